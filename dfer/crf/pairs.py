"""Pairs of a clip's tokens: the two kernels that couple them, and what every backend does with them.

*Appearance* is dense and normalised symmetrically; a token sends itself no message:

    K_ij = exp(-|z_i - z_j|^2 / 2),   d_i = sum_j K_ij,   S_ij = K_ij / sqrt(d_i d_j) for i != j,   S_ii = 0.

*Smoothness* is the product of one factor over frames and one over the cells of a frame.

A *sweep* is the product x -> S x, implemented in `dense.py`, `triton.py` and `sdpa.py`; `backends.py` chooses one.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor


def normalised_kernel(z: Float[Tensor, "*batch N d"]) -> Float[Tensor, "*batch N N"]:
    """Return K_ij / sqrt(d_i d_j) including the diagonal, S_ii = 1/d_i."""
    half_norm = 0.5 * z.square().sum(-1)
    # Rounding could make the exponent positive where two tokens coincide.
    kernel = (z @ z.mT - half_norm[..., :, None] - half_norm[..., None, :]).clamp(max=0).exp()
    scale = kernel.sum(-1).clamp(min=1).rsqrt()
    return scale[..., :, None] * kernel * scale[..., None, :]


class Pairs(ABC):
    """The appearance kernel of some clips, as one backend computes it."""

    scale: Float[Tensor, "B N"]  # 1 / sqrt(d)

    @abstractmethod
    def sweep(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Return S x."""

    def sweep_both(
        self, states: Float[Tensor, "B N L"], values: Float[Tensor, "B N C"]
    ) -> tuple[Float[Tensor, "B N L"], Float[Tensor, "B N C"]]:
        """Return S states and S values.

        A backend may round the sums of S values like operands, since whatever uses them next rounds them anyway.
        """
        swept = self.sweep(torch.cat([states, values], dim=-1))
        return swept[..., : states.shape[-1]], swept[..., states.shape[-1] :]

    def step(
        self,
        q: Float[Tensor, "B N L"],
        logits: Float[Tensor, "B N L"],
        unary: Float[Tensor, "B N L"],
        smooth: Float[Tensor, "B N L"] | None,
        compatibility: Float[Tensor, "L L"],
        eta: Float[Tensor, " B"],
        values: Float[Tensor, "B N C"] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Do one iteration; return the new logits, their softmax, the message S q M + `smooth`, and S values.

        `smooth` is the message of the smoothness kernel, with its compatibility applied.
        """
        sums, swept = (self.sweep(q), None) if values is None else self.sweep_both(q, values)
        message = sums @ compatibility
        if smooth is not None:
            message = message + smooth
        logits = torch.lerp(logits, unary + message, eta[:, None, None])
        return logits, logits.softmax(-1), message, swept


class DifferentiablePairs(Pairs):
    """Pairs whose gradient is written by hand (autograd differentiates those of `sdpa`)."""

    points: Float[Tensor, "B N _"]

    @abstractmethod
    def gradient(
        self, left: Float[Tensor, "B N R"], right: Float[Tensor, "B N R"], columns: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B N d"]:
        """Return the gradient of sum_ij S_ij <left_i, right_j> with respect to the points, degrees included.

        `columns` are the column sums sum_i S_ij <left_i, right_j>, which follow from the adjoint sweeps.
        """


class Smoothness:
    """The smoothness kernel S^0 of some clips: the product of two factors, less the diagonal.

    It is exact and never N x N. Each factor is normalised with its diagonal, so the message of a token to itself is
    subtracted afterwards.
    """

    def __init__(self, frames: Float[Tensor, "B T T"], cells: Float[Tensor, "P P"]):
        self.frames, self.cells = frames, cells
        frame_diagonal, cell_diagonal = frames.diagonal(dim1=-2, dim2=-1), cells.diagonal()
        self.to_itself = (frame_diagonal[:, :, None] * cell_diagonal).flatten(1)[..., None]  # (B, N, 1)

    def sweep(self, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B N L"]:
        """Return S^0 q."""
        return self.over_cells(self.over_frames(q)) - self.to_itself * q

    def over_frames(self, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B N L"]:
        """Apply the factor over frames."""
        batch, num_frames = self.frames.shape[:2]
        return torch.bmm(self.frames, q.reshape(batch, num_frames, -1)).view_as(q)

    def over_cells(self, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B N L"]:
        """Apply the factor over the cells of a frame."""
        num_cells = len(self.cells)
        frames = q.reshape(-1, num_cells, q.shape[-1])
        return torch.bmm(self.cells.expand(frames.shape[0], -1, -1), frames).view_as(q)

    def gradient(
        self, left: Float[Tensor, "B N R"], right: Float[Tensor, "B N R"]
    ) -> tuple[Float[Tensor, "B T T"], Float[Tensor, "P P"]]:
        """Return the gradients of sum <left_i, (S^0 right)_i> with respect to `frames` and `cells`."""
        batch, num_frames, num_cells = *self.frames.shape[:2], len(self.cells)
        by_frame = left.reshape(batch, num_frames, -1), self.over_cells(right).reshape(batch, num_frames, -1)
        by_cell = (x.reshape(-1, num_cells, x.shape[-1]) for x in (left, self.over_frames(right)))
        to_frames, to_cells = (torch.bmm(a, b.mT) for a, b in (by_frame, by_cell))
        to_itself = (left * right).sum(-1).view(batch, num_frames, num_cells)
        frame_diagonal, cell_diagonal = self.frames.diagonal(dim1=-2, dim2=-1), self.cells.diagonal()
        to_frames = to_frames - torch.diag_embed(to_itself @ cell_diagonal)
        to_cells = to_cells.sum(0) - torch.diag((frame_diagonal[:, :, None] * to_itself).sum((0, 1)))
        return to_frames, to_cells


def rounded(x: Tensor, operands: torch.dtype, accumulate: torch.dtype) -> Tensor:
    """Return x as a matrix product uses it: rounded to `operands`, contiguous, in the type of the sums."""
    return x.to(operands).to(accumulate).contiguous()


def adjoint_sweep(pairs: Pairs, x: Float[Tensor, "B N C"], operands: torch.dtype) -> Float[Tensor, "B N C"]:
    """Return S x for a gradient.

    A gradient carries the loss scale: before it is rounded to fp16, each clip's is divided by its largest element.
    """
    if operands is not torch.float16:
        return pairs.sweep(x)
    size = _largest_element(x)
    return pairs.sweep(x / size) * size


def adjoint_sweep_both(
    pairs: Pairs, x: Float[Tensor, "B N L"], values: Float[Tensor, "B N C"], operands: torch.dtype
) -> tuple[Float[Tensor, "B N L"], Float[Tensor, "B N C"]]:
    """Return S x and S values for gradients, scaled as in `adjoint_sweep`."""
    if operands is not torch.float16:
        return pairs.sweep_both(x, values)
    sizes = _largest_element(x), _largest_element(values)
    swept = pairs.sweep_both(x / sizes[0], values / sizes[1])
    return swept[0] * sizes[0], swept[1] * sizes[1]


def _largest_element(x: Float[Tensor, "B N C"]) -> Float[Tensor, "B 1 1"]:
    """Return the largest absolute element of each clip, 1 where all are 0."""
    largest = x.abs().amax((1, 2), keepdim=True)
    return torch.where(largest > 0, largest, 1)
