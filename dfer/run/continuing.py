"""What a command may say differently that continues a run, which run it means if it names none, and how it reads."""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dfer.cli import UserError, command_of
from dfer.config import PRESETS, Config, begun_config, parse_config
from dfer.run.checkpoint import find_manifests
from dfer.run.defaults import scaled_lr, settled_as
from dfer.run.launchers import number

# What may differ in the command that continues a run: nothing that is trained depends on it, but for the rounding of
# another decoder or of other kernels. The batch size is checked by `dfer.run.folder.same_global_batch`, which knows the
# number of processes.
_FREE = {"resume", "validate_only", "profile", "run.name", "run.log_dir", "run.wandb", "run.save_minutes"}
_FREE |= {"run.wandb_project", "run.tensorboard", "run.grace", "run.timeout", "run.graph"}
_FREE |= {"run.fused", "model.crf_backend"}
_FREE |= {"data.batch_size", "data.jpeg_decoder", "data.video_decoder", "data.cache"}
# They round otherwise, which is said: a machine may lack the GPU, or the cores, that the run began with.
_FREE |= {"run.device", "run.threads"}
# Where data lies; whether it is the same data, `dfer.run.fingerprints` knows.
_FREE |= {"data.train_list", "data.val_list", "data.root", "data.source", "loss.soft_labels"}


def parse_command(words: Sequence[str]) -> Config:
    """Return the configuration that train.py's words make; --resume without a name is given the run's that it means.

    Raises:
        UserError: as `parse_config`; if there is no such run.
    """
    config = parse_config(list(words))
    if not config.resume or config.run.name is not None or os.environ.get("RANK", "0") != "0":
        return config  # rank 0 may be alone in seeing the folder, and says which it is
    return parse_config([*words, "--run.name", unfinished_run(config).name])


def unfinished_run(config: Config) -> Path:
    """Return the folder of the newest run of a configuration that is not finished.

    Data counts by the lists that are named: the runs of two folds are two configurations.

    Raises:
        UserError: if there is none; it names the newest of another configuration.
    """
    others = []
    for folder in newest_first(config.run.log_dir):
        with contextlib.suppress(UserError):  # no run that could be continued
            begun = begun_config(folder)
            if begun is None or _is_finished(folder, begun.optim.epochs):
                continue
            like = config
            if suits_its_batch(begun) and suits_its_batch(config):  # by a preset, each on a card of its own
                like = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=begun.optim.lr))
            differing = differences(begun, like) + _other_data(begun, config)
            if not differing:
                return folder
            others.append(f"; {folder.name} is another: {'; '.join(differing)}")
    raise UserError(
        f"--resume: {config.run.log_dir} has no unfinished run of this configuration{others[0] if others else ''}; say "
        "which with --run.name NAME"
    )


def newest_first(log_dir: Path) -> list[Path]:
    """Return the folders in which runs have left a checkpoint, the one that was written to last first."""
    found = []
    with contextlib.suppress(OSError):  # there is none, which whoever asks says
        for entry in os.scandir(log_dir):
            with contextlib.suppress(OSError):
                if find_manifests(Path(entry.path, "checkpoints")):
                    found.append((os.stat(Path(entry.path, "checkpoints")).st_mtime_ns, Path(entry.path)))
    return [folder for _, folder in sorted(found, reverse=True)]


def suits_its_batch(config: Config) -> bool:
    """Return whether the learning rate is the one that the preset has for such a batch on some GPU."""
    preset = PRESETS[config.preset](True)
    factor = config.data.batch_size / preset.data.batch_size
    return config.optim.lr == scaled_lr(preset.optim.lr, config.optim.optimizer, factor)


def _is_finished(folder: Path, epochs: int) -> bool:
    """Return whether a run has evaluated its last epoch, and saved that."""
    last = {}
    with contextlib.suppress(OSError, ValueError), open(folder / "metrics.jsonl", "rb") as file:
        last = json.loads(file.read().splitlines()[-1])
    return (
        isinstance(last, dict)
        and last.get("epoch") == epochs
        and "val/WAR" in last
        and last.get("step") == find_manifests(folder / "checkpoints")[0]
    )


def _other_data(begun: Config, now: Config) -> list[str]:
    """Return the flags that name other data, as `--flag was this, is that`."""
    pairs = {
        "--data.train-list": (begun.data.train_list, now.data.train_list),
        "--data.val-list": (begun.data.val_list, now.data.val_list),
        "--data.root": (begun.data.root, now.data.root),
        "--loss.soft-labels": (begun.loss.soft_labels, now.loss.soft_labels),
    }
    return [f"{flag} was {was}, is {is_}" for flag, (was, is_) in pairs.items() if _real(was) != _real(is_)]


def _real(path: Path | None) -> str | None:
    return None if path is None else os.path.realpath(path)


def continuing_command(run: Path) -> str:
    """Return the command that goes on with a run, whose saved configuration says all but where it lies."""
    program, installed = Path(sys.argv[0]), command_of("train") == "dfer train"
    python = sys.executable
    with contextlib.suppress(OSError):  # the folder that it was started in may be gone
        python = os.path.relpath(python) if Path(python).is_relative_to(Path.cwd()) else python
    if "TORCHELASTIC_RUN_ID" in os.environ:
        command = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"]
        command += ["-m", "dfer", "train"] if installed else [str(program)]
    elif program.name == "train.py" and not installed:
        command = [python, str(program)]
    else:
        command = ["dfer", "train"]
    where = [] if run.parent == Path("logs") else ["--run.log-dir", str(run.parent)]
    return shlex.join([*command, "--run.name", run.name, *where])


def differences(saved: Config, now: Config) -> list[str]:
    """Return what keeps a command from continuing a run: `--flag was this, is that`.

    What the command leaves open is no difference.
    """
    was, is_ = json.loads(saved.to_json()), json.loads(settled_as(now, saved).to_json())
    for config in (was, is_):
        if not saved.optim.ema:  # no average, whichever
            del config["optim"]["ema_warmup"]
        # The checkpoint has the weights: which file they came from is of no matter.
        if config["model"]["init"] not in ("random", "timm", "auto"):
            config["model"]["init"] = "a file"
    if now.run.device == "cpu" and saved.run.amp == "fp16":  # which no CPU has
        was["run"]["amp"] = is_["run"]["amp"]
    if now.run.device == "cpu" and number("WORLD_SIZE", 1) == 1:  # one process has all clips of a step by itself
        was["run"]["sync_bn"] = is_["run"]["sync_bn"] = False
    if was["model"]["init"] == "auto":  # what the run began with, whichever that was
        is_["model"]["init"] = was["model"]["init"]
    return _differences(was, is_, "")


def _differences(saved: dict, now: dict, prefix: str) -> list[str]:
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in _FREE:
            flag = "preset" if prefix + key == "preset" else f"--{prefix}{key}".replace("_", "-")
            lines.append(f"{flag} was {old}, is {new}")
    return lines
