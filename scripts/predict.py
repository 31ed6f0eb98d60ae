"""What a trained model sees in videos, frame by frame: `python scripts/predict.py CLIP ... --checkpoint RUN --out DIR`.

CLIP is a video, an animated GIF among them; a folder of videos, which may lie in folders within it; or a folder of JPEG
or PNG files, if no video lies in it or in folders within it: the frames of one clip, in natural order (2 before 10).
Of each video, DIR gets
  NAME.csv   a row per frame: frame (from 0), time in seconds, the square that the model saw (centre x, y and side in
             pixels, tilt in degrees), a probability per emotion, the likeliest; empty where no face is
  NAME.json  the models, the windows, the share of frames with a face, mean probabilities, runs of one emotion
  NAME.png   the course of the emotions
  NAME.mp4   the video with all of it in the picture; with --annotate gif NAME.gif, smaller and of 15 frames/s at most
A video without a face has the first two. The face is followed as by prepare_videos.py, but through cuts too. Several
checkpoints (folds, seeds) are averaged. Exit code 0: all were read; 2: what was not, is named, one per line.
"""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dali_pipes import torch_stages
from dfer.cli import Parser, UserError, in_range, one_line_errors, shown
from dfer.config import config_from_json
from dfer.images import FRAME_SUFFIXES, MAX_BYTES, decode_image, natural_key
from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.model import DFERNet
from dfer.plan.sampling import ClipSampler
from dfer.predict.overlay import Overlay, course_picture
from dfer.predict.timeline import Course, place_windows, segments
from dfer.run.checkpoint import load_checkpoint, write_whole
from dfer.run.distributed import World
from dfer.video.decode import (
    BadVideo,
    claimed_seconds,
    decode,
    find_video_files,
    record,
    unique_names,
    write_gif,
    write_mp4,
)
from dfer.video.faces import Detector, crop_face, find_face, make_detector
from train import amp_dtype, trained_model

CROP_SIZE = 224  # px; of prepare_videos.py, so that a face has the pixels that training's have
BATCH_PIXELS = 8 * 16 * 112 * 112  # of the clips that a model sees at once: about 0.5 GB; on a GPU eight times as many
# A GIF is for slides and pages: at a video's size and rate it would be twenty times as large as the video.
GIF_SIDE = 480  # px, the picture's longer side
GIF_INTERVAL = 1 / 15  # seconds between two frames, at least
GIF_SAMPLES = 24  # frames that its 256 colours are chosen from
ANNOTATED = (".mp4", ".gif")


class Video(NamedTuple):
    path: Path  # a file, or a folder of frames
    name: str  # of what is written, below --out


class Span(NamedTuple):
    """A number of frames, or of seconds."""

    length: float
    in_seconds: bool

    def frames(self, fps: float) -> int:
        return max(round(self.length * fps if self.in_seconds else self.length), 1)


