"""The index: what the disk holds, scanned once, and never taken from a stale or damaged cache."""

import hashlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

import dfer.video.random_access
from dfer.lists import scan as scan_module
from dfer.lists.annotations import read_annotations
from dfer.lists.index import build_index, load_index
from dfer.lists.scan import FrameFiles, VideoFiles


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


def write_video(path: Path, num_frames: int, height: int = 48, width: int = 64, step: int = 8) -> None:
    """A video of a counter, in which frame i is grey at 16 + step * i; packets are not in the order of frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "2", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(num_frames):
            image = np.full((height, width, 3), 16 + step * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A list of three videos with 7, 8 and 9 frames, of different sizes."""
    for i in range(3):
        write_video(tmp_path / f"v {i}.mp4", 7 + i, height=32 + 16 * i)
    path = tmp_path / "list.txt"
    path.write_text("v 0.mp4 7 0\nv 1.mp4 3 1\nv 2.mp4 9 6\n")
    return path


def same(a, b) -> bool:
    if isinstance(a.store, VideoFiles):
        stores = all(np.array_equal(vars(a.store)[name], vars(b.store)[name]) for name in vars(a.store))
        stores &= all(
            np.array(vars(a.store)[name]).dtype == np.array(vars(b.store)[name]).dtype for name in vars(a.store)
        )
    else:
        stores = a.store == b.store
    return (
        stores
        and a.records == b.records
        and np.array_equal(a.num_frames, b.num_frames)
        and np.array_equal(a.labels, b.labels)
    )


def forbid_scans(monkeypatch):
    def fail(record):
        raise AssertionError("scanned again")

    monkeypatch.setattr(scan_module, "_scan_folder", fail)
    monkeypatch.setattr(dfer.video.random_access, "scan_video", fail)


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


def test_folders_with_the_same_names_share_them(tmp_path):
    names = {"a": ["1.jpg", "2.jpg"], "b": ["1.jpg", "2.jpg"], "c": ["2.jpg"], "d": ["1.jpg", "2.jpg"]}
    for folder in names:
        (tmp_path / folder).mkdir()
        for name in names[folder]:
            (tmp_path / folder / name).touch()
    (tmp_path / "list.txt").write_text("".join(f"{folder} 1 0\n" for folder in names))
    for _ in range(2):
        index = load_index(tmp_path / "list.txt")
        assert index.source == "frames" and index.store == FrameFiles(list(names.values()))
        assert index.frame_path(3, 1) == str(tmp_path / "d" / "2.jpg")
    assert index.store.names[0] is index.store.names[3]


def test_many_rows_keep_their_order_whether_the_disk_is_slow_or_not(tmp_path, monkeypatch):
    for i in range(600):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / f"{i}.jpg").touch()
    (tmp_path / "list.txt").write_text("".join(f"{i} 1 {i % 7}\n" for i in range(600)))
    records = read_annotations(tmp_path / "list.txt")
    want = [(os.stat(record.path).st_mtime_ns, scan_module.FOLDER) for record in records]
    for seconds in (0, 1):
        clock = iter([0.0, seconds])
        monkeypatch.setattr(scan_module.time, "perf_counter", lambda clock=clock: next(clock))
        assert scan_module.path_states(records).tolist() == [list(state) for state in want]
    monkeypatch.undo()
    for _ in range(2):
        assert load_index(tmp_path / "list.txt").store.names == [[f"{i}.jpg"] for i in range(600)]


def test_videos_are_scanned_once_and_laid_end_to_end(videos, monkeypatch):
    want = build_index(read_annotations(videos))
    assert want.source == "video" and want.num_frames.tolist() == [7, 8, 9] and want.num_miscounted() == 1
    store = want.store
    assert store.first.tolist() == [0, 7, 15, 24] and store.first.dtype == store.pts.dtype == np.int64
    assert store.height.tolist() == [32, 48, 64] and store.width.tolist() == [64] * 3
    assert store.codec.tolist() == ["h264"] * 3 and store.matrix.tolist() == ["bt601"] * 3
    assert store.full_range.tolist() == [False] * 3
    for video, record in enumerate(want.records):
        part = slice(store.first[video], store.first[video + 1])
        with av.open(str(record.path)) as container:
            shown = [(frame.pts, frame.key_frame) for frame in container.decode(video=0)]
        assert list(zip(store.pts[part].tolist(), store.key[part].tolist(), strict=True)) == shown
    assert same(load_index(videos), want)
    forbid_scans(monkeypatch)
    assert same(load_index(videos), want)
    cache = Path(f"{videos}.index.npz")
    cache.write_bytes(cache.read_bytes()[:-30])
    with pytest.raises(AssertionError, match="scanned again"):
        load_index(videos)


