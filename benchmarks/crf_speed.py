"""What does the CRF cost? `python benchmarks/crf_speed.py [--step] [--json FILE] [--plot FILE.svg|png]`

Forward and backward pass of mean-field inference, by number N of tokens and B of clips: 16 states, 3 iterations, 64
values, float32 on a CPU and bf16 operands on a GPU. The designs take turns; printed are medians over the rounds.

  dense, triton, sdpa   our backends
  naive dense           the same sums as matrix products, differentiated by autograd; equal to ours
  window                ConvCRF's method: neighbours in a window of 11 x 11 cells of a picture, by unfolding. Its
                        published code takes the first message from log-probabilities; this one does not
  layer, attention      our whole layer, projections, inference and readout, and one layer of torch's multi-head
                        attention of the same width 256, with 8 heads
  permutohedral         pydensecrf, if installed: two dimensions, forward pass only, approximate
  limit                 what the arithmetic of `dense` takes at the speeds of matrix product and exp measured here

Memory is what forward keeps for backward and the peak of both passes. `--step` measures the share of a training step:
the model with the CRF, with the naive one in its place, and without, in turns. On a CPU the trainer has the C library
keep freed memory, and so has `--step`; the designs run with the C library's defaults unless --keep-memory is given.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dfer.crf.layers
from benchmarks.crf_peers import (
    ITERATIONS,
    SHAPES,
    STATES,
    VALUES,
    WIDTH,
    WINDOW,
    AttentionLayer,
    make_problem,
    naive,
    naive_meanfield,
    ours,
    permutohedral,
    window,
)
from benchmarks.loader_speed import BENCH_HINT, machine
from benchmarks.quiet import Usage, wait_for_quiet
from dfer.cli import Parser, in_range
from dfer.crf.layers import MeanFieldCRF
from dfer.model import DFERNet
from dfer.run.distributed import keep_freed_memory

# Pixels, frames and clips of the training steps.
STEPS = {"cpu": [(48, 8, 16), (112, 16, 8)], "cuda": [(112, 16, 64), (112, 16, 256)]}

# ---- Measurements.


def passes(design: str, num_tokens: int, batch: int, device: str) -> Callable[[], object]:
    """One forward and backward pass of a design."""
    if design in ("layer", "attention"):
        num_frames, *sides = SHAPES[num_tokens]
        autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        if design == "layer":
            module = MeanFieldCRF(WIDTH, 7, (16, 32), num_frames).to(device)
            inputs = [torch.randn(batch, num_frames, WIDTH, *side, device=device) for side in sides]
        else:
            module = AttentionLayer().to(device)
            inputs = [torch.randn(batch, num_tokens, WIDTH, device=device)]
        inputs = [x.requires_grad_() for x in inputs]

        def run_module() -> None:
            with autocast:
                out = module(inputs)[0] if design == "layer" else [module(inputs[0])]
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

        return run_module
    problem = make_problem(num_tokens, batch, device)
    if design == "permutohedral":
        return lambda: permutohedral(problem)
    operands = torch.bfloat16 if device == "cuda" else torch.float32
    infer = {"naive dense": naive, "window": window}.get(design, lambda p: ours(p, design, operands))
    generator = torch.Generator().manual_seed(1)
    towards = [torch.randn(batch, num_tokens, n, generator=generator).to(device) for n in (STATES, VALUES)]

    def run() -> tuple:
        inputs = problem.inputs()
        outputs = infer(inputs)
        if design != "window":
            return (*outputs, *torch.autograd.grad(outputs, inputs, towards))
        used = [inputs.unary, inputs.points, inputs.compatibility, inputs.values]
        return (*outputs, *torch.autograd.grad(outputs, used, towards))

    return run


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def saved_bytes(run: Callable[[], object]) -> int:
    """What forward keeps for backward, storages that are shared counted once."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory in use at a time beyond what was before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # or it would be served from what earlier passes have left
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status_kib("VmRSS")
    run()
    return 1024 * max(status_kib("VmHWM") - before, 0)


