"""ClipLoader: plans in, batches of torch tensors out, from any source, on either device."""

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from torch._C._profiler import _RecordFunctionFast

from dali_pipes import pixels, torch_stages
from dali_pipes.bad_clips import BadClips, hung, stand_ins
from dali_pipes.feeding import Epoch, Refused
from dali_pipes.halved_stream import HalvedStream
from dali_pipes.image_stream import ImageStream
from dali_pipes.options import AHEAD, LoaderOptions
from dali_pipes.readers import Readers
from dali_pipes.reading import Files, Reading, Rooms
from dali_pipes.resident import ResidentClips
from dali_pipes.sources import FrameFolders, Images, Shards, source_of
from dali_pipes.stored import BadClip
from dali_pipes.streaming import RawStream, StreamedEpoch
from dali_pipes.video_stream import VideoStream
from dali_pipes.videos import DeviceVideos, feed_of
from dfer.batch import Batch, mixed
from dfer.cli import UserError, printable, say_error, say_once
from dfer.lists.index import ClipIndex, Packed
from dfer.plan.sampling import ClipSampler, EpochPlan, shard


class _Started(NamedTuple):
    """A batch that the graph has, or that nobody could read a clip of."""

    rows: Int64[np.ndarray, " B"]  # of the plan
    valid: Bool[np.ndarray, " B"]
    good: Bool[np.ndarray, " B"]  # could be read
    room: Files | None


class _Pass:
    """An epoch being loaded: what is read, and what the graph has. `close` ends its threads, as does its end."""

    def __init__(self, key: tuple[int, int], drawn: Epoch, steps: np.ndarray, valid: np.ndarray, readers: Readers):
        self.key, self.drawn = key, drawn  # key: epoch and first step
        self.left = deque(zip(steps, valid, strict=True))  # steps that are not yet read
        self.read: deque[tuple[np.ndarray, np.ndarray, Reading]] = deque()
        self.started: deque[_Started] = deque()
        self.readers = readers
        self.close = weakref.finalize(self, readers.close)  # threads hold the readers, and what is read; not this


class _Streamed(NamedTuple):
    """An epoch of clips that threads make without DALI, or read for a GPU."""

    key: tuple[int, int]
    plan: EpochPlan
    steps: Int64[np.ndarray, "S B"]
    valid: Bool[np.ndarray, "S B"]
    made: StreamedEpoch

    def close(self) -> None:
        """End its threads."""
        self.made.close()


