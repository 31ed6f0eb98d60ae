"""Turn videos into JPEG frames of the face they show and write the annotation list that train.py reads.

`python scripts/prepare_videos.py INPUT --out DIR`, where INPUT is a folder of videos (its immediate sub-folders may be
classes: Happy, Sad, ...), one video, or a .txt/.csv list of `path label` rows. Any codec that FFmpeg reads will do.
The face is found, followed and cropped; DIR/report.csv says what became of each video. Run it again and it goes on.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, UserError, in_range, shown
from dfer.images import natural_key
from dfer.lists.annotations import EMOTIONS, write_annotations
from dfer.lists.formats import WORDS
from dfer.video.decode import BadVideo, decode, find_video_files, nearest_frames, unique_names
from dfer.video.faces import crop_face, find_face, make_detector

LABELS = {word: EMOTIONS.index(emotion) for word, emotion in WORDS.items()}
LABEL_HELP = "0..6 or " + ", ".join(EMOTIONS)
LISTS = ("list.txt", "unlabelled.txt")


@dataclass(frozen=True)
class Video:
    """One video to prepare."""

    path: Path
    name: str  # of its frame folder below DIR/frames, unique
    label: int | None  # None: unlabelled


@dataclass(frozen=True)
class Options:
    """What shapes the frames of a video."""

    crop: bool = True
    detector: Path | None = None  # of YuNet; None is Haar
    margin: float = 0.1
    size: int = 224  # px
    fps: float | None = None
    clip_length: int | None = None
    quality: int = 92


@dataclass(frozen=True)
class Result:
    """What became of a video."""

    outcome: str  # ok, no face, several faces, cut, failed: reason
    clips: dict[str, int]  # folder below DIR -> frames
    decoded: int
    faces: int | None = None  # at once; None: not looked for
    cuts: int | None = None


def parse_label(text: str) -> int:
    """Label of an id or an emotion word."""
    if text.isdecimal() and int(text) < len(EMOTIONS):
        return int(text)
    if text.casefold() not in LABELS:
        raise UserError(f"{text!r} is no label: {LABEL_HELP}")
    return LABELS[text.casefold()]


def read_list(list_path: Path, labelled: bool = True) -> list[tuple[Path, int | None]]:
    """Path and label from rows of `path label` or `path,label`, split from the right; paths start at the list.

    Where the videos are not `labelled`, a row is a path and nothing else.
    """
    try:
        lines = list_path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{list_path}: cannot be read as a list of videos ({error})") from None
    rows: list[tuple[Path, int | None]] = []
    for row, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if "\0" in line:
            raise UserError(f"{list_path}:{row}: no path has a NUL in it: {line!r}")
        if not labelled:
            rows.append((list_path.parent / line, None))
            continue
        fields = re.fullmatch(r"(.+?)(?:\s*,\s*|\s+)([^\s,]+)", line)
        if fields is None:
            raise UserError(f"{list_path}:{row}: expected 'path label', got {line!r}")
        try:
            rows.append((list_path.parent / fields[1], parse_label(fields[2])))
        except UserError as error:
            raise UserError(f"{list_path}:{row}: {error}") from None
    return rows


def find_videos(source: Path, label: int | None, unlabelled: bool = False) -> list[Video]:
    """The videos of a folder, a list or a single file, in natural order; `label` is for those that have no other.

    Raises:
        UserError: in one line, if there are none, or one has no label (unless all are `unlabelled`).
    """
    labelled: Sequence[tuple[Path, int | None]]
    if source.is_dir():
        found = find_video_files(source, lambda line: print(f"prepare_videos: {shown(line)}", file=sys.stderr))
        found.sort(key=lambda path: natural_key(path.relative_to(source).as_posix()))
        labelled = [(path, LABELS.get(path.relative_to(source).parts[0].casefold(), label)) for path in found]
    elif source.suffix.lower() in (".txt", ".csv"):
        labelled = read_list(source, not unlabelled)
    elif source.exists():
        labelled = [(source, label)]
    else:
        raise UserError(f"{source}: no such folder, video or list")
    if not labelled:
        raise UserError(f"{source}: no videos in it")
    base = source if source.is_dir() else source.parent
    names = unique_names([os.path.relpath(path, base) for path, _ in labelled])
    videos = []
    for (path, own), name in zip(labelled, names, strict=True):
        if own is None and not unlabelled:
            raise UserError(
                f"{path}: no label; put it in a folder named after its emotion ({', '.join(EMOTIONS)}), "
                "give a .txt list of 'path label' rows, give --label for all such videos, or say --unlabelled"
            )
        videos.append(Video(path, name, None if unlabelled else own))
    return videos


def _remove_frames(folder: Path) -> None:
    for frame in folder.glob("*.jpg"):
        frame.unlink()


def _remove_folder(folder: Path) -> None:
    _remove_frames(folder)
    with contextlib.suppress(OSError):  # not empty: another video's folder lies in it
        folder.rmdir()


_detector = functools.cache(make_detector)  # one in each process


def pictures(path: Path, options: Options, found: dict[str, int]) -> Iterator[Image.Image]:
    """The frames to write. Puts the number of frames `decoded`, and of `faces` and `cuts`, in `found` as it knows them.

    Raises:
        BadVideo, av.FFmpegError: as `decode`; where faces or times are looked for, before the first frame comes.
    """
    if not (options.crop or options.fps):
        for found["decoded"], (_, image) in enumerate(decode(path), start=1):
            yield image
        return
    # Twice through the video: all its frames together may not fit in memory.
    boxes = None
    if options.crop:
        faces = find_face(((time, np.asarray(image)) for time, image in decode(path)), _detector(options.detector))
        times, boxes = faces.times, faces.boxes
        found |= {"faces": faces.most, "cuts": faces.cuts}
    else:
        times = np.array([time for time, _ in decode(path)])
    found["decoded"] = len(times)
    counts = nearest_frames(times, options.fps) if options.fps else np.ones(len(times), np.int64)
    if boxes is not None:
        counts[np.isnan(boxes[:, 0])] = 0
    end = int(np.flatnonzero(counts).max(initial=-1)) + 1
    for index, (_, image) in enumerate(itertools.islice(decode(path), end)):
        if boxes is not None and counts[index]:
            image = Image.fromarray(crop_face(np.asarray(image), boxes[index], options.size, options.margin))
        for _ in range(counts[index]):
            yield image


def write_clips(video: Video, out: Path, options: Options) -> Result:
    """Worker: write a video's frames; none are left of a video that failed."""
    clips: dict[str, int] = {}
    found: dict[str, int] = {"decoded": 0}
    name, clip_length, outcome = "", options.clip_length, "ok"
    try:
        for index, image in enumerate(pictures(video.path, options, found)):
            if index % (clip_length or sys.maxsize) == 0:
                name = f"frames/{video.name}" + (f"_c{len(clips) + 1:03d}" if clip_length else "")
                clips[name] = 0
                (out / name).mkdir(parents=True, exist_ok=True)
                _remove_frames(out / name)  # of a run that was stopped, maybe of a longer clip
            clips[name] += 1
            image.save(out / name / f"{clips[name]:05d}.jpg", quality=options.quality)
    except (av.FFmpegError, BadVideo) as error:
        outcome = f"failed: {getattr(error, 'strerror', None) or error}"
        if found["decoded"]:
            outcome += f", after {found['decoded']} frames"
    unwanted = list(clips) if outcome != "ok" else []
    if clip_length and len(clips) > 1 and 2 * clips[name] < clip_length and not unwanted:
        unwanted = [name]  # the remainder is too short to be a clip
    for dropped in unwanted:
        del clips[dropped]
        _remove_folder(out / dropped)
    if outcome == "ok" and options.crop:
        if not found["faces"]:
            outcome = "no face"
        elif not clips:
            outcome = "failed: its face is seen too shortly for --fps"
        elif found["faces"] > 1:
            outcome = "several faces"
        elif found["cuts"]:
            outcome = "cut"
    return Result(outcome, clips, **found)


