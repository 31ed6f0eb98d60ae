"""What all commands share: a user's error is one line and exit code 2, a defect of ours keeps its traceback."""

import contextlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dfer.__main__ import commands
from dfer.cli import UserError, one_line_errors, progress, say_error, usable_cores
from tests.conftest import ROOT


def users_error():
    raise UserError("list.txt:3: wrong\nin two lines")


DEFECTS = {
    "a zip of unequal parts": lambda: list(zip([1], [], strict=True)),
    "unpacking": lambda: [a for a, _ in [(1, 2, 3)]],
    "the largest of none": lambda: max([]),
    "a number in a text of ours": lambda: int("x"),
    "a key": lambda: {}["x"],
}


def test_a_users_error_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert one_line_errors("pack", users_error) == 2
    assert capsys.readouterr().err == "pack: list.txt:3: wrong\\nin two lines\n"
    assert one_line_errors("pack", lambda: None) == 0 and one_line_errors("pack", lambda: 75) == 75


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_keeps_its_traceback(defect):
    with pytest.raises((ValueError, KeyError)):
        one_line_errors("pack", DEFECTS[defect])


@pytest.mark.parametrize(("raising", "code"), [("UserError('a')", 2), ("ValueError('a')", 1)])
def test_exit_codes(raising, code):
    program = f"import sys; from dfer.cli import *\ndef f(): raise {raising}\nsys.exit(one_line_errors('x', f))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (code == 1) and (done.stderr == "x: a\n") == (code == 2)


def test_before_the_ranks_have_joined_one_of_them_speaks(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        assert one_line_errors("train.py", users_error) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_a_line_is_written_in_one_piece(monkeypatch):
    """Two ranks write to the same terminal."""
    pieces = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))
    say_error("train.py: rank 2: gone")
    assert pieces == ["train.py: rank 2: gone\n"]


def test_progress_passes_everything_on_and_says_how_far_it_is(capsys):
    assert "".join(progress(iter("abcdefghijklmnop"), 20, "clips", done=4)) == "abcdefghijklmnop"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{n}/20 clips" for n in range(6, 21, 2)]
    assert all("clips/s" in line for line in lines) and "left" in lines[0] and "left" not in lines[-1]
    assert list(progress(["a"], 1, "clips", to_stderr=True)) == ["a"] and list(progress([], 0, "clips")) == []
    told = capsys.readouterr()
    assert told.err.startswith("1/1 clips, ") and not told.out


def test_short_work_is_quiet_where_that_is_asked_for(capsys, monkeypatch):
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr("dfer.cli.time.monotonic", lambda: next(times))
    assert list(progress(iter("abcdefgh"), 8, "images", to_stderr=True, quiet_s=5)) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[0] == "3/8 images, 0.5 images/s, about 10 s left"


# Tells on both streams and by a library, keeps a file, and says what became of it by its exit code.
TELLS = """
import os, sys
from dfer.cli import begin
begin("tells")
with open(sys.argv[1], "w") as kept:
    for _ in range(3):
        print("told \\u4e2d" * 4000, flush=True)
        print("told", file=sys.stderr)
        try:
            os.write(2, b"told by a library")
        except OSError:
            pass
    kept.write("kept")
print("left to the end")
"""


def tells(path, **streams):
    done = subprocess.run([sys.executable, "-c", TELLS, str(path)], cwd=ROOT, timeout=20, **streams)
    assert path.read_text() == "kept"
    return done.returncode


def gone(open_ends):
    """The writing end of a pipe or a terminal that nobody reads any more."""
    reading, writing = open_ends()
    os.close(reading)
    return writing


