"""The benchmark's picture: each kind of storage beside the field's own way and the limit of the machine."""

import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.engines import ALL_PEERS
from benchmarks.peers import CPU_LIMITS_OF, GPU_LIMITS_OF, source_of
from benchmarks.storage import SOURCES

REFERENCE = "pil-frames"  # the field's own way


def limits_of(device: str, source: str) -> list[str]:
    return (CPU_LIMITS_OF if device == "cpu" else GPU_LIMITS_OF)[source]


def draw(path: Path, report: dict, title: str) -> None:
    """Bars of clips/s for each kind of storage: ours, the best peer, the field's way; a line at the limit."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def median(name: str) -> float:
        return statistics.median(report["clips_per_s"].get(name) or [0.0])

    def best(names: Iterable[str]) -> tuple[float, str]:
        return max(((median(name), name) for name in names), default=(0.0, ""))

    device, reference = report["settings"]["device"], median(REFERENCE)
    shown_sources = [source for source in SOURCES if median(f"dfer-{source}")]
    rivals = {s: best(n for n in ALL_PEERS if source_of(n) == s and n != REFERENCE) for s in shown_sources}
    limits = {source: best(limits_of(device, source)) for source in shown_sources}
    tallest = max([median(f"dfer-{s}") for s in shown_sources] + [r[0] for r in rivals.values()] + [reference, 1e-9])
    # A limit far above all bars would flatten them: it is written at the edge instead.
    top = 1.15 * max([tallest] + [limit for limit, _ in limits.values() if limit < 2.5 * tallest])

    figure, axes = pyplot.subplots(figsize=(9.5, 4.8), layout="constrained")
    width, ticks = 0.27, []
    for x, source in enumerate(shown_sources):
        bars = [(median(f"dfer-{source}"), "#1b6ca8", "dfer"), (rivals[source][0], "#e39b3b", "best peer")]
        bars.append((reference, "#9a9a9a", "Pillow DataLoader, JPEG frames"))
        for offset, (height, colour, label) in zip((-width, 0, width), bars, strict=True):
            if height:
                axes.bar(x + offset, height, 0.94 * width, color=colour, label=label)
                spot = {"ha": "center", "va": "bottom", "fontsize": 9, "zorder": 3}
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # a line may cross it
                axes.text(x + offset, height + 0.015 * top, f"{height:,.0f}", bbox=behind, **spot)
        peer = rivals[source][1].removesuffix(f"-{source}")
        ticks.append(f"{source}\n(peer: {peer})" if rivals[source][0] else source)
        limit, name = limits[source]
        if limit:
            beyond = limit > top
            style, what = ":" if beyond else "-", "libjpeg-turbo or FFmpeg alone, whole pictures"
            axes.hlines(min(limit, top), x - 1.6 * width, x + 1.6 * width, "black", style, label=what)
            text = f"{name.removeprefix('limit-')} {limit:,.0f}{' (off the scale)' if beyond else ''}"
            # Above the line where the lowest bars are; of the last source beside it, where there is room.
            last = source == shown_sources[-1]
            place = {"ha": "left", "va": "center"} if last else {"ha": "right", "va": "bottom"}
            axes.text(x + (1.65 if last else 1.6) * width, min(limit, top), text, fontsize=8, **place)
    axes.set_xticks(range(len(shown_sources)), ticks)
    axes.set_ylabel("clips/s")
    axes.set_ylim(0, 1.08 * top)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # one of each label
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=150)
    os.replace(partial, path)
