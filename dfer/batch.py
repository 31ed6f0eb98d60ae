"""The batch that passes from the loader to the model, and the letters used for shapes everywhere.

B clips in a batch, T frames of a clip, C channels, H W height and width, h w those of a feature map, D feature width,
K classes, N videos of a list (in dfer/crf/: tokens of a clip).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from dfer.lists.index import ClipIndex
from dfer.plan.sampling import ClipSampler


class Mix(NamedTuple):
    """Whose pixels are in a clip beside its own, by which its label is to be mixed too."""

    partner: Int64[Tensor, " B"]  # row of the batch; its own if it is not mixed
    share: Float[Tensor, " B"]  # of its own pixels


class Batch(NamedTuple):
    clips: Float[Tensor, "B T 3 H W"]  # normalised; channels-last in memory
    labels: Int64[Tensor, " B"] | Float[Tensor, "B K"]  # the loader's are ids of classes
    valid: Bool[Tensor, " B"]  # False: padding that fills up the last batch; counts nowhere
    ids: Int64[Tensor, " B"]  # row of the clip in its ClipIndex
    mix: Mix | None = None  # of mixup and cutmix


def empty_batch(batch_size: int, num_frames: int, size: int, device: torch.device) -> Batch:
    """Return a batch of black clips of `size` x `size` px, all of them valid, laid out as the loader's are."""
    clips = torch.zeros(batch_size, num_frames, size, size, 3, device=device).permute(0, 1, 4, 2, 3)
    ids = torch.zeros(batch_size, dtype=torch.int64)
    labels = ids.to(device)
    return Batch(clips, labels, torch.ones_like(labels, dtype=torch.bool), ids)


def mixed(batch: Batch, draws: Float32[np.ndarray, "B 5"]) -> Batch:
    """Return a batch whose clips are mixed with their neighbours as `EpochPlan.mix` says, without waiting for a GPU.

    A clip that is not valid is mixed with none.
    """
    device, size = batch.clips.device, batch.clips.shape[-1]
    edges = np.round(np.stack([draws[:, 1:3], draws[:, 1:3] + draws[:, 3:]], axis=2) * np.float32(size))  # (B, 2, 2)
    share = draws[:, 0] * (1 - (edges[:, :, 1] - edges[:, :, 0]).prod(1) / size**2)
    table = torch.from_numpy(np.concatenate([draws[:, :1], share[:, None], edges.reshape(-1, 4)], axis=1))
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
    own = torch.arange(len(draws), device=device)
    alone = ~(batch.valid & batch.valid[own ^ 1])
    partner = torch.where(alone, own, own ^ 1)
    weight, share = (torch.where(alone, 1.0, column) for column in table[:, :2].T)
    pixel = torch.arange(size, device=device)
    inside = (pixel >= table[:, 2::2, None]) & (pixel < table[:, 3::2, None])  # (B, 2, S): rows, columns
    inside = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None, :, :, None]
    clips = batch.clips.permute(0, 1, 3, 4, 2)  # as it lies in memory
    weight = weight.to(clips.dtype).view(-1, 1, 1, 1, 1)
    others = clips[partner]
    clips = torch.where(inside, others, weight * clips + (1 - weight) * others).permute(0, 1, 4, 2, 3)
    return batch._replace(clips=clips, mix=Mix(partner, share))


@runtime_checkable
class Loader(Protocol):
    """What training and evaluation know of a loader: `dali_pipes.loader.ClipLoader` is one."""

    index: ClipIndex
    sampler: ClipSampler
    bad_clips: dict[int, str]  # row of the index -> why it was left out

    def __len__(self) -> int:
        """Return the steps of an epoch, the same on every rank."""
        ...

    def __call__(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on."""
        ...

    def prepare(self, epoch: int, start_step: int = 0) -> None:
        """Begin to read what the next call will ask for, if that can be done ahead; called again, to make it."""
        ...
