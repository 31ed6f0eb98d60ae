"""How the clips of a list are stored, for scripts/check_list.py: as folders of images, as videos or in a pack.

A clip is here, as lists call it, a whole video.
"""

import contextlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dfer.files import reason
from dfer.images import FRAME_SUFFIXES, decode_image, frame_file, frame_names, is_image, open_image
from dfer.lists.packed import Packed
from dfer.video.find import VIDEO_SUFFIX


class Stored(NamedTuple):
    """What was found of a clip."""

    num_frames: int
    samples: tuple[str, ...] = ()  # of a folder: names of the first, middle and last frame; of a still an empty one
    size: tuple[int, int] | None = None  # width and height in px of a video or a packed clip
    pack: Packed | None = None
    number: int = 0  # in the pack
    identity: tuple[object, int] | None = None  # the same for all paths that lead to it
    error: tuple[str, str] | None = None  # kind of problem, and details

    @property
    def kind(self) -> str:
        """Return how it is stored; empty if that cannot be told."""
        return "folders" if self.samples else "packed clips" if self.pack else "videos" if self.size else ""


def scan(path: str) -> Stored:
    """Count the frames of a clip: of a folder by their names, of which three are kept, of a video as for training, of a
    still one.
    """
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and is_image(path):
            return Stored(1, ("",), identity=(status.st_dev, status.st_ino))
        if not stat.S_ISDIR(status.st_mode):
            return _scan_video(path, (status.st_dev, status.st_ino))
        names = frame_names(path)
    except FileNotFoundError:
        video = VIDEO_SUFFIX.fullmatch(os.path.splitext(path)[1])
        kind = "videos" if video else "images" if is_image(path) else "folders"
        return Stored(0, error=(f"missing {kind}", ""))
    except OSError as error:  # a symlink loop, no permission, too long a name
        return Stored(0, error=("unreadable folders", f" ({reason(error)})"))
    if not names:
        return Stored(0, error=("folders without frames", f" ({'/'.join(FRAME_SUFFIXES)})"))
    samples = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    return Stored(len(names), tuple(samples), identity=(status.st_dev, status.st_ino))


def _scan_video(path: str, identity: tuple[int, int]) -> Stored:
    from dfer.video.decode import VIDEO_ERRORS  # takes 0.3 s to load, which lists of frames need not wait for
    from dfer.video.random_access import scan_video

    try:
        found = scan_video(Path(path))
    except VIDEO_ERRORS as error:
        return Stored(0, error=("unreadable videos", f" ({reason(error)})"))
    return Stored(len(found.pts), size=(found.width, found.height), identity=identity)


def inspect(job: tuple[str, tuple[str, ...]], decode_all: bool) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Return the sizes of a clip's frames, and a line for each bad one. This is the work of a process.

    Args:
        job: the folder and the names of its samples, or a video and no names.
        decode_all: decode all frames; else read the headers of a folder's samples.
    """
    path, names = job
    if not names:
        return _inspect_video(path)
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    if decode_all and names != ("",):
        try:
            names = tuple(frame_names(path))
        except OSError as error:
            return sizes, [f"{path}: {reason(error)}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd files: what matters is raised
        for name in names:
            file = frame_file(path, name)
            try:
                with decode_image(file) if decode_all else open_image(file) as image:
                    sizes[image.size] += 1
            except Exception as error:  # damaged files make Pillow raise anything, even MemoryError or struct.error
                bad.append(f"{file}: {reason(error)}")
    return sizes, bad


def _inspect_video(path: str) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Decode a video, as `inspect` does a folder."""
    from dfer.video.decode import VIDEO_ERRORS, decode

    sizes: Counter[tuple[int, int]] = Counter()
    try:
        sizes.update(image.size for _, image in decode(Path(path)))
    except VIDEO_ERRORS as error:
        return sizes, [f"{path}: {reason(error)}"]
    return sizes, []


def pictures(path: str, stored: Stored) -> Iterator[Image.Image | None]:
    """Yield the first, middle and last frame of a clip; None for those that cannot be read, which `inspect` names."""
    frames = sorted({0, stored.num_frames // 2, stored.num_frames - 1})
    if stored.kind == "videos":
        yield from _pictures_of_video(path, frames)
        return
    for frame, name in zip(frames, stored.samples or ("",) * len(frames), strict=False):
        try:
            yield _packed_frame(stored, frame) if stored.pack else decode_image(frame_file(path, name))
        except Exception:  # as in `inspect`
            yield None


def _pictures_of_video(path: str, frames: Sequence[int]) -> Iterator[Image.Image | None]:
    """Yield frames of a video, as `pictures` does."""
    from dfer.video.decode import VIDEO_ERRORS, decode

    found = {}
    with contextlib.suppress(*VIDEO_ERRORS):
        for number, (_, image) in enumerate(decode(Path(path))):
            if number in frames:
                found[number] = image
    yield from map(found.get, frames)


def _packed_frame(stored: Stored, frame: int) -> Image.Image:
    """Return a frame of a packed clip."""
    pack, number = stored.pack, stored.number
    assert pack is not None and stored.size is not None
    frame += int(pack.first[number])
    with open(pack.paths[pack.shard[number]], "rb") as file:
        file.seek(pack.offset[frame])
        data = file.read(pack.length[frame])
    return Image.frombytes("RGB", stored.size, data) if pack.kind == "raw" else decode_image(data)
