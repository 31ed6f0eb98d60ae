"""Read and write annotation lists: the one place that knows what a row of a `.txt` list means.

The canonical form, which our scripts write, is the common form of the field below a header of comments:

    # classes: Happy Sad Neutral Angry Surprise Disgust Fear
    # root: /data/DFEW/Clip/clip_224x224     (or, if the clips are packed, "# packed: NAME.npz")
    # faces: drawn  (of make_faces.py: no people)
    # sha256: 3b0c...  (of the rows, each ended by a newline)
    00001 144 1
"""

import contextlib
import csv
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dfer.cli import UserError, command_of, printable, say_once
from dfer.files import reason, write_whole
from dfer.lists.orders import EMOTIONS, WORDS, check_paths
from dfer.lists.text import USUAL, name_hidden, read_head, read_lines, split_rows

COLUMNS = "path num_frames label"
DRAWN = "drawn"  # what a list's header says of faces that are no people's
_ROW = re.compile(r"(.*\S)\s+(-?[0-9]{1,9})\s+(-?[0-9]{1,9})")  # int() would also take ٣, +3 and 1_0


@dataclass(frozen=True)
class VideoRecord:
    """One annotated video: a row of a list."""

    name: str  # as the list writes it; logs and predictions.csv use it too
    path: Path  # folder of frames (or file) on this machine
    num_frames: int  # as listed; a hint only, published lists get it wrong
    label: int  # 0 .. len(EMOTIONS) - 1
    source: str  # "list.txt:row", which begins each message about it


def read_annotations(list_path: str | Path, root: str | Path | None = None) -> list[VideoRecord]:
    """Read a list of `path num_frames label` rows, the common form of the field.

    Rows are split from the right, so paths may hold spaces; CRLF, a byte-order mark, blank lines and lines starting
    with `#` are fine. Relative paths start at `root`, else where the list's header says, else at the list's folder. A
    clip whose name begins with `#` may be written `./#name`. What is read otherwise than it stands there is said once.

    Raises:
        UserError: if the list is missing, empty or damaged, if its header states another order of classes, or a hash
            that its rows do not have, or if most of its paths name other emotions than its labels, and no header says
            what these mean. The message names the file, and the row if it is about one.
    """
    list_path = Path(list_path)
    lines, oddities = read_lines(list_path, advice=_hint(list_path))
    for oddity in oddities:
        if oddity not in USUAL:
            say_once(f"{list_path}: {oddity}")
    header = read_header(lines)
    _check_header(list_path, header, lines)
    base = Path(root) if root is not None else list_path.parent / header.get("root", "")
    rows, left_out = split_rows(lines, base)
    if left_out:
        say_once(
            f"{list_path}:{left_out[0]}: begins with # and is taken for a comment, as {len(left_out):,} such rows are; "
            "there is no clip of that name"
        )
    records = [_parse_row(line, f"{list_path}:{row}", base) for row, line in rows]
    if not records:
        raise UserError(f"{list_path}: the annotation list is empty")
    if root is not None and "packed" not in header:
        for record in records:
            if os.path.isabs(record.name):
                say_once(f"{record.source}: the path is absolute, where the root that was given has no effect")
                break
    check_paths(
        records,
        "classes" in header,
        lambda flags: (
            f"if its ids have another order, convert it: {command_of('check_list')} {printable(list_path)} {flags} "
            f"--write OUT; if not, let its first line say so: # classes: {' '.join(EMOTIONS)}"
        ),
    )
    return records


def _parse_row(line: str, where: str, base: Path) -> VideoRecord:
    row = _ROW.fullmatch(line)
    if row is None or "\0" in line:
        raise UserError(f"{where}: {_what_is_wrong(line)}")
    name, num_frames, label = row[1], int(row[2]), int(row[3])
    if name.startswith("./#"):
        name = name[2:]
    if num_frames < 1:
        raise UserError(f"{where}: num_frames is {num_frames}, must be at least 1")
    if not 0 <= label < len(EMOTIONS):
        legend = " ".join(f"{i}={e}" for i, e in enumerate(EMOTIONS))
        other = _converts() if label == len(EMOTIONS) else ""
        raise UserError(f"{where}: label {label} is not in 0..{len(EMOTIONS) - 1} ({legend}){other}")
    return VideoRecord(name, base / name, num_frames, label, where)


