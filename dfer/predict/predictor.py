"""Trained models on videos: windows over the face, and the probabilities of each frame."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor

from dfer.cli import UserError
from dfer.config import Amp, config_from_json
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet
from dfer.plan.sampling import ClipSampler
from dfer.precision import amp_of_trained, build_precision
from dfer.predict.inputs import ShowProgress, read_pictures
from dfer.predict.timeline import Timeline, place_windows
from dfer.run.checkpoint import load_checkpoint
from dfer.run.provenance import trained_on
from dfer.state import load_trained
from dfer.video.decode import BadVideo
from dfer.video.detectors import Detector
from dfer.video.faces import FaceTrack, crop_face, find_face

CROP_SIZE = 224  # px; of prepare_videos.py, so that a face has the pixels that training's have
BATCH_PIXELS = 8 * 16 * 112 * 112  # of the clips of a batch: about 0.5 GB; on a GPU eight times as many

# Pictures, boxes and mirroring of a plan, and the side in pixels -> resized pictures: dali_pipes.torch_stages.resize.
Resize = Callable[
    [UInt8[Tensor, "B T H W 3"], Float[Tensor, "B 4"], Bool[Tensor, " B"], int], Float[Tensor, "B T S S 3"]
]


class Duration(NamedTuple):
    """A number of frames, or of seconds."""

    length: float
    in_seconds: bool

    def num_frames(self, fps: float) -> int:
        """Return how many frames that is, at least one."""
        return max(round(self.length * fps if self.in_seconds else self.length), 1)

    def seconds(self, fps: float) -> float:
        """Return how long that is."""
        return self.length if self.in_seconds else self.length / fps


class FacePrediction(NamedTuple):
    """One face in each frame of its time in one shot."""

    number: int  # from 1, the most prominent one first
    first: int  # frame
    boxes: Float64[np.ndarray, "n 4"]  # as in dfer/video/faces.py
    probabilities: Float64[np.ndarray, "n K"]

    @property
    def end(self) -> int:
        """Return the frame after the last."""
        return self.first + len(self.boxes)


class Run(NamedTuple):
    """Consecutive frames of one face."""

    first: int
    end: int  # frame after the last
    boxes: Float64[np.ndarray, "n 4"] | None  # None: the whole picture


class VideoPrediction(NamedTuple):
    """The probabilities of each frame of a video, and what they were predicted from."""

    height: int  # px, upright
    width: int
    times: Float64[np.ndarray, " N"]  # seconds from the first frame
    boxes: Float64[np.ndarray, "N 4"] | None  # of the face, as in dfer/video/faces.py; None: the whole picture
    track: Int64[np.ndarray, " N"]  # which face; -1 for none
    faces_at_once: int | None  # None: not looked for
    cuts: int | None
    window: int  # frames
    stride: int
    probabilities: Float64[np.ndarray, "N K"]  # nan where no face is
    notes: tuple[str, ...] = ()  # on its pictures, see `decode`
    detector: str | None = None  # yunet or haar
    faces: tuple[FacePrediction, ...] = ()  # all of them, if all were followed; of the best ones is what stands above

    @property
    def interval(self) -> float:
        """Return the seconds from a frame to the next, typically."""
        return float(np.median(np.diff(self.times))) if len(self.times) > 1 else 0.04

    @property
    def at_end(self) -> Bool[np.ndarray, " N"]:
        """Return in which frames the timeline's face has begun, or will end, less than half a window away."""
        marked = np.ones(len(self.times), bool)
        for run in runs_of(self.track, self.boxes):
            marked[run.first : run.end] = near_ends(run.end - run.first, self.window)
        return marked

    @property
    def edges(self) -> Float64[np.ndarray, " E"]:
        """Return the N + 1 times in seconds at which frames begin and end."""
        return np.append(self.times, self.times[-1] + self.interval)


