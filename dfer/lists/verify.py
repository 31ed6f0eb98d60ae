"""Verification: read a pack again, its list, its index and all bytes of its shards."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dfer.cli import UserError, progress
from dfer.files import hash_file, reason
from dfer.images import BadImage, decode_image
from dfer.lists.annotations import EMOTIONS, packed_index, read_annotations
from dfer.lists.packed import Pack, match_records, read_pack, shard_problems
from dfer.lists.threads import in_order

_NAMED = 10  # problems of a shard that are named


def verify(list_path: Path, workers: int = 1) -> tuple[Pack, list[str]]:
    """Read a pack again: list, index, and all bytes of all shards. Returns the pack, and a line for each problem.

    Raises:
        UserError: if the list or its .npz file is such that there is nothing to verify by.
    """
    records = read_annotations(list_path)
    index_path = packed_index(list_path)
    if index_path is None:
        raise UserError(f"{list_path}: not packed: its header names no .npz file")
    pack = read_pack(index_path)
    problems = []
    try:
        match_records(records, pack, index_path)
    except UserError as error:
        problems.append(str(error))
    problems += shard_problems(pack)
    paths = pack.clips.paths
    present = [number for number, path in enumerate(paths) if os.path.isfile(path)]
    # Each shard as a whole (None), then its clips.
    parts = [(number, clip) for number in present for clip in (None, *_clips_of(pack, number))]

    def check(part: tuple[int, int | None]) -> list[str]:
        number, clip = part
        try:
            return list(check_shard(pack, number) if clip is None else check_clip(pack, clip))
        except OSError as error:
            return [f"{paths[number]}: cannot be read ({reason(error)})"]

    counts = [0] * len(paths)
    found = progress(in_order(check, parts, workers), len(parts), "parts")
    for (number, _), lines in zip(parts, found, strict=True):
        problems += lines[: max(0, _NAMED - counts[number])]
        counts[number] += len(lines)
    problems += [
        f"{path}: {count - _NAMED:,} more problems of its clips"
        for path, count in zip(paths, counts, strict=True)
        if count > _NAMED
    ]
    return pack, problems


def _clips_of(pack: Pack, number: int) -> list[int]:
    """Return the clips in a shard."""
    return np.flatnonzero(pack.clips.shard == number).tolist()


def check_clip(pack: Pack, clip: int) -> Iterator[str]:
    """Yield what is wrong with the bytes of a clip's frames.

    Raises:
        OSError: if the shard cannot be read.
    """
    clips, path = pack.clips, pack.clips.paths[pack.clips.shard[clip]]
    where = f"{path}: clip {pack.names[clip]}"
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for frame in range(clips.first[clip], clips.first[clip + 1]):
            file.seek(clips.offset[frame])
            data = file.read(clips.length[frame])
            hasher.update(data)
            if clips.kind == "raw":
                continue
            try:
                size = decode_image(data).size
            except BadImage as error:
                yield f"{where}: frame {frame - clips.first[clip]} cannot be decoded ({error})"
                continue
            if size != (clips.width[clip], clips.height[clip]):
                yield f"{where}: frame {frame - clips.first[clip]} is {size[0]} x {size[1]} pixels, not as indexed"
    if hasher.digest() != pack.digests[clip].tobytes():
        yield f"{where}: its frames are not those that were packed"


def check_shard(pack: Pack, number: int) -> Iterator[str]:
    """Yield what is wrong with a shard as a whole, and with the parts of a tar file between the frames.

    Raises:
        OSError: if the shard cannot be read.
    """
    path, clips = pack.clips.paths[number], pack.clips
    if hash_file(path) != pack.hashes[number]:
        yield f"{path}: its SHA-256 is not that of the shard that was packed"
    if clips.kind == "raw":
        return
    wanted = {}
    for clip in _clips_of(pack, number):
        for frame in range(clips.first[clip], clips.first[clip + 1]):
            name = f"{clip:07d}.{frame - clips.first[clip]:05d}"
            wanted[name] = (int(clips.offset[frame]), int(clips.length[frame]))
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("json", "cls"):
                    clip = int(key)
                    said = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    known: Any = int(pack.labels[clip])
                    if suffix == "json":
                        said = [said[name] for name in ("clip", "label", "classes", "num_frames")]
                        known = [pack.names[clip], known, list(EMOTIONS), int(np.diff(clips.first)[clip])]
                    if said != known:
                        yield f"{path}: {member.name} says {said}, the index {known}"
                else:
                    found[member.name.rpartition(".")[0]] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        yield f"{path}: damaged between its frames ({reason(error)})"
        return
    if found != wanted:
        yield f"{path}: its members are not those of the index"
