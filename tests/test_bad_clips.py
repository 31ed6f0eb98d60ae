"""Clips that cannot be read, from every source: named, left out or fatal, and never anybody else's harm."""

import ctypes
import functools
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

import dali_pipes.bad_clips
import dfer.video.random_access
from dali_pipes import halved_stream, pixels
from dali_pipes.feeding import Refused
from dali_pipes.headers import claimed_pixels, refusal
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.sources import source_of
from dali_pipes.stored import read_bytes
from dali_pipes.streaming import read_clips
from dfer.images import MAX_BYTES, MAX_PIXELS, BadImage, decode_image
from dfer.lists.index import ClipIndex, load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.video.decode import BadVideo, check_claims
from dfer.video.random_access import read_frames, scan_video
from scripts import hash_clips, pack
from tests.conftest import run_python, smooth_image
from tests.image_files import patched
from tests.oracle import oracle_clip
from tests.test_dali_pipes import EVERYTHING, SIZE, T, pillow_frames, write_video
from tests.test_train import TINY

CLIPS, BAD, FRAME = 4, 2, 3  # of the four clips the third one gets a bad fourth frame
PLAIN = Augmentation(min_crop_area=0.5, colour=0.3)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def claim(jpeg: bytes, height: int, width: int) -> bytes:
    """The same JPEG file with another size in its header."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


def flipped(data: bytes, number: int = 20) -> bytes:
    """The same file with some bits of its second half turned over."""
    changed = bytearray(data)
    for place in np.random.default_rng(1).choice(np.arange(len(data) // 2, len(data) - 4), number, replace=False):
        changed[place] ^= 0x10
    return bytes(changed)


def picture() -> Image.Image:
    return smooth_image(np.random.default_rng(5), 72, 60)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)


# What stands in the place of a frame, and what is said of it.
BAD_IMAGES = {
    "truncated": (lambda: encoded(picture())[:600], "cannot be decoded"),
    "huffman tables": (lambda: patched(encoded(picture()), b"\xff\xc4", 5, b"\xff" * 16), "cannot be decoded"),
    "header only": (lambda: encoded(picture())[:40], "states no size"),
    "garbage": (lambda: np.random.default_rng(0).bytes(3000), "neither JPEG nor PNG"),
    "text": (lambda: b"404 not found\n" * 20, "neither JPEG nor PNG"),
    "another format": (lambda: encoded(picture(), "BMP"), "neither JPEG nor PNG"),
    "truncated png": (lambda: encoded(picture(), "PNG")[:-300], "cannot be decoded"),
    "header bomb": (lambda: claim(encoded(picture()), 30000, 30000), "claims 900,000,000 pixels"),
    "png bomb": (lambda: png_bomb(), "claims 900,000,000 pixels"),
    "zero-size header": (lambda: claim(encoded(picture()), 0, 60), "states no size"),
}
GOOD_IMAGES = {
    "png renamed": lambda: encoded(picture(), "PNG"),
    "gray": lambda: encoded(picture().convert("L")),
    "cmyk": lambda: encoded(picture().convert("CMYK")),
    "16-bit png": lambda: encoded(sixteen_bits(), "PNG"),
    "one pixel": lambda: encoded(picture().resize((1, 1))),
    "progressive": lambda: encoded(picture(), progressive=True),
}
BAD_FILES = {  # frames only: what lies there is no file with bytes in it
    "missing": (lambda path: path.unlink(), "no such file or folder"),
    "empty": (lambda path: path.write_bytes(b""), "zero bytes"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "endless": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), f"more than {MAX_BYTES:,} bytes"),
}


def png_bomb() -> bytes:
    data = bytearray(encoded(picture(), "PNG"))
    data[16:24] = struct.pack(">II", 30000, 30000)
    return bytes(data)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """Four clips of T frames: in folders, in a tar, as VP9 videos."""
    root, rng = tmp_path_factory.mktemp("healthy"), np.random.default_rng(0)
    rows = [[], []]
    for clip in range(CLIPS):
        height, width = (int(x) for x in rng.integers(50, 90, 2) // 2 * 2)
        images = [smooth_image(rng, height, width) for _ in range(T)]
        (root / str(clip)).mkdir()
        for frame, image in enumerate(images):
            image.save(root / str(clip) / f"{frame}.jpg", quality=92)
        (root / "videos").mkdir(exist_ok=True)
        options = {"crf": "20", "cpu-used": "8"}
        arrays = [np.asarray(image) for image in images]
        write_video(root / "videos" / f"{clip}.webm", arrays, "libvpx-vp9", "yuv420p", options)
        rows[0].append(f"{clip} {T} {clip}\n")
        rows[1].append(f"{clip}.webm {T} {clip}\n")
    (root / "list.txt").write_text("".join(rows[0]))
    (root / "videos" / "list.txt").write_text("".join(rows[1]))
    assert pack.main([str(root / "list.txt"), "--out", str(root / "tar"), "--workers", "1"]) == 0
    return root


@pytest.fixture
def clips(healthy, tmp_path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "clips"))


def index_of(root: Path, source: str) -> ClipIndex:
    return load_index({"frames": root, "shards": root / "tar", "video": root / "videos"}[source] / "list.txt")


def put(root: Path, source: str, data: bytes) -> ClipIndex:
    """Put a file in the place of one frame."""
    index = index_of(root, source)
    if source == "frames":
        (root / str(BAD) / f"{FRAME}.jpg").write_bytes(data)
        return index
    store = index.store
    row = int(store.first[BAD]) + FRAME
    with open(store.paths[0], "ab") as file:  # behind the end, where there is room for it
        offset = file.tell()
        file.write(data)
    offsets, lengths = store.offset.copy(), store.length.copy()
    offsets[row], lengths[row] = offset, len(data)
    return replace(index, store=replace(store, offset=offsets, length=lengths))


def clip_loader(index: ClipIndex, policy: str, batch_size: int = CLIPS, **options) -> ClipLoader:
    options = {"augmentation": EVERYTHING} | options
    sampler = ClipSampler(3, T, augmentation=replace(options.pop("augmentation"), speed=1.0))  # all T frames of each
    return ClipLoader(index, sampler, LoaderOptions(batch_size, SIZE, bad_clips=policy, **options))


@functools.cache
def healthy_clips(root: Path, source: str, *options: tuple[str, object]) -> dict[tuple[int, int], torch.Tensor]:
    """(epoch, video) -> clip."""
    loader = clip_loader(index_of(root, source), "error", **dict(options))
    found = {}
    for epoch in (0, 1):
        for batch in loader(epoch):
            found |= {(epoch, int(video)): clip for video, clip in zip(batch.ids, batch.clips, strict=True)}
    assert len(found) == 2 * CLIPS
    return found


def check_policies(root: Path, source: str, index: ClipIndex, reason: str, name: str, capsys, **options) -> None:
    """Both policies on an index whose clip BAD is bad: all that is promised of them."""
    wanted = healthy_clips((root.parent / "healthy").resolve(), source, *options.items())
    with pytest.raises(ValueError) as error:
        list(clip_loader(index, "error", **options)(0))
    assert reason in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert f"list.txt:{index.records[BAD].source.rpartition(':')[2]}: " in str(error.value)

    for batch_size in (CLIPS, 1):
        capsys.readouterr()
        skipping = clip_loader(index, "skip", batch_size, **options)
        for epoch in (0, 1):
            batches = list(skipping(epoch))
            assert len(batches) == len(skipping) == CLIPS // batch_size
            for batch in batches:
                assert batch.clips.isfinite().all() and batch.clips.shape[0] == batch_size
                for video, clip, label, valid in zip(batch.ids, batch.clips, batch.labels, batch.valid, strict=True):
                    assert bool(valid) == (int(video) != BAD)
                    assert int(label) == index.labels[video]
                    if valid:
                        assert torch.equal(clip, wanted[epoch, int(video)])
                    elif batch.valid.any():  # another clip stands in, with all that is done to that one
                        assert torch.equal(clip, batch.clips[batch.valid][0])
        assert list(skipping.bad_clips) == [BAD]
        assert reason in skipping.bad_clips[BAD] and name in skipping.bad_clips[BAD]
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clip left out: ")]
        assert told == [f"clip left out: {skipping.bad_clips[BAD]}"]


@pytest.fixture
def beside(healthy, clips) -> Path:
    """The damaged copy; the healthy one lies beside it."""
    (clips.parent / "healthy").symlink_to(healthy)
    return clips


@pytest.mark.parametrize("kind", BAD_IMAGES)
@pytest.mark.parametrize("source", ["frames", "shards"])
def test_a_bad_image(beside, source, kind, capsys):
    make, reason = BAD_IMAGES[kind]
    index = put(beside, source, make())
    name = f"{FRAME}.jpg of clip {BAD}: " if source == "frames" else f"bad frame {FRAME} of clip {BAD} in "
    check_policies(beside, source, index, reason, name, capsys)


@pytest.mark.parametrize("graph", ["operators", "decoded", "streamed"])
@pytest.mark.parametrize("kind", ["huffman tables", "header bomb"])
def test_a_bad_image_in_other_graphs(beside, kind, graph, capsys):
    make, reason = BAD_IMAGES[kind]
    index = put(beside, "frames", make())
    check_policies(beside, "frames", index, reason, "3.jpg of clip 2", capsys, graph=graph)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", ["huffman tables", "truncated"])
def test_a_bad_image_of_either_half(beside, kind, half, capsys, monkeypatch):
    """In the second one the decoder of the other half refuses the batch, and it alone."""
    make, reason = BAD_IMAGES[kind]
    index = put(beside, "frames", make())
    monkeypatch.setattr(halved_stream, "by_nvjpeg", lambda videos, frames: (videos[:, None] + frames) % 2 == half)
    check_policies(beside, "frames", index, reason, "3.jpg of clip 2", capsys, graph="streamed", halved=True)


@pytest.mark.parametrize(
    ("source", "graph"), [("shards", None), ("shards", "streamed"), ("raw", None), ("raw", "streamed")]
)
def test_a_shard_that_is_cut_while_it_is_mapped(clips, source, graph, capsys):
    """Touching what is not there any more would kill the process."""
    if source == "raw":
        arguments = ["--out", str(clips / "raw"), "--format", "raw", "--workers", "1"]
        assert pack.main([str(clips / "list.txt"), *arguments]) == 0
    index = load_index(clips / {"shards": "tar", "raw": "raw"}[source] / "list.txt")
    store, frame = index.store, T - 2
    policies = {policy: clip_loader(index, policy, 1, graph=graph) for policy in ("skip", "error")}
    want = {int(batch.ids): batch.clips for batch in policies["error"](0)}
    last = int(store.offset[store.first[:-1]].argmax())
    row = int(store.first[last]) + frame
    os.truncate(store.paths[0], int(store.offset[row] + store.length[row]) - 1)
    where = rf"bad frame [{frame}{frame + 1}] of clip {index.records[last].name} in .*: the file was cut to \d"
    for batch in policies["skip"](0):
        assert bool(batch.valid) == (int(batch.ids) != last)
        assert not batch.valid or torch.equal(batch.clips, want[int(batch.ids)])
    assert list(policies["skip"].bad_clips) == [last] and re.search(where, policies["skip"].bad_clips[last])
    assert capsys.readouterr().err.count("clip left out: ") == 1
    with pytest.raises(ValueError, match=where):
        list(policies["error"](0))
    os.truncate(store.paths[0], 0)
    with pytest.raises(ValueError, match="of 4 clips cannot be read: more than 1% are not left out"):
        list(policies["skip"](0))


@pytest.mark.parametrize("missing", [2, 20, 200])
def test_an_image_without_its_end(beside, missing, capsys):
    """Even where the crop needs nothing of what is missing: whether a clip is good depends on no draw."""
    index = put(beside, "frames", encoded(picture())[:-missing])
    top = Augmentation(min_crop_area=0.1, max_crop_ratio=1.0)
    check_policies(beside, "frames", index, "cannot be decoded", "3.jpg of clip 2", capsys, augmentation=top)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_a_bad_image_among_other_types(beside, dtype, capsys):
    index = put(beside, "frames", BAD_IMAGES["truncated"][0]())
    check_policies(beside, "frames", index, "cannot be decoded", "3.jpg of clip 2", capsys, dtype=dtype)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file(beside, kind, capsys):
    spoil, reason = BAD_FILES[kind]
    index = index_of(beside, "frames")
    spoil(beside / str(BAD) / f"{FRAME}.jpg")
    check_policies(beside, "frames", index, reason, f"{FRAME}.jpg of clip {BAD}: ", capsys)


@pytest.mark.parametrize("kind", GOOD_IMAGES)
@pytest.mark.parametrize("source", ["frames", "shards"])
def test_an_odd_image_is_a_good_one(clips, source, kind):
    """Unusual, but images: they come out as the oracle has them, all 16 bits of them scaled to 8."""
    index = put(clips, source, GOOD_IMAGES[kind]())
    loader = clip_loader(index, "skip", augmentation=PLAIN)
    (batch,) = loader(0)
    assert batch.valid.all() and not loader.bad_clips
    plan = loader.sampler.plan(0, index.num_frames)
    pixels = pillow_frames(index_of(clips, "frames"))(BAD) if source == "frames" else [None] * T
    if source == "shards":
        data = (index.store.paths[0]).read_bytes()
        for frame in range(T):
            row = int(index.store.first[BAD]) + frame
            start = int(index.store.offset[row])
            with Image.open(io.BytesIO(data[start : start + int(index.store.length[row])])) as image:
                pixels[frame] = np.asarray(image.convert("RGB"))
    if kind == "16-bit png":
        pixels[FRAME] = np.asarray(picture().convert("L").convert("RGB"))
    want = oracle_clip([pixels[f] for f in plan.frames[BAD]], plan, BAD, SIZE)
    (row,) = np.flatnonzero(batch.ids.numpy() == BAD)
    step = np.abs(plan.colour[BAD, :, :3]).sum(1).max()
    assert np.abs(batch.clips[row].numpy() - want).max() <= 0.05 * step + 1e-5


def wide_video(path: Path, width: int = 8256) -> None:
    write_video(path, [np.zeros((16, width, 3), np.uint8)] * T, "mjpeg", "yuvj420p", {})


def claiming_video(path: Path) -> None:
    """A VP9 stream whose first frame header claims 16,000 x 16,000; what the container says stays as it is."""
    data = bytearray(path.read_bytes())
    place = data.index(b"\x49\x83\x42") + 3  # the sync code; then 4 bits, 16 of width - 1, 16 of height - 1
    field = int.from_bytes(data[place : place + 5], "big") & ~(0xFFFFFFFF << 4) | (15999 << 20 | 15999 << 4)
    data[place : place + 5] = field.to_bytes(5, "big")
    path.write_bytes(data)


def sound_alone(path: Path) -> None:
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BAD_VIDEOS = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10]),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "no pictures": sound_alone,
    "wide": lambda path: wide_video(path.with_suffix(".avi")) or path.with_suffix(".avi").replace(path),
    "claims": claiming_video,
}


@pytest.mark.parametrize("graph", ["fused", "operators"])
@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_a_bad_video(beside, kind, graph, capsys):
    """After the index was made."""
    if (kind, graph) == ("claims", "operators"):
        pytest.skip("what a stream claims within its container is between DALI and its decoder")
    index = index_of(beside, "video")
    BAD_VIDEOS[kind](index.records[BAD].path)
    augmentation = {"augmentation": PLAIN, "graph": graph}
    check_policies(beside, "video", index, f"{BAD}.webm", "list.txt:3: ", capsys, **augmentation)
    if kind == "truncated":  # this short, the end is within what headers may be wrong by: fewer frames are found
        assert load_index(beside / "videos" / "list.txt").num_miscounted() == 1


def long_video(path: Path) -> None:
    """More than a second of it: what is cut off of it is missed."""
    rng = np.random.default_rng(0)
    options = {"crf": "20", "cpu-used": "8"}
    write_video(path, [np.asarray(smooth_image(rng, 48, 64)) for _ in range(60)], "libvpx-vp9", "yuv420p", options)


BAD_AT_ONCE = {kind: spoil for kind, spoil in BAD_VIDEOS.items() if kind not in ("missing", "truncated")} | {
    "cut short": lambda path: long_video(path) or BAD_VIDEOS["truncated"](path),
    "text": lambda path: path.write_text("404 not found\n" * 20),
}


@pytest.mark.parametrize("graph", ["fused", "operators"])
@pytest.mark.parametrize("kind", BAD_AT_ONCE)
def test_a_video_that_is_bad_when_the_index_is_made(beside, kind, graph, capsys):
    """An error by default; left out where that is wanted, from the scan as from the cache, and the others as ever."""
    list_path = beside / "videos" / "list.txt"
    whole = load_index(list_path)
    BAD_AT_ONCE[kind](whole.records[BAD].path)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=rf"^.*list.txt:3: cannot use the video .*{BAD}\.webm \(.+\)$"):
            load_index(list_path)
        index = load_index(list_path, bad_videos="skip")
        assert list(index.bad) == [BAD] and index.num_frames.tolist() == whole.num_frames.tolist()
        for name in ("height", "width", "codec", "matrix", "full_range"):
            was, now = (np.delete(getattr(i.store, name), BAD) for i in (whole, index))
            assert np.array_equal(was, now)
        options = {"augmentation": PLAIN, "graph": graph}
        check_policies(beside, "video", index, "cannot use the video", f"{BAD}.webm", capsys, **options)
    shutil.copy(beside / "videos" / "1.webm", index.records[BAD].path)  # mended while a run is under way: next time
    assert [int(b.ids[~b.valid]) for b in clip_loader(index, "skip", **options)(0)] == [BAD]
    other = clip_loader(index, "skip", **options, rank=1, world_size=2, batch_size=1)
    assert list(other.bad_clips) == [BAD] and capsys.readouterr().err.count("clip left out") == 1  # rank 0 has said it
    assert not load_index(list_path, bad_videos="skip").bad


def test_a_video_that_could_not_be_read_for_once_is_tried_again(clips, monkeypatch):
    """It is the same file: nothing but another try can tell."""
    list_path, calls = clips / "videos" / "list.txt", []
    want = load_index(list_path, hashed=False)
    Path(f"{list_path}.index.npz").unlink()
    real = dfer.video.random_access.scan_video

    def scan(path: Path) -> dfer.video.random_access.VideoScan:
        calls.append(path)
        if path.name == "1.webm" and len(calls) <= 6:
            raise av.OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(dfer.video.random_access, "scan_video", scan)
    for number, bad in ((4, [1]), (5, [1]), (6, [1]), (11, []), (11, [])):  # scans so far
        index = load_index(list_path, bad_videos="skip")
        assert (len(calls), list(index.bad)) == (number, bad)
    assert np.array_equal(index.store.pts, want.store.pts) and index.num_frames.tolist() == want.num_frames.tolist()


def test_too_many_bad_videos_stop_a_run_at_its_start(clips):
    for video in (0, 2):
        (clips / "videos" / f"{video}.webm").write_bytes(b"")
    index = load_index(clips / "videos" / "list.txt", bad_videos="skip")
    with pytest.raises(ValueError, match=r"2\.webm \(.*\); with it, 2 of 4 clips cannot be read: more than 1% are not"):
        clip_loader(index, "skip")


def test_a_run_leaves_a_bad_video_out_and_evaluates_none(clips, tmp_path):
    bad, good = (clips / "videos" / f"{name}.txt" for name in ("list", "good"))
    good.write_text("".join(row for i, row in enumerate(bad.read_text().splitlines(keepends=True)) if i != BAD))
    (clips / "videos" / f"{BAD}.webm").write_bytes(b"")
    words = [*TINY, "--optim.epochs", "1", "--data.batch-size", "2", "--run.log-dir", str(tmp_path / "logs")]
    for train_list, val_list, options in ((good, bad, []), (bad, good, ["--data.bad-clips", "error"])):
        lists = ["--data.train-list", str(train_list), "--data.val-list", str(val_list)]
        done = run_python("train.py", *words, *lists, *options)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith(f"train.py: {bad}:3: cannot use the video "), line
    done = run_python("train.py", *words, "--data.train-list", str(bad), "--data.val-list", str(good))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("clip left out: ") == 1 and "1 of 4 training clips could not be read" in done.stdout


SHORTENED = """
import mmap, runpy, sys
import dfer.config

