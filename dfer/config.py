"""Configuration: frozen dataclasses, presets in Python, overrides on the command line."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
import tyro

from dfer.cli import Range, UserError, expand_home
from dfer.files import read_file
from dfer.plan.augmentation import Augmentation
from dfer.recipes import RECIPES
from dfer.run.checkpoint import find_manifests
from dfer.run.launchers import own_words

Amp = Literal["auto", "off", "bf16", "fp16"]


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
    jpeg_engine: Annotated[float, Range(0.0, 1.0)] = 0.0
    """Share of the images that a GPU's JPEG engine decodes, where it has one. It frees cores, but see docs/LOG.md."""
    bad_clips: Literal["error", "skip"] = "skip"
    """Training clips that cannot be read: stop, or leave them out, by name and 1 % at most. Evaluation always stops."""
    cache: Literal["off", "gpu"] = "off"
    """gpu = hold the whole raw data set in GPU memory."""
    recipe: Literal["none", "former-dfer", "dfer-clip", "ial", "m3dfel", "mae-dfer"] = "none"
    """Clips and augmentation as a published method has them, where no other flag says otherwise."""
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
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class ModelConfig:
    name: Literal["dfernet", "mean-pool"] = "dfernet"
    """The full model, or the baseline: the same backbone with its frames mean-pooled."""
    backbone: str = "resnet18"
    """Any timm model with feature levels."""
    weights: str | None = None
    """Backbone weights: none = random, `timm` = timm's pretrained ones, else a file, or a run's or export's folder."""
    dim: Annotated[int, Range(8, 4096)] = 256
    """Width D of the pyramid."""
    crf: Literal["meanfield", "messages", "gaussian"] = "meanfield"
    """The mean-field CRF; for comparison the original method's messages or a continuous Gaussian CRF."""
    readout: Literal["none", "labels", "value", "both"] = "both"
    """What the CRF writes back into the features."""
    iterations: Annotated[int, Range(0, 100)] = 3
    """Mean-field iterations of the CRF."""
    max_coupling: Annotated[float, Range(0.01, 100.0)] = 8.0
    """Bound on the coupling of the CRF's tokens; up to 2 its optimum is unique."""
    crf_backend: Literal["auto", "dense", "triton", "sdpa"] = "auto"
    """How the CRF's sums are computed; auto = dense. Triton's kernels were not yet run on a GPU."""
    dropout: Annotated[float, Range(0.0, 0.99)] = 0.2


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[float, Range(1e-12, 1e3)] = 1e-3
    """Peak learning rate, after warm-up; cosine to zero from there."""
    weight_decay: Annotated[float, Range(0.0, 1e3)] = 0.05
    epochs: Annotated[int, Range(1, 100_000)] = 60
    steps_per_epoch: Annotated[int, Range(0, 10**9)] = 0
    """Cut epochs short after this many optimizer steps; 0 = whole epochs."""
    warmup_epochs: Annotated[float, Range(0.0, 100_000.0)] = 3.0
    clip_norm: Annotated[float, Range(0.0, 1e9)] = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    accumulate: Annotated[int, Range(1, 100_000)] = 1
    """Batches per optimizer step."""
    ema: Annotated[float, Range(0.0, 0.999999)] = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated; 0 = none."""
    ema_warmup: bool = True
    """Let the average begin short: a decay of (1 + n) / (10 + n) after n steps, until that is --optim.ema."""


@dataclass(frozen=True)
class LossConfig:
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
    channels_last: bool = True
    sync_bn: bool = False
    """Batch statistics over all GPUs."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto = as WANDB_MODE and `wandb offline` say, else online where there is a key."""
    wandb_project: str | None = None
    """W&B's project; WANDB_PROJECT or dfer if not given."""
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
    """The embedded data set: `python train.py`. On a CPU smaller input and T, so that 2 cores take about 8 minutes."""
    if gpu:
        return Config("faces", optim=OptimConfig(epochs=30, warmup_epochs=2.0))
    return Config(
        "faces",
        data=DataConfig(size=48, num_segments=8, batch_size=16),
        optim=OptimConfig(epochs=10, warmup_epochs=1.0),
    )


def _dfew(gpu: bool) -> Config:
    """DFEW fold 1, 112 px, T=16: `torchrun --nproc_per_node=4 train.py dfew --data.root DIR`."""
    lists = DataConfig(train_list=Path("lists/dfew/set_1_train.txt"), val_list=Path("lists/dfew/set_1_test.txt"))
    return Config(
        "dfew", data=dataclasses.replace(lists, batch_size=32), optim=OptimConfig(epochs=100, warmup_epochs=5.0)
    )


def _ferv39k(gpu: bool) -> Config:
    """FERV39k, all scenes, 112 px, T=16: `torchrun --nproc_per_node=4 train.py ferv39k --data.root DIR`."""
    lists = DataConfig(train_list=Path("lists/ferv39k/train_All.txt"), val_list=Path("lists/ferv39k/test_All.txt"))
    return Config("ferv39k", data=dataclasses.replace(lists, batch_size=32), optim=OptimConfig(warmup_epochs=5.0))


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
    flags = args[1:] if args and args[0] == preset else args
    default = PRESETS[preset](torch.cuda.is_available())
    if (recipe := _recipe(flags)) in RECIPES:  # anything else is named by tyro
        default = dataclasses.replace(default, data=dataclasses.replace(default.data, **RECIPES[recipe]))
    config = _parse(flags, default)
    begun = begun_config(config.run.log_dir / config.run.name) if config.run.name else None
    if begun is None:
        return config
    return _parse(flags, _continued(begun, config, preset_typed=len(flags) < len(args)))


