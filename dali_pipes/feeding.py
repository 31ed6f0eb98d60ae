"""Feeding the DALI graph: what it needs for a batch is made from the plan, handed over, and its pictures taken out."""

import contextlib
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch.profiler import record_function

from dali_pipes import graphs, kernels, pixels
from dali_pipes.options import LoaderOptions
from dali_pipes.sources import Source, VideoFiles
from dali_pipes.torch_stages import DevicePlan, Stages
from dfer.lists.index import ClipIndex
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.plan.sampling import EpochPlan
from dfer.video.colour import yuv_to_rgb

_STORED_AS = {torch.float32: "float32", torch.bfloat16: "uint16", torch.uint8: "uint8"}  # by the kernel


class Epoch(NamedTuple):
    """What is drawn for one epoch."""

    plan: EpochPlan
    on_device: DevicePlan | None  # for the stages that the graph of DALI's operators leaves out; None with our kernels
    stages: Stages | None = None  # where a graph decodes and no more


class Feed:
    """The DALI pipeline of a loader: `start` a batch, then take its `pictures`. At most one batch is in flight.

    The pipeline reads the arrays that it is fed without a copy. They are held here until their pictures are taken, or
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
        self._yuv = source.yuv() if isinstance(source, VideoFiles) else None
        self._recolour = _from_bt601(index) if source.kind == "videos" else None
        self._stored_as = _STORED_AS.get(options.dtype, "float32") if options.fused else "float32"
        num_samples = options.batch_size * (1 if source.kind == "videos" else clip_length)
        if options.fused:
            self._build = partial(
                graphs.fused, source.kind, num_samples, options.size, self._stored_as, options.num_threads
            )
        elif options.route(index.source) == "decoded":
            gpu = options.device, options.device_id, options.jpeg_engine
            self._build = partial(graphs.decoded, num_samples, options.num_threads, *gpu)
        else:
            gpu = options.device, options.device_id, options.jpeg_engine
            self._build = partial(graphs.operators, source.kind, num_samples, options.size, options.num_threads, *gpu)
        self._pipeline = self._build()
        self._fed: list[np.ndarray | list[np.ndarray]] = []
        self._in_flight = False
        self._decodes: tuple[Epoch, Int64[np.ndarray, " B"]] | None = None  # rows whose frames are decoded

    def start(self, samples: list[np.ndarray], rows: Int64[np.ndarray, " B"], epoch: Epoch) -> None:
        """Start the graph on one clip for each of these rows of the plan, or on one frame for each.

        `samples` are what the source has fetched, clip after clip. If an earlier batch is in flight, its pictures must
        be taken first.
        """
        plan, repeat = epoch.plan, len(samples) // len(rows)
        videos = plan.video[rows]
        self._feed("source", samples)
        if epoch.stages is not None:
            self._decodes = epoch, rows  # the rest is done to what is decoded
        elif epoch.on_device is None:
            decoder_crops = self.source.kind == "images"
            yuv = None if self._yuv is None else self._yuv[videos]
            normalised = self._options.dtype != torch.uint8
            table = kernels.parameters(plan, rows, crop=not decoder_crops, yuv=yuv, normalised=normalised)
            self._feed("parameters", np.repeat(table, repeat, axis=0))
            if decoder_crops:
                self._feed_crop(plan, rows, repeat)
        else:
            self._feed_crop(plan, rows, repeat)
            # What must be warped or blurred first gets its colours after that.
            late = epoch.on_device.touches_geometry
            colour = np.tile(np.eye(3, 4, dtype=np.float32), (len(rows), 1, 1)) if late else plan.colour[rows]
            colour = colour if self._recolour is None else _compose(colour, self._recolour[videos])
            self._feed("mirror", np.repeat(plan.mirror[rows].astype(np.int32), repeat))
            self._feed("matrix", np.repeat(np.ascontiguousarray(colour[:, :, :3]), repeat, axis=0))
            self._feed("offset", np.repeat(np.ascontiguousarray(colour[:, :, 3]), repeat, axis=0))
            if self.source.kind == "videos":
                self._feed("frames", plan.frames[rows].astype(np.int32))
        self._pipeline.schedule_run()
        self._in_flight = True

    def _feed(self, name: str, data: np.ndarray | list[np.ndarray]) -> None:
        self._fed.append(data)
        self._pipeline.feed_input(name, data)

    def _feed_crop(self, plan: EpochPlan, rows: Int64[np.ndarray, " B"], repeat: int) -> None:
        box = np.repeat(plan.box[rows].astype(np.float32), repeat, axis=0)
        self._feed("anchor", np.ascontiguousarray(box[:, :2]))
        self._feed("shape", np.ascontiguousarray(box[:, 2:]))

    @record_function("DALI")
    def pictures(self) -> torch.Tensor:
        """Return the pictures of the batch that was started, (F, S, S, 3) or (B, T, S, S, 3), once they are done.

        Raises:
            RuntimeError: if DALI refuses the batch, which it does as a whole; the pipeline is built anew.
        """
        self._in_flight = False
        device = self._options.torch_device
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
        try:
            (pictures,) = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError:
            self._pipeline = self._build()  # what a pipeline does after an error is not documented
            raise
        finally:
            self._fed.clear()
        if self._decodes is None:
            return torch.from_dlpack(pictures.as_tensor())
        (epoch, rows), options = self._decodes, self._options
        assert epoch.stages is not None
        return pixels.of_decoded(pictures, epoch.plan, rows, epoch.stages, options.size, options.dtype)

    def drain(self) -> None:
        """Throw away a batch that was started and never asked for."""
        if self._in_flight:
            with contextlib.suppress(RuntimeError):
                self.pictures()

    def zeros(self, num_clips: int) -> torch.Tensor:
        """Return pictures of a batch without any clip that can be read."""
        shape = (num_clips * self._clip_length, self._options.size, self._options.size, 3)
        return torch.zeros(shape, dtype=getattr(torch, self._stored_as), device=self._options.torch_device)


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
