import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from dfer.plan.augmentation import Augmentation
from dfer.plan.balance import balanced_videos, describe_draws
from dfer.plan.sampling import ClipSampler, EpochPlan, epoch_plan, segment_frames, shard
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD, colour_matrices
from tests import oracle

LENGTHS = np.random.default_rng(0).integers(1, 200, 301)
OLD, NEW = ("order", "frames", "box", "mirror", "colour"), ("warp", "blur", "erase")
FIELDS = OLD + NEW
EVERYTHING = Augmentation(
    brightness=0.3, hue=0.2, grayscale=0.2, rotation=20.0, blur=0.5, erase=0.4, speed=2.0, reverse=0.4, randaugment=2
)
SEGMENTS = 8


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
        return epoch_plan(seed, epoch, lengths, 16, augmentation=EVERYTHING)

    a, b = plan(), plan()
    assert {f.name for f in dataclasses.fields(a)} == {*FIELDS, "video", "mix"}
    assert np.array_equal(a.video, np.arange(len(LENGTHS))) and a.mix is None
    for field in FIELDS:
        assert np.array_equal(getattr(a, field), getattr(b, field))
        if field != "order":  # what happens to a video does not depend on how many follow it
            assert np.array_equal(getattr(a, field)[:50], getattr(plan(lengths=LENGTHS[:50]), field))
        assert not np.array_equal(getattr(a, field), getattr(plan(seed=3), field))
        assert not np.array_equal(getattr(a, field), getattr(plan(epoch=3), field))
    assert sorted(a.order) == list(range(len(LENGTHS)))


def digest(arrays) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("mode", "seed", "epoch", "segments", "consecutive", "want"),
    [
        ("train", 1, 2, 16, 1, "d868e468ee2a4976"),
        ("train", 0, 0, 8, 2, "4a30da4034a62bdc"),
        ("eval", 0, 0, 8, 2, "c5f437a340bfb949"),
    ],
)
def test_default_plans_never_move(mode, seed, epoch, segments, consecutive, want):
    """The digests are those of the plans before there was anything but crop, flip and colour.

    Boxes are rounded, as NumPy's powers differ in the last bit between CPUs with and without AVX-512.
    """
    plan = epoch_plan(seed, epoch, LENGTHS, segments, consecutive, mode)
    assert digest([plan.order, plan.frames, plan.box.round(9) + 0.0, plan.mirror, plan.colour]) == want


def test_plans_with_everything_on_never_move():
    """A new draw must not shift the others: runs are to be repeatable."""
    plan = epoch_plan(1, 2, LENGTHS, 16, augmentation=EVERYTHING)
    rounded = [getattr(plan, field).astype(np.float64).round(6) + 0.0 for field in FIELDS]
    assert digest(rounded) == "31553371f45ce9d7"


COUNTS = [120, 60, 40, 20, 10, 4, 47]
LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(7), COUNTS))  # of LENGTHS


def balanced(balance, epoch=2, seed=1, labels=LABELS) -> EpochPlan:
    return ClipSampler(seed, 16, augmentation=EVERYTHING, balance=balance).plan(epoch, LENGTHS[: len(labels)], labels)


@pytest.mark.parametrize(("balance", "power"), [("sqrt", -0.5), ("full", -1.0)])
def test_small_classes_come_more_often(balance, power):
    weights = [COUNTS[label] ** power for label in LABELS]
    expected = [weight * len(LABELS) / sum(weights) for weight in weights]
    for epoch in range(3):
        plan = balanced(balance, epoch)
        assert sorted(plan.order) == list(range(len(LABELS)))  # as many steps as ever
        times = np.bincount(plan.video, minlength=len(LABELS))
        assert all(math.floor(e) <= t <= math.ceil(e) for e, t in zip(expected, times, strict=True))
        for label, count in enumerate(COUNTS):
            share = expected[list(LABELS).index(label)] * count
            assert times[label == LABELS].sum() == pytest.approx(share, abs=7)
    rng = np.random.default_rng(0)
    many = [balanced_videos(np.array(expected), rng.permutation(len(LABELS)), rng.random()) for _ in range(300)]
    mean = np.bincount(np.concatenate(many), minlength=len(LABELS)) / 300
    assert np.abs(mean - expected).max() < 0.2


