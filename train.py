"""Train and validate: `python train.py [preset] [--key value ...]`, or `torchrun --nproc_per_node=4 train.py ...`.

The same command with the same --run.name continues the run from its last checkpoint, as if it had never stopped.
Exit codes: 0 done; 2 something is to be changed, which one line says; 75 stopped by SIGTERM, SIGINT or SIGUSR1 with
everything saved; 70 stopped by one of them without, since a step did not end in time; 69 another process died or hangs.
"""

import gc

gc.disable()  # a quarter of the imports' time would go into looking for garbage among what they make for good
import contextlib
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.batch import Batch
from dfer.cli import UserError, one_line_errors
from dfer.config import Config, ModelConfig, config_from_json, parse_config
from dfer.lists.annotations import EMOTIONS, read_votes
from dfer.lists.index import ClipIndex, load_index
from dfer.losses import classification_loss
from dfer.metrics import BEGINNING, ConfusionMatrix, Throughput, peak_memory
from dfer.model import DFERNet, MeanPoolNet
from dfer.optim import FiniteSteps, build_ema, build_optimizer, lr_at
from dfer.plan.sampling import ClipSampler
from dfer.run import distributed, dry_run
from dfer.run.checkpoint import RunDir, decode_state, newest_checkpoint, save_weights, write_whole
from dfer.run.distributed import EXIT_GAVE_UP, EXIT_STOPPED, StopSignals, World
from dfer.run.logger import Logger, write_predictions
from dfer.run.profiler import TRACE, WARM_UP, Profiler

gc.enable()
gc.freeze()  # and none of it is looked at again in training


def main(config: Config) -> int:
    """The whole story of a run. Returns the exit code."""
    data = config.data
    keep = not config.validate_only
    train_index = load_index(data.train_list, data.root, data.source, bad_videos=data.bad_clips, write_cache=keep)
    val_index = load_index(data.val_list, data.root, data.source, write_cache=keep)
    votes = None
    if config.loss.soft_labels:
        votes = torch.from_numpy(read_votes(config.loss.soft_labels, train_index.records))
    world = distributed.setup(config.run.device, timedelta(seconds=config.run.timeout))

    if config.validate_only:
        with distributed.peers_named(world):
            return rehearse(config, train_index, val_index, votes, world)

    run, saved, damage = None, None, []
    if world.is_main:
        name = config.run.name or f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = RunDir(config, distributed.remembered(world, "run", name))
        saved, damage = newest_checkpoint(run.checkpoints)
    with contextlib.closing(run) if run else contextlib.nullcontext(), distributed.peers_named(world):
        code = train(config, train_index, val_index, votes, world, run, distributed.share(saved, world), damage)
    if run and code == 0:
        print_report(run.path)
    return code


def rehearse(
    config: Config, train_index: ClipIndex, val_index: ClipIndex, votes: Float[Tensor, "N K"] | None, world: World
) -> int:
    """Everything that a run does but its records, in small, and what the run will take by that. Writes nothing."""
    optim, global_batch = config.optim, config.data.batch_size * world.size
    few, throughput = val_index.head(dry_run.BATCHES * global_batch), Throughput()
    clock = dry_run.Clock(config, throughput, world.device)
    with memory_advice(config), StopSignals(world, timedelta(seconds=config.run.timeout)) as stop:
        train_loader, val_loader, steps_per_epoch, trainee, ddp, amp = prepare(
            config, train_index, few, votes, world, None
        )
        disk = dry_run.free_disk(config.run.log_dir, trainee.num_bytes())
        steps = min(dry_run.STEPS, steps_per_epoch)
        go_on = train_one_epoch(
            ddp, train_loader, votes, 0, steps, steps_per_epoch * optim.epochs, trainee, amp, config, world, None,
            clock, throughput, Profiler(0, optim.accumulate, None, print), lambda: None, stop,
        )  # fmt: skip
        for _ in range(2):  # the first one compiles
            model, channels_last = trainee.evaluated_model(), config.run.channels_last
            result = evaluate(model, val_loader, world, amp, channels_last, stop) if go_on else None
            if result is None:
                return EXIT_GAVE_UP
    peak = distributed.gather(torch.tensor([peak_memory(world.device)], device=world.device), world)
    measured = dry_run.Rehearsal(
        optim.epochs,
        steps_per_epoch,
        global_batch * optim.accumulate,
        dry_run.padded(len(val_index), global_batch) * val_loader.sampler.num_views,
        throughput.read(since=clock.warm if steps > 1 else BEGINNING),
        result.throughput,
        skipped=int(trainee.steps.skipped[0]),
        peak=int(peak.max()),
        free=dry_run.free_memory(world.device),
        checkpoint=trainee.num_bytes(),
        disk=disk,
    )
    if world.is_main:
        clips = f"{len(train_index):,} to train, {len(val_index):,} to evaluate ({train_index.source})"
        title = f"{config.preset} on {world.size} x {world.device.type}: a run could begin; nothing was written"
        rows = {"clips": clips, **measured.rows()}
        if config.run.name and (config.run.log_dir / config.run.name).exists():
            rows["name"] = f"{config.run.name} is there: continued if it is this run, else refused"
        dry_run.print_rows(title, rows)
    return 0


