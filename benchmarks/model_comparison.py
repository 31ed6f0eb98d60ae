"""Does the full model earn its keep? `python benchmarks/model_comparison.py`

Trains the full model and its mean-pooled baseline (the same backbone, no order of frames) on the embedded data set with
the same preset, seeds, epochs and clips, in turn, and prints WAR and UAR of the last epoch. What the two score says
nothing about DFEW or FERV39k; that the first beats the second says that the time course is seen. Runs are kept in the
log folder: the same command continues where it was cut off, and a new comparison wants a new --log-dir.
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

from dfer.commandline import Parser

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("dfernet", "mean-pool")


def train(model: str, seed: int, log_dir: Path, extra: list[str]) -> dict[str, float]:
    """Train once, from a shell as a user would, and read the last evaluation. A run that was cut off is continued."""
    name = f"comparison-{model}-seed{seed}"
    command = [sys.executable, "train.py", "faces", "--model.name", model, "--seed", str(seed), "--run.name", name]
    resume = ["--resume"] if (log_dir / name / "last.pt").exists() else []
    settings = ["--run.log-dir", str(log_dir), "--run.wandb", "off", *resume, *extra]
    subprocess.run([*command, *settings], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (log_dir / name / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "val/WAR" in row][-1]
    return {"seed": seed, "epochs": last["epoch"], "WAR": last["val/WAR"], "UAR": last["val/UAR"]}


def main(args: argparse.Namespace) -> None:
    log_dir = args.log_dir.resolve()
    results = {model: [] for model in MODELS}
    for seed in range(args.seeds):
        for model in MODELS if seed % 2 == 0 else reversed(MODELS):
            results[model].append(train(model, seed, log_dir, args.extra))

    table = Table(title=f"last epoch, {args.seeds} seeds: mean and range")
    for column in ("model", "WAR", "UAR"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model, runs in results.items():
        cells = [
            f"{statistics.mean(r[key] for r in runs):.1f} ({min(r[key] for r in runs):.1f} to "
            f"{max(r[key] for r in runs):.1f})"
            for key in ("WAR", "UAR")
        ]
        table.add_row(model, *cells)
    gains = [a["WAR"] - b["WAR"] for a, b in zip(results["dfernet"], results["mean-pool"], strict=True)]
    console = Console()
    console.print(table)
    console.print(f"WAR gained over the baseline, per seed: {', '.join(f'{g:.1f}' for g in gains)}")
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
            "WAR_gain": {"mean": statistics.mean(gains), "all": gains},
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = Parser("model_comparison", __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--log-dir", type=Path, default=Path("logs/comparison"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("extra", nargs="*", help="further words for train.py, after --")
    try:
        main(parser.parse_args())
    except subprocess.CalledProcessError as error:
        print(f"model_comparison.py: a training run failed with exit code {error.returncode}", file=sys.stderr)
        sys.exit(2)
