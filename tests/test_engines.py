"""Peers beside torch's DataLoader give our clips too, each once in an epoch; those not installed are skipped."""

import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engines, loader_speed, storage
from benchmarks.engines import ALL_PEERS, ENGINES, STREAMING, Engine, interpreter, note_of, open_engine
from benchmarks.loader_speed import Results, best_peer
from benchmarks.peers import PEERS, Task, source_of
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.plan.transforms import IMAGENET_STD
from tests.conftest import ROOT

SIZE, T, BATCH = 40, 6, 4
# Largest difference, and mean of the worst clip, in steps of 255.
LINEAR, AREA = (14, 1.6), (6, 1.2)
VIDEO = (30, 3.6)  # OpenCV repeats the chroma of 2 x 2 pixels, where we interpolate, and does not antialias
# An interpreter of its own imports torch anew.
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if engine.home else [])
    for name, engine in ENGINES.items()
    if not name.endswith("-shards224")
]

IN_ITS_OWN = """
import sys
from pathlib import Path
import numpy as np
from tests.test_engines import first_pass
np.save(sys.argv[3], first_pass(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def packs(clips, tmp_path_factory) -> Path:
    folder = storage.prepare_frames(clips / "train.txt", None, 20, tmp_path_factory.mktemp("packs"))
    for source in ("shards144", "raw128", "video"):
        storage.prepare(folder, source)
    return folder


def task_of(folder: Path) -> Task:
    sampler = ClipSampler(0, T, augmentation=Augmentation(min_crop_area=0.3, colour=0.3))
    return Task(folder, sampler, BATCH, SIZE, 1, "cpu")


def first_pass(name: str, folder: Path) -> np.ndarray:
    """The clips of a peer's first epoch, (20, T, S, S, 3), in its own order."""
    batches = open_engine(name, task_of(folder))
    # Copied, as a batch is written to again.
    found = [batch.permute(0, 1, 3, 4, 2).numpy().copy() for batch in itertools.islice(batches, 20 // BATCH)]
    if hasattr(batches, "close"):
        batches.close()
    return np.concatenate(found)


def first_pass_of(name: str, folder: Path, out: Path) -> np.ndarray:
    if ENGINES[name].home is None:
        try:
            return first_pass(name, folder)
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
    try:
        python = interpreter(name)
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [python, "-c", IN_ITS_OWN, name, str(folder), str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return np.load(out)


def ours(folder: Path, source: str) -> np.ndarray:
    """Our loader's clips of the first epoch by video."""
    task = task_of(folder)
    loader = ClipLoader(load_index(task.list_of(source)), task.sampler, LoaderOptions(batch_size=BATCH, size=SIZE))
    found = {int(v): c for b in loader(0) for v, c in zip(b.ids, b.clips.permute(0, 1, 3, 4, 2).numpy(), strict=True)}
    return np.stack([found[video] for video in range(20)])


@pytest.mark.parametrize("name", CASES)
def test_every_peer_gives_our_clips(packs, name, tmp_path):
    want = ours(packs, source_of(name))
    found = first_pass_of(name, packs, tmp_path / "clips.npy")
    scale = 255 * IMAGENET_STD
    apart = np.array([[np.abs(clip - other).mean() * scale.mean() for other in want] for clip in found])
    videos = apart.argmin(axis=1)
    assert sorted(videos) == list(range(20))  # each once
    difference = np.abs(found - want[videos]) * scale
    largest, mean = AREA if "-area-" in name else VIDEO if name.endswith("-video") else LINEAR
    assert difference.max() <= largest and difference.mean(axis=(1, 2, 3, 4)).max() <= mean
    apart[np.arange(20), videos] = np.inf
    assert apart.min() > 3 * mean  # so the bounds tell clips apart
    assert np.abs(found - want[videos][:, :, :, ::-1]).mean() * scale.mean() > 3 * mean  # and mirrors


def test_shards_of_either_size_are_read_by_the_same_code():
    assert ENGINES["threads-shards224"] == ENGINES["threads-shards144"]


def test_threads_begin_so_many_batches_and_no_more(packs, monkeypatch):
    made = []
    monkeypatch.setattr(engines, "clip_maker", lambda *_: lambda key, out: (made.append(key), out.fill(key[1])))
    task = task_of(packs)
    batches = engines.threads(task, "raw128")
    order = task.sampler.plan(0, task.index.num_frames).order.tolist()
    held = next(batches)
    assert held[:, 0, 0, 0, 0].tolist() == order[:BATCH]
    next(batches)
    assert len(made) <= (2 + engines.AHEAD) * BATCH
    batches.close()


def test_a_peer_with_pins_of_its_own_has_its_own_interpreter(tmp_path, monkeypatch):
    assert interpreter("pil-frames") == interpreter("spdl-frames") == interpreter("dfer-frames")
    monkeypatch.setitem(ENGINES, "streaming-raw128", Engine(engines.streaming, home=tmp_path / ".venv-x"))
    with pytest.raises(ValueError, match=r"^not installed: \.venv-x is missing: make bench-peers$"):
        interpreter("streaming-raw128")
    python = tmp_path / ".venv-x" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert interpreter("streaming-raw128") == str(python)
    assert STREAMING.name == ".venv-streaming" in (ROOT / "Makefile").read_text().split()


def test_ratios_are_quoted_to_the_best_peer_of_a_source():
    speeds = {
        "pil-frames": [1, 1, 9],
        "spdl-frames": [4, 6, 6],
        "threads-frames": [5, 5, 9],
        "threads-raw128": [50] * 3,
    }
    results = Results({name: [{"clips_per_s": x} for x in values] for name, values in speeds.items()}, {})
    assert best_peer(results, "frames") == "spdl-frames"  # by medians, not by the best run
    assert best_peer(results, "raw128") == "threads-raw128" and best_peer(results, "video") is None


def test_what_a_peer_does_less_is_said():
    assert not PEERS.keys() & ENGINES.keys() and len(ALL_PEERS) == len(PEERS) + len(ENGINES)
    less = {name for name in ALL_PEERS if "no antialias" in note_of(name)}
    assert {"cv2-frames", "webdataset-shards144", "threads-frames", "litdata-raw128"} <= less
    assert not {"pil-frames", "torchvision-frames", "numpy-raw128", "threads-area-frames"} & less and not note_of(
        "dfer-raw128"
    )
    assert {name for name in ALL_PEERS if "whole videos" in note_of(name)} == {
        f"{library}-{source}" for library in ("litdata", "streaming") for source in ("shards144", "raw128")
    }


def test_a_copy_that_stays_in_memory_is_not_measured_cold():
    args = loader_speed.parse(["--cold"])
    for design in ("litdata-raw128", "streaming-shards144"):
        with pytest.raises(ValueError, match=r"which --cold does not drop from memory$"):
            loader_speed.run_child(args, loader_speed.Case(design, design, Path(), {}))
