"""Faces in a video: detections -> tracks -> the one track of the clip -> a smooth square box per frame -> crops.

A clip to train on is one face in one shot; in a video to predict on, each frame has the best of the tracks it lies in.

Frames are (H, W, 3) uint8, RGB. A box is a row (x, y, side, tilt): the centre of an upright square in pixels, where
(0, 0) is the picture's upper left corner, the square's side in pixels, and the slope of the line between the eyes in
radians, positive where the eye on the right lies lower; 0 where the detector knows no eyes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8

from dfer.cli import UserError
from dfer.video.shots import is_cut, thumbnail

DETECT_LONG_SIDE = 480  # px; in so small a picture a face is found as well, and 2 to 10 times faster
MIN_FACE = 0.1  # smallest face, of the picture's shorter side
HAAR_NEIGHBOURS = 8  # OpenCV's usual 3 finds faces in foliage and folds
YUNET_SCORE = 0.8
DETECT_S = 0.095  # at most some ten detections a second: a head moves little in between
MAX_GAP = 5  # samples from one detection to the next of a track: half a second
MIN_OVERLAP = 0.3  # intersection over union of a face with itself, MAX_GAP samples later at worst
MIN_DETECTIONS = 5  # of a track, or half of all samples in a video too short for that
SMOOTH_S = 0.2  # standard deviation of the kernel that box coordinates are smoothed with

Detector = Callable[[UInt8[np.ndarray, "H W 3"]], Float64[np.ndarray, "K 4"]]


@dataclass(frozen=True)
class Track:
    """One face through the samples (frames that were searched) of one shot."""

    samples: Int64[np.ndarray, " K"]  # where it was detected, rising
    boxes: Float64[np.ndarray, "K 4"]


@dataclass(frozen=True)
class Faces:
    """The chosen face in each frame of a video, and what else there is."""

    times: Float64[np.ndarray, " N"]  # seconds, of all frames
    boxes: Float64[np.ndarray, "N 4"]  # of the chosen face; NaN in frames to leave out: in all if there is no face
    track: Int64[np.ndarray, " N"]  # which track the box is of: 0 is the best one; -1 where there is no box
    faces_at_once: int  # at most
    cuts: int


def make_detector(model: Path | None = None) -> Detector:
    """Return a function from a frame to the boxes of its faces, in an order that does not depend on threads.

    Args:
        model: an .onnx file of YuNet; None is OpenCV's own Haar cascade for frontal faces, which knows no eyes.

    Raises:
        UserError: if the model cannot be used, or this OpenCV has no Haar cascade.
    """
    cv2.setNumThreads(1)  # the processes are the parallelism
    if model is None:
        if not hasattr(cv2, "CascadeClassifier"):
            raise UserError(f"OpenCV {cv2.__version__} has no Haar detector: install the version in requirements.txt")
        folder = cv2.data.haarcascades  # pyright: ignore[reportAttributeAccessIssue]
        cascade = cv2.CascadeClassifier(f"{folder}haarcascade_frontalface_default.xml")

        def find(small: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "K 4"]:
            grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
            least = max(24, round(MIN_FACE * min(grey.shape)))
            found = cascade.detectMultiScale(grey, 1.1, HAAR_NEIGHBOURS, 0, (least, least))
            x, y, width, height = np.array(found, np.float64).reshape(-1, 4).T
            return np.stack([x + width / 2, y + height / 2, width, 0 * x], axis=1)

    else:
        # The file may hold anything. OpenCV takes it by its suffix, and logs at length before it raises.
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            net = cv2.FaceDetectorYN.create(str(model), "", (64, 64), YUNET_SCORE)
            net.detect(np.zeros((64, 64, 3), np.uint8))
        except (cv2.error, SystemError):
            raise UserError(f"{model}: not a YuNet model that OpenCV {cv2.__version__} can use") from None
        finally:
            cv2.utils.logging.setLogLevel(level)

        def find(small: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "K 4"]:
            net.setInputSize(small.shape[1::-1])
            _, found = net.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
            found = np.zeros((0, 15)) if found is None else np.asarray(found, np.float64)
            return yunet_boxes(found)

    def detect(frame: UInt8[np.ndarray, "H W 3"]) -> Float64[np.ndarray, "K 4"]:
        scale = min(1.0, DETECT_LONG_SIDE / max(frame.shape))
        height, width = (max(1, round(scale * side)) for side in frame.shape[:2])
        small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else frame
        boxes = find(small) * (frame.shape[1] / width, frame.shape[0] / height, frame.shape[1] / width, 1)
        return boxes[np.lexsort(boxes.T)]

    return detect


def yunet_boxes(found: Float64[np.ndarray, "K 15"]) -> Float64[np.ndarray, "K 4"]:
    """Return boxes from YuNet's rows: x, y, width, height, x and y of five landmarks (the eyes first), the score."""
    x, y, width, height, x_left, y_left, x_right, y_right = found.T[:8]  # left as one sees it
    tilt = np.arctan2(y_right - y_left, x_right - x_left)
    return np.stack([x + width / 2, y + height / 2, np.maximum(width, height), tilt], axis=1)


