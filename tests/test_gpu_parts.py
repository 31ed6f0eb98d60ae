"""The parts of benchmarks/gpu.py without a card: no typo is left for the card, and checks that can fail."""

import ctypes
import dataclasses
import inspect
import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from benchmarks import floor
from benchmarks.gpu_parts import ceilings, checks, data, mixing, nvdec, rows, steps, timing, trace
from benchmarks.gpu_parts.card import _Card
from benchmarks.gpu_parts.plan import PARTS, all_cases
from benchmarks.gpu_parts.setting import NotHere, Setting, setting_of


def test_the_plan_names_what_there_is():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases) and {case.part for case in cases} == set(PARTS)
    for case in cases:
        work = getattr(import_module(case.module), case.function)
        inspect.signature(work).bind(None, **case.options)
    on_card = [case.proven for case in cases if case.gpu]
    assert on_card == sorted(on_card, reverse=True)  # the proven figures come first
    suspects = ("engine 0.65", "engine 1", "Triton", "compiled", "bf16", "cudnn", "engines", "NVDEC, all", "two proc")
    for case in cases:
        assert not (case.proven and any(word in case.name for word in suspects)), case.name


class Card:
    """torch.cuda as far as its names and arguments go; what it tells is made up."""

    def __getattr__(self, name: str):
        signature = inspect.signature(getattr(torch.cuda, name))  # an AttributeError where torch has no such name

        def call(*args, **kwargs):
            signature.bind(*args, **kwargs)
            return {"get_device_name": "NVIDIA stub", "is_available": False, "max_memory_allocated": 2**30}.get(name)

        return call


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
    "eager": {
        "ms", "busy_share", "kernels_ms", "launches", "share_of_floor", "share_of_eager_floor", "mfu", "peak_GiB"
    },
    "alone": {"cores_used", "others_used", "B"},
    "share_of_crf": {"ms", "its_kernels_ms"},
    "jpeg": {"kB_an_image"},
    "videos": {"frames_a_video"},
}  # fmt: skip
# One case for each function and each way through it; the others, which take the same ways, are slow.
QUICK = {
    "copies and product", "SMs, engine and cores together", "nvJPEG on SMs, crops", "NVDEC, one session",
    "FFmpeg on all cores", "loader frames", "loader raw128 held", "eager 0", "training from video", "clips of frames",
    "clips of raw128 held", "mixing, engine 1", "feeding", "share of the CRF, dense", "step, bf16 input",
    "NVDEC's limits",
}  # fmt: skip


def walked() -> list:
    """All cases but the data's, which the fixture makes, and those whose options a CPU cannot take."""
    cases = [c for c in all_cases() if c.part != "data" and not any(word in str(c) for word in ("triton", "compiled"))]
    cases = [case for case in cases if case.options.get("place", 0) == 0 and "other batches" not in case.name]
    quick = [case for case in cases if case.name in QUICK or case.part == "peers"]
    return [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in cases if case not in quick)]


@pytest.mark.parametrize("case", walked(), ids=lambda case: case.name.replace(" ", "-"))
def test_every_part_as_far_as_python_goes(toy, one_thread, monkeypatch, case):
    """The device and the calls of torch.cuda are stubbed; everything else is real, and tiny."""
    monkeypatch.setattr(_Card, "module", Card())
    work = getattr(import_module(case.module), case.function)
    try:
        found = list(work(toy, **case.options))
    except NotHere as reason:
        assert any(word in str(reason) for word in ("not installed", "TorchCodec", "NVDEC"))
        return
    assert found
    for row in found:
        assert set(row) >= COMMON and row["n"] >= 1 and row["unit"], row
        assert json.loads(json.dumps(row)) == row  # what is written can be read
        # A share is a difference of two times, which at this size is noise.
        assert row["value"] == row["value"] and (row["value"] >= 0 or "share" in row["what"]), row
    wanted = KEYS.get(case.function, set())
    assert wanted <= set(found[0]), wanted - set(found[0])
    if case.part == "checks" and "against eager" not in case.name:  # two steps say nothing about a course of losses
        assert all(row["right"] for row in found), found


# ---- Checks and readings that could pass whatever happens.


