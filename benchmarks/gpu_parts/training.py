"""Training from each source as a fraction of its speed on one batch that lies there: same step, same B, in turns."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_parts.project import Graph, Route, batches, clip_loader, training_step
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import in_turns, ratios


def from_source(
    setting: Setting,
    source: str,
    how: Mapping[str, Any],
    held: bool = False,
    batch: int | None = None,
    nvdec: int = 0,
    graph: Graph = "operators",
) -> Iterator[Row]:
    """The step, taken so, on what the loader brings, and on the first batch of it again and again."""
    loader = clip_loader(setting, source, Route(nvdec=nvdec, graph=graph), held=held, batch=batch)
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
    route = ", held in the card" if held else f", {graph}" if graph != "operators" else ""
    route += f", NVDEC, sessions: {nvdec}" if nvdec else ""
    where = f"{source}{route}, B={loader.options.batch_size}"
    yield figure(f"training from {where}", found["loaded"], "clips/s", host_waits_share=waited[0] / waited[1])
    yield figure(f"training from {where}: fraction of synthetic", ratios(found, "loaded", "synthetic"), "of synthetic")
