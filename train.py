"""Train and validate: `python train.py [preset] [--key value ...]`, or `torchrun --nproc_per_node=4 train.py ...`."""

import gc

gc.disable()  # a quarter of the imports' time would go into looking for garbage among what they make for good
import contextlib
import itertools
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_pipes.loader import ClipLoader
from dfer import distributed
from dfer.annotations import EMOTIONS, read_votes
from dfer.batch import Batch
from dfer.checkpoint import copy_checkpoint, load_checkpoint, save_checkpoint
from dfer.config import Config, ModelConfig, parse_config
from dfer.distributed import World
from dfer.index import ClipIndex, load_index
from dfer.logger import Logger, open_run_dir, write_predictions
from dfer.losses import classification_loss
from dfer.metrics import ConfusionMatrix, Throughput
from dfer.model import DFERNet, MeanPoolNet
from dfer.optim import build_ema, build_optimizer, lr_at
from dfer.sampling import ClipSampler

gc.enable()
gc.freeze()  # and none of it is looked at again in training


def main(config: Config) -> None:
    """The whole story of a run."""
    train_index = load_index(config.data.train_list, config.data.root, config.data.source)
    val_index = load_index(config.data.val_list, config.data.root, config.data.source)
    votes = None
    if config.loss.soft_labels:
        votes = torch.from_numpy(read_votes(config.loss.soft_labels, train_index.records))
    world = distributed.setup(config.run.device)
    train_loader = build_loader(config, train_index, "train", world)
    val_loader = build_loader(config, val_index, "eval", world)
    accumulate = config.optim.accumulate
    steps_per_epoch = len(train_loader) // accumulate
    if steps_per_epoch == 0:
        raise ValueError(
            f"{config.data.train_list}: {len(train_index)} clips do not fill one step of "
            f"{config.data.batch_size} clips x {world.size} processes x {accumulate} batches; lower --data.batch-size"
        )
    if config.optim.steps_per_epoch:
        steps_per_epoch = min(steps_per_epoch, config.optim.steps_per_epoch)
    total_steps = steps_per_epoch * config.optim.epochs

    torch.manual_seed(config.seed)
    model = build_model(config.model, config.data.num_segments * config.data.frames_per_segment)
    if config.run.sync_bn:
        if world.device.type != "cuda":
            raise ValueError("--run.sync-bn: torch synchronises batch norm between GPUs only")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(world.device)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim.optimizer, config.optim.lr, config.optim.weight_decay)
    ema = build_ema(model, config.optim.ema)
    amp = amp_dtype(config, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=amp is torch.float16)
    first_epoch, best = 0, {"WAR": -1.0, "UAR": -1.0}

    run_dir = open_run_dir(config) if world.is_main else None
    if config.resume:
        state = load_checkpoint(config.run.log_dir / config.run.name / "last.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        first_epoch, best = state["epoch"], state["best"]
    if config.run.compile:
        model.compile()
    if world.size > 1:
        ddp = DistributedDataParallel(model, device_ids=[world.local_rank] if world.device.type == "cuda" else None)
    else:
        ddp = model

    logger = Logger(run_dir, config, total_steps, start_step=first_epoch * steps_per_epoch)
    try:
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

        throughput = Throughput()
        for epoch in range(first_epoch, config.optim.epochs):
            train_one_epoch(
                ddp, train_loader, votes, epoch, steps_per_epoch, total_steps, optimizer, scaler, ema, amp, config,
                world, logger, throughput,
            )  # fmt: skip
            step = (epoch + 1) * steps_per_epoch
            result = evaluate(model if ema is None else ema.module, val_loader, world, amp, config.run.channels_last)
            war, uar = result.confusion.war(), result.confusion.uar()
            recalls = result.confusion.per_class_recall().tolist()
            logger.row(
                step,
                {"epoch": epoch + 1, "val/WAR": war, "val/UAR": uar, "val/loss": result.loss}
                | {f"val/recall/{e}": r for e, r in zip(EMOTIONS, recalls, strict=True) if r == r}
                | {f"val/{k}": v for k, v in result.throughput.items()},
            )
            logger.say(f"epoch {epoch + 1}/{config.optim.epochs}  WAR {war:.2f}  UAR {uar:.2f}  loss {result.loss:.3f}")
            improved = [name for name, value in (("WAR", war), ("UAR", uar)) if value > best[name]]
            best |= {"WAR": max(best["WAR"], war), "UAR": max(best["UAR"], uar)}
            if world.is_main:
                state = {
                    "epoch": epoch + 1,
                    "step": step,
                    "model": model.state_dict(),
                    "ema": ema.state_dict() if ema is not None else None,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "best": best,
                    "config": config.to_json(),
                    "emotions": list(EMOTIONS),
                }
                save_checkpoint(run_dir / "last.pt", state)
                for name in improved:
                    copy_checkpoint(run_dir / "last.pt", run_dir / f"best_{name}.pt")
                write_predictions(run_dir / "predictions.csv", val_index, result.ids, result.probabilities)
        if first_epoch >= config.optim.epochs:
            logger.say(f"{config.run.name} has finished all its {config.optim.epochs} epochs; nothing left to do")
        else:
            logger.result(result.confusion, throughput.read(), run_dir or Path(), best)
    finally:
        logger.close()


def train_one_epoch(
    ddp: nn.Module,
    loader: ClipLoader,
    votes: Float[Tensor, "N K"] | None,
    epoch: int,
    steps_per_epoch: int,
    total_steps: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: nn.Module | None,
    amp: torch.dtype | None,
    config: Config,
    world: World,
    logger: Logger,
    throughput: Throughput,
) -> None:
    """One pass over the training list. Nothing in here waits for the GPU."""
    ddp.train()
    optim, accumulate = config.optim, config.optim.accumulate
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    batches = throughput.timed(itertools.islice(loader(epoch), steps_per_epoch * accumulate))
    row_began = throughput.snapshot()
    loss_sum = torch.zeros((), device=world.device)
    for micro, batch in enumerate(batches):
        step, last_micro = epoch * steps_per_epoch + micro // accumulate, (micro + 1) % accumulate == 0
        # Dropout too is a function of (seed, step, rank): a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(zlib.crc32(f"{config.seed}/{epoch}/{micro}/{world.rank}".encode()))
        if micro % accumulate == 0:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total_steps, warmup_steps, optim.lr)
        waits_for_more = isinstance(ddp, DistributedDataParallel) and not last_micro
        with ddp.no_sync() if waits_for_more else contextlib.nullcontext():
            loss, diagnostics = training_loss(ddp, batch, votes, amp, config)
            scaler.scale(loss / accumulate).backward()
        loss_sum += loss.detach()
        throughput.num_clips += len(batch.labels) * world.size
        if not last_micro:
            continue

        if optim.clip_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(ddp.parameters(), optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(ddp.module if isinstance(ddp, DistributedDataParallel) else ddp)

        logger.step_done(step + 1)
        steps_done = step + 1 - epoch * steps_per_epoch
        if steps_done % config.run.log_every == 0 or steps_done == steps_per_epoch:
            values = {"train/lr": optimizer.param_groups[0]["lr"]}
            values |= {f"throughput/{k}": v for k, v in throughput.read(since=row_began).items()}
            num_batches = (steps_done - 1) % config.run.log_every * accumulate + accumulate
            logger.train_row(step + 1, epoch + 1, values, {"train/loss": loss_sum / num_batches, **diagnostics})
            loss_sum = torch.zeros_like(loss_sum)
            row_began = throughput.snapshot()
    logger.flush()


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
    model: nn.Module, loader: ClipLoader, world: World, amp: torch.dtype | None, channels_last: bool
) -> Evaluation:
    """Evaluate every clip of the loader's list exactly once, whatever the number of processes.

    Of a clip of several views the probabilities are averaged, and their largest is the prediction.
    """
    model.eval()
    distributed.broadcast_buffers(model)
    confusion, throughput = ConfusionMatrix(len(EMOTIONS), world.device), Throughput()
    num_views = loader.sampler.num_views
    ids, valid, labels, probabilities = [], [], [], []
    batches = itertools.chain.from_iterable(loader(epoch=view) for view in range(num_views))
    for i, batch in enumerate(throughput.timed(batches)):
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
        raise ValueError("--data.cache gpu: there is no GPU here")
    return ClipLoader(
        index,
        sampler,
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


def amp_dtype(config: Config, world: World) -> torch.dtype | None:
    """The autocast type, or None for float32 throughout."""
    gpu = world.device.type == "cuda"
    if config.run.amp == "fp16" and not gpu:
        raise ValueError("--run.amp fp16: needs a GPU; on a CPU use bf16 or off")
    native = gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    auto = torch.bfloat16 if native else None
    return {"auto": auto, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.run.amp]


def one_line_errors(program: str, work: Callable[[], None]) -> int:
    """Do the work and return the exit code: 0 done, 2 the user has to change something, which one line says."""
    try:
        work()
        return 0
    except ValueError as error:
        if not _is_ours(error):
            raise
        # What is wrong before the ranks have joined is wrong on all of them: one says it.
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.cleanup()


def _is_ours(error: ValueError) -> bool:
    """Was it raised by this project's code? A ValueError from inside a library is a defect and keeps its traceback."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = Path(traceback.tb_frame.f_code.co_filename).resolve()
    root = Path(__file__).resolve().parent
    return file.is_relative_to(root) and not any(p.name in (".venv", "site-packages") for p in file.parents)


if __name__ == "__main__":
    sys.exit(one_line_errors("train.py", lambda: main(parse_config(sys.argv[1:]))))
