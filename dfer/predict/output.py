"""What is written of a prediction: NAME.csv, NAME.json, NAME.png and the annotated video."""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from dfer.cli import printable
from dfer.files import write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.predict.inputs import ANNOTATED, InputVideo, ShowProgress, read_pictures
from dfer.predict.overlay import OtherFace, Overlay, timeline_picture
from dfer.predict.predictor import Model, Predictor, VideoPrediction, near_ends
from dfer.predict.timeline import segments
from dfer.video.write import write_gif, write_mp4

Annotate: TypeAlias = Literal["mp4", "gif", "none"]  # what an annotated video becomes

PURPOSE = (
    "For research on facial expressions, and to see what a model does. The numbers say what somebody might see in a "
    "face, not what a person feels; they are no ground for a decision about anyone."
)

# A GIF is for slides and pages: at a video's size and rate it would be twenty times as large as the video.
GIF_SIDE = 480  # px, the picture's longer side
GIF_INTERVAL = 1 / 15  # seconds between two frames, at least
GIF_SAMPLES = 24  # frames that its 256 colours are chosen from


def to_csv(prediction: VideoPrediction) -> str:
    """Return the content of NAME.csv: a row per frame and face in it; a row without numbers if no face is in it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    box_columns = ["box_x", "box_y", "box_side", "box_tilt"]
    writer.writerow(["frame", "time", "face", *box_columns, *(f"p_{e}" for e in EMOTIONS), "emotion", "at_end"])
    nothing = [""] * (len(box_columns) + len(EMOTIONS) + 3)
    rows: list[list[list[object]]] = [[] for _ in prediction.times]
    for face in followed(prediction):
        for i, (number, p) in enumerate(zip(face.frames.tolist(), face.probabilities, strict=True)):
            box = [""] * len(box_columns)
            if face.boxes is not None:
                x, y, side, tilt = face.boxes[i]
                box = [f"{x:.1f}", f"{y:.1f}", f"{side:.1f}", f"{np.degrees(tilt):.1f}"]
            emotion = EMOTIONS[int(p.argmax())]
            rows[number].append([face.number, *box, *(f"{x:.6f}" for x in p), emotion, int(face.at_end[i])])
    for number, time in enumerate(prediction.times):
        writer.writerows([number, f"{time:.4f}", *row] for row in rows[number] or [nothing])
    return text.getvalue()


class Followed(NamedTuple):
    """What was predicted of one face."""

    number: int  # from 1
    frames: Int64[np.ndarray, " n"]  # rising
    boxes: Float64[np.ndarray, "n 4"] | None  # None: the whole picture
    probabilities: Float64[np.ndarray, "n K"]
    at_end: Bool[np.ndarray, " n"]  # no window has the frame in its middle: the face begins or ends too soon


def followed(prediction: VideoPrediction) -> list[Followed]:
    """Return every face in all its frames, or, if only the best ones were predicted on, each in those that it won."""
    if prediction.faces:
        ends = [near_ends(len(face.boxes), prediction.window) for face in prediction.faces]
        return [
            Followed(face.number, np.arange(face.first, face.end), face.boxes, face.probabilities, end)
            for face, end in zip(prediction.faces, ends, strict=True)
        ]
    found, at_end = [], prediction.at_end
    for track in range(int(prediction.track.max(initial=-1)) + 1):
        frames = np.flatnonzero(prediction.track == track)
        if len(frames):
            boxes = None if prediction.boxes is None else prediction.boxes[frames]
            found.append(Followed(track + 1, frames, boxes, prediction.probabilities[frames], at_end[frames]))
    return found


def _summarize_face(face: Followed, edges: Float64[np.ndarray, " E"]) -> dict[str, Any]:
    mean = face.probabilities.mean(axis=0)
    first, last = int(face.frames[0]), int(face.frames[-1])
    return {
        "face": face.number,
        "first_frame": first,
        "last_frame": last,
        "start": round(float(edges[first]), 4),
        "end": round(float(edges[last + 1]), 4),
        "frames": len(face.frames),
        "frames_at_end": int(face.at_end.sum()),
        "emotion": EMOTIONS[int(mean.argmax())],
        "mean_probabilities": dict(zip(EMOTIONS, mean.round(6).tolist(), strict=True)),
    }


def summarize(video: InputVideo, prediction: VideoPrediction, models: Sequence[Model]) -> dict[str, Any]:
    """Return the content of NAME.json."""
    known, times = prediction.track >= 0, prediction.times
    mean = prediction.probabilities[known].mean(axis=0) if known.any() else None
    return {
        "video": printable(video.path),
        "outcome": "ok" if known.any() else "no face",
        "emotion": None if mean is None else EMOTIONS[int(mean.argmax())],
        "mean_probabilities": None if mean is None else dict(zip(EMOTIONS, mean.round(6).tolist(), strict=True)),
        "frames": len(times),
        "frames_with_face": int(known.sum()),
        "share_with_face": round(float(known.mean()), 4),
        "seconds": round(float(prediction.edges[-1]), 4),
        "fps": round((len(times) - 1) / times[-1], 4) if len(times) > 1 else None,
        "width": prediction.width,
        "height": prediction.height,
        "detector": prediction.detector,
        "faces_at_once": prediction.faces_at_once,
        "cuts": prediction.cuts,
        "notes": list(prediction.notes),
        "window_frames": prediction.window,
        "stride_frames": prediction.stride,
        "window_seconds": round(prediction.window * prediction.interval, 4),
        "stride_seconds": round(prediction.stride * prediction.interval, 4),
        "latency_seconds": round(prediction.window * prediction.interval, 4),
        "models": [
            {
                "checkpoint": printable(m.path),
                "trained_on": printable(m.trained_on),
                "step": m.step,
                "frames": m.sampler.clip_length,
                "size": m.config.data.size,
            }
            for m in models
        ],
        "faces_followed": "all" if prediction.faces else "main",
        "faces": [_summarize_face(face, prediction.edges) for face in followed(prediction)],
        "segments": [
            {
                "emotion": EMOTIONS[emotion],
                "first_frame": first,
                "last_frame": end - 1,
                "start": round(float(prediction.edges[first]), 4),
                "end": round(float(prediction.edges[end]), 4),
                "probability": round(float(prediction.probabilities[first:end, emotion].mean()), 6),
            }
            for first, end, emotion in segments(prediction.track, prediction.probabilities)
        ],
    }


def describe(summary: dict[str, Any]) -> str:
    """Return a video's summary in a line."""
    notes = f" ({'; '.join(summary['notes'])})" if summary["notes"] else ""
    if not summary["frames_with_face"]:
        return f"no face in {summary['frames']} frames{notes}"
    emotion = summary["emotion"]
    line = f"{emotion} {100 * summary['mean_probabilities'][emotion]:.0f} %"
    if summary["frames_with_face"] < summary["frames"]:
        line += f", a face in {summary['frames_with_face']} of {summary['frames']} frames"
    if summary["faces_at_once"] and summary["faces_at_once"] > 1:
        line += f", {summary['faces_at_once']} faces at once, of which the largest and most central one counts"
        line += " here; NAME.csv and NAME.json have each" if summary["faces_followed"] == "all" else ""
    return line + notes


