"""Cross-validate: `python scripts/crossval.py dfew [--seeds 3] [--parallel 4] [-- words for train.py]`.

Each fold, of each seed, is a run of train.py on the lists set_1_train.txt and set_1_test.txt, set_2 ... of --lists, as
prepare_dfew.py writes them to lists/dfew; the embedded data set is split into five folds here. All lies in
LOG_DIR/NAME/: a run's folder for each seed and fold, results.json and report.html. The same command goes on where it
was ended, by whatever; what is done is not done again. `--parallel 4` works on four folds at once, on a GPU each, and
`--part 2/5` does a fifth of the runs, for machines that share LOG_DIR (scripts/slurm/crossval.sbatch): whichever part
ends last writes the results.

Exit codes: 0 done; 2 something is to be changed, which one line says; 75 stopped by SIGTERM, SIGINT or SIGUSR1 with
everything saved; otherwise that of the run that failed.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import Parser, UserError, in_range, one_line_errors
from dfer.config import PRESETS, Config, config_from_json, parse_config
from dfer.images import natural_key
from dfer.lists.annotations import EMOTIONS, read_annotations, write_annotations
from dfer.lists.index import load_index
from dfer.lists.releases import DFEW_TEST_COUNTS
from dfer.metrics import ConfusionMatrix
from dfer.report.page import write_folds_report
from dfer.report.records import Pool, Predictions, Run, pool, read_predictions, read_run, wilson
from dfer.run.checkpoint import decode_state, differences, newest_checkpoint, write_whole
from dfer.run.distributed import EXIT_STOPPED, SIGNALS, World
from train import fingerprint, same_global_batch

ROOT = Path(__file__).resolve().parents[1]
NUM_FOLDS = 5  # of the embedded data set
BEST = "predictions_best_WAR.csv"  # of the best epoch's weights; train.py keeps only those of the last
OWN = {"--seed": "--seeds", "--data.train-list": "--lists", "--data.val-list": "--lists", "--run.name": "--name",
       "--run.log-dir": "--log-dir", "--resume": "nothing: the same command goes on"}  # fmt: skip
# A child is asked to save when its parent is gone, `kill -9` included: no run is left that nobody waits for.
ENDS_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
# As printed by others, of DFEW's five folds: what the weights start from, UAR and WAR.
PROTOCOL = (
    "Protocol: DFEW's 11,697 single-labelled clips in the release's five folds, WAR and UAR as means of the folds. "
    "Most of them pick the best epoch on the test fold, so they stand beside the best epoch here; MAE-DFER reports the "
    "last. None holds out a validation set. One standard error of a WAR of 11,697 clips is 0.4, of UAR 0.5."
)
PUBLISHED = (
    ("ResNet18-LSTM", "ResNet18, from scratch", 51.32, 63.85),
    ("Former-DFER", "ResNet18 and transformer, from scratch", 53.69, 65.70),
    ("NR-DFERNet", "ResNet18", 54.21, 68.19),
    ("LOGO-Former", "ResNet18", 54.21, 66.98),
    ("IAL", "ResNet18", 55.71, 69.24),
    ("M3DFEL", "R3D-18, Kinetics", 56.10, 69.25),
    ("LSTPNet", "ResNet18, pre-trained on face images", 60.18, 71.16),
    ("LSGTNet", "ResNet18", 61.33, 72.34),
    ("DFER-CLIP", "CLIP B/32", 59.61, 71.25),
    ("MAE-DFER", "masked autoencoder, VoxCeleb2", 63.41, 74.43),
    ("S4D", "VoxCeleb2 and AffectNet", 66.80, 76.68),
    ("FineCLIPER", "CLIP B/16 and text", 65.98, 76.21),
)


# ---- Folds


def find_folds(folder: Path) -> list[tuple[Path, Path]]:
    """The pairs of lists, set_1_train.txt and set_1_test.txt, set_2 ...

    Raises:
        UserError: in one line, if there are fewer than two, or one of a pair is missing.
    """
    names = {path.name for path in folder.glob("set_*_t*.txt")}
    found = {int(m[1]) for m in (re.fullmatch(r"set_([1-9]\d*)_(?:train|test)\.txt", name) for name in names) if m}
    if len(found) < 2:
        hint = "; scripts/prepare_dfew.py writes them" if not found else ""
        raise UserError(f"{folder}: needs set_1_train.txt, set_1_test.txt, set_2_train.txt ... of two folds{hint}")
    folds = [tuple(folder / f"set_{k}_{part}.txt" for part in ("train", "test")) for k in range(1, max(found) + 1)]
    for path in (path for pair in folds for path in pair):
        if path.name not in names:
            raise UserError(f"{path}: missing; folds are numbered without gaps, and each has a train and a test list")
    return folds


def check_folds(folds: Sequence[tuple[Path, Path]], root: Path | None) -> None:
    """Raises UserError, in one line, if a clip is trained and tested on in a fold, or tested on in two."""
    tested: dict[Path, str] = {}
    for train_list, test_list in folds:
        trained = {record.path for record in read_annotations(train_list, root)}
        for record in read_annotations(test_list, root):
            if record.path in trained:
                raise UserError(f"{record.source}: clip {record.name} is trained on too, in {train_list}")
            if record.path in tested:
                raise UserError(f"{record.source}: clip {record.name} is tested on before, in {tested[record.path]}")
            tested[record.path] = record.source


def split(rows: Sequence[tuple[str, int, int]], num_folds: int) -> list[int]:
    """The fold, 0 .., of each (name, num_frames, label) row, by DFEW's rule: the clips of each class, sorted by name,
    are cut into consecutive blocks.
    """
    folds = [0] * len(rows)
    for label in {row[2] for row in rows}:
        mine = sorted((i for i, row in enumerate(rows) if row[2] == label), key=lambda i: natural_key(rows[i][0]))
        for fold, block in enumerate(np.array_split(mine, num_folds)):
            for i in block.tolist():
                folds[i] = fold
    return folds


def split_embedded(lists: Sequence[Path], folder: Path) -> None:
    """Write the lists of five folds of the clips of all `lists`, which lie side by side."""
    records = [record for path in lists for record in read_annotations(path)]
    rows = [(record.name, record.num_frames, record.label) for record in records]
    folds = split(rows, NUM_FOLDS)
    folder.mkdir(parents=True, exist_ok=True)
    for fold in range(NUM_FOLDS):
        for part, wanted in (("train", False), ("test", True)):
            chosen = [row for row, mine in zip(rows, folds, strict=True) if (mine == fold) == wanted]
            write_annotations(folder / f"set_{fold + 1}_{part}.txt", chosen, lists[0].resolve().parent)


# ---- Runs


class Job(NamedTuple):
    """What is left to do of a run: commands, one after the other, each the words behind `python`."""

    name: str
    commands: list[list[str]]


def flags_of(config: Config, words: Sequence[str]) -> list[str]:
    """The command line of train.py that says `config`, one that differs from `words` in lists, seed and place only."""
    data, run = config.data, config.run
    flags = {"--data.train-list": data.train_list, "--data.val-list": data.val_list, "--seed": config.seed}
    flags |= {"--run.name": run.name, "--run.log-dir": run.log_dir}
    return [*words, *(str(word) for flag in flags.items() for word in flag)]


def is_trained(config: Config, train_list: str) -> bool:
    """Whether the run of this configuration has all its epochs. `train_list`: the fingerprint of its training list.

    Raises:
        UserError: in one line, if the run's folder holds a run of another configuration or of other clips.
    """
    path = config.run.log_dir / config.run.name
    content, _ = newest_checkpoint(path / "checkpoints")
    if content is None:
        if (path / BEST).exists():
            raise UserError(
                f"{path}: is of a run that was done, but its checkpoints are gone; remove it to start it over"
            )
        return False  # whatever else lies there, train.py judges
    state = decode_state(content, path)
    saved = config_from_json(state["config"], path)
    differing = differences(json.loads(saved.to_json()), json.loads(config.to_json()))
    if differing:
        raise UserError(
            f"{path}: holds a run of another configuration: {'; '.join(differing)}; continue with its own or choose "
            "another --name"
        )
    same_global_batch(config, state, World(0, 1, 0, 1, torch.device("cpu")))
    if state["train_list"] != train_list:
        raise UserError(
            f"{config.data.train_list}: not the clips that {path} was trained on (names, labels or numbers of frames "
            "have changed); choose another --name"
        )
    return state["evaluated"] == config.optim.epochs


def slots_for(parallel: int, device: str) -> list[dict[str, str]]:
    """The environment of each of the runs that work at once: a GPU each, and a share of the cores."""
    if parallel == 1:
        return [{}]
    slots: list[dict[str, str]] = [{} for _ in range(parallel)]
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(len(os.sched_getaffinity(0)) // parallel, 1)
        slots = [{"OMP_NUM_THREADS": str(threads)} for _ in slots]
    if device != "cpu" and torch.cuda.is_available():
        gpus = list(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(gpus)).split(",")[: len(gpus)]
        if parallel > len(gpus):
            raise UserError(f"--parallel {parallel}: {len(gpus)} GPUs are visible here, and each run takes one")
        slots = [slot | {"CUDA_VISIBLE_DEVICES": gpu} for slot, gpu in zip(slots, gpus, strict=False)]
    return slots


def drive(jobs: Sequence[Job], slots: Sequence[dict[str, str]], folder: Path) -> int:
    """Work the jobs off in their order, one at a time for each slot, and return an exit code: 0 if all are done.

    A signal is handed on, and all end. Otherwise a job that fails is named, and the others go on; but after exit code
    2, which the user has to change something for, no other begins. Of several slots the output goes to FOLDER/JOB.txt.
    """
    waiting, free, codes = list(jobs), list(range(len(slots))), []
    children: dict[int, tuple[Job, list[list[str]], subprocess.Popen]] = {}
    asked: list[int] = []

    def start(slot: int, job: Job, commands: list[list[str]]) -> None:
        command = [sys.executable, "-c", ENDS_WITH_PARENT, *commands[0]]
        with open(folder / f"{job.name}.txt", "ab") if len(slots) > 1 else contextlib.nullcontext() as out:
            # A session of its own: Ctrl-C reaches it through here only, once.
            child = subprocess.Popen(
                command, stdout=out, stderr=out, env={**os.environ, **slots[slot]}, start_new_session=True
            )
        children[slot] = (job, commands[1:], child)

    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in SIGNALS}
    told = set()
    try:
        while children or (waiting and not asked):
            while waiting and free and not asked:
                slot, job = free.pop(0), waiting.pop(0)
                print(f"crossval.py: {job.name} begins, {len(waiting)} wait", flush=True)
                start(slot, job, job.commands)
            for slot, (job, left, child) in list(children.items()):
                if asked and slot not in told:
                    told.add(slot)
                    child.terminate()
                code = child.poll()
                if code is None:
                    continue
                if code == 0 and left and not asked:
                    start(slot, job, left)
                    continue
                del children[slot]
                free.append(slot)
                if asked and (code == -signal.SIGTERM or (code == 0 and left)):
                    code = EXIT_STOPPED  # it had nothing to save yet
                elif code == EXIT_STOPPED:
                    asked.append(signal.SIGTERM)  # told by somebody else: who ends one run ends them all
                elif code:
                    where = f"; see {folder / job.name}.txt" if len(slots) > 1 else ""
                    print(f"crossval.py: {job.name} failed with exit code {code}{where}", file=sys.stderr, flush=True)
                    if code == 2:
                        waiting.clear()
                else:
                    print(f"crossval.py: {job.name} is done", flush=True)
                codes.append(code)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = [code if code > 0 else 128 - code for code in codes if code not in (0, EXIT_STOPPED)]
    return failed[0] if failed else EXIT_STOPPED if asked else 0


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other parts, for the moments in which files of all of them are written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(f"--log-dir: cannot use {folder} ({error})") from None


# ---- Results


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation, None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def numbers_of(matrix: ConfusionMatrix) -> dict[str, Any]:
    recalls = dict(
        zip(EMOTIONS, (None if math.isnan(r) else r for r in matrix.per_class_recall().tolist()), strict=True)
    )
    return {"clips": matrix.total(), "WAR": matrix.war(), "UAR": matrix.uar(), "recall": recalls,
            "confusion": matrix.counts.tolist()}  # fmt: skip


def summary(predictions: Pool) -> dict[str, Any]:
    """What is said of all folds and seeds together; percentages, and standard deviations of n - 1."""
    matrices = predictions.confusions()
    pooled = [ConfusionMatrix.pooled(folds) for folds in matrices]
    found: dict[str, Any] = {"mean_of_folds": {}, "pooled": {}}
    intervals = predictions.intervals()
    for name in ("WAR", "UAR"):
        values = np.array([[getattr(fold, name.lower())() for fold in folds] for folds in matrices])  # (seeds, folds)
        means = values.mean(1).tolist()
        found["mean_of_folds"][name] = {
            "mean": statistics.mean(means),
            "sd_of_folds": spread(values.mean(0).tolist()),
            "sd_of_seeds": spread(means),
            "per_seed": means,
        }
        totals = [getattr(matrix, name.lower())() for matrix in pooled]
        found["pooled"][name] = {
            "mean": statistics.mean(totals),
            "interval": list(intervals[name]),
            "sd_of_seeds": spread(totals),
            "per_seed": totals,
        }
    right = np.mean([matrix.counts.diag().tolist() for matrix in pooled], axis=0).tolist()
    clips = pooled[0].counts.sum(1).tolist()
    found["recall"] = {
        emotion: {"clips": n, "mean": 100 * r / n, "interval": list(wilson(r, n))} if n else {"clips": 0}
        for emotion, r, n in zip(EMOTIONS, right, clips, strict=True)
    }
    found["confusion_per_seed"] = [matrix.counts.tolist() for matrix in pooled]
    return found


def published(counts: Sequence[Sequence[int]]) -> tuple[dict[str, Any] | None, str]:
    """The table to stand beside results on test folds of these clips per class, if they are DFEW's; and a note."""
    if len(counts) == len(DFEW_TEST_COUNTS):
        missing = np.array(DFEW_TEST_COUNTS) - np.array(counts)
        if missing.min() >= 0 and missing.sum() <= 0.01 * np.sum(DFEW_TEST_COUNTS):
            rows = [{"method": m, "start": start, "UAR": uar, "WAR": war} for m, start, uar, war in PUBLISHED]
            table = {"protocol": PROTOCOL, "rows": rows}
            note = f"{missing.sum()} of DFEW's {np.sum(DFEW_TEST_COUNTS):,} clips are not in these lists"
            return table, note if missing.sum() else ""
    return (
        None,
        "no published figures beside these: the test lists do not have the clips per class of DFEW's five folds",
    )


