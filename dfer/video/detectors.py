"""Face detectors: YuNet, whose weights are fetched once, and OpenCV's own Haar cascade, which sees frontal faces only.

A detector is a function from a frame, (H, W, 3) uint8 RGB, to the boxes of its faces as in dfer/video/faces.py, in an
order that does not depend on threads.
"""

import argparse
import hashlib
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from dfer.cli import UserError, say_once
from dfer.files import hash_file, reason, write_whole

# The file of the authors, "Licensed under the Apache License, Version 2.0"; opencv_zoo has a smaller sibling.
YUNET_URL = (
    "https://raw.githubusercontent.com/ShiqiYu/libfacedetection.train/0047ac24afb1a50a0c6105001c89d1b5b805dbf1/"
    "onnx/yunet_n_640_640.onnx"
)
YUNET_SHA256 = "25a606a145a5b6d7271ae138fbd00eba91dad8b83222ae3f2c7ecd0f4a7b0e31"
VARIABLE = "DFER_YUNET"
HAAR, YUNET = Path("haar"), Path("yunet")  # words for --detector
PATIENCE_S = 10  # for each answer of the server

DETECT_LONG_SIDE = 480  # px; in so small a picture a face is found as well, and 2 to 10 times faster
MIN_FACE = 0.1  # smallest face that Haar is asked for, of the picture's shorter side
HAAR_NEIGHBOURS = 8  # OpenCV's usual 3 finds faces in foliage and folds
YUNET_SCORE = 0.8

Detector = Callable[[UInt8[np.ndarray, "H W 3"]], Float64[np.ndarray, "K 4"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --detector, for `find_weights`, and --no-level, for `make_detector`."""
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FILE",
        help="YuNet's .onnx file; or `yunet`, which is fetched once, or `haar`, which sees frontal faces only and "
        f"knows no eyes (default: the file or word in {VARIABLE}, else yunet, or haar where it cannot be fetched)",
    )
    parser.add_argument(
        "--no-level", action="store_true", help="crop upright squares (default: turned, so that the eyes are level)"
    )


def find_weights(given: Path | None) -> Path | None:
    """Return where YuNet's weights lie, fetched into the cache folder if they are nowhere; None for Haar.

    A line on stderr says that they are fetched, and another if they cannot be and Haar takes their place.

    Args:
        given: a file, or one of the words `yunet` and `haar`. None: what the environment says, else what can be had.

    Raises:
        UserError: if `yunet` was asked for and cannot be had.
    """
    asked = named(given)
    if asked is not None and asked not in (HAAR, YUNET):
        return asked
    if asked == HAAR:
        return None
    path = cache_folder() / "yunet_n_640_640.onnx"
    try:
        if not path.is_file() or hash_file(path) != YUNET_SHA256:
            # First: a server that does not answer is waited for.
            say_once(f"fetching YuNet's weights (0.3 MB, Apache-2.0), once, from {YUNET_URL} to {path}")
            _fetch(path)
    except (OSError, ValueError) as error:  # ValueError: of addresses and proxies
        remedy = f"put {YUNET_URL} there as {path}, or name a copy with --detector or {VARIABLE}"
        if asked is not None:
            raise UserError(f"YuNet's weights cannot be fetched ({reason(error)}): {remedy}") from None
        say_once(
            f"YuNet's weights cannot be fetched ({reason(error)}): OpenCV's Haar cascade looks for faces instead, "
            f"which sees frontal ones only; {remedy}"
        )
        return None
    return path


def named(given: Path | None) -> Path | None:
    """Return the file or word that was given, or else stands in the environment."""
    return given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)


def cache_folder() -> Path:
    """Return the folder for what is fetched once, which may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfer"


def _fetch(path: Path) -> None:
    """Download YuNet's weights.

    Raises:
        OSError, ValueError: if they cannot be had or written, or are not those that are known.
    """
    with urllib.request.urlopen(YUNET_URL, timeout=PATIENCE_S) as answer:
        content = answer.read(10**7)
    if hashlib.sha256(content).hexdigest() != YUNET_SHA256:
        raise ValueError(f"another file came than expected, of {len(content):,} bytes")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def make_detector(weights: Path | None = None, level: bool = True) -> Detector:
    """Return a detector.

    Args:
        weights: an .onnx file of YuNet; None is OpenCV's own Haar cascade for frontal faces, which knows no eyes.
        level: have boxes say how the eyes are tilted; else the tilt is 0.

    Raises:
        UserError: if the file cannot be used, or this OpenCV has no Haar cascade.
    """
    cv2.setNumThreads(1)  # the processes are the parallelism
    find = _haar() if weights is None else _yunet(weights)

    def detect(frame: UInt8[np.ndarray, "H W 3"]) -> Float64[np.ndarray, "K 4"]:
        scale = min(1.0, DETECT_LONG_SIDE / max(frame.shape))
        height, width = (max(1, round(scale * side)) for side in frame.shape[:2])
        small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else frame
        boxes = find(small) * (frame.shape[1] / width, frame.shape[0] / height, frame.shape[1] / width, int(level))
        return boxes[np.lexsort(boxes.T)]

    return detect


def _haar() -> Detector:
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

    return find


def _yunet(weights: Path) -> Detector:
    # The file may hold anything. OpenCV takes it by its suffix, and logs at length before it raises.
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        net = cv2.FaceDetectorYN.create(str(weights), "", (64, 64), YUNET_SCORE)
        net.detect(np.zeros((64, 64, 3), np.uint8))
    except (cv2.error, SystemError):
        raise UserError(f"{weights}: not a YuNet model that OpenCV {cv2.__version__} can use") from None
    finally:
        cv2.utils.logging.setLogLevel(level)

    def find(small: UInt8[np.ndarray, "h w 3"]) -> Float64[np.ndarray, "K 4"]:
        net.setInputSize(small.shape[1::-1])
        _, found = net.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        return yunet_boxes(np.zeros((0, 15)) if found is None else np.asarray(found, np.float64))

    return find


def yunet_boxes(found: Float64[np.ndarray, "K 15"]) -> Float64[np.ndarray, "K 4"]:
    """Return boxes from YuNet's rows: x, y, width, height, x and y of five landmarks (the eyes first), the score."""
    x, y, width, height, x_left, y_left, x_right, y_right = found.T[:8]  # left as one sees it
    tilt = np.arctan2(y_right - y_left, x_right - x_left)
    return np.stack([x + width / 2, y + height / 2, np.maximum(width, height), tilt], axis=1)
