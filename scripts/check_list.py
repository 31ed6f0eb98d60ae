"""Check annotation lists of any dialect against themselves, each other and the disk; write them in the canonical form.

`python scripts/check_list.py train.csv test.csv --root DIR` says which dialect each list is in and why, counts classes
and lengths, and names each problem. The headers of the first, middle and last frame of each clip are read, or every
frame decoded with --decode. Exit code: 0 fine, 1 problems found, 2 a list cannot be judged or the command is wrong.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import stat
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, UserError, in_range, shown
from dfer.images import FRAME_SUFFIXES, MAX_PIXELS, natural_key
from dfer.lists.annotations import EMOTIONS, write_annotations
from dfer.lists.formats import ListFormat, Row, read_list

NAMED = 10  # problems of a kind that are printed
UNWRITABLE = ("missing folders", "unreadable folders", "folders without frames", "clips with two labels")
PARALLEL = 2000  # images from which starting processes pays


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


Problems = dict[str, list[str]]  # kind -> one line each


def place(
    rows: Sequence[Row], form: ListFormat, list_path: Path, root: Path | None, disk: bool
) -> tuple[list[str], str | None, str]:
    """Where the clips lie: their names below a base folder (None: they are absolute), and a remark on the change.

    Lists come with paths of other machines. Leading folders that all rows share are dropped if that leads to clips.
    """
    names = [row.name for row in rows]
    if dialect.absolute and root is None:
        return names, None, ""
    base = os.path.abspath(root if root is not None else list_path.parent / (dialect.root or ""))
    if dialect.absolute and all(name.startswith(f"{base}/") for name in names):
        return [name[len(base) + 1 :] for name in names], base, ""
    parts = [name.split("/") for name in names]
    ends = min(parts)[:-1], max(parts)[:-1]  # what the least and the greatest share, all share
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
    probes = [parts[i] for i in {0, len(parts) // 2, len(parts) - 1}]
    drops = range(1 if dialect.absolute else 0, shared + 1)
    found = (n for n in drops if disk and any(os.path.isdir(os.path.join(base, *probe[n:])) for probe in probes))
    drop = next(found, shared if dialect.absolute else 0)
    remark = f"all paths start with {'/'.join(parts[0][:drop])}/, which is taken for {base}/" if drop else ""
    return ["/".join(part[drop:]) for part in parts], base, remark


def scan(path: str) -> Folder:
    """Count the frames of a clip's folder; only the names of three are kept."""
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(FRAME_SUFFIXES)]
    except FileNotFoundError:
        return Folder(0, error=("missing folders", ""))
    except OSError as error:  # a file, a symlink loop, no permission, too long a name
        return Folder(0, error=("unreadable folders", f" ({error.strerror})"))
    if not names:
        return Folder(0, error=("folders without frames", f" ({'/'.join(FRAME_SUFFIXES)})"))
    names.sort(key=natural_key)
    samples = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
    return Folder(len(names), tuple(samples), (status.st_dev, status.st_ino))