class Done(NamedTuple):
    """A run that is trained and evaluated."""

    seed: int
    fold: int  # 1 ..
    run: Run
    last: Predictions
    best: Predictions
    best_epoch: int
    best_war: float  # in training


def read_done(seed: int, fold: int, config: Config) -> Done:
    """Read what a run has predicted.

    Raises:
        UserError: in one line, if that is damaged or not of the clips of its test list.
    """
    path = config.run.log_dir / config.run.name
    run = read_run(path)
    wanted = sorted((r.name, r.label) for r in read_annotations(config.data.val_list, config.data.root))
    found = []
    for file in ("predictions.csv", BEST):
        try:
            predictions = read_predictions(path / file)
        except UserError as error:
            raise UserError(f"{path / file}: {error}; remove {path} to train this fold again") from None
        if sorted(zip(predictions.clips, predictions.labels.tolist(), strict=True)) != wanted:
            raise UserError(f"{path / file}: not the clips and labels of {config.data.val_list}, which has changed")
        found.append(predictions)
    _, wars = run.series("val/WAR")
    if not len(wars):
        raise UserError(f"{path / 'metrics.jsonl'}: holds no evaluation; remove {path} to train this fold again")
    best = int(np.argmax(wars))
    return Done(seed, fold, run, *found, best + 1, float(wars[best]))


