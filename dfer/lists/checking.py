"""Checks of a list against itself, other lists and the disk, for scripts/check_list.py.

A clip is here, as lists call it, a whole video.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError, printable, progress
from dfer.files import reason
from dfer.images import FRAME_SUFFIXES, decode_image, frame_names, open_image
from dfer.lists.annotations import EMOTIONS
from dfer.lists.formats import ListFormat, Row, read_list
from dfer.lists.threads import in_chunks

PARALLEL = 2000  # images from which starting processes pays
_QUIET_S = 5
_NAMED = 10  # image sizes that are named

Problems = dict[str, list[str]]  # kind -> one line each


class Clip(NamedTuple):
    """A row of a list, placed on this machine."""

    number: int  # of its list
    where: str  # "list.txt:row"
    name: str  # below the list's root
    path: str
    row: Row


class Folder(NamedTuple):
    """What a clip's folder holds."""

    num_frames: int
    samples: tuple[str, ...] = ()  # names of the first, middle and last frame
    identity: tuple[int, int] | None = None  # the same for all paths that lead to it
    error: tuple[str, str] | None = None  # kind of problem, and details


class PlacedList(NamedTuple):
    """A list as it was read, with its clips placed on this machine."""

    path: Path
    form: ListFormat
    base: str | None  # folder in which the names of the clips start; None: they are absolute
    remark: str  # on how the names were changed
    clips: list[Clip]


def read_placed(
    number: int, list_path: Path, root: Path | None, disk: bool, order: str | None = None, base: int | None = None
) -> PlacedList:
    """Read a list of any format and find where its clips lie, on the disk if `disk` is set.

    Raises:
        UserError: as read_list does.
    """
    rows, form = read_list(list_path, order=order, base=base)
    names, folder, remark = place(rows, form, list_path, root, disk)
    clips = [
        Clip(number, f"{list_path}:{row.line}", name, os.path.join(folder or "", name), row)
        for name, row in zip(names, rows, strict=True)
    ]
    return PlacedList(list_path, form, folder, remark, clips)


