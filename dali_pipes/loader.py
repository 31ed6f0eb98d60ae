"""ClipLoader: plans in, batches of torch tensors out, from any source, on either device."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch.profiler import record_function

from dali_pipes import pixels, torch_stages
from dali_pipes.bad_clips import BadClips, hung, stand_ins
from dali_pipes.feeding import Epoch, Feed
from dali_pipes.options import LoaderOptions
from dali_pipes.readers import Readers
from dali_pipes.resident import ResidentClips
from dali_pipes.sources import BadClip, Images, Shards, source_of
from dali_pipes.streaming import RawStream
from dfer.batch import Batch, mixed
from dfer.cli import UserError, printable, say_error
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import ClipSampler, EpochPlan, shard

AHEAD = 2  # batches that are read, and videos decoded, before the graph needs them


class ClipLoader:
    """Batches of one rank, epoch by epoch: `for batch in loader(epoch): ...`.

    At most AHEAD + 3 batches exist at a time: AHEAD as they are stored (of videos: their decoded frames), one in the
    graph, one made, one with the consumer.

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
        self.index, self.sampler, self.options = index, sampler, options
        self._device = options.torch_device
        self._resident = ResidentClips(index, self._device) if options.cached else None
        self._bad = BadClips(index, options.bad_clips)
        self.bad_clips: dict[int, str] = self._bad.found  # row of the index -> why it was left out
        for video, reason in index.bad.items():
            self._bad.add(video, BadClip(reason), tell=options.rank == 0)
        self._route = None if options.cached else options.route(index.source)
        if options.dtype == torch.uint8 and self._route != "fused":
            raise UserError("clips of uint8 come from the CPU kernel only")
        self._source = source_of(index, whole_videos=not options.cached and not options.fused)
        self._told = False
        self._stream = None
        if options.cached:
            self._verify_all()
        elif self._route == "streamed":
            assert index.source == "raw" and isinstance(self._source, Shards), index.source
            self._stream = RawStream(index, self._source, self._bad, options)
        else:
            self._feed = Feed(index, self._source, sampler.clip_length, options)

    def __len__(self) -> int:
        """Return the steps per epoch, the same on every rank."""
        global_batch = self.options.batch_size * self.options.world_size
        return -(-len(self.index) // global_batch) if self._pad else len(self.index) // global_batch

    @property
    def _pad(self) -> bool:
        return self.sampler.mode == "eval"

    def __call__(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on. Decoding runs one batch ahead of the consumer.

        Raises:
            UserError: if a frame is missing or cannot be decoded (with `bad_clips="skip"`, if too many are bad), or if
                storage or a decoder hangs. The message names the clip and the file.
        """
        options = self.options
        plan = self.sampler.plan(epoch, self.index.num_frames, self.index.labels)
        steps, valid = shard(plan.order, options.rank, options.world_size, options.batch_size, self._pad)
        steps, valid = steps[start_step:], valid[start_step:]
        if not len(steps):
            return
        if self._resident is not None:
            yield from self._resident_batches(self._resident, plan, steps, valid)
            return
        if self._stream is not None:
            made = self._stream.begin(plan, steps)
            for (pictures, good), rows, rows_valid in zip(made, steps, valid, strict=True):
                yield self._batch(pictures, plan, rows, rows_valid & good)
            return
        self._feed.drain()  # the consumer of the last epoch may have left early
        on_device = torch_stages.DevicePlan(plan, self._device) if self._route == "operators" else None
        drawn = Epoch(plan, on_device, torch_stages.Stages(plan) if self._route == "decoded" else None)
        # Storage is waited for, not computed with: a few threads even on one core. Decoding videos takes all cores.
        with Readers(max(options.num_threads, 4)) as readers:

            def read(rows: np.ndarray) -> list[Future]:
                clips = zip(plan.video[rows].tolist(), plan.frames[rows], strict=True)
                return [readers.submit(self._source.fetch, video, frames) for video, frames in clips]

            ahead = deque(read(rows) for rows in steps[:AHEAD])
            good = self._schedule(ahead.popleft(), steps[0], drawn)
            for step, rows in enumerate(steps):
                pictures, rows_good = self._outputs(rows, good, drawn)
                filled = stand_ins(rows, rows_good)
                if step + AHEAD < len(steps):
                    ahead.append(read(steps[step + AHEAD]))
                if step + 1 < len(steps):
                    good = self._schedule(ahead.popleft(), steps[step + 1], drawn)
                if drawn.on_device is not None and rows_good.any():
                    pictures = self._finish(pictures, drawn.on_device, filled)
                yield self._batch(pictures, plan, rows, valid[step] & rows_good)

    def _resident_batches(
        self, resident: ResidentClips, plan: EpochPlan, steps: Int64[np.ndarray, "S B"], valid: Bool[np.ndarray, "S B"]
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch of a data set in the device's memory."""
        frames, stages, options = resident.frames(plan), torch_stages.Stages(plan), self.options
        for rows, rows_valid in zip(steps, valid, strict=True):
            there = torch_stages.upload(rows, self._device)
            good = ~np.isin(plan.video[rows], list(self.bad_clips))
            clips = pixels.clips(frames, there, stages, options.size, options.dtype)
            yield self._batch(clips, plan, rows, rows_valid & good)

    def _verify_all(self) -> None:
        """Check the hashes of a data set that is held in memory, as nothing is read again later."""
        if self.index.hashes is None:
            return
        for video, num_frames in enumerate(self.index.num_frames.tolist()):
            try:
                self._source.fetch(video, np.arange(num_frames))
            except BadClip as error:
                self._bad.add(video, error, tell=self.options.rank == 0)

    @record_function("reading")
    def _schedule(self, fetched: list[Future], rows: Int64[np.ndarray, " B"], drawn: Epoch) -> Bool[np.ndarray, " B"]:
        """Start decoding a batch, in which another clip stands in for each that cannot be fetched; return which can."""
        clips, good, videos = [], np.ones(len(rows), dtype=bool), drawn.plan.video[rows].tolist()
        for place, (video, row, future) in enumerate(zip(videos, rows, fetched, strict=True)):
            try:
                self._bad.check_frames(video, drawn.plan.frames[row])
                clips.append(future.result(self.options.patience))
            except TimeoutError:
                late = sum(not future.done() for future in fetched)  # it may have come since, as may all the others
                raise hung(self.index, video, max(late, 1), len(fetched), self.options.patience) from None
            except BadClip as error:
                self._bad.add(video, error)
                good[place] = False
        self._tell_of_slow_frames()
        if good.any():
            by_place = dict(zip(np.flatnonzero(good).tolist(), clips, strict=True))
            samples = [array for place in range(len(rows)) for array in by_place.get(place, clips[0])]
            self._feed.start(samples, stand_ins(rows, good), drawn)
        return good

    def _tell_of_slow_frames(self) -> None:
        """Say once that there are image files which DALI is not given as they are."""
        if isinstance(self._source, Images) and self._source.decoded and not self._told:
            self._told = True
            where = printable(self._source.decoded)
            say_error(f"note: {where}, perhaps others too, is an unusual image file, which takes longer to decode")

    def _outputs(
        self, rows: Int64[np.ndarray, " B"], good: Bool[np.ndarray, " B"], drawn: Epoch
    ) -> tuple[torch.Tensor, Bool[np.ndarray, " B"]]:
        """Return the pictures of the batch that was started, and which of its clips are good after all."""
        if not good.any():
            return self._feed.zeros(len(rows)), good
        try:
            return self._feed.pictures(), good
        except RuntimeError as error:
            message = " ".join(str(error).split())
        return self._bad.decode_one_by_one(self._feed, rows, good, drawn, message)

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
