"""The training step on synthetic input: its speed, what of it is the card's work, and how far from the floor it is."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.floor import Counts, floor_seconds, read_counts
from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.ceilings import copy_rate, datasheet_flops
from benchmarks.gpu_parts.project import Batch, Step, free_card, replace_clips, synthetic, training_step
from benchmarks.gpu_parts.rows import Row, figure, read
from benchmarks.gpu_parts.setting import NotHere, Setting
from benchmarks.gpu_parts.timing import in_turns, ratios, repeated
from benchmarks.gpu_parts.trace import traced, traced_operators

LARGE = 0.02  # share of the kernels' time from which on an operator is told


def clips_of(step: Step, batch: Batch) -> Callable[[], int]:
    """A run for the clock: one step, so many clips."""

    def run() -> int:
        step(batch)
        return len(batch.labels)

    return run


def input_of(setting: Setting, batch: int, options: dict[str, Any]) -> Batch:
    """What the step is given: noise, in bf16 where the option says that the loader would give it so."""
    made = synthetic(setting, batch)
    return replace_clips(made, made.clips.to(torch.bfloat16)) if options.get("bf16_input") else made


def eager(setting: Setting, place: int) -> Iterator[Row]:
    """The step as it is, with the batch that stands at that place of the setting's."""
    batch = setting.batches[place]
    run = clips_of(training_step(setting), synthetic(setting, batch))
    speeds = repeated(setting, run)
    yield figure(name_of("eager", batch), speeds, "clips/s", **beside_it(setting, run, speeds, batch))


def name_of(step: str, batch: int) -> str:
    return f"step, {step}, B={batch}"


def measured_eager(setting: Setting, batch: int) -> float | None:
    """The speed of the eager step, in clips/s, as its case has found it in a process of its own."""
    found, _ = read(setting.out / "results.jsonl")
    told = [row["value"] for row in found if row.get("what") == name_of("eager", batch)]
    return told[-1] if told else None


def traces(setting: Setting) -> Iterator[Row]:
    """What the card does in an eager step of each batch size. Once there is a trace, no figure of speed comes after."""
    for batch in setting.batches:
        run = clips_of(training_step(setting), synthetic(setting, batch))
        speed = measured_eager(setting, batch) or float(np.median(repeated(setting, run)))
        yield traced_row(setting, "eager", run, batch, speed)
        del run
        free_card()


def variant(setting: Setting, name: str, options: dict[str, Any], places: tuple[int, ...]) -> Iterator[Row]:
    """A step under some options, in a process that has taken no other, over eager's speed if that is known.

    What libraries keep of a step outlives it: cuDNN's plans, which eager has chosen, would serve a step that is to look
    for better ones.
    """
    batches = [setting.batches[place] for place in places if place < len(setting.batches)]
    for batch in batches:
        run = clips_of(training_step(setting, **options), input_of(setting, batch, options))
        speeds = repeated(setting, run)
        yield figure(name_of(name, batch), speeds, "clips/s", **beside_it(setting, run, speeds, batch))
        if base := measured_eager(setting, batch):
            yield figure(f"step, {name} over eager, B={batch}", [speed / base for speed in speeds], "times")
        if batch == batches[-1] and not options.get("default"):  # the floors are those of the first version's model
            yield traced_row(setting, name, run, batch, float(np.median(speeds)))
        del run
        free_card()
        if options.get("compiled"):
            torch.compiler.reset()  # or the next size would be compiled as one of many


def traced_row(setting: Setting, name: str, run: Callable[[], int], batch: int, clips_per_s: float) -> Row:
    """The busy share of a step whose speed was measured without a trace."""
    seen = traced(setting, run)
    more = {"kernels_ms": 1000 * seen.kernels_s, "launches": seen.launches}
    return figure(f"busy share of a step, {name}, B={batch}", seen.busy_s * clips_per_s / batch, "of the step", **more)


def beside_it(setting: Setting, run: Callable[[], int], speeds: list[float], batch: int) -> dict[str, float | None]:
    """All that is told of a step beside its speed; docs/speed.md has the definitions."""
    clips_per_s = sorted(speeds)[len(speeds) // 2]
    cuda.reset_peak_memory_stats()
    run()
    peak = cuda.max_memory_allocated() / 2**30
    counts, flops = read_counts(setting), datasheet_flops(cuda.get_device_name())
    step_s = batch / clips_per_s
    return {
        "ms": 1000 * step_s,
        **shares_of_floor(setting, counts, flops, batch, step_s),
        "mfu": counts.flops(batch) / step_s / flops if flops else None,
        "peak_GiB": peak,
    }


def shares_of_floor(
    setting: Setting, counts: Counts, flops: float | None, batch: int, step_s: float
) -> dict[str, float]:
    """The time of the floor over the step's, with the bytes that are needed and with those that eager operators move.

    Nothing where the datasheet of the card is not known.
    """
    if flops is None:
        return {}
    rate = copy_rate(setting)
    moved = {"share_of_floor": counts.needed(batch), "share_of_eager_floor": counts.eager(batch)}
    return {name: floor_seconds(num, counts.flops(batch), rate, flops) / step_s for name, num in moved.items()}


def floors(setting: Setting) -> Iterator[Row]:
    """The most that the card could do by its own copies and its datasheet, whatever computes the step.

    Raises:
        NotHere: if no datasheet of the card was looked up.
    """
    counts, flops = read_counts(setting), datasheet_flops(cuda.get_device_name())
    if flops is None:
        raise NotHere(f"no datasheet of {cuda.get_device_name()} was looked up")
    rate = copy_rate(setting)
    for batch in setting.batches:
        for name, num in (("needed", counts.needed(batch)), ("eager operators'", counts.eager(batch))):
            seconds = floor_seconds(num, counts.flops(batch), rate, flops)
            yield figure(f"floor of the {name} bytes, B={batch}", batch / seconds, "clips/s")


def share_of_crf(setting: Setting, backend: str) -> Iterator[Row]:
    """What the CRF costs: the step with it less the step without it, in turns; its kernels' sum beside it."""
    runs = {
        "with": clips_of(training_step(setting, crf_backend=backend), synthetic(setting, setting.batch)),
        "without": clips_of(training_step(setting, crf=False), synthetic(setting, setting.batch)),
    }
    found = in_turns(setting, runs)
    shares = [1 - ratio for ratio in ratios(found, "with", "without")]
    seen = traced(setting, runs["with"])
    step_ms = 1000 * setting.batch / sorted(found["with"])[setting.repeats // 2]
    more = {"ms": step_ms, "its_kernels_ms": 1000 * seen.crf_s}
    yield figure(f"share of the CRF ({backend}) of a step, B={setting.batch}", shares, "of the step", **more)


def operators(setting: Setting, name: str, options: dict[str, Any]) -> Iterator[Row]:
    """What of a step's kernels each operator is, where that is 2 % or more, and how near a copy's rate its bytes move.

    Steps are not graphs here, whose kernels belong to no operator.
    """
    batch = setting.batches[0]
    run = clips_of(training_step(setting, **options), input_of(setting, batch, options))
    for _ in range(3):
        run()  # algorithms are chosen, kernels compiled
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
    """What the model computes and moves for a clip, and for a step besides; kept for the cases that follow."""
    counts = read_counts(setting)
    yield figure("computing", counts.flops_a_clip, "FLOP a clip")
    yield figure("bytes that are needed", counts.needed_a_clip, "B a clip", a_step_besides=counts.needed_a_step)
    yield figure("bytes that eager operators move", counts.eager_a_clip, "B a clip", a_step_besides=counts.eager_a_step)
