"""The stem's convolution on frames of 3 channels, and padded with zeros to 4 and 8: does padding earn its bytes?"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import in_turns

WIDTHS = (3, 4, 8)  # channels; kernels of tensor cores load 8 or 16 bytes at a time


def padded(setting: Setting) -> Iterator[Row]:
    """Each part of the work at each width, in turns; then all of it, with the padding's copy, over 3 channels."""
    batch = setting.batches[0]
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        found = in_turns(setting, runs_of(setting, batch))
    for name, speeds in found.items():
        yield figure(f"stem's {name}, B={batch}", speeds, "clips/s", ms=1000 * batch / statistics.median(speeds))
    for width in WIDTHS[1:]:
        ratios = [plain / wide for plain, wide in zip(seconds(found, 3), seconds(found, width), strict=True)]
        yield figure(f"stem, {width} channels over 3, B={batch}", ratios, "times")


def seconds(found: Mapping[str, list[float]], width: int) -> list[float]:
    """What all parts take of a clip at a width, round by round."""
    rounds = zip(*(speeds for name, speeds in found.items() if name.endswith(of(width))), strict=True)
    return [sum(1 / speed for speed in speeds) for speeds in rounds]


def of(width: int) -> str:
    return f", {width} channels"


def runs_of(setting: Setting, batch: int) -> dict[str, Callable[[], int]]:
    """What is timed; each run is of `batch` clips. Weights are padded with zeros too, so that the maps are the same."""
    frames, weight = (
        torch.randn(shape, device=setting.device, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        for shape in ((batch * setting.frames, setting.size, setting.size, 3), (64, 7, 7, 3))
    )
    runs: dict[str, Callable[[], int]] = {}
    for width in WIDTHS:
        x, kernel = widened(frames, width), widened(weight, width).requires_grad_()
        maps = convolved(x, kernel)
        to_kernel = partial(torch.autograd.grad, maps, kernel, torch.ones_like(maps), retain_graph=True)
        runs[f"forwards{of(width)}"] = counted(partial(convolved, x, kernel.detach()), batch)
        runs[f"weight gradient{of(width)}"] = counted(to_kernel, batch)
        if width > 3:
            runs[f"padding{of(width)}"] = counted(partial(widened, frames, width), batch)
    return runs


def counted(work: Callable[[], object], units: int) -> Callable[[], int]:
    """A run for the clock: some work, so many units of it."""

    def run() -> int:
        work()
        return units

    return run


def convolved(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, stride=2, padding=3)


def widened(x: Tensor, width: int) -> Tensor:
    """Pad channels with zeros; the order of memory stays."""
    return F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1]))
