"""Say what this machine has and lacks: `python scripts/doctor.py`. Attach its output to a report of a problem.

Exit code 2 if training cannot work here; what only costs speed or a feature is named and is no error.
"""

import ctypes
import fcntl
import getpass
import importlib.metadata
import os
import platform
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import EXIT_USAGE, Parser, UserError, begin, usable_cores
from dfer.files import cannot_sync, free_bytes, reason
from dfer.run.launchers import find_place

APP = Path(__file__).resolve().parents[1]
REQUIREMENTS = APP / "requirements.txt"
DEVELOPERS = ("bench", "dev")  # extras of pyproject.toml
MIN_FREE_GB = {"memory": 4.0, "disk": 2.0}  # the faces preset takes 1.3 GB; a run keeps up to 5 checkpoints of 160 MB
CODECS = {"h264": "most videos", "hevc": "phones", "vp9": "web", "av1": "web", "mpeg4": "older files"}
# By what they are called when a program looks for them; the first is the driver's.
GPU_LIBRARIES = {
    "NVDEC, video decoding": (("libnvcuvid.so.1",), "in a container: NVIDIA_DRIVER_CAPABILITIES=video,compute,utility"),
    "nvJPEG, image decoding": (("libnvjpeg.so.12", "libnvjpeg.so.13"), "pip install nvidia-nvjpeg-cu12"),
}


class Finding(NamedTuple):
    """A thing that was examined."""

    what: str
    found: str
    state: Literal["ok", "slower", "missing"]  # slower: or a feature less; missing: training cannot work
    remedy: str = ""


def requirements() -> str:
    """Return the packages: requirements.txt's pins, or pip's ranges of them where it has installed this."""
    if REQUIREMENTS.exists():
        return REQUIREMENTS.read_text(encoding="utf-8")
    return "\n".join(importlib.metadata.requires("dfer") or [])


def packages(requirements: str) -> Iterator[Finding]:
    """Compare the packages of some lines, in the form of requirements.txt, with what is installed.

    Those of extras are a feature each; extras that only developers need are left out.
    """
    from packaging.requirements import Requirement  # loaded here: its lack is one of the findings

    for line in requirements.splitlines():
        if not (line := line.split("#")[0].strip()):
            continue
        wanted = Requirement(line)
        extra = re.search(r'extra == "(\w+)"', str(wanted.marker))
        if extra and extra[1] in DEVELOPERS:
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            install = f"pip install {shlex.quote(f'{wanted.name}{wanted.specifier}')}"
            yield Finding(wanted.name, "not installed", "slower" if extra else "missing", install)
            continue
        same = wanted.specifier.contains(version, prereleases=True)
        yield Finding(
            wanted.name, version, "ok" if same else "slower", "" if same else f"tested with {wanted.specifier}"
        )


def imports(*modules: str) -> Iterator[Finding]:
    """Import modules with compiled parts, each in a process of its own: one that crashes takes nothing along."""
    for module in modules:
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if done.returncode:
            yield Finding(f"import {module}", reason, "missing", "pip install -r requirements.txt, in a new venv")
        else:
            yield Finding(f"import {module}", "works", "ok")


def gpus() -> Iterator[Finding]:
    """Describe the GPUs that torch can use, and look for the libraries that decode on them."""
    import torch

    if not torch.cuda.is_available():
        why = f"none that torch {torch.__version__} can use"
        remedy = "training works on the CPU; for a GPU: its driver (nvidia-smi must list it), then this again"
        if shutil.which("nvidia-smi"):
            remedy = (
                f"nvidia-smi is there: its driver may be too old for CUDA {torch.version.cuda}, or no GPU is visible"
            )
        yield Finding("GPU", why, "slower", remedy)
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield Finding(f"GPU {number}", f"{about.name}, {memory}, sm_{about.major}{about.minor}, {bf16}", "ok")
    for what, (names, remedy) in GPU_LIBRARIES.items():
        found = next((name for name in names if loads(name)), None)
        yield Finding(what, found or f"no {names[0]}", "ok" if found else "slower", "" if found else remedy)


def loads(library: str) -> bool:
    """Return whether a shared library is found and can be loaded."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def codecs() -> Finding:
    """Ask FFmpeg's libraries inside PyAV for the usual codecs."""
    import av

    missing = [f"{name} ({where})" for name, where in CODECS.items() if name not in av.codecs_available]
    if missing:
        return Finding("video codecs", f"no {', '.join(missing)}", "slower", "pip install av: its wheels have them all")
    return Finding("video codecs", " ".join(CODECS), "ok")