def print_report(path: Path) -> None:
    """Write the page about a run that is done: whatever goes wrong with it costs one line, not the run."""
    try:
        from dfer.report.page import write_report  # with its libraries half a second, which only the end pays
        from dfer.report.records import read_run

        print(f"report: {write_report(read_run(path), build_loader, trained_model)}")
    except (Exception, KeyboardInterrupt) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"no report ({reason}); python scripts/report.py {path} tries again", file=sys.stderr)


def train(
    config: Config,
    train_index: ClipIndex,
    val_index: ClipIndex,
    votes: Float[Tensor, "N K"] | None,
    world: World,
    run: RunDir | None,
    saved: bytes | None,
    damage: list[str],
) -> int:
    """Begin, or continue from the bytes of a checkpoint; `run` is rank 0's. `damage`: why newer ones are not used."""
    state = decode_state(saved, config.run.log_dir) if saved else None
    about = {
        "config": state["config"] if state else config.to_json(),
        "emotions": list(EMOTIONS),
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint does not load
        "train_list": fingerprint(train_index),
        "global_batch": state["global_batch"] if state else config.data.batch_size * world.size,
    }
    if state:
        config = same_global_batch(config, state, world)
        if state["train_list"] != about["train_list"]:
            raise UserError(
                f"{config.data.train_list}: not the clips that {config.run.name} was trained on so far (names, labels "
                "or numbers of frames have changed); choose another --run.name"
            )
    train_loader, val_loader, steps_per_epoch, trainee, ddp, amp = prepare(
        config, train_index, val_index, votes, world, state
    )
    model, total_steps = trainee.model, steps_per_epoch * config.optim.epochs

    if run:
        run.begin(config, trainee.num_bytes())
    start_evaluated = trainee.evaluated * steps_per_epoch == trainee.step
    wandb_id = state["wandb_id"] if state else None
    logger = Logger(run.path if run else None, config, total_steps, trainee.step, start_evaluated, wandb_id)

    def save() -> None:
        """A checkpoint of this very step. The other ranks have nothing to add, and go on."""
        logger.secure()
        if run:
            run.save(trainee.state() | about | {"wandb_id": logger.wandb_id})

    patience = timedelta(seconds=config.run.timeout)
    with StopSignals(world, patience) as stop, contextlib.closing(logger), memory_advice(config):
        num_parameters = sum(p.numel() for p in model.parameters())
        logger.say(
            f"{config.preset}: {len(train_index)} train and {len(val_index)} validation clips ({train_index.source}), "
            f"{train_loader.sampler.clip_length} frames of {config.data.size} px; {config.model.name} with "
            f"{num_parameters / 1e6:.1f} M parameters on {world.size} x {world.device.type}"
        )
        for name, index in (("train", train_index), ("validation", val_index)):
            if index.num_miscounted():
                logger.say(
                    f"{index.num_miscounted()} {name} clips hold another number of frames than listed; disk used"
                )
        for line in damage:
            logger.say(f"{line}; an older checkpoint is used")
        if trainee.evaluated == config.optim.epochs:
            logger.say(f"{run.path if run else ''}: all {config.optim.epochs} epochs are done; nothing is left to do")
            return 0
        if state:
            logger.say(
                f"continuing from step {trainee.step}, with {config.data.batch_size} clips per step on each of "
                f"{world.size} processes"
            )

        throughput = Throughput()
        profiler = Profiler(config.profile if run else 0, config.optim.accumulate, run and run.path / TRACE, logger.say)
        while trainee.evaluated < config.optim.epochs:
            epoch = trainee.evaluated
            go_on = train_one_epoch(
                ddp, train_loader, votes, epoch, steps_per_epoch, total_steps, trainee, amp, config, world, run,
                logger, throughput, profiler, save, stop,
            )  # fmt: skip
            evaluated = trainee.evaluated_model()
            result = evaluate(evaluated, val_loader, world, amp, config.run.channels_last, stop) if go_on else None
            if result is None:
                save()
                stop.saved = True
                logger.say(f"stopped by a signal after step {trainee.step}; the same command continues")
                return EXIT_STOPPED
            war, uar = result.confusion.war(), result.confusion.uar()
            recalls = result.confusion.per_class_recall().tolist()
            logger.row(
                trainee.step,
                {"epoch": epoch + 1, "val/WAR": war, "val/UAR": uar, "val/loss": result.loss}
                | {f"val/recall/{e}": r for e, r in zip(EMOTIONS, recalls, strict=True) if r == r}
                | {f"val/{k}": v for k, v in result.throughput.items()},
            )
            if left_out := distributed.count_distinct(train_loader.bad_clips, len(train_index), world):
                logger.say(
                    f"{left_out} of {len(train_index)} training clips could not be read and were left out so far"
                )
            logger.say(f"epoch {epoch + 1}/{config.optim.epochs}  WAR {war:.2f}  UAR {uar:.2f}  loss {result.loss:.3f}")
            for name, value in (("WAR", war), ("UAR", uar)):
                if value > trainee.best[name][0]:
                    trainee.best[name] = [value, trainee.step]
                    if run:  # before the checkpoint: one that calls these weights the best finds them
                        description = {"step": str(trainee.step), name: str(value), "config": about["config"]}
                        description["emotions"] = json.dumps(about["emotions"])
                        save_weights(run.path / f"best_{name}.safetensors", evaluated.state_dict(), description)
            trainee.evaluated = epoch + 1
            if run:
                write_predictions(run.path / "predictions.csv", val_index, result.ids, result.probabilities)
            save()
            logger.best(trainee.best)
        if profiler.num_steps:
            logger.say(f"no trace: no epoch had --profile {config.profile} and {WARM_UP} more steps left")
        logger.result(result.confusion, throughput.read(), trainee.best)
    return 0


