import hashlib
import math

import numpy as np
import pytest

from dfer.sampling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmentation,
    ClipSampler,
    colour_matrices,
    epoch_plan,
    segment_frames,
    shard,
)

LENGTHS = np.random.default_rng(0).integers(1, 200, 301)


def slow_frames(num_frames: int, segments: int, consecutive: int, u: list[float]) -> list[int]:
    """The oracle: one video, plain Python."""
    frames = []
    for s in range(segments):
        start = math.floor((s + u[s]) * max(num_frames - consecutive + 1, 1) / segments)
        frames += [min(start + k, num_frames - 1) for k in range(consecutive)]
    return sorted(frames)


@pytest.mark.parametrize(("segments", "consecutive"), [(16, 1), (8, 2), (1, 1), (5, 3)])
def test_segment_frames_equals_the_loop(segments, consecutive):
    u = np.random.default_rng(1).random((len(LENGTHS), segments))
    frames = segment_frames(LENGTHS, segments, consecutive, u)
    assert frames.tolist() == [slow_frames(n, segments, consecutive, row) for n, row in zip(LENGTHS, u, strict=True)]
    assert (frames >= 0).all() and (frames < LENGTHS[:, None]).all() and (np.diff(frames, axis=1) >= 0).all()


def test_known_frames():
    half = np.full((1, 16), 0.5)
    assert segment_frames(np.array([16]), 16, 1, half).tolist() == [list(range(16))]
    assert segment_frames(np.array([32]), 16, 1, half).tolist() == [list(range(1, 32, 2))]
    # 8 frames for 16 segments: every frame twice, not the first one nine times
    assert segment_frames(np.array([8]), 16, 1, half).tolist() == [sorted([*range(8), *range(8)])]
    assert segment_frames(np.array([1]), 16, 1, half).tolist() == [[0] * 16]
    # 8 x 2: consecutive pairs
    pairs = segment_frames(np.array([80]), 8, 2, half[:, :8])[0].reshape(8, 2)
    assert (pairs[:, 1] - pairs[:, 0] == 1).all()


def test_a_plan_is_a_function_of_seed_epoch_and_video():
    def plan(seed=1, epoch=2, lengths=LENGTHS):
        return epoch_plan(seed, epoch, lengths, 16)

    a, b = plan(), plan()
    for field in ("order", "frames", "box", "mirror", "colour"):
        assert np.array_equal(getattr(a, field), getattr(b, field))
        if field != "order":  # what happens to a video does not depend on how many follow it
            assert np.array_equal(getattr(a, field)[:50], getattr(plan(lengths=LENGTHS[:50]), field))
        assert not np.array_equal(getattr(a, field), getattr(plan(seed=3), field))
        assert not np.array_equal(getattr(a, field), getattr(plan(epoch=3), field))
    assert sorted(a.order) == list(range(len(LENGTHS)))


@pytest.mark.parametrize(
    ("seed", "epoch", "segments", "consecutive", "digest"),
    [
        (1, 2, 16, 1, "e8e5214bfdbc47eda75aac9395d5fa5bbbed6d411cb7e286f59ab22c083aaf5c"),
        (0, 0, 8, 2, "71387c3727fdf14b3af1b35d66cbdf6740a627656ef06e080663be037542a047"),
    ],
)
def test_the_default_plan_never_moves(seed, epoch, segments, consecutive, digest):
    """Runs of older versions are repeated to the bit: new draws must not shift the old ones."""
    plan = epoch_plan(seed, epoch, LENGTHS, segments, consecutive)
    drawn = hashlib.sha256()
    for field in ("order", "frames", "box", "mirror", "colour"):
        drawn.update(getattr(plan, field).tobytes())
    assert drawn.hexdigest() == digest


def test_train_draws_cover_their_ranges_and_stay_inside():
    augmentation = Augmentation(min_crop_area=0.3, max_crop_ratio=1.5, flip=0.25, colour=0.4)
    plan = epoch_plan(0, 0, np.full(5000, 40), 16, augmentation=augmentation)
    top, left, height, width = plan.box.T
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + height <= 1 + 1e-12).all()
        and (left + width <= 1 + 1e-12).all()
    )
    area = height * width
    assert 0.2 < area.min() < 0.32 and 0.95 < area.max() <= 1
    assert 0.22 < plan.mirror.mean() < 0.28
    # every frame of a segment is drawn about equally often
    segment = plan.frames[:, 3] - 3 * 40 // 16
    assert set(segment) == {0, 1, 2} or set(segment) == {0, 1, 2, 3}


def test_eval_is_the_centre_and_the_whole_frame_for_every_seed_and_epoch():
    a = ClipSampler(0, mode="eval").plan(0, LENGTHS)
    b = ClipSampler(7, mode="eval").plan(9, LENGTHS)
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.order, np.arange(len(LENGTHS)))
    assert (a.box == [0, 0, 1, 1]).all() and not a.mirror.any()
    assert a.frames.tolist() == [slow_frames(n, 16, 1, [0.5] * 16) for n in LENGTHS]


def test_colour_matrix_equals_the_steps_one_by_one():
    rng = np.random.default_rng(2)
    rgb, factors = rng.uniform(0, 255, (50, 3)), rng.uniform(0.6, 1.4, (50, 3))
    matrix = colour_matrices(factors)
    for pixel, (brightness, contrast, saturation), m in zip(rgb, factors, matrix, strict=True):
        luma = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]
        x = saturation * pixel + (1 - saturation) * luma
        x = 128 + contrast * (brightness * x - 128)
        want = (x / 255 - IMAGENET_MEAN) / IMAGENET_STD
        np.testing.assert_allclose(m[:, :3] @ pixel + m[:, 3], want, atol=1e-4)


def test_shards_cover_every_video_once_for_any_world_and_batch():
    for n in range(1, 34):
        order = np.random.default_rng(n).permutation(n)
        for world in (1, 2, 3, 4):
            for batch in (1, 2, 5, 8):
                shards = [shard(order, rank, world, batch, pad=True) for rank in range(world)]
                assert len({ids.shape for ids, _ in shards}) == 1  # same number of steps: nobody waits for ever
                seen = np.concatenate([ids[valid] for ids, valid in shards])
                assert sorted(seen) == list(range(n))


def test_train_order_does_not_depend_on_the_number_of_ranks():
    order = epoch_plan(0, 5, LENGTHS, 16).order

    def global_batches(world, batch):
        ids = [shard(order, rank, world, batch, pad=False)[0] for rank in range(world)]
        return np.concatenate(ids, axis=1).tolist()

    assert global_batches(1, 8) == global_batches(2, 4) == global_batches(4, 2)
    assert len(global_batches(1, 8)) == len(LENGTHS) // 8  # the tail is dropped
    assert shard(order, 0, 1, 8, pad=False)[1].all()
