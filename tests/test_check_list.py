"""The list doctor: every line of its report on small trees, the traps of the field, and hostile files."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dfer.cli import UserError
from dfer.lists import checking
from dfer.lists.annotations import EMOTIONS, read_annotations, write_annotations
from dfer.lists.formats import ORDERS
from dfer.lists.index import build_index, load_index
from dfer.lists.packing import Options, pack
from scripts import check_list as cl
from tests.conftest import run_python
from tests.releases import write_video


def make_clip(folder: Path, num_frames: int, size: tuple[int, int] = (32, 24), label: int = 0) -> None:
    """Frames 1.jpg, 2.jpg, ..., not zero-padded, each of its own grey."""
    folder.mkdir(parents=True)
    for frame in range(num_frames):
        Image.new("RGB", size, (10 * frame, 30 * label, 90)).save(folder / f"{frame + 1}.jpg")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """data/ with two clips per class in the layout of FERV39k, of 3 to 16 frames, and train.csv, test.csv beside it."""
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for number in range(14):
        emotion, split = EMOTIONS[number % 7], "train" if number < 7 else "test"
        name = f"Daily Life/{emotion}/{number:04d}"
        make_clip(tmp_path / "data" / name, number + 3, label=number % 7)
        rows[split].append(f"{name} {emotion}\n")
    for split, lines in rows.items():
        (tmp_path / f"{split}.csv").write_text("".join(lines))
    return tmp_path


def check(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a run; of one that ends in an error, its one line."""
    try:
        code = cl.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    if code == 2:
        assert err.startswith("check_list: ") and err.count("\n") == 1
        return 2, err
    assert not err
    return code, out


def listed(tree: Path, text: str, name: str = "list.txt") -> Path:
    (tree / name).write_text(text)
    return tree / name


COMMON = "".join(f"data/Daily Life/{EMOTIONS[i % 7]}/{i:04d} {i + 3} {i % 7}\n" for i in range(14))


def test_a_sound_list(tree, capsys):
    code, out = check(capsys, tree / "train.csv", tree / "test.csv", "--root", tree / "data")
    assert code == 0
    for line in (
        "images (headers of the first, middle and last frame of each clip): 32x24 in 42 of 42",
        f"{tree}/train.csv: 7 clips: path label, emotion words (official FERV39k)",
        "  because: the emotion folder in 7 of 7 paths agrees with the label",
        "  0 Happy           1   14.3%",
        "  frames: 3 to 9, median 6; 7 clips shorter than 16",
        "       2..3            1 ######",
        "       8..15           2 ############",
        "  frames: 10 to 16, median 13; 6 clips shorter than 16",
        "no problems in 14 clips",
    ):
        assert line in out.splitlines(), line
    assert "other size" not in out and out.count("Daily Life") == 0


def test_judging_the_list_alone(tree, capsys):
    path = listed(tree, COMMON)
    shutil.rmtree(tree / "data")
    code, out = check(capsys, path, "--no-disk", "--frames", 5)
    assert code == 0 and "frames: 3 to 16, median 10; 2 clips shorter than 5" in out and "images" not in out
    code, out = check(capsys, tree / "train.csv", "--no-disk")
    assert code == 0 and "frames:" not in out
    code, out = check(capsys, path)
    assert code == 1 and "missing folders: 14" in out and out.endswith("14 problems in 14 clips\n")


def test_writing_the_canonical_list(tree, capsys):
    out_path = tree / "lists.txt"
    code, out = check(capsys, tree / "train.csv", "--root", tree / "data", "--write", out_path)
    assert code == 0 and f"written: {out_path}\n" in out
    records = read_annotations(out_path)
    assert [(r.name, r.num_frames, r.label) for r in records] == [
        (f"Daily Life/{emotion}/{label:04d}", label + 3, label) for label, emotion in enumerate(EMOTIONS)
    ]
    assert build_index(records).num_miscounted() == 0
    again = tree / "data" / "again.txt"  # beside the clips: the list may move with them
    assert check(capsys, out_path, "--write", again)[0] == 0
    assert "# root" not in again.read_text() and build_index(read_annotations(again)).num_miscounted() == 0
    out_path.write_text(out_path.read_text().replace("0000 3 0", "0000 9 0"))
    code, out = check(capsys, out_path, "--write", out_path)  # a canonical list may be written in its own place
    assert code == 1 and "damaged rows: 1" in out and "wrong frame counts: 1" in out
    assert check(capsys, out_path)[0] == 0 and read_annotations(out_path)[0].num_frames == 3


