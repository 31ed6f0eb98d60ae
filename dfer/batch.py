"""The batch that passes from the loader to the model, and the letters used for shapes everywhere.

B clips in a batch, T frames of a clip, C channels, H W height and width, h w those of a feature map, D feature width,
K classes, N videos of a list (in dfer/crf/: tokens of a clip).
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dfer.lists.index import ClipIndex
from dfer.plan.sampling import ClipSampler


class Batch(NamedTuple):
    clips: Float[Tensor, "B T 3 H W"]  # normalised; channels-last in memory
    labels: Int64[Tensor, " B"]
    valid: Bool[Tensor, " B"]  # False: padding that fills up the last batch; counts nowhere
    ids: Int64[Tensor, " B"]  # row of the clip in its ClipIndex


def empty_batch(batch_size: int, num_frames: int, size: int, device: torch.device) -> Batch:
    """Return a batch of black clips of `size` x `size` px, all of them valid, laid out as the loader's are."""
    clips = torch.zeros(batch_size, num_frames, size, size, 3, device=device).permute(0, 1, 4, 2, 3)
    ids = torch.zeros(batch_size, dtype=torch.int64)
    labels = ids.to(device)
    return Batch(clips, labels, torch.ones_like(labels, dtype=torch.bool), ids)


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
