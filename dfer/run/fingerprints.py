"""What the numbers of a run depend on beside its configuration: clips, their bytes where they are known, and votes.

A clip is known by its name below the folder that all clips of its list have in common, so that data may be moved,
mounted elsewhere and written otherwise. No frame is read: bytes are known by what a pack, or the hashes beside a list,
say of them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from dfer.cli import UserError
from dfer.config import Config, config_from_json
from dfer.lists.hashes import SIZE
from dfer.lists.index import ClipIndex
from dfer.lists.packed import Packed
from dfer.losses import Objective
from dfer.run.defaults import as_flags, is_open, only_of_a_gpu

DataOfRun = tuple[ClipIndex, ClipIndex, Objective]  # to train on, to evaluate on, to minimise
ROUNDING = ("run.device", "run.threads", "run.amp", "run.sync_bn")  # may be others where a run goes on
PLACES = ("data.train_list", "data.val_list", "data.root", "data.source", "loss.soft_labels")  # and not what lies there


def fingerprint(index: ClipIndex) -> str:
    """Return the SHA-256 of what the order and the frames of the clips depend on, by the names that the list has."""
    return _hash_rows(_rows([record.name for record in index.records], index))


def data_fingerprints(train: ClipIndex, val: ClipIndex, objective: Objective) -> dict[str, Any]:
    """Return what a checkpoint keeps of the data: {"train_list", "val_list": of each list, "votes": or None}."""
    votes = None if objective.votes is None else hashlib.sha256(objective.votes.numpy().tobytes()).hexdigest()
    return {"train_list": _of_list(train, ordered=True), "val_list": _of_list(val, ordered=False), "votes": votes}


def _of_list(index: ClipIndex, ordered: bool) -> dict[str, str | None]:
    """Return the fingerprints of a list: in its order, or whatever its order is, if nothing depends on that."""
    rows = _rows(_names(index), index)
    order = range(len(rows)) if ordered else sorted(range(len(rows)), key=rows.__getitem__)
    listed = _rows([record.name for record in index.records], index)
    return {
        "clips": _hash_rows([rows[i] for i in order]),
        "listed": _hash_rows([listed[i] for i in order]),
        "source": index.source,
        "bytes": _hash_bytes(index, order),
    }


def _names(index: ClipIndex) -> list[str]:
    """Return the paths of the clips below the folder that they have in common."""
    paths = [os.path.normpath(record.path) for record in index.records]
    if len({os.path.isabs(path) for path in paths}) > 1:
        paths = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath({os.path.dirname(path) for path in paths})
    skipped = len(common) + (common not in ("", os.sep))
    return [path[skipped:] for path in paths]


def _rows(names: Sequence[str], index: ClipIndex) -> list[tuple[str, int, int]]:
    return list(zip(names, index.num_frames.tolist(), index.labels.tolist(), strict=True))


def _hash_rows(rows: Sequence[tuple[str, int, int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _hash_bytes(index: ClipIndex, order: Sequence[int]) -> str | None:
    """Return a hash of the hashes of all frames or videos; None where there are none."""
    sha256 = hashlib.sha256()
    if isinstance(index.store, Packed) and index.store.digests is not None:
        sha256.update(index.store.digests[list(order)].tobytes())
    elif index.hashes is not None:
        first = (SIZE * index.hashes.first).tolist()
        for i in order:
            sha256.update(index.hashes.digests[first[i] : first[i + 1]])
    else:
        return None
    return sha256.hexdigest()


def check_data(state: dict[str, Any], now: dict[str, Any], config: Config, run: object, flag: str) -> None:
    """Check that a run goes on with what its checkpoint was trained and evaluated on.

    Args:
        state: the checkpoint.
        now: `data_fingerprints` of this process.
        config: what this process was started with.
        run: the run, and the flag that names another one, for messages.
        flag: see `run`.

    Raises:
        UserError: if clips, their bytes or votes are others.
    """
    data, instead = config.data, f"choose another {flag}"
    counted = "(names, labels or numbers of frames have changed)"
    saved = state.get("data")
    if saved is None:
        saved = _of_older_version(state, now, config)
    if not _same(saved["train_list"], now["train_list"]):
        raise UserError(f"{data.train_list}: not the clips that {run} was trained on so far {counted}; {instead}")
    if not _same(saved["val_list"], now["val_list"]):
        raise UserError(
            f"{data.val_list}: not the clips that {run} was evaluated on so far {counted}, and the best of its epochs "
            f"would be that of other clips; give the list as it was, or {instead}"
        )
    for key, path in (("train_list", data.train_list), ("val_list", data.val_list)):
        before, after = saved[key], now[key]
        known = before["bytes"] and after["bytes"] and before["source"] == after["source"]
        if known and before["bytes"] != after["bytes"]:
            where = "the pack that it names" if after["source"] in ("shards", "raw") else "the hashes beside it"
            raise UserError(
                f"{path}: its clips have other bytes than when {run} began ({where} changed); give them as they were, "
                f"or {instead}"
            )
    if saved["votes"] != now["votes"]:
        raise UserError(
            f"--loss.soft-labels {config.loss.soft_labels}: not the votes that {run} was trained on so far; give them "
            f"as they were, or {instead}"
        )


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether two fingerprints are of the same clips, by their places or as their list writes them."""
    return before["clips"] == now["clips"] or before["listed"] == now["listed"]


