"""Shards: the bytes of each clip as a pack stores them, and the files that hold them one after another.

A clip is here, as the data sets call it, a whole video of a list. `dfer/lists/packed.py` says what the files hold.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from av.error import FFmpegError
from jaxtyping import Int32, Int64
from PIL import Image

from dfer import __version__
from dfer.cli import UserError, printable
from dfer.files import commit, hash_file, reason, write_whole
from dfer.images import BadImage, decode_image
from dfer.lists.annotations import EMOTIONS, VideoRecord
from dfer.video.decode import BadVideo, decode

QUALITY = 90
_ALIGN = 64  # bytes, at which a clip starts; a tar's blocks are of 512
_TAR_END = bytes(1024)

Record = dict[str, np.ndarray]  # the size, hash and frames of a finished shard


@dataclass(frozen=True)
class Options:
    """The options that the bytes of a pack depend on."""

    format: Literal["shards", "raw"] = "shards"
    size: int | None = None  # px; None: as they are
    quality: int | None = None  # of JPEG images that are encoded; None: QUALITY
    shard_bytes: int = 256 * 10**6  # at most, unless one clip is larger


@dataclass(frozen=True)
class Clip:
    """A clip to pack."""

    number: int  # in the pack, from 0
    record: VideoRecord
    frames: list[str] | None  # its image files; None: it is a video
    num_frames: int
    listed: dict[str, str | int]  # the list it is from, its hash and the row

    def where(self) -> str:
        """Return how messages about the clip begin."""
        return f"{self.record.source}: clip {self.record.name}"


@dataclass(frozen=True)
class Block:
    """A packed clip as it stands in a shard."""

    data: bytes
    offset: Int64[np.ndarray, " T"]  # of each frame, in data
    length: Int32[np.ndarray, " T"]
    height: int
    width: int
    digest: bytes


# ---- One clip


def encode_image(image: Image.Image, quality: int) -> bytes:
    """Return the bytes of a JPEG file without chroma subsampling and with its own Huffman tables."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def read_frames(clip: Clip) -> Iterator[tuple[bytes, Image.Image]]:
    """Yield the frames of a clip: the bytes of the image file, none of them for a video, and the decoded image.

    Raises:
        UserError: if a frame cannot be read or decoded.
    """
    if clip.frames is None:
        count = 0
        try:
            for _, image in decode(clip.record.path, square=False):  # as loaders read it
                count += 1
                yield b"", image
        except (BadVideo, FFmpegError, OSError) as error:
            raise UserError(f"{clip.where()}: {clip.record.path} cannot be decoded ({reason(error)})") from None
        if count != clip.num_frames:
            raise UserError(
                f"{clip.where()}: {clip.record.path} has {clip.num_frames} frames, but {count} could be decoded"
            )
        return
    for path in clip.frames:
        try:
            data = Path(path).read_bytes()
            image = decode_image(data)
        except (BadImage, OSError) as error:
            raise UserError(f"{clip.where()}: {path} cannot be decoded ({reason(error)})") from None
        yield data, image


def pack_clip(clip: Clip, options: Options) -> Block:
    """Return the bytes of a clip as they will stand in a shard.

    Raises:
        UserError: if a frame cannot be decoded, or frames differ in size.
    """
    frames: list[tuple[bytes, str]] = []  # and the suffix of a tar's member
    size = None
    for data, image in read_frames(clip):
        if options.size is not None:
            # LANCZOS: of the filters, its results differ least from the original after a training crop.
            image = image.resize((options.size, options.size), Image.Resampling.LANCZOS)
        if size not in (None, image.size):
            raise UserError(
                f"{clip.where()}: frame {len(frames) + 1} is {image.width} x {image.height} pixels, those before are "
                f"{size[0]} x {size[1]}; --size makes them equal"
            )
        size = image.size
        if options.format == "raw":
            frames.append((image.tobytes(), ""))
        elif is_encoded(clip, options):
            frames.append((encode_image(image, options.quality or QUALITY), "jpg"))
        else:
            frames.append((data, "png" if data.startswith(b"\x89PNG") else "jpg"))
    assert size is not None and len(frames) == clip.num_frames
    hasher = hashlib.blake2b(digest_size=16)
    for data, _ in frames:
        hasher.update(data)
    length = np.array([len(data) for data, _ in frames], dtype=np.int64)
    if options.format == "raw":
        block, offset = b"".join(data for data, _ in frames), np.cumsum(length) - length
    else:
        block, offset = _tar_members(clip, options, frames)
    return Block(block, offset, length.astype(np.int32), size[1], size[0], hasher.digest())


def is_encoded(clip: Clip, options: Options) -> bool:
    """Return whether the frames are encoded anew, and are neither pixels nor the files as they are."""
    return options.format == "shards" and (options.size is not None or clip.frames is None)


