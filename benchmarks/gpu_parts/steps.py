"""The training step on synthetic input: its speed, what of it is the card's work, and how far from the floor it is."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.floor import FLOORS, Counts, moved, read_counts
from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.ceilings import copy_rate, datasheet_flops, measured, product_rate
from benchmarks.gpu_parts.project import Batch, Step, free_card, replace_clips, synthetic, training_step
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import in_turns, ratios, repeated, wait
from benchmarks.gpu_parts.trace import traced, traced_operators

LARGE = 0.02  # share of the kernels' time from which on an operator is told
EAGER, FAST = "static eager", "static fast"  # names of steps whose figures others are held against
Options = Mapping[str, Any]  # of `training_step`


def clips_of(step: Step, batch: Batch) -> Callable[[], int]:
    """A run for the clock: one step, so many clips."""

    def run() -> int:
        step(batch)
        return len(batch.labels)

    return run


def input_of(setting: Setting, batch: int, options: Options) -> Batch:
    """What the step is given: noise, in bf16 where the option says that the loader would give it so."""
    made = synthetic(setting, batch)
    return replace_clips(made, made.clips.to(torch.bfloat16)) if options.get("bf16_input") else made


def warmed(setting: Setting, batch: int, options: Options) -> tuple[Step, Callable[[], int]]:
    """A step of a fresh model and its run, after those in which libraries choose, compilers compile, graphs begin."""
    free_card()
    step = training_step(setting, **options)
    run = clips_of(step, input_of(setting, batch, options))
    for _ in range(step.warm_up):
        run()
    wait(setting)
    return step, run


def name_of(step: str, batch: int) -> str:
    return f"step, {step}, B={batch}"


def speed(setting: Setting, name: str, options: Options, place: int) -> Iterator[Row]:
    """A step under some options, on the batch that stands at that place of the setting's.

    What libraries keep of a step outlives it: cuDNN's plans, which eager has chosen, would serve a step that is to look
    for better ones. So a process is for steps under the same options.
    """
    batch = setting.batches[place]
    step, run = warmed(setting, batch, options)
    began, worked = time.perf_counter(), step.worked_s()
    speeds = repeated(setting, run)
    took = time.perf_counter() - began
    more = beside_it(setting, run, speeds, batch, options)
    if worked is not None and (until := step.worked_s()) is not None:
        more["busy_by_events"] = (until - worked) / took
    yield figure(name_of(name, batch), speeds, "clips/s", **more)
    yield from over_eager(setting, name, batch, options)


def over_eager(setting: Setting, name: str, batch: int, options: Options) -> Iterator[Row]:
    """The ratio to eager's speed, which another process has measured; behind eager itself that of the fast step."""
    name = FAST if name == EAGER else name
    one, eager = (measured(setting, name_of(of, batch)) for of in (name, EAGER))
    if one and eager and not options.get("default"):  # of another model a ratio would say nothing
        yield figure(f"step, {name} over eager, B={batch}", one / eager, "times")


def busy(setting: Setting, name: str, options: Options, place: int) -> Iterator[Row]:
    """The busy share of a step. Once there is a trace in a process, no figure of speed comes after it there."""
    batch = setting.batches[place]
    _, run = warmed(setting, batch, options)
    for _ in range(setting.warm_up):
        run()
    clips_per_s = measured(setting, name_of(name, batch)) or float(np.median(repeated(setting, run)))
    yield traced_row(setting, name, run, batch, clips_per_s)


def traced_row(setting: Setting, name: str, run: Callable[[], int], batch: int, clips_per_s: float) -> Row:
    """The busy share of a step whose speed was measured without a trace."""
    seen = traced(setting, run)
    more = {"kernels_ms": 1000 * seen.kernels_s, "launches": seen.launches}
    return figure(f"busy share of a step, {name}, B={batch}", seen.busy_s * clips_per_s / batch, "of the step", **more)


