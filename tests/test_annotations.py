import os
import re
import unicodedata
from pathlib import Path

import pytest

from dfer.cli import UserError
from dfer.images import natural_key
from dfer.lists.annotations import EMOTIONS, packed_index, read_annotations, read_votes, write_annotations
from dfer.lists.index import build_index, load_index
from dfer.lists.packing import read_lists


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


ROWS = [("a b/00001", 3, 0), ("no # comment", 12, 6), ("#12", 4, 1), ("x\u2028y\x0bz", 1, 2)]


@pytest.mark.parametrize(("root", "base"), [(None, "."), ("frames", "frames"), ("/abs", "/abs")])
def test_canonical_lists_read_back_the_same(tmp_path, root, base):
    path = tmp_path / "list.txt"
    write_annotations(path, ROWS, root)
    records = read_annotations(path)
    assert [(r.name, r.num_frames, r.label) for r in records] == ROWS
    assert records[0].path == tmp_path / base / "a b/00001"
    assert read_annotations(path, "/other")[0].path == Path("/other/a b/00001")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as a careless editor leaves it
    assert len(read_annotations(path)) == len(ROWS)
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
    "row", [("a\nb", 3, 0), ("", 3, 0), (" a", 3, 0), ("./#a", 3, 0), ("a", 0, 0), ("a", 3, 7), ("\udcff", 3, 0)]
)
def test_rows_that_would_not_read_back_are_not_written(tmp_path, row):
    with pytest.raises(ValueError, match="cannot stand in a list"):
        write_annotations(tmp_path / "list.txt", [("ok", 1, 1), row])
    with pytest.raises(ValueError, match="cannot stand in a list"):
        write_annotations(tmp_path / "list.txt", [("ok", 1, 1)], root="a\nb 3 1")
    assert not list(tmp_path.iterdir())


ALPHABETICAL = sorted(EMOTIONS)
REVERSED = EMOTIONS[::-1]


def rows_in_order(order, base=0, folder="{}/{:03d}", count=14) -> bytes:
    """Rows whose paths name the emotion that their ids stand for in an order of the classes."""
    return "".join(f"{folder.format(order[i % 7], i)} 3 {i % 7 + base}\n" for i in range(count)).encode()


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (rows_in_order(ALPHABETICAL), "--class-order alphabetical --write"),
        (rows_in_order(ALPHABETICAL, folder="S/3_{}/{:03d}", count=7), "--class-order alphabetical --write"),
        (
            rows_in_order(ALPHABETICAL, 1).replace(b" 7\n", b" 1\n").replace(b"Surprise", b"x"),
            "alphabetical --label-base 1",
        ),
        (rows_in_order(REVERSED, folder="{}-{:03d}.mp4"), f"--class-order {','.join(REVERSED)} --write"),
        (rows_in_order(REVERSED) + b"Fear/x 3 1\n", f"--class-order {','.join(REVERSED)} --write"),
        (rows_in_order(ALPHABETICAL, folder="/home/happy/{}/{:03d}"), "--class-order alphabetical --write"),
    ],
)
def test_ids_that_the_paths_contradict_are_refused(tmp_path, text, flags):
    path = write(tmp_path, text)
    for read in (read_annotations, load_index, lambda path: read_lists([path], None)):  # train and evaluate; pack
        with pytest.raises(UserError, match=r"list\.txt:[0-9]+: label . means .*, but its path says") as error:
            read(path)
        assert f"check_list.py {path} " in str(error.value) and flags in str(error.value)
        assert "\n" not in str(error.value)


