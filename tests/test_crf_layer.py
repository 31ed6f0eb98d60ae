"""The CRF layers: what they make of features, marginals and messages, and how they behave in training."""

import math

import pytest
import torch

from dfer.crf.gaussian import gaussian_field
from dfer.crf.layers import BranchMessages, GaussianCRF, MeanFieldCRF, _diagnostics, cell_positions
from dfer.crf.meanfield import MeanField
from dfer.model import DFERNet
from tests import crf_oracle
from tests.conftest import run_python


def levels(batch: int = 2, num_frames: int = 4, dim: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, num_frames, dim, *size, generator=generator) for size in ((3, 4), (2, 2))]


def layer(**options) -> MeanFieldCRF:
    torch.manual_seed(0)
    return MeanFieldCRF(16, 7, strides=(16, 32), num_frames=4, **options)


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


def test_the_layer_reads_out_marginals_and_messages_of_values():
    crf, inputs = moved_layer(), levels(batch=1)
    with torch.no_grad():
        outputs, crf_output = crf(inputs)
        tokens = torch.cat([x.flatten(3).mT for x in inputs], dim=2)  # (1, T, P, D)
        normed = torch.cat([crf.norms[k](t) for k, t in enumerate(tokens.split([12, 4], dim=2))], dim=2).flatten(1, 2)
        unary, embedding, values = crf.project(normed).split([16, 28, 64], dim=-1)
        cells = cell_positions([torch.Size((3, 4)), torch.Size((2, 2))], (16, 32), torch.device("cpu"))
        sigma_a, sigma_s = crf.log_sigma_appearance.exp(), crf.log_sigma_smoothness.exp()
        embedding = embedding / embedding.norm(dim=-1, keepdim=True) * crf.log_scale.exp()
        position = [[t, *c] for t in range(4) for c in cells.tolist()]
        points = [
            [*e, *(x / s for x, s in zip(p, sigma_a.tolist(), strict=True))]
            for e, p in zip(embedding[0].tolist(), position, strict=True)
        ]
        smooth = [[x / s for x, s in zip(p, sigma_s.tolist(), strict=True)] for p in position]
        kernels = [crf_oracle.kernel(points), crf_oracle.kernel(smooth)]
        q = crf_oracle.meanfield(unary[0].tolist(), kernels, crf.compatibility().tolist(), 3, 0.0)[-1]
        assert crf_output.diagnostics["crf/damping"] == 0
        gathered = torch.cat([torch.tensor(q), torch.tensor(kernels[0]) @ values[0]], dim=1)
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
        assert torch.linalg.matrix_norm(matrices, 2).sum() <= 8 + 1e-5
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


@torch.no_grad()
def test_damping_is_a_clips_own():
    crf, inputs = moved_layer(), levels()
    crf.coupling_logit.data += 10
    crf.log_scale.data += 3  # embeddings far apart, hardly any neighbours: large 1/degree
    crf.log_sigma_appearance.data += 3
    for level in inputs:
        level[1] = level[1, :1, :, :1, :1]  # but here all tokens look alike
    together = crf(inputs)
    for i in range(2):
        alone = crf([level[i : i + 1] for level in inputs])
        torch.testing.assert_close(alone[1].pooled[0], together[1].pooled[i], atol=1e-6, rtol=1e-6)
    damping = [crf([level[i : i + 1] for level in inputs])[1].diagnostics["crf/damping"].item() for i in range(2)]
    assert max(damping) > 0 and damping[0] != damping[1]


@pytest.mark.parametrize("max_coupling", [0.5, 2.0, 20.0])
def test_the_cap_on_the_coupling_holds_whatever_is_learned(max_coupling):
    crf = layer(max_coupling=max_coupling)
    at_start = crf.compatibility().abs().sum(-1).amax(-1).sum().item()
    assert at_start == pytest.approx(min(2.0, max_coupling / 2))
    crf.affinity.data += 30 * torch.randn_like(crf.affinity)
    crf.coupling_logit.data += 10
    spectral = torch.linalg.matrix_norm(crf.compatibility().detach().double(), 2).sum().item()
    assert spectral < max_coupling * (1 + 1e-6)


