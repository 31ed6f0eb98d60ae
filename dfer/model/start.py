"""What a model starts from: `--model.init`, resolved, and loaded by one stated rule.

Of a model of ours (a run, a checkpoint, an export) comes all but the tensors whose shape depends on the number of
classes, where that differs; those that depend on T are resampled. Where nothing beside the backbone fits (a file of a
backbone alone, or another model around the same one), and with backbone:THAT, comes the backbone. Less than 95 % of
either is refused.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfer.cli import UserError, say_once
from dfer.config import Config, ModelConfig, config_from_json
from dfer.lists.annotations import EMOTIONS
from dfer.model.backbone import FrameBackbone, timm_out_of_reach
from dfer.model.build import build_model
from dfer.model.pretrained import Found, Held, find_tensors, held_tensors, load_found, some
from dfer.run.checkpoint import load_tensors
from dfer.run.hub import local

ALONE = "backbone:"
_OF_TRAINING = {
    "init",
    "freeze",
    "drop_path",
    "dropout",
    "crf_backend",
}  # options that trained weights do not depend on


def resolved(config: ModelConfig) -> ModelConfig:
    """Return the configuration with timm or random for `auto`; where that is random, a line says so and why.

    Raises:
        UserError: if it is random, and what is random would be frozen.
    """
    if config.init != "auto":
        return config
    name = config.backbone if config.name != "r3d-18" else config.name
    why = timm_out_of_reach(name) if config.name != "r3d-18" else "timm has none"
    if why is not None:
        line = f"--model.init auto: random weights, as timm's of {name} cannot be had ({why})"
        if config.freeze == "backbone":
            raise UserError(f"{line}, and --model.freeze backbone would keep them; give a file with --model.init FILE")
        say_once(f"{line}; --model.init FILE gives others")
    return dataclasses.replace(config, init="random" if why is not None else "timm")


class Source(NamedTuple):
    """What a model is to start from, as it was read."""

    name: str  # for messages
    held: Held
    config: Config | None  # of the run that wrote it; None: it is somebody else's, or does not say


def start(model: nn.Module, config: ModelConfig, num_frames: int) -> str | None:
    """Load what `config.init` names into a fresh model, and return what in a few words; None for random weights.

    Args:
        model: as `build_model` returns it.
        config: of the model; `auto` is resolved.
        num_frames: T, frames of its clips.

    Raises:
        UserError: if the weights cannot be had or do not fit; it names those that do not.
    """
    assert config.init != "auto"
    if config.init == "random":
        return None
    backbone = next((module for module in model.modules() if isinstance(module, FrameBackbone)), None)
    if backbone is None:
        raise UserError(f"--model.init {config.init}: {config.name} has no backbone of timm: leave it random")
    try:
        if config.init == "timm":
            return backbone.load_timm()
        source = _read(config.init.removeprefix(ALONE))
        if not config.init.startswith(ALONE):
            found = find_tensors(model, source.held)
            if _is_whole(model, backbone, found):
                return _load_whole(model, config, num_frames, found, source)
        return _load_backbone(backbone, source)
    except UserError as error:
        others = config.init in ("timm", "auto") or "hf:" in config.init or os.path.exists(config.init)
        hint = "" if others or config.init.startswith(ALONE) else " (or random, timm, auto, hf:ORG/NAME)"
        raise UserError(f"--model.init {error}{hint}") from None


def _read(name: str) -> Source:
    path = local(Path(name))
    commit = f" at {path.name[:12]}" * (path != Path(name))  # of a model of the hub
    content = load_tensors(path)
    text = content.get("config")
    return Source(name + commit, held_tensors(content), config_from_json(text, path) if isinstance(text, str) else None)


def _load_backbone(backbone: FrameBackbone, source: Source) -> str:
    name, net = backbone.name, backbone.net
    try:
        said = load_found(net, find_tensors(net, source.held, backbone.rename()), source.held, source.name, name)
    except UserError as error:
        raise UserError(f"{error}: give weights of {name}, or another --model.backbone") from None
    return f"{said}; all else is fresh"


def _is_whole(model: nn.Module, backbone: FrameBackbone, found: Found) -> bool:
    """Return whether what was found is of a model of ours: tensors of the backbone under our name, and others."""
    inside = next(f"{name}." for name, module in model.named_modules() if module is backbone)
    of_backbone = sum(name.startswith(inside) for name in found.tensors)
    return 0 < of_backbone < len(found.tensors)


def _load_whole(model: nn.Module, config: ModelConfig, num_frames: int, found: Found, source: Source) -> str:
    """Load all that fits of a model of ours, and say how many tensors, and which are fresh or resampled."""
    notes, fresh = "", []
    if found.misshapen:  # what depends on what is known by building models that differ in it alone
        frames = _shapes_that_change(model, config, num_frames + 1, len(EMOTIONS))
        shapes = {name: ours.shape for name, ours in model.state_dict().items() if name in found.misshapen}
        fresh = _of_other_classes(model, config, num_frames, found)
        resampled = {
            name: _resampled(found.misshapen[name], frames[name], shape[frames[name]])
            for name, shape in shapes.items()
            if name in frames and _differ_at(shape, found.misshapen[name].shape, frames[name])
        }
        misshapen = {name: tensor for name, tensor in found.misshapen.items() if name not in resampled}
        found = found._replace(tensors=found.tensors | resampled, misshapen=misshapen)
        notes += f"; fresh, as it has other classes: {some(sorted(fresh))}" * bool(fresh)
        notes += f"; resampled to {num_frames} frames: {some(sorted(resampled))}" * bool(resampled)
    try:
        said = load_found(model, found, source.held, source.name, "the model", fresh)
    except UserError as error:
        raise UserError(f"{error}: it is another model; {ALONE}{config.init} takes its backbone alone") from None
    if source.config:
        notes += _retimed(model, num_frames, source.config) + _other_options(config, source.config.model)
    return said + notes


def _of_other_classes(model: nn.Module, config: ModelConfig, num_frames: int, found: Found) -> list[str]:
    """Return the tensors that have another shape because, and only because, they were trained on other classes."""
    head = next(reversed(model.state_dict()))  # its bias, a number for each class
    if head not in found.misshapen:
        return []
    with torch.device("meta"):
        theirs = build_model(config, num_frames, len(found.misshapen[head])).state_dict()
    return [name for name, tensor in found.misshapen.items() if theirs[name].shape == tensor.shape]


def _retimed(model: nn.Module, num_frames: int, begun: Config) -> str:
    """Fit what a model has learnt in frames to clips of another number of them, and say what that was."""
    before = begun.data.num_segments * begun.data.frames_per_segment
    if before in (1, num_frames):  # from single frames nothing was learnt about time
        return ""
    names = []
    for prefix, module in model.named_modules():
        retime: Callable[[int], list[str]] | None = getattr(module, "retime", None)
        names += [f"{prefix}.{name}" for name in retime(before)] if retime else []
    return f"; fitted to {num_frames} frames for {before}: {some(sorted(names))}" * bool(names)


def _other_options(config: ModelConfig, begun: ModelConfig) -> str:
    """Return which options change what the same weights do, where they are not those that the weights come from."""
    was, now = dataclasses.asdict(begun), dataclasses.asdict(config)
    of_network = now if config.name == "dfernet" else ("name", "backbone")  # baselines have no other options
    differing = [name for name in of_network if name not in _OF_TRAINING and was[name] != now[name]]
    lines = [f"--model.{name.replace('_', '-')} was {was[name]}, is {now[name]}" for name in differing]
    return f"; its options were others: {', '.join(lines)}" * bool(lines)


def _shapes_that_change(model: nn.Module, config: ModelConfig, num_frames: int, num_classes: int) -> dict[str, int]:
    """Return the tensors whose shape is another one with so many frames or classes, and the axis along which."""
    with torch.device("meta"):
        other = build_model(config, num_frames, num_classes).state_dict()
    shapes = ((name, tensor.shape, other[name].shape) for name, tensor in model.state_dict().items())
    return {
        name: next(i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n) for name, a, b in shapes if a != b
    }


def _differ_at(a: torch.Size, b: torch.Size, axis: int) -> bool:
    """Return whether two shapes differ along one axis alone."""
    return len(a) == len(b) and all(m == n for i, (m, n) in enumerate(zip(a, b, strict=True)) if i != axis)


def _resampled(tensor: Tensor, axis: int, length: int) -> Tensor:
    """Return a tensor with `length` entries along an axis, linearly between its own, from the first to the last."""
    rows = tensor.movedim(axis, -1)
    flat = F.interpolate(rows.reshape(1, -1, rows.shape[-1]), size=length, mode="linear", align_corners=True)
    return flat.reshape(*rows.shape[:-1], length).movedim(-1, axis)
