"""The parts of benchmarks/gpu.py without a card: no typo is left for the card, and checks that can fail."""

import ctypes
import dataclasses
import inspect
import itertools
import json
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import floor, gpu
from benchmarks.gpu_parts import (
    ceilings,
    checks,
    data,
    decoders,
    mixing,
    nvdec,
    plan,
    project,
    rows,
    steps,
    timing,
    trace,
    training,
    user,
)
from benchmarks.gpu_parts.card import _Card
from benchmarks.gpu_parts.plan import PARTS, all_cases
from benchmarks.gpu_parts.setting import BATCHES, NotHere, Setting, setting_of
from dali_pipes.options import LoaderOptions


def test_the_plan_names_what_there_is():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases) and {case.part for case in cases} == set(PARTS)
    for case in cases:
        work = getattr(import_module(case.module), case.function)
        inspect.signature(work).bind(None, **case.options)
    assert not any("," in case.name or "*" in case.name for case in cases)  # they are given with commas between
    names = [case.name for case in cases if case.part not in plan.ASKED]
    in_order = [f"default fast B={batch}" for batch in BATCHES[:2]] + ["train.py as a user", "training from frames"]
    in_order += ["clips of frames", "training from video", "share of the CRF triton", "nvJPEG on SMs"]
    in_order += ["bits of fixed algorithms", *(f"default fast B={batch}" for batch in BATCHES[2:])]
    in_order += [*(f"static fast B={batch}" for batch in BATCHES), "static eager B=16", "CPU loader on all cores"]
    places = [names.index(name) for name in in_order]
    assert places == sorted(places)


def test_a_child_does_what_may_share_one():
    """Steps of one kind, as what libraries keep of one would serve the next; and no speed after a trace."""
    for case in all_cases():
        assert case.child is None or case.cores is None, case.name
    for parts in ({"step"}, {"step", "grid"}):
        series = [list(group) for _, group in itertools.groupby(all_cases(), lambda case: case.child or case.name)]
        for cases in ([case for case in group if case.part in parts] for group in series):
            kinds = [case.function for case in cases if case.function in ("speed", "busy")]
            assert kinds == sorted(kinds, reverse=True)
            assert len({str(case.options["options"]) for case in cases if case.function in ("speed", "busy")}) <= 1
    chosen = [case for case in all_cases() if gpu.named(case.name, ["graph B=*"])]  # of a part, and of the grid
    assert [case.name for case in chosen] == [f"graph B={batch}" for batch in BATCHES]
    assert [case.child == chosen[1].child for case in chosen] == [False, True, True, True]


def test_what_trains_is_the_step_that_a_run_takes():
    """On a card: a graph, fused layers, the CRF's kernels, cuDNN's fastest. Its clips come by the trainer's routes."""
    for case in all_cases():
        how = case.options.get("how", plan.FAST)
        assert how == plan.FAST == {"graph": True, "fused": "all", "crf_backend": "triton", "cudnn_benchmark": True}
        if case.function in ("alone", "from_source", "clips_against_cpu", "both") and "nvdec" not in case.options:
            source, cached = case.options.get("source", "frames"), case.options.get("held", False)
            engine = case.options.get("engine", 0.0)
            card = LoaderOptions(16, 112, device="gpu", jpeg_engine=engine, halved=engine == "half")
            route = case.options.get("graph", "operators")
            assert cached or route == card.route({"raw128": "raw", "shards144": "shards"}.get(source, source)), case


class Card:
    """torch.cuda as far as its names and arguments go; what it tells is made up."""

    def __getattr__(self, name: str):
        signature = inspect.signature(getattr(torch.cuda, name))  # an AttributeError where torch has no such name

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            said = {"get_device_name": "NVIDIA stub", "is_available": False}
            said |= {"max_memory_allocated": 2**30, "memory_reserved": 2**31, "mem_get_info": (2**34, 2**36)}
            return Event() if name == "Event" else said.get(name)

        return call


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Setting:
    """The smallest setting, with its data."""
    folder = tmp_path_factory.mktemp("toy")
    setting = setting_of("toy", folder / "data", folder)
    (made,) = data.prepare(setting)
    assert made["what"] == "data drawn and packed"
    (again,) = data.prepare(setting)
    assert again["what"] == "data"
    return setting


