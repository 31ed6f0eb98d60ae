"""Clips from decoded frames that lie anywhere in a device's memory: one table says where, and what is done to each.

The table is all that a batch needs beside the pixels: it is made of arrays, whatever the number of frames, and holds
the crop already, so that a frame costs no Python and no size has to be the same. On a GPU one kernel reads it
(pixel_kernel.py); on a CPU, where training has other ways, the CPU's kernel does, for the tests.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportIndexIssue=false

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from numba import carray
from torch import Tensor

from dali_pipes import kernels, torch_stages
from dali_pipes.compiling import njit, pointer
from dfer.files import reason
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import EpochPlan, epoch_plan

# Where a frame's parameters have matrices, and of which shape: warp, colour.
_MATRICES = (kernels.WARP, kernels.BLUR, (2, 3)), (kernels.COLOUR, kernels.YUV, (3, 4))

_PARAMETER_WORDS = kernels.NUM_PARAMETERS // 2  # of 8 bytes


class Decoded(Protocol):
    """Decoded frames, each without gaps: a TensorList of DALI that a pipeline has returned."""

    def shape(self) -> list[tuple[int, ...]]:
        """Return height, width and channels of each."""
        ...

    def as_reshaped_tensor(self, shape: list[int]) -> Any:
        """Return all of them as one tensor, which has a `data_ptr`; a RuntimeError if they do not lie one by one."""
        ...

    def __getitem__(self, place: int) -> Any:
        """Return one of them, which has a `data_ptr`."""
        ...


class Frames(NamedTuple):
    """Where the frames of N clips lie, and what is done to them."""

    cuts: Int64[Tensor, "N T 4"]  # of `cut_out`
    parameters: Float32[Tensor, "N P"]  # of `parameters`

    @classmethod
    def unpack(cls, words: Int64[Tensor, " _"], num_clips: int, length: int) -> tuple["Frames", Int64[Tensor, " N"]]:
        """Return what `pack` has packed, as views: the table of a batch, and its rows."""
        rows, cuts, rest = words.split([num_clips, 4 * num_clips * length, num_clips * _PARAMETER_WORDS])
        return cls(cuts.view(num_clips, length, 4), rest.view(torch.float32).view(num_clips, -1)), rows


def pack(cuts: Int64[np.ndarray, "N T 4"], parameters: Float32[np.ndarray, "N P"]) -> Int64[np.ndarray, " _"]:
    """Return the table of a batch as one array, so that it is copied at once."""
    return np.concatenate([np.arange(len(cuts)), cuts.ravel(), parameters.view(np.int64).ravel()])


def num_words(num_clips: int, length: int) -> int:
    """Return the length of what `pack` returns."""
    return num_clips * (1 + 4 * length + _PARAMETER_WORDS)


def cut_out(
    address: Int64[np.ndarray, "N T"],
    height: Int64[np.ndarray, "#N #T"],
    width: Int64[np.ndarray, "#N #T"],
    box: Float64[np.ndarray, "N 4"],
) -> Int64[np.ndarray, "N T 4"]:
    """Return where the boxes of frames lie: address of the first byte, bytes of a line, rows and columns of pixels.

    By the rule of `kernels.fused`, which is DALI's: shares are float32, calculated with in float64, half a pixel is
    rounded up, and at least one pixel is left.

    Args:
        address: of the frames, each (height, width, 3) uint8 without gaps.
        height: of the frames, or of all frames of each clip.
        width: likewise.
        box: as in `EpochPlan`.
    """
    shares = box.astype(np.float32).astype(np.float64)[:, :, None]
    top, rows = _cut(shares[:, 0], shares[:, 2], height)
    left, columns = _cut(shares[:, 1], shares[:, 3], width)
    parts = (address + 3 * (top * width + left), 3 * width, rows, columns)
    return np.stack([np.broadcast_to(part, address.shape) for part in parts], axis=2)


def _cut(
    start: Float64[np.ndarray, "N 1"], length: Float64[np.ndarray, "N 1"], side: Int64[np.ndarray, "#N #T"]
) -> tuple[Int64[np.ndarray, "A B"], Int64[np.ndarray, "A B"]]:
    """Return the first pixels of crops and their numbers of pixels."""
    first = np.minimum(np.floor(start * side + 0.5).astype(np.int64), side - 1)
    last = np.minimum(np.floor((start + length) * side + 0.5).astype(np.int64), side)
    return first, np.maximum(last - first, 1)


def parameters(plan: EpochPlan, rows: Int64[np.ndarray, " N"]) -> Float32[np.ndarray, "N P"]:
    """Return what is done to the clips of some rows of a plan, once the box is cut out."""
    return kernels.parameters(plan, rows, crop=False)


def clips(
    frames: Frames, rows: Int64[Tensor, " B"], stages: torch_stages.Stages, size: int, dtype: torch.dtype
) -> Float[Tensor, "B T S S 3"]:
    """Return clips on the device of `frames`, made on its current stream. What `frames` points to has to be kept.

    Args:
        frames: the table.
        rows: of it.
        stages: which there are in the epoch.
        size: S.
        dtype: float32, bfloat16 or float16.
    """
    if frames.cuts.is_cuda:
        return on_gpu(frames, rows, stages, size, dtype)
    out = np.empty((len(rows), frames.cuts.shape[1], size, size, 3), dtype=np.float32)
    _on_cpu(out, rows.numpy(), frames.cuts.numpy(), frames.parameters.numpy())
    return torch.from_numpy(out).to(dtype)


def addresses(decoded: Decoded, sizes: Int64[np.ndarray, "F 3"]) -> Int64[np.ndarray, " F"]:
    """Return where decoded frames lie, of which `sizes` are height, width and 3."""
    ends = np.cumsum(sizes.prod(1))
    try:
        first = decoded.as_reshaped_tensor([int(ends[-1])]).data_ptr()
    except RuntimeError:  # they lie apart, as DALI does not promise that they never do: a call for each of them
        return np.array([decoded[place].data_ptr() for place in range(len(ends))])
    return first + ends - sizes.prod(1)


def of_decoded(
    decoded: Decoded,
    sizes: Int64[np.ndarray, "B T 3"],
    plan: EpochPlan,
    rows: Int64[np.ndarray, " B"],
    stages: torch_stages.Stages,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "B T S S 3"]:
    """Return the clips of some rows of a plan, of whose frames, T of each, `decoded` has all pixels, on this device.

    On a GPU they are being made when this returns: `decoded` has to be held until the current stream has come so far.
    `sizes` are height, width and 3 of each frame.
    """
    address = addresses(decoded, sizes.reshape(-1, 3)).reshape(sizes.shape[:2])
    cuts = cut_out(address, sizes[:, :, 0], sizes[:, :, 1], plan.box[rows])
    words = torch_stages.upload(pack(cuts, parameters(plan, rows)), device)
    return clips(*Frames.unpack(words, len(rows), sizes.shape[1]), stages, size, dtype)


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Return why the kernel is not to be used on a device: it cannot run, or makes other clips than the CPU's."""
    augmentation = Augmentation(min_crop_area=0.3, max_crop_ratio=1.5, colour=0.3, erase=0.5)
    plan, rows, found = epoch_plan(0, 0, np.full(4, 2), 2, augmentation=augmentation), np.arange(4), []
    height, width = 70, 52
    noise = torch.arange(8 * height * width * 3).mul(7919).remainder(251).to(torch.uint8)
    try:
        for place in (torch.device("cpu"), device):
            memory = noise.to(place)
            address = memory.data_ptr() + height * width * 3 * np.arange(8).reshape(4, 2)
            cuts = cut_out(address, np.array([[height]]), np.array([[width]]), plan.box)
            table = Frames(*(torch_stages.upload(part, place) for part in (cuts, parameters(plan, rows))))
            there = torch_stages.upload(rows, place)
            found.append(clips(table, there, torch_stages.Stages(plan), 24, torch.float32).cpu())
    except Exception as error:  # of Triton, its compiler and the driver, which raise different classes
        return f"Triton's kernel for clips does not run here ({reason(error)})"
    off = float((found[0] - found[1]).abs().nan_to_num(torch.inf).max())
    return None if off <= 1e-3 else f"Triton's kernel for clips is {off:.1e} off the CPU's"


