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
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dfer.cli import UserError, command_of
from dfer.files import commit, read_file, reason, write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.run.hub import local
from dfer.run.weight_files import WeightFile, digest, read_weight_file

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
    except (FileNotFoundError, NotADirectoryError):  # who is to write there finds what is in the way
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
            f"{folder}: none of {len(damage)} checkpoints can be used: {damage[0]}; copy them again, or train anew "
            "under another --run.name"
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
    return _checked(state, source)


def _checked(state: object, source: Path) -> dict[str, Any]:
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(
            f"{source}: not a checkpoint of this project: no configuration of a run is in it; as weights to start from "
            "train.py takes it (--model.init)"
        )
    _check_classes(state.get("emotions"), source)
    return state


def _check_classes(classes: object, source: Path) -> None:
    if classes != list(EMOTIONS):
        raise UserError(f"{source}: its model's classes are {classes}, those of the lists are {list(EMOTIONS)}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: {"model", "ema", "config", "emotions", ...}.

    What a file is its content says, whatever it is called; links are followed. An exported model has no lists, which
    {"exported": True} says. {"faces": DRAWN or ""} is what the list that it was trained on says of them; of older
    versions' nothing is known.

    Args:
        path: a run's folder (its newest checkpoint), one checkpoint's .json or .pt, the weights of a best epoch, or
            what scripts/export.py wrote: its folder, model.safetensors in it, or hf:ORG/NAME where that was uploaded.

    Raises:
        UserError: if it is missing, damaged, or not a checkpoint of this project.
    """
    path = local(path)
    if os.path.isdir(path):
        content, _ = newest_checkpoint(path / "checkpoints" if os.path.isdir(path / "checkpoints") else path)
        if content is not None:
            return decode_state(content, path)
        if os.path.exists(path / "model.safetensors"):
            return load_checkpoint(path / "model.safetensors")
        best = sorted(p.name for p in path.glob("best_*.safetensors"))
        raise UserError(f"{path}: holds no checkpoint" + (f", but {best[-1]}, which can be given" if best else ""))
    if _MANIFEST.fullmatch(path.name):
        return decode_state(read_verified(path), path)
    places = (path, Path(os.path.realpath(path))) if os.path.islink(path) else (path,)
    for there in places:
        manifest = there.with_name(there.name.rsplit("-", 1)[0] + ".json")
        if _STATE.fullmatch(there.name) and os.path.exists(manifest):
            if _read_manifest(manifest)["file"] != there.name:
                raise UserError(f"{path}: {manifest.name} names another file: left over from a save that did not end")
            return decode_state(read_verified(manifest), path)
    found = read_weight_file(path)
    if _is_of_best_epoch(found):
        return _of_best_epoch(found, path)
    if "config" not in found.content:
        for there in places:
            if os.path.exists(there.with_name("config.json")):
                return _of_export(found, there)
    state = _checked(found.content, path)
    try:
        with zipfile.ZipFile(path) as file:  # a copy without its manifest, whose SHA-256 would verify it
            damaged = file.testzip() is not None
    except Exception:  # of a damaged zip file, of many kinds
        damaged = True
    if damaged:
        raise UserError(f"{path}: damaged: not what was written (CRC differs)")
    return state


def load_tensors(path: Path) -> dict[str, Any]:
    """Return what a file, a folder or hf:ORG/NAME holds, of whatever model: a run, an export, or another's file.

    Raises:
        UserError: if there are none, or they cannot be read.
    """
    path = local(path)
    if not os.path.isdir(path):
        if _STATE.fullmatch(path.name) or _MANIFEST.fullmatch(path.name):
            return load_checkpoint(path)
        found = read_weight_file(path)
        if _is_of_best_epoch(found):
            return _of_best_epoch(found, path)
        return _of_export(found, path) if _is_export(path) else found.content
    if os.path.isdir(path / "checkpoints") or find_manifests(path):
        return load_checkpoint(path)
    names = ("model.safetensors", "pytorch_model.bin")
    there = next((path / name for name in names if os.path.exists(path / name)), None)
    if there is None:
        raise UserError(f"{path}: a folder without weights: it is no run, and {' and '.join(names)} are not in it")
    return load_tensors(there)


def _is_export(path: Path) -> bool:
    """Return whether a file is of an export by its name and the config.json beside it, which other models have too."""
    with contextlib.suppress(UserError, ValueError, AttributeError):
        about = json.loads(read_file(path.with_name("config.json")))
        return path.name == "model.safetensors" and about.get("network") in _NETWORKS
    return False


def _is_of_best_epoch(found: WeightFile) -> bool:
    return {"sha256", "config", "emotions"} <= found.about.keys()


def _of_best_epoch(found: WeightFile, path: Path) -> dict[str, Any]:
    """Return what `save_weights` wrote for a run, in the form of `load_checkpoint`."""
    about = dict(found.about)
    sha256 = about.pop("sha256")
    try:
        emotions = json.loads(about["emotions"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged or not weights of this project ({type(error).__name__})") from None
    if digest(found.content, about) != sha256:
        raise UserError(f"{path}: damaged: not the weights that were written (SHA-256 differs)")
    _check_classes(emotions, path)
    state = {"model": found.content, "ema": None, "config": about["config"], "emotions": emotions}
    return state | ({"faces": about["faces"]} if "faces" in about else {})


# Class of an exported network -> --model.name.
_NETWORKS = {"DFERNet": "dfernet", "MeanPoolNet": "mean-pool", "LSTMNet": "r18-lstm", "GRUNet": "r18-gru"}
_NETWORKS |= {"R3DNet": "r3d-18", "STFormer": "st-former"}


def _of_export(found: WeightFile, path: Path) -> dict[str, Any]:
    """Return an exported model in the form of `load_checkpoint`, by the config.json beside it."""
    source = path.with_name("config.json")
    try:
        hub = json.loads(read_file(source))
        name = _NETWORKS[hub["network"]]
        data = {"size": hub["size"], "num_segments": hub["segments"], "train_list": "unknown", "val_list": "unknown"}
        data["frames_per_segment"] = hub["num_frames"] // hub["segments"]
        settings = ("backbone", "dropout", "dim", "branches", "dynamic", "time", "crf", "crf_branch", "readout")
        settings = (*settings, "iterations", "max_coupling")
        model = {"name": name} | {key: hub[key] for key in settings if key in hub}
        emotions = hub["classes"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError):  # JSON's and Unicode's errors are ValueErrors
        raise UserError(
            f"{path}: not a checkpoint of this project: {source.name} beside it is not of {command_of('export')}; as "
            "weights to start from train.py takes it (--model.init)"
        ) from None
    _check_classes(emotions, path)
    config = json.dumps({"preset": "exported", "data": data, "model": model})
    state = {"model": found.content, "ema": None, "config": config, "emotions": emotions, "exported": True}
    return state | ({"faces": hub["faces"]} if "faces" in hub else {})