COMMON = {"what", "value", "unit", "n"}
KEYS = {  # what a figure of a part tells beside that
    "speed": {"ms", "share_of_eager_floor", "share_of_inductor_floor", "share_of_fused_floor", "mfu", "peak_GiB"},
    "busy": {"kernels_ms", "launches"},
    "alone": {"cores_used"},
    "kernel_alone": {"kB_a_clip"},
    "control_in_graph": {"of", "differ", "worst"},
    "control_torchvision": {"of", "differ", "worst"},
    "share_of_crf": {"ms", "its_kernels_ms"},
    "jpeg": {"kB_an_image"},
    "videos": {"frames_a_video"},
}  # fmt: skip
# One case for each function and each way through it, but for those that have a test below; the others are slow.
QUICK = {
    "copies and product", "floors static", "static fast B=64", "busy static fast B=64", "static eager B=64",
    "bits of fixed algorithms", "nvJPEG on SMs and crops only", "SMs and engine and cores together",
    "NVDEC one session", "FFmpeg on all cores", "loader frames", "loader video by NVDEC", "loader raw128",
    "loader raw128 held", "training from raw128", "clips of frames", "clips of raw128 held", "mixing engine 1",
    "mixing control in the graph", "mixing control torchvision", "feeding", "NVDEC's limits", "kernel alone 128 px",
    "operators of a step fused", "warm static", "memory over 2000 steps",
    "gain of weights cast at once", "stem padded",
}  # fmt: skip


def walked() -> list:
    """All cases but the data's, which the fixture makes, a compiler's, and those on batches that the toy has not."""
    cases = [case for case in all_cases() if case.part != "data" and "compiled" not in case.name]
    cases = [case for case in cases if case.options.get("place", 0) == 0]
    quick = [case for case in cases if case.name in QUICK or case.part == "peers"]
    return [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in cases if case not in quick)]


def on_a_cpu(options):
    """Options with dense pairs in the place of Triton's kernels."""
    if isinstance(options, dict):
        return {name: on_a_cpu(value) for name, value in options.items()}
    return "dense" if options == "triton" else options


@pytest.mark.parametrize("case", walked(), ids=lambda case: case.name.replace(" ", "-"))
def test_every_part_as_far_as_python_goes(toy, monkeypatch, case):
    """The device and the calls of torch.cuda are stubbed; everything else is real, and tiny."""
    monkeypatch.setattr(_Card, "module", Card())
    work = getattr(import_module(case.module), case.function)
    if case.function == "variant_against_eager" and not (toy.out / "eager_losses.json").exists():
        list(checks.eager_against_eager(toy))  # what it is held against, as an earlier case of the plan leaves it
    try:
        found = list(work(toy, **on_a_cpu(case.options)))
    except NotHere as reason:
        assert any(word in str(reason) for word in ("not installed", "TorchCodec", "NVDEC"))
        return
    assert found
    for row in found:
        assert set(row) >= COMMON and row["n"] >= 1 and row["unit"], row
        assert json.loads(json.dumps(row)) == row  # what is written can be read
        # A share is a difference of two times, which at this size is noise.
        assert row["value"] == row["value"] and (row["value"] >= 0 or "share" in row["what"]), row
    assert case.function != "alone" or found[0]["what"].endswith(f", B={case.options.get('batch', 2)}")
    wanted = KEYS.get(case.function, set())
    assert wanted <= set(found[0]), wanted - set(found[0])
    if "control" in case.name:
        assert all("right" not in row and row["what"].startswith("control: ") for row in found), found
    elif case.part == "checks" and "against eager" not in case.name:  # two steps say nothing about a course of losses
        assert all(row["right"] for row in found), found


# ---- Checks and readings that could pass whatever happens.


