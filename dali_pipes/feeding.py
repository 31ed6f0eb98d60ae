"""Feeding the DALI graph: what it needs for a batch is made from the plan, handed over, and its pictures taken out."""

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from nvidia.dali.pipeline import Pipeline
from torch._C._profiler import _RecordFunctionFast

from dali_pipes import graphs, jpeg, kernels, pixels
from dali_pipes.options import LoaderOptions
from dali_pipes.reading import Files, Pictures, Samples
from dali_pipes.sources import Source
from dali_pipes.torch_stages import DevicePlan, Stages
from dfer.lists.index import ClipIndex
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.plan.sampling import EpochPlan
from dfer.video.colour import yuv_to_rgb

# Batches of decoded pixels that a GPU has yet to read, and their bytes, at most: the host is no further ahead. One of
# them may have more bytes.
HELD, HELD_BYTES = 4, 2**32
# Samples of a batch for each thread, at least: the last one has the other threads wait.
_SHARES = 32
STORED_AS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.uint8: "uint8"}  # by the kernel


class Refused(RuntimeError):
    """A batch that DALI has refused. No other error is a clip's fault: not that of a full GPU, nor of our kernels."""


class Epoch(NamedTuple):
    """What is drawn for one epoch."""

    plan: EpochPlan
    on_device: DevicePlan | None  # for the stages that the graph of DALI's operators leaves out; None with our kernels
    stages: Stages | None = None  # where a graph decodes and no more


_Rows: TypeAlias = Int64[np.ndarray, " B"]  # of the plan
_Inputs: TypeAlias = list[tuple[str, np.ndarray | list[np.ndarray]]]  # name and data of each input of the graph


class _Started(NamedTuple):
    """A batch that a pipeline has, with what must be held for it."""

    pipeline: int
    rows: _Rows
    epoch: Epoch
    inputs: _Inputs
    samples: Samples
    others: Int64[np.ndarray, " P"]  # places of the frames that the graph `sliced` is making


class _Sliced:
    """The graph of frames that DALI decodes, built when there are any: `start`, then take the `pictures`."""

    def __init__(self, build: Callable[[], Pipeline]):
        self._build = build
        self._pipeline: Pipeline | None = None  # before what it reads: so it ends before that is released
        self._inputs: _Inputs = []

    def start(self, inputs: _Inputs) -> None:
        """Start the graph on some frames; those of before, if nobody took them because of an error, are dropped."""
        if self._inputs or self._pipeline is None:
            self._pipeline = self._build()
        self._inputs = inputs  # behind the pipeline that may read those of before, and has ended
        schedule(self._pipeline, inputs)

    def pictures(self) -> np.ndarray:
        """Return the frames that were started.

        Raises:
            Refused: as `Feed.pictures`.
        """
        assert self._pipeline is not None
        try:
            with refusals():
                (pictures,) = self._pipeline.outputs()
        except Refused:
            self._pipeline = None
            raise
        finally:
            self._inputs = []
        return pictures.as_array()


