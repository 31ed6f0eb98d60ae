"""The moving average of weights."""

from torch import nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn


def build_ema(model: nn.Module, decay: float, warmup: bool) -> AveragedModel | None:
    """Return a moving average of weights and batch statistics, or None when `decay` is 0.

    With `warmup` the decay after n updates is at most (1 + n) / (10 + n), as TensorFlow's is: the average then covers
    the last tenth of a run that is shorter than 1 / (1 - decay) steps, instead of staying at its first weights.
    """
    if not decay:
        return None

    def update(averaged: PARAM_LIST, current: PARAM_LIST, _: object) -> None:
        n = int(ema.n_averaged)  # which lies on the CPU; the argument is a copy of it on the device
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)) if warmup else decay)(averaged, current, n)

    ema = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return ema
