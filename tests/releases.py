"""Copies of the official releases of DFEW and FERV39k in layout, names and quirks, with drawn faces for pictures.

`python tests/releases.py {dfew,ferv39k} --out DIR` writes a miniature, with `--full` as many clips, of the same classes
and about the same lengths, as the release has: a million names of a few files, to measure how long preparing takes.
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import openpyxl

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.lists.annotations import EMOTIONS
from dfer.lists.releases import DFEW_COUNTS, FERV39K_TEST_COUNTS, FERV39K_TRAIN_COUNTS
from scripts.make_faces import apex_script, frames

PEOPLE = 2
SCENES = (
    *("Action", "Argue", "Business", "Conflict", "Contest", "Crime", "Crisis", "DailyLife", "ElegantArt", "Experiment"),
    *("History", "Interview", "Liveshow", "Medicine", "OfficialEvent", "ScholarReport", "School", "Social", "Speech"),
    *("Talkshow", "Terror", "War"),
)


def build_dfew(
    root: Path,
    counts: Sequence[int] = (9, 8, 11, 8, 7, 5, 6),
    parts: Sequence[str] = ("clip_224x224",),
    full: bool = False,
    single: str = "single-labeled",
) -> None:
    """Write a release of DFEW with `counts` clips per class, of which the first two of the classes are short.

    `parts` are those of clip_224x224, clip_224x224_16f and original to write; `single` is how the folders of the sets
    are spelled.
    """
    rng = np.random.default_rng(0)
    others = sum(counts) // 8  # annotated, but of no single emotion; they have clips and no label
    kinds = np.repeat([*range(1, len(EMOTIONS) + 1), 0], [*counts, others])
    labels = dict(enumerate(rng.permutation(kinds).tolist(), start=1))
    by_class = [[clip for clip in labels if labels[clip] == kind] for kind in range(1, len(EMOTIONS) + 1)]
    if full:
        lengths = np.clip(np.rint(rng.lognormal(np.log(70), 0.44, len(labels))), 12, 847)
        listed = {clip: int(length) for clip, length in zip(labels, lengths, strict=True) if labels[clip]}
    else:
        listed = {clip: int(length) for clip, length in zip(labels, rng.integers(16, 24, len(labels)), strict=True)}
        listed |= {by_class[0][0]: 12, by_class[1][0]: 15}
    link = _linker(root / ".pictures")
    for clip, length in listed.items():
        picture = max(labels[clip] - 1, 0), clip % PEOPLE
        if "clip_224x224" in parts:  # which are 256x256
            folder = _folder(root / "Clip" / "clip_224x224" / f"{clip:05d}")
            for frame in range(1, length + 1):
                link((*picture, 256), f"{folder}/{clip:05d}_{frame:05d}.jpg")
        if "clip_224x224_16f" in parts:
            folder = _folder(root / "Clip" / "clip_224x224_16f" / f"{clip:05d}")
            for frame in range(1, 17):
                link((*picture, 224), f"{folder}/{frame}.jpg")
        if "original" in parts:
            write_video(_folder(root / "Clip" / "original") / f"{clip:05d}.mp4", length)
    shutil.rmtree(root / ".pictures", ignore_errors=True)

    # Per class, the numbers sorted and cut into five blocks; fold k tests on block k.
    blocks = [np.array_split(sorted(clips), 5) for clips in by_class]
    for fold in range(1, 6):
        test = {int(clip) for block in blocks for clip in block[fold - 1]}
        for split in ("train", "test"):
            folder = _folder(root / "EmoLabel_DataSplit" / f"{split}({single})")
            clips = [clip for clip in labels if labels[clip] and (clip in test) == (split == "test")]
            rows = "".join(f"{clip},{labels[clip]}\n" for clip in clips)
            (folder / f"set_{fold}.csv").write_text(f"video_name,label\n{rows}")
    book = openpyxl.Workbook()
    book.active.append([*(f"{i}{emotion.lower()}" for i, emotion in enumerate(EMOTIONS, 1)), "order", "label"])
    for clip, label in labels.items():
        votes = (
            rng.multinomial(3, [1 / 7] * 7) + 7 * np.eye(7, dtype=int)[label - 1] if label else [2, 2, 2, 2, 2, 0, 0]
        )
        book.active.append([*map(int, votes), clip, label])
    book.save(_folder(root / "Annotation") / "annotation.xlsx")


def build_ferv39k(root: Path, full: bool = False) -> None:
    """Write a release of FERV39k; the miniature trains on one or two clips of each scene and class and tests on one."""
    rng = np.random.default_rng(0)
    if full:
        counts = {"train": FERV39K_TRAIN_COUNTS, "test": FERV39K_TEST_COUNTS}
        rows = [
            (scene, emotion, split)
            for split in counts
            for emotion, count in zip(EMOTIONS, counts[split], strict=True)
            for scene in rng.choice(SCENES, count)
        ]
        lengths = 16 + rng.binomial(31, 0.45, len(rows))
        lengths[rng.choice(len(rows), 4070, replace=False)] = rng.integers(8, 16, 4070)
    else:
        rows = [(scene, emotion, split) for scene in SCENES for emotion in EMOTIONS for split in ("train", "test")]
        rows += [row for row in rows if row[2] == "train" and rng.random() < 0.5]
        lengths = rng.integers(8, 25, len(rows))
    order = rng.permutation(len(rows))
    numbers: dict[tuple[str, str], int] = {}
    link = _linker(root / ".pictures")
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for length, (scene, emotion, split) in zip(lengths[order].tolist(), (rows[i] for i in order), strict=True):
        number = numbers[scene, emotion] = numbers.get((scene, emotion), 0) + int(rng.integers(1, 4))
        clip = f"{scene}/{emotion}/{number:04d}"
        lists[split].append(f"{clip} {emotion}")
        folder = _folder(root / "2_ClipsforFaceCrop" / clip)
        for frame in range(1, length + 1):
            link((EMOTIONS.index(emotion), number % PEOPLE, 224), f"{folder}/{frame:02d}.jpg")
    shutil.rmtree(root / ".pictures")
    for split, listed in lists.items():
        listed.sort()
        _write_rows(root / "4_setups" / "All_scenes" / f"{split}_All.csv", listed)
        for scene in SCENES:
            own = [row for row in listed if row.startswith(f"{scene}/")]
            _write_rows(root / "4_setups" / "22_scenes" / scene / f"{split}_{scene}.csv", own)


def write_video(path: Path, num_frames: int, faststart: bool = False) -> None:
    """A small video, of which an encoder holds back frames, so that packets are not in the order of frames."""
    with av.open(str(path), "w", container_options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in range(num_frames):
            image = np.full((48, 64, 3), 8 * frame % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _linker(folder: Path) -> Callable[[tuple[int, int, int], str], None]:
    """A function that gives picture (emotion, person, side) one more name, as a file system can a million times."""
    sources: dict[tuple[int, int, int], str] = {}

    def link(picture: tuple[int, int, int], path: str) -> None:
        for _ in range(2):
            if picture not in sources:
                emotion, person, side = picture
                image = cv2.resize(next(frames(apex_script(0, person, emotion))), (side, side))
                number = len(os.listdir(folder)) if folder.exists() else 0
                sources[picture] = f"{_folder(folder)}/{number}.jpg"
                cv2.imwrite(sources[picture], image, (cv2.IMWRITE_JPEG_QUALITY, 80))
            try:
                os.link(sources[picture], path)
                return
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                del sources[picture]  # has all the names that a file can have: on with another copy

    return link


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_rows(path: Path, rows: Sequence[str]) -> None:
    _folder(path.parent)
    path.write_text("".join(f"{row}\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=("dfew", "ferv39k"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="as many clips and frames as the release has")
    args = parser.parse_args()
    if args.release == "ferv39k":
        build_ferv39k(args.out, args.full)
    elif args.full:
        build_dfew(args.out, DFEW_COUNTS, full=True)
    else:
        build_dfew(args.out, parts=("clip_224x224", "clip_224x224_16f", "original"))


if __name__ == "__main__":
    main()
