"""Peers that are more than a torch DataLoader: threads that read ahead, and the loaders of other libraries.

All take the same plan as our loader: videos, frames, boxes, mirrors and colours. Each does what a good engineer does
with that library. All decode and resize with the quickest there is: simplejpeg, which is libjpeg-turbo, and OpenCV,
whose linear resize does not antialias and so does less than ours. Where a peer does less or more, its note says so.
Libraries with a format of their own store the videos of our packs in it, once.
"""

import itertools
import mmap
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers import (
    PEERS,
    Cut,
    Cuts,
    Order,
    Task,
    cv2_video,
    one_thread,
    places,
    raw_clips,
    source_of,
    torchcodec_video,
)

ROOT = Path(__file__).resolve().parents[1]
STREAMING = ROOT / ".venv-streaming"  # a copy of the library with the pins that clash with ours: `make bench-peers`
AHEAD = 2  # batches that are begun while one is waited for

Frames = Callable[[int, list[int]], list[np.ndarray]]  # (video, frames) -> decoded frames, (H, W, 3) uint8
Open = Callable[[Task, Path], Callable[[int, list[int]], Any]]  # opens a folder, for `Frames` or the like
# Writes the clip of (epoch, video) to a (T, S, S, 3) float32 array.
Fill = Callable[[tuple[int, int], np.ndarray], None]


# ---- Reading, decoding and resizing, as all of them do it. Nothing here holds the GIL for long.


def decoded(encoded: Callable[[int, int], bytes | memoryview]) -> Frames:
    import simplejpeg

    return lambda video, frames: [simplejpeg.decode_jpeg(encoded(video, frame)) for frame in frames]


def frames_of(task: Task, source: str) -> Frames:
    """What reads the frames of a source: files, views of the mapped files of a pack, or of videos OpenCV."""
    if source == "video":
        return cv2_video(task, task.folder / source)
    if source == "raw128":
        raw = raw_clips(task, task.folder / source)
        return lambda video, frames: [raw[video][frame] for frame in frames]
    if source == "frames":
        path = task.index.frame_path

        def read(video: int, frame: int) -> bytes:
            file = os.open(path(video, frame), os.O_RDONLY)
            try:
                return os.read(file, os.fstat(file).st_size)
            finally:
                os.close(file)

        return decoded(read)
    clips = places(task, task.folder / source)
    maps = {}
    for name in {place.path for place in clips}:
        with open(name, "rb") as file:
            maps[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def view(video: int, frame: int) -> memoryview:
        clip = clips[video]
        return maps[clip.path][clip.offsets[frame] :][: clip.lengths[frame]]

    return decoded(view)


def write_clip(images: Sequence[np.ndarray], cut: Cut, out: np.ndarray, antialias: bool) -> None:
    """Crop, resize, mirror and colour with OpenCV."""
    import cv2

    size = out.shape[1]
    small = np.empty((size, size, 3), np.uint8)
    for image, target in zip(images, out, strict=True):
        top, left, height, width = cut.pixels(*image.shape[:2])
        # Antialiased where a side shrinks; enlarged by areas, pixels would become squares.
        shrinks = antialias and min(height, width) > size
        cv2.resize(
            image[top : top + height, left : left + width],
            (size, size),
            dst=small,
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )
        cv2.transform((cv2.flip(small, 1) if cut.mirror else small).astype(np.float32), cut.matrix, dst=target)


def clip_maker(task: Task, source: str, antialias: bool = False, reader: Open | None = None) -> Fill:
    import cv2

    cv2.setNumThreads(0)
    read = frames_of(task, source) if reader is None else reader(task, task.folder / source)
    cuts = Cuts(task)

    def fill(key: tuple[int, int], out: np.ndarray) -> None:
        cut = cuts.cut(*key)
        write_clip(read(key[1], cut.frames.tolist()), cut, out, antialias)

    return fill


def new_clip(task: Task, clips: int | None = None) -> np.ndarray:
    shape = (task.sampler.clip_length, task.size, task.size, 3)
    return np.empty(shape if clips is None else (clips, *shape), np.float32)


def handed_over(batch: np.ndarray | Tensor, task: Task) -> Tensor:
    """(B, T, 3, S, S) on the task's device, channels-last in memory as ours."""
    clips = batch if isinstance(batch, Tensor) else torch.from_numpy(batch)
    return (clips.pin_memory().cuda(non_blocking=True) if task.device == "gpu" else clips).permute(0, 1, 4, 2, 3)


# ---- The loaders.


def threads(task: Task, source: str, antialias: bool = False, reader: Open | None = None) -> Iterator[Tensor]:
    """Python threads, a clip each, which write into batches that are used again: the best simple way."""
    fill = clip_maker(task, source, antialias, reader)
    buffers = itertools.cycle([new_clip(task, task.batch_size) for _ in range(AHEAD + 2)])

    def batches() -> Iterator[Tensor]:
        begun: deque = deque()
        with ThreadPoolExecutor(task.workers) as pool:
            for keys in Order(task):
                batch = next(buffers)
                begun.append((batch, [pool.submit(fill, key, out) for key, out in zip(keys, batch, strict=True)]))
                if len(begun) > AHEAD:
                    batch, jobs = begun.popleft()
                    for job in jobs:
                        job.result()
                    yield handed_over(batch, task)

    return batches()


def spdl(task: Task, source: str) -> Iterator[Tensor]:
    """SPDL: a pipeline of stages on its threads, in the order of the plan."""
    from spdl.pipeline import PipelineBuilder

    fill = clip_maker(task, source)

    def clip(key: tuple[int, int]) -> np.ndarray:
        out = new_clip(task)
        fill(key, out)
        return out

    builder = PipelineBuilder().add_source(itertools.chain.from_iterable(Order(task)))
    builder = builder.pipe(clip, concurrency=task.workers, output_order="input").aggregate(task.batch_size)
    pipeline = builder.pipe(np.stack).add_sink(AHEAD).build(num_threads=task.workers + 1)

    def batches() -> Iterator[Tensor]:
        with pipeline.auto_stop():
            for batch in pipeline:
                yield handed_over(batch, task)

    return batches()


class Endless:
    """The clips of all epochs, one after another, as grain wants them: with a length, by number."""

    def __init__(self, task: Task, source: str):
        self._task, self._fill, self._plans = task, clip_maker(task, source), Cuts(task)
        self._per_epoch = len(task.index) // task.batch_size * task.batch_size

    def __len__(self) -> int:
        return self._per_epoch * 10**6

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self._per_epoch)
        out = new_clip(self._task)
        self._fill((epoch, int(self._plans.plan(epoch).order[place])), out)
        return out


