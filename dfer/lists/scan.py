"""Scan the disk for the frames of a list's videos, in folders or video files, and cache the result."""

import contextlib
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from dfer.cli import UserError
from dfer.files import reason, write_whole
from dfer.images import FRAME_SUFFIXES, frame_names, is_image
from dfer.lists.annotations import VideoRecord
from dfer.lists.missing import explain, relocate
from dfer.lists.threads import in_chunks

Kind = Literal["frames", "video"]
BadVideos = Literal["error", "skip"]
States = Int64[np.ndarray, "N 2"]
FOLDER, MISSING = -1, -2  # in place of a file's size
_STILL = [""]  # of all stills, whose one frame is the file itself


@dataclass(frozen=True)
class FrameFiles:
    """A folder of images per video, or one image file."""

    # Per video, file names inside record.path, in natural order (2.jpg before 10.jpg); of a still one empty name.
    names: list[list[str]]


@dataclass(frozen=True)
class VideoFiles:
    """A video file per video, with all that decoding any of its frames needs. N videos, F frames in all.

    The frames of video i are those from first[i] to first[i + 1], in the order of presentation.
    """

    first: Int64[np.ndarray, " _"]  # (N + 1,)
    pts: Int64[np.ndarray, " F"]  # presentation times, in the units of each stream
    key: Bool[np.ndarray, " F"]  # keyframes
    height: Int32[np.ndarray, " N"]  # px; 0 if the video cannot be used
    width: Int32[np.ndarray, " N"]
    codec: Shaped[np.ndarray, " N"]  # str: h264, vp9, ...
    matrix: Shaped[np.ndarray, " N"]  # str: bt601, bt709 or bt2020, from YUV to RGB
    full_range: Bool[np.ndarray, " N"]  # YUV of 0..255 and not 16..235
    pixels: Shaped[np.ndarray, " N"] | None = None  # str, see VideoScan; None: of an older version's cache


def path_states(records: Sequence[VideoRecord]) -> States:
    """Return when each path changed last, in ns (a folder: when a file was added, removed or renamed), and its size.

    The size is FOLDER for a folder and MISSING for a path that does not exist.
    """
    paths = [os.fspath(record.path) for record in records]
    began = time.perf_counter()
    states = [_state(path) for path in paths[:256]]
    # Threads are for a disk that is waited for. Where the system answers from memory, they would double the time.
    slow = time.perf_counter() - began > 256 * 50e-6
    states += (in_chunks if slow else map)(_state, paths[256:])
    return np.array(states, dtype=np.int64).reshape(-1, 2)


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, MISSING
    return found.st_mtime_ns, FOLDER if stat.S_ISDIR(found.st_mode) else found.st_size


def locate(records: Sequence[VideoRecord]) -> tuple[list[VideoRecord], States]:
    """Return the records, where need be by the Unicode form of their paths that the disk has, and `path_states`."""
    states, located = path_states(records), list(records)
    for row, path in relocate(records, np.flatnonzero(states[:, 1] == MISSING).tolist()).items():
        located[row] = replace(located[row], path=path)
        states[row] = _state(os.fspath(path))
    return located, states


def find_kind(records: Sequence[VideoRecord], states: States, source: Literal["auto", "frames", "video"]) -> Kind:
    """Return whether the paths of all records are folders of frames or single images, or video files.

    Raises:
        UserError: if they are not all the same, not of the `source` asked for, or if one is missing.
    """
    files = np.flatnonzero(states[:, 1] >= 0)
    stills = np.array([is_image(records[row].path) for row in files.tolist()], dtype=bool)
    images, videos = np.union1d(np.flatnonzero(states[:, 1] == FOLDER), files[stills]), files[~stills]
    if source == "auto" and len(images) and len(videos):
        a, b = records[images[0]], records[videos[0]]
        what = _what(a, int(states[images[0], 1]))
        raise UserError(f"{a.source}: {a.path} is {what}, but {b.path} ({b.source}) is a file: "
                         "a list is of the one or the other")  # fmt: skip
    kind = ("video" if len(videos) else "frames") if source == "auto" else source
    for row in (videos if kind == "frames" else images)[:1].tolist():
        there = "a file" if kind == "frames" else _what(records[row], int(states[row, 1])).removesuffix(" of frames")
        raise UserError(f"{records[row].source}: {records[row].path} is {there}, but the source asked for is {source}")
    for row in np.flatnonzero(states[:, 1] == MISSING)[:1].tolist():
        wanted = {"frames": "frame folder", "video": "video file", "auto": "frame folder or video file"}
        what = wanted[source if not len(images) and not len(videos) else kind]
        record = records[row]
        if is_image(record.path) and kind == "frames":
            what = "image file"
        raise UserError(f"{record.source}: no such {what}: {record.path}{explain(record.path, record.name)}")
    return kind


