"""Cross-validation: the sums are those of loops, the intervals cover the truth, and a killed command goes on."""

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dfer.config import PRESETS, OptimConfig, parse_config
from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.lists.folds import assign_folds, check_folds, find_folds, write_folds
from dfer.lists.index import load_index
from dfer.lists.releases import DFEW_TEST_COUNTS
from dfer.losses import Objective
from dfer.report import figures, fold_results, read_run
from dfer.report.folds import folds_page
from dfer.report.published import published_results
from dfer.report.statistics import Pool, bootstrap, pool, wilson
from dfer.run.checkpoint import load_checkpoint, save_checkpoint
from dfer.run.fingerprints import data_fingerprints
from dfer.run.folds import BEST, FoldJob, drive, slots_for
from dfer.run.predictions import Predictions
from dfer.run.signals import SIGNALS
from scripts import crossval
from tests.conftest import ROOT
from tests.test_report import Page, closed_in_itself, some_predictions, some_rows, write_run

# Shares of the classes about as in DFEW; Disgust is rare and hardly ever found.
SHARES = np.array([0.21, 0.16, 0.23, 0.19, 0.12, 0.02, 0.07])
RECALLS = np.array([0.88, 0.65, 0.62, 0.68, 0.52, 0.10, 0.35])


def simulated(count: int, seed: int, known: int = 7, guess: int = 0) -> Predictions:
    """Clips of the first `known` classes, the same for each `guess`; a wrong prediction is any other class."""
    labels = np.random.default_rng(seed).choice(known, count, p=SHARES[:known] / SHARES[:known].sum())
    rng = np.random.default_rng([seed, guess])
    right = rng.random(count) < RECALLS[labels]
    predicted = np.where(right, labels, (labels + rng.integers(1, 7, count)) % 7)
    return Predictions([f"{seed}/{i}" for i in range(count)], labels, predicted, np.zeros((count, 7)))


def naive_counts(*many: Predictions) -> list[list[int]]:
    counts = [[0] * 7 for _ in range(7)]
    for predictions in many:
        for label, guess in zip(predictions.labels.tolist(), predictions.predicted.tolist(), strict=True):
            counts[label][guess] += 1
    return counts


def naive_war_uar(counts: list[list[int]]) -> tuple[float, float]:
    right, recalls = 0, []
    for k, row in enumerate(counts):
        right += row[k]
        if sum(row):
            recalls.append(100 * row[k] / sum(row))
    return 100 * right / sum(map(sum, counts)), sum(recalls) / len(recalls)


# ---- Statistics


