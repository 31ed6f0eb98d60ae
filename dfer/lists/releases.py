"""The official releases of DFEW and FERV39k: what is published of them, and the steps of preparing either.

A clip is here, as the releases call it, a whole video.
"""

import os
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from av.error import FFmpegError

from dfer.cli import Parser, UserError, printable, progress
from dfer.files import commit, disk_errors, is_data, reason, write_whole
from dfer.images import frame_names, natural_key
from dfer.lists.annotations import EMOTIONS, write_annotations
from dfer.lists.text import read_lines
from dfer.lists.threads import in_chunks

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
# Folders of clips, of which there are many (DFEW's 00001, FERV39k's emotions).
NOT_SEARCHED = re.compile(rf"[0-9]{{5}}|{'|'.join(EMOTIONS)}", re.IGNORECASE)
IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
NAMED = 10  # clips that a message names at most


@dataclass(frozen=True)
class Scan:
    """Whether a listed clip can be used, judged by what is on disk."""

    num_frames: int
    problem: str | None = None  # why it cannot be used


def search(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the folders of an unpacked release, top down: path, names of sub-folders, names of files.

    Clip folders are named but not entered. Links are followed last, and at most once to the same place by the same
    name, so that a loop ends. What is no data (see files.is_data) and a folder that cannot be opened are passed over; a
    part of the release that lies in it is then reported as not found.
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
                for entry in filter(lambda entry: is_data(entry.name), entries):
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
    """Return the one path that holds a part of the release; of several paths to the same place, the first.

    Raises:
        UserError: if there is none or more than one, or if the path cannot stand in a list.
    """
    by_place: dict[str, str] = {}
    for path in found:
        by_place.setdefault(os.path.realpath(path), path)
    places = list(by_place.values())
    if not places:
        raise UserError(f"{printable(root)}: found no {part} in it")
    if len(places) > 1:
        more = f" (and {len(places) - 2} more)" if len(places) > 2 else ""
        raise UserError(
            f"{part}: found in {printable(places[0])} and in {printable(places[1])}{more}; "
            "give a --root that holds only the one you mean, or move all pieces into one folder"
        )
    if not places[0].isprintable() or places[0] != places[0].strip():
        raise UserError(f"{places[0]!a}: a path with such characters cannot stand in a list; rename the folder")
    return places[0]


def read_rows(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield the rows of a text file that are not blank: ("file:row", which begins messages, the text).

    Raises:
        UserError: if the file cannot be read.
    """
    for row, line in enumerate(read_lines(Path(path), "list of the release")[0], start=1):
        if line:
            yield f"{path}:{row}", line


def count_difference(name: str, labels: Iterable[int], published: Sequence[int]) -> str | None:
    """Return how the class counts of a list differ from the published ones, or None."""
    counts = Counter(labels)
    found = [counts[label] for label in range(len(EMOTIONS))]
    if found == list(published):
        return None
    classes = ", ".join(
        f"{emotion} {f:,} not {p:,}" for emotion, f, p in zip(EMOTIONS, found, published, strict=True) if f != p
    )
    return f"{name} lists {sum(found):,} clips, the release {sum(published):,} ({classes})"


def scan_frames(path: str) -> Scan:
    """Count a folder's frames as the trainer does, and read the signatures of the first, the middle and the last."""
    try:
        names = frame_names(path)
    except (FileNotFoundError, NotADirectoryError):
        return Scan(0, "missing")
    except OSError as error:
        return Scan(0, f"unreadable ({reason(error)})")
    if not names:
        return Scan(0, "missing (no frames in its folder)")
    for index in sorted({0, len(names) // 2, len(names) - 1}):
        if not _starts_as_image(os.path.join(path, names[index])):
            return Scan(len(names), f"unreadable ({printable(names[index])} is no JPEG or PNG image)")
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
    """Count a video's frames without decoding them, as there is one packet for each."""
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
    except (FFmpegError, OSError) as error:
        return Scan(0, f"unreadable ({reason(error)})")
    return Scan(num_frames, None if num_frames else "unreadable (no frames)")


def scan_clips(root: str, names: Sequence[str], scan: Callable[[str], Scan]) -> dict[str, Scan]:
    """Scan all clips below `root`, and show progress."""
    found = in_chunks(lambda name: scan(os.path.join(root, name)), names, size=64)
    return dict(zip(names, progress(found, len(names), "clips"), strict=True))


def command_line(program: str, description: str | None) -> Parser:
    """Return a parser with the options that both commands have."""
    parser = Parser(program, description)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the release, however deep")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the lists to")
    parser.add_argument("--allow-missing", action="store_true", help="take a part of the release for what it is")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write what differs, is missing or short, a row each"
    )
    return parser


def judge(scans: Mapping[str, Scan], differences: Sequence[str], report: Path | None, allow_missing: bool) -> None:
    """Print what is not as published, and write all of it to `report`; refuse it unless `allow_missing` is set.

    Raises:
        UserError: if the copy is not whole and has to be, or if the report cannot be written.
    """
    if report:
        write_report(report, scans, differences)
    if not allow_missing:
        check_whole(scans, differences)
    for line in [*differences, *bad_clips(scans), *short_clips(scans)]:
        print(line)


def write_report(path: Path, scans: Mapping[str, Scan], differences: Sequence[str]) -> None:
    """Write everything that is not as published, a row each.

    Raises:
        UserError: if the file cannot be written.
    """
    rows = [f"differs: {difference}" for difference in differences]
    rows += [f"{name}: {scan.problem}" for name, scan in scans.items() if scan.problem]
    rows += [f"{name}: short ({scan.num_frames} frames)" for name, scan in scans.items() if _is_short(scan)]
    with disk_errors("cannot write"):
        write_whole(path, "".join(f"{row}\n" for row in rows))


def _is_short(scan: Scan) -> bool:
    return scan.num_frames < SHORT and not scan.problem


def check_whole(scans: Mapping[str, Scan], differences: Sequence[str]) -> None:
    """Refuse a copy that is not the whole release.

    Raises:
        UserError: if anything differs or a clip cannot be used.
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
    """Return a line that names the missing clips and one that names the unreadable ones, where there are any."""
    lines = []
    for kind in ("missing", "unreadable"):
        bad = [name for name, scan in scans.items() if scan.problem and scan.problem.startswith(kind)]
        if bad:
            lines.append(f"{len(bad):,} of {len(scans):,} clips are {kind}: {some(bad)}")
    return lines


def short_clips(scans: Mapping[str, Scan]) -> list[str]:
    """Return a line, if there are any, that names the clips with fewer than SHORT frames, which are listed."""
    short = [name for name, scan in scans.items() if _is_short(scan)]
    if not short:
        return []
    return [f"{len(short):,} of {len(scans):,} clips have fewer than {SHORT} frames and are kept: {some(short)}"]


def some(names: Sequence[str]) -> str:
    """Return the first NAMED names in a text, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def write_lists(
    out: Path,
    root: str,
    lists: Mapping[str, Sequence[tuple[str, int]]],
    scans: Mapping[str, Scan],
    others: Mapping[str, str | None] | None = None,
) -> None:
    """Write annotation lists of the clips that can be used.

    Clips left out are named in `LIST.missing.txt` beside the list, and a list without any clips is not written. All
    files are first written to a folder of their own and only then put in place, so that a full disk changes none of
    the old ones. A file that an earlier run wrote under one of these names and this one does not is removed.

    Args:
        out: folder to write to.
        root: folder in which the names of the clips start.
        lists: name of each list -> its (clip, label) rows.
        scans: clip -> its frame count, or why it cannot be used.
        others: name of further files -> their text; None removes what an earlier run wrote.

    Raises:
        UserError: if no clip can be used, or if `out` cannot be written to.
    """
    if all(scan.problem for scan in scans.values()):
        raise UserError(f"none of {len(scans):,} clips can be used; nothing was written")
    files = {f"{name}.txt" for name in lists} | {f"{name}.missing.txt" for name in lists} | set(others or {})
    with disk_errors("cannot write"):
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
                    write_whole(partial / f"{name}.missing.txt", "".join(bad))
            for file, text in (others or {}).items():
                if text is not None:
                    write_whole(partial / file, text)
            for file in sorted(files):
                if (partial / file).exists():
                    (out / file).parent.mkdir(exist_ok=True)
                    commit(partial / file, out / file)
                else:
                    (out / file).unlink(missing_ok=True)
