"""A raw data set held whole in the memory of a device: clips are cut out of it, nothing is loaded after the start."""

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipes import torch_stages
from dfer.cli import UserError, command_of
from dfer.lists.index import ClipIndex, Packed


class ResidentClips:
    """All pictures of a raw source on one device.

    Raises:
        UserError: if the source is not raw, pictures differ in size, or the memory does not hold them.
    """

    def __init__(self, index: ClipIndex, device: torch.device):
        store = index.store
        if index.source != "raw" or not isinstance(store, Packed):
            raise UserError(
                f"--data.cache gpu holds raw clips, these are {index.source}: {command_of('pack')} --format raw"
            )
        self.pictures = _load(store, device)
        self._first = torch.from_numpy(store.first[:-1]).to(device)

    def clips(self, rows: Int64[Tensor, " B"], plan: torch_stages.DevicePlan, size: int) -> Float[Tensor, "B T S S 3"]:
        """Return the clips of some rows of the plan, made on the device without waiting for it."""
        pictures = self.pictures[self._first[plan.video[rows]][:, None] + plan.frames[rows]]
        clips = torch_stages.resize(pictures, plan.box[rows], plan.mirror[rows], size)
        return torch_stages.finish(clips, plan, rows)


def _load(store: Packed, device: torch.device) -> UInt8[Tensor, "F H W 3"]:
    """Return all pictures of a pack on a device, video after video."""
    sizes = np.unique(np.stack([store.height, store.width], axis=1), axis=0)
    if len(sizes) > 1:
        raise UserError(f"--data.cache gpu: the clips differ in size; {command_of('pack')} --format raw --size PX")
    height, width = sizes[0].tolist()
    needed = int(store.first[-1]) * height * width * 3
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > 0.8 * free:
            raise UserError(
                f"--data.cache gpu: {needed / 2**30:.1f} GiB of pictures, {free / 2**30:.1f} GiB of GPU memory are free"
            )
    pictures = torch.empty((int(store.first[-1]), height, width, 3), dtype=torch.uint8, device=device)
    maps = [np.memmap(path, dtype=np.uint8, mode="c") for path in store.paths]  # "c": torch refuses read-only arrays
    for video in range(len(store.shard)):
        rows = slice(int(store.first[video]), int(store.first[video + 1]))
        start = int(store.offset[rows.start])
        clip = maps[store.shard[video]][start : start + (rows.stop - rows.start) * height * width * 3]
        pictures[rows] = torch.from_numpy(clip.reshape(-1, height, width, 3))
    return pictures