# ---- Records: one small file for each finished video, so that a run which was stopped goes on where it was.


def _record_path(video: Video, out: Path) -> Path:
    # A hash, as names may be long, and one video's name may be another's folder.
    return out / "records" / f"{hashlib.sha256(video.name.encode()).hexdigest()[:24]}.json"


def shaped_by(video: Video, options: Options, detector: str) -> dict[str, Any]:
    """All that a video's frames depend on; `detector` stands for the content of its file."""
    with contextlib.suppress(OSError):
        file = video.path.stat()
        source = [os.path.abspath(video.path), file.st_size, file.st_mtime_ns]
        shape = {"name": video.name, "source": source, **asdict(options), "detector": detector}
        return shape if options.crop else {**shape, "detector": None, "margin": None, "size": None}
    return {}


def read_record(video: Video, out: Path, shape: dict[str, Any]) -> Result | None:
    """What a video gave in an earlier run, or None, and then no trace of it is left, if it has to be done (again)."""
    path = _record_path(video, out)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        result = Result(**record["result"])
        clips = {str(name): int(count) for name, count in result.clips.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        path.unlink(missing_ok=True)
        return None
    own = re.compile(re.escape(f"frames/{video.name}") + r"(_c\d+)?")  # a record may say anything
    clips = {name: count for name, count in clips.items() if own.fullmatch(name)}
    whole = all(len(list((out / name).glob("*.jpg"))) == count for name, count in clips.items())
    if shape and record.get("shaped_by") == shape and whole and len(clips) == len(result.clips):
        return result
    path.unlink(missing_ok=True)
    for name in clips:
        _remove_folder(out / name)
    return None


def do_video(video: Video, out: Path, options: Options, shape: dict[str, Any]) -> Result:
    """Worker: `write_clips`, and the record that it is done. A video that failed has none: it may be mended."""
    result = write_clips(video, out, options)
    if shape and not result.outcome.startswith("failed"):
        record = {"shaped_by": shape, "result": asdict(result)}
        write_whole(_record_path(video, out), json.dumps(record, indent=1, ensure_ascii=True) + "\n")
    return result


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_suffix(".tmp")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers


def _finished(
    work: Callable[[Video, Path, Options, dict[str, Any]], Result], jobs: Sequence[tuple], workers: int
) -> Iterator[tuple[Video, Result]]:
    """Results of jobs as they come. Raises BrokenProcessPool if a process is killed."""
    if workers == 1:
        for job in jobs:
            yield job[0], work(*job)
        return
    # Spawned, as forking a process that has threads is unsafe.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        videos = {pool.submit(work, *job): job[0] for job in jobs}
        for future in as_completed(videos):
            yield videos[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(
    videos: Sequence[Video], out: Path, options: Options = Options(), detector: str = "haar", workers: int = 1
) -> list[Result]:
    """Write the frames of all videos not yet finished, then report and list (atomically, and not before: a half-done
    run is never taken for a finished one). Returns what became of each video."""
    for folder in ("frames", "records"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name in (*LISTS, "report.csv"):
        (out / name).unlink(missing_ok=True)
    results, jobs = {}, []
    for video in videos:
        shape = shaped_by(video, options, detector)
        known = read_record(video, out, shape)
        if known is None:
            jobs.append((video, out, options, shape))
        else:
            results[video.name] = known
    if results:
        print(f"{len(results):,} of {len(videos):,} videos were finished before")
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        finished = stack.enter_context(contextlib.closing(_finished(do_video, jobs, min(workers, len(jobs) or 1))))
        if terminal := sys.stdout.isatty():
            from rich.progress import MofNCompleteColumn, Progress

            progress = stack.enter_context(Progress(*Progress.get_default_columns(), MofNCompleteColumn()))
            finished = progress.track(finished, total=len(jobs), description="videos")
        for done, (video, result) in enumerate(finished, start=1):
            results[video.name] = result
            if not terminal and done * 10 // len(jobs) > (done - 1) * 10 // len(jobs):
                left = (time.monotonic() - start) / done * (len(jobs) - done)
                more = f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
                print(f"{done}/{len(jobs)} videos{more if done < len(jobs) else ''}", flush=True)
    write_lists(videos, results, out)
    return [results[video.name] for video in videos]


def write_lists(videos: Sequence[Video], results: dict[str, Result], out: Path) -> None:
    """Write report.csv, and the list of clips where there are any: without labels it is no list to train on."""
    table, rows = io.StringIO(), []
    report = csv.writer(table, lineterminator="\n")
    report.writerow(["video", "clips", "label", "frames_decoded", "frames_kept", "faces", "cuts", "outcome"])
    for video in videos:
        done = results[video.name]
        kept = sum(done.clips.values())
        clips = ";".join(done.clips)
        report.writerow(
            [shown(video.path), clips, video.label, done.decoded, kept, done.faces, done.cuts, done.outcome]
        )
        rows += [(name, n, video.label) for name, n in done.clips.items()]
    write_whole(out / "report.csv", table.getvalue())
    if rows and videos[0].label is None:
        write_whole(out / "unlabelled.txt", "".join(f"{name}\n" for name, _, _ in rows))
    elif rows:
        write_annotations(out / "list.txt", rows)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("prepare_videos", __doc__)
    default = Options()
    parser.add_argument("input", type=Path, help="folder of videos, a video, or a .txt/.csv list of 'path label' rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write frames/, list.txt and report.csv to")
    parser.add_argument("--no-crop", action="store_true", help="keep frames as they are: the clips are faces already")
    parser.add_argument(
        "--detector",
        type=Path,
        metavar="FILE",
        help="YuNet's .onnx file: finds turned heads too, and levels the eyes (default: Haar, frontal faces, upright)",
    )
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
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(arguments)
    for name in (*LISTS, "report.csv"):
        if args.input.resolve() == (args.out / name).resolve():
            parser.error(f"--out {args.out}: the list of videos would be overwritten with the list of frames")
    names = {field: getattr(args, field) for field in asdict(default) if field != "crop"}
    options = Options(crop=not args.no_crop, **names)
    detector = "haar"
    try:
        label = None if args.label is None else parse_label(args.label)
        videos = find_videos(args.input, label, args.unlabelled)
        if options.crop:
            if args.detector is not None:
                detector = hashlib.sha256(args.detector.read_bytes()).hexdigest()
            make_detector(args.detector)  # fails here, in one line, rather than in each worker
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: cannot be read ({error.strerror})")
    try:
        results = prepare(videos, args.out, options, detector, args.workers)
    except OSError as error:
        parser.error(f"cannot write: {error}")
    except BrokenProcessPool:
        parser.error(
            "a worker process died (killed, or out of memory?); what is finished stays finished: run the same again"
        )
    except KeyboardInterrupt:
        parser.exit(130, "prepare_videos: interrupted; what is finished stays finished: run the same again\n")
    outcomes = [result.outcome for result in results]
    bad = [
        f"{shown(video.path)}: {outcome.removeprefix('failed: ')}"
        for video, outcome in zip(videos, outcomes, strict=True)
        if outcome.startswith(("failed", "no face"))
    ]
    counts = [count for result in results for count in result.clips.values()]
    if not counts:
        parser.error(f"none of {len(videos)} videos gave a clip; the first: {bad[0]}")
    for line in bad:
        print(f"prepare_videos: {line}", file=sys.stderr)
    told = [f"{outcomes.count(kind):,} with {kind}" for kind in ("no face", "several faces") if kind in outcomes]
    if "cut" in outcomes:
        told.append(f"{outcomes.count('cut'):,} with a cut, of which one shot is kept")
    if told:
        print(f"{', '.join(told)}: {args.out / 'report.csv'}")
    if args.unlabelled:
        list_path = args.out / "unlabelled.txt"
        print("a clip a line, without labels: for prediction, not for training")
    else:
        list_path = args.out / "list.txt"
        print(f"train on it: python train.py --data.train-list {shlex.quote(str(list_path))} --data.val-list VAL_LIST")
    good = len(videos) - len(bad)
    print(f"{good:,} of {len(videos):,} videos, {len(counts):,} clips, {sum(counts):,} frames: {list_path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
