"""Image files of all kinds, made from nothing: as everybody writes them, odd ones, damaged ones."""

import io
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48


def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture without noise, of which no turn looks like another."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, "JPEG", **{"quality": 92} | options)
    return file.getvalue()


def png(image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, "PNG", **options)
    return file.getvalue()


# ---- JPEG


def of_ffmpeg(pixels: str) -> bytes:
    """What FFmpeg's encoder makes, whose sampling factors others write in lower terms."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = WIDTH, HEIGHT, pixels, Fraction(1, 25)
    frame = av.VideoFrame.from_image(picture()).reformat(format=pixels)
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def inserted(data: bytes, what: bytes, before: bytes = b"\xff\xdb") -> bytes:
    """The file with bytes before the first marker of a kind; by default after JFIF's header."""
    place = data.index(before)
    return data[:place] + what + data[place:]


def exif(orientation: int, *, little: bool = True, kind: int = 3, more: tuple = ()) -> bytes:
    """An EXIF block, without its name: the orientation, and other entries (tag, kind, count, value or offset)."""
    order = "<" if little else ">"
    value = struct.pack(order + ("HH" if kind == 3 else "I"), orientation, *([0] if kind == 3 else []))
    entries = [struct.pack(order + "HHI", 0x0112, kind, 1) + value]
    entries += [struct.pack(order + "HHII", *entry) for entry in more]
    head = (b"II*\0" if little else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(entries)) + b"".join(sorted(entries)) + bytes(4)


def app1_exif(block: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + block)


def xmp(orientation: int, *, element: bool = False) -> bytes:
    inner = f"><tiff:Orientation>{orientation}</tiff:Orientation>" if element else f' tiff:Orientation="{orientation}">'
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def app1_xmp(packet: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)


def patched(data: bytes, before: bytes, offset: int, value: bytes) -> bytes:
    """The file with other bytes at an offset from the first place of some."""
    place = data.index(before) + offset
    return data[:place] + value + data[place + len(value) :]


def rgb_jpeg() -> bytes:
    """RGB without a change of colours, as Adobe's marker says."""
    return jpeg(keep_rgb=True)


def scan(data: bytes) -> int:
    """Where the pixels' data of a JPEG file with one scan begin."""
    place = data.index(b"\xff\xda")
    return place + 2 + struct.unpack(">H", data[place + 2 : place + 4])[0]


def flipped(data: bytes, start: int, number: int = 10, seed: int = 1) -> bytes:
    """The file with some bits turned over between a place and its last bytes."""
    changed = bytearray(data)
    for place in np.random.default_rng(seed).choice(np.arange(start, len(data) - 20), number, replace=False):
        changed[place] ^= 0x10
    return bytes(changed)


# ---- PNG


def chunk(kind: bytes, data: bytes, crc: int = 0) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc)


def raw_png(depth: int, colours: int, *, interlaced: bool = False, extra: bytes = b"", crc: int = 0) -> bytes:
    """A PNG file of random samples by hand: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA."""
    rng = np.random.default_rng(depth * 10 + colours)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    samples = rng.integers(0, 2**depth, (HEIGHT, WIDTH, channels))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b""
    for y, x, dy, dx in passes if interlaced else [(0, 0, 1, 1)]:
        for row in samples[y::dy, x::dx].reshape(len(range(y, HEIGHT, dy)), -1):
            bits = (row[:, None] >> np.arange(depth - 1, -1, -1) & 1).astype(np.uint8).ravel()
            lines += b"\0" + np.packbits(bits).tobytes()
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colours, 0, 0, interlaced)
    palette = chunk(b"PLTE", rng.bytes(3 * 2**depth)) if colours == 3 else b""
    data = chunk(b"IDAT", zlib.compress(lines), crc)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + extra + data + chunk(b"IEND", b"")


def with_chunk(data: bytes, what: bytes, before: bytes = b"IDAT") -> bytes:
    place = data.index(before) - 4
    return data[:place] + what + data[place:]


