"""Packs: the same bytes, or the pixels that Pillow makes of them; readable by others; nothing lost, skipped or half."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from dfer import __version__
from dfer.cli import UserError
from dfer.files import hash_file
from dfer.lists import packing
from dfer.lists import shards as shards_module
from dfer.lists import verify as verify_module
from dfer.lists.annotations import EMOTIONS, packed_index, read_annotations, write_annotations
from dfer.lists.index import ClipIndex, build_index, load_index
from dfer.lists.packed import Pack, Packed, load_packed, read_pack, write_pack
from dfer.lists.shards import Options
from dfer.lists.verify import verify
from dfer.video.decode import BadVideo, decode
from scripts import pack as command
from tests.conftest import ROOT, run_python, smooth_image
from tests.test_index import write_video

SMALL = 300_000  # bytes of a shard: several shards for a few clips


def pack(source: Path, out: Path, workers: int = 2, root: Path | None = None, **options) -> ClipIndex:
    (target,) = packing.pack([source], root, out, Options(**{"shard_bytes": SMALL, **options}), workers)
    assert target == out / source.name
    return load_index(target)


def stored(index: ClipIndex, clip: int) -> list[bytes]:
    """The bytes of a clip's frames, by the index alone."""
    store = index.store
    data = store.paths[store.shard[clip]].read_bytes()
    frames = range(store.first[clip], store.first[clip + 1])
    return [data[store.offset[i] : store.offset[i] + store.length[i]] for i in frames]


def pixels(index: ClipIndex, clip: int) -> np.ndarray:
    """(T, H, W, 3) of a raw pack, as one view of a memory map."""
    store = index.store
    shape = (index.num_frames[clip], store.height[clip], store.width[clip], 3)
    start = int(store.offset[store.first[clip]])
    assert start % 64 == 0
    return np.memmap(store.paths[store.shard[clip]], np.uint8, "r", start, shape)


def oracle(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def everything(out: Path) -> dict[str, object]:
    """Content of all files of a pack, short of when and by which command it was made, of folders how old."""
    files: dict[str, object] = {}
    for path in sorted(out.iterdir()):
        if path.suffix == ".npz":
            with np.load(path) as found:
                files |= {name: found[name].tolist() for name in found.files if name != "provenance"}
                made = json.loads(str(found["provenance"]))
                files["provenance"] = {key: made[key] for key in made if key not in ("date", "command", "key")}
        else:
            files[path.name] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def source(clips, tmp_path_factory) -> Path:
    """A list whose frames and folders may be changed, if they are changed back."""
    root = tmp_path_factory.mktemp("source")
    shutil.copytree(clips / "train clips", root / "train clips")
    shutil.copy(clips / "train.txt", root / "train.txt")
    return root / "train.txt"


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory) -> ClipIndex:
    return pack(source, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def raw(source, tmp_path_factory) -> ClipIndex:
    return pack(source, tmp_path_factory.mktemp("raw"), format="raw", shard_bytes=10**6)


def copy_of(index: ClipIndex, folder: Path) -> Path:
    """A pack that may be damaged; returns its list."""
    shutil.copytree(index.store.paths[0].parent, folder, dirs_exist_ok=True)
    return folder / "train.txt"


def same_rows(index: ClipIndex, frames: ClipIndex) -> bool:
    return (
        [record.name for record in index.records] == [record.name for record in frames.records]
        and index.labels.tolist() == frames.labels.tolist()
        and index.num_frames.tolist() == frames.num_frames.tolist()
        and index.num_miscounted() == 0
    )


# ---- What is in a pack


def test_shards_hold_the_same_bytes(source, shards):
    frames = build_index(read_annotations(source))
    assert shards.source == "shards" and same_rows(shards, frames)
    for clip, names in enumerate(frames.store.names):
        paths = [frames.frame_path(clip, frame) for frame in range(len(names))]
        assert stored(shards, clip) == [Path(path).read_bytes() for path in paths]
        assert oracle(paths[0]).size == (shards.store.width[clip], shards.store.height[clip])


def test_shards_are_tar_files_of_the_given_size(source, shards):
    """Every frame's place is that of a member, for a reader that knows nothing of ours."""
    store, seen, clips_before = shards.store, 0, 0
    assert len(store.paths) > 3 and [path.name for path in store.paths[:2]] == ["train-00000.tar", "train-00001.tar"]
    for number, path in enumerate(store.paths):
        in_shard = np.flatnonzero(store.shard == number).tolist()
        assert in_shard == list(range(clips_before, clips_before + len(in_shard)))  # in the order of the list
        clips_before += len(in_shard)
        assert path.stat().st_size <= SMALL + 1024 or len(in_shard) == 1
        assert path.read_bytes()[-1024:] == bytes(1024) and path.stat().st_size % 512 == 0  # POSIX's end of a tar
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar}
            assert [*members] == sorted(members, key=lambda name: name.replace("json", "!!").replace("cls", "!#"))
            for clip in in_shard:
                about = json.load(tar.extractfile(members.pop(f"{clip:07d}.json")))
                label = int(tar.extractfile(members.pop(f"{clip:07d}.cls")).read())
                assert about["label"] == label == shards.labels[clip] and about["emotion"] == EMOTIONS[label]
                assert (about["clip"], about["list"], about["row"]) == (
                    shards.records[clip].name,
                    "train.txt",
                    clip + 1,
                )
                assert about["num_frames"] == shards.num_frames[clip] and about["classes"] == list(EMOTIONS)
                for frame in range(shards.num_frames[clip]):
                    member = members.pop(f"{clip:07d}.{frame:05d}.jpg")
                    i = store.first[clip] + frame
                    assert (member.offset_data, member.size) == (store.offset[i], store.length[i])
                    assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                    seen += 1
        assert not members
    assert seen == shards.num_frames.sum()


