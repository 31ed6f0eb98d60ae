"""The benchmark: its peers give our loader's clips, so the comparison is fair, and its figures are what it says."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import busy, loader_speed, peers, quiet, storage
from benchmarks.loader_speed import Results, main
from benchmarks.peers import PEERS, Clips, Cuts, Order, Task, encoded_clips, raw_clips, tar_keys
from dali_pipes import kernels
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.annotations import read_annotations
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.plan.transforms import IMAGENET_STD

SIZE, T = 40, 6
TINY = ["--frames", "4", "--size", "32", "--batch-size", "4", "--threads", "1", "--warmup", "1", "--seconds", "0.05"]


def task_of(clips, colour: float = 0.0) -> Task:
    sampler = ClipSampler(0, T, augmentation=Augmentation(min_crop_area=0.3, colour=colour))
    return Task(clips, sampler, 4, SIZE, 1, "cpu", stem="train")


def ours(task: Task, epoch: int) -> dict[int, np.ndarray]:
    """Our loader's clips by video, (T, S, S, 3)."""
    loader = ClipLoader(load_index(task.list_of("frames")), task.sampler, LoaderOptions(batch_size=4, size=SIZE))
    batches = list(loader(epoch))
    return {int(v): c.permute(0, 2, 3, 1).numpy() for b in batches for v, c in zip(b.ids, b.clips, strict=True)}


def dataset(task: Task, name: str) -> Clips:
    open_source, tail = PEERS[name]
    return Clips(task, open_source(task, task.folder), tail)


# Largest and mean difference of a clip in steps of 255. Pillow and torch round after each of two passes, each a mean of
# 0.25 off; ours never does.
@pytest.mark.parametrize(
    ("name", "largest", "mean"),
    [("pil-frames", 4, 0.4), ("torchvision-frames", 4, 0.4), ("cv2-frames", 8, 1.2)],  # cv2 does not antialias
)
def test_peers_give_our_clips(clips, name, largest, mean):
    task = task_of(clips)
    peer, want = dataset(task, name), ours(task, epoch=1)
    assert len(want) == 20
    for video, clip in want.items():
        difference = np.abs(peer[1, video].numpy() - clip) * 255 * IMAGENET_STD
        assert difference.shape == (T, SIZE, SIZE, 3)
        assert difference.max() <= largest and difference.mean() <= mean
        # The bounds tell clips apart: another mirror, crop or frame is beyond them.
        for other in (peer[1, video].numpy()[:, :, ::-1], peer[2, video].numpy()):
            assert np.abs(other - clip).mean() * 255 * IMAGENET_STD.mean() > 10 * mean


def test_the_cv2_tail_has_our_colours(clips):
    task = task_of(clips, colour=0.4)
    peer = dataset(task, "cv2-frames")
    plain = dataset(task_of(clips), "cv2-frames")
    for video, clip in ours(task, epoch=1).items():
        assert np.abs(peer[1, video].numpy() - clip).mean() < 0.04
        assert np.abs(plain[1, video].numpy() - clip).mean() > 0.04


def test_peers_run_through_epoch_after_epoch(clips):
    task = dataclasses.replace(task_of(clips), batch_size=6)
    batches = iter(Order(task))
    for epoch in range(3):
        keys = [key for _ in range(3) for key in next(batches)]  # of 20 clips two are dropped, as in our loader
        assert {e for e, _ in keys} == {epoch}
        assert [v for _, v in keys] == task.sampler.plan(epoch, task.index.num_frames).order.tolist()[:18]


def test_colours_are_drawn_with_our_strength(clips):
    cuts = Cuts(task_of(clips, colour=0.3))
    factors = np.array([cuts.cut(epoch, video).factors for epoch in range(5) for video in range(20)])
    assert factors.min() >= 0.7 and factors.max() <= 1.3 and np.ptp(factors, axis=0).min() > 0.5


