"""Train and validate: `python train.py [preset] [--key value ...]`, or `torchrun --nproc_per_node=4 train.py ...`.

The same command with the same --run.name continues the run from its last checkpoint, as if it had never stopped; with
--resume and without a name the newest unfinished run of its configuration.
Exit codes: 0 done; 2 something is to be changed, which one line says; 75 stopped by a signal with everything saved; 70
stopped by one without, since a step did not end in time (--run.grace); 69 another process died or hangs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python leaves it out if PYTHONSAFEPATH is set
from dfer.cli import begin, one_line_errors

if __name__ == "__main__":
    begin("train.py", "torch, DALI and timm")
import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dali_pipes.build import build_loader
from dfer.batch import Batch, empty_batch
from dfer.config import Config
from dfer.evaluation import evaluate
from dfer.lists.index import ClipIndex, load_index
from dfer.losses import Objective, build_objective
from dfer.metrics import BEGINNING, Throughput
from dfer.optim.schedule import build_schedule
from dfer.precision import build_precision
from dfer.report.live import LivePage, print_report
from dfer.run import distributed, dry_run
from dfer.run.algorithms import chosen_algorithms
from dfer.run.checkpoint import decode_state, newest_checkpoint
from dfer.run.continuing import parse_command
from dfer.run.distributed import World
from dfer.run.folder import RunFolder, about_run, continued_config, diverged, open_run, shared_config, started_config
from dfer.run.graph import build_graphs
from dfer.run.logger import Logger
from dfer.run.memory import memory_advice
from dfer.run.predictions import write_predictions
from dfer.run.profiler import TRACE, Profiler, check_steps
from dfer.run.provenance import note_start
from dfer.run.resolving import with_cache
from dfer.run.signals import EXIT_STOPPED, StopSignals
from dfer.run.step import with_step
from dfer.state import Job, Step, build_state, load_trained

COMMAND = __name__ == "__main__"  # else another program calls main(): a notebook, which is not ours to end


class Data(NamedTuple):
    """The clips of a run, and what training on them minimises."""

    train_index: ClipIndex
    val_index: ClipIndex
    objective: Objective


class Diverged(Exception):
    """Many optimizer steps in a row were skipped, as their loss or gradient is non-finite. Holds the last batch."""

    def __init__(self, batch: Batch):
        super().__init__()
        self.batch = batch


def main(config: Config) -> int:
    """Run what the configuration says, and return the exit code."""
    distributed.find_place()  # what is wrong with the launcher is said first
    data = read_data(config := started_config(config))
    config = with_cache(config, data.train_index, data.val_index)
    world = distributed.setup(config.run.device, timedelta(seconds=config.run.timeout))
    with distributed.peers_named(world):
        if (shared := shared_config(config, world)) != config:
            config, data = shared, read_data(shared)
        if config.validate_only:
            with chosen_algorithms(config.run), memory_advice(config):
                return try_out(config, data, world)
        run = open_run(config, world) if world.is_main else None
        saved, damage = None, []
        with contextlib.closing(run) if run else contextlib.nullcontext():
            if run:
                saved, damage = newest_checkpoint(run.checkpoints)
            content = distributed.share(saved, world)
            state = decode_state(content, config.run.log_dir) if content else None
            if state:
                config = continued_config(state, config, data, world.size)
            with chosen_algorithms(config.run), memory_advice(config, begun=state is not None):
                code = train(prepare(config, data, world, state), run, state, damage)
    if run and code == 0:
        print_report(run.path, build_loader, load_trained)
    return code


def read_data(config: Config) -> Data:
    """Find the clips of both lists, and the labels to train on."""
    data, keep = config.data, not config.validate_only
    train_index = load_index(data.train_list, data.root, data.source, bad_videos=data.bad_clips, write_cache=keep)
    val_index = load_index(data.val_list, data.root, data.source, write_cache=keep)
    return Data(train_index, val_index, build_objective(config.loss, train_index.records))


def prepare(config: Config, data: Data, world: World, checkpoint: dict[str, Any] | None) -> Job:
    """Build all that a run needs before its first step, fresh or as a checkpoint has it."""
    train_loader = build_loader(config, data.train_index, "train", world)
    val_loader = build_loader(config, data.val_index, "eval", world)
    schedule = build_schedule(config, train_loader, world.size)
    check_steps(config.profile, schedule.steps_per_epoch)
    precision = build_precision(config.run, world.device)
    state = build_state(config, precision, checkpoint)
    objective, graphs = data.objective.on(world.device), build_graphs(config.run, world)
    # Where steps are graphs, gradients are exchanged between them (`Exchange`); else DDP does, while it makes them.
    model = distributed.parallel(state.model, world) if world.size > 1 and not graphs.active else state.model
    job = Job(config, world, train_loader, val_loader, state, model, objective, schedule, precision)
    if isinstance(model, DistributedDataParallel):
        empty = empty_batch(config.data.batch_size, train_loader.sampler.clip_length, config.data.size, world.device)
        distributed.settle_buckets(model, empty, lambda batch: training_loss(job, batch)[0])
    return with_step(job, training_loss, graphs)


def train(job: Job, run: RunFolder | None, checkpoint: dict[str, Any] | None, damage: list[str]) -> int:
    """Train and evaluate epoch by epoch, from the beginning or from a checkpoint; return the exit code.

    `run` is rank 0's. `damage` says why newer checkpoints than this one are not used.
    """
    config, world, state = job.config, job.world, job.state
    about, changes = about_run(job, checkpoint)
    if run:
        run.begin(config, state.num_bytes())
        note_start(run.path, state.step, world, about["faces"])
    start_evaluated = state.evaluated * job.schedule.steps_per_epoch == state.step
    wandb_id = checkpoint["wandb_id"] if checkpoint else None
    logger = Logger(run.path if run else None, config, job.schedule.total_steps, state.step, start_evaluated, wandb_id)
    stop = StopSignals(world, timedelta(seconds=config.run.timeout), COMMAND, config.run.grace)

    def save() -> None:
        """Write a checkpoint of this very step. The other ranks have nothing to add, and go on."""
        logger.secure()
        if run:
            run.save(state.state_dict() | about | {"wandb_id": logger.wandb_id})
        stop.unsaved = 0

    assert job.step is not None
    with stop, contextlib.closing(logger), contextlib.closing(job.step):
        logger.announce(job, damage, changes)
        if state.evaluated == config.optim.epochs:
            logger.say(f"{run.path if run else ''}: all {config.optim.epochs} epochs are done; nothing is left to do")
            return 0
        throughput, result = Throughput(world.size, job.step.worked_s), None
        page = LivePage(run.path if run else None, logger.say)
        profiler = Profiler(config.profile if run else 0, config.optim.accumulate, run and run.path / TRACE, logger.say)
        while state.evaluated < config.optim.epochs:
            result = None
            if train_epoch(job, throughput, profiler, logger, stop, run, save):
                model, predict = state.evaluated_model(), job.step.predict
                result = evaluate(model, job.val_loader, world, job.precision, stop, logger.evaluating, predict)
            if result is None:
                save()
                stop.saved = True
                logger.stopped(state.step)
                return EXIT_STOPPED
            line = logger.evaluation(job, result)
            better = state.improve({"WAR": result.confusion.war(), "UAR": result.confusion.uar()})
            state.evaluated += 1
            if run:  # before the checkpoint: one that calls these weights the best finds them
                run.keep_best(state, better, about)
                write_predictions(run.path / "predictions.csv", job.val_loader.index, result.ids, result.probabilities)
            # On a GPU an epoch may take less than to save it: a run that is killed repeats some of them then.
            if run is None or world.device.type == "cpu" or state.evaluated == config.optim.epochs or run.pays():
                save()
            logger.evaluated(line, state.best)
            if state.evaluated < config.optim.epochs:
                page.write()
        profiler.finish()
        assert result is not None
        logger.result(result.confusion, throughput.read(), state.best)
    return 0


def train_epoch(
    job: Job,
    throughput: Throughput,
    profiler: Profiler,
    logger: Logger,
    stop: StopSignals,
    run: RunFolder | None,
    save: Callable[[], None],
) -> bool:
    """Train for the rest of an epoch, log and save. Return False if a signal ended it."""
    state, steps_per_epoch = job.state, job.schedule.steps_per_epoch
    row_began = throughput.snapshot()
    batches = profiler.watch(throughput.timed(epoch_batches(job)), steps_per_epoch - job.steps_done)
    try:
        for step in train_steps(job, batches):
            logger.step_done(state.step)
            while note := job.step.take_note():
                logger.say(note)
            stop.unsaved += 1
            done = job.steps_done
            if job.logs(done):
                logger.steps(job, step.grad_norm, step.diagnostics, throughput.read(since=row_began))
                row_began = throughput.snapshot()
            if stop.requested():
                return False
            if run and done < steps_per_epoch and run.due():
                save()
    except Diverged as error:
        raise diverged(job, run, error.batch) from None
    logger.flush()
    return True


def epoch_batches(job: Job) -> Iterator[Batch]:
    """Yield the batches that are left of the epoch that the state is in.

    Before the end, what comes next begins to be read, and then to be made: the clips to evaluate, the next epoch's.
    """
    epoch, accumulate = job.state.evaluated, job.config.optim.accumulate
    first, last = job.steps_done * accumulate, job.schedule.steps_per_epoch * accumulate
    batches = itertools.islice(job.train_loader(epoch, first), last - first)
    for number, batch in enumerate(batches, start=first):
        if number >= last - 2:
            job.val_loader.prepare(0)
            if epoch + 1 < job.config.optim.epochs:
                job.train_loader.prepare(epoch + 1)
        yield batch


def train_steps(job: Job, batches: Iterable[Batch]) -> Iterator[Step]:
    """Yield after each optimizer step on the batches of an epoch. Nothing in here waits for the GPU.

    Raises:
        Diverged: if too many steps in a row were skipped.
    """
    state, accumulate = job.state, job.config.optim.accumulate
    assert job.step is not None
    job.model.train()
    for micro, batch in enumerate(batches, start=job.steps_done * accumulate):
        first, last = micro % accumulate == 0, (micro + 1) % accumulate == 0
        # Dropout too is a function of (seed, step, rank): a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(zlib.crc32(f"{job.config.seed}/{state.evaluated}/{micro}/{job.world.rank}".encode()))
        if first:
            job.schedule.set_lr(state.optimizer, state.step)
        step = job.step(batch, first, last)
        if step is not None:
            if state.guard.diverged():
                raise Diverged(batch)
            state.step += 1
            yield step


def training_loss(job: Job, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch and the model's diagnostics."""
    prediction = job.precision.forward(job.model, batch.clips)
    return job.objective(prediction, batch), prediction.diagnostics


