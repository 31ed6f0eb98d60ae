"""Two nodes, each a network namespace of its own with a cable between them, are one node; the cable may be cut."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.conftest import ROOT
from tests.test_resume import SMALL, assert_ends_as, play_together, what_was_computed
from tests.test_train import losses

WHY_NOT = "" if not os.geteuid() and shutil.which("ip") else "network namespaces need root and iproute2's ip"
ADDRESSES = ("10.0.0.1", "10.0.0.2")  # in networks that nobody else is in
PORT = 29400


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_nodes() -> Iterator[list[str]]:
    """The names of two network namespaces with one cable between them; they end with all that runs in them."""
    nodes = [f"dfer-{os.getpid()}-{secrets.token_hex(3)}-{side}" for side in (0, 1)]
    with contextlib.ExitStack() as stack:
        for node in nodes:
            ip("netns", "add", node)
            stack.callback(remove, node)
        ip("link", "add", "eth0", "netns", nodes[0], "type", "veth", "peer", "name", "eth0", "netns", nodes[1])
        for node, address in zip(nodes, ADDRESSES, strict=True):
            ip("-n", node, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", node, "link", "set", "lo", "up")
            cable(node, "up")
        yield nodes


def remove(node: str) -> None:
    for pid in processes_of(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ip("netns", "delete", node)


def processes_of(node: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", node).split()]


def cable(node: str, state: Literal["up", "down"]) -> None:
    ip("-n", node, "link", "set", "eth0", state)


def torchrun_on(
    nodes: list[str], side: int, rendezvous: Literal["static", "c10d"], words: list[str], out: Path
) -> subprocess.Popen:
    """Start two of the four ranks, whose output is added to a file."""
    launcher = ["ip", "netns", "exec", nodes[side], sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--nnodes=2", "--nproc_per_node=2", "--max-restarts=0", f"--local-addr={ADDRESSES[side]}"]
    if rendezvous == "static":
        launcher += [f"--node-rank={side}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
    else:  # these addresses are not those of the machine's name, by which torchrun would know who has the store
        launcher += ["--rdzv-backend=c10d", "--rdzv-id=x", f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}"]
        launcher += [f"--rdzv-conf=is_host={1 - side}"]
    with open(out, "a") as file:
        return subprocess.Popen(
            [*launcher, "train.py", *words], cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def one_node(clips, tmp_path_factory):
    """What four ranks on one node compute."""
    folder = tmp_path_factory.mktemp("one node")
    extra = ("--run.name", "x", "--optim.accumulate", "1", "--data.batch-size", "1")
    done = play_together(4, "-", clips, folder, *extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(folder / "logs" / "x")) == 6
    return what_was_computed(folder / "logs" / "x")


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize(("rendezvous", "cut"), [("static", 0), ("c10d", 1)])
def test_two_nodes_compute_what_one_does_and_end_and_continue_when_the_link_is_cut(
    one_node, clips, tmp_path, rendezvous, cut
):
    words = [*SMALL, "--optim.accumulate", "1", "--data.batch-size", "1", "--run.log-dir", str(tmp_path / "logs")]
    words += ["--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt"]
    out = [tmp_path / f"node {side}.txt" for side in (0, 1)]

    def start(*extra: str) -> list[subprocess.Popen]:
        return [torchrun_on(nodes, side, rendezvous, [*words, *extra], out[side]) for side in (0, 1)]

    def said() -> str:
        return "".join(path.read_text() for path in out)

    with two_nodes() as nodes:
        assert [process.wait(300) for process in start("--run.name", "whole")] == [0, 0], said()
        assert_ends_as(tmp_path / "logs" / "whole", one_node)

        both = start("--run.name", "cut", "--run.timeout", "15")
        rows = tmp_path / "logs" / "cut" / "metrics.jsonl"
        give_up = time.monotonic() + 200
        while not (rows.exists() and rows.read_bytes()) and time.monotonic() < give_up:
            assert [process.poll() for process in both] == [None, None], said()
            time.sleep(0.01)
        cable(nodes[cut], "down")
        codes = [process.wait(150) for process in both]  # TCP itself would go on for a quarter of an hour
        assert 0 not in codes, said()
        give_up = time.monotonic() + 20
        while (left := processes_of(nodes[0]) + processes_of(nodes[1])) and time.monotonic() < give_up:
            time.sleep(0.1)
        assert not left, said()
        for side, path in enumerate(out):
            lines = sorted(line for line in path.read_text().splitlines() if line.startswith("train.py: rank "))
            what = ("ranks 2, 3 of 4 died or did not answer", "neither a rank nor the store on 10.0.0.1")[side]
            assert len(lines) == 2 and all(what in line and "the same command continues" in line for line in lines)
            assert [line.split(": ")[1] for line in lines] == [f"rank {2 * side}", f"rank {2 * side + 1}"]

        cable(nodes[cut], "up")
        assert [process.wait(300) for process in start("--run.name", "cut")] == [0, 0], said()
        assert "continuing from step" in out[0].read_text()
        assert_ends_as(tmp_path / "logs" / "cut", one_node)
