"""The two-level feature pyramid: laterals to one width, and top-down fusion."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfer.model.convolution import with_products
from dfer.model.resize import upsample_aligned


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
        with_products(self)

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
        with_products(self)

    def forward(self, fine: Float[Tensor, "F D h w"], coarse: Float[Tensor, "F D h2 w2"]) -> Float[Tensor, "F D h w"]:
        return F.gelu(self.norm(self.conv(fine + upsample_aligned(coarse, fine.shape[-2:]))))