def test_a_balanced_plan_is_that_of_before_with_other_clips_for_videos_that_do_not_come():
    """A video that comes keeps its clip; one that comes again gets frames and augmentation of its own."""
    plan = balanced("full")
    plain = ClipSampler(1, 16, augmentation=EVERYTHING).plan(2, LENGTHS)
    own = plan.video == np.arange(len(LABELS))
    assert 0.2 < own.mean() < 0.9 and np.array_equal(plan.order, plain.order)
    for field in FIELDS[1:]:
        assert np.array_equal(getattr(plan, field)[own], getattr(plain, field)[own])
    assert (plan.frames < LENGTHS[plan.video][:, None]).all()
    clips = {(v, *f, *b) for v, f, b in zip(plan.video, map(tuple, plan.frames), map(tuple, plan.box), strict=True)}
    assert len(clips) == len(LABELS)
    assert set(plan.video[own]) == set(plan.video)


def test_balance_is_a_function_of_seed_and_epoch_and_none_is_todays():
    a, b = balanced("sqrt"), balanced("sqrt")
    assert np.array_equal(a.video, b.video) and np.array_equal(a.frames, b.frames)
    assert not np.array_equal(a.video, balanced("sqrt", epoch=3).video)
    assert not np.array_equal(a.video, balanced("sqrt", seed=2).video)
    plain = ClipSampler(1, 16, augmentation=EVERYTHING).plan(2, LENGTHS)
    assert all(np.array_equal(getattr(balanced("none"), f), getattr(plain, f)) for f in (*FIELDS, "video"))
    equal = balanced("full", labels=np.arange(294) % 7)
    assert np.array_equal(equal.video, np.arange(294))  # classes of one size: each video once
    held_out = ClipSampler(0, mode="eval", balance="full").plan(0, LENGTHS, LABELS)
    assert np.array_equal(held_out.video, np.arange(len(LABELS)))
    assert digest([a.order, a.video]) == "7a82742138fc58b9"  # as it was when there was balance for the first time


@pytest.mark.parametrize("labels", [[3], [0, 0], [0, 1], [6] * 5 + [2]])
def test_any_list_can_be_balanced(labels):
    labels = np.array(labels)
    for epoch in range(5):
        plan = balanced("full", epoch, labels=labels)
        assert set(labels[plan.video]) == set(labels) and len(plan.video) == len(labels)


def test_what_is_drawn_is_said():
    labels = np.array([0] * 90 + [5] * 10)
    names = ["a", "b", "c", "d", "e", "f", "g"]
    assert describe_draws(labels, "full", names).endswith("takes, of so many videos: a 50 of 90, f 50 of 10")
    assert describe_draws(labels, "sqrt", names).endswith("takes, of so many videos: a 75 of 90, f 25 of 10")


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
    brightness, contrast, saturation = factors.T
    matrix = colour_matrices(brightness * contrast, 128 * (1 - contrast), saturation.astype(complex))
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


def drawn(num_videos: int = 4000, length: int = 160, **augmentation) -> EpochPlan:
    """A training plan with the colours as they are, unless asked for otherwise."""
    wanted = Augmentation(**{"colour": 0.0, **augmentation})
    return epoch_plan(5, 3, np.full(num_videos, length), SEGMENTS, augmentation=wanted)


def differing(a: EpochPlan, b: EpochPlan) -> set[str]:
    return {field for field in FIELDS if not np.array_equal(getattr(a, field), getattr(b, field))}


def seen(plan: EpochPlan, rgb) -> np.ndarray:
    """What colours (..., 3) in 0..255 become in every clip, as colours in 0..255: (N, ..., 3)."""
    rgb = np.asarray(rgb, dtype=np.float64)
    out = np.einsum("nij,...j->n...i", plan.colour[:, :, :3].astype(np.float64), rgb)
    out += plan.colour[:, :, 3].reshape(-1, *(1,) * (rgb.ndim - 1), 3)
    return (out * IMAGENET_STD + IMAGENET_MEAN) * 255


def share(mask: np.ndarray) -> float:
    return float(np.mean(mask))


def test_off_is_exactly_nothing():
    for plan in (drawn(), ClipSampler(0, mode="eval").plan(0, LENGTHS)):
        assert (plan.warp == np.eye(2, 3)).all() and (plan.blur == 0).all() and (plan.erase == 0).all()
        assert all(getattr(plan, field).dtype == np.float32 for field in NEW)


