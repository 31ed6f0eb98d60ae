"""What the demo shows where it is given nothing: the newest run or one that is trained for it, and drawn examples."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np

from dfer.__main__ import commands
from dfer.cli import UserError, printable
from dfer.run.continuing import newest_first
from dfer.video.decode import decode
from dfer.video.faces import Detector, find_face

LOGS = Path("logs")  # where train.py puts runs
DRAWN_DATA = Path("data/faces-demo")  # and not data/faces, where `make train` expects all of the data set


def own_checkpoint() -> Path:
    """Return the newest run in logs/; if there is none, draw the embedded data set and train the preset debug on it.

    Raises:
        UserError: if that cannot be.
    """
    for folder in newest_first(LOGS):
        print(f"demo: no --checkpoint: the newest run, {printable(folder)}", flush=True)
        return folder
    print(
        "demo: no --checkpoint, and no run in logs/: one is trained, by the preset debug, in a minute or so", flush=True
    )
    start(commands()["make-faces"], "--out", str(DRAWN_DATA), "--size", "0.05")
    lists = ("--data.train-list", str(DRAWN_DATA / "train.txt"), "--data.val-list", str(DRAWN_DATA / "test.txt"))
    start(commands()["train"], "debug", *lists, "--run.log-dir", str(LOGS))
    return newest_first(LOGS)[0]


def own_examples(folder: Path, detect: Detector | None) -> list[Path]:
    """Return up to three videos of drawn faces that the detector sees, which are made in a folder."""
    start(commands()["make-faces"], "--out", str(folder), "--size", "0.005", "--video", "h264", "--seed", "5")
    videos = sorted(folder.glob("videos_h264/*.mp4"))
    return list(itertools.islice((video for video in videos if detect is None or _sees(detect, video)), 3))


def _sees(detect: Detector, video: Path) -> bool:
    frames = ((time, np.asarray(image)) for time, image in decode(video))
    return bool((find_face(frames, detect, every_track=True).track >= 0).mean() > 0.9)


def start(file: Path, *words: str) -> None:
    """Run a command of the project by its file.

    Raises:
        UserError: if it fails.
    """
    if code := subprocess.run([sys.executable, str(file), *words], check=False).returncode:
        raise UserError(f"{file.name} ended with exit code {code}; give a run of your own: --checkpoint RUN")
