"""The sdpa backend: torch's scaled_dot_product_attention over augmented points, differentiated by autograd."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfer.crf.pairs import Pairs


class SdpaPairs(Pairs):
    """Sweeps by attention: exp(z_i.z_j - |z_i|^2/2 - |z_j|^2/2) = K_ij, and softmax divides by the row's sum.

    One more key, whose K is 1 for every query and whose value is 0, makes that sum 1 + d_i. Attention in which its
    value is 1 and all others are 0 gives the degree. |z|^2/2 goes in two parts, as bf16 would lose its last digits.
    """

    def __init__(self, points: Float[Tensor, "B N d"], operands: torch.dtype):
        self.accumulate = points.dtype
        z = points.to(operands)
        half_norm = 0.5 * z.to(self.accumulate).square().sum(-1, keepdim=True)
        bias = -half_norm
        zero, one = torch.zeros_like(z[..., :1]), torch.ones_like(z[..., :1])
        self.query = torch.cat([z, one, one, *_two_parts(half_norm, operands)], dim=-1)
        keys = torch.cat([z, *_two_parts(bias, operands), zero, zero], dim=-1)
        sink = torch.zeros_like(keys[:, :1])
        sink[..., -2:] = 1
        self.keys = torch.cat([keys, sink], dim=1)
        to_sink = torch.zeros(*keys.shape[:2], 1, dtype=operands, device=z.device)
        share = self._attend(torch.cat([to_sink, one[:, :1]], dim=1))[..., 0]  # 1 / (1 + d)
        self.total = 1 / share
        self.scale = (self.total - 1).clamp(min=1).rsqrt()

    def _attend(self, values: Float[Tensor, "B N1 C"]) -> Float[Tensor, "B N C"]:
        query, keys, values = (x[:, None] for x in (self.query, self.keys, values))  # one head
        return F.scaled_dot_product_attention(query, keys, values, scale=1.0)[:, 0].to(self.accumulate)

    def sweep(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        scaled = (self.scale[..., None] * x).to(self.keys.dtype)
        attended = self._attend(torch.cat([scaled, torch.zeros_like(scaled[:, :1])], dim=1))
        return self.scale[..., None] * (self.total[..., None] * attended - scaled)  # less the message to itself


def _two_parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x rounded to `dtype`, and the rounded rest."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)
