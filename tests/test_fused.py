"""The fused kernels in Triton's interpreter and through its compiler, which need no GPU, and on a GPU if there is one.

The same checks run in the interpreter and on a GPU, against torch's own operators in float64.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfer.model import fused, launches
from dfer.model.baselines import MeanPoolNet
from dfer.model.fused import FusedNorm, FusedPool, fuse
from tests.conftest import no_waiting, run_python
from tests.nursery import python_path

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def maps(frames: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise, channels-last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, height, width, channels, generator=generator)
    return x.to(dtype).permute(0, 3, 1, 2)


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm, generator = nn.BatchNorm2d(channels), torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))  # of both signs
        norm.bias.copy_(torch.randn(channels, generator=generator))
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return norm


def fused_copy(norm: nn.Module, device: str) -> FusedNorm:
    made = copy.deepcopy(norm).to(device)
    made.__class__ = FusedNorm
    return made


def close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: float = 4) -> None:
    """Within so many roundings of the largest element."""
    got, want = got.detach().double().cpu(), want.detach().double()
    assert (got - want).abs().max() <= terms * UNIT[dtype] * want.abs().max().clamp(min=1), (got - want).abs().max()


def check_norm(device: str, x: Tensor, shortcut: Tensor | None, relu: bool) -> None:
    """One step in training: output, all gradients, running statistics."""
    norm = norm_of(x.shape[1])
    ours, oracle = fused_copy(norm, device), copy.deepcopy(norm).double()
    given = [x] if shortcut is None else [x, shortcut]
    leaves = [t.to(device).requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    y = ours(*leaves, relu=relu)
    before = sum(exact[1:], oracle(exact[0]))
    want = before.relu() if relu else before
    slope = maps(*x.shape, x.dtype, seed=2)
    got_slopes = torch.autograd.grad(y, [*leaves, ours.weight, ours.bias], slope.to(device))
    # The mask is ours: a cell that rounding takes over the ReLU's edge is no fault.
    masked = torch.where(y.detach().cpu() > 0, slope, 0) if relu else slope
    want_slopes = torch.autograd.grad(before, [*exact, oracle.weight, oracle.bias], masked.double())
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == x.dtype
    close(y, want, x.dtype)
    for a, b in zip(got_slopes[: len(given)], want_slopes, strict=False):
        close(a, b, x.dtype)
    for a, b in zip(got_slopes[-2:], want_slopes[-2:], strict=True):  # float32 sums
        close(a, b, torch.float32, terms=64)
    close(ours.running_mean, oracle.running_mean, torch.float32)
    close(ours.running_var, oracle.running_var, torch.float32)
    assert ours.num_batches_tracked == 1 and ours.num_batches_tracked.dtype is torch.int64


def check_norms(device: str, dtypes: Iterable[torch.dtype] = UNIT) -> None:
    odd = (2, 66, 3, 3)  # neither cells nor channels fill a tile
    for dtype in dtypes:
        check_norm(device, maps(*odd, dtype), None, relu=True)
        check_norm(device, maps(*odd, dtype), maps(*odd, dtype, seed=3), relu=True)
    check_norm(device, maps(1, 1, 2, 1, torch.float32), maps(1, 1, 2, 1, torch.float32, seed=3), relu=True)
    check_norm(device, maps(5, 3, 7, 2, torch.bfloat16), None, relu=False)
    check_parts(device)
    check_far_from_zero(device)
    check_evaluation(device)
    check_not_finite(device)


def check_parts(device: str) -> None:
    """Rows in several parts of several tiles, the last ones not full, and the same bits again."""
    with mock.patch.object(launches, "ROWS", 8):
        x, shortcut = maps(3, 5, 7, 9, torch.float32), maps(3, 5, 7, 9, torch.float32, seed=3)
        with mock.patch.object(launches, "PROGRAMS", 10):
            assert launches.maps_of(x).split() == (8, 3)  # 189 rows: 7 parts of 24 and one of 21
            check_norm(device, x, shortcut, relu=True)
        assert launches.maps_of(x).split() == (24, 1)  # more parts than are merged at a time
        check_norm(device, x, None, relu=True)
        bits = []
        for _ in range(2):
            norm, leaf = fused_copy(norm_of(5), device), x.to(device).requires_grad_()
            y = norm(leaf, relu=True)
            bits.append([y, norm.running_var, *torch.autograd.grad(y.sum(), [leaf, norm.weight])])
        assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def check_far_from_zero(device: str) -> None:
    """A mean of 1,000 standard deviations: as near as torch's own operator comes, and not a hundred times as far."""
    x = 1000 + maps(8, 3, 5, 5, torch.float32)
    x[0, 0, 0, 0] = 0  # even where the first value is far from all
    norm = norm_of(3)
    ours, theirs, oracle = fused_copy(norm, device), copy.deepcopy(norm), copy.deepcopy(norm).double()
    want = oracle(x.double())
    bound = 4 * (theirs(x) - want).abs().max()
    assert (ours(x.to(device)).cpu() - want).abs().max() <= bound
    assert ((ours.running_var.cpu() - oracle.running_var) / oracle.running_var).abs().max() <= 1e-5