def room(folder: Path) -> Iterator[Finding]:
    """Measure the free memory and disk, and whether the folder can be written."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        (line,) = (x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
        yield enough("memory", 1024 * int(line.split()[1]) / 1e9, "close other programs, or lower --data.batch-size")
    if (free := free_bytes(folder)) is None:
        yield Finding("free disk", f"the file system of {folder} does not say", "ok", "runs begin without asking it")
    else:
        yield enough("disk", free / 1e9, f"make room in {folder}, or --run.log-dir elsewhere")
    if not os.access(folder, os.W_OK):
        yield Finding("folder", f"{folder} cannot be written", "missing", "--run.log-dir elsewhere")


def odd_user() -> Iterator[Finding]:
    """Look for a user without a name or a home, as in containers, and for no temporary folder."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        name = getpass.getuser()  # by the environment, where `import dfer` has put one
        yield Finding("user", f"id {os.getuid()} has no name here: {name}", "ok", "USER=NAME names it; all works")
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK | os.X_OK):
        remedy = "pretrained weights and caches want one: HOME, or HF_HOME and NUMBA_CACHE_DIR"
        yield Finding("home folder", f"{home} cannot be written", "slower", remedy)
    try:
        tempfile.TemporaryFile().close()
    except OSError as error:
        yield Finding("temporary folder", reason(error), "slower", "TMPDIR=FOLDER; export and --run.compile need it")


def odd_folder(folder: Path) -> Iterator[Finding]:
    """Look for what the file system of the runs cannot do, and for a folder called ~."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if os.access(folder, os.W_OK):  # else it is said that it cannot be written
            found = f"files in {folder} cannot be locked ({reason(error)})"
            yield Finding("locks", found, "missing", "--run.log-dir on another file system")
    if why := cannot_sync(folder):
        remedy = "after a power cut the last checkpoint may be missing, and the one before counts"
        yield Finding("folders", f"{folder} cannot be synced to the disk ({why})", "slower", remedy)
    if os.path.lexists(folder / "~"):
        yield Finding("a folder called ~", f"lies in {folder}", "slower", "rm -r ./~ removes it; rm -r ~ is your home")


def odd_start() -> Iterator[Finding]:
    """Look for a place to keep machine code in, for half a launcher's environment, and how W&B would record."""
    code = "from dali_pipes import headers; print(headers.claimed_pixels._cache.cache_path)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(APP)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.strip() == "None":
        remedy = "it is compiled at each start; NUMBA_CACHE_DIR=FOLDER names one"
        yield Finding("machine code", "no folder to keep it in can be written", "slower", remedy)
    try:
        find_place()
    except UserError as error:
        yield Finding("launcher", str(error), "missing", "see there")
    try:
        from dfer.run.wandb_log import mode_of_machine

        mode = mode_of_machine()
        remedy = "" if mode == "online" else "wandb login, for online; WANDB_MODE and `wandb online` count too"
        yield Finding("W&B", f"--run.wandb auto is {mode} here", "ok", remedy)
    except (ImportError, UserError) as error:
        yield Finding("W&B", reason(error), "slower", "--run.wandb off")


def enough(what: str, free_gb: float, remedy: str) -> Finding:
    ok = free_gb >= MIN_FREE_GB[what]
    return Finding(f"free {what}", f"{free_gb:.1f} GB", "ok" if ok else "slower", "" if ok else remedy)


def python() -> Finding:
    version = sys.version_info[:2]
    ok = (3, 11) <= version <= (3, 13)
    remedy = "" if ok else "Python 3.11 to 3.13: make PYTHON=python3.12 ..."
    return Finding("Python", platform.python_version(), "ok" if ok else "missing", remedy)


def examine(folder: Path) -> list[Finding]:
    """Examine everything, in the order in which one thing needs another."""
    findings = [python(), *packages(requirements())]
    findings += imports("torch", "nvidia.dali", "numba", "cv2", "timm")
    works = {f.what for f in findings if f.state != "missing"}
    if "import torch" in works:
        findings += gpus()
    if "av" in works:
        findings.append(codecs())
    if {"import torch", "import numba"} <= works:
        findings += odd_start()
    return [*findings, *room(folder), *odd_user(), *odd_folder(folder)]


def run() -> int:
    print("doctor: looking at this machine", flush=True)
    try:
        findings = examine(Path.cwd())
    except FileNotFoundError:
        print("doctor: the folder that this was started in is gone: cd to another", file=sys.stderr)
        return EXIT_USAGE
    table = Table(title=f"{platform.platform()}, {usable_cores()} cores")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok", "slower": "[yellow]!", "missing": "[red]missing"}
    for finding in findings:
        table.add_row(marks[finding.state], *(escape(x) for x in (finding.what, finding.found, finding.remedy)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    missing = [finding.what for finding in findings if finding.state == "missing"]
    if missing:
        print(f"doctor: training cannot work here: {', '.join(missing)}: see above", file=sys.stderr)
    return EXIT_USAGE if missing else 0


def main(arguments: list[str]) -> int:
    Parser("doctor", __doc__).parse_args(arguments)
    return run()


if __name__ == "__main__":
    begin("doctor")
    sys.exit(main(sys.argv[1:]))