def test_a_changed_video_is_scanned_again(videos):
    before = load_index(videos)
    path = videos.parent / "v 1.mp4"
    state = path.stat()
    write_video(path, 12)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # another size alone is enough
    after = load_index(videos)
    assert before.num_frames.tolist() == [7, 8, 9] and after.num_frames.tolist() == [7, 12, 9]
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # so is another time
    state = (videos.parent / "list.txt.index.npz").stat()
    assert same(load_index(videos), after)
    assert (videos.parent / "list.txt.index.npz").stat().st_mtime_ns != state.st_mtime_ns


def test_bad_videos_are_named(videos):
    (videos.parent / "v 1.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match=r"list.txt:2: cannot use the video .*v 1\.mp4 \(.+\)$"):
        load_index(videos)
    (videos.parent / "v 1.mp4").unlink()
    with pytest.raises(ValueError, match=r"list.txt:2: no such video file: .*v 1\.mp4$"):
        load_index(videos)


def test_a_list_is_of_one_kind_and_of_the_kind_asked_for(small, videos):
    folders, files = (small.parent / name for name in ("folders.txt", "files.txt"))
    folders.write_text("v 0 3 0\nv 1 3 1\n")
    files.write_text("v 0.mp4 7 0\nv 1.mp4 8 1\n")
    for path, source in ((folders, "frames"), (files, "video")):
        for asked in ("auto", source):
            assert load_index(path, source=asked).source == source
    small.write_text("v 0.mp4 7 0\ngone 1 2\nv 1 3 1\n")
    for path, source, message in (
        (folders, "video", r"folders.txt:1: .*v 0 is a folder, but the source asked for is video"),
        (files, "frames", r"files.txt:1: .*v 0\.mp4 is a file, but the source asked for is frames"),
        (folders, "shards", r"folders.txt: not packed, but the source asked for is shards: .*pack\.py"),
        (files, "raw", r"files.txt: not packed, but the source asked for is raw"),
        (small, "auto", r"list.txt:3: .*v 1 is a folder of frames, but .*v 0\.mp4 \(.*list.txt:1\) is a file: a list"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_index(path, source=source)
        assert "\n" not in str(error.value)
    small.write_text("gone/v 1 2\n")
    for source, what in (("auto", "frame folder or video file"), ("video", "video file"), ("frames", "frame folder")):
        with pytest.raises(ValueError, match=rf"list.txt:1: no such {what}: .*gone/v \(its parent is missing too"):
            load_index(small, source=source)


def test_a_cache_of_the_other_kind_is_not_taken(small):
    load_index(small)
    shutil.rmtree(small.parent / "v 0")
    write_video(small.parent / "v 0.mp4", 5)
    (small.parent / "v 0.mp4").rename(small.parent / "v 0")
    small.write_text("v 0 5 0\n")
    load_index(small)
    (small.parent / "v 0").unlink()
    (small.parent / "v 0").mkdir()
    (small.parent / "v 0" / "1.jpg").touch()
    index = load_index(small)
    assert index.source == "frames" and index.store.names == [["1.jpg"]]


def test_caches_of_older_versions_are_taken(small, tmp_path_factory, monkeypatch):
    """Their entries are written here by hand, as they have been since the first version."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(2):
        write_video(root / f"{i}.mp4", 5 + i)
    (root / "list.txt").write_text("0.mp4 5 0\n1.mp4 6 1\n")
    for path in (small, root / "list.txt"):
        records = read_annotations(path)
        want = build_index(records)
        key = hashlib.sha256("\0".join(str(record.path) for record in records).encode()).hexdigest()
        found = [os.stat(record.path) for record in records]
        states = [(one.st_mtime_ns, -1 if want.source == "frames" else one.st_size) for one in found]
        if want.source == "frames":
            names = os.fsencode("/".join("\0".join(names) for names in want.store.names))
            entries = {"names": np.frombuffer(names, np.uint8), "folder": np.arange(3)}
        else:
            fields = ("first", "pts", "key", "height", "width", "codec", "matrix", "full_range")
            entries = {name: getattr(want.store, name) for name in fields}
            want = replace(want, store=replace(want.store, pixels=None))  # which is found out where it matters
        np.savez_compressed(f"{path}.index.npz", paths=np.array(key), states=np.array(states), **entries)
        with monkeypatch.context() as patch:
            forbid_scans(patch)
            assert same(load_index(path), want)


def test_hidden_files_are_no_frames(small):
    """As macOS leaves them on foreign disks."""
    (small.parent / "v 1" / "._1.jpg").write_bytes(b"\0\5\x16\7")
    assert load_index(small).num_frames.tolist() == [3, 3, 4]