STREAMS = {
    "a reader that has gone": lambda: gone(os.pipe),
    "a terminal that has gone": lambda: gone(os.openpty),
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "not to be written": lambda: os.open(os.devnull, os.O_RDONLY),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_what_cannot_be_told_ends_nothing(tmp_path, stream, which):
    descriptor = STREAMS[stream]()
    streams = {name: descriptor for name in ("stdout", "stderr") if which in (name, "both")}
    assert tells(tmp_path / "file", **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | streams) == 0
    os.close(descriptor)


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_stream_that_is_closed_is_no_file_that_is_opened_later(tmp_path, closed):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", TELLS, str(tmp_path / "file")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_a_pipe_that_was_set_not_to_block_gets_all(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen(
        [sys.executable, "-c", TELLS, str(tmp_path / "file")], cwd=ROOT, stdout=writing, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        assert told.read() == ("told \u4e2d" * 4000 + "\n") * 3 + "left to the end\n"
    assert process.wait(20) == 0


def test_a_full_disk_is_said_once_where_somebody_hears_it(tmp_path):
    with open("/dev/full", "w") as full, open(tmp_path / "err", "w") as err:
        assert tells(tmp_path / "file", stdout=full, stderr=err) == 0
    assert (tmp_path / "err").read_text().count(
        "note: standard output cannot be written (No space left on device)"
    ) == 1


def test_a_terminal_of_few_letters_gets_the_others_in_numbers(tmp_path):
    with open(tmp_path / "out", "w") as out:
        assert tells(tmp_path / "file", stdout=out, env={**os.environ, "PYTHONIOENCODING": "ascii"}) == 0
    assert r"told \u4e2d" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("command", [*commands().values(), ROOT / "dfer" / "__main__.py"], ids=lambda path: path.stem)
def test_every_command_begins(command):
    assert re.search(r'^    begin\("', command.read_text(), re.MULTILINE)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function from what limits a process of a machine with 16 cores to the cores that it may use."""
    for name in ("CPUS_PER_TASK", "CPUS_ON_NODE", "NTASKS_PER_NODE", "STEP_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)

    def cores(affinity=16, group="0::/\n", quotas=(), **slurm):
        monkeypatch.setattr(os, "cpu_count", lambda: 16)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
        (tmp_path / "own").write_text(group)
        for path, text in dict(quotas).items():
            (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / path).write_text(text)
        for name, value in slurm.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        return usable_cores(tmp_path / "tree", tmp_path / "own")

    return cores


@pytest.mark.parametrize(
    ("cores", "limits"),
    [
        (16, {}),
        (3, {"affinity": 3}),
        (2, {"quotas": {"cpu.max": "150000 100000\n"}}),
        (1, {"quotas": {"cpu.max": "20000 100000\n"}}),
        (16, {"quotas": {"cpu.max": "max 100000\n"}}),
        (4, {"group": "0::/pods/one\n", "quotas": {"pods/cpu.max": "400000 100000", "pods/one/cpu.max": "max 100000"}}),
        (5, {"group": "0::/../elsewhere\n", "quotas": {"cpu.max": "500000 100000"}}),
        (2, {"group": "4:cpu,cpuacct:/a\n0::/\n",
             "quotas": {"cpu/a/cpu.cfs_quota_us": "200000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}}),
        (16, {"group": "4:cpu:/\n", "quotas": {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}}),
        (6, {"CPUS_PER_TASK": "6"}),
        (8, {"CPUS_PER_TASK": "2", "NTASKS_PER_NODE": "4"}),
        (2, {"CPUS_PER_TASK": "2", "NTASKS_PER_NODE": "4", "STEP_ID": "0"}),
        (10, {"CPUS_ON_NODE": "10"}),
        (16, {"CPUS_ON_NODE": "10(x2)", "CPUS_PER_TASK": ""}),
        (2, {"affinity": 2, "CPUS_PER_TASK": "8", "quotas": {"cpu.max": "400000 100000"}}),
    ],
)  # fmt: skip
def test_the_cores_are_those_that_may_be_used(machine, cores, limits):
    assert machine(**limits) == cores


def test_a_machine_that_tells_nothing_of_groups_has_its_affinity(machine, tmp_path):
    machine(affinity=7)
    assert usable_cores(tmp_path / "no tree", tmp_path / "nothing") == 7


def test_torch_takes_no_more_threads_than_there_are_cores(monkeypatch):
    taken = []
    torch = SimpleNamespace(get_num_threads=lambda: 16, set_num_threads=taken.append)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr("dfer.cli.usable_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one_line_errors("x", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")  # who says it is obeyed
    one_line_errors("x", lambda: 0)
    torch.get_num_threads = lambda: 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    one_line_errors("x", lambda: 0)
    assert taken == [3, 2]


@pytest.mark.parametrize(
    ("said", "spins"), [({}, "6000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_of_a_command_sleep_soon_where_nobody_says_otherwise(said, spins):
    """Torch's own library for threads is asked, by itself: all of torch takes seconds."""
    load = "from importlib.util import find_spec; from pathlib import Path; import ctypes; from dfer.cli import begin\n"
    load += "begin('x', 'torch'); lib, = Path(find_spec('torch').origin).parent.glob('lib/libgomp*'); ctypes.CDLL(lib)"
    outside = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env = outside | {"OMP_DISPLAY_ENV": "VERBOSE"} | said
    done = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True, env=env)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [spins], done.stderr


