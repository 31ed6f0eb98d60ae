"""Raw clips read into one buffer a batch: the batches of the CPU's graph, bad clips, order, depth; no Python a frame.

On a CPU, where the kernel is the CPU's; tests/test_pixels.py and tests/test_dali_pipes.py have what needs a GPU.
"""

import dataclasses
import itertools
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from dali_pipes import bad_clips, resident, sources, streaming
from dali_pipes.build import type_of_clips
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.resident import ResidentClips
from dali_pipes.stored import BadClip
from dfer.cli import UserError
from dfer.config import Config, RunConfig
from dfer.lists.index import ClipIndex, load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from scripts import pack
from tests.conftest import run_python, smooth_image
from tests.test_kernels import EVERYTHING

T, SIZE, CLIPS = 4, 16, 11


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ClipIndex:
    """Clips that differ in size and in length, some shorter than T, in two shards."""
    root, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    rows = []
    for clip in range(CLIPS):
        count, (height, width) = int(rng.integers(2, 10)), rng.integers(50, 120, 2).tolist()
        (root / str(clip)).mkdir()
        for frame in range(count):
            smooth_image(rng, height, width).save(root / str(clip) / f"{frame}.png")
        rows.append(f"{clip} {count} {clip % 7}\n")
    (root / "list.txt").write_text("".join(rows))
    args = ["--out", str(root / "raw"), "--format", "raw", "--workers", "1", "--shard-size", "1"]
    assert pack.main([str(root / "list.txt"), *args]) == 0
    found = load_index(root / "raw" / "list.txt")
    assert len(found.store.paths) > 1 and len(np.unique(found.store.height)) > 4 and found.num_frames.min() < T
    return found


def loader(index: ClipIndex, graph: str = "streamed", mode: str = "train", **options) -> ClipLoader:
    sampler = {"augmentation": EVERYTHING, "frames_per_segment": 1} | options
    sampler = {name: sampler[name] for name in sampler.keys() - {*LoaderOptions.__dataclass_fields__}}
    options = {"batch_size": 3, "size": SIZE} | {name: options[name] for name in options.keys() - sampler.keys()}
    return ClipLoader(index, ClipSampler(0, T, mode=mode, **sampler), LoaderOptions(graph=graph, **options))


def check_same(batches, wanted) -> int:
    """All that a batch holds, to the bit. Returns the number of batches."""
    count = 0
    for a, b in zip(batches, wanted, strict=True):
        for name in ("clips", "labels", "valid", "ids"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and torch.equal(x, y), name
        assert a.clips.stride() == b.clips.stride()
        assert (a.mix is None) == (b.mix is None)
        assert a.mix is None or (torch.equal(a.mix.partner, b.mix.partner) and torch.equal(a.mix.share, b.mix.share))
        count += 1
    return count


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("train", {}),
        ("train", {"dtype": torch.bfloat16, "frames_per_segment": 2}),
        ("train", {"balance": "full", "rank": 1, "world_size": 2, "num_threads": 7}),
        ("train", {"augmentation": replace(EVERYTHING, mixup=0.8, cutmix=1.0), "batch_size": 4}),
        ("eval", {"views": 2, "mirror_views": True}),
        ("eval", {"rank": 1, "world_size": 2, "batch_size": 5, "num_threads": 1}),
    ],
    ids=["train", "pairs of frames", "balanced", "mixed", "views", "ranks"],
)
def test_batches_are_those_of_the_cpus_graph(index, mode, options):
    """Order, clips, labels, padding, mixing; the last batch of an evaluation holds repeats."""
    streamed, fused = (loader(index, graph, mode, **options) for graph in ("streamed", "fused"))
    for epoch in (0, 3):
        assert check_same(streamed(epoch), fused(epoch)) == len(fused) > 0
    assert check_same(streamed(1, start_step=1), fused(1, start_step=1)) == len(fused) - 1


def test_an_epoch_that_is_left_early_leaves_nothing(index):
    streamed, before = loader(index), threading.active_count()
    next(iter(streamed(0)))
    assert check_same(streamed(1), loader(index, "fused")(1)) == 3
    for thread in threading.enumerate():
        if thread.name == "clip reader":
            thread.join(timeout=60)
    assert threading.active_count() <= before


