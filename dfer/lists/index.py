"""ClipIndex: where the frames of each video lie. The truth is the disk, not the list.

Folders and videos are scanned once; what was found is kept beside the list, in LIST.index.npz, for as long as none of
them changes. A packed list (dfer/lists/packed.py) comes with its index.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from dfer.cli import UserError
from dfer.images import FRAME_SUFFIXES, frame_names
from dfer.lists.annotations import VideoRecord, packed_index, read_annotations
from dfer.lists.hashes import Hashes, read_hashes
from dfer.lists.packed import Packed, load_packed

Item, Found = TypeVar("Item"), TypeVar("Found")
Source = Literal["frames", "video", "shards", "raw"]
FOLDER, MISSING = -1, -2  # in place of a file's size


@dataclass(frozen=True)
class FrameFiles:
    """A folder of images per video."""

    names: list[list[str]]  # per video, file names inside record.path, in natural order (2.jpg before 10.jpg)


@dataclass(frozen=True)
class VideoFiles:
    """A video file per video: what it takes to decode any of its frames. N videos, F frames in all.

    The frames of video i are those from first[i] to first[i + 1], in the order in which they are shown.
    """

    first: Int64[np.ndarray, " _"]  # (N + 1,)
    pts: Int64[np.ndarray, " F"]  # presentation times, in the units of each stream
    key: Bool[np.ndarray, " F"]  # keyframes
    height: Int32[np.ndarray, " N"]  # px
    width: Int32[np.ndarray, " N"]
    codec: Shaped[np.ndarray, " N"]  # str: h264, vp9, ...
    matrix: Shaped[np.ndarray, " N"]  # str: bt601, bt709 or bt2020, from YUV to RGB
    full_range: Bool[np.ndarray, " N"]  # YUV of 0..255 and not 16..235


@dataclass(frozen=True)
class ClipIndex:
    """The videos of one list and where their frames were found."""

    records: list[VideoRecord]
    num_frames: Int64[np.ndarray, " N"]  # as found, whatever is listed; as listed where nothing can be found
    labels: Int64[np.ndarray, " N"]
    store: FrameFiles | VideoFiles | Packed
    hashes: Hashes | None = None  # of each frame, or of each video file, if what is read is to be verified
    bad: dict[int, str] = field(default_factory=dict)  # videos of which nothing is in the store -> why, in one line

    def __len__(self) -> int:
        return len(self.records)

    @property
    def source(self) -> Source:
        if isinstance(self.store, Packed):
            return self.store.kind
        return "frames" if isinstance(self.store, FrameFiles) else "video"

    def frame_path(self, video: int, frame: int) -> str:
        """File of a frame; of the source "frames" only."""
        assert isinstance(self.store, FrameFiles), self.source
        return os.path.join(self.records[video].path, self.store.names[video][frame])

    def head(self, count: int) -> "ClipIndex":
        """The same for the first clips only. What is stored of the others is not looked at."""
        return dataclasses.replace(
            self, records=self.records[:count], num_frames=self.num_frames[:count], labels=self.labels[:count]
        )

    def num_miscounted(self) -> int:
        """Videos whose listed frame count differs from the one found (which is used)."""
        return int(np.sum(self.num_frames != [record.num_frames for record in self.records]))


def load_index(
    list_path: str | Path,
    root: str | Path | None = None,
    source: Literal["auto", "frames", "video", "shards", "raw"] = "auto",
    hashed: bool = True,
    bad_videos: Literal["error", "skip"] = "error",
    write_cache: bool = True,
) -> ClipIndex:
    """The index of a list: a pack's own, else from the cache where nothing has changed since, else by a scan.

    `source` says what the list has to be; "auto" takes what is there: a pack if the list's header names one, else
    folders of frames or video files. `root` is where paths start, which packed clips have no use for. `hashed`: with
    the hashes of the clips, if there are any beside the list. `bad_videos`: what becomes of a video file that is there
    but cannot be used: "error", or "skip": its row stays, and `bad` says why it is bad.

    Safe for any number of processes at once: the cache is replaced as a whole. Where it cannot be written, everything
    is scanned at every start.

    Raises:
        UserError: in one line naming list, row and file, as read_annotations, build_index, load_packed and read_hashes
            do; or if the list is not of the given source.
    """
    index = _load(list_path, root, source, bad_videos, write_cache)
    if not hashed:
        return index
    num_parts = np.ones(len(index), dtype=np.int64) if index.source == "video" else index.num_frames
    return dataclasses.replace(index, hashes=read_hashes(list_path, index.records, num_parts))


def _load(
    list_path: str | Path,
    root: str | Path | None,
    source: Literal["auto", "frames", "video", "shards", "raw"],
    bad_videos: Literal["error", "skip"],
    write_cache: bool,
) -> ClipIndex:
    records = read_annotations(list_path, root)
    packed = packed_index(list_path)
    if packed is not None:
        store = load_packed(records, packed)
        if source not in ("auto", store.kind):
            raise UserError(f"{list_path}: its clips are packed as {store.kind}, but the source asked for is {source}")
        return _index(records, store)
    if source in ("shards", "raw"):
        raise UserError(f"{list_path}: not packed, but the source asked for is {source}: scripts/pack.py packs it")
    # Taken before the scan: what changes during it has another time at the next start.
    states = _look(records)
    kind = _kind(records, states, source)
    cache_path = Path(f"{list_path}.index.npz")
    key = hashlib.sha256(os.fsencode("\0".join(os.fspath(record.path) for record in records))).hexdigest()
    store, bad = _read_cache(cache_path, key, states, kind), {}
    if isinstance(store, VideoFiles) and not store.height.all():  # perhaps it was the disk that could not be read
        rows = np.flatnonzero(store.height == 0).tolist()
        _, again = _scan_videos([records[row] for row in rows], bad_videos)
        bad = {rows[i]: reason for i, reason in again.items()}
        if len(bad) < len(rows):
            store = None
    if store is None:
        store, bad = _scan(records, kind, bad_videos)
        if write_cache:
            _write_cache(cache_path, key, states, store)
    return _index(records, store, bad)


def build_index(records: Sequence[VideoRecord], source: Literal["auto", "frames", "video"] = "auto") -> ClipIndex:
    """Scan the frame folders or the video files of all records.

    Raises:
        UserError: in one line naming list, row and path, if a folder or video is missing, holds no frames, cannot be
            read or is not of the source, or if there are both folders and videos.
    """
    return _index(records, *_scan(records, _kind(records, _look(records), source)))


def _index(
    records: Sequence[VideoRecord], store: FrameFiles | VideoFiles | Packed, bad: dict[int, str] | None = None
) -> ClipIndex:
    counts = [len(names) for names in store.names] if isinstance(store, FrameFiles) else np.diff(store.first)
    counts = np.array(counts, dtype=np.int64)
    for row in bad or ():  # as if it were good, so that a run finds the clips that it began with when it is mended
        counts[row] = records[row].num_frames
    labels = np.array([record.label for record in records], dtype=np.int64)
    return ClipIndex(list(records), counts, labels, store, bad=bad or {})


def _in_threads(look: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Look at all of them, some at once, as it is the disk that is waited for; in chunks, as handing over costs too."""
    chunks = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(8) as pool:
        return [found for part in pool.map(lambda chunk: [look(item) for item in chunk], chunks) for found in part]


