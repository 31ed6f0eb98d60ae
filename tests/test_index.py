"""The index: what the disk holds, scanned once, and never taken from a stale or damaged cache."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dfer import index as index_module
from dfer.annotations import read_annotations
from dfer.index import build_index, load_index


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A list of three folders with 2, 3 and 4 frames, one of them with a name that is no UTF-8."""
    for i in range(3):
        folder = tmp_path / f"v {i}"
        folder.mkdir()
        for k in range(2 + i):
            (folder / f"{10 * k + 1}.jpg").touch()
    with open(os.fsencode(tmp_path) + b"/v 0/\xff.jpg", "wb"):
        pass
    path = tmp_path / "list.txt"
    path.write_text("v 0 3 0\nv 1 3 1\nv 2 9 6\n")
    return path


def same(a, b) -> bool:
    return (
        a.records == b.records
        and a.frames == b.frames
        and np.array_equal(a.num_frames, b.num_frames)
        and np.array_equal(a.labels, b.labels)
    )


def forbid_scans(monkeypatch):
    def fail(record):
        raise AssertionError("scanned again")

    monkeypatch.setattr(index_module, "_scan_folder", fail)


def test_a_warm_index_equals_the_scan_and_does_not_scan(small, monkeypatch):
    want = build_index(read_annotations(small))
    assert want.num_frames.tolist() == [3, 3, 4] and want.num_miscounted() == 1
    assert same(load_index(small), want)
    forbid_scans(monkeypatch)
    assert same(load_index(small), want)
    small.write_text(small.read_text().replace("9 6", "4 5"))  # labels and counts are the list's, not the cache's
    changed = load_index(small)
    assert changed.labels.tolist() == [0, 1, 5] and changed.num_miscounted() == 0
    assert {p.name for p in small.parent.iterdir()} == {"list.txt", "list.txt.index.npz", "v 0", "v 1", "v 2"}


def add_a_frame(small: Path) -> None:
    time.sleep(0.02)  # the clock of a file system ticks every few ms
    (small.parent / "v 1" / "99.jpg").touch()


def rename_a_frame(small: Path) -> None:
    time.sleep(0.02)
    (small.parent / "v 2" / "1.jpg").rename(small.parent / "v 2" / "2.jpg")


def drop_a_row(small: Path) -> None:
    small.write_text("v 0 3 0\nv 2 4 6\n")


def swap_rows(small: Path) -> None:
    small.write_text("v 1 3 1\nv 0 3 0\nv 2 9 6\n")


@pytest.mark.parametrize("change", [add_a_frame, rename_a_frame, drop_a_row, swap_rows])
def test_a_change_is_seen(small, change):
    before = load_index(small)
    change(small)
    after = load_index(small)
    assert same(after, build_index(read_annotations(small))) and not same(after, before)
    assert same(load_index(small), after)


def test_a_damaged_cache_is_made_anew(small):
    want, cache = load_index(small), Path(f"{small}.index.npz")
    whole = cache.read_bytes()
    for damage in (b"", b"garbage", whole[:-30], whole[: len(whole) // 2], whole[:200] + b"xxxx" + whole[204:]):
        cache.write_bytes(damage)
        assert same(load_index(small), want)
    np.savez(cache, key="x")
    assert same(load_index(small), want)
    cache.unlink()
    cache.mkdir()  # cannot be replaced: no cache then, and nothing left behind
    assert same(load_index(small), want)
    assert not list(small.parent.glob("*.partial"))


def test_missing_folders_are_named_with_a_cache_too(small):
    load_index(small)
    for path in (small.parent / "v 1").iterdir():
        path.unlink()
    (small.parent / "v 1").rmdir()
    with pytest.raises(ValueError, match=r"list.txt:2: no such frame folder"):
        load_index(small)


def test_many_at_once(small):
    want = build_index(read_annotations(small))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: load_index(small), range(32)):
            assert same(found, want)
    assert not list(small.parent.glob("*.partial"))