def test_an_epoch_is_read_before_it_is_asked_for(index):
    """And one that is closed instead ends its threads."""
    made = loader(index, "streamed")
    plan = made.sampler.plan(0, index.num_frames, index.labels)
    steps = plan.order[:9].reshape(3, 3)
    begun = made._stream.begin(plan, steps)
    for reading in begun._ahead:
        for job in reading.jobs:
            job.result(timeout=60)
    assert len(begun._ahead) == streaming.AHEAD and all(reading.fine for reading in begun._ahead)
    for (clips, good), want in zip(begun, loader(index, "fused")(0), strict=True):
        assert good.all() and torch.equal(clips.permute(0, 1, 4, 2, 3), want.clips)
    made._stream.begin(plan, steps).close()
    for thread in threading.enumerate():
        if thread.name == "clip reader":
            thread.join(timeout=60)
    assert not any(thread.name == "clip reader" for thread in threading.enumerate())


def test_a_source_has_its_own_way_on_a_gpu():
    gpu = LoaderOptions(2, SIZE, device="gpu")
    routes = [gpu.route(source) for source in ("frames", "shards", "raw", "video")]
    assert routes == ["decoded", "decoded", "streamed", "operators"]
    assert (
        LoaderOptions(2, SIZE).route("raw") == "fused" and replace(gpu, graph="operators").route("raw") == "operators"
    )


