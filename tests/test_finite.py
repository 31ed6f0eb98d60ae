"""Non-finite steps are as if they had never been, and a run of nothing else ends."""

import copy

import pytest
import torch
from torch import nn

from dfer.optim.average import build_ema
from dfer.optim.guard import NonFiniteGuard
from dfer.optim.optimizers import build_optimizer
from dfer.state import TrainState
from tests.conftest import no_waiting

OPTIMIZERS = ["adamw", "sgd", "lion", "muon"]


def build(name: str, scale: float | None = None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
    optimizer = build_optimizer(model, name, lr=0.05, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    return model, optimizer, NonFiniteGuard(model, optimizer, scaler)


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


def states(optimizer: torch.optim.Optimizer) -> dict:
    """All tensors of the state, by parameter and name."""
    by_parameter = optimizer.state_dict()["state"]
    return {(p, k): v for p, state in by_parameter.items() for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", OPTIMIZERS)
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
    moments, want_moments = states(optimizer), states(want_optimizer)
    assert moments.keys() == want_moments.keys() and len(moments) >= 6
    for key, moment in moments.items():
        assert torch.equal(moment, want_moments[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_leaves_a_state_at_its_beginning(name):
    """Counters too; and weights that had no gradient are not touched."""
    model, optimizer, steps = build(name)
    model[1].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    take(model, steps, 0, "nan", 1.0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "num_batches" not in k)
    assert states(optimizer) and not any(moment.any() for moment in states(optimizer).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_loss_is_skipped_and_its_scale_halved(name):
    model, _, steps = build(name, scale=8.0)
    want, want_optimizer, _ = build(name)
    before = copy.deepcopy(model.state_dict())
    for step, harm in ((0, "nan"), (1, None)):
        steps.before_forward()
        x, y = batch(step, harm)
        steps._scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        steps.step(0.0)
        model.zero_grad()
        assert steps._scaler.get_scale() == 4.0
        same = all(torch.equal(before[k], v) for k, v in model.state_dict().items() if "num_batches" not in k)
        assert same == (harm is not None)
    nn.functional.cross_entropy(want(batch(1, None)[0]), batch(1, None)[1]).backward()
    want_optimizer.step()
    torch.testing.assert_close(model[0].weight, want[0].weight)


def test_fused_optimizers_copy_nothing(monkeypatch):
    """They look at the gradient themselves: the guard of the others costs them nothing."""
    for name, copies in (("adamw", False), ("sgd", False), ("lion", True), ("muon", True)):
        model, _, steps = build(name)
        called = []
        monkeypatch.setattr(steps, "_step_or_restore", called.append)
        take(model, steps, 0, None, 1.0)
        assert bool(called) == copies, name


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
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_is_not_waited_for(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).cuda()
    optimizer = build_optimizer(model, name, lr=0.05, weight_decay=0.1)
    steps = NonFiniteGuard(model, optimizer, torch.amp.GradScaler("cuda", enabled=False))
    before = copy.deepcopy(model.state_dict())
    x = torch.full((6, 4), torch.nan, device="cuda")
    for number in range(NonFiniteGuard.LIMIT + NonFiniteGuard.LAG + 1):
        with no_waiting():
            steps.before_forward()
            model(x).sum().backward()
            steps.step(1.0)
            model.zero_grad()
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
