"""The CRF layer: every space-time token of a clip's two feature levels hears all the others.

`MeanFieldCRF`: a token is one cell of one level in one frame; it carries one of L latent states, two for each emotion
and two for the background. Two kernels couple all pairs of tokens: *appearance* (learned embedding and position) and
*smoothness* (position only). Both are normalised symmetrically, S = D^-1/2 K D^-1/2, and a token sends no message to
itself, so that there is an energy, and mean field with `certified_damping` never increases its free energy.

    E(z) = - sum_i unary_i(z_i) - sum_h sum_{i<j} S^h_ij M^h(z_i, z_j)
    F(q) = - sum_i unary_i . q_i - 1/2 sum_h tr(q^T S^h q M^h) + sum_i q_i . log q_i   >=   - log Z

After Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011 (the
model) and Baqué et al., "Principled Parallel Mean-Field Inference for Discrete Random Fields", 2016 (the damping). The
sums over pairs are exact: no lattice, no window. docs/crf.md has the bounds and what was measured.

For comparison: `GaussianCRF`, continuous and linear, and `BranchMessages`, the messages of the original method.
"""

import contextlib
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dfer.crf.gaussian import gaussian_field
from dfer.crf.meanfield import Features, MeanField, meanfield
from dfer.crf.pairs import Backend, normalised_kernel

STATES_PER_CLASS = 2
EMBEDDING_DIM = 28
VALUE_DIM = 64
INITIAL_COUPLING = 2.0  # below 2 the free energy is convex: one optimum
SIGMA_APPEARANCE = (4.0, 0.5, 0.5, 1.0)  # at the start: frames, height, width (as shares of the frame), level
SIGMA_SMOOTHNESS = (2.0, 0.15, 0.15, 1.0)


class CRFOutput(NamedTuple):
    pooled: Float[Tensor, "B K"] | None  # log-probabilities of the classes: the marginals, averaged over tokens
    marginals: Float[Tensor, "B N L"] | None  # of every token's states; None, as `pooled`, where there are no labels
    diagnostics: dict[str, Tensor]  # scalars without gradient


