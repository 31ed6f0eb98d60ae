"""The CRF layer against loops in plain Python, enumeration of all labelings, and its own guarantees."""

import itertools
import math

import pytest
import torch

from dfer.crf import (
    MAX_COUPLING,
    Kernels,
    MeanFieldCRF,
    appearance_kernel,
    cell_positions,
    certified_damping,
    free_energy,
    meanfield,
    messages,
    normalised_kernel,
    smoothness_kernel,
)


def slow_kernel(points: list[list[float]], valid: list[bool]) -> list[list[float]]:
    """The oracle: symmetric normalisation, no self-message, invalid tokens nowhere."""
    n = len(points)

    def gauss(i: int, j: int) -> float:
        return math.exp(-0.5 * sum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)))

    degree = [sum(gauss(i, j) for j in range(n) if valid[j]) for i in range(n)]
    return [
        [gauss(i, j) / math.sqrt(degree[i] * degree[j]) if i != j and valid[i] and valid[j] else 0.0 for j in range(n)]
        for i in range(n)
    ]


def slow_softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def slow_meanfield(unary, kernels, compatibility, iterations: int, damping: float) -> list[list[float]]:
    """The oracle: one clip, plain lists."""
    n, num_states, eta = len(unary), len(unary[0]), 1 / (1 + damping)
    logits = [list(row) for row in unary]
    for _ in range(iterations):
        q = [slow_softmax(row) for row in logits]
        for i in range(n):
            for state in range(num_states):
                message = sum(
                    s[i][j] * q[j][k] * m[k][state]
                    for s, m in zip(kernels, compatibility, strict=True)
                    for j in range(n)
                    for k in range(num_states)
                )
                logits[i][state] = (1 - eta) * logits[i][state] + eta * (unary[i][state] + message)
    return [slow_softmax(row) for row in logits]


class Problem:
    """Random clips: T frames with a 2 x 3 and a 1 x 2 level, L states, float64."""

    def __init__(self, seed: int, coupling: float, batch: int = 1, spread: float = 1.0):
        num_frames, num_states = 3, 4
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.time = torch.arange(num_frames, dtype=torch.float64)[:, None]
        self.cells = cell_positions([torch.Size((2, 3)), torch.Size((1, 2))], (16, 32), torch.device("cpu")).double()
        self.embedding = spread * draw(batch, num_frames * len(self.cells), 5)
        self.sigmas = draw(2, 4).mul(0.3).exp()
        self.valid = torch.ones(batch, num_frames, dtype=torch.bool)
        self.unary = draw(batch, num_frames * len(self.cells), num_states)
        factor = draw(2, num_states, num_states)
        gram = factor @ factor.mT
        self.compatibility = coupling / 2 * gram / gram.abs().sum(-1).amax(-1)[:, None, None]

    @property
    def valid_tokens(self) -> torch.Tensor:
        return self.valid.repeat_interleave(len(self.cells), dim=1)

    def kernels(self) -> tuple[Kernels, torch.Tensor]:
        """The kernels and the largest 1/degree of each."""
        appearance, a = appearance_kernel(self.embedding, self.time, self.cells, self.sigmas[0], self.valid)
        frames, cells, b = smoothness_kernel(self.time, self.cells, self.sigmas[1], self.valid)
        return Kernels(appearance, frames, cells), torch.stack([a, b], dim=1)

    def slow_kernels(self) -> list[list[list[float]]]:
        positions = [[*t, *c] for t in self.time.tolist() for c in self.cells.tolist()]
        scaled = [[[x / s for x, s in zip(p, sigma, strict=True)] for p in positions] for sigma in self.sigmas.tolist()]
        both = [e + p for e, p in zip(self.embedding[0].tolist(), scaled[0], strict=True)]
        valid = self.valid_tokens[0].tolist()
        return [slow_kernel(both, valid), slow_kernel(scaled[1], valid)]


