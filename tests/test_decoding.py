"""One rule for image files: what one command reads, all read, with the same pixels, and nobody dies of what it holds.

`python -m tests.test_decoding` prints what becomes of each kind, as a table.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia import nvimgcodec
from PIL import Image

import dali_pipes.bad_clips
from dali_pipes import headers
from dali_pipes.headers import is_plain, refusal
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.sources import source_of
from dali_pipes.stored import BadClip
from dfer.cli import UserError
from dfer.images import BadImage, decode_image, encode_plain
from dfer.lists.index import ClipIndex, load_index
from dfer.lists.shards import Clip, Options, pack_clip
from dfer.lists.stored import inspect, scan
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.predict.inputs import read_pictures
from dfer.video.decode import BadVideo
from scripts import hash_clips, pack
from tests.conftest import nursery
from tests.image_files import (
    ALL,
    DAMAGED,
    ODD,
    PLAIN,
    app1_exif,
    app1_xmp,
    chunk,
    exif,
    inserted,
    itxt,
    jpeg,
    mutated,
    patched,
    picture,
    png,
    profile,
    with_chunk,
    xmp,
)
from tests.oracle import oracle_clip

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # as dfer/images.py does where it is not a test

SIZE = 32
WHOLE = Augmentation(min_crop_area=1.0, max_crop_ratio=1.0)
CROPPED = Augmentation(min_crop_area=0.2, max_crop_ratio=1.4, colour=0.2)
FINDS_OUT_LATER = {"jpeg, Huffman tables", "jpeg, no quantization table", "png, flipped bits", "png, no palette"}
FINDS_OUT_LATER |= {"jpeg, progressive, cut and ended"}  # hashes are made without decoding


def write_clips(root: Path, files: dict[str, bytes]) -> ClipIndex:
    """A list of clips of one frame each: 0, 1, 2, ... in the order of `files`."""
    for number, data in enumerate(files.values()):
        (root / str(number)).mkdir(parents=True)
        (root / str(number) / "1.png").write_bytes(data)
    rows = [f"{number} 1 {number % 7}\n" for number in range(len(files))]
    (root / "list.txt").write_text("".join(rows))
    return load_index(root / "list.txt")


def load(
    index: ClipIndex, graph: str, augmentation: Augmentation = WHOLE, device: str = "cpu", **options
) -> ClipLoader:
    sampler = ClipSampler(0, 1, augmentation=augmentation)
    options = {"bad_clips": "skip", "graph": graph, "device": device} | options
    return ClipLoader(index, sampler, LoaderOptions(len(index), SIZE, **options))


def loaded(loader: ClipLoader, epoch: int = 0) -> dict[int, torch.Tensor]:
    """video -> its clip, of those that can be read."""
    (batch,) = loader(epoch)
    return {int(v): clip for v, clip, good in zip(batch.ids, batch.clips, batch.valid, strict=True) if good}


def pixels(data: bytes) -> np.ndarray | None:
    try:
        return np.asarray(decode_image(data))
    except BadImage:
        return None


def reads(work: Callable[[], object]) -> str:
    """What a reader says, nothing if it is content."""
    try:
        work()
    except (UserError, BadVideo) as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def readers(index: ClipIndex) -> dict[str, list[str]]:
    """What all readers that look at one frame after the other say of each clip."""
    source, found = source_of(index), {}

    def clip(video: int) -> Clip:
        record = index.records[video]
        return Clip(video, record, [index.frame_path(video, 0)], 1, {})

    ways: dict[str, Callable[[int], object]] = {
        "hash_clips": lambda video: hash_clips.hash_video(source, video),
        "pack": lambda video: pack_clip(clip(video), Options()),
        "pack --size": lambda video: pack_clip(clip(video), Options(size=SIZE)),
        "pack raw": lambda video: pack_clip(clip(video), Options(format="raw")),
        "predict": lambda video: list(read_pictures(index.records[video].path, 25.0)),
    }
    for name, way in ways.items():
        found[name] = [reads(lambda way=way, video=video: way(video)) for video in range(len(index))]
    checks = [
        inspect((str(record.path), scan(str(record.path)).samples), decode_all=True)[1] for record in index.records
    ]
    found["check_list"] = [" ".join(lines) for lines in checks]
    return found


@pytest.fixture
def all_may_be_bad(monkeypatch):
    monkeypatch.setattr(dali_pipes.bad_clips, "TOLERATED", 1.0)


def check_agreement(root: Path, files: dict[str, bytes], later: set[str], graphs=("fused", "operators"), **options):
    """Every reader takes the same of these files, and the loaders have the pixels of `decode_image`."""
    index, names = write_clips(root, files), list(files)
    want = [pixels(data) for data in files.values()]
    good = {video for video, found in enumerate(want) if found is not None}
    for reader, said in readers(index).items():
        content = {video for video, line in enumerate(said) if not line}
        if reader == "hash_clips":
            content -= {video for video in content if names[video] in later}
        assert content == good, (reader, [names[video] for video in content ^ good])
    for graph in graphs:
        for augmentation in (WHOLE, CROPPED):
            loader = load(index, graph, augmentation, **options)
            found = loaded(loader)
            assert set(found) == good, (graph, [names[video] for video in set(found) ^ good])
            plan = loader.sampler.plan(0, index.num_frames)
            for video, clip in found.items():
                step = np.abs(plan.colour[video, :, :3]).sum(1).max()
                difference = np.abs(clip.numpy() - oracle_clip([want[video]], plan, video, SIZE)).max()
                assert difference <= 0.05 * step + 1e-5, (graph, names[video])
            for video, line in loader.bad_clips.items():
                assert f"list.txt:{video + 1}: bad frame " in line and "\n" not in line
    return index, good


def test_all_readers_agree(tmp_path, all_may_be_bad, capfd):
    files = {name: make() for name, make in ALL.items()}
    _, good = check_agreement(tmp_path, files, FINDS_OUT_LATER)
    names = list(files)
    assert {names[video] for video in good} >= PLAIN.keys() | ODD.keys()
    read = {"jpeg, cut and ended", "jpeg, flipped bits", "jpeg, restart markers lost", "jpeg, no Huffman table"}
    assert {names[video] for video in good} - PLAIN.keys() - ODD.keys() - {"jpeg, segment of length 0"} == read | {
        "png, CRC of pixels"
    }


def test_headers_that_end_at_once_are_read_to_their_end():
    """In Python, where an index beyond the end is an error, as it is not in compiled code."""
    data = jpeg()
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for place in (frame, scan):
        for length in range(9):
            cut = data[: place + 2] + (length + 2).to_bytes(2) + data[place + 4 : place + 4 + length]
            assert not headers._is_plain_jpeg.py_func(np.frombuffer(cut, np.uint8))


def test_a_marker_is_seen_wherever_it_stands():
    """Scans are looked at many bytes at a time; no decoder stops at what lies behind their end."""
    data = jpeg()
    scan = data.index(b"\xff\xda")
    header, end = data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])], b"\xff\xd9"
    for length in (*range(4), *range(60, 70), 200):
        for place in range(length - 1):
            for second, plain in ((0x00, True), (0xD0, True), (0xD7, True), (0xD8, False), (0xC1, False), (1, False)):
                body = bytearray(b"\x11\xd4" * (length // 2 + 1))[:length]
                body[place : place + 2] = 0xFF, second
                assert is_plain(np.frombuffer(header + body + end, np.uint8)) == plain, (length, place, second)
        body = b"\x11" * length
        assert is_plain(np.frombuffer(header + body + end, np.uint8))
        assert is_plain(np.frombuffer(header + body + end + b"\xff\xc1" * 90, np.uint8))
        assert not is_plain(np.frombuffer(header + body, np.uint8))
        assert not is_plain(np.frombuffer(header + body + b"\xff", np.uint8))


def test_packs_of_odd_files_are_the_files(tmp_path):
    """Packed verbatim or raw: the same bits in training."""
    index = write_clips(tmp_path / "folders", {name: make() for name, make in (PLAIN | ODD).items()})
    want = loaded(load(index, "fused", CROPPED, bad_clips="error"))
    for kind in ("shards", "raw"):
        words = [str(tmp_path / "folders" / "list.txt"), "--out", str(tmp_path / kind), "--format", kind]
        assert pack.main([*words, "--workers", "1"]) == 0
        assert pack.main(["--verify", str(tmp_path / kind / "list.txt"), "--workers", "1"]) == 0
        found = loaded(load(load_index(tmp_path / kind / "list.txt"), "fused", CROPPED, bad_clips="error"))
        assert found.keys() == want.keys() and all(torch.equal(found[video], want[video]) for video in want)


def test_which_files_dali_is_given_as_they_are():
    assert all(is_plain(np.frombuffer(make(), np.uint8)) for make in PLAIN.values())
    assert not any(is_plain(np.frombuffer(make(), np.uint8)) for make in ODD.values())
    assert is_plain(np.frombuffer(encode_plain(picture()), np.uint8))
    assert np.array_equal(decode_image(encode_plain(picture())), picture())


def check_mutations(number: int, seed: int) -> int:
    """Mutate files; of those that are called plain, DALI's parser must refuse none. Returns how many there were."""
    rng, made = np.random.default_rng(seed), [make() for make in ALL.values()]
    plain = 0
    for _ in range(number):
        data = mutated(made[rng.integers(len(made))], rng)
        array = np.frombuffer(b"x" + data, np.uint8)[1:]  # at an odd address, as in a pack
        if is_plain(array):
            plain += 1
            assert refusal(array) is None
            assert nvimgcodec.CodeStream(data).height > 0, data
    return plain


