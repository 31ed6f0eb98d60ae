"""The CRF layer: couples all space-time tokens of a clip's two feature levels.

`MeanFieldCRF`: a token is one cell of one level in one frame; it has one of L latent states, two for each emotion and
two for the background. Two kernels couple all pairs of tokens: *appearance* (learned embedding and position) and
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
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfer.crf.backends import Backend
from dfer.crf.gaussian import gaussian_field
from dfer.crf.meanfield import Features, MeanField, Sums, meanfield
from dfer.crf.pairs import normalised_kernel

STATES_PER_CLASS = 2
EMBEDDING_DIM = 28
VALUE_DIM = 64
INITIAL_COUPLING = 2.0  # below 2 the free energy is convex: one optimum
SIGMA_APPEARANCE = (4.0, 0.5, 0.5, 1.0)  # at the start: frames of training, shares of height and width, level
SIGMA_SMOOTHNESS = (2.0, 0.15, 0.15, 1.0)


class CRFOutput(NamedTuple):
    """What a CRF layer returns besides the features. N tokens, L states, K classes."""

    pooled: Float[Tensor, "B K"] | None  # log-probabilities of the classes: the marginals, averaged over tokens
    marginals: Float[Tensor, "B N L"] | None  # of each token's states; None, like `pooled`, in a layer without labels
    diagnostics: dict[str, Tensor]  # scalars without gradient


class TokenGraph(nn.Module):
    """The common part of the CRFs: the tokens of a clip, and the points of the appearance kernel.

    Args:
        dim: D, width of the features.
        strides: of the two levels, in pixels.
        widths: of log-potentials, embedding and values, which are projected from a token; 0 for what is not needed, as
            distributed training cannot have unused parameters. Without an embedding there is no appearance kernel.
        num_frames: T of training. A clip is that long whatever its own T, so that widths in time, which are learned in
            frames of training, are shares of a clip.
    """

    def __init__(self, dim: int, strides: tuple[int, int], widths: tuple[int, int, int], num_frames: int):
        super().__init__()
        self.strides, self.widths, self.num_frames = strides, widths, num_frames
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in strides)  # their biases distinguish the levels
        self.project = nn.Linear(dim, sum(widths))  # one product for all three
        if widths[1]:
            self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))  # norm of the embeddings
            self.log_sigma_appearance = nn.Parameter(torch.tensor(SIGMA_APPEARANCE).log())

    def no_weight_decay(self) -> set[str]:
        """Return the names of logarithms, logits and the compatibility factor, for which 0 is no neutral value."""
        names = ("log_scale", "log_sigma_appearance", "log_sigma_smoothness", "coupling_logit", "affinity", "log_beta")
        return {name for name in names if hasattr(self, name)}

    @torch.no_grad()
    def retime(self, num_frames: int, fresh: Collection[str] = ()) -> list[str]:
        """Take weights of a model for clips of so many frames: widths in time stay the same shares of a clip.

        Args:
            num_frames: T of that model.
            fresh: names of parameters that are not of it, and stay as they are.

        Returns:
            The names of the parameters that have changed.
        """
        names = ("log_sigma_appearance", "log_sigma_smoothness")
        names = [name for name in names if hasattr(self, name) and name not in fresh]
        for name in names:
            self.get_parameter(name)[0] += math.log(self.num_frames / num_frames)
        return names

    def project_tokens(self, levels: list[Float[Tensor, "B T D _ _"]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-potentials, embedding and values (B, N, width) of all cells of both levels.

        Row t*P + c is cell c of frame t; the fine level's cells come first.
        """
        flat = [level.flatten(3).mT for level in levels]  # (B, T, h*w, D) each
        projected = torch.cat([self.project(norm(x)) for norm, x in zip(self.norms, flat, strict=True)], dim=2)
        log_potentials, embedding, values = projected.flatten(1, 2).split(self.widths, dim=-1)
        return log_potentials, embedding, values

    def points(
        self, embedding: Float[Tensor, "B N e"], time: Float[Tensor, "T 1"], cells: Float[Tensor, "P 3"]
    ) -> Float[Tensor, "B N d"]:
        """Return (embedding scaled to one norm, position / sigma): tokens are close where both are."""
        scale = self.log_scale.clamp(math.log(0.25), math.log(8)).exp()
        embedding = F.normalize(_precise(embedding), dim=-1) * scale
        sigma = self.log_sigma_appearance.exp()
        over_time = (time / sigma[0])[:, None].expand(-1, cells.shape[0], -1)
        over_cells = (cells / sigma[1:])[None].expand(time.shape[0], -1, -1)
        position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1)  # (N, 4)
        return torch.cat([embedding, position.expand(embedding.shape[0], -1, -1)], dim=-1)

    def positions(self, levels: list[Tensor]) -> tuple[Float[Tensor, "T 1"], Float[Tensor, "P 3"]]:
        """Return the position in time of each frame, in frames of training, and `cell_positions`."""
        num_frames = levels[0].shape[1]
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        time = torch.arange(num_frames, device=levels[0].device, dtype=dtype)[:, None]
        time = time * (self.num_frames / num_frames)
        cells = cell_positions([level.shape[-2:] for level in levels], self.strides, levels[0].device)
        return time, cells.to(time.dtype)


