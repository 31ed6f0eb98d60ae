"""What is compared: a row is a name and its words for train.py. The first row of a table is what the others are set
against. A new option gets a row here, and nothing else. At the end, which rows docs/recipes.md recommends.
"""

from typing import NamedTuple

Words = tuple[str, ...]

MODELS: dict[str, Words] = {
    "dfernet": (),
    "mean-pool": ("--model.name", "mean-pool"),
    "r18-lstm": ("--model.name", "r18-lstm"),
    "r18-gru": ("--model.name", "r18-gru"),
    "r3d-18": ("--model.name", "r3d-18"),
    "st-former": ("--model.name", "st-former"),
}

ABLATIONS: dict[str, dict[str, Words]] = {
    "branches": {  # what is seen, and what reads it; the last row is the first version's model
        "both": (),
        "static": ("--model.branches", "static"),
        "dynamic": ("--model.branches", "dynamic"),
        "difference": ("--model.dynamic", "difference"),
        "first": ("--model.dynamic", "first"),
        "original": ("--model.dynamic", "original"),
        "both-attention": ("--model.time", "attention"),
        "static-attention": ("--model.branches", "static", "--model.time", "attention"),
    },
    "crf": {  # what the CRF writes back, how often it iterates, and two other layers in its place
        "both-t3": (),
        "no-crf": ("--model.crf", "none"),
        "on-static": ("--model.crf-branch", "static"),
        "no-aux": ("--loss.aux-weight", "0"),
        "none-t3": ("--model.readout", "none"),
        "labels-t3": ("--model.readout", "labels"),
        "value-t3": ("--model.readout", "value"),
        "both-t0": ("--model.iterations", "0"),
        "both-t1": ("--model.iterations", "1"),
        "both-t5": ("--model.iterations", "5"),
        "messages": ("--model.crf", "messages"),
        "gaussian": ("--model.crf", "gaussian"),
    },
    "imbalance": {  # for the rarest class
        "as-it-is": (),
        "sqrt": ("--data.balance", "sqrt"),
        "full": ("--data.balance", "full"),
        "logit-adjusted": ("--loss.kind", "logit-adjusted"),
        "class-balanced": ("--loss.kind", "class-balanced"),
        "focal": ("--loss.kind", "focal"),
        "sqrt-mixup": ("--data.balance", "sqrt", "--data.augmentation.mixup", "0.2"),
    },
}

# Everything that a preset makes depend on the machine is said, so that a budget is the same on a CPU and a GPU.
BUDGETS: dict[str, Words] = {
    "short": (
        *("--data.size", "48", "--data.num-segments", "8", "--data.batch-size", "16"),
        *("--optim.epochs", "10", "--optim.warmup-epochs", "1"),
    ),
    "short16": (
        *("--data.size", "48", "--data.num-segments", "16", "--data.batch-size", "16"),
        *("--optim.epochs", "10", "--optim.warmup-epochs", "1"),
    ),
    "long": (
        *("--data.size", "48", "--data.num-segments", "8", "--data.batch-size", "16"),
        *("--optim.epochs", "30", "--optim.warmup-epochs", "2"),
    ),
    "full": (
        *("--data.size", "112", "--data.num-segments", "16", "--data.batch-size", "16"),
        *("--optim.epochs", "30", "--optim.warmup-epochs", "2"),
    ),
    "pair": (  # for clips of two frames, or to be cut into two
        *("--data.size", "64", "--data.num-segments", "2", "--data.batch-size", "16"),
        *("--optim.epochs", "22", "--optim.warmup-epochs", "2"),
    ),
    "order": (
        *("--data.size", "64", "--data.num-segments", "8", "--data.batch-size", "16"),
        *("--optim.epochs", "22", "--optim.warmup-epochs", "2"),
    ),
}
SEGMENTS = (4, 8, 16, 32)  # that the test clips are cut into, beside those of training


def tables() -> dict[str, dict[str, Words]]:
    """Return all tables, the models' first."""
    return {"models": MODELS} | ABLATIONS


class Choice(NamedTuple):
    """What docs/recipes.md recommends for about so many clips to train on: a row's words with a preset and a start."""

    clips: int
    preset: str
    init: str
    table: str = "models"
    row: str = "dfernet"
    more: Words = ()  # of what its runs had besides, where the preset has something else


LONGER = ("--optim.epochs", "30", "--optim.warmup-epochs", "2")  # few clips make few steps an epoch

# The default model, but where another row was shown to win: by more than two standard errors of the paired difference.
CHOICES = (
    Choice(300, "faces", "random", more=LONGER),
    Choice(300, "faces", "timm", more=LONGER),
    Choice(1_400, "faces", "random"),
    Choice(1_400, "faces", "timm"),
    Choice(3_000, "faces", "random"),
    Choice(3_000, "faces", "timm"),
    Choice(10_000, "dfew", "random"),
    Choice(10_000, "dfew", "timm"),
    Choice(40_000, "ferv39k", "random"),
    Choice(40_000, "ferv39k", "timm"),
)