@pytest.mark.parametrize(
    ("augmentation", "changes"),
    [
        ({"brightness": 0.3}, {"colour"}),
        ({"hue": 0.1}, {"colour"}),
        ({"grayscale": 0.5}, {"colour"}),
        ({"rotation": 10.0}, {"warp"}),
        ({"blur": 0.5}, {"blur"}),
        ({"erase": 0.5}, {"erase"}),
        ({"speed": 1.5}, {"frames"}),
        ({"reverse": 0.5}, {"frames"}),
        ({"randaugment": 1}, {"warp", "colour", "blur"}),
        ({"randaugment": 1, "magnitude": 0.0}, set()),
        ({"flip": 0.2}, {"mirror"}),
    ],
)
def test_each_augmentation_changes_its_own_field_and_nothing_else(augmentation, changes):
    assert differing(drawn(300), drawn(300, **augmentation)) == changes


def test_draws_do_not_depend_on_each_other():
    """One column used for two things shows as a correlation of 1; chance is 0.016 for 4000 clips."""
    plan = drawn(rotation=10.0, blur=0.5, erase=0.5, reverse=0.5, speed=2.0, max_crop_ratio=1.0)
    always = drawn(blur=1.0, erase=1.0)
    grey, light, hue = (seen(drawn(**{name: 0.3}), [200, 100, 100]) for name in ("grayscale", "brightness", "hue"))
    step = drawn(randaugment=1)
    (top, left, height, width), erased = plan.box.T, always.erase.T * 0.9999  # as a side can be 1
    uses = {
        "top": top / (1 - height),
        "left": left / (1 - width),
        "area": height * width,
        "mirror": plan.mirror,
        "angle": plan.warp[:, 0, 1],
        "blurred": plan.blur > 0,
        "erased": plan.erase[:, 2] > 0,
        "reversed": plan.frames[:, 0] > plan.frames[:, -1],
        "spread": abs(plan.frames[:, -1] - plan.frames[:, 0]),
        "place": plan.frames.mean(1),
        "grey": np.ptp(grey, axis=1) > 1,
        "light": light.sum(1),
        "hue": hue[:, 1] - hue[:, 2],
        "contrast": seen(drawn(colour=0.3), [0, 0, 0])[:, 0],
        "sigma": always.blur,
        "erased top": erased[0] / (1 - erased[2]),
        "erased left": erased[1] / (1 - erased[3]),
        "erased area": erased[2] * erased[3],
        "erased ratio": erased[2] - erased[3],
        "moved": step.warp[:, 0, 2],
        "smoothed": step.blur,
    }
    correlation = np.corrcoef(np.array([use.astype(float) for use in uses.values()])) - np.eye(len(uses))
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    assert np.abs(correlation).max() < 0.08, [list(uses)[i] for i in worst]


def test_rotation():
    warp = drawn(rotation=12.0).warp
    degrees = np.rad2deg(np.arctan2(warp[:, 1, 0], warp[:, 0, 0]))
    assert -12 <= degrees.min() < -11.9 and 11.9 < degrees.max() <= 12 and abs(degrees.mean()) < 0.5
    np.testing.assert_allclose(warp[:, :, :2] @ warp[:, :, :2].transpose(0, 2, 1), np.tile(np.eye(2), (4000, 1, 1)),
                               atol=1e-6)  # fmt: skip
    assert (np.linalg.det(warp[:, :, :2]) > 0).all() and (warp[:, :, 2] == 0).all()


def test_blur_is_drawn_in_pixels_of_a_clip_of_112():
    sigma = drawn(blur=0.3).blur * 112
    assert share(sigma > 0) == pytest.approx(0.3, abs=0.03)
    sigma = sigma[sigma > 0]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0 and np.median(sigma) == pytest.approx(1.05, abs=0.1)


def test_blurs_one_after_another_add_their_variances():
    both, flag, step = drawn(blur=0.5, randaugment=1), drawn(blur=0.5), drawn(randaugment=1)
    np.testing.assert_allclose(both.blur**2, flag.blur**2 + step.blur**2, rtol=1e-5)
    assert share((flag.blur > 0) & (step.blur > 0)) == pytest.approx(0.05, abs=0.015)