def grain(task: Task, source: str) -> Iterator[Tensor]:
    """grain: its threads make a batch each."""
    import grain

    options = grain.ReadOptions(num_threads=task.workers, prefetch_buffer_size=task.workers + AHEAD)
    batches = grain.MapDataset.source(Endless(task, source)).batch(task.batch_size).to_iter_dataset(options)
    return (handed_over(batch, task) for batch in batches)


# ---- Libraries with a format of their own: a sample is a video, all of its frames one after another.


@dataclass(frozen=True)
class Sampled:
    """Makes a clip of a stored video, in a worker that goes through its share of the data again and again."""

    task: Task
    cuts: Cuts
    raw: bool

    def __post_init__(self):
        import simplejpeg  # noqa: F401 (whether it is installed is found out here, not in a worker)

    def clip(self, epoch: int, video: int, data: bytes, lengths: np.ndarray) -> Tensor:
        import simplejpeg

        cut, ends = self.cuts.cut(epoch, video), np.cumsum(lengths).tolist()
        parts = [memoryview(data)[ends[f] - int(lengths[f]) : ends[f]] for f in cut.frames.tolist()]
        if self.raw:
            side = round((int(lengths[0]) / 3) ** 0.5)
            images = [np.frombuffer(part, np.uint8).reshape(side, side, 3) for part in parts]
        else:
            images = [simplejpeg.decode_jpeg(part) for part in parts]
        out = new_clip(self.task)
        write_clip(images, cut, out, antialias=False)
        return torch.from_numpy(out)


def stored_videos(task: Task, source: str) -> Iterator[dict]:
    """Each video of a pack as a sample: its number, the bytes of its frames, and their lengths."""
    for video, place in enumerate(places(task, task.folder / source)):
        with open(place.path, "rb") as file:
            frames = []
            for offset, length in zip(place.offsets, place.lengths, strict=True):
                file.seek(offset)
                frames.append(file.read(length))
        yield {"video": video, "frames": b"".join(frames), "lengths": np.array(place.lengths, np.int32)}


def converted(task: Task, library: str, source: str, write: Callable[[Iterator[dict], str], None]) -> str:
    """Return the folder of a library's copy of a pack, which is made once."""
    folder = task.folder / f"{source}-{library}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write(stored_videos(task, source), str(partial))
        os.replace(partial, folder)
    return str(folder)


def clips_of(stored_videos: Any, task: Task, source: str) -> Any:
    """A library's data set of whole videos as one of clips, of a pass after the other."""

    class Clips(stored_videos):
        def __init__(self, **options):
            super().__init__(**options)
            self.made, self.passes = Sampled(task, Cuts(task), source == "raw128"), -1

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

        def __getitem__(self, index):
            stored = super().__getitem__(index)
            return self.made.clip(self.passes, int(stored["video"]), stored["frames"], np.asarray(stored["lengths"]))

    return Clips


