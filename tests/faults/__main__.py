"""Break runs of train.py in every way that machines do, and look whether anything is lost: `make faults HOURS=2`.

Each trial is one run, begun and continued by the same command until it is finished, while faults are injected at random
moments: signals, kills, a full disk, damaged files, a W&B server that dies. Its rows, weights and optimizer state must
then be, to the bit, those of a run that nothing has happened to. *Lost* is a run that the same command cannot finish or
that hangs; *divergent* one that ends otherwise. `--out FILE.md` writes the table by kind of fault.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dfer.cli import Parser, in_range
from dfer.run.checkpoint import read_verified
from tests.conftest import ROOT, make_clips
from tests.nursery import python_path
from tests.test_resume import SMALL, assert_same, what_was_computed
from tests.test_two_nodes import WHY_NOT, cable, torchrun_on, two_nodes
from tests.wandb_server import FakeWandb

PATIENCE_S = 180.0  # after which a process hangs
ATTEMPTS = 12  # of the same command, until a run is lost
CLEAN_EXITS = (0, 2, 69, 70, 75)  # those of train.py; a negative one is a signal

# Imports train.py once and plays it in forked processes: one line of JSON each, answered by its process id and, when it
# has ended, by its exit code.
NURSERY = """
import errno, functools, json, os, random, stat, sys
import torch
import train, wandb
from dfer.cli import begin, one_line_errors
from dfer.config import parse_config

torch.set_num_threads(1)
train.COMMAND = True  # it is ours to end

def without_streams(how):
    if how == "closed":  # as Python leaves it then
        sys.stdout = sys.stderr = None
        os.close(1)
        os.close(2)
        return
    if how == "full":
        there = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, there = os.pipe() if how == "unread" else os.openpty()
        os.close(reader)
    os.dup2(there, 1)
    os.dup2(there, 2)

def answer_nonsense():
    real_sync, real_names, real_free = os.fsync, os.listdir, os.statvfs
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real_sync(descriptor)
    def listdir(*folder):
        names = real_names(*folder)
        random.shuffle(names)
        return names
    def statvfs(path):
        found = list(real_free(path))
        found[2:8] = [0] * 6
        return os.statvfs_result(found)
    os.fsync, os.listdir, os.statvfs = fsync, listdir, statvfs

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        if order["streams"]:
            without_streams(order["streams"])
        if order["nonsense"]:
            answer_nonsense()
        begin("train.py")
        os.environ |= order["env"]
        bounds = {"init_timeout": 5.0, "finish_timeout": 2.0}
        wandb.Settings = functools.partial(lambda make, **k: make(**k | bounds), wandb.Settings)
        try:
            code = one_line_errors("train.py", lambda: train.main(parse_config(order["words"])))
            sys.stdout.flush()
        except SystemExit as end:
            code = end.code
        except BaseException:
            import traceback
            with open(order["log"], "a") as file:
                traceback.print_exc(file=file)
            code = 1
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Lost(Exception):
    """A run that cannot be finished."""


@dataclass
class Trial:
    """One run, from its first command to its end."""

    folder: Path  # holds logs/ and out.txt
    clips: Path
    rng: random.Random
    server: FakeWandb
    processes: int = 1
    nodes: list[str] = field(default_factory=list)  # network namespaces that share the processes
    words: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    streams: str = ""  # what has become of stdout and stderr: closed, full, unread, or of a terminal that is gone
    nonsense: bool = False  # the file system answers what makes no sense

    @property
    def run_dir(self) -> Path:
        return self.folder / "logs" / "x"

    @property
    def out(self) -> Path:
        return self.folder / "out.txt"

    def command(self) -> list[str]:
        lists = ["--data.train-list", f"{self.clips}/train.txt", "--data.val-list", f"{self.clips}/test.txt"]
        return [*SMALL, *lists, "--run.log-dir", str(self.folder / "logs"), "--run.name", "x", *self.words]

    def progress(self) -> int:
        """Something that grows with each checkpoint and row."""
        rows = self.run_dir / "metrics.jsonl"
        with contextlib.suppress(OSError):
            steps = [int(p.stem[5:]) for p in (self.run_dir / "checkpoints").glob("step-*.json")]
            return 2 * max(steps, default=0) + len(rows.read_bytes().splitlines())
        return 0

    def newest(self, pattern: str) -> Path | None:
        return max(self.run_dir.glob(f"checkpoints/{pattern}"), default=None)


