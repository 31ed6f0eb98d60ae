"""Some frames of a video are, to the bit, those of a full decode, and no more is decoded than they need."""

import contextlib
import functools
import gc
import itertools
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dali_pipes import ffmpeg, ffmpeg_loop, kernels, video_stream
from dali_pipes.ffmpeg import read_clip, read_planar, videos_of
from dali_pipes.ffmpeg_loop import Videos
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.planar import fused
from dali_pipes.video_files import VideoFiles
from dfer.cli import say_once
from dfer.lists.index import load_index
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.plan.sampling import ClipSampler
from dfer.video import random_access as ra
from dfer.video.colour import EXACT, yuv_to_rgb
from dfer.video.decode import BadVideo, decode, decode_frames
from dfer.video.random_access import VideoScan, read_frames, scan_video
from tests.conftest import ROOT

F, W, H = 50, 64, 48
X265 = "log-level=none:pools=none:frame-threads=1:wpp=0:"  # with threads it crashes once in a thousand videos
B_FRAMES = {"x264-params": "keyint=20:bframes=3:b-adapt=0:b-pyramid=none"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=1:bframes=3:b-adapt=0:b-pyramid=2:scenecut=0"}
OPEN_HEVC = {"x265-params": X265 + "open-gop=1:keyint=12:bframes=4:scenecut=0"}
FAST_START = {"movflags": "faststart"}
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "15"}
VPX_HIDDEN = {"deadline": "good", "cpu-used": "5", "g": "15", "auto-alt-ref": "1", "lag-in-frames": "16"}

# What decodes only what it must ...
QUICK = {
    "h264 closed GOP": ("libx264", "mp4", {"x264-params": "keyint=12:bframes=0:scenecut=0"}),
    "h264 B-frames": ("libx264", "mp4", B_FRAMES),
    "h264 B-frames mov": ("libx264", "mov", B_FRAMES),
    "h264 B-frames mkv": ("libx264", "mkv", B_FRAMES),
    "h264 pyramid": ("libx264", "mp4", {"x264-params": "keyint=25:bframes=7:b-adapt=0:b-pyramid=2"}),
    "h264 open GOP mp4": ("libx264", "mp4", OPEN_GOP),
    "h264 open GOP mkv": ("libx264", "mkv", OPEN_GOP),
    "h264 short open GOP": ("libx264", "mp4", {"x264-params": "open-gop=1:keyint=4:min-keyint=1:bframes=5:b-adapt=0"}),
    "h264 long GOP": ("libx264", "mkv", {"x264-params": "keyint=250:bframes=3:scenecut=0"}),
    "h264 intra": ("libx264", "mp4", {"g": "1"}),
    "h264 intra refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:keyint=12:bframes=2"}),
    "h264 baseline": ("libx264", "mp4", {"profile": "baseline", "g": "12"}),
    "hevc open GOP mp4": ("libx265", "mp4", OPEN_HEVC),
    "hevc open GOP mkv": ("libx265", "mkv", OPEN_HEVC),
    "hevc pyramid": ("libx265", "mp4", {"x265-params": X265 + "keyint=250:bframes=8:b-adapt=0:b-pyramid=1"}),
    "hevc layers": ("libx265", "mp4", {"x265-params": X265 + "keyint=20:bframes=4:temporal-layers=3"}),
    "av1 mp4": ("libsvtav1", "mp4", {"preset": "12", "svtav1-params": "keyint=16:lp=1"}),
    "av1 webm": ("libsvtav1", "webm", {"preset": "12", "svtav1-params": "keyint=16:irefresh-type=1:lp=1"}),
    "vp8 webm": ("libvpx", "webm", VPX),
    "vp8 hidden frames": ("libvpx", "webm", VPX_HIDDEN),
    "vp9 webm": ("libvpx-vp9", "webm", VPX),
    "vp9 hidden frames": ("libvpx-vp9", "mp4", VPX_HIDDEN),
    "mpeg4 mp4": ("mpeg4", "mp4", {"g": "12", "bf": "2"}),
    "mpeg4 mkv": ("mpeg4", "mkv", {"g": "12", "bf": "0", "flags": "+mv4"}),
    "mpeg2 mkv": ("mpeg2video", "mkv", {"g": "12", "bf": "2"}),
    "mjpeg mov": ("mjpeg", "mov", {}),
}
# ... and what is decoded from its first frame on.
COUNTED = {
    "mpeg4 avi": ("mpeg4", "avi", {"g": "12", "bf": "2"}),
    "mjpeg avi": ("mjpeg", "avi", {}),
    "h264 avi": ("libx264", "avi", B_FRAMES),
    "h264 ts": ("libx264", "ts", B_FRAMES),
    "h264 raw": ("libx264", "h264", OPEN_GOP),
    "h264 interlaced": ("libx264", "mp4", {"flags": "+ildct+ilme", "g": "12"}),
    "mpeg2 mpg": ("mpeg2video", "mpg", {"g": "12", "bf": "2"}),
    "flv": ("flv", "flv", {}),
    "raw mkv": ("rawvideo", "mkv", {}),  # the container holds a tag of the codec, as for an AVI in it
}
CONSTANT = ("mpeg2video", "flv", "rawvideo", "avi", "mpg", "h264")  # codecs and containers without time stamps
RATES = [(name, True) for name in QUICK | COUNTED]
RATES += [(name, False) for name, (codec, suffix, _) in (QUICK | COUNTED).items() if not {codec, suffix} & {*CONSTANT}]

SIZE = 20  # of a clip's pictures
PARAMETERS = np.zeros(kernels.NUM_PARAMETERS, np.float32)  # a crop, mirrored, of colours that are mixed
PARAMETERS[kernels.BOX : kernels.WARP] = 0.1, 0.15, 0.8, 0.7, 1
PARAMETERS[[kernels.WARP, kernels.WARP + 4]] = 1
PARAMETERS[kernels.COLOUR : kernels.YUV] = np.eye(3, 4).ravel() + 0.1
PARAMETERS[kernels.YUV : kernels.CHROMA_LEFT] = yuv_to_rgb("bt601", False).ravel()