def test_a_mixed_batch_is_seen(toy, monkeypatch):
    """And one that is only rounded another way is not taken for it."""
    real = mixing.image_batches

    def mixes(setting, groups, engine, depth, read_in_graph=False):
        for number, pixels in enumerate(real(setting, groups, engine, depth, read_in_graph)):
            if depth == 2 and number < 2:
                pixels[0, 5, 5, 1] ^= (4, 32)[number]
            yield pixels

    monkeypatch.setattr(_Card, "module", Card())
    monkeypatch.setattr(mixing, "image_batches", mixes)
    found = [(row["value"], row["differ"], row["worst"], row["right"]) for row in mixing.of_decoder(toy, 0.65)]
    assert found == [(0, 0, 0, True), (1, 2, 32, False)] * 2
    (control,) = mixing.control_in_graph(toy, 1.0)
    assert (control["value"], control["differ"]) == (1, 2) and "right" not in control
    assert mixing.told("", [torch.tensor(float("nan"))])["value"] == 1


def test_a_loader_that_mixes_is_seen(toy, monkeypatch):
    """Its clips are normalised: a difference counts in steps of 255."""
    real, made = mixing.clip_loader, []

    def mixes(*args, **options):
        loader = real(*args, **options)
        made.append(loader)
        if len(made) == 1:
            return loader
        return lambda epoch: (batch._replace(clips=batch.clips + off) for batch in loader(epoch))

    monkeypatch.setattr(_Card, "module", Card())
    monkeypatch.setattr(mixing, "clip_loader", mixes)
    for by, right in ((14, True), (18, False)):
        off = (by / (255 * torch.tensor(mixing.IMAGENET_STD).float())).view(3, 1, 1)
        made.clear()
        (row,) = mixing.of_loader(toy, 0.0)
        assert row["right"] is right and row["differ"] == row["of"] and row["worst"] == pytest.approx(by, abs=0.01)


def test_the_host_is_never_far_ahead_of_the_card(toy, monkeypatch):
    """Of a card that does nothing until it is waited for."""
    queued = done = furthest = 0

    class Slow(Event):
        def record(self):
            self.at = queued

        def synchronize(self):
            nonlocal done
            done = self.at

    def run() -> int:
        nonlocal queued, furthest
        queued += 1
        furthest = max(furthest, queued - done)
        return 1

    card = SimpleNamespace(Event=Slow, synchronize=lambda: None)
    monkeypatch.setattr(_Card, "module", card)
    assert timing.window(dataclasses.replace(toy, seconds=0.01), run) > 0
    assert queued > 20 and furthest <= 8


def test_decoders_are_fed_what_is_ready(toy):
    images = [np.arange(size, dtype=np.uint8) for size in (3, 4, 5)]
    ((first, second),) = decoders.ready(images, 2)  # whole batches only
    assert isinstance(first, decoders.TensorCPU) and np.array_equal(np.array(second), images[1])
    cut = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert [np.array(t).tolist() for (t,) in decoders.ready(cut, 1)] == cut.tolist()


def test_shares_of_decoders_are_medians(toy, monkeypatch):
    turns = iter([({"a": 10.0, "b": 1.0}, 5.0), ({"a": 30.0, "b": 3.0}, 7.0), ({"a": 20.0, "b": 9.0}, 6.0)])
    monkeypatch.setattr(decoders, "at_once", lambda *_: next(turns))
    runs = dict.fromkeys("ab", lambda: 1)
    (row,) = decoders._rows(dataclasses.replace(toy, repeats=3), "x", runs, lambda: 1, 2, {})
    assert (row["value"], row["of a"], row["of b"], row["step_clips_per_s"]) == (14.5, 10, 1.5, 6)


def test_no_case_makes_an_index(toy, monkeypatch):
    """Within its time: all lists have been read when the data is there."""

    def scan(*_, **__):
        raise AssertionError("a list is scanned")

    monkeypatch.setattr("dfer.lists.index.scan", scan)
    for source in project.LISTS:
        assert len(project.index_of(toy, source)) == toy.list_length and len(project.index_of(toy, source, "short")) > 2
    assert project.index_of(toy, "raw128", "held").source == "raw"


def test_each_clip_that_is_held_comes_eight_times(toy):
    count = {name: len(data.rows_of(toy.data / "raw128" / f"{name}.txt")) for name in ("short", "held")}
    assert count["held"] == 8 * count["short"] > 0
    assert project.clip_loader(toy, "raw128", where="cpu", listed="held").options.cached is False


