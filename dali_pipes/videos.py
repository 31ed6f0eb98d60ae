"""Videos on a GPU: NVDEC or the cores decode each, as a rule says by its kind, and a batch may hold both.

What the cores decode is uploaded as it leaves FFmpeg, mostly planar YUV, and becomes a clip on the device by the rules
of kernels.py. All of it runs on any device, which is how it is tested.
"""

import contextlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dali_pipes.feeding import Epoch, Feed, Refused
from dali_pipes.options import LoaderOptions
from dali_pipes.reading import Samples
from dali_pipes.sources import Source
from dali_pipes.video_files import VideoBytes, VideoFiles
from dfer.cli import printable, say_error
from dfer.lists.index import ClipIndex
from dfer.lists.scan import VideoFiles as VideoStore
from dfer.plan.resizing import resize, resize_planar
from dfer.video.decode import VIDEO_ERRORS, plain_pixels
from dfer.video.random_access import PLANAR

# By codec the shortest side in px that a decoder takes. Seen on an H200, but for AV1: that is what NVIDIA states.
Rule: TypeAlias = Mapping[str, int]
NVDEC: Rule = {"h264": 64, "hevc": 144, "vp9": 128, "av1": 128}
DALI_ON_A_CPU: Rule = {"vp8": 1, "vp9": 1, "mjpeg": 1}  # stands in for NVDEC in tests
CORES: Rule = {}  # decode everything
LONGEST = 4096  # px of a side that NVDEC takes of H.264; of others more
PINNED = 2**32  # bytes of page-locked memory for decoded frames, at most
_AT_A_TIME = 8  # batches that have some: read ahead, decoded, uploaded, and as much again by rounding to powers of two
_AT_ONCE = 2**26  # pixels that are floats at a time: 256 MiB, and as much again on the way


class Decoded(NamedTuple):
    """Frames of a clip that were decoded on the cores and are of one shape."""

    pixels: UInt8[Tensor, "n rows W C"]  # as of read_frames; page-locked where they go to a GPU
    places: list[int]  # in the clip, 0 to T - 1


Sample: TypeAlias = UInt8[np.ndarray, " _"] | list[Decoded]  # a file for NVDEC, or what the cores have decoded


def takes(rule: Rule, codec: str, pixels: str, height: int, width: int) -> bool:
    """Return whether a decoder takes a video.

    Args:
        rule: the decoder's.
        codec: FFmpeg's name of it.
        pixels: FFmpeg's name of their format; "" if the video is turned, or HDR.
        height: of a frame in px, as width.
        width: see there.
    """
    least = rule.get(codec)
    return (
        least is not None
        and pixels in PLANAR  # 8 bits, 4:2:0
        and not (height % 2 or width % 2)
        and least <= min(height, width)
        and max(height, width) <= LONGEST
    )


def rule_of(options: LoaderOptions) -> Rule:
    """Return which videos are not for the cores."""
    if options.video_decoder != "nvdec":  # "auto": no card has shown NVDEC to be faster
        return CORES
    return NVDEC if options.device == "gpu" else DALI_ON_A_CPU