def test_resized_shards_equal_pillow_by_hand(source, tmp_path):
    frames = build_index(read_annotations(source))
    for options, quality in (({}, 90), ({"quality": 60}, 60)):
        index = pack(source, tmp_path / str(quality), size=48, **options)
        assert set(index.store.height.tolist()) == set(index.store.width.tolist()) == {48}
        for clip in (0, 7, 19):
            for frame, found in enumerate(stored(index, clip)):
                small = oracle(frames.frame_path(clip, frame)).resize((48, 48), Image.Resampling.LANCZOS)
                want = io.BytesIO()
                small.save(want, "JPEG", quality=quality, subsampling=0, optimize=True)
                assert found == want.getvalue()
                error = np.abs(np.asarray(small, int) - np.asarray(Image.open(io.BytesIO(found))))
                assert error.mean() < (2.5 if quality == 90 else 4)


def test_raw_pixels_are_those_of_pillow(source, raw, tmp_path):
    frames = build_index(read_annotations(source))
    small = pack(source, tmp_path, format="raw", size=32)
    assert raw.source == small.source == "raw" and same_rows(raw, frames) and same_rows(small, frames)
    assert len(raw.store.paths) > 3 and len(small.store.paths) > 1
    for clip, names in enumerate(frames.store.names):
        want = [oracle(frames.frame_path(clip, frame)) for frame in range(len(names))]
        assert np.array_equal(pixels(raw, clip), np.stack(want))
        want = [image.resize((32, 32), Image.Resampling.LANCZOS) for image in want]
        assert np.array_equal(pixels(small, clip), np.stack(want))
        assert b"".join(stored(small, clip)) == pixels(small, clip).tobytes()


def test_odd_images_are_kept_as_they_are_and_decoded_as_the_trainer_does(tmp_path):
    rng = np.random.default_rng(0)
    image = smooth_image(rng, 40, 56)
    alpha = image.convert("RGBA")
    alpha.putalpha(smooth_image(rng, 40, 56).convert("L"))
    turned = Image.Exif()
    turned[0x112] = 6
    odd = {
        "gray.jpg": (image.convert("L"), {}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "turned.jpg": (smooth_image(rng, 56, 40), {"exif": turned}),  # its upright size is that of the others
        "progressive.jpeg": (image, {"progressive": True}),
        "a.PNG": (image, {}),
        "alpha.png": (alpha, {}),
        "palette.png": (image.convert("P"), {}),
    }
    (tmp_path / "clip").mkdir()
    for name, (picture, options) in odd.items():
        picture.save(tmp_path / "clip" / name, **options)
    (tmp_path / "list.txt").write_text("clip 7 3\n")
    frames = build_index(read_annotations(tmp_path / "list.txt"))
    files = [np.fromfile(frames.frame_path(0, frame), np.uint8) for frame in range(len(odd))]
    shards = pack(tmp_path / "list.txt", tmp_path / "shards")
    assert stored(shards, 0) == [file.tobytes() for file in files]
    with tarfile.open(shards.store.paths[0]) as tar:
        suffixes = [Path(name).suffix for name in tar.getnames()[2:]]
    assert suffixes == [".png" if "png" in name.lower() else ".jpg" for name in frames.store.names[0]]
    pipeline = Pipeline(len(odd), 1, None)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="files")))
    pipeline.build()
    pipeline.feed_input("files", files)
    (want,) = pipeline.run()
    raw = pixels(pack(tmp_path / "list.txt", tmp_path / "raw", format="raw"), 0)
    assert raw.shape == (7, 40, 56, 3) and np.array_equal(raw, np.stack([want.at(i) for i in range(len(odd))]))


