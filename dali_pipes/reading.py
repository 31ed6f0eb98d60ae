"""Reading ahead: the clips of a batch are fetched by several threads, each of which has a part of the batch.

A part takes one call of compiled code, however many clips and frames it has. Only a clip that is unusual, or cannot be
read, is fetched by Python. Of videos each clip is a part.
"""

from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, UInt8

from dali_pipes import native
from dali_pipes.readers import Readers, parts_of
from dali_pipes.stored import BadClip

_LIMIT = 2**30  # bytes of the files of a batch that lie side by side; what needs more is handed over file by file
_FIRST_STRIDE = 2**16  # bytes


class Files(NamedTuple):
    """Image files side by side; what lies behind the end of one means nothing."""

    data: UInt8[np.ndarray, "F L"]
    lengths: Int32[np.ndarray, "F 1"]


class Pictures(NamedTuple):
    """Where pictures lie in memory, which their owners keep: address, height, width, channels."""

    table: Int64[np.ndarray, "F 4"]
    owners: list[np.ndarray]

    @classmethod
    def of(cls, arrays: list[UInt8[np.ndarray, "H W C"]]) -> "Pictures":
        """Return where some pictures lie, which are kept."""
        arrays = [np.ascontiguousarray(array) for array in arrays]
        rows = [(array.__array_interface__["data"][0], *array.shape) for array in arrays]
        return cls(np.array(rows, dtype=np.int64).reshape(-1, native.COLUMNS), arrays)


Samples: TypeAlias = Files | Pictures | list[Any]  # of a list: an array for each sample, or what a VideoFeed takes


class Readable(Protocol):
    """What can be read: a source, or videos for a GPU."""

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[Any]:
        """Return the samples of one clip."""
        ...

    def read(self, *args: Any) -> None:
        """Read clips in compiled code as far as that can be done; as Images.read."""
        ...


class Rooms:
    """Memory for image files that are read, which is used again: new memory costs as much as filling it does.

    Args:
        num_files: of a batch.
        longest: bytes of the longest file, if that is known.
        device: where they are decoded; the files are read from memory until that has been done.
    """

    def __init__(self, num_files: int, longest: int | None, device: torch.device):
        self._num_files, self._device = num_files, device
        self._stride = 0
        self.widen(longest or _FIRST_STRIDE - 1)
        self._free: deque[tuple[Files, torch.cuda.Event | None]] = deque()

    def widen(self, length: int) -> None:
        """Make rooms from now on as wide as a file of this length needs, if that is not too much for all."""
        stride = 4096 * -(-(length + 1) // 4096)
        if self._stride < stride and stride * self._num_files <= _LIMIT:
            self._stride = stride
            self._free = deque()

    def take(self) -> Files:
        """Return a room that nobody uses."""
        if self._free and (self._free[0][1] is None or self._free[0][1].query()):
            return self._free.popleft()[0]
        stride = max(self._stride, 4096)
        return Files(np.empty((self._num_files, stride), np.uint8), np.zeros((self._num_files, 1), np.int32))

    def give_back(self, room: Files) -> None:
        """Take back a room whose pictures were made, or are being made by what was queued on the GPU before."""
        if room.data.shape[1] == self._stride:
            event = None
            if self._device.type == "cuda":
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self._device))
            self._free.append((room, event))


