"""Turn videos into JPEG frames of the face they show and write the annotation list that train.py reads.

`python scripts/prepare_videos.py INPUT --out DIR`, where INPUT is a folder of videos (its immediate sub-folders may be
classes: Happy, Sad, ...), one video, or a .txt/.csv list of `path label` rows. Any codec that FFmpeg reads will do.
The face is found, followed and cropped; DIR/report.csv says what became of each video. Run it again and it goes on.

Exit code 0: all gave clips; 1: what did not is named, one per line; 2: nothing did, or something is to be changed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import (
    EXIT_PROBLEMS,
    Parser,
    UserError,
    begin,
    command_of,
    in_range,
    one_line_errors,
    printable,
    usable_cores,
)
from dfer.files import hash_file, reason
from dfer.video import detectors
from dfer.video.clips import ClipOptions, ClipResult
from dfer.video.labels import LABEL_HELP, LabelledVideo, find_labelled_videos, parse_label
from dfer.video.preparation import LISTS, REPORT, begun_with, prepare


def warn(line: str) -> None:
    print(f"prepare_videos: {printable(line)}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Prepare the videos and print what came of it. Returns the exit code."""
    for name in (*LISTS, REPORT):
        if args.input.resolve() == (args.out / name).resolve():
            raise UserError(f"--out {args.out}: the list of videos would be overwritten with the list of frames")
    weights, content = (None, "haar") if args.no_crop else choose_detector(args.detector, args.out)
    options = ClipOptions(
        crop=not args.no_crop,
        detector=weights,
        level=not args.no_level,
        margin=args.margin,
        size=args.size,
        fps=args.fps,
        clip_length=args.clip_length,
        quality=args.quality,
    )
    label = None if args.label is None else parse_label(args.label)
    videos = find_labelled_videos(args.input, label, args.unlabelled, warn)
    results = prepare(videos, args.out, options, content, args.workers)
    if options.crop and weights is None:
        print("faces were looked for with OpenCV's Haar cascade, which sees frontal ones only")
    return summarize(videos, results, args.out, args.unlabelled)


def choose_detector(asked: Path | None, out: Path) -> tuple[Path | None, str]:
    """Return YuNet's file, None for Haar, and what stands for its content.

    Raises:
        UserError: if it cannot be used; here, in one line, rather than in each worker. Also if the folder was begun
            with YuNet, and Haar would take its place only since YuNet cannot be fetched now.
    """
    weights = detectors.find_weights(asked)
    begun = begun_with(out)
    if weights is None and detectors.named(asked) is None and begun not in (None, "haar"):
        raise UserError(
            f"{out}: was begun with YuNet, which is not to be had now; --detector haar makes all of it anew with Haar"
        )
    try:
        content = "haar" if weights is None else hash_file(weights)
    except OSError as error:
        raise UserError(f"{weights}: cannot be read ({reason(error)})") from None
    detectors.make_detector(weights)
    return weights, content


def summarize(videos: Sequence[LabelledVideo], results: Sequence[ClipResult], out: Path, unlabelled: bool) -> int:
    """Print what came of the videos. Returns the exit code."""
    outcomes = [result.outcome for result in results]
    bad = [
        f"{printable(video.path)}: {outcome.removeprefix('failed: ')}"
        for video, outcome in zip(videos, outcomes, strict=True)
        if outcome.startswith(("failed", "no face"))
    ]
    counts = [count for result in results for count in result.clips.values()]
    if not counts:
        raise UserError(f"none of {len(videos)} videos gave a clip; the first: {bad[0]}")
    for line in bad:
        warn(line)
    notes = [f"{outcomes.count(kind):,} with {kind}" for kind in ("no face", "several faces") if kind in outcomes]
    if "cut" in outcomes:
        notes.append(f"{outcomes.count('cut'):,} with a cut, of which one shot is kept")
    if noted := sum(bool(result.notes) for result in results):
        notes.append(f"{noted:,} with notes on their pictures (HDR, colours, pixels)")
    if notes:
        print(f"{', '.join(notes)}: {out / REPORT}")
    if unlabelled:
        list_path = out / "unlabelled.txt"
        print("a clip a line, without labels: for prediction, not for training")
    else:
        list_path = out / "list.txt"
        path = shlex.quote(str(list_path))
        print(f"train on it: {command_of('train')} --data.train-list {path} --data.val-list VAL_LIST")
    good = len(videos) - len(bad)
    print(f"{good:,} of {len(videos):,} videos, {len(counts):,} clips, {sum(counts):,} frames: {list_path}")
    return EXIT_PROBLEMS if bad else 0


def make_parser() -> Parser:
    parser = Parser("prepare_videos", __doc__)
    default = ClipOptions()
    parser.add_argument("input", type=Path, help="folder of videos, a video, or a .txt/.csv list of 'path label' rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write frames/, list.txt and report.csv to")
    parser.add_argument("--no-crop", action="store_true", help="keep frames as they are: the clips are faces already")
    detectors.add_arguments(parser)
    parser.add_argument(
        "--margin",
        type=in_range(float, 0, 2),
        default=default.margin,
        help=f"around the face, on each side, of the face's size (default: {default.margin})",
    )
    parser.add_argument(
        "--size",
        type=in_range(int, 16, 2048),
        default=default.size,
        help=f"of the square crop, in pixels (default: {default.size})",
    )
    parser.add_argument(
        "--fps",
        type=in_range(float, 0.1, 240),
        help="constant frame rate, by the frame nearest in time (default: each frame once)",
    )
    parser.add_argument(
        "--clip-length",
        type=in_range(int, 1, 10**6),
        metavar="N",
        help="cut each video into clips of N frames; a last one below N/2 is left out (default: a clip per video)",
    )
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--label", help=f"of videos without a class folder: {LABEL_HELP}")
    labels.add_argument(
        "--unlabelled",
        action="store_true",
        help="the videos have no labels: write unlabelled.txt, a clip a line, to predict on and not to train on; "
        "an input list then has a path a row",
    )
    parser.add_argument(
        "--quality",
        type=in_range(int, 1, 100),
        default=default.quality,
        help=f"of the JPEG images (default: {default.quality})",
    )
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=usable_cores(), help="processes")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    kept = "interrupted; what is finished stays finished: run the same again"
    return one_line_errors("prepare_videos", lambda: run(args), kept)


if __name__ == "__main__":
    begin("prepare_videos")
    sys.exit(main())
