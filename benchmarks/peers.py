"""What our loader is measured against: the field's own ways to load clips, and the limits of the machine.

Every peer is written as a good engineer would who uses that library: one endless pass over the epochs, so that no
worker is ever restarted; one thread in each worker; frames that are not asked for are not decoded where the library
allows it. The Pillow one alone is kept as the field has it. All take the same plan as our loader: the same videos,
frames, crops and mirrors. Colours are drawn with the same strength: exactly ours in the cv2 tail, torchvision's
definition of brightness, contrast and saturation in the others.

A limit does only what no loader can leave out: to decode, copy or read. It yields numbers of clips instead of clips.
"""

import functools
import itertools
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dfer.images import natural_key
from dfer.lists.annotations import read_annotations
from dfer.lists.index import ClipIndex, load_index
from dfer.plan.sampling import ClipSampler, EpochPlan
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD

LIBRARIES = ("decord", "torchcodec", "webdataset", "simplejpeg", "spdl", "grain", "litdata", "streaming", "ffcv")
MEAN, STD = IMAGENET_MEAN.tolist(), IMAGENET_STD.tolist()


@dataclass(frozen=True)
class Task:
    """What every design is asked for: (batch_size, T, 3, size, size) float32 on `device`, endlessly."""

    folder: Path  # frames.txt, the list of frame folders, and one folder for each way that the same clips are packed
    sampler: ClipSampler
    batch_size: int
    size: int
    workers: int  # processes or threads
    device: Literal["cpu", "gpu"]
    stem: str = "frames"  # of the lists, one in each folder

    @functools.cached_property
    def index(self) -> ClipIndex:
        return load_index(self.list_of("frames"))

    def folder_of(self, source: str) -> Path:
        return self.folder if source == "frames" else self.folder / source

    def list_of(self, source: str) -> Path:
        return self.folder_of(source) / f"{self.stem}.txt"