class MeanFieldCRF(TokenGraph):
    """One CRF per clip over both levels jointly; its marginals and messages are added to the features.

    features <- features + W [ marginals ; S values ]: the label path and the value path. W starts at zero, so the layer
    starts as the identity, to the bit.

    Args:
        dim: D, width of the features.
        num_classes: K; the latent states are 2 (K + 1).
        strides: of the two levels, in pixels.
        num_frames: T of training.
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
        num_frames: int,
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
        max_coupling: float = 8.0,
        backend: Backend = "auto",
    ):
        has_values = readout in ("value", "both")
        num_states = STATES_PER_CLASS * (num_classes + 1)
        has_pairs = iterations > 0 or has_values
        super().__init__(dim, strides, (num_states, EMBEDDING_DIM * has_pairs, VALUE_DIM * has_values), num_frames)
        self.num_classes, self.iterations = num_classes, iterations
        self.backend: Backend = backend
        self.diagnosed = True  # the output has diagnostics; training wants them of the steps that it logs
        self.max_coupling, self.num_states = max_coupling, num_states
        self.adds_labels, self.adds_values = readout in ("labels", "both"), has_values
        if iterations > 0:
            self.log_sigma_smoothness = nn.Parameter(torch.tensor(SIGMA_SMOOTHNESS).log())
            share = min(INITIAL_COUPLING / max_coupling, 0.5)
            self.coupling_logit = nn.Parameter(torch.full((2,), math.log(share / (1 - share))))
            self.affinity = nn.Parameter(torch.eye(self.num_states).repeat(2, 1, 1))
        if readout != "none":
            width = self.num_states * self.adds_labels + VALUE_DIM * self.adds_values
            self.readout = nn.Linear(width, dim, bias=False)
            nn.init.zeros_(self.readout.weight)

    def compatibility(self) -> Float[Tensor, "2 L L"]:
        """Return M^h = w_h B_h / max(1, ||B_h||_inf), B_h = A_h A_h^T: symmetric, positive semi-definite, norm <= w_h.

        The couplings w_h sum to less than max_coupling. At the start M is Potts: agreement is rewarded.
        """
        gram = self.affinity @ self.affinity.mT
        bound = gram.abs().sum(-1).amax(-1).clamp(min=1)
        weight = self.max_coupling / 2 * self.coupling_logit.sigmoid()
        return (weight / bound)[:, None, None] * gram

    def forward(self, levels: list[Float[Tensor, "B T D _ _"]]) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        """Return the updated features and the marginals of `levels`, the fine and the coarse features of all frames."""
        unary, embedding, values = self.project_tokens(levels)
        unary = _precise(unary)
        field, diagnostics = None, {}
        if self.iterations or self.adds_values:
            with _without_autocast(unary.device.type):  # degrees, softmax and energy need float32
                features, compatibility = self._kernels(levels, embedding)
                field = meanfield(
                    unary,
                    features,
                    compatibility,
                    self.iterations,
                    values=values if self.adds_values else None,
                    sums=Sums(self.backend, embedding.dtype, self.diagnosed),
                )
            if self.iterations and self.diagnosed:
                diagnostics = _diagnostics(field, compatibility)
        q = unary.softmax(-1) if field is None else field.marginals
        update = [q] if self.adds_labels else []
        if field is not None and field.values is not None:
            update.append(field.values)
        if update:
            levels = _added(levels, self.readout(torch.cat(update, dim=-1)))
        return levels, CRFOutput(self._pool(q), q, diagnostics)

    def _kernels(
        self, levels: list[Tensor], embedding: Float[Tensor, "B N e"]
    ) -> tuple[Features, Float[Tensor, "H L L"]]:
        """Return what the kernels are made of, and the compatibility of each: smoothness only serves the iterations."""
        time, cells = self.positions(levels)
        points = self.points(embedding, time, cells)
        if not self.iterations:
            return Features(points), points.new_zeros(1, self.num_states, self.num_states)
        sigma = self.log_sigma_smoothness.exp()
        over_time = (time / sigma[0]).expand(points.shape[0], -1, -1)
        factors = normalised_kernel(over_time), normalised_kernel(cells / sigma[1:])
        return Features(points, *factors), self.compatibility()

    def _pool(self, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B K"]:
        """Return log-probabilities of the classes: states summed by class, over all tokens, without the background."""
        return self.class_probabilities(q.sum(1)).clamp(min=1e-12).log().log_softmax(1)

    def emotion_maps(self, levels: list[Float[Tensor, "B T D _ _"]]) -> list[Float[Tensor, "B T K _ _"]]:
        """Return the probability of each class at every cell of each level; the rest to 1 is the background."""
        _, output = self(levels)
        per_cell = self.class_probabilities(output.marginals).unflatten(1, (levels[0].shape[1], -1))  # (B, T, P, K)
        sizes = [level.shape[-2:] for level in levels]
        parts = per_cell.split([h * w for h, w in sizes], dim=2)
        return [part.mT.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]

    def class_probabilities(self, q: Float[Tensor, "*N L"]) -> Float[Tensor, "*N K"]:
        """Return the states' probabilities summed by class; the rest to 1 is the background."""
        return q.unflatten(-1, (self.num_classes + 1, STATES_PER_CLASS)).sum(-1)[..., : self.num_classes]


