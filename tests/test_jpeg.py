"""Our decoder of JPEG files: Pillow's pixels to the bit, all else is refused, and nothing harms it."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from dali_pipes import feeding, graphs, kernels
from dali_pipes.feeding import _crop_inputs
from dali_pipes.headers import is_plain
from dali_pipes.jpeg import crop_shape, decode_crop
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import epoch_plan
from tests.conftest import ROOT
from tests.image_files import HEIGHT, WIDTH, app1_exif, exif, inserted, jpeg, of_ffmpeg, picture, png, segment
from tests.test_streaming import T, loader

WHOLE = np.array([0, 0, 1, 1], np.float32)
# Height and width: one block, one more than it, less than one; of 16 and one more; larger.
SHAPES = [(8, 8), (9, 17), (1, 5), (5, 1), (16, 16), (17, 33), (31, 50), (129, 70), (300, 511)]
KINDS = {"gray": None, "444": 0, "422": 1, "420": 2}  # of Pillow's subsampling


def image(rng: np.random.Generator, height: int, width: int, kind: str) -> Image.Image:
    """Return noise, waves, or waves of black and white, whose blocks overshoot."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 127 * np.sin(x / 7), 127 + 127 * np.cos(y / 5), (3 * x + 5 * y) % 256], axis=-1)
    noise = rng.integers(0, 256, (height, width, 3))
    return Image.fromarray({"noise": noise, "waves": waves, "edges": 255 * (waves > 127)}[kind].astype(np.uint8))


def boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    start = rng.random((number, 2)) * 0.95
    return np.concatenate([start, rng.random((number, 2)) * (1 - start)], axis=1).astype(np.float32)


def decoded(data: bytes, box: np.ndarray = WHOLE, behind: bytes = b"") -> np.ndarray | None:
    file = np.frombuffer(data + behind, np.uint8)
    rows, width, first, columns = crop_shape(file, box)
    pixels = np.empty((rows, width, 3), np.uint8)
    return pixels[:, first : first + columns] if rows and decode_crop(file, box, pixels) else None


def cut_out(pixels: np.ndarray, box: np.ndarray) -> np.ndarray:
    (top, rows), (left, columns) = (kernels.cut(box[i], box[i + 2], pixels.shape[i]) for i in (0, 1))
    return pixels[top : top + rows, left : left + columns]


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_those_of_libjpeg(sampling, shape):
    """Of whole pictures and of crops; of coarse and fine coefficients; with tables of long codes; whatever follows."""
    rng, small = np.random.default_rng(shape), max(shape) < 200  # Pillow optimises no large noise
    for kind in ("noise", "waves", "edges"):
        for quality in (3, 50, 93, 100):
            source = image(rng, *shape, kind).convert("L" if sampling == "gray" else "RGB")
            data = jpeg(source, quality=quality, subsampling=KINDS[sampling] or 0, optimize=small and quality == 93)
            want = pillow(data)
            for box in (WHOLE, *boxes(rng, 5)):
                got = decoded(data, box, rng.bytes(int(rng.integers(40))))
                if sampling in ("422", "420") and shape[1] <= 4:
                    assert got is None  # libjpeg does not blend chroma there
                else:
                    assert np.array_equal(got, cut_out(want, box))


def with_code_of_ones(data: bytes) -> bytes:
    """Give the first table of coefficients one more symbol of 16 bits, after which no code is left."""
    place = data.index(b"\xff\xc4")
    while data[place + 4] >> 4 == 0:  # a table of means
        place = data.index(b"\xff\xc4", place + 2)
    size = int.from_bytes(data[place + 2 : place + 4], "big")
    lengths = bytearray(data[place + 5 : place + 21])
    used = sum(count << 16 - length for length, count in enumerate(lengths, start=1))
    more = 2**16 - used
    lengths[15] += more
    table = data[place + 4 : place + 5] + bytes(lengths) + data[place + 21 : place + 2 + size] + bytes(more)
    return data[:place] + segment(0xC4, table) + data[place + 2 + size :]


def black_and_white() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8)
    return Image.fromarray(255 * noise)


