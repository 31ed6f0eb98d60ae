"""Convolutions of maps of a few cells, on a CPU: one product of matrices.

At 48 px a ResNet's last stage has 2 x 2 cells, and its convolutions have as many weights as at any size. oneDNN's pass
over the weights for their gradient is made for large maps: it took a third of a training step. Here all windows are
copied side by side, (cells, k k C), and multiplied by the weights as they lie in memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Convolution(nn.Conv2d):
    """A convolution that is a product of matrices where that is faster; its gradient has none of its own then.

    Both round alike, but add in another order.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the maps."""
        if torch.compiler.is_compiling() or input.device.type != "cpu":
            return super().forward(input)
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else self.weight.dtype
        if not (self._is_small(input, dtype) and input.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(input)
        made: Any = _Product.apply(input.to(dtype), self.weight.to(dtype), self.stride[0])
        return made

    def _is_small(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a product is faster for maps: by what was measured with AMX, without it, and in float32."""
        cells = ((x.shape[-2] - 1) // self.stride[0] + 1) * ((x.shape[-1] - 1) // self.stride[0] + 1)
        if cells <= 4:
            return True
        amx = dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported()
        return amx and (cells <= 9 or (cells <= 16 and self.weight.numel() >= 2**20))


def with_products(model: nn.Module) -> nn.Module:
    """Return a model, whose usual convolutions of many channels are `Convolution`s; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_usual(module):
            module.__class__ = Convolution
    return model


def _is_usual(conv: nn.Conv2d) -> bool:
    k = conv.kernel_size[0]
    return (
        conv.kernel_size == (k, k)
        and k % 2 == 1
        and conv.padding == (k // 2, k // 2)
        and conv.padding_mode == "zeros"
        and conv.stride[0] == conv.stride[1]
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and conv.in_channels >= 128
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        k, (num_frames, channels, height, width) = weight.shape[-1], x.shape
        ctx.stride, ctx.kernel, ctx.size = stride, k, (height, width)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *4 * (k // 2,)))
        windows = torch.cat([_cells(padded, stride, k, tap) for tap in range(k * k)], dim=-1)
        rows, columns = windows.shape[1:3]
        windows = windows.view(-1, k * k * channels)
        matrix = weight.permute(0, 2, 3, 1).reshape(len(weight), -1)  # as it lies in memory, if that is channels-last
        ctx.save_for_backward(windows, matrix)
        return F.linear(windows, matrix).view(num_frames, rows, columns, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        windows, matrix = ctx.saved_tensors
        k, (height, width), (num_frames, _, rows, columns) = ctx.kernel, ctx.size, to_y.shape
        flat, to_x, to_weight = to_y.permute(0, 2, 3, 1).reshape(len(windows), -1), None, None
        if ctx.needs_input_grad[1]:
            to_weight = (flat.t() @ windows).view(len(matrix), k, k, -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            to_windows = (flat @ matrix).view(num_frames, rows, columns, k * k, -1)
            shape = num_frames, height + 2 * (k // 2), width + 2 * (k // 2), to_windows.shape[-1]
            to_padded = to_windows.new_zeros(shape)
            for tap in range(k * k):
                _cells(to_padded, ctx.stride, k, tap).add_(to_windows[..., tap, :])
            to_x = to_padded[:, k // 2 : k // 2 + height, k // 2 : k // 2 + width].permute(0, 3, 1, 2)
            to_x = to_x.contiguous(memory_format=torch.channels_last)
        return to_x, to_weight, None


def _cells(padded: Tensor, stride: int, k: int, tap: int) -> Tensor:
    """Return the cells of padded maps, (F, H, W, C), that one weight of the kernel is multiplied by, as a view."""
    rows, columns = ((side - k) // stride + 1 for side in padded.shape[1:3])
    top, left = divmod(tap, k)
    return padded[:, top : top + stride * (rows - 1) + 1 : stride, left : left + stride * (columns - 1) + 1 : stride]
