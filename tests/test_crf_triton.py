"""The Triton kernels in Triton's interpreter and through its compiler, which need no GPU, and on a GPU if there is one.

The same checks run in the interpreter and on a GPU, against the dense backend in float64.
"""

import functools
from unittest import mock

import pytest
import torch

import dfer.crf.sdpa
import dfer.crf.triton
from dfer.crf import backends
from dfer.crf.backends import grouped
from dfer.crf.gaussian import gaussian_field
from dfer.crf.layers import MeanFieldCRF
from dfer.crf.meanfield import Features, Sums, meanfield
from dfer.crf.triton import TritonPairs
from tests.conftest import no_waiting, run_python
from tests.crf_problems import FullSize, Problem, error
from tests.nursery import python_path

GRADIENTS = ("dunary", "dpoints", "dcompatibility", "dvalues")
ROUNDED_OTHERWISE = 1.3  # sums in another order, operands rounded before or after they are normalised
CHECKS_PER_OPERANDS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}  # bounds on the marginals


def small(device: str, smooth: bool = True) -> dict[str, torch.Tensor]:
    """Two clips of 3 x 22 tokens: three blocks, the last almost empty. In the interpreter 3 x 11: two blocks."""
    sizes = ((3, 3), (2, 1)) if device == "cpu" else ((4, 4), (3, 2))
    problem = Problem(0, 4.0, batch=2, sizes=sizes, states=16 if smooth else 6, dim=28, spread=0.4, width=64)
    points, frames, cells = problem.features(smooth) if smooth else (*problem.features(smooth)[:1], None, None)
    p = problem.parameters
    tensors = {"unary": p["unary"], "points": points, "frames": frames, "cells": cells, "values": p["values"]}
    tensors |= {"compatibility": p["compatibility"][: 2 if smooth else 1]}
    return {name: x for name, x in tensors.items() if x is not None}


