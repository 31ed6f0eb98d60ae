"""What others decode on the same card, and the strong opponent without one: libjpeg-turbo on all cores, pinned, copied.

Each peer is given the same JPEG files in memory and yields uint8 pictures on the card; nothing is cropped or resized.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.decoders import jpeg_files
from benchmarks.gpu_parts.project import index_of
from benchmarks.gpu_parts.rows import Row, figure
from benchmarks.gpu_parts.setting import NotHere, Setting
from benchmarks.gpu_parts.timing import repeated

AT_ONCE = 256  # images of a call


def groups_of(setting: Setting, images: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
    size = min(AT_ONCE, len(images))
    return itertools.cycle([images[start : start + size] for start in range(0, len(images) - size + 1, size)])


def told(setting: Setting, peer: str, decode: Callable[[Sequence[np.ndarray]], object]) -> Iterator[Row]:
    """The clips per second of a peer that is handed some images at a time."""
    groups = groups_of(setting, jpeg_files(setting, setting.images))

    def run() -> int:
        group = next(groups)
        decode(group)
        return len(group)

    speeds = [speed / setting.frames for speed in repeated(setting, run)]
    yield figure(f"JPEG, whole frames: {peer}", speeds, "clips/s")


def torchvision_on_card(setting: Setting) -> Iterator[Row]:
    """torchvision.io.decode_jpeg on a list: batched, on the JPEG engine where there is one."""
    try:
        from torchvision.io import decode_jpeg
    except ImportError as error:
        raise NotHere(f"not installed: {error.name}") from None

    def decode(images: Sequence[np.ndarray]) -> object:
        return decode_jpeg([torch.from_numpy(image) for image in images], device=setting.device)

    yield from told(setting, "torchvision.io.decode_jpeg", decode)


def simplejpeg_and_copy(setting: Setting) -> Iterator[Row]:
    """A thread on each core decodes into pinned memory, which is copied to the card."""
    try:
        import simplejpeg
    except ImportError as error:
        raise NotHere(f"not installed: {error.name}") from None
    images = jpeg_files(setting, setting.images)
    shape = simplejpeg.decode_jpeg(images[0].tobytes()).shape
    size = min(AT_ONCE, len(images))
    host = torch.empty((size, *shape), dtype=torch.uint8, pin_memory=cuda.is_available())
    there, rows = torch.empty_like(host, device=setting.device), host.numpy()
    with ThreadPoolExecutor(setting.cores) as pool:

        def into(place: int, image: np.ndarray) -> None:
            simplejpeg.decode_jpeg(image, buffer=rows[place])

        def decode(group: Sequence[np.ndarray]) -> object:
            list(pool.map(into, range(len(group)), group))
            return there.copy_(host, non_blocking=False)

        yield from told(setting, f"simplejpeg on {setting.cores} threads and a pinned copy", decode)


def torchcodec_videos(setting: Setting) -> Iterator[Row]:
    """TorchCodec's NVDEC, whole videos, one after another."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError) as error:  # RuntimeError: FFmpeg's libraries are missing
        raise NotHere(f"TorchCodec cannot be imported: {' '.join(str(error).split())[:200]}") from None
    paths = itertools.cycle([str(record.path) for record in index_of(setting, "video", "short").records])

    def run() -> int:
        decoder = VideoDecoder(next(paths), device=setting.device)
        decoder.get_frames_in_range(0, len(decoder))
        return 1

    yield figure("H.264, whole videos: TorchCodec", repeated(setting, run), "clips/s")


def spdl(setting: Setting) -> Iterator[Row]:
    """SPDL's batched nvJPEG, which resizes as well: it has no way not to."""
    try:
        import spdl.io

        config = spdl.io.cuda_config(device_index=0)  # only now does it load its libraries
    except ImportError as error:
        raise NotHere(f"not installed: {error.name}") from None
    except RuntimeError as error:  # it finds none of the FFmpeg that it was built for
        raise NotHere(f"not installed as a whole: {str(error).splitlines()[0][:200]}") from None
    size = {"width": setting.size, "height": setting.size}

    def decode(images: Sequence[np.ndarray]) -> object:
        return spdl.io.load_image_batch_nvjpeg([image.tobytes() for image in images], device_config=config, **size)

    yield from told(setting, "SPDL, resized too", decode)
