"""Videos to frames: each frame once, in order, upright, in true colours, and no bad video passed over in silence.

And to faces: one steady face per clip, what was kept is told, and a run that was stopped goes on.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.lists.index import build_index
from dfer.video import clips as vc
from dfer.video import preparation
from dfer.video.decode import BadVideo, decode
from dfer.video.detectors import make_detector
from dfer.video.faces import find_face
from dfer.video.find import MAX_NAME
from dfer.video.labels import find_labelled_videos, parse_label
from scripts import make_faces as mf
from scripts import prepare_videos as pv
from tests.conftest import ROOT, YUNET, run_python
from tests.test_faces import toy_yunet

REAL = ROOT.parent / "shared" / "videos"
needs_yunet = pytest.mark.skipif(not YUNET.is_file(), reason="YuNet's weights are not beside this checkout")
FAST = {"preset": "ultrafast", "crf": "10", "bf": "2", "g": "5"}  # with B-frames, which come out of order from the file
STEP = 8  # grey levels between one frame of a counter and the next


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray],
    codec: str = "libx264",
    pts_ms: Sequence[int] | None = None,
    audio_s: float = 0,
    faststart: bool = False,
) -> Path:
    """A video of the given (H, W, 3) frames, or of a counter: frame i is grey at 16 + STEP * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(frames, int):
        frames = [np.full((48, 64, 3), 16 + STEP * i, np.uint8) for i in range(frames)]
    with av.open(str(path), "w", container_options={"movflags": "faststart"} if faststart else {}) as container:
        video = container.add_stream(codec, rate=25, options=FAST if codec == "libx264" else {})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        if audio_s:
            audio = container.add_stream("pcm_s16le", rate=8000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), 40 * i if pts_ms is None else pts_ms[i]
            container.mux(video.encode(frame))
        container.mux(video.encode())
        for tenth in range(round(10 * audio_s)):  # the muxer sorts them in between the frames
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            sound.sample_rate, sound.pts = 8000, 800 * tenth
            container.mux(audio.encode(sound))
    return path


def remux(path: Path, *sources: Path, title: str = "") -> None:
    """One file with the video streams of all sources."""
    with av.open(str(path), "w") as container, contextlib.ExitStack() as stack:
        container.metadata["title"] = title
        inputs = [stack.enter_context(av.open(str(source))) for source in sources]
        streams = [container.add_stream_from_template(source.streams.video[0]) for source in inputs]
        for source, stream in zip(inputs, streams, strict=True):
            for packet in source.demux(video=0):
                packet.stream = stream
                if packet.size:
                    container.mux(packet)


def noise(count: int) -> list[np.ndarray]:
    """Frames that compress badly, so that a cut file loses many of them."""
    return list(np.random.default_rng(0).integers(0, 256, (count, 96, 96, 3), dtype=np.uint8))


def counter(folder: Path) -> list[int]:
    """What a folder of a counter's frames counts."""
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{number:05d}.jpg" for number in range(1, len(files) + 1)]
    return [round((np.asarray(Image.open(file)).mean() - 16) / STEP) for file in files]


def tables(quality: int) -> dict[int, list[int]]:
    """JPEG's quantization at a quality."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    return Image.open(file).quantization


def prepare(*arguments: object) -> int:
    """Of clips that are kept as they are."""
    return pv.main([*map(str, arguments), "--no-crop", "--workers", "1"])


def crop(*arguments: object) -> int:
    return pv.main([*map(str, arguments), "--workers", "1"])


def rows(out: Path) -> list[str]:
    lines = (out / "list.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("# ")]


def report(out: Path) -> dict[str, dict[str, str]]:
    """The report's rows by the names of the videos."""
    with open(out / "report.csv", encoding="utf-8", newline="") as file:
        return {Path(row["video"]).name: row for row in csv.DictReader(file)}


def content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def person(identity: int) -> np.ndarray:
    """A drawn face that the detector finds."""
    return next(mf.frames(mf.apex_script(0, identity, 0)))[:, :, ::-1].copy()


def assert_refused(capsys: pytest.CaptureFixture, *arguments: object, run: Callable[..., int] = prepare) -> str:
    """Exit code 2 and one line, which is returned."""
    try:
        code = run(*arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("ten") / "ten.mp4", 10)


