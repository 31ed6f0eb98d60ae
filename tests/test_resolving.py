"""What is open is settled at the first start of a run, by a stated rule, and stays so wherever the run goes on."""

import contextlib
import dataclasses
import json
from datetime import timedelta
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch

from dfer.cli import UserError
from dfer.config import PRESETS, Config, DataConfig, RunConfig, begun_config, config_from_json, parse_config
from dfer.lists.index import ClipIndex
from dfer.lists.packed import Packed
from dfer.precision import amp_of_trained
from dfer.run import defaults, distributed, resolving
from dfer.run.algorithms import chosen_algorithms
from dfer.run.continuing import differences, parse_command
from dfer.run.defaults import MOST_CLIPS, batch_factor, cache_tier, only_of_a_gpu, scaled_lr, suited
from dfer.run.distributed import World
from dfer.run.fingerprints import changes
from dfer.run.folder import RunFolder, started_config
from dfer.run.folds import fold_runs, with_one_start
from dfer.run.launchers import Place
from dfer.run.memory import memory_advice
from dfer.run.resolving import busy_beside, evaluated, in_words, raw_bytes, settled, short_of_cores, with_cache

CPU = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def machine(monkeypatch):
    """A function that gives this process a GPU with so many GB, free ones, or none, and so many cores."""

    def give(gb: float | None = None, cores: int = 8, free: float = 1000, gpus: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gb is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus * (gb is not None))
        properties = SimpleNamespace(total_memory=int(1e9 * (gb or 0)))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(1e9 * free), properties.total_memory))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(resolving, "usable_cores", lambda: cores)
        monkeypatch.setattr(distributed, "usable_cores", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    give()
    return give


@pytest.fixture
def begin(tmp_path):
    """A function that leaves the run that some words begin here, as after its first step; what it has is returned."""

    def leave(*words):
        config = started_config(parse_config([*words, "--run.log-dir", str(tmp_path), "--run.name", "a"]))
        (tmp_path / "a" / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / "config.json").write_text(config.to_json())
        (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
        return config

    return leave


def again(tmp_path, *words):
    return started_config(parse_config([*words, "--run.log-dir", str(tmp_path), "--run.name", "a"]))


def computing(config):
    run = config.run
    return run.device, run.amp, run.graph, run.threads, config.model.crf_backend


def test_what_is_open_is_what_the_machine_has(machine, monkeypatch):
    machine(None, cores=3)
    assert computing(settled(parse_config(["debug"]))) == ("cpu", "off", "off", 3, "dense")
    machine(80)
    assert computing(settled(parse_config(["debug"]))) == ("cuda", "bf16", "on", 0, "triton")
    assert computing(settled(parse_config(["debug", "--run.device", "cpu"]))) == ("cpu", "off", "off", 8, "dense")
    typed = parse_config(["debug", "--run.amp", "fp16", "--run.graph", "off", "--model.crf-backend", "sdpa"])
    assert computing(settled(typed)) == ("cuda", "fp16", "off", 0, "sdpa")
    machine(None)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")  # who says it is obeyed
    assert settled(parse_config(["debug"])).run.threads == 16
    assert settled(parse_config(["debug", "--run.threads", "2"])).run.threads == 2


def test_nothing_stays_open_but_the_cache(machine):
    """Another option that is "auto" has to be settled, or said to depend on no machine."""
    machine(80)
    found = json.loads(settled(parse_config(["debug", "--data.cache", "auto"])).to_json())
    still = {f"{s}.{k}" for s in ("data", "model", "run", "optim") for k, v in found[s].items() if v == "auto"}
    assert still == {"data.source", "data.cache"}
    assert set(defaults.OPEN) >= {"run.device", "run.amp", "run.graph", "model.crf_backend", "data.cache"}


@pytest.mark.parametrize("words", [(), ("debug",), ("debug", "--run.device", "auto", "--run.amp", "auto")])
def test_a_run_goes_on_as_it_was_settled(machine, begin, tmp_path, words):
    machine(None, cores=6)
    config = begin("debug")
    assert config.run.threads == 6
    machine(80, cores=2)  # to which all would be another
    now = again(tmp_path, *words)
    assert computing(now) == computing(config) and differences(config, now) == []
    RunFolder(now, "a").close()
    assert short_of_cores(now, CPU).startswith("--run.threads 6, as this run has them, on 2 usable cores of a process")
    assert short_of_cores(settled(parse_config(["debug", "--run.device", "cpu"])), CPU) is None
    machine(None, cores=6)
    assert short_of_cores(now, CPU) is None
    beside = dataclasses.replace(CPU, size=4, local_size=2)  # two processes share the cores of each of two machines
    assert "on 3 usable cores of a process" in short_of_cores(now, beside)


def test_a_run_of_a_gpu_goes_on_without_one_where_that_is_said(machine, begin, tmp_path):
    machine(80)
    config = begin("debug")
    machine(None)
    now = again(tmp_path, "debug")
    assert computing(now) == computing(config)
    with pytest.raises(UserError, match=r"--run\.device cuda: no NVIDIA GPU is visible here; --run\.device cpu does "):
        distributed.setup(now.run.device, timedelta(seconds=1))
    now = again(tmp_path, "debug", "--run.device", "cpu", "--run.threads", "2")
    assert computing(now) == ("cpu", "bf16", "off", 2, "triton") and differences(config, now) == []
    state = {"config": config.to_json(), "data": {k: {"source": "raw", "bytes": None, "listed": ""}
             for k in ("train_list", "val_list")}}  # fmt: skip
    assert changes(state, now, state["data"]) == [
        "--run.device was cuda, is cpu: it rounds otherwise than it would have",
        "--data.jpeg-decoder sms --run.graph on --run.fused all: only a GPU has that; the run goes on without",
    ]
    assert only_of_a_gpu(now) == {} and only_of_a_gpu(config).keys() == {"data.jpeg_decoder", "run.graph", "run.fused"}
    back = settled(config)
    assert changes(state, back, state["data"]) == []
    now = again(tmp_path, "debug", "--run.device", "cpu", "--run.amp", "off")
    assert differences(config, now) == ["--run.amp was bf16, is off"]


def test_a_run_that_left_all_open_is_settled_at_each_start(machine, begin, tmp_path):
    """As older versions did: it goes on wherever it can."""
    begin("debug")
    path = tmp_path / "a" / "config.json"
    saved = json.loads(path.read_text())
    saved["run"] |= {"device": "auto", "amp": "auto", "graph": "off"}
    saved["model"]["crf_backend"] = "auto"
    del saved["run"]["threads"]
    path.write_text(json.dumps(saved))
    for gb, found in ((80, ("cuda", "bf16", "off", 0, "dense")), (None, ("cpu", "off", "off", 8, "dense"))):
        machine(gb)
        now = again(tmp_path, "debug")
        assert computing(now) == found
        RunFolder(now, "a").close()
    with pytest.raises(UserError, match=r"--run\.amp was off, is bf16"):
        RunFolder(again(tmp_path, "debug", "--run.amp", "bf16"), "a")


def leave_open(tmp_path, **run):
    """As an older version saved a run."""
    path = tmp_path / "a" / "config.json"
    saved = json.loads(path.read_text())
    saved["run"] |= {"device": "auto", "amp": "auto"} | run
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize("words", [(), ("--run.device", "cpu"), ("--run.graph", "off"), ("--run.graph", "auto")])
def test_a_run_that_left_its_device_open_goes_on_without_a_gpu_and_its_graphs(machine, begin, tmp_path, words):
    machine(80)
    begin("debug")
    leave_open(tmp_path, graph="on", fused="both")
    assert again(tmp_path, "debug").run.graph == "on"
    machine(None)
    now = again(tmp_path, "debug", *words)
    assert (now.run.device, now.run.amp, now.run.graph) == ("cpu", "off", "off")
    RunFolder(now, "a").close()
    machine(80)  # and beside one that is not to be used
    if words[:1] != ("--run.graph",):
        now = again(tmp_path, "debug", "--run.device", "cpu")
        assert (now.run.device, now.run.amp, now.run.graph) == ("cpu", "off", "off")
        RunFolder(now, "a").close()


# Options with a choice of values that mean something wherever a run is, or are refused by what needs them.
ANYWHERE = {"data.source", "data.bad_clips", "data.balance", "data.mirror_views", "run.device", "run.wandb", "run.amp"}
ANYWHERE |= {f"run.{name}" for name in ("compile", "deterministic", "channels_last", "sync_bn", "tensorboard")}
CHOICES = {  # of all options of where and how a run computes
    f"{section}.{field.name}": get_args(field.type) or (False, True)
    for section, options in (("data", DataConfig), ("run", RunConfig))
    for field in dataclasses.fields(options)
    if get_origin(field.type) is Literal or field.type is bool
}


def test_every_choice_has_a_meaning_on_a_cpu_or_is_known_to_have_none():
    assert CHOICES.keys() == defaults.ON_A_CPU.keys() | ANYWHERE and not ANYWHERE & defaults.ON_A_CPU.keys()
    for name, known in defaults.ON_A_CPU.items():
        assert set(known) < set(CHOICES[name]) and known[-1] in ("off", "cores"), name


# A value that is a GPU's of three options, and one that is not; the slow tests take all of all.
QUICK = {("data.cache", "gpu"), ("data.jpeg_decoder", "engine"), ("run.graph", "on"), ("run.graph", "auto")}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, v, marks=() if (name, v) in QUICK else pytest.mark.slow)
        for name in defaults.ON_A_CPU
        for v in CHOICES[name]
    ],
)
def test_what_only_a_gpu_has_is_refused_on_a_cpu_where_it_is_typed(machine, begin, tmp_path, name, value):
    """Whatever else a run had of it; and a run that had it goes on without."""
    flag, gpus = f"--{name.replace('_', '-')}", value not in defaults.ON_A_CPU[name]
    refused = pytest.raises(UserError, match=rf"^{flag} {value}: only a GPU has that, and this run is on a CPU; leave")
    for gb, device in ((80, "cpu"), (None, "cpu"), (None, "auto")):
        machine(gb)
        with refused if gpus else contextlib.nullcontext():
            started_config(parse_config(["debug", "--run.device", device, flag, value]))
    machine(80)
    assert started_config(parse_config(["debug", flag, value])).run.device == "cuda"
    begin("debug", flag, value)
    assert again(tmp_path, "debug").run.device == "cuda"
    machine(None)
    assert only_of_a_gpu(again(tmp_path, "debug", "--run.device", "cpu")) == {}
    with refused if gpus else contextlib.nullcontext():
        again(tmp_path, "debug", "--run.device", "cpu", flag, value)


