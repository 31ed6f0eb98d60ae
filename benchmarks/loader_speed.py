"""How fast do clips arrive? `python benchmarks/loader_speed.py`

Our loader against the field's: a torch DataLoader whose workers list the clip's folder, open its JPEGs one by one with
Pillow and transform frame by frame with torchvision. Same clips, same frames, crops and flips, same output (float32,
normalised). The colour jitter has the same strengths but torchvision's definition. Runs are interleaved, each after a
warm-up; medians and the ratio of each pair are reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dali_pipes.loader import ClipLoader
from dfer.commandline import Parser
from dfer.index import ClipIndex, load_index, natural_key
from dfer.sampling import IMAGENET_MEAN, IMAGENET_STD, ClipSampler, EpochPlan


class FieldClips(Dataset):
    """The way of Former-DFER's VideoDataset, which most of the field uses, with one draw per clip."""

    def __init__(self, index: ClipIndex, plan: EpochPlan, size: int, jitter: float):
        self.index, self.plan, self.size, self.jitter = index, plan, size, jitter

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, video: int) -> tuple[torch.Tensor, int]:
        record = self.index.records[video]
        names = sorted(os.listdir(record.path), key=natural_key)  # on every access, as the field does
        top, left, height, width = self.plan.box[video]
        draw = np.random.default_rng(video).uniform(1 - self.jitter, 1 + self.jitter, 3)
        frames = []
        for frame in self.plan.frames[video]:
            image = Image.open(os.path.join(record.path, names[frame])).convert("RGB")
            w, h = image.size
            box = [round(top * h), round(left * w), round(height * h), round(width * w)]
            image = F.resized_crop(image, *box, [self.size, self.size], InterpolationMode.BILINEAR)
            if self.plan.mirror[video]:
                image = F.hflip(image)
            image = F.adjust_brightness(image, draw[0])
            image = F.adjust_contrast(image, draw[1])
            image = F.adjust_saturation(image, draw[2])
            frames.append(F.normalize(F.to_tensor(image), IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist()))
        return torch.stack(frames), record.label


def clips_per_s(batches: Iterator, num_batches: int, warmup: int, batch_size: int) -> float:
    for _ in range(warmup):
        next(batches)
    began = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return num_batches * batch_size / (time.perf_counter() - began)


def main(args: argparse.Namespace) -> None:
    index = load_index(args.list, args.root)
    sampler = ClipSampler(seed=0, num_segments=args.frames)
    plan = sampler.plan(0, index.num_frames)
    workers = os.cpu_count() or 1
    num_batches = min(args.batches, len(index) // args.batch_size - args.warmup)
    if num_batches < 1:
        raise SystemExit(f"loader_speed.py: {args.list} has too few clips for {args.warmup} + 1 batches")
    loader = ClipLoader(
        index,
        sampler,
        batch_size=args.batch_size,
        size=args.size,
        device=args.device,
        num_threads=workers,
        device_id=0 if args.device == "gpu" else None,
    )

    def ours() -> Iterator:
        return loader(epoch=0)

    def field() -> Iterator:
        dataset = FieldClips(index, plan, args.size, sampler.augmentation.colour)
        order = [int(v) for v in plan.order]
        data = DataLoader(dataset, args.batch_size, sampler=order, num_workers=workers, drop_last=True)
        to_gpu = (lambda b: [t.cuda() for t in b]) if args.device == "gpu" else (lambda b: b)
        return map(to_gpu, iter(data))

    designs: dict[str, Callable[[], Iterator]] = {f"dfer (DALI, {args.device})": ours, "field (PIL DataLoader)": field}
    speeds = {name: [] for name in designs}
    for number in range(args.rounds):
        for name in list(designs) if number % 2 == 0 else reversed(designs):  # no design always goes first
            speeds[name].append(clips_per_s(designs[name](), num_batches, args.warmup, args.batch_size))
            print(f"round {number + 1}/{args.rounds}  {name}: {speeds[name][-1]:.1f} clips/s", file=sys.stderr)

    first, second = speeds.values()
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    console = Console()
    table = Table(title=f"{args.frames} frames of {args.size} px, batch {args.batch_size}, {workers} cores")
    for column in ("loader", "clips/s (median)", "min", "max"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, values in speeds.items():
        table.add_row(name, *(f"{f(values):.1f}" for f in (statistics.median, min, max)))
    console.print(table)
    console.print(f"ratio, median of {len(ratios)} pairs: {statistics.median(ratios):.2f} "
                  f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    if args.json:
        report = {
            "command": " ".join(["python", "benchmarks/loader_speed.py", *sys.argv[1:]]),
            "settings": {k: str(v) for k, v in vars(args).items() if k != "json"},
            "machine": {
                "cores": workers,
                "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "clips_per_s": speeds,
            "ratio": {"median": statistics.median(ratios), "all": ratios},
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = Parser("loader_speed", __doc__)
    parser.add_argument("--list", type=Path, default=Path("data/faces/train.txt"))
    parser.add_argument("--root", type=Path)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=20, help="timed batches per run")
    parser.add_argument("--warmup", type=int, default=4, help="batches before the clock starts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    try:
        main(parser.parse_args())
    except ValueError as error:
        print(f"loader_speed.py: {error}", file=sys.stderr)
        sys.exit(2)
