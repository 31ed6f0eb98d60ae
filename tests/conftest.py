"""Shared fixtures: a tiny set of real JPEG clips, and the rule for tests that need a GPU."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.nursery import Nursery

ROOT = Path(__file__).resolve().parents[1]
YUNET = ROOT.parent / "shared" / "yunet" / "yunet_n_640.onnx"
# Tests take nothing from the network, nor from a cache: the detector is the one that OpenCV brings, unless a test says.
os.environ["DFER_YUNET"] = "haar"
TORCHRUN = ("-m", "torch.distributed.run")

# cuBLAS reads it when it is first called, which may be in a test before one of fixed algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Under nohup, and behind a shell's &, these are ignored, and tests of commands that stop on them would wait for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small models and products only wait for a second thread, for ever where other tests run beside.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("REQUIRE_GPU"):
        return  # REQUIRE_GPU=1: without a GPU the tests fail, so that a skip cannot hide
    for item in items:
        if item.get_closest_marker("gpu"):  # not a keyword: those are also the names of folders
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU (REQUIRE_GPU=1 makes this a failure)"))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Have all fail that waits for the GPU. What is to run has to have run before, as the first time loads kernels."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, torch says, which may not see each
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:  # or all tests behind it would fail
        torch.cuda.set_sync_debug_mode("default")


def smooth_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A random image without pixel noise, so that JPEG and resize tolerances mean something."""
    coarse = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    make_clips(root)
    return root


def make_clips(root: Path) -> None:
    """Fill a folder: train.txt (20 clips) and test.txt (9 clips), 3..24 frames, several sizes, all seven labels."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("test", 9)):
        rows = []
        for i in range(count):
            folder = root / f"{name} clips" / f"{i:03d}"
            folder.mkdir(parents=True)
            num_frames = int(rng.integers(3, 25))
            height, width = (int(x) for x in rng.integers(60, 130, 2))
            for frame in range(num_frames):
                smooth_image(rng, height, width).save(folder / f"{frame + 1}.jpg", quality=92)
            rows.append(f"{name} clips/{i:03d} {num_frames} {i % 7}")
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")


@functools.cache
def nursery() -> Nursery:
    """This test process's own, started when it is first needed."""
    return Nursery()


def run_python(*args: str, timeout: float = 120, fresh: bool | None = None, **env: str) -> subprocess.CompletedProcess:
    """Run Python as a user would: scripts and torchrun in a fork of a process that has their libraries, `-c` afresh.

    `fresh` says otherwise.
    """
    # One thread each: several tests run at once, and threads that wait for each other wait long then.
    env = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **env}
    if fresh is None:
        fresh = not (args[0].endswith(".py") or args[:2] == TORCHRUN) or "PYTHONIOENCODING" in env
    if not fresh:
        return nursery().run(list(args), env, timeout)
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=env)