class Held:
    """What DALI has decoded for our kernel, until that has read it, as DALI's memory knows nothing of torch's streams.

    Handed over as a tensor, it would have a thread of DALI's wait for the whole device when that is dropped.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[torch.cuda.Event, object, int]] = deque()

    def add(self, done: torch.cuda.Event, pictures: object, num_bytes: int) -> None:
        """Hold a batch until an event has come; wait for the oldest ones if there are too many."""
        self._batches.append((done, pictures, num_bytes))
        while self._batches and (self._batches[0][0].query() or self._too_many()):
            self._drop()

    def clear(self) -> None:
        """Wait for all."""
        while self._batches:
            self._drop()

    def _too_many(self) -> bool:
        count = len(self._batches)
        return count > HELD or (count > 1 and sum(num_bytes for *_, num_bytes in self._batches) > HELD_BYTES)

    def _drop(self) -> None:
        self._batches[0][0].synchronize()  # before the pixels are dropped
        self._batches.popleft()


class Feed:
    """The DALI pipelines of a loader: `start` batches, at most one for each, then take the `pictures` of each in turn.

    A pipeline reads the arrays that it is fed without a copy. They are held here until their pictures are taken, or
    the pipeline has ended: whether it holds them itself after an error is not documented.

    Args:
        index: the videos.
        source: of `index`.
        clip_length: T.
        options: of the loader.
    """

    def __init__(self, index: ClipIndex, source: Source, clip_length: int, options: LoaderOptions):
        self.source = source
        self._clip_length, self._options = clip_length, options
        self._recolour = _from_bt601(index) if source.kind == "videos" else None
        self._stored_as = STORED_AS.get(options.dtype, "float32") if options.fused else "float32"
        num_samples = options.batch_size * (1 if source.kind == "videos" else clip_length)
        if options.fused:
            picture = options.size, self._stored_as, options.num_threads
            self._build = partial(graphs.fused, source.kind, num_samples, *picture)
            self._sliced = [_Sliced(partial(graphs.sliced, num_samples, *picture)) for _ in range(options.depth)]
            self._has_others = False  # whether our kernel has refused a frame: until then, none is looked for
        elif options.route(index.source) == "decoded":
            assert options.jpeg_engine is not None, "what the cores decode is streamed"
            gpu = options.device, options.device_id, options.jpeg_engine
            self._build = partial(graphs.decoded, num_samples, options.num_threads, *gpu)
        else:
            gpu = options.device, options.device_id, options.jpeg_engine
            self._build = partial(graphs.operators, source.kind, num_samples, options.size, options.num_threads, *gpu)
        # Several pipelines, as one that has a queue wants it to be full before it begins.
        self._pipelines = [self._build() for _ in range(options.depth)]
        self._idle = deque(range(options.depth))
        self._in_flight: deque[_Started] = deque()
        self._read = Held()
        # Our kernels read memory whose addresses they were given: they must have ended before that is released.
        weakref.finalize(self, _end, self._pipelines, self._read, self._in_flight, source)

    def start(self, samples: Samples, rows: Int64[np.ndarray, " B"], epoch: Epoch) -> None:
        """Start the graph on one clip for each of these rows of the plan, or on one frame for each.

        `samples` are what the source has fetched, clip after clip. One of the pipelines must be idle.
        """
        self._in_flight.append(self._started(self._idle.popleft(), samples, rows, epoch))

    def alone(self, samples: Samples, rows: Int64[np.ndarray, " B"], epoch: Epoch) -> torch.Tensor:
        """Return the pictures of clips or frames, past the batches that were started, on an idle pipeline.

        Raises:
            Refused: as `pictures`.
        """
        return self._outputs(self._started(self._idle[0], samples, rows, epoch))

    def _started(self, pipeline: int, samples: Samples, rows: _Rows, epoch: Epoch) -> "_Started":
        samples = self._as_fed(samples)
        inputs, others = self._inputs(samples, rows, epoch), np.empty(0, np.int64)
        schedule(self._pipelines[pipeline], inputs)
        if self._options.fused and isinstance(samples, Files) and self._has_others:
            others = jpeg.of_other_kinds(*samples)
        if len(others):
            self._sliced[pipeline].start(self._slices(samples, others, rows, epoch))
        return _Started(pipeline, rows, epoch, inputs, samples, others)

    def _inputs(self, samples: Samples, rows: Int64[np.ndarray, " B"], epoch: Epoch) -> _Inputs:
        """Return what the graph is fed for one clip of each row, or one frame."""
        plan, repeat = epoch.plan, len(samples[0] if isinstance(samples, tuple) else samples) // len(rows)
        videos = plan.video[rows]
        if self._options.fused:
            table = kernels.parameters(plan, rows, normalised=self._options.dtype != torch.uint8)
            source, repeat = _together(samples, len(rows), self._options.num_threads)
            return [("source", source), ("parameters", np.repeat(table, repeat, axis=0))]
        inputs = _sample_inputs(samples, lengths=self.source.kind == "images")
        if epoch.on_device is None:
            return inputs  # the rest is done to what is decoded
        inputs += _crop_inputs(plan, rows, repeat)
        # What must be warped or blurred first gets its colours after that.
        late = epoch.on_device.touches_geometry
        colour = np.tile(np.eye(3, 4, dtype=np.float32), (len(rows), 1, 1)) if late else plan.colour[rows]
        colour = colour if self._recolour is None else _compose(colour, self._recolour[videos])
        inputs.append(("mirror", np.repeat(plan.mirror[rows].astype(np.int32), repeat)))
        inputs.append(("matrix", np.repeat(np.ascontiguousarray(colour[:, :, :3]), repeat, axis=0)))
        inputs.append(("offset", np.repeat(np.ascontiguousarray(colour[:, :, 3]), repeat, axis=0)))
        if self.source.kind == "videos":
            inputs.append(("frames", plan.frames[rows].astype(np.int32)))
        return inputs

    def _as_fed(self, samples: Samples) -> Samples:
        """Return samples in a form that the graph takes: our kernel wants to know where pictures lie."""
        addressed = self._options.fused and self.source.kind == "pixels"
        return Pictures.of(samples) if addressed and isinstance(samples, list) else samples

    def pictures(self) -> torch.Tensor:
        """Return the pictures of the batch that was started, (F, S, S, 3) or (B, T, S, S, 3), once they are done.

        Raises:
            Refused: if DALI refuses the batch, which it does as a whole; the pipeline is built anew.
        """
        with _RecordFunctionFast("DALI"):
            started = self._in_flight.popleft()
            self._idle.append(started.pipeline)
            return self._outputs(started)

    def _outputs(self, started: "_Started") -> torch.Tensor:
        device, epoch = self._options.torch_device, started.epoch
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        try:
            with refusals():
                pictures, *refused = self._pipelines[started.pipeline].outputs(cuda_stream=stream)
        except Refused:
            self._pipelines[started.pipeline] = self._build()  # what one does after an error is not documented
            raise
        if epoch.stages is None:
            frames = torch.from_dlpack(pictures.as_tensor())
            if self._options.fused:
                frames = frames.flatten(0, 1)
            if refused:
                self._replace(frames.numpy(), np.flatnonzero(refused[0].as_array()), started)
            return frames
        sizes = np.array(pictures.shape(), dtype=np.int64).reshape(len(started.rows), -1, 3)
        size, dtype = self._options.size, self._options.dtype
        clips = pixels.of_decoded(pictures, sizes, epoch.plan, started.rows, epoch.stages, size, dtype, device)
        if device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            self._read.add(done, pictures, int(sizes.prod(2).sum()))
        return clips

    def _replace(self, frames: np.ndarray, refused: Int64[np.ndarray, " P"], started: "_Started") -> None:
        """Set the frames in these places, which our kernel does not decode, to what DALI makes of them.

        Those of other kinds are being made already, but for the first ones; the rest is damaged, or turns out to be odd
        behind its header.
        """
        if not len(refused):
            return
        sliced, self._has_others = self._sliced[started.pipeline], True
        if len(started.others):
            frames[started.others] = sliced.pictures()
            refused = np.setdiff1d(refused, started.others)
        if len(refused):
            sliced.start(self._slices(started.samples, refused, started.rows, started.epoch))
            frames[refused] = sliced.pictures()

    def _slices(self, samples: Samples, places: Int64[np.ndarray, " P"], rows: _Rows, epoch: Epoch) -> _Inputs:
        """Return what the graph `sliced` is fed for the samples in these places."""
        assert not isinstance(samples, Pictures)
        repeat = len(samples[0] if isinstance(samples, tuple) else samples) // len(rows)
        normalised = self._options.dtype != torch.uint8
        table = kernels.parameters(epoch.plan, rows, crop=False, normalised=normalised)
        source = samples.data[places] if isinstance(samples, Files) else [samples[place] for place in places.tolist()]
        inputs: _Inputs = [("source", source), ("parameters", table[places // repeat])]
        return inputs + [(name, data[places]) for name, data in _crop_inputs(epoch.plan, rows, repeat)]

    def drain(self) -> None:
        """Throw away batches that were started and never asked for."""
        while self._in_flight:
            with contextlib.suppress(Refused):
                self.pictures()

    def zeros(self, num_clips: int) -> torch.Tensor:
        """Return pictures of a batch without any clip that can be read."""
        shape = (num_clips * self._clip_length, self._options.size, self._options.size, 3)
        return torch.zeros(shape, dtype=getattr(torch, self._stored_as), device=self._options.torch_device)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raise DALI's errors as Refused."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise Refused(*error.args) from error


def _together(
    samples: Samples, num_clips: int, num_threads: int
) -> tuple[UInt8[np.ndarray, "S G L"] | Int64[np.ndarray, "S G 4"] | list[np.ndarray], int]:
    """Return the samples of the graph `fused`, G frames of a clip each, and how many a clip has."""
    if isinstance(samples, list):
        return [file[None] for file in samples], len(samples) // num_clips
    data = samples[0]
    length, most = len(data) // num_clips, len(data) // (_SHARES * num_threads)
    frames = max(n for n in range(1, length + 1) if length % n == 0 and n <= max(most, 1))
    return data.reshape(-1, frames, data.shape[1]), length // frames


def _sample_inputs(samples: Samples, *, lengths: bool) -> _Inputs:
    """Return the inputs of the graph that are what was fetched; `lengths`: also of files."""
    if isinstance(samples, Pictures):
        return [("source", samples.table)]
    if isinstance(samples, Files):
        return [("source", samples.data), *([("length", samples.lengths)] if lengths else [])]
    sizes = np.array([[len(file)] for file in samples], dtype=np.int32)
    return [("source", samples), *([("length", sizes)] if lengths else [])]


def _crop_inputs(plan: EpochPlan, rows: _Rows, repeat: int) -> list[tuple[str, np.ndarray]]:
    box = np.repeat(plan.box[rows].astype(np.float32), repeat, axis=0)
    return [("anchor", np.ascontiguousarray(box[:, :2])), ("shape", np.ascontiguousarray(box[:, 2:]))]


def schedule(pipeline: Pipeline, inputs: _Inputs) -> None:
    """Start a pipeline on its inputs, which have to be held until its outputs are there."""
    for name, data in inputs:
        pipeline.feed_input(name, data)
    pipeline.schedule_run()


def _end(pipelines: list[Pipeline], read: Held, *_: object) -> None:
    """End pipelines, which wait for what they are doing, before the other arguments are released."""
    read.clear()
    pipelines.clear()


def _from_bt601(index: ClipIndex) -> Float32[np.ndarray, "N 3 4"]:
    """Return maps from the RGB of DALI's decoder, which takes all streams for BT.601, to the right RGB."""
    store, maps = index.store, {}
    assert isinstance(store, VideoStore)
    rows = np.empty((len(store.matrix), 3, 4), dtype=np.float32)
    for video, kind in enumerate(zip(store.matrix.tolist(), store.full_range.tolist(), strict=True)):
        if kind not in maps:
            true, taken = yuv_to_rgb(*kind), yuv_to_rgb("bt601", kind[1])
            back = np.linalg.inv(taken[:, :3]) @ np.concatenate([np.eye(3), -taken[:, 3:]], axis=1)
            maps[kind] = _compose(true[None], back[None])[0]
        rows[video] = maps[kind]
    return rows


def _compose(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the (B, 3, 4) affine maps that apply `first`, then `second`."""
    both = second[:, :, :3] @ first
    both[:, :, 3] += second[:, :, 3]
    return both