def on_gpu(
    frames: Frames, rows: Int64[Tensor, " B"], stages: torch_stages.Stages, size: int, dtype: torch.dtype
) -> Float[Tensor, "B T S S 3"]:
    """Return clips by the GPU's kernel; where an epoch warps or blurs, what follows the resize is torch's."""
    from dali_pipes import pixel_kernel  # here, because Triton is not installed everywhere

    if not stages.touches_geometry:
        return pixel_kernel.clips(rows, *frames, size, dtype)
    pictures = pixel_kernel.clips(rows, *frames, size, None)
    p = frames.parameters[rows]
    warp, colour = (p[:, a:b].reshape(-1, *shape) for a, b, shape in _MATRICES)
    drawn = torch_stages.Drawn(warp, p[:, kernels.BLUR], colour, p[:, kernels.ERASE : kernels.COLOUR])
    return torch_stages.treat(pictures, stages, drawn).to(dtype)


@njit(fastmath={"contract"}, nogil=True, error_model="numpy")
def _on_cpu(out, rows, cuts, parameters):
    for clip in range(len(rows)):
        row = rows[clip]
        for t in range(cuts.shape[1]):
            pitch, height, columns = cuts[row, t, 1], cuts[row, t, 2], cuts[row, t, 3]
            source = carray(pointer(cuts[row, t, 0]), ((height - 1) * pitch + 3 * columns,), np.uint8)
            pixels = np.empty((height, columns, 3), np.uint8)
            for y in range(height):
                pixels[y] = source[y * pitch : y * pitch + 3 * columns].reshape(columns, 3)
            kernels.fused(out[clip, t], pixels, parameters[row])