def _of_older_version(state: dict[str, Any], now: dict[str, Any], config: Config) -> dict[str, Any]:
    """Return the fingerprints of a checkpoint that has only its training list's: those of today for what it lacks."""
    begun = config_from_json(state["config"], config.run.log_dir)
    had_votes = begun.loss.soft_labels is not None
    return {
        "train_list": now["train_list"] | {"clips": None, "listed": state["train_list"]},
        "val_list": now["val_list"],
        "votes": now["votes"] if had_votes == (now["votes"] is not None) else "others",
    }


def relocated(begun: Config, now: Config) -> Config:
    """Return the configuration that a run was begun with, with the places where its data lies now."""
    data = {name.split(".")[1]: _get(now, name) for name in PLACES if name.startswith("data.")}
    return dataclasses.replace(
        begun,
        data=dataclasses.replace(begun.data, **data),
        loss=dataclasses.replace(begun.loss, soft_labels=now.loss.soft_labels),
    )


def changes(state: dict[str, Any], config: Config, now: dict[str, Any]) -> list[str]:
    """Return a line for each thing that is not as when a run began, and that does not keep it from going on."""
    begun = config_from_json(state["config"], config.run.log_dir)
    moved = [
        f"{_flag(n)} was {_get(begun, n)}, is {_get(config, n)}" for n in PLACES if _get(begun, n) != _get(config, n)
    ]
    same = "the same clips by name, label and number of frames"
    if "data" not in state:
        same = "an older version began the run, and whether evaluation list and votes are the same cannot be told"
    lines = [f"{'; '.join(moved)}: {same}"] * bool(moved)
    for name in ROUNDING:
        was, now_ = _get(begun, name), _get(config, name)
        if was != now_ and not is_open(name, was):
            lines.append(f"{_flag(name)} was {was}, is {now_}: it rounds otherwise than it would have")
    had = only_of_a_gpu(begun) if (begun.run.device, config.run.device) == ("cuda", "cpu") else {}
    lines += [f"{as_flags(had)}: only a GPU has that; the run goes on without"] * bool(had)
    if begun.model.init != config.model.init:
        lines.append(f"--model.init {config.model.init} is not read: the checkpoint has all weights")
    for key in ("train_list", "val_list") if "data" in state else ():
        before, after, path = state["data"][key], now[key], _get(config, f"data.{key}")
        if before["source"] != after["source"]:
            lines.append(f"{path}: its clips were read as {before['source']} so far, and are as {after['source']} now")
        elif before["bytes"] and not after["bytes"]:
            lines.append(f"{path}: has no hashes beside it any more: what is read is not verified")
        if before["listed"] != after["listed"]:
            lines.append(
                f"{path}: writes the paths of its clips otherwise than so far; below their folder they are the same"
            )
    return lines


def _get(config: Config, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def _flag(name: str) -> str:
    return f"--{name}".replace("_", "-")
