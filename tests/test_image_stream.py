"""Images decoded on the cores for a GPU: the batches of the CPU's graph, from files of all kinds.

On a CPU, where the kernel is the CPU's; tests/test_dali_pipes.py has what needs a GPU, and test_bad_clips.py and
test_reading.py what all ways to load have in common.
"""

import contextlib
import gc
import os
import shutil
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from dali_pipes import halved_stream, image_stream
from dali_pipes.options import LoaderOptions
from dfer.cli import UserError
from dfer.lists.index import ClipIndex, load_index
from scripts import pack
from tests.image_files import app1_exif, exif, inserted, jpeg, png
from tests.test_jpeg import image
from tests.test_kernels import EVERYTHING
from tests.test_streaming import check_same, loader

CLIPS = 11
KINDS = {"420": {"subsampling": 2}, "422": {"subsampling": 1}, "444": {"subsampling": 0, "quality": 99}}


@pytest.fixture(scope="module")
def indexes(tmp_path_factory) -> dict[str, ClipIndex]:
    """Clips that differ in size, length and sampling. One is progressive, of one a frame is a PNG, of one turned."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for clip in range(CLIPS):
        count, (height, width) = int(rng.integers(2, 10)), rng.integers(20, 150, 2).tolist()
        (root / str(clip)).mkdir()
        for frame in range(count):
            picture = ImageChops.offset(image(rng, height, width, "waves" if clip % 2 else "edges"), 3 * frame)
            data = jpeg(picture, progressive=clip == 3, **list(KINDS.values())[clip % 3])
            if (clip, frame) in ((5, 1), (6, 0)):
                data = png(picture) if clip == 5 else inserted(data, app1_exif(exif(3)))
            (root / str(clip) / f"{frame}.jpg").write_bytes(data)
        rows.append(f"{clip} {count} {clip % 7}\n")
    (root / "list.txt").write_text("".join(rows))
    assert pack.main([str(root / "list.txt"), "--out", str(root / "tar"), "--workers", "1"]) == 0
    return {"frames": load_index(root / "list.txt"), "shards": load_index(root / "tar" / "list.txt")}


@pytest.mark.parametrize("source", ["frames", "shards"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("train", {}),
        ("train", {"halved": True, "num_threads": 3}),
        ("train", {"halved": True, "frames_per_segment": 2, "batch_size": CLIPS}),
        ("train", {"dtype": torch.bfloat16, "frames_per_segment": 2, "balance": "full"}),
        ("train", {"augmentation": replace(EVERYTHING, mixup=0.8, cutmix=1.0), "num_threads": 7, "batch_size": 10}),
        ("eval", {"rank": 1, "world_size": 2, "batch_size": 5, "num_threads": 1}),
    ],
    ids=["train", "halved", "halved pairs", "pairs of frames", "mixed", "ranks"],
)
def test_batches_are_those_of_the_cpus_graph(indexes, source, mode, options):
    """The decoders of both halves round alike on a CPU."""
    streamed, fused = (loader(indexes[source], graph, mode, **options) for graph in ("streamed", "fused"))
    for epoch in (0, 3):
        assert check_same(streamed(epoch), fused(epoch)) == len(fused) > 0
    assert check_same(streamed(1, start_step=1), fused(1, start_step=1)) == len(fused) - 1


@pytest.mark.parametrize("source", ["frames", "shards"])
def test_files_that_are_too_large_for_their_room_are_the_same_clips(indexes, source, monkeypatch):
    """And there is room for them afterwards."""
    index = indexes[source]
    want = list(loader(index, "fused")(0))
    monkeypatch.setattr(image_stream, "_STRIDE", 64)
    streamed, apart = loader(index), []
    decode = image_stream.ImageStream._decode
    monkeypatch.setattr(image_stream.ImageStream, "_decode", lambda *args: apart.append(args[3]) or decode(*args))
    for _ in range(4):
        apart.clear()
        assert check_same(streamed(0), want) == 3
    assert set(apart) <= {3, 5, 6}
    monkeypatch.setattr(image_stream, "_LIMIT", 64)
    apart.clear()
    assert check_same(loader(index)(0), want) == 3 and len(set(apart)) == 9


def test_what_hangs_is_named(indexes, tmp_path):
    """The clip that is being read, in whatever part of a batch it is."""
    for hanging in (1, 7):
        folder = tmp_path / str(hanging)
        shutil.copytree(indexes["frames"].records[0].path.parent, folder)
        rows = [f"{clip} {count} 0" for clip, count in enumerate(indexes["frames"].num_frames)]
        (folder / "list.txt").write_text("\n".join(rows) + "\n")
        index = load_index(folder / "list.txt")
        for frame in (folder / str(hanging)).iterdir():
            frame.unlink()
            os.mkfifo(frame)
        with pytest.raises(UserError, match=rf"reading clip {hanging} .* has taken more than 0\.5 s"):
            list(loader(index, batch_size=CLIPS, patience=0.5)(0))
        while any(thread.name == "clip reader" for thread in threading.enumerate()):  # which now may end
            for frame in (folder / str(hanging)).iterdir():
                with contextlib.suppress(OSError):  # nobody reads it
                    os.close(os.open(frame, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("header", ["none", "plain"])
def test_a_clip_that_is_left_out_holds_no_memory(indexes, tmp_path, halved, header):
    shutil.copytree(indexes["frames"].records[0].path.parent, tmp_path / "data")
    for frame in (tmp_path / "data" / "4").iterdir():
        data = frame.read_bytes()
        tables = data.index(b"\xff\xc4") + 5  # which no decoder takes
        damaged = data[:tables] + b"\xff" * 16 + data[tables + 16 :]
        frame.write_bytes(damaged if header == "plain" else b"\xff\xd8 no picture")
    index = load_index(tmp_path / "data" / "list.txt")
    streamed = loader(index, bad_clips="skip", batch_size=CLIPS, halved=halved)
    list(streamed(0))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert sum(int((~batch.valid).sum()) for batch in streamed(0)) == 1
        assert not [held for held in gc.get_objects() if issubclass(type(held), image_stream.Crops)]
    finally:
        gc.enable()


def test_pictures_of_all_sizes_and_boxes_are_cut_alike(tmp_path):
    """Those that are decoded in compiled code, and those that are not."""
    rng, rows = np.random.default_rng(1), []
    for clip in range(12):
        (tmp_path / str(clip)).mkdir()
        picture = Image.fromarray(rng.integers(0, 256, (*rng.integers(1, 40, 2), 3), dtype=np.uint8))
        (tmp_path / str(clip) / "0.jpg").write_bytes(jpeg(picture) if clip % 2 else png(picture))
        rows.append(f"{clip} 1 {clip % 7}\n")
    (tmp_path / "list.txt").write_text("".join(rows))
    index = load_index(tmp_path / "list.txt")
    for epoch in range(10):
        assert check_same(loader(index)(epoch), loader(index, "fused")(epoch)) == 4


@pytest.mark.parametrize("options", [{"jpeg_engine": None}, {"halved": True}], ids=str)
def test_the_cores_decode_for_a_gpu_where_they_are_asked_to(options):
    gpu = LoaderOptions(2, 16, device="gpu", **options)
    assert [gpu.route(source) for source in ("frames", "shards", "video")] == ["streamed", "streamed", "operators"]


def test_halves_are_decoded_apart(indexes, monkeypatch):
    """Of each clip the frames whose number and the video's make an even sum, whatever the batch, the other frames of
    the clip, and the room for files, which grows."""
    index, decoded, real = indexes["frames"], [], halved_stream.HalvedStream._schedule
    files_of = {file.read_bytes(): file for record in index.records for file in record.path.iterdir()}

    def watch(stream, number, files):
        for data, length in zip(files.data, files.lengths[:, 0], strict=True):
            file = files_of[data[:length].tobytes()]
            decoded.append((int(file.parent.name), int(file.stem)))
        real(stream, number, files)

    monkeypatch.setattr(halved_stream.HalvedStream, "_schedule", watch)
    for batch_size, stride in ((3, 2**16), (CLIPS, 2**16), (3, 64), (3, 2048)):
        decoded.clear()
        monkeypatch.setattr(image_stream, "_STRIDE", stride)
        halved = loader(index, halved=True, batch_size=batch_size, mode="eval")
        list(halved(0))
        plan = halved.sampler.plan(0, index.num_frames, index.labels)
        asked = {(video, frame) for video, frames in enumerate(plan.frames.tolist()) for frame in frames}
        assert {*decoded} == {(video, frame) for video, frame in asked if (video + frame) % 2 == 0}
        assert {3, 5, 6} < {video for video, _ in decoded}  # clips with a frame that is not for compiled code


def test_threads_that_keep_files_do_not_meet(tmp_path):
    """Each for the parts of one batch, of which all frames are odd."""
    rng, rows = np.random.default_rng(2), []
    for clip in range(64):
        (tmp_path / str(clip)).mkdir()
        for frame in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            (tmp_path / str(clip) / f"{frame}.jpg").write_bytes(jpeg(picture, progressive=True))
        rows.append(f"{clip} 2 {clip % 7}\n")
    (tmp_path / "list.txt").write_text("".join(rows))
    index, options = load_index(tmp_path / "list.txt"), {"batch_size": 64, "num_threads": 16}
    halved, fused = loader(index, halved=True, **options), loader(index, "fused", **options)
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        for epoch in range(30):
            (batch,) = halved(epoch)
            assert batch.valid.all()
    finally:
        sys.setswitchinterval(interval)
    assert check_same(halved(40), fused(40)) == 1


def test_an_epoch_that_is_left_gives_its_pipelines_back(indexes):
    index = indexes["frames"]
    halved, fused = loader(index, halved=True), loader(index, "fused")
    stream, plan = halved._stream, halved._plan(0)
    for _ in range(3):
        epoch = stream.begin(plan, halved._shard(plan)[0])
        for begun in epoch._ahead:
            assert all(job.result() is None for job in begun.jobs)
            stream.start(begun)
        assert not stream._idle  # both are decoding
        epoch.close()
        del epoch, begun
        gc.collect()
        assert sorted(stream._dropped) == [0, 1]
    assert check_same(halved(9), fused(9)) == 3
    assert sorted(stream._idle) == [0, 1] and not stream._dropped
