"""Who has started this process: nobody, torchrun, or a launcher that starts runs of one process each."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dfer.cli import UserError, say_once

# In which variable a launcher says how many processes it has started. Slurm has one for a job and one for a step.
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
}
_TORCHRUN = "start several processes with torchrun"


class LauncherError(UserError):
    """What has started this process does not work. Each process says so, since none of them knows of the others."""

    said_by_all = True


class Place(NamedTuple):
    """The place of this process among those of a run."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def own_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without the one that torch.distributed.launch and DeepSpeed add.

    Raises:
        LauncherError: if they have not left in the environment what torchrun does, by which a process finds its place.
    """
    ranks = [word for word in words if re.fullmatch(r"--local[-_]rank(=\d+)?", word)]
    if not ranks:
        return list(words)
    words = shlex.split(re.sub(r"(?<!\S)--local[-_]rank[= ]\d+", "", shlex.join(words)))
    command = f"torchrun --nproc_per_node={number('LOCAL_WORLD_SIZE', number('WORLD_SIZE', 1))}"
    command = f"{command} {shlex.join([sys.argv[0], *words])}"
    if "WORLD_SIZE" not in os.environ:
        raise LauncherError(f"{ranks[0]} is of torch.distributed.launch or DeepSpeed; use torchrun instead: {command}")
    say_once(f"{ranks[0]} is of torch.distributed.launch or DeepSpeed; torchrun does without it: {command}")
    return words


def check_tasks() -> None:
    """Look for a launcher that has started several processes which do not know of each other.

    Raises:
        LauncherError: if there is one, with the command for torchrun.
    """
    for name, launcher in _TASKS.items():
        tasks = os.environ.get(name, "")
        if "WORLD_SIZE" not in os.environ and re.fullmatch("[0-9]{1,9}", tasks) and int(tasks) > 1:
            here = re.match("[0-9]+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "") if launcher == "srun" else "")
            raise LauncherError(
                f"{launcher} has started {tasks} processes, which would be runs of their own; use torchrun, one on a "
                f"machine: torchrun --nproc_per_node={here[0] if here else tasks} {shlex.join(sys.argv)}, or "
                f"scripts/slurm/train.sbatch; if they are to be runs of their own: env -u {name} before the command"
            )


def find_place() -> Place:
    """Return the place that torchrun has given this process; without torchrun it is alone.

    Raises:
        LauncherError: if the environment has only a part of what torchrun leaves, or numbers that make no sense.
    """
    check_tasks()
    place = Place(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))
    given = ", ".join(
        f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ
    )
    alone = "env -u RANK -u WORLD_SIZE -u LOCAL_RANK before the command for one"
    lacks = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if place.size > 1 and lacks:
        raise LauncherError(f"the environment has {given} and no {', '.join(lacks)}: {_TORCHRUN}, or {alone}")
    # DeepSpeed and others say no LOCAL_WORLD_SIZE.
    beside = place.local_size if "LOCAL_WORLD_SIZE" in os.environ else place.size
    if place.rank >= place.size or place.local_rank >= beside:
        raise LauncherError(f"the environment has {given}, which is no process of torchrun's: {_TORCHRUN}, or {alone}")
    return place


def own_environment() -> dict[str, str]:
    """Return the environment for a run that this process starts by itself, whatever has started several of this one."""
    return {name: value for name, value in os.environ.items() if name not in _TASKS}


def number(name: str, default: int | None) -> int:
    """Return a number that a launcher has left in the environment; without a default it has to be there.

    Raises:
        LauncherError: if it is none.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise LauncherError(f"the environment's {name} is {text!r}, not a number: {_TORCHRUN}")
    return int(text)