def write_outputs(
    video: InputVideo,
    prediction: VideoPrediction,
    predictor: Predictor,
    out: Path,
    annotate: Annotate,
    show_progress: ShowProgress = iter,
) -> dict[str, Any]:
    """Write all files of a video and return the content of NAME.json, which comes last and says what is in them.

    Args:
        video: what was predicted on.
        prediction: of the video.
        predictor: where the prediction is from.
        out: the folder; files of an earlier call are replaced.
        annotate: what the annotated video becomes.
        show_progress: shown the frames of each pass through the video.

    Raises:
        BadVideo, av.FFmpegError, OSError: if a file cannot be written, or the video can no longer be read.
    """
    base, summary = out / video.name, summarize(video, prediction, predictor.models)
    for suffix in (".json", *ANNOTATED, ".png"):  # of an earlier call
        Path(f"{base}{suffix}").unlink(missing_ok=True)
    base.parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(f"{base}.csv"), to_csv(prediction))
    if summary["frames_with_face"]:
        png = io.BytesIO()
        timeline_picture(prediction.edges, prediction.probabilities).save(png, "PNG")
        write_whole(Path(f"{base}.png"), png.getvalue())
        _write_annotated(base, video, prediction, predictor.fps, annotate, show_progress)
    write_whole(Path(f"{base}.json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def _write_annotated(
    base: Path,
    video: InputVideo,
    prediction: VideoPrediction,
    fps: float,
    annotate: Annotate,
    show_progress: ShowProgress,
) -> None:
    if annotate == "none":
        return
    longest = {"longest": GIF_SIDE} if annotate == "gif" else {}
    size, others = (prediction.height, prediction.width), other_faces(prediction)
    overlay = Overlay(*size, prediction.edges, prediction.boxes, prediction.probabilities, others=others, **longest)

    def annotated(numbers: Sequence[int]) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
        """Yield times and annotated pictures of those frames, whose numbers rise."""
        wanted = set(numbers)
        pictures = itertools.islice(read_pictures(video.path, fps), numbers[-1] + 1)
        for number, (_, image) in enumerate(show_progress(pictures)):
            if number in wanted:
                yield float(prediction.times[number]), overlay.draw(number, image)

    if annotate == "mp4":
        write_mp4(Path(f"{base}.mp4"), annotated(range(len(prediction.times))))
    else:
        numbers = spaced_frames(prediction.times, GIF_INTERVAL)
        samples = (picture for _, picture in annotated(numbers[:: -(-len(numbers) // GIF_SAMPLES)]))
        write_gif(Path(f"{base}.gif"), annotated(numbers), samples)


def other_faces(prediction: VideoPrediction) -> dict[int, list[OtherFace]]:
    """Return the faces of each frame that has others than the one which its timeline is of."""
    others: dict[int, list[OtherFace]] = {}
    for face in prediction.faces:
        for i in range(len(face.boxes)):
            if prediction.track[face.first + i] != face.number - 1:
                others.setdefault(face.first + i, []).append((face.number, face.boxes[i], face.probabilities[i]))
    return others


def spaced_frames(times: Float64[np.ndarray, " N"], interval: float) -> list[int]:
    """Return the first frame, and from each one the next that is not sooner than `interval` seconds after it."""
    numbers = [0]
    for number, time in enumerate(times.tolist()):
        if time - times[numbers[-1]] >= interval - 1e-3:  # containers round times
            numbers.append(number)
    return numbers
