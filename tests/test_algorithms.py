"""Which algorithms a run takes, and what is said where there is none."""

import os

import pytest
import torch

from dfer.cli import UserError
from dfer.config import RunConfig
from dfer.run.algorithms import _settings, chosen_algorithms


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")


@pytest.mark.parametrize("fixed", [False, True])
def test_one_option_fixes_all_algorithms(fixed):
    before = _settings()
    with chosen_algorithms(RunConfig(deterministic=fixed)):
        found = torch.backends.cudnn.deterministic, not torch.backends.cudnn.benchmark
        assert (*found, torch.are_deterministic_algorithms_enabled()) == (fixed,) * 3
        assert torch.backends.cuda.mem_efficient_sdp_enabled() != fixed
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if fixed else "")
    assert _settings() == before


def test_a_workspace_that_will_do_is_left(monkeypatch):
    for given, want in ((":16:8", ":16:8"), (":0:0", ":4096:8")):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
        with chosen_algorithms(RunConfig(deterministic=True)):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == want


def test_an_operator_without_such_an_algorithm_is_one_line():
    with (
        pytest.raises(UserError, match=r"^--run.deterministic: torch has no algorithm for \S+ that rounds alike"),
        chosen_algorithms(RunConfig(deterministic=True)),
    ):
        torch.nn.functional.max_unpool2d(torch.rand(1, 1, 2, 2), torch.arange(4).view(1, 1, 2, 2), 2)
    with pytest.raises(RuntimeError, match="another"), chosen_algorithms(RunConfig(deterministic=True)):
        raise RuntimeError("another")
