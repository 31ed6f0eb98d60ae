"""Mean-field inference against loops in plain Python, enumeration of all labelings, and its own guarantees.

Bounds and cases follow docs/crf.md; tests/mutants.py breaks the code in many ways and looks whether this notices.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfer.crf.backends import grouped
from dfer.crf.dense import PAIRS_AT_ONCE, DensePairs
from dfer.crf.meanfield import Features, MeanField, Sums, certified_damping, curvature_bounds, meanfield
from dfer.crf.pairs import Smoothness, normalised_kernel
from tests import crf_oracle
from tests.crf_problems import DOUBLE, FullSize, Problem, error


def assert_equal_lists(got: torch.Tensor, want: list, tolerance: float) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), atol=tolerance, rtol=0)


# 1. Loops


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(1, 3),
    states=st.integers(2, 4),
    iterations=st.integers(0, 3),
    damping=st.sampled_from(["certified", "indefinite", 0.0, 0.7]),
    coupling=st.sampled_from([1.0, 4.0, 16.0]),
    smooth=st.booleans(),
    backend=st.sampled_from(["dense", "sdpa"]),
)
def test_everything_equals_the_loops(seed, frames, states, iterations, damping, coupling, smooth, backend):
    problem = Problem(seed, coupling, frames=frames, states=states, sizes=((2, 2), (1, 2)))
    given_damping = damping if isinstance(damping, str) else torch.tensor([damping], dtype=DOUBLE)
    field = problem.solve(iterations, smooth, damping=given_damping, backend=backend)

    kernels = problem.slow_kernels(smooth=smooth)
    matrices = problem.parameters["compatibility"].tolist()[: len(kernels)]
    unary = problem.parameters["unary"][0].tolist()
    # S_ii, which the certificate needs, is 1/d_i, and the kernel's own diagonal is empty
    positions = [[*t, *c] for t in problem.time.tolist() for c in problem.cells.tolist()]
    sigmas = problem.parameters["sigmas"].tolist()
    scaled = [[[x / s for x, s in zip(p, sigma, strict=True)] for p in positions] for sigma in sigmas]
    points = [e + p for e, p in zip(problem.parameters["embedding"][0].tolist(), scaled[0], strict=True)]
    degrees = [crf_oracle.degrees(x) for x in (points, scaled[1])][: len(kernels)]
    if isinstance(damping, str):
        lam = 0.0
        for degree, m in zip(degrees, matrices, strict=True):
            largest_self = max(1 / d for d in degree)
            norm = max(sum(abs(x) for x in row) for row in m)
            reach = max(sum(abs(x) for k, x in enumerate(row) if k != i) - row[i] for i, row in enumerate(m))
            lam += max(largest_self * norm, reach if damping == "indefinite" else 0.0)
        damping = max(0.0, (lam - 2) / 4)
    assert field.damping.item() == pytest.approx(damping, abs=1e-12)
    trajectory = crf_oracle.meanfield(unary, kernels, matrices, iterations, damping)
    assert_equal_lists(field.marginals[0], trajectory[-1], 1e-12)
    swept = torch.tensor(kernels[0], dtype=DOUBLE) @ problem.parameters["values"][0]
    torch.testing.assert_close(field.values[0], swept, atol=1e-12, rtol=0)
    energies = [crf_oracle.free_energy(unary, kernels, matrices, q) for q in trajectory[:-1]]
    assert_equal_lists(field.energies[0], energies, 1e-11)
    assert_equal_lists(field.scale[0], [1 / math.sqrt(d) for d in degrees[0]], 1e-12)
    if iterations:
        last = [torch.tensor(q, dtype=DOUBLE) for q in trajectory[-2:]]
        assert field.residual.item() == pytest.approx((last[1] - last[0]).abs().max().item(), abs=1e-12)


# 2. Enumeration


@pytest.mark.parametrize(("coupling", "tolerance"), [(0.0, 1e-12), (0.5, 0.003), (1.0, 0.01), (2.0, 0.04), (8.0, 1.0)])
def test_marginals_and_bound_against_enumeration(coupling, tolerance):
    """-F <= log Z always, and mean field is close where the coupling is weak."""
    for seed in range(3):
        problem = Problem(seed, coupling=1.0, frames=1, sizes=((2, 3), (1, 1)), states=3)
        problem.parameters["compatibility"] = coupling * torch.eye(3, dtype=DOUBLE).expand(2, 3, 3)
        kernels = problem.slow_kernels(smooth=False)
        unary, matrices = problem.parameters["unary"], problem.parameters["compatibility"].tolist()[:1]
        log_z, exact = crf_oracle.enumerate_labelings(unary[0].tolist(), kernels, matrices)
        field = problem.solve(60, smooth=False)
        final = crf_oracle.free_energy(unary[0].tolist(), kernels, matrices, field.marginals[0].tolist())
        for energy in (*field.energies[0].tolist(), final):
            assert -energy <= log_z + 1e-9
        assert_equal_lists(field.marginals[0], exact, tolerance)
        if coupling == 0:
            assert -final == pytest.approx(log_z, abs=1e-9)


@pytest.mark.parametrize("num_tokens", [2, 4])
def test_a_chain_against_forward_and_backward(num_tokens):
    """Tokens so far from all but their neighbours that the kernel is a chain: exact marginals are known."""
    generator = torch.Generator().manual_seed(num_tokens)
    points = 6.0 * torch.arange(num_tokens, dtype=DOUBLE)[None, :, None]  # K of the second next is e^-72
    points[0, 1::2] -= 5  # pairs at distance 1, then a gap
    unary = torch.randn(1, num_tokens, 3, generator=generator, dtype=DOUBLE)
    matrix = 0.5 * torch.eye(3, dtype=DOUBLE)
    kernel = crf_oracle.kernel(points[0].tolist())
    weights = [kernel[i][i + 1] for i in range(num_tokens - 1)]
    exact = crf_oracle.chain_marginals(unary[0].tolist(), weights, matrix.tolist())
    _, enumerated = crf_oracle.enumerate_labelings(unary[0].tolist(), [kernel], [matrix.tolist()])
    assert_equal_lists(torch.tensor(exact), enumerated, 1e-6)
    field = meanfield(unary, Features(points), matrix[None], 60)
    assert_equal_lists(field.marginals[0], exact, 0.01)
    alone = unary.softmax(-1)[0]
    assert (alone - torch.tensor(exact)).abs().max() > 5 * (field.marginals[0] - torch.tensor(exact)).abs().max()


# 3. Descent


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("indefinite", [False, True])
def test_the_descent_identity(indefinite):
    """F(q) - F(q+) = (1 + rho) KL(q|q+) + rho KL(q+|q) + 1/2 <dq, A dq>: holds for every step, to rounding."""
    for seed in range(5):
        problem = Problem(seed, 6.0, indefinite=indefinite)
        kernels = [torch.tensor(s, dtype=DOUBLE) for s in problem.slow_kernels()]
        for rho in (0.0, 0.4):
            damping = torch.tensor([rho], dtype=DOUBLE)
            energies = problem.solve(5, damping=damping).energies[0]
            before = problem.parameters["unary"].softmax(-1)[0]
            for step in range(4):
                after = problem.solve(step + 1, damping=damping).marginals[0]
                change = after - before
                curvature = sum(
                    (change * (s @ change @ m)).sum()
                    for s, m in zip(kernels, problem.parameters["compatibility"], strict=True)
                )
                want = (1 + rho) * kl(before, after) + rho * kl(after, before) + 0.5 * curvature
                got = energies[step] - energies[step + 1]
                torch.testing.assert_close(got, want, atol=1e-10 * energies.abs().max().item(), rtol=1e-10)
                before = after


def test_the_free_energy_never_increases_with_the_certificate():
    increases_undamped = 0
    for seed in range(20):
        indefinite, coupling, spread = seed % 2 == 1, (4.0, 16.0, 40.0)[seed % 3], (0.2, 1.0, 4.0)[seed // 2 % 3]
        problem = Problem(seed, coupling, batch=25, spread=spread, indefinite=indefinite)
        field = problem.solve(40, damping="indefinite" if indefinite else "certified")
        assert (field.energies.diff(dim=1) <= 1e-11).all()
        free = problem.solve(40, damping=torch.zeros(25, dtype=DOUBLE))
        increases_undamped += (free.energies.diff(dim=1) > 1e-9).any(dim=1).sum().item()
    assert increases_undamped > 20, "these problems need no damping and show nothing"


def pair(unary: list[list[float]], weight: float, **options: object) -> MeanField:
    """Two tokens in one place: S_12 = 1/2."""
    points, matrix = torch.zeros(1, 2, 1, dtype=DOUBLE), weight * torch.eye(2, dtype=DOUBLE)[None]
    return meanfield(torch.tensor([unary], dtype=DOUBLE), Features(points), matrix, 80, **options)


@pytest.mark.parametrize(
    ("unary", "weight", "rule", "rho"),
    [
        ([[0.1, -0.1], [0.1, -0.1]], -8.0, "indefinite", 1.5),  # both avoid each other, and jump together
        ([[1.0, -1.0], [-1.0, 1.0]], 8.0, "certified", 0.5),  # of opposite opinion, they swap labels
    ],
)
def test_a_strong_pair_oscillates_without_the_damping(unary, weight, rule, rho):
    free = pair(unary, weight, damping=torch.zeros(1, dtype=DOUBLE))
    assert free.residual.item() > 0.5 and (free.energies.diff(dim=1) > 0.1).any()
    damped = pair(unary, weight, damping=rule)
    assert damped.damping.item() == pytest.approx(rho)
    assert damped.residual.item() < 1e-3 and (damped.energies.diff(dim=1) <= 1e-12).all()


def test_what_needs_no_damping_gets_none():
    assert (Problem(0, 2.0, batch=20).solve(1).damping == 0).all()
    crowd = Problem(1, 16.0, batch=20, spread=0.1, frames=6)
    crowd.parameters["sigmas"] = crowd.parameters["sigmas"] * 4
    assert (crowd.solve(1).damping == 0).all()


# 4. One optimum where the coupling is below 2


def fixed_point(problem: Problem, logits: torch.Tensor, iterations: int) -> list[torch.Tensor]:
    """Undamped iterations from any start, by the layer's own sweeps."""
    points, frames, cells = problem.features()
    ((_, pairs),) = grouped("dense", points, DOUBLE, DOUBLE)
    smoothness, matrices = Smoothness(frames, cells), problem.parameters["compatibility"]
    eta, marginals = torch.ones(len(points), dtype=DOUBLE), [logits.softmax(-1)]
    for _ in range(iterations):
        smooth = smoothness.sweep(marginals[-1]) @ matrices[1]
        step = (marginals[-1], logits, problem.parameters["unary"], smooth, matrices[0], eta, None)
        logits, q, _, _ = pairs.step(*step)
        marginals.append(q)
    return marginals