class Cut(NamedTuple):
    """What a plan says of one clip."""

    frames: np.ndarray  # (T,) int64
    box: np.ndarray  # (4,) top, left, height, width as shares of the frame
    mirror: bool
    matrix: np.ndarray  # (3, 4) float32: our colour and normalisation
    factors: tuple[float, float, float]  # brightness, contrast, saturation for torchvision's definition

    def pixels(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the crop as top, left, height, width in pixels of a frame, rounded as our loader does."""
        top, rows = pixels_of(self.box[0], self.box[2], height)
        left, columns = pixels_of(self.box[1], self.box[3], width)
        return top, left, rows, columns


def pixels_of(start: float, length: float, size: int) -> tuple[int, int]:
    """Return the first pixel and the number of pixels of a part of a side, by DALI's rule: half a pixel goes up."""
    start, length = float(np.float32(start)), float(np.float32(length))
    first = min(math.floor(start * size + 0.5), size - 1)
    return first, max(min(math.floor((start + length) * size + 0.5), size) - first, 1)


class Cuts:
    """The cuts of all epochs; the plan of an epoch is made once in each process."""

    def __init__(self, task: Task):
        self._sampler, self._num_frames = task.sampler, task.index.num_frames
        self._epoch, self._plan = -1, None

    def plan(self, epoch: int) -> EpochPlan:
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._sampler.plan(epoch, self._num_frames)
        return self._plan

    def cut(self, epoch: int, video: int) -> Cut:
        plan, colour = self.plan(epoch), self._sampler.augmentation.colour
        factors = np.random.default_rng((epoch, video)).uniform(1 - colour, 1 + colour, 3)
        return Cut(plan.frames[video], plan.box[video], bool(plan.mirror[video]), plan.colour[video], tuple(factors))


# ---- From decoded frames, a row of (H, W, 3) uint8 RGB arrays or Pillow images, to a (T, S, S, 3) float32 clip.


def pil_tail(images: Iterable, cut: Cut, size: int) -> Tensor:
    """The field's transforms: Pillow and torchvision, frame by frame, the same draw for all frames of the clip."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    frames = []
    for image in images:
        image = F.resized_crop(image, *cut.pixels(image.height, image.width), [size, size], InterpolationMode.BILINEAR)
        if cut.mirror:
            image = F.hflip(image)
        for adjust, factor in zip(
            (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), cut.factors, strict=True
        ):
            image = adjust(image, factor)
        frames.append(F.normalize(F.to_tensor(image), MEAN, STD))
    return torch.stack(frames).permute(0, 2, 3, 1)


def v2_tail(images: Iterable, cut: Cut, size: int) -> Tensor:
    """torchvision's v2 transforms on the whole clip.

    Converted to float before the colours and kept in rows-columns-channels order: 8 ms a clip, where uint8 takes 22 and
    planes 15.
    """
    from torchvision.transforms.v2 import functional as F

    clip = images if isinstance(images, np.ndarray) else np.stack(images)  # (T, H, W, 3)
    clip = torch.from_numpy(clip).permute(0, 3, 1, 2)
    clip = F.resized_crop(clip, *cut.pixels(*clip.shape[2:]), [size, size], antialias=True)
    if cut.mirror:
        clip = F.horizontal_flip(clip)
    clip = F.to_dtype(clip, torch.float32, scale=True)
    for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), cut.factors, strict=True):
        clip = adjust(clip, factor)
    return F.normalize(clip, MEAN, STD).permute(0, 2, 3, 1)


def cv2_tail(images: Iterable, cut: Cut, size: int) -> Tensor:
    """OpenCV: linear interpolation without antialiasing, then colours and normalisation as one affine map."""
    import cv2

    clip = np.empty((len(cut.frames), size, size, 3), dtype=np.float32)
    for image, target in zip(images, clip, strict=True):
        top, left, height, width = cut.pixels(*image.shape[:2])
        image = cv2.resize(image[top : top + height, left : left + width], (size, size))
        if cut.mirror:
            image = cv2.flip(image, 1)
        cv2.transform(image.astype(np.float32), cut.matrix, dst=target)
    return torch.from_numpy(clip)


# ---- From (video, frames) to decoded frames. Each opens its source once and returns what reads a clip.

Reader = Callable[[int, list[int]], Iterable]


def pil_frames(task: Task, folder: Path) -> Reader:
    from PIL import Image

    records = task.index.records

    def read(video: int, frames: list[int]) -> Iterable:
        path = records[video].path
        names = sorted(os.listdir(path), key=natural_key)  # on every access, as the field does
        return (Image.open(os.path.join(path, names[frame])).convert("RGB") for frame in frames)

    return read


def torchvision_frames(task: Task, folder: Path) -> Reader:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    path = task.index.frame_path

    def read(video: int, frames: list[int]) -> Iterable:
        images = [decode_jpeg(read_file(path(video, frame)), ImageReadMode.RGB) for frame in frames]
        return torch.stack(images).permute(0, 2, 3, 1).numpy()

    return read


def cv2_frames(task: Task, folder: Path) -> Reader:
    import cv2

    path = task.index.frame_path
    return lambda video, frames: (cv2.imread(path(video, frame), cv2.IMREAD_COLOR_RGB) for frame in frames)


def video_paths(task: Task, folder: Path) -> list[str]:
    return [str(record.path) for record in read_annotations(folder / f"{task.stem}.txt")]


def pyav_video(task: Task, folder: Path) -> Reader:
    import av

    paths = video_paths(task, folder)

    def read(video: int, frames: list[int]) -> Iterable:
        images, wanted = {}, set(frames)
        with av.open(paths[video]) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    images[number] = frame.to_ndarray(format="rgb24")
                    if len(images) == len(wanted):
                        break
        return [images[frame] for frame in frames]

    return read


def decord_video(task: Task, folder: Path) -> Reader:
    import decord

    paths = video_paths(task, folder)

    def read(video: int, frames: list[int]) -> Iterable:
        return decord.VideoReader(paths[video], num_threads=1).get_batch(frames).asnumpy()

    return read


def torchcodec_video(task: Task, folder: Path) -> Reader:
    try:
        from torchcodec.decoders import VideoDecoder
    except RuntimeError as error:  # it loads FFmpeg's libraries, for which storage.with_ffmpeg makes links
        raise ImportError("needs FFmpeg's shared libraries: apt-get install ffmpeg", name="torchcodec") from error
    paths = video_paths(task, folder)

    def read(video: int, frames: list[int]) -> Iterable:
        # Of videos of one rate it needs no index, which it would make by reading the whole file.
        decoder = VideoDecoder(paths[video], dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        return decoder.get_frames_at(frames).data.numpy()

    return read


def cv2_video(task: Task, folder: Path) -> Reader:
    import cv2

    paths = video_paths(task, folder)

    def read(video: int, frames: list[int]) -> Iterable:
        images, wanted = {}, set(frames)
        capture = cv2.VideoCapture(paths[video], cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        for number in range(max(frames) + 1):
            if not capture.grab():
                raise ValueError(f"{paths[video]}: OpenCV finds no frame {number}")
            if number in wanted:
                images[number] = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
        capture.release()
        return [images[frame] for frame in frames]

    return read


def numpy_raw(task: Task, folder: Path) -> Reader:
    clips = raw_clips(task, folder)
    return lambda video, frames: clips[video][frames]


# ---- What scripts/pack.py wrote: one .npz file says where the bytes of each frame lie.


class Place(NamedTuple):
    """Where a clip lies."""

    path: Path  # of the shard
    offsets: list[int]  # of each frame, in bytes
    lengths: list[int]
    height: int  # px
    width: int


def places(task: Task, folder: Path) -> list[Place]:
    """Where each clip of the list lies in a pack."""
    with np.load(folder / "frames.npz") as pack:
        names = pack["names"].tobytes().decode().split("\n")
        shards = [folder / name for name in pack["shards"].tolist()]
        first, shard, offset, length = (pack[key].tolist() for key in ("first", "shard", "offset", "length"))
        height, width = pack["height"].tolist(), pack["width"].tolist()
    clip_of = {name: clip for clip, name in enumerate(names)}
    found = []
    for record in task.index.records:
        clip = clip_of[record.name]
        frames = slice(first[clip], first[clip + 1])
        found.append(Place(shards[shard[clip]], offset[frames], length[frames], height[clip], width[clip]))
    return found


def raw_clips(task: Task, folder: Path) -> list[np.ndarray]:
    """The frames of each clip, (N, H, W, 3) uint8, as views of the memory-mapped files."""
    clips, files = [], {}
    for place in places(task, folder):
        if place.path not in files:
            files[place.path] = np.memmap(place.path, dtype=np.uint8, mode="r")
        block = files[place.path][place.offsets[0] :][: sum(place.lengths)]
        clips.append(np.asarray(block).reshape(-1, place.height, place.width, 3))
    return clips


def tar_keys(task: Task, folder: Path) -> dict[str, int]:
    """The video of each key of our tars: as webdataset has it, a member's path up to the first dot of its name.

    Raises:
        ValueError: if the members of a clip do not share a key of their own.
    """
    clips = places(task, folder)
    video_at = {(str(p.path), offset): video for video, p in enumerate(clips) for offset in p.offsets}
    keys: dict[str, int] = {}
    for path in sorted({str(place.path) for place in clips}):
        with tarfile.open(path) as tar:
            for member in tar:
                parent, name = os.path.split(member.name)
                video = video_at.get((path, member.offset_data))
                key = os.path.join(parent, name.partition(".")[0])
                if video is not None and keys.setdefault(key, video) != video:
                    raise ValueError(f"{path}: frames of several clips have the key {key}")
    if len(set(keys.values())) != len(keys) or len(keys) != len(clips):
        raise ValueError(
            f"{folder}: {len(clips)} clips have {len(keys)} keys: webdataset cannot read them clip by clip"
        )
    return keys


def is_frame(extension: str) -> bool:
    return extension.lower().endswith(("jpg", "jpeg", "png"))


# ---- Peers: a reader and a tail in the workers of a torch DataLoader.


class Order:
    """Batches of (epoch, video), epoch after epoch; as in our loader the last, partial batch is dropped."""

    def __init__(self, task: Task):
        self._task = task

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        cuts, batch_size = Cuts(self._task), self._task.batch_size
        for epoch in itertools.count():
            order = cuts.plan(epoch).order.tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield [(epoch, video) for video in order[start : start + batch_size]]


class Clips(Dataset):
    """Clips by (epoch, video) as (T, S, S, 3) float32, as that is what all tails but one can give without a copy."""

    def __init__(self, task: Task, read: Reader, tail: Callable[[Iterable, Cut, int], Tensor]):
        self._cuts, self._read, self._tail, self._size = Cuts(task), read, tail, task.size

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        cut = self._cuts.cut(*key)
        return self._tail(self._read(key[1], cut.frames.tolist()), cut, self._size)


def data_loader(task: Task, dataset: Dataset, **options) -> Iterator[Tensor]:
    """Batches of the workers, on the task's device: (B, T, 3, S, S), channels-last in memory as ours."""
    gpu = task.device == "gpu"
    loader = DataLoader(dataset, num_workers=task.workers, worker_init_fn=one_thread, pin_memory=gpu, **options)
    for batch in loader:
        yield (batch.cuda(non_blocking=True) if gpu else batch).permute(0, 1, 4, 2, 3)


def one_thread(worker: int) -> None:
    """torch gives each worker one thread by itself; OpenCV does not."""
    import cv2

    cv2.setNumThreads(0)


class Shards(IterableDataset):
    """The webdataset library over our tars: sequential reads, a shuffle buffer, only the T frames decoded."""

    def __init__(self, task: Task, folder: Path):
        import webdataset  # noqa: F401 (whether it is installed is found out here, not in a worker)

        self._task, self._cuts = task, Cuts(task)
        self._urls = sorted({str(place.path) for place in places(task, folder)})
        self._video_of = tar_keys(task, folder)

    def __iter__(self) -> Iterator[Tensor]:
        import cv2
        import webdataset as wds

        worker = get_worker_info()
        # Whole tars to each worker, as the library means it, where that is fair; else every worker reads every tar and
        # takes its share of the clips.
        if len(self._urls) % worker.num_workers == 0:
            split = [wds.split_by_worker, wds.tarfile_to_samples()]
        else:
            split = [
                wds.tarfile_to_samples(),
                lambda clips: itertools.islice(clips, worker.id, None, worker.num_workers),
            ]
        for epoch in itertools.count():
            shards = wds.SimpleShardList(self._urls, seed=epoch)
            for sample in wds.DataPipeline(shards, *split, wds.shuffle(64, initial=16, seed=epoch)):
                names = sorted(filter(is_frame, sample), key=natural_key)
                cut = self._cuts.cut(epoch, self._video_of[sample["__key__"]])
                encoded = (np.frombuffer(sample[names[frame]], dtype=np.uint8) for frame in cut.frames.tolist())
                images = (cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) for data in encoded)
                yield cv2_tail(images, cut, self._task.size)