def litdata(task: Task, source: str) -> Iterator[Tensor]:
    """litdata: chunks that are shuffled as it shuffles them; workers that live on."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    def write(videos: Iterator[dict], folder: str) -> None:
        os.makedirs(folder)
        writer = BinaryWriter(folder, chunk_bytes="64MB")
        for number, video in enumerate(videos):
            writer[number] = video
        writer.done()
        writer.merge(1)

    data = clips_of(StreamingDataset, task, source)(
        input_dir=converted(task, "litdata", source, write), shuffle=True, drop_last=True
    )
    loader = StreamingDataLoader(
        data, batch_size=task.batch_size, num_workers=task.workers, persistent_workers=True, worker_init_fn=one_thread
    )
    return (handed_over(batch, task) for _ in itertools.count() for batch in loader if len(batch) == task.batch_size)


def streaming(task: Task, source: str) -> Iterator[Tensor]:
    """mosaicml-streaming: MDS shards that are shuffled as it shuffles them; workers that live on."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    def write(videos: Iterator[dict], folder: str) -> None:
        columns = {"video": "int", "frames": "bytes", "lengths": "ndarray:int32"}
        with MDSWriter(out=folder, columns=columns) as writer:
            for video in videos:
                writer.write(video)

    clean_stale_shared_memory()
    data = clips_of(StreamingDataset, task, source)(
        local=converted(task, "streaming", source, write), shuffle=True, batch_size=task.batch_size
    )
    loader = DataLoader(
        data,
        batch_size=task.batch_size,
        num_workers=task.workers,
        persistent_workers=True,
        drop_last=True,
        worker_init_fn=one_thread,
    )
    return (handed_over(batch, task) for _ in itertools.count() for batch in loader)


def ffcv(task: Task, source: str) -> Iterator[Tensor]:
    """FFCV has no wheel, and its samples are single images of which one resize without antialiasing is made."""
    raise ImportError(
        "needs a compiler and the headers of OpenCV and libjpeg-turbo, which its package is built with; not measured",
        name="ffcv",
    )


@dataclass(frozen=True)
class Engine:
    """A peer's way to load, and what it does otherwise than ours."""

    batches: Callable[[Task, str], Iterator[Tensor]]
    note: str = "no antialias"
    home: Path | None = None  # of its environment, if its pins clash with ours

    @property
    def stores(self) -> bool:
        """Whether it reads a copy of the data in a format of its own."""
        return self.batches in (litdata, streaming)


WHOLE = "no antialias; reads whole videos"
ENGINES = {
    "threads-frames": Engine(threads),
    "threads-shards224": Engine(threads),
    "threads-shards144": Engine(threads),
    "threads-raw128": Engine(threads),
    "threads-video": Engine(threads),
    "threads-torchcodec-video": Engine(lambda task, source: threads(task, source, reader=torchcodec_video)),
    "threads-area-frames": Engine(lambda task, source: threads(task, source, antialias=True), "areas, not triangles"),
    "spdl-frames": Engine(spdl),
    "spdl-shards144": Engine(spdl),
    "spdl-raw128": Engine(spdl),
    "grain-frames": Engine(grain),
    "grain-shards144": Engine(grain),
    "grain-raw128": Engine(grain),
    "litdata-shards144": Engine(litdata, WHOLE),
    "litdata-raw128": Engine(litdata, WHOLE),
    "streaming-shards144": Engine(streaming, WHOLE, STREAMING),
    "streaming-raw128": Engine(streaming, WHOLE, STREAMING),
    "ffcv-shards144": Engine(ffcv),
}
ALL_PEERS = (*PEERS, *ENGINES)


def interpreter(design: str) -> str:
    """Return the Python that has the library of a design.

    Raises:
        ValueError: if its environment is missing.
    """
    home = ENGINES[design].home if design in ENGINES else None
    if home is None:
        return sys.executable
    if not (home / "bin" / "python").exists():
        raise ValueError(f"not installed: {home.name} is missing: make bench-peers")
    return str(home / "bin" / "python")


def note_of(design: str) -> str:
    """Return what a peer does otherwise than ours."""
    if design in ENGINES:
        return ENGINES[design].note
    tail = PEERS[design][1] if design in PEERS else None
    return "no antialias" if design.startswith("webdataset") or getattr(tail, "__name__", "") == "cv2_tail" else ""


def open_engine(name: str, task: Task) -> Iterator[Tensor]:
    """The batches of a peer.

    Raises:
        ImportError: if its library is not installed.
    """
    return ENGINES[name].batches(task, source_of(name))
