"""HDR becomes SDR as a plain calculation by the ITU's formulas has it, and what SDR can show stays as it is."""

import itertools
import math
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dfer.predict.inputs import InputVideo
from dfer.predict.output import describe, summarize
from dfer.predict.predictor import VideoPrediction
from dfer.video.decode import decode
from dfer.video.hdr import to_sdr
from dfer.video.random_access import read_frames, scan_video
from scripts import prepare_videos
from tests.video_table import plain

# x and y of R, G, B; white is D65.
CHROMATICITIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def to_xyz(primaries: int) -> np.ndarray:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in CHROMATICITIES[primaries]]).T
    white = np.array((0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290))
    return columns * np.linalg.solve(columns, white)


def pq(nits: float) -> float:
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def pq_inverse(code: float) -> float:
    y = code ** (1 / 78.84375)
    return 10000 * (max(y - 0.8359375, 0) / (18.8515625 - 18.6875 * y)) ** (1 / 0.1593017578125)


def hlg_inverse(code: float) -> float:
    return code**2 / 3 if code <= 0.5 else (math.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12


def eetf(nits: float) -> float:
    """BT.2390-10, 5.4.1, from 1000 to 203 nits, both black at 0."""
    e1, most = min(pq(nits) / pq(1000), 1), pq(203) / pq(1000)
    knee = 1.5 * most - 0.5
    if e1 < knee:
        return nits
    t = (e1 - knee) / (1 - knee)
    p = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return pq_inverse(p * pq(1000))


def oracle(code: tuple[float, ...], transfer: str, primaries: int) -> list[float]:
    """One pixel, R'G'B' in 0..1, to 0..255."""
    if transfer == "PQ":
        nits = [pq_inverse(c) for c in code]
    else:
        scene = [hlg_inverse(c) for c in code]
        luma = 0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]
        nits = [1000 * luma**0.2 * c for c in scene]
    brightest = max(nits)
    gain = eetf(brightest) / brightest if brightest else 1
    linear = np.linalg.solve(to_xyz(1), to_xyz(primaries)) @ [gain * n / 203 for n in nits]
    linear = [min(max(c, 0), 1) for c in linear]
    return [255 * (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055) for c in linear]


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
@pytest.mark.parametrize("primaries", [9, 1, 12, 2])
def test_pixels_are_those_of_the_formulas(transfer: str, primaries: int) -> None:
    rng = np.random.default_rng(primaries)
    codes = rng.integers(0, 65536, (40, 25, 3)).astype(np.uint16)
    codes[0, :20] = rng.integers(0, 4000, (20, 3))  # dark
    codes[1, :9] = np.linspace(0, 65535, 9)[:, None].astype(np.uint16)  # grey
    found = to_sdr(codes, transfer, primaries).reshape(-1, 3)
    for code, pixel in zip(codes.reshape(-1, 3), found, strict=True):
        wanted = oracle(tuple(code / 65535), transfer, {2: 9}.get(primaries, primaries))
        assert np.abs(pixel - wanted).max() < 1.1, (code, pixel, wanted)


def test_what_sdr_can_show_stays() -> None:
    """Greys up to 90 nits come back as they were in SDR with its white at 203; brighter ones rise, up to white."""
    levels = np.arange(256)
    linear = np.where(levels <= 0.04045 * 255, levels / 255 / 12.92, ((levels / 255 + 0.055) / 1.055) ** 2.4)
    codes = np.array([[[65535 * pq(203 * value)] * 3 for value in linear]]).astype(np.uint16)
    found = to_sdr(codes, "PQ", 9)[0, :, 0].astype(int)
    dark = 203 * linear < 90
    assert np.abs(found - levels)[dark].max() <= 1 and (np.diff(found) >= 0).all()
    assert 220 < found[255] < 235  # paper; what shines is brighter
    shining = np.full((1, 1, 3), 65535 * pq(1000), np.uint16)
    assert to_sdr(shining, "PQ", 9).tolist() == [[[255, 255, 255]]]


