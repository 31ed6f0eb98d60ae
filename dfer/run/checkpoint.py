"""Checkpoints: written whole or not at all, found by verification, read without executing anything.

A folder holds, per checkpoint, a file of tensors and plain values and a manifest with its SHA-256. Replacing the
manifest is the one moment at which a checkpoint comes into being: what no manifest names is left over from a save that
did not end. There is no pointer to the last one; it is found, as the highest step that verifies.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from dfer.cli import UserError
from dfer.files import commit, read_file, reason, write_whole
from dfer.lists.annotations import EMOTIONS

FORMAT = 1
KEPT = 2  # newest checkpoints; the best are kept besides
_MANIFEST = re.compile(r"step-(\d{8,})\.json")
_STATE = re.compile(r"step-\d{8,}-[0-9a-f]{8}\.pt")


class _Hashing:
    """A file that hashes what is written to it: the manifest has the hash of what was meant, whatever a disk does."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` (tensors and plain values; its "step" counts optimizer steps) and return its manifest.

    The newest `KEPT` stay, and those that the state calls the best ({"best": {name: [value, step]}}); others are
    deleted once the new one is safe on the disk.

    Raises:
        UserError: if the state is non-finite or cannot be written; the checkpoints before it stay.
    """
    non_finite = next(_non_finite(state), None)
    if non_finite is not None:
        raise UserError(f"{folder}: step {state['step']} is not saved: {non_finite} is not finite")
    manifest = folder / f"step-{state['step']:08d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        about = _write_state(folder, manifest.stem, state)
        write_whole(manifest, json.dumps(about))
        best = {step for _, step in state.get("best", {}).values()}
        # Later steps than this one are damaged or of a past that this run has left.
        steps = [step for step in find_manifests(folder) if step <= state["step"]]
        delete_all_but(folder, set(steps[:KEPT]) | best & set(steps))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{manifest}: cannot write the checkpoint ({reason(error)})") from None
    return manifest


def _write_state(folder: Path, stem: str, state: dict[str, Any]) -> dict[str, Any]:
    """Write the file of a checkpoint and return what its manifest says of it."""
    partial = folder / "state.partial"
    try:
        with open(partial, "wb") as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # type: ignore[arg-type] (it asks for no more than write and flush)
        sha256 = hashing.sha256.hexdigest()
        # Named by its content: a step that is saved twice does not touch the file that its first manifest names.
        target = folder / f"{stem}-{sha256[:8]}.pt"
        commit(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    return {
        "format": FORMAT, "step": state["step"], "file": target.name, "bytes": hashing.size, "sha256": sha256
    }  # fmt: skip


def _non_finite(state: object, name: str = "state") -> Iterator[str]:
    """Yield the names of tensors with a non-finite value."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(state.isfinite().all()):
            yield name
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _non_finite(value, str(key) if name == "state" else f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _non_finite(value, f"{name}.{i}")


def find_manifests(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, newest first, whether they verify or not."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(m[1]) for m in map(_MANIFEST.fullmatch, names) if m), reverse=True)


def delete_all_but(folder: Path, steps: set[int]) -> None:
    """Delete the checkpoints of other steps, and what saves that did not end have left.

    Manifests go first, so that none ever names a file that is gone.
    """
    kept = set()
    for step in find_manifests(folder):
        manifest = folder / f"step-{step:08d}.json"
        if step in steps:
            kept |= {manifest.name}
            with contextlib.suppress(UserError):  # a damaged one keeps nothing
                kept |= {_read_manifest(manifest)["file"]}
        else:
            manifest.unlink()
    for name in os.listdir(folder):
        if name not in kept and (_STATE.fullmatch(name) or name.endswith(".partial")):
            os.unlink(folder / name)


def _read_manifest(manifest: Path) -> dict[str, Any]:
    """Read a manifest. Raises UserError if it is none."""
    content = read_file(manifest)
    try:
        about = json.loads(content)
        known = about["format"] == FORMAT and _STATE.fullmatch(about["file"])
        fits = manifest.name == f"step-{about['step']:08d}.json" and about["bytes"] > 0 and len(about["sha256"]) == 64
        if not known or not fits:
            raise ValueError
    except (ValueError, KeyError, TypeError):  # JSON and Unicode errors are ValueErrors
        raise UserError(f"{manifest}: damaged, or of a newer version") from None
    return about


def read_verified(manifest: Path) -> bytes:
    """Return the bytes of a checkpoint's state, verified to be those that were written.

    Raises:
        UserError: if they are not, or the manifest is damaged.
    """
    about = _read_manifest(manifest)
    path = manifest.with_name(about["file"])
    content = read_file(path)
    if len(content) != about["bytes"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise UserError(f"{path}: damaged: not the {about['bytes']} bytes that were written (SHA-256 differs)")
    return content


def newest_checkpoint(folder: Path) -> tuple[bytes | None, list[str]]:
    """Return the newest state that verifies (None in a folder without checkpoints) and what is wrong with newer ones.

    Raises:
        UserError: if there are checkpoints and none verifies.
    """
    damage = []
    for step in find_manifests(folder):
        try:
            return read_verified(folder / f"step-{step:08d}.json"), damage
        except UserError as error:
            damage.append(str(error))
    if damage:
        raise UserError(
            f"{folder}: none of {len(damage)} checkpoints can be used: {damage[0]}; remove the folder to start over"
        )
    return None, []


def decode_state(content: bytes, source: Path) -> dict[str, Any]:
    """Return the state in verified bytes, on the CPU; `source` is named in messages.

    Raises:
        UserError: if it is not a checkpoint of this project, or of another order of the classes.
    """
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors are of many kinds
        raise UserError(f"{source}: damaged or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(f"{source}: not a checkpoint of this project")
    _check_classes(state.get("emotions"), source)
    return state


def _check_classes(classes: object, source: Path) -> None:
    if classes != list(EMOTIONS):
        raise UserError(f"{source}: its model's classes are {classes}, those of the lists are {list(EMOTIONS)}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: {"model", "ema", "config", "emotions", ...}.

    `path` is a run's folder (its newest checkpoint), one checkpoint's .json or .pt, or weights in .safetensors.

    Raises:
        UserError: if it is missing, damaged, or not a checkpoint of this project.
    """
    if path.suffix == ".safetensors":
        return load_weights(path)
    if path.is_dir():
        content, _ = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if content is None:
            raise UserError(f"{path}: holds no checkpoint")
        return decode_state(content, path)
    manifest = path
    if path.suffix == ".pt":
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint")
        if not _STATE.fullmatch(path.name):
            raise UserError(f"{path}: not a checkpoint of this project: those are in a run's checkpoints/ folder")
        manifest = path.with_name(path.name.rsplit("-", 1)[0] + ".json")
        if _read_manifest(manifest)["file"] != path.name:
            raise UserError(f"{path}: {manifest.name} names another file: left over from a save that did not end")
    return decode_state(read_verified(manifest), path)


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write weights and `about` in one .safetensors file, whose metadata hold a SHA-256 of both.

    Raises:
        UserError: if it cannot be written; a file of that name stays as it was.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(weights, about | {"sha256": _digest(weights, about)})
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot write the weights ({reason(error)})") from None


def load_weights(path: Path) -> dict[str, Any]:
    """Return what `save_weights` wrote, in the form of `load_checkpoint`.

    Raises:
        UserError: if it is missing, damaged, or of something else.
    """
    content = read_file(path)
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = header["__metadata__"]
        weights = safetensors.torch.load(content)
        sha256 = about.pop("sha256")
        emotions, config = json.loads(about["emotions"]), about["config"]
    except Exception as error:  # of header, offsets and types, each of another kind
        raise UserError(f"{path}: damaged or not weights of this project ({type(error).__name__})") from None
    if _digest(weights, about) != sha256:
        raise UserError(f"{path}: damaged: not the weights that were written (SHA-256 differs)")
    _check_classes(emotions, path)
    return {"model": weights, "ema": None, "config": config, "emotions": emotions}


def _digest(weights: dict[str, Tensor], about: dict[str, str]) -> str:
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name]
        sha256.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
