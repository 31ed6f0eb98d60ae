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

With --camera, of a webcam (0 if no number is given), a stream's URL or a video file at its own rate, all is shown as it
comes: on a page that this machine serves to itself, whose address is printed, and in the terminal. A face has numbers
once half a window of it was seen; they are of the last window, so that an expression is there in full a window after it
began. Frames that come while another one is looked at are dropped, never queued, and counted: the picture is behind by
one frame's work, however slow the model is. Ctrl-C ends it. With --out all frames are written to DIR/recordings, and
then predicted on as above.

Exit code 0: all were read; 1: what was not is named, one per line, the others are done; 2: something is to be changed.
"""

import argparse
import math
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
from dfer.predict.live import LivePredictor, in_words, stopped_by_signals, warm_up, watch
from dfer.predict.live_page import LivePage
from dfer.predict.options import add_arguments, build_predictor
from dfer.predict.output import PURPOSE, Annotate, describe, write_outputs
from dfer.predict.predictor import Predictor
from dfer.predict.progress import LiveLines, VideoProgress
from dfer.video.camera import Camera
from dfer.video.decode import VIDEO_ERRORS

PASSES: dict[Annotate, int] = {"mp4": 3, "gif": 4, "none": 2}  # through a video


def warn(line: str) -> None:
    print(f"predict: {printable(line)}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Load the models and predict, on a camera's picture first if there is one. Returns the exit code."""
    if args.out and os.path.lexists(args.out) and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is no folder: give one, or a new name")
    predictor = build_predictor(args, resize)
    about = [f"the model is {line}" for line in dict.fromkeys(model.trained_on for model in predictor.models)]
    for line in about:
        print(printable(line), flush=True)
    if args.camera:
        recording = args.out and args.out / "recordings" / f"{time.strftime('%Y%m%d-%H%M%S')}.mp4"
        code = watch_camera(Camera(args.camera, args.seconds, recording), predictor, about, recording)
        return max(code, predict_all([recording], predictor, args.out, args.annotate)) if recording else code
    make_folder(args.out)
    return predict_all(list(args.clips), predictor, args.out, args.annotate)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {reason(error)}") from None


def watch_camera(camera: Camera, predictor: Predictor, about: list[str], recording: Path | None) -> int:
    """Show what a camera sees until it ends or is ended. Returns the exit code."""
    if recording:
        make_folder(recording.parent)
    warm_up(predictor)

    def begin_showing(live: LivePredictor) -> None:
        numbers = f"numbers are of the last {live.window:g} s, new every {live.stride:g} s"
        print(f"{printable(camera.name)}: {page.url} shows it; {numbers}; Ctrl-C ends it", flush=True)

    title, words = printable(camera.name), [f"{printable(line).capitalize()}." for line in about]
    with (
        LivePage(title, [*words, PURPOSE]) as page,
        LiveLines() as lines,
        camera,
        stopped_by_signals(camera.stop),
    ):
        watched = watch(camera, predictor, begin_showing, page.show, lambda faces: lines.show(map(in_words, faces)))
    print(f"{printable(camera.name)}: {watched}", flush=True)
    if camera.lost is None:
        return 0
    warn(camera.lost)
    return EXIT_PROBLEMS


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
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results; a --camera needs none")
    parser.add_argument(
        "--annotate",
        choices=tuple(PASSES),
        default="mp4",
        help="what the annotated video becomes (mp4); without it a fifth of the time is saved",
    )
    parser.add_argument(
        "--camera",
        nargs="?",
        const="0",
        metavar="N",
        help="camera N (0), a stream's URL or a video file in its place, shown as it comes",
    )
    parser.add_argument(
        "--seconds", type=in_range(float, 0.1, 86400), default=math.inf, help="of --camera (until Ctrl-C)"
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    if not (args.clips or args.camera):
        parser.error("no CLIP: name a video, a folder of videos or frames, or a --camera")
    if args.clips and args.camera:
        parser.error(f"--camera {args.camera} and CLIP {args.clips[0]}: one or the other")
    if args.clips and not args.out:
        parser.error("no --out: name a folder for the results")
    if args.seconds < math.inf and not args.camera:
        parser.error("--seconds: is how long a --camera is shown, and there is none; leave it out")
    return one_line_errors("predict", lambda: run(args), "interrupted; what is written is whole")


if __name__ == "__main__":
    sys.exit(main())