class Model:
    """A checkpoint, which gets clips as evaluation does: the same frames, resizing, colours, precision and views.

    Args:
        path: the checkpoint, as of `load_checkpoint`.
        device: where it runs.
        amp: another precision than the run's, as --run.amp.
        resize: see `Resize`.
    """

    def __init__(self, path: Path, device: torch.device, amp: Amp | None, resize: Resize):
        state = load_checkpoint(path)
        config = config_from_json(state["config"], source=path)
        amp = amp or amp_of_trained(config.run, "cuda" if device.type == "cuda" else "cpu")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, amp=amp))
        self.path, self.config, self.step = path, config, state.get("step")
        self.trained_on = trained_on(state.get("faces"), config.data.train_list)
        self._device, self._net, self._resize = device, load_trained(state, config).to(device), resize
        self._precision = build_precision(config.run, device)
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
        # Evaluation's plan is the same for all clips but for mirroring, which `predict` does to whole clips.
        plan = dataclasses.replace(self.sampler, mirror_views=False).plan(0, np.ones(1, np.int64))
        self._box = torch.from_numpy(plan.box.astype(np.float32)).to(device)
        self._mirror = torch.from_numpy(plan.mirror).to(device)
        self._colour = torch.from_numpy(plan.colour).to(device)

    @property
    def cell(self) -> int:
        """Return how many pixels of a prepared picture lie from a cell of `maps` to the next."""
        assert isinstance(self._net, DFERNet)  # else there are no maps
        return self._net.backbone.strides[0]

    @torch.inference_mode()
    def prepare(self, picture: UInt8[np.ndarray, "H W 3"]) -> Float[Tensor, "S S 3"]:
        """Return a picture resized and normalised, on the device."""
        pixels = torch.tensor(picture, device=self._device)[None, None]
        resized = self._resize(pixels, self._box, self._mirror, self.config.data.size)
        colour = self._colour[:, None, None]
        return (torch.einsum("btyci,btyxi->btyxc", colour[..., :3], resized) + colour[..., None, :, 3])[0, 0]

    @torch.inference_mode()
    def predict(self, clips: Sequence[Sequence[Tensor]], mirrored: bool) -> Float64[np.ndarray, "B K"]:
        """Return the probabilities of clips of prepared pictures."""
        batch = torch.stack([torch.stack(list(clip)) for clip in clips])
        batch = (batch.flip(3) if mirrored else batch).permute(0, 1, 4, 2, 3)
        logits = self._precision.forward(self._net, batch).logits.float()
        return F.softmax(logits, 1).double().cpu().numpy()

    @torch.inference_mode()
    def maps(self, clip: Sequence[Tensor]) -> Float[np.ndarray, "T K h w"]:
        """Return where in prepared pictures which emotion lies: the CRF's marginals in the cells of the fine level.

        Raises:
            UserError: if the model's CRF has no labels, or it has no CRF.
        """
        if not isinstance(self._net, DFERNet):
            raise UserError(f"{self.config.model.name} has no CRF")
        clips = self._precision.layout(torch.stack(list(clip))[None].permute(0, 1, 4, 2, 3))
        with self._precision.autocast():
            fine, _ = self._net.emotion_maps(clips)
        return fine[0].float().cpu().numpy()


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Models whose mean is taken, and how videos are cut into windows for them."""

    models: Sequence[Model]
    detect: Detector | None  # None: all of each frame is the face
    margin: float  # around the face, in its sides
    window: Duration
    stride: Duration | None  # None: a quarter of a window
    fps: float  # of folders of frames
    detector: str | None = None  # its name: yunet or haar
    faces: Literal["all", "main"] = "main"

    def predict(self, path: Path, show_progress: ShowProgress = iter) -> VideoPrediction:
        """Go through a video twice: for its faces (without a detector: its times), then for the emotions.

        Memory does not grow with the video but for some numbers per frame.

        Raises:
            UserError: if the windows do not touch.
            BadVideo, av.FFmpegError, OSError: as `read_pictures`.
        """
        size, notes = (0, 0), []

        def frames() -> Iterator[tuple[float, np.ndarray]]:
            nonlocal size
            for time, image in show_progress(read_pictures(path, self.fps, notes)):
                size = size if size[0] else image.size
                yield time, np.asarray(image)

        boxes = faces_at_once = cuts = None
        tracks: list[FaceTrack] = []
        if self.detect is not None:
            faces = find_face(frames(), self.detect, every_track=True)
            times, track, faces_at_once, cuts = faces.times, faces.track, faces.faces_at_once, faces.cuts
            boxes = faces.boxes * (1, 1, 1 + 2 * self.margin, 1)
            tracks = [FaceTrack(t.first, t.boxes * (1, 1, 1 + 2 * self.margin, 1)) for t in faces.tracks]
        else:
            times = np.array([time for time, _ in frames()])
            track = np.zeros(len(times), np.int64)
        if not len(times):
            raise BadVideo("it changed while it was read")
        times = times - times[0]
        length, stride = self._window_frames(times)
        every = bool(tracks) and self.faces == "all"
        runs = [Run(t.first, t.end, t.boxes) for t in tracks] if every else runs_of(track, boxes)
        said = self._predict_runs(path, runs, (length, stride), show_progress)
        probabilities = np.full((len(times), len(EMOTIONS)), np.nan)
        for number in reversed(range(len(runs))):  # the best one last, so that it is the one that stays
            probabilities[runs[number].first : runs[number].end] = said[number]
        found = (FacePrediction(k + 1, r.first, tracks[k].boxes, said[k]) for k, r in enumerate(runs)) if every else ()
        width, height = size
        return VideoPrediction(
            *(height, width, times, boxes, track, faces_at_once, cuts, length, stride, probabilities, tuple(notes)),
            detector=self.detector,
            faces=tuple(found),
        )

    def _window_frames(self, times: Float64[np.ndarray, " N"]) -> tuple[int, int]:
        """Return the length of a window and the stride to the next, in frames of a video with such times."""
        fps = (len(times) - 1) / times[-1] if len(times) > 1 else 25.0
        length = self.window.num_frames(fps)
        stride = self.stride.num_frames(fps) if self.stride else max(length // 4, 1)
        if stride > length:
            raise UserError(f"--stride: {stride} frames are more than the window's {length}: some would not be seen")
        return length, stride

    def _predict_runs(
        self, path: Path, runs: Sequence[Run], windows: tuple[int, int], show_progress: ShowProgress
    ) -> list[Float64[np.ndarray, "n K"]]:
        """Return the mean of the models' probabilities of each frame of each run.

        Args:
            path: the video.
            runs: of one face each; they may be at the same time.
            windows: their length and stride, in frames.
            show_progress: as of `predict`.
        """
        said: list[np.ndarray] = [np.zeros((0, len(EMOTIONS)))] * len(runs)
        waiting = sorted(range(len(runs)), key=lambda r: -runs[r].first)  # the next one last
        live: dict[int, list[Timeline]] = {}
        pictures = itertools.islice(read_pictures(path, self.fps), max((run.end for run in runs), default=0))
        for number, (_, image) in enumerate(show_progress(pictures)):
            while waiting and runs[waiting[-1]].first == number:
                index = waiting.pop()
                live[index] = self._timelines(runs[index].end - number, windows)
            for index, timelines in list(live.items()):
                run, frame = runs[index], number - runs[index].first
                wanting = [timeline for timeline in timelines if timeline.wants(frame)]
                if wanting:
                    picture = face_picture(image, run.boxes, frame)
                    for timeline in wanting:
                        timeline.add(frame, picture)
                if number + 1 == run.end:
                    assert all(timeline.complete for timeline in timelines)
                    said[index] = np.mean([timeline.probabilities() for timeline in live.pop(index)], axis=0)
        if waiting or live:
            raise BadVideo("it changed while it was read")
        return said

    def _timelines(self, num_frames: int, windows: tuple[int, int]) -> list[Timeline]:
        """Return the timelines of a run of so many frames, one for each model."""
        placed = place_windows(np.zeros(num_frames, np.int64), *windows)
        return [Timeline(num_frames, placed, m.sampler, m.prepare, m.predict, m.batch_size) for m in self.models]


def runs_of(track: Int64[np.ndarray, " N"], boxes: Float64[np.ndarray, "N 4"] | None) -> list[Run]:
    """Return the runs of frames that one face has after the other; without boxes, of whole frames."""
    edges = [0, *(np.flatnonzero(np.diff(track)) + 1).tolist(), len(track)]
    return [
        Run(first, end, None if boxes is None else boxes[first:end])
        for first, end in itertools.pairwise(edges)
        if track[first] >= 0
    ]


def near_ends(length: int, window: int) -> Bool[np.ndarray, " n"]:
    """Return which of a face's frames no window has in its middle, as they lie less than half of one from an end."""
    at = np.arange(length)
    return (at < window // 2) | (at >= length - window // 2)


def face_picture(
    image: Image.Image, boxes: Float64[np.ndarray, "N 4"] | None, number: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Return what a model gets of frame `number`: the face in its box, or all of the frame if there are no boxes."""
    picture = np.asarray(image)
    return picture if boxes is None else crop_face(picture, boxes[number], CROP_SIZE)
