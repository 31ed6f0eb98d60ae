"""MeanFieldCRF: mean-field inference of a dense CRF over every space-time token of a clip's two feature levels.

A token is one cell of one level in one frame; it carries one of L latent states, two for each emotion and two for the
background. Two kernels couple all pairs of tokens: *appearance* (learned embedding and position) and *smoothness*
(position only). Both are normalised symmetrically, S = D^-1/2 K D^-1/2, and a token sends no message to itself, so
that there is an energy, and mean field with the damping of `certified_damping` never increases its free energy.

    E(z) = - sum_i unary_i(z_i) - sum_h sum_{i<j} S^h_ij M^h(z_i, z_j)
    F(q) = - sum_i unary_i . q_i - 1/2 sum_h tr(q^T S^h q M^h) + sum_i q_i . log q_i   >=   - log Z

After Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", 2011 (the
model) and Baqué et al., "Principled Parallel Mean-Field Inference for Discrete Random Fields", 2016 (the damping). The
sums over pairs are exact: no lattice, no window.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

STATES_PER_CLASS = 2
EMBEDDING_DIM = 28
VALUE_DIM = 64
MAX_COUPLING = 8.0  # beyond it mean field orders globally and needs tens of iterations
INITIAL_COUPLING = 2.0  # below 2 the free energy is convex: one optimum
SIGMA_APPEARANCE = (4.0, 0.5, 0.5, 1.0)  # at the start: frames, height, width (as shares of the frame), level
SIGMA_SMOOTHNESS = (2.0, 0.15, 0.15, 1.0)


class CRFOutput(NamedTuple):
    pooled: Float[Tensor, "B K"]  # log-probabilities of the classes: the marginals, averaged over tokens
    diagnostics: dict[str, Tensor]  # scalars without gradient


class Kernels(NamedTuple):
    """The two normalised kernels of a batch of clips. N = T*P tokens, token (t, c) at row t*P + c."""

    appearance: Float[Tensor, "B N N"]  # diagonal zero; rows and columns of invalid frames zero
    frames: Float[Tensor, "B T T"]  # the smoothness kernel is frames (x) cells, ...
    cells: Float[Tensor, "P P"]  # ... from which `smoothness_message` takes the self-message out again


class MeanField(NamedTuple):
    marginals: Float[Tensor, "B N L"]
    residual: Float[Tensor, " B"]  # largest change of a marginal in the last iteration
    energies: Float[Tensor, "B I"]  # free energy before each iteration, in nats


def normalised_kernel(
    z: Float[Tensor, "*batch N d"], valid: Bool[Tensor, "*batch N"] | None = None
) -> tuple[Float[Tensor, "*batch N N"], Float[Tensor, "*batch N"]]:
    """S_ij = K_ij / sqrt(d_i d_j) and 1/d_i, with K_ij = exp(-|z_i - z_j|^2 / 2) and degrees d_i = sum_j K_ij >= 1.

    The diagonal is still in: S_ii = 1/d_i. Invalid tokens have zero rows and columns and count in no degree.
    """
    half_norm = 0.5 * z.square().sum(-1)
    # Rounding could make the exponent positive where two tokens coincide.
    kernel = (z @ z.mT - half_norm[..., :, None] - half_norm[..., None, :]).clamp(max=0).exp()
    if valid is not None:
        kernel = kernel * valid[..., None, :]
    scale = kernel.sum(-1).clamp(min=1).rsqrt()
    if valid is not None:
        scale = scale * valid
    return scale[..., :, None] * kernel * scale[..., None, :], scale.square()


def appearance_kernel(
    embedding: Float[Tensor, "B N e"],
    time: Float[Tensor, "T 1"],
    cells: Float[Tensor, "P 3"],
    sigma: Float[Tensor, " 4"],
    valid: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B N N"], Float[Tensor, " B"]]:
    """Normalised kernel over (embedding, position / sigma) with a zero diagonal, and the largest 1/degree."""
    over_time = (time / sigma[0])[:, None].expand(-1, len(cells), -1)
    over_cells = (cells / sigma[1:])[None].expand(len(time), -1, -1)
    position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1)  # (N, 4)
    z = torch.cat([embedding, position.expand(len(embedding), -1, -1)], dim=-1)
    kernel, to_itself = normalised_kernel(z, valid.repeat_interleave(len(cells), dim=1))
    return kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1)), to_itself.amax(1)


def smoothness_kernel(
    time: Float[Tensor, "T 1"], cells: Float[Tensor, "P 3"], sigma: Float[Tensor, " 4"], valid: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T T"], Float[Tensor, "P P"], Float[Tensor, " B"]]:
    """The two factors of the kernel over position alone, diagonals included, and the product's largest 1/degree."""
    frames, frame_to_itself = normalised_kernel((time / sigma[0]).expand(len(valid), -1, -1), valid)
    cells, cell_to_itself = normalised_kernel(cells / sigma[1:])
    return frames, cells, frame_to_itself.amax(1) * cell_to_itself.amax()


