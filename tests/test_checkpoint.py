"""Checkpoints under every failure of a save, under damage, and the folder that holds them."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dfer import files
from dfer.config import Config, OptimConfig, RunConfig
from dfer.lists.annotations import EMOTIONS
from dfer.run import checkpoint, folder
from dfer.run.checkpoint import find_manifests, load_checkpoint, newest_checkpoint, save_checkpoint
from dfer.run.distributed import World
from dfer.run.folder import RunFolder, open_run
from dfer.run.weight_files import save_weights
from tests.conftest import ROOT
from tests.nursery import python_path


def state_of(step: int, best: int = 1) -> dict:
    weights = {"w": torch.arange(3000.0) + step, "b": torch.ones(5, dtype=torch.bfloat16)}
    return {"step": step, "model": weights, "config": "{}", "emotions": list(EMOTIONS), "best": {"WAR": [0.5, best]}}


def newest_step(folder: Path) -> int:
    """Which step is found, and that it is whole."""
    state = load_checkpoint(folder)
    for name, tensor in state_of(state["step"])["model"].items():
        assert torch.equal(state["model"][name], tensor)
    return state["step"]


def names(folder: Path) -> list[str]:
    return sorted(p.name[:13] + p.suffix for p in folder.iterdir())


class Killed(BaseException):
    """What a process does not survive."""


class Faults:
    """Lets the k-th call that changes the disk fail, and, if it is a kill, all after it."""

    def __init__(self, monkeypatch, k: int, kind: str):
        self.k, self.kind, self.calls = k, kind, 0
        for name in ("replace", "fsync", "unlink"):
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))
        for module in (checkpoint, files):
            monkeypatch.setattr(module, "open", self.open, raising=False)

    def failing(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.kind == "kill" and self.calls >= self.k:
                raise Killed
            if self.calls == self.k:
                raise OSError(getattr(errno, self.kind), os.strerror(getattr(errno, self.kind)))
            return function(*args, **kwargs)

        return call

    def open(self, path, mode="r"):
        if "w" not in mode:
            return open(path, mode)
        outer = self

        class Torn(io.FileIO):
            """A file of which a failing write leaves the first half."""

            def write(self, data):
                if outer.calls + 1 == outer.k:
                    super().write(bytes(data)[: len(data) // 2])
                return outer.failing(super().write)(data)

            def flush(self):
                if not self.closing:
                    outer.failing(super().flush)()

            closing = False

            def close(self):
                self.closing = True
                super().close()

        return Torn(path, "w")


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "kill"])
def test_whatever_call_of_a_save_fails_a_checkpoint_remains(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the disk is slow, and this is no power cut
    outcomes = []
    for k in range(1, 200):
        folder = tmp_path / str(k)
        for step in (1, 2, 3):
            save_checkpoint(folder, state_of(step))
        with monkeypatch.context() as patch:
            faults = Faults(patch, k, kind)
            try:
                save_checkpoint(folder, state_of(4))
                failed = False
            except Killed:
                failed = True
            except ValueError as error:
                failed = True
                assert "\n" not in str(error) and "step-00000004" in str(error)
        outcomes.append((failed, newest_step(folder)))
        assert kind == "kill" or not list(folder.glob("*.partial"))
        save_checkpoint(folder, state_of(4))  # the same command, after the cause is gone
        assert newest_step(folder) == 4
        assert [n for n in names(folder) if n != "state.partial"] == names_of(1, 3, 4)
        if faults.calls < k:
            break
    assert 12 < k < 200 and outcomes[-1] == (False, 4)
    assert outcomes[0] == (True, 3)  # nothing is written yet
    found = [step for _, step in outcomes]
    assert found == sorted(found), "the new checkpoint exists from one call on, never half"


def names_of(*steps: int) -> list[str]:
    return sorted(f"step-{step:08d}{suffix}" for step in steps for suffix in (".json", ".pt"))


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5), (7, 5)):
        save_checkpoint(tmp_path, state_of(step, best))
        assert newest_step(tmp_path) == step
        assert names(tmp_path) == names_of(*({step, max(step - 1, 1), best}))
    save_checkpoint(tmp_path, state_of(6, 5))  # continued from an older one: what came after it never was
    assert names(tmp_path) == names_of(5, 6)


def test_a_step_saved_twice_holds_the_second(tmp_path):
    first = state_of(3)
    save_checkpoint(tmp_path, first | {"evaluated": 0})
    save_checkpoint(tmp_path, first | {"evaluated": 1})
    assert load_checkpoint(tmp_path)["evaluated"] == 1 and names(tmp_path) == names_of(3)


def test_whatever_call_of_a_second_save_of_a_step_is_the_last_the_first_or_second_remains(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    found = []
    for k in range(1, 200):
        folder = tmp_path / str(k)
        save_checkpoint(folder, state_of(3) | {"evaluated": 0})
        with monkeypatch.context() as patch:
            faults = Faults(patch, k, "kill")
            with contextlib.suppress(Killed):
                save_checkpoint(folder, state_of(3) | {"evaluated": 1})
        found.append(load_checkpoint(folder)["evaluated"])
        if faults.calls < k:
            break
    assert found == sorted(found) and (found[0], found[-1]) == (0, 1) and k > 8


@pytest.mark.parametrize("suffix", [".pt", ".json", ".safetensors"])
def test_no_damage_is_accepted(tmp_path, suffix):
    """Every bit of a manifest and of a header, of the rest some hundred; lengths; and what is no file."""
    rng = random.Random(0)
    if suffix == ".safetensors":
        target = tmp_path / "best.safetensors"
        state = state_of(2)
        about = {"config": "{}", "emotions": json.dumps(list(EMOTIONS)), "WAR": "50.0"}
        save_weights(target, state["model"], about)
        assert torch.equal(load_checkpoint(target)["model"]["w"], state["model"]["w"])
        load = lambda: load_checkpoint(target)  # noqa: E731
    else:
        save_checkpoint(tmp_path, state_of(2))
        (target,) = tmp_path.glob(f"*{suffix}")
        load = lambda: newest_checkpoint(tmp_path)  # noqa: E731
    good = target.read_bytes()
    every = {".json": len(good), ".pt": 32, ".safetensors": 8 + int.from_bytes(good[:8], "little")}[suffix]
    bits = [*range(8 * every), *rng.sample(range(8 * len(good)), 300)]
    lengths = {0, 1, len(good) - 1, *rng.sample(range(len(good)), min(100, len(good)))}
    damaged = [good[: b // 8] + bytes([good[b // 8] ^ 1 << b % 8]) + good[b // 8 + 1 :] for b in bits]
    for content in damaged + [good[:length] for length in lengths] + [good + b"x"]:
        target.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load()
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    target.unlink()
    elsewhere = tmp_path / "elsewhere"
    target.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"a link to .*elsewhere, which is not there"):
        load()
    elsewhere.write_bytes(good)  # whatever it is called, as in shared caches
    load()


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(step))
    (newest,) = tmp_path.glob("step-00000003-*.pt")
    newest.write_bytes(newest.read_bytes()[:-1])
    content, damage = newest_checkpoint(tmp_path)
    assert newest_step(tmp_path) == 2 and content and len(damage) == 1 and newest.name in damage[0]
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load_checkpoint(newest)
    (tmp_path / "step-00000002.json").unlink()
    assert newest_step(tmp_path) == 1
    left = next(tmp_path.glob("step-00000002-*.pt"))
    assert load_checkpoint(left)["step"] == 2  # as a copy: asked for by name, and whole
    next(tmp_path.glob("step-00000001-*.pt")).unlink()
    with pytest.raises(ValueError, match="none of 2 checkpoints can be used"):  # never from the start, unasked
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path, value):
    save_checkpoint(tmp_path, state_of(1))
    state = state_of(2) | {"optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "groups": [{"lr": 0.1}]}}
    state["optimizer"]["state"][0]["exp_avg"][2] = value
    with pytest.raises(ValueError, match=r"step 2 is not saved: optimizer\.state\.0\.exp_avg is not finite"):
        save_checkpoint(tmp_path, state)
    assert names(tmp_path) == names_of(1)


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": Payload(), "config": ""}, "damaged or not a checkpoint"),
        ({"weights": 1}, "not a checkpoint of this project"),
        ({"model": {}, "config": "", "emotions": sorted(EMOTIONS)}, r"its model's classes are \['Angry'"),
    ],
)
def test_what_is_no_checkpoint_is_one_line_and_is_not_executed(tmp_path, state, message, capsys):
    save_checkpoint(tmp_path, {"step": 1} | state)  # with a manifest that verifies
    for path in (tmp_path, *tmp_path.glob("step*")):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "x.safetensors").write_bytes(next(tmp_path.glob("*.pt")).read_bytes())
    (tmp_path / "last.pt").write_bytes(next(tmp_path.glob("*.pt")).read_bytes())
    for name in ("x.safetensors", "last.pt", "nowhere.pt", "nowhere.safetensors", "nowhere"):
        with pytest.raises(ValueError, match=name):
            load_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def config(log_dir: Path, **optim) -> Config:
    return Config(optim=OptimConfig(**optim), run=RunConfig(log_dir=log_dir))


HOLD = """
import sys
from pathlib import Path
from dfer.run.folder import RunFolder
from tests.test_checkpoint import config
run = RunFolder(config(Path(sys.argv[1])), "a")
run.begin(config(Path(sys.argv[1])), 1)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_held_by_one_living_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on {socket.gethostname()};"):
                RunFolder(config(tmp_path), "a")
        finally:
            holder.kill()
    assert "process" in (tmp_path / "a" / "lock").read_text()
    run = RunFolder(config(tmp_path), "a")
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on"):
        RunFolder(config(tmp_path), "a")
    run.close()
    RunFolder(config(tmp_path), "a").close()