def test_all_that_only_a_gpu_has_is_named_at_once(machine, tmp_path):
    words = ["--run.fused", "pool", "--data.video-decoder", "nvdec"]
    with pytest.raises(UserError, match=r"^--data\.video-decoder nvdec --run\.fused pool: only a GPU has that"):
        started_config(parse_config(["debug", *words]))


def test_a_run_of_a_cpu_that_an_older_version_began_goes_on_there(machine, begin, tmp_path):
    """It was saved with decoders of a GPU, or with none named."""
    begin("debug")
    path = tmp_path / "a" / "config.json"
    saved = json.loads(path.read_text())
    assert saved["data"]["jpeg_decoder"] == "sms"
    del saved["data"]["jpeg_decoder"], saved["data"]["video_decoder"]
    path.write_text(json.dumps(saved))
    now = again(tmp_path, "debug")
    assert only_of_a_gpu(now) == {} and begun_config(tmp_path / "a").data.video_decoder == "nvdec"
    RunFolder(now, "a").close()


@pytest.mark.parametrize("sync_bn", [False, True])
def test_several_processes_go_on_with_graphs_unless_they_exchange_within_a_pass(
    machine, begin, tmp_path, monkeypatch, sync_bn
):
    machine(80)
    words = ["--run.sync-bn"] if sync_bn else []
    config = begin("debug", *words)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    found = [
        again(tmp_path, "debug", *words, *typed).run for typed in ((), ("--run.graph", "on"), ("--run.graph", "off"))
    ]
    assert [run.graph for run in found] == ["off" if sync_bn else "on", "on", "off"]
    assert [run.fused for run in found] == [config.run.fused] * 3 == ["all"] * 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert again(tmp_path, "debug", *words).run.graph == "on"


