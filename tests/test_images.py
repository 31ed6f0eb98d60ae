"""Image files as frames: which files are frames, in which order, and what is not decoded."""

import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from dfer.images import MAX_PIXELS, BadImage, decode_image, frame_names, natural_key, open_image


def test_frames_come_in_natural_order_and_hidden_files_are_none(tmp_path):
    for name in ("10.jpg", "2.JPG", "._2.jpg", ".hidden.png", "1.jpeg", "notes.txt", "3.png"):
        (tmp_path / name).touch()
    assert frame_names(tmp_path) == ["1.jpeg", "2.JPG", "3.png", "10.jpg"]
    with pytest.raises(FileNotFoundError):
        frame_names(tmp_path / "gone")


@pytest.mark.parametrize(
    "names",
    [
        [f"{n:05d}.jpg" for n in (10, 2, 1, 99999)],
        ["10.jpg", "9.jpg", "1.jpg"],
        ["10.jpg", "09.png", "08.JPG"],
        ["a10.jpg", "a09.jpg"],
        ["10.jpeg", "09.jpeg"],
        ["1٣.jpg", "12.jpg", "1٤.jpg"],
        ["1².jpg", "10.jpg", "11.jpg"],
    ],
)
def test_padded_numbers_are_sorted_as_all_others(monkeypatch, names):
    """Names of one length are sorted letter by letter, which is faster, only where that is the same."""
    monkeypatch.setattr("os.listdir", lambda folder: names)
    assert frame_names("folder") == sorted(names, key=natural_key)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size, with next to no data."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pixels_are_rgb_and_upright():
    picture = np.zeros((4, 6, 3), dtype=np.uint8)
    picture[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    turned = decode_image(encoded(Image.fromarray(picture), format="PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), picture[::-1, ::-1])
    gray = decode_image(encoded(Image.fromarray(picture[..., 0]), format="PNG"))
    assert np.array_equal(np.asarray(gray), picture)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zero bytes"),
        (b"GIF89a" + bytes(50), "neither JPEG nor PNG"),
        (claiming(MAX_PIXELS // 8, 9), "claims .* pixels, more than"),
        (claiming(2**17, 2**17), "claims more than"),
        (encoded(Image.new("RGB", (40, 40)), format="JPEG")[:400], "[Tt]runcated|broken"),
    ],
    ids=["empty", "gif", "oversized", "bomb", "truncated"],
)
def test_what_is_refused(tmp_path, data, message):
    (tmp_path / "1.png").write_bytes(data)
    for source in (data, tmp_path / "1.png"):
        with pytest.raises(BadImage, match=message) as caught:
            decode_image(source)
        assert "\n" not in str(caught.value)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(BadImage, match="not a file"):
        open_image(tmp_path / "1.jpg")
