"""The weights of a forward pass under autocast, cast at once, and their gradients cast back at once.

Autocast has a kernel for each weight, and in the backward pass another one for each gradient: 35 and 35 small ones in a
step of the default model, 48 and 48 with attention in one branch. The leaves stay the float32 parameters, so that
clipping, averages, optimizers and checkpoints know nothing of it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfer.model.convolution import Convolution

# Autocast casts all parameters of these, once a forward pass. A subclass may want its weights in float32 before.
_CAST = (nn.Conv1d, nn.Conv2d, Convolution, nn.Conv3d, nn.Linear, nn.GRUCell, nn.LSTMCell)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what is not used has no gradient
        cast = _cast(weights, dtype)
        ctx.mark_non_differentiable(*(c for c, w in zip(cast, weights, strict=True) if not w.requires_grad))
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(cast) for g in gradients)


def _cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    # With strides of their own all go through one kernel; with any others each would have one.
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if cast:
        torch._foreach_copy_(cast, tensors)
    return cast


def cast_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return in `dtype` the parameters of a model that autocast casts, by name, to the bit as it does.

    Their gradients, summed up in `dtype`, reach the float32 parameters when all of them are there: at the end of the
    backward pass.
    """
    found = {
        name: parameter
        for path, module in model.named_modules()
        if type(module) in _CAST
        for name, parameter in module.named_parameters(path, recurse=False)
        if parameter.dtype is torch.float32
    }
    made: Any = _CastTogether.apply(dtype, *found.values())
    of_parameter = dict(zip(found.values(), made, strict=True))  # one for layers that share it: a sum is rounded once
    return {name: of_parameter[parameter] for name, parameter in found.items()}
