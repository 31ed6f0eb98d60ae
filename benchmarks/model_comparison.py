"""Is our model ahead, and does each part earn its keep? `python benchmarks/model_comparison.py [--ablation crf]`

Trains ours and the baselines, or the rows of an ablation, on the same clips with the same budget and seeds, through
train.py as a user would, and evaluates each at other numbers of segments too. Each finished run is appended to a file
that is committed, and is not done again on that kind of machine, so that hours add up over days; a run that was cut off
is continued. A table has the runs of one kind of machine. The tables, and docs/comparison.md and docs/recipes.md
(--write-page), come from that file alone.
benchmarks/comparison/tables.py has the rows, and what is recommended.

Data that is not there is drawn. What drawn faces say about DFEW or FERV39k is not known. Words for train.py, for all
rows, go after --, as in `-- --optim.lr 3e-4`.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comparison import advice, faults, page, record, tables
from benchmarks.comparison.record import (
    Result,
    append_result,
    data_fingerprint,
    find_result,
    portable,
    read_results,
    settled,
)
from dfer.cli import Parser, UserError, in_range, one_line_errors
from dfer.config import Config, parse_config
from dfer.files import write_whole
from dfer.lists.annotations import EMOTIONS, VideoRecord, read_annotations, write_annotations
from dfer.model.build import build_model
from scripts.make_faces import DIFFICULTIES, make_data_set

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "results" / "model_comparison.jsonl"
PAGES = (ROOT / "docs" / "comparison.md", ROOT / "docs" / "recipes.md")
DRAWN = {"faces": "normal", "faces-large": "large", "faces-hard": "hard"}
WATCHED = 64  # clips of the test list that a training is evaluated on after each epoch; all, when it is over
RUNNING: set[subprocess.Popen] = set()  # what is ended when this process is
ENDING = threading.Event()
COUNTING = threading.Lock()


class Data(NamedTuple):
    """The clips that all rows are trained and evaluated on."""

    name: str
    train: Path
    test: Path
    watched: Path  # the first clips of the test list
    clips: int  # to train on
    fingerprint: dict[str, str]
    root: Path | None = None  # where relative paths start


class Run(NamedTuple):
    """One training."""

    row: str
    words: tables.Words  # of the row
    seed: int
    command: list[str]  # words for train.py, but for the run's name and place
    config: Config  # what they make, as the record has it


def draw(name: str) -> None:
    """Draw one of our data sets, unless it is there."""
    out = Path("data") / name
    if (out / "test.txt").exists():  # the last thing that is written
        return
    print(f"drawing {out}")
    if name in DRAWN:
        make_data_set(out, workers=os.cpu_count() or 1, level=DIFFICULTIES[DRAWN[name]])
    else:
        faults.write_fault_lists(name, out)


def find_data(words: list[str], clips: int | None, log_dir: Path, root: Path | None = None) -> Data:
    """Return the data that the command line names: one of ours, or two lists; with only the first `clips` to train on.

    Raises:
        UserError: if it is neither, or has fewer clips.
    """
    if len(words) == 1 and words[0] in (*DRAWN, *faults.FAULTS):
        draw(words[0])
        name, train, test = words[0], *(Path("data", words[0], f"{split}.txt").resolve() for split in ("train", "test"))
    elif len(words) == 2:
        train, test = (Path(word).resolve() for word in words)
        name = f"{train.parent.name}/{train.stem}"
    else:
        known = ", ".join((*DRAWN, *faults.FAULTS))
        raise UserError(f"--data {' '.join(words)}: must be one of {known}, or a list to train on and one to test on")
    records = read_annotations(train, root)
    if clips is not None:
        if clips > len(records):
            raise UserError(f"--clips {clips}: {train} has only {len(records)}")
        train = first_clips(records[:clips], log_dir / "lists" / f"{name.replace('/', '-')}-first-{clips}.txt")
    prints = {"test": data_fingerprint(test, root), "train": data_fingerprint(train, root)}
    watched = first_clips(
        read_annotations(test, root)[:WATCHED], log_dir / "lists" / f"watched-{prints['test'][:10]}.txt"
    )
    return Data(name, train, test, watched, clips or len(records), prints, root)


def first_clips(records: list[VideoRecord], path: Path) -> Path:
    """Write a list of these clips, under the names that they had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, where = records[0].name, str(records[0].path)
    root = None if os.path.isabs(name) else where.removesuffix(name)
    write_annotations(path, [(r.name, r.num_frames, r.label) for r in records], root)
    return path


