"""benchmarks/gpu.py without a card: what children do to themselves costs nothing else, and no part has a typo."""

import inspect
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.gpu_parts import rows, runner
from benchmarks.gpu_parts.plan import PARTS, all_cases
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
    assert failed["segfaults"].startswith("died of SIGSEGV")
    assert failed["raises"].startswith("ValueError: of no use: in two lines (child.py:")
    assert failed["hangs"].startswith("not done after 0.7 s: killed")
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
    out, _ = accidents
    table = (out / "table.md").read_text()
    assert table.startswith("card none, cores 2")
    assert "part | first | something | 2 | clips/s | 3 | 1 to 4 | right" in table
    assert "- part, segfaults: died of SIGSEGV" in table and "- part, is_not_here: no such library" in table
    assert table.endswith("WRONG:\n\n- part, is_wrong: mixed batches: 3 batches\n")
    assert not list(out.glob("*.partial"))


def test_the_budget_ends_it_in_the_middle(tmp_path):
    cases = [case for case in gpu_cases.CASES if case.name in ("first", "sleeps", "last")]
    cases = [cases[0], cases[2], cases[1]]
    began = time.monotonic()
    runner.run_all(cases, tmp_path, 2.0, gpu_cases.command(tmp_path), ABOUT)
    assert time.monotonic() - began < 6
    found, _ = rows.read(tmp_path / "results.jsonl")
    assert of(found, "figure") == {"first": "something", "sleeps": "before it sleeps"}
    assert of(found, "failed")["sleeps"].startswith("ended by the budget")
    assert of(found, "left out") == {"last": "the budget of 2 s was used up"}
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
    first_alone = next(i for i, case in enumerate(cases) if not case.proven)
    assert not any(case.proven for case in cases[first_alone:])  # the proven figures come first
    suspects = ("engine 0.65", "engine 1", "Triton", "compiled", "bf16", "cudnn", "engines", "NVDEC, all", "two proc")
    for case in cases:
        assert not (case.proven and any(word in case.name for word in suspects)), case.name