def touch(words):
    with open(sys.argv[1], "r+b") as file:
        bytes_of_it = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        return bytes_of_it[0]

dfer.config.parse_config = touch
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_process_that_is_killed_by_the_memory_it_touches_says_so(tmp_path):
    """What remains of it: a file that is cut between the look at its size and the one at its bytes."""
    (tmp_path / "file").write_bytes(bytes(5000))
    done = run_python("-c", SHORTENED, str(tmp_path / "file"))
    assert done.returncode == -7 and done.stderr.startswith("Fatal Python error: Bus error\n"), done.stderr


def test_a_batch_without_a_good_clip_is_zeros(clips, monkeypatch):
    monkeypatch.setattr(dali_pipes.bad_clips, "TOLERATED", 1.0)
    index = index_of(clips, "frames")
    for clip in range(CLIPS):
        (clips / str(clip) / "0.jpg").write_bytes(encoded(picture())[:450] if clip % 2 else b"")
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for graph in ("fused", "operators")[: 2 if dtype == torch.float32 else 1]:
            skipping = clip_loader(index, "skip", dtype=dtype, graph=graph)
            for batch in itertools.chain(skipping(0), skipping(1)):
                assert batch.clips.shape == (CLIPS, T, 3, SIZE, SIZE) and batch.clips.dtype == dtype
                assert not batch.valid.any() and not batch.clips.any()
            assert sorted(skipping.bad_clips) == list(range(CLIPS))