def overlaps(box: Float64[np.ndarray, " 4"], boxes: Float64[np.ndarray, "K 4"]) -> Float64[np.ndarray, " K"]:
    """Return the intersection over union of one box with each of several, tilt aside."""
    low = np.maximum(box[:2] - box[2] / 2, boxes[:, :2] - boxes[:, 2:3] / 2)
    high = np.minimum(box[:2] + box[2] / 2, boxes[:, :2] + boxes[:, 2:3] / 2)
    both = np.maximum(high - low, 0).prod(axis=1)
    return both / (box[2] ** 2 + boxes[:, 2] ** 2 - both)


def link_tracks(faces: Sequence[Float64[np.ndarray, "_ 4"]], shots: Int64[np.ndarray, " S"]) -> list[Track]:
    """Join detections that overlap, best overlap first, from sample to sample of a shot.

    `faces[s]` are the boxes in sample s, which lies in shot `shots[s]`. A face that is missed for less than `MAX_GAP`
    samples goes on. Tracks come in the order of their first detection; each detection is in exactly one.
    """
    tracks: list[list[tuple[int, np.ndarray]]] = []
    live: list[list[tuple[int, np.ndarray]]] = []
    for sample, boxes in enumerate(faces):
        live = [track for track in live if sample - track[-1][0] <= MAX_GAP and shots[track[-1][0]] == shots[sample]]
        pairs = [
            (-overlap, t, k)
            for t, track in enumerate(live)
            for k, overlap in enumerate(overlaps(track[-1][1], boxes))
            if overlap >= MIN_OVERLAP
        ]
        continued, taken = set(), set()
        for _, t, k in sorted(pairs):
            if t not in continued and k not in taken:
                live[t].append((sample, boxes[k]))
                continued.add(t)
                taken.add(k)
        new = [[(sample, box)] for k, box in enumerate(boxes) if k not in taken]
        tracks += new
        live += new
    return [Track(np.array([sample for sample, _ in track]), np.stack([box for _, box in track])) for track in tracks]


def rank_tracks(tracks: Sequence[Track], num_samples: int, height: int, width: int) -> tuple[list[Track], int]:
    """Return the faces of a video, the most prominent one (large, central, long) first, and how many are seen at once.

    A track counts for each detection its side, halved towards the corners of the `height` x `width` picture. Tracks of
    too few detections, or with more samples missed than hit, are false alarms: they are neither returned nor counted.
    """
    enough = min(MIN_DETECTIONS, -(-num_samples // 2))
    tracks = [
        track
        for track in tracks
        if len(track.samples) >= enough and 2 * len(track.samples) > track.samples[-1] - track.samples[0]
    ]
    middle, at_once = np.array([width, height]) / 2, np.zeros(num_samples, np.int64)
    weights = []
    for track in tracks:
        away = np.linalg.norm(track.boxes[:, :2] - middle, axis=1) / np.linalg.norm(middle)
        weights.append((track.boxes[:, 2] * (1 - away / 2)).sum())
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
    """Return the box of a video's face in each frame.

    It is known from the track's first detection to its last, and on to the frame before the next sample or cut; in
    between it is interpolated, and smoothed.

    Args:
        frames: times in seconds, rising, and pictures. One is held at a time.
        detect: from `make_detector`.
        every_track: frames that the best track leaves out have the box of the best track that covers them: the same
            face after a cut, or another one.
    """
    times: list[float] = []
    samples: list[int] = []  # the frames that were searched, among them the first of each shot
    shots: list[int] = []
    faces: list[np.ndarray] = []
    shot, due, before, shape = -1, 0.0, None, None
    for time, frame in frames:
        now = thumbnail(frame)
        if before is None or frame.shape != shape or is_cut(before, now):
            shot, due = shot + 1, time
        if time >= due:
            samples.append(len(times))
            shots.append(shot)
            faces.append(detect(frame))
            due = time + DETECT_S
        times.append(time)
        before, shape = now, frame.shape
    seconds, boxes = np.array(times, np.float64), np.full((len(times), 4), np.nan)
    of_track = np.full(len(times), -1, np.int64)
    if shape is None:
        return Faces(seconds, boxes, of_track, 0, 0)
    tracks, at_once = rank_tracks(link_tracks(faces, np.array(shots)), len(samples), *shape[:2])
    for number, track in enumerate(tracks if every_track else tracks[:1]):
        known = np.array(samples)[track.samples]
        end = [*samples, len(times)][track.samples[-1] + 1]
        kept = np.arange(known[0], end)
        filled = [np.interp(seconds[kept], seconds[known], column) for column in track.boxes.T]
        smooth = smooth_boxes(np.stack(filled, axis=1), seconds[kept])
        free = of_track[kept] < 0
        boxes[kept[free]], of_track[kept[free]] = smooth[free], number
    return Faces(seconds, boxes, of_track, at_once, shot)


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
