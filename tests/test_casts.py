"""Weights that are cast at once are autocast's own to the bit: it is the oracle, on a CPU in bfloat16."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from dfer.config import RunConfig
from dfer.evaluation import probabilities
from dfer.model import Prediction
from dfer.model.build import build_model
from dfer.model.casts import cast_weights
from dfer.precision import Precision
from dfer.run import graph
from dfer.run.algorithms import chosen_algorithms
from dfer.run.graph import CudaGraphs, Graphs, resolved_graph
from dfer.run.step import with_step
from tests.recorded import Recorder
from tests.test_graph import NUM_STEPS, SMALL, WORLD, assert_same, batches, configured, job_of, on_card, told
from train import training_loss

BF16 = Precision(torch.device("cpu"), torch.bfloat16, True)
AT_ONCE = BF16._replace(at_once=True)


class Casts(TorchDispatchMode):
    """Watches how float32 becomes bfloat16, or the other way round."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters()}
        self.alone: list[str] = []  # parameters that have a cast of their own
        self.together: list[int] = []  # how many tensors are cast at once
        self.single = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype != made.dtype:
            self.single += 1
            if args[0].data_ptr() in self.names:
                self.alone.append(self.names[args[0].data_ptr()])
        if func is torch.ops.aten._foreach_copy_.default and args[0][0].dtype != args[1][0].dtype:
            self.together.append(len(args[0]))
            # Else a GPU would have a kernel for each.
            assert all(a.stride() == b.stride() for a, b in zip(*args, strict=True))
            assert len({a.dtype for a in args[0]}) == len({b.dtype for b in args[1]}) == 1
        return made


@pytest.mark.parametrize(
    ("accumulate", "recorded"),
    [(1, True), (2, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (3, True)))],
)
def test_training_is_autocast_s_to_the_bit(accumulate, recorded):
    """The default model: both branches, which share the backbone, the CRF and the recurrent unit; a step is skipped."""
    config, found = configured(accumulate=accumulate), []
    for precision, backend in ((BF16, None), (AT_ONCE, Recorder() if recorded else None)):
        job = job_of(config, backend, precision=precision)
        found.append((job, told(job, batches(NUM_STEPS * accumulate, harmed=(accumulate,)))))
    (want, want_logged), (job, logged) = found
    assert job.state.guard.skipped[0] == 1
    assert_same(job, want)
    for a, b in zip(logged, want_logged, strict=True):
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def check_casts(device: torch.device) -> None:
    found = []
    for at_once in (False, True):
        job = job_of(configured(), None, precision=BF16._replace(device=device, at_once=at_once))
        with Casts(job.state.model) as casts:
            told(job, batches(1) if device.type == "cpu" else on_card(batches(1)))
        found.append(casts)
    apart, at_once = found
    number = len(cast_weights(job.state.model, torch.bfloat16))
    assert apart.together == [] and sorted(apart.alone) == sorted(cast_weights(job.state.model, torch.bfloat16))
    assert at_once.alone == [] and at_once.together == [number, number] and number == 30
    assert apart.single - at_once.single == 2 * number


def test_a_step_has_two_casts_for_all_weights():
    """And none for one alone, while autocast casts all of them alone, so that the test would see one."""
    check_casts(torch.device("cpu"))


def clips_of() -> Tensor:
    return next(batches(1)).clips


def passed(model: nn.Module, precision: Precision, clips: Tensor) -> dict[str, Tensor | None]:
    """Logits and gradients of a pass."""
    torch.manual_seed(0)
    model.zero_grad()
    logits = precision.forward(model, clips).logits
    logits.float().square().sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_alike(model: nn.Module, clips: Tensor) -> None:
    """The same logits and gradients, in the same order of memory."""
    want, got = (passed(model, precision, clips) for precision in (BF16, AT_ONCE))
    for name, a in want.items():
        b = got[name]
        assert a is b is None or (torch.equal(a, b) and (a.dtype, a.stride()) == (b.dtype, b.stride())), name


@pytest.mark.parametrize(
    "options",
    [
        {"crf": "gaussian", "branches": "static", "time": "attention"},
        {"name": "r18-lstm"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"crf": "messages"},
                {"crf": "none", "branches": "dynamic"},
                {"name": "r18-gru"},
                {"name": "st-former", "backbone": "resnet18"},
                {"name": "mean-pool", "backbone": "convnext_atto"},
                {"name": "mean-pool", "backbone": "nf_resnet26"},  # standardises its weights, in float32
                {"name": "mean-pool", "backbone": "vgg11_bn"},
            )
        ),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_model_is_autocast_s_to_the_bit(options):
    """But r3d-18, whose gradients in bfloat16 differ from one pass to the next on a CPU."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SMALL, **options), 2)
    for weight in model.parameters():
        weight.data = weight.data.to(memory_format=torch.channels_last) if weight.dim() == 4 else weight.data
    assert_alike(model.train(), clips_of())


def test_a_frozen_backbone_has_no_gradients():
    model = build_model(dataclasses.replace(SMALL, freeze="backbone"), 2).train()
    assert_alike(model, clips_of())
    cast = cast_weights(model, torch.bfloat16)
    assert {name.startswith("backbone.") for name in cast} == {True, False}
    assert all(tensor.requires_grad != name.startswith("backbone.") for name, tensor in cast.items())


class Odd(nn.Module):
    """Layers that share a weight, one that is not used, one that wants its weight in float32, one in float64."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.scaled, self.exact, self.norm = Scaled(8, 8), nn.Linear(8, 8).double(), nn.LayerNorm(8)

    def forward(self, clips: Tensor) -> Prediction:
        x = clips.flatten(1)[:, :8]
        x = self.scaled(self.second(self.first(x).relu()))
        with torch.autocast("cpu", enabled=False):
            return Prediction(self.exact(self.norm(x.float()).double()), None, {})


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)


