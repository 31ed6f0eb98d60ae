"""What all commands share: a user's error is one line and exit code 2, a defect of ours keeps its traceback."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from dfer.cli import UserError, one_line_errors, progress, say_error
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