def test_a_bad_frame_that_is_not_drawn_costs_nothing_and_one_that_is_is_decoded_once(clips, monkeypatch):
    """What becomes of a clip depends on its own frames alone, never on what was seen before: runs can be resumed."""
    index = put(clips, "frames", BAD_IMAGES["huffman tables"][0]())
    sampler = ClipSampler(3, 2, augmentation=PLAIN)

    def loader() -> ClipLoader:
        return ClipLoader(index, sampler, LoaderOptions(CLIPS, SIZE, bad_clips="skip"))

    built, lasting = [], loader()
    sliced = lasting._feed._sliced[0]
    monkeypatch.setattr(sliced, "_build", lambda build=sliced._build: built.append(1) or build())
    seen = set()
    for epoch in range(12):
        (batch,), (anew,) = lasting(epoch), loader()(epoch)
        drawn = FRAME in sampler.plan(epoch, index.num_frames).frames[BAD]
        assert bool(batch.valid[batch.ids == BAD]) == (not drawn)
        assert torch.equal(batch.valid, anew.valid) and torch.equal(batch.clips, anew.clips)
        seen.add(drawn)
    assert seen == {True, False}
    assert len(built) == 3  # for the batch, the clip, the frame


@pytest.mark.parametrize("graph", ["fused", "operators"])
def test_a_bad_video_that_comes_again_is_one_bad_clip(clips, graph):
    """Where classes are balanced a video of a small class comes several times, and is left out each time."""
    index = put(clips, "frames", BAD_IMAGES["huffman tables"][0]())
    index = replace(index, labels=(np.arange(CLIPS) == BAD).astype(np.int64))
    sampler = ClipSampler(3, T, augmentation=replace(EVERYTHING, speed=1.0), balance="full")
    skipping = ClipLoader(index, sampler, LoaderOptions(CLIPS, SIZE, bad_clips="skip", graph=graph))
    for epoch in (0, 1):
        (batch,) = skipping(epoch)
        assert (batch.ids == BAD).sum() == 2 and torch.equal(batch.valid, batch.ids != BAD)
        assert torch.equal(batch.labels, (batch.ids == BAD).long()) and batch.clips.isfinite().all()
        assert not torch.equal(*batch.clips[batch.valid])
    assert list(skipping.bad_clips) == [BAD] and f"{BAD}/{FRAME}.jpg" in skipping.bad_clips[BAD]