def try_out(config: Config, data: Data, world: World) -> int:
    """Do everything that a run does but write, in small, and print what the run will take by that."""
    head = data._replace(val_index=data.val_index.head(dry_run.BATCHES * config.data.batch_size * world.size))
    with StopSignals(world, timedelta(seconds=config.run.timeout), COMMAND) as stop, contextlib.ExitStack() as end:
        stop.saved = True  # there is nothing to save
        job = prepare(dry_run.without_first_weights(shared_config(config, world), world), head, world, None)
        end.callback(job.step.close)
        disk = dry_run.free_disk(config.run.log_dir, job.state.num_bytes())
        throughput, warm = Throughput(world.size), BEGINNING
        num_steps = dry_run.num_steps(job)
        with contextlib.closing(throughput.timed(epoch_batches(job))) as batches:
            for _ in itertools.islice(train_steps(job, batches), num_steps):
                if world.device.type == "cuda":
                    torch.cuda.synchronize(world.device)  # a step ends when the GPU is done, not when it is queued
                if job.state.step == dry_run.warm_up(job) < num_steps:
                    warm = throughput.snapshot()
                if stop.requested():
                    return EXIT_STOPPED
        for _ in range(dry_run.evaluations(job)):
            model, predict = job.state.evaluated_model(), job.step.predict
            result = evaluate(model, job.val_loader, world, job.precision, stop, predict=predict)
            if result is None:
                return EXIT_STOPPED
    measured = dry_run.measured(job, len(data.val_index), throughput.read(since=warm), result.throughput, disk)
    if world.is_main:
        while note := job.step.take_note():
            print(note)
        dry_run.print_table(job._replace(config=config), data.val_index, measured)
    return 0


if __name__ == "__main__":
    sys.exit(one_line_errors("train.py", lambda: main(parse_command(sys.argv[1:]))))