def chosen_rows(args: argparse.Namespace) -> dict[str, tables.Words]:
    """Return the rows that the command line names, and their words.

    Raises:
        UserError: if there is no such row, or train.py would not take the further words.
    """
    names = tables.ABLATIONS[args.ablation] if args.ablation else tables.MODELS
    if unknown := set(args.models or ()) - names.keys():
        raise UserError(f"--models {' '.join(sorted(unknown))}: choose from {', '.join(names)}")
    parse_config(["faces", *tables.BUDGETS[args.budget], *args.extra])
    return {name: names[name] for name in args.models or names}


def plan(args: argparse.Namespace, rows: dict[str, tables.Words], data: Data) -> list[Run]:
    """Return all runs of these rows: seed by seed, so that rows can be compared early.

    Raises:
        UserError: if train.py would not take the words.
    """
    lists = ["--data.train-list", str(data.train), "--data.val-list", str(data.watched), "--run.wandb", "off"]
    runs = []
    for seed in range(args.seeds):
        for row, words in rows.items():
            command = ["faces", *tables.BUDGETS[args.budget], *words, *args.extra, "--seed", str(seed), *lists]
            runs.append(Run(row, words, seed, command, portable(settled(parse_config(command)))))
    return runs


def train(run: Run, folder: Path, threads: int) -> None:
    """Train once, or go on where a run was cut off, with what it prints in a file beside its folder.

    Raises:
        UserError: if it fails, with the last line that it printed.
    """
    place = ["--run.log-dir", str(folder.parent), "--run.name", folder.name]
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "ab") as output:
        command = [sys.executable, str(ROOT / "train.py"), *run.command, *place]
        code = call(command, threads, output)
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        raise UserError(f"{run.row}, seed {run.seed}: train.py ended with exit code {code}: {last[0]} ({log})")