def test_packs_are_read_as_they_were_written(clips, tmp_path):
    folder = storage.prepare_frames(clips / "test.txt", None, 5, tmp_path)
    for source in ("shards224", "raw128"):
        storage.prepare(folder, source)
        made = (folder / source / "frames.txt").stat().st_mtime_ns
        storage.prepare(folder, source)  # is there already
        assert (folder / source / "frames.txt").stat().st_mtime_ns == made
    task = Task(folder, ClipSampler(0, T), 1, SIZE, 1, "cpu")
    assert len(task.index) == 5
    raw, verbatim = raw_clips(task, folder / "raw128"), encoded_clips(task, "shards224")
    assert verbatim == encoded_clips(task, "frames")
    for video, count in enumerate(task.index.num_frames.tolist()):
        assert raw[video].shape == (count, 128, 128, 3)
        for frame in range(count):
            with Image.open(task.index.frame_path(video, frame)) as image:
                want = np.asarray(image.convert("RGB").resize((128, 128)), dtype=float)
            assert np.abs(raw[video][frame] - want).mean() < 3  # another way to resize
    assert sorted(tar_keys(task, folder / "shards224").values()) == list(range(5))


def test_videos_hold_the_frames_in_order(clips, tmp_path):
    folder = storage.prepare_frames(clips / "train.txt", None, 3, tmp_path)
    storage.prepare(folder, "video")
    task = Task(folder, ClipSampler(0, T), 1, SIZE, 1, "cpu")
    rows = read_annotations(folder / "video" / "frames.txt")
    assert [(r.num_frames, r.label) for r in rows] == [
        (n, r.label) for n, r in zip(task.index.num_frames.tolist(), task.index.records, strict=True)
    ]
    for name in ("pyav-video", "cv2-video"):
        read = PEERS[name][0](task, folder / "video")
        for video, count in enumerate(task.index.num_frames.tolist()):
            frames = [0, count // 2, count // 2, count - 1]
            for image, frame in zip(read(video, frames), frames, strict=True):
                with Image.open(task.index.frame_path(video, frame)) as original:
                    want = np.asarray(original.convert("RGB").resize((224, 224)), dtype=float)
                assert image.shape == (224, 224, 3) and np.abs(image - want).mean() < 8


def test_a_subset_is_spread_over_the_list_and_finds_its_frames(clips, tmp_path):
    everything = read_annotations(clips / "train.txt")
    folder = storage.prepare_frames(clips / "train.txt", None, 4, tmp_path)
    chosen = read_annotations(folder / "frames.txt")
    assert [r.name for r in chosen] == [everything[i].name for i in (0, 5, 10, 15)]
    assert [os.path.realpath(r.path) for r in chosen] == [os.path.realpath(everything[i].path) for i in (0, 5, 10, 15)]
    assert storage.prepare_frames(clips / "train.txt", None, 4, tmp_path) == folder
    assert storage.prepare_frames(clips / "train.txt", None, 999, tmp_path) != folder
    assert len(storage.files_of(folder, "frames")) == sum(r.num_frames for r in chosen)


def test_longer_clips_and_lists_are_the_same_frames_over_and_over(clips, tmp_path):
    folder = storage.prepare_frames(clips / "train.txt", None, 3, tmp_path)
    short = load_index(folder / "frames.txt")
    long = load_index(storage.linked_clips(folder, 50) / "frames.txt")
    assert long.num_frames.tolist() == [50, 50, 50] and long.labels.tolist() == short.labels.tolist()
    for frame in (0, 1, 49):
        assert os.path.samefile(long.frame_path(2, frame), short.frame_path(2, frame % int(short.num_frames[2])))
    storage.repeat_list(folder, 7)
    assert [r.name for r in read_annotations(folder / "list-7.txt")] == [short.records[i % 3].name for i in range(7)]


def test_ratios_are_of_one_round():
    results = Results({"a": [{"clips_per_s": x} for x in (10, 40)], "b": [{"clips_per_s": x} for x in (5, 10)],
                       "c": [{"clips_per_s": x} for x in (1, 20)]}, {"d": "not installed"})  # fmt: skip
    assert results.ratios("a", ["b"]) == [2, 4]
    assert results.ratios("a", ["b", "c", "d"]) == [2, 2]  # the better one of each round
    assert results.ratios("a", ["d"]) == [] and results.ratios("d", ["a"]) == []


def test_a_run_is_repeated_while_others_disturb_it(tmp_path, monkeypatch):
    foreign = iter([0.5, 0.2, 0.3, 0.5, 0.05])
    monkeypatch.setattr(
        loader_speed, "run_child", lambda args, case: {"clips_per_s": 1.0, "foreign_cores": next(foreign)}
    )
    monkeypatch.setattr(loader_speed, "wait_for_quiet", lambda patience: None)
    args = loader_speed.parse(["--patience", "1"])
    index = tmp_path / "list.txt.index.npz"
    case = loader_speed.Case("a", "dfer-frames", tmp_path, {}, (index,))
    kept = []
    for new in (False, True):
        index.touch()
        kept.append(loader_speed.run_quietly(args, case, new))
        assert index.exists() != new
    assert [(k["foreign_cores"], k["runs"]) for k in kept] == [(0.2, 3), (0.05, 2)]  # the quietest, not the fastest


def test_slope_of_memory_leaves_out_the_start():
    assert loader_speed.settled_slope([0, 300, 500, 502, 504, 506]) == pytest.approx(2)
    assert loader_speed.settled_slope([7.0] * 9) == pytest.approx(0)


def test_use_of_the_machine_counts_children_and_nobody_else():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        family = quiet.family()
        process.communicate(b"\n")
    assert {os.getpid(), process.pid} <= family.keys() and os.getppid() not in family
    used = quiet.Usage(12.0, 6.0, 7.5).since(quiet.Usage(10.0, 3.0, 4.0))
    assert used == {"seconds": 2.0, "cpu_s": 3.0, "foreign_cores": 0.25}


def test_one_measurement(clips, tmp_path, capsys):
    words = ["--list", f"{clips}/train.txt", "--cache", str(tmp_path), "--device", "cpu", *TINY]
    assert main(["--design", "dfer-frames", *words]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["clips"] % 4 == 0 and record["clips_per_s"] == pytest.approx(record["clips"] / record["seconds"])
    assert record["seconds"] >= 0.05 and record["memory_mib"] > 50 and record["first_batch_s"] > 0


def test_what_is_missing_of_ours_is_not_called_a_missing_peer(clips, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dali_pipes.loader", None)
    with pytest.raises(ImportError, match=r"dali_pipes\.loader"):
        main(["--design", "dfer-frames", "--list", f"{clips}/train.txt", "--cache", str(tmp_path), *TINY])


def test_the_report(clips, tmp_path, capsys, monkeypatch):
    """A whole run, every measurement in a process of its own, with a peer that is not installed."""
    (tmp_path / "decord.py").write_text("raise ModuleNotFoundError('gone', name='decord')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    words = ["--list", f"{clips}/train.txt", "--cache", str(tmp_path), "--device", "cpu", *TINY, "--rounds", "1"]
    words += ["--designs", "dfer-frames,pil-frames,decord-video", "--clips", "8", "--patience", "0"]
    assert main([*words, "--json", f"{tmp_path}/r.json"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"command", "settings", "machine", "data", "clips_per_s", "ratios", "ratios_by_round",
                           "best_peers", "of_best_peer", "of_limit", "failed", "runs"}  # fmt: skip
    assert report["best_peers"]["frames"] == "pil-frames" and report["best_peers"]["video"] is None
    assert report["of_best_peer"] == report["ratios"]
    assert report["command"].startswith("python benchmarks/loader_speed.py --list")
    assert report["settings"]["frames"] == 4 and report["data"]["clips"] == 8 and report["machine"]["torch"]
    speeds = report["clips_per_s"]
    assert set(speeds) == {"dfer-frames", "pil-frames"} and all(len(v) == 1 and v[0] > 0 for v in speeds.values())
    assert report["ratios"] == {"frames": speeds["dfer-frames"][0] / speeds["pil-frames"][0], "shards": None,
                                "shards224": None, "raw": None, "video": None}  # fmt: skip
    assert set(report["of_limit"]) == set(report["ratios"]) and set(report["of_limit"].values()) == {None}
    assert "not installed: decord: pip install" in report["failed"]["decord-video"]
    assert "decord-video: not installed" in printed and "dfer-frames" in printed
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--designs", "dfer-frames,nonsense"], "no design 'nonsense'; there are dfer-frames"),
        (["--list", "nowhere.txt"], "nowhere.txt: no such annotation list"),
        (["--seconds", "0"], "'0' is not a number from 0.01"),
        (["--plot", "picture.pdf"], "does not end in .svg or .png"),
        (["--json", "no/such/folder/r.json"], "its folder is missing"),
        (["--growth", "nothing"], "invalid choice"),
        (["--starve", "--plot", "picture.png"], "--plot draws the comparison"),
        (["--list", "{clips}/test.txt", "--cache", "{tmp}"], "9 clips do not fill a batch of 16; lower --batch-size"),
    ],
)
def test_bad_input_is_one_line(clips, tmp_path, capsys, words, message):
    try:
        code = main([word.format(clips=clips, tmp=tmp_path) for word in words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.startswith("loader_speed.py: ") and error.count("\n") == 1


def test_peers_cut_where_the_loader_cuts():
    """Half a pixel goes up; Python's round takes every other half down."""
    assert peers.pixels_of(0.25, 0.5, 10) == (3, 5) and (round(2.5), round(7.5)) == (2, 8)
    rng = np.random.default_rng(0)
    for start, length in [(0.0, 0.5), (0.25, 0.5), (0.999, 0.001), *rng.random((200, 2)).tolist()]:
        start, length = np.float32(start), np.float32(min(length, 1 - start))
        for size in (10, 97, 224):
            assert peers.pixels_of(start, length, size) == kernels.cut(start, length, size)


def test_the_fair_share_beside_busy_processes(monkeypatch, capsys):
    """Each round measures all alike, beside as many processes as it says; they are gone after it."""
    assert [busy.fair(36.0, 2, n) for n in (0, 2, 4)] == [36.0, 18.0, 12.0]
    assert busy.environment("threads", 4) == (1, 4, {}) and busy.environment("threads=3", 4) == (1, 3, {})
    assert busy.environment("processes", 4) == (4, 1, {})
    assert busy.environment("nospin", 2) == (1, 2, {"GOMP_SPINCOUNT": "0"})
    running, started = [], subprocess.Popen

    def start(command, **options):
        running.append(started(command, **options))
        return running[-1]

    def clips_per_s(way, cores, seconds):
        alive = sum(process.poll() is None for process in running)
        return (10.0 if way == "threads" else 7.0) / (1 + alive)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(busy, "measured", clips_per_s)
    monkeypatch.setattr(busy, "usable_cores", lambda: 2)
    assert busy.main(["--neighbours", "1", "--ways", "threads", "threads=1", "--rounds", "2"]) == 0
    assert len(running) == 4 and all(process.poll() is not None for process in running)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("{")][1:]
    assert rows == [["threads", "0", "10.0", "1.00"], ["threads=1", "0", "7.0", "0.70"],
                    ["threads", "1", "5.0", "0.75"], ["threads=1", "1", "3.5", "0.53"]]  # fmt: skip
    with pytest.raises(SystemExit):
        busy.main(["--ways", "thread=1"])
