"""The videos to prepare and their labels: from folders named after classes, from a list, or one for all."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError, say_once
from dfer.files import check_visible
from dfer.images import natural_key
from dfer.lists.columns import unquote
from dfer.lists.missing import find_listed
from dfer.lists.orders import EMOTIONS, WORDS, check_paths
from dfer.lists.text import USUAL, read_lines, split_rows
from dfer.video.find import find_video_files, unique_names

LABEL_HELP = "0..6 or " + ", ".join(EMOTIONS)
_LABELS = {word: EMOTIONS.index(emotion) for word, emotion in WORDS.items()}


@dataclass(frozen=True)
class LabelledVideo:
    """One video to prepare."""

    path: Path
    name: str  # of its frame folder below DIR/frames, unique
    label: int | None  # None: unlabelled


class _Row(NamedTuple):
    """A row of a list of videos whose label is an id, for `check_paths`."""

    source: str
    name: str
    label: int


def parse_label(text: str) -> int:
    """Return the label of an id or an emotion word.

    Raises:
        UserError: if it is neither.
    """
    if re.fullmatch(r"0*[0-9]", text) and int(text[-1]) < len(EMOTIONS):
        return int(text[-1])
    if text.casefold() not in _LABELS:
        raise UserError(f"{text!r} is no label: {LABEL_HELP}")
    return _LABELS[text.casefold()]


def find_labelled_videos(
    source: Path, label: int | None, unlabelled: bool, warn: Callable[[str], None]
) -> list[LabelledVideo]:
    """Return the videos of a folder, a list or a single file, in natural order.

    Args:
        source: a folder of videos, a .txt or .csv list of them, or a video.
        label: of the videos that have no other.
        unlabelled: give no video a label.
        warn: called with one line for each folder that was not searched.

    Raises:
        UserError: if there are none, or one has no label (unless all are `unlabelled`).
    """
    found: Sequence[tuple[Path, int | None]]
    check_visible(source)
    if source.is_dir():
        paths = find_video_files(source, warn)
        paths.sort(key=lambda path: natural_key(path.relative_to(source).as_posix()))
        found = [(path, _LABELS.get(path.relative_to(source).parts[0].casefold(), label)) for path in paths]
    elif source.suffix.lower() in (".txt", ".csv"):
        found = read_list(source, not unlabelled)
    elif source.exists():
        found = [(source, label)]
    else:
        raise UserError(f"{source}: no such folder, video or list")
    if not found:
        raise UserError(f"{source}: no videos in it")
    base = source if source.is_dir() else source.parent
    names = unique_names([os.path.relpath(path, base) for path, _ in found])
    videos = []
    for (path, own), name in zip(found, names, strict=True):
        if own is None and not unlabelled:
            if "\\" in path.name:
                raise UserError(
                    f"{path}: no label; the backslashes in its name were folders where it was packed: unpack it again "
                    "with a program that makes them, such as 7z"
                )
            raise UserError(
                f"{path}: no label; put it in a folder named after its emotion ({', '.join(EMOTIONS)}), "
                "give a .txt list of 'path label' rows, give --label for all such videos, or say --unlabelled"
            )
        videos.append(LabelledVideo(path, name, None if unlabelled else own))
    return videos


def read_list(list_path: Path, labelled: bool = True) -> list[tuple[Path, int | None]]:
    """Return path and label from rows of `path label` or `path,label`, split from the right; paths start at the list.

    Where the videos are not `labelled`, a row is a path and nothing else.

    Raises:
        UserError: if the list cannot be read, or a row of it is none.
    """
    lines, oddities = read_lines(list_path, "list of videos")
    numbered, left_out = split_rows(lines, list_path.parent)
    numbered = unquote(numbered, oddities)
    for oddity in oddities:
        if oddity not in USUAL:
            say_once(f"{list_path}: {oddity}")
    if left_out:
        say_once(
            f"{list_path}:{left_out[0]}: begins with # and is taken for a comment; {len(left_out):,} such rows are"
        )
    rows: list[tuple[Path, int | None]] = []
    with_ids: list[_Row] = []
    for row, line in numbered:
        source = f"{list_path}:{row}"
        if "\0" in line:
            raise UserError(f"{source}: no path has a NUL in it: {line!r}")
        if not labelled:
            rows.append((find_listed(list_path.parent, line, source), None))
            continue
        fields = re.fullmatch(r"(.+?)(?:\s*[,;]\s*|\s+)([^\s,;]+)", line)
        if fields is None:
            raise UserError(f"{source}: expected 'path label', got {line!r}")
        try:
            label = parse_label(fields[2])
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        rows.append((find_listed(list_path.parent, fields[1], source), label))
        if fields[2].isdecimal():
            with_ids.append(_Row(source, fields[1], label))
    check_paths(
        with_ids,
        False,
        lambda _: f"write emotions for the ids, which are 0 to 6 for {' '.join(EMOTIONS)}, or move the files",
    )
    return rows