def check_evaluation(device: str) -> None:
    norm = norm_of(66).eval()
    ours = fused_copy(norm, device)
    x, shortcut = maps(2, 66, 3, 5, torch.bfloat16), maps(2, 66, 3, 5, torch.bfloat16, seed=3)
    with torch.no_grad():
        want = norm.double()(x.double())
        close(ours(x.to(device)), want, x.dtype)
        close(ours(x.to(device), shortcut.to(device), relu=True), (want + shortcut).relu(), x.dtype)
        close(ours.pooled(x.to(device)), F.max_pool2d(want.relu(), 3, 2, 1), x.dtype)
    state = ours.state_dict()
    assert all(torch.equal(state[name].cpu(), value.to(state[name].dtype)) for name, value in norm.state_dict().items())


def check_not_finite(device: str) -> None:
    """A value that is not finite is not hidden by a ReLU or a pool: the step has to be skipped."""
    x = maps(2, 3, 4, 4, torch.float32)
    x[1, 1, 2, 2] = torch.nan
    y = fused_copy(norm_of(3), device)(x.to(device), relu=True)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()
    x[1, 1, 2, 2] = torch.inf
    leaf = x.to(device).requires_grad_()
    (slope,) = torch.autograd.grad(fused_copy(norm_of(3), device).pooled(leaf).sum(), leaf)
    assert slope[:, 1].isnan().any() and slope[:, [0, 2]].isfinite().all()


def check_pools(device: str, dtypes: Iterable[torch.dtype] = UNIT) -> None:
    """To the bit as torch's on a CPU, whose order is that of a GPU's: the first of equal cells, the last NaN."""
    pool = nn.MaxPool2d(3, 2, 1)
    ours = copy.deepcopy(pool)
    ours.__class__ = FusedPool
    for size in ((2, 5, 7, 8), (1, 66, 1, 2), (1, 3, 5, 1), (2, 64, 6, 6)):
        x = maps(*size, torch.float32).round()  # many are equal
        x[0, 0], x[-1, 1, 0, 0], x[-1, 2] = -torch.inf, torch.nan, 0
        leaf, want = x.to(device).requires_grad_(), pool(x.requires_grad_())
        z = ours(leaf)
        slope = maps(*want.shape, torch.float32, seed=2)
        assert torch.equal(z.cpu().nan_to_num(7), want.nan_to_num(7))
        (got,), (want,) = torch.autograd.grad(z, leaf, slope.to(device)), torch.autograd.grad(want, x, slope)
        assert torch.equal(got.cpu() == 0, want == 0)
        close(got, want, torch.float32)
    check_stem(device, dtypes)


def check_stem(device: str, dtypes: Iterable[torch.dtype]) -> None:
    """Batch norm, ReLU and pool in one, against our own norm and torch's pool, which break ties of the same cells."""
    for dtype in dtypes:
        x, norm = maps(2, 66, 4, 5, dtype), norm_of(66)
        ours, other = fused_copy(norm, device), fused_copy(norm, device)
        leaf, again = (x.to(device).requires_grad_() for _ in range(2))
        z, y = ours.pooled(leaf), other(again, relu=True)
        written = y.detach().cpu().requires_grad_()
        want = F.max_pool2d(written, 3, 2, 1)
        assert torch.equal(z.cpu(), want)
        slope = maps(*z.shape, dtype, seed=2)
        got = torch.autograd.grad(z, [leaf, ours.weight, ours.bias], slope.to(device))
        (to_y,) = torch.autograd.grad(want, written, slope)
        for a, b in zip(got, torch.autograd.grad(y, [again, other.weight, other.bias], to_y.to(device)), strict=True):
            close(a, b.cpu(), dtype, terms=8)
        assert torch.equal(ours.running_var, other.running_var)


