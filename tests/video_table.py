"""What becomes of videos of many kinds, all made here: `python -m tests.video_table` prints it as Markdown.

A row says which frames must come out of a file, of what size and with which note, or why it must be refused.
`examine` looks what does come out; tests/test_video_table.py compares, also between all that reads videos.
"""

import contextlib
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from dfer.files import reason
from dfer.video.decode import VIDEO_ERRORS, decode
from dfer.video.random_access import scan_video
from tests.test_prepare_videos import remux
from tests.test_video import B_FRAMES, OPEN_GOP, OPEN_HEVC, VPX, VPX_HIDDEN, X265, H, W, number_of, picture, write

F = 12
CUT = 40  # frames of files that are cut: headers may be wrong by some
MS = 40  # a frame
TIMES = [0, 10, 20, 500, 510, 900, 1700, 1701, 1702, 3000, 3040, 3100]  # ms
CODECS = {  # encoder, options, pixels
    "h264": ("libx264", {"g": "5", "bf": "0"}, "yuv420p"),
    "hevc": ("libx265", {"x265-params": X265 + "keyint=5:bframes=0"}, "yuv420p"),
    "vp9": ("libvpx-vp9", VPX, "yuv420p"),
    "vp8": ("libvpx", VPX, "yuv420p"),
    "av1": ("libsvtav1", {"preset": "12", "svtav1-params": "keyint=8:lp=1"}, "yuv420p"),
    "mpeg4": ("mpeg4", {"q": "2"}, "yuv420p"),
    "mpeg2": ("mpeg2video", {"q": "2"}, "yuv420p"),
    "mjpeg": ("mjpeg", {"q": "2"}, "yuvj420p"),
    "prores": ("prores_ks", {}, "yuv422p10le"),
    "ffv1": ("ffv1", {}, "yuv420p"),
    "wmv2": ("wmv2", {"q": "2"}, "yuv420p"),
    "flv1": ("flv", {"q": "2"}, "yuv420p"),
}


class Row(NamedTuple):
    codec: str
    container: str
    oddity: str
    make: Callable[[Path], object]  # writes the file
    numbers: Sequence[int] = range(F)  # of the frames, in order
    size: tuple[int, int] = (H, W)  # of the pictures that are shown
    turn: int = 0  # quarter turns, clockwise, by which they are shown
    note: str = ""  # a part of it
    refusal: str = ""  # a part of it; "" if the video is to be read


class Found(NamedTuple):
    numbers: list[int]
    size: tuple[int, int]
    notes: list[str]
    refusal: str
    scan_refusal: str
    num_scanned: int


def plain(codec: str, frames: int = F, **known: object) -> Callable[[Path], Path]:
    """A maker of a video; `known` as of tests.test_video.write."""
    encoder, options, pixels = CODECS[codec]
    known = {"options": options, "pixels": pixels, "pts": range(0, MS * frames, MS), **known}
    return lambda path: write(path, encoder, **known)