def test_a_run_is_not_tied_to_a_card_that_held_its_clips(machine, begin, tmp_path):
    machine(80)
    config = begin("debug", "--data.cache", "gpu")
    assert again(tmp_path, "debug").data.cache == "gpu"
    machine(24)
    now = again(tmp_path, "debug", "--data.cache", "off")
    assert now.data.cache == "off" and differences(config, now) == []
    RunFolder(now, "a").close()
    machine(None)
    now = again(tmp_path, "debug", "--run.device", "cpu")
    assert now.data.cache == "off" and differences(config, now) == []


def test_what_no_cpu_has_may_be_left_out_there(machine, begin, tmp_path, monkeypatch):
    machine(80)
    config = begin("debug", "--run.amp", "fp16", "--run.sync-bn")
    machine(None)
    cpu = ("--run.device", "cpu", "--run.amp", "off", "--run.no-sync-bn")
    now = again(tmp_path, *cpu)
    RunFolder(now, "a").close()
    assert differences(config, now) == []
    state = {"config": config.to_json(), "data": {k: {"source": "raw", "bytes": None, "listed": ""}
             for k in ("train_list", "val_list")}}  # fmt: skip
    assert [line.split(":")[0] for line in changes(state, now, state["data"])] == [
        "--run.device was cuda, is cpu", "--run.amp was fp16, is off", "--run.sync-bn was True, is False",
        "--data.jpeg-decoder sms --run.graph on --run.fused all",
    ]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")  # each of whose batch statistics would be of its own clips
    assert differences(config, now) == ["--run.sync-bn was True, is False"]
    monkeypatch.delenv("WORLD_SIZE")
    machine(80)  # where nothing speaks for another one
    with pytest.raises(UserError, match=r"--run\.amp was fp16, is off; --run\.sync-bn was True, is False"):
        RunFolder(again(tmp_path, "--run.amp", "off", "--run.no-sync-bn"), "a")