def test_intervals_cover_the_truth_in_95_of_100_data_sets():
    """1,000 test sets from a known confusion. Of their clips only the numbers of each kind matter: drawn at once."""
    rng = np.random.default_rng(0)
    truth = {"WAR": 100 * float(SHARES @ RECALLS), "UAR": 100 * float(RECALLS.mean())}
    covered = dict.fromkeys(truth, 0)
    sizes = rng.multinomial(1500, SHARES, size=1000)
    hits = rng.binomial(sizes, RECALLS)
    for size, right in zip(sizes, hits, strict=True):
        kinds = np.stack([right, size - right], 1).ravel()  # of each class: right, taken for the next one
        labels = np.repeat(np.arange(14) // 2, kinds)
        predicted = np.repeat((np.arange(14) + 1) // 2 % 7, kinds)
        for name, (low, high) in Pool(np.zeros_like(labels), labels, predicted[:, None]).intervals(1000).items():
            covered[name] += low <= truth[name] <= high
    assert all(930 <= number <= 970 for number in covered.values()), covered


def test_resampling_within_classes_has_the_distribution_of_the_naive_one():
    rng = np.random.default_rng(1)
    labels = np.array([0] * 30 + [1] * 20 + [5] * 3)
    right = rng.random((53, 2)) < 0.6
    right[-3:, 0] = [True, False, False]
    wars, uars = bootstrap(labels, right, within_classes=True)
    naive = []
    for _ in range(1500):
        recalls = []
        for k in (0, 1, 5):
            mine = np.flatnonzero(labels == k)
            recalls.append(right[rng.choice(mine, len(mine))].mean(0))
        naive.append([100 * (30 * a + 20 * b + 3 * c) / 53 for a, b, c in zip(*recalls, strict=True)]
                     + [100 * x for x in np.mean(recalls, axis=0)])  # fmt: skip
    for fast, slow in zip(np.column_stack([wars, uars]).T, np.array(naive).T, strict=True):
        assert fast.mean() == pytest.approx(slow.mean(), abs=5 * slow.std() / math.sqrt(1500))
        assert fast.std() == pytest.approx(slow.std(), rel=0.1)
    assert set(np.round(3 * uars[:, 0] / 100 - 3 * uars[:, 0].min() / 100, 3).tolist()) != {0.0}


def test_seeds_do_not_make_more_clips():
    """Five times the same predictions say as much as once: the interval does not shrink."""
    one = simulated(400, 3)
    single, five = pool([[one]]), pool([[one]] * 5)
    assert five.predicted.shape == (400, 5)
    for name, (low, high) in single.intervals().items():
        assert five.intervals()[name] == pytest.approx((low, high), abs=1e-9)


def test_war_is_resampled_over_all_clips_uar_within_classes_and_seeds_are_averaged():
    labels, folds = np.repeat([0, 1], 50), np.zeros(100, dtype=np.int64)
    found = Pool(folds, labels, np.zeros((100, 1), dtype=np.int64)).intervals()  # one class right, one wrong
    assert found["UAR"] == (50, 50) and found["WAR"] == pytest.approx((40, 60), abs=1)
    halves = np.arange(100) % 2
    guesses = np.stack([labels ^ halves, labels ^ 1 ^ halves], axis=1)  # each clip is right with one of two seeds
    for low, high in Pool(folds, labels, guesses).intervals().values():
        assert (low, high) == pytest.approx((50, 50))


def test_the_folds_sum_to_the_pool_and_all_numbers_are_those_of_loops():
    sizes = (60, 45, 50)
    seeds = [[simulated(n, fold, known=5 if fold == 1 else 7, guess=seed) for fold, n in enumerate(sizes)]
             for seed in range(2)]  # fmt: skip
    shuffled = np.random.default_rng(0).permutation(60)  # one run lists its clips in another order
    first = seeds[1][0]
    seeds[1][0] = Predictions([first.clips[i] for i in shuffled], first.labels[shuffled],
                              first.predicted[shuffled], first.probabilities)  # fmt: skip
    pooled = pool(seeds)
    found = fold_results.summary(pooled)
    for seed, matrices in enumerate(pooled.confusions()):
        assert [m.counts.tolist() for m in matrices] == [naive_counts(p) for p in seeds[seed]]
        assert found["confusion_per_seed"][seed] == sum(m.counts for m in matrices).tolist()
        assert found["confusion_per_seed"][seed] == naive_counts(*seeds[seed])
    for at, name in enumerate(("WAR", "UAR")):
        folds = [[naive_war_uar(naive_counts(p))[at] for p in seed] for seed in seeds]
        means = [sum(values) / 3 for values in folds]
        mean_of_folds = found["mean_of_folds"][name]
        assert mean_of_folds["per_seed"] == pytest.approx(means)
        assert mean_of_folds["mean"] == pytest.approx(sum(means) / 2)
        assert mean_of_folds["sd_of_seeds"] == pytest.approx(statistics.stdev(means))
        of_folds = [(a + b) / 2 for a, b in zip(*folds, strict=True)]
        assert mean_of_folds["sd_of_folds"] == pytest.approx(statistics.stdev(of_folds))
        totals = [naive_war_uar(naive_counts(*seed))[at] for seed in seeds]
        assert found["pooled"][name]["per_seed"] == pytest.approx(totals)
        assert found["pooled"][name]["mean"] == pytest.approx(sum(totals) / 2)
        low, high = found["pooled"][name]["interval"]
        assert low < found["pooled"][name]["mean"] < high and 5 < high - low < 25
    for k, emotion in enumerate(EMOTIONS):
        counts = [naive_counts(*seed)[k] for seed in seeds]
        right, clips = sum(row[k] for row in counts) / 2, sum(counts[0])
        assert clips and found["recall"][emotion]["clips"] == clips
        assert found["recall"][emotion]["mean"] == pytest.approx(100 * right / clips)
        assert found["recall"][emotion]["interval"] == pytest.approx(wilson(right, clips))


def test_one_seed_has_no_spread_of_seeds_and_a_class_without_clips_no_recall():
    found = fold_results.summary(pool([[simulated(50, 0, known=5), simulated(50, 1, known=5)]]))
    assert found["pooled"]["WAR"]["sd_of_seeds"] is None and found["mean_of_folds"]["UAR"]["sd_of_seeds"] is None
    assert found["recall"]["Fear"] == {"clips": 0} and "NaN" not in json.dumps(found)


def test_seeds_of_other_clips_are_refused():
    with pytest.raises(ValueError, match="fold 2 of two seeds"):
        pool([[simulated(9, 0), simulated(9, 1)], [simulated(9, 0), simulated(9, 2)]])


# ---- Folds


def test_the_split_is_a_partition_and_each_fold_has_its_share_of_each_class():
    rng = np.random.default_rng(0)
    rows = [(f"clips/{i}", 20, int(k)) for i, k in enumerate(rng.choice(7, 223, p=SHARES))]
    folds = assign_folds(rows, 5)
    assert set(folds) == set(range(5))
    for k in range(7):
        sizes = [sum(f == fold and row[2] == k for row, f in zip(rows, folds, strict=True)) for fold in range(5)]
        assert max(sizes) - min(sizes) <= 1 and sorted(sizes, reverse=True) == sizes
        mine = [f for row, f in zip(rows, folds, strict=True) if row[2] == k]
        assert mine == sorted(mine)  # blocks in the order of the names, 9 before 10
    order = rng.permutation(len(rows)).tolist()
    assert assign_folds([rows[i] for i in order], 5) == [folds[i] for i in order]


def test_the_embedded_lists_are_split_and_still_point_at_their_clips(clips, tmp_path):
    write_folds([clips / "train.txt", clips / "test.txt"], tmp_path / "lists", 5)
    folds = find_folds(tmp_path / "lists")
    check_folds(folds, None)
    everything = {r.path for part in ("train", "test") for r in read_annotations(clips / f"{part}.txt")}
    tested = [r.path.resolve() for _, test in folds for r in read_annotations(test)]
    assert len(tested) == 29 and set(tested) == {path.resolve() for path in everything}
    for train, test in folds:
        parts = [{r.path for r in read_annotations(path)} for path in (train, test)]
        assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 29


def make_folds(clips: Path, folder: Path, num_folds: int = 3) -> Path:
    """Lists of the fixture's clips in folds."""
    rows = [line.split() for part in ("train", "test") for line in (clips / f"{part}.txt").read_text().splitlines()]
    folder.mkdir(parents=True)
    for fold in range(num_folds):
        for part in ("train", "test"):
            mine = [" ".join(row) for i, row in enumerate(rows) if (i % num_folds == fold) == (part == "test")]
            text = "".join(f"{line}\n" for line in [f"# root: {clips}", *mine])
            (folder / f"set_{fold + 1}_{part}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "set_2_test.txt").unlink(), "set_2_test.txt: missing"),
        (lambda folder: [p.unlink() for p in folder.glob("set_2_*")], "set_2_train.txt: missing"),
        (lambda folder: [p.unlink() for p in folder.glob("set_[23]_*")], "of two folds"),
        (lambda folder: [p.unlink() for p in folder.glob("*.txt")], "prepare_dfew.py writes them"),
        (lambda folder: (folder / "set_3_test.txt").write_bytes((folder / "set_1_test.txt").read_bytes()),
         "set_3_test.txt:2: clip train clips/000 is trained on too"),
        (lambda folder: [(folder / f"set_3_{p}.txt").write_bytes((folder / f"set_1_{p}.txt").read_bytes())
                         for p in ("train", "test")], "is tested on before"),
    ],
)  # fmt: skip
def test_folds_that_are_none(clips, tmp_path, damage, said):
    folder = make_folds(clips, tmp_path / "lists")
    check_folds(find_folds(folder), None)
    damage(folder)
    with pytest.raises(ValueError, match=said) as error:
        check_folds(find_folds(folder), None)
    assert "\n" not in str(error.value)


# ---- Driving


# Plays a command: the log gets a line at its start and its end. Told to stop it saves and exits with 75, or with 0 as a
# run whose last step was done: if its own exit code is 75.
PLAY = """
import signal, sys, time
log, name, seconds, code = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
def say(word):
    with open(log, "a") as file:
        file.write(f"{name} {word}\\n")
def stop(number, frame):
    say("saved")
    sys.exit(75 - code)
signal.signal(signal.SIGTERM, stop)
say("begins")
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.01)
say("ends")
sys.exit(code)
"""


@pytest.fixture
def play(tmp_path):
    (tmp_path / "play.py").write_text(PLAY)
    return lambda name, seconds=0.0, code=0: [str(tmp_path / "play.py"), str(tmp_path / "log"), name, str(seconds),
                                              str(code)]  # fmt: skip


def log(tmp_path: Path) -> list[str]:
    path = tmp_path / "log"
    return path.read_text().splitlines() if path.exists() else []


def test_jobs_in_sequence(tmp_path, play, capsys):
    jobs = [FoldJob("a", [play("a1"), play("a2")]), FoldJob("b", [play("b1")])]
    handlers = [signal.getsignal(number) for number in SIGNALS]
    assert drive(jobs, [{}], tmp_path) == 0
    assert log(tmp_path) == [f"{name} {word}" for name in ("a1", "a2", "b1") for word in ("begins", "ends")]
    assert handlers == [signal.getsignal(number) for number in SIGNALS]


def test_jobs_at_once_have_their_own_environment_and_file(tmp_path):
    show = ["-c", "import os, time; print(os.environ['GPU']); time.sleep(0.5)"]
    begin = time.monotonic()
    jobs = [FoldJob(name, [show]) for name in "abcd"]
    assert drive(jobs, [{"GPU": "x"}, {"GPU": "y"}], tmp_path) == 0
    assert sorted((tmp_path / f"{name}.txt").read_text() for name in "abcd") == ["x\n", "x\n", "y\n", "y\n"]
    assert time.monotonic() - begin > 0.9  # never more than two at once
    assert (tmp_path / "a.txt").read_text() != (tmp_path / "b.txt").read_text()


@pytest.mark.parametrize(("code", "goes_on"), [(2, False), (1, True), (69, True)])
def test_a_job_that_fails(tmp_path, play, capfd, code, goes_on):
    """Its second command is not begun; others are, unless something is to be changed first."""
    jobs = [FoldJob("a", [play("a1", code=code), play("a2")]), FoldJob("b", [play("b1")])]
    assert drive(jobs, [{}], tmp_path) == code
    assert ("b1 begins" in log(tmp_path)) == goes_on and "a2 begins" not in log(tmp_path)
    assert f"a failed with exit code {code}\n" in capfd.readouterr().err


def test_a_job_that_is_killed(tmp_path):
    job = FoldJob("a", [["-c", "import os; os.kill(os.getpid(), 9)"]])
    assert drive([job], [{}], tmp_path) == 137


def wait_for(condition, child: subprocess.Popen | None = None) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < give_up and (child is None or child.poll() is None)
        time.sleep(0.02)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_is_handed_on_and_nothing_else_begins(tmp_path, play, number, code):
    def send() -> None:
        wait_for(lambda: len(log(tmp_path)) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    jobs = [FoldJob(name, [play(name, 600, code), play(f"{name}2")]) for name in "abc"]
    assert drive(jobs, [{}, {}], tmp_path) == 75
    thread.join()
    assert sorted(log(tmp_path)) == ["a begins", "a saved", "b begins", "b saved"]


def test_a_run_that_somebody_else_stops_stops_all(tmp_path, play):
    def send() -> None:
        wait_for(lambda: len(log(tmp_path)) == 2)
        os.kill(int(subprocess.check_output(["pgrep", "-f", f"{tmp_path}/log a 600"], text=True)), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert drive([FoldJob(n, [play(n, 600)]) for n in "abc"], [{}, {}], tmp_path) == 75
    thread.join()
    assert sorted(log(tmp_path)) == ["a begins", "a saved", "b begins", "b saved"]


def test_killed_hard_its_children_save_too(tmp_path, play):
    code = (
        "import sys; from pathlib import Path; from dfer.run.folds import FoldJob, drive\n"
        f"drive([FoldJob('a', [{play('a', 600)}]), FoldJob('b', [{play('b')}])], [{{}}], Path({str(tmp_path)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: log(tmp_path) == ["a begins"], child)
    child.kill()
    child.wait(60)
    wait_for(lambda: log(tmp_path) == ["a begins", "a saved"])


def test_slots(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert slots_for(1, "auto") == [{}]
    assert slots_for(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in slots_for(2, "auto")] == ["0", "1"]
    assert slots_for(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-77ab")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert slots_for(2, "cuda") == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-77ab"}]
    with pytest.raises(ValueError, match="--parallel 3: 2 GPUs"):
        slots_for(3, "auto")


# ---- The command, train.py and evaluate.py played in this process


class Played:
    """In the place of `drive`: leaves what train.py and evaluate.py leave, and ends after some commands if asked to."""

    def __init__(self):
        self.commands, self.commands_left = [], 10**9

    def __call__(self, jobs, slots, folder) -> int:
        for job in jobs:
            for command in job.commands:
                if not self.commands_left:
                    return 75
                self.commands_left -= 1
                self.commands.append((job.name, Path(command[0]).name))
                (self.train if command[0].endswith("train.py") else self.evaluate)(command[1:])
        return 0

    def train(self, words) -> None:
        config = parse_config(words)
        path = config.run.log_dir / config.run.name
        records = read_annotations(config.data.val_list)
        names, labels = [r.name for r in records], [r.label for r in records]
        seed = 100 * config.seed + int(config.run.name[-1])
        last = some_predictions(len(names), seed, labels, names)
        rows = some_rows(2)
        hits = [100 * sum(a[1] == a[2] for a in guesses) / len(names) for guesses in (self.best(last), last)]
        rows[1]["val/WAR"], rows[3]["val/WAR"] = hits
        write_run(path, config, last, rows)
        train, val = load_index(config.data.train_list), load_index(config.data.val_list)
        data = data_fingerprints(train, val, Objective(0.1, 0.2))
        state = {"step": 20, "evaluated": config.optim.epochs, "model": {}, "ema": None, "config": config.to_json()}
        state |= {"emotions": list(EMOTIONS), "data": data, "global_batch": config.data.batch_size}
        save_checkpoint(path / "checkpoints", state)

    @staticmethod
    def best(rows: list[tuple]) -> list[tuple]:
        """The best epoch knows one clip more, where there is one."""
        wrong = next((i for i, row in enumerate(rows) if row[1] != row[2]), None)
        return [(*row[:2], row[1] if i == wrong else row[2], *row[3:]) for i, row in enumerate(rows)]

    def evaluate(self, words) -> None:
        path = Path(words[0]).parent
        assert words[0] == str(path / "best_WAR.safetensors") and words[1] == "--list"
        assert words[3:] == ["--device", "auto", "--out", str(path / BEST)]
        predictions = read_run(path).predictions
        rows = [(c, int(a), int(b), *p) for c, a, b, p in zip(*predictions, strict=True)]
        scratch = write_run(path.parent / "scratch", parse_config(["debug"]), self.best(rows))
        (scratch / "predictions.csv").rename(path / BEST)
        (scratch / "config.json").unlink()
        scratch.rmdir()


@pytest.fixture
def played(monkeypatch):
    drive = Played()
    monkeypatch.setattr(crossval, "drive", drive)
    return drive


def command(tmp_path: Path, clips: Path, *words: str, capsys, **options) -> tuple[int, str]:
    """Exit code and stderr."""
    if not (tmp_path / "lists").exists():
        make_folds(clips, tmp_path / "lists")
    options = {"preset": "debug", "lists": tmp_path / "lists", "name": "cv", "log-dir": tmp_path / "logs"} | options
    arguments = [options.pop("preset")]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)] if value is not None else []
    try:
        code = crossval.main([*arguments, "--", *words])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    return code, capsys.readouterr().err


def results_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "logs" / "cv" / "results.json").read_text())


