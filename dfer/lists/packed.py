"""Packed lists: the frames of many clips in a few large files, which a memory map reads at random.

A clip is here, as in the data sets, a whole video of a list. scripts/pack.py writes, beside each other:

    train.txt          a list whose header says "# packed: train.npz"
    train.npz          where the bytes of each frame lie, their hashes, and how the pack was made
    train-00000.tar    a shard: the frames in a .tar file are image files, those in a .raw file are pixels
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from dfer.cli import UserError, command_of
from dfer.files import reason, write_whole
from dfer.lists.annotations import EMOTIONS, VideoRecord
from dfer.lists.missing import similar

FORMAT = 1  # of the .npz file
SUFFIX = {"shards": "tar", "raw": "raw"}  # of the shards


@dataclass(frozen=True)
class Packed:
    """Where the frames of N clips, F in all, lie in the shards.

    The frames of clip i are those from first[i] to first[i + 1], in order of time and all of one size. In "shards" a
    frame's bytes are a JPEG file (or a PNG file, if it came as one and was not resized). In "raw" they are its pixels,
    height x width x 3 uint8 RGB in row-major order; a clip starts at a multiple of 64 bytes, and its frames follow each
    other without a gap.
    """

    kind: Literal["shards", "raw"]
    paths: list[Path]  # of the shards
    shard: Int32[np.ndarray, " N"]  # index into paths
    first: Int64[np.ndarray, " _"]  # (N + 1,)
    offset: Int64[np.ndarray, " F"]  # bytes, in the clip's shard
    length: Int32[np.ndarray, " F"]  # bytes
    height: Int32[np.ndarray, " N"]  # px, of the decoded and upright frames
    width: Int32[np.ndarray, " N"]
    digests: UInt8[np.ndarray, "N 16"] | None = None  # those of the pack, in the index of a list

    def select(self, clips: Int64[np.ndarray, " M"]) -> "Packed":
        """Return where some of the clips lie, in the given order."""
        if np.array_equal(clips, np.arange(len(self.shard))):
            return self
        counts = np.diff(self.first)[clips]
        first = np.concatenate([[0], np.cumsum(counts)])
        frames = np.repeat(self.first[clips] - first[:-1], counts) + np.arange(first[-1])
        return Packed(
            self.kind, self.paths, self.shard[clips], first, self.offset[frames], self.length[frames],
            self.height[clips], self.width[clips],
        )  # fmt: skip


@dataclass(frozen=True)
class Pack:
    """The content of a pack's .npz file. Its clips are in the order of the shards; a list may name some of them."""

    clips: Packed
    names: list[str]  # of the N clips as lists write them, unique
    labels: Int64[np.ndarray, " N"]
    digests: UInt8[np.ndarray, "N 16"]  # BLAKE2b of each clip's frames, their bytes one after another
    sizes: Int64[np.ndarray, " S"]  # bytes of each shard
    hashes: list[str]  # SHA-256 of each shard, in hex
    provenance: dict[str, Any]  # the lists, options, command, date and versions that made it

    def summary(self) -> str:
        """Return the size of the pack in a few words."""
        size, shards = format_bytes(int(self.sizes.sum())), len(self.sizes)
        counts = f"{len(self.names):,} clips, {len(self.clips.offset):,} frames"
        return f"{counts}, {size} in {shards:,} {SUFFIX[self.clips.kind]} files"


def format_bytes(number: int | float) -> str:
    """Return a size as users read it."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def write_pack(path: Path, pack: Pack) -> None:
    """Write a pack's .npz file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    clips = pack.clips
    entries = {
        "format": FORMAT, "classes": EMOTIONS, "kind": clips.kind, "shards": [shard.name for shard in clips.paths],
        "sizes": pack.sizes, "hashes": pack.hashes, "names": np.frombuffer("\n".join(pack.names).encode(), np.uint8),
        "labels": pack.labels, "digests": pack.digests, "shard": clips.shard, "first": clips.first,
        "offset": clips.offset, "length": clips.length, "height": clips.height, "width": clips.width,
        "provenance": json.dumps(pack.provenance),
    }  # fmt: skip
    # Not compressed: 15 MB for a million frames, read in a tenth of the time.
    write_whole(path, lambda file: np.savez(file, **entries))


