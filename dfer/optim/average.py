"""The moving average of weights."""

from typing import TypeAlias

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """A moving average of weights and batch statistics: torch's, with its shares on the device.

    Torch's own counts its updates on the host and branches by their number, neither of which a captured step would do
    again. The first update takes the weights as they are.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool):
        super().__init__(model, use_buffers=True)
        self._decay, self._warmup = decay, warmup
        # No buffers: they are a function of `n_averaged`, and no checkpoint has them.
        self._shares = torch.zeros(2, device=next(model.parameters()).device)  # of the average, of the weights

    def advance(self) -> None:
        """Count an update, and set what it will do. Call before each `update`, outside of a graph."""
        n = int(self.n_averaged)  # which lies on the CPU
        decay = (min(self._decay, (1 + n) / (10 + n)) if self._warmup else self._decay) if n else 0.0
        self._shares[0].fill_(decay)
        self._shares[1].fill_(1 - decay)
        self.n_averaged += 1

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards a model's weights."""
        kept, new = self._shares.unbind()
        averaged, current = _tensors(self.module), _tensors(model)
        pairs = list(zip(averaged, current, strict=True))
        move = _move_at_once if self._shares.is_cuda else _move
        move([(a, b) for a, b in pairs if a.is_floating_point()], kept, new)
        for a, b in pairs:
            if not a.is_floating_point():  # counts of batches
                a.copy_(a * kept + b * new)

    def update_parameters(self, model: nn.Module) -> None:
        """Do both."""
        self.advance()
        self.update(model)


def build_ema(model: nn.Module, decay: float, warmup: bool) -> MovingAverage | None:
    """Return a moving average of weights and batch statistics, or None when `decay` is 0.

    With `warmup` the decay after n updates is at most (1 + n) / (10 + n), as TensorFlow's is: the average then covers
    the last tenth of a run that is shorter than 1 / (1 - decay) steps, instead of staying at its first weights.
    """
    return MovingAverage(model, decay, warmup) if decay else None


_Pairs: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]  # of the average, and of the weights


def _move(pairs: _Pairs, kept: torch.Tensor, new: torch.Tensor) -> None:
    """Set the first of each pair to kept * first + new * second, where both shares sum to 1."""
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], [new] * len(pairs))


def _move_at_once(pairs: _Pairs, kept: torch.Tensor, new: torch.Tensor) -> None:
    """Do the same with a few kernels: by weights on the device a lerp takes one for each tensor of a GPU."""
    ours = [a for a, _ in pairs]
    torch._foreach_mul_(ours, kept)
    torch._foreach_add_(ours, torch._foreach_mul([b for _, b in pairs], new))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
