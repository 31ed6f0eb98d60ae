"""Sources: from (video, frames) to the bytes or pixels of a clip. One class per kind of storage:
here folders of images and packs, in video_files.py whole video files.

`kind` is what `fetch` returns: "images" (encoded), "pixels" (uint8 pictures) or "videos" (whole encoded files). `read`
does the same for many clips at once, in compiled code, as far as there is nothing unusual about them; but for videos.
"""

import abc
import itertools
import os
import weakref
from collections.abc import Iterable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int64, UInt8

from dali_pipes import native
from dali_pipes.headers import is_plain, refusal
from dali_pipes.options import Kind
from dali_pipes.shard_files import close_shards, map_shards, open_shards
from dali_pipes.stored import BadClip, changed, read_bytes
from dali_pipes.video_files import VideoBytes
from dfer.files import reason
from dfer.images import MAX_BYTES, BadImage, decode_image, encode_plain
from dfer.lists.index import ClipIndex
from dfer.lists.packed import Packed
from dfer.lists.scan import FrameFiles


class Images(abc.ABC):
    """What sources of image files share: decoders are given what DALI reads, at once or after decoding here."""

    kind: Kind = "images"

    def __init__(self, index: ClipIndex):
        self.index = index
        self.decoded = ""  # what messages call the first frame that was decoded here, if any was
        self._refused: set[tuple[int, int]] = set()  # (video, frame) of plain headers that DALI refuses all the same

    def fetch(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "..."]]:
        """Return the T encoded images, as DALI reads them; of raw clips the T pictures, (H, W, 3).

        Raises:
            BadClip: as `stored` and `for_dali`.
        """
        return self.for_dali(video, frames, self.stored(video, frames))

    def read(self, *args: Any) -> None:
        """Read clips as native.py does. What is not DONE then must be fetched one by one.

        The arguments are those of its functions behind the tables; `out` and `lengths` as one pair.
        """
        videos, frames, out, states = args
        hashes = self.index.hashes
        if hashes is not None and not self.digests.function:  # this machine's Python has no such function
            return
        if self._refused:
            known = np.array(sorted(self._refused))
            keys = (videos[:, None] << 32) + frames
            states[np.isin(keys, (known[:, 0] << 32) + known[:, 1]).any(1)] = native.ODD
        self._read(videos, frames, out, states)

    @abc.abstractmethod
    def _read(self, *args: Any) -> None:
        """Do what `read` does of frames that DALI has never refused."""

    @cached_property
    def digests(self) -> native.Digests:
        """Return the hashes that frames must have, for compiled code."""
        hashes = self.index.hashes
        if hashes is None:
            return native.NO_DIGESTS
        return native.Digests(native.sha256_address(), np.frombuffer(hashes.digests, np.uint8), hashes.first)

    @abc.abstractmethod
    def stored(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "..."]]:
        """Return the bytes of the frames as they lie there.

        Raises:
            BadClip: if they cannot be read, or their hash differs.
        """

    def for_dali(
        self, video: int, frames: Int64[np.ndarray, " T"], files: list[UInt8[np.ndarray, "..."]]
    ) -> list[UInt8[np.ndarray, "..."]]:
        """Return image files as they are, if they are plain ones, else their pixels as files that are.

        Raises:
            BadClip: if one is no image, claims too much, or cannot be decoded. Of plain ones DALI finds that out.
        """
        if self.kind != "images":
            return files
        return [self._for_dali(video, frame, data) for frame, data in zip(frames.tolist(), files, strict=True)]

    def refused(self, video: int, frame: int, data: UInt8[np.ndarray, " _"]) -> UInt8[np.ndarray, " _"]:
        """Return what stands in for a plain image file that DALI has refused, now and in later fetches.

        Raises:
            BadClip: if nobody can decode it.
        """
        self._refused.add((video, frame))
        return self._for_dali(video, frame, data)

    def has_refused(self, video: int, frames: Int64[np.ndarray, " T"]) -> bool:
        """Return whether DALI has refused one of these frames."""
        return any((video, frame) in self._refused for frame in frames.tolist())

    def _for_dali(self, video: int, frame: int, data: UInt8[np.ndarray, " _"]) -> UInt8[np.ndarray, " _"]:
        if is_plain(data) and not (self._refused and (video, frame) in self._refused):
            return data
        problem = refusal(data)
        if problem is None:
            try:
                plain = encode_plain(decode_image(data.tobytes()))
                self.decoded = self.decoded or self.place(video, frame)
                return np.frombuffer(plain, dtype=np.uint8)
            except BadImage as error:
                problem = f"cannot be decoded ({error})"
        raise BadClip(f"{self.name(video, frame)}: {problem}")

    @abc.abstractmethod
    def place(self, video: int, frame: int) -> str:
        """Return where a frame lies."""

    def name(self, video: int, frame: int) -> str:
        """Return how messages on a bad frame begin."""
        return f"{self.index.records[video].source}: bad {self.place(video, frame)}"


