"""Each start of a run notes its code and machine; where git cannot say, that is noted."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from dfer import __version__
from dfer.config import Config
from dfer.report.records import read_run
from dfer.run import provenance
from dfer.run.distributed import World
from dfer.run.provenance import code, describe_starts, driver_version, note_start, read_starts

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit."""
    root = tmp_path / "app"
    root.mkdir()
    (root / "code.py").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    return root


def test_the_commit_and_whether_anything_was_changed_since(repository):
    found = code(repository)
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert found == {"version": __version__, "commit": head.strip(), "changed": False}
    (repository / "notes.txt").touch()  # not of the code
    assert not code(repository)["changed"]
    (repository / "code.py").write_text("x = 1\n")
    assert code(repository) == {"version": __version__, "commit": head.strip(), "changed": True}


def test_where_git_cannot_say_that_is_said(repository, tmp_path, monkeypatch):
    inside = repository / "site-packages"
    inside.mkdir()
    assert code(inside)["no_commit"] == "no repository of the project" and code(inside)["commit"] is None
    outside = tmp_path / "no repository"
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "not a git repository" in code(outside)["no_commit"]
    monkeypatch.setattr(provenance.shutil, "which", lambda _: None)
    assert code(repository)["no_commit"] == "git is not installed"
    monkeypatch.undo()

    def hangs(command, **_):
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(provenance.subprocess, "run", hangs)
    assert "timed out" in code(repository)["no_commit"]


def test_a_run_keeps_the_list_of_what_ran_it(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(Config().to_json())
    commits = iter(["a" * 40, "a" * 40, "b" * 40])
    monkeypatch.setattr(provenance, "code", lambda: {"version": "1.0", "commit": next(commits), "changed": False})
    for step in (0, 5, 9):
        note_start(tmp_path, step, ALONE, "drawn")
    with open(tmp_path / "started.jsonl", "a") as file:
        file.write('{"time": "torn')
    starts = read_starts(tmp_path)
    assert [(s["step"], s["processes"], s["device"]) for s in starts] == [(0, 1, "cpu"), (5, 1, "cpu"), (9, 1, "cpu")]
    line = "dfer 1.0 (commit aaaaaaaaaaaa) on 1 x cpu; then dfer 1.0 (commit bbbbbbbbbbbb) on 1 x cpu"
    assert describe_starts(starts) == read_run(tmp_path).made_by == line
    assert read_starts(tmp_path / "older") == [] and describe_starts([]) == ""


def test_a_gpu_has_a_name_and_a_driver(tmp_path):
    version = tmp_path / "version"
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n",
    ):
        version.write_text(text)
        assert driver_version(version) in ("535.183.01", "570.86.15")
    assert driver_version(tmp_path / "none") is None
    start = {"version": "1", "commit": "c" * 40, "changed": True, "gpu": "H100", "driver": "535.1", "processes": 4}
    assert describe_starts([json.loads(json.dumps(start))]) == (
        f"dfer 1 (commit {'c' * 12}, with changes that are in no commit) on 4 x H100, driver 535.1"
    )
    assert describe_starts([{"no_commit": "git is not installed"}]).startswith(
        "dfer ? (commit unknown: git is not installed)"
    )


def test_this_very_code_says_what_it_is():
    found = code(Path(__file__).resolve().parents[1])
    assert found["version"] != "unknown" and (found["commit"] is None) == ("no_commit" in found)