def _parse(words: list[str], default: Config) -> Config:
    """Return `default` with the flags among the words set, and its values checked."""
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
        raise UserError(_first_sentence(captured.getvalue())) from None
    validate(config)
    return config


def _recipe(args: list[str]) -> str | None:
    """Return the value of --data.recipe, which is read before all other flags since it sets their defaults."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--data.recipe", dest="recipe", nargs="?")
    return flag.parse_known_args(args)[0].recipe


def _first_sentence(panel: str) -> str:
    """Return in one line what is wrong, and what may be meant, from the panel that tyro draws."""
    words = re.split("For full helptext|Argument helptext", re.sub(r"[╭╮╰╯│]|─{3,}[^\n]*?(?=\n)", "", panel))[0]
    return re.sub(r"\s+", " ", words.replace("Perhaps you meant:", "- perhaps you meant")).strip()


def validate(config: Config) -> None:
    """Check what types do not express: the ranges that stand at the fields, and what fields demand of each other.

    Raises:
        UserError: names the flag, its value and what is allowed.
    """
    _check_ranges(config, "--")
    model, run = config.model, config.run
    if model.dim % 4:
        raise UserError(f"--model.dim {model.dim}: must be a multiple of 4, the attention heads")
    if run.name is not None and (run.name in ("", ".", "..") or Path(run.name).name != run.name):
        raise UserError(f"--run.name {run.name!r}: must be a plain folder name")
    if run.name is not None and (size := len(os.fsencode(run.name))) > 255:
        raise UserError(f"--run.name {run.name[:30]}...: is {size} bytes long, and file systems take 255: shorten it")


def _check_ranges(section: Any, prefix: str) -> None:
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        flag = f"{prefix}{name.replace('_', '-')}"
        value: Any = getattr(section, name)
        if dataclasses.is_dataclass(type(value)):
            _check_ranges(value, f"{flag}.")
            continue
        for limits in (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)):
            if not math.isfinite(value) or not limits.low <= value <= limits.high:
                raise UserError(f"{flag} {value}: must be between {limits.low} and {limits.high}")


# What a run did that was saved before a field existed, where the default now means something else: flag -> value.
_BEFORE = {
    "data.jpeg_engine": 0.65,  # DALI's own default, before there was one of ours
    "run.wandb_project": "dfer",
    "optim.ema_warmup": False,  # torch's plain average, which stays at its first weights for 1 / (1 - decay) steps
}

# What may differ in the command that continues a run: nothing that is trained depends on it, but for the rounding of
# another JPEG decoder. `dfer.run.folder.same_global_batch`, which knows the number of processes, checks the batch size.
_FREE = {"resume", "validate_only", "profile", "run.name", "run.log_dir", "run.wandb", "run.save_minutes"}
_FREE |= {"run.wandb_project", "run.grace", "run.timeout", "data.batch_size", "data.jpeg_engine"}
# Where data lies; whether it is the same data, `dfer.run.fingerprints` knows.
_FREE |= {"data.train_list", "data.val_list", "data.root", "data.source", "loss.soft_labels"}


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
    return config_from_json(read_file(saved).decode(errors="replace"), saved)


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


def differences(saved: Config, now: Config) -> list[str]:
    """Return what keeps a command from continuing a run: `--flag was this, is that`."""
    was, is_ = json.loads(saved.to_json()), json.loads(now.to_json())
    for config in (was, is_):
        if not saved.optim.ema:  # no average, whichever
            del config["optim"]["ema_warmup"]
        # The checkpoint has the weights: which file they came from is of no matter.
        if config["model"]["weights"] not in (None, "timm"):
            config["model"]["weights"] = "a file"
    return _differences(was, is_, "")


def _differences(saved: dict, now: dict, prefix: str) -> list[str]:
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in _FREE:
            flag = "preset" if prefix + key == "preset" else f"--{prefix}{key}".replace("_", "-")
            lines.append(f"{flag} was {old}, is {new}")
    return lines


def config_from_json(text: str, source: Path) -> Config:
    """Return the configuration that `to_json` wrote; `source` is named in messages.

    Raises:
        UserError: if it is no such configuration, or has a value that no flag would take.
    """
    try:
        saved = json.loads(text)
        for flag, value in _BEFORE.items():
            section, name = flag.split(".")
            saved.get(section, {}).setdefault(name, value)
        config = _restored(Config, saved, "--")
        validate(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (TypeError, AttributeError, ValueError, RecursionError) as error:  # json's errors are ValueErrors
        raise UserError(f"{source}: not a run's configuration ({error})") from None
    return config


def _restored(kind: Any, saved: Any, flag: str) -> Any:
    """Return a value of a field's type from what JSON has of it.

    Raises:
        TypeError, ValueError: if it is of another type, or none of the choices.
    """
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        start = flag if flag == "--" else f"{flag}."
        known = {k: _restored(hints[k], v, start + k.replace("_", "-")) for k, v in saved.items() if k in hints}
        return cast(type, kind)(**(dict(saved) | known))  # an unknown key is a TypeError
    if get_origin(kind) is Literal:
        fits = saved in get_args(kind)
    elif get_origin(kind) is UnionType:  # a type, or None
        return None if saved is None else _restored(get_args(kind)[0], saved, flag)
    elif kind is Path:
        fits = isinstance(saved, str) and "\0" not in saved
        saved = Path(saved) if fits else saved
    else:
        fits = isinstance(saved, int | float if kind is float else kind) and isinstance(saved, bool) == (kind is bool)
    if not fits:
        raise ValueError(f"{flag} is {saved!r}")
    return saved