def _look(records: Sequence[VideoRecord]) -> Int64[np.ndarray, "N 2"]:
    """When each path changed last, in ns (a folder: when a file was added, removed or renamed), and its size."""
    paths = [os.fspath(record.path) for record in records]
    began = time.perf_counter()
    states = [_state(path) for path in paths[:256]]
    # What the system has in memory, threads would only fight for: they double the time.
    slow = time.perf_counter() - began > 256 * 50e-6
    rest = paths[256:]
    states += _in_threads(_state, rest) if slow else map(_state, rest)
    return np.array(states, dtype=np.int64).reshape(-1, 2)


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, MISSING
    return found.st_mtime_ns, FOLDER if stat.S_ISDIR(found.st_mode) else found.st_size


def _kind(
    records: Sequence[VideoRecord], states: Int64[np.ndarray, "N 2"], source: Literal["auto", "frames", "video"]
) -> Literal["frames", "video"]:
    """What the paths are, and that they are all the same and what was asked for."""
    folders, files = np.flatnonzero(states[:, 1] == FOLDER), np.flatnonzero(states[:, 1] >= 0)
    if source == "auto" and len(folders) and len(files):
        a, b = records[folders[0]], records[files[0]]
        raise UserError(f"{a.source}: {a.path} is a folder of frames, but {b.path} ({b.source}) is a file: "
                         "a list is of the one or the other")  # fmt: skip
    kind = ("video" if len(files) else "frames") if source == "auto" else source
    for row in (files if kind == "frames" else folders)[:1].tolist():
        there = "a file" if kind == "frames" else "a folder"
        raise UserError(f"{records[row].source}: {records[row].path} is {there}, but the source asked for is {source}")
    for row in np.flatnonzero(states[:, 1] == MISSING)[:1].tolist():
        wanted = {"frames": "frame folder", "video": "video file", "auto": "frame folder or video file"}
        what = wanted[source if not len(folders) and not len(files) else kind]
        path = records[row].path
        hint = "" if path.parent.is_dir() else " (its parent is missing too: is --data.root right?)"
        raise UserError(f"{records[row].source}: no such {what}: {path}{hint}")
    return kind


