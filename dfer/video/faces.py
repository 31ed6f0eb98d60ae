"""Faces in a video: detections -> tracks -> the one track of the clip -> a smooth square box per frame -> crops.

A clip to train on is one face in one shot; in a video to predict on, each frame has the best of the tracks it lies in,
and every track is a face of its own.

Frames are (H, W, 3) uint8, RGB. A box is a row (x, y, side, tilt): the centre of an upright square in pixels, where
(0, 0) is the picture's upper left corner, the square's side in pixels, and the slope of the line between the eyes in
radians, positive where the eye on the right lies lower; 0 where the detector knows no eyes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8

from dfer.video.detectors import Detector
from dfer.video.shots import ShotDetector

DETECT_S = 0.095  # at most some ten detections a second: a head moves little in between
MAX_GAP = 5  # samples from one detection to the next of a track: half a second
MIN_CLOSENESS = 0.3  # of a face with itself, MAX_GAP samples later at worst
JUMP, SAME_FACE = 0.5, 0.85  # below this overlap, or after a gap, a face must look the same, by this correlation
LOOK = 8  # px of the picture that is kept of a detected face
MIN_DETECTIONS = 5  # of a track, or half of all samples in a video too short for that
SMOOTH_S = 0.2  # standard deviation of the kernel that box coordinates are smoothed with


@dataclass(frozen=True)
class Track:
    """One face through the samples (frames that were searched) of one shot."""

    samples: Int64[np.ndarray, " K"]  # where it was detected, rising
    boxes: Float64[np.ndarray, "K 4"]


@dataclass(frozen=True)
class FaceTrack:
    """One face in one shot: its box in each frame from `first` on."""

    first: int  # frame
    boxes: Float64[np.ndarray, "n 4"]

    @property
    def end(self) -> int:
        """Return the frame after the last."""
        return self.first + len(self.boxes)


@dataclass(frozen=True)
class Faces:
    """The chosen face in each frame of a video, and all there are."""

    times: Float64[np.ndarray, " N"]  # seconds, of all frames
    boxes: Float64[np.ndarray, "N 4"]  # of the chosen face; NaN in frames to leave out: in all if there is no face
    track: Int64[np.ndarray, " N"]  # which track the box is of: 0 is the best one; -1 where there is no box
    tracks: list[FaceTrack]  # all, the best one first
    faces_at_once: int  # at most
    cuts: int


def overlaps(box: Float64[np.ndarray, " 4"], boxes: Float64[np.ndarray, "K 4"]) -> Float64[np.ndarray, " K"]:
    """Return the intersection over union of one box with each of several, tilt aside."""
    low = np.maximum(box[:2] - box[2] / 2, boxes[:, :2] - boxes[:, 2:3] / 2)
    high = np.minimum(box[:2] + box[2] / 2, boxes[:, :2] + boxes[:, 2:3] / 2)
    both = np.maximum(high - low, 0).prod(axis=1)
    return both / (box[2] ** 2 + boxes[:, 2] ** 2 - both)


def closeness(
    track: Sequence[tuple[int, Float64[np.ndarray, " 4"]]], sample: int, boxes: Float64[np.ndarray, "K 4"]
) -> Float64[np.ndarray, " K"]:
    """Return how well boxes in a sample go on with a track of (sample, box): their overlap times their sizes' ratio.

    Compared are the track's last box and where it would be if it went on as it moved last; the better one counts.
    """
    last, box = track[-1]
    expected = box.copy()
    if len(track) > 1:
        before, earlier = track[-2]
        expected[:2] += (box[:2] - earlier[:2]) / (last - before) * (sample - last)
    ratio = np.minimum(box[2] / boxes[:, 2], boxes[:, 2] / box[2])
    return np.maximum(overlaps(box, boxes), overlaps(expected, boxes)) * ratio


def face_look(frame: UInt8[np.ndarray, "H W 3"], box: Float64[np.ndarray, " 4"]) -> UInt8[np.ndarray, " D"]:
    """Return the small picture of a face by which it is known again a moment later."""
    x, y, side, _ = box
    height, width = frame.shape[:2]
    left, right = (int(np.clip(edge, 0, width)) for edge in (x - side / 2, x + side / 2))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (y - side / 2, y + side / 2))
    part = frame[min(top, height - 1) : max(bottom, top + 1), min(left, width - 1) : max(right, left + 1)]
    return cv2.resize(part, (LOOK, LOOK), interpolation=cv2.INTER_AREA).reshape(-1)


def looks_alike(a: UInt8[np.ndarray, " D"], b: UInt8[np.ndarray, " D"]) -> bool:
    """Return whether two small pictures may be of one face, in whatever light."""
    first, second = a - a.mean(), b - b.mean()
    return bool(first @ second >= SAME_FACE * np.sqrt((first @ first) * (second @ second)))


class _Followed(NamedTuple):
    """A track that may go on: its number, its last two detections, the look of the last one, and the shot."""

    number: int
    last: list[tuple[int, Float64[np.ndarray, " 4"]]]  # (sample, box)
    look: UInt8[np.ndarray, " D"] | None
    shot: int


class Linker:
    """Joins detections that are close to tracks, as they come; what it holds does not grow with time.

    A face that is missed for less than `MAX_GAP` samples goes on if it looks the same after. A track ends where the
    box jumps and the face changes, as at a cut that was not noticed.
    """

    def __init__(self) -> None:
        self._live: list[_Followed] = []  # in the order of their first detection
        self._tracks = 0

    def add(
        self,
        sample: int,
        boxes: Float64[np.ndarray, "K 4"],
        looks: Sequence[UInt8[np.ndarray, " D"]] | None = None,
        shot: int = 0,
    ) -> list[int]:
        """Return the number of each box's track, from 0 in the order of first detections. The closest pairs go first.

        Args:
            sample: the number of the frame that was searched, above the one before.
            boxes: the faces in it.
            looks: of each box, from `face_look`.
            shot: which shot it lies in; no track goes on in another one.
        """
        live = [track for track in self._live if sample - track.last[-1][0] <= MAX_GAP and track.shot == shot]
        pairs = []
        for t, track in enumerate(live):
            before, box = track.last[-1]
            doubtful = (overlaps(box, boxes) < JUMP) | (sample - before > 1)
            for k, close in enumerate(closeness(track.last, sample, boxes)):
                same = looks is None or track.look is None or looks_alike(track.look, looks[k])
                if close >= MIN_CLOSENESS and (same or not doubtful[k]):
                    pairs.append((-close, t, k))
        of_box: dict[int, int] = {}  # box -> which of the live tracks
        for _, t, k in sorted(pairs):
            if t not in of_box.values() and k not in of_box:
                of_box[k] = t
        numbers = []
        for k, box in enumerate(boxes):
            look, detection = None if looks is None else looks[k], (sample, box)
            if k in of_box:
                track = live[of_box[k]]
                live[of_box[k]] = track._replace(last=[track.last[-1], detection], look=look)
                numbers.append(track.number)
            else:
                live.append(_Followed(self._tracks, [detection], look, shot))
                numbers.append(self._tracks)
                self._tracks += 1
        self._live = live
        return numbers


def link_tracks(
    faces: Sequence[Float64[np.ndarray, "_ 4"]],
    shots: Int64[np.ndarray, " S"],
    looks: Sequence[Sequence[UInt8[np.ndarray, " D"]]] | None = None,
) -> list[Track]:
    """Join the detections of a whole video, as `Linker` does.

    Tracks come in the order of their first detection; each detection is in one.

    Args:
        faces: the boxes in each sample.
        shots: the shot that each sample lies in, rising.
        looks: of each box, from `face_look`.
    """
    linker = Linker()
    tracks: list[list[tuple[int, int]]] = []  # (sample, which of its boxes)
    for sample, boxes in enumerate(faces):
        numbers = linker.add(sample, boxes, None if looks is None else looks[sample], int(shots[sample]))
        for k, number in enumerate(numbers):
            if number == len(tracks):
                tracks.append([])
            tracks[number].append((sample, k))
    return [Track(np.array([s for s, _ in track]), np.stack([faces[s][k] for s, k in track])) for track in tracks]


def prominence(boxes: Float64[np.ndarray, "K 4"], height: int, width: int) -> Float64[np.ndarray, " K"]:
    """Return the side of each box, halved towards the corners of a `height` x `width` picture."""
    middle = np.array([width, height]) / 2
    away = np.linalg.norm(boxes[:, :2] - middle, axis=1) / np.linalg.norm(middle)
    return boxes[:, 2] * (1 - away / 2)


def rank_tracks(tracks: Sequence[Track], num_samples: int, height: int, width: int) -> tuple[list[Track], int]:
    """Return the faces of a video, the most prominent one (large, central, long) first, and how many are seen at once.

    A track counts for each detection its `prominence` in the `height` x `width` picture. Tracks of
    too few detections, or with more samples missed than hit, are false alarms: they are neither returned nor counted.
    """
    enough = min(MIN_DETECTIONS, -(-num_samples // 2))
    tracks = [
        track
        for track in tracks
        if len(track.samples) >= enough and 2 * len(track.samples) > track.samples[-1] - track.samples[0]
    ]
    at_once, weights = np.zeros(num_samples, np.int64), []
    for track in tracks:
        weights.append(prominence(track.boxes, height, width).sum())
        at_once[track.samples[0] : track.samples[-1] + 1] += 1
    best_first = sorted(range(len(tracks)), key=lambda t: -weights[t])
    return [tracks[t] for t in best_first], int(at_once.max(initial=0))


def smooth_boxes(boxes: Float64[np.ndarray, "N 4"], times: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, "N 4"]:
    """Return for each box the value of a line through its neighbours in time, weighted by a Gaussian.

    Unlike their mean it does not lag at the ends, and steady motion passes unchanged. `times` in seconds, rising.
    """
    smooth = np.empty_like(boxes)
    for i, time in enumerate(times):
        near = slice(*np.searchsorted(times, (time - 3 * SMOOTH_S, time + 3 * SMOOTH_S)))
        away = times[near] - time
        weights = np.exp(-0.5 * (away / SMOOTH_S) ** 2)
        first, second = weights @ away, weights @ away**2
        line = weights * (second - first * away)
        weights = line if line.sum() > 1e-9 else weights  # a single frame has no line through it
        smooth[i] = weights @ boxes[near] / weights.sum()
    return smooth


def find_face(
    frames: Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]], detect: Detector, every_track: bool = False
) -> Faces:
    """Return the box of a video's face in each frame, and the tracks of all its faces.

    Args:
        frames: times in seconds, rising, and pictures. One is held at a time.
        detect: from `make_detector`.
        every_track: frames that the best track leaves out have the box of the best track that covers them: the same
            face after a cut, or another one.
    """
    times: list[float] = []
    samples: list[int] = []  # the frames that were searched
    faces: list[np.ndarray] = []
    looks: list[list[np.ndarray]] = []
    shots, due, shape = ShotDetector(), 0.0, None
    for time, frame in frames:
        shots.add(time, frame)
        if time >= due or frame.shape != shape:
            samples.append(len(times))
            faces.append(detect(frame))
            looks.append([face_look(frame, box) for box in faces[-1]])
            due = time + DETECT_S
        times.append(time)
        shape = frame.shape
    seconds, boxes = np.array(times, np.float64), np.full((len(times), 4), np.nan)
    of_track = np.full(len(times), -1, np.int64)
    if shape is None:
        return Faces(seconds, boxes, of_track, [], 0, 0)
    starts = shots.starts()
    linked = link_tracks(faces, np.searchsorted(starts, samples, side="right"), looks)
    ranked, at_once = rank_tracks(linked, len(samples), *shape[:2])
    tracks = [fill_track(track, np.array(samples), starts, seconds) for track in ranked]
    for number, track in enumerate(tracks if every_track else tracks[:1]):
        kept = np.arange(track.first, track.end)
        free = of_track[kept] < 0
        boxes[kept[free]], of_track[kept[free]] = track.boxes[free], number
    return Faces(seconds, boxes, of_track, tracks, at_once, len(starts))


def fill_track(
    track: Track, samples: Int64[np.ndarray, " S"], starts: Int64[np.ndarray, " C"], times: Float64[np.ndarray, " N"]
) -> FaceTrack:
    """Return a track's box in each frame: interpolated between detections, and smoothed.

    It begins with the first detection, or with the shot if nothing of that was searched before, and goes on to the
    frame before the next sample or shot.

    Args:
        track: the detections.
        samples: the frames that were searched.
        starts: the first frames of all shots but the first.
        times: of all frames, in seconds.
    """
    known, edges = samples[track.samples], np.array([0, *starts, len(times)])
    shot = int(np.searchsorted(starts, known[0], side="right"))
    searched_before = track.samples[0] > 0 and samples[track.samples[0] - 1] >= edges[shot]
    first = known[0] if searched_before else edges[shot]
    end = min([*samples, len(times)][track.samples[-1] + 1], edges[shot + 1])
    kept = np.arange(first, end)
    filled = [np.interp(times[kept], times[known], column) for column in track.boxes.T]
    return FaceTrack(int(first), smooth_boxes(np.stack(filled, axis=1), times[kept]))


def crop_face(
    frame: UInt8[np.ndarray, "H W 3"], box: Float64[np.ndarray, " 4"], size: int, margin: float = 0.0
) -> UInt8[np.ndarray, "size size 3"]:
    """Return a box, widened by `margin` of its side on each side, turned upright, as `size` x `size` pixels.

    Positions are exact below a pixel: a still face stays still. Beyond its edge a picture repeats its last pixel.
    """
    x, y, side, tilt = box
    scale = side * (1 + 2 * margin) / size
    reach = 0.75 * scale * size + 4  # half of the square's diagonal, and what the filters see around it
    height, width = frame.shape[:2]
    left, right = (int(np.clip(edge, 0, width - 1)) for edge in (x - reach, x + reach))
    top, bottom = (int(np.clip(edge, 0, height - 1)) for edge in (y - reach, y + reach))
    part = frame[top : bottom + 1, left : right + 1]
    if scale > 1:  # else fine patterns would flicker
        part = cv2.GaussianBlur(part, (0, 0), 0.5 * np.sqrt(scale**2 - 1), borderType=cv2.BORDER_REPLICATE)
    turn = scale * np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    corner = np.array([x - left, y - top]) - turn @ np.full(2, (size - 1) / 2) - 0.5  # of pixel centres
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        part, np.column_stack([turn, corner]), (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
