"""How batches are read: in compiled code, as Python would do it, and ahead of who needs them."""

import os
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dali_pipes import loader as loader_module
from dali_pipes import native
from dali_pipes.headers import is_plain
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.readers import Readers
from dali_pipes.reading import Files, Pictures, Rooms
from dali_pipes.sources import source_of
from dali_pipes.stored import BadClip
from dali_pipes.streaming import RawStream
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from scripts import hash_clips, pack
from tests.image_files import DAMAGED, ODD, PLAIN, jpeg, picture
from train import epoch_batches

CLIPS, FRAMES, SIZE = 8, 5, 24


@pytest.fixture
def root(tmp_path):
    """Clips in folders, a still among them, and the same in a tar and raw."""
    rng, rows = np.random.default_rng(0), []
    for clip in range(CLIPS):
        (tmp_path / f"c{clip}").mkdir()
        for frame in range(FRAMES):
            data = jpeg(picture(int(rng.integers(1000)), 40, 30))
            (tmp_path / f"c{clip}" / f"{frame + 1}.jpg").write_bytes(data)
        rows.append(f"c{clip} {FRAMES} {clip % 7}\n")
    (tmp_path / "list.txt").write_text("".join(rows))
    return tmp_path


def packed(root, kind):
    words = [str(root / "list.txt"), "--out", str(root / kind), "--format", kind, "--workers", "1"]
    assert pack.main(words) == 0
    return load_index(root / kind / "list.txt")


def read(index, videos, frames, width=4096, states=None):
    """What compiled code makes of a batch: its states, and the bytes or pixels of each frame."""
    source = source_of(index)
    states = np.zeros(len(videos), np.uint8) if states is None else states
    if source.kind == "images":
        room = Files(np.full((frames.size, width), 7, np.uint8), np.zeros((frames.size, 1), np.int32))
        source.read(videos, frames, room, states)
        return states, [row[:length] for row, (length,) in zip(room.data, room.lengths.tolist(), strict=True)]
    table = np.zeros((frames.size, native.COLUMNS), np.int64)
    source.read(videos, frames, table, states)
    found = []
    for place, height, width, channels in table.tolist():
        start = place - source._bytes[0].ctypes.data
        found.append(source._bytes[0][start : start + height * width * channels].reshape(height, width, channels))
    return states, found


def some_frames(count=CLIPS, length=4):
    rng = np.random.default_rng(1)
    return rng.permutation(count).astype(np.int64), np.sort(rng.integers(0, FRAMES, (count, length)), axis=1)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("kind", ["frames", "shards", "raw"])
def test_compiled_code_reads_what_python_reads(root, kind, hashed):
    index = load_index(root / "list.txt") if kind == "frames" else packed(root, kind)
    if hashed:
        path = root / "list.txt" if kind == "frames" else root / kind / "list.txt"
        assert hash_clips.main([str(path)]) == 0
        index = load_index(path)
        assert index.hashes is not None and native.sha256_address()
    videos, frames = some_frames()
    states, found = read(index, videos, frames)
    assert (states == native.DONE).all()
    source = source_of(index)
    want = [a for video, of in zip(videos, frames, strict=True) for a in source.fetch(int(video), of)]
    assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True)) and len(found) == len(want)


