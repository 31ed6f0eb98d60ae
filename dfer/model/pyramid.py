"""The two-level feature pyramid: laterals to one width, and top-down fusion."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """1x1 convolutions that bring both levels to one width D.

    Args:
        channels: of the levels of the backbone.
        dim: D.
    """

    def __init__(self, channels: list[int], dim: int):
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, dim, 1, bias=False), nn.BatchNorm2d(dim)) for c in channels
        )

    def forward(self, features: list[Float[Tensor, "F _ _ _"]]) -> list[Float[Tensor, "F D _ _"]]:
        return [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]


class TopDownFusion(nn.Module):
    """Fusion of the coarse level into the fine one: F4 = GELU(BN(conv3x3(P4 + up(P5)))).

    Args:
        dim: D, width of both levels.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, fine: Float[Tensor, "F D h w"], coarse: Float[Tensor, "F D h2 w2"]) -> Float[Tensor, "F D h w"]:
        return F.gelu(self.norm(self.conv(fine + upsample_aligned(coarse, fine.shape[-2:]))))


def upsample_aligned(
    coarse: Float[Tensor, "F D h2 w2"], size: tuple[int, int] | torch.Size
) -> Float[Tensor, "F D h w"]:
    """Return `coarse` at twice the resolution, without a shift: coarse cell k lies on fine cell 2k exactly.

    Strided convolutions with padding k//2 put cell k of stride s on pixel s*k, so 4 -> 7 is bilinear with
    align_corners (0, .5, 1, ...). An even fine size has one more cell beyond the last coarse one: it repeats the edge.
    """
    height, width = 2 * coarse.shape[-2] - 1, 2 * coarse.shape[-1] - 1
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    pad_bottom, pad_right = size[0] - height, size[1] - width
    return F.pad(fine, (0, pad_right, 0, pad_bottom), mode="replicate") if pad_bottom or pad_right else fine
