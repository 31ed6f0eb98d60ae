"""W&B's own client, online against a server of ours that fails as servers do: training must not notice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from csv import DictReader
from pathlib import Path

import pytest

from dfer.lists.annotations import EMOTIONS
from tests.conftest import ROOT
from tests.test_train import TINY, rows, tiny_run
from tests.wandb_server import FakeWandb, Run

KEY = "0123456789abcdef" * 2 + "canary00"
TABLES = {"val/confusion_matrix_table", "val/hardest_clips"}
# What a training process does with its logger, without the training: so many rows, one for each line that it is given.
DRIVER = """
import functools, sys, time, wandb
from pathlib import Path
from dfer.config import parse_config
from dfer.run.logger import Logger
bounds = {"init_timeout": float(sys.argv[4]), "finish_timeout": float(sys.argv[5])}
wandb.Settings = functools.partial(lambda make, **k: make(**k | bounds), wandb.Settings)
run_dir, start, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
began = time.monotonic()
config = parse_config(["debug", "--run.wandb", sys.argv[6]])
logger = Logger(run_dir, config, total, start_step=start, start_evaluated=start == total)
print("open", time.monotonic() - began, flush=True)
for step in range(start + 1, total + 1):
    if not sys.stdin.readline():
        break
    began = time.monotonic()
    logger.row(step, {"train/loss": 1 / step})
    print(step, time.monotonic() - began, flush=True)
began = time.monotonic()
logger.evaluated("epoch", {"WAR": [50.0, 1], "UAR": [40.0, 1]})
logger.close()
print("closed", time.monotonic() - began, flush=True)
"""


@pytest.fixture
def server():
    with FakeWandb() as fake:
        yield fake


class Client:
    """A process that logs, row by row."""

    def __init__(
        self, server: FakeWandb, run_dir: Path, start=0, total=12, init_timeout=30, finish_timeout=30, mode="auto"
    ):
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, (run_dir, start, total, init_timeout, finish_timeout, mode))],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**environment, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
        )  # fmt: skip
        self.said: list[str] = []
        self.opened = self.told("open")

    def told(self, what: str) -> float:
        """Wait for a line of the driver and return its seconds."""
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith(f"{what} "):
                return float(line.split()[1])
        raise AssertionError(f"no {what!r} in:\n{''.join(self.said)}")

    def rows(self, first: int, last: int) -> float:
        """Log these rows and return the seconds of the slowest."""
        slowest = 0.0
        for step in range(first, last + 1):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            slowest = max(slowest, self.told(str(step)))
        return slowest

    def close(self) -> float:
        self.process.stdin.close()
        seconds = self.told("closed")
        assert self.process.wait(30) == 0
        self.process.stdout.close()
        return seconds

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()


def recorded(server: FakeWandb, run_dir: Path) -> list[dict]:
    run = server.runs[(run_dir / "wandb-id.txt").read_text()]
    assert run.numbers == list(range(len(run.numbers)))  # no row twice, none left out
    return run.rows


def numbers_of(recorded_rows: list[dict]) -> list[dict]:
    """Without the tables, which only the last row has."""
    assert not any(TABLES & set(row) for row in recorded_rows[:-1])
    return [{key: value for key, value in row.items() if key not in TABLES} for row in recorded_rows]


def wait_for(condition, seconds: float = 30) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_whole_run_online(clips, tmp_path, server):
    tiny_run(
        clips, tmp_path, "a", "--run.wandb", "auto",
        WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_MODE="online",
    )  # fmt: skip
    run_dir = tmp_path / "a"
    assert numbers_of(recorded(server, run_dir)) == rows(run_dir)
    (run,) = server.runs.values()
    assert run.complete and set(run.rows[-1]) - set(rows(run_dir)[-1]) == TABLES
    assert run.about == {
        "groupName": clips.name, "jobType": "train", "tags": [clips.name, "seed0", "dfernet"],
    }  # fmt: skip
    assert run.config["dataset"]["value"] == clips.name and run.config["fold"]["value"] is None
    assert not server.unknown
    assert axes(run) == {"train/*": "step", "throughput/*": "step", "crf/*": "step", "val/*": "epoch"}
    best = max(row["val/WAR"] for row in rows(run_dir) if "val/WAR" in row)
    assert run.summary["best/WAR"] == pytest.approx(best)
    assert run.config["data"]["value"]["num_segments"] == 2
    # No key in any file or upload; no pictures of faces; no more of the machine than the client needs.
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert not [path for path, data in files.items() if KEY.encode() in data]
    assert not [name for name, data in run.uploads.items() if KEY.encode() in data]
    assert not [name for name in run.uploads if name.endswith((".jpg", ".png", ".mp4", ".gif"))]
    assert not [name for name, data in run.uploads.items() if b"test clips/" in data]  # nor what the clips are called
    (table,) = (json.loads(data) for name, data in run.uploads.items() if name.startswith("media/table/val/hardest"))
    assert table["data"] == hardest(run_dir)


def axes(run: Run) -> dict[str, str]:
    """What each name is drawn over, as the client encodes it: 1 name, 2 names, 5 number of the axis."""
    metrics = run.config["_wandb"]["value"]["m"]
    return {metric["2"]: metrics[metric["5"] - 1]["1"] for metric in metrics if "2" in metric}


def hardest(run_dir: Path) -> list[list]:
    with open(run_dir / "predictions.csv", newline="") as file:
        clips = [
            (int(r["label"]), int(r["prediction"]), [float(r[f"p_{e}"]) for e in EMOTIONS]) for r in DictReader(file)
        ]
    order = sorted(range(len(clips)), key=lambda i: clips[i][2][clips[i][0]])
    return [
        [2 + i, EMOTIONS[label], EMOTIONS[predicted], p[label], max(p)]
        for i, (label, predicted, p) in ((i, clips[i]) for i in order)
    ]


def inspected(folder: Path) -> list[dict]:
    """The rows of an offline run's file, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = [r["history"]["item"] for r in map(json.loads, done.stdout.splitlines()) if r["type"] == "history"]
    assert [row["_step"] for row in found] == list(range(len(found)))
    # Of a table it shows parts: "val/hardest_clips.nrows".
    own = [{key.split(".")[0]: v for key, v in row.items() if not key.startswith("_")} for row in found]
    return numbers_of(own)


