"""What do products in the convolutions' place give on this CPU? `python benchmarks/convolution_speed.py [--size 48]`

Training steps of the default model on one random batch, AdamW and precision as train.py takes them, with
dfer/model/convolution.py and with the library's convolutions. They take turns in one process; medians are printed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import Parser, in_range, one_line_errors
from dfer.config import ModelConfig
from dfer.model.build import build_model
from dfer.model.convolution import Convolution
from dfer.precision import auto_amp
from dfer.run.distributed import keep_freed_memory

FRAMES = 8  # of a clip


def model(products: bool) -> nn.Module:
    """The default model, as it is or with torch's convolutions."""
    torch.manual_seed(0)
    made = build_model(ModelConfig(), FRAMES).train().to(memory_format=torch.channels_last)
    for module in made.modules():
        if isinstance(module, Convolution) and not products:
            module.__class__ = nn.Conv2d
    return made


def main(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code."""
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=auto_amp(gpu=False) == "bf16")
    clips = torch.randn(args.batch_size, FRAMES, args.size, args.size, 3).permute(0, 1, 4, 2, 3)
    labels = torch.arange(args.batch_size) % 7
    models = {"products": model(products=True), "library": model(products=False)}
    steps = {name: torch.optim.AdamW(net.parameters(), 1e-3, fused=True) for name, net in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-2, args.steps):
        for name in list(models) if number % 2 else reversed(models):
            began = time.perf_counter()
            with bf16:
                logits = models[name](clips).logits
            nn.functional.cross_entropy(logits.float(), labels).backward()
            steps[name].step()
            steps[name].zero_grad()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name:9} {args.batch_size / statistics.median(times):6.1f} clips/s")
    ratios = [library / ours for ours, library in zip(*seconds.values(), strict=True)]
    print(f"{statistics.median(ratios):.2f} times the library's, {min(ratios):.2f} to {max(ratios):.2f}")
    return 0


def parser() -> Parser:
    parser = Parser("convolution_speed", __doc__)
    parser.add_argument("--size", type=in_range(int, 32, 1024), default=48, help="px of a clip")
    parser.add_argument("--batch-size", type=in_range(int, 1, 1024), default=16)
    parser.add_argument("--threads", type=in_range(int, 1, 1024), default=2)
    parser.add_argument("--steps", type=in_range(int, 1, 10**6), default=12, help="of each")
    return parser


if __name__ == "__main__":
    sys.exit(one_line_errors("convolution_speed", lambda: main(parser().parse_args())))