def test_a_mixed_batch_is_seen(toy, monkeypatch):
    real = mixing.image_batches

    def mixes(setting, groups, engine, depth):
        for number, pixels in enumerate(real(setting, groups, engine, depth)):
            if depth == 2 and number == 1:
                pixels[0, 5, 5, 1] ^= 32
            yield pixels

    monkeypatch.setattr(_Card, "module", Card())
    monkeypatch.setattr(mixing, "image_batches", mixes)
    assert [(row["value"], row["worst"], row["right"]) for row in mixing.of_decoder(toy, 0.65)] == [
        (0, 0, True),
        (1, 32, False),
    ] * 2


def test_wrong_clips_are_seen(toy, monkeypatch):
    real = checks.clip_loader

    def mirrored(setting, source, where="card", **options):
        loader = real(setting, source, where=where, **options)
        if where == "cpu":
            return loader
        return lambda epoch: (batch._replace(clips=batch.clips.flip(-1)) for batch in loader(epoch))

    monkeypatch.setattr(checks, "clip_loader", mirrored)
    assert [row["right"] for row in checks.clips_against_cpu(toy, "frames")] == [False]


def test_a_variant_that_computes_something_else_is_seen(toy, one_thread):
    (eager,) = checks.eager_against_eager(toy)
    assert eager["right"] and eager["value"] == 0  # on one thread
    variants = ({"nudge": 0.0}, {"nudge": 0.3}, {"bf16_input": True})
    verdicts = [next(checks.variant_against_eager(toy, "x", options))["right"] for options in variants]
    assert verdicts == [True, False, True]
    with pytest.raises(NotHere, match="has not been run"):
        list(checks.variant_against_eager(dataclasses.replace(toy, out=toy.out / "elsewhere"), "x", {}))


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


def test_bytes_are_counted_by_hand():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with floor.Watch() as watch:
        (a @ b).view(8).relu()
    assert watch.needed == 4 * (6 + 12 + 8) and watch.eager == watch.needed + 4 * (8 + 8)
    counts = floor.Counts(1e9, 1e6, 2e6, 1e6, 9e6)
    assert (counts.flops(4), counts.needed(4), counts.eager(4)) == (4e9, 9e6, 37e6)
    assert floor.floor_seconds(9e6, 4e9, 9e6, 1e15) == pytest.approx(1.0)  # bytes
    assert floor.floor_seconds(9e6, 4e9, 9e15, 1e9) == pytest.approx(4.0)  # FLOP


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
    assert ceilings.copy_rate(setting) == 3e12
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "T4": None}
    assert {name: ceilings.datasheet_flops(name) for name in names} == names


def test_ratios_and_shares_are_the_right_way_round(toy, monkeypatch):
    assert timing.ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b") == [2.0, 3.0]
    monkeypatch.setattr(steps, "in_turns", lambda setting, runs: {"with": [80.0], "without": [100.0]})
    monkeypatch.setattr(steps, "traced", lambda setting, run: trace.Work(0.5, 0.6, 900.0, 0.002))
    (row,) = steps.share_of_crf(toy, "dense")
    assert (row["value"], row["ms"], row["its_kernels_ms"]) == pytest.approx((0.2, 25.0, 2.0))
    counts = floor.Counts(1e9, 0.0, 1e6, 0.0, 4e6)
    monkeypatch.setattr(steps, "read_counts", lambda setting: counts)
    monkeypatch.setattr(steps, "copy_rate", lambda setting: 1e9)
    monkeypatch.setattr(_Card, "module", Card())  # whose datasheet says 1e12 FLOP/s
    told = steps.beside_it(toy, lambda: 1, [100.0, 200.0, 1000.0], batch=100)  # half a second
    assert told["ms"] == 500 and told["busy_share"] == 1 and told["kernels_ms"] == 600 and told["launches"] == 900
    assert told["mfu"] == pytest.approx(100e9 / 1e12 / 0.5) and told["peak_GiB"] == 1
    assert told["share_of_floor"] == pytest.approx(0.1 / 0.5)  # 0.1 s of bytes, 0.1 s of FLOP
    assert told["share_of_eager_floor"] == pytest.approx(0.4 / 0.5)