def open_image(path: str) -> Image.Image:
    """Open an image, its pixels not yet decoded.

    Raises:
        UserError: "kind: details", if it should not be decoded.
        Exception: whatever Pillow makes of damage.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise UserError("not a file")
    if not status.st_size:
        raise UserError("zero bytes")
    try:
        image = Image.open(path, formats=("JPEG", "PNG"))
    except Image.DecompressionBombError:
        raise UserError(f"oversized: over {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UserError(f"oversized: {image.width}x{image.height}, over {MAX_PIXELS:,} pixels")
    return image


def inspect(job: tuple[str, tuple[str, ...]], decode: bool) -> tuple[Counter[tuple[int, int]], list[str]]:
    """Worker: the sizes of a clip's frames, and what is wrong with which; all frames are decoded, or samples opened."""
    folder, names = job
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    if decode:
        try:
            names = tuple(name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES))
        except OSError as error:
            return sizes, [f"{folder}: {error.strerror}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on odd files: what matters is raised
        for name in sorted(names, key=natural_key):
            path = os.path.join(folder, name)
            try:
                with open_image(path) as image:
                    sizes[image.size] += 1
                    if decode:
                        image.load()
            except Image.UnidentifiedImageError:
                bad.append(f"{path}: neither JPEG nor PNG")
            except Exception as error:  # damaged files make Pillow raise anything, even MemoryError or struct.error
                bad.append(f"{path}: {error or type(error).__name__}")
    return sizes, bad


def watch(results: Iterable, total: int, what: str) -> Iterator:
    """Pass results on and show progress on stderr: a bar on a terminal, else a line now and then."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(results, what, total, console=Console(stderr=True))
        return
    start = last = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if now - last > 5:
            last = now
            left = (now - start) / done * (total - done)
            print(f"{what}: {done:,}/{total:,}, {left:,.0f} s left", file=sys.stderr, flush=True)


def find_duplicates(clips: Sequence[Clip], folders: Sequence[Folder] | None, problems: Problems) -> None:
    """Clips that are listed twice, by folder where there is a disk, which sees through links and nested copies."""
    seen: dict[object, Clip] = {}
    for number, clip in enumerate(clips):
        identity = folders[number].identity if folders else None
        first = seen.setdefault(identity or os.path.normpath(clip.path), clip)
        if first is clip:
            continue
        line = f"{clip.where}: {clip.name}, also {first.where}"
        problems["clips in two lists" if clip.number != first.number else "clips listed twice"].append(line)
        if clip.row.label != first.row.label:
            line += f": {EMOTIONS[clip.row.label]} and {EMOTIONS[first.row.label]}"
            problems["clips with two labels"].append(line)


def check_disk(clips: Sequence[Clip], decode: bool, problems: Problems) -> list[Folder]:
    """Compare clips with the disk: folders, counts, images. Prints the sizes of the images, which are no problem."""
    with ThreadPoolExecutor(8) as pool:  # directory reads wait on the disk, not on the GIL
        folders = list(watch(pool.map(scan, [clip.path for clip in clips]), len(clips), "folders"))
    for clip, folder in zip(clips, folders, strict=True):
        if folder.error:
            kind, details = folder.error
            problems[kind].append(f"{clip.where}: {clip.path}{details}")
        elif clip.row.num_frames not in (None, folder.num_frames):
            found = f"listed {clip.row.num_frames}, found {folder.num_frames}"
            problems["wrong frame counts"].append(f"{clip.where}: {clip.name}: {found}")

    jobs = list(
        {clip.path: folder.samples for clip, folder in zip(clips, folders, strict=True) if folder.samples}.items()
    )
    work = functools.partial(inspect, decode=decode)
    with contextlib.ExitStack() as stack:
        results: Iterable = map(work, jobs)
        workers = os.cpu_count() or 1
        if workers > 1 and sum(f.num_frames if decode else len(f.samples) for f in folders) > PARALLEL:
            # Spawned, as forking a process that has threads is unsafe. Pillow reads headers in Python: threads would
            # wait for each other.
            spawn = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(workers, spawn)).map(work, jobs, chunksize=16)
        sizes: Counter[tuple[int, int]] = Counter()
        odd: dict[tuple[int, int], str] = {}
        for (path, _), (found, bad) in zip(jobs, watch(results, len(jobs), "images"), strict=True):
            sizes += found
            odd |= {size: path for size in found if size not in odd}
            problems["bad images"] += bad
    if sizes:
        how = "every frame decoded" if decode else "headers of the first, middle and last frame of each clip"
        (width, height), most = sizes.most_common(1)[0]
        print(f"images ({how}): {width}x{height} in {most:,} of {sizes.total():,}")
        for (width, height), number in sizes.most_common(NAMED + 1)[1:]:
            print(f"  other size: {width}x{height} in {number:,}, first in {shown(odd[width, height])}")
    return folders


def hint_at_nested_copy(clip: Clip, base: str | None) -> str:
    """Where a missing clip lies below its root after all, as unpacked archives often nest."""
    level = [base] if base and os.path.isdir(base) else []
    for _ in range(3):
        inner = []
        for folder in level[:200]:  # a bounded search: the root may hold a million folders
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                inner += [entry.path for entry in itertools.islice(entries, 200) if entry.is_dir()]
        level = sorted(inner)[:200]
        for folder in level:
            if os.path.isdir(os.path.join(folder, clip.name)):
                return f"{shown(clip.name)} lies in {shown(folder)}: say --root {shown(folder)}"
    return ""


def describe(clips: Sequence[Clip], lengths: Sequence[int], clip_length: int) -> None:
    """Print class counts and lengths of a list."""
    counts = Counter(clip.row.label for clip in clips)
    for label, emotion in enumerate(EMOTIONS):
        print(f"  {label} {emotion:<9}{counts[label]:>8,} {counts[label] / len(clips):>7.1%}")
    if not lengths:
        return
    short = sum(length < clip_length for length in lengths)
    middle = sorted(lengths)[len(lengths) // 2]
    print(f"  frames: {min(lengths)} to {max(lengths)}, median {middle}; {short:,} clips shorter than {clip_length}")
    for low, high, number in length_bins(lengths):
        print(f"  {low:>6}..{high:<6}{number:>8,} {'#' * -(-40 * number // len(lengths))}")


def length_bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(lowest, highest, clips) in steps of powers of two, from the shortest to the longest clip."""
    bits = Counter(length.bit_length() for length in lengths)
    return [(2 ** (b - 1), 2**b - 1, bits[b]) for b in range(min(bits), max(bits) + 1)]


def draw(path: Path, clips: Sequence[Clip], folders: Sequence[Folder]) -> None:
    """Contact sheet: clips of each class by first, middle and last frame, and histograms of classes and lengths."""
    tile, per_class, margin, gap = 96, 4, 110, 12
    font = ImageFont.load_default()
    width = margin + per_class * (3 * tile + gap)
    row_height = tile + 22
    sheet = Image.new("RGB", (width, len(EMOTIONS) * row_height + 160), "white")
    pen = ImageDraw.Draw(sheet)
    pairs = [pair for pair in zip(clips, folders, strict=True) if pair[1].samples]
    counts = [sum(clip.row.label == label for clip in clips) for label in range(len(EMOTIONS))]
    for label, emotion in enumerate(EMOTIONS):
        top = label * row_height + 4
        pen.text((8, top + tile // 3), f"{label} {emotion}\n{counts[label]:,} clips", "black", font)
        own = [pair for pair in pairs if pair[0].row.label == label]
        chosen = [own[i * len(own) // per_class] for i in range(per_class)] if len(own) > per_class else own
        for column, (clip, folder) in enumerate(chosen):
            left = margin + column * (3 * tile + gap)
            for number, name in enumerate(folder.samples):
                box = (left + number * tile, top, left + (number + 1) * tile - 1, top + tile - 1)
                try:
                    with warnings.catch_warnings(action="ignore"), open_image(os.path.join(clip.path, name)) as image:
                        image.draft("RGB", (tile, tile))
                        sheet.paste(image.convert("RGB").resize((tile, tile)), box[:2])
                except Exception:  # as in inspect(), which names it
                    pen.rectangle(box, "lightgrey")
                    pen.line(box, "red")
            caption = f"{clip.name} ({folder.num_frames})".encode("ascii", "replace").decode()
            pen.text((left, top + tile + 2), caption[-46:], "grey", font)
    lengths = [folder.num_frames for folder in folders if folder.num_frames]
    bars = [(emotion, counts[label]) for label, emotion in enumerate(EMOTIONS)]
    spans = [(f"{low}-{high}", number) for low, high, number in length_bins(lengths)] if lengths else []
    for left, title, chart in ((8, "clips per class", bars), (width // 2, "clips by frames", spans)):
        top = len(EMOTIONS) * row_height + 16
        pen.text((left, top), title, "black", font)
        for number, (name, value) in enumerate(chart):
            y = top + 20 + 16 * number
            longest = max(value for _, value in chart)
            pen.text((left, y), name, "black", font)
            pen.rectangle((left + 80, y, left + 80 + 300 * value // longest, y + 11), "steelblue")
            pen.text((left + 388, y), f"{value:,}", "black", font)
    partial = path.with_name(path.name + ".partial")
    sheet.save(partial, "PNG")
    os.replace(partial, path)


def check_outputs(outputs: Sequence[Path | None], list_path: Path, replaceable: Path | None) -> None:
    """Find out before the work whether files can be written, and that only `replaceable` replaces the list.

    Raises:
        UserError: in one line.
    """
    paths = [path for path in outputs if path]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path}: would be written twice")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise UserError(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'its folder is missing'}")
        if path != replaceable and path.exists() and path.samefile(list_path):
            raise UserError(f"{path}: would be overwritten, and --write replaces only canonical lists")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("check_list", __doc__)
    parser.add_argument(
        "lists", nargs="+", type=Path, metavar="LIST", help="list to check, alone and against the others"
    )
    parser.add_argument(
        "--root", type=Path, help="where the paths start (default: as its header says, else the list's folder)"
    )
    parser.add_argument(
        "--label-base", type=int, choices=(0, 1), help="id of the first class, where a list leaves it open"
    )
    parser.add_argument(
        "--class-order", metavar="ORDER", help="dfew, alphabetical, or the seven classes with commas between"
    )
    parser.add_argument(
        "--frames",
        type=in_range(int, 1, 10**6),
        default=16,
        metavar="T",
        help="clips below T frames are counted (default: 16)",
    )
    parser.add_argument("--no-disk", action="store_true", help="judge the lists alone, without the frames")
    parser.add_argument("--decode", action="store_true", help="decode every frame, which takes minutes")
    parser.add_argument(
        "--write", type=Path, metavar="OUT", help="write the list in the canonical form, with the disk's counts"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw a contact sheet with histograms")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write every problem, of which only the first are printed"
    )
    args = parser.parse_args(arguments)
    if args.no_disk and (args.decode or args.picture):
        parser.error("--decode and --picture need the frames: drop --no-disk")
    if args.write and len(args.lists) > 1:
        parser.error("--write takes one list at a time")
    sys.stdout.reconfigure(errors="backslashreplace")
    clips: list[Clip] = []
    titles, bases = [], []
    problems: Problems = defaultdict(list)
    try:
        for number, list_path in enumerate(args.lists):
            rows, dialect = read_list(list_path, order=args.class_order, base=args.label_base)
            names, base, remark = place(rows, dialect, list_path, args.root, not args.no_disk)
            for name, row in zip(names, rows, strict=True):
                clips.append(Clip(number, f"{list_path}:{row.line}", name, os.path.join(base or "", name), row))
            bases.append(base)
            reasons = "".join(f"\n  because: {line}" for line in (*dialect.evidence, remark) if line)
            titles.append(f"{list_path}: {len(rows):,} clips: {dialect.name}{reasons}")
            problems["damaged rows"] += dialect.problems
            check_outputs([args.write, args.picture, args.report], list_path, dialect.canonical and args.write)
        if args.write and args.no_disk and any(clip.row.num_frames is None for clip in clips):
            raise UserError(f"{args.lists[0]}: lacks frame counts: --write needs the frames; drop --no-disk")
    except (OSError, UserError) as error:
        parser.error(str(error))

    try:
        folders = None if args.no_disk else check_disk(clips, args.decode, problems)
    except BrokenProcessPool:
        parser.error("a process that reads images died: too little memory, or an image made to do this")
    find_duplicates(clips, folders, problems)
    lengths = [clip.row.num_frames or 0 for clip in clips] if folders is None else [f.num_frames for f in folders]
    for number, title in enumerate(titles):
        own = [i for i, clip in enumerate(clips) if clip.number == number]
        print("\n".join(map(shown, title.split("\n"))))
        describe([clips[i] for i in own], [lengths[i] for i in own if lengths[i]], args.frames)
    found = {kind: [shown(line) for line in lines] for kind, lines in problems.items() if lines}
    for kind, lines in found.items():
        print(f"{kind}: {len(lines):,}", *lines[:NAMED], sep="\n  ")
        if len(lines) > NAMED:
            print(f"  ... and {len(lines) - NAMED:,} more" + ("" if args.report else " (--report FILE names all)"))
    if folders and problems["missing folders"]:
        lost = next(i for i, folder in enumerate(folders) if folder.error and folder.error[0] == "missing folders")
        if hint := hint_at_nested_copy(clips[lost], bases[clips[lost].number]):
            print(hint)

    try:
        if args.write and (blocking := [kind for kind in UNWRITABLE if problems[kind]]):
            print(f"not written: {shown(args.write)}: {', '.join(blocking)}")
        elif args.write:
            base = bases[0] if bases[0] != os.path.abspath(args.write.parent) else None
            write_annotations(args.write, [(c.name, n, c.row.label) for c, n in zip(clips, lengths, strict=True)], base)
            print(f"written: {shown(args.write)}")
        if args.picture:
            draw(args.picture, clips, folders or [])
        if args.report:
            text = "".join(f"{kind}: {line}\n" for kind, lines in found.items() for line in lines)
            args.report.write_text(text, encoding="utf-8")
    except (OSError, UserError) as error:
        parser.error(f"cannot write: {error}")
    total = sum(map(len, found.values()))
    print(f"{total:,} problems in {len(clips):,} clips" if total else f"no problems in {len(clips):,} clips")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