def test_ranks_stay_in_step(clips):
    index = put(clips, "frames", BAD_IMAGES["truncated"][0]())
    ranks = [clip_loader(index, "skip", 1, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in range(3):
        steps = [list(rank(epoch)) for rank in ranks]
        assert [len(part) for part in steps] == [2, 2]
        assert sum(int(batch.valid.sum()) for part in steps for batch in part) == CLIPS - 1


def test_more_bad_clips_than_an_accident_explains_are_fatal(clips):
    index = index_of(clips, "frames")
    for clip in (1, 2):
        (clips / str(clip) / "0.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"0.jpg of clip \d: no such file or folder; with it, 2 of 4 clips cannot be read"
    ):
        list(clip_loader(index, "skip")(0))


def test_evaluation_leaves_nothing_out(clips):
    with pytest.raises(AssertionError, match="counts every clip"):
        ClipLoader(index_of(clips, "frames"), ClipSampler(0, T, mode="eval"), LoaderOptions(1, SIZE, bad_clips="skip"))


def test_an_error_that_is_no_clips_fault_is_not_blamed_on_one(clips, monkeypatch):
    loader = clip_loader(index_of(clips, "frames"), "skip")
    failures = iter([Refused("out of\nmemory")])
    real = loader._feed.pictures

    def pictures() -> torch.Tensor:
        made = real()
        for failure in failures:
            raise failure
        return made

    monkeypatch.setattr(loader._feed, "pictures", pictures)
    with pytest.raises(ValueError, match=r"not of any one clip, in the batch of .*: out of memory"):
        list(loader(0))
    assert not loader.bad_clips


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, torch.AcceleratorError])
@pytest.mark.parametrize("graph", ["decoded", "operators", "video"])
def test_only_what_dali_refuses_is_a_clips_fault(clips, monkeypatch, graph, error):
    """Neither a kernel nor an upload that fails, nor a full GPU: a good clip is not blamed, the run ends with it."""

    def fail(*args, **kwargs):
        raise error("of no clip")

    def fail_once(*args, **kwargs):
        monkeypatch.setattr(*place, real)
        fail()

    if error is not RuntimeError:
        place = Pipeline, "outputs"
    elif graph == "decoded":
        place = pixels, "of_decoded"
    else:
        place = torch, "from_dlpack"
    real = getattr(*place)
    options = {"graph": "operators", "video_decoder": "nvdec"} if graph == "video" else {"graph": graph}
    loader = clip_loader(index_of(clips, "video" if graph == "video" else "frames"), "skip", **options)
    for failure in (fail_once, fail):
        monkeypatch.setattr(*place, failure)
        with pytest.raises(error, match=r"^of no clip$"):
            list(loader(0))
    assert not loader.bad_clips


