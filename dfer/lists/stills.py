"""Labelled images as clips of one frame: what lies in folders of emotions, and RAF-DB as it is handed out."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dfer.cli import UserError, printable
from dfer.files import is_data, reason
from dfer.images import BadImage, frame_names, open_image
from dfer.lists import releases
from dfer.lists.orders import EMOTIONS, SAY_ORDER, emotion_of

# What RAF-DB's ids, from 1, stand for.
RAF_DB = ("Surprise", "Fear", "Disgust", "Happy", "Sad", "Angry", "Neutral")
_RAF_LABELS = "list_patition_label.txt"  # as it is spelt there
_RAF_ROW = re.compile(r"((train|test)_[0-9]+)\.jpg\s+([1-7])", re.ASCII)
_RAF_ALIGNED = "_aligned.jpg"


class Stills(NamedTuple):
    """The images that were found below a folder, and what was made of that."""

    root: str  # folder in which their names start
    lists: dict[str, list[tuple[str, int]]]  # name of each list -> (name, label) of each image
    notes: list[str]  # a line for each thing that is left out or not as it should be


class ClassIds(NamedTuple):
    """What folders that are called by numbers stand for."""

    classes: tuple[str, ...] = ()  # none: such folders are not taken
    base: int = 0  # the id of the first

    def label(self, folder: str) -> int | None:
        """Return the label of a folder, by its word or else its number; None if it is none of ours."""
        if emotion := emotion_of(folder):
            return EMOTIONS.index(emotion)
        number = int(folder) - self.base if re.fullmatch("[0-9]{1,2}", folder) else -1
        return EMOTIONS.index(self.classes[number]) if 0 <= number < len(self.classes) else None


def find_stills(root: Path, ids: ClassIds, left_out: Collection[str] = ()) -> Stills:
    """Find the labelled images below a folder: RAF-DB if its list of labels is there, else folders of classes.

    Args:
        root: the folder.
        ids: of folders that are called by numbers.
        left_out: folders of further classes that are not to be taken.

    Raises:
        UserError: if there are none, or what there is can be read in several ways.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder")
    folders = list(releases.search(root))
    labels = [os.path.join(folder, _RAF_LABELS) for folder, _, files in folders if _RAF_LABELS in files]
    if labels:
        return _raf_db(releases.only_one(_RAF_LABELS, labels, root), folders, root)
    return _tree(folders, root, ids, left_out)


# ---- RAF-DB


def _raf_db(labels: str, folders: Sequence[tuple[str, list[str], list[str]]], root: Path) -> Stills:
    """Return the images that RAF-DB's list of labels names: the aligned faces, else the whole pictures."""
    lists: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    seen: set[str] = set()
    aligned = [folder for folder, _, files in folders if any(file.endswith(_RAF_ALIGNED) for file in files)]
    whole = [folder for folder, _, files in folders if any(_RAF_ROW.fullmatch(f"{file} 1") for file in files)]
    if not aligned and not whole:
        raise UserError(f"{printable(labels)}: found no images of it (train_00001_aligned.jpg) below {printable(root)}")
    suffix = _RAF_ALIGNED if aligned else ".jpg"
    for where, line in releases.read_rows(labels):
        row = _RAF_ROW.fullmatch(line)
        if row is None:
            raise UserError(f"{where}: expected 'train_00001.jpg 5', a label from 1 to 7, got {line!r}")
        if row[1] in seen:
            raise UserError(f"{where}: {row[1]} is listed twice")
        seen.add(row[1])
        lists[row[2]].append((row[1] + suffix, EMOTIONS.index(RAF_DB[int(row[3]) - 1])))
    notes = [] if aligned else ["found no aligned faces (train_00001_aligned.jpg): the pictures are taken uncropped"]
    folder = releases.only_one("folder with RAF-DB's images", aligned or whole, root)
    return Stills(folder, {name: rows for name, rows in lists.items() if rows}, notes)


# ---- Folders of classes


def _tree(
    folders: Sequence[tuple[str, list[str], list[str]]], root: Path, ids: ClassIds, left_out: Collection[str]
) -> Stills:
    """Return the images of all folders that hold folders of classes, such as train/happy: a list for each."""
    lists: dict[str, list[tuple[str, int]]] = {}
    base, notes = os.path.abspath(root), []
    for folder, inner, _ in folders:
        labels = {name: label for name in inner if (label := ids.label(name)) is not None and name not in left_out}
        if len(set(labels.values())) < 2:  # a folder that happens to be called so
            continue
        name = os.path.basename(folder) if folder != base else "all"
        if name in lists:
            raise UserError(f"{printable(folder)}: another folder {name} holds classes too; give a --root with one")
        if unknown := [other for other in inner if other not in labels and other not in left_out]:
            raise UserError(
                f"{printable(os.path.join(folder, unknown[0]))}: is none of our classes ({', '.join(EMOTIONS)}); "
                f"--leave-out {printable(unknown[0])} takes the others without it"
            )
        notes += [f"left out: {printable(os.path.join(folder, other))}" for other in inner if other in left_out]
        lists[name] = []
        for word, label in labels.items():
            place = os.path.join(folder, word)
            below = os.path.relpath(place, base)
            lists[name] += [(f"{below}/{file}", label) for file in _images(place, notes)]
    if not any(lists.values()):
        numbers = next((f for f, inner, _ in folders if len([n for n in inner if n.isdecimal()]) > 1), None)
        raise UserError(
            f"{printable(numbers)}: its folders are called by numbers: {SAY_ORDER}"
            if numbers and not ids.classes
            else f"{printable(root)}: found neither images in folders of classes (train/happy/1.jpg) nor {_RAF_LABELS}"
        )
    return Stills(base, {name: rows for name, rows in lists.items() if rows}, notes)


def _images(folder: str, notes: list[str]) -> Iterator[str]:
    """Yield the names of a folder's images, and note what else lies there."""
    try:
        names = frame_names(folder)
        others = sorted({name for name in os.listdir(folder) if is_data(name)} - set(names))
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot be read ({reason(error)})") from None
    if others:
        notes.append(f"{printable(folder)}: {len(others):,} that are no JPEG or PNG files by name are left out: "
                     f"{printable(releases.some(others))}")  # fmt: skip
    yield from names


def scan_still(path: str) -> releases.Scan:
    """Return whether an image can be used, by its header."""
    try:
        open_image(path).close()
    except FileNotFoundError:
        return releases.Scan(0, "missing")
    except (BadImage, OSError) as error:
        return releases.Scan(0, f"unreadable ({reason(error)})")
    return releases.Scan(1)
