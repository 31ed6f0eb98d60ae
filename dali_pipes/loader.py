"""ClipLoader: plans in, batches of torch tensors out."""

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from PIL import Image

from dali_pipes.graphs import frames_pipeline
from dali_pipes.sources import FrameFolders
from dfer.batch import Batch
from dfer.index import ClipIndex
from dfer.sampling import ClipSampler, EpochPlan, shard


class ClipLoader:
    """Batches of one rank, epoch by epoch: `for batch in loader(epoch): ...`.

    Args:
        index: the videos and where their frames lie.
        sampler: what a clip is; its mode says whether the last batch is dropped (train) or padded (eval).
        batch_size: clips per batch and rank.
        size: height and width of the clips in pixels.
        device: where frames are decoded and clips end up, "cpu" or "gpu".
    """

    def __init__(
        self,
        index: ClipIndex,
        sampler: ClipSampler,
        *,
        batch_size: int,
        size: int,
        device: Literal["cpu", "gpu"] = "cpu",
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 2,
        device_id: int | None = None,
    ):
        self.index, self.sampler = index, sampler
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._source = FrameFolders(index)
        self._size, self._device = size, device
        self._pipeline = frames_pipeline(batch_size * sampler.clip_length, size, device, num_threads, device_id)
        self._in_flight = False

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
            ValueError: in one line that names the clip and the file, when a frame is missing or cannot be decoded.
        """
        plan = self.sampler.plan(epoch, self.index.num_frames)
        ids, valid = shard(plan.order, self.rank, self.world_size, self.batch_size, self._pad)
        ids, valid = ids[start_step:], valid[start_step:]
        if self._in_flight:  # the consumer of the last epoch left early: take out what it had not asked for
            with contextlib.suppress(RuntimeError):
                self._pipeline.outputs()
        with ThreadPoolExecutor(1) as reader:
            encoded = deque(reader.submit(self._source.fetch, row, plan.frames[row]) for row in ids[:2])
            for step in range(len(ids)):
                if step == 0:
                    self._schedule(encoded.popleft().result(), ids[0], plan)
                images = self._outputs(ids[step], plan)
                if step + 1 < len(ids):
                    self._schedule(encoded.popleft().result(), ids[step + 1], plan)
                if step + 2 < len(ids):
                    encoded.append(reader.submit(self._source.fetch, ids[step + 2], plan.frames[ids[step + 2]]))
                yield self._batch(images, ids[step], valid[step])

    def _schedule(self, encoded: list[np.ndarray], ids: np.ndarray, plan: EpochPlan) -> None:
        def per_frame(per_clip: np.ndarray) -> np.ndarray:
            return np.repeat(per_clip, self.sampler.clip_length, axis=0)

        feed = self._pipeline.feed_input
        feed("frames", encoded)
        feed("anchor", per_frame(plan.box[ids, :2].astype(np.float32)))
        feed("shape", per_frame(plan.box[ids, 2:].astype(np.float32)))
        feed("mirror", per_frame(plan.mirror[ids].astype(np.int32)))
        feed("matrix", per_frame(np.ascontiguousarray(plan.colour[ids, :, :3])))
        feed("offset", per_frame(np.ascontiguousarray(plan.colour[ids, :, 3])))
        self._pipeline.schedule_run()
        self._in_flight = True

    def _outputs(self, ids: np.ndarray, plan: EpochPlan) -> torch.Tensor:
        self._in_flight = False
        stream = torch.cuda.current_stream().cuda_stream if self._device == "gpu" else None
        try:
            (images,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            raise ValueError(self._name_the_frame(ids, plan, str(error))) from None
        return torch.from_dlpack(images.as_tensor())

    def _name_the_frame(self, ids: np.ndarray, plan: EpochPlan, message: str) -> str:
        """Find the frame that broke the batch. DALI names a sample for some kinds of damage only, so decode again."""
        for video in ids.tolist():
            for frame in plan.frames[video].tolist():
                path = self.index.frame_path(video, frame)
                try:
                    with Image.open(path) as image:
                        image.load()
                except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged files
                    record = self.index.records[video]
                    reason = "file not found" if isinstance(error, FileNotFoundError) else "cannot be decoded"
                    return f"{record.source}: bad frame {path} of clip {record.name}: {reason}"
        names = ", ".join(self.index.records[v].name for v in ids)
        return f"decoding failed in one of the clips {names}: {' '.join(message.split())}"

    def _batch(self, images: torch.Tensor, ids: np.ndarray, valid: np.ndarray) -> Batch:
        clips = images.view(len(ids), self.sampler.clip_length, self._size, self._size, 3)
        return Batch(
            clips=clips.permute(0, 1, 4, 2, 3),  # a view: channels-last memory, as cuDNN and oneDNN like it
            labels=torch.from_numpy(self.index.labels[ids]).to(images.device, non_blocking=True),
            valid=torch.from_numpy(np.ascontiguousarray(valid)).to(images.device, non_blocking=True),
            ids=torch.from_numpy(np.ascontiguousarray(ids)),
        )
