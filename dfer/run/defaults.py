"""What a configuration leaves open, and the rules by which a machine settles it.

What is open is settled at the first start of a run, saved with it, and obeyed wherever the run goes on.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch

from dfer.cli import UserError
from dfer.run.launchers import number

Section = TypeVar("Section", bound=Any)

# Options that may be left open -> the value that says so.
OPEN: dict[str, str | int] = {
    "data.cache": "auto",
    "data.jpeg_decoder": "auto",
    "data.video_decoder": "auto",
    "model.init": "auto",
    "model.crf_backend": "auto",
    "run.device": "auto",
    "run.amp": "auto",
    "run.graph": "auto",
    "run.fused": "auto",
    "run.threads": 0,
}

# Options of which a CPU knows these values alone, the last of them for what a run had of a GPU; all others are a GPU's.
# What it lacks of others, precision and batch norm, would make another run: each is refused where it is needed.
ON_A_CPU: dict[str, tuple[str, ...]] = {
    "data.cache": ("auto", "off"),
    "data.jpeg_decoder": ("auto", "cores"),
    "data.video_decoder": ("auto", "cores"),
    "run.graph": ("auto", "off"),
    "run.fused": ("auto", "off"),
}

# Share of the images that a GPU's JPEG engine decodes, where it has one, its SMs the others; None: the cores decode.
JPEG_ENGINE: dict[str, float | None] = {
    "auto": 0.0,
    "cores": None,
    "sms": 0.0,
    "cores+sms": 0.0,
    "engine": 1.0,
    "mixed": 0.65,
}

# Whoever types one of these chooses the step: nothing of it is then made to suit a card.
STEP_FLAGS = {"--data.batch-size", "--optim.lr", "--optim.accumulate", "--recipe"}

# Clips of a step over all processes that a preset does not exceed by itself, so that an epoch keeps some 20 steps.
MOST_CLIPS = {"faces": 64, "dfew": 512, "ferv39k": 1024}
_FACTORS = ((32e9, 1), (64e9, 2), (math.inf, 4))  # of a preset's batch, on a card with less memory than that
_SMALL, _SMALL_BATCH = 12e9, 16  # a card with less memory takes no more clips


def jpeg_decoder_of(share: float) -> str:
    """Return --data.jpeg-decoder for a share of the JPEG engine, as runs once had it saved."""
    return "sms" if share == 0 else "engine" if share == 1 else "mixed"


def chooses_the_step(words: Iterable[str]) -> bool:
    """Return whether one of a command's words is a flag by which nothing of its step is made to suit a card."""
    return any(word.split("=")[0].replace("_", "-") in STEP_FLAGS for word in words)


def is_open(name: str, value: object) -> bool:
    """Return whether a value of an option, such as "run.device", leaves it open."""
    return OPEN.get(name) == value


def settled_as(config: Section, begun: Any) -> Section:
    """Return a configuration that has, wherever it leaves an option open, what another one has there."""
    for name, value in OPEN.items():
        section, field = name.split(".")
        part = getattr(config, section)
        if getattr(part, field) == value:
            part = dataclasses.replace(part, **{field: getattr(getattr(begun, section), field)})
            config = dataclasses.replace(config, **{section: part})
    return config


def at_this_place(config: Section, typed: Any) -> Section:
    """Return a run's configuration without what it has by itself and cannot have where it goes on.

    On a CPU that is what a GPU held and launched. What is typed stays, and is refused where it cannot be.

    Args:
        config: what the run was begun with, under the flags of the command that continues it.
        typed: what those flags make of a preset.
    """
    lacks = only_of_a_gpu(config) if _on_a_cpu(config) else {}
    if config.run.graph == "on" and config.run.sync_bn and (number("WORLD_SIZE", 1) or 1) > 1:
        lacks["run.graph"] = "on"  # processes that exchange within a forward pass capture it only where that is typed
    for name, value in lacks.items():
        section, field = name.split(".")
        if getattr(getattr(typed, section), field) != value:
            part = dataclasses.replace(getattr(config, section), **{field: ON_A_CPU[name][-1]})
            config = dataclasses.replace(config, **{section: part})
    return config


def only_of_a_gpu(config: Any) -> dict[str, str]:
    """Return the options that have a value which is nothing to a CPU, such as {"run.graph": "on"}."""
    values = {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in ON_A_CPU}
    return {name: value for name, value in values.items() if value not in ON_A_CPU[name]}


def check_place(config: Any) -> None:
    """Check that a configuration asks nothing of a CPU that only a GPU does. What a run had by itself is left out.

    Raises:
        UserError: if it does, which was typed.
    """
    if _on_a_cpu(config) and (typed := only_of_a_gpu(config)):
        raise UserError(f"{as_flags(typed)}: only a GPU has that, and this run is on a CPU; leave it out")


def as_flags(values: dict[str, str]) -> str:
    """Return options and their values as a user types them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def _on_a_cpu(config: Any) -> bool:
    device = config.run.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def suited(config: Section, memory: int, world_size: int) -> Section:
    """Return a preset's configuration with batch and learning rate for a card with so many bytes of memory.

    The rule is of the default model, whose memory was measured, and of the presets that it names; all else stays.
    """
    data, model, optim = config.data, config.model, config.optim
    if config.preset not in MOST_CLIPS or (model.name, model.backbone) != ("dfernet", "resnet18"):
        return config
    pixels = data.num_segments * data.frames_per_segment * data.size**2
    share = max(pixels / (16 * 112**2), 1)
    factor = batch_factor(memory / share, data.batch_size, MOST_CLIPS[config.preset], world_size)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, batch_size=round(factor * data.batch_size)),
        optim=dataclasses.replace(optim, lr=scaled_lr(optim.lr, optim.optimizer, factor)),
    )


def batch_factor(memory: int | float, clips: int, most: int, world_size: int) -> int | float:
    """Return what a preset's batch is multiplied with on a card.

    Args:
        memory: the card's, in bytes, for clips of 16 frames of 112 px; for larger ones a part of it.
        clips: the preset's own, of a process and step.
        most: clips of a step over all processes that are not exceeded, but by the preset itself.
        world_size: the number of processes.
    """
    if memory < _SMALL:
        return min(1.0, _SMALL_BATCH / clips)
    factor = next(factor for limit, factor in _FACTORS if memory < limit)
    while factor > 1 and clips * factor * world_size > most:
        factor //= 2
    return factor


def scaled_lr(lr: float, optimizer: str, factor: int | float) -> float:
    """Return the learning rate for a batch `factor` times as large, to three digits.

    SGD's grows like the batch, those of the others, whose updates are of one size, like its root.
    """
    return float(f"{lr * (factor if optimizer == 'sgd' else math.sqrt(factor)):.3g}")


def cache_tier(pictures: int, memory: int, local_size: int) -> Literal["gpu", "shares", "off"]:
    """Return where raw pictures are best kept: whole on each card, in shares over those of a machine, or on disk.

    What training itself takes is left free: 16 GB, and a quarter of the card at least (for a small card, half of it).

    Args:
        pictures: bytes of those of both lists.
        memory: bytes of a card.
        local_size: processes on this machine, each with a card of its own.
    """
    room = memory - max(min(16e9, memory / 2), memory / 4)
    if pictures <= room:
        return "gpu"
    return "shares" if local_size > 1 and pictures <= local_size * room else "off"


def card_memory(local_rank: int) -> int | None:
    """Return the bytes of memory of a process's GPU; None where there is none. Nothing is made on it."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(min(local_rank, torch.cuda.device_count() - 1)).total_memory
