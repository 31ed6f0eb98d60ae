"""What to predict on: videos and folders of frames, where they are and what is in them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from PIL import Image

from dfer.cli import UserError
from dfer.files import check_visible, reason
from dfer.images import BadImage, decode_image, frame_names, natural_key
from dfer.video.decode import BadVideo, decode
from dfer.video.find import find_video_files, unique_names

ANNOTATED = (".mp4", ".gif")  # suffixes of annotated videos, which must not replace what they are made of

Frames: TypeAlias = Iterator[tuple[float, Image.Image]]  # times in seconds, and pictures
# Wraps the frames of one pass through a video, to show how far it is.
ShowProgress: TypeAlias = Callable[[Frames], Frames]


class InputVideo(NamedTuple):
    path: Path  # a file, or a folder of frames
    name: str  # of what is written, below --out


def read_pictures(path: Path, fps: float, notes: list[str] | None = None) -> Frames:
    """Yield the frames of a video as `decode` does, with its `notes`; of a folder its images, `fps` of them a second.

    Raises:
        BadVideo, av.FFmpegError, OSError: as `decode`, or if an image cannot be read, is too large or damaged.
    """
    if not path.is_dir():
        yield from decode(path, notes=notes)
        return
    for number, name in enumerate(frame_names(path)):
        try:
            image = decode_image(path / name)
        except (BadImage, OSError) as error:
            raise BadVideo(f"frame {name}: {reason(error)}") from None
        yield number / fps, image


def find_videos(clips: Sequence[Path], out: Path, warn: Callable[[str], None]) -> list[InputVideo]:
    """Return the videos of files and folders, each once, in natural order.

    Args:
        clips: videos, folders of videos, folders of frames.
        out: where results will be written; those of an earlier call, if in one of the folders, are not returned.
        warn: called with one line for each folder that was not searched.

    Raises:
        UserError: if there are none, or a result would take the place of a video or lie among frames.
    """
    paths: list[Path] = []
    names: list[str] = []
    for clip in clips:
        check_visible(clip)
        if not clip.exists():
            raise UserError(f"{clip}: no such video or folder")
        if not clip.is_dir():
            paths.append(clip)
            names.append(clip.name)
            continue
        found = find_video_files(clip, warn)
        own = out.resolve()
        if own != clip.resolve():
            found = [path for path in found if not path.resolve().is_relative_to(own)]
        found.sort(key=lambda path: natural_key(path.relative_to(clip).as_posix()))
        paths += found
        names += [path.relative_to(clip).as_posix() for path in found]
        if not found:
            _check_frames(clip)
            paths.append(clip)
            names.append(f"{clip.resolve().name}.")  # its last dot begins no suffix
    # Of a video that is named twice the first mention counts.
    distinct = {path.resolve(): (path, name) for path, name in zip(reversed(paths), reversed(names), strict=True)}
    paths, names = (list(column) for column in zip(*reversed(distinct.values()), strict=True))
    videos = [InputVideo(path, name) for path, name in zip(paths, unique_names(names), strict=True)]
    _check_results(videos, out)
    return videos


def _check_frames(folder: Path) -> None:
    """Raise UserError if a folder without videos has no frames either."""
    try:
        if not frame_names(folder):
            raise UserError(f"{folder}: no videos in it, and no JPEG or PNG frames")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)})") from None


def _check_results(videos: Sequence[InputVideo], out: Path) -> None:
    """Raise UserError if a result would take the place of one of the videos or lie among frames."""
    inputs = {video.path.resolve() for video in videos}
    for video in videos:
        for suffix in ANNOTATED:
            if Path(f"{out / video.name}{suffix}").resolve() in inputs:
                raise UserError(
                    f"--out {out}: {video.name}{suffix} lies there and would be overwritten; choose another folder"
                )
        if (out / video.name).parent.resolve() in inputs:
            raise UserError(f"--out {out}: the results would lie among the frames; choose another folder")
