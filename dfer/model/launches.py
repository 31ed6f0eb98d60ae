"""Launches of the fused kernels: what each pass reads and writes. Maps are channels-last, (F, C, H, W)."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dfer.model import kernels

ROWS, COLUMNS = 32, 64  # of a tile: 16 numbers for each of 128 threads, 16 bytes at a time
PROGRAMS = 1024  # of a pass that sums, at most: several for each multiprocessor of the largest cards
INTERPRETED = bool(triton.knobs.runtime.interpret)  # type: ignore[attr-defined]


class Maps(NamedTuple):
    """Shape of channels-last maps, as the kernels see it."""

    rows: int
    height: int
    width: int
    channels: int

    def split(self) -> tuple[int, int]:
        """Return into how many parts a pass that sums divides the rows, and the tiles of each part."""
        programs = max(PROGRAMS // -(-self.channels // COLUMNS), 1)
        tiles = -(-self.rows // (ROWS * programs))
        return -(-self.rows // (ROWS * tiles)), tiles


def maps_of(x: Tensor) -> Maps:
    """Return the shape of channels-last maps (F, C, H, W)."""
    frames, channels, height, width = x.shape
    return Maps(frames * height * width, height, width, channels)


def launch(kernel: Any, maps: Maps, parts: int | None, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel for each part, by default each tile, of the rows and for each block of the channels."""
    grid = (parts or triton.cdiv(maps.rows, ROWS), triton.cdiv(maps.channels, COLUMNS))
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, C=maps.channels, ROWS=ROWS, COLUMNS=COLUMNS, **constants)


def statistics(x: Tensor, running: tuple[Tensor, Tensor, Tensor], momentum: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / std of each channel, float32 (C,), and update the running mean, variance and count."""
    maps = maps_of(x)
    parts, tiles = maps.split()
    means, squares = x.new_empty((2, parts, maps.channels), dtype=torch.float32)
    launch(kernels.parts_kernel, maps, parts, x, means, squares, maps.rows, STEPS=tiles)
    mean, inverse_std = (x.new_empty(maps.channels, dtype=torch.float32) for _ in range(2))
    launch(
        kernels.merge_kernel, maps, 1, means, squares, *running, mean, inverse_std, maps.rows, momentum, eps,
        PARTS=parts, PART=tiles * ROWS,
    )  # fmt: skip
    return mean, inverse_std


class Norm(NamedTuple):
    """What batch norm applies to each channel, (C,) each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    spread: Tensor  # 1 / std; the variance where there is an `eps`
    eps: float | None = None


def normalise(x: Tensor, norm: Norm, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Return the normalised maps with the shortcut added, after the ReLU if there is to be one."""
    maps, y = maps_of(x), torch.empty_like(x)
    added = x if shortcut is None else shortcut  # x: a pointer that is not followed
    launch(
        kernels.normalise_kernel, maps, None, x, added, norm.mean, norm.spread, norm.weight, norm.bias, y, maps.rows,
        norm.eps or 0.0, ADD=shortcut is not None, RELU=relu, EVALUATING=norm.eps is not None,
    )  # fmt: skip
    return y


def pool(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Return the largest cell of each 3x3 window at stride 2, after batch norm and ReLU if there is a norm.

    And which cell of its window that is, int8: 3 * row + column.
    """
    z, index = pooled_like(x)
    maps = maps_of(z)
    weight, bias, mean, spread, eps = norm or Norm(x, x, x, x)
    size = {"H": x.shape[2], "W": x.shape[3]}
    launch(
        kernels.pool_kernel, maps, None, x, mean, spread, weight, bias, z, index, maps.rows, eps or 0.0, **size,
        NORM=norm is not None, EVALUATING=eps is not None,
    )  # fmt: skip
    return z, index


def pooled_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialised maps of the pool's size, and as many int8 places."""
    frames, channels, height, width = x.shape
    size = (frames, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    z = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return z, torch.empty_like(z, dtype=torch.int8)


def unpool(to_z: Tensor, index: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the gradient of the pool's input, whose height and width are given."""
    shape = (*to_z.shape[:2], *size)
    to_x = torch.empty(shape, dtype=to_z.dtype, device=to_z.device, memory_format=torch.channels_last)
    maps = maps_of(to_x)
    launch(kernels.unpool_kernel, maps, None, to_z, index, to_x, maps.rows, H=maps.height, W=maps.width)
    return to_x


def gradients(
    to_y: Tensor, x: Tensor, norm: Norm, y: Tensor | None, index: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the shortcut (empty without one), and of weight and bias as one, (2, C).

    Args:
        to_y: the gradient of what `normalise` or `pool` returned.
        x: what it was given.
        norm: without `eps`.
        y: what `normalise` returned, if it had a shortcut.
        index: what `pool` returned, if that was it.
        relu: whether there was a ReLU.
    """
    maps = maps_of(x)
    parts, tiles = maps.split()
    weights, biases = sums = x.new_empty((2, parts, maps.channels), dtype=torch.float32)
    to_shortcut = x.new_empty(0) if y is None else torch.empty_like(x)
    size = {"H": 1, "W": 1} if index is None else {"H": maps.height, "W": maps.width}
    given, places = (norm.mean, norm.spread, norm.weight, norm.bias), to_y if index is None else index
    launch(
        kernels.gradient_parts_kernel, maps, parts, to_y, places, x, x if y is None else y, *given,
        x if y is None else to_shortcut, weights, biases, maps.rows, **size, STEPS=tiles, POOL=index is not None,
        ADD=y is not None, RELU=relu,
    )  # fmt: skip
    to_affine = sums.sum(1)
    to_x, seen = torch.empty_like(x), y is not None  # the shortcut's gradient is that of the norm, ReLU included
    launch(
        kernels.input_gradient_kernel, maps, None, to_shortcut if seen else to_y, places, x, *given, *to_affine, to_x,
        maps.rows, **size, POOL=index is not None, RELU=relu and not seen,
    )  # fmt: skip
    return to_x, to_shortcut, to_affine
