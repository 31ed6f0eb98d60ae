"""A camera, a stream, or a file in its place, as it comes: the newest frame, and never one that had to wait."""

import errno
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from dfer.cli import UserError
from dfer.files import reason
from dfer.video.colour import believed_aspect, square_size, to_rgb
from dfer.video.decode import LIMITS, VIDEO_ERRORS, best_stream, check_size
from dfer.video.write import write_mp4

PATIENCE_S = 10  # for a camera or server that does not answer
DEVICES = Path("/dev")


class LiveFrame(NamedTuple):
    """A frame of even height and width, with square pixels."""

    time: float  # seconds from the first frame, by the camera's clock
    arrived: float  # when it was decoded, by time.monotonic()
    pixels: UInt8[np.ndarray, "H W 3"]  # RGB


class Camera:
    """Reads all frames in a thread and holds the newest one until it is taken; what it replaces was dropped.

    To be used as a context, within which the thread runs.

    Args:
        source: a camera's number, a stream's URL, or a video file, which is shown at its own rate.
        seconds: when it ends, at the latest.
        recording: a file that all frames are written to, those that are dropped too.
    """

    def __init__(self, source: str, seconds: float = math.inf, recording: Path | None = None):
        self.name = f"camera {source}" if source.isdecimal() else source
        self.came = self.taken = 0  # frames
        self.fps = 25.0  # claimed; known with the first frame
        self.lost: str | None = None  # why frames ended before they should, in a line
        self._source, self._seconds, self._recording = source, seconds, recording
        self._newest: LiveFrame | None = None
        self._changed, self._stopped, self._ended = threading.Condition(), threading.Event(), False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)

    def __enter__(self) -> "Camera":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stop()
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the frames; what was recorded is then written to its end. A signal's handler may call this."""
        self._stopped.set()

    def frames(self) -> Iterator[LiveFrame]:
        """Yield the newest frame, as often as the caller is ready for one, until the camera ends or is stopped.

        Raises:
            UserError: if nothing comes at all, or the recording cannot be written.
        """
        while True:
            with self._changed:
                # With a limit, as a signal's handler may run in this very thread.
                while self._newest is None and not self._ended and not self._stopped.is_set():
                    self._changed.wait(0.2)
                frame, self._newest = self._newest, None
                if self._error is not None:
                    raise self._error
                if not self.came:
                    raise UserError(f"{self.name}: ended before a frame had come from it")
                if frame is None or self._stopped.is_set():
                    return
                self.taken += 1
            yield frame

    def _read(self) -> None:
        """Read to the end, in a thread of its own, and keep what goes wrong for the caller of `frames`."""
        try:
            if self._recording is None:
                for _ in self._frames():
                    pass
            else:
                write_mp4(self._recording, self._frames())
        except UserError as error:
            self._error = error
        except VIDEO_ERRORS as error:  # what the source raises was made a UserError, or ended the frames
            self._error = UserError(f"{self._recording}: cannot be written ({reason(error)})")
        except Exception as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _frames(self) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
        """Yield times in seconds and pixels of all frames, and hold out each as the newest.

        Raises:
            UserError: if there is not even one.
        """
        last = 0.0
        try:
            for frame in self._decode():
                with self._changed:
                    self._newest, self.came, last = frame, self.came + 1, frame.time
                    self._changed.notify()
                yield frame.time, frame.pixels
        except VIDEO_ERRORS as error:
            if not self.came:
                raise UserError(refusal(self._source, error)) from None
            self.lost = f"{self.name}: lost after {last:.1f} s ({reason(error)})"
            if self._source.isdecimal():
                self.lost += ": it was unplugged, or does not work"
        if not self.came:
            raise UserError(f"{self.name}: no frames came from it")

    def _decode(self) -> Iterator[LiveFrame]:
        """Yield the frames as they come, those of a file at its own rate.

        Raises:
            BadVideo, av.FFmpegError, OSError: if it cannot be opened or read.
        """
        device = self._source.isdecimal()
        place = str(DEVICES / f"video{self._source}") if device else self._source
        paced, reformatter, size = Path(place).is_file(), VideoReformatter(), None
        begun = first = now = -math.inf
        kind = "v4l2" if device else None
        with av.open(place, format=kind, metadata_errors="replace", options=LIMITS, timeout=PATIENCE_S) as container:
            video = best_stream(container)
            self.fps = float(video.average_rate or 25)
            for frame in container.decode(video):
                check_size(frame)
                if frame.is_corrupt or frame.time is None or frame.time <= now:
                    continue  # as streams begin
                if size is None:
                    wide, high = square_size(frame.width, frame.height, believed_aspect(video.sample_aspect_ratio))
                    size = max(wide // 2 * 2, 2), max(high // 2 * 2, 2)
                    begun, first = time.monotonic(), frame.time
                now = frame.time
                if paced:
                    self._stopped.wait(max(begun + now - first - time.monotonic(), 0))
                if self._stopped.is_set() or now - first >= self._seconds:
                    return
                yield LiveFrame(now - first, time.monotonic(), to_rgb(frame, reformatter, *size))


def refusal(source: str, error: Exception) -> str:
    """Return the line for a camera, stream or file that gives no frame."""
    if not source.isdecimal():
        return f"{source}: {reason(error)}"
    number = getattr(error, "errno", None)
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        others = sorted(int(p.name[5:]) for p in DEVICES.glob("video*") if p.name[5:].isdecimal())
        here = f"here are {', '.join(map(str, others))}" if others else "this machine has none"
        return f"no camera {source} ({here}): give another number, a stream's URL or a video file"
    if number == errno.EBUSY:
        return f"camera {source}: another program uses it: close that one"
    if number in (errno.EACCES, errno.EPERM):
        return f"camera {source}: this user may not use it, who is not in the group `video`"
    return f"camera {source}: {reason(error)}"
