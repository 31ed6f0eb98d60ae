"""What trained models see in a camera's picture as it comes: faces that are followed, each with its last window."""

import contextlib
import io
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from dfer.cli import UserError
from dfer.lists.annotations import EMOTIONS
from dfer.predict.overlay import SeenFace, live_picture
from dfer.predict.predictor import CROP_SIZE, Predictor
from dfer.predict.timeline import Timeline
from dfer.video.camera import Camera
from dfer.video.faces import DETECT_S, MAX_GAP, SMOOTH_S, Linker, crop_face, face_look, prominence

MISSED = 1  # searches in a row that may miss a face before it is no longer shown
JPEG_QUALITY = 85


@dataclass
class _Face:
    """A face that is followed."""

    number: int  # from 1, as they came
    box: Float64[np.ndarray, " 4"] | None  # smooth; None: the whole picture
    found: int  # in which search, last
    pictures: deque[tuple[float, UInt8[np.ndarray, "_ _ 3"]]] = field(default_factory=deque)  # of the last window
    probabilities: Float64[np.ndarray, " K"] | None = None
    due: float = 0.0  # when it is to be predicted on again
    since: float = 0.0  # when it came, or came back
    seen: float = -math.inf  # in which frame, last


class LivePredictor:
    """Follows the faces in frames that come one by one, some left out, and predicts on the last window of each.

    A face has numbers as soon as half a window of it was seen without a break, of a window of one frame at once; they
    belong to the last window, and are new after each stride. Of several faces that are due, one is predicted on per
    frame, so that no frame waits for more than that.

    Args:
        predictor: the models, their windows and the detector.
        fps: of the camera, by which a window in frames has a length in seconds.
    """

    def __init__(self, predictor: Predictor, fps: float):
        self._predictor = predictor
        self.window = predictor.window.seconds(fps)
        self.stride = predictor.stride.seconds(fps) if predictor.stride else self.window / 4
        if self.stride > self.window:
            raise UserError(f"--stride: {self.stride:g} s are more than the window's {self.window:g}")
        # A picture lasts: n of them are n - 1 frames apart. Cameras' clocks round.
        self._enough = min(self.window / 2, self.window - 1 / fps) - 1e-6
        self._before = 0.0  # when the frame before came
        self._linker, self._searches, self._search_due = Linker(), 0, 0.0
        self._faces: dict[int, _Face] = {}

    def see(self, now: float, frame: UInt8[np.ndarray, "H W 3"]) -> list[SeenFace]:
        """Return the faces in the next frame, at `now` seconds, in the order of their numbers."""
        faces = self._follow(now, frame)
        for face in faces:
            if face.seen < self._before:
                face.since = now
            face.seen = now
            face.pictures.append((now, self._crop(face, frame)))
            while face.pictures[0][0] <= now - self.window + 1e-6:
                face.pictures.popleft()
        waiting = [f for f in faces if now >= f.due and now - f.since >= self._enough]
        self._before = now
        if waiting:
            face = min(waiting, key=lambda f: f.due)
            face.probabilities = _predict(self._predictor, [picture for _, picture in face.pictures])
            face.due = now + self.stride - 1e-6
        return [SeenFace(face.number, face.box, face.probabilities) for face in faces]

    def _follow(self, now: float, frame: UInt8[np.ndarray, "H W 3"]) -> list[_Face]:
        """Search the frame if it is time for that, and return the faces that are in it."""
        detect = self._predictor.detect
        if detect is None:
            return [self._faces.setdefault(0, _Face(1, None, 0))]
        if now >= self._search_due:
            self._searches, self._search_due = self._searches + 1, now + DETECT_S
            boxes = detect(frame)
            numbers = self._linker.add(self._searches, boxes, [face_look(frame, box) for box in boxes])
            for number, box in zip(numbers, boxes * (1, 1, 1 + 2 * self._predictor.margin, 1), strict=True):
                face = self._faces.setdefault(number, _Face(number + 1, box, self._searches))
                searched = self._searches - face.found
                share = 1 - np.exp(-searched * DETECT_S / SMOOTH_S)
                face.box, face.found = face.box + share * (box - face.box), self._searches
            self._faces = {n: f for n, f in self._faces.items() if self._searches - f.found <= MAX_GAP}
        seen = [face for face in self._faces.values() if self._searches - face.found <= MISSED]
        if self._predictor.faces == "main" and seen:
            weights = prominence(np.stack([face.box for face in seen if face.box is not None]), *frame.shape[:2])
            seen = [seen[int(weights.argmax())]]
        return seen

    def _crop(self, face: _Face, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
        return frame if face.box is None else crop_face(frame, face.box, CROP_SIZE)


def warm_up(predictor: Predictor) -> None:
    """Have the detector and the models look at a black picture: what they do once, no frame then waits for."""
    black = np.zeros((CROP_SIZE, CROP_SIZE, 3), np.uint8)
    if predictor.detect is not None:
        predictor.detect(black)
    _predict(predictor, [black])


def _predict(predictor: Predictor, pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float64[np.ndarray, " K"]:
    """Return what the models say of one window, on average, as of a video's."""
    window, means = np.array([[0, len(pictures)]]), []
    for model in predictor.models:
        timeline = Timeline(len(pictures), window, model.sampler, model.prepare, model.predict, 1)
        for number, picture in enumerate(pictures):
            if timeline.wants(number):
                timeline.add(number, picture)
        means.append(timeline.probabilities()[0])
    return np.mean(means, axis=0)


class Watched(NamedTuple):
    """What came of watching a camera."""

    seconds: float
    came: int  # frames
    shown: int
    delays: list[float]  # of each frame that was shown, from when it was decoded, s

    def __str__(self) -> str:
        if not self.delays:
            return f"{self.seconds:.1f} s: it ended before a picture was shown"
        return (
            f"{self.seconds:.1f} s: of {self.came} frames {self.shown} were shown, {self.came - self.shown} dropped, "
            f"as a newer one had come; from camera to page {1000 * np.median(self.delays):.0f} ms typically, "
            f"{1000 * max(self.delays):.0f} at most"
        )


def watch(
    camera: Camera, predictor: Predictor, begin: Callable[[LivePredictor], object], show: Callable[[bytes], object],
    say: Callable[[Sequence[SeenFace]], object],
) -> Watched:  # fmt: skip
    """Predict on what a camera shows until it ends.

    Args:
        camera: its thread runs.
        predictor: the models.
        begin: called when the first frame has come.
        show: called with each picture that was drawn, a JPEG.
        say: called with the faces in it.

    Raises:
        UserError: if no frame comes, the recording cannot be written, or windows would not touch.
    """
    live, delays, last = None, [], 0.0
    for frame in camera.frames():
        if live is None:
            live = LivePredictor(predictor, camera.fps)
            begin(live)
        faces, last = live.see(frame.time, frame.pixels), frame.time
        behind = time.monotonic() - frame.arrived
        status = f"of the last {live.window:g} s; {1000 * behind:.0f} ms behind; {camera.taken} of {camera.came} frames"
        jpeg = io.BytesIO()
        live_picture(frame.pixels, faces, status).save(jpeg, "JPEG", quality=JPEG_QUALITY)
        show(jpeg.getvalue())
        say(faces)
        delays.append(time.monotonic() - frame.arrived)
    return Watched(last, camera.came, len(delays), delays)


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM call `stop`, once; a second one then does what it did before."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]

    def restore() -> None:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)

    def handle(*_: object) -> None:
        restore()
        stop()

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield
    finally:
        restore()


def in_words(face: SeenFace) -> str:
    """Return a face's numbers in a line."""
    if face.probabilities is None:
        return f"face {face.number}: just come"
    shares = ", ".join(f"{name} {100 * p:.0f}" for name, p in zip(EMOTIONS, face.probabilities, strict=True))
    return f"face {face.number}: {EMOTIONS[int(face.probabilities.argmax())]} ({shares} %)"
