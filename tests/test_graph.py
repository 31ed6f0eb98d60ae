"""Captured steps are eager ones to the bit, whatever happens to them: CUDA graphs as a recorder plays them on a CPU."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from dfer.batch import Batch, Mix, empty_batch
from dfer.config import Config, DataConfig, ModelConfig, RunConfig
from dfer.losses import Objective, build_objective
from dfer.optim import average
from dfer.optim.options import OptimConfig
from dfer.optim.schedule import Schedule
from dfer.precision import Precision
from dfer.run import distributed, graph
from dfer.run.algorithms import chosen_algorithms
from dfer.run.distributed import World
from dfer.run.graph import (
    WARM_UP,
    CapturedCall,
    CudaGraphs,
    Graphs,
    build_graphs,
    resolved_graph,
    together,
)
from dfer.run.profiler import RANGES
from dfer.run.step import TrainingStep, with_step
from dfer.state import Job, build_state
from tests.conftest import run_python
from tests.recorded import Recorder, Refusing
from train import train_steps, training_loss

CPU = Precision(torch.device("cpu"), None, True)
WORLD = World(0, 1, 0, 1, torch.device("cpu"))
SMALL = ModelConfig(dim=16, backbone="test_resnet", dropout=0.5)
NUM_STEPS = WARM_UP + 3


def configured(**optim) -> Config:
    options = OptimConfig(**({"lr": 0.01, "ema": 0.9, "clip_norm": 1.0} | optim))
    data, run = DataConfig(size=32, num_segments=2, batch_size=2), RunConfig(log_every=1)
    return Config(data=data, model=SMALL, optim=options, run=run)


def job_of(
    config: Config, backend: object, objective: Objective | None = None, checkpoint: dict | None = None,
    scaled: bool = False, precision: Precision = CPU,
) -> Job:  # fmt: skip
    """A job on two clips, whose steps a backend captures; without one they are eager."""
    state = build_state(config, precision, checkpoint)
    if scaled:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        state.__post_init__()
        if checkpoint:
            state.load_state_dict(checkpoint)
    schedule = Schedule(config.optim.lr, 3, 100, 100)
    objective = objective or build_objective(config.loss, [])
    world = dataclasses.replace(WORLD, device=precision.device)
    job = Job(config, world, None, None, state, state.model, objective, schedule, precision)
    return job._replace(step=TrainingStep(job, training_loss, Graphs(backend)))


def batches(count: int, harmed: tuple[int, ...] = (), mixed: bool = False) -> Iterator[Batch]:
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        clips = torch.randn(2, 2, 32, 32, 3, generator=generator).permute(0, 1, 4, 2, 3)
        if number in harmed:
            clips[0, 0, 0, 0, 0] = torch.nan
        labels, valid = torch.tensor([number % 7, 3]), torch.tensor([True, number % 4 != 1])
        mix = Mix(torch.tensor([1, 0]), torch.rand(2, generator=generator)) if mixed else None
        yield Batch(clips, labels, valid, torch.tensor([number % 5, 2]), mix)


def told(job: Job, given: Iterator[Batch]) -> list[list[Tensor]]:
    """What each step leaves to be logged."""
    return [
        [step.grad_norm.clone(), *(v.clone() for v in step.diagnostics.values())] for step in train_steps(job, given)
    ]


def everything(job: Job) -> list[Tensor]:
    """All tensors that training changes, but for gradients and for how a scaler keeps its own."""
    state = job.state
    models = [model for model in (state.model, state.ema) if model is not None]
    found = [t.detach() for model in models for t in (*model.parameters(), *model.buffers())]
    found += [t for kept in state.optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)]
    return [*found, state.guard.skipped, state.losses]


def assert_same(job: Job, want: Job, gradients: bool = True) -> None:
    """Gradients too, unless steps of two graphs took turns: they lie where the one that was captured later has them."""
    for a, b in zip(everything(job), everything(want), strict=True):
        assert torch.equal(a, b)
    assert job.state.scaler.state_dict() == want.state.scaler.state_dict() and job.state.step == want.state.step
    for a, b in () if not gradients else zip(job.state.model.parameters(), want.state.model.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


CASES = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "clip_norm": 0.0},
    "muon": {"optimizer": "muon", "ema": 0.0},
    "lion": {"optimizer": "lion", "accumulate": 2},
    "three batches a step": {"accumulate": 3, "ema_warmup": False},
    "layers": {"layer_decay": 0.7, "lr": 0.02},
}


@pytest.mark.parametrize(
    ("name", "scaled", "mixed"),
    [
        ("adamw", False, False),
        ("three batches a step", True, True),
        *(pytest.param(name, False, False, marks=pytest.mark.slow) for name in CASES if name != "adamw"),
        *(pytest.param(name, True, False, marks=pytest.mark.slow) for name in ("adamw", "sgd", "lion")),
    ],
)
def test_captured_steps_are_eager_ones(name, scaled, mixed):
    """Skipped ones among them, with dropout, an average that begins short and another learning rate each time."""
    config = configured(**CASES[name])
    accumulate = config.optim.accumulate
    harmed = (0, accumulate * (WARM_UP + 1))  # in the first step, and in a replayed one
    votes = torch.rand(5, 7).softmax(1)
    objective = Objective(0.1, 0.2, votes) if mixed else None
    found = []
    for backend in (None, recorder := Recorder()):
        job = job_of(config, backend, objective, scaled=scaled)
        logged = told(job, batches(NUM_STEPS * accumulate, harmed, mixed))
        found.append((job, logged))
    (want, want_logged), (job, logged) = found
    assert job.step.graphs.take_note() is None
    kinds = min(accumulate, 3)
    assert (recorder.warmed, recorder.captured) == (WARM_UP * accumulate, kinds)
    assert recorder.replayed == (NUM_STEPS - WARM_UP) * accumulate
    assert job.state.guard.skipped.tolist() == [2, 0]
    for a, b in zip(logged, want_logged, strict=True):
        assert len(a) > 5 and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))
    assert_same(job, want)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_that_are_not_logged_leave_out_the_diagnostics_and_nothing_else(accumulate):
    """They are another graph than those that are, and both write what is asked for."""
    config = configured(accumulate=accumulate)
    some = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=2))
    found = []
    for each, backend in ((config, None), (some, None), (some, recorder := Recorder())):
        job = job_of(each, backend)
        found.append((job, told(job, batches((NUM_STEPS + 2) * accumulate))))
    (want, whole), *others = found
    assert len(whole) == 7 and all(len(step) == 9 for step in whole)
    for job, logged in others:
        assert_same(job, want, gradients=False)
        # The first two are warm-up, which calls whatever will be captured.
        assert [len(step) for step in logged] == [9, 9, 1, 9, 1, 9, 1]
        for step, a in zip(logged, whole, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(step, a[: len(step)], strict=True))
    assert recorder.captured == 2 * accumulate - (accumulate - 1)
    with torch.inference_mode():
        job.step.predict(next(batches(1)).clips)
    assert not any(crf.diagnosed for crf in job.step._crfs)


@pytest.mark.parametrize("exchanged", [False, True])
def test_the_gradients_of_the_last_step_can_be_looked_at(exchanged):
    """Whichever graph has made them: the one without diagnostics was captured first, and the other one in between."""
    config = dataclasses.replace(configured(ema=0.0), run=RunConfig(log_every=2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        want, job = job_of(config, None), job_of(config, Recorder())
        exchange = distributed.Exchange(job.state.model, job.world) if exchanged else None
        job = job._replace(step=TrainingStep(job, training_loss, job.step.graphs, exchange))
        given = (list(batches(NUM_STEPS, harmed=(NUM_STEPS - 2,))) for _ in range(2))
        for _ in zip(train_steps(want, iter(next(given))), train_steps(job, iter(next(given))), strict=True):
            want.step.show_gradients()
            shown = [p.grad for p in job.state.model.parameters()]
            job.step.show_gradients()
            for a, b in zip(job.state.model.parameters(), want.state.model.parameters(), strict=True):
                assert torch.equal(a.grad.nan_to_num(), b.grad.nan_to_num())
            for parameter, gradient in zip(job.state.model.parameters(), shown, strict=True):
                parameter.grad = gradient
    finally:
        dist.destroy_process_group()


def test_an_optimizer_that_takes_gradients_from_the_host_has_one_graph():
    config = dataclasses.replace(configured(optimizer="lion"), run=RunConfig(log_every=2))
    job = job_of(config, recorder := Recorder())
    assert [len(step) for step in told(job, batches(NUM_STEPS))] == [9] * NUM_STEPS
    assert recorder.captured == 1


def test_captured_steps_go_on_where_a_kill_has_left_them():
    config = configured()
    given = list(batches(NUM_STEPS + 3))
    whole, killed = job_of(config, Recorder()), job_of(config, Recorder())
    told(whole, iter(given))
    told(killed, iter(given[:-3]))
    saved = copy.deepcopy(killed.state.state_dict())
    assert all(isinstance(group["lr"], float) for group in saved["optimizer"]["param_groups"])
    job = job_of(config, Recorder(), checkpoint=saved)
    told(job, iter(given[-3:]))
    assert_same(job, whole)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_a_graph_reads_and_writes_stays_where_it_is(accumulate):
    job = job_of(configured(accumulate=accumulate), Recorder())
    places = []
    for number, step in enumerate(train_steps(job, batches(NUM_STEPS * accumulate))):
        if number >= WARM_UP:
            outputs = [step.grad_norm, *step.diagnostics.values()]
            gradients = [p.grad for p in job.state.model.parameters()]
            places.append([t.data_ptr() for t in (*everything(job), *gradients, *outputs)])
    assert len(places) == NUM_STEPS - WARM_UP and all(place == places[0] for place in places)


def test_an_eager_step_keeps_its_state_where_it_is_and_averages_its_weights():
    job = job_of(configured(), None)
    places, weights = [], []
    for _ in train_steps(job, batches(3)):
        places.append([t.data_ptr() for t in everything(job)])
        weights.append(next(job.state.model.parameters()).detach().clone())
    assert places[1] == places[2]
    mean = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        keep = (1 + n) / (10 + n)
        mean = keep * mean + (1 - keep) * weight
    torch.testing.assert_close(next(job.state.evaluated_model().parameters()).detach(), mean)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"name": "st-former"},
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ({"crf": "gaussian"}, {"name": "r18-lstm"}, {"time": "attention"})
        ),
    ],
)
def test_flop_are_counted_without_computing(model):
    config = dataclasses.replace(configured(), model=dataclasses.replace(SMALL, **model))
    job = job_of(config, None)
    before = [t.clone() for t in everything(job)]
    job.step.count_flops()
    assert job.step.take_note() is None and all(map(torch.equal, before, everything(job)))
    with FlopCounterMode(display=False) as counter:
        loss, _ = training_loss(job, next(batches(1)))
        loss.backward()
    assert job.step.flops_a_clip == counter.get_total_flops() / 2 > 1e6


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError])
def test_a_model_whose_flop_cannot_be_counted_is_trained(error, monkeypatch):
    """Whatever torch raises; and what else there is to say is said too."""

    def refuse(config):
        raise error("aten::x needs its\ncontent")

    monkeypatch.setattr("dfer.run.step.flops_a_clip", refuse)
    job = job_of(configured(), None)
    job.step.notes.append("kernels are not taken")
    job.step.count_flops()
    assert job.step.take_note() == "kernels are not taken"
    note = job.step.take_note()
    assert note.startswith("the model's FLOP cannot be counted (") and "): no share of the GPU's peak" in note
    assert "aten::x needs its" in note and "\n" not in note
    assert job.step.take_note() is None and job.step.flops_a_clip is None
    told(job, batches(1))


@pytest.mark.parametrize(
    ("accumulate", "number", "scaled"),
    [(1, 1, True), *(pytest.param(2, *rest, marks=pytest.mark.slow) for rest in ((2, True), (1, False)))],
)
def test_a_capture_that_fails_is_one_line_and_the_steps_go_on(accumulate, number, scaled):
    config = configured(accumulate=accumulate)
    given = list(batches(NUM_STEPS * accumulate))
    want, job = job_of(config, None, scaled=scaled), job_of(config, None, scaled=scaled)
    told(want, iter(given))
    # Its state is made in the first step: only then is there all that a capture might harm.
    at = accumulate * WARM_UP
    graphs = job.step.graphs
    graphs._backend = Recorder()
    job.step._rates = TrainingStep(job, training_loss, graphs)._rates
    told(job, iter(given[:at]))
    operator = (
        "_fused_adamw_" if number == accumulate else "_foreach_lerp_" if number > accumulate else "native_batch_norm"
    )

    def harmed() -> list[Tensor]:
        return everything(job) + [p.grad for p in job.state.model.parameters() if p.grad is not None]

    graphs._backend = Refusing(harmed, operator, number)
    told(job, iter(given[at:]))
    note = graphs.take_note()
    what = {(1, 1): "a training step that is logged", (2, 1): "the first batch of a training step"}
    name = what.get((accumulate, number), "the last batch of a training step that is logged")
    assert note.startswith(f"--run.graph: {name} cannot be captured (") and f"stream is capturing: {operator}" in note
    assert "\n" not in note and graphs.take_note() is None and not graphs.active
    assert_same(job, want)


def test_evaluation_is_captured_too():
    job = job_of(configured(), recorder := Recorder())
    job.state.evaluated_model().eval()
    with torch.inference_mode():
        for batch in batches(WARM_UP + 3):
            found = job.step.predict(batch.clips).clone()
            want = job.state.evaluated_model()(batch.clips).logits.softmax(1)
            assert torch.equal(found, want)
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (WARM_UP, 1, 3)


def test_an_evaluation_that_cannot_be_captured_leaves_steps_their_graph():
    job = job_of(configured(ema=0.0), Recorder())
    told(job, batches(WARM_UP + 1))
    job.step._evaluation._backend = Refusing(list, "softmax", 1)
    job.state.model.eval()
    with torch.inference_mode():
        for batch in batches(WARM_UP + 2):
            assert torch.equal(job.step.predict(batch.clips), job.state.model(batch.clips).logits.softmax(1))
    assert job.step.take_note().startswith("--run.graph: an evaluated batch cannot be captured (")
    assert job.step.graphs.active and job.step.take_note() is None


def test_a_capture_is_tried_twice_and_done_once():
    """A thread that waits for the whole device breaks the first one off."""
    config, given = configured(accumulate=2), list(batches(2 * NUM_STEPS))
    want = job_of(config, None)
    told(want, iter(given))
    job = job_of(config, None)
    told(job, iter(given[: 2 * WARM_UP]))
    harmed = lambda: everything(job) + [p.grad for p in job.state.model.parameters() if p.grad is not None]  # noqa: E731

    class Disturbed(Recorder):
        tries = 0

        def capture(self, function):
            self.tries += 1
            if self.tries % 2:
                return Refusing(harmed, "_fused_adamw_" if self.tries > 2 else "native_batch_norm", 1).capture(function)
            return super().capture(function)

    graphs = job.step.graphs
    graphs._backend = disturbed = Disturbed()
    job.step._rates = TrainingStep(job, training_loss, graphs)._rates
    told(job, iter(given[2 * WARM_UP :]))
    assert (disturbed.tries, disturbed.captured) == (4, 2) and graphs.active and graphs.take_note() is None
    assert_same(job, want)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_seeds_of_others():
    ones, out = torch.ones(1000, device="cuda"), torch.empty(1000, device="cuda")
    graphs = Graphs(CudaGraphs(torch.device("cuda", 0)))

    def masks() -> list[Tensor]:
        found = []
        for seed in (3, 4, 3):
            torch.manual_seed(seed)
            graphs.run("drop", lambda: out.copy_(torch.nn.functional.dropout(ones, 0.5)), warm=True)
            found.append(out.clone())
        return found

    before, other = masks(), graphs.beside()
    other.run("read", lambda: float(ones.sum()), warm=True)
    assert "cannot be captured" in other.take_note() and graphs.take_note() is None
    after = masks()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(after[0], after[2]) and not torch.equal(after[0], after[1])


def test_the_average_of_a_gpu_is_that_of_a_cpu():
    generator = torch.Generator().manual_seed(0)
    old, new = ([torch.randn(shape, generator=generator) for shape in ((3,), (4, 5), ())] for _ in range(2))
    shares = torch.tensor([0.9, 0.1])
    made = []
    for move in (average._move, average._move_at_once):
        pairs = [(a.clone(), b) for a, b in zip(old, new, strict=True)]
        move(pairs, *shares)
        made.append([a.clone() for a, _ in pairs])
        move(pairs, *torch.tensor([0.0, 1.0]))
        assert all(torch.equal(a, b) for a, b in pairs)
    for a, b, c, d in zip(*made, old, new, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a, 0.9 * c + 0.1 * d, rtol=1e-6, atol=1e-7)


def test_a_shape_that_was_not_captured_is_no_broadcast():
    call = CapturedCall(Graphs(Recorder()), "x", lambda x: x + 1, torch.float64)
    assert call(torch.ones(2, 1)).dtype == torch.float64
    with pytest.raises(AssertionError, match=r"for \(2, 1\), not for \(1, 1\)"):
        call(torch.ones(1, 1))


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_step_reads_no_value(monkeypatch, optimizer):
    """On tensors without content, which have none that could be read."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # which such tensors do not know
    config = configured(optimizer=optimizer, accumulate=2, ema=0.0)  # an average is a copy, which they do not know
    with FakeTensorMode():
        job = job_of(config, None)
        job.model.train()
        step, (batch,) = job.step, batches(1)
        for first, last in ((True, False), (False, True), (True, True)):
            step._batch = batch
            step._do(first, last, "a step")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(step._norms["a step"])


