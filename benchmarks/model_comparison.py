"""Does each part of the model earn its keep? `python benchmarks/model_comparison.py [--variants crf]`

Trains variants of the model on the embedded data set with the same preset, seeds, epochs and clips, in turn, and prints
WAR and UAR of the last epoch:

  baseline   the full model and its mean-pooled baseline (the same backbone, no order of frames)
  crf        what the CRF writes back, how often it iterates, and two other layers in its place

What they score says nothing about DFEW or FERV39k; that the full model beats its baseline says that the time course is
seen. Runs are kept in the log folder: the same command continues where it was cut off, and a new comparison wants a new
--log-dir. Words for train.py go after --, as in `-- --optim.epochs 4`.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import Parser

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {  # the first is what the others are compared with
    "baseline": {"dfernet": [], "mean-pool": ["--model.name", "mean-pool"]},
    "crf": {
        "both-t3": [],
        "none-t3": ["--model.readout", "none"],
        "labels-t3": ["--model.readout", "labels"],
        "value-t3": ["--model.readout", "value"],
        "both-t0": ["--model.iterations", "0"],
        "both-t1": ["--model.iterations", "1"],
        "both-t5": ["--model.iterations", "5"],
        "messages": ["--model.crf", "messages"],
        "gaussian": ["--model.crf", "gaussian"],
    },
}


def train(variant: str, flags: list[str], seed: int, log_dir: Path, extra: list[str]) -> dict[str, float]:
    """Train once, from a shell as a user would, and read the last evaluation. A run that was cut off is continued."""
    name = f"comparison-{variant}-seed{seed}"
    command = [sys.executable, str(ROOT / "train.py"), "faces", *flags, "--seed", str(seed), "--run.name", name]
    settings = ["--run.log-dir", str(log_dir), "--run.wandb", "off", *extra]
    subprocess.run([*command, *settings], check=True)
    rows = [json.loads(line) for line in (log_dir / name / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/WAR" in row][-1]
    return {"seed": seed, "epochs": last["epoch"], "WAR": last["val/WAR"], "UAR": last["val/UAR"]}


def with_error(values: list[float]) -> str:
    """Mean and, of several values, its standard error."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main(args: argparse.Namespace) -> None:
    log_dir = args.log_dir.resolve()
    variants = VARIANTS[args.variants]
    results = {name: [] for name in variants}
    for seed in range(args.seeds):
        for name in variants if seed % 2 == 0 else reversed(variants):
            results[name].append(train(name, variants[name], seed, log_dir, args.extra))

    first = next(iter(variants))
    table = Table(title=f"last epoch, {args.seeds} seeds: mean ± standard error; gains per seed of {first}")
    for column in ("variant", "WAR", "UAR", "WAR gained by"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    gains = {}
    for name, runs in results.items():
        gains[name] = [ours["WAR"] - other["WAR"] for ours, other in zip(results[first], runs, strict=True)]
        cells = (with_error([run[key] for run in runs]) for key in ("WAR", "UAR"))
        table.add_row(name, *cells, "" if name == first else with_error(gains[name]))
    Console().print(table)
    if args.json:
        report = {
            "command": " ".join(["python", "benchmarks/model_comparison.py", *sys.argv[1:]]),
            "machine": {
                "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
                "cores": torch.get_num_threads(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "runs": results,
            "WAR_gained_by_first": gains,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = Parser("model_comparison", __doc__)
    parser.add_argument("--variants", choices=VARIANTS, default="baseline")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log-dir", type=Path, default=Path("logs/comparison"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("extra", nargs="*", help="further words for train.py, after --")
    try:
        main(parser.parse_args())
    except subprocess.CalledProcessError as error:
        print(f"model_comparison.py: a training run failed with exit code {error.returncode}", file=sys.stderr)
        sys.exit(2)