# What takes seconds to load, and a command that is wrong need not wait for.
COMPILERS = ("numba", "llvmlite", "torch._dynamo", "torch._inductor", "triton", "wandb", "timm", "nvidia.dali")
NEEDLESS = {"predict": COMPILERS, "evaluate": COMPILERS, "export": COMPILERS, "check_list": ("torch", *COMPILERS)}


@pytest.mark.parametrize("command", NEEDLESS)
def test_no_compiler_is_loaded_at_the_start(command):
    code = f"import sys, scripts.{command}; print(sorted(sys.modules.keys() & set({NEEDLESS[command]!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(("environment", "words"), [({}, 1), ({"RANK": "1", "WORLD_SIZE": "2"}, 0)])
def test_what_is_loading_is_said_before_it_is_loaded(environment, words):
    """By one process, and on stdout: what is wrong is on stderr."""
    code = "import sys; from dfer.cli import begin; begin('predict', 'torch'); print('torch' in sys.modules)"
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "predict: loading torch\n" * words + "False\n" and not done.stderr


@pytest.mark.parametrize("command", ["train.py", "scripts/evaluate.py", "scripts/predict.py"])
def test_without_docstrings_and_a_safe_path_is_one_line(command):
    """-P leaves out the folder of the file, so that this line shows that the project is found all the same."""
    done = subprocess.run([sys.executable, "-P", "-OO", str(ROOT / command)], cwd="/", capture_output=True, text=True)
    assert done.returncode == 2 and "leave out -OO" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("rank", ["1", "", "3"])
def test_a_rank_alone_silences_nothing(monkeypatch, capsys, rank):
    """A shell within a job may have inherited it; rank 1 of two is silent, as rank 0 says it."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def work():
        raise UserError("it is wrong")

    assert one_line_errors("x", work) == 2 and capsys.readouterr().err == "x: it is wrong\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert one_line_errors("x", work) == 2 and capsys.readouterr().err == ""


def test_an_interrupted_command_is_one_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert one_line_errors("pack", work, "interrupted; what is finished stays") == 130
    assert capsys.readouterr().err == "pack: interrupted; what is finished stays\n"


# Ctrl-C while libraries are loaded (one of them takes every error for a missing feature), and from then on.
INTERRUPTED = """
import os, signal, sys
from dfer.cli import begin, one_line_errors
begin("x")
try:
    if sys.argv[1] == "loading":
        os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
sys.exit(one_line_errors("x", lambda: os.kill(os.getpid(), signal.SIGINT), "interrupted at work"))
"""


@pytest.mark.parametrize(("when", "said"), [("loading", "x: interrupted\n"), ("at work", "x: interrupted at work\n")])
def test_an_interrupt_is_one_line_from_the_start(when, said):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, said)


def test_a_shell_that_ignores_the_interrupt_has_it_ignored():
    """`command &` in a script."""
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", INTERRUPTED, "loading"],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 75, ""),
        (UserError("it is wrong"), 2, "x: it is wrong\n"),
        (OSError(28, "", "here"), 2, "x: here: No space left on device\n"),
        (ZeroDivisionError(), 1, "ZeroDivisionError\n"),
        (SystemExit(69), 69, ""),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_who_fails_does_not_wait_for_those_that_wait_for_it(error, code, said, backend, monkeypatch, capsys):
    """NCCL leaves together, gloo does not."""
    ended: list[int | str] = []
    joined = {"is_available": lambda: True, "is_initialized": lambda: True, "get_backend": lambda: backend}
    joined["destroy_process_group"] = lambda: ended.append("left")
    monkeypatch.setitem(sys.modules, "torch.distributed", SimpleNamespace(**joined))
    monkeypatch.setattr(os, "_exit", ended.append)

    def work() -> int:
        if error is not None:
            raise error
        return 75

    with contextlib.suppress(ZeroDivisionError, SystemExit):
        assert one_line_errors("x", work) == code
    at_once = backend == "nccl" and error is not None
    assert ended == [code] * at_once + ["left"]  # a process that has ended does not come to that
    assert capsys.readouterr().err.endswith(said if backend == "nccl" or said != "ZeroDivisionError\n" else "")