def _tar_members(
    clip: Clip, options: Options, frames: Sequence[tuple[bytes, str]]
) -> tuple[bytes, Int64[np.ndarray, " T"]]:
    """Return the members of a clip, and where in them the bytes of the frames start."""
    about = {
        "clip": clip.record.name,
        "label": clip.record.label,
        "emotion": EMOTIONS[clip.record.label],
        "classes": EMOTIONS,
        "num_frames": clip.num_frames,
        **clip.listed,
        "size": options.size,
        "quality": (options.quality or QUALITY) if is_encoded(clip, options) else None,
        "dfer": __version__,
    }
    members = [("json", json.dumps(about, sort_keys=True).encode()), ("cls", str(clip.record.label).encode())]
    members += [(f"{frame:05d}.{suffix}", data) for frame, (data, suffix) in enumerate(frames)]
    parts, starts, position = [], [], 0
    for suffix, data in members:
        member = tarfile.TarInfo(f"{clip.number:07d}.{suffix}")  # time, owner and group are 0
        member.size = len(data)
        head = member.tobuf(tarfile.USTAR_FORMAT)
        parts += [head, data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        starts.append(position + len(head))
        position += sum(map(len, parts[-3:]))
    return b"".join(parts), np.array(starts[2:], dtype=np.int64)


# ---- Files


class Shard:
    """A shard that is being written. It gets its name when it is whole; its record is written just before."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file = open(self.partial, "wb")  # noqa: SIM115
        self.position, self.hasher = 0, hashlib.sha256()
        self.blocks: list[Block] = []  # without their data

    def add(self, block: Block) -> None:
        """Write a clip."""
        self._write(bytes(-self.position % _ALIGN))
        self.blocks.append(replace(block, data=b"", offset=block.offset + self.position))
        self._write(block.data)

    def finish(self, record: Path) -> Record:
        """Close the shard, write `record` and name the shard, in this order: without a record it is not recognised.

        Raises:
            OSError: if the disk is full or fails.
        """
        if self.path.suffix == ".tar":
            self._write(_TAR_END)
        self.file.close()
        blocks = self.blocks
        found = {
            "num_frames": np.array([len(block.offset) for block in blocks], dtype=np.int64),
            "offset": np.concatenate([block.offset for block in blocks]),
            "length": np.concatenate([block.length for block in blocks]),
            "height": np.array([block.height for block in blocks], dtype=np.int32),
            "width": np.array([block.width for block in blocks], dtype=np.int32),
            "digests": np.frombuffer(b"".join(block.digest for block in blocks), np.uint8).reshape(-1, 16),
            "size": np.array(self.position),
            "sha256": np.array(self.hasher.hexdigest()),
        }
        write_whole(record, lambda file: np.savez(file, **found))
        commit(self.partial, self.path)
        return found

    def discard(self) -> None:
        """Delete the unfinished file."""
        with contextlib.suppress(OSError):  # a full disk is full for what is still in memory too
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hasher.update(data)
        self.position += len(data)


def shard_path(out: Path, name: str, number: int, suffix: str) -> Path:
    """Return the file of a shard."""
    return out / f"{name}-{number:05d}.{suffix}"


def record_path(out: Path, name: str, number: int) -> Path:
    """Return the file of a finished shard's record, which is kept until the pack is complete."""
    return out / f"{name}.unfinished" / f"{number:05d}.npz"


def finished_shards(out: Path, name: str, suffix: str) -> list[Record]:
    """Return the records of the shards that a stopped run has left whole, and remove those after the first bad one.

    Raises:
        UserError: if there is a shard that no run of this pack has written.
    """
    found: list[Record] = []
    for record in sorted(record_path(out, name, 0).parent.glob("*.npz")):
        path = out / f"{name}-{record.stem}.{suffix}"
        if record.stem == f"{len(found):05d}":
            with contextlib.suppress(OSError, ValueError, EOFError, KeyError), np.load(record) as entries:
                done = {key: entries[key] for key in entries.files}
                if path.stat().st_size == done["size"] and hash_file(path) == str(done["sha256"]):
                    found.append(done)
                    continue
            print(f"{printable(path)} is not whole and packed again")
        path.unlink(missing_ok=True)
        record.unlink()
    for file in sorted(os.listdir(out)):
        shard = re.fullmatch(re.escape(name) + r"-(\d{5,})\.(tar|raw)(\.partial)?", file)
        if shard and shard[3]:
            (out / file).unlink()
        elif shard and (int(shard[1]) >= len(found) or shard[2] != suffix):
            raise UserError(f"{out / file}: is there already, and not of this pack; choose another --out")
    return found
