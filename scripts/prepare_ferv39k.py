"""Write FERV39k's lists, of all scenes and of each, from a copy of the release, checked against what is published.

`python scripts/prepare_ferv39k.py --root DIR --out lists/ferv39k` finds the parts of the release anywhere below DIR:
the folder of face clips, train_All.csv and test_All.csv, and the set-ups of single scenes if they are there.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import UserError, begin, command_of, one_line_errors, printable
from dfer.files import check_visible, is_data
from dfer.lists import releases
from dfer.lists.annotations import EMOTIONS

CLIP_FOLDER = re.compile(rf"(?:2_)?ClipsforFaceCrop{releases.COPY_SUFFIX}", re.IGNORECASE)
SET_FILE = re.compile(r"(train|test)[ _-]*(\w*)\.csv", re.IGNORECASE)  # of all scenes, or of one
ROW = re.compile(r"((\w+)/(\w+)/\w+)\s+(\w+)", re.ASCII)
LABELS = {emotion.lower(): label for label, emotion in enumerate(EMOTIONS)}


@dataclass(frozen=True)
class Parts:
    """Where the clips of the release lie, and its lists."""

    clips: str  # folder
    sets: dict[str, dict[str, int]]  # "train_All", "test_All" -> clip -> label
    scene_sets: dict[str, dict[str, int]]  # "Crime_train" -> clip -> label, for the set-ups of single scenes found


def find_parts(root: Path) -> Parts:
    """Find the parts of the release below `root`, and read its lists.

    Raises:
        UserError: if a part that is needed is not there, or there twice, or damaged.
    """
    clip_folders, set_files = [], []
    for folder, _, files in releases.search(root):
        if CLIP_FOLDER.fullmatch(os.path.basename(folder)):
            clip_folders.append(folder)
        set_files += [(folder, m) for m in map(SET_FILE.fullmatch, files) if m]
    sets, scene_sets = {}, {}
    for split in ("train", "test"):
        found = [os.path.join(folder, m[0]) for folder, m in set_files if m[0].lower() == f"{split}_all.csv"]
        found = [path for path in found if os.path.isfile(path) and os.path.getsize(path)]
        sets[f"{split}_All"] = read_set(releases.only_one(f"{split}_All.csv", found, root))
    scenes = {scene.lower(): scene for scene in scenes_of(sets)}
    for scene in scenes.values():
        for split in ("train", "test"):
            found = [
                os.path.join(folder, m[0])
                for folder, m in set_files
                if m[1].lower() == split and scene.lower() in (m[2].lower(), os.path.basename(folder).lower())
            ]
            if found:
                scene_sets[f"{scene}_{split}"] = read_set(releases.only_one(f"set-up {scene} {split}", found, root))
    # Half of a nested copy is often just empty folders.
    classes = {os.path.dirname(clip) for labels in sets.values() for clip in labels}
    held = [folder for folder in clip_folders if any(_has_entries(os.path.join(folder, name)) for name in classes)]
    return Parts(
        releases.only_one("folder 2_ClipsforFaceCrop with clips (Scene/Emotion/0001)", held, root), sets, scene_sets
    )


def _has_entries(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(is_data(entry.name) for entry in entries)
    except OSError:
        return False


def scenes_of(sets: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the scenes of all listed clips."""
    return sorted({clip.split("/")[0] for clips in sets.values() for clip in clips})


def read_set(path: str) -> dict[str, int]:
    """Read one of the release's .csv files: no header, `Crime/Angry/0063 Angry`. Returns clip -> label, 0 .. 6.

    Raises:
        UserError: if it is damaged, lists a clip twice, or has a label that is not
            the emotion of the clip's folder.
    """
    labels: dict[str, int] = {}
    for where, line in releases.read_rows(path):
        fields = ROW.fullmatch(line)
        if fields is None:
            raise UserError(f"{where}: expected 'Scene/Emotion/0001 Emotion', got {line!r}")
        clip, _, folder, word = fields.groups()
        if word.lower() not in LABELS:
            raise UserError(f"{where}: {word!r} is no emotion: the release's labels are {', '.join(EMOTIONS)}")
        if word.lower() != folder.lower():
            raise UserError(f"{where}: clip {clip} is labelled {word}, but lies in folder {folder}")
        if clip in labels:
            raise UserError(f"{where}: clip {clip} is listed twice")
        labels[clip] = LABELS[word.lower()]
    return labels


def check_sets(parts: Parts) -> list[str]:
    """Check the sets against each other and against the published counts.

    Returns:
        What differs from the release without being wrong in itself, as in a part of it.

    Raises:
        UserError: if a clip is trained and tested on.
    """
    train, test = parts.sets["train_All"], parts.sets["test_All"]
    if both := sorted(train.keys() & test.keys()):
        raise UserError(f"{len(both):,} clips are in train_All and in test_All: {releases.some(both)}")
    differences = [
        releases.count_difference("train_All", train.values(), releases.FERV39K_TRAIN_COUNTS),
        releases.count_difference("test_All", test.values(), releases.FERV39K_TEST_COUNTS),
    ]
    scenes = scenes_of(parts.sets)
    if len(scenes) != releases.FERV39K_SCENES:
        differences.append(f"{len(scenes)} scenes are listed, the release has {releases.FERV39K_SCENES}")
    for name, labels in parts.scene_sets.items():
        scene, split = name.rsplit("_", 1)
        whole = {clip for clip in parts.sets[f"{split}_All"] if clip.split("/")[0] == scene}
        if labels.keys() != whole:
            odd = sorted(labels.keys() ^ whole)
            differences.append(
                f"the {split} set-up of {scene} and {split}_All's clips of that scene differ in {len(odd):,} clips: "
                f"{releases.some(odd)}; {split}_All is what counts"
            )
    return [difference for difference in differences if difference]


def run(args: argparse.Namespace) -> None:
    """Find, check and write, as the command line says."""
    if not os.path.isdir(args.root):
        check_visible(args.root)
        raise UserError(f"--root {args.root}: no such folder")
    parts = find_parts(args.root)
    print(f"clips: {parts.clips}")
    differences = check_sets(parts)
    clips = [clip for labels in parts.sets.values() for clip in labels]
    scans = releases.scan_clips(parts.clips, clips, releases.scan_frames)
    releases.judge(scans, differences, args.report, args.allow_missing)
    lists = {name: list(labels.items()) for name, labels in parts.sets.items()}
    # The lists of a scene are rows of the lists of all scenes, so that a model of all scenes never trained on its test.
    for scene in scenes_of(parts.sets):
        for split in ("train", "test"):
            rows = [row for row in lists[f"{split}_All"] if row[0].split("/")[0] == scene]
            if split == "test" or f"{scene}_train" in parts.scene_sets:
                lists[f"scenes/{scene}_{split}"] = rows
    releases.write_lists(args.out, parts.clips, lists, scans)
    both = [printable(shlex.quote(str(args.out / f"{split}_All.txt"))) for split in ("train", "test")]
    print(f"train on it: {command_of('train')} ferv39k --data.train-list {both[0]} --data.val-list {both[1]}")
    usable = sum(not scan.problem for scan in scans.values())
    print(f"{usable:,} of {len(clips):,} clips, {len(scenes_of(parts.sets))} scenes: {printable(args.out)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = releases.command_line("prepare_ferv39k", __doc__)
    args = parser.parse_args(arguments)
    return one_line_errors("prepare_ferv39k", lambda: run(args))


if __name__ == "__main__":
    begin("prepare_ferv39k")
    sys.exit(main())