class ClipLoader:
    """Batches of one rank, epoch by epoch: `for batch in loader(epoch): ...`.

    At most AHEAD + depth + 2 batches exist at a time: AHEAD as they are stored (of videos decoded frames, on a CPU
    clips; of images that the cores decode for a GPU their crops), `options.depth` in the graph, if there is one, one
    made, one with the consumer. Where
    `prepare` was called there are AHEAD more as they are stored, and those in the graph may be of the epoch that it
    has named.

    Args:
        index: the videos and where their frames lie, which decides the source.
        sampler: what a clip is; its mode says whether the last batch is dropped (train) or padded (eval).
        options: the batch, the machine, and the policy on clips that cannot be read.

    Raises:
        UserError: if the data set cannot be held in memory though it should, or clips that are known to be bad are too
            many or may not be left out.
    """

    def __init__(self, index: ClipIndex, sampler: ClipSampler, options: LoaderOptions):
        assert sampler.mode == "train" or options.bad_clips == "error", "evaluation counts every clip"
        options = usable(options, index)
        self.index, self.sampler, self.options = index, sampler, options
        self._device = options.torch_device
        self._bad = BadClips(index, options.bad_clips)
        self.bad_clips: dict[int, str] = self._bad.found  # row of the index -> why it was left out
        for video, reason in index.bad.items():
            self._bad.add(video, BadClip(reason), tell=options.rank == 0)
        self._route = None if options.cached else options.route(index.source)
        if options.dtype == torch.uint8 and (options.cached or not options.fused):
            raise UserError("clips of uint8 come from the CPU kernel only")
        self._source = DeviceVideos(index, options) if index.source == "video" else source_of(index)
        self._told = False
        self._stream, self._resident = None, None
        if options.cached:
            self._resident = ResidentClips(index, self._device, self._verify, options.neighbours)
            self._learn_of_bad_clips()
        elif self._route == "streamed":
            if index.source == "raw":
                assert isinstance(self._source, Shards)
                self._stream = RawStream(index, self._source, self._bad, options)
            elif isinstance(self._source, DeviceVideos):
                self._stream = VideoStream(index, self._source.frames, self._bad, options)
            else:
                assert isinstance(self._source, FrameFolders | Shards), index.source
                of_images = index, self._source, self._bad, options
                halved = options.halved
                self._stream = HalvedStream(*of_images, sampler.clip_length) if halved else ImageStream(*of_images)
        else:
            self._feed = feed_of(index, self._source, sampler.clip_length, options)
        longest = int(index.store.length.max()) if isinstance(index.store, Packed) else None
        self._rooms = Rooms(options.batch_size * sampler.clip_length, longest, self._device)
        self._prepared: _Pass | _Streamed | None = None
        self._on: _Pass | None = None  # whose batches are taken from the graph

    def __len__(self) -> int:
        """Return the steps per epoch, the same on every rank."""
        global_batch = self.options.batch_size * self.options.world_size
        return -(-len(self.index) // global_batch) if self._pad else len(self.index) // global_batch

    @property
    def _pad(self) -> bool:
        return self.sampler.mode == "eval"

    def __call__(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on. Reading and decoding run ahead of the consumer.

        Raises:
            UserError: if a frame is missing or cannot be decoded (with `bad_clips="skip"`, if too many are bad), or if
                storage or a decoder hangs. The message names the clip and the file.
        """
        if self._resident is not None:
            yield from self._resident_batches(self._resident, epoch, start_step)
            return
        with self._pass(epoch, start_step) as run:
            if isinstance(run, _Streamed):
                for (pictures, good), rows, valid in zip(run.made, run.steps, run.valid, strict=True):
                    yield self._batch(pictures, run.plan, rows, valid & good)
                return
            if self._on is not None and self._on.started:  # whose consumer has left, and not closed it
                self._feed.drain()
                self._on.started.clear()
            self._on = run
            self._start_ahead(run)
            while run.started:
                batch = run.started.popleft()
                pictures, good = self._outputs(batch, run.drawn)
                self._start_ahead(run)
                if run.drawn.on_device is not None and good.any():
                    pictures = self._finish(pictures, run.drawn.on_device, stand_ins(batch.rows, good))
                yield self._batch(pictures, run.drawn.plan, batch.rows, batch.valid & good)

    def prepare(self, epoch: int, start_step: int = 0) -> None:
        """Begin to read the first batches of an epoch which the next call asks for, while others are still on.

        Called again, begin to make those that are read by then, if all of the others are made.
        """
        if self._resident is not None:
            return
        prepared = self._prepared
        if prepared is None or prepared.key != (epoch, start_step):
            self._prepared = None
            if prepared is not None:
                prepared.close()
                if isinstance(prepared, _Pass) and prepared.started:
                    self._feed.drain()
            self._prepared = self._begin(epoch, start_step)
        elif isinstance(prepared, _Streamed):
            prepared.made.make_ahead()
        elif self._on is None or not (self._on.started or self._on.read or self._on.left):
            self._start_ahead(prepared, wait=False)

    def _begin(self, epoch: int, start_step: int) -> "_Pass | _Streamed":
        key, options, plan = (epoch, start_step), self.options, self._plan(epoch)
        steps, valid = (part[start_step:] for part in self._shard(plan))
        if self._stream is not None:
            return _Streamed(key, plan, steps, valid, self._stream.begin(plan, steps))
        on_device = torch_stages.DevicePlan(plan, self._device) if self._route == "operators" else None
        drawn = Epoch(plan, on_device, torch_stages.Stages(plan) if self._route == "decoded" else None)
        # Storage is waited for, not computed with: a few threads even on one core. Decoding videos takes all cores.
        readers = Readers(max(options.num_threads, 4) if len(steps) else 0)
        run = _Pass(key, drawn, steps, valid, readers)
        self._read_ahead(run)
        return run

    @contextmanager
    def _pass(self, epoch: int, start_step: int) -> Iterator["_Pass | _Streamed"]:
        self.prepare(epoch, start_step)
        run, self._prepared = self._prepared, None
        assert run is not None
        try:
            yield run
        finally:
            run.close()
            if run is self._on:
                self._on = None
                if isinstance(run, _Pass) and run.started:  # the consumer has left early
                    self._feed.drain()

    def _plan(self, epoch: int) -> EpochPlan:
        return self.sampler.plan(epoch, self.index.num_frames, self.index.labels)

    def _shard(self, plan: EpochPlan) -> tuple[Int64[np.ndarray, "S B"], Bool[np.ndarray, "S B"]]:
        options = self.options
        return shard(plan.order, options.rank, options.world_size, options.batch_size, self._pad)

    def _read_ahead(self, run: _Pass) -> None:
        """Begin to read until AHEAD batches are read or being read."""
        kind, plan = self._source.kind, run.drawn.plan
        listed = kind == "videos" or (kind == "pixels" and not self.options.fused)
        while run.left and len(run.read) < AHEAD:
            rows, valid = run.left.popleft()
            room = self._rooms.take() if kind == "images" else None
            reading = Reading(self._source, plan.video[rows], plan.frames[rows], room, run.readers, listed=listed)
            run.read.append((rows, valid, reading))

    def _start_ahead(self, run: _Pass, wait: bool = True) -> None:
        """Give the graph what it can take, or of that no more than is read, and read on."""
        self._read_ahead(run)
        while run.read and len(run.started) < self.options.depth and (wait or run.read[0][2].done):
            rows, valid, reading = run.read.popleft()
            good = self._schedule(reading, rows, run.drawn)
            run.started.append(_Started(rows, valid, good, reading.room))
            self._read_ahead(run)

    def _resident_batches(self, resident: ResidentClips, epoch: int, start_step: int) -> Iterator[Batch]:
        """Yield the batches of an epoch of a data set in the device's memory."""
        plan = self._plan(epoch)
        steps, valid = self._shard(plan)
        frames, stages, options = resident.frames(plan), torch_stages.Stages(plan), self.options
        for rows, rows_valid in zip(steps[start_step:], valid[start_step:], strict=True):
            good = ~np.isin(plan.video[rows], list(self.bad_clips))
            there = torch_stages.upload(stand_ins(rows, good), self._device)
            clips = pixels.clips(frames, there, stages, options.size, options.dtype)
            clips = clips if good.any() else torch.zeros_like(clips)
            yield self._batch(clips, plan, rows, rows_valid & good)

    def _verify(self, video: int, pictures: UInt8[np.ndarray, "N _"]) -> None:
        """Check the hashes of a video whose pictures are held in memory, as nothing is read again later."""
        assert isinstance(self._source, Shards)
        try:
            self._source.verify(video, np.arange(len(pictures)), pictures)
        except BadClip as error:
            self._bad.add(video, error, tell=self.options.rank == 0 or self.options.neighbours is not None)

    def _learn_of_bad_clips(self) -> None:
        """Know those that neighbours have found in their shares of what is held."""
        neighbours = self.options.neighbours
        for found in neighbours.each(dict(self.bad_clips)) if neighbours is not None else ():
            for video, reason in found.items():
                if video not in self.bad_clips:
                    self._bad.add(video, BadClip(reason), tell=False)

    def _schedule(self, reading: Reading, rows: Int64[np.ndarray, " B"], drawn: Epoch) -> Bool[np.ndarray, " B"]:
        """Start decoding a batch, in which another clip stands in for each that cannot be read; return which can."""
        with _RecordFunctionFast("reading"):
            late = reading.wait(self.options.patience)
        if late is not None:
            video, missing = int(drawn.plan.video[rows[late]]), max(reading.num_late(), 1)  # all may have come since
            raise hung(self.index, video, missing, len(rows), self.options.patience)
        bad = self._bad.refused(drawn.plan.video[rows], drawn.plan.frames[rows]) | reading.bad
        good = np.ones(len(rows), dtype=bool)
        for place in sorted(bad):
            self._bad.add(int(drawn.plan.video[rows[place]]), bad[place])
            good[place] = False
        self._tell_of_slow_frames()
        self._rooms.widen(reading.longest_apart())
        if good.any():
            self._feed.start(reading.samples(good), stand_ins(rows, good), drawn)
        return good

    def _tell_of_slow_frames(self) -> None:
        """Say once that there are image files which DALI is not given as they are."""
        if isinstance(self._source, Images) and self._source.decoded and not self._told:
            self._told = True
            where = printable(self._source.decoded)
            say_error(f"note: {where}, perhaps others too, is an unusual image file, which takes longer to decode")

    def _outputs(self, batch: _Started, drawn: Epoch) -> tuple[torch.Tensor, Bool[np.ndarray, " B"]]:
        """Return the pictures of a batch that was started, and which of its clips are good after all."""
        if not batch.good.any():
            return self._feed.zeros(len(batch.rows)), batch.good
        try:
            pictures = self._feed.pictures()
        except Refused as error:
            message = " ".join(str(error).split())
        else:
            if batch.room is not None:
                self._rooms.give_back(batch.room)
            return pictures, batch.good
        return self._bad.decode_one_by_one(self._feed, batch.rows, batch.good, drawn, message)

    def _finish(
        self, pictures: torch.Tensor, on_device: torch_stages.DevicePlan, rows: Int64[np.ndarray, " B"]
    ) -> torch.Tensor:
        """Return the pictures after the stages that the graph of DALI's operators leaves out."""
        if not (on_device.touches_geometry or on_device.erases):
            return pictures
        size = self.options.size
        clips = pictures.view(len(rows), self.sampler.clip_length, size, size, 3)
        there = torch.from_numpy(rows).to(self._device, non_blocking=True)
        return torch_stages.finish(clips, on_device, there, coloured=not on_device.touches_geometry)

    def _batch(
        self, pictures: torch.Tensor, plan: EpochPlan, rows: Int64[np.ndarray, " B"], valid: Bool[np.ndarray, " B"]
    ) -> Batch:
        if pictures.dtype == torch.uint16:
            pictures = pictures.view(torch.bfloat16)
        size, ids = self.options.size, plan.video[rows]
        clips = pictures.view(len(rows), self.sampler.clip_length, size, size, 3)
        batch = Batch(
            # a view: channels-last memory, as cuDNN and oneDNN like it
            clips=clips.permute(0, 1, 4, 2, 3).to(self.options.dtype),
            labels=torch.from_numpy(self.index.labels[ids]).to(pictures.device, non_blocking=True),
            valid=torch.from_numpy(np.ascontiguousarray(valid)).to(pictures.device, non_blocking=True),
            ids=torch.from_numpy(ids),
        )
        return batch if plan.mix is None else mixed(batch, plan.mix[rows])


def usable(options: LoaderOptions, index: ClipIndex) -> LoaderOptions:
    """Return the options, or, where a GPU's kernel does not do what it should, with DALI's operators; which is said."""
    if options.device == "cpu" or not (options.cached or options.route(index.source) in ("decoded", "streamed")):
        return options
    why = pixels.why_not(options.torch_device)
    if options.neighbours is not None:  # none holds its share without the others
        options.neighbours.agree(why)
    if why is None:
        return options
    say_once(f"{why}: DALI's operators make the clips" + ("; none are held in memory" if options.cached else ""))
    return dataclasses.replace(options, cached=False, graph="operators")