def status_kib(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1])


def machine_speeds(device: str) -> dict[str, float]:
    """Multiply-adds and exponentials per second at sizes that suit the machine."""
    operands = torch.bfloat16 if device == "cuda" else torch.float32
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=operands) for _ in range(2))
    x = torch.rand(2**28 if device == "cuda" else 2**18, device=device).neg_()
    out = torch.empty_like(x)
    best = {}
    for name, run, work in (
        ("mac_per_s", lambda: a @ b, side**3),
        ("exp_per_s", lambda: torch.exp(x, out=out), x.numel()),
    ):
        best[name] = work / min(timed(run, device) for _ in range(30))
    return best


def limit_seconds(num_tokens: int, batch: int, speeds: dict[str, float]) -> float:
    """Time of the arithmetic alone, appearance kernel: nothing but products and exponentials, each at full speed.

    Forward: the kernel, I sweeps of L states, one of C values. Backward: the kernel again, the sweeps again, their
    adjoints, and the gradient's product of rank I L + C with its two products with the points.
    """
    points = 32
    forward = points + ITERATIONS * STATES + VALUES
    backward = points + 2 * ITERATIONS * STATES + VALUES + (ITERATIONS * STATES + VALUES) + 2 * points
    pairs = batch * num_tokens**2
    return pairs * (forward + backward) / speeds["mac_per_s"] + 2 * pairs / speeds["exp_per_s"]


def measure(args: argparse.Namespace) -> dict:
    """All designs at all sizes: {"n1040_b8": {"ms": {design: [..]}, "saved_mb": {...}, "peak_mb": {...}}}."""
    speeds, cells, skipped = machine_speeds(args.device), {}, {}
    per_pair: dict[str, float] = {}  # seconds, from the sizes before: what is bigger can be foreseen
    console = Console(stderr=True)
    for num_tokens in args.tokens:
        for batch in args.batches:
            cell = {"ms": {}, "saved_mb": {}, "peak_mb": {}, "limit_ms": 1e3 * limit_seconds(num_tokens, batch, speeds)}
            name, pairs = f"n{num_tokens}_b{batch}", batch * num_tokens**2
            runs = {}
            for design in args.designs:
                # 40 bytes a pair is what autograd keeps of the naive one; a window keeps its points unfolded.
                need = {"naive dense": 40 * pairs, "window": 8 * batch * num_tokens * WINDOW**2 * 100}.get(design, 0)
                if need > 0.5 * free_bytes(args.device):
                    skipped[f"{name} {design}"] = f"memory: some {need / 1e9:.0f} GB"
                elif per_pair.get(design, 0) * pairs > args.limit:
                    skipped[f"{name} {design}"] = f"time: some {per_pair[design] * pairs:.0f} s for one pass"
                else:
                    runs[design] = passes(design, num_tokens, batch, args.device)
            console.print(f"{name}: {', '.join(runs) or 'nothing fits'}")
            for design, run in runs.items():
                cell["saved_mb"][design] = saved_bytes(run) / 1e6  # warms up, too
                cell["peak_mb"][design] = peak_bytes(run, args.device) / 1e6
                cell["ms"][design] = []
            wait_for_quiet(args.patience)
            start = Usage.now()
            for round_ in range(args.rounds):
                for design in runs if round_ % 2 == 0 else reversed(runs):
                    cell["ms"][design].append(1e3 * timed(runs[design], args.device))
            cell["foreign_cores"] = Usage.now().since(start)["foreign_cores"]
            if {"dense", "naive dense"} <= runs.keys():
                cell["difference"] = differences(runs["dense"](), runs["naive dense"]())
            per_pair |= {design: min(ms) / 1e3 / pairs for design, ms in cell["ms"].items()}
            cells[name] = cell
    return {"speeds": speeds, "cells": cells, "not_run": skipped}


