"""One video to clips: folders of JPEG frames, cropped to the face, at a constant frame rate, in equal lengths."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from jaxtyping import Float64, Int64
from PIL import Image

from dfer.files import reason
from dfer.video.decode import BadVideo, decode
from dfer.video.detectors import make_detector
from dfer.video.faces import crop_face, find_face
from dfer.video.labels import LabelledVideo

MAX_REPEATS = 100  # by a constant frame rate, of a frame on average; beyond, the time stamps are broken


@dataclass(frozen=True)
class ClipOptions:
    """What shapes the frames of a video. Records of earlier runs hold these names."""

    crop: bool = True
    detector: Path | None = None  # of YuNet; None is Haar
    margin: float = 0.1
    size: int = 224  # px
    fps: float | None = None
    clip_length: int | None = None
    quality: int = 92
    level: bool = True  # turn the crop so that the eyes are level, where the detector knows them


@dataclass(frozen=True)
class ClipResult:
    """What a video gave. Records of earlier runs hold these names."""

    outcome: str  # ok, no face, several faces, cut, failed: reason
    clips: dict[str, int]  # folder below DIR -> frames
    decoded: int  # frames
    faces: int | None = None  # at once; None: not looked for
    cuts: int | None = None
    notes: list[str] = field(default_factory=list)  # on its pictures, see `decode`


@dataclass
class _Found:
    """What reading a video has found so far."""

    decoded: int = 0  # frames
    faces: int | None = None  # at once
    cuts: int | None = None
    notes: list[str] = field(default_factory=list)


_detector = functools.cache(make_detector)  # one in each process


def write_clips(video: LabelledVideo, out: Path, options: ClipOptions) -> ClipResult:
    """Write a video's frames below out/frames; none are left of a video that failed.

    Raises:
        OSError: if they cannot be written.
    """
    clips: dict[str, int] = {}
    found = _Found()
    name, clip_length, outcome = "", options.clip_length, "ok"
    try:
        for index, image in enumerate(_read_pictures(video.path, options, found)):
            if index % (clip_length or sys.maxsize) == 0:
                name = f"frames/{video.name}" + (f"_c{len(clips) + 1:03d}" if clip_length else "")
                clips[name] = 0
                (out / name).mkdir(parents=True, exist_ok=True)
                _remove_frames(out / name)  # of a run that was stopped, maybe of a longer clip
            clips[name] += 1
            image.save(out / name / f"{clips[name]:05d}.jpg", quality=options.quality)
    except (FFmpegError, BadVideo) as error:
        outcome = f"failed: {reason(error)}"
        if found.decoded and not str(error).startswith("truncated:"):  # which says it
            outcome += f", after {found.decoded} frames"
    unwanted = list(clips) if outcome != "ok" else []
    if clip_length and len(clips) > 1 and 2 * clips[name] < clip_length and not unwanted:
        unwanted = [name]  # the remainder is too short to be a clip
    for dropped in unwanted:
        del clips[dropped]
        remove_clip(out / dropped)
    if outcome == "ok" and options.crop:
        outcome = _face_outcome(found, clips)
    return ClipResult(outcome, clips, found.decoded, found.faces, found.cuts, found.notes)


def _face_outcome(found: _Found, clips: dict[str, int]) -> str:
    """Return the outcome of a video that was decoded and searched for faces."""
    if not found.faces:
        return "no face"
    if not clips:
        return "failed: its face is seen too shortly for --fps"
    if found.faces > 1:
        return "several faces"
    return "cut" if found.cuts else "ok"


def _read_pictures(path: Path, options: ClipOptions, found: _Found) -> Iterator[Image.Image]:
    """Yield the frames to write, and fill `found` on the way.

    Raises:
        BadVideo, av.FFmpegError: as `decode`; where faces or times are looked for, before the first frame comes.
    """
    if not (options.crop or options.fps):
        notes = found.notes
        for found.decoded, (_, image) in enumerate(decode(path, notes=notes), start=1):
            yield image
        return
    # Twice through the video: all its frames together may not fit in memory.
    boxes = None
    if options.crop:
        frames = ((time, np.asarray(image)) for time, image in decode(path, notes=found.notes))
        faces = find_face(frames, _detector(options.detector, options.level))
        times, boxes = faces.times, faces.boxes
        found.faces, found.cuts = faces.faces_at_once, faces.cuts
    else:
        times = np.array([time for time, _ in decode(path, notes=found.notes)])
    found.decoded = len(times)
    counts = nearest_frames(times, options.fps) if options.fps else np.ones(len(times), np.int64)
    if boxes is not None:
        counts[np.isnan(boxes[:, 0])] = 0
    end = int(np.flatnonzero(counts).max(initial=-1)) + 1
    for index, (_, image) in enumerate(itertools.islice(decode(path), end)):
        if boxes is not None and counts[index]:
            image = Image.fromarray(crop_face(np.asarray(image), boxes[index], options.size, options.margin))
        for _ in range(counts[index]):
            yield image


def nearest_frames(times: Float64[np.ndarray, " N"], fps: float) -> Int64[np.ndarray, " N"]:
    """Return how often each frame is taken if at every 1/fps seconds from the first one the nearest in time is taken.

    `times` in seconds, rising. At its own rate each frame of a video is taken once.

    Raises:
        BadVideo: if the times are so far apart that frames would be repeated without end.
    """
    ticks = (times[-1] - times[0]) * fps
    if not ticks < MAX_REPEATS * len(times):
        raise BadVideo(f"time stamps {times[-1] - times[0]:,.0f} s apart in {len(times)} frames")
    wanted = times[0] + np.arange(int(ticks + 0.25) + 1) / fps  # files round their times
    after = np.minimum(np.searchsorted(times, wanted), len(times) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(wanted - times[before] <= times[after] - wanted + 1e-9, before, after)
    return np.bincount(nearest, minlength=len(times))


def remove_clip(folder: Path) -> None:
    """Delete the frames of a clip, and its folder unless another video's folder lies in it."""
    _remove_frames(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_frames(folder: Path) -> None:
    for frame in folder.glob("*.jpg"):
        frame.unlink()