def test_writing_without_the_disk_keeps_the_listed_counts(tree, capsys):
    path = listed(tree, COMMON.replace("0000 3 0", "0000 9 0"))
    assert check(capsys, path, "--no-disk", "--write", tree / "out.txt")[0] == 0
    assert read_annotations(tree / "out.txt")[0].num_frames == 9
    code, err = check(capsys, tree / "train.csv", "--no-disk", "--write", tree / "none.txt")
    assert code == 2 and "lacks frame counts" in err and not (tree / "none.txt").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("data/Daily Life/Happy/0000 3 0\ndata/gone 3 0\n", "missing folders"),
        ("data/Daily Life/Happy/0000 3 0\ntrain.csv 3 0\n", "unreadable videos"),
        ("data/Daily Life/Happy/0000 3 0\ndata 3 0\n", "folders without frames"),
        ("a 3 0\na 3 0\na 3 1\n", "clips with two labels"),
    ],
)
def test_what_cannot_be_written(tree, capsys, text, problem):
    make_clip(tree / "a", 3)
    code, out = check(capsys, listed(tree, text), "--label-base", 0, "--write", tree / "out.txt")
    assert code == 1 and f"not written: {tree}/out.txt: {problem}\n" in out and not (tree / "out.txt").exists()


# ---- the traps of the field


def test_wrong_counts_are_named_and_the_rest_goes_to_the_report(tree, capsys):
    path = listed(tree, COMMON.replace(" 16 6\n", " 99 6\n").replace("0000 3 0", "0000 4 0"))
    code, out = check(capsys, path, "--report", tree / "report")
    assert code == 1 and "wrong frame counts: 2\n" in out and out.endswith("2 problems in 14 clips\n")
    assert f"  {path}:1: data/Daily Life/Happy/0000: listed 4, found 3\n" in out
    path = listed(tree, "".join(f"data/Daily Life/{EMOTIONS[i % 7]}/{i:04d} 2 {i % 7}\n" for i in range(14)))
    code, out = check(capsys, path, "--report", tree / "report")
    assert out.count(": listed 2, found") == 10 and "  ... and 4 more\n" in out
    report = (tree / "report").read_text().splitlines()
    assert len(report) == 14 and report[13].startswith(
        f"wrong frame counts: {path}:14: data/Daily Life/Fear/0013: listed 2"
    )
    assert "  ... and 4 more (--report FILE names all)\n" in check(capsys, path)[1]
    path = listed(tree, "".join(path.read_text().splitlines(keepends=True)[:10]))
    assert "wrong frame counts: 10\n" in (out := check(capsys, path)[1]) and "more" not in out


def test_class_orders_and_bases(tree, capsys):
    """1..7, S2D's 0..6 below the same header, and alphabetical ids all give the same canonical list."""
    names = [f"Daily Life/{EMOTIONS[i % 7]}/{i:04d}" for i in range(14)]
    alphabetical = ORDERS["alphabetical"]
    for name, text in {
        "official.csv": "video_name,label\n" + "".join(f"{name},{i % 7 + 1}\n" for i, name in enumerate(names)),
        "s2d.csv": "video_name,label\n" + "".join(f"{name},{i % 7}\n" for i, name in enumerate(names)),
        "ferv.csv": "".join(f"{n},{alphabetical.index(EMOTIONS[i % 7])}\n" for i, n in enumerate(names)),
        "windows.txt": COMMON.replace("/", "\\").replace("\n", "\r\n").replace("data\\", "D:\\FERV39k\\"),
        "foreign.txt": COMMON.replace("data/", "/home/him/FERV39k/"),
        "dotted.txt": COMMON.replace("data/", "./dataset/"),
    }.items():
        path = listed(tree, text, name)
        code, out = check(capsys, path, "--root", tree / "data", "--write", tree / "data" / "out.txt")
        assert code == 0, out
        assert [(r.name, r.label) for r in read_annotations(tree / "data" / "out.txt")] == [
            (name, i % 7) for i, name in enumerate(names)
        ]
        said = "all paths start with" in out
        assert said == (path.suffix == ".txt")
    code, err = check(capsys, listed(tree, "video_name,label\n1,1\n2,6\n"), "--write", tree / "none.txt")
    assert code == 2 and "say --label-base 0 or --label-base 1" in err and not (tree / "none.txt").exists()