def differences(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> dict[str, float]:
    """Of marginals, absolute; of gradients, relative to the largest."""
    ours, theirs = list(ours), list(theirs)
    relative = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {"marginals": (ours[0] - theirs[0]).abs().max().item(), "values_and_gradients": max(relative)}


def free_bytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    (line,) = (x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


class NoCRF(nn.Module):
    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], object]:
        return levels, dfer.crf.layers.CRFOutput(None, None, {})


def measure_steps(args: argparse.Namespace) -> dict:
    """Training steps with our CRF, with the naive one, and with none: {"48 px, T=8, B=16": {"ms": ...}}."""
    gpu = args.device == "cuda"
    native = gpu or torch.cpu._is_avx512_bf16_supported()
    report = {}
    for size, num_frames, batch in STEPS[args.device]:
        clips = torch.randn(batch, num_frames, 3, size, size, device=args.device)
        labels = torch.arange(batch, device=args.device) % 7
        steps = {}
        for name in ("ours", "naive dense", "no CRF"):
            torch.manual_seed(0)
            model = DFERNet(num_frames).to(args.device).to(memory_format=torch.channels_last)
            if name == "no CRF":
                model.crf = NoCRF()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=gpu)
            steps[name] = step_of(model, optimizer, clips, labels, native, naive=name == "naive dense")
        ms = {name: [] for name in steps}
        for step in steps.values():
            step()
        wait_for_quiet(args.patience)
        start = Usage.now()
        for round_ in range(3 * args.rounds):  # what is to be seen is a small part of each
            for name in steps if round_ % 2 == 0 else reversed(steps):
                ms[name].append(1e3 * timed(steps[name], args.device))
        without = ms["no CRF"]
        share = {
            name: statistics.median(1 - b / a for a, b in zip(ms[name], without, strict=True))
            for name in ("ours", "naive dense")
        }
        foreign = Usage.now().since(start)["foreign_cores"]
        report[f"{size} px, T={num_frames}, B={batch}"] = {"ms": ms, "share": share, "foreign_cores": foreign}
    return report


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, clips: Tensor, labels: Tensor, amp: bool, naive: bool
) -> Callable[[], None]:
    def step() -> None:
        place = mock.patch.object(dfer.crf.layers, "meanfield", naive_meanfield) if naive else contextlib.nullcontext()
        with place:
            with torch.autocast(clips.device.type, torch.bfloat16, enabled=amp):
                prediction = model(clips)
            loss = F.cross_entropy(prediction.logits.float(), labels)
            if prediction.marginals is not None:
                loss = loss + 0.2 * F.nll_loss(prediction.marginals, labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- What people see.


def ratios_of(cells: dict[str, dict]) -> dict[str, float]:
    """Of each other design's time to ours at each size, as the median over the rounds."""
    ratios = {}
    for name, cell in cells.items():
        for design, ms in cell["ms"].items():
            base = {"attention": "layer", "layer": None}.get(design, "dense")
            if base in cell["ms"] and design != base:
                pairs = zip(ms, cell["ms"][base], strict=True)
                ratios[f"{design.replace(' ', '_')}_{name}"] = statistics.median(a / b for a, b in pairs)
    return ratios


def print_report(report: dict, designs: Sequence[str], console: Console) -> None:
    table = Table(title="forward + backward in ms, median; in brackets MB kept for backward")
    table.add_column("N, B")
    for design in (*designs, "limit"):
        table.add_column(design, justify="right")
    for name, cell in report["cells"].items():
        texts = [
            f"{statistics.median(cell['ms'][d]):.1f} ({cell['saved_mb'][d]:.1f})" if d in cell["ms"] else "-"
            for d in designs
        ]
        table.add_row(name.replace("n", "").replace("_b", ", "), *texts, f"{cell['limit_ms']:.1f}")
    console.print(table)
    for what, why in report["not_run"].items():
        console.print(f"not run: {what}: {why}")
    for name, step in report.get("steps", {}).items():
        shares = ", ".join(f"{design} {100 * share:.1f} %" for design, share in step["share"].items())
        console.print(f"share of a training step, {name}: {shares}")


def draw(path: Path, report: dict, designs: Sequence[str]) -> None:
    """Time and memory of a clip over N, at the largest batch that all designs ran at."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    styles = {
        "dense": ("#1b6ca8", "o"), "triton": ("#0b3c5d", "s"), "sdpa": ("#6fa8dc", "v"),
        "naive dense": ("#c0392b", "o"), "window": ("#e39b3b", "D"), "permutohedral": ("#8e44ad", "x"),
        "layer": ("#2e8b57", "o"), "attention": ("#9a9a9a", "o"),
    }  # fmt: skip
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    batches = sorted({int(name.split("_b")[1]) for name in report["cells"]})
    batch = 8 if 8 in batches else batches[0]
    cells = {
        int(name[1:].split("_b")[0]): cell for name, cell in report["cells"].items() if name.endswith(f"_b{batch}")
    }
    for design in designs:
        colour, marker = styles[design]
        points = [(n, cell) for n, cell in cells.items() if cell["ms"].get(design)]
        if points:
            xs = [n for n, _ in points]
            ms = [statistics.median(cell["ms"][design]) / batch for _, cell in points]
            left.plot(xs, ms, marker=marker, color=colour, label=design)
            if design != "permutohedral":  # it has no backward pass
                kept = [cell["saved_mb"][design] / batch for _, cell in points]
                right.plot(xs, kept, marker=marker, color=colour, label=design)
    left.plot(list(cells), [c["limit_ms"] / batch for c in cells.values()], "k:", label="limit of the machine")
    for axes, title in ((left, "forward + backward, ms per clip"), (right, "kept for backward, MB per clip")):
        axes.set(xscale="log", yscale="log", xlabel="N, tokens of a clip")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks(list(cells), [str(n) for n in cells], fontsize=8)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=150)
    os.replace(partial, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("crf_speed.py", __doc__)
    whole, number = lambda low, high: in_range(int, low, high), lambda low, high: in_range(float, low, high)
    gpu = torch.cuda.is_available()
    known = ["dense", "sdpa", "naive dense", "window", "layer", "attention"]
    known += ["triton"] if gpu else []
    known += ["permutohedral"] if importlib.util.find_spec("pydensecrf") else []
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", choices=SHAPES, default=list(SHAPES), help="N of a clip")
    parser.add_argument("--batches", type=whole(1, 4096), nargs="+", default=[1, 8, 32, 128, 256], help="clips")
    parser.add_argument("--designs", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=whole(1, 1000), default=5)
    parser.add_argument("--limit", type=number(0.01, 3600), default=8.0, help="seconds that one pass may take (8)")
    parser.add_argument("--patience", type=number(0, 86400), default=30.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory, as the trainer does on a CPU")
    parser.add_argument("--step", action="store_true", help="share of a training step, too")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg|png")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: no NVIDIA GPU is visible here")
    for path in filter(None, (args.json, args.plot)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'its folder is missing'}")
    if args.plot and args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot {args.plot}: does not end in .svg or .png")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error(f"--plot needs matplotlib: {BENCH_HINT}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    report = {"command": " ".join(["python", "benchmarks/crf_speed.py", *words]), "machine": machine()}
    if args.keep_memory:
        keep_freed_memory()
    report |= measure(args)
    report["ratios"] = ratios_of(report["cells"])
    if args.step:
        if args.device == "cpu":
            keep_freed_memory()  # as in training
        report["steps"] = measure_steps(args)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    print_report(report, args.designs, console)
    if args.json:
        partial = args.json.with_name(f"{args.json.name}.partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, args.json)
    if args.plot:
        draw(args.plot, report, args.designs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