def test_stopped_in_fold_3_it_goes_on_there(tmp_path, clips, played, capsys):
    played.commands_left = 5  # folds 1 and 2, and the training of fold 3
    assert command(tmp_path, clips, capsys=capsys) == (75, "")
    assert not (tmp_path / "logs" / "cv" / "results.json").exists()
    played.commands_left, before = 10**9, played.commands
    played.commands = []
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    assert played.commands == [("seed0-fold3", "evaluate.py")]
    results = results_of(tmp_path)
    assert [row["run"] for row in results["runs"]] == ["seed0-fold1", "seed0-fold2", "seed0-fold3"]
    assert len(before) == 5 and results["last"]["confusion_per_seed"] == [
        np.sum([row["last"]["confusion"] for row in results["runs"]], axis=0).tolist()
    ]
    assert sum(map(sum, results["best"]["confusion_per_seed"][0])) == 29
    for row in results["runs"]:
        assert row["best"]["epoch"] == 1 and row["best"]["WAR"] >= row["last"]["WAR"] and row["last"]["epoch"] == 2
    assert results["published"] is None and "no published figures beside these" in results["notes"][-1]
    for fold, (_, test) in enumerate(find_folds(tmp_path / "lists"), start=1):
        tested = {EMOTIONS[r.label] for r in read_annotations(test)}
        absent = [e for e in EMOTIONS if e not in tested]
        want = [f"fold {fold} tests no clip of {', '.join(absent)}: its UAR is of the other classes"] if absent else []
        assert [note for note in results["notes"] if note.startswith(f"fold {fold}")] == want
    # Once more there is nothing to do, and the same files come out; two more seeds take what is there.
    played.commands, text = [], (tmp_path / "logs" / "cv" / "report.html").read_bytes()
    assert command(tmp_path, clips, capsys=capsys) == (0, "") and played.commands == []
    assert (tmp_path / "logs" / "cv" / "report.html").read_bytes() == text and results_of(tmp_path) == results
    assert command(tmp_path, clips, capsys=capsys, seeds=3) == (0, "")
    assert {name[:5] for name, _ in played.commands} == {"seed1", "seed2"} and len(played.commands) == 12
    assert results_of(tmp_path)["seeds"] == [0, 1, 2] and len(results_of(tmp_path)["runs"]) == 9


