"""Right or wrong on the card: clips against the CPU's, losses of a variant against eager, two processes against one."""

import copy
import itertools
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu_parts.project import (
    IMAGENET_STD,
    Engine,
    Graph,
    Route,
    Step,
    clip_loader,
    gradients,
    leave,
    replace_clips,
    synthetic,
    training_step,
)
from benchmarks.gpu_parts.rows import Row, figure, read
from benchmarks.gpu_parts.setting import NotHere, Setting

# Largest and mean difference from the CPU's clip, in steps of 255, as tests/test_dali_pipes.py has them: nvJPEG and
# NVDEC round the inverse DCT and the chroma their own way, pixels that were never encoded only what follows.
CLOSE = {"frames": (12, 1), "shards144": (12, 1), "raw128": (0.05, 0.002), "video": (12, 1.5)}
NUDGE = 2.0**-9  # what rounding to bf16 moves a number by, at most
SAME = 2.0  # times the distance that such a nudge of all weights makes: further away is not rounding
EARLY = 20  # steps in which a wrong gradient shows before chaos does


def clips_against_cpu(
    setting: Setting,
    source: str,
    held: bool = False,
    engine: Engine = 0.0,
    nvdec: int = 0,
    graph: Graph = "operators",
) -> Iterator[Row]:
    """The clips of a route on the card and those of the CPU's kernel, of the same plan."""
    route = Route(engine, nvdec, graph)
    one = clip_loader(setting, source, route, held=held, batch=setting.loader_batch)
    listed = "held" if held else "long"
    other = clip_loader(setting, source, where="cpu", listed=listed, batch=setting.loader_batch)
    worst, total, number, seen = 0.0, 0.0, 0, 0
    for ours, want in itertools.islice(zip(one(0), other(0), strict=True), 4):
        assert torch.equal(ours.ids, want.ids), "the batches hold other clips"
        steps = (ours.clips.float().cpu() - want.clips).abs() * torch.tensor(255 * IMAGENET_STD).view(3, 1, 1)
        worst, total = max(worst, float(steps.max())), total + float(steps.double().sum())
        number, seen = number + steps.numel(), seen + len(ours.ids)
    limits = CLOSE[source]
    what = f"{source}{', held in the card' if held else ''}{route.told()}"
    yield figure(
        f"clips of {what} against the CPU's: largest difference", worst, "of 255", mean=total / number, clips=seen,
        right=worst <= limits[0] and total / number <= limits[1],
    )  # fmt: skip


def losses(setting: Setting, step: Step, count: int, bf16_input: bool = False, first: int = 0) -> list[float]:
    """The losses of the training steps from `first` to before `count`, on eight batches in turn."""
    size = min(16, setting.batch)
    given = [synthetic(setting, size, seed=seed) for seed in range(8)]
    if bf16_input:
        given = [replace_clips(batch, batch.clips.to(torch.bfloat16)) for batch in given]
    made = [step(given[number % 8]).clone() for number in range(first, count)]
    return torch.stack(made).float().tolist() if made else []


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The mean difference of two courses of the loss in their first steps."""
    return float(np.abs(np.subtract(a[:EARLY], b[:EARLY])).mean())


def judged(apart: float, rounding: float, wrong: float) -> Row:
    """The verdict on a distance: none where what is known to be wrong is no further away than rounding may bring it."""
    more: Row = {"rounding": rounding, "known_wrong": wrong}
    if not wrong > SAME * rounding:
        return {"verdict": "proves nothing, as what is known to be wrong is as near", **more}
    return {"right": apart <= SAME * rounding, **more}


def eager_against_eager(setting: Setting) -> Iterator[Row]:
    """The same training twice, twice with weights that were nudged, and once with a model that is another one.

    The second tells how far rounding brings losses apart, the third what has to be further away than that.
    """
    first: list[float] = []
    again: list[float] = []
    yield from same_bits(setting, setting.train_steps, first, again)
    early = min(EARLY, setting.train_steps)
    nudged = [losses(setting, training_step(setting, nudge=sign * NUDGE), early) for sign in (1, -1)]
    rounding = max(distance(first[:early], other) for other in nudged)
    wrong = distance(first[:early], losses(setting, training_step(setting, crf=False), early))
    about = read(setting.out / "results.jsonl")[0][:1]  # the machine
    told = {"about": about, "losses": first, "rounding": rounding, "known_wrong": wrong}
    (setting.out / "eager_losses.json").write_text(json.dumps(told))
    yield figure(
        "eager against eager, first losses", distance(first, again), "of the loss",
        **judged(distance(first, again), rounding, wrong), last_loss=_end(first), last_loss_again=_end(again),
    )  # fmt: skip
    yield figure("known to be wrong (no CRF) against eager, first losses", wrong, "of the loss", rounding=rounding)


def eager_for_long(setting: Setting) -> Iterator[Row]:
    """The same training twice, for longer."""
    yield from same_bits(setting, setting.long_train_steps, [], [])


def same_bits(setting: Setting, count: int, first: list[float], again: list[float]) -> Iterator[Row]:
    """In how many steps the losses of the same training, done twice, are the same bits, and whether the weights end so.

    The losses are added to the two lists. No verdict: sums whose order is the card's own may differ.
    """
    weights = []
    for course in (first, again):
        step = training_step(setting)
        course += losses(setting, step, count)
        weights.append(step.model.state_dict())
    same = sum(a == b for a, b in zip(first, again, strict=True))
    equal = all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    what = f"eager against eager, {count} steps: losses of the same bits"
    yield figure(what, same, "steps", weights_the_same_bits=equal, last_loss=_end(first), last_loss_again=_end(again))


def bits_of_fixed_algorithms(setting: Setting, **model: bool) -> Iterator[Row]:
    """The same training in the mode of fixed algorithms: eagerly twice, as a graph, and as a graph that is continued.

    And as one that casts weights at once. All have to end with the same bits. `dropout` is drawn in each of their
    steps: its masks are the same too.
    """
    count, whose = setting.long_train_steps, ", default model" if model else ""
    first, want = _course(setting, count, model)
    graph, cast = {"graph": True}, {"graph": True, "fused": "weights"}
    for name, how, cut in (
        ("eager again", {}, 0),
        ("a graph", graph, 0),
        ("a graph, continued", graph, count // 2),
        ("a graph, weights cast at once", cast, 0),
    ):
        course, weights = _course(setting, count, model | how, cut)
        same = sum(a == b for a, b in zip(first, course, strict=True))
        equal = all(torch.equal(weights[key], value) for key, value in want.items())
        what = f"fixed algorithms{whose}, {count} steps of {name} against eager: losses of the same bits"
        yield figure(what, same, "steps", right=equal and same == count, weights_the_same_bits=equal)


def _course(
    setting: Setting, count: int, how: dict[str, Any], cut: int = 0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a training with fixed algorithms and its weights, begun anew from its state after `cut` steps."""
    step = training_step(setting, deterministic=True, **how)
    course = losses(setting, step, cut)
    if cut:
        saved = copy.deepcopy(step.state.state_dict())
        step = training_step(setting, deterministic=True, **how)
        step.restore(saved, cut)
    return course + losses(setting, step, count, first=cut), step.model.state_dict()