def test_a_loader_that_took_other_options_has_no_figures(toy, monkeypatch):
    """As where the card's kernel fails, and DALI's operators make the clips."""
    monkeypatch.setattr(project.pixels, "why_not", lambda device: "the kernel burns")
    other = lambda options, index: dataclasses.replace(options, graph="operators")  # noqa: E731
    monkeypatch.setattr("dali_pipes.loader.usable", other)
    with pytest.raises(RuntimeError, match="the kernel burns"):
        project.clip_loader(toy, "raw128", where="cpu", listed="short")


def test_wrong_clips_are_seen(toy, monkeypatch):
    real = checks.clip_loader

    def mirrored(setting, source, where="card", **options):
        loader = real(setting, source, where=where, **options)
        if where == "cpu":
            return loader
        return lambda epoch: (batch._replace(clips=batch.clips.flip(-1)) for batch in loader(epoch))

    monkeypatch.setattr(checks, "clip_loader", mirrored)
    assert [row["right"] for row in checks.clips_against_cpu(toy, "frames")] == [False]


def test_a_variant_that_computes_something_else_is_seen(toy):
    bits, eager, wrong = checks.eager_against_eager(toy)
    assert (bits["value"], bits["weights_the_same_bits"]) == (2, True)  # on one thread
    assert eager["right"] and eager["value"] == 0
    assert wrong["value"] > checks.SAME * wrong["rounding"] and eager["known_wrong"] == wrong["value"]
    variants = ({"nudge": 0.3}, {"bf16_input": True})
    verdicts = [next(checks.variant_against_eager(toy, "x", options))["right"] for options in variants]
    assert verdicts == [False, True]
    with pytest.raises(NotHere, match="has not been run"):
        list(checks.variant_against_eager(dataclasses.replace(toy, out=toy.out / "elsewhere"), "x", {}))


def test_a_check_that_would_pass_what_is_wrong_has_no_verdict():
    assert checks.judged(0.1, rounding=0.1, wrong=0.3)["right"] and not checks.judged(0.25, 0.1, 0.3)["right"]
    for wrong in (0.2, float("nan")):
        row = checks.judged(0.1, 0.1, wrong)
        assert "right" not in row and row["verdict"].startswith("proves nothing")


def test_bits_that_differ_are_counted(toy, monkeypatch):
    real, made = checks.training_step, []

    def nudged(setting):
        made.append(real(setting, nudge=1e-6 * len(made)))
        return made[-1]

    monkeypatch.setattr(checks, "training_step", nudged)
    (row,) = checks.eager_for_long(dataclasses.replace(toy, long_train_steps=1))
    assert (row["value"], row["weights_the_same_bits"]) == (0, False) and "eager, 1 steps" in row["what"]


def test_a_graph_of_other_bits_is_seen(toy, monkeypatch):
    real = checks.training_step

    def nudged(setting, graph=False, **how):
        return real(setting, graph=graph, nudge=1e-6 * graph, **how)

    monkeypatch.setattr(checks, "training_step", nudged)
    found = [row["right"] for row in checks.bits_of_fixed_algorithms(dataclasses.replace(toy, long_train_steps=2))]
    assert found == [True, False, False, False]


class Taken:
    """In the place of a step: as many take 1 s as it is told, and the card's clock says that it worked for 0.3."""

    warm_up = 3

    def __init__(self, clock: list[float]):
        self.clock, self.num_taken = clock, 0

    def __call__(self, batch):
        self.num_taken += 1
        self.clock[0] += 1.0

    def worked_s(self):
        return 0.3 * self.num_taken


