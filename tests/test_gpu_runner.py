"""benchmarks/gpu.py: what children do to themselves, a budget and a signal cost nothing that is not theirs."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu, quiet
from benchmarks.gpu_parts import rows, runner
from benchmarks.gpu_parts.plan import PARTS
from tests import gpu_cases
from tests.conftest import ROOT, run_python
from tests.nursery import Nursery, python_path

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
    assert failed["hangs"].startswith("not done after 1.5 s: killed: File") and failed["hangs"].endswith("in hangs")
    assert failed["exhausts_memory"].startswith("MemoryError")
    assert failed["is_killed"].startswith("died of SIGKILL (out of memory?)")
    assert failed["leaves"].startswith("its process ended without it")
    assert of(found, "left out") == {"is_not_here": "no such library"}
    figures = of(found, "figure")
    assert figures["segfaults"] == "before it" and figures["raises"] == "before it"  # what came before is there


def test_a_series_shares_a_child_until_a_case_ends_it(accidents):
    found = [row for row in accidents[1] if row.get("what") == "something"]
    process = {row["case"]: row["process"] for row in found}
    assert len(set(process.values())) == len(process)  # each of these came after an accident, or is no series
    assert [row["n"] for row in found] == [3] * len(found) and {row["value"] for row in found} == {2.0}


def test_nothing_outlives_a_child_that_was_killed(accidents):
    (pid,) = (int(row["value"]) for row in accidents[1] if row.get("what") == "its process")
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_memory_runs_out_in_the_child_first(accidents):
    (row,) = (row for row in accidents[1] if row.get("what") == "adjusted")
    assert row["value"] == 1000 and row["core_file_bytes"] == 0


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
    machine = {"event": "machine", "others": rows.OTHERS_UNKNOWN}
    table = rows.table([machine, *found])
    assert "NOT QUIET" not in table and "Whether others used the cores cannot be told here" in table


@pytest.mark.parametrize(("cores", "listed", "told"), [(2, 2, True), (2, 16, False), (1, 2, False)])
def test_a_container_on_a_larger_host_is_known(monkeypatch, cores, listed, told):
    stat = "cpu  1 2 3\n" + "".join(f"cpu{i} 1 2 3\n" for i in range(listed)) + "intr 1\n"
    monkeypatch.setattr(quiet.Path, "read_text", lambda path: stat)
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    assert quiet.counts_others(cores) is told


def test_what_no_mixed_batch_is_worth_is_told():
    row = {"event": "figure", "part": "checks", "case": "mixing", "value": 0, "unit": "batches", "n": 1}
    found = [row | {"what": f"{rows.MIXED}: loader"}]
    assert "is above 0; here no control ran." in rows.table(found)
    found += [row | {"what": f"{rows.CONTROL}: {value}", "value": value} for value in (0, 3)]
    assert "here 1 of 2 controls mixed." in rows.table(found) and "WRONG" not in rows.table(found)
    assert "controls" not in rows.table([row | {"what": "something"}])


def test_the_budget_ends_it_in_the_middle(tmp_path):
    cases = [case for case in gpu_cases.CASES if case.name in ("first", "sleeps", "last")]
    cases = [cases[0], cases[2], cases[1]]
    began = time.monotonic()
    runner.run_all(cases, tmp_path, 3.0, gpu_cases.command(tmp_path), ABOUT)
    assert time.monotonic() - began < 7
    found, _ = rows.read(tmp_path / "results.jsonl")
    assert of(found, "figure") == {"first": "something", "sleeps": "before it sleeps"}
    left_out = of(found, "left out")
    assert left_out["sleeps"].startswith("ended by the budget") and left_out["last"] == "the budget of 3 s was used up"
    assert not of(found, "failed")
    assert "before it sleeps" in (tmp_path / "table.md").read_text()


def test_a_signal_leaves_the_table(tmp_path):
    """As a terminal that is gone sends it; `timeout` sends another, which is caught the same way."""
    code = (
        "import signal, sys; from pathlib import Path; from tests import gpu_cases; "
        "from benchmarks import gpu; from benchmarks.gpu_parts import runner; gpu.exit_on_signals(); "
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL; "
        f"out = Path({str(tmp_path)!r}); cases = [c for c in gpu_cases.CASES if c.name in ('first', 'sleeps')]; "
        "runner.run_all(cases, out, 60.0, gpu_cases.command(out), {})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while "before it sleeps" not in str(rows.read(tmp_path / "results.jsonl")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        assert process.wait(10) == 129
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


def test_the_parent_has_no_way_to_the_card(tmp_path):
    """Neither torch nor DALI is loaded there; and somebody else's package of that name is not taken for ours."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('of somebody else')")
    code = (
        "import sys; sys.argv = ['gpu.py', '--list']; sys.path.insert(0, '.'); from benchmarks import gpu; gpu.main()"
    )
    code += "; print('loaded', [m for m in sys.modules if m.split('.')[0] in ('torch', 'nvidia', 'numba')])"
    done = run_python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "loaded []", done.stderr
    assert "libjpeg-turbo on all cores" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "loader"], "no part 'loader'; there are data"),
        (["--budget", "0"], "'0'"),
        (["--cases", "busy *,bussy *"], "no case 'bussy *'; --list prints them"),
    ],
)
def test_bad_arguments_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        gpu.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.startswith("gpu.py: ") and error.count("\n") == 1


