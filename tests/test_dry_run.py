"""`--validate-only` tries everything, says what the run will take, and writes nothing."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.config import parse_config
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import load_index
from dfer.metrics import Throughput, peak_memory
from dfer.optim.schedule import Schedule
from dfer.plan.sampling import ClipSampler
from dfer.run.checkpoint import save_checkpoint
from dfer.run.distributed import World
from dfer.run.dry_run import DryRun, duration, free_disk, padded, without_first_weights
from dfer.run.fingerprints import data_fingerprints
from dfer.run.memory import free_memory
from tests.conftest import ROOT, make_clips, nursery
from tests.test_train import TINY


def test_rank_0_sees_for_all_whether_a_run_has_begun(tmp_path, monkeypatch):
    """And what it may begin with is not checked for a run that begins no more."""
    words = ["--model.init", "timm", "--model.freeze", "backbone", "--run.log-dir", str(tmp_path), "--run.name", "a"]
    config, other = parse_config(["debug", *words]), World(1, 2, 1, 2, torch.device("cpu"))
    for begun, init in ((b"begun", "random"), (None, "timm")):
        monkeypatch.setattr("dfer.run.distributed.share", lambda content, world, begun=begun: begun)
        assert without_first_weights(config, other).model.init == init


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """What lies in a folder, down to the contents and when they were written."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in folder.rglob("*")
    }


def validate_only(folder, *words, launcher=(), fresh=True):
    """Start it in an empty folder with an empty home, as a user would who has just unpacked a data set."""
    for name in ("here", "home"):
        (folder / name).mkdir(exist_ok=True)
    lists = ("--data.train-list", f"{folder}/train.txt", "--data.val-list", f"{folder}/test.txt")
    command = [*launcher, str(ROOT / "train.py"), *TINY, *lists, "--validate-only", *words]
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {"HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": "c" * 40}
    before = tree(folder)
    if fresh:
        command, where = [sys.executable, *command], {"cwd": folder / "here", "env": env}
        done = subprocess.run(command, **where, capture_output=True, text=True, timeout=120)
    else:
        done = nursery().run(command, env, 120, folder / "here")
    assert tree(folder) == before
    return done


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    make_clips(folder)
    return folder


def test_nothing_is_written_and_the_whole_run_is_told(unpacked):
    words = ("--run.wandb", "online", "--optim.epochs", "7", "--optim.steps-per-epoch", "0", "--optim.ema", "0.5")
    done = validate_only(unpacked, *words, "--data.views", "2")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for told in (
        "debug on 1 x cpu: a run could begin; nothing was written",
        "20 to train, 9 to evaluate (frames)",
        "7 of 5 steps of 4 clips",
        "whole run",
    ):
        assert told in done.stdout, done.stdout
    # its own numbers agree with each other: 7 epochs of 5 steps and an evaluation
    step_ms = float(re.search(r"step +│ ([\d,]+) ms", done.stdout)[1].replace(",", ""))
    told = {name: float(re.search(name + r" +│ (?:about )?([\d.]+) s", done.stdout)[1])
            for name in ("evaluation", "whole run")}  # fmt: skip
    assert told["whole run"] == pytest.approx(7 * (5 * step_ms / 1000 + told["evaluation"]), abs=0.5)
    peak = float(re.search(r"memory +│ ([\d.]+) GB", done.stdout)[1])
    assert 0.3 < peak < 5


def test_several_processes(unpacked):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    words = ("--run.name", "here", "--run.log-dir", str(unpacked), "--model.crf-backend", "triton")
    done = validate_only(unpacked, *words, launcher=launcher)
    assert done.returncode == 0, done.stderr
    said = "--model.crf-backend triton: rank 0: there is no GPU here; dense is taken\n"
    assert done.stdout.count(said) == 1 and said not in done.stderr
    assert done.stdout.count("debug on 2 x cpu: a run could begin") == 1 and "2 of 2 steps of 8 clips" in done.stdout


def test_what_would_stop_a_run_is_one_line(unpacked):
    done = validate_only(unpacked, "--run.log-dir", str(unpacked / "train.txt" / "logs"), fresh=False)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and not done.stdout
    assert line == f"train.py: --run.log-dir: cannot write {unpacked / 'train.txt'}"


def test_the_arithmetic_is_that_of_a_stupid_loop():
    training = {"total_clips_per_s": 20.0, "data_wait_share": 0.25}
    whole = DryRun(
        3, 10, 8, 36, training, {"total_clips_per_s": 12.0}, skipped=0, peak=2 * 10**9, free=3 * 10**9,
        checkpoint=10**8, disk=10**12,
    )  # fmt: skip
    seconds = 0.0
    for _ in range(3):
        for _ in range(10):
            seconds += 8 / 20
        seconds += 36 / 12
    assert whole.run_s() == pytest.approx(seconds) == pytest.approx(21)
    assert whole.rows() == {
        "epochs": "3 of 10 steps of 8 clips",
        "step": "400 ms (20.0 clips/s), 25% of it waiting for data",
        "evaluation": "3.0 s (12.0 clips/s)",
        "whole run": "about 21.0 s",
        "memory": "2.00 GB at the peak of a process, 3.0 GB are free beside it",
        "disk": "0.50 GB for up to 5 checkpoints, 1000.0 GB are free",
    }
    assert whole._replace(skipped=2).rows()["step"].endswith("data; 2 of the steps tried were skipped, as not finite")
    for clips in range(1, 20):
        assert padded(clips, 6) == next(n for n in range(0, 30, 6) if n >= clips)