def test_unpadded_numbers_and_a_headerless_first_row(tmp_path, capsys):
    for number in (1, 23):
        make_clip(tmp_path / f"{number:05d}", 16, (256, 256))
    path = listed(tmp_path, "video_name,label\n1,7\n23,7\n", "set_1.csv")
    code, out = check(capsys, path, "--write", tmp_path / "out.txt", "--label-base", 1)
    assert code == 0 and "256x256 in 6 of 6" in out
    assert [r.name for r in read_annotations(tmp_path / "out.txt")] == ["00001", "00023"]
    (tmp_path / "00001" / "16.jpg").write_bytes(b"")  # the last in time, the eighth by letters
    (tmp_path / "00001" / "9.jpg").write_bytes(b"")  # the middle one
    (tmp_path / "00001" / "2.jpg").write_bytes(b"")  # neither: only --decode sees it
    code, out = check(capsys, path, "--label-base", 1)
    assert code == 1 and "bad images: 2\n" in out and "16.jpg: zero bytes\n" in out and "9.jpg: zero bytes\n" in out
    code, out = check(capsys, path, "--label-base", 1, "--decode")
    assert code == 1 and "bad images: 3\n" in out and "images (every frame decoded): 256x256 in 29 of 29" in out
    code, out = check(capsys, listed(tmp_path, "00001 Sad\n00023 Fear\n"), "--no-disk")
    assert code == 0 and ": 2 clips: path label, emotion words" in out


def test_other_sizes_are_no_problem(tree, capsys):
    make_clip(tree / "data" / "Daily Life" / "Sad" / "x", 4, (256, 256))
    path = listed(tree, COMMON + "data/Daily Life/Sad/x 4 1\n")
    code, out = check(capsys, path)
    assert code == 0 and f"  other size: 256x256 in 3, first in {tree}/data/Daily Life/Sad/x\n" in out


def test_duplicates_within_and_between_lists(tree, capsys):
    (tree / "link").symlink_to(tree / "data", target_is_directory=True)
    first = listed(tree, COMMON + "data/Daily Life/Happy/0000 3 0\n", "first.txt")
    # Emotion folders would refuse another label: a link hides them.
    (tree / "clip").symlink_to(tree / "data" / "Daily Life" / "Sad" / "0001", target_is_directory=True)
    second = listed(tree, "link/Daily Life/Happy/0007 10 0\nclip 4 2\n", "second.txt")
    code, out = check(capsys, first, second, "--label-base", 0)
    assert code == 1 and out.endswith("4 problems in 17 clips\n")
    for line in (
        f"clips listed twice: 1\n  {first}:15: data/Daily Life/Happy/0000, also {first}:1\n",
        f"clips in two lists: 2\n  {second}:1: link/Daily Life/Happy/0007, also {first}:8\n",
        f"clips with two labels: 1\n  {second}:2: clip, also {first}:2: Neutral and Sad\n",
    ):
        assert line in out
    code, out = check(capsys, first, second, "--label-base", 0, "--no-disk")  # which cannot know what links to what
    assert code == 1 and "clips listed twice: 1\n" in out and out.endswith("1 problems in 17 clips\n")


@pytest.mark.parametrize("inner", ["FERV39k", "FERV39K/FERV39k/2_Clips"])
def test_nested_copies_are_found(tree, capsys, inner):
    (tree / "copy" / inner).parent.mkdir(parents=True)
    (tree / "data").rename(tree / "copy" / inner)
    code, out = check(capsys, tree / "train.csv", "--root", tree / "copy")
    assert code == 1 and "missing folders: 7\n" in out
    assert f"Daily Life/Happy/0000 lies in {tree}/copy/{inner}: say --root {tree}/copy/{inner}\n" in out


# ---- hostile files


