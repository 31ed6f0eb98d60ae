"""The record of finished runs: one line of JSON each, appended, found again by what was trained on what."""

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dfer.cli import UserError
from dfer.config import Config, DataConfig, RunConfig, config_from_json
from dfer.files import read_file
from dfer.lists.index import load_index
from dfer.model.pretrained import held_tensors
from dfer.model.start import ALONE
from dfer.run import resolving
from dfer.run.checkpoint import load_tensors
from dfer.run.fingerprints import fingerprint
from dfer.run.weight_files import digest

Result = dict[str, Any]


def read_results(path: Path) -> list[Result]:
    """Return the runs of a file; none if there is no file.

    A last line without an end was cut off while it was written: it is left out, and `append_result` removes it.

    Raises:
        UserError: if another line is none of ours.
    """
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            result = json.loads(line)
            results.append(result | {"config": dict(result["config"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not the line of a run: mend or remove it") from None
    return results


def append_result(path: Path, result: Result) -> None:
    """Add a run to a file, on the disk when this returns. Several processes may add to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)  # what was cut off
        file.write(json.dumps(result, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


# Options that say where something lies. What is read there a record knows by what it is: these clips by their bytes.
PLACES = ("data.train_list", "data.val_list", "data.root", "run.log_dir")
CONTENT = ("model.init", "loss.soft_labels")  # and these files by a hash


def portable(config: Config) -> Config:
    """Return a configuration without what does not change a result: places, names, decoders and the log.

    Of weights to start from, and of votes, it has a name and what they are, not where they lie.

    Raises:
        UserError: if there are no such weights or votes.
    """
    where = ("train_list", "val_list", "root", "source", "cache", "jpeg_decoder", "video_decoder")
    data = dataclasses.replace(config.data, **{name: DataConfig.__dataclass_fields__[name].default for name in where})
    run = RunConfig(device=config.run.device, amp=config.run.amp, channels_last=config.run.channels_last)
    model = dataclasses.replace(config.model, init=_portable_init(config.model.init))
    votes = config.loss.soft_labels
    votes = None if votes is None else Path(_portable_file(str(votes), _sha256_of_file, "--loss.soft-labels"))
    loss = dataclasses.replace(config.loss, soft_labels=votes)
    return dataclasses.replace(config, data=data, model=model, loss=loss, run=run)


def _portable_init(init: str) -> str:
    """Return --model.init with `NAME sha256:...` for a path."""
    path = init.removeprefix(ALONE)
    if path in ("random", "timm", "auto") or path.startswith("hf:"):
        return init
    return f"{init[: -len(path)]}{_portable_file(path, _sha256_of_weights, '--model.init')}"


def _portable_file(path: str, sha256: Callable[[str], str], flag: str) -> str:
    """Return `NAME sha256:...` for a path: what has that form already, as in a record, stays."""
    if re.fullmatch(r"[^/]+ sha256:[0-9a-f]{64}", path):
        return path
    try:
        return f"{os.path.basename(os.path.abspath(path))} sha256:{sha256(path)}"
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


@functools.cache
def _sha256_of_file(path: str) -> str:
    return hashlib.sha256(read_file(Path(path))).hexdigest()


@functools.cache
def _sha256_of_weights(path: str) -> str:
    """Return the SHA-256 of a file, or of the weights in a folder: of a run those of its average, if it has one."""
    if not os.path.isdir(path):
        return _sha256_of_file(path)
    content = load_tensors(Path(path))
    taken = held_tensors(content.get("ema") or content.get("model") or content)
    return digest({f"{where}{name}": tensor for where, tensors in taken for name, tensor in tensors.items()}, {})


def portable_words(words: Sequence[str], config: Config) -> list[str]:
    """Return words for train.py without places, and with what lies there as a record's configuration has it."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*PLACES, *CONTENT):
        also = ["--model.weights"] if name == "model.init" else []
        flags.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, *also, dest=name)
    found, others = flags.parse_known_args(words)
    for name in (name for name in CONTENT if getattr(found, name) is not None):
        section, field = name.split(".")
        others += [f"--{name.replace('_', '-')}", str(getattr(getattr(config, section), field))]
    return others


def find_result(results: list[Result], config: Config, data: dict[str, str], machine: str) -> Result | None:
    """Return the latest run of this configuration on this data and kind of machine; None if there is none.

    Another processor rounds otherwise, which moves the WAR of a seed as far as another seed does.

    A run that was recorded before an option existed was trained with what the option's default then meant, as for a run
    that is continued (`_BEFORE` of dfer/config.py).
    """
    there = (r for r in reversed(results) if r["machine"]["kind"] == machine and r["fingerprint"] == data)
    return next((r for r in there if recorded_config(r) == config), None)


def recorded_config(result: Result) -> Config | None:
    """Return the portable configuration of a recorded run; None if this version has no such configuration."""
    config = _config(json.dumps(result["config"]))
    if config is None:
        return None
    device, amp = computed_with(result)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, device=device, amp=amp))


@functools.cache
def _config(text: str) -> Config | None:
    try:
        return portable(config_from_json(text, Path("record")))
    except UserError:
        return None


def settled(config: Config) -> Config:
    """Return a configuration with the device and the precision that this machine would train it with."""
    run = resolving.settled(config).run
    return dataclasses.replace(config, run=dataclasses.replace(config.run, device=run.device, amp=run.amp))


def computed_with(result: Result) -> tuple[str, str]:
    """Return the device and the precision that a recorded run was trained with.

    All lines that leave them open, from before they were settled, are of a CPU that computes in bfloat16.
    """
    run = result["config"].get("run", {})
    device, amp = run.get("device", "auto"), run.get("amp", "auto")
    return "cpu" if device == "auto" else device, "bf16" if amp == "auto" else amp


@functools.cache
def data_fingerprint(path: Path, root: Path | None = None) -> str:
    """Return the SHA-256 of a list: its clips, and the first 64 KiB of the first file of each.

    Names, lengths and labels alone would be the same for faces of another difficulty.
    """
    index = load_index(path, root)
    sha256 = hashlib.sha256(fingerprint(index).encode())
    for record in index.records:
        file = Path(record.path)
        if file.is_dir():
            file = min(entry for entry in file.iterdir() if entry.is_file())
        if file.is_file():
            with open(file, "rb") as content:
                sha256.update(content.read(2**16))
    return sha256.hexdigest()
