"""Training from each source as a fraction of its speed on one batch that lies there: same step, same B, in turns.

And for long: whether its memory stays.
"""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.project import Engine, Graph, Route, batches, clip_loader, training_step
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import in_turns, ratios, wait

MOST_MIB = 64.0  # that memory may grow by from the first quarter of many steps to their end
SMALL = 16  # clips of a batch of those


def from_source(
    setting: Setting,
    source: str,
    how: Mapping[str, Any],
    held: bool = False,
    batch: int | None = None,
    nvdec: int = 0,
    graph: Graph = "operators",
    engine: Engine = 0.0,
) -> Iterator[Row]:
    """The step, taken so, on what the loader brings, and on the first batch of it again and again."""
    route = Route(engine, nvdec, graph, torch.bfloat16)
    loader = clip_loader(setting, source, route, held=held, batch=batch)
    stream, step, waited = batches(loader), training_step(setting, **how), [0.0, 0.0]
    first = next(stream)

    def synthetic() -> int:
        step(first)
        return len(first.labels)

    def loaded() -> int:
        began = time.perf_counter()
        given = next(stream)
        waited[0] += time.perf_counter() - began
        step(given)
        waited[1] += time.perf_counter() - began
        return len(given.labels)

    for _ in range(step.warm_up):
        synthetic()
    found = in_turns(setting, {"synthetic": synthetic, "loaded": loaded})
    where = f"{source}{', held in the card' if held else route.told()}, B={loader.options.batch_size}"
    yield figure(f"training from {where}", found["loaded"], "clips/s", host_waits_share=waited[0] / waited[1])
    yield figure(f"training from {where}: fraction of synthetic", ratios(found, "loaded", "synthetic"), "of synthetic")


def soak(setting: Setting, how: Mapping[str, Any]) -> Iterator[Row]:
    """How much more memory is taken at the end of many steps than after a quarter of them, of the card and the host."""
    route = Route(graph="streamed", dtype=torch.bfloat16)
    stream = batches(clip_loader(setting, "raw128", route, batch=min(SMALL, setting.batch)))
    step, seen = training_step(setting, **how), []
    ends = (setting.soak_steps // 4, setting.soak_steps)
    for number in range(1, setting.soak_steps + 1):
        step(next(stream))
        if number in ends:
            wait(setting)
            seen.append((-cuda.mem_get_info()[0], own_memory()))
    card, host = ((end - quarter) / 2**20 for quarter, end in zip(*seen, strict=True))
    what = f"memory of the card from step {ends[0]} to {ends[1]}, B={min(SMALL, setting.batch)}"
    yield figure(what, card, "MiB more", host_MiB=host, right=card < MOST_MIB and host < MOST_MIB)


def own_memory() -> int:
    """The bytes of this process that are no file's: pages of shards that were read come and go."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
