"""What a training step takes at least: `python benchmarks/floor.py [--copy B/S] [--product FLOP/S]`

Counted by watching one step of the model, operator by operator, on tensors without content, at B = 2 and at B = 3: what
is the same in both belongs to the step, the rest to each clip. An operator takes at least as long as a copy of its
inputs and outputs, each moved once, and at least as long as its FLOP, if they are those of a convolution or a matrix
product or the CRF's, of which the formula is here. The floor is the sum over the operators, which a card does one after
another. There are three, by what is one operator:

- eager: as torch calls them.
- inductor: a batch norm with the ReLU, the sum and the pool behind it is one, and its statistics another, forwards;
  backwards all of it is one. So `--run.fused` and a compiler fuse.
- fused: the same, and the statistics are computed where convolutions write, which moves nothing.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts.project import (
    config_of,
    fresh_model,
    fuse,
    fused_operators_called,
    loss_of,
    optimizer_of,
    synthetic,
)
from benchmarks.gpu_parts.setting import Setting

# What computes: its operands and results have to be in memory, all else could be computed where those read or write.
# Parts of the operators' names.
NEEDED = ("convolution", "mm", "attention", "meanfield", "adamw")
STATISTICS = "dfer::batch_statistics"
FLOORS = ("eager", "inductor", "fused")
CRF = "dfer::meanfield_backward"  # to which all of the CRF's FLOP are given: no pass of it moves much
CRF_MACS = 32 + 3 * 16 + 64 + 32 + 2 * 3 * 16 + 64 + (3 * 16 + 64) + 2 * 32  # a pair; as in benchmarks/crf_speed.py

Row = tuple[float, float, float]  # of an operator: bytes of a step, bytes and FLOP of each clip besides


class Counts(NamedTuple):
    """Of a step: the operators of each floor, and what of eager's no fusion saves."""

    eager: list[Row]
    inductor: list[Row]
    fused: list[Row]
    needed: list[Row]

    def flops(self, batch: int) -> float:
        return batch * sum(flops for _, _, flops in self.eager)

    def seconds(self, floor: str, batch: int, copy_rate: float, flops_per_s: float) -> float:
        """The time that a step takes at least."""
        a_step, a_clip, flops = np.array(getattr(self, floor)).T
        return float(np.maximum((a_step + batch * a_clip) / copy_rate, batch * flops / flops_per_s).sum())


def moved(rows: Sequence[Row]) -> tuple[float, float]:
    """The bytes of a step, and of each clip besides."""
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


class Call(NamedTuple):
    name: str
    moved: int  # bytes of inputs and outputs
    flops: int


class Watch(TorchDispatchMode):
    """Keeps each call of an operator; a view of a tensor moves nothing."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.name().startswith(("aten::empty", "aten::detach", "prim::")):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        computing = flop_registry.get(func._overloadpacket)
        flops = computing(*args, **(kwargs or {}), out_val=out) if computing else 0
        self.calls.append(Call(func.name(), sum(x.numel() * x.element_size() for x in tensors), flops))
        return out


def count(setting: Setting, default: bool) -> Counts:
    """Count a step of the first version's model, or of the default one."""
    eager, fewer = (named_rows(setting, default, fused) for fused in (False, True))
    return Counts(
        eager=[row for _, row in eager],
        inductor=[row for _, row in fewer],
        fused=[row for name, row in fewer if name != STATISTICS],
        needed=[row for name, row in eager if any(part in name for part in NEEDED)],
    )


def named_rows(setting: Setting, default: bool, fused: bool) -> list[tuple[str, Row]]:
    """The operators of a step in their order, those of three clips held against those of two."""
    two, three = (watched(setting, batch, default, fused) for batch in (2, 3))
    crf = 2.0 * CRF_MACS * (setting.frames * tokens_a_frame(setting.size)) ** 2
    found = []
    for a, b in zip(two, three, strict=True):
        assert a.name == b.name, "three clips take other operators than two"
        flops = crf if a.name == CRF else b.flops - a.flops
        found.append((a.name, (float(3 * a.moved - 2 * b.moved), float(b.moved - a.moved), float(flops))))
    return found


def watched(setting: Setting, batch: int, default: bool, fused: bool) -> list[Call]:
    """The calls of a step: forwards, backwards and the optimizer."""
    config = config_of(setting, default=default)
    with FakeTensorMode(), fused_operators_called():
        model = fresh_model(setting, config)
        if fused:
            fuse(model, "both")
        optimizer, given = optimizer_of(model), synthetic(setting, batch)
        with Watch() as watch:
            loss_of(setting, config, model, given, torch.bfloat16).backward()
            optimizer.step()
    return watch.calls


def tokens_a_frame(size: int) -> int:
    """Cells of the two levels, of strides 16 and 32."""
    return (-(-size // 16)) ** 2 + (-(-size // 32)) ** 2


def read_counts(setting: Setting, default: bool) -> Counts:
    """The counts of a setting, which are kept beside the data, as counting takes some seconds."""
    path = setting.data / f"counts_{'default' if default else 'static'}.json"
    about = [setting.frames, setting.size, setting.dim]
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
        if kept.pop("of") == about:
            return Counts(**{name: [tuple(row) for row in rows] for name, rows in kept.items()})
    counts = count(Setting(**{**vars(setting), "device": "cpu"}), default)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"of": about, **counts._asdict()}))
    os.replace(partial, path)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copy", type=float, default=4.2e12, help="measured: bytes read + written per second (4.2e12)")
    parser.add_argument("--product", type=float, default=6.83e14, help="measured: FLOP/s of bf16 products (6.83e14)")
    args = parser.parse_args(arguments)
    setting = Setting(Path(), Path(), gpu=False, device="cpu")
    for default in (False, True):
        counts = count(setting, default)
        model, bytes_of = "default" if default else "static", [in_megabytes(counts, name) for name in Counts._fields]
        print(f"{model}: {counts.flops(1) / 1e9:.1f} GFLOP a clip")
        print(f"MB of a clip, and of a step besides: {', '.join(bytes_of)}")
        for batch in setting.batches:
            rates = (batch / counts.seconds(floor, batch, args.copy, args.product) for floor in FLOORS)
            told = (f"{floor} {rate:,.0f}" for floor, rate in zip(FLOORS, rates, strict=True))
            print(f"B = {batch}, clips/s at most: {', '.join(told)}")
    return 0


def in_megabytes(counts: Counts, name: str) -> str:
    a_step, a_clip = moved(getattr(counts, name))
    return f"{name} {a_clip / 1e6:.0f} and {a_step / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main())
