"""benchmarks/gpu.py without a card: what children do to themselves costs nothing else, and no part has a typo."""

import ctypes
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import floor, gpu
from benchmarks.gpu_parts import ceilings, checks, data, mixing, nvdec, rows, runner, steps, timing, trace
from benchmarks.gpu_parts.card import _Card
from benchmarks.gpu_parts.plan import PARTS, all_cases
from benchmarks.gpu_parts.setting import NotHere, Setting, setting_of
from tests import gpu_cases
from tests.conftest import ROOT, run_python

ABOUT = {"card": "none", "cores": 2}


def of(found: list[dict], event: str) -> dict[str, str]:
    """Case -> reason, or what was measured."""
    return {row["case"]: row.get("reason", row.get("what")) for row in found if row.get("event") == event}


@pytest.fixture(scope="module")
def accidents(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run of all that can happen to a child."""
    out = tmp_path_factory.mktemp("accidents")
    cases = [case for case in gpu_cases.CASES if case.name != "sleeps"]
    runner.run_all(cases, out, 120.0, gpu_cases.command(out), ABOUT)
    return out, rows.read(out / "results.jsonl")[0]


def test_what_happens_to_a_child_costs_its_own_case_only(accidents):
    _, found = accidents
    fine = {case.name for case in gpu_cases.CASES if case.function == "fine"}
    assert fine | {"is_wrong"} == set(of(found, "end"))
    failed = of(found, "failed")
    assert set(failed) == {"segfaults", "raises", "leaves", "hangs", "exhausts_memory", "is_killed"}
    assert failed["segfaults"].startswith("died of SIGSEGV: File") and failed["segfaults"].endswith("in segfaults")
    assert failed["raises"].startswith("ValueError: of no use: in two lines (child.py:")
    assert failed["hangs"].startswith("not done after 0.7 s: killed: File") and failed["hangs"].endswith("in hangs")
    assert failed["exhausts_memory"].startswith("MemoryError")
    assert failed["is_killed"].startswith("died of SIGKILL (out of memory?)")
    assert failed["leaves"].startswith("its process ended without it")
    assert of(found, "left out") == {"is_not_here": "no such library"}
    figures = of(found, "figure")
    assert figures["segfaults"] == "before it" and figures["raises"] == "before it"  # what came before is there


def test_proven_cases_share_a_child_until_one_of_them_ends_it(accidents):
    found = [row for row in accidents[1] if row.get("what") == "something"]
    process = {row["case"]: row["process"] for row in found}
    assert len(set(process.values())) == len(process)  # each of these came after an accident, or is not proven
    assert [row["n"] for row in found] == [3] * len(found) and {row["value"] for row in found} == {2.0}


def test_nothing_outlives_a_child_that_was_killed(accidents):
    (pid,) = (int(row["value"]) for row in accidents[1] if row.get("what") == "its process")
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_memory_runs_out_in_the_child_first(accidents):
    (points,) = (row["value"] for row in accidents[1] if row.get("what") == "adjusted")
    assert points == 1000


def test_logs_say_where_a_child_was_and_on_what(accidents):
    (log,) = (path for path in (accidents[0] / "logs").iterdir() if "in hangs" in path.read_text())
    assert log.read_text().startswith("# card none, cores 2") and "gpu_cases.py" in log.read_text()


def test_the_table_has_it_all(accidents):
    out, found = accidents
    table = (out / "table.md").read_text()
    assert table.startswith("card none, cores 2")
    assert "part | first | something | 2 | clips/s | 3 | 1 to 4 | right" in table
    assert "- part, segfaults: died of SIGSEGV" in table and "- part, is_not_here: no such library" in table
    assert table.endswith("WRONG:\n\n- part, is_wrong: mixed batches: 3 batches\n")
    ends = [row for row in found if row.get("event") == "end"]
    assert all(row["seconds"] > 0 and row["cores_used"] >= 0 <= row["foreign_cores"] for row in ends)
    assert not list(out.glob("*.partial"))


def test_who_was_disturbed_is_told():
    found = [{"event": "end", "part": "part", "case": str(cores), "foreign_cores": cores} for cores in (0.05, 1.5)]
    assert rows.table(found).endswith("cores:\n\n- part, 1.5: 1.50 cores\n")


def test_the_budget_ends_it_in_the_middle(tmp_path):
    cases = [case for case in gpu_cases.CASES if case.name in ("first", "sleeps", "last")]
    cases = [cases[0], cases[2], cases[1]]
    began = time.monotonic()
    runner.run_all(cases, tmp_path, 2.0, gpu_cases.command(tmp_path), ABOUT)
    assert time.monotonic() - began < 6
    found, _ = rows.read(tmp_path / "results.jsonl")
    assert of(found, "figure") == {"first": "something", "sleeps": "before it sleeps"}
    left_out = of(found, "left out")
    assert left_out["sleeps"].startswith("ended by the budget") and left_out["last"] == "the budget of 2 s was used up"
    assert not of(found, "failed")
    assert "before it sleeps" in (tmp_path / "table.md").read_text()


def test_a_signal_leaves_the_table(tmp_path):
    """As `timeout` sends it."""
    code = (
        "import signal, sys; from pathlib import Path; from tests import gpu_cases; "
        "from benchmarks.gpu_parts import runner; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
        f"out = Path({str(tmp_path)!r}); cases = [c for c in gpu_cases.CASES if c.name in ('first', 'sleeps')]; "
        "runner.run_all(cases, out, 60.0, gpu_cases.command(out), {})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while "before it sleeps" not in str(rows.read(tmp_path / "results.jsonl")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert "- part, sleeps: ended by SystemExit" in (tmp_path / "table.md").read_text()


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    path = tmp_path / "results.jsonl"
    rows.append(path, {"event": "begin"})
    with open(path, "a") as file:
        file.write('{"event": "fig')
    found, place = rows.read(path)
    assert found == [{"event": "begin"}]
    with open(path, "a") as file:
        file.write('ure"}\nno row\n')
    assert rows.read(path, place)[0] == [{"event": "figure"}]


def test_the_parent_has_no_way_to_the_card():
    """Neither torch nor DALI is loaded there."""
    code = (
        "import sys; sys.argv = ['gpu.py', '--list']; sys.path.insert(0, '.'); from benchmarks import gpu; gpu.main()"
    )
    code += "; print('loaded', [m for m in sys.modules if m.split('.')[0] in ('torch', 'nvidia', 'numba')])"
    done = run_python("-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "loaded []", done.stderr
    assert "libjpeg-turbo on all cores" in done.stdout


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
        assert row["value"] == row["value"] and row["value"] >= 0, row
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
                pixels[0, 5, 5, 1] ^= 1
            yield pixels

    monkeypatch.setattr(_Card, "module", Card())
    monkeypatch.setattr(mixing, "image_batches", mixes)
    assert [(row["value"], row["right"]) for row in mixing.of_decoder(toy, 0.65)] == [(0, True), (1, False)] * 2


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


@pytest.mark.parametrize(
    ("words", "message"), [(["--parts", "loader"], "no part 'loader'; there are data"), (["--budget", "0"], "'0'")]
)
def test_bad_arguments_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        gpu.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.startswith("gpu.py: ") and error.count("\n") == 1


def test_fewer_cores_than_a_case_asks_for_leave_it_out():
    def names(gpu_there: bool, cores: int) -> list[str]:
        return [case.name for case in gpu.chosen(["loaders"], False, gpu_there, cores) if case.cores]

    assert names(False, 2) == ["CPU loader, cores: all", "CPU loader, cores: 1"]
    assert names(True, 16)[-1] == "CPU loader, cores: 8"
    assert not any(case.gpu for case in gpu.chosen(list(PARTS), True, False, 2))


def test_the_script_for_a_machine_goes_on_whatever_happens(tmp_path):
    """With a Python that writes down what it is asked: one file's tests die, another's hang."""
    python, asked = tmp_path / "python", tmp_path / "asked.txt"
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {asked}\necho "said of ${{@: -1}}"\n'
        'case "$*" in *test_doctor*) kill -SEGV $$ ;; *test_finite*) sleep 30 ;;\n'
        '*peers*) echo "a table"; exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out), "TEST_SECONDS": "1", "BUDGET": "90"}
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "a table" in done.stdout
    told = dict(line.split(": ", 1) for line in (out / "tests.txt").read_text().splitlines())
    assert set(told) >= {f"tests/test_{name}.py" for name in ("crf_triton", "dali_pipes", "doctor", "finite")}
    assert told["tests/test_doctor.py"].startswith("exit code 139;")
    assert told["tests/test_finite.py"].startswith("exit code 124;")
    assert told["tests/test_crf_triton.py"] == "exit code 0; said of tests/test_crf_triton.py"
    assert (out / "tests" / "test_doctor.txt").read_text().startswith("said of --list\n")
    commands = asked.read_text().splitlines()
    (last,) = (line for line in commands if "--peers" in line)
    words = last.split()
    assert 60 <= int(words[words.index("--budget") + 1]) <= 90 and words[words.index("--out") + 1] == str(out)
    gpu.parse(words[1:])
    assert f"benchmarks/gpu.py --parts data --out {out}/data" in commands and commands[-1] == last


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
