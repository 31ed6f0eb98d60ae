"""Two processes that train one model by captured steps, beside the eager ones of torch's own DDP.

`python tests/two_processes.py STORE RANKS N`: a fork each, which says why where it is not as it should be. Each of
RANKS (such as "none,1,0:2,odd1") is one training: the rank that cannot capture there, or not the second time, or for a
reason that is no RuntimeError, as Triton has them; "gpu" is one of both processes on one GPU, whose exchange by gloo
neither can capture. N batches make a step.
"""

import itertools
import os
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dfer.batch import Batch, empty_batch
from dfer.config import Config, RunConfig
from dfer.precision import Precision
from dfer.run import distributed
from dfer.run.algorithms import chosen_algorithms
from dfer.run.distributed import World, settle_buckets
from dfer.run.graph import WARM_UP_TOGETHER, CudaGraphs, together
from dfer.run.step import TrainingStep
from dfer.state import Job
from tests.recorded import Apart
from tests.test_graph import assert_same, batches, configured, everything, job_of, on_card, told
from train import training_loss

NUM_STEPS = WARM_UP_TOGETHER + 3


class OutOfResources(Exception):
    """What a kernel may raise that Triton cannot launch."""


def job_together(
    config: Config, world: World, reference: bool, fails_at: str | None = None, number: int = 1,
    error: type[Exception] = RuntimeError,
) -> Job:  # fmt: skip
    """A job of one rank; `reference`: eager, and wrapped as torch's documentation has it."""
    job = job_of(config, None)
    model = DistributedDataParallel(job.model) if reference else distributed.parallel(job.model, world)
    job = job._replace(model=model, world=world)
    settle_buckets(model, next(batches(1)), lambda batch: training_loss(job, batch)[0])
    backend = None
    if not reference:
        alone = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
        backend = Apart(lambda: everything(job) + [p.grad for p in job.state.model.parameters() if p.grad is not None],
                        alone, fails_at, number, error)  # fmt: skip
    return job._replace(step=TrainingStep(job, training_loss, together(backend, world)))


def given(rank: int, accumulate: int) -> Iterator[Batch]:
    """A rank's own batches; two of rank 1's make both ranks skip a step: the first one, and one that is replayed."""
    harmed = (0, accumulate * (WARM_UP_TOGETHER + 1)) if rank == 1 else ()
    good, bad = batches(2 * NUM_STEPS * accumulate), batches(2 * NUM_STEPS * accumulate, harmed=range(10**3))
    for number, pair in enumerate(itertools.islice(zip(good, bad, strict=True), rank, None, 2)):
        yield pair[number in harmed]


def play(rank: int, store: str, cases: str, accumulate: int) -> None:
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    world, config = World(rank, 2, rank, 2, torch.device("cpu")), configured(accumulate=accumulate)
    want = job_together(config, world, reference=True)
    want_logged = told(want, given(rank, accumulate))
    assert want.state.guard.skipped.tolist() == [2, 0]
    for case in cases.split(",") if cases != "gpu" else ():
        failing, _, number = case.partition(":")
        number, odd = int(number or 1), failing.startswith("odd")
        failing = failing.removeprefix("odd")
        fails_at = "native_batch_norm_backward" if failing == str(rank) else None
        error = OutOfResources if odd else RuntimeError
        job = job_together(config, world, False, fails_at, number, error)
        backend = job.step.graphs._backend
        logged = told(job, given(rank, accumulate))
        assert_same(job, want)
        for a, b in zip(logged, want_logged, strict=True):
            assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))
        note, captured = job.step.take_note(), (backend.warmed, backend.captured, backend.replayed)
        if failing == "none":
            assert note is None and job.step.graphs.active
            assert captured == (WARM_UP_TOGETHER * accumulate, accumulate, (NUM_STEPS - WARM_UP_TOGETHER) * accumulate)
        else:
            what = "the last batch" if number > 1 else "the first batch"
            what = "a training step" if accumulate == 1 else f"{what} of a training step"
            what += "" if (accumulate, number) == (2, 1) else " that is logged"
            named = f"--run.graph: {what} cannot be captured (rank {failing}: {'OutOfResources: ' * odd}operation not"
            assert note.startswith(named) and note.endswith("; all goes on without a graph"), note
            assert not job.step.graphs.active
            assert captured == (WARM_UP_TOGETHER * accumulate, number - (failing == str(rank)), number - 1)
    if cases == "gpu":
        share_a_card(config, rank, accumulate)
    dist.destroy_process_group()


class Unwilling(CudaGraphs):
    """Captures nothing."""

    def capture(self, function):
        raise RuntimeError("gloo's exchange cannot be captured")


def share_a_card(config: Config, rank: int, accumulate: int) -> None:
    """Both processes on one GPU: none captures, as gloo waits for the device, and eager steps go on.

    Were it tried, one rank would wait for what the other has not sent.
    """
    world = World(rank, 2, 0, 2, torch.device("cuda", 0))
    precision = Precision(world.device, None, True)
    with chosen_algorithms(RunConfig(deterministic=True)):
        jobs = []
        for backend in (None, Unwilling(world.device)):
            graphs, job = together(backend, world), job_of(config, None, precision=precision)
            with graphs.stream():
                job = job._replace(model=distributed.parallel(job.model, world), world=world)
                empty = empty_batch(2, 2, 32, world.device)
                settle_buckets(job.model, empty, lambda batch, job=job: training_loss(job, batch)[0])
            jobs.append(job._replace(step=TrainingStep(job, training_loss, graphs)))
            told(jobs[-1], on_card(given(rank, accumulate)))
        assert_same(*jobs)
    note = jobs[1].step.take_note()
    assert note is not None and "cannot be captured (rank " in note and not jobs[1].step.graphs.active, note


def main(store: str, cases: str, accumulate: str) -> int:
    torch.set_num_threads(1)
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            code = 1
            try:
                play(rank, store, cases, int(accumulate))
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
