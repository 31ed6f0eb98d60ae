"""Clips without DALI. For a GPU threads put a batch into pinned memory, and copies and one kernel follow.

Here raw clips, which compiled code reads; image_stream.py has images. No Python runs for a clip or a frame, but where
one is bad. video_stream.py has videos on a CPU, of which threads make the clips. Later batches are read, copied and
made beside the consumer's work, on the GPU on a stream of their own. Where clips end up on a CPU, as in the tests, all
is the same but for pinned memory, the stream, and the kernel.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

import abc
import contextlib
import os
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from numba import types
from torch._C._profiler import _RecordFunctionFast

from dali_pipes import pixels
from dali_pipes.bad_clips import BadClips, hung, stand_ins
from dali_pipes.compiling import njit
from dali_pipes.native import DONE, ODD, READING, WAITING, check_hashes
from dali_pipes.options import AHEAD, LoaderOptions
from dali_pipes.readers import Readers, parts_of
from dali_pipes.sources import Shards
from dali_pipes.stored import BadClip
from dali_pipes.torch_stages import Stages
from dfer.files import reason
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import EpochPlan

_TAKEN = 4  # batches that a GPU has yet to use, at most: the host is no further ahead, and their memory is bounded
# The C library's, which every process has. Unlike memory that a file is mapped to, it survives a file that is cut, or a
# disk that fails, and what it copies lies where the GPU can fetch it.
_pread = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))


@dataclass(frozen=True)
class Begun:
    """A batch that threads read."""

    rows: Int64[np.ndarray, " B"]  # of the plan
    states: UInt8[np.ndarray, " B"]
    jobs: list[Future[None]] = field(default_factory=list, init=False)
    bad: dict[int, BadClip] = field(default_factory=dict, init=False)  # place -> why it cannot be had

    @property
    def fine(self) -> bool:
        """Return whether it is there as it should be."""
        return all(job.done() for job in self.jobs) and not self.bad and bool((self.states == DONE).all())


@dataclass(frozen=True)
class _Raw(Begun):
    buffer: torch.Tensor  # uint8: room for the table, then the clips
    position: Int64[np.ndarray, " B"]  # in the buffer
    size: Int64[np.ndarray, " B"]  # bytes of a frame


class _Made(NamedTuple):
    """A batch whose clips are being made."""

    clips: torch.Tensor
    good: Bool[np.ndarray, " B"]
    ready: torch.cuda.Event | None


Read = TypeVar("Read", bound=Begun)


class Stream(abc.ABC, Generic[Read]):
    """Clips of a source, batch by batch.

    At most AHEAD batches are read, into pinned memory for a GPU, and one more on its way out of it (torch rounds each
    piece of it up to a power of two and uses it again); one is made, one with the consumer, _TAKEN of those before wait
    for the GPU.

    Args:
        index: the videos.
        bad: where bad clips are told.
        options: of the loader.
    """

    def __init__(self, index: ClipIndex, bad: BadClips, options: LoaderOptions):
        self._index, self._bad, self._options, self._device = index, bad, options, options.torch_device
        self.num_threads = max(options.num_threads, 4)  # some wait for storage
        self._gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._gpu else None

    def begin(self, plan: EpochPlan, steps: Int64[np.ndarray, "S B"]) -> "StreamedEpoch":
        """Return the batches of an epoch, of which the first are read from now on."""
        return StreamedEpoch(self, plan, steps)

    def read(self, readers: Readers, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> Read:
        """Start to read a batch."""
        begun = self._begun(plan, rows)
        for begin, end in parts_of(len(rows), self._num_parts(len(rows))):
            begun.jobs.append(readers.submit(self._read_part, begun, plan, begin, end))
        return begun

    def _num_parts(self, num_clips: int) -> int:
        """Return into how many jobs a batch is divided."""
        return min(num_clips, self.num_threads)

    def start(self, begun: Read) -> None:
        """Start what this thread has to start for a batch, once that is read. Called again and again."""

    def is_ready(self, begun: Read) -> bool:
        """Return whether nothing about a batch has to be waited for, or told."""
        return begun.fine

    @abc.abstractmethod
    def _begun(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> Read:
        """Return a batch of which nothing is read."""

    @abc.abstractmethod
    def _read_part(self, begun: Read, plan: EpochPlan, begin: int, end: int) -> None:
        """Read clips [begin, end) of a batch, in a thread. Their states become DONE, or ODD for `_find_bad`."""

    def _find_bad(self, begun: Read, plan: EpochPlan) -> dict[int, BadClip]:
        """Return which clips of a batch are bad, by their places; others that are ODD are read by other means."""
        return begun.bad

    @abc.abstractmethod
    def _clips(self, begun: Read, plan: EpochPlan, places: Int64[np.ndarray, " B"], stages: Stages) -> torch.Tensor:
        """Start to make a batch of the clips in these places, (B, T, S, S, 3)."""

    def _wait(self, begun: Read, plan: EpochPlan) -> Bool[np.ndarray, " B"]:
        """Return which clips of a batch are good, once it is read."""
        videos = plan.video[begun.rows]
        for (begin, end), job in zip(parts_of(len(videos), len(begun.jobs)), begun.jobs, strict=True):
            try:
                job.result(self._options.patience)
            except TimeoutError:
                late = np.flatnonzero(begun.states != DONE)
                # First what is being read, then what is odd; by now all may be there.
                order = {READING: 0, ODD: 1, WAITING: 2}
                of_part = [place for place in late.tolist() if begin <= place < end]
                first = min(of_part, key=lambda place: order[int(begun.states[place])], default=begin)
                number = max(len(late), 1)
                raise hung(self._index, int(videos[first]), number, len(videos), self._options.patience) from None
        good = np.ones(len(videos), dtype=bool)
        for place, error in sorted(self._find_bad(begun, plan).items()):
            self._bad.add(int(videos[place]), error)
            good[place] = False
        return good

    def make(self, begun: Read, plan: EpochPlan, stages: Stages) -> _Made:
        """Start the copy of a batch and its kernel, once it is read."""
        with _RecordFunctionFast("reading"):
            good = self._wait(begun, plan)
        options, batch, length = self._options, len(begun.rows), plan.frames.shape[1]
        if not good.any():
            shape = (batch, length, options.size, options.size, 3)
            return _Made(torch.zeros(shape, dtype=options.dtype, device=self._device), good, None)
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            clips = self._clips(begun, plan, stand_ins(np.arange(batch), good), stages)
            return _Made(clips, good, self._stream.record_event() if self._stream else None)


class PixelStream(Stream[Read]):
    """Clips that one kernel makes of pixels which threads have read."""

    @abc.abstractmethod
    def _frames(
        self, begun: Read, plan: EpochPlan, places: Int64[np.ndarray, " B"]
    ) -> tuple[pixels.Frames, Int64[torch.Tensor, " B"]]:
        """Copy a batch to the device; return its table and the rows of that. Those places' clips are shown."""

    def _clips(self, begun: Read, plan: EpochPlan, places: Int64[np.ndarray, " B"], stages: Stages) -> torch.Tensor:
        table = self._frames(begun, plan, places)
        return pixels.clips(*table, stages, self._options.size, self._options.dtype)


