"""The official releases of DFEW and FERV39k: what is published of them, and the steps of preparing either."""

import os
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av

from dfer.cli import Parser, UserError, shown
from dfer.images import FRAME_SUFFIXES, natural_key
from dfer.lists.annotations import EMOTIONS, write_annotations

# Clips per class, in the order of EMOTIONS. A fold of DFEW trains on all that it does not test on.
DFEW_TEST_COUNTS = (
    (489, 379, 534, 435, 294, 29, 181),
    (489, 379, 534, 435, 294, 29, 181),
    (489, 379, 534, 435, 294, 29, 180),
    (489, 379, 534, 434, 294, 29, 180),
    (489, 378, 533, 434, 293, 29, 180),
)
DFEW_COUNTS = tuple(map(sum, zip(*DFEW_TEST_COUNTS, strict=True)))
FERV39K_TRAIN_COUNTS = (5854, 5523, 7790, 5906, 2502, 1833, 1680)
FERV39K_TEST_COUNTS = (1473, 1393, 1958, 1487, 638, 467, 431)
FERV39K_SCENES = 22

SHORT = 16  # frames; the field's T

# What unpacking twice, or downloading in pieces, adds to the name of a folder.
COPY_SUFFIX = r"(?:[ _-]*(?:\(\d+\)|-\d+|copy|part_\d+))*"
MAX_DEPTH = 8
# Clips, of which there are many: DFEW's 00001, and below FERV39k's emotions. And what macOS packs with everything.
NOT_SEARCHED = re.compile(rf"[0-9]{{5}}|[.].*|__MACOSX|{'|'.join(EMOTIONS)}", re.IGNORECASE)
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
SCAN_THREADS = 8
NAMED = 10  # how many of many clips a message names


@dataclass(frozen=True)
class Scan:
    """What was found on disk of one listed clip."""

    num_frames: int
    problem: str | None = None  # why it cannot be used