def trial(folder, *words):
    lists = ("--data.train-list", f"{folder}/train.txt", "--data.val-list", f"{folder}/test.txt")
    return parse_config([*TINY, *lists, "--validate-only", "--optim.steps-per-epoch", "0", *words])


def test_its_steps_have_the_learning_rates_of_the_run(unpacked, monkeypatch):
    """10 steps an epoch, of which 5 are tried: the warm-up is that of the run, not of an epoch of 5 steps."""
    used = []
    set_lr = Schedule.set_lr
    monkeypatch.setattr(Schedule, "set_lr", lambda self, *step: (used.append(self), set_lr(self, *step)))
    words = ("--data.batch-size", "2", "--optim.warmup-epochs", "2", "--optim.epochs", "7")
    assert train.main(trial(unpacked, *words)) == 0
    assert set(used) == {Schedule(1e-3, 20, 70, 10)} and len(used) == 5


def test_a_signal_ends_it_as_it_ends_a_run(unpacked, monkeypatch):
    saved = []

    class Asked(train.StopSignals):
        def requested(self):
            return True

        def __exit__(self, *args):
            saved.append(self.saved)
            super().__exit__(*args)

    monkeypatch.setattr(train, "StopSignals", Asked)
    assert train.main(trial(unpacked)) == 75
    assert saved == [True]  # or the watchdog would end it with 70 if its end took long


def test_the_first_step_is_not_measured(unpacked, monkeypatch):
    """It allocates, and compiles."""
    since = []
    read = Throughput.read
    monkeypatch.setattr(Throughput, "read", lambda self, *args, **kw: since.append(kw) or read(self, *args, **kw))
    assert train.main(trial(unpacked)) == 0
    assert [kw["since"].num_clips for kw in since if kw] == [4]


def test_a_run_that_has_begun_is_known(unpacked, tmp_path, monkeypatch, capsys):
    words = ("--run.log-dir", str(tmp_path), "--run.name", "x", "--data.views", "2")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(trial(unpacked, *words).to_json())
    (tmp_path / "x" / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setenv("COLUMNS", "200")

    def outcome(*more: str) -> str:
        assert train.main(trial(unpacked, *words, *more)) == 0
        return capsys.readouterr().out.split("x has begun and ")[1]

    assert outcome("--seed", "1").startswith("is another configuration: --seed was 0, is 1")
    assert outcome().startswith("left no checkpoint: it would begin anew")
    config = trial(unpacked, *words)
    data = data_fingerprints(*train.read_data(config))
    state = {"step": 1, "model": {}, "config": config.to_json(), "emotions": list(EMOTIONS), "data": data}
    save_checkpoint(tmp_path / "x" / "checkpoints", state | {"global_batch": config.data.batch_size})
    assert outcome().startswith("would be continued")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, init="gone.pt"))
    (tmp_path / "x" / "config.json").write_text(config.to_json())
    assert outcome().startswith("would be continued")  # the first weights are in the checkpoint
    state["data"] = data | {"val_list": data["train_list"]}
    save_checkpoint(tmp_path / "x" / "checkpoints", state | {"global_batch": config.data.batch_size})
    assert outcome().startswith("cannot be continued: ")


def test_durations():
    known = {0.24: "0.2 s", 59.9: "59.9 s", 61.0: "1 min 1 s", 3599.0: "59 min 59 s", 3600.0: "1 h 0 min"}
    known |= {5400.0: "1 h 30 min", 86399.0: "23 h 59 min", 86400.0: "1 days 0 h", 2e5: "2 days 7 h"}
    assert {seconds: duration(seconds) for seconds in known} == known


def test_memory_is_measured():
    before = peak_memory(torch.device("cpu"))
    held = np.ones(300_000_000 // 8)
    after = peak_memory(torch.device("cpu"))
    assert after >= held.nbytes and after < before + 2 * held.nbytes  # at most: what was there may have been higher
    assert 0 < free_memory(torch.device("cpu")) < 2**50


def test_room_on_the_disk(tmp_path, monkeypatch):
    assert free_disk(tmp_path / "not" / "there", 1) > 0
    with pytest.raises(ValueError, match=f"MB are free in {tmp_path}, and two checkpoints take"):
        free_disk(tmp_path / "not" / "there", 10**15)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--run\.log-dir: cannot write"):
        free_disk(tmp_path / "file" / "logs", 1)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"--run\.log-dir: cannot write .*link"):
        free_disk(tmp_path / "link", 1)
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(ValueError, match=f"--run.log-dir: cannot write {tmp_path}"):
        free_disk(tmp_path, 1)


def test_the_head_of_an_index_gives_the_clips_of_the_whole(unpacked):
    index = load_index(unpacked / "test.txt", write_cache=False)
    assert not list(unpacked.glob("*.npz"))
    sampler = ClipSampler(0, 2, 1, "eval")
    options = LoaderOptions(batch_size=3, size=32, num_threads=1)
    loaders = [ClipLoader(part, sampler, options) for part in (index, index.head(5))]
    whole, head = (list(loader(0)) for loader in loaders)
    assert len(head) == 2 and sum(int(batch.valid.sum()) for batch in head) == 5
    assert torch.equal(head[0].clips, whole[0].clips) and torch.equal(head[1].clips[:2], whole[1].clips[:2])
    assert head[1].ids[:2].tolist() == [3, 4] and torch.equal(head[0].labels, whole[0].labels)
