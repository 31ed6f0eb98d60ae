"""The fused CPU kernel and the torch stages against the oracle's loops, frame by frame."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from dali_pipes import kernels, planar, torch_stages
from dali_pipes.kernels import parameters
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import EpochPlan, epoch_plan
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD
from tests.oracle import oracle_clip, resize_weights

SIZE = 24
EVERYTHING = Augmentation(
    min_crop_area=0.08, max_crop_ratio=1.4, colour=0.4, hue=0.1, grayscale=0.2, rotation=20.0, blur=0.5, erase=0.7,
    randaugment=2,
)  # fmt: skip
# Height and width: enlarged, reduced by less and by more than 2, single rows and columns, odd numbers.
SHAPES = [(24, 24), (10, 17), (40, 31), (49, 90), (130, 75), (1, 9), (33, 1), (2, 2), (224, 200)]


def train_plan(augmentation: Augmentation, num_videos: int, epoch: int = 0) -> EpochPlan:
    return epoch_plan(5, epoch, np.full(num_videos, 9), 1, augmentation=augmentation)


def one_frame(pixels, plan, video, dtype=np.float32, size=SIZE, **options) -> np.ndarray:
    out = np.full((size, size, 3), 99, dtype)
    kernel = planar if pixels.shape[2] == 1 else kernels
    kernel.fused(out, pixels, parameters(plan, np.array([video]), **options)[0])
    return out


def picture(rng, height, width) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_the_oracle(shape):
    rng = np.random.default_rng(1)
    plan = train_plan(EVERYTHING, 20)
    frame = picture(rng, *shape)
    for video in range(20):
        want = oracle_clip([frame], plan, video, SIZE)[0].transpose(1, 2, 0)
        # a step of 255 is about 0.02 here
        assert np.abs(one_frame(frame, plan, video) - want).max() < 2e-4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 22, 31])
def test_any_size_equals_the_oracle(size):
    """Lines are blended some at a time: the last ones may be fewer."""
    rng = np.random.default_rng(4)
    plan = train_plan(Augmentation(min_crop_area=0.3), 4)
    for video in range(4):
        frame = picture(rng, 33, 45)
        want = oracle_clip([frame], plan, video, size)[0].transpose(1, 2, 0)
        assert np.abs(one_frame(frame, plan, video, size=size) - want).max() < 2e-4


def test_outputs_are_rounded_to_their_type():
    rng = np.random.default_rng(2)
    plan = train_plan(EVERYTHING, 8)
    mean, std = 255 * IMAGENET_MEAN, 255 * IMAGENET_STD
    lowest = highest = 0
    for video in range(8):
        frame = np.where(picture(rng, 50, 60) > 127, 255, 0).astype(np.uint8)
        want = one_frame(frame, plan, video)
        half = torch.from_numpy(one_frame(frame, plan, video, np.uint16)).view(torch.bfloat16)
        assert torch.equal(half, torch.from_numpy(want).bfloat16())
        levels = one_frame(frame, plan, video, normalised=False)
        assert np.abs(levels - (want * std + mean)).max() < 2e-2
        lowest, highest = min(lowest, levels.min()), max(highest, levels.max())
        rounded = np.clip(np.rint(levels), 0, 255)
        assert np.array_equal(one_frame(frame, plan, video, np.uint8, normalised=False), rounded)
    assert lowest < 0 and highest > 255  # so clamping was seen


def test_what_the_decoder_cut_out_is_not_cut_again():
    plan = train_plan(Augmentation(min_crop_area=0.2), 1)
    frame = picture(np.random.default_rng(3), 30, 40)
    whole = dataclasses.replace(plan, box=np.array([[0.0, 0.0, 1.0, 1.0]]))
    assert np.array_equal(one_frame(frame, plan, 0, crop=False), one_frame(frame, whole, 0))
    assert not np.array_equal(one_frame(frame, plan, 0), one_frame(frame, whole, 0))


def upsampled(plane: np.ndarray, left: bool) -> np.ndarray:
    """Chroma at the positions of luma, linearly interpolated; rows lie between luma rows, columns on or between."""

    def matrix(n: int, on_even: bool) -> np.ndarray:
        m = np.zeros((2 * n, n))
        for i in range(2 * n):
            at = Fraction(i, 2) if on_even else Fraction(2 * i - 1, 4)
            low = at.numerator // at.denominator
            for j, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
                m[i, min(max(j, 0), n - 1)] += float(weight)
        return m

    return matrix(plane.shape[0], False) @ plane @ matrix(plane.shape[1], left).T


def yuv_oracle(yuv, plan, video, to_rgb, chroma_left, size) -> np.ndarray:
    """Chroma upsampled, all cut and resized, then RGB, clamped, and the rest as of RGB."""
    height, width = len(yuv) * 2 // 3, yuv.shape[1]
    u, v = yuv[height:].reshape(2, height // 2, width // 2).astype(float)
    whole = np.stack([yuv[:height, :, 0].astype(float), upsampled(u, chroma_left), upsampled(v, chroma_left)], axis=2)
    rows, columns = (
        (min(int(a * n + 0.5), n - 1), max(int((a + s) * n + 0.5), min(int(a * n + 0.5), n - 1) + 1))
        for a, s, n in zip(*np.float32(plan.box[video]).astype(float).reshape(2, 2), (height, width), strict=True)
    )
    cut = whole[slice(*rows), slice(*columns)]
    small = np.einsum("iy,jx,yxc->ijc", resize_weights(cut.shape[0], size), resize_weights(cut.shape[1], size), cut)
    rgb = np.clip(small @ to_rgb[:, :3].T.astype(float) + to_rgb[:, 3], 0, 255)
    uncut = dataclasses.replace(plan, box=np.tile([0.0, 0, 1, 1], (len(plan.box), 1)))
    return oracle_clip([rgb], uncut, video, size)[0].transpose(1, 2, 0)


@pytest.mark.parametrize("chroma_left", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (10, 16), (40, 30), (50, 90), (130, 76), (2, 2), (6, 4), (2, 40)], ids=str)
def test_yuv_is_upsampled_resized_converted_and_clamped(shape, chroma_left):
    rng = np.random.default_rng(4)
    height, width = shape
    yuv = rng.integers(0, 256, (height * 3 // 2, width, 1), dtype=np.uint8)
    to_rgb = rng.normal(size=(3, 4)).astype(np.float32)
    plan = train_plan(EVERYTHING, 12)
    row = np.append(to_rgb.reshape(12), chroma_left)[None]
    for video, size in zip(range(12), (24, 16, 17, 31, 33, 1, 2, 7, 8, 9, 15, 22), strict=True):
        want = yuv_oracle(yuv, plan, video, to_rgb, chroma_left, size)
        assert np.abs(one_frame(yuv, plan, video, size=size, yuv=row) - want).max() < 5e-4


def test_yuv_is_rounded_to_its_type():
    rng = np.random.default_rng(8)
    plan = train_plan(EVERYTHING, 8)
    yuv = rng.integers(0, 256, (75, 60, 1), dtype=np.uint8)
    row = np.append(rng.normal(size=12), 0)[None].astype(np.float32)
    for video in range(8):
        half = torch.from_numpy(one_frame(yuv, plan, video, np.uint16, yuv=row)).view(torch.bfloat16)
        assert torch.equal(half, torch.from_numpy(one_frame(yuv, plan, video, yuv=row)).bfloat16())
        levels = np.clip(np.rint(one_frame(yuv, plan, video, yuv=row, normalised=False)), 0, 255)
        assert np.array_equal(one_frame(yuv, plan, video, np.uint8, yuv=row, normalised=False), levels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_torch_stages_equal_the_oracle(shape):
    rng = np.random.default_rng(6)
    plan = train_plan(EVERYTHING, 20)
    frames = np.stack([picture(rng, *shape) for _ in range(2)])
    videos = torch.tensor([3, 17, 0, 9])
    on_device = torch_stages.DevicePlan(plan, torch.device("cpu"))
    pictures = torch.from_numpy(frames).expand(4, -1, -1, -1, -1)
    clips = torch_stages.resize(pictures, on_device.box[videos], on_device.mirror[videos], SIZE)
    clips = torch_stages.finish(clips, on_device, videos)
    two = dataclasses.replace(plan, frames=np.repeat(plan.frames, 2, axis=1))
    for clip, video in zip(clips, videos.tolist(), strict=True):
        want = oracle_clip(list(frames), two, video, SIZE)
        assert np.abs(clip.permute(0, 3, 1, 2).numpy() - want).max() < 5e-4


def test_colour_that_was_applied_is_not_applied_again():
    plan = train_plan(dataclasses.replace(EVERYTHING, rotation=0.0, blur=0.0, randaugment=0), 6)
    on_device = torch_stages.DevicePlan(plan, torch.device("cpu"))
    assert on_device.erases and not on_device.touches_geometry
    clips = torch.from_numpy(np.random.default_rng(7).normal(size=(6, 1, SIZE, SIZE, 3)).astype(np.float32))
    done = torch_stages.finish(clips, on_device, torch.arange(6), coloured=True)
    kept = done != 0
    assert torch.equal(done[kept], clips[kept]) and 0.1 < kept.float().mean() < 0.99
