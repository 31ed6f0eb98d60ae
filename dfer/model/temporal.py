"""What reads the frames of a clip in order: a recurrent block, or convolution and attention."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan


def is_exporting() -> bool:
    """Return whether torch.export is tracing: torch.compile (2.10) has torch's own function of that name say so too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class RecurrentBlock(nn.Module):
    """A recurrent unit over the frames of a clip, whose last state is the clip's.

    It reads order, and any T: no parameter belongs to a frame's index. A clip is as long at any T, so that of n times
    the frames of training each lasts an n-th as long, and a gated unit keeps of its state the n-th root of what it
    would have kept. A cell of torch rather than its `nn.GRU`, where torch.compile breaks its graph and of which
    torch.export makes a program for one T.

    The T that the weights count in lies with them: `state_dict` has it, and `load_state_dict` takes it over, so that
    they mean the same in a model that is trained on at another T. It is no buffer, which an average would move. Weights
    of versions that did not keep it count in the `num_frames` that the block was made with, as they did then.

    Args:
        dim: D, width of the features of a frame.
        width: E, of the state.
        unit: gated (Cho et al. 2014), or long short-term memory (Hochreiter and Schmidhuber 1997).
        num_frames: of a clip in training; None: each frame counts as one, however many there are.
    """

    def __init__(self, dim: int, width: int, unit: Literal["gru", "lstm"] = "gru", num_frames: int | None = None):
        super().__init__()
        assert unit == "gru" or num_frames is None
        self.num_frames = num_frames
        self.norm = nn.LayerNorm(dim)
        self.cell = nn.GRUCell(dim, width) if unit == "gru" else nn.LSTMCell(dim, width)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.num_frames is not None:
            destination[f"{prefix}num_frames"] = torch.tensor(self.num_frames)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        if self.num_frames is not None:  # torch hands over a dictionary of this module's own
            self.num_frames = int(state_dict.pop(f"{prefix}num_frames", self.num_frames))
        super()._load_from_state_dict(state_dict, prefix, *more)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B E"]:
        frames = self.norm(x).transpose(0, 1)
        start = frames.new_zeros(x.shape[0], self.cell.hidden_size)
        state = (start, start.clone()) if isinstance(self.cell, nn.LSTMCell) else (start,)
        if is_exporting():  # a loop over any T, by which a program must not branch
            lasts = None if self.num_frames is None else self.num_frames / frames.new_ones(x.shape[1]).sum()
            return scan(partial(self._scanned, lasts), state, frames)[0][0]
        share = None if self.num_frames in (None, len(frames)) else self.num_frames / len(frames)
        for frame in frames:
            state = self._next(state, frame, share)
        return state[0]

    def _scanned(
        self, lasts: Tensor | None, state: tuple[Tensor, ...], frame: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        state = self._next(state, frame, lasts)
        return state, state[0].clone()  # a scan wants an output besides, which may not be the same tensor

    def _next(self, state: tuple[Tensor, ...], frame: Tensor, lasts: Tensor | float | None) -> tuple[Tensor, ...]:
        """Return the state after a frame that is as long as `lasts` frames of training (None: as one)."""
        if isinstance(self.cell, nn.LSTMCell):
            return self.cell(frame, state)
        if lasts is None:
            return (self.cell(frame, state[0]),)
        cell, (before,) = self.cell, state
        from_frame = F.linear(frame, cell.weight_ih, cell.bias_ih).chunk(3, -1)
        from_state = F.linear(before, cell.weight_hh, cell.bias_hh).chunk(3, -1)
        reset = (from_frame[0] + from_state[0]).sigmoid()
        # By its logarithm: the gradient of a power is not finite at 0, which a sigmoid rounds to.
        kept = (lasts * F.logsigmoid(from_frame[1] + from_state[1])).exp()
        new = (from_frame[2] + reset * from_state[2]).tanh()
        return (new + kept * (before - new),)


class TemporalBlock(nn.Module):
    """Depthwise convolution over time (motion), attention over frames (order) and MLP, as pre-norm residuals.

    Args:
        dim: D, width of the features of a frame.
        num_frames: T, frames of a clip in training.
        num_heads: heads of the attention.
    """

    def __init__(self, dim: int, num_frames: int, num_heads: int = 4):
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_frames, dim) * 0.02)
        self.conv_norm, self.conv = nn.LayerNorm(dim), nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.num_heads = num_heads

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.positions(x.shape[1])
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)

    def positions(self, num_frames: int) -> Float[Tensor, "T D"]:
        """Return the position embeddings of T frames, interpolated if T is not that of training."""
        trained = len(self.position)
        if not is_exporting() and num_frames == trained:  # an exported program must not branch on T
            return self.position
        at = torch.arange(num_frames, device=self.position.device) * ((trained - 1) / max(num_frames - 1, 1))
        distance = (at[:, None] - torch.arange(trained, device=self.position.device)).abs()
        return ((1 - distance).clamp(min=0)[..., None] * self.position).sum(1)  # (T, trained, D), small