def beside_it(
    setting: Setting, run: Callable[[], int], speeds: list[float], batch: int, options: Options
) -> dict[str, float | None]:
    """All that is told of a step beside its speed; docs/speed.md has the definitions."""
    step_s = batch / sorted(speeds)[len(speeds) // 2]
    counts, flops = read_counts(setting, bool(options.get("default"))), datasheet_flops(cuda.get_device_name())
    return {
        "ms": 1000 * step_s,
        **{f"share_of_{floor}_floor": least / step_s for floor, least in floors_of(setting, counts, batch).items()},
        "mfu": counts.flops(batch) / step_s / flops if flops else None,
        "peak_GiB": peak_bytes(run, bool(options.get("graph"))) / 2**30,
    }


def peak_bytes(run: Callable[[], int], graph: bool) -> int:
    """The memory of a step. What a graph needs is its own for good: a replay allocates nothing."""
    if graph:
        free_card()
        return cuda.memory_reserved()
    cuda.reset_peak_memory_stats()
    run()
    return cuda.max_memory_allocated()


def floors_of(setting: Setting, counts: Counts, batch: int) -> dict[str, float]:
    """The seconds that a step takes at least, by the copies and products that this card was seen to do."""
    rates = copy_rate(setting), product_rate(setting)
    return {floor: counts.seconds(floor, batch, *rates) for floor in FLOORS}


def floors(setting: Setting, default: bool) -> Iterator[Row]:
    """The most that the card could do, whatever computes the step."""
    model = "default" if default else "static"
    for batch in setting.batches:
        for floor, seconds in floors_of(setting, read_counts(setting, default), batch).items():
            yield figure(f"floor, {model}, {floor}, B={batch}", batch / seconds, "clips/s")


def share_of_crf(setting: Setting, options: Options) -> Iterator[Row]:
    """What the CRF costs: the step with it less the step without it, in turns; its kernels' sum beside it.

    That is of a step without a graph, in which nothing tells whose kernels are which.
    """
    batch, without = synthetic(setting, setting.batch), {**options, "crf": False}
    steps = {name: training_step(setting, **how) for name, how in (("with", options), ("without", without))}
    runs = {name: clips_of(step, batch) for name, step in steps.items()}
    for name, step in steps.items():
        for _ in range(step.warm_up):
            runs[name]()
    found = in_turns(setting, runs)
    shares = [1 - ratio for ratio in ratios(found, "with", "without")]
    _, one_by_one = warmed(setting, setting.batch, {**options, "graph": False})
    seen = traced(setting, one_by_one)
    step_ms = 1000 * setting.batch / sorted(found["with"])[setting.repeats // 2]
    more = {"ms": step_ms, "its_kernels_ms": 1000 * seen.crf_s}
    backend = options.get("crf_backend", "dense")
    yield figure(f"share of the CRF ({backend}) of a step, B={setting.batch}", shares, "of the step", **more)


def gain(setting: Setting, name: str, options: Options, base: Options) -> Iterator[Row]:
    """The speed of a step over that of another one, in turns: what a change of a few per cent is told by.

    On the most telling batch and on the one where launches cost most. Both steps ask cuDNN for the same plans.
    """
    for batch in setting.batches[:2]:
        runs = {how: warmed(setting, batch, given)[1] for how, given in (("with", options), ("without", base))}
        found = in_turns(setting, runs)
        yield figure(f"step, {name} over one without, B={batch}", ratios(found, "with", "without"), "times")


def operators(setting: Setting, name: str, options: Options) -> Iterator[Row]:
    """What of a step's kernels each operator is, where that is 2 % or more, and how near a copy's rate its bytes move.

    Steps are not graphs here, whose kernels belong to no operator.
    """
    batch = setting.batches[0]
    _, run = warmed(setting, batch, options)
    found = traced_operators(setting, run)
    total = sum(one.kernels_s for one in found)
    yield figure(
        f"kernels of a step, {name}, B={batch}", 1000 * total, "ms", launches=sum(one.launches for one in found)
    )
    for one in sorted(found, key=lambda one: -one.kernels_s):
        if one.kernels_s < LARGE * total or not one.kernels_s:
            break
        rate = one.moved / one.kernels_s
        more = {"ms": 1000 * one.kernels_s, "MB": one.moved / 1e6, "share_of_copy_rate": rate / copy_rate(setting)}
        more |= {"launches": one.launches, "longest": one.longest}
        yield figure(f"{one.name} in a step, {name}, B={batch}", one.kernels_s / total, "of the kernels", **more)


def counted(setting: Setting) -> Iterator[Row]:
    """What each model computes and moves for a clip, and for a step besides; kept for the cases that follow."""
    for default in (False, True):
        counts, model = read_counts(setting, default), "default" if default else "static"
        yield figure(f"computing, {model}", counts.flops(1), "FLOP a clip")
        for name in Counts._fields:
            a_step, a_clip = moved(getattr(counts, name))
            yield figure(f"bytes, {model}, {name}", a_clip, "B a clip", a_step_besides=a_step)


def warm(setting: Setting, options: Options) -> Iterator[Row]:
    """Take a step on each batch, so that Triton's kernels for it are in its cache; nothing is measured."""
    for batch in setting.batches:
        began = time.perf_counter()
        free_card()
        training_step(setting, **options)(synthetic(setting, batch))
        wait(setting)
        yield figure(f"warmed, B={batch}", time.perf_counter() - began, "s")