def test_every_frame_comes_out_once_and_in_order(ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(ten, "--out", tmp_path / "o u t", "--label", "anger") == 0
    assert rows(tmp_path / "o u t") == ["frames/ten 10 3"]
    assert counter(tmp_path / "o u t" / "frames" / "ten") == list(range(10))
    with Image.open(tmp_path / "o u t" / "frames" / "ten" / "00001.jpg") as image:
        assert image.size == (64, 48)
        assert image.quantization == tables(92)
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    captured = capsys.readouterr()
    assert not captured.err
    *_, hint, summary = captured.out.splitlines()
    assert f"train.py --data.train-list '{tmp_path}/o u t/list.txt'" in hint
    assert summary == f"1 of 1 videos, 1 clips, 10 frames: {tmp_path}/o u t/list.txt"
    prepare(ten, "--out", tmp_path, "--label", "3", "--quality", "50")
    with Image.open(tmp_path / "frames" / "ten" / "00001.jpg") as image:
        assert image.quantization == tables(50)


def test_classes_are_folders(ten: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in (
        "Happy/10.mp4", "Happy/2.mp4", "happiness/deep/er/x.MP4", "SAD/a.mp4", "Sadness/a.mp4", "neutral/a.mp4",
        "Anger/a.mp4", "Angry/a.mp4", "surprise/a.mp4", "Disgust/a.mp4", "fear/a.mp4", "other/Fear/a.mp4", "loose.mp4",
        "Happy/._2.mp4", "Happy/notes.txt", "Happy/2.jpg",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ten)
    (source / "Angry linked").symlink_to(source / "Anger")  # no class, but to be looked into
    assert prepare(source, "--out", tmp_path / "out", "--label", 6) == 0
    labels = {row.split()[0].removeprefix("frames/"): int(row.split()[-1]) for row in rows(tmp_path / "out")}
    assert labels == {
        "Happy/2": 0, "Happy/10": 0, "happiness/deep/er/x": 0, "SAD/a": 1, "Sadness/a": 1, "neutral/a": 2,
        "Anger/a": 3, "Angry/a": 3, "surprise/a": 4, "Disgust/a": 5, "fear/a": 6, "other/Fear/a": 6, "loose": 6,
        "Angry": 6,
    }  # fmt: skip
    names = list(labels)
    assert names.index("Happy/2") + 1 == names.index("Happy/10")


def test_bins_and_folders_of_the_system_are_left_out_and_named(ten: Path, tmp_path: Path, capsys) -> None:
    source = tmp_path / "in"
    for name in (
        "Happy/a.mp4", "Happy/@eaDir/a.mp4/FILM.mp4", "Happy/._a.mp4", "Sad/.b.mp4", "Sad/#12.mp4",
        ".Trash-1000/files/c.mp4", "$RECYCLE.BIN/S-1/R.mp4", "__MACOSX/Fear/d.mp4", "Fear/lost+found/e.mp4",
        "System Volume Information/f.mp4",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ten)
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert rows(tmp_path / "out") == ["frames/Happy/a 10 0", "frames/Sad/#12 10 1"]
    said = [line for line in capsys.readouterr().err.splitlines() if "not searched" in line]
    assert len(said) == 1 and "7 named $RECYCLE.BIN, .Trash-1000, .b.mp4" in said[0], said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("\ufeffa.mp4 Happy\n\ufeff#12.mp4 1\n".encode(), "byte-order marks"),
        (b"a.mp4;Happy\r#12.mp4;Sad\r", "CR alone"),
        ("a.mp4\tHappy\n#12.mp4\tSad\n".encode("utf-16"), "UTF-16"),
        (b'"a.mp4","Happy"\n"#12.mp4","Sad"\n', "quotes"),
        (b"a.mp4 0\n./#12.mp4 1\n# gone.mp4 2\n", ":3: begins with # and is taken for a comment"),
        (b"a.mp4,0\n./#12.mp4,1\n# two columns\n", ""),
    ],
)
def test_lists_of_other_programs(ten: Path, tmp_path: Path, capsys, data: bytes, said: str) -> None:
    for name in ("a.mp4", "#12.mp4"):
        (tmp_path / name).symlink_to(ten)
    (tmp_path / "list.txt").write_bytes(data)
    assert prepare(tmp_path / "list.txt", "--out", tmp_path / "out") == 0
    assert rows(tmp_path / "out") == ["frames/a 10 0", "frames/#12 10 1"]
    err = capsys.readouterr().err
    assert (said in err and err.count("\n") == 1) if said else not err


def test_listed_names_are_found_in_other_forms_and_ids_are_compared_with_paths(
    ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = sorted(EMOTIONS)
    for name in ("sub/a.mp4", "\u00e9.mp4", *(f"{emotion}/{i}.mp4" for emotion in orders for i in range(2))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ten)
    path = tmp_path / "list.txt"
    path.write_text("sub\\a.mp4 0\ne\u0301.mp4 1\n")
    found = find_labelled_videos(path, None, False, print)
    assert [video.path.name for video in found] == ["a.mp4", "\u00e9.mp4"]
    assert capsys.readouterr().err.count("that is taken") == 2
    path.write_text("".join(f"{emotion}/{i}.mp4 {k}\n" for k, emotion in enumerate(orders) for i in range(2)))
    assert "list.txt:1: label 0 means Happy, but its path says Angry" in assert_refused(
        capsys, path, "--out", tmp_path / "out"
    )
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "Happy\\a.mp4").symlink_to(ten)
    assert "unpack it again" in assert_refused(capsys, tmp_path / "flat", "--out", tmp_path / "out")


def test_label_words_cover_all_emotions() -> None:
    for label, emotion in enumerate(EMOTIONS):
        assert parse_label(emotion) == parse_label(emotion.upper()) == parse_label(str(label)) == label
    for word in ("7", "-1", "", "²", "joy", "0.5", "10", "9" * 5000):
        with pytest.raises(ValueError, match=r"is no label: 0\.\.6 or Happy"):
            parse_label(word)