def test_an_order_that_is_stated_counts_and_the_paths_are_said_once(tmp_path, capsys):
    header = f"# classes: {' '.join(EMOTIONS)}\n".encode()
    for text, wrong in (
        (header + rows_in_order(ALPHABETICAL), "so it is in 14 of the 14 rows"),
        (rows_in_order(EMOTIONS) + b"Happy/typo 3 1\n", "so it is in 1 of the 15 rows"),
        (b"Happy/typo 3 1\nx/1 3 0\n", "so it is in 1 of the 1 rows"),
        (b"Fear/1 3 1\nFear/2 3 0\nDaily/1 3 3\n", "so it is in 2 of the 2 rows"),  # a scene, or a film
        (rows_in_order([EMOTIONS[i] for i in (1, 0, 2, 3, 2, 2, 2)]), "so it is in 10 of the 14 rows"),  # as perceived
    ):
        path = write(tmp_path, text)
        path = path.rename(tmp_path / f"{wrong[12:14].strip()}{len(text)}.txt")
        for _ in range(2):
            assert all(record.label in range(7) for record in read_annotations(path))
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"note: {path}:") and wrong in err
    in_a_home = b"/home/happy/dfew/1 3 1\n/home/happy/dfew/2 3 4\n"
    for text in (rows_in_order(EMOTIONS), b"Happy Feet/1 3 1\nFear/Happy/2 3 0\n0001 3 4\n", in_a_home):
        read_annotations(write(tmp_path, text))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("\ufeffa 3 0\n\ufeff# again\n\ufeffé 3 1\n".encode(), "byte-order marks inside it"),
        ("# x\na 3 0\né 3 1\n".encode("utf-16"), "UTF-16"),
        ("\ufeffa 3 0\né 3 1\n".encode("utf-16-be"), "UTF-16"),
        ("a 3 0\né 3 1\n".encode("utf-32"), "UTF-32"),
        ("a 3 0\ré 3 1\r".encode(), "CR alone"),
        ("a 3 0\r\n\r\né 3 1\r\n".encode(), ""),
        ("a\t3\t0\né\u00a03\u30001\n".encode(), ""),
        ("a 3 0\n#é 3 1\né 3 1\n".encode(), ":2: begins with # and is taken for a comment"),
    ],
)
def test_whatever_wrote_a_list_it_is_read_and_what_is_odd_said_once(tmp_path, capsys, data, said):
    path = write(tmp_path, data)
    for _ in range(2):
        assert [(r.name, r.num_frames, r.label) for r in read_annotations(path)] == [("a", 3, 0), ("é", 3, 1)]
        assert packed_index(path) is None
    err = capsys.readouterr().err
    assert (said in err and err.count("\n") == 1) if said else not err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_headers_are_read_whatever_wrote_the_list(tmp_path, encoding, end):
    path = write(tmp_path, f"# root: x{end}# packed: p.npz{end}a 3 0{end}".encode(encoding))
    assert packed_index(path) == tmp_path / "p.npz"
    assert read_annotations(path)[0].path == tmp_path / "x" / "a"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("训练 3 0\n".encode("gbk"), r":1: .* byte 0x.. is not UTF-8; save the list as UTF-8"),
        (b"\xff\xfea\x003\xd8", "begins as UTF-16, but is not: damaged"),
        ("a 3 0\n".encode("utf-16-le"), "without a byte-order mark; save the list as UTF-8"),
        (b"a 3 0\nb\0 3 0\n", ":2: holds a NUL"),
        ("a 3 0\nb 3\u200b 0\n".encode(), r":2: .* holds \\u200b \(zero width space\)"),
        ("a 3 0\nb 3 0\u2060\n".encode(), r":2: .* holds \\u2060 \(word joiner\)"),
        (b"a 3.0 0\n", r":1: .* write 6 as 6\.0: write whole numbers"),
        (b"a 3 0.0\n", r":1: .* write 6 as 6\.0: write whole numbers"),
        (b"a,3,0\n", ":1: .* converts lists with other columns"),
        (b"a;3;0\n", ":1: .* converts lists with other columns"),
        (b"a 3 Happy\n", ":1: .* converts lists with other columns or labels"),
        (b"a 3 7\n", ":1: label 7 .* converts lists with other columns or labels"),
    ],
)
def test_rows_of_other_programs_are_named_with_what_to_do(tmp_path, data, message):
    with pytest.raises(UserError, match=message) as error:
        read_annotations(write(tmp_path, data))
    assert "\n" not in str(error.value)


def test_lists_that_are_no_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "pipe or a device.* write it to a file"), (".", "is a folder; name the file in it")):
        with pytest.raises(UserError, match=message):
            read_annotations(tmp_path / name)


