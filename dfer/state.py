"""All that training changes, saved and restored; all that it works with; the trained model in a checkpoint."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dfer.batch import Batch, Loader
from dfer.cli import UserError
from dfer.config import Config
from dfer.losses import Objective
from dfer.model.backbone import FrameBackbone
from dfer.model.build import build_model
from dfer.model.start import start
from dfer.optim.average import MovingAverage, build_ema
from dfer.optim.guard import NonFiniteGuard
from dfer.optim.optimizers import build_optimizer
from dfer.optim.schedule import Schedule
from dfer.precision import Precision
from dfer.run.distributed import World
from dfer.run.graph import Graphs


@dataclass
class TrainState:
    """All that training changes: restored at any step, a run goes on as if it had not stopped.

    Random draws are no part of it: they are a function of the seed and the step, and so is the learning rate.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: MovingAverage | None
    step: int = 0  # optimizer steps taken or skipped
    evaluated: int = 0  # epochs that are trained and evaluated
    best: dict[str, list[float]] = field(default_factory=lambda: {"WAR": [-1.0, 0], "UAR": [-1.0, 0]})  # value, step
    started: str | None = None  # from which weights, in a few words; None: from random ones, or it goes on

    def __post_init__(self):
        self.guard = NonFiniteGuard(self.model, self.optimizer, self.scaler)
        self.losses = torch.zeros(2, device=self.guard.skipped.device)  # since the last row: sum, finite batches

    def backward(self, loss: Tensor, accumulate: int) -> None:
        """Add the gradient of one of `accumulate` batches, and its loss to those of the row."""
        finite = loss.detach().isfinite()
        # Other ranks learn of a non-finite loss from the gradient alone, so the gradient must be non-finite too.
        self.scaler.scale(loss * torch.where(finite, 1 / accumulate, torch.nan)).backward()
        self.losses += torch.stack([torch.where(finite, loss.detach(), 0.0), finite.float()])

    def improve(self, values: dict[str, float]) -> list[str]:
        """Remember the values that are the best so far, with this step, and return their names."""
        better = [name for name, value in values.items() if value > self.best[name][0]]
        self.best |= {name: [values[name], self.step] for name in better}
        return better

    def evaluated_model(self) -> nn.Module:
        """Return what is evaluated: the averaged weights if there are any."""
        return self.model if self.ema is None else self.ema.module

    def compile(self) -> None:
        """Compile the model, and its average, which is a copy and is what is evaluated."""
        self.model.compile()
        if self.ema is not None:
            self.ema.module.compile()

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors and plain values of a checkpoint."""
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.guard.skipped,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` has returned.

        Raises:
            UserError: if it is of another version of the model.
        """
        load_weights(self.model, state["model"])
        if self.ema is not None:
            load_weights(self.ema, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where a run in fp16 has gone on without it: its scale is found again
            self.scaler.load_state_dict(state["scaler"])
        self.guard.skipped.copy_(state["skipped"])
        self.losses.copy_(state["losses"])
        self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]

    def num_bytes(self) -> int:
        """Return about the size of a checkpoint: weights, the optimizer's two moments, averaged weights."""
        weights = sum(p.numel() * p.element_size() for p in self.model.state_dict().values())
        return weights * (3 + (self.ema is not None))


class Step(NamedTuple):
    """What an optimizer step leaves to be logged, on the device: the next one may write over it."""

    grad_norm: Tensor
    diagnostics: dict[str, Tensor]


@runtime_checkable
class StepTaker(Protocol):
    """What training knows of `dfer.run.step.TrainingStep`."""

    graphs: Graphs
    flops_a_clip: float | None

    def __call__(self, batch: Batch, first: bool, last: bool) -> Step | None:
        """Take a batch, the first one or the last one of a step or both; return what the last one leaves."""
        ...

    def predict(self, clips: Tensor) -> Tensor:
        """Return the probabilities of clips by what is evaluated."""
        ...

    def take_note(self) -> str | None:
        """Return what is to be said of its graphs, once."""
        ...

    def worked_s(self) -> float | None:
        """Return for how many seconds the device has worked on steps; None where that cannot be told."""
        ...

    def show_gradients(self) -> None:
        """Have the parameters' gradients be the last step's."""
        ...

    def close(self) -> None:
        """Free its graphs."""
        ...


