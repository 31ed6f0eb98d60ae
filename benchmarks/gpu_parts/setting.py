"""How large the work is: for a card, for a CPU, and so small that a test can walk through all of it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ENGINES_OF_H100 = 7  # of NVDEC; of an H200 too
BATCHES = (64, 16, 128, 256)  # clips of a step on a card: the most telling, launch-bound, what `dfew` takes, large


class NotHere(Exception):
    """What a case needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Setting:
    """What all cases share. `gpu` with device "cpu" is a test's: the code for the card with its calls stubbed."""

    data: Path
    out: Path
    gpu: bool
    device: Literal["cuda", "cpu"]
    seconds: float = 0.6  # of one repeat
    repeats: int = 3
    warm_up: int = 4  # batches or steps
    frames: int = 16  # T of a clip
    size: int = 112  # px of a clip
    batches: tuple[int, ...] = BATCHES
    batch: int = 64  # where only one is measured
    loader_batch: int = 16  # on a CPU, as the trainer has it there
    dim: int = 256  # D of the model
    copy_bytes: int = 2**30
    product_side: int = 8192
    images: int = 2048  # that decoders are given, from memory
    train_steps: int = 60  # of variants that are compared by their losses
    long_train_steps: int = 200  # of eager against eager, once more at the end
    mixing_batches: int = 240
    soak_steps: int = 2000
    user_steps: int = 60  # of an epoch of train.py
    user_words: tuple[str, ...] = ()  # of its command besides
    list_length: int = 9356  # rows of DFEW's first training list
    data_share: float = 0.25  # of the embedded data set

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))


def setting_of(size: Literal["card", "cpu", "toy"], data: Path, out: Path) -> Setting:
    """The setting for a kind of machine."""
    if size == "card":
        return Setting(data, out, gpu=True, device="cuda")
    if size == "cpu":
        return Setting(data, out, gpu=False, device="cpu", images=256, data_share=0.03)
    return Setting(
        data, out, gpu=True, device="cpu", seconds=0.0, repeats=1, warm_up=1, frames=2, size=32, batches=(2,),
        batch=2, loader_batch=2, dim=16, copy_bytes=2**12, product_side=16, images=8, train_steps=2, long_train_steps=3,
        mixing_batches=3, soak_steps=8, user_steps=1, list_length=30, data_share=0.003,
        user_words=("--data.size", "32", "--data.num-segments", "2", "--model.dim", "16", "--run.device", "cpu"),
    )  # fmt: skip
