"""Bilinear interpolation of feature maps, with a gradient whose sums always have the same order.

The gradient of torch's own interpolation is an atomic sum on a GPU, and so another one each time. There the map is
multiplied by the matrices of both axes, as one matrix, since two products would round twice. A CPU has torch's, whose
order is fixed: it is the faster one there, and a run that it began goes on with the same bits.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize(x: Float[Tensor, "F C h w"], size: tuple[int, int] | torch.Size) -> Float[Tensor, "F C h2 w2"]:
    """Return feature maps of another size, whose corners lie on the corners of the old ones."""
    if not by_products(x):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    return multiply(x, *(weights(old, new, None, x.device) for old, new in zip(x.shape[-2:], size, strict=True)))


def resize_time(x: Float[Tensor, "F C T"], num_frames: int) -> Float[Tensor, "F C T2"]:
    """Return the features of another number of frames, the first and the last ones being those of the old ones."""
    if not by_products(x):
        return F.interpolate(x, size=num_frames, mode="linear", align_corners=True)
    one = torch.ones(1, 1, device=x.device)
    return multiply(x[:, :, None], one, weights(x.shape[-1], num_frames, None, x.device))[:, :, 0]


def upsample_aligned(
    coarse: Float[Tensor, "F D h2 w2"], size: tuple[int, int] | torch.Size
) -> Float[Tensor, "F D h w"]:
    """Return `coarse` at twice the resolution, without a shift: coarse cell k lies on fine cell 2k exactly.

    Strided convolutions with padding k//2 put cell k of stride s on pixel s*k, so 4 -> 7 is bilinear with
    align_corners (0, .5, 1, ...). An even fine size has one more cell beyond the last coarse one: it repeats the edge.
    """
    if by_products(coarse):
        pairs = zip(coarse.shape[-2:], size, strict=True)
        return multiply(coarse, *(weights(old, new, 0.5, coarse.device) for old, new in pairs))
    height, width = 2 * coarse.shape[-2] - 1, 2 * coarse.shape[-1] - 1
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    pad_bottom, pad_right = size[0] - height, size[1] - width
    return F.pad(fine, (0, pad_right, 0, pad_bottom), mode="replicate") if pad_bottom or pad_right else fine


def by_products(x: Tensor) -> bool:
    """Return whether features are resized by matrices."""
    return x.is_cuda


def weights(old: int, new: int, step: float | None, device: torch.device) -> Float[Tensor, "new old"]:
    """Return the share of each old cell in each new one, along one axis.

    New cell k lies at step * k of the old ones, by default so that both ends are the same; beyond the last of them it
    repeats it. Made on the device, by a few small kernels: nothing is copied to it in the middle of a captured step.
    """
    if step is None:
        step = (old - 1) / max(new - 1, 1)
    at = (torch.arange(new, device=device) * step).clamp(max=old - 1)
    return (1 - (at[:, None] - torch.arange(old, device=device)).abs()).clamp(min=0)


def multiply(
    x: Float[Tensor, "F C h w"], rows: Float[Tensor, "h2 h"], columns: Float[Tensor, "w2 w"]
) -> Float[Tensor, "F C h2 w2"]:
    """Return rows . x . columns^T of each map, in its type and channels-last."""
    both = torch.kron(rows, columns).to(x.dtype)  # (h2 * w2, h * w)
    cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # a view of channels-last maps
    with torch.autocast(x.device.type, enabled=False):  # or it would round maps that are float32
        made = torch.bmm(both.expand(len(cells), -1, -1), cells)
    return made.unflatten(1, (len(rows), len(columns))).permute(0, 3, 1, 2)
