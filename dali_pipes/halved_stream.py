"""Images for a GPU, of which the cores decode one half and nvJPEG the other, at the same time.

In which half a frame is depends on its video and its number alone, whatever the batch: the two round in other ways.
"""

import contextlib
import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8

from dali_pipes import graphs, pixels
from dali_pipes.bad_clips import BadClips
from dali_pipes.feeding import Held, Refused, refusals, schedule
from dali_pipes.image_stream import Crops, ImageStream
from dali_pipes.options import AHEAD, LoaderOptions
from dali_pipes.reading import Files
from dali_pipes.sources import FrameFolders, Shards
from dali_pipes.stored import BadClip
from dali_pipes.torch_stages import Stages
from dfer.lists.index import ClipIndex
from dfer.plan.sampling import EpochPlan


class _Run:
    """A pipeline that is decoding. Who drops this has its pictures thrown away."""

    def __init__(self, number: int, dropped: list[int]):
        self.number = number
        self.taken = weakref.finalize(self, dropped.append, number).detach


class _Decoded(NamedTuple):
    """Pictures of some frames of a batch, in the memory of DALI."""

    frames: Int64[np.ndarray, " n"]  # which, of all B * T
    pictures: pixels.Decoded
    sizes: Int64[np.ndarray, "n 3"]


@dataclass(frozen=True)
class _Halves(Crops):
    files: dict[int, Files] = field(default_factory=dict)  # first place of a part -> those that nvJPEG decodes
    runs: list[_Run] = field(default_factory=list)  # one, once it is started
    decoded: list[_Decoded] = field(default_factory=list)
    refused: list[bool] = field(default_factory=list)  # True, if nvJPEG does not decode all

    def all_files(self) -> Files:
        """Return the files of all parts as one."""
        return _together([self.files[first] for first in sorted(self.files)])