def test_threads_are_those_of_the_run():
    before = torch.get_num_threads()
    with chosen_algorithms(RunConfig(threads=before + 2)):
        assert torch.get_num_threads() == before + 2
    with chosen_algorithms(RunConfig()):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_work_beside_several_threads_is_said(tmp_path):
    pressure = tmp_path / "cpu"
    pressure.write_text("some avg10=87.40 avg60=1.00 avg300=0.50 total=7\nfull avg10=0.00 avg60=0.00 total=0\n")
    two, one, gpu = (RunConfig(device=d, threads=n) for d, n in (("cpu", 2), ("cpu", 1), ("cuda", 2)))
    configs = [dataclasses.replace(PRESETS["debug"](False), run=run) for run in (two, one, gpu)]
    said = [busy_beside(config, pressure) for config in configs]
    assert said[0].startswith("other work waits for these cores 87 % of the time, and slows this run; one that begins ")
    assert said[1:] == [None, None]
    pressure.write_text("some avg10=24.00 avg60=90.00 avg300=90.50 total=7\n")
    assert busy_beside(configs[0], pressure) is busy_beside(configs[0], tmp_path / "none") is None


def test_what_was_settled_is_one_line(machine):
    machine(None, cores=3)
    line = in_words(settled(parse_config(["debug"])), CPU)
    assert line.startswith(
        "settled for this run: cpu, amp off, CRF dense, 3 threads of torch, batches of 8 clips, peak rate 0.001; here "
    )
    machine(80)
    line = in_words(settled(parse_config(["dfew"])), CPU)
    assert (
        "cuda, amp bf16, CRF triton, cache off, images by sms, videos by cores, graph on, fused all, "
        "batches of 128 clips, peak rate 0.002" in line
    )