def test_parts_share_the_runs_and_the_last_collects(tmp_path, clips, played, capsys):
    for part in (1, 2, 3, 4):
        assert not (tmp_path / "logs" / "cv" / "results.json").exists()
        assert command(tmp_path, clips, capsys=capsys, seeds=2, part=f"{part}/4") == (0, "")
    names = [name for name, program in played.commands if program == "train.py"]
    order = [f"seed{s}-fold{f}" for s in range(2) for f in (1, 2, 3)]
    assert names == [order[i] for i in (0, 4, 1, 5, 2, 3)] and len(results_of(tmp_path)["runs"]) == 6


def test_a_run_that_others_work_on_is_not_looked_at(tmp_path, clips, played, capsys):
    """Its checkpoints change while it runs: what is read half of one is no defect of the run."""
    assert command(tmp_path, clips, capsys=capsys, part="1/3") == (0, "")
    other = tmp_path / "logs" / "cv" / "seed0-fold2" / "checkpoints"
    other.mkdir(parents=True)
    (other / "step-00000004.json").write_text("{}")
    assert command(tmp_path, clips, capsys=capsys, part="1/3") == (0, "")
    code, err = command(tmp_path, clips, capsys=capsys, part="2/3")
    assert code == 2 and "none of 1 checkpoints can be used" in err


