"""Configuration: frozen dataclasses, presets in Python, overrides on the command line. A field has one reader."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from dfer.sampling import MAX_RANDAUGMENT, Augmentation


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
    jpeg_engine: float = 0.0
    """Share of the images that a GPU's JPEG engine decodes, where it has one. It frees cores, but see docs/LOG.md."""
    bad_clips: Literal["error", "skip"] = "skip"
    """Training clips that cannot be read: stop, or leave them out, by name and 1 % at most. Evaluation always stops."""
    cache: Literal["off", "gpu"] = "off"
    """gpu = hold the whole raw data set in GPU memory."""
    recipe: Literal["none", "former-dfer", "dfer-clip", "ial", "m3dfel", "mae-dfer"] = "none"
    """Clips and augmentation as a published method has them, where no other flag says otherwise."""
    size: int = 112
    """Height and width of a clip in pixels."""
    num_segments: int = 16
    """Segments that a video is cut into."""
    frames_per_segment: int = 1
    """Consecutive frames from each segment: 16 x 1 is the field's default, 8 x 2 is Former-DFER's."""
    batch_size: int = 16
    """Clips per process and step."""
    views: int = 1
    """Evaluation averages the probabilities of this many clips of a video, each at another place in time."""
    mirror_views: bool = False
    """And of their mirror images: twice as many."""
    augmentation: Augmentation = field(default_factory=Augmentation)


# How the peers take and augment clips: what a recipe sets in DataConfig, from their public code. Approximated in all:
# boxes that do not fit are drawn again there (here cut to the frame), most draw the aspect ratio uniformly (here
# log-uniform), and most repeat the first or the last frame of a short video (here all of them, evenly). Only MAE-DFER
# normalises its input.
RECIPES: dict[str, dict[str, Any]] = {
    # zengqunzhao/Former-DFER: dataloader/dataset_DFEW.py, dataloader/video_transform.py
    "former-dfer": {
        "num_segments": 8,
        "frames_per_segment": 2,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0),
    },
    # zengqunzhao/DFER-CLIP: main.py, dataloader/video_dataloader.py, dataloader/video_transform.py. As on DFEW; on
    # FERV39k it turns clips (--data.augmentation.rotation 4 --data.augmentation.brightness 0) instead.
    "dfer-clip": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 224,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0, brightness=0.5),
    },
    # muse1998/IAL-for-Facial-Expression-Recognition: dataset_DFEW.py, video_transform.py. It draws ratios of up to 5/3,
    # but of an area of 0.85 or more only those up to 1/0.85 fit. Approximated: what a rotation lays open is black.
    "ial": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.85, max_crop_ratio=1.18, colour=0.0, brightness=0.6, rotation=4.0),
    },
    # ECNU-Cross-Innovation-Lab/M3DFEL_replicate: options.py, datasets/dataset_DFEW.py, datasets/video_transform.py.
    # Approximated: hue turns in HSV there; each frame is drawn from the 16 that follow its segment's start, which may
    # run backwards, in testing too (here: within its segment, and the centre in testing).
    "m3dfel": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.4, hue=0.4),
    },
    # sunlicai/MAE-DFER: run_class_finetuning.py, kinetics.py, scripts/dfew/*.sh. Approximated: its clip is 64
    # consecutive frames or the whole video where that is shorter (here: up to 1.2 times shorter than the video, about
    # DFEW's median of 70 frames); rand-m7-n4-mstd0.5-inc1, read as timm does, skips each of its 4 operations half of
    # the time, may draw the non-linear ones, and comes before the crop; erased pixels are noise; the two views in time
    # are the first and the last 64 frames (its two crops are one and the same).
    "mae-dfer": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 160,
        "views": 2,
        "augmentation": Augmentation(
            min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0, speed=1.2, randaugment=2, magnitude=7.0, erase=0.25
        ),
    },
}