def sync(server: FakeWandb, run_dir: Path) -> None:
    """As docs/wandb.md says."""
    folders = map(str, (run_dir / "wandb").glob("offline-run-*"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *folders], cwd=ROOT, check=True, capture_output=True, timeout=300,
        env={**environment, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
    )  # fmt: skip


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_offline_holds_the_rows_of_metrics_jsonl(killed, clips, tmp_path, server):
    run_dir = tmp_path / "a"
    flags = ("--run.wandb", "offline", "--run.save-minutes", "0", "--optim.accumulate", "2")
    if killed:
        lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
        where = ("--run.log-dir", str(tmp_path), "--run.name", "a")
        process = subprocess.Popen(
            [sys.executable, "train.py", *TINY, *lists, *where, *flags], cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) >= 3, 120)
        process.kill()
        process.wait()
    tiny_run(clips, tmp_path, "a", *flags)
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert len(rows(run_dir)) == 6 and inspected(folder) == rows(run_dir)
    for row in (row for row in rows(run_dir) if "train/loss" in row):
        speed = row["throughput/total_clips_per_s"]
        assert row["throughput/step_ms"] == pytest.approx(1000 * 4 * 2 / speed)  # of 4 clips, and 2 batches per step
        assert row["throughput/per_gpu_clips_per_s"] == speed and 0.1 < row["throughput/memory_gb"] < 100
    sync(server, run_dir)
    assert numbers_of(recorded(server, run_dir)) == rows(run_dir)
    (run,) = server.runs.values()
    assert (
        run.complete
        and set(run.rows[-1]) > TABLES
        and run.summary["best/WAR"] == pytest.approx(max(row["val/WAR"] for row in rows(run_dir) if "val/WAR" in row))
    )


@pytest.mark.slow  # test_a_run_offline_holds_the_rows_of_metrics_jsonl is not
@pytest.mark.parametrize("then", ["offline", "sync, offline", "online"])
def test_a_run_continued_after_an_offline_part_is_recorded_once(then, tmp_path, server):
    run_dir = tmp_path / "a"
    client = Client(server, run_dir, mode="offline")
    client.rows(1, 5 if then == "sync, offline" else 7)
    client.close()
    if then == "sync, offline":
        sync(server, run_dir)
    client = Client(server, run_dir, start=5, mode=then.split()[-1])
    client.rows(6, 12)
    client.close()
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == {"offline": 1, "sync, offline": 2, "online": 0}[then]
    if then == "offline":
        assert inspected(folders[0]) == rows(run_dir)
        Client(server, run_dir, start=12, mode="auto").close()  # nothing is left to do
        assert sorted((run_dir / "wandb").glob("*run-*")) == folders
    if folders:
        sync(server, run_dir)
    assert recorded(server, run_dir) == rows(run_dir) and len(rows(run_dir)) == 12