PEERS = {
    "pil-frames": (pil_frames, pil_tail),
    "torchvision-frames": (torchvision_frames, v2_tail),
    "cv2-frames": (cv2_frames, cv2_tail),
    "webdataset-shards224": (Shards, None),
    "webdataset-shards144": (Shards, None),
    "numpy-raw128": (numpy_raw, v2_tail),
    "numpy-cv2-raw128": (numpy_raw, cv2_tail),
    "pyav-video": (pyav_video, v2_tail),
    "pyav-cv2-video": (pyav_video, cv2_tail),
    "decord-video": (decord_video, v2_tail),
    "decord-cv2-video": (decord_video, cv2_tail),
    "torchcodec-video": (torchcodec_video, v2_tail),
    "torchcodec-cv2-video": (torchcodec_video, cv2_tail),
    "cv2-video": (cv2_video, cv2_tail),
}


def source_of(design: str) -> str:
    """The way of packing that a design reads: the last word of its name."""
    return design.rsplit("-", 1)[1]


def peer(name: str, task: Task) -> Iterator[Tensor]:
    """The batches of a peer.

    Raises:
        ImportError: if its library is not installed.
    """
    open_source, tail = PEERS[name]
    folder = task.folder_of(source_of(name))
    if open_source is Shards:
        return data_loader(task, Shards(task, folder), batch_size=task.batch_size, drop_last=True)
    return data_loader(task, Clips(task, open_source(task, folder), tail), batch_sampler=Order(task))