def clips_of_frames() -> Tensor:
    """Four frames, whose last maps have cells enough for statistics: of two values rounding is all that is left."""
    return torch.randn(1, 4, 3, 40, 40, generator=torch.Generator().manual_seed(0))


BOUND = 1e-3  # of a tensor's largest element; test_the_bound_of_networks_is_between_rounding_and_faults is its reason


def network(**options: float) -> MeanPoolNet:
    """A whole ResNet. Its residual branches end with a weight of 0, as it comes, and so have no gradients."""
    torch.manual_seed(0)
    net = MeanPoolNet(backbone="resnet18", **options).to(memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def check_networks(device: str) -> None:
    """Blocks of each kind, against torch's own operators there, which draw the same paths."""
    for drop_path in (0.0, 0.5):
        model = network(drop_path=drop_path).to(device)
        ours = copy.deepcopy(model)
        fuse(ours, "both")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            want, got = (passed(net, clips_of_frames().to(device)) for net in (model, ours))
        assert got.keys() == want.keys() and model.state_dict().keys() == ours.state_dict().keys()
        assert all(errors[1] <= BOUND for errors in farthest(got, want)), farthest(got, want)[:3]


def passed(net: nn.Module, clips: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and buffers of one step in training."""
    torch.manual_seed(0)
    made = net.train()(clips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))
    made.logits.square().sum().backward()
    slopes = {name: p.grad.cpu() for name, p in net.named_parameters()}
    return {"logits": made.logits.detach().cpu()} | slopes | {name: b.cpu() for name, b in net.named_buffers()}


def farthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> list[tuple[str, float]]:
    """How far each tensor is off, as a share of its largest element; the farthest first."""
    off = {name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want}
    return sorted(off.items(), key=lambda item: -item[1])


def test_the_bound_of_networks_is_between_rounding_and_faults():
    """On a CPU: float32's own errors are far below it; a layer of a hundredth too much is above, as is TF32."""
    net = network(dropout=0.0)
    found, exact = {}, passed(copy.deepcopy(net).double(), clips_of_frames().double())
    for name in ("rounded", "wrong", "TF32"):
        made = copy.deepcopy(net)
        if name == "wrong":
            norm = made.backbone.net["layer4"][1].bn1
            norm.register_forward_hook(lambda norm, given, y: 1.01 * y)
        elif name == "TF32":
            for module in made.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_pre_hook(lambda conv, given: to_tf32(given[0]))
        found[name] = farthest(passed(made, clips_of_frames()), exact)[0][1]
    assert 50 * found["rounded"] < BOUND and found["wrong"] > 5 * BOUND and found["TF32"] > 5 * BOUND, found


def to_tf32(x: Tensor) -> Tensor:
    """Round to ten bits behind the first, as a GPU's units for matrices do with float32 where they may."""
    rounded = (x.detach().view(torch.int32) + (1 << 12)) & -(1 << 13)
    return x + (rounded.view(torch.float32) - x).detach()


def check_trust(device: str) -> None:
    """Kernels that are right are trusted, and what is wrong in any of them is seen."""
    where = torch.device(device)
    assert fused.why_not(where, torch.float32) is None
    for (function, case), affected in WRONG.items():
        wrong = functools.partial(tenth_too_much, getattr(launches, function), affected)
        with mock.patch.object(launches, function, wrong):
            assert fused._distance(where, torch.float32, case) > 0.05, (function, case)


WRONG = {  # which launches of a function are wrong, by what they are given; and where it is seen
    ("normalise", "norm"): lambda x, norm, shortcut, relu: not relu,
    ("normalise", "rectified"): lambda x, norm, shortcut, relu: norm.eps is not None,
    ("normalise", "sum"): lambda x, norm, shortcut, relu: norm.eps is not None,
    ("gradients", "norm"): lambda to_y, x, norm, y, index, relu: not relu,
    ("gradients", "rectified"): lambda to_y, x, norm, y, index, relu: y is None,
    ("gradients", "sum"): lambda to_y, x, norm, y, index, relu: y is not None,
    ("pool", "stem"): lambda x, norm: norm.eps is not None,
    ("pool", "pool"): lambda x, norm: norm is None,
    ("unpool", "pool"): lambda *given: True,
}


def tenth_too_much(function: Callable, affected: Callable[..., bool], *given: object) -> object:
    """Return what a function does; where it is affected, the first of it too large."""
    made = function(*given)
    if not affected(*given):
        return made
    return (1.1 * made[0], *made[1:]) if isinstance(made, tuple) else 1.1 * made


CHECKS = "import torch; import tests.test_fused as t; "


def interpret(checks: str) -> None:
    """Run checks in Triton's interpreter, on this machine's CPU."""
    arguments = ("-c", f"{CHECKS}{checks}; print('done')")
    done = run_python(*arguments, timeout=300, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=python_path())
    assert done.returncode == 0 and done.stdout.strip() == "done", done.stderr[-2000:]


def test_the_kernels_in_the_interpreter():
    interpret("t.check_norms('cpu', [torch.float32]); t.check_pools('cpu', [torch.bfloat16]); t.check_trust('cpu')")


@pytest.mark.slow
def test_all_types_and_networks_in_the_interpreter():
    interpret("t.check_norms('cpu'); t.check_pools('cpu'); t.check_networks('cpu')")


COMPILE = """
import sys
import jaxtyping, torch, triton
jaxtyping.install_import_hook("dfer", "beartype.beartype")  # as in the tests that run on a GPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dfer.model import fused, launches

dtype, capability = getattr(torch, sys.argv[1]), int(sys.argv[2])
names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
names |= {torch.int8: "*i8", torch.int64: "*i64"}
done = set()
def record(kernel, maps, parts, *arguments, **constants):  # nothing is computed: what the launches would be matters
    kind = lambda x: names[x.dtype] if isinstance(x, torch.Tensor) else {int: "i32", float: "fp32"}[type(x)]
    given = dict(zip(kernel.arg_names, map(kind, arguments)))
    constants |= {"C": maps.channels, "ROWS": launches.ROWS, "COLUMNS": launches.COLUMNS}
    assert sorted([*given, *constants]) == sorted(kernel.arg_names)
    if len(sys.argv) > 3 and kernel.__name__ in done:
        return
    done.add(kernel.__name__)
    signature = given | {name: "constexpr" for name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(arguments) if not isinstance(x, float)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(kernel.__name__, made.metadata.shared, made.asm["ptx"].count("ld.global.v4"))

launches.launch = record
x = torch.empty(2, 64, 56, 56, dtype=dtype).to(memory_format=torch.channels_last)
of_channels = [torch.empty(64) for _ in range(4)]
norm = launches.Norm(*of_channels)
z, index = launches.pool(x, norm)
launches.gradients(z, x, norm, None, index, True)
launches.normalise(x, norm, x, True)
launches.statistics(x, (*of_channels[:2], torch.zeros((), dtype=torch.int64)), 0.1, 1e-5)
launches.unpool(z, index, (56, 56))
launches.normalise(x, norm, None, False)
launches.pool(x, None)
launches.pool(x, norm._replace(eps=1e-5))
launches.gradients(x, x, norm, x, None, True)
launches.gradients(x, x, norm, None, None, False)
"""
KERNELS = {"parts", "merge", "normalise", "pool", "unpool", "gradient_parts", "input_gradient"}


@pytest.mark.parametrize(
    ("dtype", "capability", "each"),
    [
        ("bfloat16", 90, ["each once"]),
        pytest.param("bfloat16", 90, [], marks=pytest.mark.slow),
        pytest.param("bfloat16", 80, [], marks=pytest.mark.slow),
        pytest.param("float16", 80, [], marks=pytest.mark.slow),
        pytest.param("float32", 90, [], marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_gpus(tmp_path, dtype, capability, each):
    """To machine code; all read 16 bytes at a time, and shared memory is what every GPU has."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = run_python("-c", COMPILE, dtype, str(capability), *each, timeout=300, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {f"{name}_kernel" for name in KERNELS}
    for name, shared, wide in rows:
        assert int(shared) <= 48 * 1024 and int(wide) > 0, (name, shared, wide)


# ---- What stays as it is.


@pytest.mark.parametrize(
    ("names", "block"),
    [
        (["test_resnet"], "FusedBasicBlock"),
        pytest.param(["resnet50"], "FusedBottleneck", marks=pytest.mark.slow),
    ],
)
def test_a_model_keeps_its_names_and_on_a_cpu_its_bits(names, block):
    """And its copies, among them the average's, are fused as it is."""
    for name in names:
        torch.manual_seed(0)
        plain = MeanPoolNet(backbone=name, dropout=0.0).to(memory_format=torch.channels_last)
        made = copy.deepcopy(plain)
        fuse(made, "both")
        made = copy.deepcopy(made)
        kinds = {type(module).__name__ for module in made.modules()}
        assert {"FusedNorm", "FusedPool", block, "FusedFeatureListNet"} <= kinds and "BatchNorm2d" not in kinds
        clips = torch.randn(1, 2, 3, 32, 32)
        for net in (plain, made):
            net(clips).logits.square().sum().backward()
        assert list(plain.state_dict()) == list(made.state_dict())
        for a, b in zip(plain.state_dict().values(), made.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(plain.parameters(), made.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for net in (plain.eval(), made.eval()):
            net.result = net(clips).logits
        assert torch.equal(plain.result, made.result)


def test_parts_are_fused_alone():
    kinds = []
    for parts in ("norm", "pool"):
        fuse(model := MeanPoolNet(), parts)
        kinds.append({type(module).__name__ for module in model.modules()})
    assert {"FusedNorm", "FusedBasicBlock", "MaxPool2d", "FeatureListNet"} <= kinds[0] and "FusedPool" not in kinds[0]
    assert {"BatchNorm2d", "BasicBlock", "FusedPool", "FeatureListNet"} <= kinds[1] and "FusedNorm" not in kinds[1]


def test_what_is_no_plain_residual_block_is_left_alone():
    """Attention stands between norm and sum, and a stem of several convolutions before its own."""
    torch.manual_seed(0)
    for name in ("seresnet18", "resnet18d"):
        backbone = MeanPoolNet(backbone=name, dropout=0.0)
        fuse(made := copy.deepcopy(backbone), "both")
        clips = torch.randn(1, 2, 3, 32, 32)
        assert torch.equal(backbone(clips).logits, made(clips).logits), name


def test_why_the_kernels_are_not_used_is_said(monkeypatch):
    """On a device that cannot run them, and on one where they are wrong."""
    from dfer.run.graph import build_graphs
    from dfer.run.step import with_step  # here, as the interpreter's process need not wait for the loader
    from tests.test_graph import configured, job_of
    from train import training_loss

    monkeypatch.setattr(fused, "_distance", mock.Mock(side_effect=[*[0.001] * 9, 0.2]))
    assert fused.why_not(torch.device("cpu"), torch.bfloat16) == "Triton's kernels are 2.0e-01 off torch's operators"
    monkeypatch.setattr(fused, "_distance", mock.Mock(return_value=0.001))
    assert fused.why_not(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(fused, "_distance", mock.Mock(side_effect=RuntimeError("no ptxas\nhere")))
    assert "do not run here (" in (said := fused.why_not(torch.device("cpu"), torch.float32)) and "\n" not in said
    config = configured()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, fused="norm"))
    job = job_of(config, None)
    on_card = job._replace(config=config, precision=job.precision._replace(device=torch.device("cuda")))
    note = with_step(on_card, training_loss, build_graphs(config.run, job.world)).step.take_note()
    assert note.startswith("--run.fused norm: Triton's kernels do not run here") and note.endswith(
        "operators are taken"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_norms, check_pools, check_networks])
def test_the_kernels_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
def test_this_gpu_is_trusted():
    check_trust("cuda")
    for dtype in UNIT:
        assert fused.why_not(torch.device("cuda"), dtype) is None


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(256, 64, 56, 56), (256, 64, 28, 28), (256, 128, 14, 14), (256, 512, 4, 4)])
def test_real_shapes_on_a_gpu(size):
    """Against torch's own operators in float32 of the same bf16 maps, and without a wait of the host."""
    x = maps(*size, torch.bfloat16).cuda()
    shortcut = maps(*size, torch.bfloat16, seed=3).cuda()
    norm = norm_of(size[1]).cuda()
    ours = fused_copy(norm, "cuda")
    ours(x, shortcut, relu=True)  # compiled the first time
    ours.load_state_dict(norm.state_dict())
    leaves = [x.requires_grad_(), shortcut.requires_grad_()]
    with no_waiting():
        y = ours(x, shortcut, relu=True)
        got = torch.autograd.grad(y, [*leaves, ours.weight, ours.bias], y.detach())
    exact = [t.detach().float().requires_grad_() for t in leaves]
    before = norm(exact[0]) + exact[1]
    want = torch.autograd.grad(before, [*exact, norm.weight, norm.bias], y.detach().float())
    close(y, before.relu().cpu(), x.dtype)
    close(ours.running_var, norm.running_var.cpu(), torch.float32, terms=64)
    for a, b in zip(got, want, strict=True):
        close(a, b.cpu(), x.dtype)


WHOLE = """
import torch
from functorch.compile import default_partition
from torch._dynamo.backends.common import aot_autograd
from dfer.model import DFERNet, fused

graphs = []

def both_passes(graph, *inputs, **options):
    graphs.append({str(node.target).split(".")[1] for node in graph.graph.nodes if "dfer" in str(node.target)})
    graphs[-1] |= {node.args[0].name().split("::")[1] for node in graph.graph.nodes
                   if "auto_functionalized" in str(node.target)}
    return default_partition(graph, *inputs, **options)

def refuse(*inputs):
    raise RuntimeError("traced")

fused.taken = lambda x: True
model = DFERNet(2, dim=16, dropout=0.0, crf_backend="triton")
fused.fuse(model, "both")
backend = aot_autograd(fw_compiler=lambda graph, inputs: refuse, partition_fn=both_passes)
compiled = torch.compile(model, backend=backend, fullgraph=True)  # fullgraph: a break is an error
try:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(torch.randn(1, 2, 3, 64, 64))
except RuntimeError as error:
    assert str(error) == "traced", error
print(len(graphs), *sorted(graphs[0]))
"""


@pytest.mark.slow
def test_the_whole_model_is_one_graph_with_the_kernels_as_operators():
    """Forwards and backwards, without a GPU: traced on tensors without content, nothing of it is computed."""
    done = run_python("-c", WHOLE, timeout=300, PYTHONPATH=python_path())
    assert done.returncode == 0, done.stderr[-2000:]
    forwards = {"batch_statistics", "meanfield", "norm_act", "norm_pool"}
    assert done.stdout.split() == ["1", *sorted(forwards | {"meanfield_backward", "norm_act_backward"})]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_a_graph_of_fused_layers_is_their_eager_steps(dtype):
    """To the bit, over skipped steps too; and evaluation, whose layers are other kernels."""
    from dfer.precision import Precision
    from dfer.run.algorithms import chosen_algorithms
    from dfer.run.graph import CudaGraphs
    from tests.test_graph import assert_same, batches, configured, job_of, on_card, told

    device = torch.device("cuda", torch.cuda.current_device())
    jobs, predicted, config = [], [], configured()
    with chosen_algorithms(dataclasses.replace(config.run, deterministic=True)):
        for backend in (None, CudaGraphs(device)):
            job = job_of(config, backend, precision=Precision(device, dtype, True))
            fuse(job.state.model, "both")
            fuse(job.state.evaluated_model(), "both")
            told(job, on_card(batches(20, harmed=(7,))))
            with torch.no_grad():
                job.state.evaluated_model().eval()
                predicted.append([job.step.predict(b.clips).clone() for b in on_card(batches(5))])
            jobs.append(job)
    assert jobs[1].step.graphs.active and jobs[1].step.take_note() is None
    assert_same(jobs[1], jobs[0])
    assert all(torch.equal(a, b) for a, b in zip(*predicted, strict=True))