def _what_is_wrong(line: str) -> str:
    """Return why a line is no row, and what to do where that can be told."""
    if "\0" in line:
        return "holds a NUL, which no path has: damaged, or not a list"
    what = "num_frames and label must be whole numbers" if len(line.split()) > 2 else f"expected '{COLUMNS}'"
    *_, label = re.split(r"[\s,;]", line)
    advice = ""
    if hidden := name_hidden(line):
        advice = f"; it holds {hidden}, which looks like nothing or a blank: remove it"
    elif re.search(r"[\s,;]-?[0-9]+\.0*([\s,;]|$)", line):
        advice = "; pandas and spreadsheets write 6 as 6.0: write whole numbers"
    elif "," in line or ";" in line or re.fullmatch("[0-7]", label) or label.lower() in WORDS:
        advice = _converts()
    return f"{what}, got {line!r}{advice}"


def packed_index(list_path: str | Path) -> Path | None:
    """Return the .npz file that a packed list says its clips lie in (see packed.py), None if the list is not packed.

    Raises:
        UserError: if the list cannot be read, or names a file that is not beside it.
    """
    list_path = Path(list_path)
    name = _header_of(list_path).get("packed")
    if name is not None and (os.path.basename(name) != name or "\0" in name or not name.endswith(".npz")):
        raise UserError(f"{list_path}: its header says packed: {name!r}, which is no .npz file beside the list")
    return None if name is None else list_path.parent / name


def listed_faces(list_path: str | Path) -> str:
    """Return what a list's header says of its faces: DRAWN, how they were found and cropped, or "".

    Raises:
        UserError: if the list cannot be read.
    """
    return _header_of(Path(list_path)).get("faces", "")


def _header_of(list_path: Path) -> dict[str, str]:
    try:
        return read_header(read_head(list_path))
    except (OSError, ValueError) as error:
        raise UserError(f"{list_path}: cannot be read as an annotation list ({error})") from None


def write_annotations(
    list_path: str | Path,
    rows: Sequence[tuple[str, int, int]],
    root: str | Path | None = None,
    packed: str | None = None,
    faces: str = "",
) -> None:
    """Write the canonical list of (name, num_frames, label) rows, whole or not at all.

    Args:
        list_path: the list to write.
        rows: (name, num_frames, label) of each video.
        root: folder in which the names start, stored as given. None: the folder of the list.
        packed: name of the .npz file beside the list that says where the clips lie, if they are packed.
        faces: how they were made, found and cropped, in words, as `listed_faces` returns it of another list.

    Raises:
        UserError: if a row cannot be written so that it reads back the same.
        OSError: if the file cannot be written.
    """
    list_path = Path(list_path)
    lines = []
    for name, num_frames, label in rows:
        if name != name.strip() or name.startswith("./#") or "\n" in name or "\r" in name or not name:
            raise UserError(f"{list_path}: a clip named {name!r} cannot stand in a list")
        if num_frames < 1 or not 0 <= label < len(EMOTIONS):
            raise UserError(f"{list_path}: clip {name}: {num_frames} frames, label {label} cannot stand in a list")
        escape = "./" if name.startswith("#") else ""  # or the row would be a comment
        lines.append(f"{escape}{name} {num_frames} {label}")
    header = [f"# classes: {' '.join(EMOTIONS)}"]
    if root is not None:
        header.append(f"# root: {root}")
        if not fits_header(str(root)):
            raise UserError(f"{list_path}: a root named {str(root)!r} cannot stand in a list")
    if packed is not None:
        header.append(f"# packed: {packed}")
        if not fits_header(packed):
            raise UserError(f"{list_path}: a pack named {packed!r} cannot stand in a list")
    if faces:
        header.append(f"# faces: {faces}")
        if not fits_header(faces):
            raise UserError(f"{list_path}: a note on faces, {faces!r}, cannot stand in a list")
    try:
        header.append(f"# sha256: {hash_rows(lines)}")
        data = "".join(f"{line}\n" for line in header + lines).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{list_path}: a name that is not UTF-8 cannot stand in a list ({error})") from None
    write_whole(list_path, data)