def test_a_run_folder_is_begun_late_cleaned_and_kept_from_others(tmp_path, monkeypatch):
    run = RunFolder(config(tmp_path), "a")
    assert not any(tmp_path.iterdir())  # a command that fails early leaves nothing
    run.begin(config(tmp_path), 1000)
    run.close()
    RunFolder(config(tmp_path, lr=0.5), "a").close()  # it has not taken a step
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"a: holds a run of another configuration: --optim\.lr was 0\.001, is 0\.5;"):
        RunFolder(config(tmp_path, lr=0.5), "a")

    run = RunFolder(config(tmp_path), "a")
    folder = run.checkpoints
    for step in (1, 2):
        save_checkpoint(folder, state_of(step))
    for leftover in ("state.partial", "step-00000003-0123abcd.pt", "../predictions.csv.partial"):
        (folder / leftover).write_text("torn")
    (folder / "notes.txt").write_text("somebody's")
    run.begin(config(tmp_path), 1000)
    assert names(folder) == sorted([*names_of(1, 2), "notes.txt.txt"]) and not list(run.path.glob("*.partial"))

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**6))
    with pytest.raises(ValueError, match=r"1 MB are free, and two checkpoints take 2 MB"):
        run.begin(config(tmp_path), 10**6)
    run.close()

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    with pytest.raises(ValueError, match=r"photos: holds 1\.jpg, which is no run"):
        RunFolder(config(tmp_path), "photos")
    RunFolder(config(tmp_path), "a").close()  # a refusal does not keep the lock

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/a/lock .No space left on device"):
        RunFolder(config(tmp_path), "a")


