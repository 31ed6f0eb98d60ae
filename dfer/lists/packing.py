"""Packing: write the clips of lists into shards, so that training reads a few large files at random.

A run that was stopped goes on when it is started again: NAME.unfinished holds a record of each finished shard, and a
hash of the task, until the pack is complete.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from dfer import __version__
from dfer.cli import UserError, printable, progress
from dfer.files import disk_errors, free_bytes, hash_file
from dfer.lists.annotations import (
    VideoRecord,
    fits_header,
    listed_faces,
    packed_index,
    read_annotations,
    write_annotations,
)
from dfer.lists.index import build_index
from dfer.lists.packed import SUFFIX, Pack, Packed, format_bytes, read_pack, shard_problems, write_pack
from dfer.lists.processes import in_processes
from dfer.lists.scan import FrameFiles
from dfer.lists.shards import (
    Clip,
    Options,
    Record,
    Shard,
    finished_shards,
    is_encoded,
    pack_clip,
    read_frames,
    record_path,
    shard_path,
)

_SAMPLE = 12  # clips from which the size of the pack is estimated

Rows = dict[str, list[tuple[str, int, int]]]  # name of each list -> its rows, as they will be written


def pack(
    lists: Sequence[Path], root: Path | None, out: Path, options: Options, workers: int = 1, command: str = ""
) -> list[Path]:
    """Pack the clips of all lists, each clip once. Returns the lists to train on, which are written last.

    Args:
        lists: lists of frame folders or of videos.
        root: where their paths start, if not where their headers say.
        out: folder to write lists, index and shards to.
        options: format, size and quality of the frames.
        workers: number of processes.
        command: the command line, for the pack's record of how it was made.

    Raises:
        UserError: if a list or clip cannot be used, if something else is in the way in `out`, or if it cannot be
            written. What is finished stays finished.
    """
    clips, rows = read_lists(lists, root)
    name = lists[0].stem if len(lists) == 1 else "clips"
    if not fits_header(name):
        raise UserError(f"{lists[0]}: the pack would be called {name!r}, which cannot stand in a list; rename the list")
    with disk_errors(f"{out}: stopped, what is finished stays finished"):
        index_path, state = out / f"{name}.npz", out / f"{name}.unfinished"
        targets = [out / f"{stem}.txt" for stem in rows]
        for target in targets:
            if target.exists() and packed_index(target) != index_path:
                raise UserError(f"{target}: is there already, and not of this pack; choose another --out")
        key = hash_task(clips, rows, options)
        if index_path.exists():
            _check_same(index_path, key)
            print(f"{printable(index_path)} is packed already; --verify reads it again")
        else:
            if options.quality is not None and not any(is_encoded(clip, options) for clip in clips):
                raise UserError("--quality: nothing is encoded: image files are copied as they are without --size")
            with _lock(state, key):
                shards = write_shards(clips, out, name, options, workers)
                paths = [shard_path(out, name, number, SUFFIX[options.format]) for number in range(len(shards))]
                provenance = _provenance(lists, options, key, command)
                write_pack(index_path, _join(clips, shards, paths, options, provenance))
        for path, target, listed in zip(lists, targets, rows.values(), strict=True):
            if not target.exists():
                write_annotations(target, listed, packed=index_path.name, faces=listed_faces(path))
        shutil.rmtree(state, ignore_errors=True)
    return targets


def read_lists(lists: Sequence[Path], root: Path | None) -> tuple[list[Clip], Rows]:
    """Return the clips of all lists, each once, and the rows of each list.

    Raises:
        UserError: if a list or a clip of it cannot be used, or one name stands for two clips.
    """
    clips: dict[str, Clip] = {}
    rows: Rows = {}
    for path in lists:
        if path.stem in rows:
            raise UserError(f"{path}: another list has that name too, so one would overwrite the other")
        records = read_annotations(path, root)
        if packed_index(path) is not None:
            raise UserError(f"{path}: is packed already; pack the list that it was made of")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        index = build_index(records)
        rows[path.stem] = []
        for video, record in enumerate(index.records):
            frames = None
            if isinstance(index.store, FrameFiles):
                frames = [index.frame_path(video, frame) for frame in range(index.num_frames[video])]
            listed = {"list": path.name, "list_sha256": digest, "row": int(record.source.rpartition(":")[2])}
            clip = Clip(len(clips), record, frames, int(index.num_frames[video]), listed)
            known = clips.setdefault(record.name, clip)
            if known is not clip and not _same(known.record, record):
                raise UserError(
                    f"{record.source}: clip {record.name} is {known.record.source} too, of another label or folder"
                )
            rows[path.stem].append((record.name, clip.num_frames, record.label))
    return list(clips.values()), rows


def _same(a: VideoRecord, b: VideoRecord) -> bool:
    return a.label == b.label and (a.path == b.path or os.path.realpath(a.path) == os.path.realpath(b.path))


def _check_same(index_path: Path, key: str) -> None:
    """Check that a pack which is there is whole and of the same task."""
    name, found = index_path.stem, read_pack(index_path)
    if found.provenance.get("key") != key:
        raise UserError(
            f"{index_path}: is a pack already, of other lists, clips or options; choose another --out, or delete "
            f"it with {name}-*"
        )
    for problem in shard_problems(found):
        raise UserError(f"{problem}; delete {index_path} and {name}-* and pack again")


@contextlib.contextmanager
def _lock(state: Path, key: str) -> Iterator[None]:
    """Hold the folder of an unfinished pack. It is deleted at the end if no shard was finished.

    Raises:
        UserError: if another run holds it, or if it is of another task than `key`.
    """
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "key", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{state}: another run is packing there") from None
        except OSError:
            pass  # a file system without locks
        file.seek(0)
        if file.read() != key:
            if any(state.glob("*.npz")):
                raise UserError(
                    f"{state}: is left of a run with other lists, clips or options; delete it and the shards beside "
                    "it to start anew, or choose another --out"
                )
            file.truncate(0)
            file.write(key)
            file.flush()
        try:
            yield
        finally:
            if not any(state.glob("*.npz")):
                shutil.rmtree(state)


def hash_task(clips: Sequence[Clip], rows: Rows, options: Options) -> str:
    """Return a hash of all that the bytes of a pack depend on, except the content of image files.

    As in the index, an image file that is overwritten under its old name makes no difference; one that is added,
    removed or renamed does, and so does any change of a video.
    """
    hasher = hashlib.sha256(json.dumps([asdict(options), rows, __version__, PIL.__version__]).encode())
    for clip in clips:
        found = clip.record.path.stat()
        size = found.st_size if clip.frames is None else 0
        names = [os.path.basename(path) for path in clip.frames or ()]
        hasher.update(json.dumps([clip.record.name, clip.listed, found.st_mtime_ns, size, names]).encode())
    return hasher.hexdigest()


def write_shards(clips: Sequence[Clip], out: Path, name: str, options: Options, workers: int) -> list[Record]:
    """Write the shards that are not yet there. Their bytes depend on neither the number of workers nor on restarts."""
    suffix = SUFFIX[options.format]
    shards = finished_shards(out, name, suffix)
    finished = sum(len(shard["num_frames"]) for shard in shards)
    if finished:
        print(f"{finished:,} of {len(clips):,} clips, in {len(shards):,} shards, were packed before")
    left = clips[finished:]
    if not left:
        return shards
    per_frame = check_space(clips, left, out, options)
    shard: Shard | None = None
    with contextlib.ExitStack() as stack:
        sizes = [round(per_frame * clip.num_frames) for clip in left]
        blocks = in_processes(functools.partial(pack_clip, options=options), left, sizes, workers)
        blocks = stack.enter_context(contextlib.closing(blocks))
        try:
            for block in stack.enter_context(contextlib.closing(progress(blocks, len(clips), "clips", finished))):
                if shard is not None and shard.position + len(block.data) > options.shard_bytes:
                    shards.append(shard.finish(record_path(out, name, len(shards))))
                    shard = None
                if shard is None:
                    shard = Shard(shard_path(out, name, len(shards), suffix))
                shard.add(block)
            assert shard is not None
            shards.append(shard.finish(record_path(out, name, len(shards))))
        except BaseException:
            if shard is not None:
                shard.discard()
            raise
    return shards


def check_space(clips: Sequence[Clip], left: Sequence[Clip], out: Path, options: Options) -> float:
    """Print how large the pack will be, estimated from a sample of the clips. Returns the bytes of a frame.

    Raises:
        UserError: if the disk has no room for what is left to write.
    """
    sample = [left[i] for i in np.unique(np.linspace(0, len(left) - 1, _SAMPLE).astype(int))]
    if options.size is not None:
        width, height = next(read_frames(sample[0]))[1].size
        if max(width, height) < options.size:
            print(f"note: frames of {width} x {height} pixels are enlarged to {options.size} x {options.size}")
    per_frame = sum(len(pack_clip(clip, options).data) for clip in sample) / sum(clip.num_frames for clip in sample)
    total, rest = (per_frame * sum(clip.num_frames for clip in some) for some in (clips, left))
    free = free_bytes(out)
    size, where = f"about {format_bytes(total)}", printable(out)
    room = f"{where} does not say what is free" if free is None else f"{format_bytes(free)} are free in {where}"
    print(f"{len(clips):,} clips, {sum(clip.num_frames for clip in clips):,} frames: {size}; {room}")
    if free is not None and 1.02 * rest > free:
        raise UserError(f"{out}: about {format_bytes(rest)} are left to write, but only {format_bytes(free)} are free")
    return per_frame


def _provenance(lists: Sequence[Path], options: Options, key: str, command: str) -> dict[str, Any]:
    return {
        "lists": [{"name": path.name, "sha256": hash_file(path)} for path in lists],
        "options": asdict(options),
        "key": key,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dfer": __version__,
        "pillow": PIL.__version__,
    }


def _join(
    clips: Sequence[Clip],
    shards: Sequence[Record],
    paths: list[Path],
    options: Options,
    provenance: dict[str, Any],
) -> Pack:
    whole = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0] if shards[0][key].ndim}
    counts = [len(shard["num_frames"]) for shard in shards]
    first = np.concatenate([[0], np.cumsum(whole["num_frames"])])
    assert np.array_equal(whole["num_frames"], [clip.num_frames for clip in clips])
    packed = Packed(
        kind=options.format,
        paths=paths,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        first=first,
        **{key: whole[key] for key in ("offset", "length", "height", "width")},
    )
    return Pack(
        clips=packed,
        names=[clip.record.name for clip in clips],
        labels=np.array([clip.record.label for clip in clips], dtype=np.int64),
        digests=whole["digests"],
        sizes=np.array([int(shard["size"]) for shard in shards], dtype=np.int64),
        hashes=[str(shard["sha256"]) for shard in shards],
        provenance=provenance,
    )
