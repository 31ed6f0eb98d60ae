"""Cut videos into JPEG frames and write the annotation list that train.py reads.

`python scripts/prepare_videos.py INPUT --out DIR`, where INPUT is a folder of videos (its immediate sub-folders may be
classes: Happy, Sad, ...), one video, or a .txt/.csv list of `path label` rows. Any codec that FFmpeg reads will do.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import shlex
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import av
from av.sidedata.sidedata import SideData, Type
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.annotations import EMOTIONS
from dfer.index import natural_key

# What to take from a folder; a file that is named, or listed, may be called anything.
VIDEO_SUFFIX = re.compile(r"\.(3gp|asf|avi|flv|gif|m2?ts|m4v|mkv|mov|mp4|mpe?g|mxf|ogv|ts|vob|webm|wmv)", re.IGNORECASE)
LABELS = {emotion.casefold(): label for label, emotion in enumerate(EMOTIONS)}
LABELS |= {"happiness": LABELS["happy"], "sadness": LABELS["sad"], "anger": LABELS["angry"]}
LABEL_HELP = "0..6 or " + ", ".join(EMOTIONS)

# By default swscale repeats chroma samples and truncates: 10-bit colours come out up to 3 levels too dark.
EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
# Signs of a, b, c, d in a display matrix (x' = ax + cy, y' = bx + dy, y pointing down) -> what makes a frame upright.
UPRIGHT = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # counter-clockwise, as all of Pillow's: a phone held upright
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Video:
    """One video to prepare."""

    path: Path
    name: str  # of its frame folder below DIR/frames, unique
    label: int


class BadVideo(Exception):
    """A video that cannot be used; the message says why."""


def parse_label(text: str) -> int:
    """Label of an id or an emotion word."""
    if text.isdecimal() and int(text) < len(EMOTIONS):
        return int(text)
    if text.casefold() not in LABELS:
        raise ValueError(f"{text!r} is no label: {LABEL_HELP}")
    return LABELS[text.casefold()]


def read_list(list_path: Path) -> list[tuple[Path, int]]:
    """Path and label from rows of `path label` or `path,label`, split from the right; paths start at the list."""
    try:
        lines = list_path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{list_path}: cannot be read as a list of videos ({error})") from None
    rows = []
    for row, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        fields = re.fullmatch(r"(.+?)(?:\s*,\s*|\s+)([^\s,]+)", line)
        if fields is None:
            raise ValueError(f"{list_path}:{row}: expected 'path label', got {line!r}")
        try:
            rows.append((list_path.parent / fields[1], parse_label(fields[2])))
        except ValueError as error:
            raise ValueError(f"{list_path}:{row}: {error}") from None
    return rows


def find_videos(source: Path, label: int | None) -> list[Video]:
    """The videos of a folder, a list or a single file, in natural order; `label` is for those that have no other.

    Raises:
        ValueError: in one line, if there are none, or one has no label.
    """
    labelled: Sequence[tuple[Path, int | None]]
    if source.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names]
        # Names with a leading dot are what macOS leaves on foreign disks, next to each real file.
        found = [path for path in found if VIDEO_SUFFIX.fullmatch(path.suffix) and path.name[0] != "."]
        found.sort(key=lambda path: natural_key(path.relative_to(source).as_posix()))
        labelled = [(path, LABELS.get(path.relative_to(source).parts[0].casefold(), label)) for path in found]
    elif source.suffix.lower() in (".txt", ".csv"):
        labelled = read_list(source)
    elif source.exists():
        labelled = [(source, label)]
    else:
        raise ValueError(f"{source}: no such folder, video or list")
    if not labelled:
        raise ValueError(f"{source}: no videos in it")
    names = frame_folders([path for path, _ in labelled], source if source.is_dir() else source.parent)
    videos = []
    for (path, own), name in zip(labelled, names, strict=True):
        if own is None:
            raise ValueError(
                f"{path}: no label; put it in a folder named after its emotion ({', '.join(EMOTIONS)}), "
                "give a .txt list of 'path label' rows, or give --label for all such videos"
            )
        videos.append(Video(path, name, own))
    return videos


def frame_folders(paths: Sequence[Path], base: Path) -> list[str]:
    """A folder name for each video: its path without suffix, unique on any disk and safe in a row of a list."""
    names: list[str] = []
    taken = set()
    for path in paths:
        stem, _ = os.path.splitext(os.path.relpath(path, base))
        printable = ("".join(c if c.isprintable() else "_" for c in part) for part in Path(stem).parts if part != "..")
        name = unique = "/".join(part.strip(" .") or "_" for part in printable)
        number = 1
        while unique.casefold() in taken:  # a.mp4 beside a.avi, or A.mp4 where the disk ignores case
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names


def decode(path: Path) -> Iterator[Image.Image]:
    """All frames of a video in presentation order: upright, RGB by the matrix and range that the stream states.

    A stream that states no matrix is taken for BT.601, as the ffmpeg program does.

    Raises:
        BadVideo, av.FFmpegError: if there is nothing to decode or the video is truncated or damaged, which may show
            only after its last good frame.
    """
    # Absolute, as FFmpeg takes "a:b.mp4" for a protocol; old files have tags that are not UTF-8.
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        video = container.streams.best("video")
        if video is None:
            raise BadVideo("no video stream")
        if video.codec_context is not None:  # else there is no decoder, which decode() says
            video.codec_context.thread_count = 1  # the workers are the parallelism
        rgb = VideoReformatter()
        streams = [video, *container.streams.audio]
        ends = {stream.index: 0.0 for stream in streams}  # seconds
        num_frames = 0
        for packet in container.demux(streams):
            if packet.is_corrupt:
                raise BadVideo("truncated or damaged")
            index = packet.stream.index
            if packet.pts is not None:
                ends[index] = max(ends[index], float((packet.pts + (packet.duration or 0)) * packet.time_base))
            for frame in packet.decode() if index == video.index else ():
                if frame.is_corrupt:  # FFmpeg has patched over missing data
                    raise BadVideo("damaged")
                pixels = rgb.reformat(frame, format="rgb24", interpolation=EXACT, threads=1).to_ndarray()
                yield _upright(Image.fromarray(pixels), frame.side_data.get(Type.DISPLAYMATRIX))
                num_frames += 1
        if not num_frames:
            raise BadVideo("no frames")
        # Matroska, and any file cut between two packets, just stops, and only the header tells. Either track may be the
        # longer one; a video that reaches its own stated end is whole whatever the container's says.
        slack = 0.1 + 2 / float(video.average_rate or 25)
        short = container.duration and max(ends.values()) < _end(container, 1 / av.time_base) - slack
        if short and (video.duration is None or ends[video.index] < _end(video, video.time_base) - slack):
            raise BadVideo("truncated")


def _end(timed: av.container.InputContainer | av.VideoStream, unit: float) -> float:
    return float(((timed.start_time or 0) + timed.duration) * unit)


def _upright(image: Image.Image, matrix: SideData | None) -> Image.Image:
    """Turn a frame as the stream says. VideoFrame.rotation will not do: it takes mirrored for upside down."""
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # 16.16 fixed point
    turn = UPRIGHT.get(tuple((x > 2**15) - (x < -(2**15)) for x in (a, b, c, d)))
    return image if turn is None else image.transpose(turn)


def _remove_frames(folder: Path) -> None:
    for frame in folder.glob("*.jpg"):
        frame.unlink()


def write_clips(
    job: tuple[int, Video], out: Path, clip_length: int | None, quality: int
) -> tuple[int, dict[str, int], str | None]:
    """Worker: write a video's frames. Its number, the frames in each clip folder, and why it failed, if it did."""
    number, video = job
    clips: dict[str, int] = {}
    name, reason = "", None
    try:
        for index, image in enumerate(decode(video.path)):
            if index % (clip_length or sys.maxsize) == 0:
                name = f"frames/{video.name}" + (f"_c{len(clips) + 1:03d}" if clip_length else "")
                clips[name] = 0
                (out / name).mkdir(parents=True, exist_ok=True)
                _remove_frames(out / name)  # of an earlier run, maybe a longer clip's
            clips[name] += 1
            image.save(out / name / f"{clips[name]:05d}.jpg", quality=quality)
    except (av.FFmpegError, BadVideo) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if clips:
            reason += f", after {sum(clips.values())} frames"
    unwanted = list(clips) if reason else []
    if clip_length and len(clips) > 1 and 2 * clips[name] < clip_length and not reason:
        unwanted = [name]  # the remainder is too short to be a clip
    for dropped in unwanted:
        del clips[dropped]
        _remove_frames(out / dropped)
        with contextlib.suppress(OSError):  # not empty: another video's folder lies in it
            (out / dropped).rmdir()
    return number, clips, reason