class Reading:
    """The clips of one batch, which are being read: `wait` for them, then take the `samples`.

    Args:
        source: of the index.
        videos: of the clips.
        frames: of each.
        room: of image files; None: a table of pictures, or if `listed` what the source fetches, as it is.
        readers: who read.
    """

    def __init__(
        self,
        source: Readable,
        videos: Int64[np.ndarray, " B"],
        frames: Int64[np.ndarray, "B T"],
        room: Files | None,
        readers: Readers,
        *,
        listed: bool,
    ):
        self._source, self._videos, self._frames = source, videos, np.ascontiguousarray(frames)
        self._states = np.full(len(videos), native.ODD if listed else native.WAITING, np.uint8)
        self._pictures = np.zeros((frames.size if room is None and not listed else 0, native.COLUMNS), np.int64)
        self._listed, self.room = listed, room
        self._apart: dict[int, list[Any]] = {}  # place in the batch -> what was fetched, where it is in no room
        self.bad: dict[int, BadClip] = {}  # place -> why it cannot be read
        num_parts = len(videos) if listed else min(readers.num_threads, len(videos))
        self._parts = parts_of(len(videos), num_parts)
        self._jobs: list[Future[None]] = [readers.submit(self._read, *part) for part in self._parts]

    def _read(self, begin: int, end: int) -> None:
        # Little Python and numpy: of what it takes to run them, the files that are read leave nothing in the caches.
        states, part, length = self._states, slice(begin, end), self._frames.shape[1]
        if not self._listed:
            rows, room = slice(begin * length, end * length), self.room
            out = self._pictures[rows] if room is None else Files(room.data[rows], room.lengths[rows])
            self._source.read(self._videos[part], self._frames[part], out, states[part])
        for place in [place for place, state in enumerate(states[part].tolist(), begin) if state != native.DONE]:
            try:
                arrays = self._source.fetch(int(self._videos[place]), self._frames[place])
            except BadClip as error:
                self.bad[place] = error.alone()
            else:
                self._put(place, arrays)
            states[place] = native.DONE

    def _put(self, place: int, arrays: list[Any]) -> None:
        """Keep what was fetched for a clip, if possible where the others are."""
        rows = slice(place * len(arrays), (place + 1) * len(arrays))
        if self._listed:
            self._apart[place] = arrays
        elif self.room is None:
            self._pictures[rows], self._apart[place] = Pictures.of(arrays)
        elif max(map(len, arrays)) > self.room.data.shape[1]:
            self._apart[place] = arrays
        else:
            for row, array in enumerate(arrays, start=rows.start):
                self.room.data[row, : len(array)] = array
                self.room.lengths[row] = len(array)

    def wait(self, patience: float) -> int | None:
        """Wait until all clips are there, or are known to be bad. Return the place of one that takes too long, or None.

        `patience` is in seconds, for each part of the batch.
        """
        for (begin, _), job in zip(self._parts, self._jobs, strict=True):
            try:
                job.result(patience)
            except TimeoutError:
                late = np.flatnonzero(self._states != native.DONE)
                begun = late[self._states[late] != native.WAITING]
                return int([*begun, *late, begin][0])  # by now it may be there
        return None

    @property
    def done(self) -> bool:
        """Return whether there is nothing to wait for."""
        return all(job.done() for job in self._jobs)

    def num_late(self) -> int:
        """Return how many clips are not there."""
        return int((self._states != native.DONE).sum())

    def samples(self, good: Bool[np.ndarray, " B"]) -> Samples:
        """Return what was read, with the first good clip in the place of each that is not good.

        Raises:
            ValueError: if none is good.
        """
        length, first = self._frames.shape[1], int(np.flatnonzero(good)[0])
        others = np.flatnonzero(~good)
        if self._listed or (self.room is not None and self._apart):
            return [array for place in range(len(good)) for array in self._clip(place if good[place] else first)]
        if len(others):
            arrays = [self._pictures] if self.room is None else list(self.room)
            for array in arrays:
                clips = array.reshape(len(good), length, -1)
                clips[others] = clips[first]
        if self.room is not None:
            return self.room
        return Pictures(self._pictures, [array for arrays in self._apart.values() for array in arrays])

    def _clip(self, place: int) -> list[Any]:
        if place in self._apart:
            return self._apart[place]
        assert self.room is not None
        rows = range(place * self._frames.shape[1], (place + 1) * self._frames.shape[1])
        return [self.room.data[row, : self.room.lengths[row, 0]] for row in rows]

    def longest_apart(self) -> int:
        """Return the bytes of the longest image file for which there was no room; 0 if there is none."""
        if self.room is None:
            return 0
        return max((len(array) for arrays in self._apart.values() for array in arrays), default=0)
