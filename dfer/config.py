"""Configuration: frozen dataclasses, presets in Python, overrides on the command line."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dfer.cli import Range, UserError, expand_home
from dfer.files import read_file
from dfer.optim.options import OptimConfig, check_schedule
from dfer.plan.augmentation import Augmentation
from dfer.plan.balance import Balance
from dfer.recipes import RECIPES
from dfer.run.checkpoint import find_manifests
from dfer.run.defaults import at_this_place, card_memory, chooses_the_step, jpeg_decoder_of, settled_as, suited
from dfer.run.launchers import find_place, own_words
from dfer.run.values import check_ranges, first_sentence, restored

Amp = Literal["auto", "off", "bf16", "fp16"]
LossKind = Literal["cross-entropy", "focal", "class-balanced", "logit-adjusted"]


@dataclass(frozen=True)
class DataConfig:
    train_list: Path = Path("data/faces/train.txt")
    """Annotation list to train on: rows of `path num_frames label`."""
    val_list: Path = Path("data/faces/test.txt")
    """Annotation list to evaluate on."""
    root: Path | None = None
    """Where relative paths in the lists start; the list's own folder if not given."""
    source: Literal["auto", "frames", "video", "shards", "raw"] = "auto"
    """Where the clips are read from; auto = what the list points at."""
    jpeg_decoder: Literal["auto", "cores", "sms", "cores+sms", "engine", "mixed"] = "auto"
    """What decodes images for a GPU: the cores, nvJPEG on its SMs, half by each, or the JPEG engine. auto = sms."""
    video_decoder: Literal["auto", "cores", "nvdec"] = "auto"
    """What decodes videos for a GPU: the cores, or NVDEC those that it takes. auto = cores, until a card shows more."""
    bad_clips: Literal["error", "skip"] = "skip"
    """Training clips that cannot be read: stop, or leave them out, by name and 1 % at most. Evaluation always stops."""
    cache: Literal["off", "gpu", "shares", "auto"] = "off"
    """gpu = hold all raw clips on each GPU; shares = on a machine's together; auto = as they fit (docs/speed.md)."""
    size: Annotated[int, Range(32, 1024)] = 112
    """Height and width of a clip in pixels."""
    num_segments: Annotated[int, Range(1, 1024)] = 16
    """Segments that a video is cut into."""
    frames_per_segment: Annotated[int, Range(1, 64)] = 1
    """Consecutive frames from each segment: 16 x 1 is the field's default, 8 x 2 is Former-DFER's."""
    batch_size: Annotated[int, Range(1, 65536)] = 16
    """Clips per process and step."""
    views: Annotated[int, Range(1, 64)] = 1
    """Evaluation averages the probabilities of this many clips of a video, each at another place in time."""
    mirror_views: bool = False
    """And of their mirror images: twice as many."""
    balance: Balance = "none"
    """Videos of small classes come more often: as (videos of the class)^-1/2 (sqrt) or ^-1 (full) says."""
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class ModelConfig:
    name: Literal["dfernet", "mean-pool", "r18-lstm", "r18-gru", "r3d-18", "st-former"] = "dfernet"
    """The full model, or a baseline: the mean, an LSTM or a GRU over frames, a 3-D ResNet18, two transformers."""
    backbone: str = "resnet18"
    """Any timm model with feature levels."""
    init: str = "random"
    """Weights to start from: random, timm (its own for the backbone), auto (those if they can be had, else random), or
    those of a run's or export's folder, a file or hf:ORG/NAME: all that fit; of backbone:THAT the backbone's alone."""
    freeze: Literal["none", "backbone"] = "none"
    """What stays as it starts: a frozen backbone gets no gradient and keeps its batch statistics."""
    drop_path: Annotated[float, Range(0.0, 0.9)] = 0.0
    """Stochastic depth: probability that the backbone's last residual branch is left out for a frame; less before."""
    dim: Annotated[int, Range(8, 4096)] = 256
    """Width D of the pyramids."""
    branches: Literal["static", "dynamic", "both"] = "both"
    """What each frame looks like, how it differs from the rest of its clip, or both."""
    dynamic: Literal["deviation", "difference", "first", "original"] = "deviation"
    """What that is: each frame less the clip's mean, the frame before, or the first; or as in the original method."""
    time: Literal["gru", "attention"] = "gru"
    """What reads the frames: a recurrent unit, or convolution and attention with the mean over time."""
    crf: Literal["meanfield", "messages", "gaussian", "none"] = "meanfield"
    """The mean-field CRF, or none; for comparison the original method's messages or a continuous Gaussian CRF."""
    crf_branch: Literal["static", "dynamic"] = "dynamic"
    """Of both branches the one whose cells the CRF couples."""
    readout: Literal["none", "labels", "value", "both"] = "both"
    """What the CRF writes back into the features."""
    iterations: Annotated[int, Range(0, 100)] = 3
    """Mean-field iterations of the CRF."""
    max_coupling: Annotated[float, Range(0.01, 100.0)] = 8.0
    """Bound on the coupling of the CRF's tokens; up to 2 its optimum is unique."""
    crf_backend: Literal["auto", "dense", "triton", "sdpa"] = "auto"
    """How the CRF's sums are computed; auto = by Triton's kernels on a GPU, by dense products on a CPU."""
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.2