def changed(make: Callable[[Path], object], change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A maker of a video whose bytes are changed."""

    def maker(path: Path) -> None:
        make(path)
        path.write_bytes(change(path.read_bytes()))

    return maker


def cut(make: Callable[[Path], object], share: float = 0.6) -> Callable[[Path], object]:
    return changed(make, lambda data: data[: int(share * len(data))])


def cut_between(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Cut behind the packet in the middle."""

    def maker(path: Path) -> None:
        make(path)
        with av.open(str(path)) as file:
            ends = [packet.pos + packet.size for packet in file.demux(video=0) if packet.size]
        os.truncate(path, ends[len(ends) // 2])

    return maker


def animation(kind: str, **known: object) -> Callable[[Path], None]:
    def maker(path: Path) -> None:
        images = [Image.fromarray(picture(i)) for i in range(F)]
        images[0].save(path, kind, save_all=True, append_images=images[1:], duration=MS, **known)

    return maker


def with_other(make: Callable[[Path], object], other: Callable[[Path], object]) -> Callable[[Path], object]:
    """A second video beside the first, in one file."""

    def maker(path: Path) -> None:
        parts = [path.with_name(f"{name}-{path.name}") for name in ("one", "other")]
        for part, write_part in zip(parts, (make, other), strict=True):
            write_part(part)
        remux(path, *parts)

    return maker


def with_subtitles(make: Callable[[Path], object], end_s: int) -> Callable[[Path], object]:
    def maker(path: Path) -> None:
        text, video = path.with_suffix(".srt"), path.with_name(f"v-{path.name}")
        text.write_text(f"1\n00:00:00,100 --> 00:00:00,200\na\n\n2\n00:00:00,200 --> 00:00:{end_s:02d},000\nb\n\n")
        make(video)
        with av.open(str(video)) as one, av.open(str(text)) as other, av.open(str(path), "w") as file:
            pairs = []
            for stream in (one.streams.video[0], other.streams.subtitles[0]):
                own = file.add_stream_from_template(stream)
                pairs += [(p, own) for p in stream.container.demux(stream) if p.dts is not None]
            for packet, own in sorted(pairs, key=lambda pair: float(pair[0].dts * pair[0].time_base)):
                packet.stream = own
                file.mux(packet)

    return maker


def longer_header(data: bytes) -> bytes:
    """A WebM file whose header claims a second more than there is."""
    place = data.index(b"\x44\x89") + 3
    (duration,) = struct.unpack_from(">d", data, place)
    return data[:place] + struct.pack(">d", duration + 1000) + data[place + 8 :]


def longer_boxes(data: bytes) -> bytes:
    """An MP4 file whose movie and tracks claim ten times their length."""
    whole = bytearray(data)
    for kind, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20), (b"elst", 12)):
        place = whole.find(kind) + offset
        (duration,) = struct.unpack_from(">I", whole, place)
        struct.pack_into(">I", whole, place, 10 * duration)
    return bytes(whole)


def longer_metadata(data: bytes) -> bytes:
    """An FLV file whose length, by a clock, is 0.8 s more."""
    place = data.index(b"\0\x08duration\0") + 11
    (duration,) = struct.unpack_from(">d", data, place)
    return data[:place] + struct.pack(">d", duration + 0.8) + data[place + 8 :]


def longer_count(data: bytes) -> bytes:
    """An AVI file whose header counts 30 frames more."""
    whole = bytearray(data)
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        (count,) = struct.unpack_from("<I", whole, place)
        struct.pack_into("<I", whole, place, count + 30)
    return bytes(whole)


def longer_properties(data: bytes) -> bytes:
    """An ASF file that claims to play for two seconds more."""
    place = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + 64
    (duration,) = struct.unpack_from("<Q", data, place)
    return data[:place] + struct.pack("<Q", duration + 20_000_000) + data[place + 8 :]


def shorter_by_edit(skipped: int) -> Callable[[bytes], bytes]:
    """An MP4 file of which an edit list shows less from the beginning."""

    def change(data: bytes) -> bytes:
        whole, place = bytearray(data), data.index(b"elst") + 12
        duration, start = struct.unpack_from(">Ii", whole, place)
        unit = struct.unpack_from(">I", whole, data.index(b"mdhd") + 16)[0] // 25
        struct.pack_into(">Ii", whole, place, duration - MS * skipped, start + skipped * unit)
        return bytes(whole)

    return change


def pixels_of(width: int, height: int) -> Callable[[Path], object]:
    """A maker of an MP4 file with pixels of 2:1 whose container says another shape."""

    def change(data: bytes) -> bytes:
        place = data.index(b"pasp") + 4
        return data[:place] + struct.pack(">II", width, height) + data[place + 8 :]

    return changed(plain("h264", **WIDE), change)


WIDE = {"sample_aspect_ratio": Fraction(2)}
PQ = {"colorspace": 9, "color_trc": 16, "color_primaries": 9}
HLG = {**PQ, "color_trc": 18}
DEEP = {"pixels": "yuv420p10le"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FAST = {"movflags": "faststart"}
SMALL_CLUSTERS = {"cluster_size_limit": "2000"}
ALL = "h264 mp4, h264 mov, h264 mkv, h264 ts, h264 avi, h264 flv, hevc mp4, hevc mkv, hevc ts, vp9 webm, vp9 mp4, "
ALL += "vp8 webm, vp8 ogv, av1 mp4, av1 webm, mpeg4 avi, mpeg4 mp4, mpeg4 mkv, mpeg2 mpg, mpeg2 ts, mjpeg avi, "
ALL += "mjpeg mov, mjpeg mkv, prores mov, ffv1 mkv, ffv1 avi, wmv2 asf, flv1 flv"
PAIRS = [tuple(pair.split()) for pair in ALL.split(", ")]
X265_PQ = X265 + "keyint=5:bframes=0:colorprim=9:transfer=16:colormatrix=9"
X265_HLG = X265_PQ.replace("transfer=16", "transfer=18")


def odd(codec: str, containers: str, oddity: str, known: dict, **expected: object) -> list[Row]:
    """Rows of one codec in several containers, of videos written with `known`."""
    return [Row(codec, c, oddity, plain(codec, **known), **expected) for c in containers.split()]


def rows() -> list[Row]:
    """All rows of the table."""
    return [
        *(Row(codec, container, "", plain(codec)) for codec, container in PAIRS),
        *(Row(kind, kind, "animated", animation(name)) for kind, name in (("gif", "GIF"), ("apng", "PNG"))),
        Row("webp", "webp", "animated", animation("WEBP", lossless=True)),
        Row("webp", "webp", "animated, lossy", animation("WEBP", quality=95)),
        Row("av1", "avif", "animated", animation("AVIF", quality=95)),
        *_order_and_time(),
        *_pictures(),
        *_lengths(),
        *_truncated(),
    ]


def _order_and_time() -> list[Row]:
    back = range(400, 400 + MS * F, MS)
    return [
        *odd("h264", "mp4 mkv ts avi flv", "B-frames", {"options": B_FRAMES}),
        *odd("h264", "mp4 mkv ts", "open GOP", {"options": OPEN_GOP}),
        *odd("hevc", "mp4 mkv ts", "open GOP", {"options": OPEN_HEVC}),
        *odd("vp9", "webm mp4", "hidden frames", {"options": VPX_HIDDEN}),
        *odd("h264", "mp4 mkv ts flv", "variable rate", {"pts": TIMES}),
        *odd("vp9", "webm", "variable rate", {"pts": TIMES}),
        *odd("h264", "mp4 mkv ts", "starts late", {"pts": back}),
        *odd("vp9", "webm", "starts late", {"pts": back}),
        *odd("h264", "mp4 mov mkv avi ts flv", "one frame", {"pts": [0]}, numbers=[0]),
        *odd("vp9", "webm", "one frame", {"pts": [0]}, numbers=[0]),
        *odd("mjpeg", "avi", "one frame", {"pts": [0]}, numbers=[0]),
        *odd("h264", "mp4", "fragments", {"container": FRAGMENTS}),
        *odd("h264", "mp4", "interlaced", {"options": {"flags": "+ildct+ilme", "g": "12"}}),
        Row("h264", "mp4", "edit list", changed(plain("h264"), shorter_by_edit(7)), range(7, F)),
        Row("vp9", "mp4", "edit list", changed(plain("vp9"), shorter_by_edit(7)), range(7, F)),
    ]


def _pictures() -> list[Row]:
    small = [picture(i, H - 1, W - 1) for i in range(F)]
    wide, tall = (H, 2 * W), (2 * W, H)
    not_known = {"options": {"g": "5", "x264-params": "colormatrix=YCgCo"}, "colorspace": 8}
    large = {"pictures": [picture(i, 720, 128) for i in range(3)], "pts": [0, 40, 80]}
    return [
        *odd("vp9", "webm mp4", "odd sides", {"pictures": small}, size=(H - 1, W - 1)),
        *odd("ffv1", "mkv", "odd sides", {"pictures": small}, size=(H - 1, W - 1)),
        *odd("mjpeg", "avi", "odd sides", {"pictures": small}, size=(H - 1, W - 1)),
        *odd("h264", "mp4 mov", "turned", {"turn": (-90,)}, size=(W, H), turn=1),
        *odd("vp9", "mp4", "turned", {"turn": (-90,)}, size=(W, H), turn=1),
        *odd("mjpeg", "mov", "turned", {"turn": (180,)}, turn=2),
        *odd("h264", "mp4 mkv ts avi flv mov", "pixels 2:1", WIDE, size=wide),
        *odd("hevc", "mp4 ts", "pixels 2:1", WIDE, size=wide),
        *odd("mpeg4", "avi mp4", "pixels 2:1", WIDE, size=wide),
        *odd("vp9", "mp4", "pixels 2:1", WIDE, size=wide),
        *odd("prores", "mov", "pixels 2:1", WIDE, size=wide),
        *odd("mpeg2", "mpg", "pixels 4:3", {"sample_aspect_ratio": Fraction(4, 3)}, size=(H, round(W * 4 / 3))),
        *odd("h264", "mp4", "pixels 1:2", {"sample_aspect_ratio": Fraction(1, 2)}, size=(2 * H, W)),
        *odd("h264", "mp4", "turned, pixels 2:1", {**WIDE, "turn": (-90,)}, size=tall, turn=1),
        Row("h264", "mp4", "pixels 2:1, 3:2 in the container", pixels_of(3, 2), size=(H, W * 3 // 2)),
        Row("h264", "mp4", "pixels 1000:1", pixels_of(1000, 1), note="taken for square"),
        *odd("h264", "mp4 mkv ts", "10 bits", DEEP),
        *odd("hevc", "mp4", "10 bits", DEEP),
        *odd("h264", "mp4 mkv", "4:4:4", {"pixels": "yuv444p"}),
        *odd("vp9", "webm", "4:4:4", {"pixels": "yuv444p", "options": {**VPX, "profile": "1"}}),
        *odd("h264", "mp4", "4:2:2", {"pixels": "yuv422p"}),
        *odd("h264", "mp4 ts", "full range", {"color_range": 2}),
        *odd("vp9", "webm", "full range", {"color_range": 2}),
        *odd("h264", "mp4", "BT.709", {"colorspace": 1}),
        *odd("vp9", "webm", "BT.709", {"colorspace": 1}),
        *odd("h264", "mp4", "BT.2020", {"colorspace": 9}),
        *odd("h264", "mp4 ts", "YCgCo", not_known, refusal="colour matrix, 8 of ITU-T H.273, is not known here"),
        *odd("h264", "mp4", "a matrix that there is not", {"colorspace": 3}),
        Row(
            "h264", "mp4", "720 rows, no matrix", plain("h264", **large), range(3), (720, 128), note="no colour matrix"
        ),
        *odd("h264", "mp4 mkv", "PQ", {**DEEP, **PQ}, note="HDR (PQ)"),
        *odd("h264", "mp4", "PQ of 8 bits", PQ, note="HDR (PQ)"),
        *odd("hevc", "mp4 mkv", "PQ", {**DEEP, "options": {"x265-params": X265_PQ}, **PQ}, note="HDR (PQ)"),
        *odd("hevc", "mp4 ts", "HLG", {**DEEP, "options": {"x265-params": X265_HLG}, **HLG}, note="HDR (HLG)"),
        *odd("vp9", "webm", "PQ of 8 bits", PQ, note="HDR (PQ)"),
    ]


def _lengths() -> list[Row]:
    more = plain("h264", frames=60)
    joined = [*range(F)] * 3
    three = lambda data: 3 * data  # noqa: E731
    return [
        *odd("h264", "mp4 mkv", "longer sound", {"audio": True, "pts": range(0, MS * F, MS)}),
        Row("h264", "mkv", "longer subtitles", with_subtitles(plain("h264"), 9)),
        Row("vp9", "webm", "header claims more", changed(plain("vp9"), longer_header)),
        Row("h264", "mkv", "header claims more", changed(plain("h264"), longer_header)),
        Row("h264", "mp4", "header claims more", changed(plain("h264"), longer_boxes)),
        Row("h264", "mov", "header claims more", changed(plain("h264"), longer_boxes)),
        Row("h264", "flv", "header claims more", changed(plain("h264"), longer_metadata)),
        Row("mpeg4", "avi", "header claims more", changed(plain("mpeg4"), longer_count)),
        Row("wmv2", "asf", "header claims more", changed(plain("wmv2"), longer_properties)),
        *(Row("h264", c, "a second, longer video", with_other(more, plain("h264")), range(60)) for c in ("mkv", "mp4")),
        Row("h264", "ts", "joined", changed(plain("h264"), three), joined),
        Row("h264", "ts", "joined, B-frames", changed(plain("h264", options=B_FRAMES), three), joined),
        Row("h264", "ts", "joined, sound", changed(plain("h264", audio=True), three), joined),
        Row("hevc", "ts", "joined", changed(plain("hevc"), three), joined),
        Row("mpeg2", "ts", "joined", changed(plain("mpeg2"), three), joined),
        Row("mpeg2", "mpg", "joined", changed(plain("mpeg2"), three), joined),
        Row("h264", "mp4", "bytes behind it", changed(plain("h264"), lambda data: data + bytes(99))),
        Row("vp9", "webm", "bytes behind it", changed(plain("vp9"), lambda data: data + bytes(99))),
    ]


def _truncated() -> list[Row]:
    h264, vp9 = plain("h264", CUT), plain("vp9", CUT)
    fast = plain("h264", CUT, container=FAST)
    clusters = {codec: plain(codec, CUT, container=SMALL_CLUSTERS) for codec in ("h264", "vp9", "av1")}
    kinds = {
        ("h264", "mp4", "cut"): (cut(fast), "truncated|Invalid data"),
        ("h264", "mp4", "cut between frames"): (cut_between(fast), "truncated: 21 of 40 frames"),
        ("h264", "mp4", "cut, index at its end"): (cut(h264), "Invalid data"),
        ("h264", "mp4", "fragments, cut"): (cut(plain("h264", CUT, container=FRAGMENTS)), "truncated|damaged|Invalid"),
        ("h264", "mov", "cut between frames"): (cut_between(fast), "truncated: 21 of 40 frames"),
        ("h264", "mkv", "cut"): (cut(clusters["h264"]), "truncated"),
        ("h264", "mkv", "cut between frames"): (
            cut_between(clusters["h264"]),
            "truncated: 20 frames, to 0.80 s of the 1.60 s in",
        ),
        ("vp9", "webm", "cut"): (cut(clusters["vp9"]), "truncated"),
        ("av1", "webm", "cut"): (cut(clusters["av1"]), "truncated"),
        ("vp9", "webm", "cut, header claims more"): (cut(changed(vp9, longer_header)), "truncated"),
        ("mpeg4", "avi", "cut"): (cut(plain("mpeg4", CUT)), "truncated"),
        ("mjpeg", "avi", "cut between frames"): (cut_between(plain("mjpeg", CUT)), "truncated: 21 of 40 frames"),
        ("h264", "flv", "cut"): (cut(h264), "truncated"),
        ("h264", "ts", "cut"): (cut(h264, 0.607), "truncated"),
        ("h264", "ts", "joined, cut"): (cut(changed(h264, lambda data: 2 * data), 0.803), "truncated"),
        ("mpeg2", "mpg", "cut"): (cut(plain("mpeg2", CUT)), "truncated|damaged|Invalid"),
        ("vp8", "ogv", "cut"): (cut(plain("vp8", CUT)), "truncated|damaged|Invalid"),
        ("hevc", "mp4", "cut"): (cut(plain("hevc", CUT, container=FAST)), "truncated"),
        ("h264", "ts", "a part is missing"): (changed(h264, lambda data: data[:9400] + data[13160:]), "damaged"),
        ("wmv2", "asf", "cut"): (cut(plain("wmv2", CUT)), "truncated|damaged"),
        ("prores", "mov", "cut"): (cut(plain("prores", CUT, container=FAST)), "truncated"),
        ("gif", "gif", "cut"): (cut(animation("GIF")), "truncated"),
        ("apng", "apng", "cut"): (cut(animation("PNG")), "truncated|damaged|Invalid"),
        ("webp", "webp", "cut"): (cut(animation("WEBP")), "truncated"),
        ("vp9", "webm", "empty"): (lambda path: path.write_bytes(b""), "Invalid data"),
    }
    return [Row(*names, make, refusal=refusal) for names, (make, refusal) in kinds.items()]


def stored(image: np.ndarray, turn: int) -> np.ndarray:
    """A picture as it was before it was turned and stretched."""
    return np.asarray(Image.fromarray(np.rot90(image, turn)).resize((W, H)))


def examine(row: Row, path: Path) -> Found:
    """What comes out of a file, and what a scan says of it."""
    numbers, notes, size, refusal, scan_refusal, num_scanned = [], [], (0, 0), "", "", 0
    try:
        for _, image in decode(path, notes=notes):
            pixels = np.asarray(image)
            size = pixels.shape[:2]
            # Pictures of other sizes are read as they are.
            numbers.append(number_of(pixels if size[0] == 720 else stored(pixels, row.turn)))
    except VIDEO_ERRORS as error:
        refusal = reason(error)
    try:
        num_scanned = len(scan_video(path).pts)
    except VIDEO_ERRORS as error:
        scan_refusal = reason(error)
    return Found(numbers, size, notes, refusal, scan_refusal, num_scanned)


def problem(row: Row, found: Found) -> str:
    """What is not as the row wants it; "" if all is."""
    if row.refusal:
        return "" if re.search(row.refusal, found.refusal) else f"refused as {found.refusal!r}"
    if found.refusal or found.scan_refusal:
        return f"refused: {found.refusal or found.scan_refusal}"
    if found.numbers != list(row.numbers) or found.num_scanned != len(row.numbers):
        return f"frames {found.numbers}, {found.num_scanned} scanned"
    if found.size != row.size:
        return f"size {found.size}"
    noted = "; ".join(found.notes)
    return "" if (row.note in noted if row.note else not noted) else f"notes {noted!r}"


def outcome(found: Found) -> str:
    """What the table says of a file."""
    if found.refusal:
        return f"refused: {found.refusal}"
    return "; ".join([f"{len(found.numbers)} frames of {found.size[1]} x {found.size[0]}", *found.notes])


@contextlib.contextmanager
def silent():
    """Encoders write to the standard error stream, whatever they are told."""
    sys.stderr.flush()
    own = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def make_all(folder: Path, wanted: Sequence[Row]) -> list[Path]:
    """The files of rows, in their order."""
    paths = [folder / f"{number:03d}.{row.container}" for number, row in enumerate(wanted)]
    with silent():
        for row, path in zip(wanted, paths, strict=True):
            row.make(path)
    return paths


def main() -> int:
    """Print the table. Returns the exit code: 1 if something is not as it should be."""
    wrong = 0
    print("| codec | container | | outcome |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        table = rows()
        for row, path in zip(table, make_all(Path(folder), table), strict=True):
            found = examine(row, path)
            says = problem(row, found)
            wrong += bool(says)
            mark = f" **WRONG**: {says}" if says else ""
            print(f"| {row.codec} | {row.container} | {row.oddity} | {outcome(found)}{mark} |")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
