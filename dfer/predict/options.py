"""The options of scripts/predict.py and scripts/demo.py that say which models predict, and how."""

import argparse
from pathlib import Path

import torch

from dfer.cli import UserError, in_range
from dfer.predict.predictor import Duration, Model, Predictor, Resize
from dfer.video import detectors


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add what `build_predictor` reads; `required`: a checkpoint must be given."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        required=required,
        metavar="RUN",
        help="a run's folder (its last checkpoint), best_WAR.safetensors, a .pt, an export, or hf:ORG/NAME; of "
        "several, the mean",
    )
    parser.add_argument(
        "--window",
        type=parse_duration,
        metavar="N",
        default=Duration(1.0, True),
        help="seconds (1s) or frames (25) that the model sees at once: a shorter one shows shorter expressions, and as "
        "long as it lasts nothing final can be said of a frame (1s, at the video's own rate)",
    )
    parser.add_argument(
        "--stride", type=parse_duration, metavar="N", help="from a window to the next (a quarter of a window)"
    )
    parser.add_argument("--no-crop", action="store_true", help="the videos are faces already: see all of each frame")
    detectors.add_arguments(parser)
    parser.add_argument(
        "--faces",
        choices=("all", "main"),
        default="all",
        help="predict on every face that is followed, or in each frame on the largest and most central one (all)",
    )
    parser.add_argument("--margin", type=in_range(float, 0, 2), default=0.1, help="as of prepare_videos.py (0.1)")
    parser.add_argument(
        "--fps", type=in_range(float, 0.1, 1000), default=25.0, help="frames a second of a folder of frames (25)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), help="the run's if not given")


def parse_duration(text: str) -> Duration:
    """Return the frames (`70`) or seconds (`2.5s`) that an argument says.

    Raises:
        argparse.ArgumentTypeError: if it says neither.
    """
    in_seconds = text.endswith("s")
    parse = in_range(float, 0.01, 1e5) if in_seconds else in_range(int, 1, 10**7)
    return Duration(float(parse(text.removesuffix("s"))), in_seconds)


def build_predictor(args: argparse.Namespace, resize: Resize) -> Predictor:
    """Load the models and the detector that the options ask for.

    Raises:
        UserError: if one cannot be loaded.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no NVIDIA GPU is visible here")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    models = [Model(path, device, args.amp, resize) for path in args.checkpoint]
    detect = name = None
    if not args.no_crop:
        weights = detectors.find_weights(args.detector)
        detect, name = detectors.make_detector(weights, not args.no_level), "haar" if weights is None else "yunet"
    return Predictor(models, detect, args.margin, args.window, args.stride, args.fps, name, args.faces)
