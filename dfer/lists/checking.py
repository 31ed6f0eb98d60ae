"""Checks of a list against itself, other lists and the disk, for scripts/check_list.py.

A clip is here, as lists call it, a whole video.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError, printable, progress, usable_cores
from dfer.files import is_data
from dfer.lists.annotations import EMOTIONS, packed_index
from dfer.lists.formats import ListFormat, Row, read_list
from dfer.lists.missing import explain, other_form
from dfer.lists.packed import Pack, read_pack, shard_problems
from dfer.lists.stored import Stored, inspect, scan
from dfer.lists.threads import in_chunks
from dfer.lists.verify import verify

PARALLEL = 2000  # images from which starting processes pays
_QUIET_S = 5
_NAMED = 10  # image sizes that are named
_HOW = {  # kind of storage -> what its frames' sizes are known from
    "folders": "headers of the first, middle and last frame of each clip",
    "videos": "the first frame of each decoded, of the others the packets",
    "packed clips": "as they were packed",
}
_WHAT = {"folders": "images", "videos": "videos", "packed clips": "packed clips"}
_BAD = {"folders": "bad images", "videos": "bad videos"}

Problems = dict[str, list[str]]  # kind -> one line each


class Clip(NamedTuple):
    """A row of a list, placed on this machine."""

    number: int  # of its list
    where: str  # "list.txt:row"
    name: str  # below the list's root
    path: str
    row: Row


class PlacedList(NamedTuple):
    """A list as it was read, with its clips placed on this machine."""

    path: Path
    form: ListFormat
    base: str | None  # folder in which the names of the clips start; None: they are absolute
    remark: str  # on how the names were changed
    clips: list[Clip]
    pack: Pack | None = None  # where the clips lie, if they are packed


def read_placed(
    number: int, list_path: Path, root: Path | None, disk: bool, order: str | None = None, base: int | None = None
) -> PlacedList:
    """Read a list of any format and find where its clips lie, on the disk if `disk` is set.

    Raises:
        UserError: as read_list does.
    """
    rows, form = read_list(list_path, order=order, base=base, root=root)
    packed = packed_index(list_path) if form.canonical else None
    if packed is not None:
        clips = [Clip(number, f"{list_path}:{row.line}", row.name, "", row) for row in rows]
        return PlacedList(list_path, form, None, f"packed in {packed}", clips, read_pack(packed))
    names, folder, remark = place(rows, form, list_path, root, disk)
    clips = [
        Clip(number, f"{list_path}:{row.line}", name, os.path.join(folder or "", name), row)
        for name, row in zip(names, rows, strict=True)
    ]
    if disk and (other := _other_forms(clips)):
        remark += f"{'; ' if remark else ''}{len(other):,} names are on the disk in another Unicode form, and taken so"
        clips = [other.get(i, clip) for i, clip in enumerate(clips)]
    return PlacedList(list_path, form, folder, remark, clips)


def _other_forms(clips: Sequence[Clip]) -> dict[int, Clip]:
    """Return the clips whose names are on the disk in another Unicode form, as they are called there."""
    found = {}
    for i, clip in enumerate(clips):
        if clip.name.isascii() or os.path.lexists(clip.path):
            continue
        if (path := other_form(clip.path, clip.name)) is not None:
            found[i] = clip._replace(name=path[len(clip.path) - len(clip.name) :], path=path)
    return found


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
    found = (n for n in drops if disk and any(os.path.exists(os.path.join(base, *probe[n:])) for probe in probes))
    drop = next(found, shared if form.absolute else 0)
    remark = f"all paths start with {'/'.join(parts[0][:drop])}/, which is taken for {base}/" if drop else ""
    return ["/".join(part[drop:]) for part in parts], base, remark


def find_duplicates(clips: Sequence[Clip], folders: Sequence[Stored] | None, problems: Problems) -> None:
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


def check_disk(lists: Sequence[PlacedList], decode: bool, problems: Problems) -> tuple[list[Stored], list[str]]:
    """Compare the clips of all lists with the disk. Adds to `problems`, and shows progress on stderr.

    Returns:
        How each clip is stored, and lines on the sizes of the images, which are no problem.

    Raises:
        UserError: if a process that reads images dies.
    """
    loose = [clip for placed in lists if placed.pack is None for clip in placed.clips]
    found = iter(progress(
        in_chunks(scan, [clip.path for clip in loose], size=16), len(loose), "clips", to_stderr=True, quiet_s=_QUIET_S
    ))  # fmt: skip
    stored: list[Stored] = []
    for placed in lists:
        own = list(itertools.islice(found, len(placed.clips))) if placed.pack is None else []
        own = own or check_pack(placed, decode, problems)
        check_kinds(placed.clips, own, problems)
        stored += own
    clips = [clip for placed in lists for clip in placed.clips]
    for clip, one in zip(clips, stored, strict=True):
        if one.error:
            kind, details = one.error
            problems[kind].append(f"{clip.where}: {clip.path}{details}")
        elif clip.row.num_frames not in (None, one.num_frames):
            counts = f"listed {clip.row.num_frames}, found {one.num_frames}"
            problems["wrong frame counts"].append(f"{clip.where}: {clip.name}: {counts}")
    try:
        return stored, _sizes(clips, stored, decode, problems)
    except BrokenProcessPool:
        raise UserError("a process that reads images died: too little memory, or an image made to do this") from None


def check_pack(placed: PlacedList, decode: bool, problems: Problems) -> list[Stored]:
    """Compare a packed list with its pack; with `decode`, read all of the pack again."""
    pack = placed.pack
    assert pack is not None
    problems["problems of the pack"] += verify(placed.path, usable_cores())[1] if decode else shard_problems(pack)
    known = {name: number for number, name in enumerate(pack.names)}
    stored = []
    for clip in placed.clips:
        number = known.get(clip.name)
        if number is None:
            stored.append(Stored(0, error=("clips that are not in the pack", clip.name)))
            continue
        if pack.labels[number] != clip.row.label:
            line = f"{clip.where}: {clip.name}: {EMOTIONS[clip.row.label]} here, {EMOTIONS[pack.labels[number]]} there"
            problems["other labels than in the pack"].append(line)
        count = int(pack.clips.first[number + 1] - pack.clips.first[number])
        size = int(pack.clips.width[number]), int(pack.clips.height[number])
        identity = str(pack.clips.paths[0]), number
        stored.append(Stored(count, size=size, pack=pack.clips, number=number, identity=identity))
    return stored


def check_kinds(clips: Sequence[Clip], stored: Sequence[Stored], problems: Problems) -> None:
    """Name what training does not take: folders and videos in one list, and clips that are no user's."""
    kinds = Counter(one.kind for one in stored if one.kind)
    if len(kinds) > 1:
        (most, _), (rare, number) = kinds.most_common()
        clip = next(clip for clip, one in zip(clips, stored, strict=True) if one.kind == rare)
        problems["folders and videos in one list"].append(
            f"{clip.where}: {clip.path}, and {number - 1:,} more {rare}: the others are {most}"
        )
    odd = [clip for clip in clips if not all(map(is_data, filter(None, clip.name.split("/"))))]
    if 2 * len(odd) < len(clips):  # else it is the user's own way to name folders
        problems["clips in hidden folders or the system's"] += [f"{clip.where}: {clip.name}" for clip in odd]


