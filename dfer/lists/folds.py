"""Find, check and write the lists of a cross-validation: set_1_train.txt, set_1_test.txt, set_2_train.txt ..."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfer.cli import UserError, command_of
from dfer.files import reason
from dfer.images import natural_key
from dfer.lists.annotations import listed_faces, read_annotations, write_annotations


def find_folds(folder: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of training and test lists in a folder.

    Raises:
        UserError: if there are fewer than two pairs, or one of a pair is missing.
    """
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        names = set()
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from None
    found = {int(m[1]) for m in (re.fullmatch(r"set_([1-9]\d*)_(?:train|test)\.txt", name) for name in names) if m}
    if len(found) < 2:
        hint = f"; {command_of('prepare_dfew')} writes them" if not found else ""
        raise UserError(f"{folder}: needs set_1_train.txt, set_1_test.txt, set_2_train.txt ... of two folds{hint}")
    folds = []
    for k in range(1, max(found) + 1):
        pair = folder / f"set_{k}_train.txt", folder / f"set_{k}_test.txt"
        for path in pair:
            if path.name not in names:
                raise UserError(
                    f"{path}: missing; folds are numbered without gaps, and each has a train and a test list"
                )
        folds.append(pair)
    return folds


def check_folds(folds: Sequence[tuple[Path, Path]], root: Path | None) -> None:
    """Check that no clip is both in training and test of a fold, or in the tests of two.

    Raises:
        UserError: if one is.
    """
    tested: dict[Path, str] = {}
    for train_list, test_list in folds:
        trained = {record.path for record in read_annotations(train_list, root)}
        for record in read_annotations(test_list, root):
            if record.path in trained:
                raise UserError(f"{record.source}: clip {record.name} is trained on too, in {train_list}")
            if record.path in tested:
                raise UserError(f"{record.source}: clip {record.name} is tested on before, in {tested[record.path]}")
            tested[record.path] = record.source


def assign_folds(rows: Sequence[tuple[str, int, int]], num_folds: int) -> list[int]:
    """Return the fold, 0 .., of each (name, num_frames, label) row.

    The rule is DFEW's: the clips of each class, sorted by name, are cut into consecutive blocks.
    """
    folds = [0] * len(rows)
    for label in {row[2] for row in rows}:
        mine = sorted((i for i, row in enumerate(rows) if row[2] == label), key=lambda i: natural_key(rows[i][0]))
        for fold, block in enumerate(np.array_split(mine, num_folds)):
            for i in block.tolist():
                folds[i] = fold
    return folds


def write_folds(lists: Sequence[Path], folder: Path, num_folds: int) -> None:
    """Write the lists of folds of the clips of all `lists`, which lie side by side.

    Raises:
        UserError: if a list cannot be read or written.
    """
    records = [record for path in lists for record in read_annotations(path)]
    rows = [(record.name, record.num_frames, record.label) for record in records]
    folds = assign_folds(rows, num_folds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for fold in range(num_folds):
            for part, wanted in (("train", False), ("test", True)):
                chosen = [row for row, mine in zip(rows, folds, strict=True) if (mine == fold) == wanted]
                path = folder / f"set_{fold + 1}_{part}.txt"
                write_annotations(path, chosen, lists[0].resolve().parent, faces=listed_faces(lists[0]))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the lists of the folds ({reason(error)})") from None