def test_dali_s_parser_refuses_no_plain_file():
    """It is the parser in which a refusal can end the process."""
    assert 150 < check_mutations(3000, 0) < 1500
    with pytest.raises(RuntimeError):
        _ = nvimgcodec.CodeStream(ODD["jpeg, bytes between headers"]()).height


@pytest.mark.slow
def test_dali_s_parser_refuses_no_plain_file_of_many():
    assert check_mutations(400_000, 1) > 20_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_all_readers_agree_on_accidents(tmp_path, all_may_be_bad, seed):
    # Of one pixel DALI may have to cut out none, which it refuses.
    rng, made = np.random.default_rng(seed), [make() for name, make in ALL.items() if "one pixel" not in name]
    files = {str(number): mutated(made[rng.integers(len(made))], rng) for number in range(400)}
    later = {name for name, data in files.items() if is_plain(np.frombuffer(data, np.uint8)) and pixels(data) is None}
    _, good = check_agreement(tmp_path, files, later)
    assert 50 < len(good) < 350


@pytest.mark.gpu
def test_a_gpu_reads_the_same_files(tmp_path, all_may_be_bad):
    """nvJPEG rounds otherwise, so that only what is taken is compared, and how the pictures lie.

    What it makes of pixels that are missing is another picture (seen on an H200).
    """
    files = {name: make() for name, make in ALL.items()}
    index = write_clips(tmp_path, files)
    cpu, gpu = (loaded(load(index, "operators", device=device, device_id=0)) for device in ("cpu", "gpu"))
    assert gpu.keys() == cpu.keys()
    for video, clip in cpu.items():
        name = list(files)[video]
        assert name == "jpeg, cut and ended" or (gpu[video].cpu() - clip).abs().mean() < 0.05, name


