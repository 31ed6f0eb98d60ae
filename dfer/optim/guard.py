"""The guard against steps that are not finite."""

from collections import deque

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class NonFiniteGuard:
    """Take an optimizer step only if the gradient is finite, without waiting for the device to know.

    DDP has summed the gradients of all ranks, so all of them skip a step or none. A skipped step leaves the weights,
    the optimizer's state and the batch statistics (which the forward pass has already changed) as they were. Torch's
    fused optimizers skip a step by themselves (`found_inf`); for any other, weights and state are copied before its
    step and restored after it.

    `before_forward` and `step` read nothing on the host and change tensors in place: both can be captured in a graph.
    """

    LIMIT = 20  # skipped steps in a row that end a run
    LAG = 4  # steps by which the counts of a GPU arrive late

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._optimizer, self._scaler = optimizer, scaler
        # Torch's name for reading `found_inf` on the device.
        self._skips_by_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
        device = self._parameters[0].device
        self.skipped: Float[Tensor, " two"] = torch.zeros(2, device=device)  # steps: in all, in a row
        self._keep = torch.tensor([1.0, 0.0], device=device)  # what a finite step multiplies these with
        num_statistics = sum(b.numel() for b in self._statistics)
        dtype = self._statistics[0].dtype if self._statistics else None
        self._copied = torch.zeros(num_statistics, dtype=dtype, device=device)
        self._arriving: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._pinned = [torch.zeros(2, pin_memory=True) for _ in range(self.LAG + 1)] if device.type == "cuda" else []

    def before_forward(self) -> None:
        """Copy the batch statistics, which a skipped step restores. Call before the first forward pass of a step."""
        if self._statistics:
            torch.cat([b.flatten() for b in self._statistics], out=self._copied)

    def step(self, clip_norm: float) -> Float[Tensor, ""]:
        """Clip the gradient to `clip_norm` (0: do not), take the step or skip it, and return the gradient's norm."""
        self._scaler.unscale_(self._optimizer)
        if clip_norm:
            norm = nn.utils.clip_grad_norm_(self._parameters, clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        bad = ~norm.isfinite()
        if not self._skips_by_itself:
            self._step_or_restore(bad)
        else:
            if not self._scaler.is_enabled():  # an enabled one sets these itself
                self._optimizer.grad_scale, self._optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
            self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._statistics:
            now = torch.cat([b.flatten() for b in self._statistics])
            parts = torch.where(bad, self._copied, now).split([b.numel() for b in self._statistics])
            torch._foreach_copy_(self._statistics, [p.view_as(b) for p, b in zip(parts, self._statistics, strict=True)])
        torch.where(bad, self.skipped + 1, self.skipped * self._keep, out=self.skipped)
        return norm

    @torch.no_grad()
    def _step_or_restore(self, bad: Bool[Tensor, ""]) -> None:
        """Take the step and undo it if `bad`. The scaler's own step would wait for the GPU to find out."""
        weights = [(p, p.clone()) for p in self._parameters if p.grad is not None]
        before = {place: t.clone() for place, t in self._state().items()}
        self._optimizer.step()
        for weight, kept in weights:
            torch.where(bad, kept, weight, out=weight)
        for place, tensor in self._state().items():
            # State that this step has created begins at zero in all optimizers that --optim.optimizer offers.
            torch.where(bad, before[place] if place in before else torch.zeros_like(tensor), tensor, out=tensor)

    def _state(self) -> dict[tuple[Tensor, str], Tensor]:
        """Return the tensors of the optimizer's state, by parameter and name."""
        by_parameter = self._optimizer.state.items()
        return {(p, name): t for p, state in by_parameter for name, t in state.items() if isinstance(t, Tensor)}

    def diverged(self) -> bool:
        """Return True after LIMIT consecutive skipped steps. Call exactly once per step.

        On a GPU the counter is read LAG steps late to avoid a sync; all ranks see the same value.
        """
        if not self._pinned:
            return float(self.skipped[1]) >= self.LIMIT
        host = self._pinned[0]
        self._pinned.append(self._pinned.pop(0))
        host.copy_(self.skipped, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._arriving.append((event, host))
        if len(self._arriving) <= self.LAG:
            return False
        event, host = self._arriving.popleft()
        event.synchronize()  # LAG steps are queued behind it: the device does not run dry
        return float(host[1]) >= self.LIMIT