def collect(runs: Sequence[Done], notes: Sequence[str]) -> dict[str, Any]:
    """All of results.json but the command."""
    notes = list(notes)
    first = runs[0].run.config
    seeds, num_folds = sorted({done.seed for done in runs}), max(done.fold for done in runs)
    by_seed = [[done for done in runs if done.seed == seed] for seed in seeds]
    rows = []
    for done in runs:
        last, best = (numbers_of(predictions.confusion()) for predictions in (done.last, done.best))
        rows.append({"seed": done.seed, "fold": done.fold, "run": done.run.name})
        rows[-1] |= {"last": {"epoch": first["optim"]["epochs"], **last}, "best": {"epoch": done.best_epoch, **best}}
        if abs(best["WAR"] - done.best_war) > 1e-6:
            notes.append(
                f"{done.run.name}: the best epoch's weights have WAR {best['WAR']:.2f} when evaluated again, "
                f"{done.best_war:.2f} in training"
            )
    for row in rows[:num_folds]:
        absent = [emotion for emotion, recall in row["last"]["recall"].items() if recall is None]
        if absent:
            notes.append(f"fold {row['fold']} tests no clip of {', '.join(absent)}: its UAR is of the other classes")
    table, note = published([[sum(line) for line in row["last"]["confusion"]] for row in rows[:num_folds]])
    return {
        "preset": first["preset"],
        "lists": str(Path(first["data"]["val_list"]).parent),
        "folds": num_folds,
        "seeds": seeds,
        "epochs": first["optim"]["epochs"],
        "classes": list(EMOTIONS),
        "last": summary(pool([[done.last for done in folds] for folds in by_seed])),
        "best": summary(pool([[done.best for done in folds] for folds in by_seed])),
        "runs": rows,
        "published": table,
        "notes": [*notes, *([note] if note else [])],
    }