def test_a_run_that_has_begun_is_not_told_to_change_its_step():
    config = parse_config(["debug"])
    for begun, words in ((False, "halve --data.batch-size"), (True, "continue it on more processes")):
        with pytest.raises(UserError, match=words), memory_advice(config, begun=begun):
            raise torch.OutOfMemoryError


def test_a_trained_model_is_computed_as_its_run_on_such_a_device():
    gpu = RunConfig(device="cuda", amp="bf16")
    assert [amp_of_trained(gpu, "cuda"), amp_of_trained(gpu, "cpu")] == ["bf16", "auto"]
    assert amp_of_trained(RunConfig(amp="bf16"), "cpu") == "bf16"  # of an older version
    full = RunConfig(device="cuda", amp="off")  # which was typed, as it is no GPU's by itself
    assert [amp_of_trained(full, "cuda"), amp_of_trained(full, "cpu")] == ["off", "off"]
    assert amp_of_trained(RunConfig(device="cpu", amp="off"), "cuda") == "auto"


def test_a_trained_model_is_launched_as_its_run_on_such_a_device(machine, tmp_path):
    """What was settled for one kind of device says nothing of the other."""

    def found(saved: Config, device: str = "auto") -> tuple:
        config = evaluated(saved, device)
        assert config.run.device == device and not config.run.compile
        return config.run.graph, config.run.fused, config.model.crf_backend

    machine(None)
    cpu = settled(parse_config(["debug"]))
    machine(80)
    gpu = settled(parse_config(["debug"]))
    typed = settled(parse_config(["debug", "--run.graph", "off", "--run.fused", "norm", "--model.crf-backend", "sdpa"]))
    compiled = settled(parse_config(["debug", "--run.compile"]))
    export = config_from_json('{"preset": "exported", "data": {"train_list": "a", "val_list": "b"}}', tmp_path)
    here = ("on", "both", "triton")  # all: casts of weights too, which are those of training
    assert [found(c) for c in (gpu, cpu, export)] == [("on", "all", "triton"), here, here]
    assert found(typed) == ("off", "norm", "sdpa") and found(compiled) == ("on", "off", "triton")
    older = dataclasses.replace(gpu, run=dataclasses.replace(gpu.run, device="auto", graph="on", fused="off"))
    assert found(older) == ("on", "off", "triton")
    assert [found(c, "cpu")[:2] for c in (gpu, cpu, export, typed, older)] == [("off", "off")] * 5
    machine(None)
    assert [found(c)[:2] for c in (gpu, cpu, export, typed, older)] == [("off", "off")] * 5
    assert found(cpu)[2] == found(export)[2] == "dense"


# ---- Batch and learning rate


# Memory in GB -> batches of a process under 1, 2, 4, 8, 16 and 64 processes, as docs/speed.md has them.
BATCHES = {
    "faces": {8: (16,) * 6, 24: (16,) * 6, 40: (32, 32, 16, 16, 16, 16), 80: (64, 32, 16, 16, 16, 16)},
    "dfew": {
        8: (16,) * 6, 12: (32,) * 6, 24: (32,) * 6, 40: (64, 64, 64, 64, 32, 32), 80: (128, 128, 128, 64, 32, 32),
        141: (128, 128, 128, 64, 32, 32),
    },
    "ferv39k": {8: (16,) * 6, 24: (32,) * 6, 40: (64,) * 5 + (32,), 80: (128, 128, 128, 128, 64, 32)},
}  # fmt: skip


