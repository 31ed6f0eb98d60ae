"""A trained model on people who begin to smile and stop: what it says rises and falls when they do."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dfer.lists.annotations import DRAWN, EMOTIONS, read_annotations, write_annotations
from scripts import make_faces as mf
from scripts import predict as pr
from tests.conftest import YUNET, run_python
from tests.drawn_scenes import room
from tests.test_prepare_videos import write_video

FPS, SECONDS, RISE_S = 25, 4.0, 0.3
TIMES = np.arange(round(FPS * SECONDS)) / FPS
HAPPY, NEUTRAL = EMOTIONS.index("Happy"), EMOTIONS.index("Neutral")


def smile(between: tuple[float, float], turned: bool) -> np.ndarray:
    """How much of a smile there is at each time: all of it between two times, half of it at them; or the other way."""
    start, end = between
    share = np.clip((TIMES - start) / RISE_S + 0.5, 0, 1) * np.clip((end - TIMES) / RISE_S + 0.5, 0, 1)
    return 1 - share if turned else share


def acted(identity: int, share: np.ndarray) -> list[np.ndarray]:
    """A drawn person who smiles so much, (224, 224, 3) RGB each."""
    apex, count = mf.apex_script(7, identity, HAPPY), len(share)
    aus = share[:, None] * apex.aus + (1 - share[:, None]) * apex.identity.rest
    still = {
        "pose": np.repeat(apex.pose, count, 0),
        "gain": np.ones(count),
        "noise_at": np.repeat(apex.noise_at, count, 0),
    }
    return [frame[:, :, ::-1] for frame in mf.frames(replace(apex, aus=aus, **still))]


def crossings(course: np.ndarray) -> list[float]:
    """When it passes the middle between its lowest and its highest, at its first and its last passage."""
    above = course > (course.min() + course.max()) / 2
    changes = np.flatnonzero(np.diff(above)) + 1
    return [float(TIMES[changes[0]]), float(TIMES[changes[-1]])]


def two_people(path: Path, between: tuple[float, float], others: tuple[float, float]) -> Path:
    """One smiles in between, the other one stops smiling in between; side by side before a wall."""
    frames = []
    people = acted(3, smile(between, False)), acted(8, smile(others, True))
    for left, right in zip(*people, strict=True):
        frame = room(3, 256, 560).copy()
        frame[16:240, 30:254], frame[16:240, 306:530] = left, right
        frames.append(frame)
    return write_video(path, frames)


@pytest.mark.slow
@pytest.mark.skipif(not YUNET.is_file(), reason="YuNet's weights are not beside this checkout")
def test_a_smile_is_seen_when_it_comes_and_goes(tmp_path: Path) -> None:
    """Within half a second of the truth, for two faces that do different things; trains for four minutes."""
    faces = tmp_path / "faces"
    assert mf.main(["--out", str(faces)]) == 0
    lists = []
    for part, name in (("train", "train"), ("val", "test")):
        kept = [(r.name, r.num_frames, r.label) for r in read_annotations(faces / f"{name}.txt")]
        write_annotations(faces / f"two_{name}.txt", [row for row in kept if row[2] in (HAPPY, NEUTRAL)], faces=DRAWN)
        lists += [f"--data.{part}-list", str(faces / f"two_{name}.txt")]
    logs = ("--run.log-dir", str(tmp_path / "logs"), "--run.name", "two", "--run.wandb", "off", "--run.device", "cpu")
    # Input and T of the preset on a CPU, also where there is a GPU.
    small = ("--data.size", "48", "--data.num-segments", "8", "--model.dim", "64", "--optim.epochs", "6")
    done = run_python("train.py", "faces", *lists, *small, *logs, "--optim.warmup-epochs", "1", timeout=3600)
    assert done.returncode == 0, done.stderr
    assert_course(tmp_path / "logs" / "two", tmp_path)


def assert_course(run: Path, folder: Path) -> None:
    truths = (1.3, 2.7), (1.0, 3.0)
    video = two_people(folder / "two.mp4", *truths)
    arguments = [str(video), "--checkpoint", str(run), "--out", str(folder / "out"), "--annotate", "none"]
    assert pr.main([*arguments, "--detector", str(YUNET), "--device", "cpu"]) == 0
    with open(folder / "out" / "two.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for middle, truth, sign in ((142, truths[0], 1), (418, truths[1], -1)):
        own = [row for row in rows if abs(float(row["box_x"]) - middle) < 60]
        assert len({row["face"] for row in own}) == 1 and len(own) == len(TIMES)
        course = np.array([float(row["p_Happy"]) - float(row["p_Neutral"]) for row in own]) * sign
        print(f"true: {truth}; predicted: {crossings(course)}, over a range of {np.ptp(course):.2f}")
        assert np.ptp(course) > 0.8
        assert crossings(course) == pytest.approx(truth, abs=0.5)