REAL = """
import os, signal, sys
from pathlib import Path
from dfer.run.checkpoint import save_checkpoint
from tests.test_checkpoint import state_of
folder, last = Path(sys.argv[1]), int(sys.argv[2])
codes = []
for k in range(last):  # one tracee each; strace counts the calls of each, and fails the same one of all
    child = os.fork()
    if not child:
        target = folder / str(k)
        other = os.open(folder / "other", os.O_RDWR | os.O_CREAT)
        for _ in range(last - 1 - k):
            os.write(other, b"x")
            os.fsync(other)
            os.rename(folder / "a", folder / "a")
        try:
            save_checkpoint(target, state_of(4))
        except ValueError as error:
            os._exit(3)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.write(1, " ".join(map(str, codes)).encode())  # in one call
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("fault", ["error=ENOSPC", "error=EIO", "signal=KILL"])
def test_whatever_system_call_fails_a_checkpoint_remains(tmp_path, call, fault):
    """The same with the kernel's own calls, without touching the code."""
    if subprocess.run(["strace", "-V"], capture_output=True, check=False).returncode:
        pytest.skip("strace is not installed")
    last = 8
    (tmp_path / "a").touch()
    for k in range(last):
        for step in (1, 2, 3):
            save_checkpoint(tmp_path / str(k), state_of(step))
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={last}",
         sys.executable, "-c", REAL, str(tmp_path), str(last)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [int(code) for code in done.stdout.split()]
    assert len(codes) == last and set(codes) == {0, -9 if fault == "signal=KILL" else 3}
    for k in range(last):
        assert newest_step(tmp_path / str(k)) == (4 if codes[k] == 0 else newest_step(tmp_path / str(k)))
        assert newest_step(tmp_path / str(k)) in (3, 4)


def test_runs_that_begin_in_one_second_have_a_folder_each(tmp_path):
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    (tmp_path / "a-3").write_text("a file")
    runs = [RunFolder(config(tmp_path), "a", alone) for _ in range(3)]
    assert os.listdir(tmp_path) == ["a-3"]  # a command that fails before its first step leaves no trace
    for run in runs:
        run.begin(config(tmp_path), 1000)
    assert [run.path.name for run in runs] == ["a", "a-2", "a-4"]
    assert [(run.path / "config.json").exists() and run.checkpoints.is_dir() for run in runs] == [True] * 3
    for run in runs:
        run.close()


def test_processes_that_are_started_again_keep_the_folder_that_was_found(tmp_path, monkeypatch):
    world = World(0, 1, 0, 1, torch.device("cpu"), dist.HashStore())
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("dfer.run.folder.time.strftime", lambda _: "at")
    (tmp_path / "faces-at").mkdir()
    run = open_run(config(tmp_path), world)
    run.begin(config(tmp_path), 1000)
    run.close()
    monkeypatch.setattr("dfer.run.folder.time.strftime", lambda _: "later")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = open_run(config(tmp_path), world)
    again.begin(config(tmp_path), 1000)
    assert again.path == run.path == tmp_path / "faces-at-2"
    again.close()


def test_a_file_in_the_place_of_runs_holds_no_checkpoints(tmp_path):
    (tmp_path / "logs").touch()
    assert find_manifests(tmp_path / "logs" / "run" / "checkpoints") == []


def test_a_checkpoint_of_an_epoch_on_a_gpu_takes_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(folder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(folder, "save_checkpoint", lambda *_: now.__setitem__(0, now[0] + 2))
    run = RunFolder(config(tmp_path), "a")
    assert run.pays()  # what one takes is not known yet
    run.save({})
    for seconds, pays in ((0, False), (17.9, False), (0.1, True)):
        now[0] += seconds
        assert run.pays() == pays
    run.close()