def _scan(
    records: Sequence[VideoRecord], kind: Literal["frames", "video"], bad_videos: Literal["error", "skip"] = "error"
) -> tuple[FrameFiles | VideoFiles, dict[int, str]]:
    """What there is, and which videos cannot be used, and why."""
    if kind == "frames":
        return FrameFiles(_in_threads(_scan_folder, records)), {}
    return _scan_videos(records, bad_videos)


def _scan_folder(record: VideoRecord) -> list[str]:
    try:
        names = frame_names(record.path)
    except OSError as error:
        raise UserError(f"{record.source}: cannot read the frame folder {record.path} ({error.strerror})") from None
    if not names:
        raise UserError(f"{record.source}: no {'/'.join(FRAME_SUFFIXES)} frames in {record.path}")
    return names


def _scan_videos(
    records: Sequence[VideoRecord], bad_videos: Literal["error", "skip"]
) -> tuple[VideoFiles, dict[int, str]]:
    import av  # takes 0.3 s to load, which lists of frames need not wait for

    from dfer.video.decode import BadVideo
    from dfer.video.random_access import VideoScan, scan_video

    # In the place of a video that cannot be used: 0 x 0 pixels.
    nothing = VideoScan(np.zeros(1, np.int64), np.zeros(1, bool), 0, 0, codec="", matrix="bt601", full_range=False)

    def scan(record: VideoRecord) -> tuple[VideoScan, str]:
        try:
            found = scan_video(record.path)
        except (BadVideo, av.FFmpegError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            line = f"{record.source}: cannot use the video {record.path} ({reason})"
            if bad_videos == "error":
                raise UserError(line) from None
            return nothing, line
        assert len(found.pts) and found.height, record
        return found, ""

    found = _in_threads(scan, records)
    scans = [scan for scan, _ in found]
    store = VideoFiles(
        first=np.cumsum([0, *(len(scan.pts) for scan in scans)], dtype=np.int64),
        pts=np.concatenate([scan.pts for scan in scans]),
        key=np.concatenate([scan.key for scan in scans]),
        height=np.array([scan.height for scan in scans], dtype=np.int32),
        width=np.array([scan.width for scan in scans], dtype=np.int32),
        codec=np.array([scan.codec for scan in scans]),
        matrix=np.array([scan.matrix for scan in scans]),
        full_range=np.array([scan.full_range for scan in scans]),
    )
    return store, {row: line for row, (_, line) in enumerate(found) if line}


def _read_cache(
    path: Path, key: str, states: Int64[np.ndarray, "N 2"], kind: Literal["frames", "video"]
) -> FrameFiles | VideoFiles | None:
    """What was found, or None if the cache is missing, damaged or of other folders or files."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
            if str(cache["paths"]) != key or not np.array_equal(cache["states"], states):
                return None
            entries = {name: cache[name] for name in cache.files if name not in ("paths", "states")}
        if kind == "video":
            return VideoFiles(**entries)
        # "/" and NUL are the two characters that no file name holds. Folders with the same names share one list.
        folders = [names.split("\0") for names in os.fsdecode(entries["names"].tobytes()).split("/")]
        return FrameFiles([folders[i] for i in entries["folder"].tolist()])
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _write_cache(path: Path, key: str, states: Int64[np.ndarray, "N 2"], store: FrameFiles | VideoFiles) -> None:
    if isinstance(store, VideoFiles):
        entries = vars(store)
    else:
        unique: dict[str, int] = {}
        folder = [unique.setdefault("\0".join(names), len(unique)) for names in store.names]
        names = np.frombuffer(os.fsencode("/".join(unique)), dtype=np.uint8)
        entries = {"names": names, "folder": np.array(folder, dtype=np.int64)}
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, paths=np.array(key), states=states, **entries)
        os.replace(partial, path)
    except OSError:  # a read-only disk: a cache is no more than a convenience
        with contextlib.suppress(OSError):
            partial.unlink()