def smoothness_message(kernels: Kernels, q: Float[Tensor, "B N L"]) -> Float[Tensor, "B N L"]:
    """S^0 q: the product kernel factor by factor, less the token's message to itself. Exact, and never N x N."""
    num_frames, num_cells = kernels.frames.shape[-1], kernels.cells.shape[-1]
    grid = q.unflatten(1, (num_frames, num_cells))  # (B, T, P, L)
    over_cells = torch.einsum("cd,btdl->btcl", kernels.cells, grid)
    everything = torch.einsum("bst,btcl->bscl", kernels.frames, over_cells)
    to_itself = kernels.frames.diagonal(dim1=-2, dim2=-1)[:, :, None] * kernels.cells.diagonal()  # (B, T, P)
    return (everything - to_itself[..., None] * grid).flatten(1, 2)


def messages(
    kernels: Kernels, q: Float[Tensor, "B N L"], compatibility: Float[Tensor, "2 L L"]
) -> Float[Tensor, "B N L"]:
    """sum_h S^h q M^h: what each token hears from all the others. Order of `compatibility`: appearance, smoothness."""
    return kernels.appearance @ q @ compatibility[0] + smoothness_message(kernels, q) @ compatibility[1]


def certified_damping(max_self: Float[Tensor, "B 2"], compatibility: Float[Tensor, "2 L L"]) -> Float[Tensor, " B"]:
    """The least damping rho under which the free energy provably never increases; usually 0.

    The spectrum of S with its diagonal lies in [0, 1], so without it above -max_i 1/d_i, and for positive semi-definite
    M the curvature of the pairwise term is at least -lam, lam = sum_h max_i(1/d_i) ||M^h||_2. Pinsker's inequality
    then asks for rho >= (lam - 2) / 4. ||M||_inf bounds ||M||_2 of a symmetric matrix and needs no decomposition.
    """
    norms = compatibility.abs().sum(-1).amax(-1)
    return ((max_self @ norms - 2) / 4).clamp(min=0)


def meanfield(
    unary: Float[Tensor, "B N L"],
    kernels: Kernels,
    compatibility: Float[Tensor, "2 L L"],
    valid: Bool[Tensor, "B N"],
    iterations: int,
    damping: Float[Tensor, " B"],
) -> MeanField:
    """Parallel mean-field updates, damped in log space (a proximal step in Kullback-Leibler divergence).

    q = softmax(a);  a <- (1 - eta) a + eta (unary + messages(q)),  eta = 1 / (1 + damping), the same for all of a clip.
    """
    assert iterations > 0
    eta = (1 / (1 + damping))[:, None, None]
    logits, energies = unary, []
    q, before = unary.softmax(-1), None
    for _ in range(iterations):
        message = messages(kernels, q, compatibility)
        with torch.no_grad():
            energies.append(free_energy(unary, q, message, valid))
        logits = (1 - eta) * logits + eta * (unary + message)
        before, q = q, logits.softmax(-1)
    with torch.no_grad():
        residual = ((q - before).abs().amax(-1) * valid).amax(1)
    return MeanField(q, residual, torch.stack(energies, dim=1))


