"""Whole runs of train.py, as a user starts them, on tiny clips."""

import csv
import json
import math

import pytest

from dfer.lists.annotations import EMOTIONS
from dfer.report.records import read_run
from tests.conftest import run_python

TINY = [
    "debug", "--data.size", "32", "--data.num-segments", "2", "--data.batch-size", "4", "--model.dim", "16",
    "--optim.epochs", "2", "--optim.steps-per-epoch", "2", "--run.log-every", "1", "--run.device", "cpu",
]  # fmt: skip


def tiny_run(clips, log_dir, name, *extra, expect=0, **env):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    done = run_python("train.py", *TINY, *lists, "--run.log-dir", str(log_dir), "--run.name", name, *extra, **env)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def rows(run_dir):
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in written]


def losses(run_dir):
    return {r["step"]: float(r["train/loss"]).hex() for r in rows(run_dir) if "train/loss" in r}


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A finished run: (its folder, what it printed)."""
    log_dir = tmp_path_factory.mktemp("logs")
    done = tiny_run(clips, log_dir, "a", "--run.wandb", "offline", fresh=True)
    return log_dir / "a", done.stdout


def test_a_run_leaves_its_records(finished, clips):
    run_dir, printed = finished
    names = {p.name for p in run_dir.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "predictions.csv",
        "log.txt",
        "best_WAR.safetensors",
        "best_UAR.safetensors",
    } <= names
    assert not list(run_dir.rglob("*.partial")) and len(list(run_dir.glob("checkpoints/*.pt"))) == 2
    assert "WAR" in printed and "UAR" in printed and "clips/s" in printed and str(run_dir) in printed

    train = [r for r in rows(run_dir) if "train/loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    for row in train:
        assert math.isfinite(row["train/loss"]) and row["throughput/total_clips_per_s"] > 0
        assert 0 <= row["throughput/data_wait_share"] <= 1 and "crf/coupling" in row
    last = [r for r in rows(run_dir) if "val/WAR" in r][-1]

    with open(run_dir / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    listed = [line.rsplit(maxsplit=2) for line in (clips / "test.txt").read_text().splitlines()]
    assert [(p["clip"], p["label"]) for p in predictions] == [(name, label) for name, _, label in listed]
    right = sum(p["label"] == p["prediction"] for p in predictions)
    assert last["val/WAR"] == pytest.approx(100 * right / len(listed))
    for p in predictions:
        assert sum(float(v) for k, v in p.items() if k.startswith("p_")) == pytest.approx(1, abs=1e-5)


def test_wandb_recorded_the_run_offline(finished):
    run_dir, _ = finished
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


def test_an_unreachable_wandb_delays_the_start_and_nothing_else(clips, tmp_path):
    done = run_python(
        "-c",
        "import functools, sys, wandb, train, dfer.config as c\n"
        "wandb.Settings = functools.partial(lambda make, **k: make(**k | {'init_timeout': 2}), wandb.Settings)\n"
        "train.main(c.parse_config(sys.argv[1:]))",
        *TINY, "--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt",
        "--run.log-dir", str(tmp_path), "--run.name", "e", "--run.wandb", "online", "--optim.epochs", "1",
        fresh=False, WANDB_MODE="online", WANDB_API_KEY="c" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "W&B cannot record online" in done.stdout and "recording offline" in done.stdout
    assert list((tmp_path / "e" / "wandb").glob("offline-run-*/*.wandb")) and rows(tmp_path / "e")
    for path in (tmp_path / "e").rglob("*"):
        assert not path.is_file() or b"c" * 40 not in path.read_bytes(), path


def test_the_same_seed_gives_the_same_bits(finished, clips, tmp_path):
    tiny_run(clips, tmp_path, "b")
    assert losses(tmp_path / "b") == losses(finished[0])
    tiny_run(clips, tmp_path, "c", "--seed", "1", "--optim.epochs", "1")
    assert losses(tmp_path / "c")[1] != losses(finished[0])[1]


def test_a_finished_run_is_left_alone_and_another_configuration_refused(finished, clips):
    run_dir, _ = finished
    saved = json.loads((run_dir / "config.json").read_text())
    del saved["data"]["cache"]  # as a version wrote it that had no such option
    (run_dir / "config.json").write_text(json.dumps(saved))
    before = {p: p.stat().st_mtime_ns for p in run_dir.glob("checkpoints/*")}
    for resume in ((), ("--resume",)):
        again = tiny_run(clips, run_dir.parent, "a", *resume, "--run.wandb", "off")
        assert "all 2 epochs are done" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.glob("checkpoints/*")} and len(rows(run_dir)) == 6
    refused = tiny_run(clips, run_dir.parent, "a", "--optim.lr", "0.5", "--loss.aux-weight", "1", expect=2)
    assert "another configuration: --loss.aux-weight was 0.2, is 1.0; --optim.lr was 0.001, is 0.5;" in refused.stderr
    refused = tiny_run(clips, run_dir.parent, "a", "--data.batch-size", "2", expect=2)
    assert "--data.batch-size 2: on 1 processes that is 2 clips per step, but a has 4" in refused.stderr
    fewer = clips / "fewer.txt"
    fewer.write_text("".join((clips / "test.txt").read_text().splitlines(keepends=True)[:-1]))
    refused = tiny_run(clips, run_dir.parent, "a", "--data.val-list", str(fewer), expect=2)
    assert f"{fewer}: not the clips that a was evaluated on so far" in refused.stderr
    (run_dir.parent / "mount").symlink_to(clips)
    moved = tiny_run(run_dir.parent / "mount", run_dir.parent, "a")
    assert (
        "the same clips by name, label and number of frames" in moved.stdout and "all 2 epochs are done" in moved.stdout
    )
    assert json.loads((run_dir / "config.json").read_text())["data"]["val_list"] == str(
        run_dir.parent / "mount/test.txt"
    )


def test_evaluate_repeats_the_last_epoch(finished, clips, tmp_path):
    run_dir, _ = finished
    done = run_python("scripts/evaluate.py", str(run_dir), "--batch-size", "3", "--device", "cpu",
                      "--out", str(tmp_path / "p.csv"), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    last = [r for r in rows(run_dir) if "val/WAR" in r][-1]
    assert (numbers["WAR"], numbers["UAR"], numbers["clips"]) == (last["val/WAR"], last["val/UAR"], 9)
    assert (tmp_path / "p.csv").read_text().count("\n") == 10


def test_options_run(clips, tmp_path):
    options = ("--optim.ema", "0.5", "--optim.accumulate", "2", "--optim.optimizer", "sgd", "--run.amp", "bf16")
    options += ("--recipe", "lstpnet", "--data.balance", "full")
    done = tiny_run(clips, tmp_path, "options", *options, "--data.frames-per-segment", "2", "--run.no-channels-last")
    said = [line for line in done.stdout.splitlines() if line.startswith(("recipe lstpnet: ", "balance full: "))]
    assert len(said) > 2 and read_run(tmp_path / "options").notes == said  # for the report
    names = [line.rsplit(maxsplit=2)[0] for line in (clips / "train.txt").read_text().splitlines()]
    votes = "".join(f"{name},1,2,3,0,0,4,0\n" for name in names)
    (tmp_path / "votes.csv").write_text(f"clip,{','.join(EMOTIONS)}\n{votes}")
    soft = ("--loss.soft-labels", str(tmp_path / "votes.csv"))
    tiny_run(clips, tmp_path, "baseline", "--model.name", "mean-pool", "--optim.epochs", "1", *soft)
    done = run_python("scripts/evaluate.py", str(tmp_path / "options"), "--json")
    last = [r for r in rows(tmp_path / "options") if "val/WAR" in r][-1]
    assert json.loads(done.stdout.splitlines()[-1])["WAR"] == last["val/WAR"]  # the averaged weights are evaluated


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18-lstm", "r18-gru", "r3d-18", "st-former"])
def test_baselines_train_and_are_evaluated_at_another_number_of_frames(clips, tmp_path, name):
    done = tiny_run(clips, tmp_path, name, "--model.name", name)
    assert "report: " in done.stdout, done.stderr
    done = run_python("scripts/evaluate.py", str(tmp_path / name), "--json")
    last = [r for r in rows(tmp_path / name) if "val/WAR" in r][-1]
    assert json.loads(done.stdout.splitlines()[-1])["WAR"] == last["val/WAR"]
    done = run_python("scripts/evaluate.py", str(tmp_path / name), "--json", "--segments", "5", "2")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(numbers["segments"], numbers["clips"]) for numbers in found] == [(5, 9), (2, 9)], done.stderr
    assert found[1]["WAR"] == last["val/WAR"]  # those of training


def test_a_clip_that_cannot_be_read_is_left_out_named_and_counted(clips, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.jpg").write_bytes(b"not a jpeg")
    good = [f"{clips}/{line}" for line in (clips / "train.txt").read_text().splitlines()[:11]]
    (tmp_path / "list.txt").write_text("\n".join([*good, "broken 1 1"]) + "\n")
    words = ("--data.train-list", str(tmp_path / "list.txt"), "--optim.steps-per-epoch", "3")
    done = tiny_run(clips, tmp_path, "holes", *words)
    assert done.stderr.count("clip left out: ") == 1 and "broken" in done.stderr
    said = "1 of 12 training clips could not be read and were left out so far"
    assert (tmp_path / "holes" / "log.txt").read_text().count(said) == 2  # once per epoch
    assert all(math.isfinite(row["train/loss"]) for row in rows(tmp_path / "holes") if "train/loss" in row)


@pytest.mark.parametrize(
    ("case", "args", "message"),
    [
        ("missing list", ("--data.train-list", "nowhere.txt"), "nowhere.txt: no such annotation list"),
        ("empty list", ("--data.train-list", "{tmp}/empty.txt"), "empty.txt: the annotation list is empty"),
        ("label 7", ("--data.val-list", "{tmp}/label7.txt"), "label7.txt:1: label 7"),
        ("folder gone", ("--data.val-list", "{tmp}/gone.txt"), "gone.txt:1: no such frame folder"),
        ("broken JPEG", ("--data.train-list", "{tmp}/broken.txt", "--data.bad-clips", "error"), "bad frame"),
        ("batch 0", ("--data.batch-size", "0"), "--data.batch-size 0"),
        ("batch too large", ("--data.batch-size", "64"), "do not fill one step"),
        ("T 0", ("--data.num-segments", "0"), "--data.num-segments 0"),
        ("lr nan", ("--optim.lr", "nan"), "--optim.lr nan"),
        ("unknown key", ("--optim.learning-rate", "1"), "--optim.learning-rate"),
        ("nothing to normalise by", ("--data.batch-size", "1", "--data.num-segments", "1"), "one value per channel"),
        ("no write permission", ("--run.log-dir", "/proc/logs"), "--run.log-dir"),
        ("no GPU", ("--run.amp", "fp16"), "--run.amp fp16"),
        ("no GPU, or not raw", ("--data.cache", "gpu"), "--data.cache gpu"),
        ("no such backbone", ("--model.backbone", "resnet19"), "resnet19"),
        ("no such run", ("--resume", "--run.name", "never"), "never holds no checkpoint to continue from"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(clips, tmp_path, case, args, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "label7.txt").write_text(f"{clips}/test clips/000 3 7\n")
    (tmp_path / "gone.txt").write_text("gone 3 1\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.jpg").write_bytes(b"not a jpeg")
    (tmp_path / "broken.txt").write_text("broken 1 1\n" * 8)
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    name = () if "--run.name" in args else ("--run.name", "x")
    log_dir = ("--run.log-dir", str(tmp_path / "logs"))
    filled = [a.replace("{tmp}", str(tmp_path)) for a in args]
    done = run_python("train.py", *TINY, *lists, *log_dir, *name, *filled, timeout=60)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.py: ") and message in line