def test_below_coupling_two_every_start_ends_at_the_same_place():
    for seed in range(3):
        problem = Problem(seed, coupling=1.9, spread=0.3)
        norm = torch.linalg.matrix_norm(problem.parameters["compatibility"], 2).sum().item()
        assert norm < 2
        generator = torch.Generator().manual_seed(seed)
        optimum = problem.solve(200).marginals
        for _ in range(4):
            start = 5 * torch.randn(optimum.shape, generator=generator, dtype=DOUBLE)
            marginals = fixed_point(problem, start, 200)
            torch.testing.assert_close(marginals[-1], optimum, atol=1e-10, rtol=0)
            errors = torch.stack([(q - optimum).norm() for q in marginals])
            near = errors[1:] > 1e-9
            assert (errors[1:] / errors[:-1])[near].max() <= norm / 2


# 5. Stationarity


def test_the_end_is_a_stationary_point_of_the_free_energy():
    for seed in range(3):
        problem = Problem(seed, coupling=2.0)
        q = problem.solve(200).marginals
        again = fixed_point(problem, q.log(), 1)[-1]
        torch.testing.assert_close(again, q, atol=1e-10, rtol=0)
        logits = q.log().requires_grad_()
        on_simplex, kernels = logits.softmax(-1)[0], problem.slow_kernels()
        message = sum(
            torch.tensor(s, dtype=DOUBLE) @ on_simplex @ m
            for s, m in zip(kernels, problem.parameters["compatibility"], strict=True)
        )
        energy = (on_simplex * (on_simplex.log() - problem.parameters["unary"][0] - 0.5 * message)).sum()
        (slope,) = torch.autograd.grad(energy, logits)
        assert slope.abs().max() < 1e-10


