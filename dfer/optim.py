"""Optimizers, the learning-rate schedule, the moving average of weights."""

import math
from typing import Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and filters decay; biases, norms, positions and what a module lists do not."""
    exempt = {
        id(module.get_parameter(name))
        for module in model.modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in exempt]
    rest = [p for p in parameters if p.ndim <= 1 or id(p) in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, name: Literal["adamw", "sgd"], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """One fused kernel per step; momentum 0.9 (Nesterov) for SGD, betas (0.9, 0.999) for AdamW."""
    groups = param_groups(model, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def lr_at(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Linear warm-up to `peak_lr`, then a cosine that ends at 0 after the last step."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """A moving average of weights and batch statistics, or None when `decay` is 0."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None