class Process:
    """A command that runs: in a fork of the nursery, or under torchrun."""

    def __init__(self, trial: Trial, nursery: subprocess.Popen):
        self.trial, self.nursery = trial, nursery
        self.torchruns: list[subprocess.Popen] = []
        self.code: int | None = None
        if trial.nodes:
            both = [(0, "c10d"), (1, "c10d")]
            self.torchruns = [torchrun_on(trial.nodes, *on, trial.command(), trial.out) for on in both]
            self.pid = self.torchruns[0].pid
            return
        if trial.processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
            env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | trial.env
            with open(trial.out, "a") as out:
                torchrun = subprocess.Popen(
                    [*launcher, f"--nproc_per_node={trial.processes}", "train.py", *trial.command()],
                    cwd=ROOT, stdout=out, stderr=out, env=env | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
                )  # fmt: skip
            self.torchruns, self.pid = [torchrun], torchrun.pid
            return
        order = {"words": trial.command(), "log": str(trial.out), "env": trial.env}
        order |= {"streams": trial.streams, "nonsense": trial.nonsense}
        nursery.stdin.write(json.dumps(order) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    def alive(self) -> bool:
        if self.torchruns:
            return None in [torchrun.poll() for torchrun in self.torchruns]
        try:  # a zombie has ended
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def ranks(self) -> list[int]:
        """The training processes."""
        if not self.torchruns:
            return [self.pid]
        running = [torchrun.pid for torchrun in self.torchruns if torchrun.poll() is None]
        return [int(child) for pid in running for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def send(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self) -> int:
        """The exit code.

        Raises:
            Lost: if it does not end.
        """
        if self.code is not None:
            return self.code
        give_up = time.monotonic() + PATIENCE_S
        while self.alive():
            if time.monotonic() > give_up:
                for pid in [*self.ranks(), *(torchrun.pid for torchrun in self.torchruns), self.pid]:
                    self.send(pid, signal.SIGKILL)
                raise Lost("hangs")
            time.sleep(0.02)
        codes = [torchrun.wait() for torchrun in self.torchruns] or [int(self.nursery.stdout.readline())]
        self.code = next(filter(None, codes), 0)
        return self.code


# ---- Faults. Each is given a trial and its running process, and strikes at once.

Fault = Callable[[Trial, Process], None]


def at_some_moment(trial: Trial, process: Process) -> None:
    """Wait for some more progress and some part of a step, or the end."""
    goal = trial.progress() + trial.rng.randrange(1, 12)
    give_up = time.monotonic() + PATIENCE_S
    while process.alive() and trial.progress() < goal and time.monotonic() < give_up:
        time.sleep(0.005)
    time.sleep(trial.rng.uniform(0, 0.1))


def signalled(*numbers: signal.Signals) -> Fault:
    def strike(trial: Trial, process: Process) -> None:
        for number in numbers:
            process.send(process.pid, number)
            time.sleep(0.05)

    return strike


def killed_rank(trial: Trial, process: Process) -> None:
    if ranks := process.ranks():
        process.send(trial.rng.choice(ranks), signal.SIGKILL)


def killed_all(trial: Trial, process: Process) -> None:
    for pid in [process.pid, *process.ranks()]:
        process.send(pid, signal.SIGKILL)


def paused(trial: Trial, process: Process) -> None:
    ranks = process.ranks()
    for pid in ranks:
        process.send(pid, signal.SIGSTOP)
    time.sleep(1)
    for pid in ranks:
        process.send(pid, signal.SIGCONT)


def then_damaged(damage: Callable[[Trial], None]) -> Fault:
    """A kill, and damage to what it has left, as long as an older checkpoint is whole: nothing else can be found."""

    def strike(trial: Trial, process: Process) -> None:
        killed_all(trial, process)
        while process.alive():
            time.sleep(0.01)
        if len(whole_checkpoints(trial.run_dir / "checkpoints")) > 1:
            damage(trial)

    return strike


def whole_checkpoints(folder: Path) -> list[Path]:
    whole = []
    for manifest in folder.glob("step-*.json"):
        with contextlib.suppress(ValueError):
            read_verified(manifest)
            whole.append(manifest)
    return whole


def flip_a_bit(trial: Trial) -> None:
    if path := trial.newest(trial.rng.choice(("*.pt", "*.json"))):
        data = bytearray(path.read_bytes())
        data[trial.rng.randrange(len(data))] ^= 1 << trial.rng.randrange(8)
        path.write_bytes(data)


def truncate(trial: Trial) -> None:
    if path := trial.newest(trial.rng.choice(("*.pt", "*.json"))):
        os.truncate(path, trial.rng.randrange(path.stat().st_size))


def tear_the_rows(trial: Trial) -> None:
    rows = trial.run_dir / "metrics.jsonl"
    if rows.exists():
        with open(rows, "a") as file:
            file.write('{"step": 99, "train/lo')


def litter(trial: Trial) -> None:
    """What a save leaves behind that did not end."""
    if trial.run_dir.exists():
        (trial.run_dir / "checkpoints").mkdir(exist_ok=True)
        (trial.run_dir / "checkpoints" / "state.partial").write_bytes(b"half")
        (trial.run_dir / "checkpoints" / "step-00000099-01234567.pt").write_bytes(b"half")


def full_disk(trial: Trial, process: Process) -> None:
    filler = trial.folder / "logs" / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**20)):
            pass
    give_up = time.monotonic() + 10
    while process.alive() and time.monotonic() < give_up:
        time.sleep(0.02)
    filler.unlink()