def fits_header(text: str) -> bool:
    """Return whether a text reads back the same from a list's header: it is UTF-8, and of one line."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return text == text.strip() and not any(character in text for character in "\n\r\0")
    return False


def read_votes(path: str | Path, records: Sequence[VideoRecord]) -> Float32[np.ndarray, "N K"]:
    """Return the label distribution of each record, each row summing to 1.

    The file has the header `clip,Happy,...,Fear` and a row for each clip with how many annotators chose each class.

    Raises:
        UserError: if the file is missing or damaged, has two rows of different votes for a clip, or none for one of the
            records.
    """
    votes: dict[str, list[float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != ["clip", *EMOTIONS]:
                raise UserError(f"{path}:1: expected clip,{','.join(EMOTIONS)}, got {','.join(header)!r}")
            for row in rows:
                counts = []
                with contextlib.suppress(ValueError):
                    counts = [float(x) for x in row[1:]]
                # The sum is bounded, as the shares are calculated in float32.
                if len(counts) != len(EMOTIONS) or not (min(counts) >= 0 and 1e-9 < sum(counts) < 1e9):
                    raise UserError(f"{path}:{rows.line_num}: expected a clip and {len(EMOTIONS)} counts, got {row}")
                if votes.setdefault(row[0], counts) != counts:
                    raise UserError(
                        f"{path}:{rows.line_num}: clip {row[0]} has other votes in an earlier row; leave one of them"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a file of votes ({reason(error)})") from None
    for record in records:
        if record.name not in votes:
            zeros = record.name.lstrip("0") in votes
            hint = "; it has them without the zeros, which spreadsheets take for no part of a name" if zeros else ""
            raise UserError(f"{path}: no votes for clip {record.name} ({record.source}){hint}")
    table = np.array([votes[record.name] for record in records], dtype=np.float32)
    return table / table.sum(1, keepdims=True)


def read_header(lines: Sequence[str]) -> dict[str, str]:
    """Return the `# key: value` comments that stand before the first row, of the keys that lists of ours have."""
    header = {}
    for line in lines:
        if line and not line.startswith("#"):
            break
        key, colon, value = line.lstrip("# ").partition(":")
        if colon and key in ("classes", "root", "packed", "faces", "sha256"):
            header[key] = value.strip()
    return header


def _check_header(list_path: Path, header: dict[str, str], lines: Sequence[str]) -> None:
    if "\0" in "".join(header.values()):
        raise UserError(f"{list_path}: its header holds a NUL, which no path has: damaged, or not a list")
    classes = tuple(header.get("classes", " ".join(EMOTIONS)).split())
    if classes != EMOTIONS:
        raise UserError(
            f"{list_path}: its labels mean {' '.join(classes)}, but a model's classes are {' '.join(EMOTIONS)}; "
            f"convert it with {command_of('check_list')} --write"
        )
    rows = [line for line in lines if line and not line.startswith("#")]
    if "sha256" in header and header["sha256"] != hash_rows(rows):
        raise UserError(
            f"{list_path}: its rows are not those that its header's sha256 was made of; if the change is meant, check "
            f"it and write a new header with {command_of('check_list')} --write"
        )


def _converts() -> str:
    return f"; {command_of('check_list')} LIST --write OUT converts lists with other columns or labels"


def hash_rows(rows: Sequence[str]) -> str:
    """Return the SHA-256 in hex that the header states of a list's rows."""
    return hashlib.sha256("".join(f"{row}\n" for row in rows).encode()).hexdigest()


def _hint(list_path: Path) -> str:
    if list_path.parts[-3:-1] == ("data", "faces"):
        return f"; make the embedded data set with: {command_of('make_faces')}"
    if list_path.parts[-3:-1] in (("lists", "dfew"), ("lists", "ferv39k")):  # where the presets look
        command = command_of(f"prepare_{list_path.parts[-2]}")
        return f"; prepare the release with: {command} --root DIR --out {printable(list_path.parent)}"
    return "; check --data.train-list and --data.val-list"