def test_finished_folds_are_of_the_same_command_or_refused(tmp_path, clips, played, capsys, monkeypatch):
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    played.commands = []
    run = tmp_path / "logs" / "cv" / "seed0-fold1"

    def refused(said: str, *words: str) -> None:
        code, err = command(tmp_path, clips, *words, capsys=capsys)
        assert code == 2 and said in err and err.count("\n") == 1 and played.commands == [], err

    refused("--optim.lr was 0.001, is 0.01; continue", "--optim.lr", "0.01")
    refused("--data.batch-size 4", "--data.batch-size", "4")
    refused("--data.size was 32, is 48", "--data.size", "48")
    with monkeypatch.context() as newer:
        before = PRESETS["debug"]
        newer.setitem(
            PRESETS, "debug", lambda gpu: dataclasses.replace(before(gpu), optim=OptimConfig(lr=0.5, epochs=2))
        )
        refused("was begun with other defaults than this version's: --optim.lr was 0.001, is 0.5;")
    lists = tmp_path / "lists"
    test_list, train_list = lists / "set_1_test.txt", lists / "set_1_train.txt"
    before = test_list.read_text(), train_list.read_text()
    test_list.write_text("".join(before[0].splitlines(keepends=True)[:-1]))
    refused("set_1_test.txt: not the clips that")
    test_list.write_text(before[0])
    train_list.write_text("".join(before[1].splitlines(keepends=True)[:-1]))
    refused("set_1_train.txt: not the clips that")
    train_list.write_text(before[1])
    (run / "checkpoints").rename(tmp_path / "gone")
    refused("its checkpoints are gone")
    (tmp_path / "gone").rename(run / "checkpoints")
    with open(run / BEST, "a") as file:
        file.write("x\n")
    refused(f"{run / BEST}: predictions.csv is damaged")