# ---- Hashes


HASHED = {  # what is damaged there, and how messages name it
    "frames": (lambda root: root / str(BAD) / f"{FRAME}.jpg", "3.jpg of clip 2: its bytes are not those"),
    "shards": (lambda root: root / "tar" / "list-00000.tar", "bad frame 3 of clip 2 in "),
    "raw": (lambda root: root / "raw" / "list-00000.raw", "bad frame 3 of clip 2 in "),
    "video": (lambda root: root / "videos" / f"{BAD}.webm", "2.webm: its bytes are not those"),
}


def spoil(index: ClipIndex, path: Path) -> None:
    """Turn over 20 bits of the bad clip's bad frame, behind its header; times and sizes stay as they were."""
    data, times = bytearray(path.read_bytes()), path.stat()
    start, end = 0, len(data)
    if index.source in ("shards", "raw"):
        row = int(index.store.first[BAD]) + FRAME
        start = int(index.store.offset[row])
        end = start + int(index.store.length[row])
    data[start:end] = flipped(bytes(data[start:end]))
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def hash_list(root: Path, source: str) -> Path:
    if source == "raw":
        args = [str(root / "list.txt"), "--out", str(root / "raw"), "--format", "raw", "--workers", "1"]
        assert pack.main(args) == 0
    path = {"frames": root, "shards": root / "tar", "raw": root / "raw", "video": root / "videos"}[source] / "list.txt"
    assert hash_clips.main([str(path)]) == 0
    return path