def jpeg_claiming(width: int, height: int) -> bytes:
    """A 4 kB JPEG whose header claims any size."""
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes([1, 0x11, 0, 2, 0x11, 1, 3, 0x11, 1])
    return b"\xff\xd8\xff\xc0" + frame + b"\0" * 4000 + b"\xff\xd9"


def png_claiming(width: int, height: int) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 999))]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "zero bytes"),
        (b"\0" * 4000, "neither JPEG nor PNG"),
        (b"GIF89a" + b"\1" * 99, "neither JPEG nor PNG"),
        (jpeg_claiming(30000, 30000), "claims more than 16,777,216 pixels"),
        (jpeg_claiming(12000, 12000), "claims 12000 x 12000 pixels, more than 16,777,216"),  # where Pillow only warns
        (jpeg_claiming(4097, 4096), "claims 4097 x 4096 pixels"),
        (jpeg_claiming(4000, 4400), "claims 4000 x 4400 pixels"),
        (png_claiming(65000, 65000), "claims more than"),
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_bad_images(tree, capsys, content, message, decode):
    bad = tree / "data" / "Daily Life" / "Fear" / "0006" / "9.jpg"
    bad.write_bytes(content)
    code, out = check(capsys, tree / "train.csv", "--root", tree / "data", *["--decode"] * decode)
    assert code == 1 and f"bad images: 1\n  {bad}: {message}" in out


def test_truncated_images_are_found_by_decoding_only(tree, capsys):
    bad = tree / "data" / "Daily Life" / "Fear" / "0006" / "9.jpg"
    Image.effect_noise((64, 64), 90).save(bad)
    bad.write_bytes(bad.read_bytes()[:-500])
    assert check(capsys, tree / "train.csv", "--root", tree / "data")[0] == 0
    code, out = check(capsys, tree / "train.csv", "--root", tree / "data", "--decode")
    assert code == 1 and f"  {bad}: image file is truncated" in out


def test_files_that_are_no_files(tree, capsys):
    folder = tree / "data" / "Daily Life" / "Happy" / "0000"
    os.mkfifo(folder / "0.jpg")  # opening it would wait for ever
    (folder / "4.jpg").mkdir()
    (folder / "2.jpg").unlink()
    (folder / "2.jpg").symlink_to("2.jpg")
    (tree / "data" / "loop").symlink_to("loop")
    (tree / "data" / "😀\udcff").mkdir()
    path = listed(tree, COMMON + "data/loop 3 0\ndata/😀 3 0\n")
    code, out = check(capsys, path)
    assert (
        code == 1
        and "0.jpg: not a file\n" in out
        and "4.jpg: not a file\n" in out
        and "2.jpg: Too many levels of symbolic links\n" in out
    )
    assert f"unreadable folders: 1\n  {path}:15: {tree}/data/loop (Too many levels of symbolic links)\n" in out
    assert f"missing folders: 1\n  {path}:16: {tree}/data/😀\n" in out


@pytest.mark.parametrize(
    "row", ["../../etc/passwd 1 0", "/etc/passwd 1 0", "a\0b 1 0", "a 1 ٣", "\x1b[2J 1 0", "x" * 99999]
)
def test_hostile_rows_are_refused(tree, capsys, row):
    path = listed(tree, COMMON + row + "\n")
    code, err = check(capsys, path, "--write", tree / "out.txt", "--report", tree / "report")
    assert code == 2 and f"{path}:15: " in err and err.strip().isprintable()
    assert not (tree / "out.txt").exists() and not (tree / "report").exists()


def test_absolute_lists_stay_absolute_without_a_root(tree, capsys):
    path = listed(tree, COMMON.replace("data/", f"{tree}/data/"))
    assert check(capsys, path, "--write", tree / "out.txt")[0] == 0
    first = read_annotations(tree / "out.txt")[0]
    assert first.name == f"{tree}/data/Daily Life/Happy/0000" == str(first.path) and first.num_frames == 3
    for more in ([], ["--no-disk"]):
        code, out = check(capsys, path, "--root", tree, "--write", tree / "out.txt", *more)
        assert code == 0 and read_annotations(tree / "out.txt")[0].name == "data/Daily Life/Happy/0000"
        assert "all paths start" not in out
    path = listed(tree, COMMON.replace("data/Daily Life", "D:\\Clips"))  # nothing tells how much of it is a root
    code, out = check(capsys, path, "--root", tree, "--write", tree / "out.txt", "--no-disk")
    assert code == 0 and f"  because: all paths start with D:/Clips/, which is taken for {tree}/\n" in out
    assert read_annotations(tree / "out.txt")[0].path == tree / "Happy" / "0000"


