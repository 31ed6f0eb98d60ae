"""Optimizers, their groups and the learning rate."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn

from dfer.cli import UserError
from dfer.config import config_from_json, parse_config
from dfer.model.backbone import FrameBackbone
from dfer.optim.average import build_ema
from dfer.optim.optimizers import build_optimizer, param_groups
from dfer.optim.schedule import Schedule

OPTIMIZERS = ["adamw", "sgd", "lion", "muon"]


def test_learning_rate_warms_up_and_ends_at_zero():
    schedule = Schedule(0.5, 10, 100, 25)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5 == max(rates)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.001
    assert schedule.lr_at(100) == pytest.approx(0) and Schedule(0.5, 0, 10, 10).lr_at(0) == 0.5


def test_the_default_rate_is_that_of_before_to_the_bit():
    schedule = Schedule(1e-3, 7, 90, 30)
    for step in range(7, 95):
        progress = (step - 7) / 83
        assert schedule.lr_at(step) == 1e-3 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def timms(kind, **options):
    """timm's schedule after a warm-up, as a function of the step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = kind(optimizer, t_in_epochs=False, **options)
    return lambda step: scheduler._get_lr(step)[0]


def test_rates_are_timms():
    """Its milestones are counted from 1, and its warm-up from 0; its steps down know no lowest rate."""
    cosine = timms(CosineLRScheduler, t_initial=80, lr_min=0.01)
    every = timms(StepLRScheduler, decay_t=30, decay_rate=0.2)
    at = timms(MultiStepLRScheduler, decay_t=[21, 61], decay_rate=0.5)
    made = {
        "cosine": Schedule(0.3, 10, 90, 10, "cosine", 0.01),
        "step": Schedule(0.3, 10, 90, 10, "step", 0.0, (3,), 0.2),
        "multistep": Schedule(0.3, 10, 90, 10, "multistep", 0.0, (2, 6), 0.5),
        "constant": Schedule(0.3, 10, 90, 10, "constant"),
        "floored": Schedule(0.3, 0, 90, 10, "step", 0.05, (1,), 0.1),
    }
    for step in range(10, 90):
        assert made["cosine"].lr_at(step) == pytest.approx(cosine(step - 10), rel=1e-12)
        assert made["step"].lr_at(step) == pytest.approx(every(step), rel=1e-12)
        assert made["multistep"].lr_at(step) == pytest.approx(at(step), rel=1e-12)
        assert made["constant"].lr_at(step) == 0.3 and made["floored"].lr_at(step) == 0.05
    assert made["step"].lr_at(29) == 0.3 and made["step"].lr_at(30) == pytest.approx(0.06)
    assert made["cosine"].lr_at(90) == pytest.approx(0.01)
    assert [made["step"].lr_at(step) for step in (0, 4)] == pytest.approx([0.03, 0.15])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.schedule", "step"], "--optim.schedule step: takes one number of --optim.decay-epochs, not none"),
        (["--optim.schedule", "step", "--optim.decay-epochs", "3", "6"], "takes one number"),
        (["--optim.schedule", "multistep"], "takes rising --optim.decay-epochs, not none"),
        (["--optim.schedule", "multistep", "--optim.decay-epochs", "6", "3"], "rising --optim.decay-epochs, not 6 3"),
        (["--optim.schedule", "multistep", "--optim.decay-epochs", "3", "3"], "not 3 3"),
        (["--optim.decay-epochs", "3"], "--optim.decay-epochs 3: only --optim.schedule step and multistep step down"),
        (["--optim.schedule", "step", "--optim.decay-epochs", "0"], "--optim.decay-epochs 0: must be between 1 and"),
        (["--optim.min-lr", "0.1"], "--optim.min-lr 0.1: more than --optim.lr 0.001"),
        (["--optim.optimizer", "adam"], "--optim.optimizer"),
        (["--optim.layer-decay", "0"], "--optim.layer-decay 0.0: must be between 0.01 and 1.0"),
        (["--optim.decay-rate", "1.5"], "--optim.decay-rate 1.5"),
    ],
)
def test_bad_options_are_one_line(words, message):
    with pytest.raises(UserError) as error:
        parse_config(words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_epochs_of_steps_down_are_saved_with_the_run(tmp_path):
    words = ["--optim.schedule", "multistep", "--optim.decay-epochs", "3", "6", "--optim.optimizer", "lion"]
    config = parse_config(words)
    assert config.optim.decay_epochs == (3, 6) and config_from_json(config.to_json(), tmp_path) == config
    for damaged in ("5", '["3"]', "[0]"):
        text = config.to_json().replace("[\n      3,\n      6\n    ]", damaged)
        assert text != config.to_json()
        with pytest.raises(UserError, match=r"decay-epochs|not a run's configuration"):
            config_from_json(text, tmp_path)


class WithExemption(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"scale"}


def test_weight_decay_spares_biases_norms_and_what_modules_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), WithExemption())
    decayed, spared = param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and [p is model[0].weight for p in decayed["params"]] == [True]
    assert spared["weight_decay"] == 0 and len(spared["params"]) == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_descend_and_ema_follows(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer, ema = build_optimizer(model, name, lr=0.05, weight_decay=0.0), build_ema(model, 0.5, warmup=False)
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and build_ema(model, 0.0, warmup=True) is None
    assert not torch.equal(ema.module.weight, model.weight)
    torch.testing.assert_close(ema.module.weight, model.weight, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_to_the_bit(name):
    """Through a file, with the learning rate of each step, in layers."""
    schedule = Schedule(0.02, 2, 8, 4, "step", 0.0, (1,), 0.5)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            schedule.set_lr(optimizer, step)
            generator = torch.Generator().manual_seed(step)
            features = model.backbone(torch.randn(2, 3, 32, 32, generator=generator))
            (model.head(features[-1].mean((2, 3))) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole = nn.ModuleDict({"backbone": FrameBackbone("test_resnet"), "head": nn.Linear(96, 5)})
    halves = copy.deepcopy(whole)
    run(whole, build_optimizer(whole, name, 0.02, 0.1, layer_decay=0.5), range(4))
    optimizer = build_optimizer(halves, name, 0.02, 0.1, layer_decay=0.5)
    run(halves, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = build_optimizer(halves, name, 0.02, 0.1, layer_decay=0.5)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    run(halves, optimizer, range(2, 4))
    for key, value in whole.state_dict().items():
        assert torch.equal(halves.state_dict()[key], value), key


def test_who_could_be_captured_in_a_graph():
    model = nn.Linear(4, 4)
    found = [build_optimizer(model, name, 0.1, 0.1).capturable for name in OPTIMIZERS]
    assert found == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "first", "last", "depth"),
    [
        ("test_resnet", "net.conv1.0.weight", "net.layer4.0.conv2.weight", 5),
        ("resnet18", "net.conv1.weight", "net.layer4.1.conv2.weight", 9),
        ("test_convnext", "net.stem_0.weight", "net.stages_3.blocks.1.mlp.fc2.weight", 0),
        ("test_vit", "net.model.patch_embed.proj.weight", "net.model.blocks.5.mlp.fc2.weight", 7),
    ],
)
def test_layers_of_the_backbone_learn_slower_the_deeper_they_lie(name, first, last, depth):
    model = nn.ModuleDict({"backbone": FrameBackbone(name), "head": nn.Linear(4, 5)})
    groups = param_groups(model, 0.1, 0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert sum(len(g["params"]) for g in groups) == len(scale) == len(names)
    assert scale[id(model["head"].weight)] == scale[id(model["head"].bias)] == groups[0]["lr_scale"] == 1
    assert scale[id(names[f"backbone.{last}"])] == 0.5
    deepest = scale[id(names[f"backbone.{first}"])]
    assert deepest == min(scale.values()) and (not depth or deepest == 0.5**depth)
    exempt = {"backbone.net.model.cls_token", "backbone.net.model.pos_embed"}  # as timm says
    for key, parameter in names.items():
        (decay,) = (g["weight_decay"] for g in groups if any(parameter is p for p in g["params"]))
        assert decay == (0.1 if parameter.ndim > 1 and key not in exempt else 0), key

    optimizer = build_optimizer(model, "sgd", 0.1, 0.1, 0.5)
    Schedule(0.3, 0, 10, 10).set_lr(optimizer, 0)
    assert {id(p): g["lr"] / 0.3 for g in optimizer.param_groups for p in g["params"]} == pytest.approx(scale)
    assert optimizer.param_groups[0]["lr"] == 0.3  # which is logged


def test_without_layer_decay_the_groups_are_those_of_before():
    model = nn.ModuleDict({"backbone": FrameBackbone("test_resnet"), "head": nn.Linear(4, 5)})
    groups = param_groups(model, 0.1)
    assert len(groups) == 2 and all(group.keys() == {"params", "weight_decay"} for group in groups)


def test_a_model_without_known_layers_is_one_line():
    with pytest.raises(UserError, match=r"--optim\.layer-decay: the model has no backbone of timm"):
        build_optimizer(nn.Linear(3, 3), "adamw", 0.1, 0.1, 0.75)
    model = nn.ModuleDict({"backbone": FrameBackbone("test_resnet")})
    model["backbone"].net.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match="timm does not know the layers of test_resnet"):
        param_groups(model, 0.1, 0.75)
