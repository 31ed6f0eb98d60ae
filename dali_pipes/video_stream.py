"""Videos on a CPU, without DALI: each frame becomes a picture of its clip where FFmpeg has decoded it.

So nothing of a frame is copied, and the kernel finds it in the cache. A clip is one call of compiled code, in a thread.
"""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped

from dali_pipes import kernels
from dali_pipes.bad_clips import BadClips
from dali_pipes.feeding import STORED_AS
from dali_pipes.native import DONE, READING
from dali_pipes.options import LoaderOptions
from dali_pipes.stored import BadClip
from dali_pipes.streaming import Begun, Stream
from dali_pipes.torch_stages import Stages
from dali_pipes.video_files import VideoFiles
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import EpochPlan


@dataclass(frozen=True)
class _Clips(Begun):
    clips: Shaped[np.ndarray, "B T S S 3"]
    parameters: Float32[np.ndarray, "B P"]  # of the kernel


class VideoStream(Stream[_Clips]):
    """The clips of videos on a CPU: those of AHEAD batches are made at a time.

    Args:
        index: the videos.
        source: of `index`.
        bad: as of Stream.
        options: as of Stream.
    """

    def __init__(self, index: ClipIndex, source: VideoFiles, bad: BadClips, options: LoaderOptions):
        assert options.device == "cpu"
        super().__init__(index, bad, options)
        self._source, self._yuv = source, source.yuv()
        self._stored_as = STORED_AS.get(options.dtype, "float32")
        self._free: list[np.ndarray] = []

    def _num_parts(self, num_clips: int) -> int:
        return num_clips  # some take many times as long as others

    def _begun(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> _Clips:
        normalised = self._options.dtype != torch.uint8
        table = kernels.parameters(plan, rows, yuv=self._yuv[plan.video[rows]], normalised=normalised)
        return _Clips(rows, np.zeros(len(rows), np.uint8), self._memory(len(rows), plan.frames.shape[1]), table)

    def _memory(self, num_clips: int, length: int) -> Shaped[np.ndarray, "B T S S 3"]:
        """Return memory that nobody has any more: new memory takes as long to come as its clips to be resized."""
        size = self._options.size
        shape = (self._options.batch_size, length, size, size, 3)
        memory = self._free.pop() if self._free else np.empty(shape, self._stored_as)
        clips = memory[:num_clips]  # what whoever has the batch holds; a view of this is one of `memory`, and would not
        weakref.finalize(clips, self._free.append, memory).atexit = False
        return clips

    def _read_part(self, begun: _Clips, plan: EpochPlan, begin: int, end: int) -> None:
        for place in range(begin, end):
            row = begun.rows[place]
            begun.states[place] = READING
            try:
                self._source.write(int(plan.video[row]), plan.frames[row], begun.clips[place], begun.parameters[place])
            except BadClip as error:
                begun.bad[place] = error.alone()
            begun.states[place] = DONE

    def _clips(self, begun: _Clips, plan: EpochPlan, places: Int64[np.ndarray, " B"], stages: Stages) -> torch.Tensor:
        others = np.flatnonzero(places != np.arange(len(places)))
        begun.clips[others] = begun.clips[places[others]]
        return torch.from_numpy(begun.clips)