def place(
    rows: Sequence[Row], form: ListFormat, list_path: Path, root: Path | None, disk: bool
) -> tuple[list[str], str | None, str]:
    """Return the names of the clips below a base folder (None: they are absolute), and a remark on the change.

    Lists come with paths of other machines. Leading folders that all rows share are dropped if that leads to clips.
    """
    names = [row.name for row in rows]
    if form.absolute and root is None:
        return names, None, ""
    base = os.path.abspath(root if root is not None else list_path.parent / (form.root or ""))
    if form.absolute and all(name.startswith(f"{base}/") for name in names):
        return [name[len(base) + 1 :] for name in names], base, ""
    parts = [name.split("/") for name in names]
    ends = min(parts)[:-1], max(parts)[:-1]  # what the least and the greatest share, all share
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    probes = [parts[i] for i in {0, len(parts) // 2, len(parts) - 1}]
    drops = range(1 if form.absolute else 0, shared + 1)
    found = (n for n in drops if disk and any(os.path.isdir(os.path.join(base, *probe[n:])) for probe in probes))
    drop = next(found, shared if form.absolute else 0)
    remark = f"all paths start with {'/'.join(parts[0][:drop])}/, which is taken for {base}/" if drop else ""
    return ["/".join(part[drop:]) for part in parts], base, remark


def scan(path: str) -> Folder:
    """Count the frames of a clip's folder. Of their names only three are kept."""
    try:
        status = os.stat(path)
        names = frame_names(path)
    except FileNotFoundError:
        return Folder(0, error=("missing folders", ""))
    except OSError as error:  # a file, a symlink loop, no permission, too long a name
        return Folder(0, error=("unreadable folders", f" ({reason(error)})"))
    if not names:
        return Folder(0, error=("folders without frames", f" ({'/'.join(FRAME_SUFFIXES)})"))
    samples = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    return Folder(len(names), tuple(samples), (status.st_dev, status.st_ino))


def inspect(job: tuple[str, tuple[str, ...]], decode: bool) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Return the sizes of a clip's frames, and a line for each bad one. This is the work of a process.

    Args:
        job: the folder and the names of its samples.
        decode: decode all frames of the folder; else read the headers of the samples.
    """
    folder, names = job
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    if decode:
        try:
            names = tuple(frame_names(folder))
        except OSError as error:
            return sizes, [f"{folder}: {reason(error)}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd files: what matters is raised
        for name in names:
            path = os.path.join(folder, name)
            try:
                with decode_image(path) if decode else open_image(path) as image:
                    sizes[image.size] += 1
            except Exception as error:  # damaged files make Pillow raise anything, even MemoryError or struct.error
                bad.append(f"{path}: {reason(error)}")
    return sizes, bad


def find_duplicates(clips: Sequence[Clip], folders: Sequence[Folder] | None, problems: Problems) -> None:
    """Name clips that are listed twice. By their folders, where those are known, as links lead to the same clip."""
    known: dict[object, Clip] = {}
    for number, clip in enumerate(clips):
        identity = folders[number].identity if folders else None
        first = known.setdefault(identity or os.path.normpath(clip.path), clip)
        if first is clip:
            continue
        line = f"{clip.where}: {clip.name}, also {first.where}"
        problems["clips in two lists" if clip.number != first.number else "clips listed twice"].append(line)
        if clip.row.label != first.row.label:
            line += f": {EMOTIONS[clip.row.label]} and {EMOTIONS[first.row.label]}"
            problems["clips with two labels"].append(line)


def check_disk(clips: Sequence[Clip], decode: bool, problems: Problems) -> tuple[list[Folder], list[str]]:
    """Compare clips with the disk: folders, counts, images. Adds to `problems`, and shows progress on stderr.

    Returns:
        The folder of each clip, and lines on the sizes of the images, which are no problem.

    Raises:
        UserError: if a process that reads images dies.
    """
    found = in_chunks(scan, [clip.path for clip in clips], size=16)
    folders = list(progress(found, len(clips), "folders", to_stderr=True, quiet_s=_QUIET_S))
    for clip, folder in zip(clips, folders, strict=True):
        if folder.error:
            kind, details = folder.error
            problems[kind].append(f"{clip.where}: {clip.path}{details}")
        elif clip.row.num_frames not in (None, folder.num_frames):
            counts = f"listed {clip.row.num_frames}, found {folder.num_frames}"
            problems["wrong frame counts"].append(f"{clip.where}: {clip.name}: {counts}")
    samples = {clip.path: folder.samples for clip, folder in zip(clips, folders, strict=True) if folder.samples}
    images = sum(folder.num_frames if decode else len(folder.samples) for folder in folders)
    try:
        sizes, first = _inspect_all(list(samples.items()), decode, images > PARALLEL, problems)
    except BrokenProcessPool:
        raise UserError("a process that reads images died: too little memory, or an image made to do this") from None
    lines = []
    if sizes:
        how = "every frame decoded" if decode else "headers of the first, middle and last frame of each clip"
        (width, height), most = sizes.most_common(1)[0]
        lines.append(f"images ({how}): {width}x{height} in {most:,} of {sizes.total():,}")
        for (width, height), number in sizes.most_common(_NAMED + 1)[1:]:
            lines.append(f"  other size: {width}x{height} in {number:,}, first in {printable(first[width, height])}")
    return folders, lines


def _inspect_all(
    jobs: Sequence[tuple[str, tuple[str, ...]]], decode: bool, parallel: bool, problems: Problems
) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], str]]:
    """Inspect the images of all folders. Returns how often each size occurs, and in which folder first."""
    work = functools.partial(inspect, decode=decode)
    sizes: Counter[tuple[int, int]] = Counter()
    first: dict[tuple[int, int], str] = {}
    with contextlib.ExitStack() as stack:
        results: Iterable = map(work, jobs)
        workers = os.cpu_count() or 1
        if parallel and workers > 1:
            # Spawned, as forking a process that has threads is unsafe. Pillow reads headers in Python: threads would
            # wait for each other.
            spawn = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(workers, spawn)).map(work, jobs, chunksize=16)
        results = progress(results, len(jobs), "folders of images", to_stderr=True, quiet_s=_QUIET_S)
        for (path, _), (found, bad) in zip(jobs, results, strict=True):
            sizes += found
            first |= {size: path for size in found if size not in first}
            problems["bad images"] += bad
    return sizes, first


def hint_at_nested_copy(clip: Clip, base: str | None) -> str:
    """Return a hint if a missing clip lies deeper below its root, as archives often nest; else an empty text."""
    level = [base] if base and os.path.isdir(base) else []
    for _ in range(3):
        inner = []
        for folder in level[:200]:  # a bounded search: the root may hold a million folders
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                inner += [entry.path for entry in itertools.islice(entries, 200) if entry.is_dir()]
        level = sorted(inner)[:200]
        for folder in level:
            if os.path.isdir(os.path.join(folder, clip.name)):
                return f"{printable(clip.name)} lies in {printable(folder)}: say --root {printable(folder)}"
    return ""


def length_bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (lowest, highest, clips) in steps of powers of two, from the shortest to the longest clip."""
    bits = Counter(length.bit_length() for length in lengths)
    return [(2 ** (b - 1), 2**b - 1, bits[b]) for b in range(min(bits), max(bits) + 1)]
