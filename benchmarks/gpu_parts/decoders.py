"""Decoders alone: nvJPEG, the JPEG engine, NVDEC, libjpeg-turbo, FFmpeg; from memory, and again beside the step.

"The decoder's limit" is what a decoder does while the synthetic step runs on the card: with nothing beside it nobody
trains. Nothing of the loader takes part; DALI's operators are called as bare as they can be.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, StreamPolicy
from nvidia.dali.tensors import TensorCPU
from torch import Tensor

from benchmarks.gpu_parts import nvdec
from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.ffmpeg import FFmpeg
from benchmarks.gpu_parts.project import beside, boxes, index_of
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import ENGINES_OF_H100, NotHere, Setting
from benchmarks.gpu_parts.timing import at_once

Where = Literal["sms", "engine", "both", "cores"]
ENGINE = {"sms": 0.0, "engine": 1.0, "both": 0.65, "cores": 0.0}  # share of the images that the JPEG engine decodes
CROP = {"normalized_anchor": True, "normalized_shape": True, "axes": [0, 1]}
IMAGES_AT_ONCE = 1024
# No allocation while it runs, and the chroma of the CPU's decoder: as the loader has it.
HINTS = {"preallocate_width_hint": 256, "preallocate_height_hint": 256, "jpeg_fancy_upsampling": True}
READER_SIDE = 896  # px; what reads a decoder's pixels in the graph takes long then


def jpeg_files(setting: Setting, count: int) -> list[np.ndarray]:
    """The bytes of that many frames, of clip after clip."""
    index = index_of(setting, "frames", "short")
    places = ((v, f) for v, frames in enumerate(index.num_frames.tolist()) for f in range(frames))
    return [np.fromfile(index.frame_path(v, f), dtype=np.uint8) for v, f in itertools.islice(places, count)]


def jpeg_pipeline(
    setting: Setting, images: Sequence[np.ndarray], where: Where, crop: bool = False, at_once: int = IMAGES_AT_ONCE
) -> Pipeline:
    """Decode the images over and over, `at_once` in a batch; with `crop` only what training would take of each."""
    batch = min(at_once, len(images))
    cut = boxes(setting, len(images))
    parts = {"source": images, "anchor": np.ascontiguousarray(cut[:, :2]), "shape": np.ascontiguousarray(cut[:, 2:])}
    turns = {name: itertools.cycle(ready(part, batch)) for name, part in parts.items()}
    card = where != "cores"
    device = "mixed" if card and setting.device == "cuda" else "cpu"
    options = {"device": device}
    if card:
        options |= {"hw_decoder_load": ENGINE[where], **HINTS}

    def fed(name: str) -> object:
        return fn.external_source(source=lambda: next(turns[name]), batch=True, no_copy=True)

    pipeline = Pipeline(batch, setting.cores, 0 if setting.device == "cuda" else None, prefetch_queue_depth=2)
    with pipeline:
        encoded = fed("source")
        if crop:
            pixels = fn.decoders.image_slice(encoded, fed("anchor"), fed("shape"), **CROP, **options)
        else:
            pixels = fn.decoders.image(encoded, **options)
        pipeline.set_outputs(pixels)
    pipeline.build()
    return pipeline


def ready(arrays: Sequence[np.ndarray], batch: int) -> list[list[TensorCPU]]:
    """Batches as DALI takes them without looking at each array, so that a decoder's limit is not that of feeding it."""
    starts = range(0, len(arrays) - batch + 1, batch)
    return [[TensorCPU(array) for array in arrays[start : start + batch]] for start in starts]


