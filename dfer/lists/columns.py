"""Columns: the rows of a list of any format cut into path, frame count and label, and the paths in plain form."""

import csv
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError

WRITE_WHOLE = "write whole numbers (in pandas: .astype(int))"


class Cells(NamedTuple):
    """A row cut into columns."""

    line: int
    path: str
    frames: str | None
    label: str


def unquote(numbered: Sequence[tuple[int, str]], evidence: list[str]) -> list[tuple[int, str]]:
    """Return the rows without the quotes of a spreadsheet's export: all of them, or none."""
    if not numbered or not all('"' in (line[0], line[-1]) for _, line in numbered):
        return list(numbered)
    rows = []
    for number, line in numbered:
        separator = next((c for c in ",;\t" if re.search(f'"{c}|{c}"', line)), None)
        if separator is None:
            return list(numbered)
        try:
            (cells,) = csv.reader([line], delimiter=separator, strict=True)
        except (csv.Error, ValueError):
            return list(numbered)
        rows.append((number, separator.join(cell.strip() for cell in cells)))
    evidence.append("quotes around cells, as spreadsheets write them, are left out")
    return rows


def cut_columns(list_path: Path, numbered: Sequence[tuple[int, str]], official: bool) -> tuple[list[Cells], str]:
    """Cut rows from the right, as paths may hold spaces and commas. Returns the columns, and what separates them.

    Raises:
        UserError: if not all rows have the same columns.
    """
    two, three, floats, separators = [], [], [], []
    # A name may end in a semicolon: only what separates the columns of all rows is a separator.
    marks = ",;" if all(re.search(r";\s*[^\s,;]*$", line) for _, line in numbered) else ","
    for number, line in numbered:
        label = re.split(rf"[\s{marks}]", line)[-1]
        rest = line[: len(line) - len(label)].rstrip()
        separators.append(rest[-1] if rest.endswith(tuple(marks)) else " ")
        rest = rest.removesuffix(separators[-1]).rstrip()
        if not rest or not label:
            raise UserError(f"{list_path}:{number}: expected 'path label' or 'path num_frames label', got {show(line)}")
        two.append(Cells(number, rest, None, label))
        separator = separators[-1].strip() or None
        head, count = map(str.strip, [*rest.rsplit(separator, maxsplit=1), ""][:2])
        if head and re.fullmatch(r"-?[0-9]+", count):
            three.append(Cells(number, head, count, label))
        elif head and re.fullmatch(r"[0-9]+\.0+", count):
            floats.append((number, count))
        if separators[-1] != separators[0]:
            raise UserError(f"{list_path}:{number}: commas and white space separate columns in the same list")
    if floats and not official and len(three) + len(floats) == len(two):
        number, count = floats[0]
        raise UserError(
            f"{list_path}:{number}: the count {count} is no whole number, as pandas and spreadsheets write 6 as 6.0: "
            f"{WRITE_WHOLE}"
        )
    if official or not three:
        return two, separators[0]
    other = "commas" if separators[0] == " " else "white space"
    if len(three) < len(two):
        uncounted = sorted({cell.line for cell in two} - {cell.line for cell in three})
        raise UserError(
            f"{list_path}:{uncounted[0]}: no frame count before the label, but row {three[0].line} has one; if names "
            f"end in numbers, separate the columns by {other}"
        )
    counts = Counter(path for path, _ in {(cell.path, int(cell.frames[-9:])) for cell in three})
    repeated, times = counts.most_common(1)[0]
    if times > 1:
        rows = [cell.line for cell in three if cell.path == repeated]
        raise UserError(
            f"{list_path}:{rows[0]}: {show(repeated)} stands in row {rows[-1]} with another number: one clip with two "
            "frame counts, or clips whose names end in numbers?"
        )
    return three, separators[0]


def clean_paths(
    list_path: Path, cells: Sequence[Cells], base: Path | None, official: bool, evidence: list[str]
) -> tuple[list[str], bool]:
    """Return the paths in plain form, and whether they are absolute (all or none). `base`: None for lists of ours."""
    names, absolute = [], []
    # Our own lists hold what is on this disk, where a name may have a backslash.
    first = next((cell.path for cell in cells if "\\" in cell.path), "")
    foreign = bool(first) and base is not None and not os.path.lexists(base / first)
    for cell in cells:
        name = cell.path.replace("\\", "/") if foreign else cell.path
        if official and re.fullmatch(r"[0-9]{1,5}", name):
            name = name.zfill(5)
        if ".." in name.split("/"):
            raise UserError(f"{list_path}:{cell.line}: {show(name)} leads outside the root, by '..'")
        absolute.append(name.startswith("/") or (base is not None and re.match(r"[A-Za-z]:/", name) is not None))
        if absolute[-1] != absolute[0]:
            kinds = "an absolute path among relative ones" if absolute[-1] else "a relative path among absolute ones"
            raise UserError(f"{list_path}:{cell.line}: {show(name)} is {kinds}")
        name = posixpath.normpath(name)
        if name in (".", "/", "//"):
            raise UserError(f"{list_path}:{cell.line}: the path is no clip's")
        names.append(name)
    if foreign:
        evidence.append("backslashes in the paths are taken for slashes")
    if official and any(cell.path != name for cell, name in zip(cells, names, strict=True)):
        evidence.append("numbers without leading zeros stand for folders of five digits")
    return names, absolute[0]


def show(text: str) -> str:
    """Return a text of a list as messages show it: printable, and not too long."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
