"""What a release promises: its metadata, the versions it fits, how it is cited, and how it is checked elsewhere."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dfer
from dfer.__main__ import commands
from dfer.cli import command_of, missing_packages
from tests.conftest import ROOT
from tests.test_architecture import sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SHIPPED = [path for path in sources() if path.relative_to(ROOT).parts[0] != "benchmarks"]
# Pages and cards that name the script which wrote them: who reads them has the project elsewhere, or not at all.
PAGES = {"dfer/report/page.py", "dfer/report/folds.py", "dfer/report/gallery.py", "scripts/export.py"}
# The packages of modules that are called otherwise, or come with a package that is named and are not wanted without it.
PACKAGES = {
    "cv2": "opencv-python-headless",
    "llvmlite": "numba",
    "nvidia": "nvidia-dali-cuda120",
    "PIL": "pillow",
    "scenedetect": "scenedetect-headless",
    "starlette": "gradio",
    "triton": "torch",
}


def ranges(*extras: str) -> dict[str, Requirement]:
    """The requirements of the project itself, or of some of its extras."""
    lines = [line for extra in extras for line in EXTRAS[extra]] if extras else PROJECT["dependencies"]
    return {wanted.name.lower(): wanted for wanted in map(Requirement, lines)}


def pins(name: str) -> dict[str, Requirement]:
    """The packages that a file of requirements pins."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {wanted.name.lower(): wanted for wanted in map(Requirement, filter(None, lines))}


# ---- Versions: pyproject.toml has ranges, the files of requirements one version each


def test_every_pin_is_exact_and_in_its_range():
    wanted, locked = ranges() | ranges(*EXTRAS), {}
    for file in ("requirements.txt", "requirements-demo.txt", "requirements-bench.txt"):
        for name, pin in pins(file).items():
            (exact,) = pin.specifier
            assert exact.operator == "==" and name in wanted, f"{file}: {pin}"
            assert exact.version in wanted[name].specifier, f"{file}: {pin} is not in {wanted[name]}"
            locked[name] = pin
    assert wanted.keys() == locked.keys()


def test_every_range_ends_before_what_nobody_knows():
    for name, wanted in (ranges() | ranges(*EXTRAS)).items():
        assert {s.operator for s in wanted.specifier} == {">=", "<"}, name