def test_erase():
    top, left, height, width = drawn(erase=0.4).erase.T.astype(np.float64)
    hit = height > 0
    assert share(hit) == pytest.approx(0.4, abs=0.03) and (width[~hit] == 0).all() and (top[~hit] == 0).all()
    top, left, height, width = (x[hit] for x in (top, left, height, width))
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + height <= 1 + 1e-6).all() and (left + width < 1 + 1e-6).all()
    )
    whole = (height < 1) & (width < 1)  # the others are cut to the clip
    area, ratio = (height * width)[whole], (width / height)[whole]
    assert 0.02 <= area.min() < 0.025 and 0.32 < area.max() < 0.331 and share(~whole) < 0.02
    assert 0.299 < ratio.min() < 0.33 and 3.0 < ratio.max() < 3.31
    assert np.median(ratio) == pytest.approx(1, abs=0.1)  # log-uniform
    for start, side in ((top, height), (left, width)):
        place = start[side < 1] / (1 - side[side < 1])
        assert place.min() < 0.01 and place.max() > 0.99 and place.mean() == pytest.approx(0.5, abs=0.03)


def test_grayscale_and_brightness():
    rgb = np.random.default_rng(0).uniform(0, 255, (9, 3))
    grey = seen(drawn(grayscale=0.3), rgb)
    is_grey = np.ptp(grey, axis=2).max(1) < 0.01
    assert share(is_grey) == pytest.approx(0.3, abs=0.03)
    want = TF.rgb_to_grayscale(torch.tensor(rgb.T[:, None] / 255))[0, 0].numpy() * 255
    np.testing.assert_allclose(grey[is_grey][:, :, 0], np.tile(want, (is_grey.sum(), 1)), atol=0.2)  # 0.2989, there
    np.testing.assert_allclose(grey[~is_grey], np.tile(rgb, ((~is_grey).sum(), 1, 1)), atol=0.01)
    light = seen(drawn(brightness=0.4), rgb) / rgb
    assert light.min() == pytest.approx(0.6, abs=0.01) and light.max() == pytest.approx(1.4, abs=0.01)
    assert np.ptp(light, axis=(1, 2)).max() < 0.01 and light.mean() == pytest.approx(1, abs=0.02)