# ---- Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_by_either_block_of_either_kind(orientation):
    """What XMP says is what EXIF would; EXIF goes before."""
    want = pixels(inserted(jpeg(), app1_exif(exif(orientation))))
    assert want.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    for element in (False, True):
        packet = app1_xmp(xmp(orientation, element=element))
        assert np.array_equal(pixels(inserted(jpeg(), packet)), want)
        assert np.array_equal(pixels(inserted(jpeg(), app1_xmp(xmp(2)) + app1_exif(exif(orientation)))), want)
    turned = pixels(with_chunk(png(), chunk(b"eXIf", exif(orientation))))
    for extra in (itxt(orientation), itxt(orientation, element=True), profile(orientation)):
        assert np.array_equal(pixels(with_chunk(png(), extra)), turned)
    turn = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
    turn |= {6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}
    assert np.array_equal(turned, turn[orientation](np.asarray(picture())))


def test_of_16_bits_the_upper_8_are_taken():
    wide = np.random.default_rng(0).integers(0, 2**16, (6, 5)).astype(np.uint16)
    assert np.array_equal(pixels(png(Image.fromarray(wide)))[..., 0], wide >> 8)


# ---- What becomes of them in a run


def test_a_frame_that_is_decoded_here_is_told_of_once(tmp_path, capfd):
    index = write_clips(tmp_path, {"a": jpeg(), "b": ODD["jpeg, XMP 6"](), "c": ODD["png, RGB of 16 bits"]()})
    loader = load(index, "fused")
    for epoch in range(3):
        assert len(loaded(loader, epoch)) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: frame ") and line.endswith("is an unusual image file, which takes longer to decode")
    loaded(load(write_clips(tmp_path / "plain", {name: make() for name, make in PLAIN.items()}), "fused"))
    assert "note: " not in capfd.readouterr().err


