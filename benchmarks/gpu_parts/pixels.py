"""The kernel that makes clips of decoded frames, alone, beside what a copy of the bytes that it needs would take."""

from collections.abc import Iterator

import torch

from benchmarks.gpu_parts.ceilings import copy_rate
from benchmarks.gpu_parts.project import pixel_stages
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import repeated

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kernel_alone(setting: Setting, side: int) -> Iterator[Row]:
    """Clips a second from frames of `side` px that lie on the card, boxes as training draws them, one batch a launch.

    The bytes are those of the boxes, read once, and of the clips, written once; a copy reads and writes each.
    """
    batch = max(setting.batches)  # of a small one the launch takes as long as the kernel
    for name, dtype in TYPES.items():
        run, needed = pixel_stages(setting, batch, side, dtype)
        speeds = repeated(setting, run)
        rates = [needed * speed / 1e9 for speed in speeds]
        share = sorted(rates)[len(rates) // 2] * 1e9 / copy_rate(setting)
        what = f"kernel alone, {side} px, {name}, B={batch}"
        yield figure(what, speeds, "clips/s", kB_a_clip=needed / 1e3)
        yield figure(f"{what}: bytes it needs", rates, "GB/s", share_of_copy=share)
