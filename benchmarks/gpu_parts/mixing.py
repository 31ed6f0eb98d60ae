"""Do pixels of two batches mix? Hundreds of small batches, a slow consumer, each against its first decode.

Public reports say that nvJPEG's hardware engine writes into a recycled buffer before those have read it that are queued
to do so (pytorch/vision 9606, torchcodec 1634), and that nothing tells of it. DALI may keep a buffer from the decoder
as long as somebody is queued to read it; then the trainer's loader cannot mix, and no test of it finds a card at fault.
So there are controls, which do what the reports say mixes and have no verdict: that no batch mixed says something of a
card only if batches of a control did.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.decoders import image_batches, jpeg_files
from benchmarks.gpu_parts.project import IMAGENET_STD, Graph, Route, clip_loader
from benchmarks.gpu_parts.rows import CONTROL, MIXED, Row, figure
from benchmarks.gpu_parts.setting import NotHere, Setting
from benchmarks.gpu_parts.timing import wait

SMALL = (16, 64)  # images of a batch
OTHER_PICTURE = 16  # of 255: further off is no other rounding, as where SMs and the engine share the images otherwise


def slow_consumer(setting: Setting) -> Callable[[], None]:
    """What keeps the card busy for some ms, queued before the pixels are read."""
    side = min(setting.product_side, 4096)
    x = torch.randn(side, side, device=setting.device)

    def consume() -> None:
        nonlocal x
        for _ in range(4):
            x = torch.relu(x @ x * 1e-3)

    return consume


def of_decoder(setting: Setting, engine: float) -> Iterator[Row]:
    """The decoder alone, batch after batch, one and two of them ahead of the consumer."""
    images, consume = jpeg_files(setting, setting.images), slow_consumer(setting)
    for size in (min(small, len(images) // 2) for small in SMALL):
        groups = groups_of(images, size)
        want = first_decodes(setting, groups, engine)
        for depth in (1, 2):
            order = drawn(setting, groups)
            stream, different = image_batches(setting, [groups[i] for i in order], engine, depth), []
            for number in order:
                pixels = next(stream)  # not by zip or enumerate, which hold on to what they gave
                consume()
                different.append(apart(pixels, want[number]))
                del pixels
            yield verdict(f"decoder, engine {engine:g}, {size} images, {depth} ahead", different)


def groups_of(images: Sequence[np.ndarray], size: int) -> list[Sequence[np.ndarray]]:
    return [images[start : start + size] for start in range(0, len(images) - size + 1, size)][:16]


def drawn(setting: Setting, groups: Sequence[object]) -> list[int]:
    return [int(i) for i in torch.randint(len(groups), (setting.mixing_batches,))]


def first_decodes(
    setting: Setting, groups: Sequence[Sequence[np.ndarray]], engine: float, read_in_graph: bool = False
) -> list[Tensor]:
    """The pixels of each group, with nothing else under way."""
    want = []
    for pixels in image_batches(setting, groups, engine, 1, read_in_graph):
        want.append(pixels.clone())
        wait(setting)
    return want


def apart(pixels: Tensor, want: Tensor) -> Tensor:
    """The largest difference of two batches of pixels, left on the card."""
    return (pixels.int() - want.int()).abs().amax()


def control_in_graph(setting: Setting, engine: float) -> Iterator[Row]:
    """A slow operator behind the decoder on one stream: only the order of that stream protects what it reads."""
    images, consume = jpeg_files(setting, setting.images), slow_consumer(setting)
    groups = groups_of(images, min(SMALL[0], len(images) // 2))
    want, order = first_decodes(setting, groups, engine, read_in_graph=True), drawn(setting, groups)
    stream = image_batches(setting, [groups[i] for i in order], engine, 2, read_in_graph=True)
    different = []
    for number in order:
        pixels = next(stream)
        consume()
        different.append(apart(pixels, want[number]))
        del pixels
    yield told(f"{CONTROL}: a resize behind the decoder on one stream, engine {engine:g}", different)


def control_torchvision(setting: Setting) -> Iterator[Row]:
    """torchvision's decoder, which public reports say mixes: it fills what is free, whoever is queued to read it.

    Raises:
        NotHere: if torchvision is not installed.
    """
    try:
        from torchvision.io import decode_jpeg
    except ImportError as error:
        raise NotHere(f"not installed: {error.name}") from None
    images, consume = jpeg_files(setting, setting.images), slow_consumer(setting)
    groups = [[torch.from_numpy(image) for image in group] for group in groups_of(images, min(16, len(images) // 2))]
    want = []
    for group in groups:
        want.append(torch.stack(decode_jpeg(group, device=setting.device)))
        wait(setting)
    different = []
    for number in drawn(setting, groups):
        pixels = decode_jpeg(groups[number], device=setting.device)
        consume()
        different.append(apart(torch.stack(pixels), want[number]))  # stacking is the queued reader
        del pixels
    yield told(f"{CONTROL}: torchvision.io.decode_jpeg, 16 images", different)


def of_loader(setting: Setting, engine: float, graph: Graph = "operators") -> Iterator[Row]:
    """The trainer's own loader: an epoch that waits for each batch, and the same epoch with a slow consumer."""
    consume, batch = slow_consumer(setting), min(4, setting.batch)
    loader = clip_loader(setting, "frames", Route(engine, graph=graph), batch=batch)
    want = []
    for given in itertools.islice(loader(0), setting.mixing_batches):
        wait(setting)
        want.append(given.clips.clone())  # on the card: to copy it there later would wait for the consumer
    scale = torch.tensor(255 * IMAGENET_STD).float().view(3, 1, 1).to(setting.device)
    stream, different = clip_loader(setting, "frames", Route(engine, graph=graph), batch=batch)(0), []
    for first in want:
        given = next(stream)
        consume()
        steps = (given.clips.float() - first.float()).abs() * scale
        different.append(steps.amax())
        del given, steps
    what = f"loader, engine {engine:g}{f', {graph}' if graph != 'operators' else ''}, {batch} clips"
    yield verdict(what, different)


def verdict(what: str, different: list[Tensor]) -> Row:
    """How many batches have pixels of another picture: that is wrong. Beside it, those that differ at all."""
    row = told(f"{MIXED}: {what}", different)
    return row | {"right": row["value"] == 0}


def told(what: str, different: list[Tensor]) -> Row:
    worst = torch.stack(different).float()
    mixed = int((~(worst <= OTHER_PICTURE)).sum())  # what is not a number is no rounding
    differ = int((worst != 0).sum())
    return figure(what, mixed, "batches", of=len(worst), differ=differ, worst=float(worst.max()))


def both(setting: Setting, engine: float, graph: Graph) -> Iterator[Row]:
    """The loader first, as it is what trains."""
    cuda.empty_cache()
    yield from of_loader(setting, engine, graph)
    yield from of_decoder(setting, engine)