def prepare(
    videos: Sequence[Video], out: Path, clip_length: int | None = None, quality: int = 92, workers: int = 1
) -> tuple[list[int], list[tuple[Video, str]]]:
    """Write the frames of all videos, then the list (atomically: a half-done run is never taken for a finished one).

    Returns:
        The number of frames of each clip written, and the videos that failed with their reasons.
    """
    list_path = out / "list.txt"
    (out / "frames").mkdir(parents=True, exist_ok=True)
    list_path.unlink(missing_ok=True)
    work = functools.partial(write_clips, out=out, clip_length=clip_length, quality=quality)
    done = {}
    with contextlib.ExitStack() as stack:
        results = map(work, enumerate(videos))
        if workers > 1:  # spawned, as forking a process that has threads is unsafe
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(workers, len(videos))))
            results = pool.imap_unordered(work, enumerate(videos))
        if terminal := sys.stdout.isatty():
            from rich.progress import MofNCompleteColumn, Progress

            progress = stack.enter_context(Progress(*Progress.get_default_columns(), MofNCompleteColumn()))
            results = progress.track(results, total=len(videos), description="videos")
        for number, clips, reason in results:
            done[number] = clips, reason
            if not terminal and len(done) * 10 // len(videos) > (len(done) - 1) * 10 // len(videos):
                print(f"{len(done)}/{len(videos)} videos", flush=True)
    rows, counts, failures = [], [], []
    for number, video in enumerate(videos):
        clips, reason = done[number]
        counts += clips.values()
        rows += [f"{name} {num_frames} {video.label}\n" for name, num_frames in clips.items()]
        if reason:
            failures.append((video, reason))
    if rows:
        part = list_path.with_suffix(".tmp")
        part.write_text("".join(rows), encoding="utf-8")
        os.replace(part, list_path)
    return counts, failures


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"prepare_videos: {message}\n")  # one line, without the usage


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")

    return parse


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="folder of videos, a video, or a .txt/.csv list of 'path label' rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write frames/ and list.txt to")
    parser.add_argument(
        "--clip-length",
        type=_whole_number(1, 10**6),
        metavar="N",
        help="cut each video into clips of N frames; a last one below N/2 is left out (default: a clip per video)",
    )
    parser.add_argument("--label", help=f"of videos without a class folder: {LABEL_HELP}")
    parser.add_argument("--quality", type=_whole_number(1, 100), default=92, help="of the JPEG images (default: 92)")
    parser.add_argument("--workers", type=_whole_number(1, 512), default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(arguments)
    list_path = args.out / "list.txt"
    if args.input.resolve() == list_path.resolve():
        parser.error(f"--out {args.out}: the list of videos would be overwritten with the list of frames")
    try:
        videos = find_videos(args.input, None if args.label is None else parse_label(args.label))
    except ValueError as error:
        parser.error(str(error))
    try:
        counts, failures = prepare(videos, args.out, args.clip_length, args.quality, args.workers)
    except OSError as error:
        parser.error(f"cannot write: {error}")
    if not counts:
        video, reason = failures[0]
        parser.error(f"none of {len(videos)} videos could be read; {video.path}: {reason}")
    for video, reason in failures:
        print(f"prepare_videos: {video.path}: {reason}", file=sys.stderr)
    good = len(videos) - len(failures)
    print(f"train on it: python train.py --data.train-list {shlex.quote(str(list_path))} --data.val-list VAL_LIST")
    print(f"{good:,} of {len(videos):,} videos, {len(counts):,} clips, {sum(counts):,} frames: {list_path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
