"""Small lists of drawn clips, each for one fault of a model, as train.py takes them.

order       grey clips of two frames at low intensity, [onset, apex] (class 0) against [apex, onset] (class 1): a model
            that sees which frames there are, and not their order, can only guess.
identity    people whose resting face looks like one expression and who show another: a still frame misleads.
two-frames  plain clips of 24 to 64 frames, to train on at T = 2 (`--budget pair`) and to evaluate at more.

Faces of the training list are on no test list.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dfer.lists.annotations import EMOTIONS, write_annotations
from scripts.make_faces import COLUMN, EMOTION_AUS, NEUTRAL, NORMAL, PLAIN, SPLIT_IDENTITIES, frames, philox, plan_clip

SIZE = 64  # px of the frames that are written
STILL = replace(NORMAL, turning=0.0, talking=0.0, flashing=0.0, occluded=0.0, drift=0.0)
MISLEADING = replace(STILL, looks=0.7)
Clip = tuple[list[np.ndarray], int]  # frames (S, S) or (S, S, 3) BGR, label


class Sizes(NamedTuple):
    train: int
    test: int


def _order_clip(seed: int, number: int, people: range) -> Clip:
    """Draw a face at rest and with an expression at 30 to 50 %, in the order that the label says."""
    label = number % 2
    rng = philox(seed, 2**52 + number)
    emotion = int(rng.choice([e for e in range(len(EMOTIONS)) if e != NEUTRAL]))
    script = plan_clip(seed, 2**35 + number, emotion, people, replace(STILL, looks=0.0))
    apex = [EMOTION_AUS[emotion].get(au, 0.0) * rng.uniform(0.3, 0.5) for au in COLUMN]
    aus = np.stack([script.identity.rest, np.maximum(script.identity.rest, apex)])
    two = {name: getattr(script, name)[:2] for name in ("pose", "gain", "noise_at")}
    drawn = list(frames(replace(script, aus=aus, occluder=np.zeros((0, 2)), blur=1, **two)))
    grey = [cv2.cvtColor(_small(frame), cv2.COLOR_BGR2GRAY) for frame in drawn]
    return grey[:: 1 if label == 0 else -1], label


def _identity_clip(seed: int, number: int, people: range) -> Clip:
    label = number % len(EMOTIONS)
    return [_small(f) for f in frames(plan_clip(seed, 2**36 + number, label, people, MISLEADING))], label


def _long_clip(seed: int, number: int, people: range) -> Clip:
    label = number % len(EMOTIONS)
    script = plan_clip(seed, 2**37 + number, label, people, STILL)
    assert script.start == PLAIN
    return [_small(frame) for frame in frames(script)], label


FAULTS: dict[str, tuple[Callable[[int, int, range], Clip], Sizes]] = {
    "order": (_order_clip, Sizes(400, 120)),
    "identity": (_identity_clip, Sizes(400, 210)),
    "two-frames": (_long_clip, Sizes(400, 210)),
}


def clips_of(fault: str, split: str, count: int, seed: int = 0) -> Iterator[Clip]:
    """Yield the clips of a list: functions of the seed and their number."""
    draw = FAULTS[fault][0]
    first = 0 if split == "train" else 10**6
    for number in range(first, first + count):
        yield draw(seed, number, SPLIT_IDENTITIES[split])


def write_fault_lists(fault: str, out: Path, sizes: Sizes | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Write train.txt and test.txt of a fault and their frames below `out`, and return the lists' paths."""
    counts = (sizes or FAULTS[fault][1])._asdict()
    for split in ("train", "test"):
        rows = []
        for number, (images, label) in enumerate(clips_of(fault, split, counts[split], seed), start=1):
            folder = out / split / f"{number:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            for frame, image in enumerate(images, start=1):
                (folder / f"{frame:05d}.jpg").write_bytes(cv2.imencode(".jpg", image)[1])
            rows.append((f"{split}/{number:05d}", len(images), label))
        write_annotations(out / f"{split}.txt", rows)  # the test list is the last thing that is written
    return out / "train.txt", out / "test.txt"


def _small(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