def test_hidden_files_are_no_frames(tree, capsys):
    (tree / "data" / "Daily Life" / "Happy" / "0000" / "._1.jpg").write_bytes(b"\0\5\x16\7")
    for more in ([], ["--decode"]):
        assert check(capsys, listed(tree, COMMON), *more)[0] == 0


def test_a_defect_keeps_its_traceback(tree, monkeypatch):
    monkeypatch.setattr(cl, "find_duplicates", lambda *_: max([]))
    with pytest.raises(ValueError, match="empty"):
        cl.main([str(tree / "train.csv"), "--root", str(tree / "data")])


def test_control_characters_never_reach_the_terminal(tree, capsys):
    folder = tree / "data" / "Daily Life" / "Happy" / "0000"
    (folder / "9\x1b[2J\n.jpg").write_bytes(b"")
    code, out = check(capsys, listed(tree, COMMON))
    assert code == 1 and "\x1b" not in out and r"9\x1b[2J\n.jpg: zero bytes" in out


# ---- what training takes: videos, packs

VIDEOS = "".join(f"v/{i}.mp4 {i + 3} {i % 7}\n" for i in range(7)).replace("0.mp4 3 0", "0.mp4 3 0\nv/0b.mp4 3 0")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "v").mkdir()
    for name, length in (("0b", 3), *((str(i), i + 3) for i in range(7))):
        write_video(tmp_path / "v" / f"{name}.mp4", length)
    return listed(tmp_path, VIDEOS, "videos.txt")


def test_a_list_of_videos(videos, capsys):
    folder = videos.parent
    code, out = check(capsys, videos, "--write", folder / "own.txt", "--picture", folder / "p.png", "--decode")
    assert code == 0 and "videos (every frame decoded): 64x48 in 45 of 45" in out, out
    assert "frames: 3 to 9, median 6" in out and load_index(folder / "own.txt").num_miscounted() == 0
    with Image.open(folder / "p.png") as sheet:  # the last frame of the last video is 8 * 8 grey
        assert abs(sheet.getpixel((110 + 96 * 2 + 40, 4 + 6 * 118 + 30))[0] - 64) < 8
    code, out = check(capsys, videos)
    assert code == 0 and "videos (the first frame of each decoded, of the others the packets): 64x48 in 8 of 8" in out