def picture(number: int, height: int = H, width: int = W) -> np.ndarray:
    """A moving pattern, and the number in blocks of 8 x 8, black and white."""
    rng = np.random.default_rng(number // 20)  # the scene changes
    noise = Image.fromarray(rng.integers(0, 256, (6, 16, 3), dtype=np.uint8))
    scene = np.asarray(noise.resize((2 * width, height), Image.Resampling.BICUBIC))
    image = scene[:, 2 * number % width :][:, :width].copy()
    for bit in range(8):
        image[:8, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    return image


def number_of(frame: np.ndarray) -> int:
    """The number in a picture, from its luma or any colour."""
    return sum(int(frame[2:6, 8 * bit + 2 : 8 * bit + 6, 0].mean() > 127) << bit for bit in range(8))


def write(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    pts: Sequence[int] = range(0, 40 * F, 40),  # ms
    pixels: str = "yuv420p",
    turn: tuple = (),
    audio: bool = False,
    container: dict[str, str] | None = None,
    **colours: int,
) -> Path:
    pictures = [picture(i) for i in range(len(pts))] if pictures is None else pictures
    whole = codec in CONSTANT or path.suffix[1:] in CONSTANT
    unit = Fraction(1, 25) if whole else Fraction(1, 1000)
    with av.open(str(path), "w", container_options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pixels
        stream.codec_context.time_base, stream.codec_context.thread_count = unit, 1
        if turn:
            stream.set_display_rotation(*turn)
        for name, value in colours.items():
            setattr(stream.codec_context, name, value)
        if audio:
            sound = file.add_stream("aac", rate=8000)
        for time, image in zip(pts, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base, frame.pts = unit, time // 40 if whole else time
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8 * pts[-1]), np.float32), "fltp", "mono")
            samples.sample_rate, samples.pts = 8000, 0
            file.mux(sound.encode(samples))
            file.mux(sound.encode())
    return path


def sequential(path: Path) -> Iterator[np.ndarray]:
    """The stupid oracle: decode everything, in order; planes of 8-bit 4:2:0, RGB of all else."""
    with av.open(str(path)) as file:
        images = None
        for i, frame in enumerate(file.decode(file.streams.best("video"))):
            turned = any(True for data in frame.side_data if data.type.name == "DISPLAYMATRIX")
            if frame.format.name in ("yuv420p", "yuvj420p") and not (frame.width % 2 or frame.height % 2 or turned):
                yield frame.to_ndarray()[:, :, None]
            else:
                images = images or [np.asarray(image) for _, image in decode(path)]
                yield images[i]


def videos_of_one(path: Path, scan: VideoScan) -> Videos:
    first, number = np.array([0, len(scan.pts)]), np.ones(1, np.int32)
    texts = np.array([scan.codec]), np.array([scan.matrix])
    sides = number * scan.height, number * scan.width
    return videos_of([path], VideoStore(first, scan.pts, scan.key, *sides, *texts, np.array([scan.full_range])))


def read(path: Path, scan: VideoScan, frames: Sequence[int], compiled: bool = False) -> list[np.ndarray]:
    """By Python; what compiled code gives must be the same. `compiled`: and it must give something."""
    numbers, videos = np.array(frames, dtype=np.int64), videos_of_one(path, scan)
    planar = read_planar(videos, 0, numbers)
    clip = np.full((len(frames), SIZE, SIZE, 3), np.nan, np.float32)
    assert read_clip(videos, 0, numbers, clip, PARAMETERS) == (planar is not None)
    try:
        found = read_frames(path, scan.pts, scan.key, numbers, scan.matrix, scan.full_range)
    except Exception:
        assert planar is None
        raise
    assert planar is not None or not compiled
    if planar is not None:
        pictures, which = planar
        assert len(pictures) == len({*frames})
        picture = np.empty_like(clip[0])
        for frame, number, made in zip(found, which.tolist(), clip, strict=True):
            assert np.array_equal(frame, pictures[number])
            fused(picture, frame, PARAMETERS)
            assert np.array_equal(made, picture)
    return found


def assert_read(
    path: Path, scan: VideoScan, truth: Sequence[np.ndarray], frames: Sequence[int], compiled: bool = False
) -> None:
    found = read(path, scan, frames, compiled)
    assert len(found) == len(frames)
    for number, frame in zip(frames, found, strict=True):
        assert frame.dtype == np.uint8 and frame.flags.c_contiguous
        assert np.array_equal(frame, truth[number]), (number, list(frames))


def choices(total: int, seed: int) -> list[list[int]]:
    """First, last, all, one each, and random numbers, which may repeat."""
    rng = np.random.default_rng(seed)
    some = [np.sort(rng.integers(0, total, size)).tolist() for size in (1, 2, 3, 5, 8, 16, 16, 40)]
    near = [[start, min(start + 1, total - 1)] for start in rng.integers(0, total, 6).tolist()]
    return [[0], [total - 1], list(range(total)), [0, total - 1], *some, *near]


def never(*_: object) -> None:
    raise AssertionError("decoded from the first frame on")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may fall back on decoding everything, in reading."""
    monkeypatch.setattr(ra, "_read_all", never)


@pytest.fixture(scope="module")
def b_frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("b") / "b.mp4", options=B_FRAMES)


@pytest.mark.parametrize("name, constant", RATES)
def test_frames_are_those_of_a_full_decode(
    name: str, constant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, suffix, options = (QUICK | COUNTED)[name]
    pts = range(0, 40 * F, 40) if constant else np.cumsum(np.random.default_rng(0).integers(7, 90, F)).tolist()
    path = write(tmp_path / f"v.{suffix}", codec, options, pts=pts)
    scan = scan_video(path)
    truth = list(sequential(path))
    assert len(truth) == len(scan.pts) == len(scan.key) == F
    assert [number_of(frame) for frame in truth] == list(range(F))
    assert (scan.height, scan.width) == (H, W) and scan.full_range == (codec == "mjpeg")
    assert scan.matrix == "bt601" and bool(scan.key.any()) == (name in QUICK)
    if name in QUICK:
        assert np.array_equal(np.diff(scan.pts) > 0, np.full(F - 1, True)) and scan.key[0]
        monkeypatch.setattr(ra, "_read_all", never)
    for frames in choices(F, seed=len(name)):
        assert_read(path, scan, truth, frames, compiled=name in QUICK)


@pytest.mark.parametrize("name", ["h264 B-frames", "vp8 hidden frames", "mpeg4 mp4", "h264 ts"])
def test_a_scan_and_decode_agree(name: str, tmp_path: Path) -> None:
    codec, suffix, options = (QUICK | COUNTED)[name]
    path = write(tmp_path / f"v.{suffix}", codec, options, pts=range(400, 400 + 40 * F, 40))
    scan = scan_video(path)
    with av.open(str(path)) as file:
        unit = float(file.streams.video[0].time_base)
    times, images = zip(*decode(path), strict=True)
    np.testing.assert_allclose(scan.pts * unit, times, atol=1e-9)
    rgb = yuv_to_rgb(scan.matrix, scan.full_range)
    differences = []
    for planar in read(path, scan, range(F)):
        chroma = planar[H:].reshape(2, H // 2, W // 2).repeat(2, axis=1).repeat(2, axis=2)
        pixels = np.concatenate([planar[:H], chroma.transpose(1, 2, 0)], axis=2) @ rgb[:, :3].T + rgb[:, 3]
        differences.append([np.abs(pixels.clip(0, 255) - np.asarray(image)).mean() for image in images])
    assert np.argmin(differences, axis=1).tolist() == list(range(F))  # not 0, as chroma is upsampled otherwise


def test_no_more_is_decoded_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    options = {"x264-params": "keyint=10:min-keyint=10:scenecut=0:bframes=2:b-adapt=0:b-pyramid=none"}
    path = write(tmp_path / "v.mp4", options=options, pts=range(0, 40 * 200, 40))
    scan = scan_video(path)
    add, came = ra._WantedFrames.add, []

    def counting(taken: ra._WantedFrames, time: int, frame: av.VideoFrame) -> None:
        came.append(time)
        add(taken, time, frame)

    monkeypatch.setattr(ra._WantedFrames, "add", counting)
    # GOPs of I BBP BBP BBP in display order: wanted is the last frame but one before a keyframe, a B-frame.
    for frames, most in (([0], 1), ([10], 1), ([150], 1), ([40, 150], 2), ([199], 4), ([7], 5), ([107], 5)):
        came.clear()
        read(path, scan, frames)
        assert len(came) <= most, (frames, len(came))
    path = write(path, options=OPEN_GOP)
    came.clear()
    read(path, scan_video(path), range(F))
    assert len(came) == F  # none twice, though frames of one GOP are stored in the next


def test_no_more_is_read_than_needed(tmp_path: Path, quick: None) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    pictures = list(np.random.default_rng(0).integers(0, 256, (F, 192, 256, 3), dtype=np.uint8))
    for suffix in ("mp4", "mkv"):
        path = write(tmp_path / f"v.{suffix}", "mjpeg", pictures=pictures)
        scan = scan_video(path)
        before = bytes_read()
        read(path, scan, [3, 45])  # three times: to frames, and by compiled code to planes and to pictures
        assert bytes_read() - before < 3 / 4 * path.stat().st_size


def test_a_long_gap_is_not_read(tmp_path: Path, quick: None) -> None:
    """The file is gone between two keyframes, and nobody notices."""
    path = write(tmp_path / "v.mp4", options={"x264-params": "keyint=10:scenecut=0"}, container=FAST_START)
    scan, truth = scan_video(path), list(sequential(path))
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for pos, size in packets[10:40]:
        data[pos : pos + size] = bytes(size)
    path.write_bytes(data)
    assert_read(path, scan, truth, [0, 3, 9, 41, 49], compiled=True)


def test_frames_that_nobody_wants_are_not_decoded(b_frames: Path, tmp_path: Path) -> None:
    """They may be damaged, if no other frame refers to them."""
    scan, truth = scan_video(b_frames), list(sequential(b_frames))
    with av.open(str(b_frames)) as file:
        times = [packet.pts for packet in file.demux(video=0) if packet.size]
    kinds = [int(frame.pict_type) for _, frame in decode_frames(b_frames)]
    path, seen = tmp_path / "v.mp4", 0
    for number in np.flatnonzero(np.array(kinds) == 3).tolist()[::5]:  # B-frames
        (data,) = damages(b_frames, [times.index(scan.pts[number])], 0xFF)
        path.write_bytes(data)
        try:
            read(path, scan, [number])
        except (BadVideo, av.FFmpegError):
            others = [other for other in range(F) if other != number]
            assert_read(path, scan, truth, others, compiled=True)
            seen += 1
    assert seen > 1


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
@pytest.mark.parametrize("start", [7000, 123])
def test_a_stream_may_start_late(suffix: str, start: int, tmp_path: Path, quick: None) -> None:
    codec, options = ("libvpx-vp9", VPX) if suffix == "webm" else ("libx264", B_FRAMES)
    path = write(tmp_path / f"v.{suffix}", codec, options, pts=range(start, start + 40 * F, 40))
    scan, truth = scan_video(path), list(sequential(path))
    assert len(truth) == len(scan.pts) == F
    for frames in choices(F, seed=start):
        assert_read(path, scan, truth, frames, compiled=True)


@pytest.mark.parametrize("skipped", [1, 5, 13, 20, 21, 33])
def test_what_an_edit_list_cuts_off_is_no_frame(skipped: int, b_frames: Path, tmp_path: Path, quick: None) -> None:
    data = bytearray(b_frames.read_bytes())
    place = data.index(b"elst") + 12  # after tag, version and count: duration in ms, start in the media's unit
    duration, start = struct.unpack(">Ii", data[place : place + 8])
    with av.open(str(b_frames)) as file:
        frame = int(Fraction(1, 25) / file.streams.video[0].time_base)
    data[place : place + 8] = struct.pack(">Ii", duration - 40 * skipped, start + skipped * frame)
    path = tmp_path / "v.mp4"
    path.write_bytes(data)
    scan, truth = scan_video(path), list(sequential(path))
    assert len(scan.pts) == len(truth) == F - skipped
    assert [number_of(frame) for frame in truth] == list(range(skipped, F))
    for frames in choices(F - skipped, seed=skipped):
        assert_read(path, scan, truth, frames, compiled=True)


@pytest.mark.parametrize("options", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov+default_base_moof"])
def test_fragments(options: str, tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", options=B_FRAMES, container={"movflags": options})
    scan, truth = scan_video(path), list(sequential(path))
    for frames in choices(F, seed=0):
        assert_read(path, scan, truth, frames, compiled=True)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_a_cut_may_begin_with_frames_that_cannot_be_decoded(
    codec: str, suffix: str, skipped: int, tmp_path: Path
) -> None:
    whole = write(tmp_path / f"whole.{suffix}", codec, OPEN_GOP if codec == "libx264" else OPEN_HEVC)
    path = tmp_path / f"cut.{suffix}"
    with av.open(str(path), "w") as file, av.open(str(whole)) as source:
        stream = file.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second + skipped :]:
            packet.stream = stream
            file.mux(packet)
    scan, truth = scan_video(path), list(sequential(path))
    assert 0 < len(scan.pts) == len(truth) < F
    for frames in choices(len(truth), seed=0):
        assert_read(path, scan, truth, frames)


def test_a_recovery_that_takes_time_is_no_place_to_start(tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", options={"x264-params": "intra-refresh=1:keyint=10:bframes=0:scenecut=0"})
    with av.open(str(path)) as file:
        assert sum(packet.is_keyframe for packet in file.demux(video=0)) > 3
    assert np.flatnonzero(scan_video(path).key).tolist() == [0]
    path = write(tmp_path / "v.mp4", options=OPEN_GOP)  # here it takes none
    assert scan_video(path).key.sum() > 3
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x06\x06\x01\xc4", b"\x06\x06\x01\x84"))  # not an exact one
    scan, truth = scan_video(path), list(sequential(path))
    assert np.flatnonzero(scan.key).tolist() == [0]
    for frames in choices(F, seed=0):
        assert_read(path, scan, truth, frames)


@pytest.mark.parametrize(
    "units, starts",
    [
        (["65 88"], True),  # IDR
        (["41 88", "65 88"], False),
        (["09 10", "06 06 01 c4 80", "41 88"], True),  # recovery point: 0 frames, exact
        (["06 06 01 84 80", "41 88"], False),  # not exact
        (["06 06 01 e4 80", "41 88"], False),  # a broken link
        (["06 06 01 58 80", "41 88"], False),  # 1 frame
        (["41 88", "06 06 01 c4 80"], False),  # of the next picture
        (["06 01 02 06 06 06 01 c4 80", "41 88"], True),  # another message before it
        (["06 01 04 00 00 03 01 06 06 01 c4 80", "41 88"], True),  # which is 00 00 01 06, escaped
        (["06 05 ff 01" + 256 * " 06" + " 06 01 c4 80", "41 88"], True),  # a long one
        (["06 05 02 06 06 80", "06", "41 88"], False),  # none
        ([], False),
    ],
)
def test_where_h264_may_start(units: list[str], starts: bool) -> None:
    for prefix in (2, 4):
        decoder = av.CodecContext.create("h264", "r")
        decoder.extradata = bytes([1, 100, 0, 10, 0xFC | prefix - 1])
        data = b"".join(len(unit).to_bytes(prefix, "big") + unit for unit in map(bytes.fromhex, units))
        packet = av.Packet(data)
        assert not ra._is_start(packet, decoder)
        packet.is_keyframe = True
        assert ra._is_start(packet, decoder) == starts


def test_a_seek_may_land_early_but_not_late(b_frames: Path) -> None:
    start = int(scan_video(b_frames).pts[20])
    with av.open(str(b_frames)) as file:
        packets = file.demux(video=0)
        assert next(itertools.dropwhile(functools.partial(ra._is_before, start), packets)).pts == start
        with pytest.raises(ra._Unseekable):
            next(itertools.dropwhile(functools.partial(ra._is_before, start), packets))


def test_hidden_frames_are_none(tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.webm", "libvpx", VPX)
    data, hidden = path.read_bytes(), (3, 4, 17, 30, F - 1)
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for number in hidden:
        packet = packets[number]
        assert packet[0] & 16 and data.count(packet) == 1  # VP8's show_frame
        data = data.replace(packet, bytes([packet[0] ^ 16]) + packet[1:])
    path.write_bytes(data)
    scan, truth = scan_video(path), list(sequential(path))
    assert len(scan.pts) == len(truth) == F - len(hidden)
    for frames in choices(len(truth), seed=0):
        assert_read(path, scan, truth, frames)


def test_times_that_are_equal_do_not_tell_frames_apart(tmp_path: Path) -> None:
    source = write(tmp_path / "source.mp4", options={"g": "1"})
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as file, av.open(str(source)) as part:
        stream = file.add_stream_from_template(part.streams.video[0])
        for number, packet in enumerate(part.demux(video=0)):
            if packet.size:
                packet.stream, packet.time_base = stream, Fraction(1, 1000)
                packet.pts = packet.dts = 40 * (number // 2)
                file.mux(packet)
    scan, truth = scan_video(path), list(sequential(path))
    assert len(scan.pts) == len(truth) == F and (np.diff(scan.pts) > 0).all() and not scan.key.any()
    for frames in choices(F, seed=0):
        assert_read(path, scan, truth, frames)


def test_frames_of_lower_layers_are_not_skipped(tmp_path: Path, quick: None) -> None:
    """HEVC calls frames non-reference that none of their own layer refers to."""
    path = write(tmp_path / "v.mp4", "libx265", {"x265-params": X265 + "keyint=50:bframes=0:ref=1:scenecut=0"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        for packet in file.demux(video=0):
            if packet.size and not packet.is_keyframe:
                assert data[packet.pos + 4] >> 1 == 1  # TRAIL_R ...
                data[packet.pos + 4] = 0  # ... now TRAIL_N
    record = data.index(b"hvcC") + 4
    assert data[record + 21] >> 3 & 7 == 1
    data[record + 21] += 1 << 3  # two layers
    truth = list(sequential(path))
    path.write_bytes(data)
    for found, expected in zip(sequential(path), truth, strict=True):
        assert np.array_equal(found, expected)
    scan = scan_video(path)
    for frames in choices(F, seed=0):
        assert_read(path, scan, truth, frames, compiled=True)
    data[record + 21] -= 1 << 3  # a lie: this is what would come of it
    path.write_bytes(data)
    with pytest.raises(AssertionError):
        assert_read(path, scan, truth, [F - 1])


@pytest.mark.parametrize("codec, suffix", [("libx264", "mp4"), ("libx264", "mkv"), ("mpeg4", "avi"), ("mjpeg", "mov")])
@pytest.mark.parametrize("between", [True, False])
def test_a_truncated_file_gives_no_wrong_frames(codec: str, suffix: str, between: bool, tmp_path: Path) -> None:
    options = {"g": "10", "bf": "2"} if codec == "libx264" else {}
    container = {"cluster_size_limit": "2000"} if suffix == "mkv" else FAST_START
    path = write(tmp_path / f"v.{suffix}", codec, options, container=container)
    scan, truth, data = scan_video(path), list(sequential(path)), path.read_bytes()
    with av.open(str(path)) as file:
        pos, size = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size][F // 2]
    path.write_bytes(data[: pos if between else pos + size - 2])
    with pytest.raises((BadVideo, av.FFmpegError)):
        scan_video(path)
    good = 0
    for number in range(F):
        try:
            (frame,) = read(path, scan, [number])
        except (BadVideo, av.FFmpegError):
            continue
        assert np.array_equal(frame, truth[number])
        good += 1
    assert F // 2 - 8 < good <= F // 2 + 1


@pytest.mark.parametrize("name", ["h264 B-frames", "hevc open GOP mp4", "vp9 webm", "mpeg4 mp4"])
def test_a_damaged_file_gives_what_a_full_decode_gives(name: str, tmp_path: Path) -> None:
    codec, suffix, options = QUICK[name]
    path = write(tmp_path / f"v.{suffix}", codec, options)
    scan, compared = scan_video(path), 0
    for damage in damages(path, packets=range(1, F, 3), bits=1):
        path.write_bytes(damage)
        truth, _ = decodable(path)
        for number in range(1, F, 7):
            frames = [number - 1, number]
            try:
                found = read(path, scan, frames)
            except (BadVideo, av.FFmpegError):
                continue
            for i, frame in zip(frames, found, strict=True):
                if (expected := truth.get(int(scan.pts[i]))) is not None:
                    assert np.array_equal(frame, expected)
                    compared += 1
    assert compared > 50


def test_no_frame_that_needs_a_damaged_one_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", options={"x264-params": "keyint=250:bframes=0:scenecut=0:cabac=0"})
    scan, refused = scan_video(path), 0
    for damage in damages(path, packets=range(1, 30, 3), bits=0xFF):
        path.write_bytes(damage)
        truth, error = decodable(path)
        for number in range(len(truth) if error else F, F):
            with pytest.raises((BadVideo, av.FFmpegError)):
                read(path, scan, [number])
            refused += 1
    assert refused > 150


def damages(path: Path, packets: Sequence[int], bits: int) -> Iterator[bytes]:
    """The file with one of these packets damaged: bits turned over in a byte of its second half, or in all of it."""
    rng, data = np.random.default_rng(0), path.read_bytes()
    with av.open(str(path)) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for pos, size in (places[i] for i in packets):
        damaged = np.frombuffer(data, np.uint8).copy()
        half = damaged[pos + size // 2 : pos + size]
        half[slice(None) if bits == 0xFF else rng.integers(len(half))] ^= bits
        yield damaged.tobytes()


def decodable(path: Path) -> tuple[dict[int, np.ndarray], Exception | None]:
    """The frames, by time, before the first that is damaged, and what is said of that."""
    frames = {}
    try:
        for _, frame in decode_frames(path):
            frames[frame.pts] = frame.to_ndarray()[:, :, None]
    except (BadVideo, av.FFmpegError) as error:
        return frames, error
    return frames, None


@pytest.mark.parametrize("wrong", ["no keyframe", "all keyframes", "shifted"])
def test_a_wrong_scan_gives_no_wrong_frames(wrong: str, b_frames: Path) -> None:
    scan, truth = scan_video(b_frames), list(sequential(b_frames))
    pts, key = scan.pts, scan.key
    if wrong == "no keyframe":
        key = np.zeros_like(key)
    elif wrong == "all keyframes":
        key = np.ones_like(key)
    else:
        pts = pts + 1
    for frames in choices(F, seed=0):
        numbers = np.array(frames)
        if wrong == "shifted":
            with pytest.raises(BadVideo, match=rf"^frame {frames[0]} does not come out of the decoder$"):
                read_frames(b_frames, pts, key, numbers, scan.matrix, scan.full_range)
        else:
            found = read_frames(b_frames, pts, key, numbers, scan.matrix, scan.full_range)
            assert all(np.array_equal(frame, truth[i]) for i, frame in zip(frames, found, strict=True))


@pytest.mark.parametrize(
    "codec, suffix", [("libx264", "mp4"), ("libx265", "mkv"), ("libvpx", "webm"), ("mpeg4", "avi")]
)
def test_a_single_frame(codec: str, suffix: str, tmp_path: Path) -> None:
    options = {"x265-params": X265 + "bframes=0"} if codec == "libx265" else None  # else its time stamps are garbage
    path = write(tmp_path / f"v.{suffix}", codec, options, pts=[0])
    scan = scan_video(path)
    assert len(scan.pts) == 1
    assert_read(path, scan, list(sequential(path)), [0, 0, 0])


def test_repeated_frames_share_memory_and_none_is_nothing(b_frames: Path, quick: None) -> None:
    scan = scan_video(b_frames)
    one, same, other = read(b_frames, scan, [7, 7, 9])
    assert one is same and one is not other
    assert one.flags.writeable and read(b_frames, scan, []) == []


@pytest.mark.parametrize(
    "codec, pixels, size",
    [
        ("libx264", "yuv420p10le", (H, W)),
        ("libx264", "yuv422p", (H, W)),
        ("libx264", "yuv444p", (H, W)),
        ("ffv1", "gray", (H, W)),
        ("ffv1", "bgr0", (H, W)),
        ("libvpx-vp9", "yuv420p", (H - 1, W)),
        ("libvpx-vp9", "yuv420p", (H, W - 1)),
    ],
)
def test_other_pixels_come_as_rgb(codec: str, pixels: str, size: tuple[int, int], tmp_path: Path, quick: None) -> None:
    pictures = [picture(i, *size) for i in range(12)]
    path = write(tmp_path / "v.mkv", codec, pictures=pictures, pts=range(0, 480, 40), pixels=pixels)
    scan, images = scan_video(path), [np.asarray(image) for _, image in decode(path)]
    assert (scan.height, scan.width) == size and images[0].shape == (*size, 3)
    assert_read(path, scan, images, [0, 3, 3, 5, 11])


@pytest.mark.parametrize("turn", [(90,), (180,), (270,), (0, True), (0, False, True), (90, True)])
def test_turned_frames_come_upright(turn: tuple, tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", options=B_FRAMES, pts=range(0, 480, 40), turn=turn)
    scan, images = scan_video(path), [np.asarray(image) for _, image in decode(path)]
    assert (scan.height, scan.width) == images[0].shape[:2] == ((W, H) if turn[0] % 180 else (H, W))
    assert_read(path, scan, images, [0, 2, 11])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_notes_that_pyav_does_not_know_leave_a_picture_as_it_is(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x10F], exif[0x112] = "Camera", orientation
    path, plain = tmp_path / f"exif.{suffix}", tmp_path / f"plain.{suffix}"
    Image.fromarray(picture(1)).save(path, exif=exif)
    Image.fromarray(picture(1)).save(plain)
    (image,), (upright,) = ([np.asarray(image) for _, image in decode(p)] for p in (path, plain))
    turned = {1: upright, 4: upright[::-1], 6: np.rot90(upright, -1)}[orientation]
    assert np.array_equal(image, turned) and (scan_video(path).height, scan_video(path).width) == turned.shape[:2]


@pytest.mark.parametrize(
    "space, full, matrix", [(1, False, "bt709"), (6, True, "bt601"), (5, False, "bt601"), (9, True, "bt2020")]
)
def test_colours_are_those_of_the_stream(space: int, full: bool, matrix: str, tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", pts=[0, 40, 80], colorspace=space, color_range=1 + full)
    scan, truth = scan_video(path), list(sequential(path))
    assert (scan.matrix, scan.full_range) == (matrix, full)
    assert_read(path, scan, truth, [0, 2])
    # A frame in other colours than the consumer will take it for comes as RGB.
    images = [np.asarray(image) for _, image in decode(path)]
    for other in ((matrix, not full), ("bt709" if matrix != "bt709" else "bt601", full)):
        found = read_frames(path, scan.pts, scan.key, np.array([0, 2]), *other)
        assert all(np.array_equal(frame, images[i]) for i, frame in zip((0, 2), found, strict=True))


def test_frames_may_change_their_looks(tmp_path: Path) -> None:
    def part(name: str, height: int, **colours: int) -> Path:
        options = {"bf": "0"}  # frames that have to wait take on the looks of later ones
        pictures, pts = [picture(i, height) for i in range(5)], range(0, 200, 40)
        return write(tmp_path / f"{name}.h264", options=options, pictures=pictures, pts=pts, **colours)

    small, tall, other = part("small", H), part("tall", 64), part("other", H, colorspace=1)
    path = tmp_path / "v.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in (small, tall, small, other)))
    scan, images = scan_video(path), [np.asarray(image) for _, image in decode(path)]
    truth = list(sequential(path))
    truth[15:] = images[15:]
    assert [frame.shape for frame in truth[::5]] == [(72, W, 1), (96, W, 1), (72, W, 1), (H, W, 3)]
    for frames in choices(20, seed=0):
        assert_read(path, scan, truth, frames)


def test_colours_that_have_no_name_here_come_as_rgb(tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", pts=[0, 40, 80], colorspace=7)  # SMPTE 240M
    scan, images = scan_video(path), [np.asarray(image) for _, image in decode(path)]
    assert_read(path, scan, images, [0, 1, 2])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix, space", [("bt601", 5), ("bt709", 1), ("bt2020", 9)])
def test_yuv_to_rgb_is_swscale_s(matrix: str, space: int, full: bool) -> None:
    rng = np.random.default_rng(0)
    transform = yuv_to_rgb(matrix, full)
    for _ in range(200):
        yuv = rng.integers(0, 256, 3)
        planes = np.concatenate([np.full(64 * n, value) for n, value in zip((4, 1, 1), yuv, strict=True)])
        frame = av.VideoFrame.from_ndarray(planes.reshape(24, 16).astype(np.uint8), format="yuv420p")
        frame.colorspace, frame.color_range = space, 1 + full
        expected = frame.reformat(format="rgb24", interpolation=EXACT).to_ndarray()[8, 8]
        found = transform[:, :3] @ yuv + transform[:, 3]
        if found.max() < 512:  # beyond, swscale's integers run over
            assert np.abs(found.clip(0, 255) - expected).max() <= 1.01, (yuv, found, expected)


def test_the_door_of_the_room_is_light() -> None:
    """PyAV takes 0.3 s to load, which lists of frames need not wait for."""
    code = "import sys; import dfer.video, dfer.video.find; assert 'av' not in sys.modules; "
    code += "from dfer.video import read_frames; assert 'av' in sys.modules and callable(read_frames); "
    code += "from dfer.video import decode; assert decode.__name__ == 'dfer.video.decode'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_yuv_to_rgb_by_hand() -> None:
    def near(matrix: str, full: bool, yuv: Sequence[float], rgb: Sequence[float]) -> None:
        transform = yuv_to_rgb(matrix, full)
        np.testing.assert_allclose(transform[:, :3] @ yuv + transform[:, 3], rgb, atol=2e-4)

    for matrix, red, blue in (("bt601", 0.299, 0.114), ("bt709", 0.2126, 0.0722), ("bt2020", 0.2627, 0.0593)):
        near(matrix, False, (16, 128, 128), (0, 0, 0))
        near(matrix, False, (235, 128, 128), (255, 255, 255))
        near(matrix, True, (0, 128, 128), (0, 0, 0))
        near(matrix, True, (255, 128, 128), (255, 255, 255))
        # Pure red and blue have the largest colour differences there are, +1/2; green is what is left.
        near(matrix, False, (16 + 219 * red, 128 - 112 * red / (1 - blue), 240), (255, 0, 0))
        near(matrix, True, (255 * blue, 255.5, 128 - 127.5 * blue / (1 - red)), (0, 0, 255))
        green = 1 - red - blue
        colours = 128 - 127.5 * green / (1 - blue), 128 - 127.5 * green / (1 - red)
        near(matrix, True, (255 * green, *colours), (0, 255, 0))
    assert yuv_to_rgb("bt601", True)[0].tolist() == pytest.approx([1, 0, 1.402, -179.456], abs=1e-4)  # as JFIF has it


def test_sound_does_not_mislead(tmp_path: Path, quick: None) -> None:
    path = write(tmp_path / "v.mp4", options=B_FRAMES, audio=True)
    scan, truth = scan_video(path), list(sequential(path))
    for frames in choices(F, seed=0):
        assert_read(path, scan, truth, frames, compiled=True)


@pytest.mark.parametrize("atom", [b"wide", b"skip", b"free"])
def test_a_file_need_not_begin_with_its_type(atom: bytes, b_frames: Path, tmp_path: Path) -> None:
    """As those of old QuickTime do not."""
    path, data = tmp_path / "v.mov", b_frames.read_bytes()
    path.write_bytes(data[:4] + atom + data[8:])
    scan, truth = scan_video(path), list(sequential(b_frames))
    assert_read(path, scan, truth, [0, 3, 20], compiled=True)


def test_a_frame_that_does_not_exist_is_an_error(b_frames: Path) -> None:
    videos, clip = videos_of_one(b_frames, scan_video(b_frames)), np.empty((2, SIZE, SIZE, 3), np.float32)
    for number in (F, -1, 10**9):
        with pytest.raises(IndexError, match="the video has no such frame"):
            read_clip(videos, 0, np.array([1, number]), clip, PARAMETERS)
        with pytest.raises(IndexError):
            read_planar(videos, 0, np.array([1, number]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_several_pictures_the_best_is_taken(suffix: str, tmp_path: Path, b_frames: Path) -> None:
    """FFmpeg finds out which it is by decoding ahead."""
    often = write(tmp_path / "often.mp4", options={"g": "1"}, pts=range(40, 1200, 40))
    first = write(tmp_path / "first.mp4", options={"g": "1"}, pts=range(0, 1200, 80))
    cover = write(tmp_path / "cover.mp4", pts=[0], pictures=[picture(77, 480, 640)])
    for order in ((first, often), (often, first), (b_frames, cover), (cover, b_frames)):
        path = tmp_path / f"two.{suffix}"
        with av.open(str(path), "w") as file, av.open(str(order[0])) as one, av.open(str(order[1])) as other:
            streams = [file.add_stream_from_template(part.streams.video[0]) for part in (one, other)]
            for part, stream in zip((one, other), streams, strict=True):
                for packet in part.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        file.mux(packet)
        scan, truth = scan_video(path), list(sequential(path))
        for frames in [*choices(len(truth), seed=0), range(1, len(truth), 2)]:  # these times occur in both
            assert_read(path, scan, truth, frames)


def test_many_threads_at_once(b_frames: Path, quick: None) -> None:
    scan, truth, errors = scan_video(b_frames), list(sequential(b_frames)), []

    def work(seed: int) -> None:
        try:
            for frames in choices(F, seed):
                assert_read(b_frames, scan, truth, frames, compiled=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_is_no_video_is_refused(tmp_path: Path, b_frames: Path) -> None:
    scan = scan_video(b_frames)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "codec.mp4").write_bytes(b_frames.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzz"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        sound = file.add_stream("aac", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        samples.sample_rate = 8000
        file.mux([*sound.encode(samples), *sound.encode()])
    for name, error in (
        ("missing.mp4", av.FileNotFoundError),
        ("text.mp4", av.InvalidDataError),
        ("sound.mp4", BadVideo),
        ("codec.mp4", (BadVideo, av.DecoderNotFoundError)),
        ("", BadVideo),
    ):
        with pytest.raises(error):
            scan_video(tmp_path / name)
        with pytest.raises(error):
            read(tmp_path / name, scan, [0, 5])

    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "device.mp4"):  # which nobody may wait for
        assert read_planar(videos_of_one(tmp_path / name, scan), 0, np.arange(3)) is None


def test_compiled_code_says_why_it_is_not_used(
    b_frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And Python reads the same."""
    scan = scan_video(b_frames)
    asked = videos_of_one(b_frames, scan), 0, np.arange(3)
    assert read_planar(*asked) is not None
    monkeypatch.setattr(ffmpeg, "why_not", ffmpeg.why_not.__wrapped__)
    for place, name, value in (
        (ffmpeg, "_VERSIONS", {"avutil": 59}),
        (ffmpeg, "_VERSIONS", {"avother": 1}),
        (ffmpeg_loop, "FUNCTIONS", {"avutil": ("av_no_such_function",)}),
    ):
        say_once.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert read_planar(*asked) is None and read_planar(*asked) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "PyAV's" in said and "Python's lock" in said, said


@pytest.mark.parametrize(
    "format_, own, container, plain",
    [
        (0, (1, 2, 2, 2), (0, 2, 2, 2), True),  # of AVPixelFormat and the numbers of H.273; first comes the range
        (12, (0, 2, 2, 6), (0, 2, 2, 2), False),
        (5, (1, 2, 2, 2), (0, 2, 2, 2), False),
        (0, (2, 2, 2, 2), (0, 2, 2, 2), False),
        (0, (1, 9, 16, 5), (0, 2, 2, 2), False),
        (0, (1, 9, 18, 5), (0, 2, 2, 2), False),
        (0, (0, 2, 2, 2), (2, 2, 2, 2), False),
        (0, (0, 2, 2, 2), (1, 2, 2, 5), True),
        (0, (0, 2, 2, 2), (1, 2, 2, 1), False),
        (0, (0, 2, 2, 6), (1, 2, 2, 1), True),
        (0, (0, 2, 2, 2), (1, 2, 16, 5), False),
        (0, (0, 2, 2, 10), (0, 2, 2, 2), False),
    ],
)
def test_only_frames_in_the_colours_of_the_index_are_plain(
    format_: int, own: tuple, container: tuple, plain: bool
) -> None:
    """BT.601 of limited range. And no frame that states other colours than the one before."""
    assert ffmpeg.why_not() is None
    fields = np.zeros(128, np.int32)  # an AVFrame's
    fields[29], fields[70:74], nothing = format_, own, np.zeros(1, np.int64)
    address, seen = fields.ctypes.data, np.full(4, -1)
    matrices = np.array([number in (2, 5, 6) for number in range(10)])
    frames = ffmpeg_loop.Frames(
        nothing,
        nothing > 0,
        nothing,
        nothing,
        np.array(container),
        seen,
        height=2,
        width=2,
        is_full_range=False,
        matrices=matrices,
        is_hdr=np.isin(np.arange(19), (16, 18)),
    )
    assert ffmpeg_loop._is_plain(address, frames) == plain
    if plain:
        fields[73] = 5 if own[3] == 6 else 6
        assert not ffmpeg_loop._is_plain(address, frames)


@pytest.mark.parametrize("name", ["mjpeg mov", "hevc pyramid", "vp8 webm"])
def test_damage_that_no_decoder_tells_of_is_the_same(name: str, tmp_path: Path) -> None:
    """Where pixels are what memory held before."""
    codec, suffix, options = QUICK[name]
    path, rng, compared = write(tmp_path / f"v.{suffix}", codec, options), np.random.default_rng(0), 0
    scan, data = scan_video(path), np.frombuffer(path.read_bytes(), np.uint8)
    with av.open(str(path)) as file:
        places = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for _ in range(60):
        damaged = data.copy()
        pos, size = places[rng.integers(len(places))]
        damaged[pos + rng.integers(size, size=3)] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        path.write_bytes(damaged.tobytes())
        with contextlib.suppress(BadVideo, av.FFmpegError):
            read(path, scan, np.sort(rng.permutation(F)[:8]).tolist())
            compared += 1
    assert compared > 10


def test_what_compiled_code_leaves_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be decoded twice each time."""
    write(tmp_path / "plain.mp4", pts=[0, 40, 80])
    write(tmp_path / "other.mp4", pts=[0, 40, 80], colorspace=7)  # SMPTE 240M
    (tmp_path / "list.txt").write_text("plain.mp4 3 0\nother.mp4 3 0\n")
    names = ["plain", "other"]
    source, real, asked = VideoFiles(load_index(tmp_path / "list.txt")), ffmpeg.read_planar, []
    monkeypatch.setattr(ffmpeg, "read_planar", lambda *args: asked.append(names[args[1]]) or real(*args))
    for _ in range(3):
        shapes = [[frame.shape[2] for frame in source.fetch(video, np.arange(3))] for video in range(2)]
        assert shapes == [[1] * 3, [3] * 3]
    assert sorted(asked) == ["other", "plain", "plain", "plain"]
    source, real, clip, tried = VideoFiles(source.index), ffmpeg.read_clip, np.empty((3, SIZE, SIZE, 3), np.float32), []
    monkeypatch.setattr(ffmpeg, "read_clip", lambda *args, **more: tried.append(names[args[1]]) or real(*args, **more))
    for video in (0, 1) * 3:
        source.write(video, np.arange(3), clip, PARAMETERS)
    assert sorted(tried) == sorted(asked)


def test_compiled_code_keeps_no_file_and_no_memory(tmp_path: Path, b_frames: Path) -> None:
    scan, names = scan_video(b_frames), [tmp_path / f"{name}.mp4" for name in ("good", "cut", "codec", "text")]
    data = b_frames.read_bytes()
    changed = data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzz")
    for path, content in zip(names, (data, data[: len(data) // 2], changed, b"no video"), strict=True):
        path.write_bytes(content)

    def read_all() -> list[bool]:
        asked, videos = np.arange(0, F, 3), [videos_of_one(path, scan) for path in names]
        clip = np.empty((len(asked), SIZE, SIZE, 3), np.float32)
        read = [read_planar(one, 0, asked) is not None for one in videos]
        assert [read_clip(one, 0, asked, clip, PARAMETERS) for one in videos] == read
        return read

    def kept() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    for _ in range(20):
        assert read_all() == [True, False, False, False]
    files, memory = kept()
    for _ in range(300):  # of a decoder some 100 kB would stay each time
        read_all()
    assert kept()[0] == files and kept()[1] - memory < 8e6


def test_a_video_that_is_left_out_holds_no_memory(tmp_path: Path) -> None:
    rows = [f"{write(tmp_path / f'{i}.mp4', pts=range(0, 400, 40)).name} 10 {i}" for i in range(3)]
    (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
    loader = ClipLoader(load_index(tmp_path / "list.txt"), ClipSampler(0, 2), LoaderOptions(3, SIZE, bad_clips="skip"))
    (tmp_path / "1.mp4").write_bytes(b"no video")
    gc.collect()
    gc.disable()
    try:
        assert [int(batch.valid.sum()) for epoch in range(3) for batch in loader(epoch)] == [2] * 3
        assert not [held for held in gc.get_objects() if type(held) is video_stream._Clips]
    finally:
        gc.enable()
