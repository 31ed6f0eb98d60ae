"""Each source's loader alone, with the cores that it used; the CPU's loader on more and more cores; feeding DALI."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from benchmarks.gpu_parts.decoders import fed_pipeline, jpeg, jpeg_files
from benchmarks.gpu_parts.project import Engine, Graph, Route, batches, boxes, clip_loader, index_of, source_of
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import repeated
from benchmarks.quiet import Usage


def alone(
    setting: Setting,
    source: str,
    where: Literal["card", "cpu"] = "card",
    engine: Engine = 0.0,
    held: bool = False,
    batch: int | None = None,
    nvdec: int = 0,
    graph: Graph = "operators",
) -> Iterator[Row]:
    """The trainer's loader with nobody at work beside it."""
    route = Route(engine, nvdec, graph, torch.bfloat16 if where == "card" else torch.float32)
    loader = clip_loader(setting, source, route, where=where, held=held, batch=batch)
    stream = batches(loader)

    def run() -> int:
        return len(next(stream).labels)

    start = Usage.now()
    speeds = repeated(setting, run)
    used = Usage.now().since(start)
    what = f"loader, {source}{', held in the card' if held else ''}{route.told()}"
    what += f", CPU, cores: {setting.cores}" if where == "cpu" else ""
    what += f", B={loader.options.batch_size}"
    yield figure(what, speeds, "clips/s", cores_used=used["cpu_s"] / used["seconds"])


def on_cpu(setting: Setting, sources: Sequence[str]) -> Iterator[Row]:
    """The CPU's loader from some sources, and libjpeg-turbo alone, on the cores that this process may use."""
    for source in sources:
        yield from alone(setting, source, "cpu")
    yield from jpeg(replace(setting, gpu=False), ["cores"], {})


def feed(setting: Setting) -> Iterator[Row]:
    """What Python does for a clip whatever the decoder: reading, and handing arrays to DALI under the GIL."""
    clips = setting.loader_batch
    count = clips * setting.frames
    images = jpeg_files(setting, count)
    count = len(images)
    pipeline = fed_pipeline(count, ("source", "anchor", "shape"))
    cut = boxes(setting, clips).repeat(setting.frames, axis=0)[:count]
    times: dict[str, list[float]] = {"frames": [], "parameters": []}
    for _ in range(setting.warm_up + 10 * setting.repeats):
        began = time.perf_counter()
        pipeline.feed_input("source", images)
        between = time.perf_counter()
        pipeline.feed_input("anchor", np.ascontiguousarray(cut[:, :2]))
        pipeline.feed_input("shape", np.ascontiguousarray(cut[:, 2:]))
        times["frames"].append((between - began) / count)
        times["parameters"].append((time.perf_counter() - between) / count)
        pipeline.run()
    for name, seconds in times.items():
        settled = [1e6 * setting.frames * s for s in seconds[setting.warm_up :]]
        yield figure(f"feeding DALI: {name}", settled, "us a clip", samples=count)
    yield from reading(setting)


def reading(setting: Setting) -> Iterator[Row]:
    """Fetching a clip as the readers do, in one thread."""
    for source in ("frames", "shards144", "raw128"):
        index = index_of(setting, source, "short")
        fetch = source_of(index).fetch
        frames = np.arange(setting.frames)
        times = []
        for number in range(setting.warm_up + 10 * setting.repeats):
            video = number % len(index)
            began = time.perf_counter()
            fetch(video, frames % int(index.num_frames[video]))
            times.append(1e6 * (time.perf_counter() - began))
        yield figure(f"reading {source}, one thread", times[setting.warm_up :], "us a clip")