@dataclass(frozen=True)
class LossConfig:
    kind: LossKind = "cross-entropy"
    """What the labels are held against; the others than cross-entropy are for classes of unequal size."""
    label_smoothing: Annotated[float, Range(0.0, 0.99)] = 0.1
    aux_weight: Annotated[float, Range(0.0, 1e3)] = 0.2
    """Weight of the loss on the CRF's marginals."""
    soft_labels: Path | None = None
    """Train on the annotators' votes in this file (prepare_dfew.py writes votes.csv) instead of the list's labels."""


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """The run's folder under log_dir; preset and time of day if not given."""
    log_dir: Path = Path("logs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Amp = "auto"
    """Mixed precision; auto = bf16 where the hardware computes it: GPUs and some CPUs (others are slower with it)."""
    compile: bool = False
    """torch.compile the model."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Launch a step on a GPU as one CUDA graph, or two of several processes; auto = on a GPU, without sync_bn."""
    fused: Literal["auto", "norm", "pool", "both", "weights", "all", "off"] = "auto"
    """What takes fewer passes: layers of a ResNet, by Triton kernels on a GPU (norm, pool, both), mixed precision's
    casts of weights, or all; auto = all where steps are graphs, but both without casts."""
    threads: Annotated[int, Range(0, 4096)] = 0
    """Threads of torch on a CPU; 0 = the cores there are. A run keeps their number, as another one rounds otherwise."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time; else a GPU takes those that are the fastest when it starts."""
    channels_last: bool = True
    sync_bn: bool = False
    """Batch statistics over all GPUs."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto = as WANDB_MODE and `wandb offline` say, else online where there is a key."""
    wandb_project: str | None = None
    """W&B's project; WANDB_PROJECT or dfer if not given."""
    tensorboard: bool = False
    """Write event files for TensorBoard, too, into the run's folder."""
    log_every: Annotated[int, Range(1, 10**9)] = 20
    """Optimizer steps between two rows of training metrics."""
    save_minutes: Annotated[float, Range(0.0, 1e6)] = 5.0
    """Minutes between two checkpoints within an epoch; each epoch ends with one anyway. 0 = after every step."""
    timeout: Annotated[float, Range(1.0, 1e6)] = 600.0
    """Seconds that a process waits for the others; must cover the slowest first step (compilation)."""
    grace: Annotated[float, Range(0.0, 1e6)] = 0.0
    """Seconds from a signal to the end of the process if no step ends; 0 = three of the longest steps, 25 at least."""


@dataclass(frozen=True)
class Config:
    preset: tyro.conf.Suppress[str] = "faces"
    recipe: Literal["none", "former-dfer", "dfer-clip", "ial", "lstpnet", "m3dfel", "mae-dfer", "r18-lstm"] = "none"
    """Train as a published method does, where no other flag says otherwise; what is not as published is said."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    resume: bool = False
    """Insist that a run is continued: --run.name, which is too without this, or the newest unfinished one like it."""
    validate_only: bool = False
    """Check all there is to check, take a few steps, say what the run will take, and write nothing."""
    profile: Annotated[int, Range(0, 1000)] = 0
    """Record this many steps: a trace in the run's folder, and a table of where their time goes."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)


def _faces(gpu: bool) -> Config:
    """The embedded data set, the default. On a CPU smaller input and T, so that 2 cores take about 8 minutes."""
    if gpu:
        return Config("faces", optim=OptimConfig(epochs=30, warmup_epochs=2.0))
    data = DataConfig(size=48, num_segments=8, batch_size=16)
    return Config("faces", data=data, optim=OptimConfig(epochs=10, warmup_epochs=1.0))


def _dfew(gpu: bool) -> Config:
    """DFEW fold 1, 112 px, T=16: `torchrun --nproc_per_node=4 train.py dfew --data.root DIR`."""
    lists = DataConfig(train_list=Path("lists/dfew/set_1_train.txt"), val_list=Path("lists/dfew/set_1_test.txt"))
    return Config(
        "dfew",
        data=dataclasses.replace(lists, batch_size=32),
        model=ModelConfig(init="auto"),
        optim=OptimConfig(epochs=100, warmup_epochs=5.0),
    )


def _ferv39k(gpu: bool) -> Config:
    """FERV39k, all scenes, 112 px, T=16: `torchrun --nproc_per_node=4 train.py ferv39k --data.root DIR`."""
    lists = DataConfig(train_list=Path("lists/ferv39k/train_All.txt"), val_list=Path("lists/ferv39k/test_All.txt"))
    return Config(
        "ferv39k",
        data=dataclasses.replace(lists, batch_size=32),
        model=ModelConfig(init="auto"),
        optim=OptimConfig(warmup_epochs=5.0),
    )


def _debug(gpu: bool) -> Config:
    """A whole run in seconds, to see that everything works: a few steps on the embedded data set."""
    return Config(
        "debug",
        data=DataConfig(size=32, num_segments=4, batch_size=8),
        model=ModelConfig(dim=64),
        optim=OptimConfig(epochs=2, steps_per_epoch=4, warmup_epochs=0.5),
        run=RunConfig(wandb="off", log_every=2),
    )


PRESETS = {"faces": _faces, "dfew": _dfew, "ferv39k": _ferv39k, "debug": _debug}


def parse_config(args: list[str]) -> Config:
    """Return the configuration that command-line words make: an optional preset, then overrides.

    A recipe goes over the preset, and single flags over the recipe, in whatever order they stand. Where --run.name is a
    run that has begun, it goes on as what it was: its saved configuration is the base, whatever the presets say by now,
    and only what is typed goes over it.

    Raises:
        UserError: in one line, for an unknown preset or key, a value of the wrong type, or one out of range.
    """
    args = expand_home(own_words(args))
    preset = args[0] if args and not args[0].startswith("-") else "faces"
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    flags = _named_as_now(args[1:] if args and args[0] == preset else args)
    default = PRESETS[preset](torch.cuda.is_available())
    flags, old_word = [re.sub(r"^--data\.recipe(?=$|=)", "--recipe", flag) for flag in flags], flags
    recipe = _recipe(flags)
    for section, values in RECIPES[recipe].settings.items() if recipe in RECIPES else ():  # others are named by tyro
        changed = dataclasses.replace(getattr(default, section), **values)
        default = dataclasses.replace(default, **{section: changed})
    config = _parse(flags, default)  # what is typed may be valid with what the run was begun with alone
    begun = begun_config(config.run.log_dir / config.run.name) if config.run.name else None
    if begun is None and flags != old_word:
        raise UserError("--data.recipe: is --recipe now, and sets optimizer, schedule, batch, epochs and loss too")
    if begun is None:
        config = _suited(config, flags)
        validate(config)
        return config
    typed, config = config, _parse(flags, _continued(begun, config, preset_typed=args[:1] == [preset]))
    config = at_this_place(settled_as(config, begun), typed)  # "auto", typed again, is what it was found to mean
    validate(config)
    return config


def _suited(config: Config, flags: list[str]) -> Config:
    """Return a preset's configuration with batch and learning rate for the GPU at hand, unless words say otherwise."""
    if config.run.device == "cpu" or chooses_the_step(flags) or not torch.cuda.is_available():
        return config
    place = find_place()
    return suited(config, card_memory(place.local_rank) or 0, place.size)


def _parse(words: list[str], default: Config) -> Config:
    """Return `default` with the flags among the words set. What types do not express is not checked."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(
                Config,
                prog=f"train.py {{{','.join(PRESETS)}}}",
                description="Train and validate. Presets: "
                + " ".join(f"{name}: {fn.__doc__}" for name, fn in PRESETS.items()),
                args=words,
                default=default,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(first_sentence(captured.getvalue())) from None
    optim = config.optim
    if optim.schedule in ("cosine", "constant") and optim.decay_epochs == default.optim.decay_epochs:
        config = dataclasses.replace(config, optim=dataclasses.replace(optim, decay_epochs=()))  # a recipe's
    return config


def _named_as_now(words: list[str]) -> list[str]:
    """Return a command's words with --model.init for --model.weights, as it was called once, and refuse others."""
    if any(re.match(r"--data\.jpeg[-_]engine(=|$)", word) for word in words):
        raise UserError("--data.jpeg-engine: is --data.jpeg-decoder now; sms is 0, engine 1, mixed in between")
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--model.weights=") else [word])]
    for at in (i for i, word in enumerate(words[:-1]) if word == "--model.weights"):
        words[at : at + 2] = ["--model.init", _init_of(None if words[at + 1] == "None" else words[at + 1])]
    return words


def _init_of(weights: object) -> str:
    """Return --model.init for a value of --model.weights, which was for the backbone alone."""
    if weights is not None and not isinstance(weights, str):
        raise ValueError(f"--model.weights is {weights!r}")
    return {None: "random", "timm": "timm"}.get(weights, f"backbone:{weights}")


def _recipe(args: list[str]) -> str | None:
    """Return the value of --recipe, which is read before all other flags since it sets their defaults."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--recipe", nargs="?")
    return flag.parse_known_args(args)[0].recipe


def validate(config: Config) -> None:
    """Check what types do not express: the ranges that stand at the fields, and what fields demand of each other.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    check_ranges(config, "--")
    model, run = config.model, config.run
    if model.dim % 4:
        raise UserError(f"--model.dim {model.dim}: must be a multiple of 4, the attention heads")
    if model.freeze == "backbone" and model.drop_path:
        raise UserError(f"--model.drop-path {model.drop_path}: nothing of a frozen backbone is dropped; leave one out")
    if model.freeze == "backbone" and model.init == "random":
        raise UserError("--model.freeze backbone: of random weights; say with --model.init what it is to start from")
    if not model.init or "\0" in model.init:
        raise UserError(f"--model.init {model.init!r}: must be random, timm, auto, a file or folder, or hf:ORG/NAME")
    check_schedule(config.optim)
    if run.name is not None and (run.name in ("", ".", "..") or Path(run.name).name != run.name):
        raise UserError(f"--run.name {run.name!r}: must be a plain folder name")
    if run.name is not None and (size := len(os.fsencode(run.name))) > 255:
        raise UserError(f"--run.name {run.name[:30]}...: is {size} bytes long, and file systems take 255: shorten it")


# What a run did that was saved before a field existed, where the default now means something else: flag -> value.
_BEFORE = {
    "data.jpeg_decoder": "mixed",  # DALI's own default, before there was one of ours
    "data.video_decoder": "nvdec",  # decoded all videos on a GPU
    "model.branches": "static",  # there was one branch,
    "model.time": "attention",  # and attention read it
    "run.wandb_project": "dfer",
    "run.graph": "off",
    "run.fused": "off",
    "optim.ema_warmup": False,  # torch's plain average, which stays at its first weights for 1 / (1 - decay) steps
}


def begun_config(folder: Path) -> Config | None:
    """Return the configuration of the run that lies in a folder; None if none has taken a step there.

    Raises:
        UserError: if it cannot be read or is none.
    """
    saved, rows = folder / "config.json", folder / "metrics.jsonl"
    try:
        begun = find_manifests(folder / "checkpoints") or (rows.exists() and rows.stat().st_size > 0)
        if not begun or not saved.exists():
            return None
    except NotADirectoryError:  # which whoever is to write there finds
        return None
    except OSError as error:
        raise UserError(f"--run.log-dir: cannot use {folder} ({error.strerror})") from None
    config = config_from_json(read_file(saved).decode(errors="replace"), saved)
    if config.model.crf_backend == "auto":  # of a run from before its meaning was saved, which was dense everywhere
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, crf_backend="dense"))
    return config