def _what(record: VideoRecord, size: int) -> str:
    return "a folder of frames" if size == FOLDER else "an image file" if is_image(record.path) else "a file"


def scan(
    records: Sequence[VideoRecord], kind: Kind, bad_videos: BadVideos = "error"
) -> tuple[FrameFiles | VideoFiles, dict[int, str]]:
    """Scan all folders or video files. Returns what was found, and which videos cannot be used and why.

    Raises:
        UserError: for the first folder that cannot be read or holds no frames, and for the first video that cannot be
            used if `bad_videos` is "error".
    """
    if kind == "frames":
        return FrameFiles(list(in_chunks(_scan_folder, records))), {}
    return scan_videos(records, bad_videos)


def _scan_folder(record: VideoRecord) -> list[str]:
    try:
        names = frame_names(record.path)
    except NotADirectoryError:  # `find_kind` has found an image
        return _STILL
    except OSError as error:
        raise UserError(f"{record.source}: cannot read the frame folder {record.path} ({reason(error)})") from None
    if not names:
        raise UserError(f"{record.source}: no {'/'.join(FRAME_SUFFIXES)} frames in {record.path}")
    return names


def scan_videos(records: Sequence[VideoRecord], bad_videos: BadVideos) -> tuple[VideoFiles, dict[int, str]]:
    """Scan video files, as `scan` does."""
    from av.error import FFmpegError  # takes 0.3 s to load, which lists of frames need not wait for

    from dfer.video.decode import BadVideo
    from dfer.video.random_access import VideoScan, scan_video

    # In the place of a video that cannot be used: 0 x 0 pixels.
    nothing = VideoScan(np.zeros(1, np.int64), np.zeros(1, bool), 0, 0, "", "bt601", full_range=False, pixels="")

    def scan_one(record: VideoRecord) -> tuple[VideoScan, str]:
        try:
            found = scan_video(record.path)
        except (BadVideo, FFmpegError) as error:
            line = f"{record.source}: cannot use the video {record.path} ({reason(error)})"
            if bad_videos == "error":
                raise UserError(line) from None
            return nothing, line
        assert len(found.pts) and found.height, record
        return found, ""

    found = list(in_chunks(scan_one, records))
    scans = [one for one, _ in found]
    store = VideoFiles(
        first=np.cumsum([0, *(len(one.pts) for one in scans)], dtype=np.int64),
        pts=np.concatenate([one.pts for one in scans]),
        key=np.concatenate([one.key for one in scans]),
        height=np.array([one.height for one in scans], dtype=np.int32),
        width=np.array([one.width for one in scans], dtype=np.int32),
        codec=np.array([one.codec for one in scans]),
        matrix=np.array([one.matrix for one in scans]),
        full_range=np.array([one.full_range for one in scans]),
        pixels=np.array([one.pixels for one in scans]),
    )
    return store, {row: line for row, (_, line) in enumerate(found) if line}


def read_cache(path: Path, key: str, states: States, kind: Kind) -> FrameFiles | VideoFiles | None:
    """Read the result of an earlier scan; None if the cache is missing, damaged or of other folders or files."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
            if str(cache["paths"]) != key or not np.array_equal(cache["states"], states):
                return None
            entries = {name: cache[name] for name in cache.files if name not in ("paths", "states")}
        if kind == "video":
            entries.pop("plain", None)  # of an older version: what `pixels` says better
            return VideoFiles(**entries)
        # "/" and NUL are the two characters that no file name holds. Folders with the same names share one list.
        folders = [names.split("\0") for names in os.fsdecode(entries["names"].tobytes()).split("/")]
        return FrameFiles([folders[i] for i in entries["folder"].tolist()])
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def write_cache(path: Path, key: str, states: States, store: FrameFiles | VideoFiles) -> None:
    """Keep the result of a scan for the next start, where the disk allows it."""
    if isinstance(store, VideoFiles):
        entries = vars(store)
    else:
        unique: dict[str, int] = {}
        folder = [unique.setdefault("\0".join(names), len(unique)) for names in store.names]
        names = np.frombuffer(os.fsencode("/".join(unique)), dtype=np.uint8)
        entries = {"names": names, "folder": np.array(folder, dtype=np.int64)}
    entries = {"paths": np.array(key), "states": states, **entries}
    with contextlib.suppress(OSError):  # a read-only disk
        write_whole(path, lambda file: np.savez_compressed(file, **entries), durable=False)