def test_what_is_wrong_with_videos(videos, capsys):
    folder = videos.parent
    videos.write_text(VIDEOS.replace("1.mp4 4", "1.mp4 9"))
    whole = (folder / "v" / "2.mp4").read_bytes()
    (folder / "v" / "2.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "v" / "3.mp4").rename(folder / "v" / "003.mp4")
    code, out = check(capsys, videos, "--write", folder / "own.txt")
    assert code == 1 and out.endswith("3 problems in 8 clips\n") and not (folder / "own.txt").exists()
    assert f"wrong frame counts: 1\n  {videos}:3: v/1.mp4: listed 9, found 4" in out
    assert f"unreadable videos: 1\n  {videos}:4: {folder}/v/2.mp4 (" in out
    assert f"missing videos: 1\n  {videos}:5: {folder}/v/3.mp4\n" in out
    assert f"{folder}/v/3.mp4: ({folder}/v/003.mp4 is there: other leading zeros)" in out
    make_clip(folder / "frames", 3)
    code, out = check(capsys, listed(folder, "v/0.mp4 3 0\nv/0b.mp4 3 0\nframes 3 0\n"))
    assert code == 1 and f"folders and videos in one list: 1\n  {folder}/list.txt:3: {folder}/frames, and 0 more" in out


@pytest.mark.parametrize("form", ["shards", "raw"])
def test_a_packed_list(videos, capsys, form):
    folder, out_folder = videos.parent, videos.parent / "pack"
    pack([videos], None, out_folder, Options(form, quality=None))
    path = out_folder / "videos.txt"
    code, out = check(capsys, path, "--write", out_folder / "own.txt", "--picture", folder / "p.png", "--decode")
    assert code == 0 and "packed clips (as they were packed): 64x48 in 8 of 8" in out, out
    assert f"because: packed in {out_folder}/videos.npz" in out
    assert load_index(out_folder / "own.txt").source == form
    with Image.open(folder / "p.png") as sheet:
        assert abs(sheet.getpixel((110 + 96 * 2 + 40, 4 + 6 * 118 + 30))[0] - 64) < 8
    code, err = check(capsys, path, "--write", folder / "own.txt")
    assert code == 2 and "has to lie beside its pack" in err and not (folder / "own.txt").exists()
    text = path.read_text()
    path.write_text(text.replace("1.mp4 4 1", "1.mp4 4 2").replace("v/2.mp4", "v/x.mp4").replace("3.mp4 6", "3.mp4 7"))
    code, out = check(capsys, path)
    assert code == 1 and "other labels than in the pack: 1" in out and "clips that are not in the pack: 1" in out
    assert "wrong frame counts: 1" in out and "damaged rows: 1" in out
    path.write_text(text)
    shard = next(out_folder.glob("*-00000.*"))
    data = bytearray(shard.read_bytes())
    data[5000] ^= 255
    shard.write_bytes(data)
    assert check(capsys, path)[0] == 0
    code, out = check(capsys, path, "--decode")
    assert code == 1 and "problems of the pack: " in out and "SHA-256" in out
    shard.unlink()
    code, out = check(capsys, path)
    assert code == 1 and "a shard of the pack is missing" in out


def test_rows_of_bins_and_names_that_lost_their_zeros_are_named(tree, capsys):
    for name in ("data/Daily Life/Happy/@eaDir", "data/.Trash-1000/1"):
        make_clip(tree / name, 3)
    path = listed(tree, COMMON + "data/Daily Life/Happy/@eaDir 3 0\ndata/.Trash-1000/1 3 0\n")
    code, out = check(capsys, path)
    assert code == 1 and "clips in hidden folders or the system's: 2\n" in out
    code, out = check(capsys, listed(tree, COMMON.replace("/0000 3", "/0 3")))
    assert code == 1 and "/0000 is there: the list has lost its leading zeros" in out


def test_names_of_another_unicode_form_are_written_as_the_disk_has_them(tree, capsys):
    (tree / "data" / "Daily Life").rename(tree / "data" / "e\u0301t\u00e9")
    path = listed(tree, COMMON.replace("Daily Life", "e\u0301te\u0301"))
    assert check(capsys, path)[0] == 1  # letters of both forms in one name, which nobody writes
    (tree / "data" / "e\u0301t\u00e9").rename(tree / "data" / "\u00e9t\u00e9")
    code, out = check(capsys, path, "--write", tree / "own.txt")
    assert code == 0 and "14 names are on the disk in another Unicode form, and taken so" in out
    assert read_annotations(tree / "own.txt")[0].name == "data/\u00e9t\u00e9/Happy/0000"


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: LIST"),
        (["none.txt"], "none.txt: no such annotation list"),
        (["train.csv", "--label-base", "2"], "invalid choice: 2"),
        (["train.csv", "--class-order", "x"], "--class-order: 'x' is no order of the classes"),
        (["train.csv", "--frames", "0"], "'0' is not a whole number from 1 to 1,000,000"),
        (["train.csv", "--frames", "٣"], "is not a whole number"),
        (["train.csv", "--no-disk", "--decode"], "drop --no-disk"),
        (["train.csv", "--no-disk", "--picture", "p.png"], "drop --no-disk"),
        (["train.csv", "test.csv", "--write", "w.txt"], "--write takes one list at a time"),
        (["train.csv", "--write", "no/w.txt"], "no/w.txt: cannot be written: its folder is missing"),
        (["train.csv", "--report", "data"], "data: cannot be written: a folder"),
        (["train.csv", "--write", "x", "--report", "x"], "x: would be written twice"),
        (["train.csv", "--write", "train.csv"], "train.csv: would be overwritten"),
        (["test.csv", "train.csv", "--report", "test.csv"], "test.csv: would be overwritten"),
        (["train.csv", "--report", "x" * 300], "cannot write: " + "x" * 300 + ": File name too long"),
        (["x" * 300], "cannot be read as an annotation list (File name too long)"),
        (["train.csv", "--class-order", "\udcff,٣"], "is no order of the classes"),
    ],
)
def test_wrong_commands_end_in_one_line(tree, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tree)
    before = {path: path.stat().st_mtime_ns for path in tree.iterdir()}
    code, err = check(capsys, *arguments)
    assert code == 2 and message in err
    assert before == {path: path.stat().st_mtime_ns for path in tree.iterdir()}


