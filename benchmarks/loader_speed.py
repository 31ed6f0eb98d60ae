"""How fast do clips arrive? `python benchmarks/loader_speed.py [--peers] [--json FILE] [--plot FILE.png]`

Our loader, from each kind of storage, against the field's ways to load the same clips and against what the machine can
do at all. Same videos, frames, crops and mirrors, same output: normalised float32, T x 3 x size x size. Every
measurement is a process of its own that warms up and is then timed for some seconds; the designs take turns, forwards
and backwards; each run waits for a quiet machine and is repeated if other processes disturbed it. Our loader pays for
the ends of its epochs, the peers run through theirs without a stop. Medians are printed, and ratios as the median over
the rounds, since the speed of a machine drifts.

  --starve        the loader beside the training step: how much of the speed on one synthetic batch is left
  --growth AXIS   one design over batch, frames, size, threads, clip-length or list-length
  --soak MINUTES  memory after each epoch
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers
from benchmarks.about import describe_data, headline, machine
from benchmarks.chart import REFERENCE, draw, limits_of
from benchmarks.engines import ALL_PEERS, ENGINES, interpreter, note_of, open_engine
from benchmarks.peers import CPU_LIMITS, GPU_LIMITS, PEERS, Task, source_of
from benchmarks.quiet import QUIET, Usage, memory_mib, wait_for_quiet
from benchmarks.storage import (
    SOURCES,
    chill,
    files_of,
    last_line,
    linked_clips,
    prepare,
    prepare_frames,
    repeat_list,
    warm,
    with_ffmpeg,
)
from dfer.cli import Parser, in_range, printable
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler

CACHED = "dfer-cached-raw128"  # held in the memory of the GPU
OURS = [*(f"dfer-{source}" for source in SOURCES), CACHED]
RATIOS = {"frames": "frames", "shards": "shards144", "shards224": "shards224", "raw": "raw128", "video": "video"}
REPEATS = 2  # of a run that was disturbed
CORES = len(os.sched_getaffinity(0))
BENCH_HINT = "pip install -r requirements-bench.txt (make bench does)"

Record = dict[str, float]  # what one run tells


# ---- One measurement: a process of its own.


def open_design(name: str, task: Task) -> Iterator[Tensor | int]:
    """The endless batches of a design; limits yield numbers of clips.

    Raises:
        ImportError: if its library is not installed.
        ValueError: in one line, if its data cannot be read.
    """
    if name in OURS:
        return ours(task, name)
    if name in PEERS:
        return peers.peer(name, task)
    if name in ENGINES:
        return open_engine(name, task)
    limit, source = (CPU_LIMITS | GPU_LIMITS)[name]
    return limit(task, source)


def ours_on(device: str) -> list[str]:
    return [name for name in OURS if device == "gpu" or name != CACHED]


def our_loader(task: Task, design: str):
    from dali_pipes.loader import ClipLoader  # here, so that no peer carries it
    from dali_pipes.options import LoaderOptions

    options = LoaderOptions(
        batch_size=task.batch_size,
        size=task.size,
        device=task.device,
        cached=design == CACHED,
        num_threads=task.workers,
        device_id=0 if task.device == "gpu" else None,
    )
    return ClipLoader(load_index(task.list_of(source_of(design))), task.sampler, options)


def ours(task: Task, design: str) -> Iterator[Tensor]:
    loader = our_loader(task, design)
    for epoch in itertools.count():
        for batch in loader(epoch):
            yield batch.clips


def task_of(args: argparse.Namespace, folder: Path) -> Task:
    sampler = ClipSampler(0, args.frames, augmentation=Augmentation(min_crop_area=args.min_crop_area))
    return Task(folder, sampler, args.batch_size, args.size, args.threads, args.device, args.stem)


def size_of(batch: Tensor | int) -> int:
    return batch if isinstance(batch, int) else len(batch)


def check_batch(batch: Tensor | int, task: Task) -> None:
    if isinstance(batch, int):
        return
    shape = (task.batch_size, task.sampler.clip_length, 3, task.size, task.size)
    kind = (tuple(batch.shape), batch.dtype, batch.device.type)
    wanted = (shape, torch.float32, "cuda" if task.device == "gpu" else "cpu")
    assert kind == wanted and batch.isfinite().all(), f"a batch is {kind}, not {wanted}, or not finite"


def wait_for_gpu(task: Task) -> None:
    if task.device == "gpu":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace, folder: Path) -> Record:
    """Time a design for at least `seconds`, in whole turns of its workers, whose batches come in bursts."""
    task = task_of(args, folder)
    began = time.perf_counter()
    batches = open_design(args.design, task)
    check_batch(next(batches), task)
    wait_for_gpu(task)
    first_batch_s = time.perf_counter() - began
    warmup = max(args.warmup, 2 * task.workers)
    left = len(task.index) // task.batch_size - warmup  # batches of the first epoch
    if args.cold and left < task.workers:
        raise ValueError(f"--cold: {len(task.index)} clips end within the warm-up of {warmup} batches; raise --clips")
    for _ in range(warmup - 1):
        next(batches)
    wait_for_gpu(task)
    start, clips = Usage.now(), 0
    while True:
        clips += sum(size_of(next(batches)) for _ in range(task.workers))
        left -= task.workers
        # What an epoch has read is no longer cold.
        if time.perf_counter() - start.at >= args.seconds or (args.cold and left < task.workers):
            break
    wait_for_gpu(task)
    used = Usage.now().since(start)
    return {"clips_per_s": clips / used["seconds"], "clips": clips, "first_batch_s": first_batch_s,
            "memory_mib": memory_mib(), **used}  # fmt: skip


def soak(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Memory after each epoch, for some minutes."""
    task = task_of(args, folder)
    per_epoch = len(task.index) // task.batch_size * task.batch_size
    stop = time.monotonic() + 60 * args.soak
    memory, clips = [], 0
    began = time.perf_counter()
    for batch in open_design(args.design, task):
        clips += size_of(batch)
        if clips >= per_epoch * (len(memory) + 1):
            memory.append(memory_mib())
            if time.monotonic() > stop and len(memory) >= 4:
                break
    return {"memory_mib": memory, "clips_per_s": [clips / (time.perf_counter() - began)], "epoch_clips": [per_epoch]}