@dataclass(frozen=True)
class ModelConfig:
    name: Literal["dfernet", "mean-pool"] = "dfernet"
    """The full model, or the baseline: the same backbone with its frames mean-pooled."""
    backbone: str = "resnet18"
    """Any timm model with feature levels."""
    weights: str | None = None
    """Backbone weights: none = random, `timm` = timm's pretrained ones, else a file."""
    dim: int = 256
    """Width D of the pyramid."""
    crf: Literal["meanfield", "messages", "gaussian"] = "meanfield"
    """The mean-field CRF; for comparison the original method's messages or a continuous Gaussian CRF."""
    readout: Literal["none", "labels", "value", "both"] = "both"
    """What the CRF writes back into the features."""
    iterations: int = 3
    """Mean-field iterations of the CRF."""
    max_coupling: float = 8.0
    """Bound on the coupling of the CRF's tokens; up to 2 its optimum is unique."""
    crf_backend: Literal["auto", "dense", "triton", "sdpa"] = "auto"
    """How the CRF's sums are computed; auto = dense. Triton's kernels were not yet run on a GPU."""
    dropout: float = 0.2


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate, after warm-up; cosine to zero from there."""
    weight_decay: float = 0.05
    epochs: int = 60
    steps_per_epoch: int = 0
    """Cut epochs short after this many optimizer steps; 0 = whole epochs."""
    warmup_epochs: float = 3.0
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    accumulate: int = 1
    """Batches per optimizer step."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated; 0 = none."""