def test_a_graph_is_chosen_once(monkeypatch):
    def chosen(gpu: bool, size: int = 1, **run) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(graph, "find_place", lambda: WORLD if size == 1 else dataclasses.replace(WORLD, size=size))
        return resolved_graph(RunConfig(**run)).graph

    assert [chosen(True), chosen(False), chosen(True, 2), chosen(True, device="cpu")] == ["on", "off", "on", "off"]
    assert [chosen(True, sync_bn=True), chosen(True, 2, sync_bn=True)] == ["on", "off"]  # it exchanges within a pass
    assert [chosen(False, graph="on"), chosen(True, 2, graph="on"), chosen(True, graph="off")] == ["on", "on", "off"]


def test_why_there_is_no_graph_is_said():
    assert build_graphs(RunConfig(graph="off"), WORLD).take_note() is None
    assert "there is no GPU here" in build_graphs(RunConfig(graph="on"), WORLD).take_note()
    two = dataclasses.replace(WORLD, size=2)
    assert "there is no GPU here" in build_graphs(RunConfig(graph="on"), two).take_note()


def test_where_one_rank_s_kernels_fail_all_take_torch_s_operators(monkeypatch):
    """And say which rank's. This rank is the first of two; its own kernels are right."""
    config = configured()
    config = dataclasses.replace(config, model=dataclasses.replace(SMALL, crf_backend="triton"))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, fused="both"))
    monkeypatch.setattr("dfer.run.step.why_not", lambda device, dtype: None)
    monkeypatch.setattr("dfer.run.step.trouble", lambda device, operands: None)
    found = {}
    for burnt in (None, "rank 1: it burns"):
        job = job_of(config, None)
        job = job._replace(config=config, precision=CPU._replace(device=torch.device("cuda")))
        job = job._replace(world=dataclasses.replace(WORLD, size=2))
        asked = []
        monkeypatch.setattr(distributed, "first_failure", lambda why, world: asked.append(why) or burnt)  # noqa: B023
        step = with_step(job, training_loss, Graphs(None)).step
        assert asked == [None, None]
        kinds = {type(m).__name__ for m in job.state.evaluated_model().modules()}
        found[burnt] = ["FusedNorm" in kinds, job.state.model.crf.backend, step.take_note(), step.take_note()]
    assert found[None] == [True, "triton", None, None]
    assert found["rank 1: it burns"] == [
        False,
        "dense",
        "--run.fused both: rank 1: it burns; torch's operators are taken",
        "--model.crf-backend triton: rank 1: it burns; dense is taken",
    ]


