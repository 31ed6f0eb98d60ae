import re
from pathlib import Path

import pytest

from dfer.cli import UserError
from dfer.images import natural_key
from dfer.lists.annotations import EMOTIONS, packed_index, read_annotations, read_votes, write_annotations
from dfer.lists.index import build_index, load_index


def write(tmp_path, text: bytes):
    path = tmp_path / "list.txt"
    path.write_bytes(text)
    return path


def test_reads_the_common_form(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf# a comment\r\na b/c d 12 0\r\n\r\n/abs/e 3 6\r\n")
    first, second = read_annotations(path)
    assert (first.name, first.path, first.num_frames, first.label) == ("a b/c d", tmp_path / "a b/c d", 12, 0)
    assert first.source == f"{path}:2"
    assert str(second.path) == "/abs/e" and second.label == 6
    assert read_annotations(path, tmp_path / "root")[0].path == tmp_path / "root" / "a b/c d"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"a 3 1\nb 3\n", r":2: expected 'path num_frames label'"),
        (b"a 3 1\nb 3 7\n", r":2: label 7 is not in 0\.\.6"),
        (b"a 3 -1\n", r":1: label -1"),
        (b"a 0 1\n", r":1: num_frames is 0"),
        (b"a three 1\n", r":1: num_frames and label must be whole numbers"),
        ("a 3 \u0663\n".encode(), r":1: num_frames and label must be whole numbers"),
        (b"a 1_0 1\n", r":1: num_frames and label must be whole numbers"),
        (b"a 3 1\n\xff\xfe\x00", "cannot be read"),
    ],
)
def test_damage_is_named_by_file_and_row(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


ROWS = [("a b/00001", 3, 0), ("no # comment", 12, 6), ("x\u2028y\x0bz", 1, 2)]


@pytest.mark.parametrize(("root", "base"), [(None, "."), ("frames", "frames"), ("/abs", "/abs")])
def test_canonical_lists_read_back_the_same(tmp_path, root, base):
    path = tmp_path / "list.txt"
    write_annotations(path, ROWS, root)
    records = read_annotations(path)
    assert [(r.name, r.num_frames, r.label) for r in records] == ROWS
    assert records[0].path == tmp_path / base / "a b/00001"
    assert read_annotations(path, "/other")[0].path == Path("/other/a b/00001")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as a careless editor leaves it
    assert len(read_annotations(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["list.txt"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# classes: Happy Sad", "# classes: Sad Happy", "labels mean Sad Happy Neutral .*check_list.py --write"),
        ("00001 3 0", "00001 3 1", "sha256"),
        ("00001 3 0\n", "", "sha256"),
    ],
)
def test_lists_whose_header_does_not_fit_are_refused(tmp_path, old, new, message):
    path = tmp_path / "list.txt"
    write_annotations(path, [("00001", 3, 0), ("00002", 3, 6)])
    text = path.read_text()
    assert f"# classes: {' '.join(EMOTIONS)}" in text and old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row", [("a\nb", 3, 0), ("", 3, 0), (" a", 3, 0), ("#a", 3, 0), ("a", 0, 0), ("a", 3, 7), ("\udcff", 3, 0)]
)
def test_rows_that_would_not_read_back_are_not_written(tmp_path, row):
    with pytest.raises(ValueError, match="cannot stand in a list"):
        write_annotations(tmp_path / "list.txt", [("ok", 1, 1), row])
    with pytest.raises(ValueError, match="cannot stand in a list"):
        write_annotations(tmp_path / "list.txt", [("ok", 1, 1)], root="a\nb 3 1")
    assert not list(tmp_path.iterdir())


def test_missing_list(tmp_path):
    with pytest.raises(ValueError, match="no such annotation list"):
        read_annotations(tmp_path / "none.txt")


def test_index_counts_frames_on_disk_in_natural_order(tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    for i in range(1, 12):
        (folder / f"{i}.JPG").touch()
    (folder / "Thumbs.db").touch()
    index = build_index(read_annotations(write(tmp_path, b"v 16 3\n")))  # the list is wrong: 11 on disk
    assert index.num_frames.tolist() == [11] and index.labels.tolist() == [3] and index.num_miscounted() == 1
    assert [index.frame_path(0, i) for i in (1, 8, 9)] == [str(folder / f"{i}.JPG") for i in (2, 9, 10)]


def test_natural_key_orders_mixed_names():
    names = ["b1", "a10", "a2", "a", "10", "1²", "9"]
    assert sorted(names, key=natural_key) == ["1²", "9", "10", "a", "a2", "a10", "b1"]


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for row, message in (
        (b"ok 1 0\ngone 3 1\n", r"list.txt:2: no such frame folder"),
        (b"empty 3 1\n", r":1: no .* frames"),
    ):
        (tmp_path / "ok").mkdir(exist_ok=True)
        (tmp_path / "ok" / "1.jpg").touch()
        with pytest.raises(ValueError, match=message) as error:
            build_index(read_annotations(write(tmp_path, row)))
        assert re.search("gone|empty", str(error.value))


HEADER = "clip,Happy,Sad,Neutral,Angry,Surprise,Disgust,Fear\n"


def test_votes_become_distributions_in_the_order_of_the_list(tmp_path):
    records = read_annotations(write(tmp_path, b"b 3 1\na 3 0\n"))
    (tmp_path / "votes.csv").write_text(
        HEADER + "a,8,0,2,0,0,0,0\nb,0,5,0,0,0,0,5\nunused,1,0,0,0,0,0,0\na,8.0,0,2,0,0,0,0\n"
    )
    votes = read_votes(tmp_path / "votes.csv", records)
    assert votes.tolist() == [pytest.approx([0, 0.5, 0, 0, 0, 0, 0.5]), pytest.approx([0.8, 0, 0.2, 0, 0, 0, 0])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: expected clip,Happy"),
        (HEADER.replace("Happy,Sad", "Sad,Happy"), ":1: expected clip,Happy"),
        (HEADER + "a,1,0,0,0,0,0\n", ":2: expected a clip and 7 counts"),
        (HEADER + "a,1,0,0,0,0,0,x\n", ":2: expected a clip and 7 counts"),
        (HEADER + "a,0,0,0,0,0,0,0\n", ":2: expected a clip and 7 counts"),
        (HEADER + "a,nan,0,0,0,0,0,0\n", ":2: expected a clip and 7 counts"),
        (HEADER + "a,2,0,0,0,0,0,-1\n", ":2: expected a clip and 7 counts"),
        (
            HEADER + "a,1,0,0,0,0,0,0\nb,1,0,0,0,0,0,0\na,0,1,0,0,0,0,0\n",
            ":4: clip a has other votes in an earlier row",
        ),
        (HEADER + "b,1,0,0,0,0,0,0\n", r"no votes for clip a \(.*list.txt:1\)"),
    ],
)
def test_damaged_votes_are_named(tmp_path, text, message):
    records = read_annotations(write(tmp_path, b"a 3 0\n"))
    (tmp_path / "votes.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_votes(tmp_path / "votes.csv", records)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_votes(tmp_path / "none.csv", records)


def test_votes_that_float32_cannot_hold_are_named(tmp_path):
    records = read_annotations(write(tmp_path, b"a 3 0\n"))
    for votes in ("1e300,1e300,0,0,0,0,0", "1e-300,0,0,0,0,0,0"):
        (tmp_path / "votes.csv").write_text(f"{HEADER}a,{votes}\n")
        with pytest.raises(ValueError, match=":2: expected a clip and 7 counts"):
            read_votes(tmp_path / "votes.csv", records)


@pytest.mark.parametrize("key", ["root", "packed"])
def test_a_nul_in_a_header_is_named(tmp_path, key):
    path = write(tmp_path, f"# {key}: x\0y.npz\na 1 0\n".encode())
    for read in (read_annotations, load_index):
        with pytest.raises(UserError, match=r"list\.txt: its header holds a NUL"):
            read(path)
    if key == "packed":
        with pytest.raises(UserError, match=r"list\.txt: its header says packed: "):
            packed_index(path)


def test_names_that_no_disk_holds_are_named(tmp_path):
    """Python asks the system about them, which raises another error than that they are missing."""
    for name in ("x" * 300, f"{'x' * 300}/1", "y/" * 3000 + "1"):
        with pytest.raises(UserError, match=r"list\.txt:1: no such frame folder"):
            load_index(write(tmp_path, f"{name} 1 0\n".encode()))
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot be read as an annotation list"):
            read_annotations(path)