class FrameFolders(Images):
    """Folders of image files, one folder per video."""

    def stored(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, " _"]]:
        """Return the T image files."""
        images = []
        for frame in frames.tolist():
            data = read_bytes(self.path(video, frame), MAX_BYTES)
            problem = data if isinstance(data, str) else changed(self.index, video, frame, data)
            if problem is not None or isinstance(data, str):
                raise BadClip(f"{self.name(video, frame)}: {problem}")
            images.append(data)
        return images

    def _read(self, videos: Any, frames: Any, out: Any, states: Any) -> None:
        native.read_files(self._files, self.digests, videos, frames, *out, states)

    @cached_property
    def _files(self) -> native.Files:
        """Where all frames lie, for compiled code: 0.2 s and some 20 bytes for each of a million frames."""
        store = self.index.store
        assert isinstance(store, FrameFiles)
        folders = native.texts(os.fspath(record.path) for record in self.index.records)
        names = native.texts(itertools.chain.from_iterable(store.names))
        first = np.concatenate([[0], np.cumsum([len(names) for names in store.names], dtype=np.int64)])
        return native.Files(*folders, *names, first)

    def path(self, video: int, frame: int) -> str:
        """Return the file of a frame."""
        return self.index.frame_path(video, frame)

    def place(self, video: int, frame: int) -> str:
        """Return where a frame lies."""
        return f"frame {self.path(video, frame)} of clip {self.index.records[video].name}"


class Shards(Images):
    """Image files, or pixels, inside packed files. Those of pixels are mapped into memory: `stored` returns views.

    `files` are their descriptors. A map keeps another one of each.

    Raises:
        UserError: if a shard cannot be opened.
    """

    def __init__(self, index: ClipIndex):
        assert isinstance(index.store, Packed)
        super().__init__(index)
        self.store = index.store
        self.kind = "images" if self.store.kind == "shards" else "pixels"
        self.files = open_shards(self.store)
        weakref.finalize(self, close_shards, self.files)
        self._bytes = [] if self.kind == "images" else map_shards(self.store, self.files)

    def _read(self, videos: Any, frames: Any, out: Any, states: Any) -> None:
        if self.kind == "images":
            native.read_ranges(self._ranges, self.digests, videos, frames, *out, states)
        else:
            native.find_pixels(self._ranges, self.digests, videos, frames, out, states)

    @cached_property
    def _ranges(self) -> native.Ranges:
        store = self.store
        address = np.array([whole.ctypes.data for whole in self._bytes], dtype=np.int64)
        places = store.shard, store.offset, store.length, store.height, store.width, store.first
        return native.Ranges(self.files, address, *places)

    def stored(self, video: int, frames: Int64[np.ndarray, " T"]) -> list[UInt8[np.ndarray, "..."]]:
        """Return the T image files (tar), or the T pictures (raw), (H, W, 3), as views of the file."""
        store, shard, rows = self.store, self.store.shard[video], self.store.first[video] + frames
        ends = (store.offset[rows] + store.length[rows]).tolist()
        # A process that reads a map behind the end of its file is killed. This check takes half a microsecond; reading
        # instead of mapping would take a quarter of a raw clip's time.
        size = os.fstat(int(self.files[shard])).st_size  # as it is now
        for frame, end in zip(frames.tolist(), ends, strict=True) if max(ends) > size else ():
            if end > size:
                raise BadClip(f"{self.name(video, frame)}: the file was cut to {size:,} bytes after the run had begun")
        views = [
            self._part(video, frame, start, end)
            for frame, start, end in zip(frames.tolist(), store.offset[rows].tolist(), ends, strict=True)
        ]
        self.verify(video, frames, views)
        if self.kind == "images":
            return views
        return [view.reshape(store.height[video], store.width[video], 3) for view in views]

    def verify(self, video: int, frames: Int64[np.ndarray, " T"], parts: Iterable[UInt8[np.ndarray, " _"]]) -> None:
        """Check the hashes of frames, if there are any.

        Raises:
            BadClip: if one differs.
        """
        if self.index.hashes is None:
            return
        for frame, part in zip(frames.tolist(), parts, strict=True):
            problem = changed(self.index, video, frame, part)
            if problem is not None:
                raise BadClip(f"{self.name(video, frame)}: {problem}")

    def _part(self, video: int, frame: int, start: int, end: int) -> UInt8[np.ndarray, " _"]:
        """Return the bytes of a frame."""
        shard = self.store.shard[video]
        if self._bytes:
            return self._bytes[shard][start:end]
        try:
            return np.frombuffer(os.pread(int(self.files[shard]), end - start, start), dtype=np.uint8)
        except OSError as error:
            raise BadClip(f"{self.name(video, frame)}: {reason(error)}") from None

    def place(self, video: int, frame: int) -> str:
        """Return where a frame lies."""
        path = self.store.paths[self.store.shard[video]]
        return f"frame {frame} of clip {self.index.records[video].name} in {path}"


Source: TypeAlias = FrameFolders | Shards | VideoBytes


def source_of(index: ClipIndex) -> Source:
    """Return the source of an index."""
    if index.source == "frames":
        return FrameFolders(index)
    if index.source in ("shards", "raw"):
        return Shards(index)
    return VideoBytes(index)
