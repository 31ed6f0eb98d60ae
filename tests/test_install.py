"""`pip install .` gives the commands that a checkout has, and the files of the container say what they should."""

import ast
import contextlib
import http.client
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dfer import __version__
from dfer.__main__ import commands
from tests.conftest import ROOT, run_python
from tests.nursery import python_path
from tests.test_train import TINY

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
TOP_LEVEL = {package.split(".")[0] for package in SETUPTOOLS["packages"]}
FOLDERS = (*sorted(TOP_LEVEL), "scripts")  # of the repository that go into the wheel
NAMES = {
    "train", "check-list", "crossval", "doctor", "evaluate", "export", "hash-clips", "make-faces", "pack", "predict",
    "prepare-dfew", "prepare-ferv39k", "prepare-videos", "report",
}  # fmt: skip


def test_every_script_is_a_command():
    files = {ROOT / "train.py", *(p for p in (ROOT / "scripts").rglob("*.py") if p.name != "__init__.py")}
    assert set(commands().values()) == files and set(commands()) >= NAMES
    for file in files:
        last = ast.parse(file.read_text()).body[-1]
        assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'", file


def test_every_entry_point_is_there():
    assert PROJECT["project"]["scripts"]
    for target in PROJECT["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def files_of(package: str) -> set[str]:
    found = (p.relative_to(ROOT) for p in (ROOT / package).rglob("*") if p.is_file())
    return {str(p) for p in found if "__pycache__" not in p.parts}


def test_all_of_the_project_is_packaged():
    """But Slurm's scripts, which start what lies in a checkout."""
    assert {"dfer", "dali_pipes"} == TOP_LEVEL and "py-modules" not in SETUPTOOLS
    packaged = set()
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        packaged |= {str(p.relative_to(ROOT)) for pattern in patterns for p in folder.glob(pattern)}
        assert (folder / "__init__.py").exists() or folder == ROOT
    for package in FOLDERS:
        assert {name for name in files_of(package) - packaged if not name.startswith("scripts/slurm/")} == set()
    outside = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"benchmarks", "tests"}
    assert outside == set(FOLDERS) and {p.stem for p in ROOT.glob("*.py")} == {"train"}
    assert {"dfer/py.typed", "dali_pipes/py.typed"} <= packaged and not (ROOT / "dfer" / "_app").exists()


def test_the_command_without_being_installed(tmp_path):
    def dfer(*words):
        command = [sys.executable, "-m", "dfer", *words]
        env = {**os.environ, "PYTHONPATH": python_path()}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    for words in ((), ("--help",)):
        told = dfer(*words)
        assert told.returncode == 0 and not told.stderr
        names = [line.split()[1] for line in told.stdout.splitlines()]
        assert names == [*commands(), "COMMAND"]
    assert dfer("--version").stdout == f"dfer {__version__}\n"
    wrong = dfer("evaluat", "--help")
    assert wrong.returncode == 2 and not wrong.stdout
    assert (
        wrong.stderr.startswith("dfer: unknown command 'evaluat': choose from train, ")
        and wrong.stderr.count("\n") == 1
    )
    assert dfer("doctor", "--help").stdout.startswith("usage: doctor")
    wrong = dfer("doctor", "--fast")
    assert wrong.returncode == 2 and wrong.stderr == "doctor: unrecognized arguments: --fast\n"


HOSTILE = "raise RuntimeError('a module of somebody else: ' + __name__)\n"


