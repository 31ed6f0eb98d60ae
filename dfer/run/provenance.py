"""Which code and which machine ran a run: a line of started.jsonl in its folder for each start."""

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from dfer import __version__
from dfer.cli import usable_cores
from dfer.files import disk_errors, reason
from dfer.lists.annotations import DRAWN
from dfer.run.distributed import World

STARTED = "started.jsonl"
ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 10  # of git, on a disk that hangs


def note_start(run: Path, step: int, world: World, faces: str) -> None:
    """Add the line of a start from `step` on to what earlier starts have left; `faces`: as of `listed_faces`.

    Raises:
        UserError: if it cannot be written.
    """
    about = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "step": step, "processes": world.size}
    about["faces"] = faces
    with disk_errors("cannot write"), open(run / STARTED, "a", encoding="utf-8") as file:
        file.write(json.dumps(about | code() | machine(world.device)) + "\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return what each start of a run has noted; of runs of older versions nothing is known."""
    try:
        lines = (run / STARTED).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            start = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(start, dict):
            found.append(start)
    return found


def describe_starts(starts: list[dict[str, Any]]) -> str:
    """Return in a line by what a run was made, each code and device once; "" if nothing is known."""
    lines = []
    for start in starts:
        commit, device = start.get("commit"), start.get("gpu") or start.get("device", "?")
        changed = ", with changes that are in no commit" if start.get("changed") else ""
        code = f"commit {str(commit)[:12]}{changed}" if commit else f"commit unknown: {start.get('no_commit', '?')}"
        driver = f", driver {start['driver']}" if start.get("driver") else ""
        lines.append(f"dfer {start.get('version', '?')} ({code}) on {start.get('processes', '?')} x {device}{driver}")
    return "; then ".join(dict.fromkeys(lines))


def trained_on(faces: str | None, train_list: Path | str) -> str:
    """Return in a line what a model was trained on, as it is said wherever the model speaks of people.

    Args:
        faces: what the run has recorded, see `listed_faces`; None: nothing, as older versions did.
        train_list: the list that it was trained on.
    """
    if faces == DRAWN:
        return "trained on drawn faces (make_faces): what it says of people means nothing"
    where = "clips that only its model card names" if str(train_list) == "unknown" else f"{train_list}"
    return f"trained on {where}{'; whether on drawn faces was not recorded' if faces is None else ''}"


def code(root: Path = ROOT) -> dict[str, Any]:
    """Return the version, the commit and whether files were changed since; why there is no commit, where there is none.

    Args:
        root: the folder that holds dfer/.
    """
    about: dict[str, Any] = {"version": __version__, "commit": None, "changed": None}
    if shutil.which("git") is None:
        return about | {"no_commit": "git is not installed"}
    try:
        top, commit = _git(root, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root:  # installed within somebody's repository, which has other commits
            return about | {"no_commit": "no repository of the project"}
        changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except subprocess.CalledProcessError as error:
        return about | {"no_commit": " ".join(error.stderr.split())[:200] or f"git ended with {error.returncode}"}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return about | {"no_commit": reason(error)}
    return about | {"commit": commit, "changed": changed}


def _git(root: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # hooks set another's
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, env=env
    )
    return done.stdout


def machine(device: torch.device) -> dict[str, Any]:
    """Return the device, its driver and the versions of Python and torch."""
    about = {"device": device.type, "python": platform.python_version(), "torch": str(torch.__version__)}
    about |= {"cpu": _processor(), "cores": usable_cores()}
    if device.type != "cuda":
        return about
    return about | {"gpu": torch.cuda.get_device_name(device), "driver": driver_version()}


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, or its architecture where it has none."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", path.read_text(errors="replace"))
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.machine()


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's driver, if it can be told."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text())
    except OSError:
        return None
    return found[1] if found else None