def run(
    tensors: dict[str, torch.Tensor],
    backend: str,
    operands: torch.dtype,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    factor: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a weighted sum of them, by name, on the CPU."""
    leaves = {name: x.to(device, dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    features = Features(leaves["points"], leaves.get("frames"), leaves.get("cells"))
    damping = torch.linspace(0, 0.5, len(leaves["unary"]), device=device, dtype=dtype)
    field = meanfield(
        leaves["unary"],
        features,
        leaves["compatibility"],
        2,
        damping=damping,
        values=leaves.get("values"),
        sums=Sums(backend, operands),
    )
    generator, total = torch.Generator().manual_seed(1), 0
    for x in field[:2]:
        if x is not None:
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)
            total = total + (weights * x).sum()
    slopes = torch.autograd.grad(factor * total, leaves.values())
    outputs = {name: x.detach() for name, x in field._asdict().items() if x is not None}
    outputs |= {f"d{name}": slope for name, slope in zip(leaves, slopes, strict=True)}
    return {name: x.cpu() for name, x in outputs.items()}


def check_against_dense(tensors: dict[str, torch.Tensor], device: str, operands: torch.dtype) -> None:
    want = run(tensors, "dense", torch.float64, torch.float64)
    dense = run(tensors, "dense", operands)
    got = run(tensors, "triton", operands, device=device)
    assert (got["marginals"] - want["marginals"]).abs().max() <= CHECKS_PER_OPERANDS[operands]
    assert (got.pop("residual") - want["residual"]).abs().max() <= CHECKS_PER_OPERANDS[operands]
    for name, x in got.items():
        assert x.isfinite().all(), name
        # in bf16 the kernel itself is rounded before it is multiplied, which the dense backend of a CPU need not do
        floor = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[operands]
        assert error(x, want[name]) <= 2 * error(dense[name], want[name]) + floor, (name, error(x, want[name]))


def check_types(device: str) -> None:
    for operands in CHECKS_PER_OPERANDS:
        check_against_dense(small(device), device, operands)
    plain = {name: x for name, x in small(device, smooth=False).items() if name != "values"}
    check_against_dense(plain, device, torch.float32)


def check_trust(device: str) -> None:
    """Kernels that are right are trusted for each type of operands, and what is wrong in any of them is seen."""
    where = torch.device(device)
    for operands in CHECKS_PER_OPERANDS:
        assert backends.trouble(where, operands) is None
    for name in ("_scale_kernel", "_sweep_kernel", "_step_kernel", "_gradient_kernel"):
        wrong = functools.partialmethod(launched_wrong, TritonPairs._launch, getattr(dfer.crf.triton, name))
        with mock.patch.object(TritonPairs, "_launch", wrong):
            assert "off dense pairs" in backends.trouble.__wrapped__(where, torch.bfloat16), name


def launched_wrong(pairs: TritonPairs, right, wrong, kernel, *tensors, **constants) -> None:
    """Launch a kernel; one of them writes a tenth too much into the last of its outputs."""
    right(pairs, kernel, *tensors, **constants)
    if kernel is wrong:
        tensors[-1].mul_(1.1)


def check_bits(device: str) -> None:
    """The same to the bit: repeated, and clip by clip, but for products of a GPU's library, which sum by their size."""
    tensors = small(device)
    first, again = (run(tensors, "triton", torch.bfloat16, device=device) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
    alone = {name: x[1:] if x.shape[0] == 2 and name != "compatibility" else x for name, x in tensors.items()}
    both = meanfield(*inputs_of(tensors, device), 2, values=tensors["values"].to(device).float(), sums=Sums("triton"))
    single = meanfield(*inputs_of(alone, device), 2, values=alone["values"].to(device).float(), sums=Sums("triton"))
    bound = 0.0 if device == "cpu" else 1e-6
    for name, a, b in zip(both._fields, both, single, strict=True):
        assert torch.equal(a[1:], b) or (name != "scale" and (a[1:] - b).abs().max() <= bound * a.abs().max()), name


def inputs_of(tensors: dict[str, torch.Tensor], device: str) -> tuple:
    t = {name: x.to(device).float() for name, x in tensors.items()}
    return t["unary"], Features(t["points"], t["frames"], t["cells"]), t["compatibility"]


def check_blocks(device: str) -> None:
    """Blocks of any size agree, and so do wide matrices in parts."""
    tensors = small(device)
    want = run(tensors, "triton", torch.float32, device=device)
    dfer.crf.triton.BLOCK = 64
    try:
        got = run(tensors, "triton", torch.float32, device=device)
    finally:
        dfer.crf.triton.BLOCK = 32
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], atol=1e-6 * max(1.0, want[name].abs().max().item()), rtol=1e-6)
    points = tensors["points"].to(device).float()
    wide = torch.randn(2, points.shape[1], 150, generator=torch.Generator().manual_seed(0)).to(device)
    swept = TritonPairs(points, torch.float32, None).sweep(wide).cpu()
    ((_, dense),) = grouped("dense", points.cpu(), torch.float32, torch.float32)
    torch.testing.assert_close(swept, dense.sweep(wide.cpu()), atol=2e-6, rtol=1e-6)