def starve(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Measure the trainer's own loop on the loader's batches and on one batch that lies there, in turn."""
    import train
    from dfer.config import Config, DataConfig, RunConfig
    from dfer.losses import build_objective
    from dfer.metrics import Throughput
    from dfer.optim.schedule import Schedule
    from dfer.precision import build_precision
    from dfer.run import distributed
    from dfer.state import Job, build_state

    task = task_of(args, folder)
    world = distributed.setup("cuda" if args.device == "gpu" else "cpu")
    data = DataConfig(size=args.size, num_segments=args.frames, batch_size=args.batch_size)
    config = Config(data=data, run=RunConfig(compile=args.compile, wandb="off"))
    precision = build_precision(config.run, world.device)
    state, loader = build_state(config, precision, None), our_loader(task, args.design)
    objective, schedule = build_objective(config.loss, task.index.records), Schedule(config.optim.lr, 0, 10**6, 10**6)
    job = Job(config, world, loader, loader, state, state.model, objective, schedule, precision)
    job = train.with_step(job, train.training_loss, train.build_graphs(config.run, world))
    loaded = (batch for epoch in itertools.count() for batch in loader(epoch))
    synthetic = itertools.repeat(next(loaded))

    def run(batches: Iterator, steps: int) -> tuple[float, float]:
        """Return clips/s and the share of the time that the loop waited for a batch."""
        throughput = Throughput()
        wait_for_gpu(task)
        began = time.perf_counter()
        for _ in train.train_steps(job, throughput.timed(itertools.islice(batches, steps))):
            pass
        wait_for_gpu(task)
        speed = steps * args.batch_size / (time.perf_counter() - began)
        return speed, throughput.read()["data_wait_share"]

    run(synthetic, 3)  # compilation, choice of algorithms
    steps = max(4, round(args.seconds * run(synthetic, 3)[0] / args.batch_size))
    result = {"clips_per_s": [], "synthetic_clips_per_s": [], "data_wait_share": []}
    start = Usage.now()
    for number in range(args.rounds):
        for batches in (synthetic, loaded) if number % 2 == 0 else (loaded, synthetic):
            run(batches, 3)  # uses up what was loaded ahead while the other was at work
            speed, share = run(batches, steps)
            if batches is synthetic:
                result["synthetic_clips_per_s"].append(speed)
            else:
                result["clips_per_s"].append(speed)
                result["data_wait_share"].append(share)
    pairs = zip(result["clips_per_s"], result["synthetic_clips_per_s"], strict=True)
    foreign = [Usage.now().since(start)["foreign_cores"]]
    return result | {
        "fraction_of_synthetic": [a / b for a, b in pairs], "steps": [steps], "foreign_cores": foreign
    }  # fmt: skip


def child(args: argparse.Namespace) -> int:
    """Measure one design and print the record as a line of JSON; what is wrong is one line too."""
    try:
        folder = args.folder or prepare_frames(args.list, args.root, args.clips, args.cache)
        for source in sources_needed(args.design):
            prepare(folder, source)
        work = soak if args.soak else starve if args.starve else measure
        print(json.dumps(work(args, folder)))
        return 0
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in peers.LIBRARIES:
            raise  # ours is broken: of the others' libraries any may be missing
        hint = error.msg if error.msg.startswith("needs ") else BENCH_HINT
        print(f"not installed: {error.name}: {hint}", file=sys.stderr)
    except ValueError as error:
        print(f"loader_speed.py: {printable(error)}", file=sys.stderr)
    return 2


# ---- Many measurements: in turns, each on a quiet machine.


@dataclass(frozen=True)
class Case:
    """A design under some settings: one row of a table."""

    name: str
    design: str
    folder: Path
    options: Mapping[str, object]  # what differs from the common settings
    indexes: tuple[Path, ...] = ()  # deleted before the runs of the first round: how long does a new list take?


@dataclass
class Results:
    records: dict[str, list[Record]]  # by case, one a round
    failed: dict[str, str]  # by case: why it cannot run here

    def values(self, name: str, key: str = "clips_per_s") -> list[float]:
        return [record[key] for record in self.records.get(name, [])]

    def ratios(self, name: str, others: Sequence[str]) -> list[float]:
        """Round by round: a case over the best of the others that ran."""
        rounds = [self.values(other) for other in others if self.records.get(other)]
        if not rounds or not self.records.get(name):
            return []
        return [a / max(b) for a, *b in zip(self.values(name), *rounds, strict=True)]


def sources_needed(design: str) -> list[str]:
    """What must lie in the folder for a design to run."""
    limits = CPU_LIMITS | GPU_LIMITS
    return [limits[design][1] if design in limits else source_of(design)]


def run_child(args: argparse.Namespace, case: Case) -> dict:
    """Run a case in a process of its own and return what it printed.

    Raises:
        ValueError: with the reason, if it fails.
    """
    names = ["frames", "size", "batch_size", "threads", "min_crop_area"]
    names += ["device", "seconds", "warmup", "rounds", "stem"]
    if args.cold and case.design in ENGINES and ENGINES[case.design].stores:
        raise ValueError("reads a copy of the data of its own, which --cold does not drop from memory")
    settings = {name: getattr(args, name) for name in names} | dict(case.options)
    command = [interpreter(case.design), __file__, "--design", case.design, "--folder", str(case.folder)]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += [f"--{name}" for name in ("cold", "starve", "compile") if getattr(args, name)]
    command += ["--soak", str(args.soak)] if args.soak else []
    limit_s = 600 + 20 * args.seconds * args.rounds + 60 * (args.soak or 0)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=with_ffmpeg(args.cache))
    except subprocess.TimeoutExpired:
        raise ValueError(f"still not done after {limit_s / 60:.0f} minutes: ended") from None
    if done.returncode:
        raise ValueError(last_line(done.stderr))
    return json.loads(last_line(done.stdout))


def run_all(args: argparse.Namespace, cases: Sequence[Case], rounds: int) -> Results:
    """Every case once a round, forwards and backwards in turn."""
    results = Results({}, {})
    for case in cases:
        for source in sources_needed(case.design):
            try:
                prepare(case.folder, source)
            except ValueError as error:
                results.failed[case.name] = str(error)
    if not args.cold:
        places = {
            (case.folder, s) for case in cases if case.name not in results.failed for s in sources_needed(case.design)
        }
        for folder, source in sorted(places):
            warm(files_of(folder, source))
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            if case.name in results.failed:
                continue
            try:
                record = run_quietly(args, case, new=number == 0)
            except ValueError as error:
                results.failed[case.name] = str(error)
                results.records.pop(case.name, None)
                print(f"{case.name}: {printable(error)}", file=sys.stderr)
                continue
            results.records.setdefault(case.name, []).append(record)
            speed, foreign = record["clips_per_s"], record["foreign_cores"]
            print(f"round {number + 1}/{rounds}  {case.name}: {speed:,.1f} clips/s (others: {foreign:.2f} cores)",
                  file=sys.stderr, flush=True)  # fmt: skip
    return results


def run_quietly(args: argparse.Namespace, case: Case, new: bool) -> Record:
    """The least disturbed of up to 1 + REPEATS runs, the first that was not disturbed."""
    records = []
    for _ in range(1 + REPEATS):
        wait_for_quiet(args.patience)
        for index in case.indexes if new else ():
            index.unlink(missing_ok=True)
        cold = {}
        if args.cold:
            cold["resident"] = chill([f for s in sources_needed(case.design) for f in files_of(case.folder, s)])
        records.append(run_child(args, case) | cold)
        if records[-1]["foreign_cores"] <= QUIET or not args.patience:
            break
    return min(records, key=lambda record: record["foreign_cores"]) | {"runs": len(records)}


# ---- The comparison.


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Measure the designs and return the report."""
    limits = CPU_LIMITS if args.device == "cpu" else GPU_LIMITS
    designs = args.designs or [*ours_on(args.device), *(ALL_PEERS if args.peers else [REFERENCE]), *limits]
    results = run_all(args, [Case(name, name, folder, {}) for name in designs], args.rounds)

    ratios = {}
    for key, source in RATIOS.items():
        rivals = [p for p in PEERS if source_of(p) == "video"] if key == "video" else [REFERENCE]
        ratios[key] = results.ratios(f"dfer-{source}", rivals)
    best = {key: best_peer(results, source) for key, source in RATIOS.items()}
    of_best = {key: results.ratios(f"dfer-{s}", [best[key]]) if best[key] else [] for key, s in RATIOS.items()}
    of_limit = {key: results.ratios(f"dfer-{s}", limits_of(args.device, s)) for key, s in RATIOS.items()}
    return {
        "clips_per_s": {name: results.values(name) for name in designs if name in results.records},
        "ratios": {key: statistics.median(values) if values else None for key, values in ratios.items()},
        "ratios_by_round": ratios,
        "best_peers": best,
        "of_best_peer": {key: statistics.median(values) if values else None for key, values in of_best.items()},
        "of_limit": {key: statistics.median(values) if values else None for key, values in of_limit.items()},
        "failed": results.failed,
        "runs": results.records,
    }


def best_peer(results: Results, source: str) -> str | None:
    """The peer of a kind of storage with the highest median of those that ran."""
    ran = [name for name in ALL_PEERS if source_of(name) == source and results.values(name)]
    return max(ran, key=lambda name: statistics.median(results.values(name)), default=None)


def table_of(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def print_comparison(args: argparse.Namespace, report: dict, console: Console) -> None:
    results = Results(report["runs"], report["failed"])
    table = table_of("clips/s", "design", "median", "min", "max", f"x {REFERENCE}", "of its limit", "")
    sections = [[name for name in (*OURS, *ALL_PEERS) if source_of(name) == source] for source in SOURCES]
    known = report["clips_per_s"].keys() | report["failed"].keys()
    for names in (*sections, CPU_LIMITS | GPU_LIMITS):
        for name in names:
            if name in report["failed"]:
                table.add_row(name, "-", *4 * [""], "failed, see below")
            elif name in known:
                speeds = results.values(name)
                cells = [f"{f(speeds):,.1f}" for f in (statistics.median, min, max)]
                ratio = results.ratios(name, [REFERENCE])
                cells.append(f"{statistics.median(ratio):.2f}" if ratio else "-")
                share = (
                    [] if name.startswith("limit") else results.ratios(name, limits_of(args.device, source_of(name)))
                )
                cells.append(f"{100 * statistics.median(share):.0f} %" if share else "-")
                table.add_row(name, *cells, note_of(name))
        table.add_section()
    console.print(table)
    for key, peer in report["best_peers"].items() if args.peers else ():
        if report["of_best_peer"][key]:
            console.print(f"{key}: {report['of_best_peer'][key]:.2f} times the best peer, {peer}")


# ---- The other questions: growth, starvation, memory.


def growth_cases(args: argparse.Namespace, folder: Path) -> list[Case]:
    """The designs over the values of an axis.

    Raises:
        ValueError: in one line, if lists cannot be made.
    """
    threads = sorted({2**i for i in range(CORES.bit_length())} | {CORES})
    axes = {
        "batch": ("batch_size", [2, 4, 8, 16, 32, 64]),
        "frames": ("frames", [8, 16, 32]),
        "size": ("size", [64, 112, 224]),
        "threads": ("threads", [n for n in threads if n <= CORES]),
        "clip-length": (None, [20, 40, 80, 160, 320]),
        "list-length": (None, [100, 1_000, 10_000, 100_000]),
    }
    option, values = axes[args.growth]
    cases = []
    for design in args.designs or ["dfer-frames"]:
        for value in values:
            place, options, lists = folder, {option: value} if option else {}, []
            if args.growth == "clip-length":
                place = linked_clips(folder, value)
                lists = [place / "frames.txt"]
            elif args.growth == "list-length":
                for source in dict.fromkeys(["frames", *sources_needed(design)]):
                    prepare(folder, source)
                    lists.append(repeat_list(folder if source == "frames" else folder / source, value))
                options = {"stem": f"list-{value}"}
            indexes = tuple(Path(f"{path}.index.npz") for path in lists)
            cases.append(Case(f"{design} {value}", design, place, options, indexes))
    return cases


def grow(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    cases = growth_cases(args, folder)
    results = run_all(args, cases, args.rounds)
    title = f"{args.growth}: clips/s, seconds from nothing to the first batch of a new and of a known list, MiB"
    table = table_of(title, f"design, {args.growth}", "median", "min", "max", "new list", "known list", "memory")
    for case in cases:
        if case.name in results.failed:
            table.add_row(case.name, "-")
            continue
        speeds, first = results.values(case.name), results.values(case.name, "first_batch_s")
        cells = [f"{f(speeds):,.1f}" for f in (statistics.median, min, max)]
        known = first[1:] if case.indexes else first
        cells += [f"{first[0]:.2f}" if case.indexes else "-", f"{statistics.median(known):.2f}" if known else "-"]
        table.add_row(case.name, *cells, f"{statistics.median(results.values(case.name, 'memory_mib')):,.0f}")
    console.print(table)
    return {"growth": args.growth, "clips_per_s": {c.name: results.values(c.name) for c in cases},
            "failed": results.failed, "runs": results.records}  # fmt: skip


def each(args: argparse.Namespace, folder: Path, designs: Sequence[str]) -> tuple[dict, dict]:
    """What one process tells of each design, and why others cannot."""
    found, failed = {}, {}
    for design in designs:
        print(design, file=sys.stderr)
        try:
            for source in sources_needed(design):
                prepare(folder, source)
                warm(files_of(folder, source))
            wait_for_quiet(args.patience)
            found[design] = run_child(args, Case(design, design, folder, {}))
        except ValueError as error:
            failed[design] = str(error)
    return found, failed


def starve_all(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    found, failed = each(args, folder, args.designs or ours_on(args.device))
    title = f"training beside the loader, {args.frames} x {args.size} px, batch {args.batch_size}: medians"
    table = table_of(
        title, "design", "clips/s", "on one synthetic batch", "fraction of synthetic", "data wait", "steps a run"
    )
    for design, record in found.items():
        speed, synthetic, fraction, wait, steps = (
            statistics.median(record[key])
            for key in ("clips_per_s", "synthetic_clips_per_s", "fraction_of_synthetic", "data_wait_share", "steps")
        )
        table.add_row(
            design, f"{speed:,.1f}", f"{synthetic:,.1f}", f"{fraction:.3f}", f"{100 * wait:.1f} %", f"{steps:.0f}"
        )
    for design in failed:
        table.add_row(design, "-")
    console.print(table)
    return {"starve": found, "failed": failed}


def soak_all(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    found, failed = each(args, folder, args.designs or ["dfer-frames"])
    title = "memory after each epoch, in MiB, without mapped files"
    table = table_of(title, "design", "epochs", "first", "middle", "last", "slope an epoch", "per 1,000 clips")
    for design, record in found.items():
        memory = record["memory_mib"]
        record["slope_mib_per_epoch"] = slope = settled_slope(memory)
        cells = [f"{m:,.1f}" for m in (memory[0], memory[len(memory) // 2], memory[-1])]
        per_clip = 1000 * slope / record["epoch_clips"][0]
        table.add_row(design, str(len(memory)), *cells, f"{slope:+.3f}", f"{per_clip:+.3f}")
    for design in failed:
        table.add_row(design, "-")
    console.print(table)
    return {"soak": found, "failed": failed}


def settled_slope(memory: Sequence[float]) -> float:
    """MiB an epoch by least squares, without the first third, in which buffers find their size."""
    settled = memory[len(memory) // 3 :]
    return float(np.polyfit(np.arange(len(settled)), settled, 1)[0])


# ---- The command line.


def print_caveats(args: argparse.Namespace, report: dict, console: Console) -> None:
    for name, reason in report["failed"].items():
        console.print(f"{name}: {escape(printable(reason))}", soft_wrap=True)
    runs = [record for records in report.get("runs", {}).values() for record in records]
    runs += [{"foreign_cores": record["foreign_cores"][0]} for record in report.get("starve", {}).values()]
    disturbed = sum(record["foreign_cores"] > QUIET for record in runs)
    if disturbed:
        worst = max(record["foreign_cores"] for record in runs)
        console.print(
            f"NOT QUIET: in {disturbed} of {len(runs)} runs other processes took more than {QUIET} cores (up to "
            f"{worst:.2f}); do not quote these figures"
        )
    if args.cold and report.get("runs"):
        console.print(
            f"cold: at most {100 * max(run['resident'] for run in runs):.1f} % of a design's pages were in memory when "
            "it started; caches of the disk itself and of a virtual machine's host are out of reach"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("loader_speed.py", __doc__)
    known = [*OURS, *ALL_PEERS, *(CPU_LIMITS | GPU_LIMITS)]

    def designs(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"no design {name!r}; there are {', '.join(known)}")
        return list(dict.fromkeys(names))

    def picture(text: str) -> Path:
        if Path(text).suffix not in (".svg", ".png"):
            raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg or .png")
        return Path(text)

    whole, number = lambda low, high: in_range(int, low, high), lambda low, high: in_range(float, low, high)
    data = parser.add_argument_group("data")
    data.add_argument("--list", type=Path, default=Path("data/faces/train.txt"), help="a list of folders of frames")
    data.add_argument("--root", type=Path, help="where its relative paths start")
    data.add_argument("--clips", type=whole(1, 10**7), default=400, help="how many of them, evenly spaced (400)")
    data.add_argument("--cache", type=Path, default=Path("data/bench"), help="where they are packed, once (data/bench)")
    data.add_argument("--cold", action="store_true", help="drop the files from memory before each run")
    work = parser.add_argument_group("the work")
    work.add_argument("--frames", type=whole(1, 1024), help="of a clip (16)")
    work.add_argument("--size", type=whole(8, 2048), help="px of a clip (112)")
    work.add_argument("--batch-size", type=whole(1, 4096), default=16, help="clips (16)")
    work.add_argument("--threads", type=whole(1, 1024), default=CORES, help="or worker processes (the cores)")
    work.add_argument("--min-crop-area", type=number(0.01, 1), default=0.08, help="share of a frame (0.08)")
    work.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    run = parser.add_argument_group("the measurement")
    run.add_argument("--designs", type=designs, help="only these, with commas between")
    run.add_argument("--peers", action="store_true", help="all peers, not the field's own way alone: make bench-peers")
    run.add_argument("--rounds", type=whole(1, 1000), default=3)
    run.add_argument("--seconds", type=number(0.01, 3600), default=5.0, help="at least, of each run (5)")
    run.add_argument("--warmup", type=whole(1, 10**6), default=4, help="batches before the clock starts (4)")
    run.add_argument("--patience", type=number(0, 86400), default=30.0,
                     help="seconds that a run waits for a quiet machine; 0: no wait and no repeats (30)")  # fmt: skip
    run.add_argument("--json", type=Path, help="write all figures here")
    run.add_argument("--plot", type=picture, metavar="FILE.svg|png", help="draw clips/s by kind of storage")
    other = parser.add_argument_group("other questions").add_mutually_exclusive_group()
    other.add_argument("--starve", action="store_true", help="train beside the loader; see also --compile")
    axes = ("batch", "frames", "size", "threads", "clip-length", "list-length")
    other.add_argument("--growth", choices=axes, help="the designs over values of this")
    other.add_argument("--soak", type=number(0.001, 10**5), metavar="MINUTES", help="memory after each epoch")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model that --starve trains")
    parser.add_argument("--design", choices=known, metavar="NAME", help="one measurement here, as a line of JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of data that lie there, for --design
    parser.add_argument("--stem", default="frames", help=argparse.SUPPRESS)  # of the lists in it
    args = parser.parse_args(arguments)
    # The model on a CPU is slow: as the preset `faces` there.
    small = args.starve and args.device == "cpu"
    args.frames, args.size = args.frames or (8 if small else 16), args.size or (48 if small else 112)
    if args.device == "gpu" and not torch.cuda.is_available():
        parser.error("--device gpu: no NVIDIA GPU is visible here")
    for path in filter(None, (args.json, args.plot)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'its folder is missing'}")
    if args.cold and (args.starve or args.soak):
        parser.error("--cold is for the comparison and for --growth: what was read once is no longer cold")
    if args.plot and (args.starve or args.growth or args.soak):
        parser.error("--plot draws the comparison, not --starve, --growth or --soak")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error(f"--plot needs matplotlib: {BENCH_HINT}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.design:
        return child(args)
    try:
        folder = prepare_frames(args.list, args.root, args.clips, args.cache)
        data = describe_data(args.list, folder)
    except ValueError as error:
        print(f"loader_speed.py: {printable(error)}", file=sys.stderr)
        return 2
    if args.batch_size > data["clips"]:
        print(f"loader_speed.py: {printable(args.list)}: {data['clips']} clips do not fill a batch of "
              f"{args.batch_size}; lower --batch-size", file=sys.stderr)  # fmt: skip
        return 2
    hidden = ("json", "plot", "design", "folder", "stem")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in hidden}
    words = sys.argv[1:] if arguments is None else arguments
    report = {
        "command": " ".join(["python", "benchmarks/loader_speed.py", *words]),
        "settings": settings,
        "machine": machine(),
        "data": data,
    }
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(escape(headline(report)))
    if args.growth:
        report |= grow(args, folder, console)
    elif args.starve:
        report |= starve_all(args, folder, console)
    elif args.soak:
        report |= soak_all(args, folder, console)
    else:
        report |= compare(args, folder)
        print_comparison(args, report, console)
    print_caveats(args, report, console)
    if args.json:
        partial = args.json.with_name(f"{args.json.name}.partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, args.json)
    if args.plot:
        draw(args.plot, report, headline(report))
    broken = [name for name in report["failed"] if name.startswith("dfer-")]
    return 1 if broken else 0  # a peer may be missing, but ours must run


if __name__ == "__main__":
    sys.exit(main())