def fed_pipeline(count: int, names: Sequence[str]) -> Pipeline:
    """A graph that passes on what it is fed, to see what feeding costs."""
    pipeline = Pipeline(count, 1, None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(*(fn.external_source(name=name, batch=True, no_copy=True) for name in names))
    pipeline.build()
    return pipeline


def image_batches(
    setting: Setting, groups: Sequence[Sequence[np.ndarray]], engine: float, depth: int, read_in_graph: bool = False
) -> Iterator[Tensor]:
    """The pixels of each group of images, all of one size, as the decoder left them; `depth` groups are under way.

    With `read_in_graph` they are what a slow operator made of them on the decoder's own stream: what the decoder wrote
    into is free for the next batch as soon as that operator is queued.
    """
    card = setting.device == "cuda"
    policy = StreamPolicy.SINGLE if read_in_graph else None
    place = 0 if card else None
    pipeline = Pipeline(len(groups[0]), setting.cores, place, prefetch_queue_depth=depth, stream_policy=policy)
    with pipeline:
        encoded = fn.external_source(name="source", batch=True, no_copy=True)
        pixels = fn.decoders.image(encoded, device="mixed" if card else "cpu", hw_decoder_load=engine, **HINTS)
        pipeline.set_outputs(fn.resize(pixels, size=[READER_SIDE, READER_SIDE]) if read_in_graph else pixels)
    pipeline.build()
    for group in groups[:depth]:
        pipeline.feed_input("source", list(group))
    pipeline.schedule_run()  # the first time as many as the queue is deep
    for number in range(len(groups)):
        # No name for them here: their memory is free for the next batch as soon as the caller lets go.
        yield pixels_of(pipeline, cuda.current_stream().cuda_stream if card else None)
        if number + depth < len(groups):
            pipeline.feed_input("source", list(groups[number + depth]))
            pipeline.schedule_run()


def pixels_of(pipeline: Pipeline, stream: int | None) -> Tensor:
    (pixels,) = pipeline.outputs(cuda_stream=stream)
    return torch.from_dlpack(pixels.as_tensor())  # as the loader does it


def counted(pipeline: Pipeline, units: int) -> Callable[[], int]:
    def run() -> int:
        pipeline.run()
        return units

    return run


def jpeg(setting: Setting, where: list[Where], how: Mapping[str, Any], crop: bool = False) -> Iterator[Row]:
    """Images that decoders make at the same time, in clips; then the same beside the step, which is taken so."""
    images = jpeg_files(setting, setting.images)
    batch = min(IMAGES_AT_ONCE, len(images))
    runs = {name: counted(jpeg_pipeline(setting, images, name, crop), batch) for name in where}
    what = f"JPEG, {'crops only' if crop else 'whole frames'}: {' + '.join(where)}"
    kilobytes = sum(map(len, images)) / len(images) / 1000
    yield from alone_and_beside(setting, what, runs, setting.frames, how, kB_an_image=kilobytes)


def alone_and_beside(
    setting: Setting,
    what: str,
    runs: dict[str, Callable[[], int]],
    per_clip: float,
    how: Mapping[str, Any],
    **more: object,
) -> Iterator[Row]:
    """Rows of what runs give at the same time: by themselves and, where there is a card, beside the step."""
    at_once(setting, runs)  # warms up
    yield from _rows(setting, what, runs, None, per_clip, more)
    if setting.gpu:
        step = beside(setting, how)
        for _ in range(2 * setting.warm_up):
            step()
        yield from _rows(setting, f"{what}, beside the step", runs, step, per_clip, more)


def _rows(
    setting: Setting, what: str, runs: dict, step: Callable[[], int] | None, per_clip: float, more: dict
) -> Iterator[Row]:
    found = [at_once(setting, runs, step) for _ in range(setting.repeats)]
    totals = [sum(rates.values()) / per_clip for rates, _ in found]
    parts = {}
    if len(runs) > 1:
        parts = {f"of {name}": float(np.median([rates[name] for rates, _ in found])) / per_clip for name in runs}
    if step is not None:
        parts["step_clips_per_s"] = float(np.median([rate for _, rate in found]))
    yield figure(what, totals, "clips/s", **parts, **more)


def video_files(setting: Setting) -> tuple[list[np.ndarray], float]:
    """The bytes of all videos, and how many frames one has on average."""
    index = index_of(setting, "video", "short")
    files = [np.fromfile(record.path, dtype=np.uint8) for record in index.records]
    return files, float(index.num_frames.mean())


def video_pipeline(setting: Setting, files: Sequence[np.ndarray]) -> Pipeline:
    """Decode whole videos over and over: one session."""
    batch = min(setting.loader_batch, len(files))
    groups = itertools.cycle(ready(files, batch))
    device = "mixed" if setting.device == "cuda" else "cpu"
    pipeline = Pipeline(batch, setting.cores, 0 if device == "mixed" else None, prefetch_queue_depth=2)
    with pipeline:
        encoded = fn.external_source(source=lambda: next(groups), batch=True, no_copy=True)
        pipeline.set_outputs(fn.decoders.video(encoded, device=device))
    pipeline.build()
    return pipeline


def videos(setting: Setting, sessions: int | None, how: Mapping[str, Any]) -> Iterator[Row]:
    """Whole videos through NVDEC, by so many sessions; None: as many as the card has engines."""
    if sessions is None:
        limits = nvdec.limits(setting)
        yield from nvdec.rows(limits)
        sessions = max((limit.engines for limit in limits), default=ENGINES_OF_H100)
    files, frames = video_files(setting)
    batch = min(setting.loader_batch, len(files))
    runs = {f"session {i + 1}": counted(video_pipeline(setting, files), batch) for i in range(sessions)}
    what = f"H.264, whole videos: NVDEC, {sessions} session{'s' * (sessions > 1)}"
    yield from alone_and_beside(setting, what, runs, 1, how, frames_a_video=frames)


def videos_on_cores(setting: Setting, how: Mapping[str, Any]) -> Iterator[Row]:
    """Whole videos through FFmpeg, one process on each core."""
    index = index_of(setting, "video", "short")
    paths = [str(record.path) for record in index.records]
    if not paths:
        raise NotHere("no videos")
    with FFmpeg(paths, setting.cores) as ffmpeg:
        what, frames = f"H.264, whole videos: FFmpeg on {setting.cores} cores", float(index.num_frames.mean())
        yield from alone_and_beside(setting, what, {"FFmpeg": ffmpeg.decoded}, 1, how, frames_a_video=frames)
