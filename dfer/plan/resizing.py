"""The resize of a plan's crops as batched torch operations, on any device: what DALI's operators and kernels do too."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def resize(
    pictures: UInt8[Tensor, "B T H W 3"], box: Float[Tensor, "B 4"], mirror: Bool[Tensor, " B"], size: int
) -> Float[Tensor, "B T S S 3"]:
    """Return pictures cropped, resized (linear, antialiased) and mirrored, by two matrix products each."""
    height, width = pictures.shape[2:4]
    rows = _triangles(box[:, 0], box[:, 2], height, size)
    columns = _triangles(box[:, 1], box[:, 3], width, size)
    columns = torch.where(mirror[:, None, None], columns.flip(1), columns)
    x = torch.einsum("bsh,bthwc->btswc", rows, pictures.float())
    return torch.einsum("bsw,bthwc->bthsc", columns, x)


def _triangles(
    start: Float[Tensor, " B"], length: Float[Tensor, " B"], source: int, size: int
) -> Float[Tensor, "B S N"]:
    """Return the resize of kernels.py as matrices over the whole side of the source.

    The crop is [start, start + length), in shares of the side.
    """
    start, length = start.double(), length.double()  # DALI's rule: half a pixel is rounded up, in float64
    first = torch.floor(start * source + 0.5).clamp(max=source - 1).float()
    last = torch.floor((start + length) * source + 0.5).clamp(max=source).float()
    last = torch.maximum(last, first + 1)
    scale = ((last - first) / size)[:, None, None]
    support = scale.clamp(min=1)
    centre = (torch.arange(size, device=start.device) + 0.5)[None, :, None] * scale - 0.5 + first[:, None, None]
    pixel = torch.arange(source, device=start.device, dtype=torch.float32)[None, None]
    weights = (1 - (pixel - centre).abs() / support).clamp(min=0)
    # Beyond the edge of the crop its edge pixel is repeated.
    inside = (pixel >= first[:, None, None]) & (pixel < last[:, None, None])
    weights = weights * inside
    for edge, sign in ((first, -1), (last - 1, 1)):
        beyond = edge[:, None] + sign * torch.arange(1, source + 2, device=start.device)
        extra = (1 - (beyond[:, None] - centre).abs() / support).clamp(min=0).sum(2)
        weights = weights + extra[:, :, None] * (pixel == edge[:, None, None])
    return weights / weights.sum(2, keepdim=True)