class DeviceVideos:
    """Video files as a `VideoFeed` takes them."""

    kind: Literal["videos"] = "videos"

    def __init__(self, index: ClipIndex, options: LoaderOptions):
        assert isinstance(index.store, VideoStore)
        self.index, self.files, self.frames = index, VideoBytes(index), VideoFiles(index)
        self._rule = rule_of(options)
        # Pinned memory is never given back: of clips that are large, batches of it would be most of a machine's.
        self._pinned = PINNED // (options.batch_size * _AT_A_TIME) if options.device == "gpu" else 0
        self._store = index.store
        self._chosen: dict[int, bool] = {}  # video -> whether the rule gives it to NVDEC
        self.refused: set[int] = set()  # by NVDEC all the same: left to the cores

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[Sample]:
        """Return the one sample of a clip.

        Raises:
            BadClip: as of VideoBytes and VideoFiles.
        """
        if self.is_for_nvdec(video):
            return [*self.files.fetch(video, frames)]
        if len(np.unique(frames)) < len(frames):  # some of them several times
            return [self._together(self.frames.fetch(video, frames))]
        memory: list[Tensor] = []

        def allocate(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
            memory.append(self._empty(shape))
            return memory[0].numpy()

        planar = self.frames.planar(video, frames, allocate=allocate)
        if planar is None:
            memory.clear()  # before `others` takes as much: page-locked memory is used again, but never given back
            return [self._together(self.frames.others(video, frames))]
        return [[Decoded(memory[0], np.argsort(planar[1]).tolist())]]

    def read(self, *args: Any) -> None:
        """Do nothing: videos are fetched one by one."""

    def is_for_nvdec(self, video: int) -> bool:
        """Return whether the rule gives a video to NVDEC, and NVDEC has not refused it."""
        if video not in self._chosen:
            self._chosen[video] = bool(self._rule) and self._choose(video)
        return self._chosen[video] and video not in self.refused

    def _choose(self, video: int) -> bool:
        store = self._store
        # Where packets do not tell frames apart (AVI, MPEG-TS, interlaced), DALI might count them in another way.
        if video in self.index.bad or not store.key[store.first[video] : store.first[video + 1]].any():
            return False
        if store.pixels is None:  # in an older version's cache
            try:
                pixels = plain_pixels(self.index.records[video].path)
            except VIDEO_ERRORS:
                return False  # what is wrong with it, who decodes it says
        else:
            pixels = str(store.pixels[video])
        return takes(self._rule, str(store.codec[video]), pixels, int(store.height[video]), int(store.width[video]))

    def _empty(self, shape: tuple[int, ...]) -> UInt8[Tensor, "..."]:
        """Return memory of a clip's frames; pinned, but of frames that are large."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=math.prod(shape) <= self._pinned)

    def _together(self, frames: Sequence[UInt8[np.ndarray, "rows W C"]]) -> list[Decoded]:
        """Return frames in one array for each of their shapes; most videos have one."""
        found = []
        for shape in dict.fromkeys(frame.shape for frame in frames):
            places = [place for place, frame in enumerate(frames) if frame.shape == shape]
            pixels = self._empty((len(places), *shape))
            np.stack([frames[place] for place in places], out=pixels.numpy())
            found.append(Decoded(pixels, places))
        return found


class _Started(NamedTuple):
    """A batch that was started and not yet taken."""

    sessions: list[tuple[Int64[np.ndarray, " b"], Feed]]  # places in the batch, and who decodes what lies there
    made: tuple[Int64[np.ndarray, " b"], Tensor] | None  # places, and clips of what the cores have decoded
    ready: torch.cuda.Event | None  # when those clips are


class VideoFeed:
    """In a Feed's place for videos on a GPU: `start` batches, then take the `pictures` of each in turn.

    What the cores have decoded is made into clips on a stream of its own, a size of frames at a time; beside the clips
    there are at most 256 MiB of pixels as floats, twice over.

    Args:
        index: the videos.
        source: of `index`.
        clip_length: T.
        options: of the loader.
    """

    def __init__(self, index: ClipIndex, source: DeviceVideos, clip_length: int, options: LoaderOptions):
        self.source = source
        self._clip_length, self._size, self._device = clip_length, options.size, options.torch_device
        self._yuv = source.frames.yuv()
        self._sessions = [
            Feed(index, source.files, clip_length, options)
            for _ in range(options.nvdec_sessions if rule_of(options) else 0)
        ]
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._in_flight: deque[_Started] = deque()
        self._told = False

    def start(self, samples: Samples, rows: Int64[np.ndarray, " B"], epoch: Epoch) -> None:
        """Start on one clip, a `Sample`, for each of these rows of the plan, as `Feed.start`."""
        assert isinstance(samples, list)
        files = [(place, sample) for place, sample in enumerate(samples) if isinstance(sample, np.ndarray)]
        sessions, made, ready = [], None, None
        for number, feed in enumerate(self._sessions):
            if part := files[number :: len(self._sessions)]:
                places = np.array([place for place, _ in part])
                feed.start([sample for _, sample in part], rows[places], epoch)
                sessions.append((places, feed))
        decoded = [(place, sample) for place, sample in enumerate(samples) if not isinstance(sample, np.ndarray)]
        if decoded:
            places = np.array([place for place, _ in decoded])
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                made = places, self._clips([sample for _, sample in decoded], rows[places], epoch)
            if self._stream is not None:
                ready = torch.cuda.Event()
                ready.record(self._stream)
        self._in_flight.append(_Started(sessions, made, ready))

    def pictures(self) -> Float[Tensor, "B T S S 3"]:
        """Return the pictures of the batch that was started first.

        Raises:
            Refused: if DALI refuses clips of it.
        """
        batch = self._in_flight.popleft()
        parts: list[tuple[Int64[np.ndarray, " b"], Tensor]] = []
        refusals: list[Refused] = []
        for places, feed in batch.sessions:  # all of them: a batch that comes later must find none of this one
            try:
                parts.append((places, feed.pictures()))
            except Refused as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]
        if batch.made is not None:
            if batch.ready is not None:
                current = torch.cuda.current_stream(self._device)
                batch.ready.wait(current)
                batch.made[1].record_stream(current)
            parts.append(batch.made)
        if len(parts) == 1:
            return parts[0][1]
        whole = self.zeros(sum(len(places) for places, _ in parts))
        for places, clips in parts:
            whole[self._put(places)] = clips
        return whole

    def alone(self, row: int, epoch: Epoch) -> tuple[Float[Tensor, "1 T S S 3"], bool]:
        """Return the pictures of a row's clip, and whether the cores decoded it, as NVDEC refuses it, now or before.

        Raises:
            BadClip: if it cannot be fetched, or the cores cannot decode it either.
        """
        video, rows = int(epoch.plan.video[row]), np.array([row])
        (sample,) = self.source.fetch(video, epoch.plan.frames[row])
        if isinstance(sample, np.ndarray):
            try:
                return self._sessions[0].alone([sample], rows, epoch), False
            except Refused:
                self.source.refused.add(video)
            (sample,) = self.source.fetch(video, epoch.plan.frames[row])
            if not self._told:
                self._told = True
                path = printable(str(self.source.index.records[video].path))
                say_error(f"note: {path}, perhaps others too, is decoded on the cores, as the GPU refuses it")
        assert not isinstance(sample, np.ndarray)
        return self._clips([sample], rows, epoch), video in self.source.refused  # or before: it was fetched earlier

    def drain(self) -> None:
        """Throw away batches that were started and never asked for."""
        for feed in self._sessions:
            feed.drain()
        self._in_flight.clear()

    def zeros(self, num_clips: int) -> Float[Tensor, "B T S S 3"]:
        """Return pictures of a batch without any clip that can be read."""
        return torch.zeros((num_clips, self._clip_length, self._size, self._size, 3), device=self._device)

    def _clips(
        self, samples: Sequence[list[Decoded]], rows: Int64[np.ndarray, " B"], epoch: Epoch
    ) -> Float[Tensor, "B T S S 3"]:
        """Return clips, finished as far as DALI's graph would finish them, from what the cores have decoded."""
        plan, on_device = epoch.plan, epoch.on_device
        assert on_device is not None
        groups: dict[tuple[int, ...], list[tuple[int, Decoded]]] = {}
        for place, parts in enumerate(samples):
            for part in parts:
                groups.setdefault(tuple(part.pixels.shape), []).append((place, part))
        clips = self.zeros(len(samples))
        for (num_frames, height, width, _), group in groups.items():
            at_once = max(_AT_ONCE // (num_frames * height * width), 1)
            for first in range(0, len(group), at_once):
                jobs = group[first : first + at_once]
                places = np.array([place for place, _ in jobs])
                pixels = torch.stack([part.pixels.to(self._device, non_blocking=True) for _, part in jobs])
                rgb = self._resized(pixels, epoch, rows[places])
                frames = self._put(np.array([part.places for _, part in jobs]))
                clips[self._put(places)[:, None], frames] = rgb
        if on_device.touches_geometry:  # what must be warped or blurred first gets its colours after that
            return clips
        colour = self._put(plan.colour[rows])
        return torch.einsum("bci,btyxi->btyxc", colour[..., :3], clips) + colour[:, None, None, None, :, 3]

    def _resized(
        self, pixels: UInt8[Tensor, "b n rows W C"], epoch: Epoch, rows: Int64[np.ndarray, " b"]
    ) -> Float[Tensor, "b n S S 3"]:
        """Return crops in RGB, 0 to 255."""
        plan = epoch.plan
        box, mirror = self._put(plan.box[rows].astype(np.float32)), self._put(plan.mirror[rows])
        at_once = max(_AT_ONCE // (pixels[:, 0].numel()), 1)  # frames of each clip
        if pixels.shape[-1] == 3:
            return torch.cat([resize(part, box, mirror, self._size) for part in pixels.split(at_once, dim=1)], 1)
        yuv = self._put(self._yuv[plan.video[rows]])
        to_rgb, chroma_left = yuv[:, :12].view(-1, 3, 4), yuv[:, 12] != 0
        planes = [resize_planar(part, box, mirror, self._size, chroma_left) for part in pixels.split(at_once, dim=1)]
        rgb = torch.einsum("bci,btyxi->btyxc", to_rgb[..., :3], torch.cat(planes, 1))
        return (rgb + to_rgb[:, None, None, None, :, 3]).clamp_(0, 255)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)


AnyFeed: TypeAlias = Feed | VideoFeed


def feed_of(index: ClipIndex, source: Source | DeviceVideos, clip_length: int, options: LoaderOptions) -> AnyFeed:
    """Return what makes pictures of what a source fetches."""
    if isinstance(source, DeviceVideos):
        return VideoFeed(index, source, clip_length, options)
    return Feed(index, source, clip_length, options)