def test_a_run_that_is_not_whole_is_gone_on_with(tmp_path, clips, played, capsys):
    """Its best epoch is of the past then, and does not stand for a finished run."""
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    run = tmp_path / "logs" / "cv" / "seed0-fold2"
    save_checkpoint(run / "checkpoints", load_checkpoint(run) | {"step": 30, "evaluated": 1})
    played.commands, played.commands_left = [], 0
    assert command(tmp_path, clips, capsys=capsys) == (75, "")
    assert [p.parent.name for p in run.parent.glob(f"*/{BEST}")].count("seed0-fold2") == 0


def test_best_weights_that_evaluate_otherwise_are_named(tmp_path, clips, played, capsys):
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    rows = tmp_path / "logs" / "cv" / "seed0-fold2" / "metrics.jsonl"
    text = rows.read_text().splitlines()
    text[1] = json.dumps(json.loads(text[1]) | {"val/WAR": 99.5})
    rows.write_text("\n".join(text))
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    (note,) = [note for note in results_of(tmp_path)["notes"] if note.startswith("seed0-fold2")]
    assert "when evaluated again, 99.50 in training" in note


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["--seed", "3"], {}, "--seed is set here for each run; use --seeds"),
        (["--data.train_list=x"], {}, "use --lists"),
        (["--run.name", "x"], {}, "use --name"),
        (["--resume"], {}, "the same command goes on"),
        (["--optim.lr", "fast"], {}, "lr"),
        ([], {"preset": "nope"}, "unknown preset 'nope'"),
        ([], {"preset": "ferv39k", "lists": None}, "no folds of its own"),
        ([], {"preset": "dfew", "lists": None}, "lists/dfew: needs"),
        ([], {"name": "a/b"}, "plain folder name"),
        ([], {"log-dir": __file__}, "--log-dir: cannot use"),
        ([], {"lists": "a" * 300}, "aa: cannot be read (File name too long)"),
        ([], {"seeds": "two"}, "'two' is not a whole number"),
        ([], {"part": "3/2"}, "'3/2' is not a part"),
    ],
)
def test_what_is_wrong_takes_one_line_and_leaves_nothing(tmp_path, clips, played, capsys, words, options, said):
    code, err = command(tmp_path, clips, *words, capsys=capsys, **options)
    assert code == 2 and said in err and err.count("\n") == 1 and err.startswith("crossval: "), err
    assert not (tmp_path / "logs").exists() and played.commands == []


