"""The learning rate as a function of the step."""

import math
from typing import NamedTuple

import torch

from dfer.batch import Loader
from dfer.cli import UserError
from dfer.config import Config
from dfer.optim.options import ScheduleName


class Schedule(NamedTuple):
    """The learning rate: linear warm-up, then a cosine, steps down, or the same to the end.

    The formulas are timm's; its classes are not used, as they begin the warm-up at 0, shift milestones by one, have a
    lowest rate for the cosine only, round it otherwise than runs did so far, and hold an optimizer.
    """

    peak_lr: float
    warmup_steps: int
    total_steps: int
    steps_per_epoch: int
    kind: ScheduleName = "cosine"
    min_lr: float = 0.0
    decay_epochs: tuple[int, ...] = ()
    decay_rate: float = 0.1

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.kind == "cosine":
            progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
            return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return max(self.peak_lr * self.decay_rate ** self._times_down(step // self.steps_per_epoch), self.min_lr)

    def _times_down(self, epochs: int) -> int:
        """Return how often the rate has stepped down once so many epochs, the warm-up's among them, are over."""
        if self.kind == "step":
            return epochs // self.decay_epochs[0]
        return sum(epochs >= milestone for milestone in self.decay_epochs) if self.kind == "multistep" else 0

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give each group of the optimizer the learning rate of a step, times the group's share of it (`lr_scale`)."""
        lr = self.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


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
    return Schedule(
        optim.lr,
        round(optim.warmup_epochs * steps),
        steps * optim.epochs,
        steps,
        optim.schedule,
        optim.min_lr,
        optim.decay_epochs,
        optim.decay_rate,
    )
