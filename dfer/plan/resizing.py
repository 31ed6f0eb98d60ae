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


def resize_planar(
    pictures: UInt8[Tensor, "B T rows W 1"],
    box: Float[Tensor, "B 4"],
    mirror: Bool[Tensor, " B"],
    size: int,
    chroma_left: Bool[Tensor, " B"],
) -> Float[Tensor, "B T S S 3"]:
    """Return planar 4:2:0 pictures as `resize` does, in Y, Cb and Cr: chroma is interpolated to where luma lies.

    Args:
        pictures: H rows of Y, then U and V, H/2 x W/2 each, without gaps: 3 H / 2 rows in all.
        box: as of `resize`, as are `mirror` and `size`.
        mirror: see there.
        size: see there.
        chroma_left: chroma samples lie on even columns of luma, else between two.
    """
    batch, length, rows, width = pictures.shape[:4]
    height = rows // 3 * 2
    luma = pictures[:, :, :height, :, 0].float()
    chroma = pictures[:, :, height:].reshape(batch, length, 2, height // 2, width // 2).float()
    down = _triangles(box[:, 0], box[:, 2], height, size)
    across = _triangles(box[:, 1], box[:, 3], width, size)
    across = torch.where(mirror[:, None, None], across.flip(1), across)
    between, on_even = (across @ _chroma(width, left, across.device) for left in (False, True))
    chroma_across = torch.where(chroma_left[:, None, None], on_even, between)
    y = torch.einsum("bsw,bthw->bths", across, torch.einsum("bsh,bthw->btsw", down, luma))
    chroma_down = down @ _chroma(height, False, down.device)
    uv = torch.einsum("bsh,btphw->btpsw", chroma_down, chroma)
    uv = torch.einsum("bsw,btphw->bthsp", chroma_across, uv)
    return torch.cat([y[..., None], uv], dim=-1)


def _chroma(side: int, on_even: bool, device: torch.device) -> Float[Tensor, "N half"]:
    """Return how chroma samples become values at luma's pixels along a side: linearly, the last ones repeat."""
    pixel = torch.arange(side, device=device)
    near, odd = pixel // 2, pixel % 2
    far = (near + 2 * odd - 1).clamp(0, side // 2 - 1)
    share = torch.where(odd == 1, 0.5, 1.0) if on_even else torch.full((side,), 0.75, device=device)
    weights = torch.zeros(side, side // 2, device=device)
    weights[pixel, near] += share
    weights[pixel, far] += 1 - share
    return weights


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
