"""Predict in Python: `Predictor("logs/NAME").video("clip.mp4")` is what `predict` does, without files."""

import argparse
from pathlib import Path
from typing import Literal

from dfer.cli import UserError, expand_home
from dfer.files import reason
from dfer.images import frame_names
from dfer.plan.resizing import resize
from dfer.predict.options import add_arguments, build_predictor
from dfer.predict.predictor import VideoPrediction
from dfer.video.decode import VIDEO_ERRORS


class Predictor:
    """Trained models, loaded once, that predict the emotions of faces in any number of videos.

    What is not given is as of `predict`, the command.

    Args:
        checkpoints: a run's folder, best_WAR.safetensors, an export's folder or hf:ORG/NAME; of several the mean.
        window: how much the models see at once: frames ("70") or seconds ("2.5s").
        stride: from a window to the next, as `window`.
        crop: follow the face and crop it; False where the videos are faces already.
        detector: yunet, haar, or YuNet's .onnx file.
        faces: predict on every face that is followed too, or only on the main one of each frame.
        fps: frames a second of a folder of frames.
        device: where the models run; auto is a GPU where there is one.

    Raises:
        UserError: if a checkpoint or the detector cannot be loaded, or an argument is out of its range.
    """

    def __init__(
        self,
        *checkpoints: str | Path,
        window: str | None = None,
        stride: str | None = None,
        crop: bool = True,
        detector: str | Path | None = None,
        faces: Literal["all", "main"] = "all",
        fps: float | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ):
        given = {"window": window, "stride": stride, "detector": detector, "fps": fps, "device": device, "faces": faces}
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        words += [] if crop else ["--no-crop"]
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_arguments(parser)
        try:
            args = parser.parse_args(expand_home(["--checkpoint=", *words]))
        except argparse.ArgumentError as error:
            raise UserError(f"{(error.argument_name or '').removeprefix('--')}: {error.message}") from None
        if not checkpoints:
            raise UserError("no checkpoint: name a run's folder, an export or hf:ORG/NAME")
        args.checkpoint = [Path(word) for word in expand_home(map(str, checkpoints))]
        self._predictor = build_predictor(args, resize)

    def video(self, path: str | Path) -> VideoPrediction:
        """Return the probabilities of the emotions over the time of a video or of a folder of frames.

        Their order is that of `EMOTIONS`. Memory does not grow with the video but for some numbers per frame.

        Raises:
            UserError: if it is not there, or cannot be read.
        """
        path = Path(*expand_home([str(path)]))
        try:
            if not path.exists():
                raise UserError(f"{path}: no such video or folder")
            if path.is_dir() and not frame_names(path):
                raise UserError(f"{path}: no JPEG or PNG frames in it; of a folder of videos each is named")
            return self._predictor.predict(path)
        except VIDEO_ERRORS as error:
            raise UserError(f"{path}: {reason(error)}") from None
