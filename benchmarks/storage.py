"""The benchmark's data: the same clips in every kind of storage, made once."""

import ctypes
import hashlib
import importlib.util
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dfer.cli import printable
from dfer.lists.annotations import read_annotations, write_annotations
from dfer.lists.index import build_index, load_index

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("frames", "shards224", "shards144", "raw128", "video")
PACK = {
    "shards224": ["--format", "shards"],
    "shards144": ["--format", "shards", "--size", "144"],
    "raw128": ["--format", "raw", "--size", "128"],
}


def with_ffmpeg(cache: Path) -> dict[str, str]:
    """The environment, in which torchcodec finds FFmpeg's libraries: those of PyAV, by links of the names it asks for.

    PyAV's names are libavcodec-5e6b81c2.so.62.28.102, wanted is libavcodec.so.62. Nothing changes without PyAV.
    """
    spec = importlib.util.find_spec("av")
    libraries = Path(spec.origin).parents[1] / "av.libs" if spec and spec.origin else Path()
    links = (cache / "ffmpeg").absolute()
    links.mkdir(parents=True, exist_ok=True)
    for library in libraries.glob("lib[as][vw]*-*.so.*"):
        link = links / re.sub(r"-[0-9a-f]+\.so\.(\d+).*", r".so.\1", library.name)
        if link.resolve() != library:
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    paths = [str(links), str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def prepare_frames(list_path: Path, root: Path | None, num_clips: int, cache: Path) -> Path:
    """The folder of a list's benchmark data, with frames.txt: `num_clips` rows, evenly spaced over the list.

    Raises:
        ValueError: in one line, if the list cannot be read or a folder of frames is missing.
    """
    records = read_annotations(list_path, root)
    num_clips = min(num_clips, len(records))
    chosen = [records[i * len(records) // num_clips] for i in range(num_clips)]
    paths = "\0".join(os.path.abspath(record.path) for record in chosen)
    folder = cache / f"{list_path.stem}-{len(chosen)}-{hashlib.sha256(os.fsencode(paths)).hexdigest()[:8]}"
    if not (folder / "frames.txt").exists():
        index = build_index(chosen)
        relative = [record for record in chosen if not os.path.isabs(record.name)]
        # A record's path is base / name: where the names start is what stands before the name.
        base = [Path(*r.path.parts[: -len(Path(r.name).parts)]) for r in relative[:1]]
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(r.name, n, r.label) for r, n in zip(chosen, index.num_frames.tolist(), strict=True)]
        write_annotations(folder / "frames.txt", rows, *map(os.path.abspath, base))
    return folder


def prepare(folder: Path, source: str) -> None:
    """Put the clips of frames.txt into another kind of storage, unless it is there already.

    Raises:
        ValueError: in one line, if that fails.
    """
    target = folder / source
    if source == "frames" or (target / "frames.txt").exists():
        return
    print(f"{printable(target)}: made once, from {printable(folder / 'frames.txt')}", file=sys.stderr)
    shutil.rmtree(target, ignore_errors=True)  # what an interrupted run left
    if source == "video":
        encode_videos(folder, target)
        return
    command = ["scripts/pack.py", os.path.abspath(folder / "frames.txt"), "--out", os.path.abspath(target)]
    done = subprocess.run(
        [sys.executable, *command, *PACK[source]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode or not (target / "frames.txt").exists():
        raise ValueError(f"{command[0]} failed: {last_line(done.stderr)}")


def encode_videos(folder: Path, target: Path) -> None:
    """H.264 as people have it: libx264 at its default preset, CRF 18, 25 fps, 224 x 224, yuv420p."""
    import av
    from PIL import Image

    index = load_index(folder / "frames.txt")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    rows = []
    for video, (record, num_frames) in enumerate(zip(index.records, index.num_frames.tolist(), strict=True)):
        path = str(partial / f"{video:05d}.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "18"})
            stream.width = stream.height = 224
            stream.pix_fmt = "yuv420p"
            for frame in range(num_frames):
                image = Image.open(index.frame_path(video, frame)).convert("RGB").resize((224, 224))
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode(None))
        rows.append((Path(path).name, num_frames, record.label))
    write_annotations(partial / "frames.txt", rows)
    os.replace(partial, target)


def files_of(folder: Path, source: str) -> list[str]:
    """The files whose bytes become clips."""
    if source == "frames":
        index = load_index(folder / "frames.txt")
        return [index.frame_path(v, f) for v, count in enumerate(index.num_frames.tolist()) for f in range(count)]
    return [
        str(path)
        for path in sorted((folder / source).rglob("*"))
        if path.is_file() and path.suffix not in (".txt", ".npz")
    ]


def warm(paths: Iterable[str]) -> None:
    """Read the files once, so that they lie in the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def chill(paths: Sequence[str]) -> float:
    """Drop the files from the page cache and return the share of their pages that is still there."""
    os.sync()  # a page that is not yet written stays
    libc = ctypes.CDLL(None, use_errno=True)
    resident = total = 0
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not os.fstat(file.fileno()).st_size:
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                view = np.frombuffer(mapped, dtype=np.uint8)
                pages = np.empty(-(-len(view) // mmap.PAGESIZE), dtype=np.uint8)
                arguments = (
                    ctypes.c_void_p(view.ctypes.data),
                    ctypes.c_size_t(len(view)),
                    ctypes.c_void_p(pages.ctypes.data),
                )
                if libc.mincore(*arguments):
                    raise OSError(ctypes.get_errno(), "mincore", path)
                resident, total = resident + int((pages & 1).sum()), total + len(pages)
                del view  # else the map cannot be closed
    return resident / max(total, 1)


def linked_clips(folder: Path, num_frames: int) -> Path:
    """A folder of 64 clips that are `num_frames` long: hard links to frames of the data, over and over."""
    target = folder / f"clips-of-{num_frames}"
    if not (target / "frames.txt").exists():
        index = load_index(folder / "frames.txt")
        rows = []
        for video in range(min(64, len(index))):
            clip = target / "clips" / f"{video:05d}"
            shutil.rmtree(clip, ignore_errors=True)
            clip.mkdir(parents=True)
            for frame in range(num_frames):
                source = index.frame_path(video, frame % int(index.num_frames[video]))
                try:
                    os.link(os.path.realpath(source), clip / f"{frame:05d}{Path(source).suffix}")
                except OSError as error:
                    raise ValueError(
                        f"cannot link {source} into {clip} ({error.strerror}): put --cache on the disk of the frames"
                    ) from None
            rows.append((f"clips/{clip.name}", num_frames, int(index.labels[video])))
        write_annotations(target / "frames.txt", rows)
    return target


def repeat_list(folder: Path, length: int) -> Path:
    """Beside frames.txt a list of `length` rows, the same ones over and over."""
    lines = (folder / "frames.txt").read_text().splitlines()
    header = [line for line in lines if line.startswith("#") and "sha256:" not in line]
    rows = [line for line in lines if not line.startswith("#")]
    path = folder / f"list-{length}.txt"
    text = "\n".join([*header, *itertools.islice(itertools.cycle(rows), length)])
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"{text}\n")
    os.replace(partial, path)
    return path


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].removeprefix("loader_speed.py: ")
