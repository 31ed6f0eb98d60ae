"""Images for a GPU, decoded on the cores without DALI: only their crops are decoded, and uploaded.

Threads read a part of a batch, decode it into pinned memory of their own, and go on: Python has a few steps for a part,
none for a clip or a frame, but where one is unusual. What is uploaded is the crop, its lines filled up to 32 pixels.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from numba import carray

from dali_pipes import jpeg, pixels, torch_stages
from dali_pipes.bad_clips import BadClips
from dali_pipes.compiling import njit, pointer
from dali_pipes.native import DONE, ODD
from dali_pipes.options import LoaderOptions
from dali_pipes.reading import Files
from dali_pipes.sources import FrameFolders, Shards
from dali_pipes.stored import BadClip
from dali_pipes.streaming import Begun, PixelStream
from dfer.images import BadImage, decode_image
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import EpochPlan

_STRIDE = 2**16  # bytes for each file at first
_LIMIT = 2**28  # bytes for the files of a part; what needs more is read one by one
OFFSET, PITCH, ROWS, COLUMNS = 0, 1, 2, 3  # of a table of crops; in pixels but for the first two, in bytes


@dataclass(frozen=True)
class Crops(Begun):
    """A batch of images that threads read, and decode."""

    crops: Int64[np.ndarray, "B T 4"]  # OFFSET in the memory of the part that the clip is of
    others: Bool[np.ndarray, "B T"]  # frames that are not decoded here
    parts: dict[int, torch.Tensor] = field(default_factory=dict)  # first place -> uint8, the crops of the part
    apart: dict[int, list[UInt8[np.ndarray, "H W 3"]]] = field(default_factory=dict)  # place -> its crops, elsewhere
    kept: dict[int, list[UInt8[np.ndarray, " _"]]] = field(default_factory=dict)  # the same places -> files of `others`


class ImageStream(PixelStream[Crops]):
    """The clips of a source of images.

    Beside what Stream holds, each thread has room for the files of its part of a batch, of _LIMIT bytes at most.

    Args:
        index: the videos.
        source: of `index`.
        bad: as of Stream.
        options: as of Stream.
    """

    def __init__(self, index: ClipIndex, source: FrameFolders | Shards, bad: BadClips, options: LoaderOptions):
        super().__init__(index, bad, options)
        self._source, self._own = source, threading.local()
        self._stride = _STRIDE
        if isinstance(source, Shards):
            self._widen(int(source.store.length.max()))

    def _begun(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> Crops:
        shape = len(rows), plan.frames.shape[1]
        return Crops(rows, np.zeros(len(rows), np.uint8), np.zeros((*shape, 4), np.int64), np.zeros(shape, bool))

    def _widen(self, length: int) -> None:
        """Make rooms from now on as wide as a file of this length needs."""
        self._stride = max(self._stride, 4096 * -(-(length + 1) // 4096))

    def _room(self, num_files: int) -> Files:
        """Return this thread's memory for the files of a part: new memory costs as much as filling it does."""
        room, stride = getattr(self._own, "room", None), min(self._stride, _LIMIT // num_files)
        if room is None or len(room.data) < num_files or room.data.shape[1] < stride:
            if self._gpu:  # what a thread pins is of its own device, the first one unless it says
                torch.cuda.set_device(self._device)
            room = Files(np.empty((num_files, stride), np.uint8), np.zeros((num_files, 1), np.int32))
            self._own.room = room
        return room

    def _read_part(self, begun: Crops, plan: EpochPlan, begin: int, end: int) -> None:
        rows, states, crops = begun.rows[begin:end], begun.states[begin:end], begun.crops[begin:end]
        others = begun.others[begin:end]
        videos, frames, box = plan.video[rows], plan.frames[rows], plan.box[rows].astype(np.float32)
        files = Files(*(array[: frames.size] for array in self._room(frames.size)))
        self._source.read(videos, frames, files, states)
        size = find_crops(*files, box, crops, others, states)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._gpu)
        decode_crops(*files, box, crops, others, memory.data_ptr(), states)
        begun.parts[begin] = memory
        for place in np.flatnonzero(states != DONE).tolist():
            try:
                self._decode(begun, begin + place, int(videos[place]), frames[place], box[place])
            except BadClip as error:
                begun.bad[begin + place], others[place] = error.alone(), False
            states[place] = DONE
        self._keep(begun, begin, end, files)

    def _keep(self, begun: Crops, begin: int, end: int, files: Files) -> None:
        """Keep what is needed of the files of a part for frames that are not decoded here."""

    def _find_others(self, cuts: Int64[np.ndarray, "B T 4"], begun: Crops, plan: EpochPlan) -> None:
        """Set where frames lie that were not decoded here."""

    def _decode(
        self, begun: Crops, place: int, video: int, frames: Int64[np.ndarray, " T"], box: Float32[np.ndarray, " 4"]
    ) -> None:
        """Decode a clip that compiled code does not read or decode: what is decoded here of it.

        Raises:
            BadClip: if there is no such clip.
        """
        found, kept, stored = [], [], self._source.stored(video, frames)
        self._widen(max(map(len, stored)))
        files = self._source.for_dali(video, frames, stored)
        for frame, data, is_other in zip(frames.tolist(), files, begun.others[place].tolist(), strict=True):
            if is_other:
                found.append(np.empty((0, 0, 3), np.uint8))
                kept.append(data)
                continue
            try:
                picture = np.asarray(decode_image(data.tobytes()))
            except BadImage as error:
                raise BadClip(f"{self._source.name(video, frame)}: cannot be decoded ({error})") from None
            sides = (np.array([[side]]) for side in picture.shape[:2])
            ((first, pitch, rows, columns),) = pixels.cut_out(np.zeros((1, 1), np.int64), *sides, box[None])[0].tolist()
            top, left = first // pitch, first % pitch // 3
            found.append(np.ascontiguousarray(picture[top : top + rows, left : left + columns]))
        begun.apart[place], begun.kept[place] = found, kept

    def _frames(
        self, begun: Crops, plan: EpochPlan, places: Int64[np.ndarray, " B"]
    ) -> tuple[pixels.Frames, Int64[torch.Tensor, " B"]]:
        cuts, firsts = begun.crops.copy(), sorted(begun.parts)
        memory = [begun.parts[first] for first in firsts]
        others = [np.concatenate([crop.ravel() for crop in crops]) for crops in begun.apart.values()]
        memory += [torch_stages.pinned(clip, self._device) for clip in others]
        ends = 8 * pixels.num_words(*cuts.shape[:2]) + np.cumsum([len(part) for part in memory])
        there = torch.empty(int(ends[-1]), dtype=torch.uint8, device=self._device)
        starts = [end - len(part) for end, part in zip(ends.tolist(), memory, strict=True)]
        for start, part in zip(starts, memory, strict=True):
            there[start : start + len(part)].copy_(part, non_blocking=True)
        for first, end, start in zip(firsts, [*firsts[1:], len(cuts)], starts, strict=False):
            cuts[first:end, :, OFFSET] += there.data_ptr() + start
        for (place, crops), start in zip(begun.apart.items(), starts[len(firsts) :], strict=True):
            sizes = np.array([crop.shape[:2] for crop in crops])
            offsets = np.cumsum(3 * sizes.prod(1)) - 3 * sizes.prod(1)
            cuts[place] = np.stack([there.data_ptr() + start + offsets, 3 * sizes[:, 1], *sizes.T], axis=1)
        self._find_others(cuts, begun, plan)
        words = pixels.pack(cuts[places], pixels.parameters(plan, begun.rows[places]))
        table = there[: words.nbytes]  # a view, which keeps the pixels until the kernel is queued behind the copies
        table.copy_(torch_stages.pinned(words.view(np.uint8), self._device), non_blocking=True)
        return pixels.Frames.unpack(table.view(torch.int64), len(places), cuts.shape[1])


