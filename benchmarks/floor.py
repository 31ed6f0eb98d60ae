"""What a training step must compute and move at least: `python benchmarks/floor.py [--card NAME] [--copy B/S]`

Counted by watching one step of the model, operator by operator, on tensors without content, at B = 1 and at B = 2: what
is the same in both belongs to the step, the rest to each clip.

FLOP are those of convolutions and matrix products, forwards and backwards, and the CRF's, of which the formula is here.
Bytes are counted in two ways. *Eager*: each operator reads all of its inputs and writes all of its outputs, as torch
runs it. *Needed*: only convolutions, products, attention, the CRF and the optimizer do, since all else can be computed
where those read or write. The floor of a card is made of the needed bytes: no fusion goes below it.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts.ceilings import datasheet_flops
from benchmarks.gpu_parts.project import config_of, fresh_model, loss_of, optimizer_of, synthetic
from benchmarks.gpu_parts.setting import Setting

# What computes: its operands and results have to be in memory. Parts of the operators' names.
NEEDED = ("convolution", "mm", "attention", "meanfield", "adamw")
CRF_MACS = 32 + 3 * 16 + 64 + 32 + 2 * 3 * 16 + 64 + (3 * 16 + 64) + 2 * 32  # a pair; as in benchmarks/crf_speed.py


class Counts(NamedTuple):
    """Of a step: a part that does not depend on the clips, and one for each clip."""

    flops_a_clip: float
    needed_a_step: float  # bytes
    needed_a_clip: float
    eager_a_step: float
    eager_a_clip: float

    def flops(self, batch: int) -> float:
        return batch * self.flops_a_clip

    def needed(self, batch: int) -> float:
        return self.needed_a_step + batch * self.needed_a_clip

    def eager(self, batch: int) -> float:
        return self.eager_a_step + batch * self.eager_a_clip


class Watch(TorchDispatchMode):
    """Adds up the bytes of each operator's inputs and outputs; a view of a tensor moves nothing."""

    def __init__(self):
        super().__init__()
        self.eager = self.needed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.name().startswith(("aten::empty", "aten::detach", "prim::")):
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in tensors)
        self.eager += moved
        if any(name in func.name() for name in NEEDED):
            self.needed += moved
        return out


def count(setting: Setting) -> Counts:
    """Count a step of the model of a setting."""
    (flops, needed, eager), (flops2, needed2, eager2) = (count_step(setting, batch) for batch in (1, 2))
    pairs = (setting.frames * tokens_a_frame(setting.size)) ** 2
    return Counts(
        flops_a_clip=flops2 - flops + 2 * CRF_MACS * pairs,
        needed_a_step=2 * needed - needed2,
        needed_a_clip=needed2 - needed,
        eager_a_step=2 * eager - eager2,
        eager_a_clip=eager2 - eager,
    )


def count_step(setting: Setting, batch: int) -> tuple[int, int, int]:
    """FLOP, needed bytes and eager bytes of a step: forwards, backwards and the optimizer."""
    config = config_of(setting)
    with FakeTensorMode():
        model = fresh_model(setting, config)
        optimizer, given = optimizer_of(model), synthetic(setting, batch)
        with Watch() as watch, FlopCounterMode(display=False) as flops:
            loss = loss_of(setting, config, model, given, torch.bfloat16)
            loss.backward()
            optimizer.step()
    return flops.get_total_flops(), watch.needed, watch.eager


def tokens_a_frame(size: int) -> int:
    """Cells of the two levels, of strides 16 and 32."""
    return (-(-size // 16)) ** 2 + (-(-size // 32)) ** 2


def floor_seconds(num_bytes: float, flops: float, copy_rate: float, flops_per_s: float) -> float:
    """The time that a step takes at least: of moving its bytes or of computing, whichever is longer."""
    return max(num_bytes / copy_rate, flops / flops_per_s)


def read_counts(setting: Setting) -> Counts:
    """The counts of a setting, which are kept beside the data, as counting takes some seconds."""
    path = setting.data / "counts.json"
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(path.read_text())
        if kept.pop("of") == [setting.frames, setting.size, setting.dim]:
            return Counts(**kept)
    counts = count(Setting(**{**vars(setting), "device": "cpu"}))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"of": [setting.frames, setting.size, setting.dim], **counts._asdict()}))
    os.replace(partial, path)
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="NVIDIA H200", help="its datasheet's bf16 FLOP/s are used (NVIDIA H200)")
    parser.add_argument("--copy", type=float, default=4.2e12, help="measured: bytes read + written per second (4.2e12)")
    args = parser.parse_args(arguments)
    flops = datasheet_flops(args.card)
    if flops is None:
        parser.error(f"no datasheet of {args.card} was looked up")
    setting = Setting(Path(), Path(), gpu=False, device="cpu")
    counts = count(setting)
    print(f"{counts.flops_a_clip / 1e9:.1f} GFLOP a clip; bytes a clip: {counts.needed_a_clip / 1e6:.0f} MB needed, "
          f"{counts.eager_a_clip / 1e6:.0f} MB eager; a step besides: {counts.needed_a_step / 1e6:.0f} and "
          f"{counts.eager_a_step / 1e6:.0f} MB")  # fmt: skip
    for batch in setting.batches:
        seconds = floor_seconds(counts.needed(batch), counts.flops(batch), args.copy, flops)
        print(f"B = {batch}: floor {1000 * seconds:.2f} ms, {batch / seconds:,.0f} clips/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