def test_layers_that_are_not_plain_keep_what_they_have():
    torch.manual_seed(0)
    model = Odd()
    names = ["first.weight", "first.bias", "second.weight", "unused.weight", "unused.bias"]
    cast = cast_weights(model, torch.bfloat16)
    assert list(cast) == names and cast["first.weight"] is cast["second.weight"]
    assert_alike(model, clips_of())
    assert model.unused.weight.grad is None and model.exact.weight.grad is not None
    assert cast_weights(nn.LayerNorm(8), torch.bfloat16) == {}


def test_evaluation_is_autocast_s_to_the_bit():
    torch.manual_seed(0)
    model = build_model(SMALL, 2).eval()
    with torch.inference_mode():
        want, got = (probabilities(model, precision, clips_of()) for precision in (BF16, AT_ONCE))
    assert torch.equal(got, want)


def test_ddp_is_given_the_gradients_of_the_leaves():
    """Of one process: it finds the layers under names of its own, and exchanges what reaches the parameters."""
    torch.manual_seed(0)
    model = build_model(SMALL, 2).to(memory_format=torch.channels_last)
    want = passed(model, BF16, clips_of())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        got = passed(DistributedDataParallel(model), AT_ONCE, clips_of())
    finally:
        dist.destroy_process_group()
    assert got.keys() == {"logits"} | {f"module.{name}" for name, _ in model.named_parameters()}
    assert all(torch.equal(got[name if name == "logits" else f"module.{name}"], want[name]) for name in want)


# ---- Whether they are.


def stepped(fused: str, precision: Precision = BF16, size: int = 1, compiled: bool = False) -> tuple[bool, str | None]:
    """Whether the steps of a job and its evaluations cast at once, and what is said of it."""
    config = dataclasses.replace(configured(), run=RunConfig(fused=fused, compile=compiled))  # type: ignore[arg-type]
    job = job_of(configured(), None, precision=precision)
    job = with_step(
        job._replace(config=config, world=dataclasses.replace(WORLD, size=size)), training_loss, Graphs(None)
    )
    with Casts(job.state.model) as casts, torch.no_grad():
        job.step.predict(clips_of())
    assert bool(casts.together) == job.precision.at_once
    return job.precision.at_once, job.step.take_note()


def test_what_is_cast_at_once_is_what_fused_says():
    assert [stepped(fused)[0] for fused in ("weights", "all", "both", "norm", "off", "auto")] == [True] * 2 + [
        False
    ] * 4
    assert stepped("all") == (True, None)
    assert stepped("all")[1] is None
    said = {
        "there are no casts": stepped("weights", BF16._replace(dtype=None)),
        "the compiler fuses casts": stepped("weights", compiled=True),
        "gradients would all be exchanged after the backward pass, none during it": stepped("weights", size=2),
    }
    for why, found in said.items():
        assert found == (False, f"--run.fused weights: {why}; weights are cast one by one")


@pytest.mark.parametrize(("fused", "kinds"), [("all", {"FusedNorm"}), ("weights", {"BatchNorm2d"})])
def test_all_is_the_layers_too(monkeypatch, fused, kinds):
    monkeypatch.setattr("dfer.run.step.why_not", lambda device, dtype: None)
    job = job_of(configured(), None, precision=BF16)
    config = dataclasses.replace(configured(), run=RunConfig(fused=fused))
    on_gpu = job._replace(config=config, precision=BF16._replace(device=torch.device("cuda")))
    job = with_step(on_gpu, training_loss, Graphs(None))
    assert job.precision.at_once and job.step.take_note() is None
    for model in (job.state.model, job.state.evaluated_model()):
        assert {type(m).__name__ for m in model.modules()} & {"FusedNorm", "BatchNorm2d"} == kinds


def test_auto_casts_at_once_where_autocast_does(monkeypatch):
    def chosen(size: int = 1, **run) -> str:
        monkeypatch.setattr(graph, "find_place", lambda: dataclasses.replace(WORLD, size=size))
        return resolved_graph(RunConfig(**run)).fused

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chosen(amp=amp) for amp in ("bf16", "fp16", "off")] == ["all", "all", "both"]
    assert [chosen(2, amp="bf16"), chosen(2, amp="bf16", graph="off")] == ["all", "off"]
    assert [chosen(amp="bf16", compile=True), chosen(amp="bf16", fused="both")] == ["off", "both"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen(amp="bf16") == "off"


# ---- On a card.


@pytest.mark.gpu
def test_on_a_gpu_a_step_has_two_casts_for_all_weights():
    """And gradients have strides with which they go through one kernel."""
    check_casts(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_training_is_autocast_s_to_the_bit(dtype, accumulate):
    """Eager steps and a graph's, a skipped one among them, and what is evaluated after them."""
    device = torch.device("cuda", torch.cuda.current_device())
    config, jobs, predicted = configured(accumulate=accumulate), [], []
    with chosen_algorithms(RunConfig(deterministic=True)):
        for at_once, backend in ((False, None), (True, None), (True, CudaGraphs(device))):
            job = job_of(config, backend, precision=Precision(device, dtype, True, at_once))
            told(job, on_card(batches(20 * accumulate, harmed=(7,))))
            job.state.evaluated_model().eval()
            with torch.no_grad():
                predicted.append([job.step.predict(b.clips).clone() for b in on_card(batches(5))])
            jobs.append(job)
    assert jobs[2].step.graphs.active and jobs[2].step.take_note() is None
    for job, probabilities_of in zip(jobs[1:], predicted[1:], strict=True):
        assert_same(job, jobs[0], gradients=False)
        assert all(torch.equal(a, b) for a, b in zip(probabilities_of, predicted[0], strict=True))
