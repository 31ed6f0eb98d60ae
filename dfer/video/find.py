"""Video files in folders, and unique names for what is made of them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dfer.files import reason
from dfer.video.webp import is_animated

# The suffixes to look for in a folder; a file that is named by the user, or listed, may be called anything.
VIDEO_SUFFIX = re.compile(
    r"\.(3gp|apng|asf|avi|flv|gif|m2?ts|m4v|mkv|mov|mp4|mpe?g|mxf|ogv|ts|vob|webm|wmv)", re.IGNORECASE
)
MAX_NAME = 200  # bytes of a name that `unique_names` gives; disks take 255, and a clip's number or a suffix follows


def find_video_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """Return the videos in a folder and all folders below it, in no order. Links are followed, but not in circles.

    Args:
        folder: where to begin.
        warn: called with one line for each folder that was not searched.
    """
    # Names with a leading dot are what macOS leaves on foreign disks, next to each real file.
    return [path for path in _walk(folder, warn) if path.name[0] != "." and _is_video(path)]


def _is_video(path: Path) -> bool:
    """Return whether a file is called a video, or is a WebP file with several frames: most are pictures."""
    return bool(VIDEO_SUFFIX.fullmatch(path.suffix)) or (path.suffix.lower() == ".webp" and is_animated(path))


def _walk(source: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    """Yield all that is no folder, in `source` and below it."""
    folders: list[tuple[Path, frozenset[str]]] = [(source, frozenset())]
    while folders:
        folder, above = folders.pop()
        here = os.path.realpath(folder)
        if here in above:
            warn(f"{folder}: a link in a circle, not followed")
            continue
        try:
            names = os.listdir(folder)
        except OSError as error:
            warn(f"{folder}: cannot be read ({reason(error)})")
            continue
        for path in (folder / name for name in names):
            if os.path.isdir(path):  # unlike Path's and DirEntry's methods it never raises
                folders.append((path, above | {here}))
            else:
                yield path


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each relative path: without suffix, unique on any disk and safe in a row of a list."""
    names: list[str] = []
    taken = set()
    for path in paths:
        stem, _ = os.path.splitext(path)
        printable = ("".join(c if c.isprintable() else "_" for c in part) for part in Path(stem).parts if part != "..")
        short = (part.encode()[:MAX_NAME].decode(errors="ignore") for part in printable)
        name = unique = "/".join(part.strip(" .") or "_" for part in short)
        number = 1
        while unique.casefold() in taken:  # a.mp4 beside a.avi, or A.mp4 where the disk ignores case
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names
