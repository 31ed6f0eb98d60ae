"""Where shots begin, on drawn scenes: cuts, dissolves, and what is neither."""

import importlib.metadata
import sys
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pytest

from dfer.cli import UserError
from dfer.video.shots import ShotDetector
from tests.drawn_scenes import Actor, dissolve, grain, play, room

COUNT = 40


def starts(frames: Sequence[np.ndarray], fps: float = 25) -> list[int]:
    shots = ShotDetector()
    for number, frame in enumerate(frames):
        shots.add(number / fps, frame)
    return shots.starts().tolist()


def scene(seed: int, identity: int, x: float = 0.8, count: int = COUNT) -> list[np.ndarray]:
    """A person who moves a little in a room."""
    return list(play(room(seed), [Actor(identity, (x, 0.5), (x + 0.2, 0.5), (0.7, 0.75))], count))


FIRST, SECOND = scene(1, 0), scene(2, 1)


def dark(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [(0.1 * frame).astype(np.uint8) for frame in frames]


def flash(frames: Sequence[np.ndarray], length: int, first: int = 20) -> list[np.ndarray]:
    lit = [np.clip(1.6 * frame + 70.0, 0, 255).astype(np.uint8) for frame in frames[first : first + length]]
    return [*frames[:first], *lit, *frames[first + length :]]


@pytest.mark.parametrize("noise", [0, 4])
@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: FIRST + SECOND, [40]),
        (lambda: FIRST + scene(1, 1, 0.9), [40]),  # another person in the same room
        (lambda: FIRST + scene(1, 3, 1.0), [40]),  # and in the same place
        (lambda: FIRST[:20] + SECOND[:8] + scene(5, 2)[:20], [20, 28]),
        (lambda: FIRST + SECOND[:2], [40]),  # two frames too many, as videos have that were cut from others
        (lambda: flash(FIRST, 2) + SECOND, [40]),
    ],
    ids=["other room", "same room", "same place", "short", "at the end", "after a flash"],
)
def test_hard_cuts(make: Callable[[], list[np.ndarray]], want: list[int], noise: int) -> None:
    assert starts(grain(make(), strength=noise) if noise else make()) == want


def test_hard_cuts_in_the_dark() -> None:
    for noise in (0.01, 2):
        assert starts(grain(dark(FIRST + SECOND), strength=noise)) == [40]
    assert starts(dark(FIRST + scene(1, 1, 0.9))) == [40]


@pytest.mark.parametrize("length", [12, 25, 50])
def test_a_dissolve_is_one_cut_where_it_is_half_over(length: int) -> None:
    before, after = scene(1, 0, count=80), scene(2, 1, count=80)
    (found,) = starts(grain(dissolve(before, after, length)))
    assert abs(found - (80 - length / 2)) <= max(3, length / 4)


def shaken(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.roll(frame, rng.integers(-2, 3, 2), (0, 1)) for frame in frames]


def waved(frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A hand goes across the picture."""
    frames = [frame.copy() for frame in frames]
    for number, frame in enumerate(frames):
        cv2.rectangle(frame, (5 * number - 30, 30), (5 * number, 90), (200, 160, 140), -1)
    return frames


@pytest.mark.parametrize(
    "make",
    [
        lambda: FIRST,
        *(lambda length=length: flash(FIRST, length) for length in (1, 2, 3, 4)),
        lambda: [(0.5 * frame).astype(np.uint8) for frame in FIRST[:20]] + FIRST[20:],  # a lamp
        lambda: [np.roll(frame, 2 * number, 1) for number, frame in enumerate(FIRST)],
        lambda: [np.roll(frame, 5 * number, 1) for number, frame in enumerate(FIRST)],
        lambda: shaken(FIRST),
        lambda: waved(FIRST),
        lambda: scene(4, 0, 0.4, 14)[::3],
        lambda: [FIRST[0]] * 40,
        list,
        lambda: FIRST[:1],
    ],
    ids=[
        *("one shot", "flash 1", "flash 2", "flash 3", "flash 4", "lamp", "pan", "fast pan", "shake", "hand", "fast"),
        *("still", "empty", "one frame"),
    ],
)
def test_no_cuts(make: Callable[[], list[np.ndarray]]) -> None:
    frames = make()
    assert starts(frames) == []
    assert starts(grain(frames)) == []


def test_a_picture_of_another_shape_is_another_shot() -> None:
    assert starts([*FIRST[:9], *(frame[:50] for frame in FIRST[9:])]) == [9]


def test_one_opencv_is_installed() -> None:
    """opencv-python and opencv-python-headless write into one folder: the later one wins, file by file."""
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    assert {name for name in names if "opencv" in name.lower()} == {"opencv-python-headless"}


def test_a_package_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(UserError, match=r"finds cuts in videos, is not there \(.*\): pip install scenedetect-headless"):
        ShotDetector()