def _sizes(clips: Sequence[Clip], stored: Sequence[Stored], decode: bool, problems: Problems) -> list[str]:
    """Return lines on how large the frames are, and add those that cannot be read to `problems`."""
    lines = []
    for kind, how in _HOW.items():
        own = {clip.path or clip.where: one for clip, one in zip(clips, stored, strict=True) if one.kind == kind}
        if kind == "packed clips" or (kind == "videos" and not decode):
            sizes = Counter(one.size for one in own.values() if one.size)
            first = {one.size: path for path, one in reversed(own.items()) if one.size}
        else:
            images = sum(one.num_frames if decode else len(one.samples) for one in own.values())
            jobs = [(path, one.samples) for path, one in own.items()]
            sizes, first = _inspect_all(jobs, decode, images > PARALLEL, problems[_BAD[kind]])
        if not sizes:
            continue
        (width, height), most = sizes.most_common(1)[0]
        how = "every frame decoded" if decode and kind != "packed clips" else how
        lines.append(f"{_WHAT[kind]} ({how}): {width}x{height} in {most:,} of {sizes.total():,}")
        for (width, height), number in sizes.most_common(_NAMED + 1)[1:]:
            lines.append(f"  other size: {width}x{height} in {number:,}, first in {printable(first[width, height])}")
    return lines


def _inspect_all(
    jobs: Sequence[tuple[str, tuple[str, ...]]], decode: bool, parallel: bool, problems: list[str]
) -> tuple[Counter[tuple[int, int]], dict[tuple[int, int], str]]:
    """Inspect the images of all clips. Returns how often each size occurs, and in which first; adds to `problems`."""
    work = functools.partial(inspect, decode_all=decode)
    sizes: Counter[tuple[int, int]] = Counter()
    first: dict[tuple[int, int], str] = {}
    with contextlib.ExitStack() as stack:
        results: Iterable = map(work, jobs)
        workers = usable_cores()
        if parallel and workers > 1:
            # Spawned, as forking a process that has threads is unsafe. Pillow reads headers in Python: threads would
            # wait for each other.
            spawn = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(workers, spawn)).map(work, jobs, chunksize=16)
        results = progress(results, len(jobs), "clips", to_stderr=True, quiet_s=_QUIET_S)
        for (path, _), (found, bad) in zip(jobs, results, strict=True):
            sizes += found
            first |= {size: path for size in found if size not in first}
            problems += bad
    return sizes, first


def hint_at_missing(clip: Clip, base: str | None) -> str:
    """Return where a missing clip may be: deeper below its root, as archives often nest, or by another name."""
    if nested := _nested_copy(clip, base):
        return nested
    why = explain(clip.path, clip.row.name)
    return f"{printable(clip.path)}:{why}" if why else ""


def _nested_copy(clip: Clip, base: str | None) -> str:
    level = [base] if base and os.path.isdir(base) else []
    for _ in range(3):
        inner = []
        for folder in level[:200]:  # a bounded search: the root may hold a million folders
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                inner += [e.path for e in itertools.islice(entries, 200) if is_data(e.name) and e.is_dir()]
        level = sorted(inner)[:200]
        for folder in level:
            if os.path.exists(os.path.join(folder, clip.name)):
                return f"{printable(clip.name)} lies in {printable(folder)}: say --root {printable(folder)}"
    return ""


def length_bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (lowest, highest, clips) in steps of powers of two, from the shortest to the longest clip."""
    bits = Counter(length.bit_length() for length in lengths)
    return [(2 ** (b - 1), 2**b - 1, bits[b]) for b in range(min(bits), max(bits) + 1)]