class GaussianCRF(TokenGraph):
    """A continuous CRF without labels, solved exactly, for comparison.

    features <- features + W x, x = argmin |x - values|^2 + beta x^T (I - S) x. S is the appearance kernel of
    `MeanFieldCRF`; beta is learned, from 0.01 to 4. W starts at zero.
    """

    def __init__(self, dim: int, strides: tuple[int, int], num_frames: int, backend: Backend = "auto"):
        super().__init__(dim, strides, (0, EMBEDDING_DIM, VALUE_DIM), num_frames)
        self.backend: Backend = backend
        self.log_beta = nn.Parameter(torch.zeros(()))
        self.readout = nn.Linear(VALUE_DIM, dim, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(self, levels: list[Float[Tensor, "B T D _ _"]]) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        """Return the updated features of `levels`, the fine and the coarse features of all frames."""
        _, embedding, values = self.project_tokens(levels)
        with _without_autocast(values.device.type):
            points = self.points(embedding, *self.positions(levels))
            beta = self.log_beta.clamp(math.log(0.01), math.log(4)).exp()
            x = gaussian_field(points, values, beta, backend=self.backend, operands=embedding.dtype)
        diagnostics = {"crf/coupling": beta.detach()}
        return _added(levels, self.readout(x)), CRFOutput(None, None, diagnostics)


class BranchMessages(nn.Module):
    """The messages of the original method, for comparison.

    Written from the description in "Enhanced Multi-Scale Dynamic Facial Expression Recognition via Conditional Random
    Fields". A *static* branch, the features, and a *dynamic* one, differences of consecutive frames and last the first
    frame less the last one, send each other one message, h_i <- relu(h_i + relu(W_ji h_j)), at every cell. There is no
    kernel, no normalisation, no compatibility and nothing between cells, frames or levels. As in the other layers the
    result is added to the features through a projection that starts at zero.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.to_static = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.to_dynamic = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.readout = nn.Linear(2 * dim, dim, bias=False)
        nn.init.zeros_(self.readout.weight)

    def forward(self, levels: list[Float[Tensor, "B T D _ _"]]) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        """Return the updated features of `levels`, the fine and the coarse features of all frames."""
        updates = []
        for level, to_static, to_dynamic in zip(levels, self.to_static, self.to_dynamic, strict=True):
            static = level.flatten(3).mT  # (B, T, h*w, D)
            dynamic = static.roll(-1, dims=1) - static
            branches = F.relu(static + F.relu(to_static(dynamic))), F.relu(dynamic + F.relu(to_dynamic(static)))
            updates.append(self.readout(torch.cat(branches, dim=-1)))
        return _added(levels, torch.cat(updates, dim=2).flatten(1, 2)), CRFOutput(None, None, {})


def _precise(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Return a context without autocast. If it is off already, the context is empty: an exported program that contains
    the switch cannot be saved.
    """
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def _added(levels: list[Tensor], update: Float[Tensor, "B N D"]) -> list[Tensor]:
    """Return levels + update, whose rows are tokens in the order of `TokenGraph.project_tokens`."""
    sizes = [level.shape[-2:] for level in levels]
    parts = update.unflatten(1, (levels[0].shape[1], -1)).split([h * w for h, w in sizes], dim=2)  # (B, T, h*w, D)
    return [
        level + part.mT.unflatten(-1, size).to(level.dtype)
        for level, part, size in zip(levels, parts, sizes, strict=True)
    ]


def cell_positions(sizes: list[torch.Size], strides: tuple[int, ...], device: torch.device) -> Float[Tensor, "P 3"]:
    """Return (height, width, level) of all cells of a frame, the first two as shares of the frame.

    Padded strided convolutions centre cell k of stride s on pixel s*k at every level, so the levels share coordinates.
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
def _diagnostics(field: MeanField, compatibility: Float[Tensor, "2 L L"]) -> dict[str, Tensor]:
    """Return scalars for the log. They stay on the device, so that nothing waits for it."""
    assert field.energies is not None and field.residual is not None
    q, to_itself = field.marginals, field.scale.square()
    num_tokens = torch.full((), q.shape[1], device=q.device)  # a tensor: CUDA divides by a Python number less exactly
    entropy = -torch.special.xlogy(q, q).sum(-1).sum(1) / num_tokens
    per_token = field.energies / num_tokens
    # What float32 can distinguish: sums of thousands of terms are good to some 1e-6 of their size.
    tolerance = 1e-5 * per_token.abs().amax(1, keepdim=True).clamp(min=1)
    return {
        "crf/coupling": compatibility.abs().sum(-1).amax(-1).sum(),  # bound on sum_h ||M^h||; convex below 2
        "crf/damping": field.damping.amax(),
        "crf/entropy": entropy.mean(),  # of the marginals, in nats
        "crf/residual": field.residual.amax(),
        "crf/free_energy": per_token[:, -1].mean(),  # nats per token, before the last iteration
        "crf/energy_increases": (per_token.diff(dim=1) > tolerance).sum(),  # must be 0
        "crf/degree_min": 1 / to_itself.amax(),
        "crf/degree_mean": ((1 / to_itself).sum(1) / num_tokens).mean(),
    }
