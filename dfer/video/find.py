"""Video files in folders, and unique names for what is made of them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dfer.files import is_data, reason
from dfer.video.webp import is_animated

# The suffixes to look for in a folder; a file that is named by the user, or listed, may be called anything.
VIDEO_SUFFIX = re.compile(
    r"\.(3gp|apng|asf|avi|flv|gif|m2?ts|m4v|mkv|mov|mp4|mpe?g|mxf|ogv|ts|vob|webm|wmv)", re.IGNORECASE
)
_NAMED = 5  # kinds of names that are no data which a message shows
MAX_NAME = 200  # bytes of a name that `unique_names` gives; disks take 255, and a clip's number or a suffix follows


def find_video_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """Return the videos in a folder and all folders below it, in no order. Links are followed, but not in circles.

    What is no data (see files.is_data) is left out, as are all folders below it.

    Args:
        folder: where to begin.
        warn: called with one line for each folder that was not searched, and one for all that is no data.
    """
    left_out: list[Path] = []
    found = [path for path in _walk(folder, warn, left_out) if _is_video(path)]
    # Of files only those that look like videos; of the ._a.mp4 that macOS leaves beside each a.mp4 none is missed.
    left_out = [p for p in left_out if p.is_dir() or (VIDEO_SUFFIX.fullmatch(p.suffix) and not p.name.startswith("._"))]
    if left_out:
        names = ", ".join(sorted({path.name for path in left_out})[:_NAMED])
        first = min(left_out)
        warn(f"{folder}: hidden or of the system, not searched: {len(left_out):,} named {names}; the first is {first}")
    return found


def _is_video(path: Path) -> bool:
    """Return whether a file is called a video, or is a WebP file with several frames: most are pictures."""
    return bool(VIDEO_SUFFIX.fullmatch(path.suffix)) or (path.suffix.lower() == ".webp" and is_animated(path))


def _walk(source: Path, warn: Callable[[str], None], left_out: list[Path]) -> Iterator[Path]:
    """Yield all that is no folder, in `source` and below it; `left_out` gets what is no data."""
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
            if not is_data(path.name):
                left_out.append(path)
            elif os.path.isdir(path):  # unlike Path's and DirEntry's methods it never raises
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
