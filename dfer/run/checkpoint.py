"""A run's folder: held by one process, written whole or not at all, read without executing anything.

`logs/<run>/checkpoints/` holds, per checkpoint, a file of tensors and plain values and a manifest with its SHA-256.
Replacing the manifest is the one moment at which a checkpoint comes into being: what no manifest names is left over
from a save that did not end. There is no pointer to the last one; it is found, as the highest step that verifies.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from dfer.cli import UserError
from dfer.config import Config, config_from_json
from dfer.lists.annotations import EMOTIONS

FORMAT = 1
KEPT = 2  # newest checkpoints; the best are kept besides
_MANIFEST = re.compile(r"step-(\d{8,})\.json")
_STATE = re.compile(r"step-\d{8,}-[0-9a-f]{8}\.pt")
# What may differ in the command that continues a run: nothing that is trained depends on it. The size of a batch is
# looked at by `same_global_batch`, which knows the number of processes.
_FREE = {"resume", "run.name", "run.log_dir", "run.wandb", "run.save_minutes", "run.timeout", "data.batch_size"}
_FREE |= {"profile"}


class RunDir:
    """The folder of one run, for the process that writes it (rank 0).

    Opening it touches nothing that is not there yet: a command that fails before its first step leaves no trace.
    """

    def __init__(self, config: Config, name: str):
        """Find the run; if it exists, hold it.

        Raises:
            UserError: in one line, if another process holds it, it is a run of another configuration or no run at
                all, or it is to be resumed and has no checkpoint.
        """
        self.path = config.run.log_dir / name
        self.checkpoints = self.path / "checkpoints"
        self._interval_s = 60 * config.run.save_minutes
        self._saved_at = time.monotonic()
        self._lock: int | None = None
        if config.resume and not find_manifests(self.checkpoints):
            raise UserError(f"--resume: {self.path} holds no checkpoint to continue from")
        if self.path.exists():
            self._hold()
            try:
                self._check(config)
            except BaseException:
                self.close()
                raise

    def _hold(self) -> None:
        """Lock the folder. The lock ends with the process, however that ends: a stale one does not exist."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--run.log-dir: cannot use {self.path} ({error})") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 1000).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise UserError(
                f"{self.path}: in use by {holder}; wait for it, stop it, or choose another --run.name"
            ) from None
        except OSError as error:
            os.close(lock)
            raise UserError(
                f"{self.path}: its file system cannot lock files ({error}); choose another --run.log-dir"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = lock

    def _check(self, config: Config) -> None:
        saved = self.path / "config.json"
        if not saved.exists():
            others = sorted(p.name for p in self.path.iterdir() if p.name != "lock")
            if others:
                raise UserError(f"{self.path}: holds {others[0]}, which is no run; choose another --run.name")
            return
        if not find_manifests(self.checkpoints) and not self._has_rows():
            return  # it never took a step: there is nothing to protect
        # Through Config: a run of an older version had the defaults of what was added since.
        before = json.loads(config_from_json(_read(saved).decode(errors="replace"), saved).to_json())
        differing = differences(before, json.loads(config.to_json()))
        if differing:
            raise UserError(
                f"{self.path}: holds a run of another configuration: {'; '.join(differing)}; "
                "continue it with its own or choose another --run.name"
            )

    def _has_rows(self) -> bool:
        rows = self.path / "metrics.jsonl"
        return rows.exists() and rows.stat().st_size > 0

    def begin(self, config: Config, state_bytes: int) -> None:
        """Make the folder ready for the first step: held, cleaned of leftovers, and known to take what is to come.

        Raises:
            UserError: in one line, if it cannot be written or the disk has no room for `state_bytes` twice (a new
                checkpoint beside the old one).
        """
        if self._lock is None:
            self._hold()
        try:
            self.checkpoints.mkdir(exist_ok=True)
            for folder in (self.path, self.checkpoints):
                for leftover in folder.glob("*.partial"):
                    leftover.unlink()
            _delete_all_but(self.checkpoints, set(find_manifests(self.checkpoints)))
            saved = self.path / "config.json"
            text = _read(saved) if find_manifests(self.checkpoints) else f"{config.to_json()}\n".encode()
            write_whole(saved, lambda file: file.write(text))  # again too: better now than at the first checkpoint
            free = shutil.disk_usage(self.checkpoints).free
        except (OSError, RuntimeError) as error:
            raise UserError(f"--run.log-dir: cannot write {self.path} ({_reason(error)})") from None
        if free < 2 * state_bytes:
            raise UserError(
                f"{self.checkpoints}: {free / 1e6:.0f} MB are free, and two checkpoints take "
                f"{2 * state_bytes / 1e6:.0f} MB; make room or choose another --run.log-dir"
            )

    def due(self) -> bool:
        """Whether the time between two checkpoints has passed."""
        return time.monotonic() - self._saved_at >= self._interval_s

    def save(self, state: dict[str, Any]) -> None:
        """Add a checkpoint and delete those that it makes superfluous; see `save_checkpoint`."""
        save_checkpoint(self.checkpoints, state)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def differences(saved: dict, now: dict, prefix: str = "") -> list[str]:
    """What keeps a command from continuing a run: `--flag was this, is that`."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in _FREE:
            lines.append(f"--{prefix}{key} was {old}, is {new}".replace("_", "-"))
    return lines


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace a file: at every moment the old content or the new one is there, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hashing:
    """A file that hashes what passes: the manifest speaks of what was meant, not of what a disk made of it."""

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

    Kept are the newest `KEPT` and those that the state calls the best ({"best": {name: [value, step]}}); others are
    deleted once the new one is safe on the disk.

    Raises:
        UserError: in one line, if the state is not finite or it cannot be written; the checkpoints before it stay.
    """
    harmful = next(_not_finite(state), None)
    if harmful is not None:
        raise UserError(f"{folder}: step {state['step']} is not saved: {harmful} is not finite")
    manifest = folder / f"step-{state['step']:08d}.json"
    partial = folder / "state.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                hashing = _Hashing(file)
                torch.save(state, hashing)
                file.flush()
                os.fsync(file.fileno())
            sha256 = hashing.sha256.hexdigest()
            # Named by its content: a step that is saved twice does not touch the file that its first manifest names.
            target = folder / f"{manifest.stem}-{sha256[:8]}.pt"
            os.replace(partial, target)
            _sync_folder(folder)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        about = {
            "format": FORMAT,
            "step": state["step"],
            "file": target.name,
            "bytes": hashing.size,
            "sha256": sha256,
        }
        write_whole(manifest, lambda file: file.write(json.dumps(about).encode()))
        best = {step for _, step in state.get("best", {}).values()}
        # Later steps than this one are damaged or of a past that this run has left.
        steps = [step for step in find_manifests(folder) if step <= state["step"]]
        _delete_all_but(folder, set(steps[:KEPT]) | best & set(steps))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{manifest}: cannot write the checkpoint ({_reason(error)})") from None
    return manifest


def _not_finite(state: object, name: str = "state") -> Any:
    """The names of tensors with a value that is not finite."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(state.isfinite().all()):
            yield name
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _not_finite(value, str(key) if name == "state" else f"{name}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _not_finite(value, f"{name}.{i}")


def find_manifests(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first, whether they verify or not."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((int(m[1]) for m in map(_MANIFEST.fullmatch, names) if m), reverse=True)


def _delete_all_but(folder: Path, steps: set[int]) -> None:
    """Delete what belongs to no checkpoint of these steps: manifests first, so that none ever names what is gone."""
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
        if name not in kept and _STATE.fullmatch(name):
            os.unlink(folder / name)


def _read_manifest(manifest: Path) -> dict[str, Any]:
    """Read a manifest. Raises UserError if it is none."""
    content = _read(manifest)
    try:
        about = json.loads(content)
        known = about["format"] == FORMAT and _STATE.fullmatch(about["file"])
        fits = manifest.name == f"step-{about['step']:08d}.json" and about["bytes"] > 0 and len(about["sha256"]) == 64
        if not known or not fits:
            raise ValueError
    except (ValueError, KeyError, TypeError):  # JSON and Unicode errors are ValueErrors
        raise UserError(f"{manifest}: damaged, or of a newer version") from None
    return about


def _read(path: Path) -> bytes:
    """All of a file that is no link: a checkpoint does not reach out of its folder.

    Raises:
        UserError: in one line, if it cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_verified(manifest: Path) -> bytes:
    """The bytes of a checkpoint's state, which are those that were written.

    Raises:
        UserError: in one line, if they are not, or the manifest is damaged.
    """
    about = _read_manifest(manifest)
    path = manifest.with_name(about["file"])
    content = _read(path)
    if len(content) != about["bytes"] or hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise UserError(f"{path}: damaged: not the {about['bytes']} bytes that were written (SHA-256 differs)")
    return content


def newest_checkpoint(folder: Path) -> tuple[bytes | None, list[str]]:
    """The newest state that verifies, None in a folder without checkpoints; and what is wrong with newer ones.

    Raises:
        UserError: in one line, if there are checkpoints and none verifies.
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
    """The state in verified bytes, on the CPU; `source` is named in messages.

    Raises:
        UserError: in one line, if it is not a checkpoint of this project, or of another order of the classes.
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
        UserError: in one line, if it is missing, damaged, or not a checkpoint of this project.
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
        UserError: in one line, if it cannot be written; a file of that name stays as it was.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(weights, about | {"sha256": _digest(weights, about)})
    try:
        write_whole(path, lambda file: file.write(content))
    except OSError as error:
        raise UserError(f"{path}: cannot write the weights ({_reason(error)})") from None


def load_weights(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote, in the form of `load_checkpoint`.

    Raises:
        UserError: in one line, if it is missing, damaged, or of something else.
    """
    content = _read(path)
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
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha256.hexdigest()


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
