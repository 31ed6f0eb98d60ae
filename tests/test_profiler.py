"""A trace has the steps and ranges that it should have, its table adds up, and nothing that is trained notices."""

import gzip
import json
import random
from collections import Counter

import pytest
import torch
from torch.profiler import record_function

import train
from dfer.config import Config, parse_config
from dfer.run.checkpoint import load_checkpoint
from dfer.run.continuing import differences
from dfer.run.profiler import RANGES, TRACE, WARM_UP, Profiler, table
from tests.conftest import run_python
from tests.test_resume import SMALL
from tests.test_train import losses, rows

CRF = {"dfer::meanfield", "dfer::meanfield_backward"}
NAMES = {"loading", "reading", "DALI", "forward", "backward", "optimizer"} | CRF


def names_in(path) -> Counter:
    """How often each named range is in a trace; "step" is any ProfilerStep#."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    found = (e["name"] for e in events if e.get("cat") in ("user_annotation", "cpu_op"))
    return Counter("step" if name.startswith("ProfilerStep#") else name for name in found)


def run(clips, log_dir, name, *extra):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    words = ("--run.log-dir", str(log_dir), "--run.name", name, "--optim.accumulate", "1", *extra)
    done = run_python("train.py", *SMALL, *lists, *words, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_profiled_run_is_the_same_run_to_the_bit(clips, tmp_path):
    run(clips, tmp_path, "plain")
    done = run(clips, tmp_path, "profiled", "--profile", "2")
    assert not done.stderr  # of what is no error either
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain") and len(losses(tmp_path / "plain")) == 6
    names = ("step", "epoch", "val/WAR", "val/UAR", "val/loss")
    plain, profiled = (
        [[row[name] for name in names] for row in rows(tmp_path / run) if "val/WAR" in row]
        for run in ("plain", "profiled")
    )
    assert plain == profiled and len(plain) == 2
    plain, profiled = (load_checkpoint(tmp_path / name) for name in ("plain", "profiled"))
    for part in ("model", "ema"):
        assert plain[part].keys() == profiled[part].keys()
        for name, tensor in plain[part].items():
            assert torch.equal(tensor, profiled[part][name]), name

    assert not (tmp_path / "plain" / TRACE).exists()
    found = names_in(tmp_path / "profiled" / TRACE)
    names = NAMES - {"reading"} | {"step"}
    assert {name: found[name] for name in names} == dict.fromkeys(names, 2)
    assert (
        2 <= found["reading"] <= 4
    )  # with the last step the evaluation and the next epoch begin, if their files are read
    log = (tmp_path / "profiled" / "log.txt").read_text()
    assert log.count("2 steps:") == 1 and TRACE in log and "100.0 %" in log


@pytest.mark.slow
def test_the_ranges_of_a_compiled_model_are_there_too(clips, tmp_path):
    run(clips, tmp_path, "compiled", "--run.compile", "--profile", "1", "--optim.epochs", "1")
    found = names_in(tmp_path / "compiled" / TRACE)
    assert {name: found[name] for name in NAMES | {"step"}} == dict.fromkeys(NAMES | {"step"}, 1)
    assert any("CompiledFxGraph" in name for name in found)


def test_a_run_is_continued_with_and_without_it():
    assert differences(Config(profile=0, seed=0), Config(profile=2, seed=1)) == ["--seed was 0, is 1"]


def test_too_many_steps_for_an_epoch_are_refused(clips, tmp_path):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    words = ("--optim.accumulate", "1", "--run.log-dir", str(tmp_path), "--profile", "3")
    with pytest.raises(ValueError, match=r"^--profile 3: an epoch has 5 steps, of which the first 3 warm up$"):
        train.main(parse_config([*SMALL, *lists, *words]))
    assert not list(tmp_path.iterdir())


def steps(profiler, num_steps, accumulate, named=True):
    """A loop as that of training: the batches it saw."""
    seen = []
    for micro, batch in enumerate(profiler.watch(range(num_steps * accumulate), num_steps), start=1):
        with record_function("forward"):
            seen.append(batch)
            torch.ones(3) + batch
        if micro % accumulate == 0:
            with record_function("optimizer"):
                torch.ones(3) * batch
    return seen


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_steps_after_the_warm_up_are_recorded_once(tmp_path, accumulate):
    said = []
    profiler = Profiler(2, accumulate, tmp_path / TRACE, said.append)
    few = WARM_UP + 1
    assert steps(profiler, few, accumulate) == list(range(few * accumulate))  # an epoch that has not enough of them
    assert not said and not list(tmp_path.iterdir()) and profiler.num_steps == 2
    assert steps(profiler, few + 4, accumulate) == list(range((few + 4) * accumulate))
    found = names_in(tmp_path / TRACE)
    assert (found["step"], found["loading"], found["forward"], found["optimizer"]) == (2, *[2 * accumulate] * 2, 2)
    assert said[-1].startswith(str(tmp_path / TRACE)) and [p.name for p in tmp_path.iterdir()] == [TRACE]
    steps(profiler, few + 4, accumulate)
    assert len(said) == len(set(said)) and profiler.num_steps == 0


def test_the_last_step_of_an_epoch_may_be_the_last_that_is_recorded(tmp_path):
    said = []
    steps(Profiler(2, 2, tmp_path / TRACE, said.append), WARM_UP + 2, 2)
    assert names_in(tmp_path / TRACE)["step"] == 2 and said[0].startswith("2 steps:")


def test_without_it_nothing_is_in_the_way(tmp_path):
    batches = iter("abc")
    for profiler in (Profiler(0, 1, tmp_path / TRACE, print), Profiler(2, 1, None, print)):
        assert profiler.watch(batches, 100) is batches


def test_a_run_that_stops_within_leaves_no_trace_and_goes_on_without(tmp_path):
    profiler = Profiler(2, 1, tmp_path / TRACE, print)
    passed = profiler.watch(range(10), 10)
    assert [next(passed) for _ in range(WARM_UP + 1)] == [0, 1, 2, 3]
    passed.close()
    assert not list(tmp_path.iterdir()) and not torch.autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    for folder, reason in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "torch could not write it")):
        with pytest.raises(ValueError, match=rf"{TRACE}: cannot write the trace \({reason}\)$"):
            steps(Profiler(1, 1, folder / TRACE, print), WARM_UP + 1, 1)
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: open(path, "w").close())
    assert not list(tmp_path.iterdir())


def made_up_trace(rng: random.Random, num_steps: int) -> tuple[list[dict], dict[str, list[float]]]:
    """A trace of a GPU in which ranges follow each other, and in ms per step what each takes there and on the host."""
    events, want = [], {name: [0.0, 0.0] for name in ("step", *RANGES)}
    now, correlation = 0.0, 0
    for step in range(num_steps):
        began = now
        for outer, inner in (
            ("loading", "reading"), ("loading", "DALI"), ("forward", "dfer::meanfield"), ("forward", None),
            ("backward", "dfer::meanfield_backward"), ("exchange", None), ("optimizer", None), (None, None),
        ):  # fmt: skip
            start = now
            for _ in range(rng.randrange(4)):
                correlation += 1
                launched = now + 0.25
                category = rng.choice(["cuda_runtime", "cuda_driver"])
                events.append({"cat": category, "name": "launch", "ts": launched, "dur": 0.5, "tid": rng.randrange(2),
                               "args": {"correlation": correlation}})  # fmt: skip
                kernel = {"cat": rng.choice(["kernel", "gpu_memcpy", "gpu_memset"]), "name": "x", "tid": 7,
                          "ts": launched + rng.uniform(0, 1e6), "dur": rng.uniform(1, 100)}  # fmt: skip
                events.append(kernel | {"args": {"correlation": correlation}})
                for name in {"step", outer, inner} - {None}:
                    want[name][1] += kernel["dur"] / 1000 / num_steps
                now += 1.0
            now += rng.uniform(1, 50)
            for name in {outer, inner} - {None}:
                category = "cpu_op" if "::" in name else "user_annotation"
                events.append({"cat": category, "name": name, "ts": start, "dur": now - start})
                want[name][0] += (now - start) / 1000 / num_steps
        events.append({"cat": "user_annotation", "name": f"ProfilerStep#{step}", "ts": began, "dur": now - began})
        want["step"][0] += (now - began) / 1000 / num_steps
    events += [
        {"name": "process_name", "ph": "M"},
        {"cat": "gpu_user_annotation", "name": "forward", "ts": 0, "dur": 9},
    ]
    rng.shuffle(events)
    return events, want


def test_the_table_is_what_was_made_up():
    for seed in range(20):
        rng = random.Random(seed)
        num_steps = rng.randint(1, 5)
        events, want = made_up_trace(rng, num_steps)
        head, *lines = table(events)
        assert head.split() == [str(num_steps), "steps:", "ms", "share", "on", "GPU:", "ms", "share"]
        there = [name for name in ("step", *RANGES) if want[name][0]]
        assert len(lines) == len(there)
        for name, line in zip(there, lines, strict=True):
            assert line[:20].rstrip() == RANGES.get(name, "step")
            host, host_share, gpu, gpu_share = (float(x) for x in line[20:].replace("%", "").split())
            share = 100 / want["step"][0]
            assert (host, gpu) == pytest.approx(want[name], abs=0.006)
            assert (host_share, gpu_share) == pytest.approx([share * x for x in want[name]], abs=0.06)


def test_a_table_without_a_gpu_says_nothing_about_one():
    events, _ = made_up_trace(random.Random(0), 2)
    head, *lines = table([e for e in events if "args" not in e])
    assert "GPU" not in head and all(line.count("%") == 1 for line in lines)