def test_autocast_rounds_operands_and_nothing_else():
    """Degrees, softmax and energy stay float32; turning autocast off gives the exact layer back."""
    crf, inputs = moved_layer(), levels()
    exact = crf(inputs)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = crf(inputs)[1]
        with torch.autocast("cpu", enabled=False):
            again = crf(inputs)[1]
    assert torch.equal(exact.marginals, again.marginals)
    assert rounded.marginals.dtype == torch.float32 and not torch.equal(exact.marginals, rounded.marginals)
    torch.testing.assert_close(rounded.marginals.sum(-1), torch.ones(2, 64), atol=1e-6, rtol=0)
    torch.testing.assert_close(rounded.marginals, exact.marginals, atol=0.05, rtol=0)


def test_the_state_of_a_layer_can_be_saved_and_loaded(tmp_path):
    crf, inputs = moved_layer(), levels()
    torch.save(crf.state_dict(), tmp_path / "crf.pt")
    other = layer()
    other.load_state_dict(torch.load(tmp_path / "crf.pt"))
    assert torch.equal(crf(inputs)[1].marginals, other(inputs)[1].marginals)


@pytest.mark.parametrize("crf", ["meanfield", "gaussian", "messages"])
def test_the_whole_model_against_finite_differences(crf):
    """The slope along three random directions in the space of all parameters, in float64."""
    torch.manual_seed(0)
    model = DFERNet(3, dim=16, crf=crf, dropout=0.0).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # no branch of the backbone sits on the kink of its ReLU, as those that start at 0 do
            parameter.data += 0.1 * torch.randn_like(parameter)
    for parameter in model.crf.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    clips = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64)

    def loss() -> torch.Tensor:
        prediction = model(clips)
        total = prediction.logits[:, 0].sum() + prediction.logits[:, 3].square().sum()
        return total if prediction.marginals is None else total - prediction.marginals[:, 1].sum()

    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss(), parameters)
    inside = {id(p) for p in model.crf.parameters()}
    assert all(slope.any() for p, slope in zip(parameters, slopes, strict=True) if id(p) in inside)
    with torch.no_grad():
        for _ in range(3):
            direction = [torch.randn_like(p) for p in parameters]
            want = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True))
            values = []
            for step in (1e-9, -2e-9):  # across as few kinks of the backbone as can be
                for p, d in zip(parameters, direction, strict=True):
                    p += step * d
                values.append(loss())
            for p, d in zip(parameters, direction, strict=True):
                p += 1e-9 * d
            torch.testing.assert_close((values[0] - values[1]) / 2e-9, want, rtol=1e-4, atol=1e-4)


COMPILED = """
import torch
from dfer.crf.layers import GaussianCRF, MeanFieldCRF
from dfer.model import DFERNet

def run(model, inputs):
    model.zero_grad()
    outputs, crf = model(inputs)
    total = sum(o.square().sum() for o in outputs) + (0 if crf.pooled is None else crf.pooled[:, 1].sum())
    total.backward()
    return [*outputs, *(p.grad.clone() for p in model.parameters())]

torch.manual_seed(0)
torch.set_num_threads(1)
inputs = [torch.randn(2, 4, 16, 3, 4), torch.randn(2, 4, 16, 2, 2)]
layers = (MeanFieldCRF(16, 7, (16, 32), 4), MeanFieldCRF(16, 7, (16, 32), 4, "value", 0), GaussianCRF(16, (16, 32), 4))
for number, layer in enumerate(layers):
    for p in layer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    autocast = number == 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):  # the backward pass is under it, too
        want = run(layer, inputs)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
        for a, b in zip(want, run(compiled, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=0.1 if autocast else 1e-4)
model = DFERNet(2, dim=16, dropout=0.0).eval()
clips = torch.randn(1, 2, 3, 32, 32)
torch._dynamo.reset()
explained = torch._dynamo.explain(model)(clips)
assert explained.graph_break_count == 0, explained.break_reasons
assert explained.graph_count == 1
"""