class Seen(NamedTuple):
    """A video, and what the models made of it."""

    height: int  # px, upright
    width: int
    times: Float64[np.ndarray, " N"]  # seconds from the first frame
    boxes: Float64[np.ndarray, "N 4"] | None  # what the model saw, as in dfer/video/faces.py; None: the whole picture
    track: Int64[np.ndarray, " N"]
    most: int | None  # faces at once; None: not looked for
    cuts: int | None
    window: int  # frames
    stride: int
    probabilities: Float64[np.ndarray, "N K"]

    @property
    def interval(self) -> float:
        """Seconds from a frame to the next, typically."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.04

    @property
    def edges(self) -> Float64[np.ndarray, " E"]:
        return np.append(self.times, self.times[-1] + self.interval)


class Model:
    """A checkpoint, which sees clips as evaluation does: the same frames, resizing, colours, precision and views."""

    def __init__(self, path: Path, device: torch.device, amp: str | None):
        state = load_checkpoint(path)
        config = config_from_json(state["config"], source=path)
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, amp=amp or config.run.amp))
        self.path, self.config, self.step = path, config, state.get("step")
        self._device, self._net = device, trained_model(state, config).to(device)
        self._amp = amp_dtype(config, World(0, 1, 0, 1, device))
        data = config.data
        self.sampler = ClipSampler(
            config.seed,
            data.num_segments,
            data.frames_per_segment,
            "eval",
            views=data.views,
            mirror_views=data.mirror_views,
        )
        clip_pixels = self.sampler.clip_length * data.size**2
        self.batch_size = max(BATCH_PIXELS * (8 if device.type == "cuda" else 1) // clip_pixels, 1)
        plan = dataclasses.replace(self.sampler, mirror_views=False).plan(0, np.ones(1, np.int64))
        self._plan = torch_stages.DevicePlan(plan, device)

    def lengths(self) -> list[int]:
        """Frames of the clips that it was trained on, as listed."""
        data = self.config.data
        try:
            return [record.num_frames for record in read_annotations(data.train_list, data.root)]
        except UserError as error:
            raise UserError(
                f"{self.path}: how long its training's clips are cannot be told ({error}); say --window FRAMES"
            ) from None

    @torch.inference_mode()
    def prepare(self, picture: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "S S 3"]:
        """Resized and normalised, on the device."""
        pixels = torch.tensor(picture, device=self._device)[None, None]
        small = torch_stages.resize(pixels, self._plan.box, self._plan.mirror, self.config.data.size)
        return torch_stages.finish(small, self._plan, torch.zeros(1, dtype=torch.int64, device=self._device))[0, 0]

    @property
    def cell(self) -> int:
        """Pixels of a prepared picture from a cell of `maps` to the next."""
        return self._net.backbone.strides[0]

    @torch.inference_mode()
    def maps(self, clip: Sequence[Tensor]) -> Float[np.ndarray, "T K h w"]:
        """Where in prepared pictures which emotion is seen: the CRF's marginals in the cells of the fine level.

        Raises:
            UserError: if the model's CRF has no labels, or it has no CRF.
        """
        if not isinstance(self._net, DFERNet):
            raise UserError(f"{self.config.model.name} has no CRF")
        batch = torch.stack(list(clip))[None].permute(0, 1, 4, 2, 3)
        with torch.autocast(self._device.type, dtype=self._amp, enabled=self._amp is not None):
            fine, _ = self._net.emotion_maps(batch if self.config.run.channels_last else batch.contiguous())
        return fine[0].float().cpu().numpy()

    @torch.inference_mode()
    def look(self, clips: Sequence[Sequence[Tensor]], mirrored: bool) -> Float64[np.ndarray, "B K"]:
        """Probabilities of clips of prepared pictures."""
        batch = torch.stack([torch.stack(list(clip)) for clip in clips])
        batch = (batch.flip(3) if mirrored else batch).permute(0, 1, 4, 2, 3)
        with torch.autocast(self._device.type, dtype=self._amp, enabled=self._amp is not None):
            logits = self._net(batch if self.config.run.channels_last else batch.contiguous()).logits.float()
        return F.softmax(logits, 1).double().cpu().numpy()


class Sight(NamedTuple):
    """What looks at videos, and how."""

    models: list[Model]
    detect: Detector | None  # None: all of each frame is the face
    margin: float  # around the face, in its sides
    window: Span
    stride: Span | None
    fps: float  # of folders of frames


def frame_names(folder: Path) -> list[str]:
    """The images in a folder, in natural order. Those with a leading dot are none: see `find_video_files`."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES) and name[0] != "."]
    return sorted(names, key=natural_key)