OTHERS = {
    "progressive": lambda: jpeg(progressive=True),
    "restarts": lambda: jpeg(restart_marker_blocks=2),
    "four colours": lambda: jpeg(picture().convert("CMYK")),
    "turned by EXIF": lambda: inserted(jpeg(), app1_exif(exif(6))),
    "turned by EXIF of the other order": lambda: inserted(jpeg(), app1_exif(exif(3, little=False))),
    "EXIF cut short": lambda: inserted(jpeg(), app1_exif(exif(1)[:12])),
    "a code of ones alone": lambda: with_code_of_ones(jpeg()),
    "noise of black and white": lambda: jpeg(black_and_white(), quality=100),
    "sampling factors in other terms": lambda: of_ffmpeg("yuvj444p"),
    "no tables": lambda: jpeg().replace(b"\xff\xc4", b"\xff\xfe"),
    "no quantisers": lambda: jpeg().replace(b"\xff\xdb", b"\xff\xfe"),
    "two frames": lambda: inserted(jpeg(), jpeg()[jpeg().index(b"\xff\xc0") :][:19]),
    "arithmetic": lambda: jpeg().replace(b"\xff\xc0", b"\xff\xc9"),
    "a table of 300 symbols": lambda: inserted(jpeg(), segment(0xC4, bytes([0, *[20] * 15, 0, *[1] * 300]))),
    "a picture of gigabytes": lambda: jpeg().replace(bytes([0, HEIGHT, 0, WIDTH]), b"\xff" * 4),
    "no end": lambda: jpeg()[:-2],
    "half of it": lambda: jpeg()[: len(jpeg()) // 2],
    "half of it and an end": lambda: jpeg()[: len(jpeg()) // 2] + b"\xff\xd9",
    "a few bytes short": lambda: jpeg()[:-5] + b"\xff\xd9",
    "PNG": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "nothing": lambda: b"\xff\xd8",
}


# Refused only where more than the frame header is read.
LATER = {"restarts", "no tables", "no quantisers", "two frames", "half of it and an end", "a few bytes short"}
LATER |= {"a code of ones alone"}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_of_the_plain_kind_is_refused(name):
    assert decoded(jpeg()) is not None
    data = OTHERS[name]()
    assert data != jpeg() and decoded(data) is None
    assert name not in LATER or crop_shape(np.frombuffer(data, np.uint8), WHOLE)[0] > 0


def test_exif_that_does_not_turn_the_picture_is_no_hindrance():
    for little in (True, False):
        data = inserted(jpeg(), app1_exif(exif(1, little=little)))
        assert np.array_equal(decoded(data), pillow(jpeg()))


def test_damaged_files_are_refused_or_give_the_pixels_of_libjpeg():
    rng = np.random.default_rng(0)
    refused = same = behind = 0
    for trial in range(4000):
        if trial % 20 == 0:
            source = image(rng, *rng.integers(5, 60, 2), rng.choice(["noise", "waves", "edges"]))
            whole = jpeg(source, quality=int(rng.integers(1, 101)), subsampling=int(rng.integers(3)))
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(2, len(data) - 2))
            change = [[rng.integers(256)], [data[place] ^ 1 << rng.integers(8)], [], rng.integers(0, 256, 3)]
            data[place : place + 1] = bytes(map(int, change[rng.integers(4)]))
        (box,) = boxes(rng, 1)
        got = decoded(bytes(data), box)
        if got is None or not is_plain(np.frombuffer(bytes(data), np.uint8)):
            refused += 1
            continue
        try:
            want = pillow(bytes(data))
        except OSError:  # it ends behind the crop
            behind += 1
            continue
        same += 1
        assert np.array_equal(got, cut_out(want, box))
    assert refused > 1000 and same > 500 and behind < 5


FREED = """
import ctypes, mmap
import numpy as np
from dali_pipes import kernels
from dali_pipes.headers import is_plain
from tests.test_jpeg import WHOLE, decoded, image, jpeg, pillow
rng = np.random.default_rng(0)
for sampling in (0, 1, 2):
    data = jpeg(image(rng, 70, 90, "waves"), subsampling=sampling)
    assert np.array_equal(decoded(data), pillow(data)), sampling
    page = mmap.PAGESIZE * -(-len(data) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, page + mmap.PAGESIZE)
    place = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place + page), mmap.PAGESIZE, 0) == 0
    for length in (*range(len(data) - 150, len(data)), len(data)):
        memory[page - length : page] = data[:length]
        assert is_plain(np.frombuffer(memory, np.uint8, length, page - length)) == (length == len(data))
"""


def test_no_memory_is_used_that_was_freed_or_lies_behind_a_file():
    """Where freed memory is given back at once, and filled, and where nothing may be read behind a file."""
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=165"}
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_clips_do_not_depend_on_who_decodes():
    """Of a frame that is ours, and of one that is not; DALI's operator decodes both."""
    plan = epoch_plan(1, 0, np.full(2, 9), 1, augmentation=Augmentation(min_crop_area=0.2, colour=0.4))
    rows = np.arange(2)
    files = [np.frombuffer(data, np.uint8) for data in (jpeg(), OTHERS["progressive"]())]

    def fed(pipeline: Pipeline, **inputs) -> list[np.ndarray]:
        for name, data in inputs.items():
            pipeline.feed_input(name, data)
        return [output.as_array() for output in pipeline.run()]

    ours, others = fed(
        graphs.fused("images", 2, 24, "float32", 1),
        source=[file[None] for file in files],
        parameters=kernels.parameters(plan, rows),
    )
    crops = dict(_crop_inputs(plan, rows, 1))
    (dali,) = fed(
        graphs.sliced(2, 24, "float32", 1), source=files, parameters=kernels.parameters(plan, rows, crop=False), **crops
    )
    assert others.tolist() == [[0], [1]] and np.array_equal(ours[0, 0], dali[0])
    assert not np.array_equal(dali[0], dali[1])


def test_decoders_have_the_same_pixels_as_the_operator_of_dali():
    """As clips of a run may come from either, whatever Pillow's library is."""
    rng = np.random.default_rng(7)
    shapes = [(40, 57), (33, 64), (9, 9)]
    files = [jpeg(image(rng, *shape, "noise"), subsampling=k) for shape in shapes for k in range(3)]
    pipeline = Pipeline(len(files), 1, None)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="source", batch=True)))
    pipeline.feed_input("source", [np.frombuffer(data, np.uint8) for data in files])
    (found,) = pipeline.run()
    assert all(np.array_equal(decoded(data), found.at(i)) for i, data in enumerate(files))