# 6. Gradients


def loss(field: MeanField) -> torch.Tensor:
    """A weighted sum of marginals and values."""
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator, dtype=DOUBLE).to(x.dtype) for x in field[:2]]
    return sum((w * x).sum() for w, x in zip(weights, field[:2], strict=True))


def gradients(problem: Problem, **options: object) -> dict[str, torch.Tensor]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in problem.parameters.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(problem.solve(**leaves, **options)), leaves.values())))  # noqa: B905


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("smooth", [True, False])
def test_gradients_equal_finite_differences(iterations, smooth):
    """Through the kernels too: degrees and sigmas are part of the function."""
    problem = Problem(0, 3.0, frames=2, sizes=((2, 2), (1, 1)), states=3, dim=2, width=2, batch=2)
    damping = torch.tensor([0.3, 0.0], dtype=DOUBLE)

    def function(*parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(problem.parameters, parameters, strict=True))
        field = problem.solve(iterations, smooth, damping=damping, backend="dense", **named)
        return torch.cat([x.flatten() for x in field[:2]])

    inputs = [p.clone().requires_grad_() for p in problem.parameters.values()]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_backward_pass_equals_unrolled_autograd(damping):
    problem = Problem(3, 4.0, batch=3)
    rho = torch.full((3,), damping, dtype=DOUBLE)
    ours, unrolled = (gradients(problem, damping=rho, backend=backend) for backend in ("dense", "sdpa"))
    for name in ours:
        torch.testing.assert_close(ours[name], unrolled[name], atol=1e-12, rtol=1e-12, msg=name)


