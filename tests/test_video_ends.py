"""What a file says of its length is believed where its bytes do not tell; joined streams have times that rise."""

import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dfer.lists.index import load_index
from dfer.predict.inputs import find_videos
from dfer.video.camera import Camera
from dfer.video.decode import BadVideo, Reading, best_stream, check_end, decode, open_video, read_packets
from dfer.video.find import find_video_files
from dfer.video.structure import all_there
from scripts import pack
from tests.test_video import B_FRAMES, H, W, picture, write
from tests.video_table import CUT, FAST, MS, SMALL_CLUSTERS, WIDE, F, animation, cut_between, plain

SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
MATROSKA, MOV = "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"


def unknown_sizes(data: bytes) -> bytes:
    """A Matroska file as a browser records it: neither the segment nor its clusters say how long they are."""
    whole = bytearray(data)
    for kind in (SEGMENT, CLUSTER):
        place = whole.find(kind)
        while place >= 0:
            length = 9 - whole[place + 4].bit_length()
            whole[place + 4 : place + 4 + length] = ((1 << 7 * length + 1) - 1).to_bytes(length, "big")
            place = whole.find(kind, place + 4)
    return bytes(whole)


def claiming(data: bytes, seconds: float) -> bytes:
    place = data.index(b"\x44\x89") + 3
    return data[:place] + struct.pack(">d", 1000 * seconds) + data[place + 8 :]


def zero_tail(data: bytes) -> bytes:
    """A download of which the disk holds the place of all, and the first half."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def frames(path: Path) -> list[tuple[float, Image.Image]]:
    return list(decode(path))


@pytest.fixture(scope="module")
def webm(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Forty frames, 1.6 s."""
    path = tmp_path_factory.mktemp("webm") / "v.webm"
    plain("vp9", CUT, container=SMALL_CLUSTERS)(path)
    return path.read_bytes()


