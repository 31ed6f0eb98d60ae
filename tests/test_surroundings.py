"""What machines lack: a name for the user, a home, a temporary folder, places that can be written or looked into."""

import ast
import errno
import getpass
import os
import pwd
import shutil
import subprocess
import sys
import tempfile

import numba
import pytest

import dfer
from dali_pipes import compiling
from dfer import cli
from tests.conftest import ROOT

COMMANDS = ["train.py", *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("[!_]*.py")))]

# ---- A process of which the machine knows nothing.


@pytest.fixture
def nobody(monkeypatch):
    """A user id without a name, as in a container."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_name_gets_one(nobody):
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    assert os.path.expanduser("~/x") == "~/x"
    dfer._fit_for_torch()
    assert getpass.getuser() == f"uid{os.getuid()}" and os.path.expanduser("~/x") == "/x"


@pytest.mark.parametrize("name", ["LOGNAME", "USER"])
def test_a_name_that_is_known_stays(nobody, monkeypatch, name):
    monkeypatch.setenv(name, "me")
    monkeypatch.setenv("HOME", "/home/me")
    before = dict(os.environ)
    dfer._fit_for_torch()
    assert dict(os.environ) == before and getpass.getuser() == "me"


def test_no_temporary_folder_is_no_end(monkeypatch):
    """As in a container whose file systems are read-only: torch asks only what the folder would be called."""

    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    dfer._fit_for_torch()
    assert tempfile.gettempdir() in ("/dev/shm", "/tmp")  # noqa: S108


@pytest.mark.parametrize("command", COMMANDS)
def test_the_process_is_prepared_before_torch_is_imported(command):
    """Whatever imports torch comes after the first module of dfer or dali_pipes, whose package imports dfer."""
    names = [
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / command).read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])
    ]  # fmt: skip
    first = min(names.index(name) for name in ("dfer", "dali_pipes") if name in names)
    assert not {"torch", "timm", "onnxruntime", "safetensors", "wandb"} & set(names[:first])


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="only root can be somebody else")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_starts_for_a_user_without_name_home_and_caches(command, tmp_path):
    for name in ("train.py", "dfer", "dali_pipes", "scripts"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["chmod", "-R", "a-w", tmp_path], check=True)
    somebody = ["unshare", "-U", "--map-user=12345", "--map-group=12345", "env", "-u", "USER", "-u", "LOGNAME"]
    words = [*somebody, "HOME=/proc/none", "PYTHONDONTWRITEBYTECODE=1", sys.executable, tmp_path / command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=120)
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


# ---- Machine code that cannot be kept.


def twice(x):
    return 2 * x


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder of numba's, and notes that are said anew."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    cli.say_once.cache_clear()
    yield tmp_path / "cache"
    cli.say_once.cache_clear()


def notes(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def cut_short(cache):
    (index,) = cache.rglob("*.nbi")
    index.write_bytes(index.read_bytes()[:30])


def foreign(cache):
    """Root reads all files: a folder of that name is refused to everybody."""
    (index,) = cache.rglob("*.nbi")
    index.unlink()
    index.mkdir()


def of_another_kind(cache):
    (index,) = cache.rglob("*.nbi")
    index.write_bytes(b"not a pickle")


@pytest.mark.parametrize("damage", [cut_short, foreign, of_another_kind])
def test_machine_code_that_cannot_be_read_is_compiled_again(own_cache, capsys, damage):
    assert compiling.njit(nogil=True)(twice)(2) == 4 and not notes(capsys)
    assert list(own_cache.rglob("*.nbc"))
    damage(own_cache)
    assert compiling.njit(nogil=True)(twice)(2) == 4
    (first, *_) = notes(capsys)
    assert str(own_cache) in first and "cannot be read" in first and "NUMBA_CACHE_DIR" in first


def test_machine_code_that_can_be_kept_nowhere(own_cache, monkeypatch, capsys):
    monkeypatch.setattr(compiling.FunctionCache._impl_class, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(twice)
    made = compiling.njit(nogil=True)(twice), compiling.cfunc("float64(float64)")(twice)
    assert made[0](2) == 4 and made[1].ctypes(2) == 4
    assert len(said := notes(capsys)) == 1 and "no folder to keep machine code in" in said[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_machine_code_that_cannot_be_written(own_cache, monkeypatch, capsys, number):
    assert compiling.njit(nogil=True)(twice)(2) == 4  # its folder is there now

    def full(path, mode="r", *args, **kwargs):
        if "w" in mode:
            raise OSError(number, os.strerror(number), path)
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr("numba.core.caching.open", full, raising=False)
    assert compiling.njit(nogil=True)(twice)(2.5) == 5  # of a type that is not yet there
    assert len(said := notes(capsys)) == 1 and f"cannot be kept in {own_cache}" in said[0]
    assert os.strerror(number) in said[0]


def test_machine_code_is_kept(own_cache, monkeypatch):
    """Both kinds are found again."""
    for make in (compiling.njit(nogil=True), compiling.cfunc("float64(float64)")):
        make(twice)
    assert compiling.njit(nogil=True)(twice)(2.5) == 5
    written = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.nb?")}
    assert compiling.njit(nogil=True)(twice)(2.5) == 5
    assert compiling.cfunc("float64(float64)")(twice).ctypes(2) == 4
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.nb?")} == written