def test_stills_and_names_of_any_kind_are_read(tmp_path):
    names = ["a.jpg", "b c'.jpg", "\udcff.jpg", "ä.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(picture(number, 30, 30)))
    (tmp_path / "list.txt").write_text("".join(f"{name} 1 0\n" for name in names if "\udcff" not in name))
    index = load_index(tmp_path / "list.txt")
    records = [index.records[0], replace(index.records[0], path=tmp_path / names[2]), *index.records[1:]]
    store = replace(index.store, names=[*index.store.names, index.store.names[0]])
    index = replace(index, records=records, store=store)
    states, found = read(index, np.arange(4), np.zeros((4, 3), np.int64))
    assert (states == native.DONE).all()
    assert [bytes(data) for data in found[::3]] == [(tmp_path / names[n]).read_bytes() for n in (0, 2, 1, 3)]


def test_what_is_not_plain_is_left_to_python_and_never_handed_on(root):
    """Every kind of image file that the decoder must not see as it is, and files that are none."""
    index = load_index(root / "list.txt")
    target = root / "c3" / "3.jpg"
    videos, frames = np.arange(CLIPS), np.tile(np.arange(FRAMES), (CLIPS, 1))
    for name, make in (ODD | DAMAGED | PLAIN).items():
        target.write_bytes(make())
        states, found = read(index, videos, frames, 2**17)
        assert ((states == native.DONE) | (videos == 3)).all(), name
        assert (states[3] == native.DONE) == is_plain(np.frombuffer(make() or b"\0", np.uint8)), name
        assert (states[3] == native.DONE) == (name in PLAIN) or name in DAMAGED, name
        if name in PLAIN:
            assert bytes(found[3 * FRAMES + 2]) == make()
    for spoil in (lambda: None, lambda: target.mkdir(), lambda: target.symlink_to("/dev/zero"),
                  lambda: target.symlink_to(root / "nothing")):  # fmt: skip
        target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
        spoil()
        assert (read(index, videos, frames)[0] == np.where(videos == 3, native.ODD, native.DONE)).all()


@pytest.mark.parametrize("kind", ["frames", "shards"])
def test_a_file_that_fills_its_room_to_the_last_byte_is_not_taken_for_whole(root, kind):
    index = load_index(root / "list.txt") if kind == "frames" else packed(root, "shards")
    length = (root / "c0" / "1.jpg").stat().st_size
    frames = np.zeros((1, 1), np.int64)
    for width in (length - 1, length, length + 1):
        states, found = read(index, np.zeros(1, np.int64), frames, width)[0], None
        assert (states[0] == native.DONE) == (width > length or (kind == "shards" and width == length)), (width, found)


def test_a_bomb_that_was_put_there_after_the_list_was_indexed_is_named(root):
    index = load_index(root / "list.txt")
    whole = bytearray((root / "c2" / "4.jpg").read_bytes())
    place = whole.index(b"\xff\xc0")
    whole[place + 5 : place + 9] = b"\x75\x30\x75\x30"
    (root / "c2" / "4.jpg").write_bytes(whole)
    loader = ClipLoader(index, ClipSampler(0, FRAMES, mode="eval"), LoaderOptions(4, SIZE))
    with pytest.raises(BadClip, match=r"frame .*4\.jpg of clip c2: claims 900,000,000 pixels"):
        list(loader(0))


@pytest.mark.parametrize("kind", ["shards", "raw"])
def test_a_shard_that_is_cut_while_it_is_read_is_named(root, kind):
    index = packed(root, kind)
    videos, frames = np.arange(CLIPS), np.tile(np.arange(FRAMES), (CLIPS, 1))
    last = int(index.store.offset[-1] + index.store.length[-1])
    loader = ClipLoader(index, ClipSampler(0, FRAMES, mode="eval"), LoaderOptions(CLIPS, SIZE))
    os.truncate(index.store.paths[0], last - 1)
    assert (read(index, videos, frames)[0] == np.where(videos == CLIPS - 1, native.ODD, native.DONE)).all()
    with pytest.raises(BadClip, match="cut to"):
        list(loader(0))


@pytest.mark.parametrize("kind", ["frames", "shards", "raw"])
def test_a_wrong_hash_is_found_in_compiled_code_and_by_machines_without_the_function(root, kind, monkeypatch):
    path = root / "list.txt" if kind == "frames" else root / kind / "list.txt"
    if kind != "frames":
        packed(root, kind)
    assert hash_clips.main([str(path)]) == 0
    index = load_index(path)
    whole = index
    want = list(ClipLoader(replace(whole, hashes=None), ClipSampler(0, FRAMES, mode="eval"), LoaderOptions(4, SIZE))(0))
    digests = bytearray(index.hashes.digests)
    digests[native.SIZE * (2 * FRAMES + 1) + 15] ^= 1
    index = replace(index, hashes=replace(index.hashes, digests=bytes(digests)))
    videos, frames = np.arange(CLIPS), np.tile(np.arange(FRAMES), (CLIPS, 1))
    assert (read(index, videos, frames)[0] == np.where(videos == 2, native.ODD, native.DONE)).all()
    for address in (native.sha256_address(), 0):
        monkeypatch.setattr(native, "sha256_address", lambda address=address: address)
        for graph in ("fused", "streamed"):
            loader = ClipLoader(index, ClipSampler(0, FRAMES, mode="eval"), LoaderOptions(4, SIZE, graph=graph))
            with pytest.raises(BadClip, match=r"(frame 1|c2/2\.jpg) of clip c2.*its bytes are not those"):
                list(loader(0))
            assert_same(list(ClipLoader(whole, loader.sampler, loader.options)(0)), want)


def batches_of(index, epochs=(0,), **options):
    sampler = ClipSampler(0, 3, augmentation=Augmentation(min_crop_area=0.5, colour=0.2))
    loader = ClipLoader(index, sampler, LoaderOptions(2, SIZE, **options))
    return loader, [batch for epoch in epochs for batch in loader(epoch)]


def assert_same(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.valid, b.valid) and torch.equal(a.clips, b.clips)


@pytest.mark.parametrize("graph", ["fused", "operators"])
def test_files_that_are_too_large_for_their_room_are_the_same_clips(root, graph, monkeypatch):
    index = load_index(root / "list.txt")
    (_, want), reference = batches_of(index, graph=graph), Rooms.take
    monkeypatch.setattr("dali_pipes.reading._FIRST_STRIDE", 64)
    (root / "c1" / "2.jpg").write_bytes(ODD["jpeg, XMP 6"]())
    loader, small = batches_of(index, (0, 0), graph=graph)
    assert loader._rooms._stride == 12288  # 4096 at first; what stands in for the odd one takes 9 kB
    (root / "c1" / "2.jpg").unlink()
    monkeypatch.setattr("dali_pipes.reading._LIMIT", 100)
    limited = batches_of(load_index(root / "list.txt"), graph=graph)[0]
    assert limited._rooms._stride == 0 and reference(limited._rooms).data.shape == (6, 4096)
    changed = 1
    for a, b in zip(small[: len(want)], want, strict=True):
        same = a.ids != changed
        assert torch.equal(a.ids, b.ids) and torch.equal(a.clips[same], b.clips[same])
    assert_same(small[: len(want)], small[len(want) :])


def test_rooms_are_used_again_but_not_while_they_are_needed():
    rooms = Rooms(4, 5000, torch.device("cpu"))
    first, second = rooms.take(), rooms.take()
    assert first.data.shape == (4, 8192) and first.data is not second.data
    rooms.give_back(first)
    assert rooms.take().data is first.data and rooms.take().data is not second.data
    rooms.widen(9000)
    rooms.give_back(second)  # too narrow by now
    assert rooms.take().data.shape == (4, 12288)


def test_where_pictures_lie():
    wide = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    table, owners = Pictures.of([wide, wide[:, ::2]])
    assert table[0].tolist() == [wide.ctypes.data, 4, 5, 3] and table[1, 1:].tolist() == [4, 3, 3]
    assert owners[1].flags.c_contiguous and table[1, 0] == owners[1].ctypes.data


@pytest.mark.parametrize("graph", ["fused", "operators"])
@pytest.mark.parametrize("kind", ["frames", "shards"])
def test_two_batches_in_the_graph_make_the_same_ones_as_one(root, kind, graph, monkeypatch):
    """Also where the decoder refuses some: what was behind them is begun again."""
    for clip in (1, 4, 5):
        (root / f"c{clip}" / "3.jpg").write_bytes(PLAIN_BUT_REFUSED)
    monkeypatch.setattr("dali_pipes.bad_clips.TOLERATED", 1.0)
    index = load_index(root / "list.txt") if kind == "frames" else packed_as_is(root)
    one = batches_of(index, (0, 1, 2), graph=graph, bad_clips="skip")[1]
    monkeypatch.setattr(LoaderOptions, "depth", property(lambda self: 3))
    assert_same(batches_of(index, (0, 1, 2), graph=graph, bad_clips="skip")[1], one)
    assert sum(int((~batch.valid).sum()) for batch in one) > 2
    loader = batches_of(index, graph=graph, bad_clips="skip")[0]
    for _ in range(3):  # left early, with batches on their way
        next(iter(loader(1)))
    assert_same(list(loader(2)), one[-len(loader) :])


PLAIN_BUT_REFUSED = jpeg(picture(9, 40, 30)).replace(b"\xff\xc4\x00\x1f\x00", b"\xff\xc4\x00\x1f\x00", 1)
_tables = PLAIN_BUT_REFUSED.index(b"\xff\xc4") + 5
PLAIN_BUT_REFUSED = PLAIN_BUT_REFUSED[:_tables] + b"\xff" * 16 + PLAIN_BUT_REFUSED[_tables + 16 :]


def packed_as_is(root):
    """A pack of healthy frames whose bytes are then spoilt as those in the folders are."""
    spoilt = {clip: (root / f"c{clip}" / "3.jpg").read_bytes() for clip in (1, 4, 5)}
    for clip in spoilt:
        (root / f"c{clip}" / "3.jpg").write_bytes(jpeg(picture(9, 40, 30)))
    index = packed(root, "shards")
    with open(index.store.paths[0], "r+b") as file:
        for clip, data in spoilt.items():
            frame = index.store.first[clip] + 2
            assert index.store.length[frame] == len(data)
            file.seek(index.store.offset[frame])
            file.write(data)
    return index


def test_what_is_prepared_is_what_is_asked_for(root):
    index = load_index(root / "list.txt")
    before = threading.active_count()
    loader, want = batches_of(index, (0, 1, 2))
    steps = len(loader)
    loader.prepare(0)
    loader.prepare(0)
    assert_same(list(loader(0)), want[:steps])
    batches = iter(loader(1))
    first = next(batches)
    loader.prepare(2, 1)  # while another epoch is on
    assert_same([first, *batches], want[steps : 2 * steps])
    assert_same(list(loader(2, 1)), want[2 * steps + 1 :])
    loader.prepare(0)
    assert_same(list(loader(1)), want[steps : 2 * steps])  # another one than was prepared
    deadline = 500
    while threading.active_count() > before and (deadline := deadline - 1):
        threading.Event().wait(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("kind", "graph"), [(None, "fused"), (None, "decoded"), (None, "streamed"), ("raw", "streamed")]
)
def test_what_is_prepared_twice_is_being_made_before_it_is_asked_for(root, kind, graph):
    """Once all of the epoch that is on are made; whoever leaves one early or asks for another gets what is right."""
    index = packed(root, kind) if kind else load_index(root / "list.txt")
    loader, want = batches_of(index, (0, 1, 2), graph=graph)
    steps = len(loader)

    def begun() -> bool:
        run = loader._prepared
        return run.made._made is not None if graph == "streamed" else len(run.started) > 0

    def prepare(epoch: int) -> None:
        loader.prepare(epoch)
        run = loader._prepared
        assert ends(lambda: all(r.fine for r in run.made._ahead) if graph == "streamed" else run.read[0][2].done)
        loader.prepare(epoch)

    prepare(0)
    assert begun()  # as of a loader that nobody uses meanwhile
    batches = loader(0)
    got = [next(batches)]
    if graph != "streamed":  # which makes ahead on a stream of its own
        prepare(1)
        assert not begun()  # the graph has batches of this one
    while len(got) < steps:
        got.append(next(batches))
    prepare(1)
    assert begun()
    assert_same([*got, *batches], want[:steps])
    assert_same(list(loader(1)), want[steps : 2 * steps])
    prepare(0)
    assert_same(list(loader(2)), want[2 * steps :])  # another one than was begun
    prepare(0)
    left = loader(0)
    next(left)
    if graph == "fused":
        left.close()
    assert_same(list(loader(1)), want[steps : 2 * steps])


def test_training_prepares_what_comes_next():
    """The clips to evaluate and the next epoch, on the last two batches; after the last epoch only the former."""
    calls = []

    class Loads(SimpleNamespace):
        def __call__(self, epoch, first=0):
            for number in range(first, 4):
                calls.append(number)
                yield number

    train, val = (Loads(prepare=partial(lambda name, epoch: calls.append((name, epoch)), name)) for name in "tv")
    for epoch, after in ((0, [("v", 0), ("t", 1)]), (1, [("v", 0)])):
        calls.clear()
        config = SimpleNamespace(optim=SimpleNamespace(accumulate=1, epochs=2))
        job = SimpleNamespace(
            config=config, state=SimpleNamespace(evaluated=epoch), steps_done=1, train_loader=train, val_loader=val,
            schedule=SimpleNamespace(steps_per_epoch=4),
        )  # fmt: skip
        assert list(epoch_batches(job)) == [1, 2, 3]
        assert calls == [1, 2, *after, 3, *after]


def ends(what) -> bool:
    """Whether something is so before long; threads end when they are given a core."""
    return any(what() or threading.Event().wait(0.01) for _ in range(1000))


def test_a_thread_that_waits_holds_nothing_of_its_last_job():
    def hold(begun, release):
        begun.set()
        return release.wait(60)

    readers = Readers(1)
    for closed in (False, True):
        memory, begun, release = np.zeros(9), threading.Event(), threading.Event()
        held = weakref.ref(memory)
        if closed:
            blocked = readers.submit(hold, begun, release)
            assert begun.wait(60)
        waits = readers.submit(np.sum, memory)
        del memory
        if closed:
            readers.close()  # with a job that was never begun
            release.set()
            assert blocked.result(60)
        else:
            assert waits.result(60) == 0
        assert ends(lambda held=held: held() is None)


@pytest.mark.parametrize("graph", ["fused", "streamed"])
def test_an_epoch_that_nobody_asks_for_ends_with_its_loader(root, graph, monkeypatch):
    """And one whose first batches there is no memory for."""
    index = packed(root, "raw")
    before = threading.active_count()
    loader = batches_of(index, (), graph=graph)[0]
    loader.prepare(0)
    assert threading.active_count() > before
    del loader
    assert ends(lambda: threading.active_count() <= before)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("of pinned memory")

    loader = batches_of(index, (), graph=graph)[0]
    where = (loader_module, "Reading") if graph == "fused" else (RawStream, "read")
    monkeypatch.setattr(*where, full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        loader.prepare(0)
    del error
    assert ends(lambda: threading.active_count() <= before)


def python_operations(index, batch_size, length, graph) -> int:
    """How many functions Python calls, in all threads, for three batches."""
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event in ("call", "c_call")

    sampler = ClipSampler(0, length, augmentation=Augmentation(min_crop_area=0.5))
    index = replace(index.head(3 * batch_size), store=index.store)
    loader = ClipLoader(index, sampler, LoaderOptions(batch_size, 4, graph=graph))
    list(loader(0))
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        assert len(list(loader(1))) == 3
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return number


@pytest.mark.parametrize("graph", ["fused", "streamed"])
@pytest.mark.parametrize("kind", ["frames", "shards", "raw"])
def test_python_does_no_more_for_more_clips_and_frames(root, kind, graph):
    index = load_index(root / "list.txt") if kind == "frames" else packed(root, kind)
    rows = np.arange(192) % CLIPS
    if kind == "frames":
        store = replace(index.store, names=[index.store.names[row] for row in rows])
    else:
        store = index.store.select(rows)
    records = [index.records[row] for row in rows]
    index = replace(index, records=records, num_frames=index.num_frames[rows], labels=index.labels[rows], store=store)
    few, more_clips, more_frames = (python_operations(index, *sizes, graph) for sizes in ((8, 4), (64, 4), (8, 16)))
    # 168 clips, or 288 frames, more. Waiting for threads takes a few calls more or less.
    assert abs(more_clips - few) < 96 and abs(more_frames - few) < 96, (few, more_clips, more_frames)
