"""Batch norm, ReLU and residual sum as one, and the stem's max-pool, on a GPU: fewer passes over the same bytes.

`fuse` changes the classes of a model's modules, so that parameters, buffers and their names stay: a checkpoint loads
either way. What the kernels do not take, a CPU's maps among it, goes through torch's own operators.
"""

import copy
import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfer.files import reason

Parts = Literal["norm", "pool", "both"]


# ---- Operators: autocast, torch.compile and graphs see their shapes only.


@torch.library.custom_op("dfer::batch_statistics", mutates_args=("running_mean", "running_var", "tracked"))
def _statistics_op(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    tracked: torch.Tensor,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and 1 / std of each channel, and update the running ones. The gradient is that of `_norm_op`."""
    from dfer.model import launches  # here and below, because Triton is not installed everywhere

    return launches.statistics(x, (running_mean, running_var, tracked), momentum, eps)


@_statistics_op.register_fake
def _(x, running_mean, *_):
    return torch.empty_like(running_mean), torch.empty_like(running_mean)


@torch.library.custom_op("dfer::norm_act", mutates_args=())
def _norm_op(
    x: torch.Tensor,
    shortcut: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    eps: float | None,
    relu: bool,
) -> torch.Tensor:
    """Return batch norm's maps. Without `eps` mean and spread are x's, and so part of its gradient."""
    from dfer.model import launches

    return launches.normalise(x, launches.Norm(weight, bias, mean, spread, eps), shortcut, relu)


@_norm_op.register_fake
def _(x, *_):
    return torch.empty_like(x)


@torch.library.custom_op("dfer::norm_pool", mutates_args=())
def _norm_pool_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    spread: torch.Tensor,
    eps: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pool of normalised, rectified maps, which are never written, and the places of the largest cells."""
    from dfer.model import launches

    return launches.pool(x, launches.Norm(weight, bias, mean, spread, eps))


@torch.library.custom_op("dfer::max_pool", mutates_args=())
def _pool_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pooled maps and the places of the largest cells."""
    from dfer.model import launches

    return launches.pool(x, None)


@_norm_pool_op.register_fake
@_pool_op.register_fake
def _(x, *_):
    size = (x.shape[0], x.shape[1], (x.shape[2] - 1) // 2 + 1, (x.shape[3] - 1) // 2 + 1)
    z = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return z, torch.empty_like(z, dtype=torch.int8)


@torch.library.custom_op("dfer::norm_act_backward", mutates_args=())
def _norm_backward_op(
    to_y: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    index: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    statistics: list[torch.Tensor],
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, of the shortcut (empty without one), and of weight and bias as one."""
    from dfer.model import launches

    to_y = to_y.contiguous(memory_format=torch.channels_last)
    mean, inverse_std = statistics
    return launches.gradients(to_y, x, launches.Norm(weight, bias, mean, inverse_std), y, index, relu)


@_norm_backward_op.register_fake
def _(_to_y, x, y, _index, weight, *_):
    to_shortcut = x.new_empty(0) if y is None else torch.empty_like(x)
    return torch.empty_like(x), to_shortcut, weight.new_empty((2, *weight.shape))


@torch.library.custom_op("dfer::max_pool_backward", mutates_args=())
def _pool_backward_op(to_z: torch.Tensor, index: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the gradient of the pool's input."""
    from dfer.model import launches

    return launches.unpool(to_z.contiguous(memory_format=torch.channels_last), index, (height, width))


@_pool_backward_op.register_fake
def _(to_z, _index, height, width):
    shape = (*to_z.shape[:2], height, width)
    return torch.empty(shape, dtype=to_z.dtype, device=to_z.device, memory_format=torch.channels_last)


def _keep_norm(ctx, inputs, output):
    x, shortcut, weight, bias, mean, spread, eps, relu = inputs
    assert eps is None, "there is no gradient in evaluation"
    # A ReLU's mask can be made of x again, unless something was added: then it is the output's.
    ctx.save_for_backward(x, None if shortcut is None else output, weight, bias, mean, spread)
    ctx.relu = relu


def _norm_backward(ctx, to_y):
    x, y, weight, bias, *statistics = ctx.saved_tensors
    to_x, to_shortcut, to_affine = _norm_backward_op(to_y, x, y, None, weight, bias, statistics, ctx.relu)
    return to_x, None if y is None else to_shortcut, *to_affine, None, None, None, None


def _keep_norm_pool(ctx, inputs, output):
    x, weight, bias, mean, spread, eps = inputs
    assert eps is None, "there is no gradient in evaluation"
    ctx.save_for_backward(x, output[1], weight, bias, mean, spread)
    ctx.mark_non_differentiable(output[1])


def _norm_pool_backward(ctx, to_z, _):
    x, index, weight, bias, *statistics = ctx.saved_tensors
    to_x, _, to_affine = _norm_backward_op(to_z, x, None, index, weight, bias, statistics, True)
    return to_x, *to_affine, None, None, None


def _keep_pool(ctx, inputs, output):
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _pool_backward(ctx, to_z, _):
    return _pool_backward_op(to_z, *ctx.saved_tensors, *ctx.size)


_norm_op.register_autograd(_norm_backward, setup_context=_keep_norm)
_norm_pool_op.register_autograd(_norm_pool_backward, setup_context=_keep_norm_pool)
_pool_op.register_autograd(_pool_backward, setup_context=_keep_pool)


# ---- Modules.


def taken(x: Tensor) -> bool:
    """Return whether the kernels take maps: of a GPU or Triton's interpreter, channels-last, of 16 or 32 bits."""
    where = x.is_cuda or (x.device.type == "cpu" and _interpreted())
    return where and x.dtype in _TYPES and x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0


_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _interpreted() -> bool:
    try:
        from dfer.model.launches import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED


class FusedNorm(nn.BatchNorm2d):
    """Batch norm that adds a shortcut and rectifies in the same pass."""

    def forward(self, input: Tensor, shortcut: Tensor | None = None, relu: bool = False) -> Tensor:
        """Return the normalised maps, with the shortcut added and rectified if asked for."""
        alike = shortcut is None or (shortcut.dtype == input.dtype and taken(shortcut))
        # There is no mask of a sum that is not rectified, and no model that has one.
        if not (self.takes(input) and alike and (relu or shortcut is None)):
            y = super().forward(input)
            y = y if shortcut is None else y + shortcut
            return F.relu(y, inplace=True) if relu else y
        return _norm_op(input, shortcut, self.weight, self.bias, *self.statistics(input), relu)

    def pooled(self, x: Tensor) -> Tensor:
        """Return the pool of the rectified maps, which the kernels have to take."""
        return _norm_pool_op(x, self.weight, self.bias, *self.statistics(x))[0]

    def takes(self, x: Tensor) -> bool:
        """Return whether maps go through the kernels: they have no gradient in evaluation."""
        usual = (
            self.affine
            and self.track_running_stats
            and self.momentum is not None
            and self.weight.dtype is torch.float32
        )
        if not self.training and torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        several = x.numel() > x.shape[1] or not self.training  # torch says what is wrong with a single value
        return usual and several and taken(x)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Return the statistics to normalise by, those of the maps in training."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        if not self.training:
            return self.running_mean, self.running_var, self.eps
        assert self.momentum is not None
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        return *_statistics_op(x.detach(), *running, self.momentum, self.eps), None


class FusedPool(nn.MaxPool2d):
    """A 3x3 max-pool at stride 2, whose gradient is gathered by the places of the largest cells."""

    def forward(self, input: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Return the pooled maps, of those that a norm and a ReLU make first if there is one."""
        if norm is not None:
            assert isinstance(norm, FusedNorm)
            if norm.takes(input):
                return norm.pooled(input)
            input = norm(input, relu=True)
        made: Any = _pool_op(input)[0] if taken(input) else super().forward(input)
        return made


def _basic_block(self: Any, x: Tensor) -> Tensor:
    return _with_shortcut(self, self.bn2, self.conv2(self.bn1(self.conv1(x), relu=True)), x)


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    inner = self.bn2(self.conv2(self.bn1(self.conv1(x), relu=True)), relu=True)
    return _with_shortcut(self, self.bn3, self.conv3(inner), x)


def _with_shortcut(block: Any, norm: FusedNorm, x: Tensor, shortcut: Tensor) -> Tensor:
    """Return a residual block's output: what stands between norm and sum keeps them apart."""
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    if block.se is None and block.drop_path is None:
        return norm(x, shortcut, relu=True)
    x = norm(x)
    x = x if block.se is None else block.se(x)
    x = x if block.drop_path is None else block.drop_path(x)
    return F.relu(x + shortcut, inplace=True)


def _features(self: Any, x: Tensor) -> list[Tensor]:
    """Return the levels of a ResNet whose stem is conv1, bn1, act1 and maxpool."""
    x, levels = self.maxpool(self.conv1(x), self.bn1), []
    for name, stage in self.items():
        x = x if name in _STEM else stage(x)
        if name in self.return_layers:
            levels.append(x)
    return levels


_STEM = ("conv1", "bn1", "act1", "maxpool")
_FORWARDS = {  # of timm's classes
    "timm.models.resnet.BasicBlock": (_basic_block, ("act1", "act2")),
    "timm.models.resnet.Bottleneck": (_bottleneck, ("act1", "act2", "act3")),
}


def fuse(model: nn.Module, parts: Parts) -> None:
    """Have a model's batch norms, its stem's max-pool, or both computed by the kernels, where they take the maps."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and parts != "pool":
            module.__class__ = FusedNorm
        elif type(module) is nn.MaxPool2d and parts != "norm" and _is_stem_pool(module):
            module.__class__ = FusedPool
    for module in model.modules():
        of_timm = _FORWARDS.get(f"{type(module).__module__}.{type(module).__name__}")
        if of_timm and parts != "pool" and _is_plain(module, of_timm[1]):
            module.__class__ = _subclass(type(module), of_timm[0])
        elif type(module).__name__ == "FeatureListNet" and _has_plain_stem(module):
            module.__class__ = _subclass(type(module), _features)


def _is_stem_pool(pool: nn.MaxPool2d) -> bool:
    pairs = [(x, x) if isinstance(x, int) else tuple(x) for x in (pool.kernel_size, pool.stride, pool.padding)]
    return pairs == [(3, 3), (2, 2), (1, 1)] and pool.dilation in (1, (1, 1)) and not pool.ceil_mode


def _is_plain(block: Any, activations: tuple[str, ...]) -> bool:
    """Return whether nothing but ReLUs stands behind a block's norms."""
    between = (block.aa, block.drop_block)
    norms = (block.bn1, block.bn2, getattr(block, "bn3", block.bn2))
    return (
        all(isinstance(module, nn.Identity) for module in between)
        and all(type(getattr(block, name)) is nn.ReLU for name in activations)
        and all(type(norm) is FusedNorm for norm in norms)
    )


def _has_plain_stem(net: Any) -> bool:
    parts = [type(net[name]) if name in net else None for name in _STEM[1:]]
    in_order = tuple(net)[:4] == _STEM and not set(_STEM) & set(net.return_layers)
    return in_order and parts == [FusedNorm, nn.ReLU, FusedPool]


@functools.cache
def _subclass(base: type, forward: Any) -> type:
    return type(f"Fused{base.__name__}", (base,), {"forward": forward})


# ---- Whether a device can be trusted with it.


# What the kernels are launched for, by norm, pool, maps and shortcut: ours, and the same of torch's operators.
_CASES: dict[str, tuple[Any, Any]] = {
    "norm": (lambda norm, _, x, __: norm(x), lambda norm, _, x, __: norm(x)),
    "rectified": (lambda norm, _, x, __: norm(x, relu=True), lambda norm, _, x, __: norm(x).relu()),
    "sum": (lambda norm, _, x, also: norm(x, also, relu=True), lambda norm, _, x, also: (norm(x) + also).relu()),
    "stem": (lambda norm, pool, x, _: pool(x, norm), lambda norm, pool, x, _: pool(norm(x).relu())),
    "pool": (lambda _, pool, x, __: pool(x), lambda _, pool, x, __: pool(x)),
}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels are not to be used: they cannot run, or make something else of a few maps than torch."""
    try:
        off = max(_distance(device, kind, case) for kind in {dtype, torch.float32} for case in _CASES)
    except Exception as error:  # of Triton, its compiler and the driver, which raise different classes
        return f"Triton's kernels do not run here ({reason(error)})"
    return None if off <= 0.05 else f"Triton's kernels are {off:.1e} off torch's operators"


def _distance(device: torch.device, dtype: torch.dtype, case: str) -> float:
    """Return how far a layer's outputs and gradients are from torch's on a CPU, as a share of the largest element.

    Those of training, and then the outputs of evaluation. A GPU's own are no measure in its deterministic mode, where
    torch may refuse a pool's gradient.
    """
    layers: Any = (nn.BatchNorm2d(72), nn.MaxPool2d(3, 2, 1))
    ours: Any = copy.deepcopy(layers)
    fuse(nn.ModuleList(ours), "both")
    waves = torch.arange(2 * 6 * 7 * 72).view(2, 6, 7, 72).permute(0, 3, 1, 2).mul(0.7).sin().to(dtype)
    found = []
    for (norm, pool), layer in zip((ours, layers), _CASES[case], strict=True):
        x = waves.to(device) if norm is ours[0] else waves.float()
        norm.to(x.device)
        x.requires_grad_()
        shortcut = x.detach().flip(0).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(norm, pool, x, shortcut)
        # Rounding makes cells of a window equal, whose gradient goes to another one of them then.
        leaves = [x] * (case != "stem" or dtype is torch.float32) + [shortcut] * (case == "sum")
        made = [y]
        if case != "pool":
            leaves += [norm.weight, norm.bias]
            made += [norm.running_mean, norm.running_var]
        # 0 at the edge of a ReLU, which rounding moves; and without negative ones, as y's own would have no gradient.
        made += torch.autograd.grad(y, leaves, y.detach().relu())
        norm.eval()
        with torch.no_grad():
            made.append(layer(norm, pool, x, shortcut))
        found.append([tensor.detach().float().cpu() for tensor in made])
    apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
    return float(torch.stack(apart).nan_to_num(torch.inf).max())
