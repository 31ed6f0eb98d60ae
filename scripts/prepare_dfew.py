"""Write the lists of DFEW's five folds from a copy of the official release, checked against what is published.

`python scripts/prepare_dfew.py --root DIR --out lists/dfew` finds the parts of the release anywhere below DIR: the
folder of clips, train's and test's `set_1.csv` .. `set_5.csv`, and annotation.xlsx, whose votes go to votes.csv.
"""

import argparse
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openpyxl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import UserError, begin, command_of, one_line_errors, printable
from dfer.files import check_visible, reason
from dfer.lists import releases
from dfer.lists.annotations import EMOTIONS

FOLDS = range(1, 6)
# Names of the parts, in the release and on users' disks.
CLIP_FOLDERS = {
    "clip_224x224": "clip_224x224|dfew_(?:frame_)?face|jpg_256",
    "clip_224x224_16f": "clip_224x(?:224_)?16f",
    "original": r"original|data_part[-_0-9]*",
}
SPLIT_FOLDER = re.compile(rf"(train|test)[ _-]*(?:\(?single[ _-]*label+ed\)?)?{releases.COPY_SUFFIX}", re.IGNORECASE)
SET_FILE = re.compile(r"set_([1-5])\.csv", re.IGNORECASE)
# Columns of annotation.xlsx by their letters: "1happy", "vote_happy" and "Happy" are the same.
VOTE_COLUMNS = {emotion.lower(): label for label, emotion in enumerate(EMOTIONS)}
VOTE_COLUMNS |= {"happiness": 0, "sadness": 1, "anger": 3}
CLIP_COLUMNS = ("order", "clipname", "videoname", "clip", "video", "name")
LABEL_COLUMNS = ("annotation", "label")

Votes = tuple[int, ...]


@dataclass(frozen=True)
class Parts:
    """Where the parts of the release lie."""

    clips: str  # folder
    clip_names: dict[int, str]  # number of a clip -> its name in that folder
    sets: dict[str, str]  # "set_1_train" -> its .csv
    sheet: str | None  # annotation.xlsx


def find_parts(root: Path, frames: str) -> Parts:
    """Find the parts of the release below `root`. `frames` is a key of CLIP_FOLDERS.

    Raises:
        UserError: if a part that is needed is not there, or there twice.
    """
    is_folder = re.compile(f"(?:{CLIP_FOLDERS[frames]}){releases.COPY_SUFFIX}", re.IGNORECASE)
    is_clip = re.compile(r"([0-9]+)\.mp4" if frames == "original" else "([0-9]+)", re.IGNORECASE)
    clips: dict[str, dict[int, str]] = {}
    splits: dict[str, dict[str, dict[int, str]]] = {"train": {}, "test": {}}
    sheets = []
    for folder, folders, files in releases.search(root):
        name = os.path.basename(folder)
        if is_folder.fullmatch(name):
            found = [m for m in map(is_clip.fullmatch, files if frames == "original" else folders) if m]
            if found:  # else it is the outer one of nested copies
                found.sort(key=lambda m: (len(m[1]), m[0]))  # of 1 and 00001, the latter
                clips[folder] = {int(m[1]): m[0] for m in found}
        if split := SPLIT_FOLDER.fullmatch(name):
            found = [m for m in map(SET_FILE.fullmatch, files) if m]
            if found:
                splits[split[1].lower()][folder] = {int(m[1]): os.path.join(folder, m[0]) for m in found}
        sheets += [os.path.join(folder, file) for file in files if file.lower() == "annotation.xlsx"]
    kind = "videos (00001.mp4 ...)" if frames == "original" else "clips (00001 ...)"
    clip_folder = releases.only_one(f"folder {frames} with {kind}", clips, root)
    sets = {}
    for split, found in splits.items():
        folder = releases.only_one(f"folder {split}(single-labeled) with set_1.csv .. set_5.csv", found, root)
        for fold in FOLDS:
            if fold not in found[folder]:
                raise UserError(f"{folder}: set_{fold}.csv is missing")
            sets[f"set_{fold}_{split}"] = found[folder][fold]
    sheet = releases.only_one("annotation.xlsx", sheets, root) if sheets else None
    return Parts(clip_folder, clips[clip_folder], sets, sheet)


