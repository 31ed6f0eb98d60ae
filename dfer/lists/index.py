"""ClipIndex: where the frames of each video of a list lie, and how many there are.

Both are found on disk, as published lists are often wrong. Folders and videos are scanned once (scan.py); the result is
kept beside the list, in LIST.index.npz, until one of them changes. A packed list (packed.py) comes with its index.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from dfer.cli import UserError, command_of
from dfer.images import frame_file
from dfer.lists.annotations import VideoRecord, packed_index, read_annotations
from dfer.lists.hashes import Hashes, read_hashes
from dfer.lists.packed import Packed, load_packed
from dfer.lists.scan import (
    BadVideos,
    FrameFiles,
    Kind,
    States,
    VideoFiles,
    find_kind,
    locate,
    read_cache,
    scan,
    scan_videos,
    write_cache,
)

Source = Literal["frames", "video", "shards", "raw"]
AskedSource = Literal["auto", "frames", "video", "shards", "raw"]


@dataclass(frozen=True)
class ClipIndex:
    """The N videos of one list and where their frames were found."""

    records: list[VideoRecord]
    num_frames: Int64[np.ndarray, " N"]  # as found, whatever is listed; as listed for bad videos
    labels: Int64[np.ndarray, " N"]
    store: FrameFiles | VideoFiles | Packed
    hashes: Hashes | None = None  # of each frame or video file, if what is read is to be verified
    bad: dict[int, str] = field(default_factory=dict)  # videos that cannot be used -> why, in one line

    def __len__(self) -> int:
        return len(self.records)

    @property
    def source(self) -> Source:
        """Return how the frames are stored."""
        if isinstance(self.store, Packed):
            return self.store.kind
        return "frames" if isinstance(self.store, FrameFiles) else "video"

    def frame_path(self, video: int, frame: int) -> str:
        """Return the file of a frame; of the source "frames" only."""
        assert isinstance(self.store, FrameFiles), self.source
        return frame_file(self.records[video].path, self.store.names[video][frame])

    def head(self, count: int) -> "ClipIndex":
        """Return the index of the first `count` videos. Its store still holds all."""
        return dataclasses.replace(
            self, records=self.records[:count], num_frames=self.num_frames[:count], labels=self.labels[:count]
        )

    def num_miscounted(self) -> int:
        """Return the number of videos whose listed frame count differs from the one found (which is used)."""
        return int(np.sum(self.num_frames != [record.num_frames for record in self.records]))


def load_index(
    list_path: str | Path,
    root: str | Path | None = None,
    source: AskedSource = "auto",
    hashed: bool = True,
    bad_videos: BadVideos = "error",
    write_cache: bool = True,
) -> ClipIndex:
    """Return the index of a list: a pack's own, else from the cache where nothing has changed since, else by a scan.

    Safe for any number of processes at once, as the cache is replaced as a whole. Where it cannot be written,
    everything is scanned at every start.

    Args:
        list_path: the list.
        root: where its paths start, if not where its header says; packed lists have no use for it.
        source: kind of storage that the list has to be of. "auto" takes any: a pack if the list's header names one,
            else folders of frames and single images, or video files.
        hashed: with the hashes of the frames or videos, if there are any beside the list.
        bad_videos: "error" raises for a video file that exists but cannot be used; "skip" keeps its row, and `bad`
            says why it cannot be used.
        write_cache: keep the result of a scan.

    Raises:
        UserError: as read_annotations, scan, load_packed and read_hashes do, or if the list is not of the given source.
    """
    index = _load(list_path, root, source, bad_videos, write_cache)
    if not hashed:
        return index
    num_parts = np.ones(len(index), dtype=np.int64) if index.source == "video" else index.num_frames
    return dataclasses.replace(index, hashes=read_hashes(list_path, index.records, num_parts))


def _load(
    list_path: str | Path, root: str | Path | None, source: AskedSource, bad_videos: BadVideos, keep: bool
) -> ClipIndex:
    records = read_annotations(list_path, root)
    packed = packed_index(list_path)
    if packed is not None:
        store = load_packed(records, packed)
        if source not in ("auto", store.kind):
            raise UserError(f"{list_path}: its clips are packed as {store.kind}, but the source asked for is {source}")
        return _index(records, store)
    if source in ("shards", "raw"):
        raise UserError(f"{list_path}: not packed, but the source asked for is {source}: {command_of('pack')} packs it")
    # Taken before the scan: what changes during it has another time at the next start.
    records, states = locate(records)
    kind = find_kind(records, states, source)
    return _index(records, *_scan_or_cached(Path(f"{list_path}.index.npz"), records, states, kind, bad_videos, keep))


def _scan_or_cached(
    cache: Path, records: Sequence[VideoRecord], states: States, kind: Kind, bad_videos: BadVideos, keep: bool
) -> tuple[FrameFiles | VideoFiles, dict[int, str]]:
    """Return the result of `scan`, from the cache if it is of these states."""
    key = hashlib.sha256(os.fsencode("\0".join(os.fspath(record.path) for record in records))).hexdigest()
    store = read_cache(cache, key, states, kind)
    if isinstance(store, VideoFiles) and not store.height.all():
        # Bad videos are tried again, as perhaps it was the disk that could not be read.
        rows = np.flatnonzero(store.height == 0).tolist()
        _, again = scan_videos([records[row] for row in rows], bad_videos)
        if len(again) == len(rows):
            return store, {rows[i]: why for i, why in again.items()}
        store = None
    if store is not None:
        return store, {}
    store, bad = scan(records, kind, bad_videos)
    if keep:
        write_cache(cache, key, states, store)
    return store, bad


def build_index(records: Sequence[VideoRecord], source: Literal["auto", "frames", "video"] = "auto") -> ClipIndex:
    """Scan the frame folders or the video files of all records.

    Raises:
        UserError: if a folder or video is missing, holds no frames, cannot be read or is not of the source, or if
            there are both folders and videos.
    """
    records, states = locate(records)
    return _index(records, *scan(records, find_kind(records, states, source)))


def _index(
    records: Sequence[VideoRecord], store: FrameFiles | VideoFiles | Packed, bad: dict[int, str] | None = None
) -> ClipIndex:
    counts = [len(names) for names in store.names] if isinstance(store, FrameFiles) else np.diff(store.first)
    counts = np.array(counts, dtype=np.int64)
    for row in bad or ():  # so that the epochs of a run stay as they were when the video is mended
        counts[row] = records[row].num_frames
    labels = np.array([record.label for record in records], dtype=np.int64)
    return ClipIndex(list(records), counts, labels, store, bad=bad or {})