class TokenGraph(nn.Module):
    """The tokens of a clip and what the appearance kernel compares of them: the common part of the CRFs.

    Args:
        dim: D, width of the features.
        strides: of the two levels, in pixels.
        widths: of what is read from a token: log-potentials, embedding, values; 0 for what no one will read, since
            distributed training wants no parameter that is not used. Without an embedding no pair is ever compared.
    """

    def __init__(self, dim: int, strides: tuple[int, int], widths: tuple[int, int, int]):
        super().__init__()
        self.strides, self.widths = strides, widths
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in strides)  # their biases tell the levels apart
        self.project = nn.Linear(dim, sum(widths))  # one product for all three: the tokens are read once
        if widths[1]:
            self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))  # norm of the embeddings
            self.log_sigma_appearance = nn.Parameter(torch.tensor(SIGMA_APPEARANCE).log())

    def no_weight_decay(self) -> set[str]:
        """Logarithms, logits and the compatibility factor: decay would pull them to no neutral value."""
        names = ("log_scale", "log_sigma_appearance", "log_sigma_smoothness", "coupling_logit", "affinity", "log_beta")
        return {name for name in names if hasattr(self, name)}

    def read(self, levels: list[Float[Tensor, "B T D _ _"]]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-potentials, embedding and values (B, N, width) of all cells of both levels, from normalised features.

        Frame by frame: token (t, c) is row t*P + c.
        """
        flat = [level.flatten(3).mT for level in levels]  # (B, T, h*w, D) each
        read = torch.cat([self.project(norm(x)) for norm, x in zip(self.norms, flat, strict=True)], dim=2)
        return read.flatten(1, 2).split(self.widths, dim=-1)

    def points(self, embedded: Float[Tensor, "B N e"], time: Tensor, cells: Tensor) -> Float[Tensor, "B N d"]:
        """(embedding of fixed norm, position / sigma): tokens are close where both are."""
        embedded = F.normalize(_precise(embedded), dim=-1) * self.log_scale.clamp(math.log(0.25), math.log(8)).exp()
        sigma = self.log_sigma_appearance.exp()
        over_time = (time / sigma[0])[:, None].expand(-1, cells.shape[0], -1)
        over_cells = (cells / sigma[1:])[None].expand(time.shape[0], -1, -1)
        position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1)  # (N, 4)
        return torch.cat([embedded, position.expand(embedded.shape[0], -1, -1)], dim=-1)

    def positions(self, levels: list[Tensor]) -> tuple[Float[Tensor, "T 1"], Float[Tensor, "P 3"]]:
        time = torch.arange(levels[0].shape[1], device=levels[0].device, dtype=self.project.weight.dtype)[:, None]
        cells = cell_positions([level.shape[-2:] for level in levels], self.strides, levels[0].device)
        return time, cells.to(time.dtype)


class MeanFieldCRF(TokenGraph):
    """One CRF per clip over both levels jointly; its beliefs and messages are added to the features.

    features <- features + W [ marginals ; S values ]: the label path and the value path. W starts at zero, so the layer
    starts as the identity, to the bit.

    Args:
        dim: D, width of the features.
        num_classes: K; the latent states are 2 (K + 1).
        strides: of the two levels, in pixels.
        readout: what is added to the features: "none", "labels" (marginals), "value" (one sweep of the appearance
            kernel over values, as attention would do, but symmetric and without self), or "both".
        iterations: mean-field iterations; 0 leaves the marginals of the unary term alone.
        max_coupling: bound on sum_h ||M^h||_2. Up to 2 the optimum is unique, whatever is learned; beyond 8 mean field
            orders globally and needs tens of iterations.
        backend: of `meanfield`.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        strides: tuple[int, int],
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
        max_coupling: float = 8.0,
        backend: Backend = "auto",
    ):
        reads_values = readout in ("value", "both")
        num_states = STATES_PER_CLASS * (num_classes + 1)
        pairs = iterations > 0 or reads_values
        super().__init__(dim, strides, (num_states, EMBEDDING_DIM * pairs, VALUE_DIM * reads_values))
        self.num_classes, self.iterations, self.backend = num_classes, iterations, backend
        self.max_coupling, self.num_states = max_coupling, num_states
        self.reads_labels, self.reads_values = readout in ("labels", "both"), reads_values
        if iterations > 0:
            self.log_sigma_smoothness = nn.Parameter(torch.tensor(SIGMA_SMOOTHNESS).log())
            share = min(INITIAL_COUPLING / max_coupling, 0.5)
            self.coupling_logit = nn.Parameter(torch.full((2,), math.log(share / (1 - share))))
            self.affinity = nn.Parameter(torch.eye(self.num_states).repeat(2, 1, 1))
        if readout != "none":
            width = self.num_states * self.reads_labels + VALUE_DIM * self.reads_values
            self.readout = nn.Linear(width, dim, bias=False)
            nn.init.zeros_(self.readout.weight)

    def compatibility(self) -> Float[Tensor, "2 L L"]:
        """M^h = w_h B_h / max(1, ||B_h||_inf), B_h = A_h A_h^T: symmetric, positive semi-definite, norm <= w_h.

        The couplings w_h sum to less than max_coupling. At the start M is Potts: agreement is rewarded.
        """
        gram = self.affinity @ self.affinity.mT
        bound = gram.abs().sum(-1).amax(-1).clamp(min=1)
        weight = self.max_coupling / 2 * self.coupling_logit.sigmoid()
        return (weight / bound)[:, None, None] * gram

    def forward(
        self, levels: list[Float[Tensor, "B T D _ _"]], valid: Bool[Tensor, "B T"] | None = None
    ) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        """`levels`: fine and coarse features of all frames; `valid`: frames that take part, all if not given."""
        valid, valid_tokens = _valid_tokens(levels, valid)
        unary, embedded, values = self.read(levels)
        unary = _precise(unary)
        field, diagnostics = None, {}
        if self.iterations or self.reads_values:
            with _without_autocast(unary.device.type):  # degrees, softmax and energy want float32
                time, cells = self.positions(levels)
                features = Features(self.points(embedded, time, cells))
                compatibility = unary.new_zeros(1, self.num_states, self.num_states)
                if self.iterations:
                    sigma = self.log_sigma_smoothness.exp()
                    over_time = (time / sigma[0]).expand(valid.shape[0], -1, -1)
                    factors = normalised_kernel(over_time, valid), normalised_kernel(cells / sigma[1:])
                    features = Features(features.points, *factors)
                    compatibility = self.compatibility()
                field = meanfield(
                    unary,
                    features,
                    compatibility,
                    valid_tokens,
                    self.iterations,
                    values=values if self.reads_values else None,
                    backend=self.backend,
                    operands=embedded.dtype,
                )
            if self.iterations:
                diagnostics = _diagnostics(field, compatibility, valid_tokens)
        q = unary.softmax(-1) if field is None else field.marginals
        gathered = [q] if self.reads_labels else []
        if self.reads_values:
            gathered.append(field.values)
        if gathered:
            levels = _added(levels, self.readout(torch.cat(gathered, dim=-1)))
        return levels, CRFOutput(self._pool(q, valid_tokens), q, diagnostics)

    def _pool(self, q: Float[Tensor, "B N L"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Log-probabilities of the classes: states summed by class, averaged over valid tokens, background left out."""
        per_class = self.class_probabilities(torch.where(valid[..., None], q, 0).sum(1))
        return per_class.clamp(min=1e-12).log().log_softmax(1)

    def emotion_maps(
        self, levels: list[Float[Tensor, "B T D _ _"]], valid: Bool[Tensor, "B T"] | None = None
    ) -> list[Float[Tensor, "B T K _ _"]]:
        """Marginal probability of each class at every cell of each level; what is missing to 1 is the background."""
        _, output = self(levels, valid)
        per_cell = self.class_probabilities(output.marginals).unflatten(1, (levels[0].shape[1], -1))  # (B, T, P, K)
        sizes = [level.shape[-2:] for level in levels]
        parts = per_cell.split([h * w for h, w in sizes], dim=2)
        return [part.mT.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]

    def class_probabilities(self, q: Float[Tensor, "*N L"]) -> Float[Tensor, "*N K"]:
        """States summed by class; what is missing to 1 is the background."""
        return q.unflatten(-1, (self.num_classes + 1, STATES_PER_CLASS)).sum(-1)[..., : self.num_classes]


class GaussianCRF(TokenGraph):
    """features <- features + W x, x = argmin |x - values|^2 + beta x^T (I - S) x: continuous, exact, no labels.

    S is the appearance kernel of `MeanFieldCRF`; beta >= 0.01 is learned, at most 4. W starts at zero.
    """

    def __init__(self, dim: int, strides: tuple[int, int], backend: Backend = "auto"):
        super().__init__(dim, strides, (0, EMBEDDING_DIM, VALUE_DIM))
        self.backend = backend
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.readout = nn.Linear(VALUE_DIM, dim, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(
        self, levels: list[Float[Tensor, "B T D _ _"]], valid: Bool[Tensor, "B T"] | None = None
    ) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        _, valid_tokens = _valid_tokens(levels, valid)
        _, embedded, values = self.read(levels)
        with _without_autocast(values.device.type):
            points = self.points(embedded, *self.positions(levels))
            beta = self.log_beta.clamp(math.log(0.01), math.log(4)).exp()
            x = gaussian_field(points, values, beta, valid_tokens, backend=self.backend, operands=embedded.dtype)
        diagnostics = {"crf/coupling": beta.detach()}
        return _added(levels, self.readout(x)), CRFOutput(None, None, diagnostics)


class BranchMessages(nn.Module):
    """The messages of the original method, "Enhanced Multi-Scale Dynamic Facial Expression Recognition via Conditional
    Random Fields", written from its description, for comparison.

    A *static* branch, the features, and a *dynamic* one, differences of consecutive frames and last the first frame
    less the last one, tell each other once, h_i <- relu(h_i + relu(W_ji h_j)), at every cell. No kernel, no
    normalisation, no compatibility, nothing between cells, frames or levels. As with the other layers the outcome is
    added to the features through a projection that starts at zero.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.to_static = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.to_dynamic = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.readout = nn.Linear(2 * dim, dim, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(
        self, levels: list[Float[Tensor, "B T D _ _"]], valid: Bool[Tensor, "B T"] | None = None
    ) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        assert valid is None, "the original method knows no padding"
        updates = []
        for level, to_static, to_dynamic in zip(levels, self.to_static, self.to_dynamic, strict=True):
            static = level.flatten(3).mT  # (B, T, h*w, D)
            dynamic = static.roll(-1, dims=1) - static
            told = F.relu(static + F.relu(to_static(dynamic))), F.relu(dynamic + F.relu(to_dynamic(static)))
            updates.append(self.readout(torch.cat(told, dim=-1)))
        return _added(levels, torch.cat(updates, dim=2).flatten(1, 2)), CRFOutput(None, None, {})


def _precise(x: Tensor) -> Tensor:
    """At least float32, whatever autocast has made of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Where it is off anyway there is no switch: an exported program cannot be saved with one in it."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _valid_tokens(levels: list[Tensor], valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Frames and tokens that take part."""
    if valid is None:
        valid = torch.ones(levels[0].shape[:2], dtype=torch.bool, device=levels[0].device)
    num_cells = sum(level.shape[-2] * level.shape[-1] for level in levels)
    return valid, valid.repeat_interleave(num_cells, dim=1)


def _added(levels: list[Tensor], update: Float[Tensor, "B N D"]) -> list[Tensor]:
    """levels + update, whose rows are the tokens in the order of `TokenGraph.tokens`."""
    sizes = [level.shape[-2:] for level in levels]
    parts = update.unflatten(1, (levels[0].shape[1], -1)).split([h * w for h, w in sizes], dim=2)  # (B, T, h*w, D)
    return [
        level + part.mT.unflatten(-1, size).to(level.dtype)
        for level, part, size in zip(levels, parts, sizes, strict=True)
    ]


def cell_positions(sizes: list[torch.Size], strides: tuple[int, ...], device: torch.device) -> Float[Tensor, "P 3"]:
    """(height, width, level) of all cells of a frame, the first two as shares of the frame.

    Padded strided convolutions centre cell k of stride s on pixel s*k, at every level: coordinates are shared.
    """
    height, width = sizes[0][0] * strides[0], sizes[0][1] * strides[0]
    positions = []
    for number, ((h, w), stride) in enumerate(zip(sizes, strides, strict=True)):
        y = torch.arange(h, device=device, dtype=torch.float32)[:, None] * (stride / height)
        x = torch.arange(w, device=device, dtype=torch.float32)[None, :] * (stride / width)
        y, x = torch.broadcast_tensors(y, x)
        positions.append(torch.stack([y, x, torch.full_like(y, number)], dim=-1).flatten(0, 1))
    return torch.cat(positions)


@torch.no_grad()
def _diagnostics(
    field: MeanField, compatibility: Float[Tensor, "2 L L"], valid: Bool[Tensor, "B N"]
) -> dict[str, Tensor]:
    """Scalars for the log, computed on the device without waiting for it."""
    num_tokens = valid.sum(1).clamp(min=1)
    q, to_itself = field.marginals, field.scale.square()
    entropy = -torch.where(valid, torch.special.xlogy(q, q).sum(-1), 0).sum(1) / num_tokens
    per_token = field.energies / num_tokens[:, None]
    # What float32 can tell apart: sums of thousands of terms are good to some 1e-6 of their size.
    tolerance = 1e-5 * per_token.abs().amax(1, keepdim=True).clamp(min=1)
    return {
        "crf/coupling": compatibility.abs().sum(-1).amax(-1).sum(),  # bound on sum_h ||M^h||; convex below 2
        "crf/damping": field.damping.amax(),
        "crf/entropy": entropy.mean(),  # of the marginals, in nats
        "crf/residual": field.residual.amax(),
        "crf/free_energy": per_token[:, -1].mean(),  # nats per token, before the last iteration
        "crf/energy_increases": (per_token.diff(dim=1) > tolerance).sum(),  # must be 0
        "crf/degree_min": 1 / to_itself.amax(),
        "crf/degree_mean": (torch.where(valid, 1 / to_itself, 0).sum(1) / num_tokens).mean(),
    }
