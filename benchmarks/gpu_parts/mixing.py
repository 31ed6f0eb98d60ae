"""Do pixels of two batches mix? Hundreds of small batches, a slow consumer, bit by bit against the first decode.

Public reports say that nvJPEG's hardware engine writes into a recycled buffer before those have read it that are queued
to do so (pytorch/vision 9606, torchcodec 1634), and that nothing tells of it.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.decoders import image_batches, jpeg_files
from benchmarks.gpu_parts.project import clip_loader
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import Setting
from benchmarks.gpu_parts.timing import wait

SMALL = (16, 64)  # images of a batch


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
        groups = [images[start : start + size] for start in range(0, len(images) - size + 1, size)][:16]
        want = []
        for pixels in image_batches(setting, groups, engine, depth=1):
            want.append(pixels.clone())
            wait(setting)
        for depth in (1, 2):
            order = [int(i) for i in torch.randint(len(groups), (setting.mixing_batches,))]
            stream, different = image_batches(setting, [groups[i] for i in order], engine, depth), []
            for number in order:
                pixels = next(stream)  # not by zip or enumerate, which hold on to what they gave
                consume()
                different.append((pixels.int() - want[number].int()).abs().amax())
                del pixels
            yield verdict(f"decoder, engine {engine:g}, {size} images, {depth} ahead", different)


def of_loader(setting: Setting, engine: float) -> Iterator[Row]:
    """The trainer's own loader: an epoch that waits for each batch, and the same epoch with a slow consumer."""
    consume, batch = slow_consumer(setting), min(4, setting.batch)
    loader = clip_loader(setting, "frames", engine=engine, batch=batch)
    want = []
    for given in itertools.islice(loader(0), setting.mixing_batches):
        wait(setting)
        want.append(given.clips.clone())  # on the card: to copy it there later would wait for the consumer
    stream, different = clip_loader(setting, "frames", engine=engine, batch=batch)(0), []
    for first in want:
        given = next(stream)
        consume()
        different.append((given.clips - first).abs().amax())
        del given
    yield verdict(f"loader, engine {engine:g}, {batch} clips", different)


def verdict(what: str, different: list[Tensor]) -> Row:
    """How many batches differ at all, and by how much: of pixels of another picture by more than of other rounding."""
    worst = torch.stack(different).float()
    mixed = int((worst != 0).sum())  # not a number, too, is not 0
    return figure(f"mixed batches: {what}", mixed, "batches", of=len(worst), worst=float(worst.max()), right=mixed == 0)


def both(setting: Setting, engine: float) -> Iterator[Row]:
    """The loader first, as it is what trains."""
    cuda.empty_cache()
    yield from of_loader(setting, engine)
    yield from of_decoder(setting, engine)