class RawStream(PixelStream[_Raw]):
    """The clips of a raw source.

    Args:
        index: the videos.
        source: of `index`; it finds out what is wrong with a clip.
        bad: as of Stream.
        options: as of Stream.
    """

    def __init__(self, index: ClipIndex, source: Shards, bad: BadClips, options: LoaderOptions):
        super().__init__(index, bad, options)
        self._source, self._store, self._files = source, source.store, source.files

    def _begun(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> _Raw:
        store, videos, length = self._store, plan.video[rows], plan.frames.shape[1]
        size = 3 * store.height[videos].astype(np.int64) * store.width[videos]
        ends = np.cumsum(length * size) + 8 * pixels.num_words(len(rows), length)
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._gpu)
        return _Raw(rows, np.zeros(len(rows), np.uint8), buffer, ends - length * size, size)

    def _read_part(self, begun: _Raw, plan: EpochPlan, begin: int, end: int) -> None:
        store, part = self._store, slice(begin, end)
        videos, frames = plan.video[begun.rows[part]], plan.frames[begun.rows[part]]
        offset = store.offset[store.first[videos][:, None] + frames]
        address = begun.buffer.data_ptr() + begun.position[part]
        states, digests = begun.states[part], self._source.digests
        read_clips(self._files[store.shard[videos]], offset, begun.size[part], address, states)
        if digests.function:
            check_hashes(digests, videos, frames, address, begun.size[part], states)
        elif self._index.hashes is not None:  # this machine's Python has no such function: one by one
            states[:] = ODD

    def _find_bad(self, begun: _Raw, plan: EpochPlan) -> dict[int, BadClip]:
        bad = {}
        for place in np.flatnonzero(begun.states != DONE).tolist():
            row = begun.rows[place]
            try:
                pictures = self._stored(int(plan.video[row]), plan.frames[row])
                self._pictures(begun, place, len(pictures))[:] = np.reshape(pictures, (len(pictures), -1))
            except BadClip as error:
                bad[place] = error
        return bad

    def _pictures(self, begun: _Raw, place: int, num_frames: int) -> UInt8[np.ndarray, "T _"]:
        """Return the part of the buffer that holds a clip."""
        start, size = int(begun.position[place]), int(begun.size[place])
        return begun.buffer.numpy()[start : start + num_frames * size].reshape(num_frames, size)

    def _stored(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "H W 3"]]:
        """Return the frames of a clip that could not be read at once.

        Raises:
            BadClip: if they cannot be read now.
        """
        store = self._store
        for frame in frames.tolist():
            row = store.first[video] + frame
            try:  # before the source looks at mapped memory, where a failing disk would end the process
                os.pread(self._files[store.shard[video]], int(store.length[row]), int(store.offset[row]))
            except OSError as error:
                raise BadClip(f"{self._source.name(video, frame)}: {reason(error)}") from None
        return self._source.stored(video, frames)

    def _frames(
        self, begun: _Raw, plan: EpochPlan, places: Int64[np.ndarray, " B"]
    ) -> tuple[pixels.Frames, Int64[torch.Tensor, " B"]]:
        there = torch.empty_like(begun.buffer, device=self._device) if self._gpu else begun.buffer
        words = self._table(begun, plan, places, there.data_ptr())
        begun.buffer[: words.nbytes] = torch.from_numpy(words.view(np.uint8))
        if self._gpu:
            there.copy_(begun.buffer, non_blocking=True)
        table = there[: words.nbytes].view(torch.int64)
        return pixels.Frames.unpack(table, len(places), plan.frames.shape[1])

    def _table(
        self, begun: _Raw, plan: EpochPlan, places: Int64[np.ndarray, " B"], address: int
    ) -> Int64[np.ndarray, " _"]:
        """Return what the kernel has to know: which clips, where, and what is done to them.

        `address`: of the buffer, as the kernel sees it.
        """
        rows, store, count = begun.rows[places], self._store, np.arange(plan.frames.shape[1])
        videos, starts = plan.video[rows], address + begun.position[places]
        height, width = (side[videos].astype(np.int64)[:, None] for side in (store.height, store.width))
        cuts = pixels.cut_out(starts[:, None] + count * begun.size[places][:, None], height, width, plan.box[rows])
        return pixels.pack(cuts, pixels.parameters(plan, rows))


