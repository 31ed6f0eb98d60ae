"""Work in processes: the order of results, what is under way at most, errors, and processes that are killed."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

from dfer.cli import UserError
from dfer.lists.processes import in_processes


def slow_at_first(item: int) -> tuple[int, int]:
    time.sleep(0.1 if item == 0 else 0)
    return item, os.getpid()


def test_results_come_in_order_from_several_processes():
    found = list(in_processes(slow_at_first, range(40), [1] * 40, workers=3))
    assert [item for item, _ in found] == list(range(40))
    assert os.getpid() not in {process for _, process in found} and len({process for _, process in found}) > 1
    assert {process for _, process in in_processes(slow_at_first, range(3), [1] * 3, workers=1)} == {os.getpid()}
    assert list(in_processes(slow_at_first, [], [], workers=2)) == []


def note(item: int, folder: Path) -> int:
    (folder / str(item)).touch()
    return item


def test_what_is_under_way_is_bounded(tmp_path):
    """What is begun while nobody takes a result is what fits, and never less than the processes can do."""
    for memory, most in ((0, 2), (50, 5), (1000, 12)):
        folder = tmp_path / str(memory)
        folder.mkdir()
        results = in_processes(functools.partial(note, folder=folder), range(12), [10] * 12, workers=2, memory=memory)
        for taken in range(3):
            assert next(results) == taken
            wanted = min(most + taken, 12)
            deadline = time.monotonic() + 30
            while len(os.listdir(folder)) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.02)
            assert len(os.listdir(folder)) == wanted
        assert list(results) == list(range(3, 12))


def fail_at_two(item: int) -> int:
    if item == 2:
        raise UserError("row 2: cannot be read")
    return item


def test_an_error_is_raised_in_the_place_of_the_result():
    results = in_processes(fail_at_two, range(9), [1] * 9, workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match=r"^row 2: cannot be read$"):
        next(results)


def die_at_two(item: int) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_is_killed_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^a worker process was killed, .*: lower --workers$"):
        list(in_processes(die_at_two, range(9), [1] * 9, workers=2))