def test_fewer_cores_than_a_case_asks_for_leave_it_out():
    def names(gpu_there: bool, cores: int) -> list[str]:
        return [case.name for case in gpu.chosen(["loaders"], False, gpu_there, cores) if case.cores]

    assert names(False, 2) == ["CPU loader on all cores", "CPU loader on 1 core"]
    assert names(True, 16)[-1] == "CPU loader on 8 cores"
    assert not any(case.gpu for case in gpu.chosen(list(PARTS), True, False, 2))


def test_cases_are_chosen_by_part_or_by_name():
    """The data comes first, whatever is chosen, but for what fills a cache beside its drawing."""

    def names(parts: list[str], patterns: list[str], peers: bool = False) -> list[str]:
        return [case.name for case in gpu.chosen(parts, peers, True, 16, patterns)]

    by_default = names(gpu.parse([]).parts, [])
    assert "static fast B=64" in by_default and not any("peer" in name or "warm" in name for name in by_default)
    assert any("peer" in name for name in names(["step"], [], peers=True))
    assert names(["warm"], []) == ["warm static", "warm default"]
    assert names(["step"], ["loader frames", "peer s*"]) == [
        *("data", "counts", "loader frames", "peer simplejpeg_and_copy", "peer spdl"),
    ]
    assert gpu.parse(["--cases", "busy *,data"]).cases == ["busy *", "data"]


