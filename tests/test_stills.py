"""Labelled images as clips of one frame: found, listed, and taken wherever clips are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.lists.index import build_index, load_index
from dfer.plan.sampling import ClipSampler
from scripts import check_list, hash_clips, pack, prepare_stills
from tests.conftest import run_python, smooth_image
from tests.oracle import oracle_clip
from tests.test_dali_pipes import PLAIN
from tests.test_train import TINY, rows, tiny_run

WORDS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")  # in the order of EMOTIONS


@pytest.fixture
def tree(tmp_path) -> Path:
    """As FER2013 is unpacked: train/happy/1.png, grey or not, of several sizes and suffixes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for label, word in enumerate(WORDS):
            folder = tmp_path / "fer" / split / word
            folder.mkdir(parents=True)
            for i in range(count):
                image = smooth_image(rng, 40 + label, 60 - i)
                (image.convert("L") if i == 0 else image).save(folder / ("a b.PNG", "2.jpeg")[i], quality=95)
    return tmp_path / "fer"


@pytest.fixture
def lists(tree, tmp_path) -> Path:
    assert prepare_stills.main(["--root", str(tree), "--out", str(tmp_path / "lists")]) == 0
    return tmp_path / "lists"


def named(path: Path) -> list[tuple[str, int, str]]:
    return [(r.name, r.num_frames, EMOTIONS[r.label]) for r in read_annotations(path)]


def test_a_tree_of_emotions_is_listed(lists, tree):
    found = named(lists / "train.txt")
    assert sorted(found) == sorted(
        (f"train/{word}/{name}", 1, EMOTIONS[label])
        for label, word in enumerate(WORDS)
        for name in ("2.jpeg", "a b.PNG")
    )
    assert len(named(lists / "test.txt")) == 7 and len(list(lists.iterdir())) == 2