def read_set(path: str) -> dict[int, int]:
    """Read one of the release's .csv files, whose labels are 1 .. 7. Returns number of a clip -> label, 0 .. 6.

    Raises:
        UserError: if it is damaged, lists a clip twice, or is numbered from 0.
    """
    rows = releases.read_rows(path)
    _, header = next(rows, ("", ""))
    if re.sub(r"\s", "", header).lower() != "video_name,label":
        raise UserError(f"{path}: its first row should be 'video_name,label', is {header!r}")
    labels: dict[int, int] = {}
    for where, line in rows:
        fields = re.fullmatch(r"([0-9]{1,9})\s*,\s*([0-9]{1,9})", line)
        if fields is None:
            raise UserError(f"{where}: expected 'number,label', got {line!r}")
        clip, label = int(fields[1]), int(fields[2])
        if label == 0:
            raise UserError(
                f"{where}: label 0, so these are not the release's labels, 1 (Happy) to 7 (Fear), but a copy of them "
                "renumbered from 0 below the same header; take the release's own file"
            )
        if label > len(EMOTIONS):
            raise UserError(f"{where}: label {label} is not in 1..7")
        if clip in labels:
            raise UserError(f"{where}: clip {clip} is listed twice")
        labels[clip] = label - 1
    return labels


