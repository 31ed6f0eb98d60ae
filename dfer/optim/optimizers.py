"""Optimizers, and the groups of parameters that they treat alike."""

from typing import Any

import torch
from torch import nn

from dfer.cli import UserError
from dfer.optim.options import OptimizerName

# Whose step is captured in a CUDA graph (`optimizer.capturable`): torch's fused ones read the learning rate, which
# changes, from a tensor. Lion's cannot; Muon's says that it can, which no card has shown yet.
CAPTURABLE: set[OptimizerName] = {"adamw", "sgd"}


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Return groups: matrices and filters, which decay; biases, norms, positions and what a module exempts.

    With a `layer_decay` below 1 there are two of them for each layer of the backbone, whose "lr_scale" is the share of
    the learning rate that they get: `layer_decay` for its last layer, to the power of k for the k-th from the end. The
    first two groups are always the rest of the model.

    Raises:
        UserError: if there is to be a layer decay, and timm does not know the layers of the model's backbone.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if hasattr(module, "no_weight_decay")
        for name, parameter in module.named_parameters()
        if name in module.no_weight_decay()  # type: ignore[operator] # may name some that this variant of it has not
    }
    depths = _depths(model) if layer_decay != 1 else {}
    groups = []
    for depth in sorted({0, *depths.values()}):
        parameters = [p for p in model.parameters() if p.requires_grad and depths.get(id(p), 0) == depth]
        decayed = [p for p in parameters if p.ndim > 1 and id(p) not in exempt]
        others = [p for p in parameters if p.ndim <= 1 or id(p) in exempt]
        scale = {"lr_scale": layer_decay**depth} if depths else {}
        groups.append({"params": decayed, "weight_decay": weight_decay, **scale})
        groups.append({"params": others, "weight_decay": 0.0, **scale})
    return groups if not depths else [group for group in groups if group["params"]]


def _depths(model: nn.Module) -> dict[int, int]:
    """Return the layer of each parameter of the backbone, counted from its end: id -> 1, 2, ...

    Raises:
        UserError: if timm does not know the layers.
    """
    import timm  # here, since most runs do not need it
    from timm.models import group_parameters

    net = getattr(getattr(model, "backbone", None), "net", None)
    name = getattr(net, "pretrained_cfg", {}).get("architecture")
    if net is None or name is None:
        raise UserError("--optim.layer-decay: the model has no backbone of timm, whose layers are known; leave it at 1")
    with torch.device("meta"):
        whole: Any = timm.create_model(name)  # a backbone knows its parameters' names, but not its layers
    # It calls some parameters otherwise: `stages_0.x` for `stages.0.x`, `model.x` for `x`.
    matcher = whole.group_matcher(coarse=False) if hasattr(whole, "group_matcher") else {}
    layers: Any = group_parameters(whole, matcher, reverse=True)
    layers = {n.replace(".", "_"): layer for n, layer in layers.items()}
    found = {id(p): layers.get(n.removeprefix("model.").replace(".", "_")) for n, p in net.named_parameters()}
    known = [layer for layer in found.values() if layer is not None]
    if len(known) < len(found) or len(set(known)) < 2:
        raise UserError(f"--optim.layer-decay: timm does not know the layers of {name}; leave it at 1")
    return {key: max(known) + 1 - layer for key, layer in found.items() if layer is not None}


def build_optimizer(
    model: nn.Module, name: OptimizerName, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """Return an optimizer of a model that lies where it will be trained.

    AdamW with betas (0.9, 0.999) and SGD with Nesterov momentum 0.9 are torch's fused ones; Lion with betas (0.9, 0.99)
    and Muon (momentum 0.95, updates of the size of AdamW's) are timm's.

    Raises:
        UserError: if there is to be a layer decay, and timm does not know the layers of the model's backbone.
    """
    groups = param_groups(model, weight_decay, layer_decay)
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        for parameter in (p for group in groups for p in group["params"]):
            # What torch starts with. But if the first step is skipped, torch goes on with uninitialised memory.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    else:
        from timm.optim import create_optimizer_v2  # here, since most runs do not need it

        more: dict[str, Any] = {}
        if name == "muon":
            # Its step counters lie on the CPU otherwise, where they cannot be restored without waiting for the GPU.
            more = {"momentum": 0.95, "capturable": next(model.parameters()).is_cuda}
        optimizer = create_optimizer_v2(groups, name, lr=lr, weight_decay=weight_decay, **more)
    optimizer.capturable = name in CAPTURABLE  # type: ignore[attr-defined]
    return optimizer