@dataclass(frozen=True)
class LossConfig:
    label_smoothing: float = 0.1
    aux_weight: float = 0.2
    """Weight of the loss on the CRF's marginals."""
    soft_labels: Path | None = None
    """Train on the annotators' votes in this file (prepare_dfew.py writes votes.csv) instead of the list's labels."""


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None
    """The run's folder under log_dir; preset and time of day if not given."""
    log_dir: Path = Path("logs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto = bf16 where the hardware computes it: GPUs and some CPUs (others are slower with it)."""
    compile: bool = False
    """torch.compile the model."""
    channels_last: bool = True
    sync_bn: bool = False
    """Batch statistics over all GPUs."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases; auto = online where there is a key, else offline."""
    log_every: int = 20
    """Optimizer steps between two rows of training metrics."""
    save_minutes: float = 5.0
    """Minutes between two checkpoints within an epoch; each epoch ends with one anyway. 0 = after every step."""
    timeout: float = 600.0
    """Seconds that a process waits for the others; must cover the slowest first step (compilation)."""


@dataclass(frozen=True)
class Config:
    preset: tyro.conf.Suppress[str] = "faces"
    seed: int = 0
    resume: bool = False
    """Insist that the run --run.name is continued; without it a named run is too, if it has begun."""
    validate_only: bool = False
    """Check all there is to check, take a few steps, say what the run will take, and write nothing."""
    profile: int = 0
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
    """Build the configuration from command-line words: an optional preset, then overrides.

    A recipe goes over the preset, and single flags over the recipe, in whatever order they stand.

    Raises:
        ValueError: in one line, for an unknown preset or key, a value of the wrong type, or one out of range.
    """
    preset = args[0] if args and not args[0].startswith("-") else "faces"
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    rest = args[1:] if args and args[0] == preset else args
    default = PRESETS[preset](torch.cuda.is_available())
    recipe = _recipe(rest)
    if recipe in RECIPES:  # anything else is named by tyro
        default = dataclasses.replace(default, data=dataclasses.replace(default.data, **RECIPES[recipe]))
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(
                Config,
                prog=f"train.py {{{','.join(PRESETS)}}}",
                description="Train and validate. Presets: "
                + " ".join(f"{name}: {fn.__doc__}" for name, fn in PRESETS.items()),
                args=rest,
                default=default,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(_first_sentence(captured.getvalue())) from None
    validate(config)
    return config


def _recipe(args: list[str]) -> str | None:
    """The value of --data.recipe, ahead of all other flags, whose defaults it is to set."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--data.recipe", dest="recipe", nargs="?")
    return flag.parse_known_args(args)[0].recipe


def _first_sentence(panel: str) -> str:
    """tyro explains an error in a drawn panel, several lines high: keep what is wrong and what may be meant."""
    words = re.sub(r"[╭╮╰╯│]|─{3,}[^\n]*?(?=\n)", "", panel)
    words = re.split(r"For full helptext|Argument helptext", words)[0]
    return re.sub(r"\s+", " ", words.replace("Perhaps you meant:", "- perhaps you meant")).strip()


def validate(config: Config) -> None:
    """Check the ranges that types do not express.

    Raises:
        ValueError: one line with the flag, its value and what is allowed.
    """
    data, model, optim, loss, run = config.data, config.model, config.optim, config.loss, config.run
    augmentation = data.augmentation
    checks = [
        ("--seed", config.seed, 0, 2**63 - 1),
        ("--profile", config.profile, 0, 1000),
        ("--data.size", data.size, 32, 1024),
        ("--data.num-segments", data.num_segments, 1, 1024),
        ("--data.frames-per-segment", data.frames_per_segment, 1, 64),
        ("--data.batch-size", data.batch_size, 1, 65536),
        ("--data.jpeg-engine", data.jpeg_engine, 0.0, 1.0),
        ("--data.views", data.views, 1, 64),
        ("--data.augmentation.min-crop-area", augmentation.min_crop_area, 0.01, 1.0),
        ("--data.augmentation.max-crop-ratio", augmentation.max_crop_ratio, 1.0, 4.0),
        ("--data.augmentation.flip", augmentation.flip, 0.0, 1.0),
        ("--data.augmentation.colour", augmentation.colour, 0.0, 0.99),
        ("--data.augmentation.brightness", augmentation.brightness, 0.0, 0.99),
        ("--data.augmentation.hue", augmentation.hue, 0.0, 0.5),
        ("--data.augmentation.grayscale", augmentation.grayscale, 0.0, 1.0),
        ("--data.augmentation.rotation", augmentation.rotation, 0.0, 180.0),
        ("--data.augmentation.blur", augmentation.blur, 0.0, 1.0),
        ("--data.augmentation.erase", augmentation.erase, 0.0, 1.0),
        ("--data.augmentation.speed", augmentation.speed, 1.0, 8.0),
        ("--data.augmentation.reverse", augmentation.reverse, 0.0, 1.0),
        ("--data.augmentation.randaugment", augmentation.randaugment, 0, MAX_RANDAUGMENT),
        ("--data.augmentation.magnitude", augmentation.magnitude, 0.0, 10.0),
        ("--model.dim", model.dim, 8, 4096),
        ("--model.iterations", model.iterations, 0, 100),
        ("--model.max-coupling", model.max_coupling, 0.01, 100.0),
        ("--model.dropout", model.dropout, 0.0, 0.99),
        ("--optim.lr", optim.lr, 1e-12, 1e3),
        ("--optim.weight-decay", optim.weight_decay, 0.0, 1e3),
        ("--optim.epochs", optim.epochs, 1, 100_000),
        ("--optim.steps-per-epoch", optim.steps_per_epoch, 0, 10**9),
        ("--optim.warmup-epochs", optim.warmup_epochs, 0.0, 100_000.0),
        ("--optim.clip-norm", optim.clip_norm, 0.0, 1e9),
        ("--optim.accumulate", optim.accumulate, 1, 100_000),
        ("--optim.ema", optim.ema, 0.0, 0.999999),
        ("--loss.label-smoothing", loss.label_smoothing, 0.0, 0.99),
        ("--loss.aux-weight", loss.aux_weight, 0.0, 1e3),
        ("--run.log-every", run.log_every, 1, 10**9),
        ("--run.save-minutes", run.save_minutes, 0.0, 1e6),
        ("--run.timeout", run.timeout, 1.0, 1e6),
    ]
    for flag, value, low, high in checks:
        if not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"{flag} {value}: must be between {low} and {high}")
    if model.dim % 4:
        raise ValueError(f"--model.dim {model.dim}: must be a multiple of 4, the attention heads")
    if config.resume and run.name is None:
        raise ValueError("--resume: say which run with --run.name NAME (a folder under --run.log-dir)")
    if run.name is not None and (run.name in ("", ".", "..") or Path(run.name).name != run.name):
        raise ValueError(f"--run.name {run.name!r}: must be a plain folder name")


def config_from_json(text: str, source: Path) -> Config:
    """The configuration that `to_json` wrote; `source` is named in messages.

    Raises:
        ValueError: in one line, if it is no such configuration.
    """
    try:
        return _build(Config, json.loads(text))
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: not a run's configuration ({error})") from None


def _build(cls: type, saved: dict) -> object:
    nested = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "loss": LossConfig, "run": RunConfig}
    nested["augmentation"] = Augmentation
    paths = {"train_list", "val_list", "root", "log_dir", "soft_labels"}
    values = {
        key: _build(nested[key], value)
        if key in nested
        else Path(value)
        if key in paths and value is not None
        else value
        for key, value in saved.items()
    }
    return cls(**values)
