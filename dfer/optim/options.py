"""The options --optim.*: apart from what they build, as the configuration knows nothing of models."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dfer.cli import Range, UserError

OptimizerName = Literal["adamw", "sgd", "lion", "muon"]
ScheduleName = Literal["cosine", "step", "multistep", "constant"]


@dataclass(frozen=True)
class OptimConfig:
    optimizer: OptimizerName = "adamw"
    """muon orthogonalises the updates of matrices and filters (slow on a CPU), and is AdamW for the rest."""
    lr: Annotated[float, Range(1e-12, 1e3)] = 1e-3
    """Peak learning rate, after warm-up."""
    schedule: ScheduleName = "cosine"
    """What follows the warm-up: a cosine to min-lr, steps down, or nothing."""
    min_lr: Annotated[float, Range(0.0, 1e3)] = 0.0
    """Lowest learning rate after warm-up."""
    decay_epochs: Annotated[tuple[int, ...], Range(1, 100_000)] = ()
    """Epochs after which the rate steps down: step = whenever so many have passed; multistep = after each of them."""
    decay_rate: Annotated[float, Range(0.0, 1.0)] = 0.1
    """Factor of each step down."""
    weight_decay: Annotated[float, Range(0.0, 1e3)] = 0.05
    layer_decay: Annotated[float, Range(0.01, 1.0)] = 1.0
    """Each layer of the backbone learns this much slower than the next one, the last one than the rest of the model."""
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


def check_schedule(optim: OptimConfig) -> None:
    """Check what the options of the learning rate demand of each other.

    Raises:
        UserError: names the flag and what is missing or too much.
    """
    epochs = " ".join(map(str, optim.decay_epochs))
    if optim.min_lr > optim.lr:
        raise UserError(f"--optim.min-lr {optim.min_lr}: more than --optim.lr {optim.lr}")
    if optim.schedule == "step" and len(optim.decay_epochs) != 1:
        raise UserError(f"--optim.schedule step: takes one number of --optim.decay-epochs, not {epochs or 'none'}")
    if optim.schedule == "multistep" and (not epochs or sorted(set(optim.decay_epochs)) != [*optim.decay_epochs]):
        raise UserError(f"--optim.schedule multistep: takes rising --optim.decay-epochs, not {epochs or 'none'}")
    if optim.schedule in ("cosine", "constant") and epochs:
        raise UserError(f"--optim.decay-epochs {epochs}: only --optim.schedule step and multistep step down")