def test_a_row_that_begins_with_a_hash_is_a_clip_if_there_is_one(tmp_path, capsys):
    for name in ("#12", "# 13", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    path = write(tmp_path, b"#12 1 0\n# 13 1 1\n#14 1 1\n# a comment of 3 4\na 1 2\n./#12 1 3\n")
    assert [record.name for record in load_index(path).records] == ["#12", "# 13", "a", "#12"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "list.txt:3: begins with #" in err


@pytest.mark.parametrize(
    ("there", "listed", "root", "hint"),
    [
        ("00001", "1", None, r"/00001 is there: the list has lost its leading zeros"),
        ("Crime/Fear/0063", "Crime/Fear/63", None, "0063 is there: the list has lost its leading zeros"),
        ("a/007/x", "a/7/x", None, "007 is there: .*zeros"),
        ("clip_01", "clip_1", None, "clip_01 is there: other leading zeros"),
        ("00003", "00003\u200b", None, r"00003 is there: the names differ in \\u200b \(zero width space\)"),
        ("a b", "a\u00a0b", None, r"differ in \\xa0 \(no-break space\)"),
        ("Happy/1", "happy/1", None, "Happy is there: capital and small letters differ"),
        ("v.mp4", "v", None, r"v\.mp4 is there: with \.mp4"),
        ("v", "v.mp4", None, "v is there: without the suffix"),
        ("train\\1\\1.jpg", "train/1", None, "files with backslashes in their names.* unpack them again"),
        ("train/1", "train\\1", None, "with slashes for the backslashes it is there: python scripts/check_list.py"),
        (
            "1",
            "/home/someone/1",
            "root",
            "a root has no effect: python scripts/check_list.py LIST --root DIR --write OUT",
        ),
        ("1", "D:\\data\\1", None, "a root has no effect: python scripts/check_list.py LIST --root DIR --write OUT"),
        ("1", "gone/2", None, "is --data.root right"),
        ("1", "x\u200b", None, r"its name holds \\u200b"),
        ("@eaDir", "@eadir", None, r"@eadir$"),
    ],
)
def test_what_is_there_in_place_of_a_missing_clip_is_named(tmp_path, there, listed, root, hint):
    (tmp_path / there).mkdir(parents=True)
    with pytest.raises(UserError, match=f"list.txt:1: no such frame folder.*{hint}") as error:
        load_index(write(tmp_path, f"{listed} 1 0\n".encode()), None if root is None else tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("there", "listed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_unicode_form(tmp_path, capsys, there, listed):
    """macOS writes é as two characters, Linux as one: archives and lists come with either."""
    for name in ("José/1", "plain"):
        folder = tmp_path / unicodedata.normalize(there, name)
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    name = unicodedata.normalize(listed, "José/1")
    path = write(tmp_path, f"{name} 1 0\nplain 1 1\n".encode())
    for index in (load_index(path), load_index(path), build_index(read_annotations(path))):
        assert [record.name for record in index.records] == [name, "plain"]
        assert Path(index.frame_path(0, 0)).exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another Unicode form, as of 1 clips" in err


def test_a_root_without_effect_is_said(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    path = write(tmp_path, f"{tmp_path}/a 1 0\n".encode())
    load_index(path)
    assert not capsys.readouterr().err
    load_index(path, tmp_path / "root")
    assert "list.txt:1: the path is absolute" in capsys.readouterr().err


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
        (HEADER + "b,1,0,0,0,0,0,0\n", r"no votes for clip a \(.*list.txt:1\)$"),
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


def test_votes_that_a_spreadsheet_has_saved_are_named(tmp_path):
    records = read_annotations(write(tmp_path, b"00012 3 0\n"))
    (tmp_path / "votes.csv").write_text(HEADER + "12,1,0,0,0,0,0,0\n")
    with pytest.raises(UserError, match=r"no votes for clip 00012 .*it has them without the zeros"):
        read_votes(tmp_path / "votes.csv", records)


def test_names_that_no_disk_holds_are_named(tmp_path):
    """Python asks the system about them, which raises another error than that they are missing."""
    for name in ("x" * 300, f"{'x' * 300}/1", "y/" * 3000 + "1"):
        with pytest.raises(UserError, match=r"list\.txt:1: no such frame folder"):
            load_index(write(tmp_path, f"{name} 1 0\n".encode()))
    for path in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="cannot be read as an annotation list"):
            read_annotations(path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lists/dfew/set_1_train.txt", "python scripts/prepare_dfew.py --root DIR --out {folder}"),
        ("lists/ferv39k/train_All.txt", "python scripts/prepare_ferv39k.py --root DIR --out {folder}"),
        ("data/faces/train.txt", "python scripts/make_faces.py"),
        ("lists/mine/train.txt", "check --data.train-list and --data.val-list"),
    ],
)
def test_a_list_of_a_preset_that_is_not_there_names_the_command_that_writes_it(name, advice, tmp_path):
    with pytest.raises(UserError) as error:
        read_annotations(tmp_path / name)
    assert str(error.value).endswith(advice.format(folder=(tmp_path / name).parent))
