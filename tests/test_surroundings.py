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
from pathlib import Path

import numba
import pytest

import dfer
from dali_pipes import compiling
from dfer import cli
from dfer.config import parse_config
from dfer.files import free_bytes
from dfer.lists.packing import pack
from dfer.lists.shards import Options
from dfer.run import dry_run
from dfer.run.folder import RunFolder
from scripts import doctor
from tests.conftest import ROOT, run_python

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


# ---- Folders that may not be looked into, and other answers of a file system that no program can help.

# Plays a command without the rights of root over files that are closed to their owner.
UNPRIVILEGED = """
import ctypes, runpy, sys
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def shut(tmp_path):
    folder = tmp_path / "shut"
    folder.mkdir()
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


CLOSED_WORDS = {
    "scripts/prepare_videos.py": ["{shut}/v", "--out", "{out}", "--unlabelled"],
    "scripts/prepare_videos.py of a list": ["{shut}/v.txt", "--out", "{out}", "--unlabelled"],
    "scripts/prepare_dfew.py": ["--root", "{shut}/dfew", "--out", "{out}"],
    "scripts/prepare_ferv39k.py": ["--root", "{shut}/ferv", "--out", "{out}"],
    "scripts/report.py": ["{shut}/run"],
    "scripts/evaluate.py": ["{shut}/run"],
    "scripts/export.py": ["{shut}/run", "--out", "{out}"],
    "scripts/check_list.py": ["{list}", "--root", "{shut}"],
    "train.py --data.root": ["debug", "--data.train-list", "{list}", "--data.root", "{shut}/x"],
    "train.py --run.log-dir": ["debug", "--data.train-list", "{list}", "--run.log-dir", "{shut}/x", "--run.name", "x"],
}  # fmt: skip


@pytest.mark.parametrize("case", CLOSED_WORDS)
def test_a_folder_that_may_not_be_looked_into_is_one_line(case, shut, clips, tmp_path):
    """The message has the folder and the reason, not that nothing is there: nobody can tell."""
    words = [w.format(shut=shut, out=tmp_path / "out", list=clips / "train.txt") for w in CLOSED_WORDS[case]]
    done = run_python("-c", UNPRIVILEGED, case.split()[0], *words, fresh=False)
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2) and "Traceback" not in said, said
    assert str(shut) in said and "Permission denied" in said and not (tmp_path / "out").exists()


def test_what_predict_is_given_may_be_closed(shut):
    looks = f"from dfer.predict.inputs import find_videos\nfind_videos([Path('{shut}/v')], Path('o'), print)"
    code = UNPRIVILEGED.partition("sys.argv")[0] + f"from pathlib import Path\n{looks}"
    done = run_python("-c", code, fresh=False)
    assert f"UserError: {shut}/v: cannot be looked at (Permission denied)" in done.stderr


class LibraryError(Exception):
    """As safetensors, HDF5 and ONNX have their own."""


ONE_LINE = [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    (PermissionError(errno.EACCES, "Permission denied", "a\nb"), r"a\nb: Permission denied"),
    (OSError(errno.ESTALE, "Stale file handle", "nas"), "nas: Stale file handle"),
    (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many open files"),
    (LibraryError("IoError: No space left on device (os error 28)"), "IoError: No space left on device (os error 28)"),
    (OSError("Can't write data (file write failed: errno = 122,\n error message = 'Disk quota exceeded')"),
     "Can't write data (file write failed: errno = 122, error message = 'Disk quota exceeded')"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "line"), ONE_LINE)
def test_what_the_machine_answers_is_one_line_whoever_wraps_it(error, line, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)

    def work():
        raise error

    assert cli.one_line_errors("x", work) == 2 and capsys.readouterr().err == f"x: {line}\n"


def test_the_folder_that_a_command_was_started_in_is_gone(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert cli.one_line_errors("x", lambda: Path("logs").absolute()) == 2
    assert capsys.readouterr().err == "x: the folder that this was started in is gone: cd to another\n"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory", "a"), IsADirectoryError(21, "Is a directory"),
              BrokenPipeError(32, "Broken pipe"), LibraryError("shape"), KeyError("a")]
)  # fmt: skip
def test_what_may_be_a_defect_of_ours_keeps_its_traceback(error):
    def work():
        raise error

    with pytest.raises(type(error)):
        cli.one_line_errors("x", work)


# ---- File systems that do not know what is free.


def statvfs(blocks, free, size=4096):
    return os.statvfs_result((size, size, blocks, free, free, 0, 0, 0, 0, 255))


def refused(number):
    def answer(path):
        raise OSError(number, os.strerror(number), path)

    return answer


NO_ANSWERS = {
    "0 of 0 blocks": lambda path: statvfs(0, 0),
    "blocks of 0 bytes": lambda path: statvfs(1000, 1000, size=0),
    "free blocks below 0": lambda path: statvfs(0, -1),
    "not implemented": refused(errno.ENOSYS),
    "too large to say": refused(errno.EOVERFLOW),
}


@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_an_unknown_number_of_free_bytes_is_no_full_disk(answer, monkeypatch, tmp_path, clips, capsys):
    monkeypatch.setattr(os, "statvfs", NO_ANSWERS[answer])
    assert free_bytes(tmp_path) is None
    assert dry_run.free_disk(tmp_path / "logs", 10**9) is None
    folder = RunFolder(parse_config(["debug", "--run.log-dir", str(tmp_path / "logs")]), "x")
    folder.begin(parse_config(["debug"]), 10**15)
    folder.close()
    pack([clips / "test.txt"], None, tmp_path / "packed", Options())
    assert "does not say what is free" in capsys.readouterr().out
    (memory, disk) = (finding for finding in doctor.room(tmp_path) if finding.what.startswith("free"))
    assert memory.state == "ok" and disk.state == "ok" and "does not say" in disk.found


def test_a_full_disk_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "statvfs", lambda path: statvfs(1000, 0))
    assert free_bytes(tmp_path) == 0
    with pytest.raises(cli.UserError, match="0 MB are free"):
        dry_run.free_disk(tmp_path, 10**6)


# ---- The home folder behind `=`, where a shell leaves the tilde to the program.

HOME = "/home/of a user"


@pytest.mark.parametrize(
    ("word", "means"),
    [
        ("--out=~/x", f"--out={HOME}/x"), ("--run.log-dir=~", f"--run.log-dir={HOME}"), ("~/a=~/b", f"{HOME}/a=~/b"),
        ("--out=~root/x", f"--out={pwd.getpwnam('root').pw_dir}/x"), ("--out=./~/x", "--out=./~/x"),
        ("--title=~3 clips", "--title=~3 clips"), ("--out=a~/b", "--out=a~/b"), ("--crf", "--crf"), ("", ""),
        ("--model.weights=~/w.pt", f"--model.weights={HOME}/w.pt"), ("backbone:~/r", f"backbone:{HOME}/r"),
        ("--model.init=backbone:~/r", f"--model.init=backbone:{HOME}/r"), ("hf:~/r", "hf:~/r"),
    ],
)  # fmt: skip
def test_the_tilde_is_the_home_folder(word, means, monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    assert cli.expand_home([word]) == [means]


def test_a_home_that_is_not_known_is_no_folder_called_so(monkeypatch, nobody, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for word in ("--out=~/x", "~", "--out=~no-such-user/x"):
        with pytest.raises(cli.UserError, match=r"is not known; write \./~"):
            cli.expand_home([word])
    (tmp_path / "~no-such-user").mkdir()  # and may be meant
    assert cli.expand_home(["--out=~no-such-user/x"]) == ["--out=~no-such-user/x"]
    with pytest.raises(SystemExit) as stop:
        cli.Parser("x", "").parse_args(["--out=~/x"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("x: --out=~/x: the home folder of this user")


def test_all_parsers_know_the_tilde(monkeypatch):
    monkeypatch.setenv("HOME", HOME)
    config = parse_config(["debug", "--run.log-dir=~/logs", "--data.root=~/d", "--model.init=~/w", "--run.name=a"])
    assert (str(config.run.log_dir), str(config.data.root)) == (f"{HOME}/logs", f"{HOME}/d")
    assert config.model.init == f"{HOME}/w"
    parser = cli.Parser("x", "")
    parser.add_argument("--out")
    parser.add_argument("list")
    assert vars(parser.parse_args(["--out=~/x", "~/l"])) == {"out": f"{HOME}/x", "list": f"{HOME}/l"}
    assert parser.parse_known_args(["--out=~/x", "~/l", "--y=~/z"])[1] == [f"--y={HOME}/z"]
    for file in [*COMMANDS, "dfer/lists/releases.py"]:  # no command has a parser of its own
        assert "argparse.ArgumentParser(" not in (ROOT / file).read_text(), file


def test_machine_code_is_not_that_of_an_older_version_of_what_it_calls(own_cache, monkeypatch, tmp_path):
    """Numba's own cache knows the function's file, but none that it calls functions of."""
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    for name in ("caller", "called"):
        (tmp_path / f"{name}.py").write_text("1")
    before = compiling._sources.__wrapped__()
    assert before == compiling._sources.__wrapped__()
    (tmp_path / "called.py").write_text("2")
    after = compiling._sources.__wrapped__()
    assert before != after
    written = []
    for sources in (before, after, after):
        monkeypatch.setattr(compiling, "_sources", lambda sources=sources: sources)
        assert compiling.njit(nogil=True)(twice)(2) == 4
        written.append({path: path.stat().st_mtime_ns for path in own_cache.rglob("*.nbi")})
    assert written[0] != written[1] == written[2]
