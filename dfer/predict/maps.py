"""Where in the face emotions lie, in the clip of a video where the likeliest emotion is surest."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dfer.predict.inputs import read_pictures
from dfer.predict.predictor import CROP_SIZE, Predictor, VideoPrediction, face_picture
from dfer.predict.timeline import place_windows
from dfer.video.decode import BadVideo


class MappedClip(NamedTuple):
    first: int  # frame of the window that the clip is of
    end: int  # frame after the window's last
    emotions: tuple[int, int]  # the likeliest of the whole video, and the next
    pictures: UInt8[np.ndarray, "T S S 3"]
    maps: Float[np.ndarray, "T K h w"]  # the CRF's marginals
    cell: int  # px of the pictures from a cell of the maps to the next


def map_emotions(path: Path, prediction: VideoPrediction, predictor: Predictor) -> MappedClip:
    """Return the maps of the clip where the video's likeliest emotion is surest, by the first of several models.

    Raises:
        UserError: if the model has no maps.
        BadVideo, av.FFmpegError, OSError: as `read_pictures`.
    """
    model = predictor.models[0]
    emotion, other = np.argsort(-np.nanmean(prediction.probabilities, axis=0))[:2].tolist()
    first, end = surest_window(prediction, emotion)
    frames = (model.sampler.plan(0, np.array([end - first])).frames[0] + first).tolist()
    faces = {}
    for number, (_, image) in enumerate(read_pictures(path, predictor.fps)):
        if number in frames:
            faces[number] = face_picture(image, prediction.boxes, number)
        if number == frames[-1]:
            break
    if len(faces) < len(set(frames)):
        raise BadVideo("it changed while it was read")
    maps = model.maps([model.prepare(faces[number]) for number in frames])
    scale = max(CROP_SIZE // model.config.data.size, 1)
    side = scale * model.config.data.size
    squares = [np.asarray(Image.fromarray(faces[number]).resize((side, side))) for number in frames]
    return MappedClip(first, end, (emotion, other), np.stack(squares), maps, scale * model.cell)


def surest_window(prediction: VideoPrediction, emotion: int) -> tuple[int, int]:
    """Return the window in whose frames the emotion is likeliest on average: first frame, and frame after the last."""
    windows = place_windows(prediction.track, prediction.window, prediction.stride)
    means = [prediction.probabilities[first:end, emotion].mean() for first, end in windows]
    first, end = windows[int(np.argmax(means))]
    return int(first), int(end)