def test_what_is_left_out_is_named(tree, tmp_path, capsys):
    (tree / "train" / "contempt").mkdir()
    out = ["--root", str(tree.parent), "--out", str(tmp_path / "out")]  # as archives nest
    assert prepare_stills.main(out) == 2
    assert "train/contempt: is none of our classes" in capsys.readouterr().err
    (tree / "train" / "happy" / "x.webp").touch()
    (tree / "train" / "happy" / ".hidden.png").touch()
    (tree / "train" / "sad" / "cut.png").write_bytes((tree / "train" / "sad" / "a b.PNG").read_bytes()[:20])
    assert prepare_stills.main([*out, "--leave-out", "contempt"]) == 2
    printed = capsys.readouterr()
    assert "1 of 22 clips are unreadable: fer/train/sad/cut.png; nothing was written" in printed.err
    assert not (tmp_path / "out").exists()
    assert prepare_stills.main([*out, "--leave-out", "contempt", "--allow-missing"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {tree}/train/contempt\n" in printed
    assert f"{tree}/train/happy: 1 that are no JPEG or PNG files by name are left out: x.webp" in printed
    assert len(named(tmp_path / "out" / "train.txt")) == 14
    assert (tmp_path / "out" / "train.missing.txt").read_text().startswith("fer/train/sad/cut.png: unreadable")


def test_folders_of_numbers_need_an_order(tree, tmp_path, capsys):
    raf = ("surprise", "fear", "disgust", "happy", "sad", "angry", "neutral")
    for split in ("train", "test"):
        for number, word in enumerate(raf, start=1):
            (tree / split / word).rename(tree / split / str(number))
    out = ["--root", str(tree), "--out", str(tmp_path / "out")]
    assert prepare_stills.main(out) == 2
    assert f"{tree}/train: its folders are called by numbers: say --class-order" in capsys.readouterr().err.replace(
        f"{tree}/test", f"{tree}/train"
    )
    assert prepare_stills.main([*out, "--label-base", "1"]) == 2
    order = ["--class-order", "Surprise,Fear,Disgust,Happiness,Sadness,Anger,Neutral", "--label-base", "1"]
    assert prepare_stills.main([*out, *order]) == 0
    assert ("train/4/2.jpeg", 1, "Happy") in named(tmp_path / "out" / "train.txt")
    assert ("test/1/a b.PNG", 1, "Surprise") in named(tmp_path / "out" / "test.txt")
    # Of one list alone, as CK+ comes; ids from 0.
    for number in range(1, 8):
        (tree / "train" / str(number)).rename(tree / "train" / str(number - 1))
    args = ["--root", str(tree / "train"), "--out", str(tmp_path / "one"), "--class-order", "alphabetical"]
    assert prepare_stills.main(args) == 0
    assert ("0/2.jpeg", 1, "Angry") in named(tmp_path / "one" / "all.txt")


def test_raf_db_is_listed_by_its_numbers(tree, tmp_path, capsys):
    root = tmp_path / "raf"
    (root / "basic" / "EmoLabel").mkdir(parents=True)
    labels = root / "basic" / "EmoLabel" / "list_patition_label.txt"
    labels.write_text("".join(f"{s}_{i:05d}.jpg {i}\n" for s in ("train", "test") for i in range(1, 8)))
    (root / "basic" / "Image" / "original").mkdir(parents=True)
    out = ["--root", str(root), "--out", str(tmp_path / "out")]
    assert prepare_stills.main(out) == 2
    assert "found no images of it (train_00001_aligned.jpg)" in capsys.readouterr().err
    source = tree / "train" / "happy" / "2.jpeg"
    for s in ("train", "test"):
        for i in range(1, 8):
            shutil.copy(source, root / "basic" / "Image" / "original" / f"{s}_{i:05d}.jpg")
    assert prepare_stills.main(out) == 0
    assert "found no aligned faces" in capsys.readouterr().out
    assert ("test_00007.jpg", 1, "Neutral") in named(tmp_path / "out" / "test.txt")
    aligned = root / "basic" / "Image" / "aligned"
    shutil.copytree(root / "basic" / "Image" / "original", aligned)
    for path in list(aligned.iterdir()):
        path.rename(path.with_name(f"{path.stem}_aligned.jpg"))
    assert prepare_stills.main(out) == 0
    order = ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Angry", "Neutral")
    want = [(f"train_{i:05d}_aligned.jpg", 1, emotion) for i, emotion in enumerate(order, start=1)]
    assert named(tmp_path / "out" / "train.txt") == want
    for text, message in (
        ("train_00001.jpg 8\n", r":1: expected 'train_00001.jpg 5', a label from 1 to 7, got"),
        ("train_00001.jpg 1\ntrain_00001.jpg 2\n", ":2: train_00001 is listed twice"),
        ("train_00009.jpg 1\ntrain_00001.jpg 1\n", "1 of 2 clips are missing: train_00009_aligned.jpg"),
    ):
        labels.write_text(text)
        assert prepare_stills.main(out) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("root", ["gone", "empty", "two"])
def test_what_is_no_set_of_stills_is_one_line(tree, tmp_path, capsys, root):
    (tmp_path / "empty").mkdir()
    shutil.copytree(tree, tmp_path / "two" / "a")
    shutil.copytree(tree, tmp_path / "two" / "b")
    assert prepare_stills.main(["--root", str(tmp_path / root), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    message = {"gone": "no such folder", "empty": "found neither images", "two": "another folder"}[root]
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_index_takes_stills_beside_folders_and_from_its_cache(lists, tree, tmp_path):
    first, again = load_index(lists / "train.txt"), load_index(lists / "train.txt")
    assert first.source == again.source == "frames" and (lists / "train.txt.index.npz").exists()
    for index in (first, again, build_index(read_annotations(lists / "train.txt"))):
        assert index.num_frames.tolist() == [1] * 14 and index.num_miscounted() == 0
        assert [index.frame_path(i, 0) for i in range(14)] == [str(r.path) for r in index.records]
    clip = tree / "clip"
    clip.mkdir()
    for i in (1, 2, 10):
        shutil.copy(tree / "train" / "fear" / "2.jpeg", clip / f"{i}.jpg")
    (tree / "film.jpg").mkdir()  # a folder, whatever it is called
    shutil.copy(clip / "1.jpg", tree / "film.jpg")
    mixed = tree / "mixed.txt"
    mixed.write_text("clip 3 0\ntrain/fear/2.jpeg 5 6\nfilm.jpg 1 1\n")
    for _ in range(2):
        index = load_index(mixed, source="frames")
        assert index.num_frames.tolist() == [3, 1, 1] and index.num_miscounted() == 1
        assert index.frame_path(0, 2).endswith("clip/10.jpg") and index.frame_path(2, 0).endswith("film.jpg/1.jpg")
    (tree / "v.mp4").touch()
    for text, source, message in (
        ("train/fear/2.jpeg 1 6\nv.mp4 1 0\n", "auto", r"mixed\.txt:1: .*2\.jpeg is an image file, but .*v\.mp4"),
        ("clip 3 0\nv.mp4 1 0\n", "auto", r"mixed\.txt:1: .*clip is a folder of frames, but .*v\.mp4"),
        ("train/fear/2.jpeg 1 6\n", "video", r"2\.jpeg is an image file, but the source asked for is video"),
        ("train/fear/2.jpeg 1 6\ntrain/fear/3.jpg 1 6\n", "auto", r"mixed\.txt:2: no such image file: .*3\.jpg"),
    ):
        mixed.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_index(mixed, source=source)


@pytest.mark.parametrize("graph", ["fused", "operators"])
@pytest.mark.parametrize("source", ["files", "shards", "raw"])
@pytest.mark.parametrize("frames", [1, 3])
def test_the_loader_gives_the_pixels_of_stills(lists, tmp_path, graph, source, frames):
    path = lists / "train.txt"
    index = load_index(path)
    if source != "files":
        assert pack.main([str(path), "--out", str(tmp_path / "p"), "--format", source, "--workers", "1"]) == 0
        path = tmp_path / "p" / "train.txt"
    sampler = ClipSampler(0, frames, mode="train", augmentation=PLAIN)
    loader = ClipLoader(load_index(path), sampler, LoaderOptions(5, 32, graph=graph))
    plan, seen = sampler.plan(1, index.num_frames), 0
    for batch in loader(1):
        for clip, video in zip(batch.clips, batch.ids.tolist(), strict=True):
            pixels = np.asarray(Image.open(index.frame_path(video, 0)).convert("RGB"))
            want = oracle_clip([pixels] * frames, plan, video, 32)
            step = np.abs(plan.colour[video, :, :3]).sum(1).max()
            difference = np.abs(clip.numpy() - want)
            assert difference.max() <= 2.5 * step and difference.mean() <= 0.5 * step
            seen += 1
    assert seen == len(loader) * 5


def test_commands_on_lists_take_stills(lists, tree, tmp_path, capsys):
    path = lists / "train.txt"
    for more in ([], ["--decode", "--picture", str(tmp_path / "sheet.png")]):
        assert check_list.main([str(path), str(lists / "test.txt"), *more]) == 0
        assert "no problems in 21 clips" in capsys.readouterr().out
    assert hash_clips.main([str(path)]) == 0 and hash_clips.main([str(path), "--verify"]) == 0
    assert "14 hashes of 14 clips" in capsys.readouterr().out
    still = tree / "train" / "fear" / "2.jpeg"
    content = still.read_bytes()
    still.write_bytes(content[:-30] + bytes(30))
    assert hash_clips.main([str(path), "--verify"]) == 1
    assert "1 of 14 clips differ" in capsys.readouterr().out
    still.write_bytes(b"text")
    assert check_list.main([str(path), "--write", str(tmp_path / "a.txt")]) == 1
    assert f"bad images: 1\n  {still}: neither JPEG nor PNG" in capsys.readouterr().out
    still.unlink()
    assert check_list.main([str(path), "--write", str(tmp_path / "b.txt")]) == 1
    printed = capsys.readouterr().out
    assert "missing images: 1\n" in printed and "not written" in printed and not (tmp_path / "b.txt").exists()
    (tree / "v.mp4").write_bytes(b"")
    mixed = tree / "mixed.txt"
    mixed.write_text("train/sad/2.jpeg 1 1\ntest/sad/a\u0020b.PNG 1 1\n")
    assert check_list.main([str(mixed)]) == 0


# ---- Stills, then clips


@pytest.mark.slow
def test_a_run_on_stills_starts_one_on_clips_and_its_folds(lists, clips, tmp_path):
    stills = ["--data.train-list", f"{lists}/train.txt", "--data.val-list", f"{lists}/test.txt"]
    log = ["--run.log-dir", str(tmp_path)]
    done = run_python(
        "train.py", *TINY, *stills, "--data.num-segments", "1", *log, "--run.name", "stills", "--optim.ema", "0.5"
    )
    assert done.returncode == 0 and f"report: {tmp_path}/stills" in done.stdout, done.stdout + done.stderr
    done = run_python(
        "scripts/export.py", str(tmp_path / "stills"), "--out", str(tmp_path / "export"), "--formats", "pt2"
    )
    assert done.returncode == 0, done.stderr
    start = ["--model.init", str(tmp_path / "stills")]
    more = [*start, "--run.save-minutes", "0", "--model.drop-path", "0.1", "--optim.epochs"]
    whole = tiny_run(clips, tmp_path, "clips", *more, "2")
    assert f"tensors of the model from {tmp_path}/stills, as ema.module.*" in whole.stdout
    tiny_run(clips, tmp_path, "broken", *more, "2")
    for path in (tmp_path / "broken" / "checkpoints").glob("step-00000004*"):
        path.unlink()
    for fold, (a, b) in enumerate((("train", "test"), ("test", "train")), start=1):
        shutil.copy(clips / f"{a}.txt", clips / f"set_{fold}_train.txt")
        shutil.copy(clips / f"{b}.txt", clips / f"set_{fold}_test.txt")
    done = run_python("scripts/crossval.py", "debug", "--lists", str(clips), "--log-dir", str(tmp_path), "--name", "cv",
                      "--", *TINY[1:], *start)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "cv" / "results.json").read_text())["folds"] == 2
    shutil.rmtree(tmp_path / "stills")
    again = tiny_run(clips, tmp_path, "broken", *more, "2")
    assert "continuing from step 3" in again.stdout and rows(tmp_path / "broken")
    losses = [[r["train/loss"] for r in rows(tmp_path / name) if "train/loss" in r] for name in ("clips", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