class Job(NamedTuple):
    """Everything that training works with, built before its first step."""

    config: Config
    world: World
    train_loader: Loader
    val_loader: Loader
    state: TrainState
    model: nn.Module  # the state's model, or DDP around it
    objective: Objective
    schedule: Schedule
    precision: Precision
    step: StepTaker | None = None  # of training; `dfer.run.step.with_step` adds it

    @property
    def steps_done(self) -> int:
        """Return the steps taken of the epoch that is not evaluated yet: all of them if only its evaluation is left."""
        return self.state.step - self.state.evaluated * self.schedule.steps_per_epoch

    def logs(self, step: int) -> bool:
        """Return whether a step has a row in the log, by its number in the epoch, from 1 on."""
        return step % self.config.run.log_every == 0 or step == self.schedule.steps_per_epoch


def build_state(config: Config, precision: Precision, checkpoint: dict[str, Any] | None) -> TrainState:
    """Return the state that training begins with, or that a checkpoint has.

    Raises:
        UserError: if the model cannot be built, or the checkpoint is of another version of it.
    """
    optim, device = config.optim, precision.device
    torch.manual_seed(config.seed)
    num_frames = config.data.num_segments * config.data.frames_per_segment
    model = build_model(config.model, num_frames)
    # A checkpoint has the weights: those that the run began with are not asked for again, and may be gone.
    started = None if checkpoint else start(model, config.model, num_frames)
    if config.run.sync_bn:
        if device.type != "cuda":
            raise UserError(
                "--run.sync-bn: torch synchronises batch norm between GPUs only; --run.no-sync-bn does without"
            )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    _check_values_per_channel(model, config)
    model.to(device)
    precision.layout_weights(model)
    optimizer = build_optimizer(model, optim.optimizer, optim.lr, optim.weight_decay, optim.layer_decay)
    ema = build_ema(model, optim.ema, optim.ema_warmup)
    state = TrainState(model, optimizer, precision.scaler(), ema, started=started)
    if checkpoint:
        state.load_state_dict(checkpoint)
    if config.run.compile:
        state.compile()
    return state


def _check_values_per_channel(model: nn.Module, config: Config) -> None:
    """Check that batch norm has more than one value of each channel to normalise by, on the last level.

    Raises:
        UserError: if it has not.
    """
    backbone = next((module for module in model.modules() if isinstance(module, FrameBackbone)), None)
    if backbone is None:  # r3d-18 has several on each clip that it takes
        return
    data, stride = config.data, max(backbone.strides)
    frames, side = data.num_segments * data.frames_per_segment, -(-data.size // stride)
    normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if normalises and data.batch_size * frames * side * side == 1:
        raise UserError(
            f"--data.batch-size 1 with T = 1 and --data.size {data.size}: batch norm sees one value per channel, from "
            "which nothing can be learnt; raise one of the three"
        )


def load_trained(state: dict[str, Any], config: Config) -> nn.Module:
    """Return the model of a checkpoint, on the CPU and set to evaluate: with the averaged weights if there are any.

    Args:
        state: as `dfer.run.checkpoint.load_checkpoint` returns it.
        config: the checkpoint's, whose model may be computed another way (`crf_backend`).

    Raises:
        UserError: if it is of another version of the model.
    """
    model = build_model(config.model, config.data.num_segments * config.data.frames_per_segment)
    if state["ema"] is None:
        load_weights(model, state["model"])
        return model.eval()
    averaged = build_ema(model, config.optim.ema, config.optim.ema_warmup)
    assert averaged is not None, "a checkpoint has averaged weights, and its configuration no average"
    load_weights(averaged, state["ema"])
    return averaged.module.eval()


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: if they are those of another version of the model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        ours = model.state_dict()
        missing, unknown = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
        shapes = sorted(k for k in ours.keys() & weights.keys() if ours[k].shape != weights[k].shape)
        parts = (("lacks", missing), ("has besides", unknown), ("has in another shape", shapes))
        listed = "; ".join(
            f"{what} {', '.join(names[:2])}{' ...' * (len(names) > 2)}" for what, names in parts if names
        )
        raise UserError(
            f"the checkpoint is of another version of the model ({listed}): use the version that wrote it, or train "
            "anew"
        ) from None