def call(command: list[str], threads: int, output: Any) -> int:
    """Run a command on so many threads and return its exit code; end it at once if this process is ending."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as child:
        RUNNING.add(child)
        if ENDING.is_set():
            child.terminate()
        try:
            return child.wait()
        finally:
            RUNNING.discard(child)


def evaluate(
    folder: Path, test: Path, segments: list[int], threads: int, root: Path | None = None
) -> dict[int, dict[str, Any]]:
    """Return WAR, UAR and the confusion matrix of a run on a list, its clips cut into each number of segments."""
    script, out = str(ROOT / "scripts" / "evaluate.py"), folder.with_name(f"{folder.name}.evaluation")
    with open(out, "wb") as output:
        words = ["--json", "--list", str(test), "--segments", *map(str, segments)]
        words += ["--root", str(root)] if root else []
        code = call([sys.executable, script, str(folder), *words], threads, output)
    lines = out.read_text(errors="replace").splitlines()
    if code:
        raise UserError(f"{folder}: evaluate.py ended with exit code {code}: {lines[-1] if lines else out}")
    out.unlink()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {numbers["segments"]: numbers for numbers in found}


def cost(config: Config) -> tuple[int, int]:
    """Return a model's parameters, and the FLOP of one clip forward, multiplications and additions counted apart."""
    data = config.data
    num_frames = data.num_segments * data.frames_per_segment
    with COUNTING, warnings.catch_warnings():  # the counter and the switch are the process's
        warnings.simplefilter("ignore")  # of torch about Intel's GPUs
        model = build_model(dataclasses.replace(config.model, init="random"), num_frames).eval()
        if hasattr(model, "crf") and hasattr(model.crf, "backend"):
            model.crf.backend = "sdpa"  # operators that the counter knows
        counter = FlopCounterMode(display=False)
        with torch.backends.mkldnn.flags(enabled=False), counter:  # whose LSTM the counter does not know
            model(torch.zeros(1, num_frames, 3, data.size, data.size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def finish(run: Run, data: Data, args: argparse.Namespace, folder: Path, threads: int) -> Result:
    """Return the line of the record of a run that is trained: what it is, where it was made, what it found."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = run.config.optim.epochs
    speeds = [r["throughput/total_clips_per_s"] for r in rows if "train/loss" in r and r["epoch"] > min(1, epochs - 1)]
    trained = run.config.data.num_segments
    found = evaluate(folder, data.test, segments_of(run.config, args), threads, data.root)
    counts = found[trained]["confusion"]
    present = [k for k in range(len(EMOTIONS)) if sum(counts[k])]
    parameters, flops = cost(run.config)
    return {
        "row": run.row, "words": run.words, "extra": record.portable_words(args.extra, run.config),
        "data": data.name, "clips": data.clips,
        "fingerprint": data.fingerprint, "budget": args.budget, "seed": run.seed, **version(), "machine": machine(),
        "jobs": args.jobs, "WAR": found[trained]["WAR"], "UAR": found[trained]["UAR"],
        "recalls": {EMOTIONS[k]: 100 * counts[k][k] / sum(counts[k]) for k in present},
        "rarest": EMOTIONS[min(present, key=lambda k: sum(counts[k]))], "test_clips": found[trained]["clips"],
        "WAR_at": {str(n): found[n]["WAR"] for n in found}, "UAR_at": {str(n): found[n]["UAR"] for n in found},
        "parameters": parameters, "flops": flops, "clips_per_s": statistics.median(speeds),
        "config": json.loads(run.config.to_json()),
    }  # fmt: skip


def segments_of(config: Config, args: argparse.Namespace) -> list[int]:
    """Return the numbers of segments at which a run is evaluated: others than its own where the reading of time counts.

    All take seven times as long as its own alone, and of a few clips twice as long as the training.
    """
    others = tables.SEGMENTS if args.ablation in (None, "branches") and args.clips is None else ()
    return sorted({config.data.num_segments, *others})


def is_done(run: Run, results: list[Result], data: Data, args: argparse.Namespace) -> bool:
    """Return whether the record has this run, with all that is asked of it."""
    found = find_result(results, run.config, data.fingerprint, machine()["kind"])
    return found is not None and {str(n) for n in segments_of(run.config, args)} <= found["WAR_at"].keys()


@functools.cache
def version() -> dict[str, Any]:
    """Return the commit, and whether tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "dfer", "dali_pipes", "train.py", "scripts"])
    return {"commit": commit.stdout.strip() or "unknown", "changed": changed.returncode != 0}