def test_list_of_videos(ten: Path, tmp_path: Path) -> None:
    (tmp_path / "sub dir").mkdir()
    for name in ("sub dir/a b, c.mp4", "#1.mp4", "d.mp4", "e"):
        (tmp_path / name).symlink_to(ten)
    text = f"# comment\r\n\r\nsub dir/a b, c.mp4 , Sad\r\n  ./#1.mp4\t3 \r\nd.mp4,fear\r\ne happy\r\n{ten} 5"
    (tmp_path / "videos.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert prepare(tmp_path / "videos.csv", "--out", tmp_path / "out", "--label", 2) == 0
    *found, outside = rows(tmp_path / "out")
    assert found == ["frames/sub dir/a b, c 10 1", "frames/#1 10 3", "frames/d 10 6", "frames/e 10 0"]
    assert outside.endswith("/ten 10 5")
    assert "/_" not in outside  # as from ../
    assert build_index(read_annotations(tmp_path / "out" / "list.txt")).num_frames.tolist() == [10] * 5


@pytest.mark.parametrize(
    ("num_frames", "clip_length", "lengths"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (8, 4, [4, 4]), (8, 5, [5, 3]), (7, 5, [5]), (3, 8, [3]), (2, 1, [1, 1])],
)
def test_clips_of_n_frames(num_frames: int, clip_length: int, lengths: list[int], tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", num_frames)
    assert prepare(video, "--out", tmp_path, "--label", 0, "--clip-length", clip_length) == 0
    names = [f"frames/v_c{number:03d}" for number in range(1, len(lengths) + 1)]
    assert rows(tmp_path) == [f"{name} {length} 0" for name, length in zip(names, lengths, strict=True)]
    assert sorted(f"frames/{path.name}" for path in (tmp_path / "frames").iterdir()) == names
    assert [level for name in names for level in counter(tmp_path / name)] == list(range(sum(lengths)))


def test_list_is_readable_whatever_the_videos_are_called(ten: Path, tmp_path: Path) -> None:
    names = ["a.mp4", "A.avi", "a.mov", "a_2.mp4", "a/b.mp4", "new\nline.mp4", "u\u2028 .mp4", "é ü.mp4", "...mp4"]
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    for name in names:
        (source / name).symlink_to(ten)
    (tmp_path / "list.txt").write_text("".join(f"in/{name} 0\n" for name in ("a.mp4", "...mp4", "a.mp4", "A.avi")))
    assert prepare(source, "--out", tmp_path / "out", "--label", 0) == 0
    index = build_index(read_annotations(tmp_path / "out" / "list.txt"))
    folders = {str(record.path).casefold() for record in index.records}  # a disk may ignore case
    assert len(folders) == len(names) - 1  # ...mp4 has a leading dot
    assert index.num_frames.tolist() == [10] * len(index)
    assert all(record.path.is_relative_to(tmp_path / "out" / "frames") for record in index.records)
    assert prepare(tmp_path / "list.txt", "--out", tmp_path / "out2") == 0
    assert rows(tmp_path / "out2") == [
        "frames/in/a 10 0",
        "frames/in/mp4 10 0",
        "frames/in/a_2 10 0",
        "frames/in/A_3 10 0",
    ]


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(
    ("matrix", "kr", "kb", "pixels"),
    [
        (1, 0.2126, 0.0722, "yuv420p"),  # BT.709
        (5, 0.299, 0.114, "yuv420p"),  # BT.601
        (2, 0.299, 0.114, "yuv420p"),  # not stated
        (1, 0.2126, 0.0722, "yuv420p10le"),
        (9, 0.2627, 0.0593, "yuv420p10le"),  # BT.2020
    ],
)
def test_colours_follow_the_stream(
    matrix: int, kr: float, kb: float, pixels: str, full_range: bool, tmp_path: Path
) -> None:
    colour = np.array((200, 60, 40))
    r, g, b = colour / 255
    y = kr * r + (1 - kr - kb) * g + kb * b
    yuv = np.array((y, 0.5 + (b - y) / 2 / (1 - kb), 0.5 + (r - y) / 2 / (1 - kr)))
    yuv = yuv * 255 if full_range else (16, 16, 16) + yuv * (219, 224, 224)
    deep = "10" in pixels
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full_range
        frame = av.VideoFrame(64, 48, pixels)
        for plane, value in zip(frame.planes, yuv, strict=True):
            size = plane.buffer_size // (1 + deep)
            plane.update(np.full(size, round(value * (1 + 3 * deep)), np.uint16 if deep else np.uint8).tobytes())
        frame.colorspace, frame.color_range, frame.pts = matrix, 1 + full_range, 0
        container.mux([*stream.encode(frame), *stream.encode()])
    assert prepare(path, "--out", tmp_path, "--label", 0, "--quality", 100) == 0
    image = np.asarray(Image.open(tmp_path / "frames" / "v" / "00001.jpg"))
    np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), colour, atol=2)  # 601 for 709 errs by 13


QUADRANTS = np.zeros((48, 64, 3), np.uint8)  # red, green over blue, white
QUADRANTS[:24, :32, 0] = QUADRANTS[:24, 32:, 1] = QUADRANTS[24:, :32, 2] = QUADRANTS[24:, 32:] = 255


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), QUADRANTS),
        ((0, 1, -1, 0), np.rot90(QUADRANTS, -1)),  # clockwise: what a phone held upright writes
        ((0.001, 1, -1, -0.001), np.rot90(QUADRANTS, -1)),  # a computed angle
        ((-1, 0, 0, -1), np.rot90(QUADRANTS, 2)),
        ((0, -1, 1, 0), np.rot90(QUADRANTS)),
        ((-1, 0, 0, 1), QUADRANTS[:, ::-1]),  # a mirrored selfie; VideoFrame.rotation says -180
        ((1, 0, 0, -1), QUADRANTS[::-1]),
        ((0, 1, 1, 0), QUADRANTS.swapaxes(0, 1)),
        ((0, -1, -1, 0), np.rot90(QUADRANTS.swapaxes(0, 1), 2)),
    ],
)
def test_rotated_videos_come_out_upright(matrix: tuple[float, ...], upright: np.ndarray, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [QUADRANTS] * 2)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44  # a, b, u, c, d, v of QuickTime's matrix: x' = ax + cy, y' = bx + dy
    assert struct.unpack_from(">6i", data, at) == (65536, 0, 0, 0, 65536, 0)
    a, b, c, d = (round(65536 * value) for value in matrix)
    struct.pack_into(">6i", data, at, a, b, 0, c, d, 0)
    path.write_bytes(data)
    assert prepare(path, "--out", tmp_path, "--label", 0) == 0
    for name in ("00001.jpg", "00002.jpg"):
        image = np.asarray(Image.open(tmp_path / "frames" / "v" / name)).astype(int)
        assert image.shape == upright.shape
        assert np.abs(image - upright).mean() < 12


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_gives_each_frame_once(suffix: str, tmp_path: Path) -> None:
    times = [0, 10, 20, 500, 510, 900, 1700, 1701, 1702, 3000]
    video = write_video(tmp_path / f"v{suffix}", 10, pts_ms=times)
    assert prepare(video, "--out", tmp_path, "--label", 0) == 0
    assert counter(tmp_path / "frames" / "v") == list(range(10))


