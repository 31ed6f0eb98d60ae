"""CUDA graphs: what is launched in hundreds of kernels, recorded once and then launched at once.

A graph is of a function of *static* tensors, which lie at the same addresses whenever it is called, and reads nothing
on the host. The same function is called without a graph too, so that both cannot drift apart.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast

from dfer.config import RunConfig
from dfer.files import reason
from dfer.run.distributed import World, first_failure
from dfer.run.launchers import find_place

_ATTEMPTS = 2  # to capture a function: another thread that waits for the whole device may break one off
WARM_UP = 2  # calls before the one that is captured: state is made in the first, algorithms are chosen

Function = Callable[[], None]
Agree = Callable[[str | None], str | None]


@runtime_checkable
class Backend(Protocol):
    """What captures: CUDA, or in tests a stub that calls the function again."""

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which work is queued where it will be captured."""
        ...

    def warm_up(self, function: Function) -> None:
        """Call a function as it will be captured."""
        ...

    def capture(self, function: Function) -> Function:
        """Return what does the work of a function, without having done it.

        Raises:
            Exception: if it cannot be captured, of whatever class: CUDA, torch and Triton have their own.
        """
        ...


class CudaGraphs:
    """Graphs of one device, which share a stream and a pool of memory: what one of them leaves is the next one's.

    So they may not run at the same time, and what a graph returns has to be used before another one runs.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Queue work on the stream of capture, between what was queued before and what will be after."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def warm_up(self, function: Function) -> None:
        """Call a function on the stream of capture."""
        with self.stream():
            function()

    def capture(self, function: Function) -> Function:
        """Return the replay of a function that was captured.

        Raises:
            Exception: if it cannot be captured, of whatever class: CUDA, torch and Triton have their own.
        """
        graph = torch.cuda.CUDAGraph()
        # What the graph draws by is its own: a capture that breaks off leaves it unusable.
        generator, before = self._generator(), self._generator().graphsafe_get_state()
        drawn = torch.Generator(self._device).manual_seed(torch.initial_seed())
        generator.graphsafe_set_state(drawn.graphsafe_get_state())
        # Other threads, DALI's among them, may allocate and wait meanwhile: that is no error of this one.
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            # The first goes back, whatever happens. What is collected meanwhile might free memory of other libraries.
            with torch.cuda.stream(torch.cuda.current_stream()), _nothing_collected(), capturing:
                function()
        except Exception:
            self._end_capture()
            raise
        finally:
            generator.graphsafe_set_state(before)

        def replay() -> None:
            drawn.manual_seed(torch.initial_seed())  # as `torch.manual_seed` has done with the generator's state of now
            graph.replay()

        return replay

    def _generator(self) -> torch.Generator:
        return torch.cuda.default_generators[torch.cuda.current_device()]

    def _end_capture(self) -> None:
        """Undo what torch leaves of a capture that broke off: its allocator still waits for the end."""
        with contextlib.suppress(RuntimeError):  # it did come to its end
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()  # newer versions of torch still fill the old one for that graph


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage now, and none until the end."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graphs:
    """Captured functions that belong together: once one of them cannot be captured, none is replayed any more."""

    def __init__(self, backend: Backend | None, agree: Agree = lambda why: why):
        """Have functions captured by a backend; without one they are called.

        Args:
            backend: what captures.
            agree: gets why this process cannot capture, or None, waits for all, and returns why the first one of them
                cannot, so that they go on without graphs together and compute alike.
        """
        self._backend, self._agree = backend, agree
        self._replays: dict[str, Function] = {}
        self.note: str | None = None  # what is to be said, once

    def beside(self) -> "Graphs":
        """Return others of the same backend, which do not end with these."""
        return Graphs(self._backend)

    @property
    def active(self) -> bool:
        """Return whether functions are given static tensors, as they are captured or will be."""
        return self._backend is not None

    def captured(self, name: str) -> bool:
        """Return whether a function is replayed, which is one launch."""
        return name in self._replays

    def run(self, name: str, function: Function, warm: bool, recover: Function = lambda: None) -> None:
        """Do the work of a function: call it, or capture it once it is warm, and replay it from then on.

        Args:
            name: by which a function is known. All its calls have to be of the same tensors.
            function: of static tensors.
            warm: whether it was called WARM_UP times, and what it adds to is captured or will stay where it is.
            recover: undoes what a capture that fails may have left on the host.
        """
        if self._backend is None:
            function()
        elif self.captured(name):
            with _RecordFunctionFast("graph"):
                self._replays[name]()
        elif not warm:
            self._backend.warm_up(function)
        else:
            self._begin(name, function, recover)

    def _begin(self, name: str, function: Function, recover: Function) -> None:
        """Capture a function and replay it; where one process cannot, none does, and all call it."""
        why = None
        for left in reversed(range(_ATTEMPTS)):
            replay, why = self._try_to_capture(function)
            if replay is not None and why is None:
                self._replays[name] = replay
                replay()
                return
            if left:
                recover()
        self.note = f"--run.graph: {name} cannot be captured ({why}); all goes on without a graph"
        self.close()
        recover()
        function()

    def _try_to_capture(self, function: Function) -> tuple[Function | None, str | None]:
        """Return the replay of a function if it could be captured, and why one of the processes cannot."""
        assert self._backend is not None
        self._agree(None)  # all are here: none is still busy with an exchange that another waits for
        replay = why = None
        try:
            replay = self._backend.capture(function)
        # Whatever it is, the others wait to hear of it. What is no fault of the capture, the next call raises again.
        except Exception as error:
            name_of = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
            why = f"{name_of}{reason(error)}"[:200]
        return replay, self._agree(why)

    def close(self) -> None:
        """Free what was captured. From now on functions are called."""
        self._replays.clear()
        self._backend = None

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

    Graphs on a GPU, but not where several processes exchange within a forward pass; fewer passes where there are
    graphs, since our kernels, launched one by one, cost the host more than torch's, and not where a compiler fuses.
    Weights are cast at once where autocast casts them.
    """
    graph, fused = run.graph, run.fused
    if graph == "auto":
        exchanges = run.sync_bn and find_place().size > 1
        graph = "on" if run.device != "cpu" and torch.cuda.is_available() and not exchanges else "off"
    if fused == "auto":
        most = "all" if run.amp in ("bf16", "fp16") else "both"
        fused = most if graph == "on" and not run.compile else "off"
    return dataclasses.replace(run, graph=graph, fused=fused)


def build_graphs(run: RunConfig, world: World) -> Graphs:
    """Return what captures the steps of a run on this process's device, if they are to be captured and can be."""
    wanted = run.graph == "on"
    backend = CudaGraphs(world.device) if wanted and world.device.type == "cuda" else None
    graphs = Graphs(backend) if world.size == 1 else together(backend, world)
    if wanted and backend is None:
        graphs.note = "--run.graph on: there is no GPU here; steps go without a graph"
    return graphs


def together(backend: Backend | None, world: World) -> Graphs:
    """Return the graphs of one process of several, which capture their steps together or not at all."""
    return Graphs(backend, partial(first_failure, world=world))