def test_hue_turns_the_colours_and_leaves_grey_and_luma():
    luma = np.array([0.299, 0.587, 0.114])
    plan = drawn(hue=0.25)
    np.testing.assert_allclose(seen(plan, [70, 70, 70]), np.full((4000, 3), 70), atol=0.01)
    red = seen(plan, [200, 50, 50])
    np.testing.assert_allclose(red @ luma, np.full(4000, np.array([200, 50, 50]) @ luma), atol=0.01)
    # I and Q, whatever their units: the angle from where red started
    axes = np.array([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    i, q = axes @ red.T
    i0, q0 = axes @ [200, 50, 50]
    turn = np.angle((i + 1j * q) / (i0 + 1j * q0)) / (2 * np.pi)
    np.testing.assert_allclose(np.hypot(i, q), np.hypot(i0, q0), rtol=1e-4)
    assert -0.2501 < turn.min() < -0.249 and 0.249 < turn.max() < 0.2501 and abs(turn.mean()) < 0.01


def one_colour(gain=1.0, offset=0.0, saturation=1.0, hue=0.0) -> EpochPlan:
    chroma = np.array([saturation * np.exp(2j * np.pi * hue)])
    return dataclasses.replace(drawn(1), colour=colour_matrices(np.array([gain]), np.array([offset]), chroma))


def test_a_third_of_a_turn_takes_red_to_green_as_torchvision_does():
    for hue in (1 / 3, -1 / 3):
        for channel in range(3):
            rgb = np.full(3, 60.0)
            rgb[channel] = 180
            want = TF.adjust_hue(torch.tensor(rgb / 255).view(3, 1, 1), hue).argmax()
            assert seen(one_colour(hue=hue), rgb)[0].argmax() == want == (channel + round(3 * hue)) % 3


def test_colours_equal_dali():
    """DALI's numbers for YIQ are rounded more coarsely, and its contrast comes before its brightness."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    rgb = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pipeline = Pipeline(1, 1, None)
    with pipeline:
        image = fn.external_source(name="image", batch=True)
        twist = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.3, "hue": 40.0}
        pipeline.set_outputs(fn.color_twist(image, dtype=types.FLOAT, **twist))
    pipeline.build()
    pipeline.feed_input("image", [rgb])
    (want,) = pipeline.run()
    plan = one_colour(gain=0.7 * 1.2, offset=128 * (1 - 0.7) * 1.2, saturation=1.3, hue=40 / 360)
    np.testing.assert_allclose(seen(plan, rgb)[0], np.asarray(want[0]), atol=0.6)


def test_speed_spreads_the_clip_over_a_window_anywhere_in_the_video():
    assert differing(drawn(speed=1.0), drawn()) == set()
    frames = drawn(speed=4.0).frames
    assert frames.min() >= 0 and frames.max() < 160 and (np.diff(frames, axis=1) >= 0).all()
    # between the centres of the first and the last of 8 segments lie 7/8 of the window
    factor = 160 * 7 / 8 / (frames[:, -1] - frames[:, 0])
    assert np.median(factor) == pytest.approx(2, abs=0.1)  # log-uniform from 1 to 4
    assert 0.8 < factor.min() < 1.0 and 4 < factor.max() < 6  # jitter within the segments widens the range
    short = factor > 3
    assert frames[short, 0].min() < 3 and frames[short, -1].max() > 156
    assert frames[short].mean() == pytest.approx(79.5, abs=4)
    slow = drawn(200, length=8, speed=8.0).frames  # windows of 1 to 8 frames: some are stretched to a standstill
    assert set(np.ptp(slow, axis=1)) >= {0, 1, 3, 5} and slow.min() == 0 and slow.max() == 7


def test_reverse():
    forwards, some = drawn(speed=1.5).frames, drawn(speed=1.5, reverse=0.3).frames
    backwards = some[:, 0] > some[:, -1]
    assert share(backwards) == pytest.approx(0.3, abs=0.03)
    assert np.array_equal(some[backwards], forwards[backwards, ::-1])
    assert np.array_equal(some[~backwards], forwards[~backwards])


def stupid_operations(strength: float):
    """Every operation that RandAugment may draw: (warp, gain, offset, saturation, blur) of one clip."""
    nothing = (np.eye(3), 1.0, 0.0, 1.0, 0.0)
    yield nothing
    yield (np.eye(3), 1.0, 0.0, 1.0, strength * 2 / 112)
    for s in (strength, -strength):
        angle = math.radians(30 * s)
        turned = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        yield (turned, *nothing[1:])
        for row, column, most in ((0, 1, 0.3), (1, 0, 0.3), (0, 2, 0.45), (1, 2, 0.45)):
            changed = np.eye(3)
            changed[row, column] = most * s
            yield (changed, *nothing[1:])
        yield (np.eye(3), 1 + 0.9 * s, 0.0, 1.0, 0.0)
        yield (np.eye(3), 1 + 0.9 * s, -0.9 * s * 128, 1.0, 0.0)
        yield (np.eye(3), 1.0, 0.0, 1 + 0.9 * s, 0.0)


def one_after_another(first, second):
    return (
        first[0] @ second[0],  # an output pixel goes back through the last change first
        first[1] * second[1],
        first[2] * second[1] + second[2],
        first[3] * second[3],
        math.hypot(first[4], second[4]),
    )


def equals(plan: EpochPlan, operation) -> np.ndarray:
    """Which clips have had this and nothing else done to them."""
    matrix, gain, offset, saturation, blur = operation
    colour = colour_matrices(np.array([gain]), np.array([offset]), np.array([saturation + 0j]))
    same = np.isclose(plan.warp, matrix[:2], atol=1e-6).all((1, 2)) & np.isclose(plan.blur, blur, atol=1e-7)
    return same & np.isclose(plan.colour, colour, atol=1e-5).all((1, 2))


def test_one_step_of_randaugment_is_one_operation_each_as_often():
    plan = drawn(randaugment=1, magnitude=6.0)
    done = np.array([equals(plan, operation) for operation in stupid_operations(0.6)])
    assert (done.sum(0) == 1).all()
    assert done[:2].mean(1) == pytest.approx(0.1, abs=0.02)
    assert done[2:].mean(1) == pytest.approx(0.05, abs=0.015)  # two signs each
    # exactly the identity where colour or blur were drawn
    assert share((plan.warp == np.eye(2, 3)).all((1, 2))) == pytest.approx(0.5, abs=0.03)


def test_steps_of_randaugment_follow_each_other():
    operations = list(stupid_operations(1.0))
    one, two, three = (drawn(randaugment=n, magnitude=10.0) for n in (1, 2, 3))
    after_two = np.zeros(4000, dtype=bool)
    after_three = np.zeros(4000, dtype=bool)
    for first in operations:
        for second in operations:
            both = one_after_another(first, second)
            hit = equals(one, first) & equals(two, both)
            after_two |= hit
            if hit[:400].any():
                for third in operations:
                    after_three |= hit & equals(three, one_after_another(both, third))
    assert after_two.all() and after_three[:400].all()


def test_views_are_spread_over_the_segments_and_mirrored():
    sampler = ClipSampler(0, mode="eval", views=3, mirror_views=True)
    assert (sampler.num_views, ClipSampler(0, mode="eval").num_views) == (6, 1)
    centre = ClipSampler(0, mode="eval").plan(0, LENGTHS)
    for view in range(6):
        plan = sampler.plan(view, LENGTHS)
        u = [(view % 3 + 0.5) / 3] * 16
        assert plan.frames.tolist() == [slow_frames(n, 16, 1, u) for n in LENGTHS]
        assert (plan.mirror == (view >= 3)).all()
        assert differing(plan, centre) <= {"frames", "mirror"}
        assert differing(plan, sampler.plan(view + 6, LENGTHS)) == set()
    assert differing(sampler.plan(1, LENGTHS), centre) == set()
    unmirrored = ClipSampler(0, mode="eval", views=3)
    assert not any(unmirrored.plan(view, LENGTHS).mirror.any() for view in range(6))


# From here on: what the oracle, to which every loader is held, makes of a plan.

PICTURE = np.random.default_rng(4).uniform(0, 255, (20, 20, 3))


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def as_picture(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().transpose(1, 2, 0)


def turned(degrees: float) -> np.ndarray:
    """The warp that `rotation` makes, for an angle of the test's choice."""
    plan = drawn(4000, rotation=180.0)
    angles = np.rad2deg(np.arctan2(plan.warp[:, 1, 0], plan.warp[:, 0, 0]))
    return plan.warp[np.abs(angles - degrees).argmin()]


def test_warp_equals_torch_beyond_the_border_too():
    for seed in range(5):
        matrix = np.eye(2, 3) + np.random.default_rng(seed).uniform(-0.5, 0.5, (2, 3))
        theta = torch.from_numpy(matrix * [1, 1, 2])[None]  # torch's coordinates go from -1 to 1
        grid = F.affine_grid(theta, [1, 3, 20, 20], align_corners=False)
        want = F.grid_sample(as_tensor(PICTURE)[None], grid, padding_mode="border", align_corners=False)[0]
        np.testing.assert_allclose(oracle.warp(PICTURE, matrix), as_picture(want), atol=1e-9)


def test_rotation_is_counter_clockwise_as_in_torchvision_and_pillow():
    np.testing.assert_allclose(oracle.warp(PICTURE, np.array([[0, -1, 0], [1, 0, 0]])), np.rot90(PICTURE), atol=1e-9)
    y, x = np.mgrid[:20, :20] - 9.5
    inside = np.hypot(x, y) < 8.5  # beyond, the others are black
    for degrees in (30, -75):
        matrix = turned(degrees)
        exact = float(np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0])))
        assert abs(exact - degrees) < 1
        got = oracle.warp(PICTURE, matrix)
        torchvision = TF.rotate(as_tensor(PICTURE), exact, TF.InterpolationMode.BILINEAR)
        np.testing.assert_allclose(got[inside], as_picture(torchvision)[inside], atol=0.01)
        pillow = Image.fromarray(PICTURE[:, :, 0].astype(np.float32)).rotate(exact, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(got[:, :, 0][inside], np.asarray(pillow)[inside], atol=0.01)


def test_translation_by_whole_pixels_and_shear_by_rows():
    moved = oracle.warp(PICTURE, np.array([[1, 0, 3 / 20], [0, 1, -2 / 20]]))
    np.testing.assert_allclose(moved[2:, :-3], PICTURE[:-2, 3:], atol=1e-9)
    np.testing.assert_allclose(moved[0, :-3], PICTURE[0, 3:], atol=1e-9)  # the edge repeated
    sheared = oracle.warp(PICTURE, np.array([[1, 2, 0], [0, 1, 0]]))  # row y is moved by 2 (y - 9.5): -1 in row 9
    np.testing.assert_allclose(sheared[9, 1:], PICTURE[9, :-1], atol=1e-9)
    np.testing.assert_allclose(sheared[10, :-1], PICTURE[10, 1:], atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.7, 5.0, 30.0])
