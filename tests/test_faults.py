"""A sample of what `make faults` does for hours."""

import pytest

from tests.faults.__main__ import ON_A_SMALL_DISK, ON_TWO_NODES, ONE_PROCESS, TOGETHER, WITH_WANDB, main
from tests.test_two_nodes import WHY_NOT


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        (ONE_PROCESS, 2),
        pytest.param(ONE_PROCESS, 4, marks=pytest.mark.slow),
        pytest.param(ONE_PROCESS, 12, marks=pytest.mark.slow),
        pytest.param(ON_A_SMALL_DISK, 4, marks=pytest.mark.slow),
        pytest.param(WITH_WANDB, 4, marks=pytest.mark.slow),
        pytest.param(TOGETHER, 4, marks=pytest.mark.slow),
        pytest.param(ON_TWO_NODES, 2, marks=[pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]),
    ],
)
def test_runs_that_are_broken_lose_nothing(kinds, count, capsys, tmp_path):
    out = tmp_path / "faults.md"
    code = main(["--count", str(count), "--hours", "0.1", "--out", str(out), "--kinds", *kinds])
    assert code == 0, capsys.readouterr().out
    assert "| all | 0 " not in out.read_text() and out.read_text().endswith(" | 0 | 0 |\n")