def test_the_list_tells_who_shares_a_child_and_what_needs_a_card(capsys, monkeypatch):
    monkeypatch.setattr(gpu.rows, "machine", lambda: {"card": None, "cores": 2})
    assert gpu.main(["--list", "--cases", "static fast B=*,warm static,feeding"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "data data",
        "data + counts",
        "warm warm static (on a GPU)",
        "step static fast B=64 (on a GPU)",
        *(f"step + static fast B={batch} (on a GPU)" for batch in (16, 128, 256)),
        "loaders feeding",
    ]


def test_further_cases_are_added_to_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_all", lambda *_: None)
    monkeypatch.setattr(gpu, "exit_on_signals", lambda: None)
    (tmp_path / "logs").mkdir()
    for words, kept in ((["--cases", "data"], True), ([], False)):
        row = {"part": "part", "case": "earlier", "reason": "a fault"}
        rows.append(tmp_path / "results.jsonl", {"event": "failed", **row})  # of an earlier call: not this one's
        assert gpu.main(["--out", str(tmp_path), *words]) == 0
        assert (tmp_path / "results.jsonl").exists() is kept is (tmp_path / "logs").exists()


GPU_TESTS = [path for path in sorted(ROOT.glob("tests/test_*.py")) if "mark.gpu\n" in path.read_text()]
PYTHON = r"""#!/bin/bash
# Writes down what it is asked, and has accidents: with one file's tests, and in another's.
echo "$@" >> "$ASKED"
case "$*" in
    *test_dali*) kill -SEGV $$ ;;
    *test_doctor*) cat "$LOG"; sleep 30 ;;
    *"-m pytest"*) echo "==== 3 passed, 1 skipped in 0.10s ====" ;;
    *version_tuple*) echo "$CAN" ;;
    *"--parts warm"*) sleep 30 ;;
    *peers*)
        echo "a table"; echo "{}" > "${@: -1}/results.jsonl"
        [ -z "$HANGS" ] || { echo $$ > "$HANGS"; sleep 30; }
        exit 1 ;;
esac
"""
LOGS = {  # what pytest prints of two tests that end, with something printed between, and of one that does not
    "": "tests/test_doctor.py::test_a[b c] PASSED   [ 16%]\ntests/test_doctor.py::test_a[d] Timeout (0:00:04)!\n"
    "PASSED     [ 33%]\ntests/test_doctor.py::test_b[e f] \n\n!!! KeyboardInterrupt !!!\n=== 2 passed in 2s ===",
    "workers leave": "tests/test_doctor.py::test_b[e f] \ntests/test_doctor.py::test_a[b c] \n"
    "[gw0] [ 16%] PASSED tests/test_doctor.py::test_a[b c] \ntests/test_doctor.py::test_a[d] Timeout (0:00:04)!\n"
    "[gw0] [ 33%] FAILED tests/test_doctor.py::test_a[d] \nFAILED tests/test_doctor.py::test_a[d] - assert 0\n"
    "!!! KeyboardInterrupt !!!\n=== 1 failed, 1 passed in 2s ===",
}


def script(folder: Path, can: str = "", hangs: str = "") -> subprocess.Popen:
    """Start benchmarks/gpu.sh with such a Python."""
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    (folder / "log").write_text(LOGS[can])
    names = {name.upper(): str(folder / name) for name in ("python", "out", "asked", "log", "back")}
    environment = {**os.environ, **names, "TEST_SECONDS": "1", "BUDGET": "90", "CAN": can, "HANGS": hangs}
    return subprocess.Popen(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("can", LOGS)
def test_the_script_for_a_machine_goes_on_whatever_happens(tmp_path, can):
    """One file's tests die, another's hang, and so does what is compiled ahead."""
    process = script(tmp_path, can)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "a table" in printed
    told = dict(line.split(": ", 1) for line in (tmp_path / "out" / "tests.txt").read_text().splitlines())
    files = {str(path.relative_to(ROOT)) for path in GPU_TESTS}
    assert len(files) > 10 and told.keys() == files | {f"all {len(files)} files"}  # each has a verdict
    assert told.pop("tests/test_dali_pipes.py").startswith("exit code 139;")
    verdict, result = ("2 passed", (2, 0)) if not can else ("1 failed, 1 passed", (1, 1))
    hung = f"exit code 124; without a verdict: test_b[e f]; {verdict} in 2s"
    assert told.pop("tests/test_doctor.py") == hung
    fine, passed, failed = len(files) - 2, 3 * (len(files) - 2) + result[0], result[1]
    in_all = f"{fine} with exit code 0; {passed} passed, {failed} failed, {fine} skipped, 0 errors"
    assert told.popitem()[1] == in_all
    assert set(told.values()) == {"exit code 0; 3 passed, 1 skipped in 0.10s"}
    commands = (tmp_path / "asked").read_text().splitlines()
    parts = [line.split("--parts ")[1].split()[0] for line in commands if "--parts" in line]
    assert parts == ["data", "warm"] and "--peers" in commands[-1]
    words = commands[-1].split()
    assert 60 <= int(words[words.index("--budget") + 1]) <= 90
    assert words[words.index("--out") + 1] == str(tmp_path / "out")
    gpu.parse(words[1:])
    workers = {line.split()[-1]: re.findall(r"-n (\d)", line) for line in commands if "-m pytest" in line}
    assert workers["tests/test_graph.py"] == ["3"] * bool(can) and workers["tests/test_finite.py"] == ["1"] * bool(can)
    check_what_was_kept(tmp_path)


def check_what_was_kept(folder: Path) -> None:
    """Few files, whole ones, and all others in one."""
    out, back = folder / "out", folder / "back"
    assert {path.name for path in back.iterdir()} <= {"cases.txt", "gpu.txt", "results.jsonl", "rest.tgz", "tests.txt"}
    assert (back / "results.jsonl").read_text() == "{}\n"
    with tarfile.open(back / "rest.tgz") as archive:
        names = {os.path.normpath(name) for name in archive.getnames()}
        assert names == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} >= {"gpu.txt"}
        assert archive.extractfile("./tests/test_doctor.txt").read() == (out / "tests" / "test_doctor.txt").read_bytes()


def test_a_signal_ends_the_script_and_all_that_it_began(tmp_path):
    process = script(tmp_path, hangs=str(tmp_path / "pid"))
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and time.monotonic() - began < 15
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    check_what_was_kept(tmp_path)


NOT_THERE = [
    "scenedetect",
    "onnx",
    "onnxruntime",
    "gradio",
    "wandb",
    "hypothesis",
    "matplotlib",
    "jinja2",
    "tensorboard",
    "sphinx",
    "openpyxl",
]
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
assert sys.modules["scenedetect"] is None
print("all")
"""


@pytest.mark.slow
def test_tests_and_figures_of_a_card_need_few_packages(tmp_path, monkeypatch):
    """On a machine that has not all: as a child imports them, and as the process does that has scripts in forks."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({NOT_THERE}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files = (*GPU_TESTS, *sorted(ROOT.glob("benchmarks/gpu_parts/*.py")))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    done = run_python("-c", IMPORTED, *names, "tests.two_processes", "train", PYTHONPATH=python_path())
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr
    nursery = Nursery()
    try:
        done = nursery.run(["-c", IMPORTED, "train"], {**os.environ, "PYTHONPATH": python_path()}, 60)
    finally:
        nursery.close()
    assert done.returncode == 0 and done.stdout == "all\n", done.stderr


def test_what_is_started_finds_libraries_that_lie_elsewhere(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a:/b")
    assert python_path() == f"{ROOT}:/a:/b"
    monkeypatch.delenv("PYTHONPATH")
    assert python_path() == str(ROOT)
