"""Processes that share what they hold: `python tests/sharing.py STORE cpu|gpu [LIST]`, a fork for each.

cpu: two machines, of two processes and of one. gpu: two processes on one card, which hold the raw clips of a list.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist

from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.cli import UserError
from dfer.lists.index import load_index
from dfer.plan.sampling import ClipSampler
from dfer.run.distributed import World
from dfer.run.neighbours import Neighbours
from tests.forks import in_forks

PLACES = {"cpu": [(0, 2), (1, 2), (0, 1)], "gpu": [(0, 2), (1, 2)]}  # local rank and size


def on_two_machines(rank: int, world: World) -> None:
    neighbours, first = Neighbours(world), rank - world.local_rank
    ranks = list(range(first, first + world.local_size))
    assert (neighbours.rank, neighbours.size) == (world.local_rank, world.local_size)
    assert neighbours.each({rank: "x" * rank}) == [{other: "x" * other} for other in ranks]
    neighbours.agree(None)
    for whys in ({1: "a reason"}, {2: "none", 1: "a reason"}):
        try:
            neighbours.agree(whys.get(rank))
        except UserError as error:
            assert str(error) == "rank 1: a reason"
        else:
            raise AssertionError("it went on")
    assert neighbours.each(rank) == ranks


def on_one_card(rank: int, world: World, list_path: str) -> None:
    index, sampler = load_index(Path(list_path)), ClipSampler(0, 4)
    options = LoaderOptions(2, 32, device="gpu", device_id=0, cached=True, rank=rank, world_size=2)
    shared = LoaderOptions(**vars(options) | {"neighbours": Neighbours(world)})
    whole, loader = (ClipLoader(index, sampler, some) for some in (options, shared))
    assert len(loader._resident.parts[0]) < len(whole._resident.parts[0])
    count = 0
    for batch, want in zip(loader(1), whole(1), strict=True):
        assert torch.equal(batch.clips, want.clips) and torch.equal(batch.ids, want.ids)
        count += 1
    assert count
    loader.options.neighbours.agree(None)  # before one of them goes, and its memory


def play(kind: str, rank: int, store: str, list_path: str) -> None:
    places = PLACES[kind]
    file, size = dist.FileStore(store, len(places)), len(places)
    dist.init_process_group("gloo", store=file, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    device = torch.device("cuda", 0) if kind == "gpu" else torch.device("cpu")
    world = World(rank, len(places), *places[rank], device)
    if kind == "gpu":
        on_one_card(rank, world, list_path)
    else:
        on_two_machines(rank, world)
    dist.destroy_process_group()


def main(store: str, kind: str, list_path: str = "") -> int:
    torch.set_num_threads(1)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # for tests, as torch says
    return in_forks(len(PLACES[kind]), lambda rank: play(kind, rank, store, list_path))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
