"""Videos on a GPU, here on the CPU: who decodes which, and that the cores' pixels become the CPU kernel's clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dali_pipes import videos
from dali_pipes.feeding import Epoch, Feed, Refused
from dali_pipes.options import LoaderOptions
from dali_pipes.planar import fused
from dali_pipes.torch_stages import DevicePlan
from dali_pipes.video_files import VideoFiles
from dali_pipes.videos import CORES, DALI_ON_A_CPU, NVDEC, rule_of, takes
from dfer.lists.annotations import read_annotations
from dfer.lists.index import ClipIndex, build_index
from dfer.plan.resizing import resize_planar
from tests.conftest import smooth_image
from tests.test_dali_pipes import EVERYTHING, PLAIN, SIZE, VIDEOS, T, loader, write_video


def write_mixed(folder, kinds) -> ClipIndex:
    """A list of moving videos: (kind of VIDEOS, height, width) each."""
    folder.mkdir()
    rows = []
    for i, (kind, height, width) in enumerate(kinds):
        codec, ending, pixels, options = VIDEOS[kind]
        still = np.asarray(smooth_image(np.random.default_rng(i), height, 2 * width))
        images = [still[:, 2 * f : 2 * f + width] for f in range(5 + i)]
        write_video(folder / f"{i}.{ending}", images, codec, pixels, options)
        rows.append(f"{i}.{ending} {len(images)} {i % 7}")
    (folder / "list.txt").write_text("\n".join(rows) + "\n")
    return build_index(read_annotations(folder / "list.txt"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> ClipIndex:
    """Planar of two sizes, one twice, RGB, and two that DALI decodes on a CPU."""
    kinds = [("h264", 64, 96), ("vp9", 64, 96), ("h264-444", 48, 40), ("h264-709", 64, 96), ("vp9", 50, 70)]
    return write_mixed(tmp_path_factory.mktemp("mixed") / "videos", [*kinds, ("mjpeg", 98, 70)])


def test_memory_of_clips_is_used_again_but_not_while_somebody_has_a_part_of_it(mixed):
    clip_loader, parts, places = loader(mixed, batch_size=1, augmentation=EVERYTHING), [], set()
    for batch in clip_loader(4):
        parts.append((batch.clips[0, 1], batch.clips[0, 1].clone()))
    del batch
    for _ in range(3):
        places.update(batch.clips.data_ptr() for batch in clip_loader(5))
    assert all(torch.equal(part, then) for part, then in parts)
    assert len(parts) == len(mixed) and places.isdisjoint(part.data_ptr() for part, _ in parts)
    assert len(places) < len(mixed)


def test_who_decodes_what():
    """A table of what NVDEC refuses, in part seen on an H200, or would show otherwise, and of its neighbours."""
    for codec, pixels, height, width, by_nvdec in (
        ("h264", "yuv420p", 224, 224, True),
        ("h264", "yuvj420p", 64, 96, True),
        ("h264", "yuv420p", 62, 96, False),
        ("hevc", "yuv420p", 144, 144, True),
        ("hevc", "yuv420p", 142, 500, False),
        ("hevc", "yuv420p", 500, 142, False),
        ("vp9", "yuv420p", 128, 128, True),
        ("vp9", "yuv420p", 126, 128, False),
        ("av1", "yuv420p", 128, 128, True),
        ("h264", "yuv444p", 224, 224, False),
        ("h264", "yuv422p", 224, 224, False),
        ("h264", "yuv420p10le", 224, 224, False),
        ("hevc", "yuv420p10le", 224, 224, False),
        ("mpeg4", "yuv420p", 224, 224, False),
        ("mjpeg", "yuvj420p", 224, 224, False),
        ("h264", "", 224, 224, False),  # turned, or HDR
        ("vp9", "yuv420p", 225, 224, False),
        ("h264", "yuv420p", 224, 4096, True),
        ("h264", "yuv420p", 224, 4098, False),
    ):
        assert takes(NVDEC, codec, pixels, height, width) is by_nvdec, (codec, pixels, height, width)
        assert not takes(CORES, codec, pixels, height, width)


def test_the_cores_decode_until_nvdec_is_asked_for():
    options = LoaderOptions(1, SIZE, device="gpu")
    assert rule_of(options) is rule_of(replace(options, video_decoder="cores")) is CORES
    assert rule_of(replace(options, video_decoder="nvdec")) is NVDEC
    assert rule_of(replace(options, device="cpu", video_decoder="nvdec")) is DALI_ON_A_CPU


@pytest.mark.parametrize("chroma_left", [False, True])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (48, 32), (30, 98)])
def test_planar_pictures_are_resized_as_the_cpu_kernel_does(height, width, chroma_left):
    """Its map from YUV to RGB, and its colours, are left out: one turns nothing, the other undoes the normalisation."""
    rng = np.random.default_rng(height)
    pictures = rng.integers(0, 256, (3, 2, height * 3 // 2, width, 1), dtype=np.uint8)
    box = np.array([[0, 0, 1, 1], [0.2, 0.4, 0.5, 0.3], [0.55, 0.1, 0.45, 0.9]], np.float32)
    mirror = np.array([False, True, False])
    found = resize_planar(
        *map(torch.from_numpy, (pictures, box, mirror)), size=9, chroma_left=torch.tensor([chroma_left] * 3)
    )
    for clip in range(3):
        p = np.zeros(44, np.float32)
        p[0:4], p[4], p[5], p[9] = box[clip], mirror[clip], 1, 1
        p[16:28] = p[28:40] = np.eye(3, 4).ravel()
        p[40] = chroma_left
        for frame in range(2):
            want = np.empty((9, 9, 3), np.float32)
            fused(want, pictures[clip, frame], p)
            assert np.abs(found[clip, frame].numpy() - want).max() < 1e-3


@pytest.mark.parametrize("augmentation", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_clips_of_the_cores_are_those_of_the_cpu_kernel(mixed, augmentation, monkeypatch):
    """Of any sizes and kinds in a batch, and whatever is made at a time."""
    want = list(loader(mixed, batch_size=3, augmentation=augmentation)(4))
    step = 1 / 255 / 0.224
    for at_once in (2**26, 20_000, 1):
        monkeypatch.setattr(videos, "_AT_ONCE", at_once)
        found = loader(mixed, batch_size=3, augmentation=augmentation, graph="operators")(4)
        for a, b in zip(want, found, strict=True):
            assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels) and torch.equal(a.valid, b.valid)
            assert (a.clips - b.clips).abs().max() < 0.02 * step
            assert b.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_frames_of_a_clip_may_differ_in_kind_and_size(mixed, monkeypatch):
    """As in a stream that changes on its way."""
    real = VideoFiles.others

    def others(self, video, frames):
        other = real(self, 2, np.minimum(frames, 6))
        return [(other if place % 3 == 1 else own)[place] for own in [real(self, video, frames)] for place in range(T)]

    monkeypatch.setattr(VideoFiles, "others", others)
    monkeypatch.setattr(VideoFiles, "_compiled", lambda *_, **__: None)
    want = list(loader(mixed, batch_size=3, augmentation=EVERYTHING)(4))
    found = list(loader(mixed, batch_size=3, augmentation=EVERYTHING, graph="operators")(4))
    assert len(want) == len(found) == 2
    for a, b in zip(want, found, strict=True):
        assert (a.clips - b.clips).abs().max() < 0.02 / 255 / 0.224


@pytest.mark.parametrize("sessions", [1, 2])
def test_a_batch_may_hold_clips_of_both_decoders(mixed, sessions):
    """Those of DALI's decoder in their places among those of the cores, as near as DALI's conversion of colours is."""
    want = next(iter(loader(mixed, "eval", 6)(0))).clips
    both = loader(mixed, "eval", 6, graph="operators", video_decoder="nvdec", nvdec_sessions=sessions)
    assert [both._source.is_for_nvdec(video) for video in range(6)] == [False, True, False, False, True, False]
    for _ in range(2):
        apart = (next(iter(both(0))).clips - want).abs()
        assert apart.mean() < 1 / 255 / 0.224 and apart.max() < 8 / 255 / 0.224
    alone = loader(mixed, "eval", 1, graph="operators", video_decoder="nvdec")
    clips = torch.cat([batch.clips for batch in alone(0)])
    assert torch.equal(clips, next(iter(both(0))).clips)


def test_batches_in_flight_come_in_turn(mixed, monkeypatch):
    """Also those behind one that was refused."""
    monkeypatch.setattr(LoaderOptions, "depth", property(lambda self: 4))
    ours = loader(mixed, "eval", 1, graph="operators", video_decoder="nvdec")
    plan = ours.sampler.plan(0, mixed.num_frames)
    epoch, feed = Epoch(plan, DevicePlan(plan, torch.device("cpu"))), ours._feed

    def start(video: int, damaged: bool = False) -> None:
        sample = [np.zeros(9, np.uint8)] if damaged else ours._source.fetch(video, plan.frames[video])
        feed.start(sample, np.array([video]), epoch)

    def clips(*videos: int) -> list[torch.Tensor]:
        for video in videos:
            start(video)
        return [feed.pictures() for _ in videos]

    want = {video: clips(video)[0] for video in range(6)}
    assert all(map(torch.equal, clips(0, 1, 2, 3), [want[0], want[1], want[2], want[3]]))
    start(1, damaged=True)
    start(0)
    start(2)
    with pytest.raises(Refused):
        feed.pictures()
    assert torch.equal(feed.alone(4, epoch)[0], want[4])  # as the clips of a refused batch are tried
    assert torch.equal(feed.pictures(), want[0]) and torch.equal(feed.pictures(), want[2])
    start(3)
    feed.drain()
    assert torch.equal(clips(5)[0], want[5])


def test_an_index_of_an_older_version_decides_the_same(mixed):
    old = replace(mixed, store=replace(mixed.store, pixels=None))
    for index in (mixed, old):
        source = loader(index, graph="operators", video_decoder="nvdec")._source
        assert [source.is_for_nvdec(video) for video in range(6)] == [False, True, False, False, True, False]


def test_what_nvdec_refuses_the_cores_decode(mixed, monkeypatch, capfd):
    """Whatever the rule says; one line tells of it, and from then on nobody asks again."""
    fed, real = [], Feed._inputs

    def inputs(self, samples, rows, epoch):
        refuses = 1 in epoch.plan.video[rows]
        fed.append(refuses)
        return real(self, [np.zeros(9, np.uint8)] * len(samples) if refuses else samples, rows, epoch)

    monkeypatch.setattr(Feed, "_inputs", inputs)
    want = next(iter(loader(mixed, "eval", 6, graph="operators")(0))).clips
    both = loader(mixed, "eval", 6, graph="operators", video_decoder="nvdec")
    for epoch in range(2):
        (batch,) = both(epoch)
        assert batch.valid.all() and not both.bad_clips
        assert torch.equal(batch.clips[:4], want[:4]) and (batch.clips - want).abs().max() < 8 / 255 / 0.224
    assert sum(fed) == 2  # in its batch, and alone
    plan = both.sampler.plan(0, mixed.num_frames)
    epoch = Epoch(plan, DevicePlan(plan, torch.device("cpu")))
    # A batch that was fetched before, as a file, is refused once more: its clip is no riddle then.
    assert [both._feed.alone(row, epoch)[1] for row in (0, 1, 4)] == [False, True, False]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]  # DALI prints lines too
    (line,) = told
    assert line.endswith("1.webm, perhaps others too, is decoded on the cores, as the GPU refuses it")


@pytest.mark.parametrize("decoder", ["cores", "nvdec"])
def test_a_bad_video_is_named_whoever_was_to_decode_it(tmp_path, capfd, decoder):
    """Nothing is said of another decoder if that one finds no more in it."""
    index = write_mixed(tmp_path / "videos", [("h264", 64, 96), ("vp9", 64, 96), ("h264", 64, 96)])
    path = index.records[1].path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"list.txt:2: cannot decode the video .*1\.webm: ") as error:
        list(loader(index, "eval", 3, graph="operators", video_decoder=decoder)(0))
    assert "\n" not in str(error.value) and "note" not in capfd.readouterr().err