class StreamedEpoch:
    """The batches of an epoch: iterated over once. `close` ends the threads that read, as its own end does."""

    def __init__(self, stream: Stream[Any], plan: EpochPlan, steps: Int64[np.ndarray, "S B"]):
        self._stream, self._plan, self._left = stream, plan, iter(steps)
        self._readers = Readers(stream.num_threads)
        self.close = weakref.finalize(self, self._readers.close)
        self._ahead: deque[Begun] = deque()
        self._stages = Stages(plan)
        self._made: _Made | None = None
        self._read_on()

    def _read_on(self) -> None:
        rows = islice(self._left, AHEAD - len(self._ahead))
        self._ahead.extend(self._stream.read(self._readers, self._plan, batch) for batch in rows)
        for begun in self._ahead:
            self._stream.start(begun)

    def make_ahead(self) -> None:
        """Start to make the next batch, if nothing about it has to be waited for, or told."""
        if self._made is None and self._ahead and self._stream.is_ready(self._ahead[0]):
            self._made = self._stream.make(self._ahead.popleft(), self._plan, self._stages)
            self._read_on()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Bool[np.ndarray, " B"]]]:
        """Yield the clips of each step, (B, T, S, S, 3), and which of them are their own.

        Those of a bad clip are a good one's, or zeros.

        Raises:
            UserError: as ClipLoader's.
        """
        taken: deque[torch.cuda.Event] = deque()
        try:
            while self._ahead or self._made is not None:
                now = self._made or self._stream.make(self._ahead.popleft(), self._plan, self._stages)
                self._made = None
                self.make_ahead()
                self._read_on()
                if now.ready is not None:
                    consumer = torch.cuda.current_stream(now.clips.device)
                    consumer.wait_event(now.ready)
                    now.clips.record_stream(consumer)
                yield now.clips, now.good
                if now.ready is not None:  # what uses them is queued by now
                    taken.append(torch.cuda.current_stream(now.clips.device).record_event())
                    if len(taken) > _TAKEN:
                        taken.popleft().synchronize()
        finally:
            self.close()


@njit(nogil=True)
def read_clips(files, offset, size, address, states):
    """Read clips; `states` says which are there.

    Args:
        files: (B,) int32 file descriptors.
        offset: (B, T) int64, of the frames in the files.
        size: (B,) int64, bytes of a frame.
        address: (B,) int64, where each clip goes.
        states: (B,) uint8; becomes DONE, or ODD for what is not to be had.
    """
    for clip in range(len(files)):
        states[clip] = READING
        t, whole = 0, True
        while t < offset.shape[1] and whole:
            count = 1  # frames that follow each other in the file
            while t + count < offset.shape[1] and offset[clip, t + count] == offset[clip, t] + count * size[clip]:
                count += 1
            got = 0
            while got < count * size[clip]:
                to = address[clip] + t * size[clip] + got
                more = _pread(files[clip], to, count * size[clip] - got, offset[clip, t] + got)
                if more <= 0:
                    whole = False
                    break
                got += more
            t += count
        states[clip] = DONE if whole else ODD