def test_the_speed_of_a_step_has_its_fellows_beside_it(toy, tmp_path, monkeypatch):
    """Eager's is that of an earlier process; without it, and of another model, there is no ratio."""
    setting, made, clock = dataclasses.replace(toy, out=tmp_path, batches=(2, 4)), [], [0.0]

    def training_step(setting, **options):
        made.append((options, Taken(clock)))
        return made[-1][1]

    monkeypatch.setattr(steps, "training_step", training_step)
    monkeypatch.setattr(steps, "repeated", lambda setting, run: [50.0 + 0 * run(), 60.0, 70.0 + 0 * run()])
    monkeypatch.setattr(steps, "beside_it", lambda *_: {})
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(_Card, "module", Card())

    def found(*case) -> list[dict]:
        return [rows.append(tmp_path / "results.jsonl", row) or row for row in steps.speed(setting, *case)]

    found("static eager", {}, 1)
    made.clear()
    options = {"bf16_input": True}
    (alone,) = found("new", options, 0)
    assert (alone["what"], alone["value"]) == ("step, new, B=2", 60)
    assert alone["busy_by_events"] == pytest.approx(0.3)  # of what is measured alone: the warm-up counts for neither
    assert made[0][0] == options and made[0][1].num_taken == 3 + 2
    monkeypatch.setattr(steps, "repeated", lambda setting, run: [120.0 * run() / 4])
    _, ratio = found("new", options, 1)
    assert (ratio["what"], ratio["value"]) == ("step, new over eager, B=4", 2)
    assert len(found("another model", {"default": True}, 1)) == 1
    assert len(found("static fast", {}, 0)) == 1
    monkeypatch.setattr(steps, "repeated", lambda setting, run: [30.0 * run() / 2])
    _, ratio = found("static eager", {}, 0)  # which comes behind the fast one
    assert (ratio["what"], ratio["value"]) == ("step, static fast over eager, B=2", 2)


def test_a_trace_is_of_warm_steps_and_has_kernels(toy, tmp_path, monkeypatch):
    setting, step = dataclasses.replace(toy, out=tmp_path, batches=(4,)), Taken([0.0])
    before = []

    def traced(setting, run):
        before.append(step.num_taken)
        return trace.Work(0.01, 0.02, 9.0, 0.0)

    monkeypatch.setattr(steps, "training_step", lambda setting, **options: step)
    monkeypatch.setattr(steps, "traced", traced)
    monkeypatch.setattr(_Card, "module", Card())
    rows.append(tmp_path / "results.jsonl", {"event": "figure", "what": "step, new, B=4", "value": 60.0})
    (row,) = steps.busy(setting, "new", {}, 0)
    assert row["what"] == "busy share of a step, new, B=4" and row["value"] == pytest.approx(0.01 * 60 / 4)
    assert before == [3 + setting.warm_up]
    with pytest.raises(NotHere, match="no kernels"):
        trace.recorded(dataclasses.replace(setting, device="cuda"), lambda: None, 1)


def test_a_graph_s_memory_is_what_it_holds(monkeypatch):
    """A replay allocates nothing, so its peak would be that of the weights."""
    monkeypatch.setattr(_Card, "module", Card())
    runs = []
    assert steps.peak_bytes(lambda: runs.append(0), graph=True) == 2**31 and not runs
    assert steps.peak_bytes(lambda: runs.append(0), graph=False) == 2**30 and runs


@pytest.mark.parametrize(("grows", "right"), [("nothing", True), ("card", False), ("host", False)])
def test_memory_that_grows_is_seen(toy, monkeypatch, grows, right):
    taken = {"card": 0, "host": 0, "nothing": 0}

    def step(batch):
        taken[grows] += 11 * 2**20  # of 8 steps 6 come after the first quarter

    monkeypatch.setattr(training, "training_step", lambda setting: step)
    monkeypatch.setattr(training, "clip_loader", lambda *_, **__: lambda epoch: iter([epoch]))
    monkeypatch.setattr(training, "own_memory", lambda: 2**30 + taken["host"])
    card = SimpleNamespace(mem_get_info=lambda: (2**36 - taken["card"], 2**37), synchronize=lambda: None)
    monkeypatch.setattr(_Card, "module", card)
    (row,) = training.soak(toy, {})
    assert row["right"] is right and row["what"].startswith("memory of the card from step 2 to 8, B=2")
    assert (row["value"], row["host_MiB"]) == tuple(66.0 * (grows == name) for name in ("card", "host"))