def test_make_installs_all_but_what_has_its_own_environment():
    assert (
        pins("requirements.txt").keys() == (ranges() | ranges("wandb", "export", "tensorboard", "dev")).keys()
        and pins("requirements-bench.txt").keys() == ranges("bench").keys()
    )
    assert "gradio" in pins("requirements-demo.txt")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def libraries(path: Path, *, everywhere: bool) -> set[str]:
    """The packages of what a file imports that is neither ours nor Python's: anywhere, or as it is loaded."""
    found, left = set(), list(parsed(path).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left += ast.iter_child_nodes(node)
    names = {name.split(".")[0] for name in found}
    names -= sys.stdlib_module_names | {"dfer", "dali_pipes"}
    return {PACKAGES.get(name, name.replace("_", "-")) for name in names}


def test_all_that_is_imported_is_required():
    """As a file is loaded by the project alone, in a function also by an extra."""
    named, optional, used = ranges().keys(), ranges("wandb", "export", "demo", "tensorboard").keys(), set()
    for path in SHIPPED:
        assert libraries(path, everywhere=False) <= named, path
        found = libraries(path, everywhere=True)
        assert found <= named | optional, path
        used |= found
    assert named <= used, "required, but never imported"


def test_a_package_that_is_not_there_is_named():
    assert missing_packages("torch", "no-such-thing", "numpy") == ["no-such-thing"] and not missing_packages("rich")


# ---- Metadata


def test_the_metadata_is_whole():
    assert PROJECT["license"] == "MIT" and (ROOT / PROJECT["readme"]).exists()
    assert PROJECT["authors"] == [{"name": "The dfer authors"}] and "The dfer authors" in (ROOT / "LICENSE").read_text()
    versions = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert versions == [f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed]
    assert not any(c.startswith("License ::") for c in PROJECT["classifiers"]), "the licence has its own field"
    assert str(Version(dfer.__version__)) == dfer.__version__ and PROJECT["dynamic"] == ["version"]


def test_it_can_be_cited():
    """The fields that version 1.2.0 of the format asks for, and that they say what the project says."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software" and cited["title"].startswith("dfer")
    assert cited["version"] == dfer.__version__ and cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"]


# ---- What messages call a command


@pytest.mark.parametrize(
    ("started", "called"),
    [
        (["python", "train.py", "dfew"], "python train.py"),
        (["python", "train.py", "--run.name", "dfer"], "python train.py"),
        (["python", "-m", "dfer", "train", "dfew"], "dfer train"),
        (["python", "-u", "-m", "dfer", "train", "--run.name", "a"], "dfer train"),  # as torchrun does
        (["python", "/venv/bin/dfer", "train"], "dfer train"),
        (["python", "/home/me/dfer/train.py"], "python train.py"),
    ],
)
def test_messages_call_commands_as_they_were_started(started, called, monkeypatch):
    at = next(i for i, word in enumerate(started) if word.endswith(("train.py", "dfer")))
    words = started[at + 2 :] if started[at].endswith("dfer") else started[at + 1 :]
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", *words])
    assert command_of("train") == called
    assert command_of("make_faces") == ("dfer make-faces" if called == "dfer train" else "python scripts/make_faces.py")


def test_an_installed_project_has_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr("dfer.cli._INSTALLED", tmp_path)
    assert command_of("hash_clips") == "dfer hash-clips"


def named_scripts(tree: ast.AST) -> list[str]:
    """Texts of a program, but for its docstrings, that name a script of ours."""
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [n.value for n in texts if id(n) not in docs and re.search(r"\bscripts/\w+\.py|python train\.py", n.value)]


def test_no_message_names_a_script_by_itself():
    """`command_of` does. Docstrings say where things are; of those that are shown as help the parser makes commands."""
    assert named_scripts(ast.parse("f'x: scripts/pack.py {1}'")) == ["x: scripts/pack.py "]
    assert not named_scripts(ast.parse("def f():\n    'See scripts/pack.py.'\n    return 'pack'"))
    for path in SHIPPED:
        if str(path.relative_to(ROOT)) not in PAGES | {"dfer/cli.py"}:
            assert not named_scripts(parsed(path)), path


# ---- Elsewhere: what runs on GitHub, and what it asks who writes there

GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
JOBS = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]


def what_is_wrong(command: str) -> str | None:
    """Why a command cannot be run in a checkout; None if it can, as far as its program, target or file tell."""
    program, *words = command.split()
    if program == "make":
        known = re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return None if known else f"no target {words[0]}"
    if program.endswith("python"):
        if words[0] == "-m":
            return None if words[1] in ("pip", "venv", "build", "twine") else f"no module {words[1]}"
        return None if (ROOT / words[0]).exists() else f"no file {words[0]}"
    if Path(program).name == "dfer":
        return None if words[0] in {*commands(), "--version"} else f"no command {words[0]}"
    return None if program in ("git", "grep", "mkdir", "cd") else f"no program {program}"


def test_a_command_that_is_not_there_is_noticed():
    for command in (
        "make tset",
        "python scripts/docter.py",
        "../clean/bin/dfer trian",
        "pip install x",
        "python -m pop",
    ):
        assert what_is_wrong(command), command


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_run_what_exists(name):
    steps, job = JOBS[name]["steps"], JOBS[name]
    assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]) and job["timeout-minutes"] <= 60
    for step in steps:
        assert ("uses" in step) != ("run" in step), step
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/x@v1"))
        for command in step.get("run", "").splitlines():
            assert what_is_wrong(command) is None, command
    versions = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert name != "test" or job["strategy"]["matrix"]["python"] == versions


def test_the_jobs_are_these():
    text = (GITHUB / "workflows" / "ci.yml").read_text()
    assert set(JOBS) == {"test", "lint", "docs", "wheel"} and "secrets." not in text
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    runs = [step.get("run", "") for job in JOBS.values() for step in job["steps"]]
    assert {"make test", "make lint", "make docs"} <= set(runs) and any("twine check" in run for run in runs)
    # The script that other machines run says the same.
    assert [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")] == [
        "make lint", "make test"
    ]  # fmt: skip


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_valid_and_name_commands_that_exist(path):
    """By GitHub's rules for forms: https://docs.github.com/communities, syntax for issue forms."""
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for part in form["body"]:
        if part["type"] == "markdown":
            assert part["attributes"].keys() == {"value"}
            continue
        assert part["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"]["label"] and isinstance(part["validations"]["required"], bool)
        options = part["attributes"].get("options", ["x"])
        assert all(isinstance(option, str) for option in options) and len(set(options)) == len(options)
    for command in re.findall(r"`([^`]+)`", path.read_text()):
        assert what_is_wrong(command) is None, command


def test_there_are_forms():
    assert {path.stem for path in FORMS} == {"bug", "wish"}
    assert yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "config.yml").read_text()) == {"blank_issues_enabled": False}