@pytest.mark.parametrize("preset", BATCHES)
def test_batches_suit_the_card(preset):
    anchor = PRESETS[preset](True)
    for gb, batches in BATCHES[preset].items():
        for size, batch in zip((1, 2, 4, 8, 16, 64), batches, strict=True):
            config = suited(anchor, int(1e9 * gb), size)
            assert config.data.batch_size == batch and batch % 2 == 0
            assert config.optim.lr == pytest.approx(1e-3 * (batch / anchor.data.batch_size) ** 0.5, rel=5e-3)
            assert batch * size <= max(MOST_CLIPS[preset], anchor.data.batch_size * size)
            as_before = dataclasses.replace(config, data=anchor.data, optim=anchor.optim)
            assert as_before == anchor  # nothing else has changed


def test_rates_grow_as_their_optimizer_does():
    assert [scaled_lr(1e-3, name, 4) for name in ("adamw", "lion", "muon", "sgd")] == [2e-3, 2e-3, 2e-3, 4e-3]
    assert [scaled_lr(1e-3, "adamw", factor) for factor in (0.5, 1, 2)] == [7.07e-4, 1e-3, 1.41e-3]
    assert batch_factor(100e9, 32, 10**9, 1) == 4


def test_what_is_typed_wins(machine):
    machine(80)

    def step(*words):
        config = parse_config(["dfew", *words])
        return config.data.batch_size, config.optim.lr

    assert step() == (128, 2e-3)
    assert step("--data.batch-size", "16") == step("--data.batch_size=16") == (16, 1e-3)
    assert step("--optim.lr", "3e-4") == (32, 3e-4) and step("--optim.accumulate", "2") == (32, 1e-3)
    assert step("--optim.optimizer", "sgd") == (128, 4e-3)
    assert step("--recipe", "ial") == (32, 1e-3) and step("--recipe", "m3dfel") == (256, 5e-4)
    assert step("--data.size", "224") == (32, 1e-3)  # four times the memory: as on 20 GB
    assert step("--model.name", "st-former") == step("--model.backbone", "resnet34") == (32, 1e-3)
    assert step("--run.device", "cpu") == (32, 1e-3)
    assert parse_config(["debug"]).data.batch_size == 8
    machine(None)
    assert step() == (32, 1e-3) and parse_config(["faces"]).data.batch_size == 16


def test_a_run_keeps_its_batch_and_is_found_on_another_card(machine, begin, tmp_path, preset="dfew"):
    machine(80)
    begun = begin(preset)
    (tmp_path / "a" / "checkpoints" / "step-00000001.json").write_text("{}")
    machine(24)
    other = parse_config([preset])
    assert other.optim.lr == 1e-3 != begun.optim.lr
    found = parse_command([preset, "--resume", "--run.log-dir", str(tmp_path)])
    assert (found.run.name, found.data.batch_size, found.optim.lr) == ("a", begun.data.batch_size, 2e-3)
    with pytest.raises(UserError, match=r"--optim\.lr was 0\.002, is 0\.001"):
        parse_command(
            [preset, "--resume", "--run.log-dir", str(tmp_path), "--optim.lr", "1e-3", "--data.batch-size", "64"]
        )
    typed = again(tmp_path, preset, "--optim.lr", "1e-3")
    assert differences(begun, typed) == ["--optim.lr was 0.002, is 0.001"]