def test_the_layers_compile_without_a_graph_break():
    """In a process of its own: the type checks of the tests are no part of what is compiled."""
    done = run_python("-c", COMPILED, timeout=300, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_emotion_maps_are_the_marginals_in_their_places():
    torch.manual_seed(0)
    model = DFERNet(3, dim=16).eval()
    for parameter in model.crf.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    clips = torch.randn(2, 3, 3, 96, 64)
    with torch.inference_mode():
        fine, coarse = model.emotion_maps(clips)
        assert fine.shape == (2, 3, 7, 6, 4) and coarse.shape == (2, 3, 7, 3, 2)
        _, output = model.crf(model._branches(clips)[model.crf_branch])
        for b, t, c, y, x in ((0, 0, 0, 0, 0), (1, 2, 6, 5, 3), (0, 1, 3, 2, 1)):
            token = t * 30 + y * 4 + x
            want = output.marginals[b, token, 2 * c] + output.marginals[b, token, 2 * c + 1]
            torch.testing.assert_close(fine[b, t, c, y, x], want)
        want = output.marginals[1, 2 * 30 + 24 + 2 * 2 + 1, 8:10].sum()
        torch.testing.assert_close(coarse[1, 2, 4, 2, 1], want)
        total = sum(level.sum((1, 3, 4)) for level in (fine, coarse))
        pooled = model(clips).marginals.exp()
        torch.testing.assert_close(total / total.sum(1, keepdim=True), pooled, atol=1e-5, rtol=1e-5)
    assert (fine.sum(2) <= 1 + 1e-6).all() and (fine > 0).all()


def test_emotion_maps_need_labels():
    for crf in ("messages", "gaussian"):
        with pytest.raises(ValueError, match=r"--model\.crf meanfield"):
            DFERNet(2, dim=16, crf=crf).emotion_maps(torch.randn(1, 2, 3, 32, 32))


@pytest.mark.parametrize("crf", ["messages", "gaussian"])
def test_the_other_layers_start_as_the_identity_and_then_learn(crf):
    torch.manual_seed(0)
    other, inputs = (BranchMessages(16) if crf == "messages" else GaussianCRF(16, (16, 32), 4)), levels()
    outputs, _ = other(inputs)
    for before, after in zip(inputs, outputs, strict=True):
        assert torch.equal(before, after)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        outputs, output = other(inputs)
        assert output.pooled is None and output.marginals is None
        sum(o.square().sum() for o in outputs).backward()
        optimizer.step()
    assert [name for name, p in other.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_branch_messages_equal_the_loops():
    torch.manual_seed(0)
    crf, inputs = BranchMessages(3), [torch.randn(1, 3, 3, 2, 1), torch.randn(1, 3, 3, 1, 1)]
    torch.nn.init.normal_(crf.readout.weight)

    def relu(x: list[float]) -> list[float]:
        return [max(v, 0.0) for v in x]

    def linear(weight: list[list[float]], bias: list[float], x: list[float]) -> list[float]:
        return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in zip(weight, bias, strict=True)]

    def told(own: list[float], message: list[float]) -> list[float]:
        return relu([a + b for a, b in zip(own, relu(message), strict=True)])

    outputs, _ = crf(inputs)
    for number, (level, output) in enumerate(zip(inputs, outputs, strict=True)):
        to_static, to_dynamic = crf.to_static[number], crf.to_dynamic[number]
        for t in range(3):
            for y in range(level.shape[3]):
                here = [level[0, k, :, y, 0].tolist() for k in range(3)]
                static = here[t]
                dynamic = [b - a for a, b in zip(here[t], here[t + 1], strict=True)] if t < 2 else [
                    a - b for a, b in zip(here[0], here[2], strict=True)
                ]  # fmt: skip
                to_s = linear(to_static.weight.tolist(), to_static.bias.tolist(), dynamic)
                to_d = linear(to_dynamic.weight.tolist(), to_dynamic.bias.tolist(), static)
                both = told(static, to_s) + told(dynamic, to_d)
                update = linear(crf.readout.weight.tolist(), [0.0] * 3, both)
                want = torch.tensor(static) + torch.tensor(update)
                torch.testing.assert_close(output[0, t, :, y, 0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_the_gaussian_field_solves_its_equations(backend):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64)
    for beta, iterations, tolerance in ((1.0, 8, 2e-6), (4.0, 8, 2e-3), (4.0, 14, 1e-8)):
        x = gaussian_field(points, values, torch.tensor(beta).double(), iterations, backend)
        for clip in range(2):
            kernel = crf_oracle.kernel(points[clip].tolist())
            matrix = torch.eye(12).double() + beta * (torch.eye(12) - torch.tensor(kernel, dtype=torch.float64))
            want = torch.linalg.solve(matrix, values[clip])
            torch.testing.assert_close(x[clip], want, atol=tolerance, rtol=0)
    bound = (want - values[1]).abs().max()
    assert bound > 0.1, "the field does nothing"


def test_gradients_of_the_gaussian_field_equal_finite_differences():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def solve(points, values, beta):
        return gaussian_field(points, values, beta, 12, "dense")

    assert torch.autograd.gradcheck(solve, (points, values, beta))


def test_the_gaussian_field_in_fp16_survives_loss_scaling():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1, 20, 8, generator=generator).requires_grad_()
    values = torch.randn(1, 20, 4, generator=generator)
    slopes = []
    for factor in (1.0, 2.0**16):
        x = gaussian_field(points, values, torch.tensor(1.0), operands=torch.float16)
        slopes.append(torch.autograd.grad(factor * x.square().sum(), points)[0] / factor)
    torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-3)


