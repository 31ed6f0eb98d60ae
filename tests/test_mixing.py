"""Mixup and cutmix: what is drawn, and what becomes of a batch, against loops."""

import dataclasses
import hashlib
import itertools
from typing import get_args

import numpy as np
import pytest
import torch

from dali_pipes.build import build_loader
from dfer.batch import Batch, mixed
from dfer.cli import UserError
from dfer.config import Config, DataConfig, parse_config
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.balance import Balance
from dfer.plan.sampling import epoch_plan, shard
from dfer.run.distributed import World
from tests.conftest import no_waiting

LENGTHS = np.full(41, 20)
BOTH = Augmentation(mixup=0.8, cutmix=1.0)


def pictures(size: int = 8) -> torch.Tensor:
    """Of each row of the plan, laid out as the loader's are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LENGTHS), 2, size, size, 3, generator=generator).permute(0, 1, 4, 2, 3)


def batch_of(rows: np.ndarray, valid: np.ndarray | None = None) -> Batch:
    ids = torch.from_numpy(np.ascontiguousarray(rows))
    ok = torch.ones(len(rows), dtype=torch.bool) if valid is None else torch.from_numpy(valid)
    return Batch(pictures()[ids], ids % 7, ok, ids)


def slow_mix(clip, other, draw, size):
    """The oracle: pixel by pixel."""
    weight, top, left, height, width = draw
    rows = np.round(np.float32([top, top + height]) * np.float32(size))
    columns = np.round(np.float32([left, left + width]) * np.float32(size))
    out, own = clip.clone(), 0.0
    for y in range(size):
        for x in range(size):
            if rows[0] <= y < rows[1] and columns[0] <= x < columns[1]:
                out[..., y, x] = other[..., y, x]
            else:
                out[..., y, x] = weight * clip[..., y, x] + (1 - weight) * other[..., y, x]
                own += weight / size**2
    return out, own


@pytest.mark.parametrize("augmentation", [BOTH, Augmentation(mixup=0.4), Augmentation(cutmix=0.7)])
def test_a_batch_is_mixed_as_the_plan_says(augmentation):
    plan = epoch_plan(3, 1, LENGTHS, 4, augmentation=augmentation)
    rows, _ = shard(plan.order, 0, 1, 20, pad=False)
    batch = batch_of(rows[1])
    found = mixed(batch, plan.mix[rows[1]])
    for i in range(20):
        want, own = slow_mix(batch.clips[i], batch.clips[i ^ 1], plan.mix[rows[1][i]].tolist(), 8)
        torch.testing.assert_close(found.clips[i], want)
        assert found.mix.share[i].item() == pytest.approx(own, abs=1e-5) and found.mix.partner[i] == i ^ 1
    assert found.clips.stride() == batch.clips.stride()  # as convolutions like it
    assert (found.mix.share < 1).any() and torch.equal(found.labels, batch.labels)


def test_what_is_drawn_covers_its_range():
    plan = epoch_plan(0, 0, np.full(4001, 20), 4, augmentation=Augmentation(mixup=1.0, cutmix=1.0))
    first, second = plan.mix[plan.order[:4000:2]], plan.mix[plan.order[1:4000:2]]
    assert np.array_equal(first, second) and plan.mix[plan.order[-1]].tolist() == [1, 0, 0, 0, 0]  # has no neighbour
    weight, top, left, height, width = first.T.astype(np.float64)
    cut = weight == 1
    assert 0.46 < cut.mean() < 0.54 and (first[~cut, 1:] == 0).all()
    assert weight[~cut].mean() == pytest.approx(0.5, abs=0.03) and 0 < weight.min() < 0.01  # uniform, for alpha 1
    assert min(top.min(), left.min()) >= 0 and max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    assert 0.25 < (height * width)[cut].mean() < 0.5
    peaked = epoch_plan(0, 0, LENGTHS, 4, augmentation=Augmentation(mixup=100.0)).mix
    assert (abs(peaked[peaked[:, 0] < 1, 0] - 0.5) < 0.2).all()


def test_mixing_changes_nothing_else_and_draws_are_of_seed_and_epoch():
    plain, plan = epoch_plan(3, 1, LENGTHS, 4), epoch_plan(3, 1, LENGTHS, 4, augmentation=BOTH)
    assert plain.mix is None and np.array_equal(plain.order, plan.order) and np.array_equal(plain.frames, plan.frames)
    assert np.array_equal(plan.mix, epoch_plan(3, 1, LENGTHS, 4, augmentation=BOTH).mix)
    kept = hashlib.sha256(plan.mix.astype(np.float64).round(6).tobytes()).hexdigest()[:16]
    assert kept == "ba39ef37894ec4d1"  # NumPy may draw Beta otherwise one day: runs would not be repeatable
    for seed, epoch in ((3, 2), (4, 1)):
        assert not np.array_equal(plan.mix[plan.order], epoch_plan(seed, epoch, LENGTHS, 4, augmentation=BOTH).mix)


@pytest.mark.parametrize("world", [2, 5, 10])
def test_clips_are_mixed_alike_on_any_number_of_processes(world):
    plan = epoch_plan(3, 1, LENGTHS, 4, augmentation=BOTH)

    def steps(world: int) -> list[torch.Tensor]:
        ranks = [shard(plan.order, rank, world, 20 // world, pad=False)[0] for rank in range(world)]
        return [torch.cat([mixed(batch_of(r[s]), plan.mix[r[s]]).clips for r in ranks]) for s in range(2)]

    assert all(torch.equal(a, b) for a, b in zip(steps(1), steps(world), strict=True))


def test_a_clip_that_is_not_valid_poisons_no_other():
    plan = epoch_plan(3, 1, LENGTHS, 4, augmentation=BOTH)
    rows, valid = plan.order[:8], np.array([1, 1, 0, 1, 1, 0, 0, 0], dtype=bool)
    batch = batch_of(rows, valid)
    batch.clips[torch.from_numpy(~valid)] = torch.nan
    found = mixed(batch, plan.mix[rows])
    for i in (3, 4):
        assert torch.equal(found.clips[i], batch.clips[i]) and found.mix.share[i] == 1 and found.mix.partner[i] == i
    assert found.clips[:2].isfinite().all() and not torch.equal(found.clips[0], batch.clips[0])


def test_an_odd_batch_is_one_line(clips):
    index = load_index(clips / "train.txt")
    world = World(0, 1, 0, 1, torch.device("cpu"))
    words = ["debug", "--data.batch-size", "3", "--data.augmentation.cutmix", "0.5"]
    with pytest.raises(UserError, match=r"--data\.batch-size 3: mixup and cutmix mix pairs"):
        build_loader(parse_config(words), index, "train", world)
    build_loader(parse_config(words), index, "eval", world)  # nothing is mixed there


def test_the_loader_mixes(clips):
    """Its batches are those of the unmixed loader, mixed by the plan."""
    index, world = load_index(clips / "train.txt"), World(0, 1, 0, 1, torch.device("cpu"))
    words = ["debug", "--data.batch-size", "4", "--data.num-segments", "2"]
    plain = build_loader(parse_config(words), index, "train", world)
    loader = build_loader(parse_config([*words, "--data.augmentation.mixup", "0.8"]), index, "train", world)
    plan = loader.sampler.plan(2, index.num_frames, index.labels)
    for step, (a, b) in enumerate(zip(plain(2), loader(2), strict=True)):
        want = mixed(a, plan.mix[plan.order[4 * step : 4 * step + 4]])
        assert a.mix is None and torch.equal(want.clips, b.clips) and torch.equal(want.mix.share, b.mix.share)
    assert step >= 1


MIXING = {"off": {}, "mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}}


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("balance", get_args(Balance))
def test_an_epoch_is_the_same_on_two_ranks_and_from_its_middle(clips, balance, mixing):
    """Clips, labels, whose pixels are in them, and pixels, to the bit, with the ranks' rows put together."""
    index = dataclasses.replace(load_index(clips / "train.txt"), labels=np.array([0] * 12 + [1] * 6 + [2] * 2))
    drawn = Augmentation(**MIXING[mixing])
    data = DataConfig(size=32, num_segments=2, balance=balance, augmentation=drawn)

    def batches(world_size: int = 1, start_step: int = 0) -> list[list[Batch]]:
        """Step -> the batches of all ranks, each of a loader of its own, as of a process that has just begun."""
        config, ranks = Config(data=dataclasses.replace(data, batch_size=4 // world_size)), []
        for rank in range(world_size):
            world = World(rank, world_size, rank, world_size, torch.device("cpu"))
            ranks.append(list(build_loader(config, index, "train", world)(1, start_step)))
        return [list(step) for step in zip(*ranks, strict=True)]

    whole, shared, rest = batches(), batches(2), batches(2, start_step=2)
    assert len(whole) == 5
    for (want,), ranks in itertools.chain(zip(whole, shared, strict=True), zip(whole[2:], rest, strict=True)):
        for name in ("ids", "labels", "valid", "clips"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in ranks]), getattr(want, name)), name
        assert (want.mix is not None) == (mixing != "off") == any(batch.mix is not None for batch in ranks)
        if want.mix is not None:
            partners = torch.cat([batch.mix.partner + 2 * rank for rank, batch in enumerate(ranks)])
            assert torch.equal(partners, want.mix.partner) and partners.tolist() == [1, 0, 3, 2]
            assert torch.equal(torch.cat([batch.mix.share for batch in ranks]), want.mix.share)
    ids = torch.cat([batch.ids for (batch,) in whole])
    assert (len(ids.unique()) == len(index)) == (balance == "none")  # else it draws some again
    assert mixing == "off" or len({float(s) for (batch,) in whole for s in batch.mix.share}) > 5


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    plan = epoch_plan(3, 1, LENGTHS, 4, augmentation=BOTH)
    batch = batch_of(plan.order[:8])
    there = batch._replace(clips=batch.clips.cuda(), labels=batch.labels.cuda(), valid=batch.valid.cuda())
    mixed(there, plan.mix[plan.order[:8]])  # the first one loads kernels
    with no_waiting():
        found = mixed(there, plan.mix[plan.order[:8]])
    torch.testing.assert_close(found.clips.cpu(), mixed(batch, plan.mix[plan.order[:8]]).clips)
