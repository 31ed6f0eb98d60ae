"""What the card can do at all: copy, take in, multiply. All else is judged by it."""

import statistics
from collections.abc import Iterator

import torch

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.project import PEAK_FLOPS, peak_flops
from benchmarks.gpu_parts.rows import Row, figure, read
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import repeated

COPY = "copy on the device, read + written"
PRODUCT = "bf16 matrix product"
DATASHEET = {**PEAK_FLOPS, "stub": 1e12}


def copies_and_product(setting: Setting) -> Iterator[Row]:
    """The rate of a copy on the device, of a matrix product in bf16, and of a copy from pinned memory."""
    mib = setting.copy_bytes / 2**20
    yield figure(COPY, copy_rates(setting), "B/s", MiB=mib)
    yield figure(PRODUCT, product_rates(setting), "FLOP/s", side=setting.product_side)
    host = torch.empty(setting.copy_bytes, dtype=torch.uint8, pin_memory=cuda.is_available())
    there = torch.empty_like(host, device=setting.device)
    yield figure("copy from pinned memory", repeated(setting, lambda: moved(there, host)), "B/s", MiB=mib)


def copy_rate(setting: Setting) -> float:
    """The measured rate of a copy, of which floors are made: as an earlier case has it, or measured now."""
    return measured(setting, COPY) or statistics.median(copy_rates(setting))


def product_rate(setting: Setting) -> float:
    """The same of a matrix product."""
    return measured(setting, PRODUCT) or statistics.median(product_rates(setting))


def measured(setting: Setting, what: str) -> float | None:
    """A figure that an earlier case has found, in this process or another one."""
    found, _ = read(setting.out / "results.jsonl")
    told = [row["value"] for row in found if row.get("what") == what]
    return told[-1] if told else None


def copy_rates(setting: Setting) -> list[float]:
    """Bytes read and written per second by copies on the device."""
    source = torch.zeros(setting.copy_bytes, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return repeated(setting, lambda: 2 * moved(target, source))


def product_rates(setting: Setting) -> list[float]:
    """FLOP per second of bf16 matrix products."""
    side = setting.product_side
    a, b = (torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> int:
        torch.mm(a, b, out=out)
        return 2 * side**3

    return repeated(setting, product)


def moved(target: torch.Tensor, source: torch.Tensor) -> int:
    target.copy_(source, non_blocking=True)
    return source.numel()


def datasheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a card; None where no datasheet was looked up."""
    return peak_flops(name, DATASHEET)
