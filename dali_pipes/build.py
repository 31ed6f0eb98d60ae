"""The loader that a configuration names."""

from datetime import timedelta
from typing import Literal

import torch

from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.cli import UserError
from dfer.config import Config
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import ClipSampler
from dfer.precision import build_precision
from dfer.run.defaults import JPEG_ENGINE
from dfer.run.distributed import World
from dfer.run.neighbours import Neighbours


def build_loader(config: Config, index: ClipIndex, mode: Literal["train", "eval"], world: World) -> ClipLoader:
    """Return a rank's loader of training clips (mode "train") or of all clips once ("eval").

    Raises:
        UserError: if the clips are to be held in GPU memory, and there is no GPU or no room, or they are not raw; or if
            they are to be mixed, and a batch does not consist of pairs.
    """
    data = config.data
    sampler = ClipSampler(
        config.seed,
        data.num_segments,
        data.frames_per_segment,
        mode,
        data.augmentation,
        data.views,
        data.mirror_views,
        data.balance,
    )
    if mode == "train" and data.batch_size % 2 and (data.augmentation.mixup or data.augmentation.cutmix):
        raise UserError(
            f"--data.batch-size {data.batch_size}: mixup and cutmix mix pairs: they take an even number per process"
        )
    gpu = world.device.type == "cuda"
    if data.cache in ("gpu", "shares") and not gpu:
        raise UserError(f"--data.cache {data.cache}: there is no GPU here")
    options = LoaderOptions(
        batch_size=data.batch_size,
        size=data.size,
        device="gpu" if gpu else "cpu",
        jpeg_engine=JPEG_ENGINE[data.jpeg_decoder],
        halved=data.jpeg_decoder == "cores+sms",
        video_decoder=data.video_decoder,
        bad_clips=data.bad_clips if mode == "train" else "error",
        cached=data.cache in ("gpu", "shares"),
        neighbours=Neighbours(world, timedelta(seconds=config.run.timeout)) if data.cache == "shares" else None,
        rank=world.rank,
        world_size=world.size,
        num_threads=world.own_cores(),
        device_id=world.device.index if gpu else None,
        dtype=type_of_clips(config, mode, world.device),
    )
    return ClipLoader(index, sampler, options)


def type_of_clips(config: Config, mode: Literal["train", "eval"], device: torch.device) -> torch.dtype:
    """Return the type in which clips are made.

    On a GPU that to which the first convolution rounds them in any case: half the bytes. But clips that are to be mixed
    are rounded after that.
    """
    drawn = config.data.augmentation
    if device.type == "cpu" or (mode == "train" and (drawn.mixup or drawn.cutmix)):
        return torch.float32
    return build_precision(config.run, device).dtype or torch.float32