def test_an_optimizer_outside_of_the_graph_is_said_though_the_capture_fails():
    """As in a dry run, which says all at its end."""
    job = job_of(configured(optimizer="muon", ema=0.0), None)
    graphs = Graphs(Refusing(list, "native_batch_norm", 1))
    job = with_step(job, training_loss, graphs)
    told(job, batches(WARM_UP + 1))
    notes = [job.step.take_note() for _ in range(3)]
    assert notes[0] == "--run.graph: muon reads its learning rate on the host; its step runs outside"
    assert notes[1].startswith("--run.graph: a training step cannot be captured (") and notes[2] is None


def test_training_on_a_cpu_says_that_the_kernels_of_a_gpu_are_not_taken():
    job = job_of(dataclasses.replace(configured(), model=dataclasses.replace(SMALL, crf_backend="triton")), None)
    note = with_step(job, training_loss, Graphs(None)).step.take_note()
    assert note == "--model.crf-backend triton: there is no GPU here; dense is taken"
    assert job.state.model.crf.backend == job.state.evaluated_model().crf.backend == "dense"


@pytest.mark.parametrize(
    ("failing", "accumulate"),
    [
        ("none,odd1", "1"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("0:2", "1"), ("none,0,1:2,1:3", "2"))),
    ],
)
def test_processes_capture_their_steps_together_or_not_at_all(tmp_path, failing, accumulate):
    """And each is DDP's eager step to the bit: gradients are exchanged in replays, on all ranks or on none."""
    done = run_python("tests/two_processes.py", str(tmp_path / "store"), failing, accumulate)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_trace_names_the_exchange_of_gradients():
    """A graph's name holds for what is in it, and no exchange is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        job = job_of(configured(), None)
        exchange = distributed.Exchange(job.state.model, job.world)
        job = job._replace(step=TrainingStep(job, training_loss, Graphs(Recorder()), exchange))
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
            told(job, batches(2))
    finally:
        dist.destroy_process_group()
    named = [event.name for event in trace.events()]
    assert named.count("exchange") == named.count("optimizer") == 2 and "exchange" in RANGES


# ---- On a card


def on_card(given: Iterator[Batch]) -> Iterator[Batch]:
    for batch in given:
        mix = Mix(*(t.cuda() for t in batch.mix)) if batch.mix else None
        yield Batch(batch.clips.cuda(), batch.labels.cuda(), batch.valid.cuda(), batch.ids, mix)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "three batches a step"])
def test_on_a_gpu_graphs_are_eager_steps_over_some_steps_and_a_kill(name, dtype):
    """Eager steps are eager ones too, with fixed algorithms; a step is skipped, dropout drawn in each, some logged."""
    device = torch.device("cuda", torch.cuda.current_device())
    config, precision = configured(**CASES[name]), Precision(device, dtype, True)
    config = dataclasses.replace(config, run=RunConfig(log_every=7))
    accumulate = config.optim.accumulate
    half = (100 if (name, dtype) == ("adamw", torch.bfloat16) else 20) * accumulate
    given = list(on_card(batches(2 * half // accumulate, harmed=(12,)))) * accumulate
    with chosen_algorithms(RunConfig(deterministic=True)):
        jobs = []
        for backend in (None, None, CudaGraphs(device)):
            jobs.append(job_of(config, backend, precision=precision))
            told(jobs[-1], iter(given))
        first = job_of(config, CudaGraphs(device), precision=precision)
        told(first, iter(given[:half]))
        saved = copy.deepcopy(first.state.state_dict())
        jobs.append(job_of(config, CudaGraphs(device), checkpoint=saved, precision=precision))
        told(jobs[-1], iter(given[half:]))
    assert jobs[2].step.graphs.active and jobs[2].step.graphs.take_note() is None
    for job in jobs[1:]:
        assert_same(job, jobs[0], gradients=False)


@pytest.mark.gpu
def test_on_a_gpu_dropout_is_that_of_the_seed():
    device = torch.device("cuda", torch.cuda.current_device())
    call = CapturedCall(Graphs(CudaGraphs(device)), "x", torch.nn.Dropout(0.5), None)
    x, found, want = torch.ones(1000, device=device), [], []
    for seed in range(WARM_UP + 3):
        torch.manual_seed(seed)
        found.append(call(x).clone())
        torch.manual_seed(seed)
        want.append(torch.nn.functional.dropout(x, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert not torch.equal(found[-1], found[-2])


@pytest.mark.gpu
def test_on_a_gpu_a_capture_that_fails_leaves_nothing():
    """A value is read: eager steps draw, allocate and are captured in other graphs as if nothing had been."""
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = Graphs(CudaGraphs(device))
    reads = CapturedCall(graphs, "it", lambda x: torch.nn.functional.dropout(x, 0.5) * float(x.sum()), None)
    x = torch.ones(100, device=device)
    for seed in range(WARM_UP + 2):
        torch.manual_seed(seed)
        found = reads(x).clone()
        torch.manual_seed(seed)
        assert torch.equal(found, torch.nn.functional.dropout(x, 0.5) * 100)
    assert graphs.take_note().startswith("--run.graph: it cannot be captured (") and not graphs.active
    again = CapturedCall(Graphs(CudaGraphs(device)), "x", lambda x: x + 1, None)
    assert all(torch.equal(again(x), x + 1) for _ in range(WARM_UP + 2)) and again._graphs.active


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_on_a_gpu_two_processes_share_a_card(tmp_path, accumulate):
    """NCCL takes one process a card; gloo exchanges between the graphs of two. Each is DDP's eager step to the bit."""
    done = run_python("tests/two_processes.py", str(tmp_path / "store"), "gpu", accumulate)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_nccl_exchanges_between_two_graphs(tmp_path, accumulate):
    """Of one process, which NCCL takes on one card: what DDP's eager steps give."""
    device = torch.device("cuda", torch.cuda.current_device())
    world = World(0, 1, device.index, 1, device)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    config, jobs, logged = configured(accumulate=accumulate), [], []
    config = dataclasses.replace(config, run=RunConfig(log_every=2))  # some are captured when their end has been
    try:
        with chosen_algorithms(RunConfig(deterministic=True)):
            for backend in (None, CudaGraphs(device)):
                job = job_of(config, None, precision=Precision(device, None, True))
                if backend is None:
                    job = job._replace(model=distributed.parallel(job.state.model, world))
                    empty = empty_batch(2, 2, 32, device)
                    distributed.settle_buckets(job.model, empty, lambda batch, job=job: training_loss(job, batch)[0])
                exchange = None if backend is None else distributed.Exchange(job.state.model, world)
                step = TrainingStep(job, training_loss, together(backend, world), exchange)
                jobs.append(job._replace(step=step))
                logged.append(told(jobs[-1], on_card(batches((WARM_UP + 40) * accumulate, harmed=(30,)))))
        for a, b in zip(*logged, strict=True):
            assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))
        assert jobs[1].step.take_note() is None and jobs[1].step.graphs.active
        assert_same(*jobs, gradients=False)
    finally:
        for job in jobs:
            job.step.close()
        dist.destroy_process_group()
