"""Training on a CPU beside other work: `python benchmarks/busy.py [--neighbours 0 2 3] [--ways threads threads=1]`.

Each round takes all ways of training in turn, beside each number of busy processes (of one thread, which never waits),
so that what the machine does otherwise meets all alike. The *fair share* is what the scheduler owes a trainer with a
thread on each of C cores beside N such processes: C / (C + N) of what the first way does on the idle machine. The last
column is the speed over that, of medians over the rounds. On a machine that is not quiet it says nothing.

Ways: threads (one for each core, as --run.threads 0), threads=N, processes (one thread each, as torchrun starts them),
and spinning, passive, nospin, bound: as threads, with libgomp's own GOMP_SPINCOUNT=300000, OMP_WAIT_POLICY=PASSIVE,
GOMP_SPINCOUNT=0, OMP_PROC_BIND=true. But for those named, threads wait as our commands have them wait (dfer/cli.py).
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, begin, in_range, one_line_errors, usable_cores

SETTINGS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "nospin": {"GOMP_SPINCOUNT": "0"},
    "bound": {"OMP_PROC_BIND": "true"},
}
WAYS = ("threads", "threads=1", "processes", *SETTINGS)
BATCH, FRAMES, SIZE = 16, 8, 48  # as the preset faces on a CPU
WARM_UP = 2  # steps


def environment(way: str, cores: int) -> tuple[int, int, dict[str, str]]:
    """Return the processes of a way, the threads of each, and what their environment has besides."""
    if way == "processes":
        return cores, 1, {}
    return 1, int(way.partition("=")[2] or cores), SETTINGS.get(way, {})


def train(batch: int, threads: int, seconds: float) -> None:
    """Take the steps of one process for so long, and print the clips/s, with the CPU time that a clip took."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from dfer.config import ModelConfig
    from dfer.model.build import build_model
    from dfer.optim.optimizers import build_optimizer
    from dfer.run.distributed import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model(ModelConfig(), FRAMES).train().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    clips = torch.randn(batch, FRAMES, SIZE, SIZE, 3).permute(0, 1, 4, 2, 3)
    labels = torch.arange(batch) % 7
    began = cpu = 0.0
    for step in itertools.count():
        if step == WARM_UP:
            began, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(clips).logits, labels).backward()
        optimizer.step()
        over = torch.tensor(float(step > WARM_UP and time.perf_counter() - began > seconds))
        if dist.is_initialized():  # all end with the same step
            dist.all_reduce(over)
        if over:
            break
    took, num_clips = time.perf_counter() - began, batch * (step + 1 - WARM_UP)
    print(json.dumps({"clips_per_s": num_clips / took, "cpu_ms": 1000 * (time.process_time() - cpu) / num_clips}))
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Keep so many processes busy."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measured(way: str, cores: int, seconds: float) -> float:
    """Return the clips/s of a way, of all its processes together."""
    processes, threads, more = environment(way, cores)
    words = [__file__, "--child", str(BATCH // processes), str(threads), str(seconds)]
    command = [sys.executable, *words]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, *words]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), **more}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sum(row["clips_per_s"] for row in rows)


def fair(idle: float, cores: int, busy: int) -> float:
    """Return the clips/s that a trainer with a thread on each core is owed beside so many busy processes."""
    return idle * cores / (cores + busy)


def run(args: argparse.Namespace) -> None:
    """Measure, and print a row for each way and number of neighbours, as JSON lines and as a table."""
    cores = usable_cores()
    counts = sorted({0, *args.neighbours})
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(args.rounds):
        for busy, way in itertools.product(counts, args.ways):
            with neighbours(busy):
                speed = measured(way, cores, args.seconds)
            found.setdefault((way, busy), []).append(speed)
            print(json.dumps({"round": number, "way": way, "neighbours": busy, "clips_per_s": speed}), flush=True)
    idle = statistics.median(found[args.ways[0], 0])
    print(f"{'way':<12}{'neighbours':>11}{'clips/s':>9}{'of the fair share':>19}")
    for (way, busy), speeds in found.items():
        speed = statistics.median(speeds)
        print(f"{way:<12}{busy:>11}{speed:>9.1f}{speed / fair(idle, cores, busy):>19.2f}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("busy", __doc__)
    parser.add_argument("--neighbours", type=in_range(int, 0, 64), nargs="+", default=[2, 3], help="busy processes")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="the first one, idle, is what fair is a share of")
    parser.add_argument("--rounds", type=in_range(int, 1, 100), default=3)
    parser.add_argument("--seconds", type=in_range(float, 0.1, 600), default=20.0, help="of each measurement")
    args = parser.parse_args(arguments)
    for way in args.ways:
        if way not in WAYS and not (way.startswith("threads=") and way[8:].isdecimal() and int(way[8:])):
            parser.error(f"--ways {way}: choose from {', '.join(WAYS)}, threads=N")
    return one_line_errors("busy", lambda: run(args))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        begin("busy", "torch")
        sys.exit(train(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    sys.exit(main())