@pytest.mark.parametrize("last_frame", [True, False])
def test_kernels_and_mean_field_equal_the_loops(last_frame):
    for seed, coupling, damping in ((0, 1.0, 0.0), (1, 4.0, 0.0), (2, 8.0, 0.7)):
        problem = Problem(seed, coupling)
        problem.valid[0, -1] = last_frame
        kernels, _ = problem.kernels()
        slow = problem.slow_kernels()
        identity = torch.eye(len(slow[0]), dtype=torch.float64)[None]
        for h in range(2):  # the messages of an identity matrix are the kernel itself
            one = torch.zeros(2, len(slow[0]), len(slow[0]), dtype=torch.float64)
            one[h] = torch.eye(len(slow[0]))
            got = messages(kernels, identity, one)[0]
            torch.testing.assert_close(got, torch.tensor(slow[h], dtype=torch.float64), atol=1e-13, rtol=0)
        want = slow_meanfield(problem.unary[0].tolist(), slow, problem.compatibility.tolist(), 3, damping)
        field = meanfield(
            problem.unary,
            kernels,
            problem.compatibility,
            problem.valid_tokens,
            3,
            torch.tensor([damping], dtype=torch.float64),
        )
        torch.testing.assert_close(field.marginals[0], torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)


def enumerate_labelings(unary, pair) -> tuple[float, torch.Tensor]:
    """log Z and the exact marginals of E = -sum unary - sum_{i<j} pair[i][j]."""
    n, num_states = unary.shape
    scores = []
    labelings = list(itertools.product(range(num_states), repeat=n))
    for z in labelings:
        score = sum(unary[i, z[i]].item() for i in range(n))
        score += sum(pair[i, j, z[i], z[j]].item() for i in range(n) for j in range(i + 1, n))
        scores.append(score)
    log_z = torch.tensor(scores, dtype=torch.float64).logsumexp(0)
    marginals = torch.zeros(n, num_states, dtype=torch.float64)
    for z, score in zip(labelings, scores, strict=True):
        for i in range(n):
            marginals[i, z[i]] += math.exp(score - log_z)
    return log_z.item(), marginals


@pytest.mark.parametrize(("coupling", "tolerance"), [(0.0, 1e-12), (0.5, 0.006), (1.0, 0.02), (8.0, 1.0)])
def test_marginals_and_bound_against_enumeration(coupling, tolerance):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        n, num_states = 5, 3
        z = torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
        unary = torch.randn(1, n, num_states, generator=generator, dtype=torch.float64)
        kernel, to_itself = normalised_kernel(z)
        kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
        # all in the appearance kernel: one frame whose smoothness has no neighbours
        kernels = Kernels(kernel, torch.ones(1, n, n).double() * torch.eye(n), torch.ones(1, 1).double())
        compatibility = torch.stack([coupling * torch.eye(num_states), torch.zeros(num_states, num_states)]).double()
        log_z, exact = enumerate_labelings(unary[0], kernel[0][:, :, None, None] * compatibility[0])
        damping = certified_damping(torch.stack([to_itself.amax(1), to_itself.amax(1)], 1), compatibility)
        valid = torch.ones(1, n, dtype=torch.bool)
        field = meanfield(unary, kernels, compatibility, valid, 60, damping)
        final = free_energy(unary, field.marginals, messages(kernels, field.marginals, compatibility), valid)
        for energy in (*field.energies[0].tolist(), final.item()):
            assert -energy <= log_z + 1e-9
        assert (field.marginals[0] - exact).abs().max() <= tolerance
        if coupling == 0:
            assert -final.item() == pytest.approx(log_z, abs=1e-9)


def test_the_free_energy_never_increases_and_the_fixed_point_is_stationary():
    for seed, spread in ((0, 0.3), (1, 3.0), (2, 1.0)):
        problem = Problem(seed, coupling=MAX_COUPLING, batch=20, spread=spread)
        kernels, max_self = problem.kernels()
        damping = certified_damping(max_self, problem.compatibility)
        field = meanfield(problem.unary, kernels, problem.compatibility, problem.valid_tokens, 300, damping)
        assert (field.energies.diff(dim=1) <= 1e-11).all()
        q = field.marginals
        again = (problem.unary + messages(kernels, q, problem.compatibility)).softmax(-1)
        assert (q - again).abs().max() < 1e-3