def test_blur_equals_torchvision(sigma):
    radius = min(math.ceil(3 * sigma), 19)
    want = TF.gaussian_blur(as_tensor(PICTURE), 2 * radius + 1, sigma)
    np.testing.assert_allclose(oracle.blur(PICTURE, np.float32(sigma / 20)), as_picture(want), atol=2e-3)


def test_resize_equals_pillow_and_keeps_fractions():
    for size in (7, 13, 33):
        got = oracle.resize(PICTURE, size)
        for channel in range(3):
            pillow = Image.fromarray(PICTURE[:, :, channel].astype(np.float32))
            want = np.asarray(pillow.resize((size, size), Image.Resampling.BILINEAR))
            inner = slice(2, -2)  # at the edge Pillow's triangle is cut off
            np.testing.assert_allclose(got[inner, inner, channel], want[inner, inner], atol=1e-3)
    assert np.array_equal(oracle.resize(PICTURE, 20), PICTURE)


def test_crop_rounds_half_a_pixel_up_and_keeps_a_pixel():
    rows = np.arange(8)[:, None, None] * np.ones((1, 4, 3), dtype=np.uint8)
    assert oracle.crop(rows, np.array([0.5 / 8, 0, 2 / 8, 1.0]))[:, 0, 0].tolist() == [1, 2]
    assert oracle.crop(rows, np.array([0.0, 0, 2.5 / 8, 1.0]))[:, 0, 0].tolist() == [0, 1, 2]
    assert oracle.crop(rows, np.array([0.99, 0, 0.001, 1.0]))[:, 0, 0].tolist() == [7]