def search(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """The folders of an unpacked release, top down: path, names of sub-folders, names of files.

    Clip folders are named but not entered. Links are followed last, and at most once to the same place by the same
    name, so that a loop ends. What cannot be opened is passed over: a part in it is then not found, which is said.
    """
    queue, links = deque([(os.path.abspath(root), 0)]), deque()
    seen = set()
    while queue or links:
        folder, depth = (queue or links).popleft()
        # With the name, as a link may be what gives a part its name.
        place = os.path.realpath(folder), os.path.basename(folder)
        if place in seen:
            continue
        seen.add(place)
        folders, files = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    # isdir() also says of a link to itself that it is no folder, where is_dir() raises.
                    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                    (folders if is_folder else files).append(entry.name)
        except OSError:
            continue
        folders.sort(key=natural_key)
        yield folder, folders, sorted(files)
        for name in folders if depth < MAX_DEPTH else ():
            if not NOT_SEARCHED.fullmatch(name):
                path = os.path.join(folder, name)
                (links if os.path.islink(path) else queue).append((path, depth + 1))


def only_one(part: str, found: Iterable[str], root: str | Path) -> str:
    """The one path that holds a part of the release; of several paths to the same place, the first found.

    Raises:
        UserError: in one line, if there is none or more than one.
    """
    by_place: dict[str, str] = {}
    for path in found:
        by_place.setdefault(os.path.realpath(path), path)
    places = list(by_place.values())
    if not places:
        raise UserError(f"{shown(root)}: found no {part} in it")
    if len(places) > 1:
        more = f" (and {len(places) - 2} more)" if len(places) > 2 else ""
        raise UserError(
            f"{part}: found in {shown(places[0])} and in {shown(places[1])}{more}; "
            "give a --root that holds only the one you mean, or move all pieces into one folder"
        )
    if not places[0].isprintable() or places[0] != places[0].strip():
        raise UserError(f"{places[0]!a}: a path with such characters cannot stand in a list; rename the folder")
    return places[0]


def read_rows(path: str | Path) -> Iterator[tuple[str, str]]:
    """The rows of a text file that are not blank: where ("file:row", for messages), and what stands there.

    Raises:
        UserError: in one line, if the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for row, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{row}", line.strip()


def count_difference(name: str, labels: Iterable[int], published: Sequence[int]) -> str | None:
    """How the classes of a list differ from the published counts, or None."""
    counts = Counter(labels)
    found = [counts[label] for label in range(len(EMOTIONS))]
    if found == list(published):
        return None
    classes = ", ".join(
        f"{emotion} {f:,} not {p:,}" for emotion, f, p in zip(EMOTIONS, found, published, strict=True) if f != p
    )
    return f"{name} lists {sum(found):,} clips, the release {sum(published):,} ({classes})"


def scan_frames(path: str) -> Scan:
    """Count a folder's frames as the trainer does, and look at the first, the middle and the last one."""
    try:
        names = [name for name in os.listdir(path) if name.lower().endswith(FRAME_SUFFIXES)]
    except (FileNotFoundError, NotADirectoryError):
        return Scan(0, "missing")
    except OSError as error:
        return Scan(0, f"unreadable ({error.strerror})")
    if not names:
        return Scan(0, "missing (no frames in its folder)")
    names.sort(key=natural_key)
    for index in sorted({0, len(names) // 2, len(names) - 1}):
        if not _starts_as_image(os.path.join(path, names[index])):
            return Scan(len(names), f"unreadable ({shown(names[index])} is no JPEG or PNG image)")
    return Scan(len(names))


def _starts_as_image(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.read(file, 8).startswith(IMAGE_SIGNATURES)
        finally:
            os.close(file)
    except OSError:
        return False


def scan_video(path: str) -> Scan:
    """Count a video's frames without decoding them: one packet each."""
    if not os.path.exists(path):
        return Scan(0, "missing")
    try:
        with av.open(path, metadata_errors="replace") as container:
            video = container.streams.best("video")
            if video is None:
                return Scan(0, "unreadable (no video stream)")
            num_frames = 0
            for packet in container.demux(video):
                if packet.is_corrupt:
                    return Scan(num_frames, "unreadable (truncated or damaged)")
                num_frames += packet.size > 0  # the last packet is empty: it says that there are no more
    except (av.FFmpegError, OSError) as error:
        return Scan(0, f"unreadable ({error.strerror})")
    return Scan(num_frames, None if num_frames else "unreadable (no frames)")


def scan_clips(root: str, names: Sequence[str], scan: Callable[[str], Scan]) -> dict[str, Scan]:
    """Scan all clips below `root`, in threads: the disk is what is waited for. Says how far it is."""
    chunks = [names[start : start + 64] for start in range(0, len(names), 64)]
    scans: dict[str, Scan] = {}
    pool = ThreadPoolExecutor(SCAN_THREADS)
    try:
        results = pool.map(lambda chunk: [scan(os.path.join(root, name)) for name in chunk], chunks)
        if terminal := sys.stdout.isatty():
            from rich.progress import track

            results = track(results, "clips", total=len(chunks))
        for chunk, found in zip(chunks, results, strict=True):
            tenths = len(scans) * 10 // len(names)
            scans.update(zip(chunk, found, strict=True))
            if not terminal and len(scans) * 10 // len(names) > tenths:
                print(f"{len(scans):,}/{len(names):,} clips", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, do not scan on
    return scans


def command_line(program: str, description: str | None) -> Parser:
    """The options that preparing either release has."""
    parser = Parser(program, description)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the release, however deep")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the lists to")
    parser.add_argument("--allow-missing", action="store_true", help="take a part of the release for what it is")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write what differs, is missing or short, a row each"
    )
    return parser


def judge(scans: Mapping[str, Scan], differences: Sequence[str], report: Path | None, allow_missing: bool) -> None:
    """Say what is not as published, in `report` in full; refuse it unless a part of the release is allowed.

    Raises:
        UserError: in one line, if the copy is not whole and has to be.
        OSError: if the report cannot be written.
    """
    if report:
        write_report(report, scans, differences)
    if not allow_missing:
        check_whole(scans, differences)
    for line in [*differences, *bad_clips(scans), *short_clips(scans)]:
        print(line)


def write_report(path: Path, scans: Mapping[str, Scan], differences: Sequence[str]) -> None:
    """Write everything there is to say about a copy of a release, a row each.

    Raises:
        OSError: if the file cannot be written.
    """
    rows = [f"differs: {difference}" for difference in differences]
    rows += [f"{name}: {scan.problem}" for name, scan in scans.items() if scan.problem]
    rows += [f"{name}: short ({scan.num_frames} frames)" for name, scan in scans.items() if _is_short(scan)]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _is_short(scan: Scan) -> bool:
    return scan.num_frames < SHORT and not scan.problem


def check_whole(scans: Mapping[str, Scan], differences: Sequence[str]) -> None:
    """Refuse a copy that is not the whole release.

    Raises:
        UserError: in one line, with what differs and the first of the clips that cannot be used.
    """
    wrong = []
    if differences:
        more = f" (and {len(differences) - 1} more such)" if len(differences) > 1 else ""
        wrong.append(differences[0] + more)
    wrong += bad_clips(scans)
    if wrong:
        raise UserError(
            f"{'; '.join(wrong)}; nothing was written: --allow-missing takes what is there, --report FILE names all"
        )


def bad_clips(scans: Mapping[str, Scan]) -> list[str]:
    """In a line each, if there are any, the clips that are missing and those that are unreadable."""
    lines = []
    for kind in ("missing", "unreadable"):
        bad = [name for name, scan in scans.items() if scan.problem and scan.problem.startswith(kind)]
        if bad:
            lines.append(f"{len(bad):,} of {len(scans):,} clips are {kind}: {some(bad)}")
    return lines


def short_clips(scans: Mapping[str, Scan]) -> list[str]:
    """In a line, if there are any, the clips that are listed though they have few frames."""
    short = [name for name, scan in scans.items() if _is_short(scan)]
    if not short:
        return []
    return [f"{len(short):,} of {len(scans):,} clips have fewer than {SHORT} frames and are kept: {some(short)}"]


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def write_lists(
    out: Path,
    root: str,
    lists: Mapping[str, Sequence[tuple[str, int]]],
    scans: Mapping[str, Scan],
    others: Mapping[str, str | None] | None = None,
) -> None:
    """Write annotation lists, `{list name: (clip, label) rows}`, of the clips that can be used.

    Clips left out are named in `LIST.missing.txt` beside the list, and a list without any clips is not written. All
    files are written elsewhere first, so that none is left half-written, and only then put in place; what an earlier
    run wrote by these names and this one does not is removed. `others` are further files: their text, or None.

    Raises:
        UserError: in one line, if no clip can be used.
        OSError: if `out` cannot be written to.
    """
    if all(scan.problem for scan in scans.values()):
        raise UserError(f"none of {len(scans):,} clips can be used; nothing was written")
    files = {f"{name}.txt" for name in lists} | {f"{name}.missing.txt" for name in lists} | set(others or {})
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        partial = Path(folder)
        for file in files:
            (partial / file).parent.mkdir(exist_ok=True)
        for name, clips in lists.items():
            good = [(clip, scans[clip].num_frames, label) for clip, label in clips if not scans[clip].problem]
            if good:
                write_annotations(partial / f"{name}.txt", good, root)
            bad = [f"{clip}: {scans[clip].problem}\n" for clip, _ in clips if scans[clip].problem]
            if bad:
                (partial / f"{name}.missing.txt").write_text("".join(bad), encoding="utf-8")
        for file, text in (others or {}).items():
            if text is not None:
                (partial / file).write_text(text, encoding="utf-8")
        for file in sorted(files):
            if (partial / file).exists():
                (out / file).parent.mkdir(exist_ok=True)
                os.replace(partial / file, out / file)
            else:
                (out / file).unlink(missing_ok=True)
