"""CUDA graphs: what is launched in hundreds of kernels, recorded once and then launched at once.

A graph is of a function of *static* tensors, which lie at the same addresses whenever it is called, and reads nothing
on the host. The same function is called without a graph too, so that both cannot drift apart.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.profiler import record_function

from dfer.cli import UserError
from dfer.config import RunConfig
from dfer.run.distributed import World
from dfer.run.launchers import find_place

WARM_UP = 2  # calls before the one that is captured: state is made in the first, algorithms are chosen

Function = Callable[[], None]


@runtime_checkable
class Backend(Protocol):
    """What captures: CUDA, or in tests a stub that calls the function again."""

    def warm_up(self, function: Function) -> None:
        """Call a function as it will be captured."""
        ...

    def capture(self, function: Function) -> Function:
        """Return what does the work of a function, without having done it.

        Raises:
            RuntimeError: if it cannot be captured.
        """
        ...


class CudaGraphs:
    """Graphs of one device, which share a stream and a pool of memory: what one of them leaves is the next one's.

    So they may not run at the same time, and what a graph returns has to be used before another one runs.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Function) -> None:
        """Call a function on the stream of capture, between what was queued before and what will be after."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            function()
        here.wait_stream(self._stream)

    def capture(self, function: Function) -> Function:
        """Return the replay of a function that was captured.

        Raises:
            RuntimeError: if it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, DALI's among them, may allocate and wait meanwhile: that is no error of this one.
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:  # the first goes back, whatever happens
                function()
        except RuntimeError:
            self._end_capture()
            raise
        return graph.replay

    def _end_capture(self) -> None:
        """Undo what torch leaves of a capture that broke off: its generator and allocator still wait for the end."""
        fresh = torch.Generator(self._device).manual_seed(torch.initial_seed())
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())
        with contextlib.suppress(RuntimeError):  # it did come to its end
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)


class Graphs:
    """Captured functions that belong together: once one of them cannot be captured, none is replayed any more."""

    def __init__(self, backend: Backend | None):
        """Have functions captured by a backend; without one they are called."""
        self._backend = backend
        self._replays: dict[str, Function] = {}
        self.note: str | None = None  # what is to be said, once

    def beside(self) -> "Graphs":
        """Return others of the same backend, which do not end with these."""
        return Graphs(self._backend)

    @property
    def active(self) -> bool:
        """Return whether functions are given static tensors, as they are captured or will be."""
        return self._backend is not None

    def run(self, name: str, function: Function, warm: bool, recover: Function = lambda: None) -> None:
        """Do the work of a function: call it, or capture it once it is warm, and replay it from then on.

        Args:
            name: by which a function is known. All its calls have to be of the same tensors.
            function: of static tensors.
            warm: whether it was called WARM_UP times, and what it adds to is captured already or will stay where it is.
            recover: undoes what a capture that fails may have left on the host.
        """
        if self._backend is None:
            function()
        elif name in self._replays:
            with record_function("graph"):
                self._replays[name]()
        elif not warm:
            self._backend.warm_up(function)
        else:
            try:
                self._replays[name] = self._backend.capture(function)
            except RuntimeError as error:  # of CUDA, of torch, of memory that runs out
                why = " ".join(str(error).split())[:200]
                self.note = f"--run.graph: {name} cannot be captured ({why}); steps go on without a graph"
                self._backend = None
                recover()
                function()
            else:
                self._replays[name]()

    def take_note(self) -> str | None:
        """Return what is to be said, the first time that it is asked for."""
        note, self.note = self.note, None
        return note


class CapturedCall:
    """A function of one tensor, which is always of one shape. What it returns lasts until it is called again."""

    def __init__(self, graphs: Graphs, name: str, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None):
        """Take a function; `dtype` is that of its input where it is captured, by default as it comes."""
        self._graphs, self._name, self._function, self._dtype = graphs, name, function, dtype
        self._calls = 0
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function makes of a tensor."""
        if not self._graphs.active:
            return self._function(x)
        self._input = refilled(self._input, x, self._dtype)
        self._graphs.run(self._name, self._call, warm=self._calls >= WARM_UP)
        self._calls += 1
        assert self._output is not None
        return self._output

    def _call(self) -> None:
        assert self._input is not None
        self._output = self._function(self._input)


def refilled(static: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a static tensor with the content of `x`; the first time, when there is none, a new one."""
    if static is None:
        static = torch.empty_like(x, dtype=dtype)
    assert static.shape == x.shape, f"a graph was captured for {tuple(static.shape)}, not for {tuple(x.shape)}"
    static.copy_(x, non_blocking=True)
    return static


def resolved_graph(run: RunConfig) -> RunConfig:
    """Return the options with what "auto" means for --run.graph and --run.fused.

    Graphs where this process is alone and has a GPU; fewer passes where there are graphs, since our kernels, launched
    one by one, cost the host more than torch's, and not where a compiler fuses.

    Raises:
        UserError: if steps are to be graphs, and the run on a CPU.
    """
    if run.graph == "on" and run.device == "cpu":
        raise UserError("--run.graph on: --run.device cpu has no graphs; leave one of them out")
    graph, fused = run.graph, run.fused
    if graph == "auto":
        alone = find_place().size == 1
        graph = "on" if alone and run.device != "cpu" and torch.cuda.is_available() else "off"
    if fused == "auto":
        fused = "both" if graph == "on" and not run.compile else "off"
    return dataclasses.replace(run, graph=graph, fused=fused)


def build_graphs(run: RunConfig, world: World) -> Graphs:
    """Return what captures the steps of a run on this process's device, if they are to be captured and can be."""
    if run.graph != "on":
        return Graphs(None)
    graphs = Graphs(CudaGraphs(world.device) if world.size == 1 and world.device.type == "cuda" else None)
    if not graphs.active:
        why = f"{world.size} processes train together" if world.size > 1 else "there is no GPU here"
        graphs.note = f"--run.graph on: {why}; steps go without a graph"
    return graphs
