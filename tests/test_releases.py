"""From a copy of an official release to its lists: the right clips, and nothing wrong passed over in silence."""

import csv
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import openpyxl
import pytest

from dfer.lists import releases
from dfer.lists.annotations import EMOTIONS, read_annotations, read_votes
from dfer.lists.index import build_index
from scripts import prepare_dfew, prepare_ferv39k
from tests.conftest import run_python
from tests.releases import SCENES, build_dfew, build_ferv39k, write_video

FOLDS = range(1, 6)
TINY = [
    "debug", "--data.size", "32", "--data.num-segments", "2", "--data.batch-size", "4", "--model.dim", "16",
    "--optim.epochs", "1", "--optim.steps-per-epoch", "2", "--run.log-every", "1", "--run.device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def dfew(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dfew")
    build_dfew(root, parts=("clip_224x224", "clip_224x224_16f", "original"))
    return root


@pytest.fixture(scope="session")
def ferv39k(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ferv39k")
    build_ferv39k(root)
    return root


@pytest.fixture
def copy(tmp_path, request):
    """A copy of a release to damage: its files share their content, so they are replaced, never written to."""

    def make(release: str) -> Path:
        return shutil.copytree(request.getfixturevalue(release), tmp_path / release, copy_function=os.link)

    return make


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    replace(path, text.replace(old, new, 1))


def prepare(capsys, script, root, out, *options) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the lines on stderr."""
    try:
        code = script.main(["--root", str(root), "--out", str(out), *map(str, options)])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def refused(capsys, script, root, out, *options, code=2) -> str:
    """Why it was refused: one line, and nothing written."""
    before = sorted(out.rglob("*")) if os.path.isdir(out) else None
    got, _, errors = prepare(capsys, script, root, out, *options)
    assert got == code and len(errors) == 1, errors
    assert (sorted(out.rglob("*")) if os.path.isdir(out) else None) == before
    return errors[0]


def taken(capsys, script, root, out, *options) -> str:
    code, printed, errors = prepare(capsys, script, root, out, "--allow-missing", *options)
    assert (code, errors) == (0, [])
    assert not list(out.rglob("*partial*"))
    return printed


def rows(path: Path) -> list[tuple[str, int, int]]:
    return [(record.name, record.num_frames, record.label) for record in read_annotations(path)]


def sets_dir(root: Path, split: str) -> Path:
    return root / "EmoLabel_DataSplit" / f"{split}(single-labeled)"


def clip_of(root: Path, label: int, last: bool = False) -> int:
    """A clip of a class, 1..7, of DFEW: of its first clips, or its last."""
    with open(sets_dir(root, "test") / f"set_{5 if last else 1}.csv") as file:
        clips = [int(row["video_name"]) for row in csv.DictReader(file) if int(row["label"]) == label]
    return clips[-1 if last else 0]


def count_by_decoding(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("frames", ["clip_224x224", "clip_224x224_16f", "original"])
def test_dfew_lists_are_the_releases_sets_with_the_frames_on_disk(dfew, tmp_path, capsys, frames):
    out = tmp_path / "lists"
    taken(capsys, prepare_dfew, dfew, out, "--frames", frames)
    clips = dfew / "Clip" / frames
    tested: Counter[str] = Counter()
    for fold in FOLDS:
        names = {}
        for split in ("train", "test"):
            expected = []
            for line in (sets_dir(dfew, split) / f"set_{fold}.csv").read_text().splitlines()[1:]:
                clip, label = line.split(",")
                name = clip.zfill(5) + (".mp4" if frames == "original" else "")
                path = clips / name
                num_frames = count_by_decoding(path) if frames == "original" else len(list(path.glob("*.jpg")))
                expected.append((name, num_frames, int(label) - 1))
            assert rows(out / f"set_{fold}_{split}.txt") == expected
            names[split] = {name for name, _, _ in expected}
        assert not names["train"] & names["test"] and len(names["train"] | names["test"]) == 54
        tested.update(names["test"])
    assert len(tested) == 54 and set(tested.values()) == {1}
    records = read_annotations(out / "set_1_train.txt")
    assert all(record.path == clips / record.name for record in records)
    if frames != "original":
        assert build_index(records).num_miscounted() == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"set_{fold}_{split}.txt" for fold in FOLDS for split in ("train", "test")] + ["votes.csv"]
    )


def test_dfew_sample_release_is_as_field_notes_say(dfew):
    assert {path.name for path in (dfew / "Clip/clip_224x224_16f/00001").iterdir()} == {
        f"{i}.jpg" for i in range(1, 17)
    }
    assert (dfew / "Clip/clip_224x224/00001/00001_00001.jpg").exists()
    labels = {line.split(",")[1] for line in (sets_dir(dfew, "test") / "set_1.csv").read_text().splitlines()[1:]}
    assert labels == set("1234567")


def test_votes_stand_by_the_lists_clips(dfew, tmp_path, capsys):
    taken(capsys, prepare_dfew, dfew, tmp_path / "a")
    taken(capsys, prepare_dfew, dfew, tmp_path / "b", "--frames", "original")
    with open(tmp_path / "a/votes.csv", newline="") as file:
        votes = list(csv.reader(file))
    assert votes[0] == ["clip", *EMOTIONS]
    sheet = openpyxl.load_workbook(dfew / "Annotation/annotation.xlsx").active
    expected = [[f"{row[7]:05d}", *map(str, row[:7])] for row in sheet.iter_rows(min_row=2, values_only=True) if row[8]]
    assert votes[1:] == expected
    label_of = {name: label for fold in FOLDS for name, _, label in rows(tmp_path / f"a/set_{fold}_test.txt")}
    assert {row[0] for row in votes[1:]} == set(label_of)
    assert all(int(row[1 + label_of[row[0]]]) >= 7 for row in votes[1:])
    records = read_annotations(tmp_path / "a/set_1_train.txt")
    read = read_votes(tmp_path / "a/votes.csv", records)
    assert read.argmax(axis=1).tolist() == [record.label for record in records]
    assert (tmp_path / "b/votes.csv").read_text().splitlines()[1].startswith("00001.mp4,")


def write_sheet(path: Path, *sheet_rows) -> None:
    book = openpyxl.Workbook()
    for row in sheet_rows:
        book.active.append(row)
    path.unlink()
    book.save(path)


def test_the_annotation_sheet_may_be_written_differently_or_be_wrong(copy, tmp_path, capsys):
    root, out = copy("dfew"), tmp_path / "lists"
    sheet = root / "Annotation/annotation.xlsx"
    header, *body = openpyxl.load_workbook(sheet).active.iter_rows(values_only=True)
    taken(capsys, prepare_dfew, root, out)
    before = (out / "votes.csv").read_bytes()

    names = ["Clip_Name", "Annotation", *(f"Vote_{word}" for word in ("Fear", "Disgust", "Surprise", "Anger"))]
    names += ["neutral", "SAD", "Happiness"]
    turned = [(f"{row[7]:05d}.mp4", str(row[8]), *(float(vote) for vote in row[6::-1])) for row in body]
    write_sheet(sheet, names, *turned, [None] * 9)
    taken(capsys, prepare_dfew, root, out)
    assert (out / "votes.csv").read_bytes() == before

    first = next(i for i, row in enumerate(body) if row[8])
    swapped = [list(row) for row in body]
    swapped[first][8] = swapped[first][8] % 7 + 1
    write_sheet(sheet, header, *swapped)
    message = refused(capsys, prepare_dfew, root, out, "--allow-missing")
    assert f"row {first + 2}: clip {body[first][7]} is annotated" in message
    write_sheet(sheet, header, *(row if i != first else ("many", *row[1:]) for i, row in enumerate(body)))
    assert f"row {first + 2} is not whole numbers" in refused(capsys, prepare_dfew, root, out, "--allow-missing")
    write_sheet(sheet, header, *(row if i != first else (*[0] * 7, *row[7:]) for i, row in enumerate(body)))
    assert "has no votes" in refused(capsys, prepare_dfew, root, out, "--allow-missing")
    twice = (*reversed(body[first][:7]), *body[first][7:])
    write_sheet(sheet, header, *body, twice)
    assert "has other votes in an earlier row" in refused(capsys, prepare_dfew, root, out, "--allow-missing")
    write_sheet(sheet, header[1:], *(row[1:] for row in body))
    assert "expected columns 1happy .. 7fear" in refused(capsys, prepare_dfew, root, out, "--allow-missing")
    replace(sheet, b"PK not a spreadsheet")
    assert "cannot be read as a spreadsheet" in refused(capsys, prepare_dfew, root, out, "--allow-missing")

    write_sheet(sheet, header, *(row for i, row in enumerate(body) if i != first))
    printed = taken(capsys, prepare_dfew, root, out)
    assert f"has no votes of 1 clips: {body[first][7]:05d}" in printed
    sheet.unlink()
    assert "votes are skipped" in taken(capsys, prepare_dfew, root, out)
    assert not (out / "votes.csv").exists()  # an earlier run's


def test_missing_short_and_unreadable_clips_are_named(copy, tmp_path, capsys):
    root, out, report = copy("dfew"), tmp_path / "lists", tmp_path / "report.txt"
    clips = root / "Clip/clip_224x224_16f"
    gone, empty, zero, middle, last, fine = (clip_of(root, label, last=True) for label in (1, 2, 3, 4, 5, 7))
    shutil.rmtree(clips / f"{gone:05d}")
    for frame in (clips / f"{empty:05d}").iterdir():
        frame.unlink()
    replace(clips / f"{zero:05d}" / "1.jpg", b"")
    # In natural order the 9th of 16 is 9.jpg; a plain sort would look at 2.jpg instead.
    replace(clips / f"{middle:05d}" / "9.jpg", b"<html>not found</html>")
    replace(clips / f"{last:05d}" / "16.jpg", b"\0" * 1000)
    (clips / f"{fine:05d}" / "16.jpg").unlink()
    (clips / f"{fine:05d}" / "Thumbs.db").write_bytes(b"no frame")
    (clips / f"{fine:05d}" / "._1.jpg").write_bytes(b"no frame either")
    message = refused(capsys, prepare_dfew, root, out, "--frames", "clip_224x224_16f", "--report", report)
    assert f"2 of 54 clips are missing: {min(gone, empty):05d}, {max(gone, empty):05d}" in message
    assert "3 of 54 clips are unreadable" in message and "--allow-missing" in message
    reported = report.read_text().splitlines()
    expected = {
        f"{gone:05d}: missing",
        f"{empty:05d}: missing (no frames in its folder)",
        f"{zero:05d}: unreadable (1.jpg is no JPEG or PNG image)",
        f"{middle:05d}: unreadable (9.jpg is no JPEG or PNG image)",
        f"{last:05d}: unreadable (16.jpg is no JPEG or PNG image)",
        f"{fine:05d}: short (15 frames)",
    }
    assert {line for line in reported if not line.startswith("differs: ")} == expected
    for thrown_away in (".Trash-0/files", "$RECYCLE.BIN/S-1-5-21", "lost+found"):  # an older copy, in a bin of the disk
        shutil.copytree(clips.parent, root / thrown_away / "Clip", copy_function=os.link)

    printed = taken(capsys, prepare_dfew, root, out, "--frames", "clip_224x224_16f")
    assert f"1 of 54 clips have fewer than 16 frames and are kept: {fine:05d}" in printed
    bad = {gone, empty, zero, middle, last}
    for fold in FOLDS:
        for split in ("train", "test"):
            listed = [
                line.split(",")[0] for line in (sets_dir(root, split) / f"set_{fold}.csv").read_text().split()[1:]
            ]
            kept = [name for name, _, _ in rows(out / f"set_{fold}_{split}.txt")]
            assert kept == [clip.zfill(5) for clip in listed if int(clip) not in bad]
            left_out = out / f"set_{fold}_{split}.missing.txt"
            named = [line.split(":")[0] for line in left_out.read_text().splitlines()] if left_out.exists() else []
            assert named == [clip.zfill(5) for clip in listed if int(clip) in bad]
    assert f"{gone:05d}," not in (out / "votes.csv").read_text()
    assert (f"{fine:05d}", 15, 6) in rows(out / "set_5_test.txt")

    taken(capsys, prepare_dfew, root, out)  # the other frames are whole
    assert not list(out.glob("*.missing.txt"))
    shutil.rmtree(clips)
    for clip in (1, 2):
        (clips / f"{clip + 60:05d}").mkdir(parents=True)
    message = refused(capsys, prepare_dfew, root, out, "--frames", "clip_224x224_16f", "--allow-missing")
    assert "none of 54 clips can be used" in message


def test_bad_videos_are_named(copy, tmp_path, capsys):
    root = copy("dfew")
    videos = [root / f"Clip/original/{clip_of(root, label):05d}.mp4" for label in (3, 4, 5, 6)]
    videos[0].unlink()
    replace(videos[1], b"nothing")
    shutil.move(videos[2], videos[2].with_name(str(int(videos[2].stem)) + ".MP4"))  # another spelling, not missing
    videos[3].unlink()
    write_video(videos[3], 20, faststart=True)  # which opens even when its end is cut off
    assert releases.scan_video(str(videos[3])) == releases.Scan(20)
    replace(videos[3], videos[3].read_bytes()[:-200])
    message = refused(capsys, prepare_dfew, root, tmp_path / "lists", "--frames", "original")
    assert f"1 of 54 clips are missing: {videos[0].name}; 2 of 54 clips are unreadable: " in message
    assert videos[1].name in message and videos[3].name in message
    taken(capsys, prepare_dfew, root, tmp_path / "lists", "--frames", "original")
    assert f"{int(videos[2].stem)}.MP4" in [name for name, _, _ in rows(tmp_path / "lists/set_1_test.txt")]


def test_many_missing_clips_are_ten_names_in_the_message_and_all_in_the_report(copy, tmp_path, capsys):
    root = copy("dfew")
    names = sorted(f"{clip:05d}" for clip in prepare_dfew.read_set(str(sets_dir(root, "train") / "set_1.csv")))[:13]
    for name in names:
        shutil.rmtree(root / "Clip/clip_224x224" / name)
    message = refused(capsys, prepare_dfew, root, tmp_path / "out", "--report", tmp_path / "report.txt")
    assert f"13 of 54 clips are missing: {', '.join(names[:10])} and 3 more; nothing was written" in message
    assert [f"{name}: missing" for name in names] == [
        line for line in (tmp_path / "report.txt").read_text().splitlines() if line.endswith(": missing")
    ]


def dfew_case(case: str, root: Path) -> None:
    test, train = sets_dir(root, "test"), sets_dir(root, "train")
    clip = clip_of(root, 1)
    if case == "numbered from 0":
        for path in [*test.iterdir(), *train.iterdir()]:
            header, *lines = path.read_text().splitlines()
            numbers = (line.split(",") for line in lines)
            replace(path, "\n".join([header, *(f"{int(clip):05d},{int(label) - 1}" for clip, label in numbers)]))
    elif case == "one set numbered from 0":
        edit(train / "set_3.csv", f"\n{clip},1\n", f"\n{clip},0\n")
    elif case == "no label 7":
        for path in [*test.iterdir(), *train.iterdir()]:
            lines = path.read_text().splitlines()
            replace(path, "\n".join(line for line in lines if not line.endswith(",7")))
    elif case == "label 8":
        edit(test / "set_1.csv", f"\n{clip},1\n", f"\n{clip},8\n")
    elif case == "two labels":
        edit(test / "set_1.csv", f"\n{clip},1\n", f"\n{clip},2\n")
    elif case == "listed twice":
        edit(test / "set_1.csv", f"\n{clip},1\n", f"\n{clip},1\n{clip},1\n")
    elif case == "train and test":
        edit(train / "set_1.csv", "label\n", f"label\n{clip},1\n")
    elif case == "tested twice":
        edit(test / "set_2.csv", "label\n", f"label\n{clip},1\n")
        edit(train / "set_2.csv", f"\n{clip},1\n", "\n")
    elif case == "no header":
        edit(test / "set_1.csv", "video_name,label\n", "")
    elif case == "odd name":
        edit(test / "set_1.csv", f"\n{clip},1\n", f"\n../{clip},1\n")
    elif case == "not text":
        replace(test / "set_1.csv", b"\xff\xfe\x00")
    elif case == "a set missing":
        (train / "set_4.csv").unlink()
    elif case == "no sets":
        shutil.rmtree(train)
    elif case == "no clips":
        shutil.rmtree(root / "Clip/clip_224x224")
    elif case == "clips twice":
        shutil.copytree(root / "Clip/clip_224x224", root / "old/DFEW_Face", copy_function=os.link)
    elif case == "sets twice":
        shutil.copytree(test, root / "old/test(single_labeled)")
    elif case == "sheets twice":
        shutil.copy(root / "Annotation/annotation.xlsx", root / "Clip/Annotation.XLSX")
    elif case == "newline in a folder":
        (root / "a\nb").mkdir()
        shutil.move(root / "Clip", root / "a\nb/Clip")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("numbered from 0", "label 0, so these are not the release's labels"),
        ("one set numbered from 0", "label 0, so these are not the release's labels"),
        ("no label 7", "no clip has label 7 (Fear)"),
        ("label 8", "label 8 is not in 1..7"),
        ("two labels", "but 1 in another set"),
        ("listed twice", "is listed twice"),
        ("train and test", "set_1: 1 clips are in train and in test"),
        ("tested twice", "is in the test sets of folds 1 and 2"),
        ("no header", "its first row should be 'video_name,label'"),
        ("odd name", "expected 'number,label'"),
        ("not text", "cannot be read"),
        ("a set missing", "set_4.csv is missing"),
        ("no sets", "found no folder train(single-labeled)"),
        ("no clips", "found no folder clip_224x224"),
        ("clips twice", "DFEW_Face"),
        ("sets twice", "old/test(single_labeled)"),
        ("sheets twice", "Annotation.XLSX"),
        ("newline in a folder", r"a\nb"),
    ],
)
def test_what_is_wrong_in_dfew_is_refused_even_of_a_part(copy, tmp_path, capsys, case, message):
    root = copy("dfew")
    dfew_case(case, root)
    assert message in refused(capsys, prepare_dfew, root, tmp_path / "out", "--allow-missing")


def test_dfew_is_found_under_names_met_in_the_wild(dfew, copy, tmp_path, capsys):
    taken(capsys, prepare_dfew, dfew, tmp_path / "expected")

    def check(root: Path, clips: Path, frames: str = "clip_224x224") -> None:
        taken(capsys, prepare_dfew, root, tmp_path / "out", "--frames", frames)
        for path in (tmp_path / "expected").iterdir():
            found = tmp_path / "out" / path.name
            if path.suffix == ".txt":
                assert [row[::2] for row in rows(found)] == [row[::2] for row in rows(path)]
                assert read_annotations(found)[0].path.parent == clips
            else:
                assert found.read_bytes() == path.read_bytes()

    root = copy("dfew")
    (root / "deep/Clip-002").mkdir(parents=True)
    shutil.move(root / "Clip", root / "deep/Clip-002/CLIP")
    clips = root / "deep/Clip-002/CLIP"
    (clips / "Clip_224x224").mkdir()  # nested copies: the outer one holds no clips
    shutil.move(clips / "clip_224x224", clips / "Clip_224x224/clip_224x224")
    shutil.move(clips / "clip_224x224_16f", clips / "clip_224x16F")
    for split in ("train", "test"):
        shutil.move(sets_dir(root, split), root / "EmoLabel_DataSplit" / f"{split.title()}(Single_Labeled)")
    (root / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "again").symlink_to(clips / "Clip_224x224")  # the same place is no second copy
    (root / "DFEW_Face").symlink_to(clips / "Clip_224x224/clip_224x224")
    (root / "locked").mkdir(mode=0)
    check(root, clips / "Clip_224x224/clip_224x224")
    check(root, clips / "clip_224x16F", "clip_224x224_16f")

    for split in ("train", "test"):
        folder = root / "EmoLabel_DataSplit" / f"{split.title()}(Single_Labeled)"
        for path in folder.iterdir():
            lines = path.read_text().splitlines()
            replace(path, "\ufeff" + "\r\n".join([lines[0].upper(), "", *lines[1:], ""]))
        shutil.move(folder, root / split)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(clips / "Clip_224x224/clip_224x224", elsewhere)
    (root / "clip").mkdir()
    (root / "clip/DFEW_Face").symlink_to(elsewhere)
    check(root, root / "clip/DFEW_Face")


def test_a_search_ends_whatever_the_links_and_stays_out_of_clips(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/clip_224x224/00001").mkdir(parents=True)
    (tmp_path / "Crime/Angry/0001").mkdir(parents=True)
    for i in range(4):
        (tmp_path / f"a/b/loop{i}").symlink_to(tmp_path)
    found = {os.path.relpath(folder, tmp_path): folders for folder, folders, _ in releases.search(tmp_path)}
    assert list(found)[:5] == [".", "Crime", "a", "a/b", "a/clip_224x224"]  # links come last
    assert found["a/clip_224x224"] == ["00001"] and found["Crime"] == ["Angry"]
    assert len(found) == 5 + 4  # each link once, and nothing below it again
    deep = tmp_path / "/".join("x" * 12)
    deep.mkdir(parents=True)
    assert max(folder.count("/x") for folder, _, _ in releases.search(tmp_path)) == releases.MAX_DEPTH


def test_single_labelled_is_spelled_two_ways(tmp_path, capsys):
    for i, single in enumerate(("single-labeled", "single_labeled", "single-labelled")):
        build_dfew(tmp_path / str(i), counts=(5, 5, 5, 5, 5, 5, 5), single=single)
        taken(capsys, prepare_dfew, tmp_path / str(i), tmp_path / f"out{i}")


def published_sets() -> dict[str, dict[int, int]]:
    """Sets of the published size, by the rule that made them."""
    labels = dict(enumerate(np.repeat(range(7), releases.DFEW_COUNTS).tolist(), start=1))
    blocks = [np.array_split([clip for clip in labels if labels[clip] == label], 5) for label in range(7)]
    sets = {}
    for fold in FOLDS:
        test = {int(clip) for block in blocks for clip in block[fold - 1]}
        sets[f"set_{fold}_train"] = {clip: label for clip, label in labels.items() if clip not in test}
        sets[f"set_{fold}_test"] = {clip: labels[clip] for clip in test}
    return sets


def test_the_published_counts_are_those_of_the_fold_rule():
    assert sum(releases.DFEW_COUNTS) == 11_697
    assert [sum(counts) for counts in releases.DFEW_TEST_COUNTS] == [2341, 2341, 2340, 2339, 2336]
    sets = published_sets()
    assert [len(sets[f"set_{fold}_train"]) for fold in FOLDS] == [9356, 9356, 9357, 9358, 9361]
    assert prepare_dfew.check_folds(sets) == []
    assert sum(releases.FERV39K_TRAIN_COUNTS) == 31_088 and sum(releases.FERV39K_TEST_COUNTS) == 7_847


def test_any_difference_from_the_published_folds_is_said():
    sets = published_sets()
    del sets["set_2_train"][1]
    assert prepare_dfew.check_folds(sets) == [
        "set_2_train lists 9,355 clips, the release 9,356 (Happy 1,955 not 1,956)",
        "set_2: 1 clips of other folds are in neither train nor test: 1",
    ]
    sets = published_sets()
    del sets["set_1_test"][1]
    assert prepare_dfew.check_folds(sets) == [
        "set_1_test lists 2,340 clips, the release 2,341 (Happy 488 not 489)",
        "set_1: 1 clips of other folds are in neither train nor test: 1",
        "1 clips are in no test set: 1",
    ]
    assert releases.count_difference("x", [0, 0, 6], (2, 0, 0, 0, 0, 0, 1)) is None
    message = releases.count_difference("x", [0, 0, 6], (2, 0, 0, 0, 0, 1, 0))
    assert message == "x lists 3 clips, the release 3 (Disgust 0 not 1, Fear 1 not 0)"


def test_a_part_of_a_release_is_refused_unless_asked_for(dfew, ferv39k, tmp_path, capsys):
    message = refused(capsys, prepare_dfew, dfew, tmp_path / "d")
    assert "set_1_train lists 40 clips, the release 9,356 (Happy 7 not 1,956" in message and "9 more" in message
    assert "train_All lists" in refused(capsys, prepare_ferv39k, ferv39k, tmp_path / "f")


def test_ferv39k_lists_are_the_releases_and_each_scenes(ferv39k, tmp_path, capsys):
    out, clips = tmp_path / "lists", ferv39k / "2_ClipsforFaceCrop"
    printed = taken(capsys, prepare_ferv39k, ferv39k, out)
    whole = {}
    for split in ("train", "test"):
        expected = []
        for line in (ferv39k / f"4_setups/All_scenes/{split}_All.csv").read_text().splitlines():
            name, word = line.split()
            expected.append((name, len(list((clips / name).glob("*.jpg"))), EMOTIONS.index(word)))
        assert rows(out / f"{split}_All.txt") == expected  # the first row too, as there is no header
        whole[split] = expected
    assert not {row[0] for row in whole["train"]} & {row[0] for row in whole["test"]}
    short = [row[0] for row in whole["train"] + whole["test"] if row[1] < 16]
    assert f"{len(short)} of {len(whole['train'] + whole['test'])} clips have fewer than 16 frames" in printed
    assert short[0] in printed
    for split in ("train", "test"):
        for scene in SCENES:
            expected = [row for row in whole[split] if row[0].startswith(f"{scene}/")]
            assert rows(out / f"scenes/{scene}_{split}.txt") == expected
    assert len(list((out / "scenes").iterdir())) == 2 * len(SCENES) == 44
    records = read_annotations(out / "test_All.txt")
    assert records[0].path == clips / records[0].name and build_index(records).num_miscounted() == 0


def test_ferv39k_without_set_ups_of_scenes_and_with_missing_clips(copy, tmp_path, capsys):
    root, out = copy("ferv39k"), tmp_path / "lists"
    shutil.rmtree(root / "4_setups/22_scenes")
    names = [line.split()[0] for line in (root / "4_setups/All_scenes/test_All.csv").read_text().splitlines()]
    gone = [name for name in names if name.startswith("Crime/")]
    for name in gone:
        shutil.rmtree(root / "2_ClipsforFaceCrop" / name)
    frames = root / "2_ClipsforFaceCrop" / names[0]
    replace(frames / "01.jpg", b"")
    message = refused(capsys, prepare_ferv39k, root, out)
    assert f"7 of 378 clips are missing: {', '.join(gone)}; 1 of 378 clips are unreadable: {names[0]}" in message
    taken(capsys, prepare_ferv39k, root, out)
    assert (out / "scenes/Crime_test.missing.txt").read_text() == "".join(f"{name}: missing\n" for name in gone)
    assert not (out / "scenes/Crime_test.txt").exists()  # it would be empty
    assert len(list((out / "scenes").glob("*_test.txt"))) == 21 and not list((out / "scenes").glob("*_train.txt"))
    assert [row[0] for row in rows(out / "test_All.txt")] == [n for n in names[1:] if n not in gone]


def ferv_case(case: str, root: Path) -> None:
    test = root / "4_setups/All_scenes/test_All.csv"
    first = test.read_text().splitlines()[0]
    clip = first.split()[0]
    if case == "numbers":
        edit(test, first, f"{clip},0")
    elif case == "wrong word":
        edit(test, first, f"{clip} Happy" if "/Happy/" not in clip else f"{clip} Sad")
    elif case == "unknown word":
        edit(test, first, f"{clip} Contempt")
    elif case == "header":
        edit(test, first, f"path label\n{first}")
    elif case == "climbing out":
        edit(test, first, f"../Angry/{clip.split('/')[-1]} Angry")
    elif case == "twice":
        edit(test, first, f"{first}\n{first}")
    elif case == "train and test":
        edit(root / "4_setups/All_scenes/train_All.csv", "\n", f"\n{first}\n")
    elif case == "no list":
        test.unlink()
    elif case == "lists twice":
        shutil.copytree(root / "4_setups", root / "FERV39K/4_setups")
    elif case == "no clips":
        shutil.rmtree(root / "2_ClipsforFaceCrop")
    elif case == "clips twice":
        one = "2_ClipsforFaceCrop/" + clip
        shutil.copytree(root / one, root / "FERV39K" / one)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("numbers", "test_All.csv:1: expected 'Scene/Emotion/0001 Emotion'"),
        ("wrong word", "test_All.csv:1: clip Action/"),
        ("unknown word", "test_All.csv:1: 'Contempt' is no emotion"),
        ("header", "test_All.csv:1: expected 'Scene/Emotion/0001 Emotion', got 'path label'"),
        ("climbing out", "test_All.csv:1: expected 'Scene/Emotion/0001 Emotion'"),
        ("twice", "test_All.csv:2: clip Action/"),
        ("train and test", "1 clips are in train_All and in test_All: Action/"),
        ("no list", "found no test_All.csv"),
        ("lists twice", "FERV39K/4_setups/All_scenes"),
        ("no clips", "found no folder 2_ClipsforFaceCrop"),
        ("clips twice", "FERV39K/2_ClipsforFaceCrop"),
    ],
)
def test_what_is_wrong_in_ferv39k_is_refused_even_of_a_part(copy, tmp_path, capsys, case, message):
    root = copy("ferv39k")
    ferv_case(case, root)
    assert message in refused(capsys, prepare_ferv39k, root, tmp_path / "out", "--allow-missing")


def test_ferv39k_is_found_in_nested_copies(copy, tmp_path, capsys):
    root, out = copy("ferv39k"), tmp_path / "lists"
    (root / "FERV39K/FERV39k").mkdir(parents=True)
    shutil.move(root / "4_setups", root / "FERV39K/FERV39k/4_SetUps")
    (root / "2_ClipsforFaceCrop-002").mkdir()
    shutil.move(root / "2_ClipsforFaceCrop", root / "2_ClipsforFaceCrop-002/2_ClipsforFaceCrop")
    (root / "FERV39K/2_ClipsforFaceCrop/Action/Angry").mkdir(parents=True)  # the shell of a copy: no clips in it
    (root / "FERV39K/train_All.csv").touch()
    taken(capsys, prepare_ferv39k, root, out)
    assert (
        read_annotations(out / "test_All.txt")[0].path.parents[2] == root / "2_ClipsforFaceCrop-002/2_ClipsforFaceCrop"
    )


def test_a_scenes_set_up_that_disagrees_is_said_and_does_not_leak(copy, tmp_path, capsys):
    root, out = copy("ferv39k"), tmp_path / "lists"
    train, test = (root / f"4_setups/22_scenes/Crime/{split}_Crime.csv" for split in ("train", "test"))
    moved = train.read_text().splitlines()[0]
    replace(test, test.read_text() + moved + "\n")
    printed = taken(capsys, prepare_ferv39k, root, out)
    assert (
        f"the test set-up of Crime and test_All's clips of that scene differ in 1 clips: {moved.split()[0]}" in printed
    )
    trained = {row[0] for row in rows(out / "train_All.txt")}
    assert not trained & {row[0] for row in rows(out / "scenes/Crime_test.txt")}


def test_a_failed_write_leaves_the_old_lists_alone(dfew, tmp_path, capsys, monkeypatch):
    out = tmp_path / "lists"
    taken(capsys, prepare_dfew, dfew, out, "--frames", "original")
    before = {path: path.read_bytes() for path in out.iterdir()}
    write, calls = releases.write_annotations, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(releases, "write_annotations", full_disk)
    message = refused(capsys, prepare_dfew, dfew, out, "--allow-missing")
    assert "cannot write" in message and "No space left" in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("script", [prepare_dfew, prepare_ferv39k])
def test_errors_are_one_line_exit_code_2_for_usage_and_1_for_the_data(tmp_path, capsys, script):
    for root in ("nowhere", "x" * 300):  # of which the system says something else than that it is missing
        assert f"--root {root}: no such folder" in refused(capsys, script, root, tmp_path / "x")
    assert "clip_112" in refused(capsys, script, tmp_path, tmp_path / "x", "--frames", "clip_112")
    with pytest.raises(SystemExit) as stop:
        script.main(["--root", str(tmp_path)])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    name = script.__name__.removeprefix("scripts.")
    done = run_python(f"scripts/{name}.py", "--root", str(tmp_path), "--out", str(tmp_path / "x"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{name}: {tmp_path}: found no" in done.stderr and not (tmp_path / "x").exists()


def test_out_that_is_a_file_cannot_be_written(dfew, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, prepare_dfew, dfew, tmp_path / "file", "--allow-missing")
    assert "cannot write" in refused(capsys, prepare_dfew, dfew, tmp_path / ("x" * 300), "--allow-missing")
    for report in (tmp_path / "nowhere/report.txt", tmp_path, tmp_path / ("x" * 300)):
        assert "cannot write" in refused(capsys, prepare_dfew, dfew, tmp_path / "out", "--report", report)


@pytest.mark.parametrize("script", [prepare_dfew, prepare_ferv39k])
def test_a_defect_keeps_its_traceback(request, tmp_path, monkeypatch, script):
    root = request.getfixturevalue(script.__name__.removeprefix("scripts.prepare_"))
    monkeypatch.setattr(releases, "judge", lambda *_: max([]))
    with pytest.raises(ValueError, match="empty"):
        script.main(["--root", str(root), "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "train", "test"),
    [("dfew", "set_1_train", "set_1_test"), ("ferv39k", "train_All", "scenes/Crime_test")],
)
def test_a_model_trains_and_is_evaluated_on_the_lists(request, tmp_path, release, train, test):
    lists = tmp_path / "lists"
    root = request.getfixturevalue(release)
    done = run_python(f"scripts/prepare_{release}.py", "--root", str(root), "--out", str(lists), "--allow-missing")
    assert done.returncode == 0, done.stderr
    done = run_python("scripts/check_list.py", str(lists / f"{train}.txt"), str(lists / f"{test}.txt"))
    assert done.returncode == 0, done.stdout + done.stderr
    data = ("--data.train-list", str(lists / f"{train}.txt"), "--data.val-list", str(lists / f"{test}.txt"))
    if release == "dfew":
        data += ("--loss.soft-labels", str(lists / "votes.csv"))
    done = run_python("train.py", *TINY, *data, "--run.log-dir", str(tmp_path), "--run.name", "run")
    assert done.returncode == 0, done.stderr
    predictions = tmp_path / "predictions.csv"
    last = str(tmp_path / "run")
    done = run_python("scripts/evaluate.py", last, "--out", str(predictions), "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    listed = rows(lists / f"{test}.txt")
    with open(predictions, newline="") as file:
        assert [(row["clip"], int(row["label"])) for row in csv.DictReader(file)] == [(r[0], r[2]) for r in listed]
    assert json.loads(done.stdout.splitlines()[-1])["clips"] == len(listed)


@pytest.mark.slow
def test_all_of_ferv39k_is_prepared(tmp_path):
    build_ferv39k(tmp_path / "ferv39k", full=True)
    done = run_python("scripts/prepare_ferv39k.py", "--root", str(tmp_path), "--out", str(tmp_path / "lists"))
    assert done.returncode == 0, done.stderr
    listed = rows(tmp_path / "lists/train_All.txt") + rows(tmp_path / "lists/test_All.txt")
    shutil.rmtree(tmp_path / "ferv39k")  # a million names, which pytest would keep
    assert len(listed) == 38_935 and sum(num_frames < 16 for _, num_frames, _ in listed) == 4_070