# ---- Limits.


class Work(IterableDataset):
    """Does the work of one clip after another, endlessly, and counts them."""

    def __init__(self, task: Task, work: Callable[[int, Cut], object], chunk: int):
        self._task, self._work, self._chunk = task, work, chunk

    def __iter__(self) -> Iterator[int]:
        worker, cuts, done = get_worker_info(), Cuts(self._task), 0
        for epoch in itertools.count():
            for video in cuts.plan(epoch).order[worker.id :: worker.num_workers].tolist():
                self._work(video, cuts.cut(epoch, video))
                done += 1
                if done % self._chunk == 0:
                    yield self._chunk


def in_processes(task: Task, work: Callable[[int, Cut], object], chunk: int = 16) -> Iterator[int]:
    """As many processes as the peers have, which send a number after every `chunk` clips: that costs nothing."""
    return iter(DataLoader(Work(task, work, chunk), batch_size=None, num_workers=task.workers))


def encoded_clips(task: Task, source: str) -> list[list[bytes]]:
    """All encoded frames of a source, in memory."""
    if source == "frames":
        index = task.index
        return [
            [Path(index.frame_path(video, frame)).read_bytes() for frame in range(count)]
            for video, count in enumerate(index.num_frames.tolist())
        ]
    clips = places(task, task.folder / source)
    files = {path: np.memmap(path, dtype=np.uint8, mode="r") for path in {place.path for place in clips}}
    return [
        [files[clip.path][at : at + length].tobytes() for at, length in zip(clip.offsets, clip.lengths, strict=True)]
        for clip in clips
    ]


