"""What starts processes: torchrun, others that are told so, and environments that are left over from one."""

import os
import re
import subprocess

import pytest

from dfer import cli
from dfer.config import parse_config
from dfer.run.launchers import LauncherError, find_place, own_environment, own_words
from tests.conftest import ROOT, run_python
from tests.nursery import python_path

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # fmt: skip


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def environment(text: str) -> dict[str, str]:
    return dict(part.split("=") for part in text.split())


HERE = "MASTER_ADDR=127.0.0.1 MASTER_PORT=1"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("WORLD_SIZE=2", "WORLD_SIZE=2 and no RANK, MASTER_ADDR, MASTER_PORT: start several processes with torchrun"),
        ("WORLD_SIZE=4 RANK=3 MASTER_ADDR=n1", "RANK=3, WORLD_SIZE=4 and no MASTER_PORT"),
        (f"WORLD_SIZE=2 {HERE}", "and no RANK:"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR= MASTER_PORT=1", "and no MASTER_ADDR:"),
        ("RANK=1", "RANK=1, which is no process of torchrun's"),
        ("LOCAL_RANK=3", "LOCAL_RANK=3, which is no process"),
        (f"WORLD_SIZE=2 RANK=2 {HERE}", "RANK=2, WORLD_SIZE=2, which is no process"),
        (f"WORLD_SIZE=8 RANK=2 LOCAL_RANK=4 LOCAL_WORLD_SIZE=4 {HERE}", "LOCAL_RANK=4, which is no process"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0, which is no process"),
        ("WORLD_SIZE=two", "WORLD_SIZE is 'two', not a number"),
        ("RANK=-1", "RANK is '-1', not a number"),
    ],
)
def test_half_an_environment_is_one_line(left, said, monkeypatch, capsys):
    """Whatever the rank: no process speaks for another one that was never started."""
    for name, value in environment(left).items():
        monkeypatch.setenv(name, value)
    assert cli.one_line_errors("train.py", lambda: find_place()) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said in line and "torchrun" in line


@pytest.mark.parametrize(
    ("left", "place"),
    [
        ("", (0, 1, 0, 1)),
        ("WORLD_SIZE=1 RANK=0 MASTER_ADDR=x", (0, 1, 0, 1)),
        ("MASTER_ADDR=n1 MASTER_PORT=29500", (0, 1, 0, 1)),  # of a module or a notebook
        (f"WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 {HERE}", (3, 4, 1, 2)),
        (f"WORLD_SIZE=2 RANK=1 {HERE}", (1, 2, 0, 1)),  # a process in each pod
        (f"WORLD_SIZE=2 RANK=1 LOCAL_RANK=1 {HERE}", (1, 2, 1, 1)),  # DeepSpeed
        ("SLURM_STEP_NUM_TASKS=1", (0, 1, 0, 1)),
        (f"SLURM_STEP_NUM_TASKS=2 WORLD_SIZE=2 RANK=1 {HERE}", (1, 2, 0, 1)),  # torchrun on two nodes
        ("SLURM_NTASKS=2", (0, 1, 0, 1)),  # of a job, in which this is no step of several tasks
    ],
)
def test_whole_environments_are_places(left, place, monkeypatch):
    for name, value in environment(left).items():
        monkeypatch.setenv(name, value)
    assert find_place() == place


@pytest.mark.parametrize(
    ("left", "launcher", "here"),
    [
        ("SLURM_STEP_NUM_TASKS=2", "srun", 2), ("SLURM_STEP_NUM_TASKS=8 SLURM_STEP_TASKS_PER_NODE=4(x2)", "srun", 4),
        ("OMPI_COMM_WORLD_SIZE=3", "mpirun", 3), ("PMI_SIZE=5", "mpiexec", 5),
    ],
)  # fmt: skip
def test_other_launchers_are_told_of_torchrun(left, launcher, here, monkeypatch):
    for name, value in environment(left).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["train.py", "debug", "--run.name", "a b"])
    with pytest.raises(LauncherError, match=f"^{launcher} has started") as error:
        find_place()
    assert f"torchrun --nproc_per_node={here} train.py debug --run.name 'a b'" in str(error.value)
    (name,) = re.findall("env -u ([A-Z_]+) before", str(error.value))
    monkeypatch.delenv(name)
    find_place()


