"""Checkpoints: written whole or not at all, read without executing anything."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dfer.annotations import EMOTIONS


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) to `path`; at every moment the old file or the new one is there.

    Raises:
        ValueError: in one line, if it cannot be written; the previous file is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot write the checkpoint ({str(error).splitlines()[0]})") from None


def copy_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name. It is never written in place, so a link is as good as a copy."""
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, partial)
    os.replace(partial, target)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        ValueError: in one line, if it is missing, damaged, or not a checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:  # zip, pickle and storage errors are of many kinds
        raise ValueError(f"{path}: damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise ValueError(f"{path}: not a checkpoint of this project")
    classes = state.get("emotions", list(EMOTIONS))
    if classes != list(EMOTIONS):
        raise ValueError(f"{path}: its model's classes are {classes}, those of the lists are {list(EMOTIONS)}")
    return state