@pytest.mark.slow
def test_a_killed_run_goes_on_without_duplicates_or_holes(tmp_path, server):
    run_dir = tmp_path / "a"
    client = Client(server, run_dir)
    client.rows(1, 7)
    wait_for(lambda: any(run.rows for run in server.runs.values()))  # what has not arrived yet is lost with the process
    client.kill()
    client = Client(server, run_dir, start=5)  # from a checkpoint at step 5: rows 6 and 7 are written again
    client.rows(6, 12)
    client.close()
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 13))
    assert recorded(server, run_dir) == rows(run_dir)


@pytest.mark.parametrize("outage", ["down", *(pytest.param(o, marks=pytest.mark.slow) for o in ("hanging", "failing"))])
def test_an_outage_delays_rows_and_nothing_else(outage, tmp_path, server):
    client = Client(server, tmp_path / "a")
    client.rows(1, 3)
    server.state = outage
    assert client.rows(4, 9) < 2  # seconds; a step that waits for a server would wait for ever
    server.state = "up"
    client.rows(10, 12)
    client.close()
    assert recorded(server, tmp_path / "a") == rows(tmp_path / "a")


@pytest.mark.slow
def test_a_server_that_never_comes_back_bounds_the_end(tmp_path, server):
    client = Client(server, tmp_path / "a", finish_timeout=3)
    client.rows(1, 3)
    server.state = "hanging"
    client.rows(4, 12)
    assert client.close() < 20
    assert [row["step"] for row in rows(tmp_path / "a")] == list(range(1, 13))


@pytest.mark.parametrize("state", ["unauthorized", pytest.param("hanging", marks=pytest.mark.slow)])
def test_a_server_that_refuses_at_the_start_means_offline(state, tmp_path, server):
    server.state = state
    client = Client(server, tmp_path / "a", init_timeout=3)
    assert client.opened < 45
    client.rows(1, 12)
    client.close()
    (folder,) = (tmp_path / "a" / "wandb").glob("*run-*")  # none is left of the attempt
    assert inspected(folder) == rows(tmp_path / "a")
    said = "".join(client.said)
    assert "recording offline" in said and "Traceback" not in said and KEY not in said
    assert [row["step"] for row in rows(tmp_path / "a")] == list(range(1, 13))
    # Nothing is lost: what was recorded offline can be sent when the server is back.
    server.state = "up"
    sync(server, tmp_path / "a")
    assert recorded(server, tmp_path / "a") == rows(tmp_path / "a")


def test_the_server_counts_a_line_once():
    with FakeWandb() as fake:
        fake.stream("x", {"files": {"wandb-history.jsonl": {"offset": 0, "content": ['{"a": 1, "_step": 0}']}}})
        again = {"offset": 0, "content": ['{"a": 1, "_step": 0}', '{"a": 2, "_step": 1}']}
        fake.stream("x", {"files": {"wandb-history.jsonl": again}})
    assert fake.runs["x"].rows == [{"a": 1}, {"a": 2}] and fake.runs["x"].numbers == [0, 1]


@pytest.mark.slow
def test_the_commands_of_the_page_work(clips, tmp_path, server):
    """All of docs/wandb.md in its order, on tiny clips instead of the embedded data set."""
    text = (ROOT / "docs" / "wandb.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [c for c in commands if "wandb agent" not in c]  # tests/test_dashboard.py has one work
    for name in ("train.py", "scripts", "sweeps"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faces").symlink_to(clips)
    outside = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**outside, "HOME": str(tmp_path), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ex", "-c", "\n".join(commands)], cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**env, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not server.unknown and len(server.views) == 1 and len(server.sweeps) == 2
    online, later, put = server.runs.values()
    for run in (online, later):
        assert run.complete and set(run.rows[-1]) > TABLES and run.about["groupName"] == "faces"
        assert not any("safetensors" in name for name in run.uploads)
    assert "artifact/best_WAR.safetensors" in put.uploads
    (view,) = (tmp_path / "logs").glob("*.json")
    assert json.loads(view.read_text())["section"]