@pytest.mark.parametrize("shares", [1, 32])
def test_files_of_other_kinds_are_decoded_before_they_are_asked_for(tmp_path, monkeypatch, shares):
    """Once there were some. What only turns out to be odd behind the frame header comes later, and is the same."""
    monkeypatch.setattr(feeding, "_SHARES", shares)
    kinds = {"ours": jpeg, "progressive": OTHERS["progressive"], "restarts": OTHERS["restarts"], "png": png}
    for clip, make in kinds.items():
        (tmp_path / clip).mkdir()
        (tmp_path / clip / "0.jpg").write_bytes(make())
    (tmp_path / "list.txt").write_text("".join(f"{clip} 1 0\n" for clip in kinds))
    index = load_index(tmp_path / "list.txt")
    want, started = list(loader(index, "operators", batch_size=4, augmentation=Augmentation())(0)), []
    ours = loader(index, "fused", batch_size=4, augmentation=Augmentation())
    start, take = feeding._Sliced.start, feeding._Sliced.pictures
    monkeypatch.setattr(
        feeding._Sliced, "start", lambda self, inputs: started.append(len(inputs[0][1])) or start(self, inputs)
    )
    monkeypatch.setattr(feeding._Sliced, "pictures", lambda self: started.append("taken") or take(self))
    for expected in ([3 * T, "taken"], [2 * T, "taken", T, "taken"]):
        (batch,) = ours(0)
        assert started == expected
        assert (batch.clips - want[0].clips).abs().max() < 0.05
        started.clear()


def test_frames_that_nobody_took_are_not_those_of_the_next_batch():
    """After an error of the graph beside them."""
    plan, rows = epoch_plan(1, 0, np.full(1, 9), 1), np.arange(1)
    sliced = feeding._Sliced(lambda: graphs.sliced(1, 24, "float32", 1))

    def inputs(seed: int) -> list:
        file = np.frombuffer(jpeg(picture(seed), progressive=True), np.uint8)
        parameters = kernels.parameters(plan, rows, crop=False)
        return [("source", [file]), ("parameters", parameters), *_crop_inputs(plan, rows, 1)]

    sliced.start(inputs(2))
    want = sliced.pictures().copy()
    sliced.start(inputs(1))
    sliced.start(inputs(2))
    assert np.array_equal(sliced.pictures(), want)