class Prepared(NamedTuple):
    train_loader: ClipLoader
    val_loader: ClipLoader
    steps_per_epoch: int
    trainee: "Trainee"
    ddp: nn.Module  # the trainee's model, or what distributes it
    amp: torch.dtype | None


def prepare(
    config: Config,
    train_index: ClipIndex,
    val_index: ClipIndex,
    votes: Float[Tensor, "N K"] | None,
    world: World,
    state: dict[str, Any] | None,
) -> Prepared:
    """All that a run needs before its first step, fresh or as a checkpoint has it."""
    train_loader = build_loader(config, train_index, "train", world)
    val_loader = build_loader(config, val_index, "eval", world)
    accumulate = config.optim.accumulate
    steps_per_epoch = len(train_loader) // accumulate
    if steps_per_epoch == 0:
        raise UserError(
            f"{config.data.train_list}: {len(train_index)} clips do not fill one step of "
            f"{config.data.batch_size} clips x {world.size} processes x {accumulate} batches; lower --data.batch-size"
        )
    if config.optim.steps_per_epoch:
        steps_per_epoch = min(steps_per_epoch, config.optim.steps_per_epoch)
    if config.profile and WARM_UP + config.profile > steps_per_epoch:
        raise UserError(
            f"--profile {config.profile}: an epoch has {steps_per_epoch} steps, of which the first {WARM_UP} warm up"
        )

    torch.manual_seed(config.seed)
    model = build_model(config.model, config.data.num_segments * config.data.frames_per_segment)
    if config.run.sync_bn:
        if world.device.type != "cuda":
            raise UserError("--run.sync-bn: torch synchronises batch norm between GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(world.device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim.optimizer, config.optim.lr, config.optim.weight_decay)
    amp = amp_dtype(config, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)
    trainee = Trainee(model, optimizer, scaler, build_ema(model, config.optim.ema))
    if state:
        trainee.restore(state)
    if config.run.compile:
        model.compile()
    if world.size > 1:
        ddp = DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)
        settle_buckets(ddp, votes, amp, config, world)
    else:
        ddp = model
    return Prepared(train_loader, val_loader, steps_per_epoch, trainee, ddp, amp)