class HalvedStream(ImageStream):
    """The clips of a source of images: every other frame of a clip is decoded by nvJPEG, on the SMs.

    On a CPU, for the tests, by DALI's own decoder.

    Args:
        index: the videos.
        source: of `index`.
        bad: as of Stream.
        options: as of Stream; clip_length: T.
    """

    def __init__(
        self, index: ClipIndex, source: FrameFolders | Shards, bad: BadClips, options: LoaderOptions, clip_length: int
    ):
        super().__init__(index, source, bad, options)
        gpu = options.device, options.device_id, 0.0
        self._build = partial(graphs.decoded, options.batch_size * clip_length, options.num_threads, *gpu)
        # One for each batch that may be read and not made, and one for what none was free for.
        self._pipelines = [self._build() for _ in range(AHEAD + 1)]
        self._inputs: list[Files | None] = [None] * len(self._pipelines)  # which they read without a copy
        self._idle, self._dropped = deque(range(AHEAD)), list[int]()
        self._held = Held()
        weakref.finalize(self, _end, self._pipelines, self._held, self._inputs)

    def _begun(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"]) -> _Halves:
        begun = super()._begun(plan, rows)
        return _Halves(rows, begun.states, begun.crops, by_nvjpeg(plan.video[rows], plan.frames[rows]))

    def _keep(self, begun: Crops, begin: int, end: int, files: Files) -> None:
        assert isinstance(begun, _Halves)
        rows = np.flatnonzero(begun.others[begin:end])
        if not len(rows):
            return
        # Not all that there are: other threads add theirs.
        kept = {place: iter(begun.kept[place]) for place in range(begin, end) if place in begun.kept}
        if kept:
            places = begin + rows // begun.others.shape[1]
            begun.files[begin] = _side_by_side(
                [
                    next(kept[place]) if place in kept else files.data[row, : files.lengths[row, 0]]
                    for place, row in zip(places.tolist(), rows.tolist(), strict=True)
                ]
            )
        else:
            longest = int(files.lengths[rows].max())
            begun.files[begin] = Files(files.data[rows, :longest], files.lengths[rows])

    def start(self, begun: Crops) -> None:
        """Have nvJPEG decode its half of a batch that is read, if a pipeline is free."""
        assert isinstance(begun, _Halves)
        while self._dropped:  # by who left an epoch early
            number = self._dropped.pop()
            with contextlib.suppress(Refused):
                self._pictures(number)
            self._idle.append(number)
        is_new = begun.files and not (begun.runs or begun.decoded or begun.refused)
        if self._idle and is_new and all(job.done() for job in begun.jobs):
            run = _Run(self._idle.popleft(), self._dropped)
            self._schedule(run.number, begun.all_files())
            begun.runs.append(run)

    def is_ready(self, begun: Crops) -> bool:
        """As Stream's. What nvJPEG has begun to decode is waited for; what it refuses is left for its turn."""
        assert isinstance(begun, _Halves)
        if not begun.fine:
            return False
        self.start(begun)
        self._take(begun)
        return not (begun.runs or begun.refused) and bool(begun.decoded or not begun.files)

    def _find_bad(self, begun: Crops, plan: EpochPlan) -> dict[int, BadClip]:
        assert isinstance(begun, _Halves)
        self._take(begun)
        if begun.files and not begun.decoded:
            whole = None if begun.refused else self._alone(np.flatnonzero(begun.others), begun.all_files())
            if whole is None:
                self._decode_one_by_one(begun, plan)
            else:
                begun.decoded.append(whole)
        return begun.bad

    def _take(self, begun: _Halves) -> None:
        """Take the pictures of a batch that was started; remember it if it was refused."""
        if begun.runs:
            run = begun.runs.pop()
            run.taken()
            try:
                begun.decoded.append(self._of(np.flatnonzero(begun.others), run.number))
            except Refused:  # the batch, as a whole
                begun.refused.append(True)
            finally:
                self._idle.append(run.number)

    def _decode_one_by_one(self, begun: _Halves, plan: EpochPlan) -> None:
        """Decode the clips of a batch that was refused, and of a clip that is refused its frames."""
        frames, files, length = np.flatnonzero(begun.others), begun.all_files(), begun.others.shape[1]
        for place in np.unique(frames // length).tolist():
            rows = np.flatnonzero(frames // length == place)
            clip = self._alone(frames[rows], Files(files.data[rows], files.lengths[rows]))
            if clip is not None:
                begun.decoded.append(clip)
                continue
            for row in rows.tolist():
                found = self._decode_frame(begun, plan, int(frames[row]), files.data[row, : files.lengths[row, 0]])
                if isinstance(found, BadClip):
                    begun.bad[place] = found
                    break
                begun.decoded.append(found)

    def _decode_frame(
        self, begun: _Halves, plan: EpochPlan, frame: int, data: UInt8[np.ndarray, " _"]
    ) -> _Decoded | BadClip:
        """Return a frame, of all B * T, or why there is none. What nvJPEG refuses, Python decodes from now on."""
        place, t = divmod(frame, begun.others.shape[1])
        row, frames = begun.rows[place], np.array([frame])
        video, number = int(plan.video[row]), int(plan.frames[row, t])
        found = self._alone(frames, _side_by_side([data]))
        if found is None:
            try:
                found = self._alone(frames, _side_by_side([self._source.refused(video, number, data)]))
            except BadClip as error:
                return error.alone()
        return found or BadClip(f"{self._source.name(video, number)}: cannot be decoded")

    def _alone(self, frames: Int64[np.ndarray, " n"], files: Files) -> _Decoded | None:
        """Return some frames of a batch, beside what was started; None if nvJPEG refuses one."""
        self._schedule(AHEAD, files)
        try:
            return self._of(frames, AHEAD)
        except Refused:
            return None

    def _schedule(self, number: int, files: Files) -> None:
        if self._inputs[number] is not None:  # nobody took what it was started on, because of an error
            self._pipelines[number] = self._build()
        self._inputs[number] = files
        schedule(self._pipelines[number], [("source", files.data), ("length", files.lengths)])

    def _of(self, frames: Int64[np.ndarray, " n"], number: int) -> _Decoded:
        pictures = self._pictures(number)
        return _Decoded(frames, pictures, np.array(pictures.shape(), dtype=np.int64).reshape(-1, 3))

    def _pictures(self, number: int) -> pixels.Decoded:
        """Return the pictures that a pipeline was started on, which our stream may read.

        Raises:
            Refused: if there is one that it does not decode.
        """
        stream = None if self._stream is None else self._stream.cuda_stream
        try:
            with refusals():
                (pictures,) = self._pipelines[number].outputs(cuda_stream=stream)
        except BaseException:
            self._pipelines[number] = self._build()  # what one does after an error is not documented
            raise
        finally:
            self._inputs[number] = None
        return pictures

    def _find_others(self, cuts: Int64[np.ndarray, "B T 4"], begun: Crops, plan: EpochPlan) -> None:
        assert isinstance(begun, _Halves)
        table, length = cuts.reshape(-1, 4), cuts.shape[1]
        for frames, pictures, sizes in begun.decoded:
            address = pixels.addresses(pictures, sizes)[:, None]
            box = plan.box[begun.rows[frames // length]]
            table[frames] = pixels.cut_out(address, sizes[:, :1], sizes[:, 1:2], box)[:, 0]

    def _clips(self, begun: Crops, plan: EpochPlan, places: Int64[np.ndarray, " B"], stages: Stages) -> torch.Tensor:
        assert isinstance(begun, _Halves)
        clips = super()._clips(begun, plan, places, stages)
        if self._stream is not None and begun.decoded:
            done, num_bytes = torch.cuda.Event(), sum(int(sizes.prod(1).sum()) for *_, sizes in begun.decoded)
            done.record(self._stream)
            self._held.add(done, begun.decoded, num_bytes)
        return clips


def by_nvjpeg(videos: Int64[np.ndarray, " B"], frames: Int64[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Return which frames nvJPEG decodes: every other one of a video."""
    return (videos[:, None] + frames) % 2 == 0


def _side_by_side(files: list[UInt8[np.ndarray, " _"]]) -> Files:
    """Return some files as one array."""
    lengths = np.array([[len(file)] for file in files], dtype=np.int32)
    data = np.empty((len(files), int(lengths.max())), np.uint8)
    for row, file in zip(data, files, strict=True):
        row[: len(file)] = file
    return Files(data, lengths)


def _together(parts: list[Files]) -> Files:
    """Return the files of some parts as one."""
    data = np.empty((sum(len(part.data) for part in parts), max(part.data.shape[1] for part in parts)), np.uint8)
    first = 0
    for part in parts:
        data[first : first + len(part.data), : part.data.shape[1]] = part.data
        first += len(part.data)
    return Files(data, np.concatenate([part.lengths for part in parts]))


def _end(pipelines: list[Any], held: Held, *_: object) -> None:
    """End pipelines, which wait for what they are doing, before what they read is released."""
    held.clear()
    pipelines.clear()