def test_a_canonical_list_is_no_place_for_a_report(tree, capsys):
    path = tree / "own.txt"
    write_annotations(path, [("a", 3, 0)])
    code, err = check(capsys, path, "--report", path)
    assert code == 2 and "would be overwritten" in err


def test_a_disk_that_fails_on_writing(tree, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cl, "write_annotations", full)
    code, err = check(capsys, tree / "train.csv", "--root", tree / "data", "--write", tree / "w.txt")
    assert code == 2 and "cannot write: No space left on device" in err


def test_processes_report_what_one_does(tree, capsys, monkeypatch):
    (tree / "data" / "Daily Life" / "Fear" / "0006" / "9.jpg").write_bytes(b"x")
    alone = check(capsys, tree / "train.csv", "--root", tree / "data", "--decode")
    monkeypatch.setattr(checking, "PARALLEL", 0)
    assert check(capsys, tree / "train.csv", "--root", tree / "data", "--decode") == alone
    assert alone[0] == 1


def die(*_: object, **__: object) -> None:
    os._exit(1)


def test_what_a_list_says_of_its_faces_is_kept(tree, capsys):
    said = "yunet 25a606a145a5, eyes level, margin 0.1"
    write_annotations(tree / "a.txt", [("data/Daily Life/Fear/0006", 9, 6)], faces=said)
    assert check(capsys, tree / "a.txt", "--write", tree / "b.txt")[0] == 0
    assert f"# faces: {said}" in (tree / "b.txt").read_text().splitlines()
    with pytest.raises(UserError, match="cannot stand in a list"):
        write_annotations(tree / "c.txt", [("a", 3, 6)], faces="two\nlines")
    assert not (tree / "c.txt").exists()


def test_a_process_that_dies_ends_the_check(tree, capsys, monkeypatch):
    monkeypatch.setattr(checking, "PARALLEL", 0)
    monkeypatch.setattr(checking, "inspect", die)
    code, err = check(capsys, tree / "train.csv", "--root", tree / "data", "--write", tree / "w.txt")
    assert code == 2 and "a process that reads images died" in err and not (tree / "w.txt").exists()


def test_the_picture_shows_each_class(tree, capsys):
    (tree / "data" / "Daily Life" / "Fear" / "0006" / "9.jpg").write_bytes(b"x")  # is crossed out, not fatal
    code, _ = check(capsys, tree / "train.csv", "--root", tree / "data", "--picture", tree / "p.png")
    assert code == 1 and not list(tree.glob("*.partial"))
    with Image.open(tree / "p.png") as sheet:
        assert sheet.format == "PNG"
        for label in range(7):
            for frame, grey in enumerate((0, (label + 3) // 2, label + 2)):
                pixel = sheet.getpixel((110 + 96 * frame + 40, 4 + label * 118 + 30))
                expected = (211, 211, 211) if (label, frame) == (6, 2) else (10 * grey, 30 * label, 90)
                assert all(abs(a - b) < 8 for a, b in zip(pixel, expected, strict=True)), (label, frame)


def test_as_a_user_runs_it(tree):
    done = run_python(
        "scripts/check_list.py", str(tree / "train.csv"), "--root", str(tree / "data"), PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 0 and not done.stderr and "no problems in 7 clips" in done.stdout
    (tree / "data" / "Daily Life").rename(tree / "data" / "😀")
    path = listed(tree, "data/😀/Happy/0000 Happy\ndata/😀/gone Sad\n")
    done = run_python("scripts/check_list.py", str(path), PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and not done.stderr and "\\U0001f600/gone" in done.stdout
    done = run_python("scripts/check_list.py", str(tree / "none"))
    assert done.returncode == 2 and done.stderr == f"check_list: {tree}/none: no such annotation list\n"
