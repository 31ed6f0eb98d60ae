"""Formats: annotation lists as the field writes them, read with the meaning of their labels or refused.

A reading is an order of the classes and the id of the first one. A reading is dropped when rows contradict it, by an id
out of its range or by an emotion folder in the path (`Crime/Angry/0063`). A single row settles nothing, as it may be a
typo: a list damaged in one row is refused or keeps the labels of the other rows. A list for which two readings remain
that differ is refused, with the flag of scripts/check_list.py that decides. Where no known order fits, the emotion
folders themselves may give one: if each id stands for one, and each for one id.

Two conventions settle what rows leave open: `path num_frames label` is in DFEW order from 0, and a list with the
official header is in DFEW order. One thing cannot be found out: two columns look like three if all names end in a blank
and a number.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError
from dfer.lists.annotations import COLUMNS as COMMON
from dfer.lists.annotations import hash_rows, read_header
from dfer.lists.columns import WRITE_WHOLE, Cells, clean_paths, cut_columns, show, unquote
from dfer.lists.orders import (
    EMOTIONS,
    ORDERS,
    SAY_ORDER,
    WORDS,
    complete_order,
    emotions_in,
    parse_order,
    read_order,
)
from dfer.lists.text import read_lines, split_rows

MAX_BYTES, MAX_ROWS, MAX_LINE = 2**26, 10**6, 2**13  # the field's largest list: 2.4 MB, 31,088 rows of 40 letters
MAX_COUNT = 10**7  # frames; 847 is the field's longest clip

WORD = "emotion words"
KNOWN = {  # (header, columns, order, base) -> who writes it
    (True, "path,label", "dfew", 1): "official DFEW",
    (True, "path,label", "dfew", 0): "the official DFEW header, but not its ids: S2D, S4D",
    (False, "path label", WORD, 0): "official FERV39k",
    (False, "path,label", "alphabetical", 0): "S2D, S4D, M3DFEL on FERV39k",
    (False, COMMON, "dfew", 0): "the common list of the field",
}
SAY_BASE = "say --label-base 0 or --label-base 1"


class Row(NamedTuple):
    """One video of a list."""

    name: str  # its path, with forward slashes
    num_frames: int | None  # as listed; None if the list has no such column or no such number
    label: int  # index into EMOTIONS, whatever the list writes
    line: int  # in the file, from 1


@dataclass(frozen=True)
class ListFormat:
    """How a list was read, and why."""

    name: str  # its columns and what its labels mean
    evidence: tuple[str, ...]
    problems: tuple[str, ...]  # "list.txt:row: ..." of what is wrong but leaves the labels certain
    root: str | None  # where the list's header says that the paths start
    absolute: bool  # all paths are, maybe on another machine
    canonical: bool  # it has a header of ours


class _Table(NamedTuple):
    """A list cut into columns. What its labels mean is open."""

    path: Path
    header: dict[str, str]
    official: bool  # it has the header of the official DFEW lists
    columns: str  # "path num_frames label", ...
    cells: list[Cells]
    names: list[str]  # the paths in plain form
    absolute: bool  # all paths are

    @property
    def canonical(self) -> bool:
        return "classes" in self.header


class _Reading(NamedTuple):
    """What the labels of a list may mean."""

    order: str
    classes: tuple[str, ...]
    base: int

    def emotion(self, label: int) -> str:
        """Return the emotion of an id as the list writes it; empty if it has none."""
        return self.classes[label - self.base] if 0 <= label - self.base < len(EMOTIONS) else ""

    def __str__(self) -> str:
        return WORD if self.order == WORD else f"ids {self.base}..{self.base + 6} in {self.order} order"


def read_list(
    list_path: str | Path, *, order: str | None = None, base: int | None = None, root: str | Path | None = None
) -> tuple[list[Row], ListFormat]:
    """Read a list of any format: 2 or 3 columns, commas, semicolons or white space, emotion words or ids of any order.

    Args:
        list_path: the list.
        order: "dfew", "alphabetical", or the seven classes with commas between, for lists that do not show theirs;
            the rows must not contradict it.
        base: the id of the first class, 0 or 1, likewise.
        root: where the paths start, if not where the header says. Of the disk only rows are looked up that may be
            comments, or whose backslashes may be part of a name.

    Returns:
        The rows in the list's order, and the format with the evidence for it.

    Raises:
        UserError: if the list cannot be read, is damaged, reaches outside its root by "..", contradicts itself, or
            leaves open what its labels mean. The message names the file and mostly a row.
    """
    list_path = Path(list_path)
    classes = None if order is None else parse_order(order, "--class-order")
    table, evidence, problems = _read_table(list_path, root)
    ids = _label_ids(list_path, table.cells)
    readings, usual = _possible_readings(table, ids is not None, order, base, evidence)
    if ids is None:
        ids = [EMOTIONS.index(WORDS[cell.label.lower()]) for cell in table.cells]
    reading = _settle(table, ids, readings, usual, evidence)
    if reading in usual and classes is None and not any(map(emotions_in, table.names)):
        evidence.append(
            f"convention, not proof: lists with such {'a header' if table.official else 'rows'} are in DFEW order"
        )
    to_label = [EMOTIONS.index(emotion) for emotion in reading.classes]
    rows = []
    for cell, name, number in zip(table.cells, table.names, ids, strict=True):
        count = None if cell.frames is None else int(cell.frames[:9])
        if cell.frames is not None and count not in range(1, MAX_COUNT + 1):
            problems.append(f"{list_path}:{cell.line}: no clip has {cell.frames[:20]} frames")
            count = None
        rows.append(Row(name, count, to_label[number - reading.base], cell.line))
    known = KNOWN.get((table.official, table.columns, reading.order, reading.base), "")
    known = "canonical list" if table.canonical else known
    name = f"{table.columns}, {reading}" + (f" ({known})" if known else "")
    root = table.header.get("root")
    return rows, ListFormat(name, tuple(evidence), tuple(problems), root, table.absolute, table.canonical)


def _read_table(list_path: Path, root: str | Path | None) -> tuple[_Table, list[str], list[str]]:
    """Read a list and cut it into columns. Returns it, its oddities, and what is wrong with it."""
    lines, evidence = _read_lines(list_path)
    header = read_header(lines)
    canonical = "classes" in header
    if "sha256" in header and not canonical:
        raise UserError(f"{list_path}: its header has a sha256 but no classes: it is damaged")
    base = Path(root) if root is not None else list_path.parent / header.get("root", "")
    numbered, left_out = split_rows(lines, base)
    problems = []
    if "sha256" in header and header["sha256"] != hash_rows([line for _, line in numbered]):
        problems.append(f"{list_path}: its rows are not those that its header's sha256 was made of")
    if not canonical:
        numbered = unquote(numbered, evidence)
    official = bool(numbered) and re.fullmatch(r"video_name\s*,\s*label", numbered[0][1], re.IGNORECASE) is not None
    if official:
        del numbered[0]
        evidence.append("header 'video_name,label' of the official DFEW lists")
    if not numbered:
        raise UserError(f"{list_path}: the list is empty")
    numbers = {number for number, _ in numbered}
    comments = [n for n, line in enumerate(lines, start=1) if line.startswith("#") and n not in numbers]
    if among := [n for n in comments if n > numbered[0][0] or n in left_out]:
        evidence.append(f"{len(among):,} lines start with # and are taken for comments, the first is row {among[0]}")
    if number := sum(line.startswith("#") for _, line in numbered):
        evidence.append(f"{number:,} rows start with # and are taken for clips, as there are folders of that name")
    cells, separator = cut_columns(list_path, numbered, official)
    if canonical and cells[0].frames is None:
        raise UserError(f"{list_path}:{cells[0].line}: its header goes with rows of 'path num_frames label'")
    names, absolute = clean_paths(list_path, cells, None if canonical else base, official, evidence)
    columns = ("path label" if cells[0].frames is None else COMMON).replace(" ", separator)
    return _Table(list_path, header, official, columns, cells, names, absolute), evidence, problems


def _possible_readings(
    table: _Table, has_ids: bool, order: str | None, base: int | None, evidence: list[str]
) -> tuple[list[_Reading], list[_Reading]]:
    """Return the readings that header and flags leave, and those that are usual by convention."""
    readings = [_Reading(name, emotions, first) for name, emotions in ORDERS.items() for first in (0, 1)]
    # An official list may also be in 1..7; nobody writes the common one so.
    usual = [r for r in readings if r.order == "dfew"]
    usual = [r for r in usual if table.official or (table.columns == COMMON and r.base == 0)]
    classes = None if order is None else parse_order(order, "--class-order")
    if not has_ids:
        evidence.append("all labels are emotion words")
        return [_Reading(WORD, EMOTIONS, 0)], usual
    if table.canonical:
        stated = parse_order(",".join(table.header["classes"].split()), f"{table.path}: its header")
        if classes not in (None, stated) or base == 1:
            raise UserError(f"{table.path}: its header states other labels than --class-order or --label-base")
        evidence.append(f"header: classes {' '.join(stated)}, from 0")
        name = next((name for name in ORDERS if ORDERS[name] == stated), "its header's")
        return [_Reading(name, stated, 0)], usual
    if classes is not None:
        evidence.append(f"--class-order {order}")
        name = order if order in ORDERS else "the given"
        readings = [_Reading(name, classes, first) for first in (0, 1)]
    if base is not None:
        evidence.append(f"--label-base {base}")
        readings = [reading for reading in readings if reading.base == base]
    return readings, usual


def _read_lines(list_path: Path) -> tuple[list[str], list[str]]:
    """Return the stripped lines of a list, and the oddities of its bytes."""
    lines, oddities = read_lines(list_path, limit=MAX_BYTES)
    if len(lines) > MAX_ROWS + 1:
        raise UserError(f"{list_path}: too large for a list: over {MAX_ROWS:,} rows")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE:
            raise UserError(f"{list_path}:{number}: a line of {len(line):,} letters: {show(line)}")
        if found := re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line):
            raise UserError(f"{list_path}:{number}: holds the control character {found[0]!r}: damaged, or not a list")
    return lines, oddities


def _label_ids(list_path: Path, cells: Sequence[Cells]) -> list[int] | None:
    """Return the ids of all rows, or None if all labels are words."""
    worded, numeric = [], []
    for cell in cells:
        if cell.label.lower() in WORDS:
            worded.append(cell)
        elif re.fullmatch(r"[0-7]", cell.label):  # int() would also take ٣, +3 and 1_0
            numeric.append(cell)
        else:
            header = " (a header? only 'video_name,label' is known)" if cell is cells[0] else ""
            if re.fullmatch(r"[0-7]\.0*", cell.label):
                header = f"; pandas and spreadsheets write 6 as 6.0: {WRITE_WHOLE}"
            raise UserError(
                f"{list_path}:{cell.line}: label {show(cell.label)} is neither an id (0..6 or 1..7) nor an emotion "
                f"({' '.join(EMOTIONS)}){header}"
            )
    if worded and numeric:
        raise UserError(
            f"{list_path}:{max(worded[0].line, numeric[0].line)}: emotion words and ids as labels in the same list"
        )
    return [int(cell.label) for cell in numeric] if numeric else None


def _settle(
    table: _Table, ids: Sequence[int], readings: Sequence[_Reading], usual: Sequence[_Reading], evidence: list[str]
) -> _Reading:
    """Return the one reading that the rows allow; if they allow a `usual` one, readings of other orders do not count.

    Raises:
        UserError: if they allow none, or several that differ.
    """
    folders = [emotions_in(name) for name in table.names]
    against = {
        reading: [row for row, i in enumerate(ids) if not (says := reading.emotion(i)) or not folders[row] <= {says}]
        for reading in readings
    }
    fitting = [reading for reading in readings if not against[reading]]
    if not fitting and (own := _own_order(readings, against, ids, folders, evidence)):
        return own
    if not fitting:
        nearest = min(readings, key=lambda reading: len(against[reading]))
        raise UserError(_contradiction(table, nearest, against[nearest], ids, folders))
    if favoured := [reading for reading in fitting if reading in usual]:
        fitting = favoured
        readings = [reading for reading in readings if reading.order == favoured[0].order]
    chosen = fitting[0]
    rivals = [
        reading
        for reading in readings
        if len(against[reading]) <= 1
        and any(reading.emotion(i) != chosen.emotion(i) for row, i in enumerate(ids) if row not in against[reading])
    ]
    if rivals:
        advice = SAY_BASE if any(reading.base != chosen.base for reading in rivals) else ""
        if any(reading.order != chosen.order for reading in rivals):
            advice += (" and " if advice else "") + SAY_ORDER
        single = next((against[reading][0] for reading in rivals if against[reading]), None)
        line = None if single is None else table.cells[single].line
        doubt = "" if line is None else f" (only row {line} speaks against that, and may be a typo)"
        raise UserError(
            f"{table.path}: its labels, {min(ids)}..{max(ids)}, may be {chosen} or {rivals[-1]}{doubt}: {advice}"
        )
    if len({reading.base for reading in readings}) > 1:
        edge = 7 * chosen.base
        if number := ids.count(edge):
            evidence.append(f"label {edge} occurs in {number:,} of {len(ids):,} rows: ids start at {chosen.base}")
    if number := sum(map(bool, folders)):
        agrees = "the label" if chosen.order == WORD else f"{chosen.order} order"
        evidence.append(f"the emotion folder in {number:,} of {len(folders):,} paths agrees with {agrees}")
    return chosen


def _own_order(
    readings: Sequence[_Reading],
    against: Mapping[_Reading, Sequence[int]],
    ids: Sequence[int],
    folders: Sequence[frozenset[str]],
    evidence: list[str],
) -> _Reading | None:
    """Return the order in which the emotion folders are, where nobody has said one and none of the known ones fits."""
    if len({r.order for r in readings}) < len(ORDERS) or min(map(len, against.values())) < 2:
        return None  # the one row that speaks against a reading may be a typo
    meaning = read_order(ids, folders)
    bases = sorted({r.base for r in readings if r.base <= min(ids) and max(ids) < r.base + len(EMOTIONS)})
    if meaning is None or not bases:
        return None
    classes = complete_order(meaning, bases[0])
    says = ", ".join(f"{i} {meaning[i]}" for i in sorted(meaning))
    evidence.append(f"each id stands for one emotion folder: {says}; in full: --class-order {','.join(classes)}")
    return _Reading("its folders'", classes, bases[0])


def _contradiction(
    table: _Table, nearest: _Reading, against: Sequence[int], ids: Sequence[int], folders: Sequence[frozenset[str]]
) -> str:
    """Return the message about a list that no reading fits. `against` are the rows that contradict the nearest one."""
    row, *more = against
    says, found = nearest.emotion(ids[row]), " and ".join(sorted(folders[row]))
    what = f"means {says} by {nearest}, but its path says {found}" if says else f"is none of {nearest}"
    rows = ", ".join(str(table.cells[r].line) for r in more[:5])
    others = f" (also against it: {len(more)} more, row {rows})" if more else ""
    cell = table.cells[row]
    advice = "" if nearest.order == WORD or table.canonical else f"; if the ids are in another order, {SAY_ORDER}"
    return (
        f"{table.path}:{cell.line}: label {cell.label} {what}{others}; no meaning of the labels fits all rows{advice}"
    )