def test_words_without_dashes_and_parts():
    for text in ("0/5", "6/5", "1", "a/b", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError):
            crossval.part_of(text)
    assert crossval.part_of("2/5") == (2, 5)


# ---- Slurm


@pytest.mark.parametrize(
    ("code", "array", "said"), [(75, "4-5", "requeue 12"), (0, "4-5", ""), (2, "4-5", ""), (0, "", "")]
)
def test_the_array_job(tmp_path, code, array, said):
    """Slurm's and Python's commands are played: which words it gives, and what becomes of the exit code."""
    bodies = {"bin/scontrol": f'echo "$@" > {tmp_path}/scontrol', ".venv/bin/python": f'echo "$@"; exit {code}'}
    for name, body in bodies.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "12", "SUBMIT_DIR": str(tmp_path)}
    if array:
        slurm |= {"ARRAY_TASK_ID": "5", "ARRAY_TASK_MIN": "4", "ARRAY_TASK_COUNT": "2"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/slurm/crossval.sbatch"), "dfew", "--seeds", "2", "--", "--data.root", "a b"],
        capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | {f"SLURM_{k}": v for k, v in slurm.items()},
    )  # fmt: skip
    if not array:
        assert done.returncode == 2 and "sbatch --array=1-5" in done.stderr
        return
    assert done.stdout.splitlines()[0] == "scripts/crossval.py --part 2/2 dfew --seeds 2 -- --data.root a b"
    assert done.returncode == (0 if code == 75 else code)
    asked = tmp_path / "scontrol"
    assert (asked.read_text().strip() if asked.exists() else "") == said


# ---- The page


def test_published_figures_stand_beside_dfew_only():
    assert published_results(DFEW_TEST_COUNTS)[0]["rows"][4] == {
        "method": "IAL", "start": "ResNet18", "UAR": 55.71, "WAR": 69.24}  # fmt: skip
    assert published_results(DFEW_TEST_COUNTS)[1] == ""
    fewer = [list(row) for row in DFEW_TEST_COUNTS]
    fewer[2][0] -= 2
    assert published_results(fewer)[0] and "2 of DFEW's 11,697" in published_results(fewer)[1]
    fewer[3][6] += 1
    assert published_results(fewer)[0] is None
    fewer[3][6] -= 1
    fewer[0][0] -= 200
    assert published_results(fewer)[0] is None
    assert published_results(DFEW_TEST_COUNTS[:4])[0] is None
    assert published_results([[70, 56, 81, 67, 44, 5, 25]] * 5)[0] is None


