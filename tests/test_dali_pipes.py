"""The loader against a stupid oracle: Pillow decodes, NumPy slices, resizes by loops over output rows and colours."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipes.loader import ClipLoader
from dfer.annotations import read_annotations
from dfer.index import build_index
from dfer.sampling import ClipSampler, shard

SIZE, T = 40, 6


@functools.cache
def resize_weights(source: int, target: int) -> np.ndarray:
    """Antialiased linear interpolation: a triangle as wide as an output pixel, but never narrower than an input one."""
    scale = source / target
    support = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale - 0.5
        for j in range(-source, 2 * source):  # beyond the edge lies the edge pixel again
            weights[i, min(max(j, 0), source - 1)] += max(0.0, 1 - abs(j - centre) / support)
    return weights / weights.sum(1, keepdims=True)


def oracle_clip(index, plan, video: int) -> np.ndarray:
    """(T, 3, SIZE, SIZE) float64."""
    frames = []
    for frame in plan.frames[video].tolist():
        image = np.asarray(Image.open(index.frame_path(video, frame)).convert("RGB"))
        size = np.array(image.shape[:2])
        start = np.round(np.float32(plan.box[video, :2]) * size).astype(int)
        stop = np.round((np.float32(plan.box[video, :2]) + np.float32(plan.box[video, 2:])) * size).astype(int)
        crop = image[start[0] : stop[0], start[1] : stop[1]].astype(np.float64)
        rows, columns = (resize_weights(n, SIZE) for n in crop.shape[:2])
        pixels = np.round(np.einsum("iy,jx,yxc->ijc", rows, columns, crop, optimize=True))
        if plan.mirror[video]:
            pixels = pixels[:, ::-1]
        colour = plan.colour[video].astype(np.float64)
        frames.append((pixels @ colour[:, :3].T + colour[:, 3]).transpose(2, 0, 1))
    return np.stack(frames)


@pytest.fixture(scope="module")
def indexes(clips):
    return {name: build_index(read_annotations(clips / f"{name}.txt")) for name in ("train", "test")}


def loader(indexes, mode, batch_size=4, seed=0, **kwargs) -> ClipLoader:
    index = indexes["train" if mode == "train" else "test"]
    return ClipLoader(index, ClipSampler(seed, T, mode=mode), batch_size=batch_size, size=SIZE, **kwargs)


def check_against_oracle(batches, index, plan, worst, mean):
    """Differences in steps of 255; one is a tie that was rounded the other way."""
    num_clips = 0
    for batch in batches:
        assert batch.clips.shape[1:] == (T, 3, SIZE, SIZE) and batch.clips.dtype == torch.float32
        for clip, label, video in zip(batch.clips.cpu(), batch.labels.tolist(), batch.ids.tolist(), strict=True):
            want = oracle_clip(index, plan, video)
            # what one step of 255 in all three channels makes in normalised units
            step = np.abs(plan.colour[video, :, :3]).sum(1).max()
            difference = np.abs(clip.numpy() - want)
            assert difference.max() <= worst * step + 1e-4 and difference.mean() <= mean * step
            assert label == index.records[video].label
            num_clips += 1
    return num_clips


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_clips_equal_the_oracle(indexes, mode):
    clip_loader = loader(indexes, mode)
    index = clip_loader.index
    plan = clip_loader.sampler.plan(3, index.num_frames)
    num_clips = check_against_oracle(clip_loader(epoch=3), index, plan, worst=1, mean=0.005)
    assert num_clips == {"train": 20, "eval": 12}[mode]  # eval: 9 clips padded to 12


def test_batches_are_views_in_channels_last_order_and_stay_valid(indexes):
    held = [(batch, batch.clips.clone()) for batch in loader(indexes, "train")(epoch=0)]
    for batch, copy in held:  # decoding later batches must not write into earlier ones
        assert torch.equal(batch.clips, copy)
        assert batch.clips.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_order_start_step_and_early_exit(indexes):
    clip_loader = loader(indexes, "train")
    assert len(clip_loader) == 5
    whole = list(clip_loader(epoch=1))
    plan = clip_loader.sampler.plan(1, clip_loader.index.num_frames)
    assert torch.cat([b.ids for b in whole]).tolist() == plan.order.tolist()
    next(iter(clip_loader(epoch=0)))  # left after one batch: nothing of it may leak into the next epoch
    rest = list(clip_loader(epoch=1, start_step=2))
    assert len(rest) == 3
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.clips, b.clips) and torch.equal(a.ids, b.ids)


def test_clips_do_not_depend_on_batch_ranks_or_threads(indexes):
    want = {int(v): c for b in loader(indexes, "eval", 9)(0) for v, c in zip(b.ids, b.clips, strict=True)}
    for world, batch, threads in ((1, 2, 1), (2, 2, 2), (4, 3, 1)):
        seen = []
        for rank in range(world):
            part = loader(indexes, "eval", batch, rank=rank, world_size=world, num_threads=threads)
            assert len(part) == len(shard(np.arange(9), rank, world, batch, pad=True)[0])
            for b in part(0):
                for video, clip, valid in zip(b.ids.tolist(), b.clips, b.valid.tolist(), strict=True):
                    assert torch.equal(clip, want[video])
                    seen += [video] * valid
        assert sorted(seen) == list(range(9))


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated"])
def test_a_bad_frame_is_named(tmp_path, damage):
    good = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(T):
            good.save(tmp_path / name / f"{i}.jpg")
    (tmp_path / "list.txt").write_text(f"a {T} 0\nb {T} 1\n")
    index = build_index(read_annotations(tmp_path / "list.txt"))
    bad = tmp_path / "b" / "3.jpg"
    data = bad.read_bytes()
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes({"empty": b"", "garbage": b"not a jpeg" * 50, "truncated": data[: len(data) // 2]}[damage])
    clip_loader = ClipLoader(index, ClipSampler(0, T, mode="eval"), batch_size=2, size=SIZE)
    with pytest.raises(ValueError, match=r"list.txt:2: bad frame .*3\.jpg of clip b: ") as error:
        list(clip_loader(0))
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_gpu_clips_are_close_to_the_oracle(indexes):
    """nvJPEG rounds its inverse DCT and chroma differently: a few steps of 255 at most."""
    clip_loader = loader(indexes, "train", device="gpu", device_id=0)
    plan = clip_loader.sampler.plan(3, clip_loader.index.num_frames)
    batches = list(clip_loader(epoch=3))
    assert all(b.clips.is_cuda for b in batches)
    assert check_against_oracle(batches, clip_loader.index, plan, worst=12, mean=1) == 20
