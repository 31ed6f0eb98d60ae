"""What is missing is found, named with a remedy, and counted as an error only if training cannot work."""

import errno
import fcntl
import getpass
import os
import pwd
import shutil
import sys
import tempfile
from types import SimpleNamespace

import av
import pytest
import torch

from dfer import files
from scripts import doctor
from tests.conftest import run_python


def states(findings) -> dict[str, str]:
    return {f.what: f.state for f in findings}


def test_here_everything_is_in_order():
    done = run_python("scripts/doctor.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nvidia.dali" in done.stdout and torch.__version__ in done.stdout and "missing" not in done.stdout


def test_packages_against_the_pins():
    found = list(
        doctor.packages(f"torch=={torch.__version__.split('+')[0]}  # why\nno-such-thing==1.2\nav==0.1\n# x==1\n")
    )
    assert [f.state for f in found] == ["ok", "missing", "slower"]
    assert found[1].remedy == "pip install no-such-thing==1.2" and "0.1" in found[2].remedy


def test_a_module_that_does_not_import_is_told_by_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "broken_here.py").write_text("raise ImportError('libfoo.so: no such file')")
    (tmp_path / "crashes_here.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    broken, crashes, fine = doctor.imports("broken_here", "crashes_here", "json")
    assert (broken.state, broken.found) == ("missing", "ImportError: libfoo.so: no such file")
    assert (crashes.state, crashes.found) == ("missing", "exit code -9")
    assert fine.state == "ok"


def test_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1_999_999_999))
    (disk,) = (f for f in doctor.room(tmp_path) if f.what == "free disk")
    assert disk.state == "slower" and disk.found == "2.0 GB" and str(tmp_path) in disk.remedy
    assert doctor.enough("disk", 2.0, "x") == doctor.Finding("free disk", "2.0 GB", "ok")


def test_codecs_and_python(monkeypatch):
    assert doctor.codecs().state == "ok"
    monkeypatch.setattr(av, "codecs_available", {"h264", "vp9", "av1", "mpeg4"})
    assert doctor.codecs().state == "slower" and "no hevc (phones)" in doctor.codecs().found
    assert doctor.python().state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert doctor.python().state == "missing"


def test_no_gpu_is_no_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (without,) = doctor.gpus()
    assert without.state == "slower" and "works on the CPU" in without.remedy
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    (driver,) = doctor.gpus()
    assert "driver may be too old" in driver.remedy


def only(findings):
    (finding,) = findings
    assert finding.remedy
    return finding


def test_a_user_of_whom_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(doctor.odd_user()) == []

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(getpass, "getuser", lambda: "uid5")
    assert only(doctor.odd_user()).found.endswith("has no name here: uid5")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: None)
    monkeypatch.setenv("HOME", "/proc/none")
    assert only(doctor.odd_user()).found == "/proc/none cannot be written"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", refusing(errno.EROFS))
    assert only(doctor.odd_user()).found == "Read-only file system"


def refusing(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_file_system_that_cannot_all(monkeypatch, tmp_path):
    assert list(doctor.odd_folder(tmp_path)) == []
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
        locks = only(doctor.odd_folder(tmp_path))
    assert locks.state == "missing" and "No locks available" in locks.found
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refusing(errno.EINVAL))
        assert "cannot be synced" in only(doctor.odd_folder(tmp_path)).found
    (tmp_path / "~").mkdir()
    assert only(doctor.odd_folder(tmp_path)).what == "a folder called ~"


def test_how_a_run_would_start(monkeypatch, tmp_path):
    """Half an environment, W&B's modes, and nowhere to keep machine code: each is one line."""
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="/x/__pycache__\n"))
    monkeypatch.setattr("dfer.run.wandb_log.mode_of_machine", lambda: "online")
    (wandb,) = doctor.odd_start()
    assert wandb.found == "--run.wandb auto is online here" and not wandb.remedy
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="None\n"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("dfer.run.wandb_log.mode_of_machine", lambda: "offline")
    code, launcher, wandb = doctor.odd_start()
    assert (code.state, launcher.state, wandb.state) == ("slower", "missing", "ok")
    assert "NUMBA_CACHE_DIR" in code.remedy and "WORLD_SIZE=2 and no RANK" in launcher.found


def test_the_folder_may_be_gone(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert doctor.run() == 2 and capsys.readouterr().err.endswith("is gone: cd to another\n")


@pytest.mark.parametrize(("state", "code"), [("missing", 2), ("slower", 0), ("ok", 0)])
def test_the_exit_code(monkeypatch, capsys, state, code):
    monkeypatch.setattr(doctor, "examine", lambda folder: [doctor.Finding("a[b]", "found", state, "do this")])
    assert doctor.main([]) == code
    out, err = capsys.readouterr()
    assert "a[b]" in out and "do this" in out
    assert ("training cannot work here: a[b]" in err) == (code == 2)


@pytest.mark.gpu
def test_a_gpu_is_described():
    findings = {f.what: f for f in doctor.gpus()}
    assert torch.cuda.get_device_name(0) in findings["GPU 0"].found and findings["GPU 0"].state == "ok"
    assert {"NVDEC, video decoding", "nvJPEG, image decoding"} <= findings.keys()