def check_folds(sets: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Check the ten sets against each other and against the published counts.

    Returns:
        What differs from the release without being wrong in itself, as in a part of it.

    Raises:
        UserError: if a clip is trained and tested on, tested on twice, or has two labels, or if the
            labels are not the release's.
    """
    whole: dict[int, int] = {}
    tested_in: dict[int, int] = {}
    for name, labels in sets.items():
        for clip, label in labels.items():
            if whole.setdefault(clip, label) != label:
                raise UserError(f"clip {clip} has label {label + 1} in {name}, but {whole[clip] + 1} in another set")
    if len(EMOTIONS) - 1 not in whole.values():
        raise UserError("no clip has label 7 (Fear): these are not the release's labels 1..7, or hardly any of it")
    for fold in FOLDS:
        train, test = sets[f"set_{fold}_train"], sets[f"set_{fold}_test"]
        if both := sorted(train.keys() & test.keys()):
            clips = releases.some(list(map(str, both)))
            raise UserError(f"set_{fold}: {len(both):,} clips are in train and in test: {clips}")
        for clip in test:
            if tested_in.setdefault(clip, fold) != fold:
                raise UserError(f"clip {clip} is in the test sets of folds {tested_in[clip]} and {fold}")
    differences = []
    for fold, published in enumerate(releases.DFEW_TEST_COUNTS, start=1):
        train, test = sets[f"set_{fold}_train"], sets[f"set_{fold}_test"]
        others = [total - tested for total, tested in zip(releases.DFEW_COUNTS, published, strict=True)]
        differences += [
            releases.count_difference(f"set_{fold}_train", train.values(), others),
            releases.count_difference(f"set_{fold}_test", test.values(), published),
        ]
        if absent := sorted(whole.keys() - train.keys() - test.keys()):
            clips = releases.some(list(map(str, absent)))
            differences.append(
                f"set_{fold}: {len(absent):,} clips of other folds are in neither train nor test: {clips}"
            )
    if untested := sorted(whole.keys() - tested_in.keys()):
        differences.append(f"{len(untested):,} clips are in no test set: {releases.some(list(map(str, untested)))}")
    return [difference for difference in differences if difference]


def read_votes(sheet: str, labels: Mapping[int, int]) -> dict[int, Votes]:
    """Read how many annotators chose each class, by clip number, and check `labels` against those of the sheet.

    Raises:
        UserError: if the sheet is damaged, a column is not found, or a label is not that of the sets.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl's, about styles
            book = openpyxl.load_workbook(sheet, read_only=True, data_only=True)
            book.active.reset_dimensions()  # what a sheet says of its own size may be wrong
            rows = list(book.active.iter_rows(values_only=True))
            book.close()
    except Exception as error:  # whatever unpacking and parsing raise on a damaged file
        raise UserError(
            f"{sheet}: cannot be read as a spreadsheet ({reason(error)}); without it, votes are skipped"
        ) from None
    clip_column, vote_columns, label_column = _find_columns(sheet, rows[0] if rows else ())
    votes: dict[int, Votes] = {}
    for row, cells in enumerate(rows[1:], start=2):
        if not any(cell is not None for cell in cells):
            continue
        try:
            clip = _whole_number(cells[clip_column])
            given = tuple(_whole_number(cells[column]) for column in vote_columns)
            stated = None if label_column is None else _whole_number(cells[label_column])
        except (UserError, IndexError):
            raise UserError(f"{sheet}: row {row} is not whole numbers") from None
        if votes.setdefault(clip, given) != given:
            raise UserError(f"{sheet}: row {row}: clip {clip} has other votes in an earlier row; leave one of them")
        if clip not in labels:  # of no single emotion, or without a face
            continue
        if not any(votes[clip]):
            raise UserError(f"{sheet}: row {row}: clip {clip} has no votes")
        if stated is not None and stated != labels[clip] + 1:
            raise UserError(
                f"{sheet}: row {row}: clip {clip} is annotated {stated}, but the sets say {labels[clip] + 1}; "
                "are the columns what they are called? Without this file, votes are skipped"
            )
    return votes


def _find_columns(sheet: str, first_row: Sequence[object]) -> tuple[int, list[int], int | None]:
    """Return which columns hold the clip's number, the votes of each class, and the label (None: no column does).

    Raises:
        UserError: if a column is not found.
    """
    header = [re.sub("^vote|[^a-z]", "", str(cell).lower()) for cell in first_row]
    votes = {VOTE_COLUMNS[name]: column for column, name in enumerate(header) if name in VOTE_COLUMNS}
    clip = next((header.index(name) for name in CLIP_COLUMNS if name in header), None)
    if len(votes) != len(EMOTIONS) or clip is None:
        raise UserError(
            f"{sheet}: expected columns 1happy .. 7fear and the clip's number ('order'), "
            f"found {', '.join(map(str, first_row)) or 'none'}"
        )
    label = next((header.index(name) for name in LABEL_COLUMNS if name in header), None)
    return clip, [votes[label] for label in range(len(EMOTIONS))], label


def _whole_number(cell: object) -> int:
    """Return the number in a cell, which may be 5, "5", 5.0 or "00005.mp4".

    Raises:
        UserError: if it is none.
    """
    text = re.sub(r"\.(mp4|0)$", "", str(cell).strip().lower())
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{cell!r} is not a whole number")
    return int(text)


def format_votes(votes: Mapping[int, Votes], names: Mapping[int, str]) -> str:
    """Return the text of votes.csv, with a row for each clip by its name in the lists."""
    rows = [f"clip,{','.join(EMOTIONS)}"]
    rows += [f"{names[clip]},{','.join(map(str, votes[clip]))}" for clip in sorted(names) if clip in votes]
    return "".join(f"{row}\n" for row in rows)


def run(args: argparse.Namespace) -> None:
    """Find, check and write, as the command line says."""
    if not os.path.isdir(args.root):
        check_visible(args.root)
        raise UserError(f"--root {args.root}: no such folder")
    parts = find_parts(args.root, args.frames)
    print(f"clips: {parts.clips}")
    sets = {name: read_set(path) for name, path in parts.sets.items()}
    differences = check_folds(sets)
    labels = {clip: label for one in sets.values() for clip, label in one.items()}
    suffix = ".mp4" if args.frames == "original" else ""
    names = {clip: parts.clip_names.get(clip, f"{clip:05d}{suffix}") for clip in sorted(labels)}
    votes = None
    if parts.sheet is None:
        print("no annotation.xlsx: votes are skipped")
    else:
        votes = read_votes(parts.sheet, labels)
        if voteless := [names[clip] for clip in names if clip not in votes]:
            differences.append(f"{parts.sheet} has no votes of {len(voteless):,} clips: {releases.some(voteless)}")
    scan = releases.scan_video if args.frames == "original" else releases.scan_frames
    scans = releases.scan_clips(parts.clips, list(names.values()), scan)
    releases.judge(scans, differences, args.report, args.allow_missing)
    lists = {name: [(names[clip], label) for clip, label in one.items()] for name, one in sets.items()}
    usable = {clip: name for clip, name in names.items() if not scans[name].problem}
    others = {"votes.csv": format_votes(votes, usable) if votes is not None else None}
    releases.write_lists(args.out, parts.clips, lists, scans, others)
    first = [printable(shlex.quote(str(args.out / f"set_1_{split}.txt"))) for split in ("train", "test")]
    print(f"train on it: {command_of('train')} dfew --data.train-list {first[0]} --data.val-list {first[1]}")
    print(f"{len(usable):,} of {len(names):,} clips in 10 lists: {printable(args.out)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = releases.command_line("prepare_dfew", __doc__)
    parser.add_argument("--frames", choices=tuple(CLIP_FOLDERS), default="clip_224x224", help="which clips to list")
    args = parser.parse_args(arguments)
    return one_line_errors("prepare_dfew", lambda: run(args))


if __name__ == "__main__":
    begin("prepare_dfew")
    sys.exit(main())