def test_the_page_says_what_the_results_say(tmp_path, clips, played, capsys):
    assert command(tmp_path, clips, capsys=capsys, seeds=2) == (0, "")
    folder, results = tmp_path / "logs" / "cv", results_of(tmp_path)
    page = Page((folder / "report.html").read_text())
    closed_in_itself(page)
    for row in results["runs"]:
        at = page.words.index(f"seed {row['seed']}, fold {row['fold']}")
        want = [row["last"]["clips"], row["last"]["WAR"], row["last"]["UAR"], row["best"]["WAR"], row["best"]["UAR"]]
        assert page.words[at + 1 : at + 7] == [str(want[0]), *(f"{x:.2f}" for x in want[1:]), "1"]
    at = page.words.index("mean of the folds")
    means = [results[kind]["mean_of_folds"][name] for kind in ("last", "best") for name in ("WAR", "UAR")]
    want = [word for m in means for word in (f"{m['mean']:.2f}", f"± {m['sd_of_folds']:.2f}")]
    assert page.words[at + 2 : at + 10] == want
    at = page.words.index("all clips pooled")
    pooled = [results[kind]["pooled"][name] for kind in ("last", "best") for name in ("WAR", "UAR")]
    want = [word for p in pooled for word in (f"{p['mean']:.2f}", "{:.1f} to {:.1f}".format(*p["interval"]))]
    assert page.words[at + 1 : at + 11] == ["95 % interval", "29", *want]
    for emotion in EMOTIONS:
        at = page.words.index(emotion, page.words.index("In numbers"))
        recall = results["last"]["recall"][emotion]
        assert page.words[at + 1 : at + 3] == [str(recall["clips"]), f"{recall['mean']:.1f}"]
    assert "Beside what is published" not in page.text and "Not drawn" not in page.text
    assert "no published figures beside these" in page.text


def test_the_page_of_dfew_sets_others_figures_off(tmp_path, clips, played, capsys):
    assert command(tmp_path, clips, capsys=capsys) == (0, "")
    results = results_of(tmp_path) | {"published": published_results(DFEW_TEST_COUNTS)[0], "name": "<b>$x"}
    runs = [read_run(tmp_path / "logs" / "cv" / row["run"]) for row in results["runs"]]
    with figures.style():
        page = Page(folds_page(results, runs))
    closed_in_itself(page)
    at = page.words.index("MAE-DFER")
    assert page.words[at + 1 : at + 4] == ["masked autoencoder, VoxCeleb2", "74.43", "63.41"]  # WAR, UAR
    at = page.words.index("this model, best epoch")
    means = results["best"]["mean_of_folds"]
    assert page.words[at + 1 : at + 3] == [f"{means['WAR']['mean']:.2f}", f"{means['UAR']['mean']:.2f}"]
    assert "others' figures" in page.text and "five folds" in page.text and "<b>$x" in page.words


# ---- The real thing


SMALL = ["--data.num-segments", "2", "--data.batch-size", "4", "--model.dim", "16", "--model.backbone", "test_resnet",
         "--optim.epochs", "2", "--optim.steps-per-epoch", "2", "--run.device", "cpu", "--run.amp", "off",
         "--run.log-every", "1"]  # fmt: skip


@pytest.mark.slow
def test_killed_in_fold_3_the_command_ends_as_if_it_had_not_been(tmp_path, clips):
    make_folds(clips, tmp_path / "lists")

    def start(name: str, **options) -> subprocess.Popen:
        words = ["scripts/crossval.py", "debug", "--lists", str(tmp_path / "lists"), "--log-dir", str(tmp_path)]
        return subprocess.Popen([sys.executable, *words, "--name", name, "--", *SMALL], cwd=ROOT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)  # fmt: skip

    assert start("whole").wait(600) == 0
    broken = start("broken")
    third = tmp_path / "broken" / "seed0-fold3"
    wait_for(lambda: (third / "metrics.jsonl").exists() and (third / "metrics.jsonl").read_bytes(), broken)
    broken.kill()
    assert broken.wait(60) == -signal.SIGKILL
    finished = (tmp_path / "broken" / "seed0-fold1" / "log.txt").read_bytes()
    give_up, code = time.monotonic() + 120, 2
    while code == 2 and time.monotonic() < give_up:  # until the run of the third fold has saved and let go
        code = start("broken").wait(600)
    assert code == 0 and (tmp_path / "broken" / "seed0-fold1" / "log.txt").read_bytes() == finished
    assert "continuing from step" in (third / "log.txt").read_text()
    whole, again = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken"))
    assert all(whole[key] == again[key] for key in ("last", "best", "runs", "notes"))