def add_hostile(folder: Path) -> None:
    """Put packages of somebody else there that are called as what lies beside dfer in the repository."""
    (folder / "scripts").mkdir()
    for name in ("train.py", "scripts/__init__.py"):
        assert not (folder / name).exists()
        (folder / name).write_text(HOSTILE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with what pip makes of the project, in site-packages/, and with here/, to work in.

    In both, modules called train and scripts are somebody else's.
    """
    folder = tmp_path_factory.mktemp("installed")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder / "source")
    for package in FOLDERS:
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    wheels, target = folder / "wheels", folder / "site-packages"
    for words in (
        ("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), str(folder / "source")),
        ("install", "--target", str(target), "--find-links", str(wheels), "dfer"),
    ):
        done = run_python(*pip, *words, "--no-deps", "--no-index", timeout=300)
        assert done.returncode == 0, done.stderr
    names = {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")}
    assert names - {"bin", "__pycache__"} == TOP_LEVEL
    assert (target / "dfer" / "py.typed").exists() and (target / "dali_pipes" / "py.typed").exists()
    add_hostile(target)
    (folder / "here").mkdir()
    add_hostile(folder / "here")
    return folder


def python(folder, *words, timeout=120):
    env = {**os.environ, "PYTHONPATH": str(folder / "site-packages"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder / "here", env=env, capture_output=True, text=True, timeout=timeout)


def dfer(folder, *words, launcher=(), timeout=120):
    """Run a command as it is installed; or with `launcher`, the words behind `python`."""
    return python(folder, *(launcher or [str(folder / "site-packages" / "bin" / "dfer")]), *words, timeout=timeout)


def left(folder: Path) -> set[str]:
    return {p.name for p in (folder / "here").iterdir()} - {"train.py", "scripts"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_command_starts_where_it_is_installed(installed, name):
    """Also as a module, which puts the folder it is started in before all others."""
    for launcher in ((), ("-m", "dfer")):
        done = dfer(installed, name, "--help", launcher=launcher)
        assert done.returncode == 0 and "usage:" in done.stdout and "--help" in done.stdout, done.stderr
        assert str(ROOT) not in done.stderr and not left(installed)
        assert "python scripts/" not in done.stdout and "python train.py" not in done.stdout.replace("\n", " ")


@pytest.mark.slow
def test_the_packages_leave_the_names_of_others_alone(installed):
    code = "import sys; before = list(sys.path); import dfer, dali_pipes, dfer.report.page; assert sys.path == before; "
    for name in ("train", "scripts"):
        done = python(installed, "-c", f"{code}import {name}")
        assert done.stderr.endswith(f"RuntimeError: a module of somebody else: {name}\n"), done.stderr


@pytest.mark.slow
def test_an_installed_project_works_from_faces_to_report(installed):
    here = installed / "here"
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dfer"]
    try:
        for words in ((), ("--out", "drawn", "--video", "h264")):  # in processes that are spawned
            drawn = dfer(installed, "make-faces", "--size", "0.02", "--workers", "2", *words)
            assert drawn.returncode == 0, drawn.stderr
        words = ("drawn", "--label", "Happy", "--out", "prepared", "--no-crop", "--workers", "2")
        prepared = dfer(installed, "prepare-videos", *words, launcher=("-m", "dfer"))
        assert prepared.returncode == 0, prepared.stdout + prepared.stderr
        checked = dfer(installed, "check-list", "data/faces/train.txt", "data/faces/test.txt")
        assert checked.returncode == 0, checked.stdout + checked.stderr
        words = ("train", *TINY, "--run.wandb", "off", "--optim.epochs", "1")
        done = dfer(installed, *words, "--run.name", "a")
        assert done.returncode == 0, done.stderr
        assert (here / "logs" / "a" / "report.html").exists()
        evaluated = dfer(installed, "evaluate", "logs/a", "--json")
        assert evaluated.returncode == 0 and '"WAR"' in evaluated.stdout, evaluated.stderr
        exported = dfer(installed, "export", "logs/a", "--out", "model", "--formats", "hub")
        assert exported.returncode == 0, exported.stderr
        packed = dfer(installed, "pack", "data/faces/test.txt", "--out", "packed")
        assert packed.returncode == 0, packed.stderr
        done = dfer(installed, *words, "--validate-only", launcher=together)
        assert done.returncode == 0 and "debug on 2 x cpu" in done.stdout, done.stderr
        folds = ("crossval", "debug", "--name", "cv", "--", *TINY[1:], "--optim.epochs", "1", "--run.wandb", "off")
        done = dfer(installed, *folds, launcher=("-m", "dfer"), timeout=600)  # it starts train.py itself, five times
        assert done.returncode == 0 and (here / "logs" / "cv" / "results.json").exists(), done.stdout + done.stderr
        assert "train on it: dfer train --data.train-list packed/test.txt" in packed.stdout
        wrong = dfer(installed, *words, "--data.train-list", "data/faces/gone.txt")
        assert "make the embedded data set with: dfer make-faces\n" in wrong.stderr
        wrong = dfer(installed, *words, "--data.train-list", "gone.txt")
        assert wrong.returncode == 2 and wrong.stderr.startswith("train.py: gone.txt: no such annotation list")
        assert wrong.stderr.count("\n") == 1
        healthy = dfer(installed, "doctor")
        assert healthy.returncode == 0 and "nvidia-dali-cuda120" in healthy.stdout, healthy.stderr
        assert "wandb" in healthy.stdout and "hypothesis" not in healthy.stdout
    finally:
        for name in left(installed):
            shutil.rmtree(here / name)


# ---- As a user has it: from the index, alone in an environment


def in_environment(bin_folder: Path, here: Path, *words: str, timeout: float = 600) -> str:
    """Run one of an environment's programs in a folder, in none of ours, and return what it says."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(bin_folder / words[0]), *words[1:]]
    done = subprocess.run(
        command, cwd=here, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def use_from_elsewhere(bin_folder: Path, here: Path) -> None:
    """Train, predict and show the page with an installed project alone."""
    assert in_environment(bin_folder, here, "dfer", "--version") == f"dfer {__version__}\n"
    in_environment(bin_folder, here, "dfer", "make-faces", "--size", "0.02")
    in_environment(bin_folder, here, "dfer", "make-faces", "--size", "0.003", "--video", "h264", "--out", "drawn")
    in_environment(bin_folder, here, "dfer", "train", "debug", "--run.name", "first", "--run.device", "cpu")
    assert (here / "logs" / "first" / "report.html").exists()
    model = ("--checkpoint", "logs/first", "--device", "cpu", "--no-crop")
    said = in_environment(bin_folder, here, "dfer", "predict", "drawn/videos_h264", *model, "--out", "seen")
    assert "trained on drawn faces" in said and len(list((here / "seen").glob("*.csv"))) == 5
    video = sorted((here / "drawn" / "videos_h264").iterdir())[0]
    assert " were shown" in in_environment(bin_folder, here, "dfer", "predict", "--camera", str(video), *model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = subprocess.Popen(
        [str(bin_folder / "dfer"), "demo", *model, "--port", str(port), "--examples", str(video)],
        cwd=here, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert any(line.startswith(f"http://127.0.0.1:{port} shows") for line in page.stdout)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/")
            assert "dfer" in connection.getresponse().read().decode()
        page.send_signal(signal.SIGTERM)
        assert page.wait(60) == 0
    finally:
        page.kill()
        page.communicate()


@pytest.mark.slow
def test_the_wheel_alone_in_a_fresh_environment(tmp_path):
    """With the versions that pip chooses today, several GB of them: what the CI's job for the wheel does, and more."""
    if shutil.disk_usage(tmp_path).free < 13e9:
        pytest.skip("less than 13 GB of disk are free")
    probe = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "probe"), "packaging")
    if run_python(*probe, timeout=300).returncode:
        pytest.skip("pip reaches no index")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "logs", "data", "build", "dist", "__pycache__")
    )
    for name, wanted in (("tools", ["build", "twine"]), ("clean", [])):
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / name)], check=True)
        if wanted:
            in_environment(tmp_path / name / "bin", tmp_path, "pip", "install", "--quiet", *wanted)
    tools, clean = tmp_path / "tools" / "bin", tmp_path / "clean" / "bin"
    in_environment(tools, tmp_path / "source", "python", "-m", "build", "--outdir", str(tmp_path / "dist"))
    made = sorted((tmp_path / "dist").iterdir())
    assert [path.suffix for path in made] == [".whl", ".gz"]
    checked = in_environment(tools, tmp_path, "python", "-m", "twine", "check", "--strict", *map(str, made))
    assert checked.count("PASSED") == 2
    in_environment(clean, tmp_path, "pip", "install", "--quiet", f"{made[0]}[demo]", timeout=3 * 3600)
    use_from_elsewhere(clean, tmp_path / "elsewhere")


