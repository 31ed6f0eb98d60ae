"""What the pages say can be done is done: every command of them names what exists, and is run, small (slow)."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfer.config import parse_config
from dfer.lists.annotations import EMOTIONS
from tests.conftest import ROOT
from tests.releases import build_dfew, build_ferv39k

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# In this order: lists that one has prepared are used by another. tests/test_wandb.py runs those of wandb.md.
NAMES = ("your-data", "dfew-ferv39k", "weights", "multi-node", "speed", "crf")
GUIDES = [ROOT / "docs" / f"{name}.md" for name in NAMES]
TINY_DATA = "--data.size 32 --data.num-segments 2 --data.batch-size 2"
# 8 steps: --profile 5 has three to warm up before.
TINY = f"{TINY_DATA} --model.dim 16 --optim.epochs 1 --optim.steps-per-epoch 8 --run.wandb off --run.device cpu"
SMALLER = {  # what is added to a command to make it small, by its script
    "train.py": TINY,
    "scripts/crossval.py": f"-- {TINY}",
    "scripts/prepare_videos.py": "--no-crop",  # in some of the drawn videos no face is found, which is exit code 1
    "scripts/prepare_dfew.py": "--allow-missing",  # a miniature of the release
    "scripts/prepare_ferv39k.py": "--allow-missing",
    "benchmarks/loader_speed.py": "--clips 24 --frames 2 --size 32 --batch-size 2 --rounds 1 --seconds .1 --patience 0",
    "benchmarks/busy.py": "--ways threads --rounds 1 --seconds 1",
    "benchmarks/crf_speed.py": "--tokens 104 --batches 1 --rounds 1 --patience 0",
    "benchmarks/model_comparison.py": f"--models both-t3 none-t3 --seeds 1 --file runs.jsonl -- {TINY}",
}


def commands(page: Path) -> list[str]:
    """The lines of a page's blocks that are commands, without what is said about them."""
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun|sbatch|make|awk) ", line)]


def script_of(words: list[str]) -> int:
    """Where the script of ours stands among the words of a command."""
    return next(i for i, word in enumerate(words) if word.endswith((".py", ".sbatch")))


def test_all_pages_are_read_and_guides_have_commands():
    assert len(PAGES) >= 8 and all(len(commands(page)) >= 2 for page in GUIDES)
    assert commands(ROOT / "README.md")[:2] == ["make train", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page):
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            continue
        if words[0] == "awk" or words[1] == "-m":
            continue
        at = script_of(words)
        script, rest = words[at], words[at + 1 :]
        if script in ("train.py", "scripts/slurm/train.sbatch"):
            if "--help" not in rest:
                parse_config(rest)
            continue
        source = (ROOT / script.replace("slurm/crossval.sbatch", "crossval.py")).read_text()
        # Some flags of a script are those of a module that several scripts share.
        for module, name in re.findall(r"from (dfer[.\w]*) import (\w+)", source):
            files = [ROOT / f"{path.replace('.', '/')}.py" for path in (module, f"{module}.{name}")]
            source += "".join(file.read_text() for file in files if file.exists())
        own = rest[: rest.index("--")] if "--" in rest else rest
        for flag in (word for word in own if word.startswith("--")):
            name = flag.split("=")[0].replace("--no-", "--")
            assert f'"{name}"' in source, f"{page.name}: {command}: no {flag} in {script}"


def test_a_flag_that_is_not_there_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\npython scripts/predict.py a.mp4 --chekpoint logs/a   # words\n```\n")
    assert commands(page) == ["python scripts/predict.py a.mp4 --chekpoint logs/a"]
    with pytest.raises(AssertionError, match="no --chekpoint"):
        test_commands_name_what_exists(page)


def rows_of(path: Path) -> list[list[str]]:
    """The words of a list's rows."""
    return [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a fresh clone with data: the project's files by links, everything else its own."""
    root = tmp_path_factory.mktemp("docs")
    for name in ("train.py", "scripts", "dfer", "dali_pipes", "benchmarks"):
        (root / name).symlink_to(ROOT / name)
    drawn = root / "drawn"
    faces = [sys.executable, "scripts/make_faces.py", "--size", "0.03"]
    subprocess.run([*faces, "--out", str(drawn), "--video", "h264"], cwd=ROOT, check=True)
    subprocess.run([*faces, "--out", str(root / "data" / "faces")], cwd=ROOT, check=True)
    for path, _, label in rows_of(drawn / "train_h264.txt")[:20]:
        folder = root / "videos" / EMOTIONS[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / path, folder / Path(path).name)
    for list_name in ("train", "test"):  # a still of each of some clips
        for path, _, label in rows_of(root / "data" / "faces" / f"{list_name}.txt")[:30]:
            folder = root / "FER2013" / list_name / EMOTIONS[int(label)].lower()
            folder.mkdir(parents=True, exist_ok=True)
            clip = root / "data" / "faces" / path
            shutil.copy(next(clip.glob("*.jpg")), folder / f"{clip.name}.jpg")
    build_dfew(root / "DFEW")
    build_ferv39k(root / "FERV39k")
    return root


@pytest.mark.slow
def test_the_commands_of_the_guides_run_one_after_the_other(checkout):
    # `python` and `torchrun` are those that run the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    for command in (command for page in GUIDES for command in commands(page)):
        words = shlex.split(command)
        if words[0] == "sbatch":
            continue  # tests/test_slurm.py
        if words[0] != "awk":
            smaller = SMALLER.get(words[script_of(words)], "")
            command += f" {smaller.removeprefix('-- ') if '--' in words else smaller}"
        shell = ["bash", "-c", command]
        done = subprocess.run(shell, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