def free_energy(
    unary: Float[Tensor, "B N L"],
    q: Float[Tensor, "B N L"],
    message: Float[Tensor, "B N L"],
    valid: Bool[Tensor, "B N"],
) -> Float[Tensor, " B"]:
    """F(q) in nats, given messages(q); invalid tokens do not count."""
    per_token = (torch.special.xlogy(q, q) - q * (unary + 0.5 * message)).sum(-1)
    return torch.where(valid, per_token, 0).sum(1)


class MeanFieldCRF(nn.Module):
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
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        strides: tuple[int, int],
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
    ):
        super().__init__()
        self.num_classes, self.strides, self.iterations = num_classes, strides, iterations
        self.num_states = STATES_PER_CLASS * (num_classes + 1)
        self.reads_labels, self.reads_values = readout in ("labels", "both"), readout in ("value", "both")
        # Only what takes part is created: distributed training wants a gradient for every parameter.
        self.uses_pairs = iterations > 0 or self.reads_values
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in strides)
        self.level = nn.Parameter(torch.zeros(len(strides), dim))
        self.unary = nn.Linear(dim, self.num_states)
        if self.uses_pairs:
            self.embedding = nn.Linear(dim, EMBEDDING_DIM)
            self.log_scale = nn.Parameter(torch.tensor(math.log(2.0)))  # norm of the embeddings
            self.log_sigma_appearance = nn.Parameter(torch.tensor(SIGMA_APPEARANCE).log())
        if iterations > 0:
            self.log_sigma_smoothness = nn.Parameter(torch.tensor(SIGMA_SMOOTHNESS).log())
            share = INITIAL_COUPLING / MAX_COUPLING
            self.coupling_logit = nn.Parameter(torch.full((2,), math.log(share / (1 - share))))
            self.affinity = nn.Parameter(torch.eye(self.num_states).repeat(2, 1, 1))
        if self.reads_values:
            self.value = nn.Linear(dim, VALUE_DIM)
        if readout != "none":
            width = self.num_states * self.reads_labels + VALUE_DIM * self.reads_values
            self.readout = nn.Linear(width, dim, bias=False)
            nn.init.zeros_(self.readout.weight)

    def no_weight_decay(self) -> set[str]:
        """Logarithms, logits and the compatibility factor: decay would pull them to no neutral value."""
        names = ("level", "log_scale", "log_sigma_appearance", "log_sigma_smoothness", "coupling_logit", "affinity")
        return {name for name in names if hasattr(self, name)}

    def compatibility(self) -> Float[Tensor, "2 L L"]:
        """M^h = w_h B_h / max(1, ||B_h||_inf), B_h = A_h A_h^T: symmetric, positive semi-definite, norm <= w_h.

        The couplings w_h sum to less than MAX_COUPLING. At the start M is Potts: agreement is rewarded.
        """
        gram = self.affinity @ self.affinity.mT
        bound = gram.abs().sum(-1).amax(-1).clamp(min=1)
        weight = MAX_COUPLING / 2 * self.coupling_logit.sigmoid()
        return (weight / bound)[:, None, None] * gram

    def forward(
        self, levels: list[Float[Tensor, "B T D _ _"]], valid: Bool[Tensor, "B T"] | None = None
    ) -> tuple[list[Float[Tensor, "B T D _ _"]], CRFOutput]:
        """`levels`: fine and coarse features of all frames; `valid`: frames that take part, all if not given."""
        sizes = [level.shape[-2:] for level in levels]
        batch, num_frames = levels[0].shape[:2]
        if valid is None:
            valid = torch.ones(batch, num_frames, dtype=torch.bool, device=levels[0].device)
        tokens = [level.flatten(3).mT for level in levels]  # (B, T, h*w, D) each
        tokens = torch.cat(
            [norm(t) + offset for norm, t, offset in zip(self.norms, tokens, self.level, strict=True)], dim=2
        ).flatten(1, 2)  # (B, N, D)
        unary = self.unary(tokens).float()
        embedding = F.normalize(self.embedding(tokens).float(), dim=-1) if self.uses_pairs else None
        values = self.value(tokens).float() if self.reads_values else None
        num_cells = tokens.shape[1] // num_frames
        valid_tokens = valid.repeat_interleave(num_cells, dim=1)

        with torch.autocast(tokens.device.type, enabled=False):  # degrees, softmax and energy want float32
            diagnostics, gathered = {}, []
            q = unary.softmax(-1)
            if self.uses_pairs:
                scale = self.log_scale.clamp(math.log(0.25), math.log(8)).exp()
                sigma = self.log_sigma_appearance.exp()
                time = torch.arange(num_frames, device=unary.device, dtype=unary.dtype)[:, None]
                cells = cell_positions(sizes, self.strides, unary.device)
                appearance, max_self = appearance_kernel(embedding * scale, time, cells, sigma, valid)
            if self.iterations:
                frames, cells, smooth_self = smoothness_kernel(time, cells, self.log_sigma_smoothness.exp(), valid)
                compatibility = self.compatibility()
                damping = certified_damping(torch.stack([max_self, smooth_self], 1), compatibility).detach()
                kernels = Kernels(appearance, frames, cells)
                field = meanfield(unary, kernels, compatibility, valid_tokens, self.iterations, damping)
                q = field.marginals
                diagnostics = _diagnostics(field, compatibility, max_self, damping, valid_tokens)
            if self.reads_labels:
                gathered.append(q)
            if self.reads_values:
                gathered.append(appearance @ values)
            pooled = self._pool(q, valid_tokens)

        if gathered:
            update = self.readout(torch.cat(gathered, dim=-1)).unflatten(1, (num_frames, num_cells))  # (B, T, P, D)
            parts = update.split([h * w for h, w in sizes], dim=2)
            levels = [
                level + part.mT.unflatten(-1, size).to(level.dtype)
                for level, part, size in zip(levels, parts, sizes, strict=True)
            ]
        return levels, CRFOutput(pooled, diagnostics)

    def _pool(self, q: Float[Tensor, "B N L"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B K"]:
        """Log-probabilities of the classes: states summed by class, averaged over valid tokens, background left out."""
        per_state = torch.where(valid[..., None], q, 0).sum(1)
        per_class = per_state.unflatten(1, (self.num_classes + 1, STATES_PER_CLASS)).sum(2)[:, : self.num_classes]
        return per_class.clamp(min=1e-12).log().log_softmax(1)


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
    field: MeanField,
    compatibility: Float[Tensor, "2 L L"],
    max_self: Float[Tensor, " B"],
    damping: Float[Tensor, " B"],
    valid: Bool[Tensor, "B N"],
) -> dict[str, Tensor]:
    """Scalars for the log, computed on the device without waiting for it."""
    num_tokens = valid.sum(1).clamp(min=1)
    q = field.marginals
    entropy = -torch.where(valid, torch.special.xlogy(q, q).sum(-1), 0).sum(1) / num_tokens
    return {
        "crf/coupling": compatibility.abs().sum(-1).amax(-1).sum(),  # bound on sum_h ||M^h||; convex below 2
        "crf/damping": damping.amax(),
        "crf/entropy": entropy.mean(),  # of the marginals, in nats
        "crf/residual": field.residual.amax(),
        "crf/free_energy": (field.energies[:, -1] / num_tokens).mean(),  # nats per token, before the last iteration
        "crf/degree_min": 1 / max_self.amax(),
    }
