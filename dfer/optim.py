"""Optimizers, the learning-rate schedule, the moving average of weights, and the guard against non-finite steps."""

import math
from collections import deque
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from dfer.batch import Loader
from dfer.cli import UserError
from dfer.config import Config


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups: matrices and filters, which decay; biases, norms, positions and what a module exempts."""
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()  # type: ignore[operator]
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in exempt]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, name: Literal["adamw", "sgd"], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return a fused optimizer: SGD with Nesterov momentum 0.9, or AdamW with betas (0.9, 0.999)."""
    groups = param_groups(model, weight_decay)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        for parameter in (p for group in groups for p in group["params"]):
            # What torch starts with. But if the first step is skipped, torch goes on with uninitialised memory.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups, lr=lr, fused=True)


class Schedule(NamedTuple):
    """The learning rate as a function of the step: linear warm-up, then a cosine to 0."""

    peak_lr: float
    warmup_steps: int
    total_steps: int
    steps_per_epoch: int

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give all parameters of the optimizer the learning rate of a step."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(step)


def build_schedule(config: Config, loader: Loader, world_size: int) -> Schedule:
    """Return the schedule of a run on the batches of a loader.

    Raises:
        UserError: if they do not fill one step.
    """
    optim, steps = config.optim, len(loader) // config.optim.accumulate
    if steps == 0:
        raise UserError(
            f"{config.data.train_list}: {len(loader.index)} clips do not fill one step of "
            f"{config.data.batch_size} clips x {world_size} processes x {optim.accumulate} batches; lower "
            "--data.batch-size"
        )
    steps = min(steps, optim.steps_per_epoch or steps)
    return Schedule(optim.lr, round(optim.warmup_epochs * steps), steps * optim.epochs, steps)


def build_ema(model: nn.Module, decay: float, warmup: bool) -> AveragedModel | None:
    """Return a moving average of weights and batch statistics, or None when `decay` is 0.

    With `warmup` the decay after n updates is at most (1 + n) / (10 + n), as TensorFlow's is: the average then covers
    the last tenth of a run that is shorter than 1 / (1 - decay) steps, instead of staying at its first weights.
    """
    if not decay:
        return None

    def update(averaged: PARAM_LIST, current: PARAM_LIST, _: object) -> None:
        n = int(ema.n_averaged)  # which lies on the CPU; the argument is a copy of it on the device
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)) if warmup else decay)(averaged, current, n)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema


class NonFiniteGuard:
    """Take an optimizer step only if the gradient is finite, without waiting for the device to know.

    DDP has summed the gradients of all ranks, so all of them skip a step or none. A skipped step leaves the weights,
    the optimizer's state and the batch statistics (which the forward pass has already changed) as they were.
    """

    LIMIT = 20  # skipped steps in a row that end a run
    LAG = 4  # steps by which the counts of a GPU arrive late

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._optimizer, self._scaler = optimizer, scaler
        device = self._parameters[0].device
        self.skipped: Float[Tensor, " two"] = torch.zeros(2, device=device)  # steps: in all, in a row
        self._keep = torch.tensor([1.0, 0.0], device=device)  # what a finite step multiplies these with
        self._arriving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._pinned = [torch.zeros(2, pin_memory=True) for _ in range(self.LAG + 1)] if device.type == "cuda" else []

    def before_forward(self) -> None:
        """Copy the batch statistics, which a skipped step restores. Call before the first forward pass of a step."""
        if self._statistics:
            self._copied = torch.cat([b.flatten() for b in self._statistics])

    def step(self, clip_norm: float) -> Float[Tensor, ""]:
        """Clip the gradient to `clip_norm` (0: do not), take the step or skip it, and return the gradient's norm."""
        self._scaler.unscale_(self._optimizer)
        if clip_norm:
            norm = nn.utils.clip_grad_norm_(self._parameters, clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        bad = ~norm.isfinite()
        if not self._scaler.is_enabled():  # an enabled one sets these itself
            self._optimizer.grad_scale, self._optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._statistics:
            now = torch.cat([b.flatten() for b in self._statistics])
            parts = torch.where(bad, self._copied, now).split([b.numel() for b in self._statistics])
            torch._foreach_copy_(self._statistics, [p.view_as(b) for p, b in zip(parts, self._statistics, strict=True)])
        self.skipped = torch.where(bad, self.skipped + 1, self.skipped * self._keep)
        return norm

    def diverged(self) -> bool:
        """Return True after LIMIT consecutive skipped steps. Call exactly once per step.

        On a GPU the counter is read LAG steps late to avoid a sync; all ranks see the same value.
        """
        if not self._pinned:
            return float(self.skipped[1]) >= self.LIMIT
        host = self._pinned[0]
        self._pinned.append(self._pinned.pop(0))
        host.copy_(self.skipped, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving.append((event, host))
        if len(self._arriving) <= self.LAG:
            return False
        event, host = self._arriving.popleft()
        event.synchronize()  # LAG steps are queued behind it: the device does not run dry
        return float(host[1]) >= self.LIMIT
