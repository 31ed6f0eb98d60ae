"""What this machine settles of a configuration that leaves it open, once, at the first start of a run."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dfer.cli import say_once, usable_cores
from dfer.config import Amp, Config
from dfer.crf.backends import resolve_backend
from dfer.lists.index import ClipIndex
from dfer.lists.packed import Packed
from dfer.precision import amp_of_trained, auto_amp
from dfer.run.defaults import cache_tier, card_memory
from dfer.run.distributed import World
from dfer.run.graph import resolved_graph
from dfer.run.launchers import find_place
from dfer.run.memory import free_memory
from dfer.run.neighbours import can_share

_BUSY = 25.0  # percent of the time


def settled(config: Config) -> Config:
    """Return a configuration with what this machine has for each option that is open, but for weights and the cache."""
    gpu = config.run.device != "cpu" and torch.cuda.is_available()
    run = config.run
    if run.device == "auto":
        run = dataclasses.replace(run, device="cuda" if gpu else "cpu")
    if run.amp == "auto":
        run = dataclasses.replace(run, amp=auto_amp(gpu))
    if run.threads == 0 and run.device == "cpu":  # a GPU's numbers do not depend on them
        run = dataclasses.replace(run, threads=threads_here())
    model = dataclasses.replace(config.model, crf_backend=resolve_backend(config.model.crf_backend, gpu))
    data = config.data
    if data.video_decoder == "auto":  # until a card has shown NVDEC to be faster
        data = dataclasses.replace(data, video_decoder="cores")
    if data.jpeg_decoder == "auto":  # until a card has shown which of both leaves more to the step
        data = dataclasses.replace(data, jpeg_decoder="sms")
    return dataclasses.replace(config, data=data, model=model, run=resolved_graph(run))


def settled_for(begun: Config, now: Config) -> Config:
    """Return what a run was begun with, as the command that continues it would have what is open in it settled."""
    there = dataclasses.replace(begun.run, device=now.run.device, graph=now.run.graph)
    return settled(dataclasses.replace(begun, run=there))


def evaluated(config: Config, device: Literal["auto", "cpu", "cuda"], amp: Amp | None = None) -> Config:
    """Return a run's configuration with how its trained model is computed on a device: as by the run, on such a device.

    On another kind it is what suits that, as it is settled for a run there. Nothing is compiled.
    """
    gpu = device != "cpu" and torch.cuda.is_available()
    run, model = config.run, config.model
    amp = amp or amp_of_trained(run, "cuda" if gpu else "cpu")
    if not gpu:
        run = dataclasses.replace(run, graph="off", fused="off")
    elif run.device == "cpu":
        run = dataclasses.replace(run, graph="auto", fused="auto")
        model = dataclasses.replace(model, crf_backend="auto")
    run = dataclasses.replace(run, device=device, amp=amp, compile=False)
    model = dataclasses.replace(model, crf_backend=resolve_backend(model.crf_backend, gpu))
    return dataclasses.replace(config, run=resolved_graph(run), model=model)


def threads_here() -> int:
    """Return the threads that torch computes with here: OMP_NUM_THREADS, else no more than there are cores to use."""
    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else min(threads, usable_cores())


def with_cache(config: Config, train: ClipIndex, val: ClipIndex) -> Config:
    """Return a configuration with "gpu", "shares" or "off" for --data.cache auto, by the clips of both lists."""
    if config.data.cache != "auto":
        return config
    tier: Literal["gpu", "shares", "off"] = "off"
    place = find_place()
    if config.run.device == "cuda":
        pictures = [raw_bytes(index) for index in (train, val)]
        memory = card_memory(place.local_rank)
        if memory is not None and None not in pictures:
            free = free_memory(torch.device("cuda", min(place.local_rank, torch.cuda.device_count() - 1)))
            tier = cache_tier(sum(n or 0 for n in pictures), min(memory, free), place.local_size)
    if tier == "shares" and not can_share(place.local_size):
        tier = "off"
        say_once(
            "--data.cache auto: the clips fit these GPUs only in shares, and not each reads all others' memory: off"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache=tier))


def raw_bytes(index: ClipIndex) -> int | None:
    """Return the bytes of all pictures of raw clips; None of any others, which no GPU holds."""
    store = index.store
    if index.source != "raw" or not isinstance(store, Packed):
        return None
    return int((np.diff(store.first) * (3 * store.height.astype(np.int64) * store.width)).sum())


def in_words(config: Config, world: World) -> str:
    """Return in a line what a run computes with: all that was settled for it, and what loads its clips here."""
    data, run = config.data, config.run
    if run.device == "cpu":
        more = f"{run.threads} threads of torch"
    else:
        more = f"cache {data.cache}, images by {data.jpeg_decoder}, videos by {data.video_decoder}, "
        more += f"graph {run.graph}, fused {run.fused}"
    return (
        f"settled for this run: {run.device}, amp {run.amp}, CRF {config.model.crf_backend}, {more}, batches of "
        f"{data.batch_size} clips, peak rate {config.optim.lr:g}; here {world.own_cores()} threads load clips"
    )


def short_of_cores(config: Config, world: World) -> str | None:
    """Return what is to be said of a run that takes more threads than a process has cores here; else None."""
    threads, cores = config.run.threads, world.own_cores()
    if config.run.device != "cpu" or threads <= cores:
        return None
    return (
        f"--run.threads {threads}, as this run has them, on {cores} usable cores of a process: it goes on with the "
        f"same bits, slowly; --run.threads {cores} is faster and rounds otherwise"
    )


def busy_beside(config: Config, pressure: Path = Path("/proc/pressure/cpu")) -> str | None:
    """Return what is to be said of a run on several threads where others keep the cores busy; else None.

    By the kernel's own measure: the share of the last ten seconds in which something waited for a core.
    """
    waited = 0.0
    with contextlib.suppress(OSError):  # a kernel that does not measure it
        found = re.search(r"some avg10=([\d.]+)", pressure.read_text())
        waited = float(found[1]) if found else 0.0
    if config.run.device != "cpu" or config.run.threads < 2 or waited < _BUSY:
        return None
    return (
        f"other work waits for these cores {waited:.0f} % of the time, and slows this run; one that begins as a "
        "process for each core, by torchrun, gets more of them (docs/speed.md)"
    )
