"""Learning rates on the device, where a captured step reads them."""

import contextlib
from collections.abc import Iterator

import torch


class DeviceRates:
    """The learning rate of each group of an optimizer as a tensor, which its step is given in place of the number.

    The numbers stay where they are: logs, checkpoints and schedules know no tensors. A GPU's optimizers read float32,
    and are given the same without a graph, so that both round alike.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self._optimizer, self._device = optimizer, device
        dtype = torch.float32 if device.type == "cuda" else torch.float64  # a CPU's read the number, to its last digit
        self._rates = torch.zeros(len(optimizer.param_groups), dtype=dtype, device=device)
        self._filled = [0.0] * len(optimizer.param_groups)

    def fill(self) -> None:
        """Take over the numbers of the groups. Call before each step, outside of a graph."""
        for place, group in enumerate(self._optimizer.param_groups):
            if self._filled[place] != group["lr"]:
                self._rates[place].fill_(group["lr"])
                self._filled[place] = group["lr"]

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Let the groups have the tensors, in which an optimizer's step is taken."""
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        groups = self._optimizer.param_groups
        kept = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for group, rate in zip(groups, self._rates.unbind(), strict=True):
            group["lr"] = rate
            if capturing and "capturable" in group:  # torch wants to be told, and warns where it is and nobody captures
                group["capturable"] = True
        try:
            yield
        finally:
            for group, before in zip(groups, kept, strict=True):
                group.update(before)