def test_a_second_derivative_is_refused():
    problem = Problem(0)
    unary = problem.parameters["unary"].requires_grad_()
    (first,) = torch.autograd.grad(problem.solve().marginals.square().sum(), unary, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


def test_diagnostics_have_no_gradient():
    for backend in ("dense", "sdpa"):
        problem = Problem(0)
        problem.parameters["unary"].requires_grad_()
        field = problem.solve(backend=backend)
        assert field.marginals.requires_grad and not any(x.requires_grad for x in field[2:])


# 7. Invariances


def test_relabelling_tokens_relabels_the_result():
    problem = Problem(0, 4.0, batch=2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    points, _, _ = problem.features()
    p = problem.parameters
    plain = meanfield(p["unary"], Features(points), p["compatibility"][:1], 3, values=p["values"])
    features, values = Features(points[:, order]), p["values"][:, order]
    mixed = meanfield(p["unary"][:, order], features, p["compatibility"][:1], 3, values=values)
    for a, b in zip(plain[:2], mixed[:2], strict=True):
        torch.testing.assert_close(a[:, order], b, atol=1e-12, rtol=0)


def test_relabelling_frames_relabels_the_result():
    problem, order = Problem(0, 4.0), torch.tensor([2, 0, 1])
    tokens = torch.arange(24).view(3, 8)[order].flatten()
    plain = problem.solve()
    problem.time = problem.time[order]
    for name in ("unary", "embedding", "values"):
        problem.parameters[name] = problem.parameters[name][:, tokens]
    mixed = problem.solve()
    torch.testing.assert_close(plain.marginals[:, tokens], mixed.marginals, atol=1e-12, rtol=0)


def test_relabelling_states_relabels_the_result():
    problem, order = Problem(0, 4.0), torch.tensor([3, 1, 0, 2])
    plain = problem.solve()
    problem.parameters["unary"] = problem.parameters["unary"][..., order]
    problem.parameters["compatibility"] = problem.parameters["compatibility"][:, order][:, :, order]
    torch.testing.assert_close(plain.marginals[..., order], problem.solve().marginals, atol=1e-12, rtol=0)


def test_what_must_not_matter_does_not():
    problem = Problem(0, 4.0)
    plain = problem.solve()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))[0]
    p = problem.parameters
    changes = {
        "a constant for all states of a token": {"unary": p["unary"] + torch.linspace(-3, 3, 24)[None, :, None]},
        "a constant for all pairs of states": {"compatibility": p["compatibility"] + 0.7},
        "rotated embeddings": {"embedding": p["embedding"] @ rotation},
        "shifted embeddings": {"embedding": p["embedding"] + 2},
    }
    for what, change in changes.items():
        options = change | ({"damping": plain.damping} if "compatibility" in change else {})
        torch.testing.assert_close(problem.solve(**options).marginals, plain.marginals, atol=1e-12, rtol=0, msg=what)
    problem.time, problem.cells = problem.time + 5, problem.cells + torch.tensor([0.3, -0.2, 1.0], dtype=DOUBLE)
    torch.testing.assert_close(problem.solve().marginals, plain.marginals, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_clip_does_not_depend_on_its_batch_mates(dtype):
    """To the bit, gradients included: clips that are worked on together share no sum."""
    problem = Problem(0, 16.0, batch=5)
    problem.parameters["embedding"][1] *= 0  # these need no damping, the others do
    together = problem.solve(dtype=dtype)
    assert together.damping.unique().numel() > 1
    grads = gradients(problem, dtype=dtype)
    for i in range(5):
        alone = Problem(0, 16.0)
        alone.parameters = {
            name: p if name in ("sigmas", "compatibility") else p[i : i + 1] for name, p in problem.parameters.items()
        }
        field = alone.solve(dtype=dtype)
        for a, b in zip(field, together, strict=True):
            assert torch.equal(a[0], b[i])
        weighted = gradients_like(problem, alone, i, dtype)
        for name in ("unary", "embedding", "values"):
            assert torch.equal(weighted[name][0], grads[name][i]), name


def gradients_like(problem: Problem, alone: Problem, clip: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of one clip alone under the weights that it has in `loss` of the whole problem."""
    generator = torch.Generator().manual_seed(99)
    names, leaves = list(alone.parameters), [p.clone().requires_grad_() for p in alone.parameters.values()]
    field = alone.solve(dtype=dtype, **dict(zip(names, leaves, strict=True)))
    total = 0
    for x in field[:2]:
        weights = torch.randn(5, *x.shape[1:], generator=generator, dtype=DOUBLE).to(dtype)
        total = total + (weights[clip : clip + 1] * x).sum()
    return dict(zip(names, torch.autograd.grad(total, leaves), strict=True))


# 9. Precision, 10. determinism, 13. memory: at the size of a clip of 112 px


@pytest.fixture(scope="module")
def exact():
    problem = FullSize()
    return problem, *problem.run(DOUBLE, DOUBLE)


@pytest.mark.parametrize(
    ("operands", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-3), (torch.float16, 2e-4)]
)
def test_precision(exact, operands, tolerance):
    problem, (marginals, _), want = exact
    (got, _), slopes = problem.run(torch.float32, operands)
    assert got.dtype == torch.float32
    assert (got - marginals).abs().max() <= tolerance
    _, peers = problem.run(torch.float32, operands, backend="sdpa")
    for name, ours, peer, exact_slope in zip("uzfcmv", slopes, peers, want, strict=True):
        assert error(ours, exact_slope) <= 2 * error(peer, exact_slope) + 1e-6, name
        assert torch.cosine_similarity(ours.double().flatten(), exact_slope.flatten(), dim=0) >= 0.999, name


def test_fp16_survives_loss_scaling(exact):
    problem, _, _ = exact
    _, plain = problem.run(torch.float32, torch.float16)
    _, scaled = problem.run(torch.float32, torch.float16, factor=2.0**16)
    for a, b in zip(plain, scaled, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(b / 2.0**16, a, rtol=1e-3, atol=1e-3 * a.abs().max().item())


def test_repeated_runs_are_the_same_to_the_bit(exact, monkeypatch):
    problem, _, _ = exact
    outputs, slopes = problem.run(torch.float32, torch.float32)
    for _ in range(4):
        again, slopes_again = problem.run(torch.float32, torch.float32)
        for a, b in zip((*outputs, *slopes), (*again, *slopes_again), strict=True):
            assert torch.equal(a, b)
    monkeypatch.setitem(PAIRS_AT_ONCE, "cpu", 2**17)  # more and smaller blocks
    blocked, blocked_slopes = problem.run(torch.float32, torch.float32)
    for a, b in zip((*outputs, *slopes), (*blocked, *blocked_slopes), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6 * a.abs().max().item(), rtol=1e-5)


def saved_bytes(problem: FullSize, operands: torch.dtype, with_values: bool) -> int:
    """Bytes that a forward pass keeps for the backward pass; what shares a storage counts once."""
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    unary, points, frames, cells, compatibility, values = problem.inputs(torch.float32)
    values = values.detach().to(operands).requires_grad_() if with_values else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        meanfield(unary, Features(points, frames, cells), compatibility, 3, values=values, sums=Sums(operands=operands))
    return sum(storages.values())


def test_memory_for_the_backward_pass_is_small_and_linear():
    clip, longer = FullSize(), FullSize(frames=32)
    assert saved_bytes(clip, torch.float32, with_values=False) <= 0.24e6
    assert saved_bytes(clip, torch.bfloat16, with_values=True) <= 0.4e6
    assert saved_bytes(clip, torch.float32, with_values=True) <= 0.5e6  # of which the values themselves are 0.27
    for operands, with_values in ((torch.float32, False), (torch.bfloat16, True)):
        ratio = saved_bytes(longer, operands, with_values) / saved_bytes(clip, operands, with_values)
        assert 1.8 < ratio <= 2.2


@pytest.mark.parametrize("operands", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["extreme unary", "identical tokens", "isolated tokens", "one frame"])
def test_extremes_stay_finite_and_on_the_simplex(case, operands):
    problem = Problem(0, 8.0, batch=2, frames=1 if case == "one frame" else 4, dim=28)
    p = problem.parameters
    if case == "extreme unary":
        p["unary"] *= 1e4
    elif case == "identical tokens":
        problem.time, problem.cells, p["embedding"] = 0 * problem.time, 0 * problem.cells, 0 * p["embedding"]
    elif case == "isolated tokens":
        p["embedding"] *= 100
    leaves = {name: x.float().requires_grad_() for name, x in p.items()}
    field = problem.solve(dtype=torch.float32, operands=operands, **leaves)
    slopes = torch.autograd.grad(loss(field), leaves.values())
    assert all(x.isfinite().all() for x in (*field, *slopes))
    torch.testing.assert_close(field.marginals.sum(-1), torch.ones(field.scale.shape), atol=1e-6, rtol=0)
    degree = field.scale.flatten() ** -2
    if case == "identical tokens":
        torch.testing.assert_close(degree, torch.full((64,), 32.0))
    if case == "isolated tokens":
        torch.testing.assert_close(degree, torch.ones(64))


# 12. The separable kernel


def test_the_smoothness_kernel_is_the_dense_one_without_its_diagonal():
    problem = Problem(0)
    _, frames, cells = problem.features()
    identity = torch.eye(24, dtype=DOUBLE)[None]
    response = Smoothness(frames, cells).sweep(identity)[0]
    assert_equal_lists(response, problem.slow_kernels()[1], 1e-12)
    assert torch.equal(response.abs() < 1e-15, identity[0].bool())  # an impulse reaches all tokens but its own


def test_damping_certificate_needs_no_decomposition():
    """The bounds hold for the true spectrum, and are sharp where all tokens are one."""
    for seed in range(20):
        problem = Problem(seed, 5.0, indefinite=True)
        matrices = problem.parameters["compatibility"]
        spectrum = torch.linalg.eigvalsh(matrices)
        bounds = curvature_bounds(matrices, indefinite=True)
        assert (bounds[:, 0] >= spectrum[:, -1] - 1e-12).all() and (bounds[:, 1] >= -spectrum[:, 0] - 1e-12).all()
        kernels = [torch.tensor(s, dtype=DOUBLE) for s in problem.slow_kernels()]
        curvature = sum(torch.kron(s, m) for s, m in zip(kernels, matrices, strict=True))
        field = problem.solve(1, damping="indefinite")
        assert field.damping.item() >= (-torch.linalg.eigvalsh(curvature)[0].item() - 2) / 4 - 1e-12
    assert certified_damping(torch.tensor([[0.5, 0.1]]), torch.tensor([[8.0, 0.0], [2.0, 0.0]])).item() == (
        pytest.approx((4.2 - 2) / 4)
    )


def test_groups_and_blocks_of_any_size_agree(monkeypatch):
    """Several clips at once, one at once, and a clip in pieces."""
    problem = Problem(0, 3.0, batch=5)
    results = []
    for pairs in (2**20, 24 * 24 * 2, 24 * 10):
        monkeypatch.setitem(PAIRS_AT_ONCE, "cpu", pairs)
        results.append((problem.solve(), gradients(problem)))
    for field, slopes in results[1:]:
        for a, b in zip(field, results[0][0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-13, rtol=0)
        for name, slope in slopes.items():
            torch.testing.assert_close(slope, results[0][1][name], atol=1e-12, rtol=0)


def test_an_impulse_on_the_gradient_pass():
    """d/dz of sum_ij S_ij W_ij by autograd through the definition, degrees included."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 9, 3, generator=generator, dtype=DOUBLE).requires_grad_()
    left, right = (torch.randn(1, 9, 2, generator=generator, dtype=DOUBLE) for _ in range(2))
    kernel = normalised_kernel(points)
    off = kernel - torch.diag_embed(kernel.diagonal(dim1=1, dim2=2))
    (want,) = torch.autograd.grad((off * (left @ right.mT)).sum(), points)
    ((_, pairs),) = grouped("dense", points.detach(), DOUBLE, DOUBLE)
    assert isinstance(pairs, DensePairs)
    columns = (pairs.sweep(left) * right).sum(-1)
    torch.testing.assert_close(pairs.gradient(left, right, columns), want, atol=1e-13, rtol=0)


# 14. Somebody else's code


def test_another_implementation_agrees_in_two_dimensions():
    """The lattice is near the exact sums in two dimensions. A token hears itself there, so its share is put back."""
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf builds from its repository only")
    side, weight, iterations = 14, 4.0, 10
    unary = torch.from_numpy(np.random.default_rng(0).normal(size=(side * side, 5)).astype(np.float32))
    peer = densecrf.DenseCRF2D(side, side, 5)
    peer.setUnaryEnergy(np.ascontiguousarray(-unary.numpy().T))
    peer.addPairwiseGaussian(sxy=3, compat=weight, normalization=densecrf.NORMALIZE_SYMMETRIC)
    want = torch.from_numpy(np.array(peer.inference(iterations)).T.copy())

    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    points = torch.stack([y, x], dim=-1).flatten(0, 1)[None].float() / 3
    ((_, pairs),) = grouped("dense", points, torch.float32, torch.float32)
    q = unary.softmax(-1)[None]
    for _ in range(iterations):
        heard = pairs.sweep(q) + pairs.scale.square()[..., None] * q
        q = (unary + weight * heard).softmax(-1)
    assert (q[0] - want).abs().max() <= 0.02
    assert (q[0].argmax(-1) == want.argmax(-1)).float().mean() >= 0.99