@pytest.mark.parametrize("change, good", [
    (lambda data: claiming(data, 2.5), True),  # all is there, whatever a clock said
    (lambda data: claiming(data, 3600), True),
    (lambda data: unknown_sizes(claiming(data, 2.5)), True),  # a clock is not as wrong as ...
    (lambda data: unknown_sizes(claiming(data, 3.0)), False),  # ... this: perhaps the rest is missing
    (lambda data: unknown_sizes(data), True),
    (lambda data: unknown_sizes(data)[:-700], False),
    (zero_tail, False),
    (lambda data: zero_tail(claiming(data, 2.5)), False),
    (lambda data: zero_tail(unknown_sizes(data)), False),
    (lambda data: data[: len(data) // 2], False),
    (lambda data: data + bytes(1000), True),
])  # fmt: skip
def test_webm(change: Callable[[bytes], bytes], good: bool, webm: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v.webm"
    path.write_bytes(change(webm))
    if good:
        assert len(frames(path)) == CUT
    else:
        with pytest.raises((BadVideo, av.FFmpegError)) as error:
            frames(path)
        assert "8192" not in str(error.value)


def test_a_refusal_has_both_times_and_a_way_out(webm: bytes, tmp_path: Path) -> None:
    path, mended = tmp_path / "v.webm", tmp_path / "mended.webm"
    path.write_bytes(unknown_sizes(claiming(webm, 5.0)))
    with pytest.raises(BadVideo, match=r"^truncated: 40 frames, to 1\.60 s of the 5\.00 s in its header \(ffmpeg -i"):
        frames(path)
    with av.open(str(path)) as source, av.open(str(mended), "w") as file:  # as ffmpeg -c copy
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    assert len(frames(mended)) == CUT


def test_counts_of_an_index_are_named(tmp_path: Path) -> None:
    cut_between(plain("h264", CUT, container=FAST))(tmp_path / "v.mp4")
    with pytest.raises(BadVideo, match=r"^truncated: 21 of 40 frames, to 0\.84 s of the 1\.60 s"):
        frames(tmp_path / "v.mp4")


def test_an_index_tells_what_is_missing_where_all_boxes_fit(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    cut_between(plain("h264", CUT, container=FAST))(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") - 4
    struct.pack_into(">I", data, place, len(data) - place)
    path.write_bytes(data)
    assert all_there(str(path), MOV)
    with pytest.raises(BadVideo, match=r"^truncated: 21 of 40 frames"):
        frames(path)


def test_a_doubt_that_nothing_follows_is_an_end_that_is_missing(tmp_path: Path) -> None:
    plain("h264", audio=True)(tmp_path / "v.ts")
    with open_video(tmp_path / "v.ts") as container:
        video, read = best_stream(container), Reading()
        packets = [packet for packet in read_packets(container, video, read) if packet.size]
        check_end(container, video, read)
        read.doubts[0] = 0
        read.judge(packets[1], is_video=True)  # one more is allowed, then a recording has to begin
        with pytest.raises(BadVideo, match=r"^truncated$"):
            check_end(container, video, read)
        with pytest.raises(BadVideo, match=r"^truncated or damaged$"):
            read.judge(packets[2], is_video=True)
        read.doubts[0] = 1
        read.judge(packets[5], is_video=True)  # a keyframe
        check_end(container, video, read)
        read.doubts[0] = 0
        for packet in packets[1:3]:  # sound goes on anywhere
            read.judge(packet, is_video=False)
        check_end(container, video, read)


def number(value: int, length: int) -> bytes:
    return (value | 1 << 7 * length).to_bytes(length, "big")


@pytest.mark.parametrize("container, data, there", [
    (MATROSKA, SEGMENT + number(3, 1) + b"\xec\x81\0", True),
    (MATROSKA, SEGMENT + number(4, 1) + b"\xec\x81\0", False),  # the last element ends before the segment
    (MATROSKA, SEGMENT + number(3, 4) + b"\xec\x81\0", True),
    (MATROSKA, SEGMENT + b"\xff" + b"\xec\x81\0", None),  # of unknown size
    (MATROSKA, SEGMENT + b"\xff" + CLUSTER + b"\x01" + 7 * b"\xff" + b"\xa3\x82ab", None),
    (MATROSKA, SEGMENT + b"\xff" + CLUSTER + b"\x01" + 7 * b"\xff" + b"\xa3\x83ab", False),
    (MATROSKA, SEGMENT + b"\xff" + b"\xec\x81\0" + b"\0\0", False),
    (MATROSKA, SEGMENT + b"\xff" + b"\xec\xff", False),  # only segments and clusters may leave it open
    (MATROSKA, SEGMENT, False),
    (MOV, b"\0\0\0\x0cftypmp42" + b"\0\0\0\x09mdatx", True),
    (MOV, b"\0\0\0\x0cftypmp42" + b"\0\0\0\x0amdatx", False),
    (MOV, b"\0\0\0\x0cftypmp42" + b"\0\0\0\0mdatx", True),  # up to the end
    (MOV, b"\0\0\0\x01mdat" + b"\0\0\0\0\0\0\0\x11x", True),
    (MOV, b"\0\0\0\x08moof" + b"\0\0\0\x08mdat", None),  # more may have followed
    (MOV, b"\0\0\0\x01mdat", False),
    (MOV, b"\0\0\0\x03mdat", False),
    ("avi", b"RIFF\4\0\0\0AVI ", True),
    ("avi", b"RIFF\5\0\0\0AVI x", True),  # no padding
    ("avi", b"RIFF\6\0\0\0AVI x", False),
    ("avi", b"RIFF\4\0\0\0AVI RIFF\4\0\0\0AVIX", True),
    ("avi", b"RIFF\4\0\0\0AVI RIFF\6\0\0\0AVIX", False),
    ("avi", b"RIFF\0\0\0\0AVI x", None),
    ("avi", b"x", False),
    ("flv", b"FLV\1\1\0\0\0\x09\0\0\0\0" + b"\x09\0\0\2" + 7 * b"\0" + b"ab" + b"\0\0\0\x0d", None),
    ("flv", b"FLV\1\1\0\0\0\x09\0\0\0\0" + b"\x09\0\0\3" + 7 * b"\0" + b"ab" + b"\0\0\0\x0d", False),
    ("mpegts", 6 * (b"\x47" + 187 * b"x"), None),
    ("mpegts", b"junk" + 6 * (b"\x47" + 187 * b"x"), None),
    ("mpegts", 6 * (b"\x47" + 187 * b"x") + b"\x47xx", False),
    ("mpegts", 6 * (b"\x47" + 187 * b"x") + b"junk", None),
    ("mpegts", 6 * (b"time\x47" + 187 * b"x"), None),
    ("mpegts", 6 * (b"time\x47" + 187 * b"x") + b"time\x47xx", False),
    ("mpegts", b"\x47", None),
    ("ogg", b"OggS" + 22 * b"\0" + b"\2\1\2abc", None),
    ("ogg", b"OggS" + 22 * b"\0" + b"\2\1\2ab", False),
    ("ogg", b"OggS" + 22 * b"\0" + b"\0", None),
    ("ogg", b"OggS" + 22 * b"\0", False),
    ("asf", bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + 24 * b"x" + b"\x30" + 7 * b"\0", True),
    ("asf", bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + 24 * b"x" + b"\x31" + 7 * b"\0", False),
    ("asf", bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365") + 24 * b"x" + 8 * b"\0", None),  # a broadcast
    ("asf", b"x", False),
    ("mxf", b"x", False),
    ("avi", b"", False),
])  # fmt: skip
def test_structures(container: str, data: bytes, there: bool | None, tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(data)
    assert all_there(str(tmp_path / "v"), container) is there


@pytest.mark.parametrize("options", [{"bf": "0", "g": "5"}, B_FRAMES], ids=["", "B-frames"])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (60, 4, 0), (0, 3600, 20)])
def test_times_of_joined_streams_go_on(offsets: tuple[int, ...], options: dict, tmp_path: Path) -> None:
    """Whether the times of the next one are earlier or much later."""
    data = b""
    for offset in offsets:
        part = write(tmp_path / "part.ts", options=options, pts=range(1000 * offset, 1000 * offset + MS * F, MS))
        data += part.read_bytes()
    (tmp_path / "v.ts").write_bytes(data)
    times = np.array([time for time, _ in frames(tmp_path / "v.ts")])
    assert len(times) == 3 * F
    np.testing.assert_allclose(np.diff(times), MS / 1000, atol=2e-3)


def test_a_pause_is_no_new_recording(tmp_path: Path) -> None:
    pts = [0, 40, 80, 5000, 5040, 9000]
    for suffix in ("ts", "mkv"):
        path = write(tmp_path / f"v.{suffix}", options={"bf": "0"}, pts=pts)
        times = np.array([time for time, _ in frames(path)])
        np.testing.assert_allclose(times - times[0], np.array(pts) / 1000, atol=2e-3)


def test_stretched_pixels_are_those_of_the_picture(tmp_path: Path) -> None:
    """A picture that was squeezed into wide pixels is shown as it was."""
    square = picture(5, 96, 128)
    squeezed = np.asarray(Image.fromarray(square).resize((64, 96), Image.Resampling.BILINEAR))
    path = write(tmp_path / "v.mp4", options={"crf": "5"}, pictures=[squeezed] * 3, pts=[0, 40, 80], **WIDE)
    for shown, width in ((True, 128), (False, 64)):
        images = [np.asarray(image).astype(int) for _, image in decode(path, square=shown)]
        assert images[0].shape == (96, width, 3)
    images = [np.asarray(image).astype(int) for _, image in decode(path)]
    assert np.abs(images[0] - square).mean() < 6
    # A pack holds what the trainer reads from the video itself: boxes are shares of the picture.
    (tmp_path / "list.txt").write_text("v.mp4 3 0\n")
    assert pack.main([str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"), "--format", "raw"]) == 0
    packed = load_index(tmp_path / "out" / "list.txt").store
    assert (packed.height[0], packed.width[0]) == (96, 64)


def test_a_recording_of_a_stream_has_its_shape(tmp_path: Path) -> None:
    plain("h264", **WIDE)(tmp_path / "stream.ts")
    with Camera(str(tmp_path / "stream.ts"), recording=tmp_path / "v.mp4") as camera:
        assert list(camera.frames())
    images = [image for _, image in decode(tmp_path / "v.mp4")]
    assert len(images) == F and images[0].size == (2 * W, H)


def test_webp_is_a_video_if_it_moves(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    durations = [40, 80, 20, 250, 10, 30, 70, 40, 40, 40, 40, 40]
    images = [Image.fromarray(picture(i)) for i in range(F)]
    images[0].save(
        tmp_path / "in" / "a.webp", save_all=True, append_images=images[1:], duration=durations, lossless=True
    )
    images[0].save(tmp_path / "in" / "still.webp")
    animation("PNG")(tmp_path / "in" / "b.apng")
    found = find_video_files(tmp_path / "in", lambda line: pytest.fail(line))
    assert sorted(path.name for path in found) == ["a.webp", "b.apng"]
    assert [video.name for video in find_videos([tmp_path / "in"], tmp_path / "out", pytest.fail)] == ["a", "b"]
    shown = frames(tmp_path / "in" / "a.webp")
    np.testing.assert_allclose([time for time, _ in shown], np.cumsum([0, *durations[:-1]]) / 1000, atol=1e-9)
    assert all(np.array_equal(image, picture(i)) for i, (_, image) in enumerate(shown))
    data = (tmp_path / "in" / "a.webp").read_bytes()
    third = [place for place in range(len(data)) if data[place : place + 4] == b"ANMF"][2]
    damaged = data[:third] + b"\xff" * 40 + data[third + 40 :]
    for damage, says in ((data[: len(data) // 2], "truncated: "), (damaged, "damaged after 0 frames")):
        (tmp_path / "in" / "a.webp").write_bytes(damage)
        with pytest.raises(BadVideo, match=says):
            frames(tmp_path / "in" / "a.webp")
    Image.new("RGB", (8200, 16)).save(tmp_path / "in" / "a.webp")
    with pytest.raises(BadVideo, match="8200 x 16 pixels, more than 8192 on a side"):
        frames(tmp_path / "in" / "a.webp")