def variant_against_eager(setting: Setting, name: str, options: dict[str, Any]) -> Iterator[Row]:
    """The losses of a variant and those of eager: right if they are as near as rounding would leave them.

    Raises:
        NotHere: if eager's are missing.
    """
    path = setting.out / "eager_losses.json"
    if not path.exists():
        raise NotHere("eager against eager has not been run")
    eager = json.loads(path.read_text())
    step = training_step(setting, **options)
    made = losses(setting, step, setting.train_steps, bool(options.get("bf16_input")))
    apart = distance(made, eager["losses"])
    yield figure(
        f"{name} against eager, first losses", apart, "of the loss",
        **judged(apart, eager["rounding"], eager["known_wrong"]),
        last_loss=_end(made), last_loss_eager=_end(eager["losses"]),
    )  # fmt: skip


def _end(course: Sequence[float]) -> float:
    return float(np.mean(course[-50:]))


def two_processes(setting: Setting) -> Iterator[Row]:
    """The gradients of two processes on one card (gloo), half of the batch each, against one with all of it."""
    whole = gradients(setting, synthetic(setting, 4))
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = setting.out / "gradients.pt"
    path.unlink(missing_ok=True)
    processes = [context.Process(target=one_of_two, args=(setting, rank, port, str(path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"the two processes ended with {codes}")
    shared = torch.load(path, weights_only=True)
    path.unlink()
    apart = gradients_apart(shared, whole)
    worst = max(apart, key=lambda name: apart[name])
    # float32 sums of up to a million terms in another order differ by some 1e-5
    yield figure(
        "gradients of two processes against one", apart[worst], "of the norm", right=apart[worst] <= 1e-3, of=worst
    )


def gradients_apart(ours: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far gradients are apart, as a share of their norm.

    Some are zero but for rounding, as that of a bias before a softmax: to each norm a 10,000th of that of all is added.
    """
    total = torch.stack([g.norm() for g in want.values()]).norm()
    return {name: float((ours[name] - g).norm() / (g.norm() + 1e-4 * total)) for name, g in want.items()}


def one_of_two(setting: Setting, rank: int, port: int, path: str) -> None:
    """A process of the two: its half of the batch, gradients averaged by gloo."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or it asks for the machine's name, which may lead nowhere
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batch = synthetic(setting, 4)
    half = batch._replace(**{name: x.chunk(2)[rank] for name, x in batch._asdict().items() if x is not None})
    found = gradients(setting, half, DistributedDataParallel)
    if rank == 0:
        torch.save(found, path)
    leave()
