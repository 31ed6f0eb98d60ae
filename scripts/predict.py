"""What a trained model sees in videos, frame by frame: `python scripts/predict.py CLIP ... --checkpoint RUN --out DIR`.

CLIP is a video, animated GIF and WebP among them; a folder of videos, which may lie in folders within it; or a folder
of JPEG or PNG files, if no video lies in it or in folders within it: the frames of one clip, in natural order (2 before
10).
Of each video, DIR gets
  NAME.csv   a row per frame and face: frame (from 0), time in seconds, the face's number (1 is the largest and most
             central one), the square that the model saw (centre x, y and side in pixels, tilt in degrees), a
             probability per emotion, the likeliest; at_end: 1 where the face begins or ends less than half a window
             away, so that no window has the frame in its middle; empty where no face is
  NAME.json  the models; the windows in frames and seconds, and latency_seconds: how long after a frame all windows that
             it lies in are over; the share of frames with a face, mean probabilities, runs of one emotion, the faces
  NAME.png   the emotions over time
  NAME.mp4   the video with all of it in the picture; with --annotate gif NAME.gif, smaller and of 15 frames/s at most
A video without a face has the first two. Faces are followed as by prepare_videos.py; a cut ends a face, and the same
person is another face after it. The timeline is, in each frame, of the largest and most central face. Several
checkpoints (folds, seeds) are averaged.

Exit code 0: all were read; 1: what was not is named, one per line, the others are done; 2: something is to be changed.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("predict", "torch and timm")
from dali_pipes.torch_stages import resize
from dfer.cli import EXIT_PROBLEMS, Parser, UserError, in_range, one_line_errors, printable
from dfer.files import reason
from dfer.predict.inputs import find_videos
from dfer.predict.options import add_arguments, build_predictor
from dfer.predict.output import Annotate, describe, write_outputs
from dfer.predict.predictor import Predictor
from dfer.predict.progress import VideoProgress
from dfer.video.decode import VIDEO_ERRORS
from dfer.video.write import record

PASSES: dict[Annotate, int] = {"mp4": 3, "gif": 4, "none": 2}  # through a video


def warn(line: str) -> None:
    print(f"predict: {printable(line)}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Load the models, record what is to be recorded, and predict. Returns the exit code."""
    if os.path.lexists(args.out) and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is no folder: give one, or a new name")
    predictor, clips = build_predictor(args, resize), list(args.clips)
    for line in dict.fromkeys(model.trained_on for model in predictor.models):
        print(f"the model is {printable(line)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.camera:
            clips.append(record_camera(args.camera, args.seconds, args.out / "recordings"))
    except VIDEO_ERRORS as error:
        raise UserError(f"{args.camera or args.out}: {reason(error)}") from None
    return predict_all(clips, predictor, args.out, args.annotate)


def record_camera(camera: str, seconds: float, folder: Path) -> Path:
    """Record a camera by its number, or a stream by its URL, and return the file."""
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}.mp4"
    folder.mkdir(exist_ok=True)
    source, kind = (f"/dev/video{camera}", "v4l2") if camera.isdecimal() else (camera, None)
    print(f"recording {seconds:g} s of {printable(source)}; Ctrl-C ends it earlier", flush=True)
    record(source, path, seconds, kind)
    return path


def predict_all(clips: Sequence[Path], predictor: Predictor, out: Path, annotate: Annotate) -> int:
    """Predict on all videos, one after the other. Returns the exit code."""
    videos, code = find_videos(clips, out, warn), 0
    with VideoProgress(videos, PASSES[annotate], predictor.fps) as progress:
        for number, video in enumerate(videos):
            progress.begin(number, printable(video.name))
            try:
                prediction = predictor.predict(video.path, progress.show)
            except VIDEO_ERRORS as error:
                warn(f"{video.path}: {reason(error)}")
                code = EXIT_PROBLEMS
                continue
            try:
                summary = write_outputs(video, prediction, predictor, out, annotate, progress.show)
            except VIDEO_ERRORS as error:
                raise UserError(f"{out / video.name}: cannot be written ({error})") from None
            progress.print(f"{printable(video.name)}: {describe(summary)}")
    return code


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("predict", __doc__)
    parser.add_argument(
        "clips", type=Path, nargs="*", metavar="CLIP", help="a video, a folder of videos, or a folder of frames"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--annotate",
        choices=tuple(PASSES),
        default="mp4",
        help="what the annotated video becomes (mp4); without it a fifth of the time is saved",
    )
    parser.add_argument(
        "--camera", metavar="N", help="record from camera N (0) or a stream's URL into DIR, and predict on that"
    )
    parser.add_argument(
        "--seconds", type=in_range(float, 0.1, 86400), default=10.0, help="of --camera, to be recorded (10)"
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    if not (args.clips or args.camera):
        parser.error("no CLIP: name a video, a folder of videos or frames, or a --camera")
    return one_line_errors("predict", lambda: run(args), "interrupted; what is written is whole")


if __name__ == "__main__":
    sys.exit(main())
