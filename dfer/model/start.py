"""What a model starts from: `--model.init`, resolved, and loaded by one stated rule.

Of a model of ours (a run, a checkpoint, an export) comes every tensor, but for those whose shape depends on the number
of classes, where that differs, and those of the CRF that it does not have by its own options; those that depend on T
are resampled. Where nothing beside the backbone fits (a file of a backbone alone, or another model around the same
one), and with backbone:THAT, comes the backbone, of which up to 5 % may be missing. All else is refused.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
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
OPTIONAL = "crf."  # where an option may add tensors that are fresh: a new CRF adds nothing to the features at first
COUNT = "recurrent.num_frames"  # the T that a recurrent unit counts in, among the weights
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
            if _is_alike(config, source.config) or _is_whole(model, backbone, found):
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


def _is_alike(config: ModelConfig, begun: Config | None) -> bool:
    """Return whether the source says that it is such a model around such a backbone, whatever its options."""
    return begun is not None and (begun.model.name, begun.model.backbone) == (config.name, config.backbone)


def _load_whole(model: nn.Module, config: ModelConfig, num_frames: int, found: Found, source: Source) -> str:
    """Load all of a model of ours, and say how many tensors, and which are fresh, resampled or left behind."""
    classes = _of_other_classes(model, config, num_frames, found)
    resampled = _resampled_tensors(model, config, num_frames, found)
    misshapen = {name: tensor for name, tensor in found.misshapen.items() if name not in resampled}
    found = found._replace(tensors=found.tensors | resampled, misshapen=misshapen)
    ours = model.state_dict().keys()
    theirs = _names_of(source.config) if source.config and _is_alike(config, source.config) else ours
    lacking = [name for name in ours if name not in theirs and name.startswith(OPTIONAL)]
    left = [name for name in found.surplus if name.removeprefix(found.prefix) in theirs]
    found = found._replace(surplus=[name for name in found.surplus if name not in left])
    if COUNT in ours and "recurrent.norm.weight" in found.tensors:
        found = _with_count(found, num_frames, source.config)
    options = _other_options(config, source.config.model) if source.config else ""
    try:
        fresh = [*classes, *lacking]
        said = load_found(model, found, source.held, source.name, "the model", fresh, enough=1.0)
    except UserError as error:
        hint = f"it is another model, or not whole; {ALONE}{config.init} takes its backbone alone"
        raise UserError(f"{error}{options}: {hint}") from None
    parts = {"fresh, as it has other classes": classes, "fresh, as the other model has none": lacking}
    left = [name.removeprefix(found.prefix) for name in (*left, *found.beside)]
    parts |= {"left behind, as this model has none": left}
    parts |= {f"resampled to {num_frames} frames": list(resampled)}
    said += "".join(f"; {what}: {some(sorted(names))}" for what, names in parts.items() if names)
    return said + _retimed(model, num_frames, source.config, lacking) + options


def _names_of(begun: Config) -> Collection[str]:
    """Return the names of the tensors of a run's model."""
    with torch.device("meta"):
        return build_model(begun.model, _frames(begun)).state_dict().keys()


def _resampled_tensors(model: nn.Module, config: ModelConfig, num_frames: int, found: Found) -> dict[str, Tensor]:
    """Return those that have another shape because, and only because, they are of another number of frames, resampled.

    Which they are is known by building a model that differs in that alone.
    """
    if not found.misshapen:
        return {}
    axes = _shapes_that_change(model, config, num_frames + 1, len(EMOTIONS))
    shapes = {name: ours.shape for name, ours in model.state_dict().items() if name in axes and name in found.misshapen}
    return {
        name: _resampled(found.misshapen[name], axes[name], shape[axes[name]])
        for name, shape in shapes.items()
        if _differ_at(shape, found.misshapen[name].shape, axes[name])
    }


def _with_count(found: Found, num_frames: int, begun: Config | None) -> Found:
    """Return what was found with the T that the recurrent unit counts in, which files of before leave to the run.

    One of single frames has learnt nothing about time, and counts in the frames of this model.
    """
    before = found.tensors.get(COUNT, torch.tensor(_frames(begun) if begun else num_frames))
    return found._replace(tensors=found.tensors | {COUNT: torch.tensor(num_frames) if before == 1 else before})


def _frames(config: Config) -> int:
    return config.data.num_segments * config.data.frames_per_segment


def _of_other_classes(model: nn.Module, config: ModelConfig, num_frames: int, found: Found) -> list[str]:
    """Return the tensors that have another shape because, and only because, they were trained on other classes."""
    head = next(reversed(model.state_dict()))  # its bias, a number for each class
    if head not in found.misshapen:
        return []
    with torch.device("meta"):
        theirs = build_model(config, num_frames, len(found.misshapen[head])).state_dict()
    return [name for name, tensor in found.misshapen.items() if theirs[name].shape == tensor.shape]


def _retimed(model: nn.Module, num_frames: int, begun: Config | None, fresh: Collection[str]) -> str:
    """Fit what a model has learnt in frames to clips of another number of them, and say what that was."""
    modules = [(prefix, module) for prefix, module in model.named_modules() if hasattr(module, "retime")]
    before, counted, said = _frames(begun) if begun else None, model.state_dict().get(COUNT), ""
    if before is None:
        said = f"; it does not say of how many frames: taken for {num_frames}" * bool(modules or counted is not None)
    elif before not in (1, num_frames):  # from single frames nothing was learnt about time
        names = []
        for prefix, module in modules:
            retime: Callable[..., list[str]] = module.retime  # type: ignore[assignment]
            changed = retime(before, [name.removeprefix(f"{prefix}.") for name in fresh])
            names += [f"{prefix}.{name}" for name in changed]
        said = f"; fitted to {num_frames} frames for {before}: {some(sorted(names))}" * bool(names)
    if counted is not None and counted != num_frames:
        said += f"; recurrent counts in {counted} frames, as it was trained"
    return said


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