def check_gaussian(device: str) -> None:
    tensors = small(device)
    results = []
    for backend, where in (("dense", "cpu"), ("triton", device)):
        points, values = (tensors[name].to(where).float().requires_grad_() for name in ("points", "values"))
        beta = torch.tensor(1.5, device=where, requires_grad=True)
        x = gaussian_field(points, values, beta, backend=backend)
        slopes = torch.autograd.grad(x.square().sum(), (points, values, beta))
        results.append([t.detach().cpu() for t in (x, *slopes)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def check_layer(device: str) -> None:
    levels = [torch.randn(2, 3, 16, *size, generator=torch.Generator().manual_seed(0)) for size in ((4, 4), (2, 2))]
    torch.manual_seed(0)
    crf = MeanFieldCRF(16, 7, (16, 32), 3, backend="dense")
    for parameter in crf.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    want, want_output = crf(levels)
    crf.backend = "triton"
    got, output = crf.to(device)([level.to(device) for level in levels])
    for a, b in zip((*want, want_output.pooled), (*got, output.pooled), strict=True):
        torch.testing.assert_close(a, b.cpu(), atol=1e-5, rtol=1e-5)
    assert all(x.isfinite() for x in output.diagnostics.values())
    assert output.diagnostics["crf/energy_increases"] == 0


EVERYTHING = (check_types, check_bits, check_blocks, check_gaussian, check_layer, check_trust)


def test_the_kernels_in_the_interpreter():
    """All of `EVERYTHING`, on this machine's CPU."""
    code = "import tests.test_crf_triton as t; [check('cpu') for check in t.EVERYTHING]; print('done')"
    done = run_python("-c", code, timeout=300, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=python_path())
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


COMPILE = """
import sys
import jaxtyping, torch, triton
jaxtyping.install_import_hook("dfer", "beartype.beartype")  # as in the tests that run on a GPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import dfer.crf.triton as kernels
from dfer.crf import backends
from tests.crf_problems import FullSize

launches = []
def record(self, kernel, *tensors, **constants):
    launches.append((kernel, (self.points, self.half_norm, *tensors), constants | {
        "N": self.points.shape[1], "D": self.points.shape[2], "BLOCK": kernels.BLOCK, "NEVER": kernels.NEVER,
        "WIDEN": False, "PRECISION": "ieee"}))

backends.triton_runs = lambda device, operands: True  # though there is no GPU
kernels.TritonPairs._launch = record  # nothing is computed: what the launches would be is what matters
names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
operands, capability = getattr(torch, sys.argv[1]), int(sys.argv[2])
FullSize().run(torch.float32, operands, backend="triton")
done = set()
for kernel, tensors, constants in launches:
    pointers = dict(zip(kernel.arg_names, (names[t.dtype] for t in tensors)))
    assert sorted([*pointers, *constants]) == sorted(kernel.arg_names)
    key = (kernel.__name__, *pointers.values(), *constants.values())
    if key in done:
        continue
    done.add(key)
    signature = pointers | {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": kernels.STAGES})
    assert "wgmma" not in made.asm["ptx"], kernel.__name__  # see BLOCK
    print(kernel.__name__, made.metadata.shared, made.asm["ptx"].count("mma.sync"))
"""


@pytest.mark.parametrize(
    ("operands", "capability"),
    [
        ("bfloat16", 90),
        pytest.param("bfloat16", 80, marks=pytest.mark.slow),
        pytest.param("float16", 89, marks=pytest.mark.slow),
        pytest.param("float32", 75, marks=pytest.mark.slow),
        pytest.param("float32", 90, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_gpus(tmp_path, operands, capability):
    """To machine code: short operands go to the tensor cores, and shared memory is what every GPU has."""
    arguments = ("-c", COMPILE, operands, str(capability))
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = run_python(*arguments, timeout=300, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {"_scale_kernel", "_step_kernel", "_sweep_kernel", "_gradient_kernel"}
    for name, shared, products in rows:
        assert int(shared) <= 48 * 1024, (name, shared)
        assert (int(products) > 0) == (operands != "float32"), name


def test_auto_is_triton_on_a_gpu(monkeypatch):
    assert [backends.resolve_backend("auto", gpu) for gpu in (True, False)] == ["triton", "dense"]
    assert {backends.resolve_backend(name, gpu) for name in ("sdpa",) for gpu in (True, False)} == {"sdpa"}
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert backends.resolve_backend("auto", True) == "dense"


def check_taken_as_dense(times: int = 2) -> None:
    tensors = small("cpu")
    want = run(tensors, "dense", torch.float32)
    for _ in range(times):
        for name, x in run(tensors, "triton", torch.float32).items():
            assert torch.equal(x, want[name]), name


def test_on_a_cpu_the_backend_of_a_gpu_is_dense_without_a_word(capsys):
    """A run of a GPU, with the backend that was chosen there, is looked at."""
    check_taken_as_dense()
    assert capsys.readouterr().err == ""


def test_where_triton_does_not_run_dense_pairs_are_taken_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(backends, "triton_runs", functools.cache(backends.triton_runs.__wrapped__))
    monkeypatch.setattr(backends, "trouble", lambda device, operands: "its kernels burn")
    check_taken_as_dense()
    assert capsys.readouterr().err == "note: --model.crf-backend triton: its kernels burn; dense is taken\n"


class RoundedAttention(torch.autograd.Function):
    """softmax(q k^T) v and its gradient in float64, rounded where any attention for short types rounds.

    Those are its operands, among them the probabilities and the gradient of the logits, and what it stores. That
    gradient's rows sum to zero, and with them cancels what the squared norms and the products of the points contribute
    to a point's gradient: its rounding is what is left, eight times the unit of the type.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        q, k, v = query.double(), key.double(), value.double()
        pairs = (q @ k.mT).softmax(-1)
        out = (pairs.to(query.dtype).double() @ v).to(query.dtype)
        ctx.save_for_backward(query, key, value, pairs, out)
        return out

    @staticmethod
    def backward(ctx, to_out):
        query, key, value, pairs, out = ctx.saved_tensors
        q, k, v, g = query.double(), key.double(), value.double(), to_out.double()
        to_logits = pairs * (g @ v.mT - (g * out.double()).sum(-1, keepdim=True))
        to_logits, to_value = to_logits.to(query.dtype).double(), pairs.to(query.dtype).double().mT @ g
        return tuple(x.to(query.dtype) for x in (to_logits @ k, to_logits.mT @ q, to_value))


def full_clip() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """N = 1040, three clips, and what float64 makes of them."""
    problem = FullSize(batch=3)
    tensors = {name: getattr(problem, name) for name in ("unary", "points", "frames", "cells", "compatibility")}
    tensors |= {"values": problem.values}
    return tensors, run(tensors, "dense", torch.float64, torch.float64)


def errors_of_rounding(tensors: dict, want: dict, operands: torch.dtype) -> dict[str, float]:
    """What `sdpa` is off by with these operands if its attention does nothing wrong but to round."""
    with mock.patch.object(
        dfer.crf.sdpa.F, "scaled_dot_product_attention", lambda q, k, v, scale: RoundedAttention.apply(q, k, v)
    ):
        rounded = run(tensors, "sdpa", operands, torch.float64)
    return {name: error(rounded[name], want[name]) for name in GRADIENTS}


@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float16])
def test_the_errors_of_sdpa_are_those_of_its_rounding(operands):
    """On a CPU: so the bound that the test on a GPU takes from them is neither loose nor out of reach."""
    tensors, want = full_clip()
    derived, got = errors_of_rounding(tensors, want, operands), run(tensors, "sdpa", operands)
    for name, bound in derived.items():
        assert 0.7 * bound <= error(got[name], want[name]) <= ROUNDED_OTHERWISE * bound, name


@pytest.mark.gpu
@pytest.mark.parametrize("check", EVERYTHING)
def test_the_kernels_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "dense", "sdpa"])
@pytest.mark.parametrize("operands", list(CHECKS_PER_OPERANDS))
def test_a_full_clip_on_a_gpu(backend, operands):
    """N = 1040, every backend, against float64 on the CPU; fp16 under loss scaling too."""
    tensors, want = full_clip()
    got = run(tensors, backend, operands, device="cuda")
    assert (got["marginals"] - want["marginals"]).abs().max() <= 2 * CHECKS_PER_OPERANDS[operands]
    floor = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[operands]
    bounds = dict.fromkeys(GRADIENTS, floor)
    if backend == "sdpa" and operands is not torch.float32:
        bounds = {n: ROUNDED_OTHERWISE * e for n, e in errors_of_rounding(tensors, want, operands).items()}
    for name, bound in bounds.items():
        assert error(got[name], want[name]) <= bound, (name, error(got[name], want[name]))
    if backend == "triton":
        scaled = run(tensors, backend, operands, device="cuda", factor=2.0**16)
        for name, x in got.items():
            if name.startswith("d") and name != "damping":
                torch.testing.assert_close(scaled[name] / 2.0**16, x, rtol=1e-2, atol=1e-2 * x.abs().max().item())


@pytest.mark.gpu
def test_the_layer_never_waits_for_the_gpu():
    crf = MeanFieldCRF(64, 7, (16, 32), 16).cuda()
    levels = [torch.randn(2, 16, 64, *size, device="cuda") for size in ((7, 7), (4, 4))]

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs, output = crf(levels)
        (sum(x.square().sum() for x in outputs) - output.pooled[:, 1].sum()).backward()

    step()  # the first time kernels are compiled
    with no_waiting():
        step()


@pytest.mark.gpu
def test_memory_on_a_gpu_is_linear_in_the_tokens():
    peaks = []
    for frames in (16, 32):
        problem = FullSize(batch=2, frames=frames)
        inputs = [x.cuda().detach().requires_grad_() for x in problem.inputs(torch.float32)]
        unary, points, frames_, cells, compatibility, values = inputs
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        field = meanfield(
            unary, Features(points, frames_, cells), compatibility, 3, values=values,
            sums=Sums("triton", torch.bfloat16),
        )  # fmt: skip
        (field.marginals.square().sum() + field.values.square().sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.3 * peaks[0]
