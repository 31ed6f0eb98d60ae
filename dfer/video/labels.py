"""The videos to prepare and their labels: from folders named after classes, from a list, or one for all."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfer.cli import UserError
from dfer.images import natural_key
from dfer.lists.annotations import EMOTIONS
from dfer.lists.formats import WORDS
from dfer.video.find import find_video_files, unique_names

LABEL_HELP = "0..6 or " + ", ".join(EMOTIONS)
_LABELS = {word: EMOTIONS.index(emotion) for word, emotion in WORDS.items()}


@dataclass(frozen=True)
class LabelledVideo:
    """One video to prepare."""

    path: Path
    name: str  # of its frame folder below DIR/frames, unique
    label: int | None  # None: unlabelled


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
    try:
        lines = list_path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{list_path}: cannot be read as a list of videos ({error})") from None
    rows: list[tuple[Path, int | None]] = []
    for row, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if "\0" in line:
            raise UserError(f"{list_path}:{row}: no path has a NUL in it: {line!r}")
        if not labelled:
            rows.append((list_path.parent / line, None))
            continue
        fields = re.fullmatch(r"(.+?)(?:\s*,\s*|\s+)([^\s,]+)", line)
        if fields is None:
            raise UserError(f"{list_path}:{row}: expected 'path label', got {line!r}")
        try:
            rows.append((list_path.parent / fields[1], parse_label(fields[2])))
        except UserError as error:
            raise UserError(f"{list_path}:{row}: {error}") from None
    return rows