def hdr_video(path: Path, transfer: int, colours: list[tuple[int, int, int]], pixels: str = "yuv420p10le") -> Path:
    """A frame for each colour, R'G'B' of 10 bits, as BT.2020 of limited range."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "preset": "ultrafast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 48, pixels
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries, context.color_range = 9, transfer, 9, 1
        for number, colour in enumerate(colours):
            r, g, b = np.array(colour) / 1023
            y = 0.2627 * r + 0.6780 * g + 0.0593 * b
            yuv = 64 + 876 * y, 512 + 896 * (b - y) / 1.8814, 512 + 896 * (r - y) / 1.4746
            frame, shift = av.VideoFrame(32, 48, pixels), 0 if "10" in pixels else 2
            for plane, value in zip(frame.planes, yuv, strict=True):
                size, kind = (plane.buffer_size // 2, np.uint16) if not shift else (plane.buffer_size, np.uint8)
                plane.update(np.full(size, round(value / 2**shift), kind).tobytes())
            frame.pts = number
            frame.colorspace, frame.color_trc, frame.color_primaries, frame.color_range = 9, transfer, 9, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv444p10le", "yuv422p10le", "yuv420p"])
@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_videos_are_mapped(transfer: int, name: str, pixels: str, tmp_path: Path) -> None:
    colours = [(450, 400, 380), (200, 250, 300), (594, 594, 594), (700, 500, 200)]
    path, notes = hdr_video(tmp_path / "v.mp4", transfer, colours, pixels), []
    frames = [np.asarray(image) for _, image in decode(path, notes=notes)]
    assert notes == [f"HDR ({name}) mapped to SDR"]
    for colour, frame in zip(colours, frames, strict=True):
        wanted = oracle(tuple(np.array(colour) / 1023), name, 9)
        assert np.abs(frame.reshape(-1, 3).mean(0) - wanted).max() < (3 if "10" in pixels else 8)
    # The trainer sees the same, also of 8 bits, which it else takes as they are stored.
    scan = scan_video(path)
    found = read_frames(path, scan.pts, scan.key, np.arange(4), scan.matrix, scan.full_range)
    assert all(np.array_equal(one, other) for one, other in zip(found, frames, strict=True)) and not scan.pixels


def test_a_prediction_says_it() -> None:
    prediction = VideoPrediction(8, 8, np.zeros(1), None, np.full(1, -1), None, None, 1, 1, np.full((1, 7), np.nan))
    for notes, line in (((), "no face in 1 frames"), (("HDR", "b"), "no face in 1 frames (HDR; b)")):
        summary = summarize(InputVideo(Path("v"), "v"), prediction._replace(notes=notes), [])
        assert summary["notes"] == list(notes) and describe(summary) == line


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_colours_may_stand_in_the_container_alone(codec: str, suffix: str, tmp_path: Path) -> None:
    """HEVC's decoder in FFmpeg forgets them, that of VP9 the matrix."""
    plain(codec)(tmp_path / "source.mp4")
    images = {}
    for colours in ((16, 9, 9), (14, 9, 9), (1, 1, 1), (2, 2, 2)):  # transfer, primaries, matrix
        path, notes = tmp_path / f"{colours[0]}.{suffix}", []
        with av.open(str(tmp_path / "source.mp4")) as source, av.open(str(path), "w") as file:
            stream = file.add_stream_from_template(source.streams.video[0])
            context = stream.codec_context
            context.color_trc, context.color_primaries, context.colorspace = colours
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    file.mux(packet)
        images[colours] = [np.asarray(image).astype(int) for _, image in decode(path, notes=notes)]
        assert notes == ["HDR (PQ) mapped to SDR"] * (colours[0] == 16)
        scan = scan_video(path)
        assert scan.matrix == {9: "bt2020", 1: "bt709", 2: "bt601"}[colours[2]] and bool(scan.pixels) == (not notes)
        found = read_frames(path, scan.pts, scan.key, np.arange(3), scan.matrix, scan.full_range)
        assert (found[0].shape[2] == 3) == bool(notes)  # of HDR as `decode`, else as it is stored
        assert not notes or all(np.array_equal(one, two) for one, two in zip(found, images[colours], strict=False))
    for colours, others in itertools.combinations(images.values(), 2):
        assert np.abs(colours[0] - others[0]).mean() > 1


def test_the_report_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hdr_video(tmp_path / "in.mp4", 16, [(400, 400, 400)] * 3)
    options = ["--out", str(tmp_path), "--no-crop", "--unlabelled", "--workers", "1"]
    for _ in range(2):  # the second time by the record
        assert prepare_videos.main([str(tmp_path / "in.mp4"), *options]) == 0
        assert "1 with notes on their pictures (HDR, colours, pixels): " in capsys.readouterr().out
        report = (tmp_path / "report.csv").read_text().splitlines()
        assert report[0].endswith(",outcome,notes") and report[1].endswith(",ok,HDR (PQ) mapped to SDR")
    with Image.open(tmp_path / "frames" / "in" / "00001.jpg") as image:
        wanted = oracle((400 / 1023,) * 3, "PQ", 9)
        assert np.abs(np.asarray(image).reshape(-1, 3).mean(0) - wanted).max() < 3