def test_an_attracting_pair_oscillates_without_the_damping():
    """Two equal tokens of opposite opinion swap their labels for ever when both are updated at once."""
    kernel, to_itself = normalised_kernel(torch.zeros(1, 2, 1, dtype=torch.float64))
    kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=-2, dim2=-1))
    kernels = Kernels(kernel, torch.eye(2).double()[None], torch.ones(1, 1).double())
    compatibility = torch.stack([8 * torch.eye(2), torch.zeros(2, 2)]).double()
    unary = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]]).double()
    valid = torch.ones(1, 2, dtype=torch.bool)
    free = meanfield(unary, kernels, compatibility, valid, 50, torch.zeros(1).double())
    assert free.residual.item() > 0.8
    assert (free.energies.diff(dim=1) > 0.1).any()
    damping = certified_damping(torch.stack([to_itself.amax(1), torch.zeros(1).double()], 1), compatibility)
    assert damping.item() == pytest.approx(0.5)  # lam = 8/2
    damped = meanfield(unary, kernels, compatibility, valid, 50, damping)
    assert damped.residual.item() < 0.01 and (damped.energies.diff(dim=1) <= 1e-12).all()


def test_gradients_equal_finite_differences():
    """Through the kernels too: degrees and sigmas are part of the function."""
    problem = Problem(0, 3.0)
    damping = torch.tensor([0.3], dtype=torch.float64)

    def marginals(unary, embedding, sigmas, compatibility):
        appearance, _ = appearance_kernel(embedding, problem.time, problem.cells, sigmas[0], problem.valid)
        frames, cells, _ = smoothness_kernel(problem.time, problem.cells, sigmas[1], problem.valid)
        kernels = Kernels(appearance, frames, cells)
        return meanfield(unary, kernels, compatibility, problem.valid_tokens, 2, damping).marginals

    inputs = (problem.unary, problem.embedding, problem.sigmas, problem.compatibility)
    assert torch.autograd.gradcheck(marginals, [x.requires_grad_() for x in inputs], fast_mode=True)


@torch.no_grad()
def test_damping_is_a_clips_own():
    crf, inputs = moved_layer(), levels()
    crf.coupling_logit.data += 10
    crf.log_sigma_appearance.data -= 3  # hardly any neighbours: large 1/degree
    for level in inputs:
        level[1] = level[1, :1, :, :1, :1]  # but here all tokens look alike
    together = crf(inputs)
    for i in range(2):
        alone = crf([level[i : i + 1] for level in inputs])
        torch.testing.assert_close(alone[1].pooled[0], together[1].pooled[i], atol=1e-6, rtol=1e-6)
    damping = [crf([level[i : i + 1] for level in inputs])[1].diagnostics["crf/damping"].item() for i in range(2)]
    assert max(damping) > 0 and damping[0] != damping[1]


def levels(batch: int = 2, num_frames: int = 4, dim: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, num_frames, dim, *size, generator=generator) for size in ((3, 4), (2, 2))]


def layer(**options) -> MeanFieldCRF:
    torch.manual_seed(0)
    return MeanFieldCRF(16, 7, strides=(16, 32), **options)


def moved_layer(**options) -> MeanFieldCRF:
    """A layer away from its identity at the start."""
    crf = layer(**options)
    for parameter in crf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return crf