def profile(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it into PNG files."""
    block = b"Exif\0\0" + exif(orientation)
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def itxt(orientation: int, *, element: bool = False) -> bytes:
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation, element=element))


ICC = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(128))
ADOBE = b"Adobe\0\x64\0\0\0\0"  # and its transform

PLAIN: dict[str, Callable[[], bytes]] = {  # what DALI is given as it is
    "jpeg": jpeg,
    "jpeg, 4:4:4": lambda: jpeg(subsampling=0),
    "jpeg, 4:2:2": lambda: jpeg(subsampling=1),
    "jpeg, 4:2:2 of FFmpeg": lambda: of_ffmpeg("yuvj422p"),
    "jpeg, 4:4:4 of FFmpeg": lambda: of_ffmpeg("yuvj444p"),
    "jpeg, gray": lambda: jpeg(picture().convert("L")),
    "jpeg, progressive": lambda: jpeg(progressive=True),
    "jpeg, optimized": lambda: jpeg(optimize=True),
    "jpeg, restart markers": lambda: jpeg(restart_marker_blocks=2),
    "jpeg, comment": lambda: jpeg(comment=b"\xff\xda\xff\xd9"),
    "jpeg, several APP segments": lambda: inserted(jpeg(), ICC + segment(0xEC, b"Ducky") + segment(0xE3, bytes(99))),
    "jpeg, JFIF thumbnail": lambda: inserted(jpeg(), segment(0xE0, b"JFXX\0\x10" + jpeg(picture(1, 16, 16)))),
    "jpeg, Adobe YCbCr": lambda: inserted(jpeg(), segment(0xEE, ADOBE + b"\1")),
    "jpeg, one pixel": lambda: jpeg(picture(0, 1, 1)),
    "jpeg, odd sides": lambda: jpeg(picture(0, 61, 37)),
    "jpeg, bytes after its end": lambda: jpeg() + b"and more" * 9,
    "jpeg, XMP upright": lambda: inserted(jpeg(), app1_xmp(b"<x:xmpmeta/>")),
    **{f"jpeg, EXIF {o}": lambda o=o: inserted(jpeg(), app1_exif(exif(o))) for o in range(1, 9)},
    "jpeg, EXIF 6, big-endian": lambda: inserted(jpeg(), app1_exif(exif(6, little=False))),
    "jpeg, EXIF without room": lambda: inserted(jpeg(), segment(0xE1, b"Ex")),
    "jpeg, sampled 1 x 2": lambda: patched(jpeg(), b"\xff\xc0", 11, b"\x12"),
    "jpeg, EXIF without a word on it": lambda: inserted(jpeg(), app1_exif(exif(1).replace(b"\x12\1", b"\x28\1"))),
    "png": png,
    "png, gray": lambda: png(picture().convert("L")),
    "png, RGBA": lambda: raw_png(8, 6),
    "png, palette": lambda: raw_png(8, 3),
    "png, interlaced": lambda: raw_png(8, 2, interlaced=True),
    "png, one pixel": lambda: png(picture(0, 1, 1)),
    "png, as FFmpeg writes": lambda: with_chunk(
        png(), chunk(b"pHYs", bytes(9)) + chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"cHRM", bytes(32))
    ),
    "png, bytes after its end": lambda: png() + b"and more" * 9,
}
ODD: dict[str, Callable[[], bytes]] = {  # good, but not for DALI
    "jpeg, bytes between headers": lambda: inserted(jpeg(), b"\0\x12\x34"),
    "jpeg, bytes before the frame": lambda: inserted(jpeg(), b"\0\x12\x34", b"\xff\xc0"),
    "jpeg, bytes before the scan": lambda: inserted(jpeg(), b"\0\x12\x34", b"\xff\xda"),
    "jpeg, fill bytes": lambda: inserted(jpeg(), b"\xff\xff\xff"),
    "jpeg, restart between headers": lambda: inserted(jpeg(), b"\xff\xd3"),
    **{f"jpeg, XMP {o}": lambda o=o: inserted(jpeg(), app1_xmp(xmp(o))) for o in (1, 3, 6, 7)},
    "jpeg, XMP 6, element": lambda: inserted(jpeg(), app1_xmp(xmp(6, element=True))),
    "jpeg, XMP 6, EXIF 3": lambda: inserted(jpeg(), app1_xmp(xmp(6)) + app1_exif(exif(3))),
    "jpeg, XMP 6, EXIF without": lambda: inserted(
        jpeg(), app1_xmp(xmp(6)) + app1_exif(exif(6).replace(b"\x12\1", b"\x28\1"))
    ),
    "jpeg, EXIF 6 as a long number": lambda: inserted(jpeg(), app1_exif(exif(6, little=False, kind=4))),
    "jpeg, EXIF 6 beside damage": lambda: inserted(jpeg(), app1_exif(exif(6, more=((0x010F, 2, 9999, 9999),)))),
    "jpeg, EXIF of two segments": lambda: inserted(jpeg(), app1_exif(exif(6)[:10]) + app1_exif(exif(6)[10:])),
    "jpeg, EXIF damaged": lambda: inserted(jpeg(), app1_exif(b"XX*\0\x08\0\0\0" + bytes(20))),
    "jpeg, EXIF cut": lambda: inserted(jpeg(), app1_exif(exif(6)[:16])),
    "jpeg, EXIF empty": lambda: inserted(jpeg(), segment(0xE1, b"Exif\0\0")),
    "jpeg, Adobe without a transform": lambda: inserted(jpeg(), segment(0xEE, ADOBE + b"\0")),
    "jpeg, Photoshop's resources": lambda: inserted(
        jpeg(), segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0" + bytes(4))
    ),
    "jpeg, RGB": rgb_jpeg,
    "jpeg, CMYK": lambda: jpeg(picture().convert("CMYK")),
    "jpeg, YCCK": lambda: inserted(
        jpeg(picture().convert("CMYK")).replace(segment(0xEE, ADOBE + b"\0"), b""), segment(0xEE, ADOBE + b"\2")
    ),
    "jpeg, arithmetic coding": lambda: patched(jpeg(), b"\xff\xc0", 1, b"\xc9"),
    "jpeg, gray sampled 2 x 2": lambda: patched(jpeg(picture().convert("L")), b"\xff\xc0", 11, b"\x22"),
    "jpeg, of two pictures": lambda: mpo(),
    "png, gray of 1 bit": lambda: raw_png(1, 0),
    "png, gray of 2 bits": lambda: raw_png(2, 0),
    "png, gray of 4 bits": lambda: raw_png(4, 0, interlaced=True),
    "png, gray of 16 bits": lambda: raw_png(16, 0),
    "png, RGB of 16 bits": lambda: raw_png(16, 2),
    "png, palette of 1 bit": lambda: raw_png(1, 3),
    "png, palette of 4 bits": lambda: raw_png(4, 3),
    "png, palette and transparency": lambda: raw_png(8, 3, extra=chunk(b"tRNS", bytes(range(256)))),
    "png, a colour transparent": lambda: raw_png(8, 2, extra=chunk(b"tRNS", bytes(6))),
    "png, gray and alpha": lambda: raw_png(8, 4),
    "png, gray and alpha of 16 bits": lambda: raw_png(16, 4),
    "png, RGBA of 16 bits": lambda: raw_png(16, 6, interlaced=True),
    "png, EXIF 6": lambda: with_chunk(png(), chunk(b"eXIf", exif(6))),
    "png, EXIF 5 at its end": lambda: with_chunk(png(), chunk(b"eXIf", exif(5)), b"IEND"),
    "png, XMP 6": lambda: with_chunk(png(), itxt(6)),
    "png, XMP 6, element": lambda: with_chunk(png(), itxt(6, element=True)),
    "png, EXIF 6 as text": lambda: with_chunk(png(), profile(6)),
    "png, without its end": lambda: png()[:-12],
    "png, cut in its end": lambda: png()[:-5],
    "png, animated": lambda: png(save_all=True, append_images=[picture(1)]),
}
DAMAGED: dict[str, Callable[[], bytes]] = {  # some of it good enough to be read; for all the same
    "jpeg, empty": lambda: b"",
    "jpeg, two bytes": lambda: jpeg()[:2],
    "jpeg, cut in its headers": lambda: jpeg()[:200],
    "jpeg, cut before its scan": lambda: jpeg()[: jpeg().index(b"\xff\xda")],
    "jpeg, cut in its scan": lambda: jpeg()[: len(jpeg()) * 2 // 3],
    "jpeg, without its end": lambda: jpeg()[:-2],
    "jpeg, cut and ended": lambda: jpeg()[: len(jpeg()) * 2 // 3] + b"\xff\xd9",
    "jpeg, progressive, cut": lambda: jpeg(progressive=True)[: len(jpeg(progressive=True)) * 2 // 3],
    "jpeg, progressive, cut and ended": lambda: jpeg(progressive=True)[:-300] + b"\xff\xd9",
    "jpeg, flipped bits": lambda: flipped(jpeg(), scan(jpeg())),
    "jpeg, restart markers lost": lambda: jpeg(restart_marker_blocks=2).replace(b"\xff\xd2", b"\xff\0"),
    "jpeg, Huffman tables": lambda: patched(jpeg(), b"\xff\xc4", 5, b"\xff" * 16),
    "jpeg, no Huffman table": lambda: patched(jpeg(), b"\xff\xc4", 1, b"\xfe"),
    "jpeg, no quantization table": lambda: patched(jpeg(), b"\xff\xdb", 1, b"\xfe"),
    "jpeg, quantization table cut": lambda: patched(jpeg(), b"\xff\xdb", 2, b"\0\x30"),
    "jpeg, no frame": lambda: patched(jpeg(), b"\xff\xc0", 1, b"\xfe"),
    "jpeg, two frames": lambda: inserted(jpeg(), segment(0xC0, b"\x08\0\x10\0\x10\1\1\x11\0"), b"\xff\xc4"),
    "jpeg, zero size": lambda: patched(jpeg(), b"\xff\xc0", 5, bytes(4)),
    "jpeg, 900 million pixels": lambda: patched(jpeg(), b"\xff\xc0", 5, struct.pack(">HH", 30000, 30000)),
    "jpeg, 12 bits": lambda: patched(jpeg(), b"\xff\xc0", 4, b"\x0c"),
    "jpeg, two channels": lambda: patched(jpeg(), b"\xff\xc0", 9, b"\2"),
    "jpeg, lossless": lambda: patched(jpeg(), b"\xff\xc0", 1, b"\xc3"),
    "jpeg, sampling 0": lambda: patched(jpeg(), b"\xff\xc0", 11, b"\0"),
    "jpeg, JFIF cut": lambda: jpeg()[:2] + segment(0xE0, b"JFIF") + jpeg()[20:],
    "jpeg, segment of length 0": lambda: inserted(jpeg(), b"\xff\xe5\0\0"),
    "jpeg, segment beyond the end": lambda: inserted(jpeg(), b"\xff\xe5\xff\xff"),
    "png, cut in its header": lambda: png()[:30],
    "png, cut in its pixels": lambda: png()[: len(png()) // 2],
    "png, flipped bits": lambda: flipped(png(), 60),
    "png, CRC of pixels": lambda: raw_png(8, 2, crc=1),
    "png, CRC of a chunk": lambda: with_chunk(png(), chunk(b"pHYs", bytes(9), 1)),
    "png, no pixels": lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", png()[16:29]) + chunk(b"IEND", b""),
    "png, zero size": lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(8) + png()[24:29]) + png()[33:],
    "png, no palette": lambda: raw_png(8, 3).replace(b"PLTE", b"pLTE"),
    "png, 3 bits": lambda: raw_png(8, 0)[:24] + b"\3" + raw_png(8, 0)[25:],
    "text": lambda: b"404 not found\n" * 20,
    "bmp": lambda: other("BMP"),
    "gif": lambda: other("GIF"),
    "webp": lambda: other("WEBP"),
}


def mpo() -> bytes:
    file = io.BytesIO()
    picture().save(file, "MPO", save_all=True, append_images=[picture(1)])
    return file.getvalue()


def other(kind: str) -> bytes:
    file = io.BytesIO()
    picture().save(file, kind)
    return file.getvalue()


ALL = PLAIN | ODD | DAMAGED


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The file after one to three accidents, most of them in its headers."""
    for _ in range(rng.integers(1, 4)):
        end = min(len(data), 700) if rng.random() < 0.7 else len(data)
        if end < 4:
            return data
        place, length = int(rng.integers(0 if rng.random() < 0.1 else 2, end)), int(rng.integers(1, 5))
        head, byte, tail = data[:place], data[place], data[place + 1 :]
        kind, other = int(rng.integers(6)), int(rng.integers(len(data)))
        if kind == 0:
            data = head + rng.bytes(1) + tail
        elif kind == 1:
            data = head + bytes([byte ^ 1 << int(rng.integers(8))]) + tail
        elif kind == 2:
            data = head + bytes([rng.choice([0, 1, 127, 192, 196, 217, 218, 225, 255])]) + tail
        elif kind == 3:
            data = head + rng.bytes(length) + data[place:]
        elif kind == 4:
            data = head + data[place + length :] if rng.random() < 0.8 else head
        else:
            data = head + data[other : other + 12 * length] + data[place:]
    return data