# ---- The container, which is not built by any test: what can be read from its files


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each with what it is given, lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def ignored(name: str) -> bool:
    """As Docker reads .dockerignore: the last pattern that fits a path, or a folder that it is in, decides."""
    decision = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").strip("/")
        if not pattern or line.startswith("#"):
            continue
        parents = [name, *(str(p) for p in Path(name).parents if str(p) != ".")]
        patterns = (pattern, pattern.removeprefix("**/"))  # "**/" is also no folder at all
        if any(
            fnmatch(p, q) and (q.startswith("**") or p.count("/") == q.count("/")) for p in parents for q in patterns
        ):
            decision = not line.startswith("!")
    return decision


def test_the_image_starts_from_a_pinned_one_and_runs_as_nobody_special():
    steps = instructions()
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base)
    words = [word for word, _ in steps]
    (user,) = [rest for word, rest in steps if word == "USER"]
    assert user not in ("root", "0")
    assert any(word == "RUN" and rest.startswith("useradd ") and rest.endswith(f" {user}") for word, rest in steps)
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert not re.search(r"secret|password|token|api_key", str(steps), re.IGNORECASE)


def test_what_the_image_copies_is_there_and_enough():
    copied = set()
    for _, rest in (step for step in instructions() if step[0] == "COPY"):
        *sources, _ = rest.split()
        for name in sources:
            assert (ROOT / name).exists() and not ignored(name), name
            copied.add(name)
    needed = {"pyproject.toml", "requirements.txt", "README.md", "LICENSE", "train.py", *FOLDERS}
    assert copied == needed and "ADD" not in dict(instructions())
    assert not any(ignored(name) for package in FOLDERS for name in files_of(package))
    assert all(ignored(p.name) != (p.name in needed) for p in ROOT.iterdir())
    for name in ("data/faces/train.txt", "logs/a/config.json", ".venv/bin/python", ".git/config", "lists/dfew/a.txt",
                 "wandb/x", ".env", "dfer/__pycache__/model.pyc", "build/lib/train.py", ".netrc"):  # fmt: skip
        assert ignored(name), name


def test_what_the_image_runs_exists():
    steps = instructions()
    programs = {"apt-get", "pip", "rm", "grep", "useradd"}  # of Debian and of Python's image
    for _, rest in (step for step in steps if step[0] == "RUN"):
        for command in re.split(r"&&|\|", rest):
            assert shlex.split(command)[0] in programs, command
    last = dict(steps)
    (entry,) = ast.literal_eval(last["ENTRYPOINT"])
    assert entry in PROJECT["project"]["scripts"]
    assert ast.literal_eval(last["CMD"])[0] in commands()
    for pattern in re.findall(r"grep -E '([^']+)'", str([rest for _, rest in steps])):
        found = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.search(pattern, line)]
        assert [line.split("==")[0] for line in found] == ["torch", "torchvision"]
    arguments = {rest.split("=")[0] for word, rest in steps if word == "ARG"}
    for used in re.findall(r"\$\{?(\w+)", str(steps)):
        assert used in arguments, used
    for offered in re.findall(r"--build-arg (\w+)", (ROOT / "Dockerfile").read_text()):
        assert offered in arguments, offered