def read_only_disk(trial: Trial, process: Process) -> None:
    """The next command finds it so, and must say so."""
    killed_all(trial, process)
    process.wait()
    remount(trial, "ro")
    code = Process(trial, process.nursery).wait()
    remount(trial, "rw")
    if code != 2:
        raise Lost(f"exit code {code} on a read-only disk")


def link_cut(trial: Trial, process: Process) -> None:
    """Both nodes end by themselves, and find the link again when they are started again."""
    node = trial.rng.choice(trial.nodes)
    cable(node, "down")
    give_up = time.monotonic() + PATIENCE_S
    while process.alive() and time.monotonic() < give_up:
        time.sleep(0.02)
    cable(node, "up")
    if process.wait() == 0:
        raise Lost("exit code 0 without a link")


def closed_streams(trial: Trial, process: Process) -> None:
    """Nobody can be told anything any more: a run that goes on must come to its end all the same."""
    killed_all(trial, process)
    process.wait()
    trial.streams = trial.rng.choice(("closed", "full", "unread", "hung up"))
    code = Process(trial, process.nursery).wait()
    if code != 0:
        raise Lost(f"exit code {code} with streams that are {trial.streams}")
    trial.streams = ""


def moved_data(trial: Trial, process: Process) -> None:
    """The next command names the same data at another place."""
    killed_all(trial, process)
    process.wait()
    there = trial.folder / f"data {trial.rng.randrange(10**6)}"
    shutil.copytree(trial.clips, there, copy_function=os.link, ignore=shutil.ignore_patterns("*.npz"))
    trial.clips = there


def odd_file_system(trial: Trial, process: Process) -> None:
    """From here on folders cannot be synced, names come in any order, and 0 of 0 bytes are free."""
    killed_all(trial, process)
    trial.nonsense = True