def read_pack(path: Path) -> Pack:
    """Read a pack's .npz file, and nothing of the shards.

    Raises:
        UserError: if it is missing, damaged, of another version, or of another order of classes.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            entries = {name: found[name] for name in found.files}
        version, classes = int(entries["format"]), tuple(entries["classes"].tolist())
        pack = _to_pack(path, entries) if version == FORMAT and classes == EMOTIONS else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but the list beside it says that its clips lie there") from None
    except Exception as error:  # a damaged zip file raises errors of many kinds
        raise UserError(f"{path}: damaged, or not made by {command_of('pack')} ({reason(error)})") from None
    if version != FORMAT:
        raise UserError(f"{path}: a pack of format {version}, this version reads {FORMAT}; pack the list again")
    if pack is None:
        raise UserError(f"{path}: its classes are {' '.join(classes)}, those of the lists are {' '.join(EMOTIONS)}")
    return pack


def _to_pack(path: Path, entries: dict[str, np.ndarray]) -> Pack:
    """Return the pack that the entries of an .npz file describe. Raises errors of many kinds if they are damaged."""
    clips = Packed(
        kind=str(entries["kind"]),  # type: ignore[arg-type]
        paths=[path.parent / os.path.basename(name) for name in entries["shards"].tolist()],
        **{name: entries[name] for name in ("shard", "first", "offset", "length", "height", "width")},
    )
    pack = Pack(
        clips=clips,
        names=entries["names"].tobytes().decode().split("\n"),
        labels=entries["labels"],
        digests=entries["digests"],
        sizes=entries["sizes"],
        hashes=entries["hashes"].tolist(),
        provenance=json.loads(str(entries["provenance"])),
    )
    _check(pack)
    return pack


def shard_problems(pack: Pack) -> list[str]:
    """Return a line for each shard that is missing or has another size than it was written with."""
    problems = []
    for path, size in zip(pack.clips.paths, pack.sizes.tolist(), strict=True):
        try:
            found = os.stat(path).st_size
        except OSError as error:
            problems.append(f"{path}: a shard of the pack is missing ({reason(error)})")
            continue
        if found != size:
            problems.append(f"{path}: {found:,} bytes, but {size:,} were packed: the shard is truncated or replaced")
    return problems


def match_records(records: Sequence[VideoRecord], pack: Pack, path: Path) -> Int64[np.ndarray, " M"]:
    """Return which clip of the pack each record of a list is. `path` names the pack in messages.

    Raises:
        UserError: for the first record that is not in the pack, or not with that label and length.
    """
    known = {name: clip for clip, name in enumerate(pack.names)}
    clips = np.array([known.get(record.name, -1) for record in records], dtype=np.int64)
    lengths = np.diff(pack.clips.first)

    def refuse(bad: Bool[np.ndarray, " M"], why: str) -> None:
        for row in np.flatnonzero(bad).tolist():
            record, clip = records[row], clips[row]
            why = why.format(record=record, label=pack.labels[clip], frames=lengths[clip])
            raise UserError(f"{record.source}: clip {record.name} {why} in {path}: pack the list again")

    for row in np.flatnonzero(clips < 0)[:1].tolist():
        record = records[row]
        hint = similar(record.name, pack.names)
        raise UserError(f"{record.source}: clip {record.name} is not in {path}{hint}: pack the list again")
    refuse(pack.labels[clips] != [r.label for r in records], "has label {record.label} here, but {label}")
    refuse(lengths[clips] != [r.num_frames for r in records], "has {record.num_frames} frames here, but {frames}")
    return clips


def load_packed(records: Sequence[VideoRecord], path: Path) -> Packed:
    """Return where the clips of a packed list lie. `path` is the pack's .npz file; of the shards the size is checked.

    Raises:
        UserError: if the pack is damaged, a shard is missing or of another size, or a record does not match.
    """
    pack = read_pack(path)
    for problem in shard_problems(pack):
        raise UserError(f"{problem}; copy it again, or pack the list again")
    clips = match_records(records, pack, path)
    return dataclasses.replace(pack.clips.select(clips), digests=pack.digests[clips])


def _check(pack: Pack) -> None:
    """Check that no frame leads out of its shard, and that each raw clip is one block.

    Raises:
        UserError: if that is not so; without the name of the file.
    """
    clips = pack.clips
    num_clips, counts = len(pack.names), np.diff(clips.first)
    if not (
        clips.kind in ("shards", "raw")
        and len(set(pack.names)) == num_clips == len(clips.shard) == len(counts) == len(clips.height)
        and num_clips == len(clips.width) == len(pack.labels) == len(pack.digests)
        and len(clips.paths) == len(pack.sizes) == len(pack.hashes)
        and clips.first[0] == 0
        and counts.min() > 0
        and len(clips.offset) == len(clips.length) == clips.first[-1]
        and clips.shard.min() >= 0
        and clips.shard.max() < len(clips.paths)
        and not any("\0" in path.name for path in clips.paths)
    ):
        raise UserError("its parts do not fit together")
    of_clip = np.repeat(np.arange(num_clips), counts)
    ends = clips.offset + clips.length
    inside = (clips.offset >= 0) & (clips.length > 0) & (ends <= pack.sizes[clips.shard][of_clip])
    if clips.kind == "raw":
        same = of_clip[1:] == of_clip[:-1]
        inside[1:] &= ~same | (clips.offset[1:] == ends[:-1])
        inside &= clips.length == (3 * clips.height.astype(np.int64) * clips.width)[of_clip]
        inside &= np.concatenate([[False], same]) | (clips.offset % 64 == 0)
    if not inside.all():
        raise UserError(f"the frames of clip {pack.names[of_clip[~inside][0]]} lie where none can be")