def test_what_crossval_starts_is_its_own(monkeypatch):
    """Of several tasks of a step, each with a part of the folds."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "5")
    assert own_environment() == {name: v for name, v in os.environ.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert parse_config(["debug"]).preset == "debug"


@pytest.mark.parametrize("word", ["--local-rank=1", "--local_rank=1", "--local_rank 1"])
@pytest.mark.parametrize("order", ["{word} debug --seed 3", "debug --seed 3 {word}"])
def test_the_word_of_older_launchers(word, order, monkeypatch, capsys):
    words = order.format(word=word).split()
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    torchrun = "torchrun --nproc_per_node={} train.py debug --seed 3"
    with pytest.raises(LauncherError, match=f"{torchrun.format(1)}$"):
        parse_config(words)
    for name, value in environment(f"WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2 {HERE}").items():
        monkeypatch.setenv(name, value)
    cli.say_once.cache_clear()
    assert parse_config(words) == parse_config(["debug", "--seed", "3"])
    assert torchrun.format(2) in capsys.readouterr().err
    assert own_words(["--local-rank-of=3", "a --local-rank=1"]) == ["--local-rank-of=3", "a --local-rank=1"]


JOINED = """
import sys
from datetime import timedelta
from dfer.cli import one_line_errors
from dfer.run import distributed
sys.exit(one_line_errors("train.py", lambda: distributed.setup("cpu", timedelta(seconds=1)) and None))
"""


@pytest.mark.parametrize(
    "left",
    ["RANK=1 MASTER_ADDR=127.0.0.1", pytest.param("RANK=0 MASTER_ADDR=127.0.0.1", marks=pytest.mark.slow),
     pytest.param("RANK=1 MASTER_ADDR=no-such-host.invalid", marks=pytest.mark.slow)],
)  # fmt: skip
def test_processes_that_do_not_come_are_one_line(left):
    port = str(20000 + os.getpid() % 12000)
    env = {**environment(left), "WORLD_SIZE": "2", "MASTER_PORT": port}
    done = run_python("-c", JOINED, fresh=False, PYTHONPATH=python_path(), **env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(lines) == 1 and "finds not all 2 processes" in lines[0] and port in lines[0]


# ---- train.sbatch, Slurm played by scripts that note how they were called.

JOB = ROOT / "scripts" / "slurm" / "train.sbatch"


def srun_of(tmp_path, **slurm: str) -> str:
    """The words of srun in a job with these variables."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, body in {"srun": f'echo "$*" >{tmp_path}/words', "scontrol": "echo node1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NUM_NODES": "1", "JOB_NODELIST": "node1", "CPUS_ON_NODE": "8"} | slurm
    keep = {name: value for name, value in os.environ.items() if not name.startswith("SLURM") and name != "MASTER_PORT"}
    env = keep | {"PATH": f"{tmp_path}/bin:{keep['PATH']}"} | {f"SLURM_{name}": value for name, value in job.items()}
    env |= {"MASTER_PORT": slurm["MASTER_PORT"]} if "MASTER_PORT" in slurm else {}
    subprocess.run(["bash", JOB, "debug", "--run.name", "a"], env=env, cwd=ROOT, check=True, timeout=20)
    return (tmp_path / "words").read_text()


@pytest.mark.parametrize(
    ("slurm", "cores"),
    [
        ({"CPUS_PER_TASK": "6"}, 6), ({}, 8), ({"JOB_CPUS_PER_NODE": "12"}, 12),
        ({"JOB_NUM_NODES": "3", "JOB_CPUS_PER_NODE": "16(x2),10"}, 10),
        ({"JOB_NUM_NODES": "2", "JOB_CPUS_PER_NODE": "9(x2)"}, 9),
    ],
)  # fmt: skip
def test_a_step_has_the_cores_of_its_job(slurm, cores, tmp_path):
    """Since Slurm 22.05 srun has to be told."""
    assert re.findall(r"--cpus-per-task=(\S+)", srun_of(tmp_path, **slurm)) == [str(cores)]


def test_jobs_on_one_node_have_ports_of_their_own(tmp_path):
    def endpoint(**slurm):
        return re.findall(r"--rdzv_endpoint=(\S+)", srun_of(tmp_path, **slurm))[0]

    # One that is free, whatever the shell that submitted the job had in its environment.
    assert endpoint() == endpoint(MASTER_PORT="29500") == "localhost:0"
    several = [endpoint(JOB_NUM_NODES="2", JOB_ID=str(number)) for number in (4711, 4712, 9_123_456)]
    assert len(set(several)) == 3
    assert all(host == "node1" and 20000 <= int(port) < 32000 for host, port in (s.split(":") for s in several))
    assert endpoint(JOB_NUM_NODES="2", MASTER_PORT="29500") == "node1:29500"