def busy_machine(trial: Trial, process: Process) -> None:
    """A signal while three processes do nothing else beside it: it must wait for the step."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(trial.rng.uniform(0.1, 1))
        process.send(process.pid, trial.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)))
        code = process.wait()
    finally:
        for other in busy:
            other.kill()
            other.wait()
    if code not in (0, 75):
        raise Lost(f"exit code {code} on a busy machine")


def remount(trial: Trial, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(trial.folder / "logs")], check=True)


def lost_clip(trial: Trial, process: Process) -> None:
    """A clip that cannot be read for a while, in a run that is to stop at one."""
    folder = trial.rng.choice(sorted(path for path in (trial.clips / "train clips").iterdir() if path.is_dir()))
    away = folder.with_name(f"{folder.name} away")
    folder.rename(away)
    give_up = time.monotonic() + 2
    while process.alive() and time.monotonic() < give_up:
        time.sleep(0.02)
    away.rename(folder)


def lost_server(state: str) -> Fault:
    def strike(trial: Trial, process: Process) -> None:
        trial.server.state = state
        time.sleep(trial.rng.uniform(0.2, 1))
        if trial.rng.random() < 0.5:
            trial.server.state = "up"

    return strike


ONE_PROCESS: dict[str, Fault] = {
    "kill -9": killed_all,
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGINT": signalled(signal.SIGINT),
    "SIGUSR1": signalled(signal.SIGUSR1),
    "SIGHUP": signalled(signal.SIGHUP),
    "two signals in a row": signalled(signal.SIGTERM, signal.SIGINT),
    "SIGSTOP for a second": paused,
    "a bit of the newest checkpoint flips": then_damaged(flip_a_bit),
    "the newest checkpoint is cut short": then_damaged(truncate),
    "a torn last row": then_damaged(tear_the_rows),
    "leftovers of a save": then_damaged(litter),
    "a clip cannot be read (--data.bad-clips error)": lost_clip,
    "stdout and stderr are closed, full or gone": closed_streams,
    "the data has moved": moved_data,
    "the file system answers nonsense": odd_file_system,
    "a signal on a busy machine": busy_machine,
}
ON_A_SMALL_DISK: dict[str, Fault] = {"the disk is full": full_disk, "the disk is read-only": read_only_disk}
WITH_WANDB: dict[str, Fault] = {
    f"W&B's server {what}": lost_server(state)
    for state, what in (
        ("down", "dies"),
        ("hanging", "hangs"),
        ("failing", "answers 500"),
        ("unauthorized", "refuses the key"),
    )
}
TOGETHER: dict[str, Fault] = {
    "kill -9 of one of two ranks": killed_rank,
    "kill -9 of torchrun and its ranks": killed_all,
    "SIGTERM to torchrun": signalled(signal.SIGTERM),
    "SIGHUP to torchrun": signalled(signal.SIGHUP),
}
ON_TWO_NODES: dict[str, Fault] = {"the link between two nodes is cut": link_cut}
FAMILIES = (ONE_PROCESS, ON_A_SMALL_DISK, WITH_WANDB, TOGETHER, ON_TWO_NODES)
KINDS = ONE_PROCESS | ON_A_SMALL_DISK | WITH_WANDB | TOGETHER | ON_TWO_NODES


# ---- Trials.


@dataclass
class Count:
    injected: Counter = field(default_factory=Counter)
    lost: Counter = field(default_factory=Counter)
    divergent: Counter = field(default_factory=Counter)
    runs: int = 0
    commands: int = 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def place_of(trial: Trial, kinds: dict[str, Fault]) -> Iterator[None]:
    if kinds is ON_A_SMALL_DISK:
        with small_disk(trial.folder / "logs"):
            yield
    elif kinds is ON_TWO_NODES:  # the unbroken run is on one
        with two_nodes() as trial.nodes:
            yield
    else:
        yield


def play(trial: Trial, faults: list[str], nursery: subprocess.Popen, count: Count) -> None:
    """Run the command until the run is finished; each of the faults strikes once, in this order.

    Raises:
        Lost: if it cannot be finished.
    """
    waiting = list(faults)
    for _ in range(ATTEMPTS):
        process = Process(trial, nursery)
        count.commands += 1
        if waiting:
            at_some_moment(trial, process)
            if process.alive():
                kind = waiting.pop(0)
                KINDS[kind](trial, process)
                count.injected[kind] += 1
        code = process.wait()
        trial.server.state = "up"
        if code == 0:  # perhaps before all its faults could strike
            return
        # torchrun has codes of its own, and -9 is what we have done.
        if trial.processes == 1 and code not in CLEAN_EXITS and code != -signal.SIGKILL:
            raise Lost(f"exit code {code}")
    raise Lost(f"not finished after {ATTEMPTS} commands")


def trial_of(kinds: dict[str, Fault], folder: Path, clips: Path, rng: random.Random, server: FakeWandb) -> Trial:
    trial = Trial(folder, clips, rng, server)
    if kinds is TOGETHER:
        trial.processes = 2
        trial.words = ["--data.batch-size", "1", "--run.timeout", "30"]
    if kinds is ON_TWO_NODES:
        trial.processes = 4
        trial.words = ["--optim.accumulate", "1", "--data.batch-size", "1", "--run.timeout", "30"]
    if kinds is WITH_WANDB:
        trial.words = ["--run.wandb", "online"]
        trial.env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    trial.words += ["--data.bad-clips", "error"]
    return trial


def faults_of(args: argparse.Namespace, rng: random.Random) -> tuple[dict[str, Fault], list[str]]:
    """What the next trial is about: one family of faults, some of them."""
    families = [kinds for kinds in FAMILIES if set(kinds) & set(args.kinds)]
    kinds = rng.choices(families, [len(set(k) & set(args.kinds)) for k in families])[0]
    choice = [kind for kind in kinds if kind in args.kinds]
    return kinds, [rng.choice(choice) for _ in range(rng.randrange(1, 4))]


def work(args: argparse.Namespace, folder: Path) -> tuple[Count, list[str]]:
    clips = folder / "clips"
    clips.mkdir()
    make_clips(clips)
    rng, count, failures = random.Random(args.seed), Count(), []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    with (
        FakeWandb() as server,
        subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
        ) as nursery,
    ):  # fmt: skip
        unbroken = {}
        give_up = time.monotonic() + 3600 * args.hours
        number = 0
        while time.monotonic() < give_up and count.injected.total() < args.count:
            kinds, faults = faults_of(args, rng)
            number += 1
            trial = trial_of(kinds, folder / f"trial{number}", clips, rng, server)
            if trial.processes not in unbroken:
                whole = trial_of(kinds, folder / f"unbroken{trial.processes}", clips, rng, server)
                whole.folder.mkdir()
                play(whole, [], nursery, Count())
                unbroken[trial.processes] = what_was_computed(whole.run_dir)
            trial.folder.mkdir()
            with place_of(trial, kinds):
                verdict = judge(trial, faults, nursery, count, unbroken[trial.processes])
            count.runs += 1
            if verdict:
                failures.append(f"trial {number} ({', '.join(faults)}): {verdict}")
                print(f"{failures[-1]}\n{trial.out.read_text()[-4000:]}", flush=True)
            else:
                shutil.rmtree(trial.folder)
                print(f"trial {number}: {', '.join(faults)}: exact", flush=True)
        nursery.stdin.close()
    return count, failures


def judge(trial: Trial, faults: list[str], nursery: subprocess.Popen, count: Count, unbroken: tuple) -> str:
    """What went wrong, or nothing."""
    try:
        play(trial, faults, nursery, count)
    except Lost as error:
        count.lost.update(set(faults))
        return f"lost: {error}"
    try:
        computed = what_was_computed(trial.run_dir)
        computed[1]["wandb_id"] = unbroken[1]["wandb_id"]
        assert_same(list(computed), list(unbroken))
        if leftovers := list(trial.run_dir.rglob("*.partial")):
            raise AssertionError(f"left behind: {leftovers[0]}")
    except (AssertionError, ValueError) as error:
        count.divergent.update(set(faults))
        return f"divergent: {error}"
    return ""


def table(count: Count, args: argparse.Namespace, minutes: float) -> str:
    lines = [
        "# Faults",
        "",
        f"`{args.command}`, {datetime.date.today()}, {minutes:.0f} minutes on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}:",
        f"{count.injected.total()} faults in {count.runs} runs ({count.commands} commands). A run counts as exact if",
        "its rows, weights, averaged weights and optimizer state are, to the bit, those of a run without faults.",
        "",
        "| fault | injected | lost | divergent |",
        "|---|---|---|---|",
        *(f"| {kind} | {count.injected[kind]} | {count.lost[kind]} | {count.divergent[kind]} |" for kind in args.kinds),
        f"| all | {count.injected.total()} | {count.lost.total()} | {count.divergent.total()} |",
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("faults", __doc__)
    parser.add_argument("--hours", type=in_range(float, 0.001, 1000), default=1.0, help="to go on for (1)")
    parser.add_argument("--count", type=in_range(int, 1, 10**6), default=10**6, help="of faults, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="only these")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table here")
    args = parser.parse_args(arguments)
    args.command = " ".join(["python -m tests.faults", *(sys.argv[1:] if arguments is None else arguments)])
    if os.geteuid() and set(args.kinds) & set(ON_A_SMALL_DISK):
        print("left out, as only root can mount a small disk:", ", ".join(ON_A_SMALL_DISK), file=sys.stderr)
        args.kinds = [kind for kind in args.kinds if kind not in ON_A_SMALL_DISK]
    if WHY_NOT and set(args.kinds) & set(ON_TWO_NODES):
        print(f"left out, as {WHY_NOT}:", ", ".join(ON_TWO_NODES), file=sys.stderr)
        args.kinds = [kind for kind in args.kinds if kind not in ON_TWO_NODES]
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        count, failures = work(args, Path(folder))
    text = table(count, args, (time.monotonic() - began) / 60)
    print(text)
    for failure in failures:
        print(failure)
    if args.out:
        args.out.write_text(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