@pytest.mark.parametrize("readout", ["none", "labels", "value", "both"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_the_layer_starts_as_the_identity_and_then_learns(readout, iterations):
    crf, inputs = layer(readout=readout, iterations=iterations), levels()
    outputs, crf_output = crf(inputs)
    for before, after in zip(inputs, outputs, strict=True):
        assert torch.equal(before, after)
    torch.testing.assert_close(crf_output.pooled.exp().sum(1), torch.ones(2))
    optimizer = torch.optim.SGD(crf.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs, crf_output = crf(inputs)
        (sum(o.square().sum() for o in outputs) - crf_output.pooled[:, 1].sum()).backward()
        optimizer.step()
    assert [name for name, p in crf.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_frames_that_do_not_count_change_nothing():
    crf, inputs = moved_layer(), levels()
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    outputs, crf_output = crf(inputs, valid)
    for level in inputs:
        level[1, 2:] = 1e3 * torch.randn_like(level[1, 2:])
    garbage_outputs, garbage_crf_output = crf(inputs, valid)
    assert torch.equal(crf_output.pooled, garbage_crf_output.pooled)
    for a, b in zip(outputs, garbage_outputs, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, :2], b[1, :2])
    # two valid frames of four are a clip of two frames
    short, short_output = crf([level[1:, :2] for level in inputs])
    torch.testing.assert_close(short_output.pooled, crf_output.pooled[1:], atol=1e-5, rtol=1e-5)
    for a, b in zip(short, outputs, strict=True):
        torch.testing.assert_close(a[0], b[1, :2], atol=1e-5, rtol=1e-5)


def test_the_layer_reads_out_marginals_and_messages_of_values():
    crf, inputs = moved_layer(), levels(batch=1)
    with torch.no_grad():
        outputs, crf_output = crf(inputs)
        tokens = torch.cat([x.flatten(3).mT for x in inputs], dim=2)  # (1, T, P, D)
        normed = torch.cat(
            [crf.norms[k](t) + crf.level[k] for k, t in enumerate(tokens.split([12, 4], dim=2))], dim=2
        ).flatten(1, 2)
        cells = cell_positions([torch.Size((3, 4)), torch.Size((2, 2))], (16, 32), torch.device("cpu"))
        sigma_a, sigma_s = crf.log_sigma_appearance.exp(), crf.log_sigma_smoothness.exp()
        embedding = crf.embedding(normed)
        embedding = embedding / embedding.norm(dim=-1, keepdim=True) * crf.log_scale.exp()
        position = [[t, *c] for t in range(4) for c in cells.tolist()]
        points = [
            [*e, *(x / s for x, s in zip(p, sigma_a.tolist(), strict=True))]
            for e, p in zip(embedding[0].tolist(), position, strict=True)
        ]
        smooth = [[x / s for x, s in zip(p, sigma_s.tolist(), strict=True)] for p in position]
        everywhere = [True] * len(points)
        kernels = [slow_kernel(points, everywhere), slow_kernel(smooth, everywhere)]
        q = slow_meanfield(crf.unary(normed)[0].tolist(), kernels, crf.compatibility().tolist(), 3, 0.0)
        assert crf_output.diagnostics["crf/damping"] == 0
        gathered = torch.cat([torch.tensor(q), torch.tensor(kernels[0]) @ crf.value(normed)[0]], dim=1)
        want = tokens[0].flatten(0, 1) + gathered @ crf.readout.weight.T
        got = torch.cat([x.flatten(3).mT for x in outputs], dim=2)[0].flatten(0, 1)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        per_class = torch.tensor(q).mean(0)[:14].view(7, 2).sum(1)
        torch.testing.assert_close(crf_output.pooled[0].exp(), per_class / per_class.sum(), atol=1e-5, rtol=1e-5)


def test_coupling_is_bounded_symmetric_and_positive():
    for scale in (0.0, 1.0, 30.0):
        crf = layer()
        crf.affinity.data += scale * torch.randn_like(crf.affinity)
        crf.coupling_logit.data += scale
        matrices = crf.compatibility().detach().double()
        torch.testing.assert_close(matrices, matrices.mT)
        assert torch.linalg.eigvalsh(matrices).min() > -1e-5
        assert torch.linalg.matrix_norm(matrices, 2).sum() <= MAX_COUPLING + 1e-5
    assert layer().compatibility().abs().sum(-1).amax(-1).sum().item() == pytest.approx(2.0)


def test_positions_are_shared_by_the_levels():
    cells = cell_positions([torch.Size((4, 8)), torch.Size((2, 4))], (16, 32), torch.device("cpu"))
    fine, coarse = cells[:32].view(4, 8, 3), cells[32:].view(2, 4, 3)
    assert fine[1, 0].tolist() == [0.25, 0, 0] and fine[0, 1].tolist() == [0, 0.125, 0]
    assert torch.equal(coarse[..., :2], fine[::2, ::2, :2]) and (coarse[..., 2] == 1).all()


@torch.no_grad()
def test_reduced_precision_and_extreme_features_stay_finite():
    crf = moved_layer()
    exact = crf(levels())[1].pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, crf_output = crf(levels())
    assert crf_output.pooled.dtype == torch.float32 and outputs[0].dtype == torch.float32
    torch.testing.assert_close(crf_output.pooled, exact, atol=0.02, rtol=0)
    for inputs in ([1e4 * x for x in levels()], [torch.zeros_like(x) for x in levels()]):
        outputs, crf_output = crf(inputs)
        assert all(x.isfinite().all() for x in (*outputs, crf_output.pooled, *crf_output.diagnostics.values()))
