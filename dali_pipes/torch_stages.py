"""The stages after decoding as batched torch operations, with the same results as kernels.py.

They serve clips that are on a GPU, in stages that the graph of DALI's operators or the kernel of pixel_kernel.py leave
out. They run on any device, which is how they are tested.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from dfer.plan.resizing import resize
from dfer.plan.sampling import EpochPlan

__all__ = ["DevicePlan", "Drawn", "Stages", "finish", "pinned", "resize", "treat", "upload"]


class Stages:
    """Which stages there are in an epoch. Looked up in its plan once: asking the GPU's copy would wait for it."""

    def __init__(self, plan: EpochPlan):
        self.warps = bool((plan.warp != np.eye(2, 3, dtype=np.float32)).any())
        self.largest_blur = float(plan.blur.max(initial=0.0))
        self.erases = bool((plan.erase[:, 2:] > 0).all(1).any())
        self.touches_geometry = self.warps or self.largest_blur > 0


class Drawn(NamedTuple):
    """What is drawn for B clips, as in `EpochPlan`."""

    warp: Float[Tensor, "B 2 3"]
    blur: Float[Tensor, " B"]
    colour: Float[Tensor, "B 3 4"]
    erase: Float[Tensor, "B 4"]


class DevicePlan(Stages):
    """The arrays of an `EpochPlan` that describe pictures, on the device: looking up rows there waits for nothing.

    Args:
        plan: of the epoch.
        device: where clips are made.
    """

    def __init__(self, plan: EpochPlan, device: torch.device):
        super().__init__(plan)
        self.box, self.mirror = upload(plan.box.astype(np.float32), device), upload(plan.mirror, device)
        self.warp, self.blur = upload(plan.warp, device), upload(plan.blur, device)
        self.colour, self.erase = upload(plan.colour, device), upload(plan.erase, device)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array on a device, which is not waited for."""
    return pinned(array, device).to(device, non_blocking=True)


def pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor in memory that a device can fetch itself."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def finish(
    clips: Float[Tensor, "B T S S 3"], plan: DevicePlan, rows: Int64[Tensor, " B"], *, coloured: bool = False
) -> Float[Tensor, "B T S S 3"]:
    """Return clips of some rows of a plan after warp, blur, colour and normalisation, and erase. As `treat`."""
    drawn = Drawn(plan.warp[rows], plan.blur[rows], plan.colour[rows], plan.erase[rows])
    return treat(clips, plan, drawn, coloured=coloured)


def treat(
    clips: Float[Tensor, "B T S S 3"], stages: Stages, drawn: Drawn, *, coloured: bool = False
) -> Float[Tensor, "B T S S 3"]:
    """Return clips after those of warp, blur, colour and normalisation, and erase that there are in the epoch.

    `coloured`: colour and normalisation were done before, which is right only if the plan neither warps nor blurs.
    """
    if not coloured:
        if stages.warps:
            clips = _warp(clips, drawn.warp)
        if stages.largest_blur:
            clips = _blur(clips, drawn.blur, stages.largest_blur)
        colour = drawn.colour[:, None, None]
        clips = torch.einsum("btyci,btyxi->btyxc", colour[..., :3], clips) + colour[..., None, :, 3]
    return _erase(clips, drawn.erase) if stages.erases else clips


def _warp(clips: Float[Tensor, "B T S S 3"], warp: Float[Tensor, "B 2 3"]) -> Float[Tensor, "B T S S 3"]:
    """Return clips sampled where `EpochPlan.warp` sends their pixels."""
    batch, length, size = clips.shape[:3]
    theta = torch.cat([warp[:, :, :2], 2 * warp[:, :, 2:]], dim=2)  # torch's coordinates run from -1 to 1
    grid = F.affine_grid(theta, [batch, 1, size, size], align_corners=False)
    frames = clips.permute(0, 1, 4, 2, 3).reshape(batch, length * 3, size, size)
    moved = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    return moved.view(batch, length, 3, size, size).permute(0, 1, 3, 4, 2)


def _blur(clips: Float[Tensor, "B T S S 3"], blur: Float[Tensor, " B"], largest: float) -> Float[Tensor, "B T S S 3"]:
    """Return blurred clips, by two matrix products; `largest` is the largest of `blur` in the epoch."""
    size = clips.shape[2]
    sigma = (blur * size)[:, None]
    reach = min(int(np.ceil(3 * largest * size)), size - 1)
    distance = torch.arange(-reach, reach + 1, device=clips.device)
    radius = torch.ceil(3 * sigma).clamp(max=size - 1)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-6)) ** 2) * (distance.abs() <= radius)
    weights = weights / weights.sum(1, keepdim=True)
    pixel = torch.arange(size, device=clips.device)[:, None] + distance
    mirrored = size - 1 - (size - 1 - pixel.abs()).abs()
    matrix = torch.zeros(len(blur), size, size, device=clips.device)
    matrix.scatter_add_(2, mirrored.expand(len(blur), -1, -1), weights[:, None].expand(-1, size, -1))
    return torch.einsum("bsh,bthwc,bvw->btsvc", matrix, clips, matrix)


def _erase(clips: Float[Tensor, "B T S S 3"], erase: Float[Tensor, "B 4"]) -> Float[Tensor, "B T S S 3"]:
    """Return clips with their rectangle of `EpochPlan.erase` set to 0."""
    size = clips.shape[2]
    n = torch.full((), size, dtype=torch.float32, device=clips.device)  # `torch.tensor` would wait for a GPU
    start, stop = torch.round(erase[:, :2] * n), torch.round((erase[:, :2] + erase[:, 2:]) * n)
    pixel = torch.arange(size, device=clips.device)
    inside = (pixel >= start[..., None]) & (pixel < stop[..., None])  # (B, 2, S)
    return clips * ~(inside[:, 0, :, None] & inside[:, 1, None, :])[:, None, :, :, None]