@njit(nogil=True)
def find_crops(data, lengths, box, crops, others, states):
    """Find out where the crops of some clips will lie, one behind the other; return their bytes.

    Args:
        data: (B * T, L) uint8, JPEG files.
        lengths: (B * T, 1) int32, of the files.
        box: (B, 4) float32, as of jpeg.decode_crop.
        crops: (B, T, 4) int64; OFFSET becomes that of a crop's first pixel.
        others: (B, T) bool, frames that take no room.
        states: (B,) uint8; what is DONE, but has a frame that is not for jpeg.py, becomes ODD.
    """
    size = 0
    for clip in range(len(states)):
        for t in range(crops.shape[1]):
            if states[clip] != DONE:
                break
            row = clip * crops.shape[1] + t
            if others[clip, t]:
                continue
            rows, width, first, columns = jpeg.crop_shape(data[row, : lengths[row, 0]], box[clip])
            crop = crops[clip, t]
            crop[OFFSET], crop[PITCH], crop[ROWS], crop[COLUMNS] = size + 3 * first, 3 * width, rows, columns
            size += 3 * width * rows
            if rows == 0:
                states[clip] = ODD
    return size


@njit(nogil=True)
def decode_crops(data, lengths, box, crops, others, address, states):
    """Decode the crops of some clips into memory at an address. As `find_crops`; ODD becomes what is damaged."""
    for clip in range(len(states)):
        for t in range(crops.shape[1]):
            if states[clip] != DONE:
                break
            if others[clip, t]:
                continue
            row = clip * crops.shape[1] + t
            file = data[row, : lengths[row, 0]]
            rows, width, first, _ = jpeg.crop_shape(file, box[clip])
            pixels = carray(pointer(address + crops[clip, t, OFFSET] - 3 * first), (rows, width, 3), np.uint8)
            if not jpeg.decode_crop(file, box[clip], pixels):
                states[clip] = ODD
