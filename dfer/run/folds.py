"""Drive the runs of a cross-validation: one of train.py for each seed and fold, and which of them are done."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfer.cli import EXIT_USAGE, UserError, usable_cores
from dfer.config import Config, begun_config, config_from_json, parse_config
from dfer.lists.index import load_index
from dfer.losses import build_objective
from dfer.run.checkpoint import decode_state, newest_checkpoint
from dfer.run.continuing import differences, suits_its_batch
from dfer.run.defaults import chooses_the_step
from dfer.run.fingerprints import check_data, data_fingerprints
from dfer.run.folder import same_global_batch, started_config
from dfer.run.launchers import own_environment
from dfer.run.signals import EXIT_STOPPED, catchable, restore

BEST = "predictions_best_WAR.csv"  # of the best epoch's weights; train.py keeps only those of the last
# A child is asked to save when its parent is gone, `kill -9` included: no run is left that nobody waits for.
_ENDS_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class FoldRun(NamedTuple):
    """One run of a cross-validation."""

    seed: int
    fold: int  # 1 ..
    path: Path  # of its folder
    config: Config


class FoldJob(NamedTuple):
    """What is left to do of a run: commands, one after the other, each the words behind `python`."""

    name: str
    commands: list[list[str]]


# ---- Which runs there are, and what is left of them


def with_one_start(config: Config, words: Sequence[str], folder: Path) -> tuple[Config, list[str]]:
    """Return configuration and words with what all runs have alike: where that is left open, what any began with.

    That is what they start from, and the batch and rate of a step, which would suit the card at hand.

    Args:
        config: what train.py makes of the words.
        words: of its command line.
        folder: of all runs.
    """
    found = (begun_config(path) for path in sorted(folder.glob("seed*-fold*")))
    begun, words = next((saved for saved in found if saved is not None), None), list(words)
    if begun is not None and not chooses_the_step(words) and suits_its_batch(begun) and suits_its_batch(config):
        batch, lr = begun.data.batch_size, begun.optim.lr
        if (batch, lr) != (config.data.batch_size, config.optim.lr):
            data, optim = dataclasses.replace(config.data, batch_size=batch), dataclasses.replace(config.optim, lr=lr)
            config = dataclasses.replace(config, data=data, optim=optim)
            words += ["--data.batch-size", str(batch), "--optim.lr", str(lr)]
    if config.model.init == "auto":
        init = begun.model.init if begun is not None else started_config(config).model.init
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=init))
        words += ["--model.init", init]
    return config, words


def fold_runs(
    config: Config, folds: Sequence[tuple[Path, Path]], num_seeds: int, folder: Path, words: Sequence[str]
) -> list[FoldRun]:
    """Return the runs of all seeds and folds, seed by seed, as subfolders of `folder`.

    A run that has begun goes on as what it was; `words` are of train.py's command line, for all runs.

    Raises:
        UserError: if runs that have begun differ from those that have not: the defaults have changed in between.
    """
    runs = []
    for seed in range(num_seeds):
        for fold, (train_list, test_list) in enumerate(folds, start=1):
            data = dataclasses.replace(config.data, train_list=train_list, val_list=test_list)
            name = f"seed{seed}-fold{fold}"
            run = dataclasses.replace(config.run, log_dir=folder, name=name)
            own = dataclasses.replace(config, seed=seed, data=data, run=run)
            runs.append(FoldRun(seed, fold, folder / name, parse_config(_flags(own, words))))
            if differing := differences(runs[-1].config, own):
                raise UserError(
                    f"{folder / name}: was begun with other defaults than this version's: {'; '.join(differing)}; type "
                    "what it was behind --, for all folds to be alike, or choose another --name"
                )
    return runs


def remaining_jobs(
    runs: Sequence[FoldRun], words: Sequence[str], app: Path, trained: Callable[[FoldRun], bool]
) -> list[FoldJob]:
    """Return what is to be trained or evaluated. A best epoch that is of the past is deleted.

    Args:
        runs: those that this process works on.
        words: of train.py's command line, for all runs.
        app: the folder of train.py and scripts/.
        trained: `is_trained` with all but the run given.

    Raises:
        UserError: as `is_trained`.
    """
    jobs = []
    for run in runs:
        commands = []
        if not trained(run):
            commands.append([str(app / "train.py"), *_flags(run.config, words)])
        if commands or not (run.path / BEST).exists():
            (run.path / BEST).unlink(missing_ok=True)
            evaluate = [str(app / "scripts" / "evaluate.py"), str(run.path / "best_WAR.safetensors")]
            data = run.config.data  # which may lie elsewhere than when the run began
            evaluate += ["--list", str(data.val_list), *(["--root", str(data.root)] if data.root else [])]
            commands.append([*evaluate, "--device", run.config.run.device, "--out", str(run.path / BEST)])
            jobs.append(FoldJob(run.path.name, commands))
    return jobs


def _flags(config: Config, words: Sequence[str]) -> list[str]:
    """Return the words of train.py that say `config`, which differs from `words` in lists, seed and place only."""
    data, run = config.data, config.run
    flags = {"--data.train-list": data.train_list, "--data.val-list": data.val_list, "--seed": config.seed}
    flags |= {"--run.name": run.name, "--run.log-dir": run.log_dir}
    return [*words, *(str(word) for flag in flags.items() for word in flag)]


def fold_fingerprints(config: Config) -> Callable[[FoldRun], dict[str, Any]]:
    """Return a function from a run to the fingerprints of its data, which are computed once for each fold."""

    @functools.cache
    def compute(train_list: Path, val_list: Path) -> dict[str, Any]:
        train, val = (load_index(path, config.data.root, config.data.source) for path in (train_list, val_list))
        return data_fingerprints(train, val, build_objective(config.loss, train.records))

    return lambda run: compute(run.config.data.train_list, run.config.data.val_list)


def is_trained(run: FoldRun, data: Callable[[FoldRun], dict[str, Any]]) -> bool:
    """Return whether a run has all its epochs.

    Args:
        run: the run.
        data: `fold_fingerprints`.

    Raises:
        UserError: if the run's folder holds a run of another configuration or of other clips.
    """
    path, config = run.path, run.config
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # a file in the place of a folder above it is an error
        content, _ = newest_checkpoint(path / "checkpoints")
    except OSError as error:
        raise UserError(f"--log-dir: cannot use {path} ({error})") from None
    if content is None:
        if (path / BEST).exists():
            raise UserError(
                f"{path}: is of a run that was done, but its checkpoints are gone; remove it to start it over"
            )
        return False  # whatever else lies there, train.py judges
    state = decode_state(content, path)
    if differing := differences(config_from_json(state["config"], path), config):
        raise UserError(
            f"{path}: holds a run of another configuration: {'; '.join(differing)}; continue with its own or choose "
            "another --name"
        )
    same_global_batch(config, state, world_size=1)
    check_data(state, data(run), config, path, "--name")
    return state["evaluated"] == config.optim.epochs


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be, against other processes while files of all runs are written.

    Raises:
        UserError: if it cannot be made, written or locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(f"--log-dir: cannot use {folder} ({error})") from None
        yield


# ---- Working them off


def slots_for(parallel: int, device: str) -> list[dict[str, str]]:
    """Return the environment of each of the runs that work at once: a GPU each, and a share of the cores.

    Raises:
        UserError: if there are fewer GPUs than runs.
    """
    if parallel == 1:
        return [{}]
    slots: list[dict[str, str]] = [{} for _ in range(parallel)]
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(usable_cores() // parallel, 1)
        slots = [{"OMP_NUM_THREADS": str(threads)} for _ in slots]
    if device != "cpu" and torch.cuda.is_available():
        gpus = list(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")[: len(gpus)]
        if parallel > len(gpus):
            raise UserError(f"--parallel {parallel}: {len(gpus)} GPUs are visible here, and each run takes one")
        slots = [slot | {"CUDA_VISIBLE_DEVICES": gpu} for slot, gpu in zip(slots, gpus, strict=False)]
    return slots


def drive(jobs: Sequence[FoldJob], slots: Sequence[dict[str, str]], folder: Path) -> int:
    """Work the jobs off in their order, one at a time for each slot, and return an exit code: 0 if all are done.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are handed on to the runs as SIGTERM, and all end. Otherwise a job that fails is
    named, and the others go on; but after exit code 2, which the user has to change something for, no other begins.
    With several slots the output goes to FOLDER/JOB.txt.
    """
    driver = _Driver(jobs, slots, folder)
    before = {number: signal.signal(number, driver.stop) for number in catchable()}
    try:
        driver.work()
    finally:
        restore(before)
    return driver.exit_code()


class _Child(NamedTuple):
    job: FoldJob
    commands: list[list[str]]  # that follow the one that runs
    process: subprocess.Popen[bytes]


class _Driver:
    """Jobs that wait, run and are done."""

    def __init__(self, jobs: Sequence[FoldJob], slots: Sequence[dict[str, str]], folder: Path):
        self.slots, self.folder = slots, folder
        self.waiting, self.free = list(jobs), list(range(len(slots)))
        self.children: dict[int, _Child] = {}  # by slot
        self.terminated: set[int] = set()  # slots
        self.codes: list[int] = []
        self.stopping = False

    def stop(self, *_: object) -> None:
        """Handle a signal."""
        self.stopping = True

    def work(self) -> None:
        while self.children or (self.waiting and not self.stopping):
            while self.waiting and self.free and not self.stopping:
                slot, job = self.free.pop(0), self.waiting.pop(0)
                print(f"crossval: {job.name} begins, {len(self.waiting)} wait", flush=True)
                self.start(slot, job, job.commands)
            for slot, child in list(self.children.items()):
                if self.stopping and slot not in self.terminated:
                    self.terminated.add(slot)
                    child.process.terminate()
                code = child.process.poll()
                if code is not None:
                    self.next_command(slot, code)
            time.sleep(0.1)

    def start(self, slot: int, job: FoldJob, commands: list[list[str]]) -> None:
        """Start the first of the commands."""
        command = [sys.executable, "-c", _ENDS_WITH_PARENT, *commands[0]]
        with open(self.folder / f"{job.name}.txt", "ab") if len(self.slots) > 1 else contextlib.nullcontext() as out:
            # A session of its own: Ctrl-C reaches it through here only, once.
            process = subprocess.Popen(
                command, stdout=out, stderr=out, env={**own_environment(), **self.slots[slot]}, start_new_session=True
            )
        self.children[slot] = _Child(job, commands[1:], process)

    def next_command(self, slot: int, code: int) -> None:
        """Go on after a command has ended with an exit code: with the job's next one, or the job is over."""
        job, left, _ = self.children[slot]
        if code == 0 and left and not self.stopping:
            self.start(slot, job, left)
            return
        del self.children[slot]
        self.free.append(slot)
        if self.stopping and (code == -signal.SIGTERM or (code == 0 and left)):
            code = EXIT_STOPPED  # it had nothing to save yet
        elif code == EXIT_STOPPED:
            self.stopping = True  # stopped by somebody else: who ends one run ends them all
        elif code:
            where = f"; see {self.folder / job.name}.txt" if len(self.slots) > 1 else ""
            print(f"crossval: {job.name} failed with exit code {code}{where}", file=sys.stderr, flush=True)
            if code == EXIT_USAGE:
                self.waiting.clear()
        else:
            print(f"crossval: {job.name} is done", flush=True)
        self.codes.append(code)

    def exit_code(self) -> int:
        """Return the code of the first job that failed, as a shell would give it."""
        failed = [code if code > 0 else 128 - code for code in self.codes if code not in (0, EXIT_STOPPED)]
        return failed[0] if failed else EXIT_STOPPED if self.stopping else 0