def test_what_dali_alone_refuses_is_decoded_here_from_then_on(tmp_path, monkeypatch):
    index = write_clips(tmp_path, {"a": jpeg(), "b": DAMAGED["png, CRC of pixels"](), "c": png()})
    loader, built = load(index, "fused", bad_clips="error"), []
    sliced = loader._feed._sliced[0]
    monkeypatch.setattr(sliced, "_build", lambda build=sliced._build: built.append(1) or build())
    for epoch in range(3):
        assert len(loaded(loader, epoch)) == 3
    assert len(built) == 1 + 3  # after the batch, the clip, the frame


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("bad, batch_size", [(0, 2), (1, 1)])
def test_what_dali_refuses_is_no_riddle_in_a_batch_that_was_read_before(tmp_path, monkeypatch, bad, batch_size, depth):
    """Not where it pads the last batch, nor in the next epoch."""
    monkeypatch.setattr(LoaderOptions, "depth", property(lambda self: depth))
    spoilt = DAMAGED["png, CRC of pixels"]()
    files = {name: jpeg(picture(number)) for number, name in enumerate("abc")}
    files["abc"[bad]] = encode_plain(decode_image(spoilt))
    index, sampler = write_clips(tmp_path, files), ClipSampler(0, 2, mode="eval", augmentation=WHOLE)
    clean = list(ClipLoader(index, sampler, LoaderOptions(batch_size, SIZE))(0))
    assert torch.cat([batch.ids for batch in clean]).tolist() == [0, 1, 2, *[0] * (batch_size - 1)]
    (tmp_path / str(bad) / "1.png").write_bytes(spoilt)
    loader = ClipLoader(index, sampler, LoaderOptions(batch_size, SIZE))
    batches = loader(0)
    found = [next(batches)]
    assert bool(loader._source._refused) == (bad == 0)
    loader.prepare(1)
    for _, _, reading in loader._prepared.read:
        assert reading.wait(60) is None
    found += [*batches, *loader(1)]
    assert loader._source._refused == {(bad, 0)}
    for got, want in zip(found, [*clean, *clean], strict=True):
        assert torch.equal(got.clips, want.clips) and torch.equal(got.valid, want.valid)


def test_hashes_are_of_the_files_and_not_of_what_dali_is_given(tmp_path):
    write_clips(tmp_path, {"a": jpeg(), "b": ODD["jpeg, XMP 6"](), "c": DAMAGED["png, CRC of pixels"]()})
    assert hash_clips.main([str(tmp_path / "list.txt")]) == 0
    assert hash_clips.main([str(tmp_path / "list.txt"), "--verify"]) == 0
    assert len(loaded(load(load_index(tmp_path / "list.txt"), "fused", bad_clips="error"))) == 3
    (tmp_path / "1" / "1.png").write_bytes(ODD["jpeg, XMP 3"]())
    with pytest.raises(BadClip, match=r"frame .*1\.png of clip 1: its bytes are not those"):
        loaded(load(load_index(tmp_path / "list.txt"), "fused", bad_clips="error"))


STRESS = """
import functools, json, mmap, os, sys
from pathlib import Path
import numpy as np
import torch
import dali_pipes.bad_clips
import dali_pipes.sources as sources
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.reading import Files, Rooms
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler

dali_pipes.bad_clips.TOLERATED = 1.0
folder, rounds, guarded, jobs = json.loads(sys.argv[1])

def guard(array):
    # On pages of its own, which are unmapped when it is released: who reads it later dies of it.
    pages = mmap.mmap(-1, max(array.nbytes, 1))
    pages.write(array.tobytes())
    return np.frombuffer(pages, np.uint8)[: array.nbytes]

if guarded:
    fetch = sources.Images.fetch
    sources.Images.fetch = lambda self, video, frames: [guard(array) for array in fetch(self, video, frames)]
    take = Rooms.take
    Rooms.take = lambda self: Files(*(guard(array).view(array.dtype).reshape(array.shape) for array in take(self)))
    Rooms.give_back = lambda self, room: None

@functools.cache
def loader(list_path, graph):
    sampler = ClipSampler(0, 4, augmentation=Augmentation(min_crop_area=0.5, colour=0.2))
    index = load_index(list_path)
    options = LoaderOptions(len(index), 32, bad_clips="skip", graph=graph)
    return ClipLoader(index, sampler, options)

def batches(list_path, graph):
    made = loader(list_path, graph)
    for memory_of_refusals in (made._bad.found, made._bad._frames, made._source._refused):
        memory_of_refusals.clear()
    (batch,) = made(0)
    return batch

def memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

want = {graph: batches(f"{folder}/healthy/list.txt", graph) for _, graph in jobs}
number, growth = 0, {}  # kB, in the second half of the rounds
for only in want:
    after = {}
    for done in range(rounds):
        for list_path, graph in (job for job in jobs if job[1] == only):
            batch = batches(list_path, graph)
            good = torch.from_numpy(np.load(Path(list_path).parent / "good.npy"))[batch.ids]
            assert torch.equal(batch.valid, good), (list_path, graph)
            same = torch.from_numpy(np.load(Path(list_path).parent / "same.npy"))[batch.ids]
            assert torch.equal(batch.clips[same], want[graph].clips[same]), (list_path, graph)
            number += 1
        after[done] = memory()
    growth[only] = after[rounds - 1] - after[rounds // 2]
print(json.dumps([number, growth]))
"""
CLIPS, FRAMES = 12, 4
SPOIL = {  # DALI refuses them; whether they can be read, and are then the same picture
    "junk": (lambda data: inserted(data, b"\0\x12\x34", b"\xff\xda"), True, True),
    "filled": (lambda data: inserted(data, b"\xff\xd0", b"\xff\xc4"), True, True),
    "tables": (lambda data: patched(data, b"\xff\xc4", 5, b"\xff" * 16), False, False),
    "cut": (lambda data: data[:-30], False, False),
    "headers": (lambda data: data[:300], False, False),
}


