"""Two processes that train one model by captured steps, beside the eager ones of torch's own DDP.

`python tests/two_processes.py STORE RANKS N`: a fork each, which says why where it is not as it should be. Each of
RANKS (such as "none,1,0:2,odd1") is one training: the rank that cannot capture there, or not the second time, or for a
reason that is no RuntimeError, as Triton has them; "gpu" is one of both processes on one GPU. N batches make a step; of
several the loss is scaled, as fp16 needs it.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dfer.batch import Batch, empty_batch
from dfer.config import Config, RunConfig
from dfer.precision import Precision
from dfer.run.algorithms import chosen_algorithms
from dfer.run.distributed import Exchange, World, broadcast_buffers, settle_buckets
from dfer.run.graph import WARM_UP, CudaGraphs, together
from dfer.run.step import TrainingStep
from dfer.state import Job
from tests.forks import in_forks
from tests.recorded import Apart
from tests.test_graph import assert_same, batches, configured, everything, job_of, on_card, told
from train import training_loss

NUM_STEPS = WARM_UP + 4  # of those that are logged and those that are not, one to be captured and one to be replayed


class OutOfResources(Exception):
    """What a kernel may raise that Triton cannot launch."""


def job_together(
    config: Config, world: World, reference: bool, fails_at: str | None = None, number: int = 1,
    error: type[Exception] = RuntimeError,
) -> Job:  # fmt: skip
    """A job of one rank; `reference`: eager, and wrapped as torch's documentation has it."""
    job = job_of(config, None, scaled=config.optim.accumulate > 1)._replace(world=world)
    if reference:
        return with_ddp(job, next(batches(1)))
    alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
    exchange = exchange_of(job)

    def changed() -> list[Tensor]:
        gradients = [p.grad for p in job.state.model.parameters() if p.grad is not None]
        scaler = job.state.scaler
        scale = [scaler._scale, scaler._growth_tracker] if scaler.is_enabled() else []
        return [*everything(job), *gradients, *scale, exchange._flat]

    return with_graphs(job, Apart(changed, alone, fails_at, number, error), exchange)


def with_ddp(job: Job, batch: Batch) -> Job:
    """A job of eager steps, by DDP."""
    job = job._replace(model=DistributedDataParallel(job.model))
    settle_buckets(job.model, batch, lambda batch: training_loss(job, batch)[0])
    return job._replace(step=TrainingStep(job, training_loss, together(None, job.world)))


def exchange_of(job: Job) -> Exchange:
    """Of a rank whose weights and statistics are others than rank 0's until then."""
    if job.world.rank:
        with torch.no_grad():
            for tensor in (*job.state.model.parameters(), *job.state.model.buffers()):
                tensor.zero_()
    return Exchange(job.state.model, job.world)


def with_graphs(job: Job, backend: object, exchange: Exchange) -> Job:
    """A job whose steps a backend captures, with the exchange between them."""
    return job._replace(step=TrainingStep(job, training_loss, together(backend, job.world), exchange))


def compare(job: Job, want: Job) -> None:
    """As jobs are when they are evaluated: by rank 0's batch statistics, which DDP has all ranks have in each step."""
    for state in (job.state, want.state):
        broadcast_buffers(state.model)
        broadcast_buffers(state.evaluated_model())
    assert_same(job, want, gradients=False)


def compare_logged(logged: list[list[Tensor]], want: list[list[Tensor]]) -> None:
    for a, b in zip(logged, want, strict=True):
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def given(rank: int, accumulate: int) -> Iterator[Batch]:
    """A rank's own batches; two of rank 1's make both ranks skip a step: the first one, and one that is replayed."""
    harmed = (0, accumulate * (WARM_UP + 1)) if rank == 1 else ()
    good, bad = batches(2 * NUM_STEPS * accumulate), batches(2 * NUM_STEPS * accumulate, harmed=range(10**3))
    for number, pair in enumerate(itertools.islice(zip(good, bad, strict=True), rank, None, 2)):
        yield pair[number in harmed]


def play(rank: int, store: str, cases: str, accumulate: int) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    world, config = World(rank, 2, rank, 2, torch.device("cpu")), configured(accumulate=accumulate)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=2))
    want = job_together(config, world, reference=True)
    want_logged = told(want, given(rank, accumulate))
    assert want.state.guard.skipped.tolist() == [2, 0]
    for case in cases.split(",") if cases != "gpu" else ():
        failing, _, number = case.partition(":")
        number, odd = int(number or 1), failing.startswith("odd")
        failing = failing.removeprefix("odd")
        fails_at = "native_batch_norm_backward" if number <= accumulate else "where"
        fails_at = fails_at if failing == str(rank) else None
        error = OutOfResources if odd else RuntimeError
        job = job_together(config, world, False, fails_at, number, error)
        backend = job.step.graphs._backend
        logged = told(job, given(rank, accumulate))
        compare(job, want)
        compare_logged(logged, want_logged)
        parts = accumulate + 1
        note, captured = job.step.take_note(), (backend.warmed, backend.captured, backend.replayed)
        if failing == "none":
            assert note is None and job.step.graphs.active
            # Steps that are logged have a graph of their own for what is diagnosed; all have the same end.
            assert captured == (WARM_UP * parts, parts + 1, (NUM_STEPS - WARM_UP) * parts)
        else:
            why = f"cannot be captured (rank {failing}: {'OutOfResources: ' * odd}operation not"
            assert note.startswith(f"--run.graph: {named(number, accumulate)} {why}"), note
            assert note.endswith("; all goes on without a graph"), note
            assert not job.step.graphs.active
    if cases == "gpu":
        share_a_card(config, rank, accumulate)
    dist.destroy_process_group()


def named(number: int, accumulate: int) -> str:
    """What is captured as the `number`-th."""
    if number > accumulate:
        return "the end of a training step"
    if accumulate == 1:
        return "a training step"
    return f"the {'first' if number == 1 else 'last'} batch of a training step"


def share_a_card(config: Config, rank: int, accumulate: int) -> None:
    """Both processes on one GPU, which NCCL does not take: gloo exchanges between their graphs."""
    world = World(rank, 2, 0, 2, torch.device("cuda", 0))
    with chosen_algorithms(RunConfig(deterministic=True)):
        jobs = [job_of(config, None, precision=Precision(world.device, None, True))._replace(world=world) for _ in "ab"]
        jobs = [
            with_ddp(jobs[0], empty_batch(2, 2, 32, world.device)),
            with_graphs(jobs[1], CudaGraphs(world.device), exchange_of(jobs[1])),
        ]
        want_logged, logged = (told(job, on_card(given(rank, accumulate))) for job in jobs)
        compare(jobs[1], jobs[0])
        compare_logged(logged, want_logged)
    assert jobs[1].step.take_note() is None and jobs[1].step.graphs.active


def main(store: str, cases: str, accumulate: str) -> int:
    torch.set_num_threads(1)
    return in_forks(2, lambda rank: play(rank, store, cases, int(accumulate)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