def test_telemetry_in_training():
    """The free energy is never seen to increase, and every figure is a finite scalar without gradient."""
    crf, inputs = layer(), levels(batch=4)
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.1)
    seen = []
    for _ in range(10):
        outputs, output = crf(inputs)
        (-output.pooled[:, 2].sum() + sum(o.square().mean() for o in outputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(x.ndim == 0 and x.isfinite() and not x.requires_grad for x in output.diagnostics.values())
        seen.append({name.removeprefix("crf/"): x.item() for name, x in output.diagnostics.items()})
    assert all(row["energy_increases"] == 0 for row in seen)
    last = seen[-1]
    assert last["coupling"] != seen[0]["coupling"] == pytest.approx(2.0)
    assert 1 <= last["degree_min"] <= last["degree_mean"] <= 64
    assert 0 <= last["entropy"] <= math.log(16) and 0 < last["residual"] < 1 and last["damping"] == 0


def test_an_increase_of_the_free_energy_is_counted():
    """Energies of ten tokens: real increases count, what float32 cannot tell apart does not."""
    energies = torch.tensor([[-30.0, -31.0, -30.9], [-30.0, -31.0, -31.000001], [-30.0, -29.0, -28.0]])
    field = MeanField(torch.full((3, 10, 4), 0.25), None, torch.ones(3, 10), torch.zeros(3), torch.zeros(3), energies)
    diagnostics = _diagnostics(field, torch.eye(4).repeat(2, 1, 1))
    assert diagnostics["crf/energy_increases"].item() == 3
    assert diagnostics["crf/free_energy"].item() == pytest.approx((-30.9 - 31 - 28) / 30)
    assert diagnostics["crf/entropy"].item() == pytest.approx(math.log(4))
    assert diagnostics["crf/coupling"].item() == 2


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_backends_of_the_layer_agree(backend):
    crf, inputs = moved_layer(backend=backend), levels()
    with torch.inference_mode():
        got = crf(inputs)[1]
    torch.testing.assert_close(got.marginals, moved_layer()(inputs)[1].marginals, atol=2e-6, rtol=0)