def test_videos_are_packed_frame_by_frame(tmp_path):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", 9 + i, height=32 + 16 * i)
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 1 {i}\n" for i in range(3)))  # the listed lengths are wrong
    raw = pack(tmp_path / "list.txt", tmp_path / "raw", format="raw")
    shards = pack(tmp_path / "list.txt", tmp_path / "shards", quality=97)
    for i in range(3):
        found = pixels(raw, i)
        assert found.shape == (9 + i, 32 + 16 * i, 64, 3)
        assert np.abs(found.mean((1, 2, 3)) - 16 - 8 * np.arange(9 + i)).max() < 2
        assert np.array_equal(found, np.stack([np.asarray(image) for _, image in decode(tmp_path / f"{i}.mp4")]))
        images = [Image.open(io.BytesIO(data)) for data in stored(shards, i)]
        assert {image.format for image in images} == {"JPEG"}
        assert np.abs(np.stack([np.asarray(image, int) for image in images]) - found).max() < 3
    for index in (raw, shards):
        assert index.num_frames.tolist() == [9, 10, 11] and index.num_miscounted() == 0


def test_several_lists_share_one_pack(source, tmp_path):
    rows = source.read_text().splitlines()
    lists = {"fold 1": rows[:12], "fold 2": rows[15:3:-2] + rows[10:11] * 2, "test": rows[12:]}
    for name in lists:
        (source.parent / f"{name}.txt").write_text("\n".join(lists[name]) + "\n")
    out = tmp_path / "out"
    paths = [source.parent / f"{name}.txt" for name in lists]
    assert packing.pack(paths, None, out, Options(shard_bytes=SMALL), 2) == [out / path.name for path in paths]
    pack_ = read_pack(out / "clips.npz")
    assert sorted(pack_.names) == sorted(row.rsplit(maxsplit=2)[0] for row in rows)
    for path in paths:
        index, frames = load_index(out / path.name), build_index(read_annotations(path))
        assert same_rows(index, frames)
        for clip, names in enumerate(frames.store.names):
            files = [frames.frame_path(clip, frame) for frame in range(len(names))]
            assert stored(index, clip) == [Path(file).read_bytes() for file in files]
            assert oracle(files[0]).size == (index.store.width[clip], index.store.height[clip])
        assert index.store.first[-1] == len(index.store.offset) == len(index.store.length)
    assert verify(out / "test.txt", 2)[1] == []


# ---- Other readers


