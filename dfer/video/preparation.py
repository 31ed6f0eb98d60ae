"""Many videos to clips, on several processes: what is finished is recorded, and a run that was stopped goes on.

Each finished video has a small file in DIR/records. DIR/report.csv and the list of clips are written at the end, so
that a half-done run is never taken for a finished one.
"""

import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfer.cli import UserError, printable, progress
from dfer.files import is_data, write_whole
from dfer.lists.annotations import write_annotations
from dfer.video.clips import ClipOptions, ClipResult, remove_clip, write_clips
from dfer.video.labels import LabelledVideo

TRACKING = 2  # counts the ways in which faces were followed: frames that another one gave are made again
LISTS = ("list.txt", "unlabelled.txt")
REPORT = "report.csv"

_Job = tuple[LabelledVideo, Path, ClipOptions, dict[str, Any]]  # the arguments of `prepare_video`


def prepare(
    videos: Sequence[LabelledVideo],
    out: Path,
    options: ClipOptions,
    detector: str,
    workers: int,
) -> list[ClipResult]:
    """Write the frames of all videos that no earlier run has finished, then the report and the list of clips.

    Args:
        videos: what to prepare.
        out: the folder to write to.
        options: what shapes the frames.
        detector: `haar`, or the hash of YuNet's file: another one makes other frames.
        workers: processes.

    Returns:
        What each video gave.

    Raises:
        UserError: if `out` cannot be written to, or a process was killed.
    """
    try:
        results = _prepare_all(videos, out, options, detector, workers)
        _write_lists(videos, results, out, describe_crops(options, detector))
    except OSError as error:
        raise UserError(f"cannot write: {error}") from None
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (killed, or out of memory?); what is finished stays finished: run the same again"
        ) from None
    return results


def _prepare_all(
    videos: Sequence[LabelledVideo], out: Path, options: ClipOptions, detector: str, workers: int
) -> list[ClipResult]:
    for folder in ("frames", "records"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name in (*LISTS, REPORT):
        (out / name).unlink(missing_ok=True)
    results: dict[str, ClipResult] = {}
    jobs: list[_Job] = []
    for video in videos:
        depends_on = _dependencies(video, options, detector)
        known = _read_record(video, out, depends_on)
        if known is None:
            jobs.append((video, out, options, depends_on))
        else:
            results[video.name] = known
    if results:
        print(f"{len(results):,} of {len(videos):,} videos were finished before")
    with contextlib.closing(_run_jobs(jobs, min(workers, len(jobs)))) as finished:
        for video, result in progress(finished, len(videos), "videos", done=len(results)):
            results[video.name] = result
    return [results[video.name] for video in videos]


def _run_jobs(jobs: Sequence[_Job], workers: int) -> Generator[tuple[LabelledVideo, ClipResult], None, None]:
    """Yield results as they come.

    Raises:
        BrokenProcessPool: if a process is killed.
    """
    if workers <= 1:
        for job in jobs:
            yield job[0], prepare_video(*job)
        return
    # Spawned, as forking a process that has threads is unsafe.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        videos = {pool.submit(prepare_video, *job): job[0] for job in jobs}
        for future in as_completed(videos):
            yield videos[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers


def prepare_video(video: LabelledVideo, out: Path, options: ClipOptions, depends_on: dict[str, Any]) -> ClipResult:
    """Write a video's frames and the record that they are written. A video that failed has none: it may be mended."""
    result = write_clips(video, out, options)
    if depends_on and not result.outcome.startswith("failed"):
        record = {"shaped_by": depends_on, "result": asdict(result)}
        content = json.dumps(record, indent=1, ensure_ascii=True) + "\n"
        write_whole(_record_path(video, out), content, durable=False)
    return result


def _record_path(video: LabelledVideo, out: Path) -> Path:
    # A hash, as names may be long, and one video's name may be another's folder.
    return out / "records" / f"{hashlib.sha256(video.name.encode()).hexdigest()[:24]}.json"


def _dependencies(video: LabelledVideo, options: ClipOptions, detector: str) -> dict[str, Any]:
    """Return all that a video's frames depend on; nothing if it cannot be read."""
    with contextlib.suppress(OSError):
        file = video.path.stat()
        source = [os.path.abspath(video.path), file.st_size, file.st_mtime_ns]
        found = {"name": video.name, "source": source, **asdict(options), "detector": detector}
        if options.crop:
            return {**found, "level": options.level and detector != "haar", "tracking": TRACKING}
        del found["level"]  # older records do not have it, and it shapes nothing
        return {**found, "detector": None, "margin": None, "size": None}
    return {}


def begun_with(out: Path) -> str | None:
    """Return the detector of what lies in a folder already, as of `prepare`; None if nothing says one."""
    for path in sorted((out / "records").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads(path.read_text(encoding="utf-8"))["shaped_by"]["detector"]
    return None


def _read_record(video: LabelledVideo, out: Path, depends_on: dict[str, Any]) -> ClipResult | None:
    """Return what a video gave in an earlier run. If it is to be done (again), delete what is left and return None."""
    path = _record_path(video, out)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        result = ClipResult(**record["result"])
        clips = {str(name): int(count) for name, count in result.clips.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        path.unlink(missing_ok=True)
        return None
    own = re.compile(re.escape(f"frames/{video.name}") + r"(_c\d+)?")  # a record may say anything
    clips = {name: count for name, count in clips.items() if own.fullmatch(name)}
    whole = all(_count_frames(out / name) == count for name, count in clips.items())
    if depends_on and record.get("shaped_by") == depends_on and whole and len(clips) == len(result.clips):
        return result
    path.unlink(missing_ok=True)
    for name in clips:
        remove_clip(out / name)
    return None


def _count_frames(folder: Path) -> int:
    """Return how many frames a clip's folder has; 0 if there is none."""
    return sum(is_data(path.name) for path in folder.glob("*.jpg"))


def describe_crops(options: ClipOptions, detector: str) -> str | None:
    """Return what a list's header says of how its faces were found and cropped; None if they were not."""
    if not options.crop:
        return None
    name, level = ("haar", False) if detector == "haar" else (f"yunet {detector[:12]}", options.level)
    return f"{name}, {'eyes level' if level else 'upright'}, margin {options.margin:g}"


def _write_lists(videos: Sequence[LabelledVideo], results: Sequence[ClipResult], out: Path, crops: str | None) -> None:
    """Write the report, and the list of clips where there are any: without labels it is no list to train on."""
    table, rows, names = io.StringIO(), [], []
    report = csv.writer(table, lineterminator="\n")
    report.writerow(["video", "clips", "label", "frames_decoded", "frames_kept", "faces", "cuts", "outcome", "notes"])
    for video, result in zip(videos, results, strict=True):
        kept, clips = sum(result.clips.values()), ";".join(result.clips)
        found = (result.decoded, kept, result.faces, result.cuts, result.outcome, "; ".join(result.notes))
        report.writerow([printable(video.path), clips, video.label, *found])
        names += list(result.clips)
        if video.label is not None:
            rows += [(name, count, video.label) for name, count in result.clips.items()]
    write_whole(out / REPORT, table.getvalue())
    if rows:
        write_annotations(out / "list.txt", rows, faces=crops or "")
    elif names:
        write_whole(out / "unlabelled.txt", "".join(f"{name}\n" for name in names))
