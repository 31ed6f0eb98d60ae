"""A raw data set held whole in the memory of a device: clips are cut out of it, nothing is loaded after the start."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dali_pipes import pixels
from dali_pipes.native import DONE
from dali_pipes.shard_files import close_shards, open_shards
from dali_pipes.streaming import read_clips
from dali_pipes.torch_stages import upload
from dfer.cli import UserError, command_of
from dfer.lists.index import ClipIndex, Packed
from dfer.plan.sampling import EpochPlan

# Told each video and its frames' bytes, (N, bytes), before they are copied to the device.
Check: TypeAlias = Callable[[int, UInt8[np.ndarray, "N _"]], None]

_PART = 2**28  # bytes that are read, and copied to the device, at a time


class ResidentClips:
    """All pictures of a raw source on one device, of any sizes.

    Args:
        index: the videos.
        device: where the pictures are held.
        check: called with what was read of each video.

    Raises:
        UserError: if the source is not raw, or the memory does not hold them.
    """

    def __init__(self, index: ClipIndex, device: torch.device, check: Check):
        store = index.store
        if index.source != "raw" or not isinstance(store, Packed):
            raise UserError(
                f"--data.cache gpu holds raw clips, these are {index.source}: {command_of('pack')} --format raw"
            )
        self._store, self._device = store, device
        frames, sizes = store.first[1:] - store.first[:-1], 3 * store.height.astype(np.int64) * store.width
        self._start = np.concatenate([[0], np.cumsum(frames * sizes)])  # of each video; its frames follow each other
        self.pictures = _load(index, store, self._start, device, check)

    def frames(self, plan: EpochPlan) -> pixels.Frames:
        """Return where the frames of all rows of a plan lie, for as long as this lives; nothing is waited for."""
        store, video = self._store, plan.video
        height, width = (side[video].astype(np.int64)[:, None] for side in (store.height, store.width))
        address = self.pictures.data_ptr() + self._start[video][:, None] + plan.frames * (3 * height * width)
        cuts = pixels.cut_out(address, height, width, plan.box)
        parameters = pixels.parameters(plan, np.arange(len(video)))
        return pixels.Frames(upload(cuts, self._device), upload(parameters, self._device))


def _load(
    index: ClipIndex, store: Packed, start: Int64[np.ndarray, " _"], device: torch.device, check: Check
) -> UInt8[Tensor, " _"]:
    """Return all pictures of a pack on a device, video after video."""
    needed = int(start[-1])
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > 0.8 * free:
            raise UserError(
                f"--data.cache gpu: {needed / 2**30:.1f} GiB of pictures, {free / 2**30:.1f} GiB of GPU memory are free"
            )
    pictures = torch.empty(needed, dtype=torch.uint8, device=device)
    files = open_shards(store)
    try:
        first = 0
        while first < len(store.shard):
            # As many videos as a part holds, but at least one.
            last = max(int(np.searchsorted(start, start[first] + _PART, side="right")) - 1, first + 1)
            part = torch.empty(int(start[last] - start[first]), dtype=torch.uint8, pin_memory=device.type == "cuda")
            states = np.zeros(last - first, dtype=np.uint8)
            videos, offset = slice(first, last), store.offset[store.first[first:last]][:, None]
            address = part.data_ptr() + start[videos] - start[first]
            read_clips(files[store.shard[videos]], offset, start[first + 1 : last + 1] - start[videos], address, states)
            for place in np.flatnonzero(states != DONE)[:1]:
                path = store.paths[store.shard[first + place]]
                raise UserError(
                    f"{path}: cannot be read as far as it was packed; copy it again, or pack the list again"
                )
            for video in range(first, min(last, len(index))):  # a store may hold more videos than the index
                begin, end = (start[video : video + 2] - start[first]).tolist()
                size = 3 * int(store.height[video]) * int(store.width[video])
                check(video, part.numpy()[begin:end].reshape(-1, size))
            pictures[int(start[first]) : int(start[last])].copy_(part, non_blocking=True)
            first = last
    finally:
        close_shards(files)
    return pictures