@pytest.mark.parametrize(("amp", "dtype"), [("auto", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_a_gpu_gets_clips_in_the_type_that_they_are_rounded_to(amp, dtype):
    """But for those that are mixed, which are rounded after that."""
    config = Config(run=RunConfig(amp=amp))
    mixing = replace(config, data=replace(config.data, augmentation=Augmentation(cutmix=0.5)))
    cuda = torch.device("cuda", 0)
    assert type_of_clips(config, "train", cuda) == type_of_clips(mixing, "eval", cuda) == dtype
    assert type_of_clips(mixing, "train", cuda) == type_of_clips(config, "train", torch.device("cpu")) == torch.float32


def fails_for(monkeypatch, video: int, index: ClipIndex) -> None:
    """Compiled code does not get at the frames of a video."""
    real, store = streaming.read_clips, index.store
    bad = store.offset[store.first[video] : store.first[video + 1]]

    def read(files, offset, size, address, states):
        real(files, offset, size, address, states)
        of_other_shards = ~np.isin(files, files_of[store.shard[video]])
        states[np.isin(offset, bad).any(axis=1) & ~of_other_shards] = streaming.ODD

    files_of = {shard: [] for shard in range(len(store.paths))}  # several loaders open them
    monkeypatch.setattr(streaming, "read_clips", read)
    opened = sources.open_shards

    def open_shards(store):
        files = opened(store)
        for shard, file in enumerate(files):
            files_of[shard].append(file)
        return files

    monkeypatch.setattr(sources, "open_shards", open_shards)


def test_a_clip_that_could_not_be_read_for_once_is_a_good_one(index, monkeypatch):
    fails_for(monkeypatch, 4, index)
    assert check_same(loader(index, mode="eval")(0), loader(index, "fused", "eval")(0)) == 4


def test_a_disk_that_fails_is_named(index, monkeypatch, capsys):
    fails_for(monkeypatch, 4, index)

    def fail(file, count, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(streaming.os, "pread", fail)
    with pytest.raises(ValueError, match=r"list.txt:\d+: bad frame \d of clip 4 in .*\.raw: Input/output error$"):
        list(loader(index, mode="eval")(0))
    skipping, plain = loader(index, bad_clips="skip"), loader(index, "fused")
    for batch, want in zip(skipping(2), plain(2), strict=True):
        assert torch.equal(batch.valid, batch.ids != 4) and torch.equal(batch.ids, want.ids)
        assert torch.equal(batch.clips[batch.valid], want.clips[batch.valid])
        for clip in batch.clips[~batch.valid]:
            assert torch.equal(clip, batch.clips[batch.valid][0])
    assert capsys.readouterr().err.count("clip left out: ") == 1
    alone = loader(index, bad_clips="skip", batch_size=1)
    batch = next(batch for epoch in itertools.count() for batch in alone(epoch) if int(batch.ids) == 4)
    assert not batch.valid.any() and not batch.clips.any()


def test_storage_that_hangs_is_named(index, monkeypatch):
    """The clip that is waited for, not those before it."""
    release, real, seen = threading.Event(), streaming.read_clips, []

    def read(files, offset, size, address, states):
        real(files[:1], offset[:1], size[:1], address[:1], states[:1])
        seen.append(len(files))
        release.wait(60)

    monkeypatch.setattr(streaming, "read_clips", read)
    hangs = loader(index, mode="eval", batch_size=8, patience=1.0)
    try:
        with pytest.raises(ValueError, match=r"list.txt:\d+: reading clip 1 \(") as error:
            next(iter(hangs(0)))
    finally:
        release.set()
    assert "has taken more than 1 s (4 of 8 clips of the batch are waiting)" in str(error.value)
    assert set(seen) == {2}  # four threads with two clips each


class AtOnce:
    """Readers that read when they are told to, so that nothing depends on time."""

    def __init__(self, num_threads):
        pass

    def close(self):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_no_more_batches_are_ahead_than_is_said(index, monkeypatch):
    monkeypatch.setattr(streaming, "Readers", AtOnce)
    read, made = streaming.RawStream.read, streaming.RawStream.make
    counts = {"read": 0, "made": 0}

    def counted(name, method):
        def call(self, *args):
            counts[name] += 1
            return method(self, *args)

        return call

    monkeypatch.setattr(streaming.RawStream, "read", counted("read", read))
    monkeypatch.setattr(streaming.RawStream, "make", counted("made", made))
    for taken, _ in enumerate(loader(index, batch_size=1)(0), start=1):
        assert counts["made"] == min(taken + 1, CLIPS)
        assert counts["read"] == min(taken + 1 + streaming.AHEAD, CLIPS)
    assert taken == CLIPS


def calls_of(made: ClipLoader) -> int:
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        batches = list(made(0))
    finally:
        sys.setprofile(None)
    assert len(batches) == 2
    return calls


def test_no_python_runs_for_a_clip_or_a_frame(index, monkeypatch):
    """Calls of Python and of C, in a whole epoch of two batches: as many for 8 clips of 12 frames as for 4 of 2."""
    monkeypatch.setattr(streaming, "Readers", AtOnce)
    counts = []
    for batch_size, length in ((4, 2), (4, 12), (5, 12)):
        sampler = ClipSampler(0, length, augmentation=Augmentation())
        made = ClipLoader(index, sampler, LoaderOptions(batch_size, SIZE, graph="streamed"))
        assert len(list(made(0))) == 2  # what is compiled is compiled now
        counts.append(min(calls_of(made) for _ in range(3)))  # collecting garbage calls functions too
    assert counts[0] == counts[1] == counts[2] > 100


@pytest.mark.gpu
def test_a_batch_is_copied_while_the_gpu_works(index):
    """What is made ahead is made on another stream than the consumer's."""
    on_gpu = loader(index, device="gpu", device_id=0, batch_size=2)
    assert on_gpu._stream._stream != torch.cuda.current_stream()
    wanted = [batch.clips for batch in loader(index, "fused", batch_size=2)(0)]
    held = [batch.clips for batch in on_gpu(0)]
    assert max((a - b.cpu()).abs().max() for a, b in zip(wanted, held, strict=True)) < 5e-3


@pytest.mark.parametrize("part", [1, 30_000, 2**28])
def test_what_is_held_in_memory_is_read_in_parts(index, monkeypatch, part):
    monkeypatch.setattr(resident, "_PART", part)
    told = []
    held = ResidentClips(index, torch.device("cpu"), lambda video, frames: told.append((video, frames.copy())))
    want = [np.fromfile(path, dtype=np.uint8) for path in index.store.paths]
    store, begin = index.store, 0
    for video, shard in enumerate(store.shard.tolist()):
        for row in range(store.first[video], store.first[video + 1]):
            frame = want[shard][store.offset[row] : store.offset[row] + store.length[row]]
            assert np.array_equal(held.parts[0][begin : begin + len(frame)].numpy(), frame)
            begin += len(frame)
            assert np.array_equal(told[video][1][row - store.first[video]], frame)
    assert begin == len(held.parts[0]) and [video for video, _ in told] == list(range(CLIPS))
    told.clear()
    ResidentClips(index.head(3), torch.device("cpu"), lambda video, frames: told.append(video))
    assert told == [0, 1, 2]


def test_a_shard_that_was_cut_is_not_held(index):
    store = replace(index.store, offset=index.store.offset + 10**9)
    with pytest.raises(ValueError, match=r"list-0000\d\.raw: cannot be read as far as it was packed; copy it again"):
        ResidentClips(replace(index, store=store), torch.device("cpu"), lambda *args: None)


@dataclasses.dataclass
class Beside:
    """In dfer.run.neighbours' place: threads, each of which has memory of its own."""

    rank: int
    size: int
    barrier: threading.Barrier
    said: dict

    def each(self, found):
        self.said[self.rank] = found
        self.barrier.wait(20)
        everywhere = [self.said[rank] for rank in range(self.size)]
        self.barrier.wait(20)
        return everywhere

    def memory(self, num_bytes):
        return self.each(torch.full((num_bytes,), 77, dtype=torch.uint8))

    def agree(self, why):
        for rank, one in enumerate(self.each(why)):
            if one is not None:
                raise UserError(f"rank {rank}: {one}")


def in_threads(size: int, work) -> list:
    """What `work` returns, or raises, in a thread for each of some neighbours."""
    barrier, said = threading.Barrier(size), {}

    def guarded(rank: int):
        try:
            return work(Beside(rank, size, barrier, said))
        except UserError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, CLIPS + 2])
def test_what_neighbours_hold_in_shares_are_the_same_clips(index, size):
    whole = loader(index, cached=True)
    want, total = list(whole(3)), len(whole._resident.parts[0])

    def held(neighbours: Beside):
        shared = loader(index, cached=True, neighbours=neighbours)
        neighbours.agree(None)
        found = list(shared(3))
        neighbours.agree(None)  # before one of them goes, and its memory
        return found, len(shared._resident.parts[neighbours.rank])

    largest = int(((index.store.first[1:] - index.store.first[:-1]) * 3 * index.store.height * index.store.width).max())
    for found, num_bytes in in_threads(size, held):
        assert check_same(found, want) == len(want) > 2
        assert total / size <= num_bytes <= total / size + largest


def test_a_share_that_cannot_be_read_ends_all(index):
    """The last video is in the last share."""
    offset = index.store.offset.copy()
    offset[index.store.first[-2]] += 10**9
    cut = replace(index, store=replace(index.store, offset=offset, paths=[*index.store.paths]))
    found = in_threads(3, lambda neighbours: loader(cut, cached=True, neighbours=neighbours))
    assert len({str(error) for error in found}) == 1
    assert str(found[0]).startswith("rank 2: ") and "cannot be read as far as it was packed" in str(found[0])


def test_memory_that_is_read_otherwise_than_by_its_owner_is_not_used(index):
    def held(neighbours: Beside):
        memory = neighbours.memory
        if neighbours.rank == 1:  # sees nothing where rank 0's pictures are
            neighbours.memory = lambda n: [torch.zeros_like(p) if i == 0 else p for i, p in enumerate(memory(n))]
        loader(index, cached=True, neighbours=neighbours)

    found = {str(error) for error in in_threads(2, held)}
    assert len(found) == 1 and "rank 1: --data.cache shares: reads other bytes in the memory of GPU 0" in found.pop()


def test_a_bad_clip_of_one_share_is_known_to_all(index, monkeypatch, capsys):
    def verify(self, video, frames, pictures):
        if video in (1, CLIPS - 1):
            raise BadClip(f"clip {video} has changed")

    monkeypatch.setattr(sources.Shards, "verify", verify)
    monkeypatch.setattr(bad_clips, "TOLERATED", 0.5)
    found = in_threads(3, lambda beside: loader(index, cached=True, bad_clips="skip", neighbours=beside).bad_clips)
    assert found == [{1: "clip 1 has changed", CLIPS - 1: f"clip {CLIPS - 1} has changed"}] * 3
    assert capsys.readouterr().err.count("clip left out") == 2
    found = in_threads(3, lambda beside: loader(index, cached=True, neighbours=beside))
    assert {str(error) for error in found} == {"rank 0: clip 1 has changed"}


def test_neighbours_are_the_processes_of_a_machine(tmp_path):
    done = run_python("tests/sharing.py", str(tmp_path / "store"), "cpu")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
def test_on_a_gpu_two_processes_hold_clips_in_shares(index, tmp_path):
    """On one card, which is all that there may be."""
    done = run_python("tests/sharing.py", str(tmp_path / "store"), "gpu", str(index.store.paths[0].parent / "list.txt"))
    assert done.returncode == 0, done.stdout + done.stderr
