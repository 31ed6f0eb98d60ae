"""ClipLoader: plans in, batches of torch tensors out, from any source, on either device."""

import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch.profiler import record_function

from dali_pipes import graphs, kernels, torch_stages
from dali_pipes.readers import Readers
from dali_pipes.resident import ResidentClips
from dali_pipes.sources import BadClip, VideoFiles, source_of
from dfer.batch import Batch
from dfer.commandline import shown
from dfer.index import ClipIndex
from dfer.sampling import ClipSampler, EpochPlan, shard
from dfer.video import yuv_to_rgb

TOLERATED = 0.01  # share of the clips that may be bad before it is no accident any more; one clip always may
AHEAD = 2  # batches that are read, and videos decoded, before the graph needs them
_STORED_AS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.uint8: "uint8"}


class ClipLoader:
    """Batches of one rank, epoch by epoch: `for batch in loader(epoch): ...`.

    At most AHEAD + 3 batches exist at a time: AHEAD as they are stored (of videos: their decoded frames), one in the
    graph, one made, one with the consumer.

    Args:
        index: the videos and where their frames lie, which decides the source.
        sampler: what a clip is; its mode says whether the last batch is dropped (train) or padded (eval).
        batch_size: clips per batch and rank.
        size: height and width of the clips in pixels.
        device: where clips end up, "cpu" or "gpu"; on "gpu" it decodes too (nvJPEG, NVDEC, which refuses HEVC
            below 144 px and VP9 below 128 px a side).
        dtype: of the clips: float32, bfloat16, float16, or uint8: colours 0..255, not normalised (from the CPU kernel).
        graph: "fused" (our CPU kernel) or "operators" (DALI's); the default is what the device has.
        jpeg_engine: share of the images that the GPU's JPEG engine decodes, where it has one; its cores do the others.
            0 until a card has shown that it does not mix the pixels of two batches (benchmarks/gpu.py).
        bad_clips: what becomes of a clip that cannot be read: "error", or "skip": it is named on stderr, once, and
            kept in `bad_clips`; its row of the batch is not valid and holds another clip's pixels, or zeros where no
            clip of the batch can be read. No other row and no number of batches changes.
        cached: hold all pictures of a raw source in the device's memory; nothing is loaded after the start.
        patience: seconds to wait for storage or a decoder before giving up on it.
    """

    def __init__(
        self,
        index: ClipIndex,
        sampler: ClipSampler,
        *,
        batch_size: int,
        size: int,
        device: Literal["cpu", "gpu"] = "cpu",
        dtype: torch.dtype = torch.float32,
        graph: Literal["fused", "operators"] | None = None,
        jpeg_engine: float = 0.0,
        bad_clips: Literal["error", "skip"] = "error",
        cached: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 2,
        device_id: int | None = None,
        patience: float = 300.0,
    ):
        self.index, self.sampler, self.dtype = index, sampler, dtype
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._size, self._patience = size, patience
        assert sampler.mode == "train" or bad_clips == "error", "evaluation counts every clip"
        self._policy = bad_clips
        self.bad_clips: dict[int, str] = {}  # row of the index -> why it was left out, the first time
        self._bad_frames: dict[tuple[int, int], str] = {}  # (video, frame) that the decoder has refused before -> why
        self._device = torch.device("cuda", device_id or 0) if device == "gpu" else torch.device("cpu")
        # Storage is waited for, not computed with: a few threads even on one core. Decoding videos takes all cores.
        self._num_readers = max(num_threads, 4)
        self._graph = graph or ("operators" if device == "gpu" else "fused")
        self._resident = ResidentClips(index, self._device) if cached else None
        self._in_flight = False
        for video, reason in index.bad.items():
            self._leave_out(video, BadClip(reason), tell=rank == 0)
        if dtype == torch.uint8 and (self._graph == "operators" or cached):
            raise ValueError("clips of uint8 come from the CPU kernel only")
        if cached:
            self._verify_all()
            return
        self._source = source_of(index, whole_videos=self._graph == "operators")
        self._yuv = self._source.yuv() if isinstance(self._source, VideoFiles) else None
        self._recolour = _from_bt601(index) if self._source.kind == "videos" else None
        if self._graph == "fused":
            num_frames = batch_size * sampler.clip_length
            stored_as = _STORED_AS.get(dtype, "float32")
            self._build = partial(graphs.fused, self._source.kind, num_frames, size, stored_as, num_threads)
        else:
            num_samples = batch_size * (1 if self._source.kind == "videos" else sampler.clip_length)
            gpu = device, device_id, jpeg_engine
            self._build = partial(graphs.operators, self._source.kind, num_samples, size, num_threads, *gpu)
        self._pipeline = self._build()

    def __len__(self) -> int:
        """Steps per epoch, the same on every rank."""
        global_batch = self.batch_size * self.world_size
        return -(-len(self.index) // global_batch) if self._pad else len(self.index) // global_batch

    @property
    def _pad(self) -> bool:
        return self.sampler.mode == "eval"

    def __call__(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` on. Decoding runs one batch ahead of the consumer.

        Raises:
            ValueError: in one line that names the clip and the file, when a frame is missing or cannot be decoded (with
                `bad_clips="skip"`, when more than the TOLERATED share of all clips is bad), or storage or a decoder
                hangs.
        """
        plan = self.sampler.plan(epoch, self.index.num_frames)
        ids, valid = shard(plan.order, self.rank, self.world_size, self.batch_size, self._pad)
        ids, valid = ids[start_step:], valid[start_step:]
        if self._resident is not None:
            yield from self._resident_batches(plan, ids, valid)
            return
        if self._in_flight:  # the consumer of the last epoch left early: take out what it had not asked for
            with contextlib.suppress(RuntimeError):
                self._pictures()
        rest = torch_stages.DevicePlan(plan, self._device) if self._graph == "operators" else None
        with Readers(self._num_readers) as readers:

            def read(row: np.ndarray) -> list[Future]:
                return [readers.submit(self._source.fetch, v, plan.frames[v]) for v in row.tolist()]

            ahead = deque(read(row) for row in ids[:AHEAD])
            for step in range(len(ids)):
                if step == 0:
                    good = self._schedule(ahead.popleft(), ids[0], plan, rest)
                pictures, good = self._outputs(ids[step], good, plan, rest)
                row_good, filled = good, _stand_ins(ids[step], good)
                if step + AHEAD < len(ids):
                    ahead.append(read(ids[step + AHEAD]))
                if step + 1 < len(ids):
                    good = self._schedule(ahead.popleft(), ids[step + 1], plan, rest)
                if rest is not None and row_good.any():
                    pictures = self._finish(pictures, rest, filled)
                yield self._batch(pictures, ids[step], valid[step] & row_good)

    def _resident_batches(self, plan: EpochPlan, ids: np.ndarray, valid: np.ndarray) -> Iterator[Batch]:
        on_device = torch_stages.DevicePlan(plan, self._device)
        for row, row_valid in zip(ids, valid, strict=True):
            videos = torch.from_numpy(np.ascontiguousarray(row)).to(self._device, non_blocking=True)
            good = ~np.isin(row, list(self.bad_clips))
            yield self._batch(self._resident.clips(videos, on_device, self._size), row, row_valid & good)

    def _verify_all(self) -> None:
        """Of a data set that is held in memory, what is wrong shows when it is loaded, or never."""
        if self.index.hashes is None:
            return
        source = source_of(self.index, whole_videos=False)
        for video, num_frames in enumerate(self.index.num_frames.tolist()):
            try:
                source.fetch(video, np.arange(num_frames))
            except BadClip as error:
                self._leave_out(video, error, tell=self.rank == 0)

    @record_function("reading")
    def _schedule(
        self, fetched: list[Future], ids: np.ndarray, plan: EpochPlan, rest: torch_stages.DevicePlan | None
    ) -> np.ndarray:
        """Start decoding a batch, in which another clip stands in for each that cannot be fetched; (B,) which can."""
        clips, good = [], np.ones(len(ids), dtype=bool)
        for row, (video, future) in enumerate(zip(ids.tolist(), fetched, strict=True)):
            try:
                for frame in plan.frames[video].tolist() if self._bad_frames else ():
                    if (video, frame) in self._bad_frames:
                        raise BadClip(self._bad_frames[video, frame])
                clips.append(future.result(self._patience))
            except TimeoutError:
                raise ValueError(self._hung(fetched, ids)) from None
            except BadClip as error:
                self._leave_out(video, error)
                good[row] = False
        if good.any():
            by_row = dict(zip(np.flatnonzero(good).tolist(), clips, strict=True))
            source = [array for row in range(len(ids)) for array in by_row.get(row, clips[0])]
            self._run(source, _stand_ins(ids, good), plan, rest)
        return good

    def _run(
        self,
        source: list[np.ndarray],
        ids: np.ndarray,
        plan: EpochPlan,
        rest: torch_stages.DevicePlan | None,
    ) -> None:
        """Start the graph on one clip for each of `ids`, or on one frame for each."""
        feed, repeat = self._pipeline.feed_input, len(source) // len(ids)
        feed("source", source)
        if self._graph == "fused":
            decoder_crops = self._source.kind == "images"
            yuv = None if self._yuv is None else self._yuv[ids]
            normalised = self.dtype != torch.uint8
            table = kernels.parameters(plan, ids, crop=not decoder_crops, yuv=yuv, normalised=normalised)
            feed("parameters", np.repeat(table, repeat, axis=0))
            if decoder_crops:
                self._feed_crop(plan, ids, repeat)
        else:
            self._feed_crop(plan, ids, repeat)
            # What must be warped or blurred first is coloured after it.
            late = rest.touches_geometry
            colour = np.tile(np.eye(3, 4, dtype=np.float32), (len(ids), 1, 1)) if late else plan.colour[ids]
            colour = colour if self._recolour is None else _compose(colour, self._recolour[ids])
            feed("mirror", np.repeat(plan.mirror[ids].astype(np.int32), repeat))
            feed("matrix", np.repeat(np.ascontiguousarray(colour[:, :, :3]), repeat, axis=0))
            feed("offset", np.repeat(np.ascontiguousarray(colour[:, :, 3]), repeat, axis=0))
            if self._source.kind == "videos":
                feed("frames", plan.frames[ids].astype(np.int32))
        self._pipeline.schedule_run()
        self._in_flight = True

    def _feed_crop(self, plan: EpochPlan, ids: np.ndarray, repeat: int) -> None:
        box = np.repeat(plan.box[ids].astype(np.float32), repeat, axis=0)
        self._pipeline.feed_input("anchor", np.ascontiguousarray(box[:, :2]))
        self._pipeline.feed_input("shape", np.ascontiguousarray(box[:, 2:]))

    def _outputs(
        self, ids: np.ndarray, good: np.ndarray, plan: EpochPlan, rest: torch_stages.DevicePlan | None
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The pictures of the batch that was started, and which of its clips are good after all."""
        if not good.any():
            shape = (len(ids) * self.sampler.clip_length, self._size, self._size, 3)
            kind = _STORED_AS.get(self.dtype, "float32") if self._graph == "fused" else "float32"
            return torch.zeros(shape, dtype=getattr(torch, kind), device=self._device), good
        try:
            return self._pictures(), good
        except RuntimeError as error:
            return self._one_by_one(ids, good, plan, rest, " ".join(str(error).split()))

    @record_function("DALI")
    def _pictures(self) -> torch.Tensor:
        self._in_flight = False
        stream = torch.cuda.current_stream().cuda_stream if self._device.type == "cuda" else None
        try:
            (pictures,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError:
            self._pipeline = self._build()  # what a graph does after an error is not documented
            raise
        return torch.from_dlpack(pictures.as_tensor())

    def _one_by_one(
        self,
        ids: np.ndarray,
        good: np.ndarray,
        plan: EpochPlan,
        rest: torch_stages.DevicePlan | None,
        message: str,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """The same for a batch that DALI has refused: it fails as a whole, and names a sample only sometimes.

        The same graph judges each clip alone, so that a clip is good or bad whatever its neighbours are.
        """
        clips: dict[int, torch.Tensor] = {}
        for row in np.flatnonzero(good).tolist():
            try:
                clips[row] = self._alone(int(ids[row]), plan, rest)
            except BadClip as error:
                self._leave_out(int(ids[row]), error)
        if len(clips) == good.sum():
            names = ", ".join(self.index.records[v].name for v in ids)
            raise ValueError(f"decoding failed, though not of any one clip, in the batch of {names}: {message}")
        good = np.isin(np.arange(len(ids)), list(clips))
        if not clips:
            return self._outputs(ids, good, plan, rest)
        stand_in = next(iter(clips.values()))
        return torch.cat([clips.get(row, stand_in) for row in range(len(ids))]), good

    def _alone(self, video: int, plan: EpochPlan, rest: torch_stages.DevicePlan | None) -> torch.Tensor:
        """The pictures of one clip.

        Raises:
            BadClip: if it cannot be decoded; it names the frame if there is one.
        """
        clip, frames = self._source.fetch(video, plan.frames[video]), plan.frames[video].tolist()
        try:
            self._run(clip, np.array([video]), plan, rest)
            return self._pictures()
        except RuntimeError as error:
            message = " ".join(str(error).split())
        if self._source.kind == "images":
            for frame, data in zip(frames, clip, strict=True):
                try:
                    self._run([data], np.array([video]), plan, rest)
                    self._pictures()
                except RuntimeError:
                    self._bad_frames[video, frame] = f"{self._source.name(video, frame)}: cannot be decoded"
                    raise BadClip(self._bad_frames[video, frame]) from None
        record = self.index.records[video]
        raise BadClip(f"{record.source}: decoding clip {record.name} ({record.path}) failed: {message}")

    def _leave_out(self, video: int, error: BadClip, tell: bool = True) -> None:
        """What the policy says about a bad clip. `tell`: not where all ranks find the same one at the same time."""
        if self._policy == "error":
            raise error from None
        if video in self.bad_clips:
            return
        self.bad_clips[video] = str(error)
        if len(self.bad_clips) > max(1, TOLERATED * len(self.index)):
            raise ValueError(
                f"{error}; with it, {len(self.bad_clips):,} of {len(self.index):,} clips cannot be read: more than "
                f"{TOLERATED:.0%} are not left out"
            )
        if tell:
            print(f"clip left out: {shown(error)}", file=sys.stderr, flush=True)

    def _finish(self, pictures: torch.Tensor, plan: torch_stages.DevicePlan, ids: np.ndarray) -> torch.Tensor:
        """What DALI's graph has left out."""
        if not (plan.touches_geometry or plan.erases):
            return pictures
        clips = pictures.view(len(ids), self.sampler.clip_length, self._size, self._size, 3)
        rows = torch.from_numpy(ids).to(self._device, non_blocking=True)
        return torch_stages.finish(clips, plan, rows, coloured=not plan.touches_geometry)

    def _batch(self, pictures: torch.Tensor, ids: np.ndarray, valid: np.ndarray) -> Batch:
        if pictures.dtype == torch.uint16:
            pictures = pictures.view(torch.bfloat16)
        clips = pictures.view(len(ids), self.sampler.clip_length, self._size, self._size, 3)
        return Batch(
            # a view: channels-last memory, as cuDNN and oneDNN like it
            clips=clips.permute(0, 1, 4, 2, 3).to(self.dtype),
            labels=torch.from_numpy(self.index.labels[ids]).to(pictures.device, non_blocking=True),
            valid=torch.from_numpy(np.ascontiguousarray(valid)).to(pictures.device, non_blocking=True),
            ids=torch.from_numpy(np.ascontiguousarray(ids)),
        )

    def _hung(self, fetched: list[Future], ids: np.ndarray) -> str:
        late = [self.index.records[v] for v, future in zip(ids.tolist(), fetched, strict=True) if not future.done()]
        return (
            f"{late[0].source}: reading clip {late[0].name} ({late[0].path}) has taken more than {self._patience:g} s "
            f"({len(late)} of {len(ids)} clips of the batch are waiting): does the storage or a decoder hang?"
        )


def _stand_ins(ids: np.ndarray, good: np.ndarray) -> np.ndarray:
    """The clips whose pixels a batch holds: for a bad one, the first good one's, so that its rows look like any."""
    return np.where(good, ids, ids[good.argmax()])


def _from_bt601(index: ClipIndex) -> np.ndarray:
    """(N, 3, 4): from the RGB of DALI's decoder, for which every stream is BT.601, to the RGB that the stream means."""
    store, maps = index.store, {}
    rows = np.empty((len(store.matrix), 3, 4), dtype=np.float32)
    for video, kind in enumerate(zip(store.matrix.tolist(), store.full_range.tolist(), strict=True)):
        if kind not in maps:
            true, taken = yuv_to_rgb(*kind), yuv_to_rgb("bt601", kind[1])
            back = np.linalg.inv(taken[:, :3]) @ np.concatenate([np.eye(3), -taken[:, 3:]], axis=1)
            maps[kind] = _compose(true[None], back[None])[0]
        rows[video] = maps[kind]
    return rows


def _compose(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The (B, 3, 4) affine maps that apply `first`, then `second`."""
    both = second[:, :, :3] @ first
    both[:, :, 3] += second[:, :, 3]
    return both