def test_folds_go_on_with_one_batch_and_rate_on_another_card(machine, tmp_path):
    words = ["--model.init", "random"]
    folds = [(tmp_path / f"set_{fold}_train.txt", tmp_path / f"set_{fold}_test.txt") for fold in (1, 2)]

    def runs(*typed):
        config, told = with_one_start(parse_config(["dfew", *words, *typed]), [*words, *typed], tmp_path)
        return told, fold_runs(config, folds, 1, tmp_path, ["dfew", *told])

    machine(80)
    told, (first, _) = runs()
    assert told == words
    first.path.mkdir()
    (first.path / "config.json").write_text(settled(first.config).to_json())
    (first.path / "metrics.jsonl").write_text('{"step": 1}\n')
    machine(24)
    told, both = runs()
    assert [(run.config.data.batch_size, run.config.optim.lr) for run in both] == [(128, 2e-3)] * 2
    assert told == [*words, "--data.batch-size", "128", "--optim.lr", "0.002"]
    with pytest.raises(UserError, match=r"--optim\.lr was 0\.002, is 0\.001"):
        runs("--data.batch_size=128")
    assert runs("--optim.lr", "1e-3")[0] == [*words, "--optim.lr", "1e-3"]  # which a checkpoint of the first refuses


# ---- The cache


def test_pictures_are_held_where_they_fit():
    dfew, ferv39k = int(44e9), int(54e9)
    found = [cache_tier(dfew, int(memory), 1) for memory in (24e9, 42e9, 80e9, 141e9)]
    assert found == ["off", "off", "gpu", "gpu"] and cache_tier(ferv39k, int(80e9), 1) == "gpu"
    assert [cache_tier(dfew, int(42e9), n) for n in (1, 2, 4)] == ["off", "shares", "shares"]
    assert cache_tier(int(4e9), int(8e9), 1) == "gpu" and cache_tier(int(4e9) + 1, int(8e9), 1) == "off"


def index_of(kind="raw", widths=(10, 10)):
    """Two videos, a million frames of 300 bytes together."""
    heights, first, two = np.full(2, 10, np.int32), np.array([0, 3, 10**6]), np.zeros(2, np.int64)
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int32)
    store = Packed(kind, [], np.zeros(2, np.int32), first, *nothing, heights, np.array(widths, np.int32))
    return ClipIndex([], two, two, store)


def test_the_bytes_of_raw_clips_are_those_of_each_of_its_frames():
    widths, frames = (10, 4000), (3, 10**6 - 3)
    expected = sum(count * 3 * 10 * width for count, width in zip(frames, widths, strict=True))
    assert raw_bytes(index_of(widths=widths)) == expected > 2**36
    assert raw_bytes(index_of()) == 300 * 10**6 and raw_bytes(index_of("shards")) is None


def test_the_cache_is_settled_by_the_clips(machine, capsys, monkeypatch):
    def tier(train, *words, gb=2, free=1000, gpus=1):
        machine(gb, free=free, gpus=gpus)
        return with_cache(settled(parse_config(["debug", *words])), train, index_of()).data.cache

    auto = ("--data.cache", "auto")
    assert tier(index_of()) == "off" and tier(index_of(), "--data.cache", "gpu", gb=0.01) == "gpu"
    assert tier(index_of(), *auto) == "gpu"  # 2 lists of 300 MB
    assert tier(index_of(), *auto, gb=1.1) == "off" and tier(index_of(), *auto, gb=None) == "off"
    assert tier(index_of(), *auto, free=1.1) == "off"  # other work has the rest
    assert tier(index_of("shards"), *auto) == "off" and tier(index_of(widths=(10, 11)), *auto) == "gpu"
    large = index_of(widths=(10, 30))  # 900 MB
    assert tier(large, *auto) == "off" and tier(large, *auto, gb=2.5) == "gpu"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(resolving, "find_place", lambda: Place(0, 2, 0, 2))
    seen = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: seen.append((a, b)) or True)
    assert tier(index_of(), *auto, gb=1.1, gpus=2) == "shares" and sorted(seen) == [(0, 1), (1, 0)]
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a < b)
    assert capsys.readouterr().err == "" and tier(index_of(), *auto, gb=1.1, gpus=2) == "off"
    assert "only in shares, and not each reads all others' memory: off" in capsys.readouterr().err
