"""A run's folder: held by one process, and everything in it of one run.

`logs/<run>/` holds config.json, started.jsonl, metrics.jsonl, log.txt, predictions.csv, weights, and checkpoints/.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfer.batch import Batch
from dfer.cli import UserError
from dfer.config import Config, begun_config, config_from_json
from dfer.files import free_bytes, read_file, reason, write_whole
from dfer.lists.annotations import EMOTIONS, listed_faces
from dfer.lists.index import ClipIndex
from dfer.model.start import resolved
from dfer.run import distributed
from dfer.run.checkpoint import delete_all_but, find_manifests, save_checkpoint
from dfer.run.continuing import differences
from dfer.run.defaults import check_place
from dfer.run.distributed import World
from dfer.run.fingerprints import DataOfRun, changes, check_data, data_fingerprints, relocated
from dfer.run.resolving import settled, settled_for
from dfer.run.tensorboard_log import check_tensorboard
from dfer.run.wandb_log import check_settings
from dfer.run.weight_files import save_weights
from dfer.state import Job, TrainState


class RunFolder:
    """The folder of one run, for the process that writes it (rank 0).

    Opening it touches nothing that is not there yet: a command that fails before its first step leaves no trace.
    """

    def __init__(self, config: Config, name: str, new_for: World | None = None):
        """Find the run; if it exists, lock it.

        Args:
            config: the run's, or the command's that continues it.
            name: of the folder.
            new_for: the processes of a run that was named by us and not begun: a folder of that name is another's.

        Raises:
            UserError: if another process holds it, it is a run of another configuration or no run at
                all, or it is to be resumed and has no checkpoint.
        """
        self.path = config.run.log_dir / name
        self.checkpoints = self.path / "checkpoints"
        self._interval_s = 60 * config.run.save_minutes
        self._saved_at, self._cost_s = time.monotonic(), 0.0
        self._lock: int | None = None
        self._new_for = new_for
        if config.resume and not find_manifests(self.checkpoints):
            raise UserError(f"--resume: {self.path} holds no checkpoint to continue from")
        if new_for is None and self.path.exists():
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
        self._lock = lock
        try:
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            raise UserError(f"--run.log-dir: cannot write {self.path / 'lock'} ({reason(error)})") from None

    def _claim(self) -> None:
        """Make a folder that nobody else has, as two commands may begin in one second."""
        name = self.path.name
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(2):
                with contextlib.suppress(FileExistsError):
                    self.path.mkdir()
                    break
                self.path = self.path.with_name(f"{name}-{number}")
        except OSError as error:
            raise UserError(f"--run.log-dir: cannot use {self.path} ({error})") from None
        self.checkpoints = self.path / "checkpoints"

    def _check(self, config: Config) -> None:
        begun = begun_config(self.path)
        if begun is None:
            others = sorted(p.name for p in self.path.iterdir() if p.name != "lock")
            if others and not (self.path / "config.json").exists():
                raise UserError(f"{self.path}: holds {others[0]}, which is no run; choose another --run.name")
            return  # it never took a step: there is nothing to protect
        if differing := differences(settled_for(begun, config), config):
            raise UserError(
                f"{self.path}: holds a run of another configuration: {'; '.join(differing)}; "
                "continue it with its own or choose another --run.name"
            )

    def begin(self, config: Config, state_bytes: int) -> None:
        """Make the folder ready for the first step: lock it, delete leftovers, check that it is writable.

        Raises:
            UserError: if it cannot be written or the disk has no room for `state_bytes` twice (a new
                checkpoint beside the old one).
        """
        if self._new_for is not None:
            self._claim()
            distributed.remembered(self._new_for, "run", self.path.name)
        if self._lock is None:
            self._hold()
        try:
            self.checkpoints.mkdir(exist_ok=True)
            for leftover in self.path.glob("*.partial"):
                leftover.unlink()
            delete_all_but(self.checkpoints, set(find_manifests(self.checkpoints)))
            saved = self.path / "config.json"
            begun = begun_config(self.path) if find_manifests(self.checkpoints) else None
            stays = begun is not None and relocated(begun, config) == begun
            text = read_file(saved) if stays else f"{(relocated(begun, config) if begun else config).to_json()}\n"
            write_whole(saved, text)  # again too: better now than at the first checkpoint
            free = free_bytes(self.checkpoints)
        except OSError as error:
            raise UserError(f"--run.log-dir: cannot write {error.filename or self.path} ({reason(error)})") from None
        if free is not None and free < 2 * state_bytes:
            raise UserError(
                f"{self.checkpoints}: {free / 1e6:.0f} MB are free, and two checkpoints take "
                f"{2 * state_bytes / 1e6:.0f} MB; make room or choose another --run.log-dir"
            )

    def due(self) -> bool:
        """Return whether the time between two checkpoints has passed."""
        return time.monotonic() - self._saved_at >= self._interval_s

    def pays(self) -> bool:
        """Return whether a checkpoint as long as the last one would be a tenth of the time since that, or less."""
        return time.monotonic() - self._saved_at >= 9 * self._cost_s

    def save(self, state: dict[str, Any]) -> None:
        """Add a checkpoint and delete those that it replaces; see `save_checkpoint`."""
        began = time.monotonic()
        save_checkpoint(self.checkpoints, state)
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - began

    def keep_best(self, state: TrainState, names: list[str], about: dict[str, Any]) -> None:
        """Write the weights that are evaluated as the best of each name (WAR, UAR)."""
        for name in names:
            description = {"step": str(state.step), name: str(state.best[name][0]), "config": about["config"]}
            description |= {"emotions": json.dumps(about["emotions"]), "faces": about["faces"]}
            save_weights(self.path / f"best_{name}.safetensors", state.evaluated_model().state_dict(), description)

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def started_config(config: Config) -> Config:
    """Return the configuration that a run is begun with, once this machine has what it takes.

    What it leaves open is saved as what was found: weights to start from, device, precision, threads and so on; a run
    that has begun has it from then. `dfer.run.resolving.with_cache` settles what depends on the clips.

    Raises:
        UserError: if random weights would be frozen, W&B's settings here cannot be used, TensorBoard is asked for and
            not there, or a graph is to be of a CPU.
    """
    check_settings(config)
    check_tensorboard(config.run.tensorboard)
    check_place(config)
    return settled(dataclasses.replace(config, model=resolved(config.model)))


def open_run(config: Config, world: World) -> RunFolder:
    """Return the folder of the run that is named, or of a new one, for rank 0.

    Raises:
        UserError: as `RunFolder`.
    """
    ours = config.run.name or f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = distributed.remembered(world, "run", ours)
    return RunFolder(config, name, world if config.run.name is None and name == ours else None)


def shared_config(config: Config, world: World) -> Config:
    """Return rank 0's configuration on all ranks: only there may the run's folder be seen."""
    text = distributed.share(config.to_json().encode() if world.is_main else None, world)
    return config if text is None or world.is_main else config_from_json(text.decode(), config.run.log_dir)


def continued_config(state: dict[str, Any], config: Config, data: DataOfRun, world_size: int) -> Config:
    """Return the configuration that a run goes on with, on however many processes.

    Args:
        state: the run's checkpoint.
        config: what this process was started with.
        data: what it would train and evaluate on, and minimise.
        world_size: the number of processes.

    Raises:
        UserError: if the data is not the run's, or the batch cannot be shared.
    """
    check_data(state, data_fingerprints(*data), config, config.run.name, "--run.name")
    return same_global_batch(config, state, world_size)


def same_global_batch(config: Config, state: dict[str, Any], world_size: int) -> Config:
    """Return the configuration with the batch size that keeps the clips of each step on this number of processes.

    Raises:
        UserError: if another number of clips is asked for, or they cannot be shared evenly.
    """
    total, given = state["global_batch"], config.data.batch_size
    begun = config_from_json(state["config"], config.run.log_dir).data.batch_size
    if given not in (begun, total / world_size):
        raise UserError(
            f"--data.batch-size {given}: on {world_size} processes that is {given * world_size} clips per step, "
            f"but {config.run.name} has {total}; leave it at {begun}, which is shared among the processes there are"
        )
    if total % world_size:
        raise UserError(
            f"{config.run.name} has {total} clips per step, which {world_size} processes cannot share evenly; "
            "start another number of them"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=total // world_size))


def about_run(job: Job, checkpoint: dict[str, Any] | None) -> tuple[dict[str, Any], list[str] | None]:
    """Return what a checkpoint holds beside the state, and what is not as when the run began; None if it begins now.

    The configuration is that which the run was begun with, but for where its data lies.
    """
    text, lines = job.config.to_json(), None
    data = data_fingerprints(job.train_loader.index, job.val_loader.index, job.objective)
    if checkpoint:
        begun = config_from_json(checkpoint["config"], job.config.run.log_dir)
        here, lines = relocated(begun, job.config), changes(checkpoint, job.config, data)
        text = checkpoint["config"] if here == begun else here.to_json()
    about = {
        "config": text,
        "emotions": list(EMOTIONS),
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint does not load
        "data": data,
        "faces": listed_faces(job.config.data.train_list),
        "global_batch": job.config.data.batch_size * job.world.size,
    }
    return about, lines


def diverged(job: Job, run: RunFolder | None, batch: Batch) -> UserError:
    """Write what the last of many skipped steps was made of, and return the error that ends the run.

    `run` is rank 0's.
    """
    dump: Path | str = "rank 0's"
    if run:
        dump = run.path / "skipped_steps.json"
        if job.step is not None:
            job.step.show_gradients()
        try:
            _dump_step(dump, job.state, batch, job.train_loader.index)
        except OSError as error:
            dump = f"{dump}, which cannot be written ({reason(error)}),"
    return UserError(
        f"step {job.state.step + 1}: {job.state.guard.LIMIT} steps in a row were skipped, as their loss or gradient is "
        f"not finite; {dump} has the last one; try a lower --optim.lr, or --run.amp off"
    )


def _dump_step(path: Path, state: TrainState, batch: Batch, index: ClipIndex) -> None:
    """Write the clips of a skipped step, and which weights and gradients are non-finite."""

    def non_finite(named: Iterator[tuple[str, Tensor | None]]) -> list[str]:
        return [name for name, t in named if t is not None and not bool(t.isfinite().all())]

    about = {
        "step": state.step + 1,
        "lr": state.optimizer.param_groups[0]["lr"],
        "clips": [index.records[i].name for i in batch.ids.tolist()],
        "clips are finite": batch.clips.isfinite().flatten(1).all(1).tolist(),
        "weights that are not finite": non_finite(state.model.named_parameters()),
        "gradients that are not finite": non_finite((name, p.grad) for name, p in state.model.named_parameters()),
    }
    write_whole(path, json.dumps(about, indent=2))