def test_healthy_videos_of_unusual_length_are_not_taken_for_truncated(ten: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "in" / "long audio.mkv", 10, audio_s=3)
    write_video(tmp_path / "in" / "short audio.mkv", 10, audio_s=0.1)
    write_video(tmp_path / "in" / "long audio.avi", 10, codec="mjpeg", audio_s=3)
    write_video(tmp_path / "in" / "stream.ts", 10)
    trimmed = write_video(tmp_path / "in" / "trimmed.mp4", 20)  # a phone's editor: the file holds more than is shown
    data = bytearray(trimmed.read_bytes())
    at = data.index(b"elst") + 12
    assert struct.unpack_from(">I", data, at) == (800,)
    struct.pack_into(">I", data, at, 400)
    trimmed.write_bytes(data)
    small = write_video(tmp_path / "small.mp4", [np.zeros((32, 32, 3), np.uint8)] * 60)
    remux(tmp_path / "in" / "second video is longer.mp4", ten, small)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--label", 0) == 0
    assert [row.split()[-2] for row in rows(tmp_path / "out")] == ["10"] * 6


def test_odd_names_and_tags(ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    video = Path("a:b.mp4")  # not a protocol
    remux(tmp_path / video, ten, title="TITLE")
    assert video.read_bytes().count(b"TITLE") == 1
    video.write_bytes(video.read_bytes().replace(b"TITLE", b"T\xefTLE"))  # not UTF-8
    assert prepare(video, "--out", "out", "--label", 0) == 0
    assert rows(Path("out")) == ["frames/a:b 10 0"]


def test_bad_videos_are_named_and_left_out(ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    whole = write_video(source / "whole.mp4", noise(24), faststart=True)
    with av.open(str(whole)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    for name, end in (("mid frame.mp4", whole.stat().st_size * 6 // 10), ("between frames.mp4", ends[11])):
        (source / name).write_bytes(whole.read_bytes()[:end])
    for suffix, codec in ((".mkv", "libx264"), (".ts", "libx264"), (".avi", "mjpeg")):
        path = write_video(source / f"cut{suffix}", noise(24), codec=codec)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    long_audio = write_video(tmp_path / "audio.mkv", noise(24), audio_s=3).read_bytes()
    (source / "cut with audio.mkv").write_bytes(long_audio[: len(long_audio) // 2])
    damaged = bytearray(write_video(source / "damaged.mp4", noise(24)).read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 300] = np.random.default_rng(1).bytes(300)
    (source / "damaged.mp4").write_bytes(damaged)
    avi = (source / "cut.avi").read_bytes()
    (source / "no frames.avi").write_bytes(avi[: avi.index(b"movi") + 4])
    (source / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (source / "empty.mp4").write_bytes(b"")
    (source / "no codec.mp4").write_bytes(ten.read_bytes().replace(b"avc1", b"zzzz"))
    with wave.open(str(source / "sound.mp4"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(800))
    (source / "gone.mp4").symlink_to(tmp_path / "nowhere")
    assert prepare(source, "--out", tmp_path / "out", "--label", 0) == 1

    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("1 of 14 videos, 1 clips, 24 frames: ")
    reasons = dict(line.split(": ", 2)[1:] for line in captured.err.splitlines())
    assert len(reasons) == len(captured.err.splitlines()) == 13
    assert all(reasons)
    reasons = {Path(path).name: reason for path, reason in reasons.items()}
    assert reasons.pop("garbage.mp4") == reasons.pop("empty.mp4") == "Invalid data found when processing input"
    assert reasons.pop("no codec.mp4") == "Decoder not found"
    assert reasons.pop("sound.mp4") == "no video stream"
    assert reasons.pop("no frames.avi") == "no frames"
    assert reasons.pop("gone.mp4") == "no such file or folder"
    assert reasons.pop("between frames.mp4") == (
        "truncated: 12 of 24 frames, to 0.56 s of the 0.96 s in its header "
        "(ffmpeg -i FILE -c copy NEW makes a file of what is there)"
    )
    for reason in reasons.values():
        assert reason.startswith(("truncated", "damaged", "Invalid data"))
        assert re.search(r"truncated: \d+ frames, to |frames$", reason)
    assert rows(tmp_path / "out") == ["frames/whole 24 0"]
    assert [path.name for path in (tmp_path / "out" / "frames").iterdir()] == ["whole"]


def test_nothing_good_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "in" / name).write_bytes(b"x" * 100)
    (tmp_path / "list.txt").write_text("an earlier run's")
    line = assert_refused(capsys, tmp_path / "in", "--out", tmp_path, "--label", 0)
    assert "none of 2 videos gave a clip" in line
    assert "a.mp4: Invalid data" in line
    assert not (tmp_path / "list.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["in"], "in/other/b.mp4: no label; put it in a folder"),
        (["in", "--label", "joy"], "'joy' is no label: 0..6 or Happy"),
        (["in", "--label", "7"], "'7' is no label"),
        (["in/other/b.mp4"], "in/other/b.mp4: no label"),
        (["missing"], "missing: no such folder, video or list"),
        (["missing.txt", "--label", "0"], "missing.txt: no such list of videos"),
        (["empty", "--label", "0"], "empty: no videos in it"),
        (["empty.csv", "--label", "0"], "empty.csv: no videos in it"),
        (["bad label.txt"], "bad label.txt:2: 'glad' is no label"),
        (["bad row.txt"], "bad row.txt:1: expected 'path label', got 'x.mp4'"),
        (["binary.txt"], "binary.txt: cannot be read"),
        (["in", "--label", "0", "--clip-length", "0"], "--clip-length"),
        (["in", "--label", "0", "--quality", "101"], "--quality"),
        (["in", "--label", "0", "--workers", "x"], "--workers"),
        (["in", "--label", "0", "--fps", "0"], "--fps: '0' is not a number from 0.1 to 240"),
        (["in", "--label", "0", "--fps", "nan"], "--fps"),
        (["in", "--label", "0", "--margin", "-1"], "--margin"),
        (["in", "--label", "0", "--size", "9"], "--size"),
        (["in", "--label", "0", "--unlabelled"], "not allowed with"),
        (["nul.txt"], "nul.txt:2: no path has a NUL"),
        (["out/unlabelled.txt", "--unlabelled"], "would be overwritten"),
        (["in", "--label", "0", "--out", "binary.txt/out"], "cannot write"),
        (["list.txt", "--out", "."], "would be overwritten"),
        (["in", "--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_are_one_line_and_write_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/Happy/a.mp4", "in/other/b.mp4"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("empty").mkdir()
    for name, text in (
        ("empty.csv", "# no rows\n"),
        ("bad label.txt", "a 0\nb glad\n"),
        ("bad row.txt", "x.mp4\n"),
        ("list.txt", "in/Happy/a.mp4 0\n"),
        ("nul.txt", "a 0\nb\0c 0\n"),
    ):
        Path(name).write_text(text)
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "out"]
    assert says in assert_refused(capsys, *arguments, *out)
    assert sorted(tmp_path.rglob("*")) == before


def test_frames_of_an_earlier_run_go_away(ten: Path, tmp_path: Path) -> None:
    prepare(ten, "--out", tmp_path, "--label", 0)
    (tmp_path / "short").mkdir()
    write_video(tmp_path / "short" / "ten.mp4", 4)
    assert prepare(tmp_path / "short", "--out", tmp_path, "--label", 0) == 0
    assert counter(tmp_path / "frames" / "ten") == [0, 1, 2, 3]
    assert rows(tmp_path) == ["frames/ten 4 0"]


def test_half_done_run_leaves_no_list(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(ten, "--out", tmp_path, "--label", 0, "--quality", 91)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert "No space left" in assert_refused(capsys, ten, "--out", tmp_path, "--label", 0)
    assert not (tmp_path / "list.txt").exists()


def test_workers_change_nothing(ten: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(1, 12):
        (source / f"{number}.mp4").symlink_to(ten)
    (source / "3.mp4").unlink()
    (source / "3.mp4").write_bytes(b"x" * 100)
    arguments = ("scripts/prepare_videos.py", str(source), "--label", "Surprise", "--clip-length", "6", "--no-crop")
    done = run_python(*arguments, "--out", str(tmp_path / "two"), "--workers", "2")
    assert done.returncode == 1
    assert done.stderr == f"prepare_videos: {source}/3.mp4: Invalid data found when processing input\n"
    progress, summary = done.stdout.splitlines()[:-2], done.stdout.splitlines()[-1]
    assert re.fullmatch(r"11/11 videos, [\d.]+ videos/s", progress[-1])
    assert re.fullmatch(r"2/11 videos, [\d.]+ videos/s, about \d+ s left", progress[0])
    assert len(progress) == 10
    assert summary == f"10 of 11 videos, 20 clips, 100 frames: {tmp_path}/two/list.txt"
    assert prepare(*arguments[1:], "--out", tmp_path / "one") == 1
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) == 100 + 10 + len(("list.txt", "report.csv"))
    assert [row.split("/")[1] for row in rows(tmp_path / "two")[:3]] == ["1_c001 6 4", "1_c002 4 4", "2_c001 6 4"]
    assert rows(tmp_path / "two")[-1] == "frames/11_c002 4 4"


def test_progress_on_a_terminal(ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert prepare(ten, "--out", tmp_path, "--label", 0) == 0
    assert "1/1" in sys.stdout.getvalue()
    assert sys.stdout.getvalue().splitlines()[-1].startswith("1 of 1 videos, ")


def test_a_finished_video_is_not_done_again(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.mp4").write_bytes(ten.read_bytes())
    (source / "b.mp4").write_bytes(ten.read_bytes())
    (source / "bad.mp4").write_bytes(b"x" * 100)
    done: list[str] = []
    monkeypatch.setattr(vc, "decode", lambda path, **known: (done.append(path.stem), decode(path, **known))[1])

    def again(*options: object) -> list[str]:
        done.clear()
        assert prepare(source, "--out", out, "--label", 0, *options) == 1
        return list(done)

    assert again() == ["a", "b", "bad"]
    before = content(out)
    capsys.readouterr()
    assert again() == ["bad"]  # it may have been mended
    assert capsys.readouterr().out.startswith("2 of 3 videos were finished before\n")
    assert content(out) == before
    (out / "frames" / "a" / "._00001.jpg").write_bytes(b"of macOS")
    assert again() == ["bad"]
    (out / "frames" / "a" / "._00001.jpg").unlink()
    assert again("--size", 100, "--margin", 1) == ["bad"]  # no crop, so they shape nothing
    assert again("--label", 1) == ["bad"]
    assert rows(out) == ["frames/a 10 1", "frames/b 10 1"]

    assert again("--clip-length", 5) == ["a", "b", "bad"]
    assert sorted(path.name for path in (out / "frames").iterdir()) == ["a_c001", "a_c002", "b_c001", "b_c002"]
    assert again() == ["a", "b", "bad"]
    assert content(out) == before
    for options in (("--quality", 50), ("--fps", 5)):
        assert set(again(*options)) == {"a", "b", "bad"}

    again()
    (out / "frames" / "a" / "00003.jpg").unlink()
    assert again() == ["a", "bad"]
    os.utime(source / "b.mp4", (1, 1))
    assert again() == ["b", "bad"]
    records = sorted((out / "records").iterdir())
    assert len(records) == 2
    records[0].write_text("{")
    assert len(again()) == 2


def test_a_forged_record_removes_nothing_outside(ten: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "1.jpg").touch()
    assert prepare(ten, "--out", tmp_path / "out", "--label", 0) == 0
    (path,) = (tmp_path / "out" / "records").iterdir()
    record = json.loads(path.read_text())
    for clips in ({"../precious": 1}, {"frames/ten/../../../precious": 1}, {"frames/ten_c1/../../../precious": 1}, []):
        record["result"]["clips"] = clips
        path.write_text(json.dumps(record))
        assert prepare(ten, "--out", tmp_path / "out", "--label", 0) == 0
        assert rows(tmp_path / "out") == ["frames/ten 10 0"]
        assert (tmp_path / "precious" / "1.jpg").exists()


def test_a_killed_worker_is_one_line_and_what_is_finished_stays(ten: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(400):
        (source / f"{number}.mp4").symlink_to(ten)
    command = ["scripts/prepare_videos.py", str(source), "--out", str(out), "--label", "0", "--no-crop"]
    command += ["--workers", "2"]
    run = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and len(list(out.glob("records/*.json"))) < 3:
            time.sleep(0.02)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 2
    assert "a worker process died" in errors
    assert len(errors.splitlines()) == 1
    assert not (out / "list.txt").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("records/*.json")}
    assert 3 <= len(finished) < 400
    assert prepare(*command[1:]) == 0
    assert len(rows(out)) == 400
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_interrupted_is_one_line(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "prepare_video", interrupt)
    assert prepare(ten, "--out", tmp_path, "--label", 0) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def nearest(times: Sequence[float], fps: float) -> list[int]:
    """The frames to take, one tick after the other."""
    taken = []
    while len(taken) / fps <= times[-1] - times[0] + 0.25 / fps:
        tick = times[0] + len(taken) / fps
        taken.append(min(range(len(times)), key=lambda i: (round(abs(times[i] - tick), 9), i)))
    return taken


def test_nearest_frames_are_the_nearest() -> None:
    rng = np.random.default_rng(0)
    for fps in (1.0, 10.0, 12.5, 30.0, 100.0):
        times = 5 + np.cumsum(rng.uniform(0.001, 0.3, 40))
        assert np.repeat(np.arange(40), vc.nearest_frames(times, fps)).tolist() == nearest(times, fps)
    for rate in (15.0, 23.976, 25.0, 29.97, 60.0):  # at its own rate each frame once, though files round their times
        times = np.round(np.arange(100) / rate, 3)
        assert vc.nearest_frames(times, rate).tolist() == [1] * 100
        assert vc.nearest_frames(times, 2 * rate).sum() == 199
    assert vc.nearest_frames(np.zeros(1), 30.0).tolist() == [1]
    with pytest.raises(BadVideo, match="time stamps 100,000 s apart"):
        vc.nearest_frames(np.array([0.0, 1e5]), 30.0)


@pytest.mark.parametrize("fps", [2, 10, 25])
def test_constant_frame_rate_from_a_variable_one(fps: int, tmp_path: Path) -> None:
    times = [0, 10, 20, 500, 510, 900, 1700, 1701, 1702, 3000]
    video = write_video(tmp_path / "v.mp4", 10, pts_ms=times)
    assert prepare(video, "--out", tmp_path, "--label", 0, "--fps", fps) == 0
    assert counter(tmp_path / "frames" / "v") == nearest([ms / 1000 for ms in times], fps)
    assert report(tmp_path)["v.mp4"]["frames_decoded"] == "10"


def test_unlabelled_videos_get_a_list_without_labels(
    ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("Happy/a b 1.mp4", "c.mp4"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ten)
    assert prepare(source, "--out", out, "--label", 0) == 0
    (tmp_path / "videos.txt").write_text("in/Happy/a b 1.mp4\n in/c.mp4\n")
    for given, names in ((source, ["Happy/a b 1", "c"]), (tmp_path / "videos.txt", ["in/Happy/a b 1", "in/c"])):
        capsys.readouterr()
        assert prepare(given, "--out", out, "--unlabelled") == 0
        assert (out / "unlabelled.txt").read_text() == "".join(f"frames/{name}\n" for name in names)
        assert not (out / "list.txt").exists()
        said = capsys.readouterr().out
        assert "for prediction, not for training" in said
        assert "train.py" not in said
        assert [row["label"] for row in report(out).values()] == ["", ""]
    prepare(source, "--out", out, "--label", 0)
    assert not (out / "unlabelled.txt").exists()


def test_hostile_names_and_links_stay_inside(ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a" / "in", tmp_path / "out"
    bad = [b"bad\nname \xf0\x9f\x98\x80.mp4", b"not utf-8 \xff.mp4"]
    for name in ("ok \N{GRINNING FACE}.mp4", "x" * 251 + ".mp4", *map(os.fsdecode, bad)):
        (source / "sub").mkdir(parents=True, exist_ok=True)
        (source / "sub" / name).symlink_to(ten)
    for name in bad:
        (source / os.fsdecode(name)).write_bytes(b"x" * 50)
    (source / "sub" / "up\nhere").symlink_to(source)
    (source / "self.mp4").symlink_to("self.mp4")
    os.mkfifo(source / "pipe.mp4")
    assert prepare(source, "--out", out, "--label", 0) == 1
    index = build_index(read_annotations(out / "list.txt"))
    assert index.num_frames.tolist() == [10] * 4
    assert max(len(record.path.name.encode()) for record in index.records) == MAX_NAME
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 5
    assert f"prepare_videos: {source}/sub/up\\nhere: a link in a circle, not followed" in errors
    assert f"prepare_videos: {source}/pipe.mp4: not a file" in errors
    assert (
        f"prepare_videos: {source}/bad\\nname \N{GRINNING FACE}.mp4: Invalid data found when processing input" in errors
    )
    assert len(report(out)) == 6 + 2 - 2  # by name
    before = set(content(tmp_path))
    (source / "list.txt").write_text(f"../../a/../../../{ten} 0\n{os.path.relpath(ten, source)} 1\n{ten} 2\n")
    out = tmp_path / "b" / "out"
    assert prepare(source / "list.txt", "--out", out) == 1
    assert len(rows(out)) == 2
    new = {path for path in set(content(tmp_path)) - before if path != Path("a/in/list.txt")}
    assert all(path.parts[:2] == ("b", "out") for path in new)


def test_monstrous_pictures_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("a frame came out of the decoder")

    monkeypatch.setattr("dfer.video.decode.upright_image", decoded)
    write_video(tmp_path / "in" / "a.mp4", [np.zeros((32, 8200, 3), np.uint8)])
    small = write_video(tmp_path / "small.avi", 3, codec="mjpeg").read_bytes()
    for name, width, height in (("b.avi", 16000, 16000), ("c.avi", 60000, 50000)):  # as the header claims
        data = small.replace(struct.pack("<2i", 64, 48), struct.pack("<2i", width, height))
        data = data.replace(struct.pack(">2H", 48, 64), struct.pack(">2H", height, width))
        (tmp_path / "in" / name).write_bytes(data)
    write_video(tmp_path / "in" / "d.mp4", [np.zeros((32, 8192, 3), np.uint8)])
    with pytest.raises(AssertionError, match="came out"):
        prepare(tmp_path / "in", "--out", tmp_path / "out", "--label", 0)
    (tmp_path / "in" / "d.mp4").unlink()
    write_video(tmp_path / "in" / "d.mp4", 3)
    monkeypatch.undo()
    raw = [write_video(tmp_path / f"{width}.h264", [np.zeros((32, width, 3), np.uint8)] * 9) for width in (64, 8200)]
    (tmp_path / "in" / "e.ts").write_bytes(b"".join(part.read_bytes() for part in raw))  # it grows
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--label", 0) == 1
    errors = [line.split("/")[-1] for line in capsys.readouterr().err.splitlines()]
    assert errors[:2] == [
        "a.mp4: 8200 x 32 pixels, more than 8192 on a side",
        "b.avi: cannot be decoded as mjpeg: damaged, of a kind that FFmpeg does not know, or more than "
        "8192 x 8192 pixels",
    ]
    assert errors[2].startswith("c.avi: ")  # which FFmpeg itself refuses
    assert errors[3] == "e.ts: 8200 x 32 pixels, more than 8192 on a side, after 9 frames"
    assert rows(tmp_path / "out") == ["frames/d 3 0"]


def test_faces_are_cropped_and_the_report_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    one, other, nothing = person(0), person(1), cv2.GaussianBlur(noise(1)[0], (0, 0), 9)
    nothing = cv2.resize(nothing, (224, 224))
    write_video(source / "one.mp4", [one] * 12)
    write_video(source / "two.mp4", [np.hstack([one, other])] * 8)
    write_video(source / "cut.mp4", [nothing] * 6 + [one] * 9)
    write_video(source / "none.mp4", [nothing] * 8)
    assert crop(source, "--out", out, "--label", 3, "--size", 96) == 1
    assert rows(out) == ["frames/cut 9 3", "frames/one 12 3", "frames/two 8 3"]
    table = {name: [*row.values()][1:] for name, row in report(out).items()}
    assert table == {
        "cut.mp4": ["frames/cut", "3", "15", "9", "1", "1", "cut", ""],
        "none.mp4": ["", "3", "8", "0", "0", "0", "no face", ""],
        "one.mp4": ["frames/one", "3", "12", "12", "1", "0", "ok", ""],
        "two.mp4": ["frames/two", "3", "8", "8", "2", "0", "several faces", ""],
    }
    captured = capsys.readouterr()
    assert captured.err == f"prepare_videos: {source}/none.mp4: no face\n"
    assert (
        f"1 with no face, 1 with several faces, 1 with a cut, of which one shot is kept: {out}/report" in captured.out
    )
    images = [np.asarray(Image.open(out / "frames" / "one" / f"{i:05d}.jpg")).astype(int) for i in (1, 12)]
    assert images[0].shape == (96, 96, 3)
    assert np.abs(images[0] - images[1]).mean() < 3  # it stands still
    before = content(out)
    assert crop(source, "--out", out, "--label", 3, "--size", 96) == 1
    assert content(out) == before
    assert crop(source, "--out", tmp_path / "again", "--label", 3, "--size", 96) == 1
    assert content(tmp_path / "again") == before

    crop(source, "--out", out, "--label", 3, "--fps", 12.5, "--clip-length", 4)
    assert rows(out) == ["frames/cut_c001 4 3", "frames/one_c001 4 3", "frames/one_c002 2 3", "frames/two_c001 4 3"]
    capsys.readouterr()
    line = assert_refused(capsys, source / "none.mp4", "--out", out, "--label", 0, run=crop)
    assert line.endswith("none of 1 videos gave a clip; the first: " + f"{source}/none.mp4: no face")


def test_detector_by_its_file(
    ten: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, model = np.zeros((96, 128, 3), np.uint8), tmp_path / "yunet.onnx"
    frame[40:48, 56:64] = 255
    video = write_video(tmp_path / "v.mp4", [frame] * 5)
    arguments = (video, "--out", tmp_path / "out", "--label", 0, "--size", 64, "--margin", 0)
    for tilt in (0.0, 0.6):  # the same name, another content
        model.write_bytes(toy_yunet(tilt))
        vc._detector.cache_clear()  # as in a new process
        assert crop(*arguments, "--detector", model) == 0
        assert rows(tmp_path / "out") == ["frames/v 5 0"]
        header = f"# faces: yunet {hashlib.sha256(toy_yunet(tilt)).hexdigest()[:12]}, eyes level, margin 0\n"
        assert header in (tmp_path / "out" / "list.txt").read_text()
        image = np.asarray(Image.open(tmp_path / "out" / "frames" / "v" / "00003.jpg").convert("L"))
        assert image.shape == (64, 64)
        assert image[30:34, 30:34].min() > 200  # of 32 px the middle 8 are white
        assert (image[24, 24] > 100) == (tilt == 0)  # a corner of the upright block, not of the turned one
        assert image[:20].max() < 60
    assert crop(*arguments, "--detector", model, "--no-level") == 0  # another crop, so made again
    assert ", upright, margin 0\n" in (tmp_path / "out" / "list.txt").read_text()
    image = np.asarray(Image.open(tmp_path / "out" / "frames" / "v" / "00003.jpg").convert("L"))
    assert image[24, 24] > 100
    for bad in (b"nonsense", None):
        model.unlink()
        if bad:
            model.write_bytes(bad)
        line = assert_refused(capsys, *arguments, "--detector", model, run=crop)
        assert f"{model}: " in line
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("DFER_YUNET")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("dfer.video.detectors.YUNET_URL", "http://127.0.0.1:9/nobody.listens")
    capsys.readouterr()
    assert crop(*arguments) == 2  # Haar, which nobody asked for, would make all of it anew
    first, note, line = capsys.readouterr().err.splitlines()
    assert "note: fetching" in first and "note: YuNet's weights cannot be fetched" in note
    assert ": was begun with YuNet, which is not to be had now; --detector haar makes all of it anew with Haar" in line
    assert rows(tmp_path / "out") == ["frames/v 5 0"]
    monkeypatch.setenv("DFER_YUNET", "haar")
    monkeypatch.delattr(cv2, "CascadeClassifier")
    assert "has no Haar detector: install" in assert_refused(capsys, *arguments, run=crop)
    assert (tmp_path / "out" / "list.txt").exists()  # untouched


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
@pytest.mark.parametrize("detector", ["haar", pytest.param(YUNET, marks=needs_yunet)])
def test_real_faces(tmp_path: Path, detector: object) -> None:
    done = run_python(
        "scripts/prepare_videos.py", str(REAL), "--out", str(tmp_path), "--label", "0", DFER_YUNET=str(detector)
    )
    assert done.returncode == 1
    assert ("Haar cascade, which sees frontal ones only" in done.stdout) == (detector == "haar")
    without = ["h264_10bits.mp4", "h265_10bits.mp4", "no_face.mp4"]
    assert done.stderr.splitlines() == [f"prepare_videos: {REAL}/{name}: no face" for name in without]
    assert rows(tmp_path) == ["frames/face_noface 72 0", "frames/single_face 72 0"]  # the cut is at frame 72
    table = report(tmp_path)
    assert [table[name]["outcome"] for name in without] == ["no face"] * 3
    assert [row["frames_decoded"] for row in table.values()] == ["169", "30", "30", "95", "72"]
    assert (table["face_noface.mov"]["outcome"], table["single_face.mp4"]["outcome"]) == ("cut", "ok")
    for clip in ("face_noface", "single_face"):
        for frame in ("00001.jpg", "00072.jpg"):
            image = np.asarray(Image.open(tmp_path / "frames" / clip / frame)).astype(int)
            assert image.shape == (224, 224, 3)
            cheeks = image[120:150, [*range(75, 95), *range(130, 150)]].mean(axis=(0, 1))
            assert cheeks[0] > cheeks[1] + 20 > cheeks[2] + 20
            again = make_detector(None if detector == "haar" else YUNET)
            assert again(np.pad(image.astype(np.uint8), ((50, 50), (50, 50), (0, 0)))).shape == (1, 4)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
def test_the_box_of_a_real_face_is_steady() -> None:
    frames = ((moment, np.asarray(image)) for moment, image in decode(REAL / "single_face.mp4"))
    found = find_face(frames, make_detector())
    assert (found.faces_at_once, found.cuts) == (1, 0)
    x, y, side, tilt = found.boxes.T
    assert len(x) == 72
    shift = np.hypot(np.diff(x), np.diff(y)) / side[1:]
    assert np.median(shift) < 0.003
    assert shift.max() < 0.01
    assert np.abs(np.diff(side) / side[1:]).max() < 0.01
    assert not tilt.any()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
def test_real_videos(tmp_path: Path) -> None:
    assert prepare(REAL, "--out", tmp_path, "--label", 0, "--quality", 75) == 0
    index = build_index(read_annotations(tmp_path / "list.txt"))
    counts = {
        os.path.basename(record.path): count for record, count in zip(index.records, index.num_frames, strict=True)
    }
    assert counts == {"face_noface": 169, "h264_10bits": 30, "h265_10bits": 30, "no_face": 95, "single_face": 72}
    assert index.num_miscounted() == 0
    with Image.open(tmp_path / "frames" / "single_face" / "00060.jpg") as image:
        assert image.size == (640, 360)
        cheek, shirt = (np.asarray(image).astype(int)[y, x] for y, x in ((200, 255), (345, 290)))
        assert cheek[0] > cheek[1] + 20 > cheek[2] + 20
        assert shirt.max() < 50


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
def test_real_videos_become_predictions(tmp_path: Path) -> None:
    videos = [f"{REAL}/{name} {label}" for name, label in (("single_face.mp4", 0), ("face_noface.mov", 4))]
    (tmp_path / "videos.txt").write_text("\n".join(videos))
    out = tmp_path / "clips"
    done = run_python(
        "scripts/prepare_videos.py", str(tmp_path / "videos.txt"), "--out", str(out), "--clip-length", "24"
    )
    assert done.returncode == 0, done.stderr
    clips = rows(out)
    assert len(clips) == 3 + 3  # of the other video only the half with the face
    lists = ("--data.train-list", str(out / "list.txt"), "--data.val-list", str(out / "list.txt"))
    logs = ("--run.log-dir", str(tmp_path / "logs"), "--run.name", "real")
    done = run_python("train.py", "debug", *lists, *logs, "--data.batch-size", "5", "--optim.epochs", "1")
    assert done.returncode == 0, done.stderr
    predictions = tmp_path / "predictions.csv"
    checkpoint = str(tmp_path / "logs" / "real")
    done = run_python("scripts/evaluate.py", checkpoint, "--list", str(out / "list.txt"), "--out", str(predictions))
    assert done.returncode == 0, done.stderr
    written = [line.split(",")[:2] for line in predictions.read_text().splitlines()[1:]]
    assert written == [[name, label] for name, _, label in (row.rsplit(maxsplit=2) for row in clips)]