def pictures(path: Path, fps: float) -> Iterator[tuple[float, Image.Image]]:
    """As of `decode`; of a folder its images, `fps` of them a second.

    Raises:
        BadVideo, av.FFmpegError, OSError: as `decode`, or if an image cannot be read, is too large or damaged.
    """
    if not path.is_dir():
        yield from decode(path)
        return
    for number, name in enumerate(frame_names(path)):
        try:
            if not (path / name).is_file():
                raise BadVideo("not a file")  # a pipe would never end
            with open(path / name, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise BadVideo(f"more than {MAX_BYTES:,} bytes")
            image = decode_image(data)
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            raise BadVideo(f"frame {name}: {reason(error)}") from None
        yield number / fps, image


def reason(error: Exception) -> str:
    """Why something could not be read, in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def watch(path: Path, sight: Sight, tick: Callable[[Iterator], Iterator] = iter) -> Seen:
    """Go through a video twice: for its faces (without a detector: its times), then for the emotions.

    What is held of it does not grow but for some numbers per frame. `tick` is shown each frame as it is read.

    Raises:
        UserError: in one line, if the windows do not touch.
        BadVideo, av.FFmpegError, OSError: as `pictures`.
    """
    size = (0, 0)

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        nonlocal size
        for moment, image in tick(pictures(path, sight.fps)):
            size = size if size[0] else image.size
            yield moment, np.asarray(image)

    if sight.detect is not None:
        faces = find_face(frames(), sight.detect, every_track=True)
        times, track, most, cuts = faces.times, faces.track, faces.most, faces.cuts
        boxes = faces.boxes * (1, 1, 1 + 2 * sight.margin, 1)
    else:
        times = np.array([moment for moment, _ in frames()])
        track, boxes, most, cuts = np.zeros(len(times), np.int64), None, None, None
    if not len(times):
        raise BadVideo("it changed while it was read")
    times = times - times[0]
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else 25.0
    length = sight.window.frames(fps)
    step = sight.stride.frames(fps) if sight.stride else max(length // 4, 1)
    if step > length:
        raise UserError(f"--stride: {step} frames are more than the window's {length}: some would not be seen")
    windows = place_windows(track, length, step)
    courses = [Course(len(times), windows, m.sampler, m.prepare, m.look, m.batch_size) for m in sight.models]
    end = int(windows[:, 1].max(initial=0))
    for number, (_, image) in enumerate(tick(itertools.islice(pictures(path, sight.fps), end))):
        wanting = [course for course in courses if course.wants(number)]
        if wanting:
            picture = np.asarray(image)
            if boxes is not None:
                picture = crop_face(picture, boxes[number], CROP_SIZE)
            for course in wanting:
                course.add(number, picture)
    if not all(course.complete for course in courses):
        raise BadVideo("it changed while it was read")
    probabilities = np.mean([course.probabilities() for course in courses], axis=0)
    return Seen(size[1], size[0], times, boxes, track, most, cuts, length, step, probabilities)


def table(seen: Seen) -> str:
    """The content of NAME.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    box_columns = ["box_x", "box_y", "box_side", "box_tilt"]
    writer.writerow(["frame", "time", *box_columns, *(f"p_{e}" for e in EMOTIONS), "emotion"])
    for number, (moment, p) in enumerate(zip(seen.times, seen.probabilities, strict=True)):
        box, row = [""] * 4, [""] * (len(EMOTIONS) + 1)
        if seen.track[number] >= 0:
            row = [*(f"{x:.6f}" for x in p), EMOTIONS[int(p.argmax())]]
            if seen.boxes is not None:
                x, y, side, tilt = seen.boxes[number]
                box = [f"{x:.1f}", f"{y:.1f}", f"{side:.1f}", f"{np.degrees(tilt):.1f}"]
        writer.writerow([number, f"{moment:.4f}", *box, *row])
    return text.getvalue()


def summary(video: Video, seen: Seen, models: Sequence[Model]) -> dict:
    """The content of NAME.json."""
    known = seen.track >= 0
    mean = seen.probabilities[known].mean(axis=0) if known.any() else None
    runs = [
        {
            "emotion": EMOTIONS[emotion],
            "first_frame": first,
            "last_frame": end - 1,
            "start": round(float(seen.edges[first]), 4),
            "end": round(float(seen.edges[end]), 4),
            "probability": round(float(seen.probabilities[first:end, emotion].mean()), 6),
        }
        for first, end, emotion in segments(seen.track, seen.probabilities)
    ]
    return {
        "video": shown(video.path),
        "outcome": "ok" if known.any() else "no face",
        "emotion": None if mean is None else EMOTIONS[int(mean.argmax())],
        "mean_probabilities": None if mean is None else dict(zip(EMOTIONS, mean.round(6).tolist(), strict=True)),
        "frames": len(seen.times),
        "frames_with_face": int(known.sum()),
        "share_with_face": round(float(known.mean()), 4),
        "seconds": round(float(seen.edges[-1]), 4),
        "fps": round((len(seen.times) - 1) / seen.times[-1], 4) if len(seen.times) > 1 else None,
        "width": seen.width,
        "height": seen.height,
        "faces_at_once": seen.most,
        "cuts": seen.cuts,
        "window_frames": seen.window,
        "stride_frames": seen.stride,
        "models": [
            {"checkpoint": shown(m.path), "step": m.step, "frames": m.sampler.clip_length, "size": m.config.data.size}
            for m in models
        ],
        "segments": runs,
    }


def annotated(
    path: Path, seen: Seen, overlay: Overlay, fps: float, numbers: Sequence[int], tick: Callable = iter
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Times and annotated pictures of those frames, whose numbers rise."""
    wanted = set(numbers)
    for number, (_, image) in enumerate(tick(itertools.islice(pictures(path, fps), numbers[-1] + 1))):
        if number in wanted:
            yield float(seen.times[number]), overlay.draw(number, image)


def spaced(times: Float64[np.ndarray, " N"], interval: float) -> list[int]:
    """The first frame, and from each one the next that is not sooner than `interval` seconds after it."""
    numbers = [0]
    for number, moment in enumerate(times.tolist()):
        if moment - times[numbers[-1]] >= interval - 1e-3:  # containers round times
            numbers.append(number)
    return numbers


def write(video: Video, seen: Seen, sight: Sight, out: Path, annotate: str, tick: Callable = iter) -> dict:
    """Write all that is to be had of a video; NAME.json comes last, and tells what is in it.

    `annotate` is what becomes of the annotated video: "mp4", "gif" or "none".
    """
    base, about = out / video.name, summary(video, seen, sight.models)
    for suffix in (".json", *ANNOTATED, ".png"):  # of an earlier call
        Path(f"{base}{suffix}").unlink(missing_ok=True)
    base.parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(f"{base}.csv"), lambda file: file.write(table(seen).encode()))
    if about["frames_with_face"]:
        png = io.BytesIO()
        course_picture(seen.edges, seen.probabilities).save(png, "PNG")
        write_whole(Path(f"{base}.png"), lambda file: file.write(png.getvalue()))
        sides = {"longest": GIF_SIDE} if annotate == "gif" else {}
        overlay = Overlay(seen.height, seen.width, seen.edges, seen.boxes, seen.probabilities, **sides)
        if annotate == "mp4":
            numbers = range(len(seen.times))
            write_mp4(Path(f"{base}.mp4"), annotated(video.path, seen, overlay, sight.fps, numbers, tick))
        elif annotate == "gif":
            numbers = spaced(seen.times, GIF_INTERVAL)
            samples = annotated(video.path, seen, overlay, sight.fps, numbers[:: -(-len(numbers) // GIF_SAMPLES)], tick)
            frames = annotated(video.path, seen, overlay, sight.fps, numbers, tick)
            write_gif(Path(f"{base}.gif"), frames, (picture for _, picture in samples))
    content = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(f"{base}.json"), lambda file: file.write(content.encode()))
    return about


def find_videos(clips: Sequence[Path], out: Path) -> list[Video]:
    """The videos of files and folders, each once, in natural order; results in a folder within are none of them.

    Raises:
        UserError: in one line, if there are none, or a result would take the place of a video or lie among frames.
    """
    paths, names = [], []
    for clip in clips:
        if not clip.exists():
            raise UserError(f"{clip}: no such video or folder")
        if not clip.is_dir():
            paths.append(clip)
            names.append(clip.name)
            continue
        found = find_video_files(clip, lambda line: print(f"predict: {shown(line)}", file=sys.stderr))
        own = out.resolve()
        if own != clip.resolve():
            found = [path for path in found if not path.resolve().is_relative_to(own)]
        found.sort(key=lambda path: natural_key(path.relative_to(clip).as_posix()))
        paths += found
        names += [path.relative_to(clip).as_posix() for path in found]
        if not found:
            try:
                if not frame_names(clip):
                    raise UserError(f"{clip}: no videos in it, and no JPEG or PNG frames")
            except OSError as error:
                raise UserError(f"{clip}: cannot be read ({error.strerror})") from None
            paths.append(clip)
            names.append(f"{clip.resolve().name}.")  # its last dot begins no suffix
    distinct = {path.resolve(): (path, name) for path, name in zip(reversed(paths), reversed(names), strict=True)}
    paths, names = zip(*reversed(distinct.values()), strict=True)
    videos = [Video(path, name) for path, name in zip(paths, unique_names(names), strict=True)]
    for video in videos:
        for suffix in ANNOTATED:
            if Path(f"{out / video.name}{suffix}").resolve() in distinct:
                raise UserError(
                    f"--out {out}: {video.name}{suffix} lies there and would be overwritten; choose another folder"
                )
        if (out / video.name).parent.resolve() in distinct:
            raise UserError(f"--out {out}: the results would lie among the frames; choose another folder")
    return videos


class Progress:
    """On a terminal a bar with frames/s and the time left, else nothing. Its unit are seconds of video."""

    def __init__(self, videos: Sequence[Video], passes: int, fps: float):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]:.0f} frames/s"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._claimed = []
        for video in videos if sys.stdout.isatty() else ():
            try:
                folder = video.path.is_dir()
                self._claimed.append(len(frame_names(video.path)) / fps if folder else claimed_seconds(video.path) or 0)
            except (av.FFmpegError, BadVideo, OSError):  # which reading it will say
                self._claimed.append(0.0)
        self._passes = passes
        self._task = self._bar.add_task("", total=passes * sum(self._claimed), rate=0.0)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:  # a video without a face takes one pass only
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
        self._bar.stop()

    def begin(self, number: int, name: str) -> None:
        """Video `number` is next."""
        done = self._passes * sum(self._claimed[:number])
        self._bar.update(self._task, completed=done, description=f"{number + 1}: {name[-30:]}")

    def tick(self, frames: Iterator[tuple[float, Image.Image]]) -> Iterator[tuple[float, Image.Image]]:
        """Show the frames of one of the passes through a video as they come."""
        if self._bar.disable:
            yield from frames
            return
        began, before = time.monotonic(), None
        for number, (moment, image) in enumerate(frames, start=1):
            yield moment, image
            rate = number / max(time.monotonic() - began, 1e-3)
            self._bar.update(self._task, advance=moment - before if before is not None else 0.0, rate=rate)
            before = moment

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def predict(clips: Sequence[Path], sight: Sight, out: Path, annotate: str) -> int:
    """All videos, one after the other. Returns the exit code."""
    videos, code = find_videos(clips, out), 0
    with Progress(videos, {"none": 2, "mp4": 3, "gif": 4}[annotate], sight.fps) as progress:
        for number, video in enumerate(videos):
            progress.begin(number, shown(video.name))
            try:
                seen = watch(video.path, sight, progress.tick)
            except (av.FFmpegError, BadVideo, OSError) as error:
                print(f"predict: {shown(video.path)}: {shown(reason(error))}", file=sys.stderr, flush=True)
                code = 2
                continue
            try:
                about = write(video, seen, sight, out, annotate, progress.tick)
            except (av.FFmpegError, BadVideo, OSError) as error:
                raise UserError(f"{out / video.name}: cannot be written ({error})") from None
            progress.say(f"{shown(video.name)}: {told(about)}")
    return code


def told(about: dict) -> str:
    """A video's summary in a line."""
    if not about["frames_with_face"]:
        return f"no face in {about['frames']} frames"
    emotion = about["emotion"]
    line = f"{emotion} {100 * about['mean_probabilities'][emotion]:.0f} %"
    if about["frames_with_face"] < about["frames"]:
        line += f", a face in {about['frames_with_face']} of {about['frames']} frames"
    if about["faces_at_once"] and about["faces_at_once"] > 1:
        line += f", {about['faces_at_once']} faces at once, of which the largest and most central one counts"
    return line


def parse_span(text: str) -> Span:
    """`70`: frames, `2.5s`: seconds."""
    kind, high = (float, 1e5) if text.endswith("s") else (int, 10**7)
    value = in_range(kind, 0.01 if kind is float else 1, high)(text.removesuffix("s"))
    return Span(float(value), kind is float)


def look_with(args: argparse.Namespace) -> Sight:
    """Load the models and the detector that `add_arguments` asks for.

    Raises:
        UserError: in one line, if one cannot be had.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no NVIDIA GPU is visible here")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    models = [Model(path, device, args.amp) for path in args.checkpoint]
    window = args.window or Span(float(np.median([n for m in models for n in m.lengths()])), False)
    detect = None if args.no_crop else make_detector(args.detector)
    return Sight(models, detect, args.margin, window, args.stride, args.fps)


def run(args: argparse.Namespace) -> int:
    """Load the models, record what is to be recorded, and predict. Returns the exit code."""
    sight, clips = look_with(args), list(args.clips)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.camera:
            clips.append(args.out / "recordings" / f"{time.strftime('%Y%m%d-%H%M%S')}.mp4")
            clips[-1].parent.mkdir(exist_ok=True)
            source, kind = (f"/dev/video{args.camera}", "v4l2") if args.camera.isdecimal() else (args.camera, None)
            print(f"recording {args.seconds:g} s of {shown(source)}; Ctrl-C ends it earlier", flush=True)
            record(source, clips[-1], args.seconds, kind)
    except (OSError, av.FFmpegError, BadVideo) as error:
        raise UserError(f"{args.camera or args.out}: {getattr(error, 'strerror', None) or error}") from None
    return predict(clips, sight, args.out, args.annotate)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What looks at videos, and how: also of scripts/demo.py."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        required=True,
        metavar="RUN",
        help="a run's folder (its last checkpoint), its best_WAR.safetensors, or a .pt; of several, the mean",
    )
    parser.add_argument(
        "--window",
        type=parse_span,
        metavar="N",
        help="frames (70) or seconds (2.5s) that the model sees at once (default: the median length of the clips that "
        "it was trained on, in frames: if those had another frame rate than your videos, say seconds)",
    )
    parser.add_argument(
        "--stride", type=parse_span, metavar="N", help="from a window to the next (default: a quarter of a window)"
    )
    parser.add_argument("--no-crop", action="store_true", help="the videos are faces already: see all of each frame")
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="YuNet's .onnx file (default: Haar), as of prepare_videos.py"
    )
    parser.add_argument("--margin", type=in_range(float, 0, 2), default=0.1, help="as of prepare_videos.py (0.1)")
    parser.add_argument(
        "--fps", type=in_range(float, 0.1, 1000), default=25.0, help="frames a second of a folder of frames (25)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), help="the run's if not given")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("predict", __doc__)
    parser.add_argument(
        "clips", type=Path, nargs="*", metavar="CLIP", help="a video, a folder of videos, or a folder of frames"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--annotate",
        choices=("mp4", "gif", "none"),
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
    try:
        return one_line_errors("predict", lambda: run(args))
    except KeyboardInterrupt:
        parser.exit(130, "predict: interrupted; what is written is whole\n")


if __name__ == "__main__":
    sys.exit(main())