def write_stress(root: Path, kinds: list[str]) -> list[str]:
    """Lists of clips of which every second is spoilt in one of the ways, in some or all frames; and a healthy one."""
    for kind in ["healthy", *kinds]:
        good, same = np.ones(CLIPS, bool), np.ones(CLIPS, bool)
        rng, rows = np.random.default_rng(0), []
        for clip in range(CLIPS):
            (root / kind / str(clip)).mkdir(parents=True)
            for frame in range(FRAMES):
                data = jpeg(picture(int(rng.integers(1000)), 80, 60))
                if kind != "healthy" and clip % 2 and (frame == 2 or clip % 4 == 1):
                    spoil, good[clip], same[clip] = SPOIL[kind]
                    data = spoil(data)
                (root / kind / str(clip) / f"{frame}.jpg").write_bytes(data)
            rows.append(f"{clip} {FRAMES} {clip % 7}\n")
        (root / kind / "list.txt").write_text("".join(rows))
        np.save(root / kind / "good.npy", good)
        np.save(root / kind / "same.npy", same)
    return [str(root / kind / "list.txt") for kind in kinds]


def run_stress(root: Path, rounds: int, guarded: bool, jobs: list[tuple[str, str]], timeout: float) -> list:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = nursery().run(["-c", STRESS, json.dumps([str(root), rounds, guarded, jobs])], env, timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_dali_refuses_ends_no_process(tmp_path):
    """48 frames, more than DALI parses on one thread; it was the parser that went on in memory of others."""
    lists = write_stress(tmp_path, ["junk", "tables"])
    jobs = [(lists[0], "fused"), (lists[0], "operators"), (lists[1], "fused")]
    assert run_stress(tmp_path, 5, True, jobs, 60)[0] == 15


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_what_dali_refuses_ends_no_process_in_thousands_of_batches(tmp_path, guarded):
    lists = write_stress(tmp_path, list(SPOIL))
    for path in map(Path, lists[:2]):
        words = [str(path), "--out", str(path.parent / "pack"), "--workers", "1"]
        assert pack.main(words) == 0
        for name in ("good.npy", "same.npy"):
            (path.parent / "pack" / name).write_bytes((path.parent / name).read_bytes())
        lists.append(str(path.parent / "pack" / "list.txt"))
    jobs = [(path, graph) for path in lists for graph in ("fused", "operators")]
    number, growth = run_stress(tmp_path, 150, guarded, jobs, 1500)
    assert number == 150 * len(jobs)
    # kB, of 525 refused batches. DALI itself keeps 58 kB of each graph of its operators that was ever built.
    assert growth["fused"] < 10_000 and growth["operators"] < 40_000, growth


def table() -> None:
    """Print what becomes of each kind: who reads it, and what is said of it."""
    import tempfile

    dali_pipes.bad_clips.TOLERATED = 1.0
    files = {name: make() for name, make in ALL.items()}
    with tempfile.TemporaryDirectory() as folder:
        index = write_clips(Path(folder), files)
        said = readers(index)
        for graph in ("fused", "operators"):
            loader = load(index, graph)
            loaded(loader)
            said[f"loader, {graph}"] = [loader.bad_clips.get(video, "") for video in range(len(files))]
    print(f"| image | plain | {' | '.join(said)} | what is said |\n|{'---|' * (len(said) + 3)}")
    for video, (name, data) in enumerate(files.items()):
        plain = bool(len(data)) and is_plain(np.frombuffer(data, np.uint8))
        line = said["loader, fused"][video].rpartition(f"of clip {video}: ")[2]
        verdicts = " | ".join("reads" if not lines[video] else "refuses" for lines in said.values())
        print(f"| {name} | {'yes' if plain else ''} | {verdicts} | {line} |")


if __name__ == "__main__":
    table()