def test_the_webdataset_library_reads_the_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    import warnings

    paths = [str(path) for path in shards.store.paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{clip:07d}" for clip in range(len(shards))]
    for clip, sample in enumerate(samples):
        assert sample["cls"] == shards.labels[clip] and sample["json"]["clip"] == shards.records[clip].name
        frames = [sample[f"{frame:05d}.jpg"] for frame in range(shards.num_frames[clip])]
        assert len([key for key in sample if key.endswith("jpg")]) == len(frames)
        want = [np.asarray(Image.open(io.BytesIO(data))) for data in stored(shards, clip)]
        assert np.array_equal(np.stack(frames), np.stack(want))


def test_dalis_reader_reads_the_shards(shards):
    paths = [str(path) for path in shards.store.paths]
    pipeline = Pipeline(len(shards), 1, None)
    with pipeline:
        pipeline.set_outputs(*fn.readers.webdataset(paths=paths, ext=["json", "cls", "00000.jpg", "00002.jpg"]))
    pipeline.build()
    about, labels, *frames = pipeline.run()
    for clip in range(len(shards)):
        assert json.loads(about.at(clip).tobytes())["clip"] == shards.records[clip].name
        assert int(labels.at(clip).tobytes()) == shards.labels[clip]
        data = stored(shards, clip)
        assert frames[0].at(clip).tobytes() == data[0] and frames[1].at(clip).tobytes() == data[2]


# ---- The same bytes however they come about


@pytest.mark.parametrize("options", [{}, {"size": 40}, {"format": "raw", "shard_bytes": 10**6}])
def test_packing_twice_gives_the_same(source, tmp_path, options):
    for workers in (1, 3):
        pack(source, tmp_path / str(workers), workers, **options)
    assert everything(tmp_path / "1") == everything(tmp_path / "3")


def test_a_killed_run_goes_on_and_ends_as_if_unbroken(source, raw, tmp_path):
    """One frame is a pipe, at which reading waits: the run is killed there, with some shards finished."""
    frame = source.parent / "train clips" / "016" / "1.jpg"
    folder = frame.parent.stat()
    frame.rename(tmp_path / "kept.jpg")
    os.mkfifo(frame)
    os.utime(frame.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))
    out = tmp_path / "out"
    words = [str(source), "--out", str(out), "--format", "raw", "--shard-size", "1", "--workers", "2"]
    with subprocess.Popen([sys.executable, "scripts/pack.py", *words], cwd=ROOT, stdout=subprocess.PIPE) as run:
        deadline = time.monotonic() + 60
        names, since = [], time.monotonic()
        while run.poll() is None and time.monotonic() < deadline:
            before, names = names, sorted(os.listdir(out)) if out.exists() else []
            if names != before:
                since = time.monotonic()
            begun = any(name.endswith(".partial") for name in names)
            if begun and sum(name.endswith(".raw") for name in names) >= 4 and time.monotonic() > since + 0.5:
                break  # nothing more comes
            time.sleep(0.02)
        assert run.poll() is None, "it did not wait at the pipe"
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=20)  # until the last process that could write there has ended
    (tmp_path / "kept.jpg").replace(frame)
    os.utime(frame.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.raw")}
    assert len(finished) >= 4 and not list(out.glob("*.txt")) and not list(out.glob("*.npz"))
    assert list(out.glob("*.raw.partial"))
    done = run_python("scripts/pack.py", *words)
    assert done.returncode == 0 and " were packed before" in done.stdout, done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # and not written again
    assert everything(out) == everything(raw.store.paths[0].parent)


def test_a_bad_frame_ends_the_run_and_mended_it_goes_on(source, shards, tmp_path, monkeypatch, capsys):
    bad, out = source.parent / "train clips" / "016" / "2.jpg", tmp_path / "out"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-200])
    with pytest.raises(ValueError, match=r"train\.txt:17: clip train clips/016: .*/016/2\.jpg cannot be decoded \(im"):
        pack(source, out)
    bad.write_bytes(whole)
    left = sorted(path.name for path in out.iterdir())
    assert len(left) > 3 and left[-1] == "train.unfinished"
    assert [name[-4:] for name in left[:-1]] == [".tar"] * (len(left) - 1)
    # Other bytes than those that are there would come of this.
    with pytest.raises(ValueError, match=r"train\.unfinished: is left of a run with other lists, clips or options"):
        pack(source, out, size=64)
    os.utime(bad.parent)
    with pytest.raises(ValueError, match=r"train\.unfinished: is left of a run with other lists, clips or options"):
        pack(source, out)
    key = (out / "train.unfinished" / "key").read_text()
    monkeypatch.setattr(packing, "hash_task", lambda *args: key)
    (out / "train-00000.raw").touch()
    with pytest.raises(ValueError, match=r"train-00000\.raw: is there already, and not of this pack"):
        pack(source, out)
    (out / "train-00000.raw").unlink()
    (out / "train-00099.tar.partial").touch()  # of a run that was killed
    damaged = bytearray((out / "train-00001.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "train-00001.tar").write_bytes(damaged)
    first = (out / "train-00000.tar").stat().st_mtime_ns
    capsys.readouterr()
    pack(source, out)
    assert "train-00001.tar is not whole and packed again" in capsys.readouterr().out
    assert (out / "train-00000.tar").stat().st_mtime_ns == first
    assert everything(out) == everything(shards.store.paths[0].parent)


def test_a_run_that_finished_no_shard_leaves_nothing(source, tmp_path):
    bad = source.parent / "train clips" / "000" / "1.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.txt:1: clip train clips/000: .*1\.jpg cannot be decoded \(zero b"):
        pack(source, tmp_path / "out")
    bad.write_bytes(whole)
    assert not list((tmp_path / "out").iterdir())


def test_the_same_again_does_nothing_and_another_is_refused(source, tmp_path, capsys):
    pack(source, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    pack(source, tmp_path)
    assert "is packed already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"train\.npz: is a pack already, of other lists, clips or options"):
        pack(source, tmp_path, size=64)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    (tmp_path / "train.txt").unlink()  # as if killed just before the end
    (tmp_path / "train.unfinished").mkdir()
    pack(source, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in times}
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.tar: a shard of the pack is missing"):
        pack(source, tmp_path)


def test_nothing_foreign_is_overwritten(source, tmp_path):
    for name, message in (
        ("train.txt", r"train\.txt: is there already, and not of this pack"),
        ("train-00000.tar", r"train-00000\.tar: is there already, and not of this pack"),
        ("train-00007.raw", r"train-00007\.raw: is there already, and not of this pack"),
    ):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine 1 1\n")
        with pytest.raises(ValueError, match=message):
            pack(source, out)
        assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine 1 1\n"
    with pytest.raises(ValueError, match="is there already"):
        pack(source, source.parent)


def test_two_runs_at_once_are_refused(source, tmp_path):
    (tmp_path / "train.unfinished").mkdir()
    with open(tmp_path / "train.unfinished" / "key", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is packing there"):
            pack(source, tmp_path)


# ---- Damage


DAMAGE = {
    "truncated": (lambda data: data[:-1500], r"train-00001\.tar: [\d,]+ bytes, but [\d,]+ were packed", True),
    "missing": (None, r"train-00001\.tar: a shard of the pack is missing \(no such file", True),
    "in a frame": (
        lambda data: flip(data, 8000),
        r"train-00001\.tar: clip train clips/0\d\d: its frames are not",
        False,
    ),
    "zeroed": (
        lambda data: data[:2048] + bytes(len(data) - 2048),
        r"train-00001\.tar: clip train clips/0\d\d: frame \d+ cannot be decoded",
        False,
    ),
    "in a label": (
        lambda data: data.replace(b'"label": ', b'"label": 1', 1)[:-1],
        r"train-00001\.tar: (damaged between|its members|.*says)",
        False,
    ),
    "in a name": (lambda data: flip(data, 3), r"train-00001\.tar: damaged between its frames", False),
    "at the end": (lambda data: flip(data, -3), r"train-00001\.tar: its SHA-256 is not that", False),
}


def flip(data: bytes, at: int) -> bytes:
    damaged = bytearray(data)
    damaged[at] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_found(shards, tmp_path, kind, capsys):
    change, message, at_once = DAMAGE[kind]
    path = copy_of(shards, tmp_path)
    shard = tmp_path / "train-00001.tar"
    if change is None:
        shard.unlink()
    else:
        shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(ValueError, match=message) if at_once else contextlib.nullcontext():  # sizes, when it is loaded
        load_index(path)
    assert command.main(["--verify", str(path), "--workers", "2"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert any(re.search(message, line) for line in lines)
    assert all(line.startswith("pack: ") and "train-00001.tar" in line for line in lines) and len(lines) <= 14


def test_a_whole_pack_is_verified(shards, raw, capsys):
    for index in (shards, raw):
        assert command.main(["--verify", str(index.store.paths[0].parent / "train.txt")]) == 0
        assert "20 clips" in (told := capsys.readouterr().out) and "all as packed" in told


def test_a_damaged_raw_shard_is_found(raw, tmp_path, capsys):
    path = copy_of(raw, tmp_path)
    shard = tmp_path / "train-00002.raw"
    shard.write_bytes(flip(shard.read_bytes(), 5))
    assert command.main(["--verify", str(path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "train-00002.raw: its SHA-256" in first and ": its frames are not those that were packed" in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{0} {1} {2}", "other {1} {2}"), r"train\.txt:\d+: clip other is not in .*train\.npz: pack the list again"),
        (
            ("{0} {1} {2}", "train clips/3 {1} {2}"),
            r"is not in .* \(train clips/003 is: other leading zeros\): pack the",
        ),
        (("{0} {1} {2}", "{0} {1} 6"), r"train\.txt:\d+: clip train clips/003 has label 6 here, but 3 in .*train\.npz"),
        (("{0} {1} {2}", "{0} 99 {2}"), r"train\.txt:\d+: clip train clips/003 has 99 frames here, but \d+ in"),
    ],
)
def test_rows_that_are_not_in_the_pack_are_named(shards, tmp_path, change, message):
    path = copy_of(shards, tmp_path)
    rows = [(record.name, record.num_frames, record.label) for record in read_annotations(path)]
    lines = [change[1].format(*row).rsplit(maxsplit=2) if i == 3 else row for i, row in enumerate(rows)]
    write_annotations(path, [(name, int(count), int(label)) for name, count, label in lines], packed="train.npz")
    with pytest.raises(ValueError, match=message) as error:
        load_index(path)
    assert "\n" not in str(error.value) and verify(path)[1] == [str(error.value)]


def test_a_pack_is_of_one_source(shards, raw):
    for index, other in ((shards, "raw"), (raw, "shards"), (raw, "frames"), (shards, "video")):
        path = index.store.paths[0].parent / "train.txt"
        assert load_index(path, source=index.source).source == index.source
        with pytest.raises(ValueError, match=f"packed as {index.source}, but the source asked for is {other}"):
            load_index(path, source=other)


def test_a_damaged_index_is_told(shards, tmp_path):
    path, npz = copy_of(shards, tmp_path), tmp_path / "train.npz"
    whole, want = npz.read_bytes(), read_pack(npz)
    rng = np.random.default_rng(0)
    damaged = [b"", b"garbage" * 99, whole[:-20], whole[: len(whole) // 2]]
    damaged += [flip(whole, int(at)) for at in rng.integers(0, len(whole), 150)]
    told = 0
    for data in damaged:
        npz.write_bytes(data)
        try:
            found = load_index(path)
        except ValueError as error:
            assert str(error).startswith(f"{npz}: ") and "\n" not in str(error)
            told += 1
        else:  # in what no reader of zip files looks at
            clips = vars(want.clips) | {"digests": want.digests}
            assert all(np.array_equal(vars(found.store)[name], clips[name]) for name in clips)
    assert told > 100
    npz.unlink()
    with pytest.raises(ValueError, match=r"train\.npz: no such file, but the list beside it says"):
        load_index(path)


def test_an_index_that_leads_nowhere_is_refused(shards, raw, tmp_path):
    def altered(index: ClipIndex, **changes) -> Pack:
        whole = read_pack(index.store.paths[0].parent / "train.npz")
        clips = Packed(**{**vars(whole.clips), **{k: v for k, v in changes.items() if k in vars(whole.clips)}})
        return Pack(**{**vars(whole), "clips": clips, **{k: v for k, v in changes.items() if k in vars(whole)}})

    store = raw.store
    moved = store.offset.copy()
    moved[store.first[3] + 1] += 1  # a gap in a clip
    shifted = store.offset.copy()
    shifted[store.first[3] : store.first[4]] -= 1
    far = shards.store.offset.copy()
    far[-1] += 10**6
    for pack_ in (
        altered(shards, offset=far),
        altered(shards, shard=shards.store.shard + 1),
        altered(shards, shard=np.where(shards.store.shard == shards.store.shard.max(), -1, shards.store.shard)),
        altered(shards, first=shards.store.first + 1),
        altered(shards, names=["a"] * len(shards)),
        altered(raw, offset=moved),
        altered(raw, offset=shifted),
        altered(raw, height=store.height + 1),
        altered(raw, paths=[path.with_name("a\0b") for path in store.paths]),
    ):
        write_pack(tmp_path / "x.npz", pack_)
        with pytest.raises(ValueError, match=r"x\.npz: damaged, or not made by"):
            read_pack(tmp_path / "x.npz")
    write_pack(tmp_path / "x.npz", altered(shards))
    assert read_pack(tmp_path / "x.npz").names == [record.name for record in shards.records]


def test_an_index_that_tells_another_story_than_its_shards_is_found(shards, tmp_path):
    """All hashes fit: made wrong, and not damaged."""
    path, npz = copy_of(shards, tmp_path), tmp_path / "train.npz"
    whole, store = read_pack(npz), shards.store
    labels, height, order = whole.labels.copy(), store.height.copy(), np.arange(len(store.offset))
    labels[4] = (labels[4] + 1) % 7
    height[4] += 1
    first, second = store.first[4], store.first[4] + 1
    order[[first, second]] = second, first
    hasher = hashlib.blake2b(digest_size=16)
    for data in np.array(stored(shards, 4), object)[order[first : store.first[5]] - first]:
        hasher.update(data)
    digests = whole.digests.copy()
    digests[4] = np.frombuffer(hasher.digest(), np.uint8)
    swapped = dataclasses.replace(store, offset=store.offset[order], length=store.length[order])
    for changed, message in (
        (dataclasses.replace(whole, clips=swapped, digests=digests), r": its members are not those of the index"),
        (dataclasses.replace(whole, labels=labels), r": 0000004\.json says \[.*\], the index \["),
        (
            dataclasses.replace(whole, clips=dataclasses.replace(store, height=height)),
            r"clip .*004: frame 0 is .* pixels, no",
        ),
    ):
        write_pack(npz, changed)
        rows = [(n, int(c), int(k)) for n, c, k in zip(whole.names, shards.num_frames, changed.labels, strict=True)]
        write_annotations(path, rows, packed="train.npz")
        problems = verify(path)[1]
        assert any(re.search(message, problem) for problem in problems), problems
        assert all("train-" in problem and "SHA-256" not in problem for problem in problems)


def test_a_list_may_be_in_another_order(shards, tmp_path):
    path = copy_of(shards, tmp_path)
    rows = [(record.name, record.num_frames, record.label) for record in read_annotations(path)]
    write_annotations(path, rows[::-1], packed="train.npz")
    index = load_index(path)
    for clip in range(len(rows)):
        assert index.records[clip].name == rows[-1 - clip][0] and stored(index, clip) == stored(
            shards, -1 - clip + len(rows)
        )


def test_an_index_of_other_classes_or_versions_is_refused(shards, tmp_path, monkeypatch):
    path = copy_of(shards, tmp_path)
    whole = read_pack(tmp_path / "train.npz")
    for name, value, message in (
        ("FORMAT", 2, "a pack of format 2, this version reads 1"),
        ("EMOTIONS", tuple(sorted(EMOTIONS)), "its classes are Angry Disgust"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"dfer.lists.packed.{name}", value)
            write_pack(tmp_path / "train.npz", whole)
        with pytest.raises(ValueError, match=rf"train\.npz: {message}"):
            load_index(path)


def test_the_header_names_a_file_beside_the_list(tmp_path):
    for name in ("../x.npz", "/x.npz", "a/x.npz", "x.txt", ".."):
        (tmp_path / "list.txt").write_text(f"# packed: {name}\na 1 1\n")
        with pytest.raises(ValueError, match=r"list\.txt: its header says packed: .*, which is no \.npz file beside"):
            load_index(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a 1 1\n# packed: x.npz\n")  # a comment among the rows
    assert packed_index(tmp_path / "list.txt") is None


# ---- What a user can get wrong


def exit_code(arguments: list[str]) -> int:
    try:
        return command.main(arguments)
    except SystemExit as stop:
        return stop.code


def write_list(folder: Path, **frames: list[Image.Image]) -> Path:
    for name in frames:
        (folder / name).mkdir()
        for i, image in enumerate(frames[name]):
            image.save(folder / name / f"{i}.png")
    (folder / "list.txt").write_text("".join(f"{name} 1 2\n" for name in frames))
    return folder / "list.txt"


def test_frames_of_different_sizes_need_a_size(tmp_path):
    rng = np.random.default_rng(0)
    path = write_list(tmp_path, a=[smooth_image(rng, 30, 40)], b=[smooth_image(rng, 30, 40), smooth_image(rng, 40, 30)])
    for kind in ("raw", "shards"):
        with pytest.raises(ValueError, match=r"list\.txt:2: clip b: frame 2 is 30 x 40 pixels, .* 40 x 30; --size"):
            pack(path, tmp_path / kind, format=kind)
    assert pack(path, tmp_path / "sized", size=32).num_frames.tolist() == [1, 2]


def test_of_deep_pixels_the_upper_8_bits_are_packed(tmp_path):
    deep = np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50
    index = pack(write_list(tmp_path, a=[Image.fromarray(deep)]), tmp_path / "out", format="raw")
    assert np.array_equal(np.fromfile(index.store.paths[0], np.uint8).reshape(30, 40, 3)[..., 0], deep >> 8)


def test_one_name_for_two_clips_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = write_list(tmp_path, a=[smooth_image(rng, 30, 40)])
    (tmp_path / "relabelled.txt").write_text("a 1 3\n")
    (tmp_path / "other").mkdir()
    moved = write_list(tmp_path / "other", a=[smooth_image(rng, 30, 40)]).rename(tmp_path / "other" / "moved.txt")
    for second in (tmp_path / "relabelled.txt", moved):
        with pytest.raises(ValueError, match=rf"{second.name}:1: clip a is .*list\.txt:1 too, of another label or fol"):
            packing.pack([path, second], None, tmp_path / "out", Options())
    with pytest.raises(ValueError, match="another list has that name too"):
        packing.pack([path, path], None, tmp_path / "out", Options())


def test_a_full_disk_is_foreseen(source, tmp_path, monkeypatch, capsys):
    (want,) = (path.stat().st_size for path in [pack(source, tmp_path / "a", shard_bytes=10**8).store.paths[0]])
    estimate = float(capsys.readouterr().out.split("about ")[1].split(" MB")[0]) * 1e6
    assert 0.7 * want < estimate < 1.4 * want
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(0.6 * want)))
    with pytest.raises(ValueError, match=r"about .* are left to write, but only .* are free"):
        pack(source, tmp_path / "b")


def test_a_full_disk_is_told_and_the_run_goes_on(source, shards, tmp_path, monkeypatch):
    def full(self, data):
        if self.path.name == "train-00002.tar" and self.position > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    write = shards_module.Shard._write
    monkeypatch.setattr(shards_module.Shard, "_write", full)
    with pytest.raises(UserError, match=r": stopped, what is finished stays finished: No space left on device$"):
        pack(source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.tar",
        "train-00001.tar",
        "train.unfinished",
    ]
    monkeypatch.undo()
    pack(source, tmp_path)
    assert everything(tmp_path) == everything(shards.store.paths[0].parent)


def test_enlarging_is_told(tmp_path, capsys):
    path = write_list(tmp_path, a=[smooth_image(np.random.default_rng(0), 60, 50)])
    for size, told in ((61, True), (60, False)):
        pack(path, tmp_path / str(size), size=size)
        assert (f"frames of 50 x 60 pixels are enlarged to {size} x {size}" in capsys.readouterr().out) == told


def test_a_video_that_gives_less_than_it_says_is_named(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4", 12)
    (tmp_path / "list.txt").write_text("v.mp4 3 1\n")

    def breaks(path, square):
        yield from itertools.islice(decode(path), 5)
        raise BadVideo("damaged")

    for decoder, message in (
        (breaks, r"cannot be decoded \(damaged\)"),
        (lambda path, square: itertools.islice(decode(path), 5), "has 12 frames, but 5 could be decoded"),
    ):
        monkeypatch.setattr(shards_module, "decode", decoder)
        with pytest.raises(ValueError, match=rf"list\.txt:1: clip v\.mp4: .*v\.mp4 {message}"):
            pack(tmp_path / "list.txt", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{list}"], "give the lists to pack and --out DIR, or --verify"),
        (["--out", "{out}"], "give the lists to pack and --out DIR, or --verify"),
        (["{list}", "--verify", "{list}"], "--verify takes the one list"),
        (["nowhere.txt", "--out", "{out}"], "nowhere.txt: no such annotation list"),
        (["{list}", "--out", "{out}", "--quality", "90"], "--quality: nothing is encoded"),
        (["{list}", "--out", "{out}", "--format", "raw", "--size", "64", "--quality", "90"], "--quality: nothing is"),
        (["{list}", "--out", "{out}", "--size", "8"], "'8' is not a whole number from 16 to 2,048"),
        (["{list}", "--out", "/proc/no"], "/proc/no"),
        (["{packed}", "--out", "{out}"], "train.txt: is packed already; pack the list that it was made of"),
        (["--verify", "{list}"], "train.txt: not packed"),
        (["{list}", "--root", "/nowhere", "--out", "{out}"], "train.txt:1: no such frame folder or video file"),
        (["{broken}", "--out", "{out}"], "broken.txt:1: cannot use the video"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(source, shards, tmp_path, arguments, message, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 99)
    (tmp_path / "broken.txt").write_text("broken.mp4 3 1\n")
    places = {"list": source, "out": tmp_path / "out", "packed": shards.store.paths[0].parent / "train.txt"}
    places["broken"] = tmp_path / "broken.txt"
    code = exit_code([argument.format(**places) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("pack: ") and message in line
    assert not list(tmp_path.glob("out/*.txt"))


def test_the_command_line(source, tmp_path, monkeypatch):
    done = run_python("scripts/pack.py", str(source), "--out", str(tmp_path / "a b"), "--size", "32", "--quality", "80")
    assert done.returncode == 0 and not done.stderr
    assert f"python train.py --data.train-list '{tmp_path}/a b/train.txt'" in done.stdout
    made = read_pack(tmp_path / "a b" / "train.npz").provenance
    assert made["lists"] == [{"name": "train.txt", "sha256": hash_file(source)}]
    assert made["options"]["size"] == 32 and made["options"]["quality"] == 80
    assert made["command"].endswith("/a b' --size 32 --quality 80") and made["dfer"] == __version__
    assert (
        load_packed(read_annotations(tmp_path / "a b" / "train.txt"), tmp_path / "a b" / "train.npz").kind == "shards"
    )


@pytest.mark.parametrize("name", [b" list.txt", b"\xff.txt", b"a\nb.txt"])
def test_a_list_whose_pack_could_not_be_named_is_refused_before_the_work(source, tmp_path, name, capsys):
    path = Path(os.fsdecode(os.fsencode(source.parent) + b"/" + name))
    shutil.copy(source, path)
    assert exit_code([str(path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "which cannot stand in a list; rename the list" in line and not (tmp_path / "out").exists()


def test_a_folder_whose_name_is_no_text_is_packed_into(tmp_path, capsys):
    path = write_list(tmp_path, a=[smooth_image(np.random.default_rng(0), 30, 40)])
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert exit_code([str(path), "--out", str(out)]) == 0 and exit_code(["--verify", str(out / "list.txt")]) == 0
    assert r"--data.train-list" in capsys.readouterr().out


def test_a_shard_that_cannot_be_read_is_named(shards, tmp_path, monkeypatch, capsys):
    def fails(path):
        if path.stem.endswith("1"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return hash_file(path)

    path = copy_of(shards, tmp_path)
    monkeypatch.setattr(verify_module, "hash_file", fails)
    assert exit_code(["--verify", str(path)]) == 1
    assert "train-00001.tar: cannot be read (Input/output error)" in capsys.readouterr().err


def test_an_index_of_shards_with_names_that_no_disk_holds(shards, tmp_path, capsys):
    path = copy_of(shards, tmp_path)
    whole = read_pack(tmp_path / "train.npz")
    paths = [tmp_path / ("x" * 300), *whole.clips.paths[1:]]
    write_pack(tmp_path / "train.npz", dataclasses.replace(whole, clips=dataclasses.replace(whole.clips, paths=paths)))
    assert exit_code(["--verify", str(path)]) == 1
    assert "xxx: a shard of the pack is missing (File name too long)" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(source, tmp_path, monkeypatch):
    """What no user can put right keeps its traceback."""
    monkeypatch.setattr(packing, "hash_task", lambda *_: max([]))
    with pytest.raises(ValueError, match="empty"):
        command.main([str(source), "--out", str(tmp_path)])


def test_a_clip_whose_name_begins_with_a_hash_is_packed_and_read(tmp_path):
    for name in ("#12", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "1.jpg")
    (tmp_path / "list.txt").write_text("#12 1 3\na 1 4\n")
    (packed,) = packing.pack([tmp_path / "list.txt"], None, tmp_path / "out", Options())
    assert "\n./#12 1 3\n" in packed.read_text()
    assert [(record.name, record.label) for record in load_index(packed).records] == [("#12", 3), ("a", 4)]