TRAINS = """
import json, pathlib, signal, sys, time
how = HOW
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
run = pathlib.Path(words["--run.log-dir"]) / words["--run.name"]
begun = run.exists()
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text('{"data": {"batch_size": 64}}')
def row(epoch, values):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 60 * epoch, "epoch": epoch, **values}) + chr(10))
if how == "dies":
    sys.exit(3)
if begun:
    row(2, {"throughput/total_clips_per_s": 2000.0, "throughput/busy": 0.9, "throughput/data_wait_share": 0.1})
    row(2, {"val/WAR": 50.0})
    sys.exit(how == "fails when it goes on")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if how == "is done at once" else 75))
row(1, {"throughput/total_clips_per_s": 1000.0})
row(1, {"val/WAR": 40.0})
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["well", "fails when it goes on", "is done at once", "dies"])
def test_a_run_that_is_stopped_has_to_go_on(toy, tmp_path, monkeypatch, how):
    (tmp_path / "train.py").write_text(TRAINS.replace("HOW", repr(how)))
    monkeypatch.setattr(user, "TRAIN", [sys.executable, str(tmp_path / "train.py")])
    setting = dataclasses.replace(toy, data=tmp_path)
    if how == "dies":
        with pytest.raises(RuntimeError, match="exit code 3 before its second epoch"):
            list(user.as_user(setting))
        return
    for _ in range(2):  # the second time over what the first has left
        speed, end = user.as_user(setting, 16)
        assert (speed["what"], speed["value"], speed["busy"]) == ("train.py as a user, B=64", 2000, 0.9)
        assert (speed["data_wait_share"], speed["step"]) == (0.1, 120) and "mfu" not in speed
        assert end["right"] is (how == "well") and end["evaluated_epochs"] == "[1, 2]"
        codes = {"well": (75, 0), "fails when it goes on": (75, 1), "is done at once": (0, 0)}
        assert (end["value"], end["of_the_same_again"]) == codes[how]


def test_halves_of_a_batch_go_to_two_processes(toy, tmp_path, monkeypatch):
    """Of a batch that is not mixed, which has a part that is none."""
    seen = []
    monkeypatch.setattr(checks.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(checks, "leave", lambda: None)
    monkeypatch.setattr(checks, "gradients", lambda setting, batch, wrap: seen.append(batch) or {})
    for rank in range(2):
        checks.one_of_two(toy, rank, 0, str(tmp_path / "gradients.pt"))
    whole = project.synthetic(toy, 4)
    assert torch.equal(torch.cat([half.clips for half in seen]), whole.clips) and seen[1].ids.tolist() == [2, 3]


def test_gradients_of_another_batch_are_seen():
    """And a gradient that is nothing but rounding is not."""
    want = {"a": torch.ones(4), "b": torch.tensor([1e-9])}
    apart = checks.gradients_apart({"a": torch.ones(4) * 1.01, "b": torch.tensor([-1e-9])}, want)
    assert apart["a"] == pytest.approx(0.01, rel=0.01) and apart["b"] < 1e-4


def test_a_trace_is_read_as_defined():
    """Two steps: kernels that overlap count once in what is busy, twice in the sum."""
    kernels = [("a", 0, 10, 1), ("b", 5, 10, 2), ("c", 100, 4, 3), ("d", 200, 6, 4)]
    events = [
        {"cat": "kernel", "name": name, "ts": at, "dur": took, "args": {"correlation": number}}
        for name, at, took, number in kernels
    ]
    launches = [(1, 1.0), (2, 2.0), (3, 52.0), (4, 60.0)]
    events += [{"cat": "cuda_runtime", "name": "launch", "ts": at, "args": {"correlation": n}} for n, at in launches]
    events += [{"cat": "cpu_op", "name": "dfer::meanfield", "ts": 50.0, "dur": 5.0}, {"name": "nothing"}]
    seen = trace.work(events, 2)
    assert seen == pytest.approx((12.5e-6, 15e-6, 2.0, 2e-6))
    assert trace.union([(0, 1), (2, 3), (2.5, 2.75)]) == 2


def test_what_an_operator_takes_is_read_as_defined():
    """Kernels belong to the call within which they were launched; those of no call to nothing."""
    calls = [("aten::mul", 100), ("aten::view", 0), ("aten::mul", 50), ("dfer::norm", 7)]
    events = [
        {"cat": "user_annotation", "name": f"{trace.CALL}{number}", "ts": 10.0 * number, "dur": 5.0}
        for number in range(4)
    ]
    kernels = [("a", 1, 1.0, 4), ("b", 2, 4.9, 1), ("a", 3, 22.0, 2), ("c", 4, 33.0, 10), ("d", 5, 6.0, 100)]
    for name, number, launched, took in kernels:
        events.append({"cat": "kernel", "name": name, "ts": 500.0, "dur": took, "args": {"correlation": number}})
        events.append({"cat": "cuda_runtime", "name": "x", "ts": launched, "args": {"correlation": number}})
    found = {one.name: one for one in trace.by_operator(events, calls)}
    assert found["aten::mul"] == trace.Operator("aten::mul", pytest.approx(7e-6), 150, 3, "a")
    assert found["dfer::norm"] == trace.Operator("dfer::norm", pytest.approx(10e-6), 7, 1, "c") and len(found) == 2


def test_large_operators_are_told_with_the_rate_of_their_bytes(toy, monkeypatch):
    made = [trace.Operator(name, seconds, 3e6, 2, "k") for name, seconds in (("a", 0.0099), ("b", 0.97), ("c", 0.0201))]
    monkeypatch.setattr(steps, "traced_operators", lambda *_: made)
    monkeypatch.setattr(steps, "training_step", lambda setting, **options: Taken([0.0]))
    monkeypatch.setattr(steps, "copy_rate", lambda setting: 6e6)
    monkeypatch.setattr(_Card, "module", Card())
    total, *found = steps.operators(toy, "new", {})
    assert (total["value"], total["launches"]) == (pytest.approx(1000), 6)
    assert [row["what"].split()[0] for row in found] == ["b", "c"] and found[0]["value"] == pytest.approx(0.97)
    assert found[0]["share_of_copy_rate"] == pytest.approx(3 / 0.97 / 6) and found[1]["ms"] == pytest.approx(20.1)


def test_calls_are_numbered_backwards_too(toy):
    """And what is no operator of the step moves nothing."""
    x = torch.ones(2, 3, requires_grad=True)
    with trace.Numbered() as calls:
        (x @ x.detach().T).sum().backward()
    names = [name for name, _ in calls.calls]
    assert names.count("aten::mm") == 2 and ("aten::mm", 4 * (6 + 6 + 4)) in calls.calls
    assert all(size == 0 for name, size in calls.calls if name in ("aten::t", "aten::transpose.int"))


def test_bytes_and_flop_are_counted_by_hand():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with floor.Watch() as watch:
        (a @ b).view(8).relu()
    assert watch.calls == [("aten::mm", 4 * (6 + 12 + 8), 2 * 2 * 3 * 4), ("aten::relu", 4 * (8 + 8), 0)]
    assert floor.moved([(1.0, 10.0, 0.0), (2.0, 20.0, 5.0)]) == (3, 30)


def test_a_floor_is_the_sum_over_operators():
    """Of each the larger one of its bytes' time and its FLOP's: one that computes hides nothing of one that moves."""
    copying, computing = (100.0, 10.0, 0.0), (0.0, 1.0, 1000.0)
    counts = floor.Counts([copying, computing], [computing], [], [])
    assert counts.flops(4) == 4000
    assert counts.seconds("eager", 4, 10.0, 100.0) == pytest.approx((100 + 40) / 10 + 4000 / 100)
    assert counts.seconds("eager", 4, 10.0, 1e9) == pytest.approx((100 + 40) / 10 + 4 / 10)
    assert counts.seconds("inductor", 4, 10.0, 100.0) == pytest.approx(40)


def test_the_floors_of_a_model(toy):
    """Those that fuse more move less, and compute the same; both models have every operator of theirs counted."""
    static, default = (floor.read_counts(toy, model) for model in (False, True))
    for counts in (static, default):
        assert floor.read_counts(toy, counts is default) == counts  # as it is kept
        a_clip = [floor.moved(rows)[1] for rows in (counts.eager, counts.inductor, counts.fused, counts.needed)]
        assert a_clip == sorted(a_clip, reverse=True) and len(set(a_clip)) == 4
        flops = {sum(flops for _, _, flops in rows) for rows in (counts.eager, counts.inductor, counts.fused)}
        assert len(flops) == 1 and flops == {counts.flops(1)}
        tokens = toy.frames * floor.tokens_a_frame(toy.size)
        assert [row[2] for row in counts.eager].count(2.0 * floor.CRF_MACS * tokens**2) == 1  # one CRF, backwards
    assert default.flops(1) > static.flops(1)
    # Statistics read each map that is normalised once more: as many times as there are such norms.
    extra = len(static.inductor) - len(static.fused)
    assert extra == sum(
        isinstance(m, torch.nn.BatchNorm2d) for m in project.fresh_model(toy, project.config_of(toy)).modules()
    )


def test_what_nvdec_says_is_read(toy, monkeypatch):
    """H.264 with seven engines; nothing else."""

    def ask(pointer):
        caps = pointer._obj
        if caps.codec == 4:
            caps.supported, caps.engines, caps.min_width, caps.min_height = 1, 7, 48, 16
        return 0

    assert ctypes.sizeof(nvdec._Caps) == 88  # as in cuviddec.h
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuvidGetDecoderCaps=ask))
    assert nvdec.limits(toy) == [("h264", 7, 48, 16)]
    (row,) = nvdec.told(toy)
    assert (row["value"], row["unit"], row["engines"]) == (16, "px", 7)


def test_the_copy_rate_of_the_floor_is_the_measured_one(toy, tmp_path):
    setting = dataclasses.replace(toy, out=tmp_path)
    rows.append(tmp_path / "results.jsonl", {"event": "figure", "what": ceilings.COPY, "value": 3e12})
    rows.append(tmp_path / "results.jsonl", {"event": "figure", "what": ceilings.PRODUCT, "value": 7e14})
    assert (ceilings.copy_rate(setting), ceilings.product_rate(setting)) == (3e12, 7e14)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "T4": None}
    assert {name: ceilings.datasheet_flops(name) for name in names} == names


def test_ratios_and_shares_are_the_right_way_round(toy, monkeypatch):
    assert timing.ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b") == [2.0, 3.0]
    monkeypatch.setattr(steps, "in_turns", lambda setting, runs: {"with": [80.0], "without": [100.0]})
    monkeypatch.setattr(steps, "traced", lambda setting, run: trace.Work(0.5, 0.6, 900.0, 0.002))
    row = steps.traced_row(toy, "new", print, batch=100, clips_per_s=200.0)
    assert (row["value"], row["kernels_ms"], row["launches"]) == (1.0, 600, 900)
    monkeypatch.setattr(steps, "training_step", lambda setting, **options: Taken([0.0]))
    monkeypatch.setattr(_Card, "module", Card())  # whose datasheet says 1e12 FLOP/s
    (row,) = steps.share_of_crf(toy, {})
    assert (row["value"], row["ms"], row["its_kernels_ms"]) == pytest.approx((0.2, 25.0, 2.0))
    counts = floor.Counts([(0.0, 4e6, 1e9)], [(0.0, 2e6, 1e9)], [(0.0, 1e6, 1e9)], [])
    asked = []
    monkeypatch.setattr(steps, "read_counts", lambda setting, default: asked.append(default) or counts)
    monkeypatch.setattr(steps, "copy_rate", lambda setting: 1e9)
    monkeypatch.setattr(steps, "product_rate", lambda setting: 1e12)
    told = steps.beside_it(toy, lambda: 1, [100.0, 200.0, 1000.0], 100, {"default": True})  # half a second
    assert asked == [True]
    assert told["ms"] == 500 and told["mfu"] == pytest.approx(100e9 / 1e12 / 0.5) and told["peak_GiB"] == 1
    assert told["share_of_eager_floor"] == pytest.approx(0.4 / 0.5)
    assert told["share_of_inductor_floor"] == pytest.approx(0.2 / 0.5)
    assert told["share_of_fused_floor"] == pytest.approx(0.1 / 0.5)  # 0.1 s of bytes, 0.1 s of FLOP
    found = {row["what"]: row["value"] for row in steps.floors(toy, default=False)}
    assert found["floor, static, inductor, B=2"] == pytest.approx(2 / (2 * 2e6 / 1e9))
