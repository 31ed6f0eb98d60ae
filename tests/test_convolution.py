"""Convolutions that are products of matrices, against torch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import convolution_speed
from dfer.model import convolution
from dfer.model.backbone import FrameBackbone
from dfer.model.convolution import Convolution, with_products
from dfer.model.pyramid import FeaturePyramid, TopDownFusion


def layer(k: int, stride: int, channels: int = 128, out: int = 40) -> nn.Conv2d:
    torch.manual_seed(k)
    conv = nn.Conv2d(channels, out, k, stride, k // 2, bias=False)
    return conv.to(memory_format=torch.channels_last)


def maps(height: int, width: int, channels: int = 128) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, channels, height, width).to(memory_format=torch.channels_last)


@pytest.fixture
def products(monkeypatch) -> list:
    """Which maps were convolved as products."""
    made, apply = [], convolution._Product.apply
    monkeypatch.setattr(convolution._Product, "apply", lambda x, *rest: made.append(tuple(x.shape)) or apply(x, *rest))
    return made


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (4, 1), (3, 2), (4, 3), (7, 2)], ids=str)
def test_outputs_and_gradients_are_those_of_the_convolution(k, stride, size, products, monkeypatch):
    monkeypatch.setattr(Convolution, "_is_small", lambda *_: True)
    theirs = layer(k, stride)
    ours = with_products(copy.deepcopy(theirs))
    x = [maps(*size).requires_grad_() for _ in range(2)]
    made = [conv(leaf) for conv, leaf in zip((theirs, ours), x, strict=True)]
    assert made[0].shape == made[1].shape and products == [x[0].shape]
    assert made[1].is_contiguous(memory_format=torch.channels_last)
    to_y = torch.randn_like(made[0])
    for y in made:
        y.backward(to_y)
    for want, found in zip(
        (made[0], x[0].grad, theirs.weight.grad), (made[1], x[1].grad, ours.weight.grad), strict=True
    ):
        assert want.stride() == found.stride() or 1 in size
        assert (want - found).abs().max() < 1e-5 * want.abs().max() + 1e-6


def test_only_what_needs_a_gradient_has_one(monkeypatch):
    monkeypatch.setattr(Convolution, "_is_small", lambda *_: True)
    ours, x = with_products(layer(3, 1)), maps(2, 2)
    ours(x).sum().backward()
    assert x.grad is None and ours.weight.grad is not None
    frozen = with_products(layer(3, 1)).requires_grad_(requires_grad=False)
    frozen(x.requires_grad_()).sum().backward()
    assert x.grad is not None and frozen.weight.grad is None
    with torch.no_grad():
        assert not frozen(x).requires_grad


def test_under_autocast_both_round_alike(products):
    theirs = layer(3, 1)
    ours = with_products(copy.deepcopy(theirs))
    with torch.autocast("cpu", torch.bfloat16):
        want, found = theirs(maps(2, 2)), ours(maps(2, 2))
    assert want.dtype == found.dtype == torch.bfloat16 and len(products) == 1
    assert (want - found).abs().max() <= 2**-7 * want.abs().max()
    want.float().square().mean().backward()
    found.float().square().mean().backward()
    assert ours.weight.grad is not None and ours.weight.grad.dtype == torch.float32
    assert (theirs.weight.grad - ours.weight.grad).abs().max() < 0.02 * theirs.weight.grad.abs().max()


@pytest.mark.parametrize("amx", [False, True])
def test_large_maps_stay_with_the_library(amx, products, monkeypatch):
    """As do maps that are not channels-last. With AMX, products are faster for a few more cells."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for dtype in (torch.float32, torch.bfloat16):
        small = 9 if amx and dtype is torch.bfloat16 else 4
        for cells in (1, 4, 5, 9, 10):
            products.clear()
            x = maps(1, cells).to(dtype)
            with_products(layer(3, 1).to(dtype))(x)
            assert len(products) == (cells <= small)
    products.clear()
    with_products(layer(3, 1))(maps(2, 2).contiguous())
    with_products(layer(3, 2))(maps(6, 4))
    wide = with_products(layer(3, 1, 512, 512).bfloat16())
    wide(maps(4, 4, 512).bfloat16())
    wide(maps(4, 5, 512).bfloat16())
    assert products == [(3, 512, 4, 4)] * amx


def test_a_backbone_keeps_its_parameters_and_takes_products_at_its_end(products):
    backbone = FrameBackbone("resnet18").eval().to(memory_format=torch.channels_last)
    replaced = [name for name, module in backbone.named_modules() if isinstance(module, Convolution)]
    assert len(replaced) == 13 and not any("layer1" in name for name in replaced)
    frames = torch.randn(2, 3, 48, 48).to(memory_format=torch.channels_last)
    found = backbone(frames)
    assert products and all(x[-1] <= 6 for x in products)
    for module in backbone.modules():
        if isinstance(module, Convolution):
            module.__class__ = nn.Conv2d
    for a, b in zip(found, backbone(frames), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_so_does_a_pyramid(products):
    pyramid, fusion = FeaturePyramid([256, 512], 128), TopDownFusion(128)
    model = nn.ModuleList([pyramid, fusion]).eval().to(memory_format=torch.channels_last)
    fine, coarse = pyramid([maps(3, 2, 256), maps(2, 1, 512)])
    fusion(fine[..., :2, :], coarse)
    assert products[-2:] == [(3, 512, 2, 1), (3, 128, 2, 2)]
    assert sum(isinstance(module, Convolution) for module in model.modules()) == 3


def test_others_are_left_alone():
    odd = [
        nn.Conv2d(128, 8, 3, padding=1),  # a bias
        nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False),
        nn.Conv2d(128, 8, 3, bias=False),  # no padding
        nn.Conv2d(128, 8, 2, padding=1, bias=False),
        nn.Conv2d(128, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(128, 8, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(128, 8, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(128, 8, 3, (1, 2), padding=1, bias=False),
        nn.Conv2d(64, 8, 3, padding=1, bias=False),
    ]
    assert all(type(module) is nn.Conv2d for module in with_products(nn.Sequential(*odd)))


def test_a_program_of_torch_export_has_the_convolution():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = with_products(layer(3, 1))

        def forward(self, x):
            return F.relu(self.conv(x))

    program = torch.export.export(Net().eval(), (maps(2, 2),))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("conv2d" in name for name in names) and not any("linear" in name for name in names)


def test_the_benchmark_measures_both(capsys):
    words = ["--size", "32", "--batch-size", "2", "--threads", str(torch.get_num_threads()), "--steps", "1"]
    assert convolution_speed.main(convolution_speed.parser().parse_args(words)) == 0
    ours, library, ratio = capsys.readouterr().out.splitlines()
    assert ours.startswith("products ") and library.startswith("library ") and "times the library's" in ratio
    taken = [sum(isinstance(m, Convolution) for m in convolution_speed.model(x).modules()) for x in (True, False)]
    assert taken[0] > 13 and taken[1] == 0  # the pyramids' too