@dataclass
class Trainee:
    """All that training changes: restored at any step, a run goes on as if it had not stopped.

    What is drawn at random is no part of it: it is a function of the seed and the step, and so is the learning rate.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None
    step: int = 0  # optimizer steps taken or skipped
    evaluated: int = 0  # epochs that are trained and evaluated
    best: dict[str, list[float]] = field(default_factory=lambda: {"WAR": [-1.0, 0], "UAR": [-1.0, 0]})  # value, step

    def __post_init__(self):
        self.steps = FiniteSteps(self.model, self.optimizer, self.scaler)
        self.losses = torch.zeros(2, device=self.steps.skipped.device)  # of the next row: sum, number of batches

    def evaluated_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.steps.skipped,
            "losses": self.losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        put_weights(self.model, state["model"])
        if self.ema is not None:
            put_weights(self.ema, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps.skipped.copy_(state["skipped"])
        self.losses.copy_(state["losses"])
        self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]

    def num_bytes(self) -> int:
        """About the size of a checkpoint: weights, the optimizer's two moments, averaged weights."""
        weights = sum(p.numel() * p.element_size() for p in self.model.state_dict().values())
        return weights * (3 + (self.ema is not None))


def train_one_epoch(
    ddp: nn.Module,
    loader: ClipLoader,
    votes: Float[Tensor, "N K"] | None,
    epoch: int,
    steps_per_epoch: int,
    total_steps: int,
    trainee: Trainee,
    amp: torch.dtype | None,
    config: Config,
    world: World,
    run: RunDir | None,
    logger: Logger,
    throughput: Throughput,
    profiler: Profiler,
    save: Callable[[], None],
    stop: StopSignals,
) -> bool:
    """The rest of one pass over the training list; False if a signal ended it. Nothing in here waits for the GPU."""
    ddp.train()
    optim, accumulate = config.optim, config.optim.accumulate
    optimizer, steps, losses = trainee.optimizer, trainee.steps, trainee.losses
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    first, last = (trainee.step - epoch * steps_per_epoch) * accumulate, steps_per_epoch * accumulate
    batches = throughput.timed(itertools.islice(loader(epoch, first), last - first))
    batches = profiler.watch(batches, (last - first) // accumulate)
    row_began = throughput.snapshot()
    for micro, batch in enumerate(batches, start=first):
        last_micro = (micro + 1) % accumulate == 0
        # Dropout too is a function of (seed, step, rank): a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(zlib.crc32(f"{config.seed}/{epoch}/{micro}/{world.rank}".encode()))
        if micro % accumulate == 0:
            steps.before_forward()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(trainee.step, total_steps, warmup_steps, optim.lr)
        waits_for_more = isinstance(ddp, DistributedDataParallel) and not last_micro
        with ddp.no_sync() if waits_for_more else contextlib.nullcontext():
            with profiler.named("forward"):
                loss, diagnostics = training_loss(ddp, batch, votes, amp, config)
            finite = loss.detach().isfinite()
            # The gradient alone tells the other ranks; so a loss that is not finite must not have a gradient that is.
            with profiler.named("backward"):
                trainee.scaler.scale(loss * torch.where(finite, 1 / accumulate, torch.nan)).backward()
        losses += torch.stack([torch.where(finite, loss.detach(), 0.0), finite.float()])
        throughput.num_clips += len(batch.labels) * world.size
        if not last_micro:
            continue

        with profiler.named("optimizer"):
            norm = steps.step(optim.clip_norm)
        if steps.hopeless():
            dump = dump_step(run, trainee.step, batch, loader.index, trainee.model, optimizer) if run else "rank 0's"
            raise UserError(
                f"step {trainee.step + 1}: {steps.LIMIT} steps in a row were skipped, as their loss or gradient is not "
                f"finite; {dump} has the last one; try a lower --optim.lr, or --run.amp off"
            )
        optimizer.zero_grad()
        if trainee.ema is not None:
            trainee.ema.update_parameters(trainee.model)
        trainee.step += 1

        logger.step_done(trainee.step)
        steps_done = trainee.step - epoch * steps_per_epoch
        if steps_done % config.run.log_every == 0 or steps_done == steps_per_epoch:
            values = {"train/lr": optimizer.param_groups[0]["lr"]}
            rates = throughput.read(since=row_began)
            rates["per_gpu_clips_per_s"] = rates["total_clips_per_s"] / world.size
            rates["step_ms"] = 1000 * config.data.batch_size * world.size * accumulate / rates["total_clips_per_s"]
            values |= {f"throughput/{k}": v for k, v in rates.items()}
            tensors = {"train/loss": losses[0] / losses[1], "train/grad_norm": norm}
            tensors |= {"train/skipped_steps": steps.skipped[0], **diagnostics}
            logger.train_row(trainee.step, epoch + 1, values, tensors)
            losses.zero_()
            row_began = throughput.snapshot()
        if stop.requested():
            return False
        if run and steps_done < steps_per_epoch and run.due():
            save()
    logger.flush()
    return True


def settle_buckets(
    ddp: DistributedDataParallel,
    votes: Float[Tensor, "N K"] | None,
    amp: torch.dtype | None,
    config: Config,
    world: World,
) -> None:
    """One backward pass for nothing, before the first step of a process.

    DDP then sorts the gradients into buckets anew, and a sum over three or more ranks depends on its place in a bucket:
    otherwise the first step of a continued run would round as the first step of a run, and not as the one it is.
    """
    data, buffers = config.data, [b.clone() for b in ddp.module.buffers()]
    size, frames = data.size, data.num_segments * data.frames_per_segment
    clips = torch.zeros(data.batch_size, frames, size, size, 3, device=world.device).permute(0, 1, 4, 2, 3)
    none = torch.zeros(data.batch_size, dtype=torch.int64)
    labels = none.to(world.device)
    ddp.train()
    loss, _ = training_loss(
        ddp, Batch(clips, labels, torch.ones_like(labels, dtype=torch.bool), none), votes, amp, config
    )
    loss.backward()
    ddp.zero_grad()
    for buffer, before in zip(ddp.module.buffers(), buffers, strict=True):
        buffer.copy_(before)


def training_loss(
    model: nn.Module, batch: Batch, votes: Float[Tensor, "N K"] | None, amp: torch.dtype | None, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward pass and loss of one batch; `votes` are label distributions of the whole list, if training uses them."""
    labels = batch.labels if votes is None else votes[batch.ids].to(batch.labels.device, non_blocking=True)
    with torch.autocast(batch.clips.device.type, dtype=amp, enabled=amp is not None):
        prediction = model(batch.clips if config.run.channels_last else batch.clips.contiguous())
    loss = classification_loss(
        prediction.logits,
        prediction.marginals,
        labels,
        batch.valid,
        config.loss.label_smoothing,
        config.loss.aux_weight,
    )
    return loss, prediction.diagnostics


class Evaluation(NamedTuple):
    confusion: ConfusionMatrix
    loss: float  # mean cross-entropy
    ids: list[int]  # rows of the index, in its order
    probabilities: list[list[float]]
    throughput: dict[str, float]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: ClipLoader,
    world: World,
    amp: torch.dtype | None,
    channels_last: bool,
    stop: StopSignals | None = None,
) -> Evaluation | None:
    """Evaluate every clip of the loader's list exactly once, whatever the number of processes.

    Of a clip of several views the probabilities are averaged, and their largest is the prediction. None if a signal
    ended it.
    """
    model.eval()
    distributed.broadcast_buffers(model)
    confusion, throughput = ConfusionMatrix(len(EMOTIONS), world.device), Throughput()
    num_views = loader.sampler.num_views
    ids, valid, labels, probabilities = [], [], [], []
    batches = itertools.chain.from_iterable(loader(epoch=view) for view in range(num_views))
    for i, batch in enumerate(throughput.timed(batches)):
        if stop is not None and stop.requested():
            return None
        with torch.autocast(world.device.type, dtype=amp, enabled=amp is not None):
            logits = model(batch.clips if channels_last else batch.clips.contiguous()).logits.float()
        throughput.num_clips += len(batch.labels) * world.size
        if i < len(loader):  # the first view
            ids.append(batch.ids)
            valid.append(batch.valid)
            labels.append(batch.labels)
            probabilities.append(F.softmax(logits, 1))
        else:  # another view of the same clips, batch by batch
            assert torch.equal(batch.ids, ids[i % len(loader)]), "the views of a clip were taken apart"
            probabilities[i % len(loader)] += F.softmax(logits, 1)
    ids, valid, labels = torch.cat(ids).to(world.device), torch.cat(valid), torch.cat(labels)
    probabilities = torch.cat(probabilities) / num_views
    confusion.update(probabilities.argmax(1), labels, valid)
    confusion.all_reduce()
    ids, valid, probabilities = (distributed.gather(part, world).cpu() for part in (ids, valid, probabilities))
    ids, probabilities = ids[valid], probabilities[valid]
    order = ids.argsort()
    ids, probabilities = ids[order], probabilities[order]
    assert confusion.total() == len(loader.index) == len(ids.unique()), "a clip was lost or counted twice"
    labels = torch.from_numpy(loader.index.labels)[ids]
    loss = float(F.nll_loss(probabilities.clamp_min(1e-12).log(), labels))
    return Evaluation(confusion, loss, ids.tolist(), probabilities.tolist(), throughput.read())


def build_loader(config: Config, index: ClipIndex, mode: str, world: World) -> ClipLoader:
    """A loader of training clips (mode "train") or of all clips once ("eval")."""
    data = config.data
    sampler = ClipSampler(
        config.seed,
        data.num_segments,
        data.frames_per_segment,
        mode,
        data.augmentation,
        data.views,
        data.mirror_views,
    )
    gpu = world.device.type == "cuda"
    if data.cache == "gpu" and not gpu:
        raise UserError("--data.cache gpu: there is no GPU here")
    options = LoaderOptions(
        batch_size=data.batch_size,
        size=data.size,
        device="gpu" if gpu else "cpu",
        jpeg_engine=data.jpeg_engine,
        bad_clips=data.bad_clips if mode == "train" else "error",
        cached=data.cache == "gpu",
        rank=world.rank,
        world_size=world.size,
        num_threads=max((os.cpu_count() or 1) // world.local_size, 1),
        device_id=world.device.index if gpu else None,
    )
    return ClipLoader(index, sampler, options)


def build_model(config: ModelConfig, num_frames: int) -> nn.Module:
    """The model that a configuration names, with fresh weights."""
    backbone = {"backbone": config.backbone, "weights": config.weights, "dropout": config.dropout}
    if config.name == "mean-pool":
        return MeanPoolNet(len(EMOTIONS), **backbone)
    return DFERNet(
        num_frames,
        num_classes=len(EMOTIONS),
        dim=config.dim,
        crf=config.crf,
        readout=config.readout,
        iterations=config.iterations,
        max_coupling=config.max_coupling,
        crf_backend=config.crf_backend,
        **backbone,
    )


def fingerprint(index: ClipIndex) -> str:
    """SHA-256 of what the order and the frames of the clips depend on."""
    rows = zip((r.name for r in index.records), index.num_frames.tolist(), index.labels.tolist(), strict=True)
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def same_global_batch(config: Config, state: dict[str, Any], world: World) -> Config:
    """A run keeps the clips of each of its steps: on another number of processes, each takes another share of them."""
    total, given = state["global_batch"], config.data.batch_size
    begun = config_from_json(state["config"], config.run.log_dir).data.batch_size
    if given not in (begun, total / world.size):
        raise UserError(
            f"--data.batch-size {given}: on {world.size} processes that is {given * world.size} clips per step, "
            f"but {config.run.name} has {total}; leave it at {begun}, which is shared among the processes there are"
        )
    if total % world.size:
        raise UserError(
            f"{config.run.name} has {total} clips per step, which {world.size} processes cannot share evenly; "
            "start another number of them"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=total // world.size))


def dump_step(
    run: RunDir, step: int, batch: Batch, index: ClipIndex, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Path:
    """Write what a skipped step was made of."""

    def harmed(named: Iterator[tuple[str, Tensor | None]]) -> list[str]:
        return [name for name, t in named if t is not None and not bool(t.isfinite().all())]

    about = {
        "step": step + 1,
        "lr": optimizer.param_groups[0]["lr"],
        "clips": [index.records[i].name for i in batch.ids.tolist()],
        "clips are finite": batch.clips.isfinite().flatten(1).all(1).tolist(),
        "weights that are not finite": harmed(model.named_parameters()),
        "gradients that are not finite": harmed((name, p.grad) for name, p in model.named_parameters()),
    }
    path = run.path / "skipped_steps.json"
    write_whole(path, lambda file: file.write(json.dumps(about, indent=2).encode()))
    return path


@contextlib.contextmanager
def memory_advice(config: Config) -> Iterator[None]:
    """Say which numbers to change where memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        data = config.data
        raise UserError(
            f"out of memory with {data.batch_size} clips of T = {data.num_segments * data.frames_per_segment} frames "
            f"of {data.size} px per process: halve --data.batch-size and double --optim.accumulate, or lower "
            f"--data.num-segments ({data.num_segments}) or --data.size"
        ) from None


def trained_model(state: dict[str, Any], config: Config) -> nn.Module:
    """The model of a checkpoint, on the CPU and set to evaluate: with the averaged weights if there are any."""
    # The weights are in the checkpoint: nothing is to be downloaded or looked for.
    settings = dataclasses.replace(config.model, weights=None)
    model = build_model(settings, config.data.num_segments * config.data.frames_per_segment)
    if state["ema"] is None:
        put_weights(model, state["model"])
        return model.eval()
    averaged = build_ema(model, config.optim.ema)
    put_weights(averaged, state["ema"])
    return averaged.module.eval()


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: in one line, if they are those of another version of the model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        ours = model.state_dict()
        missing, unknown = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
        shapes = sorted(k for k in ours.keys() & weights.keys() if ours[k].shape != weights[k].shape)
        parts = (("lacks", missing), ("has besides", unknown), ("has in another shape", shapes))
        told = "; ".join(f"{what} {', '.join(names[:2])}{' ...' * (len(names) > 2)}" for what, names in parts if names)
        raise UserError(
            f"the checkpoint is of another version of the model ({told}): use the version that wrote it, or train anew"
        ) from None


def amp_dtype(config: Config, world: World) -> torch.dtype | None:
    """The autocast type, or None for float32 throughout."""
    gpu = world.device.type == "cuda"
    if config.run.amp == "fp16" and not gpu:
        raise UserError("--run.amp fp16: needs a GPU; on a CPU use bf16 or off")
    native = gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    auto = torch.bfloat16 if native else None
    return {"auto": auto, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.run.amp]


if __name__ == "__main__":
    faulthandler.enable(all_threads=False)  # the last word of a process that dies of SIGBUS or SIGSEGV
    sys.exit(one_line_errors("train.py", lambda: main(parse_config(sys.argv[1:]))))