@pytest.mark.parametrize("source", HASHED)
def test_flipped_bits_are_found_by_hashes(clips, source, capsys):
    list_path = hash_list(clips, source)
    index = load_index(list_path)
    wanted = {int(v): clip for b in clip_loader(index, "error")(0) for v, clip in zip(b.ids, b.clips, strict=True)}
    assert hash_clips.main([str(list_path), "--verify"]) == 0
    where, name = HASHED[source]
    spoil(index, where(clips))
    index = load_index(list_path)
    streamed = ("streamed",) if source != "video" else ()
    for graph in ("fused", "operators", *streamed):
        options = {"augmentation": PLAIN, "graph": graph} if source == "video" else {"graph": graph}
        with pytest.raises(ValueError, match=re.escape(name)):
            list(clip_loader(index, "error", **options)(0))
    for graph in ("fused", *streamed):
        skipping = clip_loader(index, "skip", graph=graph)
        (batch,) = skipping(0)
        for video, clip, valid in zip(batch.ids.tolist(), batch.clips, batch.valid, strict=True):
            assert bool(valid) == (video != BAD)
            assert video == BAD or torch.equal(clip, wanted[video])
        assert list(skipping.bad_clips) == [BAD] and name in skipping.bad_clips[BAD]
    capsys.readouterr()
    assert hash_clips.main([str(list_path), "--verify"]) == 1
    told = capsys.readouterr()
    assert name in told.err and told.out == "1 of 4 clips differ\n"
    if source == "frames":  # what hashes are for: without them nobody notices
        index = load_index(list_path, hashed=False)
        (unnoticed,) = clip_loader(index, "error")(0)
        same = [torch.equal(clip, wanted[int(v)]) for v, clip in zip(unnoticed.ids, unnoticed.clips, strict=True)]
        assert index.hashes is None and same.count(False) == 1


def test_a_data_set_in_memory_is_verified_as_it_is_loaded(clips, capsys):
    arguments = ["--format", "raw", "--size", "48", "--workers", "1"]
    assert pack.main([str(clips / "list.txt"), "--out", str(clips / "raw48"), *arguments]) == 0
    list_path = clips / "raw48" / "list.txt"
    assert hash_clips.main([str(list_path)]) == 0
    index = load_index(list_path)
    whole = clip_loader(index, "error", cached=True)
    spoil(index, clips / "raw48" / "list-00000.raw")
    with pytest.raises(ValueError, match=r"bad frame 3 of clip 2 in .*list-00000.raw: its bytes"):
        clip_loader(index, "error", cached=True)
    skipping = clip_loader(index, "skip", cached=True)
    assert list(skipping.bad_clips) == [BAD]
    for epoch in (0, 1):
        (batch,), (want,) = skipping(epoch), whole(epoch)
        assert batch.clips.isfinite().all() and torch.equal(batch.valid, batch.ids != BAD) and want.valid.all()
        assert torch.equal(batch.clips[batch.valid], want.clips[batch.valid])
        assert torch.equal(batch.clips[batch.ids == BAD][0], batch.clips[batch.valid][0])  # another one stands in
    for batch in clip_loader(index, "skip", 1, cached=True)(0):
        assert bool(batch.valid) == bool(batch.ids != BAD) == bool(batch.clips.any())  # zeros, as none is good
    assert capsys.readouterr().err.count("clip left out") == 2


def test_hashes_of_a_data_set_in_memory_are_of_what_is_held(clips, monkeypatch):
    """Not of what a second look at the files finds."""
    arguments = ["--format", "raw", "--size", "48", "--workers", "1"]
    assert pack.main([str(clips / "list.txt"), "--out", str(clips / "raw48"), *arguments]) == 0
    list_path = clips / "raw48" / "list.txt"
    assert hash_clips.main([str(list_path)]) == 0
    index = load_index(list_path)
    row = index.store.first[BAD] + FRAME

    def read(files, offset, size, address, states):
        read_clips(files, offset, size, address, states)
        (ctypes.c_uint8 * 1).from_address(int(address[BAD] + index.store.offset[row] - offset[BAD, 0]))[0] ^= 1

    monkeypatch.setattr("dali_pipes.resident.read_clips", read)
    with pytest.raises(ValueError, match=r"bad frame 3 of clip 2 in .*list-00000.raw: its bytes"):
        clip_loader(index, "error", cached=True)


def test_hashes_are_those_of_the_files(clips):
    """By hand: SHA-256's first half of each file, in order of the list."""
    list_path = hash_list(clips, "frames")
    with np.load(f"{list_path}.hashes.npz") as found:
        assert found["first"].tolist() == [T * i for i in range(CLIPS + 1)]
        files = [clips / str(clip) / f"{frame}.jpg" for clip in range(CLIPS) for frame in range(T)]
        want = [hashlib.sha256(path.read_bytes()).digest()[:16] for path in files]
        assert found["digests"].tobytes() == b"".join(want)


