"""Non-finite steps are as if they had never been, and a run of nothing else ends."""

import copy
import itertools

import pytest
import torch
from torch import nn

from dfer.optim import NonFiniteGuard, build_ema, build_optimizer
from dfer.state import TrainState


def build(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
    optimizer = build_optimizer(model, name, lr=0.05, weight_decay=0.1)
    return model, optimizer, NonFiniteGuard(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def batch(step: int, harm: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
    if harm in ("nan", "inf"):
        x[2, 1] = float(harm)
    return x, y


def take(model, steps: NonFiniteGuard, step: int, harm: str | None, clip_norm: float) -> torch.Tensor:
    steps.before_forward()
    x, y = batch(step, harm)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    if harm == "gradient":
        model[3].bias.grad[1] = torch.nan
    norm = steps.step(clip_norm)
    model.zero_grad()
    return norm


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_skipped_step_changes_nothing(name, clip_norm):
    harms = ["nan", None, None, "inf", "gradient", None, "nan", "nan", None]  # the very first one too
    model, optimizer, steps = build(name)
    want, want_optimizer, _ = build(name)
    in_a_row = 0
    for step, harm in enumerate(harms):
        norm = take(model, steps, step, harm, clip_norm)
        assert bool(norm.isfinite()) == (harm is None)
        in_a_row = 0 if harm is None else in_a_row + 1
        assert steps.skipped.tolist() == [sum(h is not None for h in harms[: step + 1]), in_a_row]
        if harm is None:  # the oracle simply takes no other steps
            nn.functional.cross_entropy(want(batch(step, None)[0]), batch(step, None)[1]).backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(want.parameters(), clip_norm)
            want_optimizer.step()
            want.zero_grad()
        for key, value in want.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(model.state_dict()[key], value), (step, key)
    moments, want_moments = optimizer.state_dict()["state"], want_optimizer.state_dict()["state"]
    for parameter, key in itertools.product(moments, moments[0]):
        assert torch.equal(moments[parameter][key], want_moments[parameter][key]), key


def test_many_skipped_steps_in_a_row_are_diverged():
    model, _, steps = build("adamw")
    before = copy.deepcopy(model.state_dict())
    for step in range(NonFiniteGuard.LIMIT - 1):
        take(model, steps, step, "nan", 1.0)
        assert not steps.diverged()
    take(model, steps, 0, None, 1.0)
    for step in range(NonFiniteGuard.LIMIT):
        assert not steps.diverged()
        take(model, steps, step, "nan", 1.0)
    assert steps.diverged() and steps.skipped[0] == 2 * NonFiniteGuard.LIMIT - 1
    assert not torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_gpu_is_not_waited_for(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).cuda()
    optimizer = build_optimizer(model, name, lr=0.05, weight_decay=0.1)
    steps = NonFiniteGuard(model, optimizer, torch.amp.GradScaler("cuda", enabled=False))
    before = copy.deepcopy(model.state_dict())
    x = torch.full((6, 4), torch.nan, device="cuda")
    for number in range(NonFiniteGuard.LIMIT + NonFiniteGuard.LAG + 1):
        torch.cuda.set_sync_debug_mode("error")
        steps.before_forward()
        model(x).sum().backward()
        steps.step(1.0)
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
        assert steps.diverged() == (number >= NonFiniteGuard.LIMIT + NonFiniteGuard.LAG - 1)
    for key, value in before.items():
        assert "num_batches" in key or torch.equal(model.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, as it loads its compiler
def test_what_is_evaluated_is_compiled_too():
    """The average is a copy of the model: compiling the one does not compile the other."""
    model, optimizer, _ = build("adamw")
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), build_ema(model, 0.5, warmup=True))
    assert state.evaluated_model() is not model
    state.compile()
    assert model._compiled_call_impl is not None and state.evaluated_model()._compiled_call_impl is not None
