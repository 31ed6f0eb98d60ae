"""What a terminal shows meanwhile: how far passes through many videos are, or what is seen in a camera's picture."""

import sys
import time
from collections.abc import Iterable, Sequence

from dfer.images import frame_names
from dfer.predict.inputs import Frames, InputVideo
from dfer.video.decode import VIDEO_ERRORS, claimed_seconds


class LiveLines:
    """On a terminal lines that are written anew where they stand, ten times a second at most, else nothing."""

    def __init__(self) -> None:
        from rich.live import Live

        self._live = Live(auto_refresh=False, transient=True)
        self._next = 0.0

    def __enter__(self) -> "LiveLines":
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, lines: Iterable[str]) -> None:
        """Show these lines in the place of those before."""
        from rich.text import Text

        if sys.stdout.isatty() and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._live.start()  # again and again, which does nothing
            self._live.update(Text("\n".join(lines)), refresh=True)


class VideoProgress:
    """On a terminal a bar with frames/s and the time left, else nothing. Its unit is a second of video, as frames are
    not counted before.

    Args:
        videos: all that are to be read.
        passes: how often each is read.
        fps: of folders of frames.
    """

    def __init__(self, videos: Sequence[InputVideo], passes: int, fps: float):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]:.0f} frames/s"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._claimed = [_claimed(video, fps) for video in videos] if sys.stdout.isatty() else []
        self._passes = passes
        self._task = self._bar.add_task("", total=passes * sum(self._claimed), rate=0.0)

    def __enter__(self) -> "VideoProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:  # a video without a face takes one pass only
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
        self._bar.stop()

    def begin(self, number: int, name: str) -> None:
        """Show that video `number` is next."""
        done = self._passes * sum(self._claimed[:number])
        self._bar.update(self._task, completed=done, description=f"{number + 1}: {name[-30:]}")

    def show(self, frames: Frames) -> Frames:
        """Pass on the frames of one pass through a video, and show them as they come."""
        if self._bar.disable:
            yield from frames
            return
        began, before = time.monotonic(), None
        for number, (now, image) in enumerate(frames, start=1):
            yield now, image
            rate = number / max(time.monotonic() - began, 1e-3)
            self._bar.update(self._task, advance=now - before if before is not None else 0.0, rate=rate)
            before = now

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _claimed(video: InputVideo, fps: float) -> float:
    """Return how many seconds a video claims to have, 0 if it does not say or cannot be read."""
    try:
        return len(frame_names(video.path)) / fps if video.path.is_dir() else claimed_seconds(video.path) or 0.0
    except VIDEO_ERRORS:  # which reading it will say
        return 0.0