def test_hashes_of_another_state_are_refused(clips, capsys):
    list_path = hash_list(clips, "frames")
    path = Path(f"{list_path}.hashes.npz")
    good = path.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            load_index(list_path)
        assert "\n" not in str(error.value) and f"scripts/hash_clips.py {list_path}, or delete it" in str(error.value)
        capsys.readouterr()
        assert hash_clips.main([str(list_path), "--verify"]) == 2
        assert capsys.readouterr().err.startswith("hash_clips: ")

    for data in (b"", b"garbage", good[: len(good) // 2], good[:-10]):
        path.write_bytes(data)
        refused("damaged")
    path.write_bytes(good)
    assert load_index(list_path).hashes is not None
    with np.load(io.BytesIO(good)) as found:
        entries = dict(found)
    for change, match in (
        ({"format": 2}, "format 2, this version reads 1"),
        ({"first": entries["first"][:-1]}, "do not fit together"),
        ({"first": entries["first"][None]}, "do not fit together"),
        ({"first": np.array(3)}, "do not fit together"),
        ({"digests": entries["digests"][:-1]}, "do not fit together"),
    ):
        np.savez(path, **entries | change)
        refused(match)
    path.write_bytes(good)
    (clips / "1" / "extra.jpg").write_bytes(encoded(picture()))
    refused(f"clip 1 has {T + 1} frames or files now, {T} when")
    (clips / "1" / "extra.jpg").unlink()
    list_path.write_text("".join(reversed(list_path.read_text().splitlines(keepends=True))))
    refused("of other clips than the list's")
    assert hash_clips.main([str(list_path)]) == 0  # says so, and may be written anew
    assert load_index(list_path).hashes is not None


def test_what_cannot_be_read_is_not_hashed(clips, capsys):
    list_path = clips / "list.txt"
    assert hash_clips.main([str(list_path), "--verify"]) == 2
    assert "no such file; without --verify it is written" in capsys.readouterr().err
    (clips / "1" / "2.jpg").write_bytes(b"")
    assert hash_clips.main([str(list_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hash_clips: ") and "2.jpg of clip 1: zero bytes" in told
    assert not list(clips.glob("*.hashes.npz*"))


def test_a_list_whose_hashes_could_not_be_named_is_loaded(clips, capsys):
    path = (clips / "list.txt").rename(clips / ("x" * 250))
    assert load_index(path).hashes is None
    for more, message in ((["--verify"], "no such file; without --verify"), ([], "cannot write: ")):
        assert hash_clips.main([str(path), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_hashes_that_cannot_be_written_and_shards_that_cannot_be_mapped_are_one_line(clips, monkeypatch, capsys):
    monkeypatch.setattr("dfer.lists.hashes.write_whole", raising(OSError(28, "No space left on device")))
    assert hash_clips.main([str(clips / "list.txt")]) == 2
    assert capsys.readouterr().err == "hash_clips: cannot write: No space left on device\n"
    raw, arguments = clips / "raw", ["--format", "raw", "--size", "48", "--workers", "1"]
    assert pack.main([str(clips / "list.txt"), "--out", str(raw), *arguments]) == 0
    capsys.readouterr()
    monkeypatch.setattr("dali_pipes.shard_files.mmap.mmap", raising(OSError(12, "Cannot allocate memory")))
    assert hash_clips.main([str(raw / "list.txt")]) == 2
    assert capsys.readouterr().err == f"hash_clips: {raw / 'list-00000.raw'}: Cannot allocate memory\n"


@pytest.mark.parametrize("source", ["tar", "raw"])
def test_a_pack_of_more_shards_than_may_be_open_is_one_line(clips, source, monkeypatch):
    """And what was opened is closed again; one descriptor a shard of files, two of pixels."""
    arguments = ["--workers", "1", "--shard-size", "1", *(["--format", "raw"] if source == "raw" else [])]
    assert pack.main([str(clips / "list.txt"), "--out", str(clips / "many" / source), *arguments]) == 0
    index = load_index(clips / "many" / source / "list.txt")
    index = replace(index, store=replace(index.store, paths=index.store.paths * 30))  # as if there were many
    number = len(index.store.paths)
    before = len(os.listdir("/proc/self/fd"))
    held = source_of(index)
    assert len(os.listdir("/proc/self/fd")) - before == number * (2 if source == "raw" else 1)
    if source == "raw":
        streamed = clip_loader(index, "error", graph="streamed")
        assert len(os.listdir("/proc/self/fd")) - before == 4 * number
        del streamed
    del held
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for room in (number // 2, number + number // 2)[: 2 if source == "raw" else 1]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, limits[1]))
        try:
            with pytest.raises(ValueError) as error:
                source_of(index)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert re.fullmatch(
            rf".*list-00000.{source}: Too many open files, as one of {number} shards: ulimit -n 4096, "
            "or pack the list again with a larger --shard-size",
            str(error.value),
        )
        del error  # and what its frames hold
        assert len(os.listdir("/proc/self/fd")) == before


def test_files_of_a_pack_that_fail_while_they_are_read_are_named(clips, monkeypatch):
    source = source_of(index_of(clips, "shards"))
    monkeypatch.setattr("dali_pipes.sources.os.pread", raising(OSError(5, "Input/output error")))
    with pytest.raises(ValueError, match=r"list.txt:\d+: bad frame 1 of clip 2 in .*\.tar: Input/output error$"):
        source.stored(BAD, np.array([1, 3]))


def raising(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


# ---- Headers


def segments(*parts: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(parts)


def frame_header(marker: int, height: int, width: int) -> bytes:
    return bytes([0xFF, marker, 0, 11, 8]) + struct.pack(">HH", height, width) + b"\x01\x01\x11\x00"


SCAN, APP = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00", b"\xff\xe1\x00\x20" + frame_header(0xC0, 1, 1) + bytes(17)


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (segments(frame_header(0xC0, 5, 7), SCAN), 35),
        (segments(APP, frame_header(0xC2, 5, 7), SCAN), 35),  # a thumbnail's header is none
        (segments(b"\xff" * 9, frame_header(0xC1, 5, 7), SCAN), 35),
        (segments(b"\x00noise", frame_header(0xC9, 5, 7), SCAN), 35),
        (segments(b"\xff\x01\xff\xd0", frame_header(0xC0, 65535, 65535), SCAN), 65535**2),
        (segments(frame_header(0xC4, 5, 7), frame_header(0xC8, 5, 7), frame_header(0xCC, 5, 7), SCAN), 0),
        (segments(frame_header(0xC0, 5, 7), frame_header(0xC0, 500, 700), SCAN), 350_000),
        (segments(frame_header(0xC0, 500, 700), frame_header(0xC0, 5, 7), SCAN), 350_000),
        (segments(frame_header(0xC0, 5, 7), SCAN, frame_header(0xC0, 500, 700)), 35),
        (segments(frame_header(0xC0, 5, 7)[:9]), 35),  # cut right behind its width
        (segments(frame_header(0xC0, 5, 7)[:8]), 0),
        (segments(frame_header(0xC0, 5, 7), b"\xff\xd9"), 35),
        (segments(frame_header(0xC0, 0, 7), SCAN), 0),
        (segments(SCAN, frame_header(0xC0, 5, 7)), 0),
        (segments(b"\xff\xe1\x00\x00", frame_header(0xC0, 5, 7), SCAN), 35),  # a length of nothing
        (segments(b"\xff\xe1\xff\xff", frame_header(0xC0, 5, 7), SCAN), 0),
        (b"\xff\xd8", -1),
        (b"", -1),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 7, 5) + b"\x08\x02", 35),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1), (2**31 - 1) ** 2),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIDAT" + struct.pack(">II", 7, 5), 0),
        (b"\x89PNG\r\n\x1a\r\0\0\0\rIHDR" + struct.pack(">II", 7, 5), -1),
    ],
)
def test_what_a_header_claims(data, pixels):
    assert claimed_pixels(np.frombuffer(data, np.uint8)) == pixels
    for end in range(len(data)):  # cut anywhere, it reads no byte beyond the end and claims nothing new
        assert claimed_pixels(np.frombuffer(data[:end], np.uint8)) in {pixels, 35, 350_000, 0, -1}


def test_headers_are_read_as_pillow_reads_them():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 400, (20, 2)).tolist():
        image = smooth_image(rng, height, width)
        exif = Image.Exif()
        exif[0x010E] = "\xff\xc0\x00\x11\x08 no header" * 20
        profile = {"exif": exif, "icc_profile": bytes(70000)}
        for options in ({}, {"progressive": True}, profile, {"comment": b"\xff\xc0" * 9}):
            assert claimed_pixels(np.frombuffer(encoded(image, **options), np.uint8)) == height * width
        assert claimed_pixels(np.frombuffer(encoded(image, "PNG"), np.uint8)) == height * width


def test_the_largest_image_is_an_image():
    jpeg = encoded(picture())
    assert refusal(np.frombuffer(claim(jpeg, 4096, 4096), np.uint8)) is None
    assert "16,781,312 pixels" in refusal(np.frombuffer(claim(jpeg, 4097, 4096), np.uint8))
    assert MAX_PIXELS == 4096 * 4096


def test_a_long_file_is_read_whole_and_an_endless_one_not(tmp_path):
    for size in (0, 1, 65535, 65536, 65537, 3 * 65536, 200_001):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(data)
        assert bytes(read_bytes(tmp_path / "file", 200_001)) == data
    (tmp_path / "file").write_bytes(bytes(4 * 65536))
    assert read_bytes(tmp_path / "file", 200_001) == "more than 200,001 bytes"


def test_a_video_that_claims_too_much_is_refused_before_it_is_decoded(clips):
    path = clips / "videos" / f"{BAD}.webm"
    scan = scan_video(path)
    check_claims(path)
    claiming_video(path)
    for work in (
        lambda: scan_video(path),
        lambda: read_frames(path, scan.pts, scan.key, np.arange(T), scan.matrix, scan.full_range),
    ):
        with pytest.raises(av.ArgumentError):  # no memory was taken; what was decoded is another error
            work()
    wide_video(clips / "wide.avi")
    with pytest.raises(BadVideo, match="8256 x 16 pixels, more than 8192"):
        check_claims(clips / "wide.avi")
    wide_video(clips / "wide.avi", 8192)
    check_claims(clips / "wide.avi")


BOMBS = """
import json, sys
from pathlib import Path
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.index import load_index
from dfer.plan.sampling import ClipSampler
from scripts import check_list, pack

def memory(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

def run(name, work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, said = memory("VmRSS"), ""
    try:
        said = str(work())
    except (ValueError, SystemExit) as error:
        said = str(error)
    found[name] = [said, memory("VmHWM") - before]

good, bad, out = (Path(word) for word in sys.argv[1:])
found = {}
for kind in ("list.txt", "videos/list.txt"):
    def load(folder, kind=kind):
        index = load_index(good / kind)
        for video, record in enumerate(index.records):
            index.records[video] = type(record)(**{**vars(record), "path": folder / Path(kind).parent / record.name})
        loader = ClipLoader(index, ClipSampler(0, 6), LoaderOptions(batch_size=4, size=40))
        list(loader(0))
    load(good)
    run("loader " + kind, lambda: load(bad))
check_list.main([str(good / "list.txt"), "--label-base", "0"])
report = ["--label-base", "0", "--decode", "--report", str(out) + ".report"]
run("check_list", lambda: check_list.main([str(bad / "list.txt"), *report]))
run("pack", lambda: pack.main([str(bad / "list.txt"), "--out", str(out)]))
print(json.dumps(found))
"""


def test_bombs_take_no_memory(healthy, clips, tmp_path):
    """4 kB that claim 2.7 GB, in every place: without the check DALI takes all of it."""
    for clip in range(CLIPS):
        for frame in range(T):
            path = clips / str(clip) / f"{frame}.jpg"
            path.write_bytes(claim(path.read_bytes(), 30000, 30000))
        claiming_video(clips / "videos" / f"{clip}.webm")
    done = run_python("-c", BOMBS, str(healthy), str(clips), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"loader list.txt", "loader videos/list.txt", "check_list", "pack"}
    assert "claims 900,000,000 pixels" in found["loader list.txt"][0]
    assert ".webm" in found["loader videos/list.txt"][0]
    assert "bad images" in Path(f"{tmp_path / 'out'}.report").read_text()
    assert found["pack"][0] == "2"
    for name, (_, growth) in found.items():
        assert growth < 200, f"{name}: {growth:.0f} MiB"


def test_what_may_be_packed_is_what_may_be_loaded():
    for height, width in ((4097, 4096), (13000, 13000), (30000, 30000)):  # Pillow itself refuses only the last one
        with pytest.raises(BadImage, match=r"claims .* pixels"):
            decode_image(claim(encoded(picture()), height, width))
    assert np.array_equal(decode_image(encoded(sixteen_bits(), "PNG")), picture().convert("L").convert("RGB"))


def test_all_kinds_of_damage_are_there():
    """Guards the tables above."""
    assert len(BAD_IMAGES) + len(GOOD_IMAGES) + len(BAD_FILES) >= 13 and len(BAD_VIDEOS) >= 6