@functools.cache
def machine() -> dict[str, str]:
    """Return the kind of machine, and versions."""
    cores = f"{os.cpu_count()} cores"
    with contextlib.suppress(OSError, IndexError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cores += f" of {names[0].split(':', 1)[1].strip()}"
    kind = torch.cuda.get_device_name(0) if torch.cuda.is_available() else cores
    return {"kind": kind, "python": platform.python_version(), "torch": torch.__version__}


def do(run: Run, data: Data, args: argparse.Namespace) -> str:
    """Train, evaluate and record one run; return a line about it."""
    key = hashlib.sha256(f"{run.config.to_json()}{data.fingerprint}".encode()).hexdigest()[:10]
    folder = args.log_dir / f"{data.name.replace('/', '-')[:40]}-{run.row}-{args.budget}-seed{run.seed}-{key}"
    threads, began = max(1, len(os.sched_getaffinity(0)) // args.jobs), time.monotonic()
    train(run, folder, threads)
    result = finish(run, data, args, folder, threads)
    append_result(args.file, result)
    shutil.rmtree(folder)  # a few hundred MB; the record has what counts
    folder.with_name(f"{folder.name}.log").unlink()
    minutes = (time.monotonic() - began) / 60
    return f"{run.row}, seed {run.seed}: WAR {result['WAR']:.1f}, UAR {result['UAR']:.1f}, {minutes:.1f} min"


def do_all(runs: list[Run], data: Data, args: argparse.Namespace) -> int:
    """Do the runs, `--jobs` at once, and none that would begin after the limit. Return how many failed."""
    end = time.monotonic() + 60 * args.limit_minutes
    failed = 0

    def do_in_time(run: Run) -> str:
        return do(run, data, args) if time.monotonic() < end else ""

    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(do_in_time, run) for run in runs]
        try:
            for future in as_completed(futures):
                try:
                    print(future.result() or "left for another time", flush=True)
                except UserError as error:
                    failed += 1
                    print(f"model_comparison: {error}", file=sys.stderr, flush=True)
        except BaseException:
            ENDING.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(RUNNING):
                child.terminate()  # it saves, and goes on next time
            raise
    return failed


def print_tables(results: list[Result]) -> None:
    for title, rows, _ in page.all_tables(results):
        table = Table(title=title)
        for column in page.COLUMNS:
            table.add_column(column, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        Console(width=max(200, Console().width)).print(table)


def main(args: argparse.Namespace) -> int:
    """Do what is left of the runs that were asked for, and print the tables; return the exit code."""
    failed = 0
    if not args.write_page:
        rows, results = chosen_rows(args), read_results(args.file)  # what can be refused before data are drawn
        args.log_dir = args.log_dir.resolve()
        args.log_dir.mkdir(parents=True, exist_ok=True)
        root = parse_config(["faces", *args.extra]).data.root
        data = find_data(args.data, args.clips, args.log_dir, root)
        runs = plan(args, rows, data)
        left = [run for run in runs if not is_done(run, results, data, args)]
        print(f"{len(runs)} runs, {len(runs) - len(left)} of them in {args.file.name}", flush=True)
        failed = do_all(left, data, args)
    results = read_results(args.file)
    print_tables(results)
    if args.write_page:
        stem = args.file.with_suffix("")
        pages = PAGES if args.file == FILE else (Path(f"{stem}.md"), Path(f"{stem}-recipes.md"))
        for path, text in zip(pages, (page.page(results), advice.page(results)), strict=True):
            write_whole(path, text)
    return 1 if failed else 0


def parser() -> Parser:
    parser = Parser("model_comparison", __doc__)
    parser.add_argument("--models", nargs="+", metavar="ROW", help="only these rows of the table")
    parser.add_argument("--ablation", choices=tuple(tables.ABLATIONS), help="the rows of this table, not the models")
    parser.add_argument(
        "--data", nargs="+", default=["faces"], metavar="DATA", help="faces, faces-hard, order, ... or two lists"
    )
    parser.add_argument("--clips", type=in_range(int, 1, 10**9), help="train on the first N clips only")
    parser.add_argument("--budget", choices=tuple(tables.BUDGETS), default="short")
    parser.add_argument("--seeds", type=in_range(int, 1, 1000), default=5, help="0 to N - 1")
    parser.add_argument("--jobs", type=in_range(int, 1, 64), default=1, help="trainings at once, which share the cores")
    parser.add_argument(
        "--limit-minutes", type=in_range(float, 0, 1e6), default=1e6, metavar="M", help="begin no run after M minutes"
    )
    parser.add_argument("--file", type=Path, default=FILE, help="the record of finished runs")
    parser.add_argument("--write-page", action="store_true", help="only write the pages from the record")
    parser.add_argument("--log-dir", type=Path, default=Path("logs/comparison"), help="of runs in progress")
    parser.add_argument("extra", nargs="*", help="further words for train.py, after --")
    return parser


if __name__ == "__main__":
    arguments = parser().parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # by way of do_all, which ends its trainings
    sys.exit(one_line_errors("model_comparison", lambda: main(arguments)))