def print_results(results: dict[str, Any]) -> None:
    table = Table(title=results["name"], title_justify="left")
    table.add_column("%", no_wrap=True)
    for name in ("WAR", "UAR"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in ("last", "best"):
        means, pooled = ([results[kind][what][name] for name in ("WAR", "UAR")] for what in ("mean_of_folds", "pooled"))
        table.add_row(
            f"{kind} epoch, mean of folds ± sd", *(f"{m['mean']:.2f} ± {m['sd_of_folds']:.2f}" for m in means)
        )
        cells = ("{:.2f} ({:.1f} to {:.1f})".format(p["mean"], *p["interval"]) for p in pooled)
        table.add_row(f"{kind} epoch, pooled (95 %)", *cells)
    Console(highlight=False).print(table)
    print("the best epoch is picked on the test folds")


# ---- The command


def main(args: argparse.Namespace, words: list[str]) -> int:
    for word in words:
        flag = word.split("=")[0].replace("_", "-").replace("--no-resume", "--resume")
        if flag in OWN:
            raise UserError(f"{flag} is set here for each run; use {OWN[flag]}")
    if args.preset not in PRESETS:
        raise UserError(f"unknown preset {args.preset!r}: choose from {', '.join(PRESETS)}")
    words = [args.preset, *words]
    config = parse_config(words)
    name = args.name or f"{args.preset}-crossval"
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name {name!r}: must be a plain folder name")
    folder, lists, notes = args.log_dir / name, args.lists, []
    slots = slots_for(args.parallel, config.run.device)
    if lists is None and config.data.train_list.name == "set_1_train.txt":
        lists = config.data.train_list.parent
    elif lists is None and config.data.train_list.parent == Path("data/faces"):
        lists = folder / "lists"
        with alone(folder):
            split_embedded([config.data.train_list, config.data.val_list], lists)
        notes.append(
            "the embedded data set's lists do not name the drawn people: one of them may be in training and test"
        )
    elif lists is None:
        raise UserError(f"{args.preset} has no folds of its own: --lists DIR, with set_1_train.txt, set_1_test.txt ...")
    folds = find_folds(lists)
    check_folds(folds, config.data.root)

    @functools.cache
    def clips_of(path: Path) -> str:
        return fingerprint(load_index(path, config.data.root, config.data.source))

    runs: list[tuple[int, int, Config]] = []
    for seed in range(args.seeds):
        for fold, (train_list, test_list) in enumerate(folds, start=1):
            data = dataclasses.replace(config.data, train_list=train_list, val_list=test_list)
            run = dataclasses.replace(config.run, log_dir=folder, name=f"seed{seed}-fold{fold}")
            runs.append((seed, fold, dataclasses.replace(config, seed=seed, data=data, run=run)))

    part, parts = args.part
    jobs = []
    for _, _, config in runs[part - 1 :: parts]:
        path, commands = folder / config.run.name, []
        if not is_trained(config, clips_of(config.data.train_list)):
            commands.append([str(ROOT / "train.py"), *flags_of(config, words)])
        if commands or not (path / BEST).exists():
            (path / BEST).unlink(missing_ok=True)
            evaluate = [str(ROOT / "scripts" / "evaluate.py"), str(path / "best_WAR.safetensors")]
            commands.append([*evaluate, "--device", config.run.device, "--out", str(path / BEST)])
            jobs.append(Job(config.run.name, commands))
    if jobs:
        with alone(folder):
            pass  # that it can be written is known before hours have passed
        code = drive(jobs, slots, folder)
        if code:
            if code == EXIT_STOPPED:
                print("crossval.py: stopped by a signal; the same command goes on", flush=True)
            return code

    # What others have not evaluated, they may be working on: their checkpoints are left alone until then.
    waiting = [
        config.run.name
        for _, _, config in runs
        if not (folder / config.run.name / BEST).exists() or not is_trained(config, clips_of(config.data.train_list))
    ]
    if waiting:
        print(f"crossval.py: this part is done; {len(waiting)} of {len(runs)} runs are not yet ({', '.join(waiting)})")
        return 0
    with alone(folder):
        done = [read_done(*run) for run in runs]
        results = {"command": shlex.join(["python", *sys.argv]), "name": name} | collect(done, notes)
        write_whole(folder / "results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
        report = write_folds_report(folder, results, [d.run for d in done])
    print_results(results)
    print(f"{folder / 'results.json'}\n{report}")
    return 0


def part_of(text: str) -> tuple[int, int]:
    """An argument's type: "2/5" is the second of five parts."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 2/5")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    parser = Parser("crossval", __doc__)
    parser.add_argument("preset", help=f"of train.py: {', '.join(PRESETS)}")
    parser.add_argument("--lists", type=Path, metavar="DIR", help="set_1_train.txt, set_1_test.txt, set_2 ... lie here")
    parser.add_argument("--seeds", type=in_range(int, 1, 1000), default=1, help="how often, with seeds 0, 1, ... (1)")
    parser.add_argument("--parallel", type=in_range(int, 1, 64), default=1, metavar="N", help="runs at once (1)")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="only each N-th run, from the I-th")
    parser.add_argument("--name", help="the folder in --log-dir; PRESET-crossval if not given")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"))
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    arguments, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"unknown: {shlex.join(unknown)}; words for train.py go after --")
    rest = sys.argv[len(own) + 2 :]
    sys.exit(one_line_errors("crossval.py", lambda: main(arguments, rest)))
