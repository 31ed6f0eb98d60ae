"""The ceiling of videos decodes what is needed and no more, and what is measured beside it makes the same clips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import video_cost
from benchmarks.peers import Task
from benchmarks.video_cost import CEILING, OURS, decode_needed, measure, ways
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.plan.sampling import ClipSampler
from dfer.plan.transforms import IMAGENET_STD
from tests.test_video import B_FRAMES, F, write


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("videos")
    rows = [f"{write(folder / f'{i}.mp4', options=B_FRAMES).name} {F} {i}" for i in range(2)]
    (folder / "list.txt").write_text("\n".join(rows) + "\n")
    return Task(folder, ClipSampler(0, 3), 1, 32, 1, "cpu", "list")


def test_the_ceiling_decodes_what_is_needed(task):
    """With three B-frames in a row each fourth frame, and those that are wanted; nothing behind the last one."""
    index = task.index
    pts = index.store.pts[:F]
    wanted = pts[[5, 6, 21]].tolist()
    found = decode_needed(index.records[0].path, set(wanted))
    assert set(wanted) <= set(found) and len(set(found)) == len(found) < 14 and max(found) <= pts[28]
    assert len(decode_needed(index.records[0].path, set(pts.tolist()))) == F


def test_the_same_clips(task):
    work, missing = ways(task)
    assert {CEILING, OURS, "OpenCV", "PyAV"} <= work.keys()
    assert {"torchcodec", "decord"} <= work.keys() | missing.keys() and all(missing.values())
    loader = ClipLoader(task.index, task.sampler, LoaderOptions(2, task.size))
    (batch,) = loader(0)
    steps = torch.tensor(255 * IMAGENET_STD).float()
    for clip, video in zip(batch.clips.permute(0, 1, 3, 4, 2), batch.ids.tolist(), strict=True):
        assert np.array_equal(work[OURS](video), clip)
        for name in work.keys() & video_cost.READERS.keys():
            # Without antialias, and with its own chroma: near, but far from another frame's.
            apart = (torch.as_tensor(work[name](video)) - clip).abs() * steps
            assert apart.mean() < 8 < ((clip - clip.flip(0)).abs() * steps).mean(), name


def test_each_is_measured_in_turn_and_the_first_round_is_left_out(capsys, task):
    called: list[tuple[str, int]] = []
    work = {name: lambda video, name=name: called.append((name, video)) for name in "ab"}
    spent = measure(work, 2, 3)
    assert [len(values) for values in spent.values()] == [3, 3]
    assert "".join(name for name, _ in called) == "aabbbbaaaabbbbaa" and [v for _, v in called] == [0, 1] * 8
    arguments = ["--clips", "1", "--rounds", "1", "--frames", "3", "--size", "32"]
    assert video_cost.main([str(Path(task.folder) / "list.txt"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "dfer, decoding alone" in out and "OpenCV" in out and "FFmpeg, whole" in out