def test_erase_equals_torchvision():
    box = np.array([0.125, 0.3, 0.25, 0.51], dtype=np.float32)  # rows 2.5 and 7.5: even are 2 and 8; columns 6 to 16
    want = TF.erase(as_tensor(PICTURE), 2, 6, 6, 10, torch.zeros(1, dtype=torch.float64))
    assert np.array_equal(oracle.erase(PICTURE, box), as_picture(want))


def test_the_stages_come_in_their_order():
    """A clip of which every stage does something, and each of them on the result of the one before."""
    frames = [np.random.default_rng(i).integers(0, 256, (24, 28, 3), dtype=np.uint8) for i in range(SEGMENTS)]
    plan = dataclasses.replace(
        drawn(1, colour=0.3, hue=0.1),
        box=np.array([[0.25, 0.0, 0.5, 0.5]]),
        mirror=np.array([True]),
        warp=np.array([[[0, -1, 0.25], [1, 0, 0]]], dtype=np.float32),
        blur=np.array([0.1], dtype=np.float32),
        erase=np.array([[0.0, 0.5, 0.25, 0.5]], dtype=np.float32),
    )
    clip = oracle.oracle_clip(frames, plan, 0, 8)
    assert clip.shape == (SEGMENTS, 3, 8, 8) and clip.dtype == np.float64
    for frame, got in zip(frames, clip, strict=True):
        x = oracle.resize(frame[6:18, :14], 8)[:, ::-1]
        x = np.rot90(np.pad(x, ((0, 0), (0, 2), (0, 0)), mode="edge")[:, 2:])  # turned, after it was moved
        x = as_picture(TF.gaussian_blur(as_tensor(x), 7, float(np.float32(0.1) * 8)))
        x = (seen(plan, x)[0] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        x[:2, 4:] = 0
        np.testing.assert_allclose(got, x.transpose(2, 0, 1), atol=1e-4)
    nothing = dataclasses.replace(drawn(1), box=np.array([[0.0, 0, 1, 1]]), mirror=np.array([False]))
    plain = oracle.oracle_clip([f[:, :24] for f in frames], nothing, 0, 24)
    for frame, got in zip(frames, plain, strict=True):
        want = (frame[:, :24] / 255 - IMAGENET_MEAN) / IMAGENET_STD
        np.testing.assert_allclose(got, want.transpose(2, 0, 1), atol=1e-5)