def _continued(begun: Config, config: Config, preset_typed: bool) -> Config:
    """Return what a run was begun with, as the base for the flags that the command continuing it has typed."""
    return dataclasses.replace(
        begun,
        preset=config.preset if preset_typed else begun.preset,
        resume=False,
        validate_only=False,
        profile=0,
        run=dataclasses.replace(begun.run, name=config.run.name, log_dir=config.run.log_dir),
    )


def config_from_json(text: str, source: Path) -> Config:
    """Return the configuration that `to_json` wrote; `source` is named in messages.

    Raises:
        UserError: if it is no such configuration, or has a value that no flag would take.
    """
    try:
        saved = json.loads(text)
        if "recipe" in saved.get("data", {}):  # where it was when it set clips and augmentation alone
            saved["recipe"] = saved["data"].pop("recipe")
        if "jpeg_engine" in (data := saved.get("data", {})):
            data["jpeg_decoder"] = jpeg_decoder_of(data.pop("jpeg_engine"))
        for flag, value in _BEFORE.items():
            section, name = flag.split(".")
            saved.get(section, {}).setdefault(name, value)
        if "weights" in (model := saved.get("model", {})):
            model["init"] = _init_of(model.pop("weights"))
        config = restored(Config, saved, "--")
        validate(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:  # json's errors are ValueErrors
        raise UserError(f"{source}: not a run's configuration ({error})") from None
    return config