def limit_jpeg(task: Task, source: str) -> Iterator[int]:
    """libjpeg-turbo decodes the T frames, whole, from memory."""
    import simplejpeg

    clips = encoded_clips(task, source)

    def decode(video: int, cut: Cut) -> None:
        for frame in cut.frames.tolist():
            simplejpeg.decode_jpeg(clips[video][frame])

    return in_processes(task, decode)


def limit_read(task: Task, source: str) -> Iterator[int]:
    """Open and read the T files."""
    path = task.index.frame_path

    def read(video: int, cut: Cut) -> None:
        for frame in cut.frames.tolist():
            with open(path(video, frame), "rb", buffering=0) as file:
                file.read()

    return in_processes(task, read, chunk=64)


def limit_copy(task: Task, source: str) -> Iterator[int]:
    """Copy the T raw frames: in memory, and on to the GPU from pinned memory where that is the device."""
    clips = raw_clips(task, task.folder / source)
    shape = (task.sampler.clip_length, *clips[0].shape[1:])
    if task.device == "cpu":
        target = np.empty(shape, dtype=np.uint8)
        return in_processes(
            task, lambda video, cut: np.take(clips[video], cut.frames, axis=0, out=target, mode="clip"), chunk=256
        )

    def to_gpu() -> Iterator[int]:
        batch = torch.empty((task.batch_size, *shape), dtype=torch.uint8, pin_memory=True)
        while True:
            batch.cuda(non_blocking=True)
            yield task.batch_size

    return to_gpu()


