"""A raw data set held in the memory of a device, or of several: clips are cut out of it, nothing is loaded later."""

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
from dfer.run.neighbours import REMEDY, Neighbours

# Told each video and its frames' bytes, (N, bytes), before they are copied to the device.
Check: TypeAlias = Callable[[int, UInt8[np.ndarray, "N _"]], None]

_PART = 2**28  # bytes that are read, and copied to the device, at a time


class ResidentClips:
    """All pictures of a raw source in the memory of one device, or in shares in that of each of a machine's.

    Args:
        index: the videos.
        device: where the pictures are held.
        check: called with what this process has read of each video.
        neighbours: who hold the other shares, and make theirs at the same time; None: this device holds all.

    Raises:
        UserError: if the source is not raw, or the memory does not hold them.
    """

    def __init__(self, index: ClipIndex, device: torch.device, check: Check, neighbours: Neighbours | None = None):
        store = index.store
        if index.source != "raw" or not isinstance(store, Packed):
            raise UserError(
                f"--data.cache holds raw clips, these are {index.source}: {command_of('pack')} --format raw"
            )
        self._store, self._device = store, device
        self._neighbours = neighbours  # whose memory it is
        frames, sizes = store.first[1:] - store.first[:-1], 3 * store.height.astype(np.int64) * store.width
        start = np.concatenate([[0], np.cumsum(frames * sizes)])  # of each video; its frames follow each other
        ends = _shares(start, 1 if neighbours is None else neighbours.size)
        largest = int((start[ends[1:]] - start[ends[:-1]]).max())
        why = _no_room(largest, device)
        if neighbours is not None:
            neighbours.agree(why)  # before one waits for another's memory
            self.parts = neighbours.memory(largest)
            own = slice(*ends[neighbours.rank : neighbours.rank + 2].tolist())
            try:
                _load(index, store, start, own, self.parts[neighbours.rank], check)
            except UserError as error:
                why = str(error)
            neighbours.agree(why)  # before one looks where another has not read yet
            neighbours.agree(_misread(self.parts, neighbours))
        elif why is not None:
            raise UserError(why)
        else:
            self.parts = [torch.empty(largest, dtype=torch.uint8, device=device)]
            _load(index, store, start, slice(0, len(store.shard)), self.parts[0], check)
        bases = np.array([part.data_ptr() for part in self.parts]) - start[ends[:-1]]
        self._address = np.repeat(bases, np.diff(ends)) + start[:-1]  # of each video

    def frames(self, plan: EpochPlan) -> pixels.Frames:
        """Return where the frames of all rows of a plan lie, for as long as this lives; nothing is waited for."""
        store, video = self._store, plan.video
        height, width = (side[video].astype(np.int64)[:, None] for side in (store.height, store.width))
        address = self._address[video][:, None] + plan.frames * (3 * height * width)
        cuts = pixels.cut_out(address, height, width, plan.box)
        parameters = pixels.parameters(plan, np.arange(len(video)))
        return pixels.Frames(upload(cuts, self._device), upload(parameters, self._device))


def _shares(start: Int64[np.ndarray, " _"], number: int) -> Int64[np.ndarray, " _"]:
    """Return where shares of about as many bytes begin, in videos, and where the last one ends."""
    inner = np.searchsorted(start[:-1], start[-1] * np.arange(1, number) // number)
    return np.concatenate([[0], inner, [len(start) - 1]])


def _misread(parts: list[UInt8[Tensor, " _"]], neighbours: Neighbours) -> str | None:
    """Return that this device reads something else in another's memory than that one does; None if it does not.

    Some machines say that their GPUs read each other's memory where that gives other bytes.
    """
    sums = [int(part.sum(dtype=torch.int64)) for part in parts]
    wrong = [rank for rank, there in enumerate(neighbours.each(sums[neighbours.rank])) if there != sums[rank]]
    if not wrong:
        return None
    return (
        f"--data.cache shares: reads other bytes in the memory of GPU {wrong[0]} than that GPU does: is an IOMMU on?"
        f"{REMEDY}"
    )


def _no_room(needed: int, device: torch.device) -> str | None:
    """Return why a device does not hold so many bytes; None if it does."""
    if device.type != "cuda" or needed <= 0.8 * (free := torch.cuda.mem_get_info(device)[0]):
        return None
    return (
        f"--data.cache: {needed / 2**30:.1f} GiB of pictures for a GPU of which {free / 2**30:.1f} GiB are free{REMEDY}"
    )


def _load(
    index: ClipIndex,
    store: Packed,
    start: Int64[np.ndarray, " _"],
    videos: slice,
    pictures: UInt8[Tensor, " _"],
    check: Check,
) -> None:
    """Read the pictures of some videos of a pack, one after the other, into the memory of a device."""
    files = open_shards(store)
    try:
        first = videos.start
        while first < videos.stop:
            # As many videos as a part holds, but at least one.
            last = max(int(np.searchsorted(start, start[first] + _PART, side="right")) - 1, first + 1)
            last = min(last, videos.stop)
            part = torch.empty(int(start[last] - start[first]), dtype=torch.uint8, pin_memory=pictures.is_cuda)
            states = np.zeros(last - first, dtype=np.uint8)
            some, offset = slice(first, last), store.offset[store.first[first:last]][:, None]
            address = part.data_ptr() + start[some] - start[first]
            read_clips(files[store.shard[some]], offset, start[first + 1 : last + 1] - start[some], address, states)
            for place in np.flatnonzero(states != DONE)[:1]:
                path = store.paths[store.shard[first + place]]
                raise UserError(
                    f"{path}: cannot be read as far as it was packed; copy it again, or pack the list again"
                )
            for video in range(first, min(last, len(index))):  # a store may hold more videos than the index
                begin, end = (start[video : video + 2] - start[first]).tolist()
                size = 3 * int(store.height[video]) * int(store.width[video])
                check(video, part.numpy()[begin:end].reshape(-1, size))
            to = int(start[first] - start[videos.start])
            pictures[to : to + len(part)].copy_(part, non_blocking=True)
            first = last
    finally:
        close_shards(files)
