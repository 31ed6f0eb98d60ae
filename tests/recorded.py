"""What plays CUDA graphs on a CPU: operators are recorded once and then done again, on the tensors that they were on.

As in a graph, Python does not run again: a number that it would read or change is the recorded one for ever, and what
is not written into a tensor that was there when the recording was made is lost. As in a pool of memory that graphs
share, what one of them returns is gone once another one runs that was captured before it.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")  # of values, by the host


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_group(value: object) -> bool:
    return isinstance(value, torch.ScriptObject) and value._type().qualified_name().endswith("c10d.ProcessGroup")


def done(result: object) -> object:
    """What an operator has returned, once exchanges between processes have come to their end."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.ScriptObject) and hasattr(leaf, "wait"):
            leaf.wait()
    return result


def storages(found: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in found}


class Recording(TorchDispatchMode):
    """Keeps the operators that are called, with all of their tensors."""

    def __init__(
        self, fails_at: str | None = None, alone: ProcessGroup | None = None, error: type[Exception] = RuntimeError
    ):
        """With a group of this process alone nothing is exchanged meanwhile, as in a capture."""
        super().__init__()
        self.calls = []
        self.made: list[Tensor] = []  # memory that is asked for meanwhile
        self._fails_at, self._alone, self._error = fails_at, alone, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or name == self._fails_at:
            raise self._error(f"operation not permitted when stream is capturing:\n{name}")
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            solo = [self._alone.boxed() if self._alone is not None and is_group(arg) else arg for arg in args]
            out = func(*solo, **kwargs)
            self.calls.append((func, args, kwargs, []))
            return out
        out = func(*args, **kwargs)
        is_view = not func._schema.is_mutable and storages(tensors(out)) <= storages(tensors((args, kwargs)))
        if not is_view:
            self.calls.append((func, args, kwargs, tensors(out)))
        if not is_view and not func._schema.is_mutable:
            self.made += [tensor for tensor in tensors(out) if tensor.is_floating_point()]
        return out

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            for func, args, kwargs, outs in self.calls:
                result = done(func(*args, **kwargs))
                for old, new in zip(outs, tensors(result) if outs else (), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder:
    """A backend of `dfer.run.graph.Graphs`. What it captures is done meanwhile, and not by the first replay."""

    def __init__(self):
        self.warmed, self.captured, self.replayed = 0, 0, 0
        self._made: list[list[Tensor]] = []  # by each graph, in the order of their captures

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, function: Callable[[], None]) -> None:
        self.warmed += 1
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        with Recording() as recording:
            function()
        self.captured += 1
        done, overwrite = False, self._in_a_pool(recording)

        def replay() -> None:
            nonlocal done
            self.replayed += 1
            if done:
                recording.replay()
            done = True
            overwrite()

        return replay

    def _in_a_pool(self, recording: Recording) -> Callable[[], None]:
        """Return what overwrites all that graphs captured later make: where this one works may be free for them."""
        self._made.append(recording.made)
        number = len(self._made)

        def overwrite() -> None:
            with torch.inference_mode():  # it may be of an evaluation
                for tensor in itertools.chain(*self._made[number:]):
                    tensor.fill_(torch.nan)

        return overwrite


class Unchanged:
    """Undoes on leaving what was done to tensors and to the generator of random numbers."""

    def __init__(self, state: list[Tensor]):
        self._state = state

    def __enter__(self) -> None:
        self._kept, self._seed = [tensor.detach().clone() for tensor in self._state], torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._seed)
        with torch.no_grad():
            for tensor, before in zip(self._state, self._kept, strict=True):
                tensor.copy_(before)


class Apart(Recorder):
    """Captures without doing anything, as CUDA does, on one process of several, which exchange in replays alone."""

    def __init__(
        self, state: Callable[[], list[Tensor]], alone: ProcessGroup, fails_at: str | None = None, number: int = 1,
        error: type[Exception] = RuntimeError,
    ):  # fmt: skip
        """Where it is to fail, at an operator, it does so when it captures for the `number`-th time."""
        super().__init__()
        self._state, self._alone, self._fails_at, self._number = state, alone, fails_at, number
        self._error = error

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        fails_at = self._fails_at if self.captured + 1 == self._number else None
        with Unchanged(self._state()), Recording(fails_at, self._alone, self._error) as recording:
            function()
        self.captured += 1
        overwrite = self._in_a_pool(recording)

        def replay() -> None:
            self.replayed += 1
            recording.replay()
            overwrite()

        return replay


class Refusing(Recorder):
    """Fails at an operator, when it captures for the `number`-th time; what was done till then is undone."""

    def __init__(self, state: Callable[[], list[Tensor]], operator: str, number: int):
        super().__init__()
        self._state, self._operator, self._number = state, operator, number

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        if self.captured + 1 < self._number:
            return super().capture(function)
        with Unchanged(self._state()), Recording(self._operator):
            function()
        raise AssertionError(f"{self._operator} was never called")