def limit_h264(task: Task, source: str) -> Iterator[int]:
    """FFmpeg decodes what the T frames need, and converts nothing."""
    from benchmarks.video_cost import decode_needed  # which measures peers too

    index = load_index(task.list_of(source))
    first, pts = index.store.first, index.store.pts

    def decode(video: int, cut: Cut) -> None:
        decode_needed(index.records[video].path, set(pts[first[video] + cut.frames].tolist()))

    return in_processes(task, decode)


def limit_nvjpeg(task: Task, source: str, hw_decoder_load: float) -> Iterator[int]:
    """DALI's mixed decoder alone on the T frames, whole, from memory; that share of them on the hardware decoder."""
    clips = encoded_clips(task, source)
    arrays = [[np.frombuffer(frame, dtype=np.uint8) for frame in clip] for clip in clips]

    def batches() -> Iterator[list[np.ndarray]]:
        cuts = Cuts(task)
        for keys in Order(task):
            yield [arrays[v][frame] for epoch, v in keys for frame in cuts.cut(epoch, v).frames.tolist()]

    def decode(encoded: object, fn: object) -> object:
        return fn.decoders.image(
            encoded,
            device="mixed",
            hw_decoder_load=hw_decoder_load,
            preallocate_width_hint=224,
            preallocate_height_hint=224,
        )

    return dali_alone(task, batches(), task.batch_size * task.sampler.clip_length, decode)


def limit_nvdec(task: Task, source: str) -> Iterator[int]:
    """DALI's mixed video decoder alone on whole clips from memory."""
    files = [np.fromfile(path, dtype=np.uint8) for path in video_paths(task, task.folder / source)]
    batches = ([files[video] for _, video in keys] for keys in Order(task))
    return dali_alone(task, batches, task.batch_size, lambda encoded, fn: fn.decoders.video(encoded, device="mixed"))


def dali_alone(
    task: Task, batches: Iterator, max_samples: int, decode: Callable[[object, object], object]
) -> Iterator[int]:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    pipeline = Pipeline(max_samples, task.workers, 0, prefetch_queue_depth=2)
    with pipeline:
        encoded = fn.external_source(source=batches, batch=True, no_copy=True)
        pipeline.set_outputs(decode(encoded, fn))
    pipeline.build()

    def clips() -> Iterator[int]:
        while True:
            pipeline.run()
            yield task.batch_size

    return clips()


CPU_LIMITS = {
    "limit-jpeg224": (limit_jpeg, "frames"),
    "limit-jpeg144": (limit_jpeg, "shards144"),
    "limit-memcpy": (limit_copy, "raw128"),
    "limit-h264": (limit_h264, "video"),
    "limit-read": (limit_read, "frames"),
}
GPU_LIMITS = {
    **{
        f"limit-nvjpeg{size}-hw{round(100 * load)}": (functools.partial(limit_nvjpeg, hw_decoder_load=load), source)
        for size, source in ((224, "frames"), (144, "shards144"))
        for load in (0.0, 0.65, 1.0)
    },
    "limit-memcpy": (limit_copy, "raw128"),
    "limit-nvdec": (limit_nvdec, "video"),
    "limit-read": (limit_read, "frames"),
}
# The limits of each source, the highest of which counts.
CPU_LIMITS_OF = {
    "frames": ["limit-jpeg224"],
    "shards224": ["limit-jpeg224"],
    "shards144": ["limit-jpeg144"],
    "raw128": ["limit-memcpy"],
    "video": ["limit-h264"],
}
GPU_LIMITS_OF = {
    "frames": [name for name in GPU_LIMITS if name.startswith("limit-nvjpeg224")],
    "shards224": [name for name in GPU_LIMITS if name.startswith("limit-nvjpeg224")],
    "shards144": [name for name in GPU_LIMITS if name.startswith("limit-nvjpeg144")],
    "raw128": ["limit-memcpy"],
    "video": ["limit-nvdec"],
}
