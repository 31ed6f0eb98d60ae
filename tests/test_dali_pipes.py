"""The loader against a stupid oracle: four sources, two graphs, every augmentation."""

import os
import threading
import time
import weakref
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from dali_pipes import feeding
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.annotations import read_annotations
from dfer.lists.index import ClipIndex, build_index, load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler, shard
from dfer.video.decode import decode
from scripts import pack
from tests.conftest import no_waiting, run_python, smooth_image
from tests.oracle import oracle_clip

SIZE, T = 40, 6
# Everything that the plan can ask for; and what stays inside the DALI graph on a GPU.
EVERYTHING = Augmentation(
    min_crop_area=0.1, max_crop_ratio=1.4, colour=0.3, hue=0.1, grayscale=0.2, rotation=15.0, blur=0.4, erase=0.5,
    speed=2.0, reverse=0.5, randaugment=1,
)  # fmt: skip
PLAIN = Augmentation(min_crop_area=0.1, colour=0.3)
VIDEOS = {  # codec, file ending, pixel format, options
    "h264": ("libx264", "mp4", "yuv420p", {"crf": "12", "bf": "3"}),
    "hevc": ("libx265", "mkv", "yuv420p", {"crf": "12", "x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "vp9": ("libvpx-vp9", "webm", "yuv420p", {"crf": "12"}),
    "mpeg4": ("mpeg4", "avi", "yuv420p", {"q": "2"}),
    "mjpeg": ("mjpeg", "avi", "yuvj420p", {"q": "2"}),
    "h264-709": ("libx264", "mp4", "yuv420p", {"crf": "12", "x264-params": "colormatrix=bt709"}),
    "h264-444": ("libx264", "mp4", "yuv444p", {"crf": "12"}),
}


def write_video(path, images: list[np.ndarray], codec: str, pixels: str, options: dict) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.options = pixels, options
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_videos(folder, kind: str, scale: int = 1) -> ClipIndex:
    """Six moving clips of one codec, of two sizes."""
    codec, ending, pixels, options = VIDEOS[kind]
    folder.mkdir()
    rows = []
    for i in range(6):
        rng = np.random.default_rng(i)
        height, width = (scale * side for side in ((64, 96), (98, 70))[i % 2])
        still = np.asarray(smooth_image(rng, height, 2 * width)).copy()
        images = [still[:, 2 * f : 2 * f + width] for f in range(int(rng.integers(4, 25)))]
        write_video(folder / f"{i}.{ending}", images, codec, pixels, options)
        rows.append(f"{i}.{ending} {len(images)} {i % 7}")
    (folder / "list.txt").write_text("\n".join(rows) + "\n")
    return build_index(read_annotations(folder / "list.txt"))


@pytest.fixture(scope="session")
def indexes(clips, tmp_path_factory) -> dict[tuple[str, str], ClipIndex]:
    """(source, list) -> index; the packs are of the very frames that lie in the folders."""
    out = tmp_path_factory.mktemp("packs")
    found = {}
    for name in ("train", "test"):
        for source in ("shards", "raw"):
            folder = out / f"{name}-{source}"
            args = [str(clips / f"{name}.txt"), "--out", str(folder), "--format", source, "--workers", "1"]
            assert pack.main(args) == 0
            found[source, name] = load_index(folder / f"{name}.txt")
        found["frames", name] = build_index(read_annotations(clips / f"{name}.txt"))
    return found


def loader(index, mode="train", batch_size=4, seed=0, augmentation=PLAIN, **kwargs) -> ClipLoader:
    sampler = ClipSampler(seed, T, mode=mode, augmentation=augmentation)
    return ClipLoader(index, sampler, LoaderOptions(batch_size, SIZE, **kwargs))


def check_against_oracle(clip_loader, epoch, pixels, worst, mean) -> list[int]:
    """Differences in steps of 255. `pixels(video)` gives all frames of a video. Returns the ids seen."""
    index, seen = clip_loader.index, []
    plan = clip_loader.sampler.plan(epoch, index.num_frames)
    for batch in clip_loader(epoch):
        assert batch.clips.shape[1:] == (T, 3, SIZE, SIZE) and batch.clips.dtype == torch.float32
        for clip, label, video in zip(batch.clips.cpu(), batch.labels.tolist(), batch.ids.tolist(), strict=True):
            frames = pixels(video)
            want = oracle_clip([frames[f] for f in plan.frames[video]], plan, video, SIZE)
            # what one step of 255 in all three channels makes in normalised units
            step = np.abs(plan.colour[video, :, :3]).sum(1).max()
            difference = np.abs(clip.numpy() - want)
            assert difference.max() <= worst * step + 1e-5 and difference.mean() <= mean * step + 1e-5
            assert label == index.records[video].label
            seen.append(video)
    return seen


def pillow_frames(index):
    def pixels(video: int) -> list[np.ndarray]:
        paths = [index.frame_path(video, f) for f in range(index.num_frames[video])]
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    return pixels


GRAPHS = [(source, graph) for source in ("frames", "shards", "raw") for graph in ("fused", "operators")]


@pytest.mark.parametrize("augmentation", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("source", "graph"),
    [*GRAPHS, *((s, "decoded") for s in ("frames", "shards")), *((s, "streamed") for s in ("frames", "shards", "raw"))],
)
def test_clips_equal_the_oracle(indexes, source, graph, augmentation):
    for mode, name in (("train", "train"), ("eval", "test")):
        clip_loader = loader(indexes[source, name], mode, augmentation=augmentation, graph=graph)
        pixels = pillow_frames(indexes["frames", name])
        seen = check_against_oracle(clip_loader, 3, pixels, worst=0.05, mean=0.002)
        assert len(seen) == {"train": 20, "eval": 12}[mode]  # eval: 9 clips padded to 12


def test_sources_give_the_same_bits(indexes):
    batches = [list(loader(indexes[s, "train"], augmentation=EVERYTHING)(1)) for s in ("frames", "shards", "raw")]
    for frames, shards, raw in zip(*batches, strict=True):
        assert torch.equal(frames.clips, shards.clips) and torch.equal(frames.clips, raw.clips)
        assert torch.equal(frames.ids, raw.ids) and torch.equal(frames.labels, raw.labels)


@pytest.mark.parametrize("source", ["frames", "shards", "raw"])
def test_clips_do_not_depend_on_how_many_frames_a_sample_has(indexes, source, monkeypatch):
    alone = [batch.clips for batch in loader(indexes[source, "train"], augmentation=EVERYTHING)(1)]
    shapes, feed = [], Pipeline.feed_input
    monkeypatch.setattr(
        Pipeline, "feed_input", lambda self, name, data: shapes.append(data.shape[:2]) or feed(self, name, data)
    )
    for shares, frames in ((1, T), (4, T // 2), (32, 1)):
        monkeypatch.setattr(feeding, "_SHARES", shares)
        together = [batch.clips for batch in loader(indexes[source, "train"], augmentation=EVERYTHING)(1)]
        assert (4 * T // frames, frames) in shapes and len({shape[0] for shape in shapes}) == 1
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        shapes.clear()


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_equal_the_oracle(tmp_path, kind):
    """The oracle converts colours first, rounds and clamps; the kernel does it last, without rounding."""
    index = write_videos(tmp_path / "videos", kind)
    assert index.source == "video" and index.store.matrix[0] == ("bt709" if kind == "h264-709" else "bt601")

    def pixels(video: int) -> list[np.ndarray]:
        return [np.asarray(image) for _, image in decode(index.records[video].path)]

    for augmentation in (PLAIN, EVERYTHING):
        clip_loader = loader(index, batch_size=3, augmentation=augmentation)
        assert sorted(check_against_oracle(clip_loader, 2, pixels, worst=4, mean=0.5)) == list(range(6))
    if kind == "vp9":  # which DALI decodes on a CPU too
        clip_loader = loader(index, batch_size=3, augmentation=PLAIN, graph="operators", video_decoder="nvdec")
        assert all(clip_loader._source.is_for_nvdec(video) for video in range(6))
        assert len(check_against_oracle(clip_loader, 2, pixels, worst=8, mean=1)) == 6


UNEQUAL = np.array([0] * 18 + [1, 2])  # classes of 18, 1 and 1 videos


@pytest.mark.parametrize(("source", "graph"), [("frames", "fused"), ("frames", "operators"), ("video", "fused")])
def test_balanced_clips_equal_the_oracle(indexes, tmp_path, source, graph):
    """A video that comes again comes as another clip; its label is its own."""
    if source == "video":
        folder = tmp_path / "videos"
        write_videos(folder, "h264")
        images = [np.asarray(smooth_image(np.random.default_rng(f), 64, 96)) for f in range(9)]
        codec, _, colours, options = VIDEOS["h264-709"]  # of the videos that come again
        write_video(folder / "5.mp4", images, codec, colours, options)
        (folder / "list.txt.index.npz").unlink(missing_ok=True)
        index = build_index(read_annotations(folder / "list.txt"))
        assert index.store.matrix[[0, 5]].tolist() == ["bt601", "bt709"]
        worst, pixels = 4, lambda video: [np.asarray(image) for _, image in decode(index.records[video].path)]
    else:
        index = indexes[source, "train"]
        worst, pixels = 0.1, pillow_frames(index)
    index = replace(index, labels=UNEQUAL[-len(index) :])
    sampler = ClipSampler(0, T, augmentation=EVERYTHING, balance="full")
    plan, seen = sampler.plan(1, index.num_frames, index.labels), []
    for step, batch in enumerate(ClipLoader(index, sampler, LoaderOptions(3, SIZE, graph=graph))(1)):
        for place, (clip, label, video) in enumerate(zip(batch.clips, batch.labels, batch.ids.tolist(), strict=True)):
            row = plan.order[3 * step + place]
            assert plan.video[row] == video and label == index.labels[video]
            frames = pixels(video)
            want = oracle_clip([frames[f] for f in plan.frames[row]], plan, row, SIZE)
            bound = worst * np.abs(plan.colour[row, :, :3]).sum(1).max()
            assert np.abs(clip.numpy() - want).max() <= bound + 1e-4
            seen.append(video)
    assert seen.count(len(index) - 1) >= len(seen) // 4


@pytest.mark.parametrize("balance", ["none", "full"])
def test_a_resident_data_set_gives_the_same_clips(indexes, balance):
    """Of clips that differ in size."""
    index = replace(indexes["raw", "train"], labels=UNEQUAL)
    sampler = ClipSampler(0, T, augmentation=EVERYTHING, balance=balance)
    streamed, resident = (ClipLoader(index, sampler, LoaderOptions(4, SIZE, cached=c))(4) for c in (False, True))
    for a, b in zip(streamed, resident, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.valid, b.valid)
        assert torch.equal(a.clips, b.clips) and torch.equal(a.labels, b.labels)
        assert b.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_resident_is_refused(indexes):
    with pytest.raises(ValueError, match="these are frames"):
        loader(indexes["frames", "train"], cached=True)
    with pytest.raises(ValueError, match="uint8 come from the CPU kernel only"):
        loader(indexes["raw", "train"], cached=True, dtype=torch.uint8)


def test_other_types(indexes):
    index = indexes["raw", "test"]
    floats, halves, bytes_ = (
        next(iter(loader(index, "eval", 9, dtype=dtype)(0))).clips
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
    )
    assert torch.equal(halves, floats.bfloat16()) and bytes_.dtype == torch.uint8
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert ((bytes_ / 255 - mean) / std - floats).abs().max() < 0.6 / 255 / 0.224


def test_batches_are_views_in_channels_last_order_and_stay_valid(indexes):
    held = [(batch, batch.clips.clone()) for batch in loader(indexes["frames", "train"])(epoch=0)]
    for batch, copy in held:  # decoding later batches must not write into earlier ones
        assert torch.equal(batch.clips, copy)
        assert batch.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("source", ["frames", "shards", "raw"])
def test_order_start_step_and_early_exit(indexes, source):
    clip_loader = loader(indexes[source, "train"])
    assert len(clip_loader) == 5
    whole = list(clip_loader(epoch=1))
    plan = clip_loader.sampler.plan(1, clip_loader.index.num_frames)
    assert torch.cat([b.ids for b in whole]).tolist() == plan.order.tolist()
    next(iter(clip_loader(epoch=0)))  # left after one batch: nothing of it may leak into the next epoch
    rest = list(clip_loader(epoch=1, start_step=2))
    assert len(rest) == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.clips, b.clips) and torch.equal(a.ids, b.ids)


@pytest.mark.parametrize("source", ["frames", "raw", "video"])
def test_clips_do_not_depend_on_batch_ranks_or_threads(indexes, tmp_path, source):
    index = write_videos(tmp_path / "videos", "h264") if source == "video" else indexes[source, "test"]
    n = len(index)
    want = {int(v): c for b in loader(index, "eval", n)(0) for v, c in zip(b.ids, b.clips, strict=True)}
    for world, batch, threads in ((1, 2, 1), (2, 2, 2), (4, 3, 1)):
        seen = []
        for rank in range(world):
            part = loader(index, "eval", batch, rank=rank, world_size=world, num_threads=threads)
            assert len(part) == len(shard(np.arange(n), rank, world, batch, pad=True)[0])
            for b in part(0):
                for video, clip, valid in zip(b.ids.tolist(), b.clips, b.valid.tolist(), strict=True):
                    assert torch.equal(clip, want[video])
                    seen += [video] * valid
        assert sorted(seen) == list(range(n))


def two_clips(folder) -> list[str]:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(T):
            smooth_image(rng, 64, 64).save(folder / name / f"{i}.jpg")
    (folder / "list.txt").write_text(f"a {T} 0\nb {T} 1\n")
    return folder / "list.txt"


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_a_bad_frame_is_named(tmp_path, damage):
    index = build_index(read_annotations(two_clips(tmp_path)))
    bad = tmp_path / "b" / "3.jpg"
    data = bad.read_bytes()
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes({"empty": b"", "garbage": b"not a jpeg" * 50, "truncated": data[: len(data) // 2]}[damage])
    with pytest.raises(ValueError, match=r"list.txt:2: bad frame .*3\.jpg of clip b: ") as error:
        list(loader(index, "eval", 2)(0))
    assert "\n" not in str(error.value)


def test_a_bad_frame_in_a_shard_is_named(tmp_path):
    assert pack.main([str(two_clips(tmp_path)), "--out", str(tmp_path / "out")]) == 0
    index = load_index(tmp_path / "out" / "list.txt")
    shard_path = index.store.paths[0]
    data = bytearray(shard_path.read_bytes())
    start = int(index.store.offset[T + 3])
    data[start : start + 40] = bytes(40)
    shard_path.write_bytes(data)
    with pytest.raises(ValueError, match=r"list.txt:\d+: bad frame 3 of clip b in .*list-00000.tar: ") as error:
        list(loader(index, "eval", 2)(0))
    assert "\n" not in str(error.value)


def test_a_bad_video_is_named(tmp_path):
    index = write_videos(tmp_path / "videos", "h264")
    path = index.records[4].path
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"list.txt:5: cannot decode the video .*4\.mp4: ") as error:
        list(loader(index, "eval", 2)(0))
    assert "\n" not in str(error.value)


def test_storage_that_hangs_is_reported_and_not_waited_for(tmp_path):
    """A named pipe that nobody writes to: whoever opens it is stuck in the system call, as on a dead network disk."""
    list_path = two_clips(tmp_path)
    build_index(read_annotations(list_path))
    (tmp_path / "b" / "3.jpg").unlink()
    os.mkfifo(tmp_path / "b" / "3.jpg")
    script = (
        "from dali_pipes.loader import ClipLoader; from dali_pipes.options import LoaderOptions\n"
        "from dfer.lists.index import load_index; from dfer.plan.sampling import ClipSampler\n"
        f"index = load_index({str(list_path)!r})\n"
        f"options = LoaderOptions(batch_size=2, size={SIZE}, patience=0.5)\n"
        f"loader = ClipLoader(index, ClipSampler(0, {T}, mode='eval'), options)\n"
        "try: list(loader(0))\n"
        "except ValueError as error: print(error)\n"
    )
    began = time.monotonic()
    done = run_python("-c", script, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "list.txt:2: reading clip b" in done.stdout and "more than 0.5 s (1 of 2 clips" in done.stdout
    assert time.monotonic() - began < 60


def test_a_clip_that_comes_just_after_its_time_was_up_is_named_too(tmp_path, monkeypatch):
    """By the time the message is made, nothing may be waiting any more."""
    list_path = two_clips(tmp_path)
    clip_loader = loader(build_index(read_annotations(list_path)), "eval", 2, patience=0.5)
    read = clip_loader._source.read

    def late(videos, frames, out, states):
        if 1 in videos:
            raise TimeoutError  # as Future.result does, of a future that is done when it is asked again
        read(videos, frames, out, states)

    monkeypatch.setattr(clip_loader._source, "read", late)
    with pytest.raises(ValueError, match=r"list.txt:2: reading clip b .* more than 0.5 s \(1 of 2 clips"):
        list(clip_loader(0))


def test_readers_end_with_the_epoch(indexes):
    clip_loader = loader(indexes["frames", "train"])
    before = threading.active_count()
    for _ in range(3):
        next(iter(clip_loader(0)))
        list(clip_loader(0))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("graph", [None, "operators", "streamed"])
@pytest.mark.parametrize("source", ["frames", "shards", "raw"])
def test_gpu_clips_are_close_to_the_oracle(indexes, source, graph, augmentation):
    """nvJPEG rounds its inverse DCT and chroma differently: a few steps of 255 at most."""
    clip_loader = loader(indexes[source, "train"], augmentation=augmentation, graph=graph, device="gpu", device_id=0)
    assert all(b.clips.is_cuda for b in clip_loader(0))
    worst, mean = (0.05, 0.002) if source == "raw" or graph == "streamed" else (12, 1)
    pixels = pillow_frames(indexes["frames", "train"])
    assert len(check_against_oracle(clip_loader, 3, pixels, worst, mean)) == 20


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1, 3], ids=["small", "large"])
@pytest.mark.parametrize("decoder", ["cores", "nvdec"])
@pytest.mark.parametrize("kind", VIDEOS)
def test_gpu_videos_are_close_to_the_oracle(tmp_path, kind, decoder, scale):
    index = write_videos(tmp_path / "videos", kind, scale)

    def pixels(video: int) -> list[np.ndarray]:
        return [np.asarray(image) for _, image in decode(index.records[video].path)]

    clip_loader = loader(index, batch_size=3, augmentation=EVERYTHING, device="gpu", device_id=0, video_decoder=decoder)
    assert len(check_against_oracle(clip_loader, 2, pixels, worst=12, mean=1.5)) == 6
    if decoder == "nvdec":  # HEVC below 144 px a side and VP9 below 128, which the H200's driver has refused, are not
        by_nvdec = {clip_loader._source.is_for_nvdec(video) for video in range(6)}
        assert by_nvdec == {kind in ("h264", "h264-709") or (kind in ("hevc", "vp9") and scale == 3)}


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [False, True], ids=["streamed", "resident"])
@pytest.mark.parametrize("augmentation", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_raw_clips_on_a_gpu_are_those_of_the_cpu(indexes, augmentation, cached):
    index, where = indexes["raw", "train"], {"cached": cached, "device": "gpu", "device_id": 0}
    whole = list(loader(index, augmentation=augmentation)(4))
    on_gpu = loader(index, augmentation=augmentation, **where)
    halves = loader(index, augmentation=augmentation, dtype=torch.bfloat16, **where)
    for a, b, c in zip(whole, on_gpu(4), halves(4), strict=True):
        assert torch.equal(a.ids, b.ids) and b.clips.is_cuda and c.clips.dtype == torch.bfloat16
        assert (a.clips - b.clips.cpu()).abs().max() < 5e-3
        torch.testing.assert_close(c.clips, b.clips.bfloat16(), rtol=2**-7, atol=1e-5)
        assert b.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    rest = list(on_gpu(4, start_step=3))
    assert [torch.equal(a.clips, b.clips) for a, b in zip(list(on_gpu(4))[3:], rest, strict=True)] == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["frames", "frames by the cores", "halved", "shards", "raw", "held", "video"])
def test_making_a_batch_waits_for_nothing_that_the_gpu_does(indexes, source, tmp_path):
    """But for DALI, of whose waiting torch does not hear."""
    stored = {"held": "raw", "frames by the cores": "frames", "halved": "frames"}.get(source, source)
    index = write_videos(tmp_path / "videos", "h264", 1) if source == "video" else indexes[stored, "train"]
    options = {"augmentation": EVERYTHING, "batch_size": 2, "cached": source == "held"}
    options |= {"jpeg_engine": None if source == "frames by the cores" else 0.0, "halved": source == "halved"}
    batches = loader(index, device="gpu", device_id=0, **options)(1)
    next(batches)  # compiles
    with no_waiting():
        next(batches)


def test_decoded_pixels_are_held_until_they_were_read_within_bounds():
    """Of batches, and of bytes: frames of 1080p would be most of a GPU's memory."""

    class Event:
        done = False

        def query(self):
            return self.done

        def synchronize(self):
            assert batches[self]() is not None  # dropped after that alone
            self.done = True

    class Pixels:
        pass

    def fill(sizes):
        held = feeding.Held()
        for size in sizes:
            event, pixels = Event(), Pixels()
            batches[event] = weakref.ref(pixels)
            held.add(event, pixels, size)
            del pixels
        return held, [pixels() is not None for pixels in batches.values()]

    for sizes, there in (
        ([1] * (feeding.HELD + 2), [False] * 2 + [True] * feeding.HELD),
        ([feeding.HELD_BYTES // 2] * 3, [False, True, True]),
        ([feeding.HELD_BYTES + 1] * 2, [False, True]),
        ([feeding.HELD_BYTES, 0, 1], [False, True, True]),
    ):
        batches: dict[Event, weakref.ref] = {}
        held, found = fill(sizes)
        assert found == there
        list(batches)[-2].done = True  # read, but behind one that is not: the GPU works in order
        feeding._end([], held)
        assert all(event.done for event in batches) and not any(pixels() for pixels in batches.values())
    batches = {}
    held, _ = fill([1, 1])
    next(iter(batches)).done = True
    held.add(Event(), None, 1)
    assert [pixels() is not None for pixels in batches.values()] == [False, True]


@pytest.mark.gpu
def test_decoded_clips_are_right_while_the_gpu_is_busy(indexes):
    """Pixels of nvJPEG are read by a kernel that comes late: more batches of them than are held."""
    index, big = indexes["frames", "train"], torch.randn(4096, 4096, device="cuda")
    ours, want, found = loader(index, device="gpu", device_id=0, augmentation=EVERYTHING, batch_size=1), [], []
    for busy in (False, True):
        for epoch in range(4):
            for batch in ours(epoch):
                for _ in range(8 * busy):
                    big = (big @ big).clamp(-1, 1)
                (found if busy else want).append(batch.clips + 0 * big[0, 0])
                if not busy:
                    torch.cuda.synchronize()
    assert len(want) == len(found) > 2 * feeding.HELD
    assert all(map(torch.equal, want, found))


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "halved"), [("frames", False), ("frames", True), ("raw", False)])
def test_streamed_clips_are_right_while_the_gpu_is_busy(indexes, source, halved):
    """Whoever takes a batch late, or keeps it, finds it as it was made."""
    index, big = indexes[source, "train"], torch.randn(4096, 4096, device="cuda")
    options, gpu = {"augmentation": EVERYTHING, "batch_size": 2}, {"device": "gpu", "device_id": 0, "halved": halved}
    want = [batch.clips for batch in loader(index, **options)(1)]
    held = []
    for batch in loader(index, graph="streamed", **gpu, **options)(1):
        for _ in range(8):
            big = (big @ big).clamp(-1, 1)
        held.append(batch.clips + 0 * big[0, 0])
    if halved:  # nvJPEG's pixels are not the CPU's, but the same each time
        again = [batch.clips for batch in loader(index, graph="streamed", **gpu, **options)(1)]
        assert all(map(torch.equal, again, held))
        assert max((a - b.cpu()).abs().mean() for a, b in zip(want, held, strict=True)) < 0.05
    else:
        assert max((a - b.cpu()).abs().max() for a, b in zip(want, held, strict=True)) < 5e-3
