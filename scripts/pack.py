"""Pack the clips of lists into a few large files, from which training reads at random faster than from a million small.

`python scripts/pack.py train.txt --out DIR` writes DIR/train.txt, the list to train on as any other, DIR/train.npz,
which knows where each frame lies, and DIR/train-00000.tar and so on. Several lists share one pack, in which each clip
is stored once: `python scripts/pack.py lists/dfew/*.txt --out DIR`. `--verify DIR/train.txt` reads all of it again.

shards    tar files that webdataset and DALI read too: CLIP.json, CLIP.cls (the label), CLIP.00000.jpg and so on.
          Image files are copied byte by byte, so that clips stay the same to the bit (PNG files too, as .png).
raw       pixels, exactly as they are decoded: nothing is left to decode in training, for 10 to 20 times the space.
--size PX squashes each frame to PX x PX. No harm is done to shapes: the trainer's crops are shares of the frame, so
          that a frame of another aspect ends as the same square. In shards, frames are then encoded again; pixels
          change slightly. A third more than the training size keeps most detail: 144 for 112.

Frames of videos are decoded, and for shards encoded as JPEG. All are encoded without chroma subsampling, which loses
less per byte at equal size of file, and with their own Huffman tables, 6 % smaller. A frame that cannot be decoded ends
the run. A run that was stopped goes on when it is started again; packing twice gives the same shards, byte by byte.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import time
import tomllib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import av
import numpy as np
import PIL
from jaxtyping import Int32, Int64
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, UserError, in_range, shown
from dfer.images import MAX_PIXELS
from dfer.lists.annotations import EMOTIONS, VideoRecord, packed_index, read_annotations, write_annotations
from dfer.lists.index import FrameFiles, build_index
from dfer.lists.packed import Pack, Packed, match_records, read_pack, shard_problems, write_pack
from dfer.video.decode import BadVideo, decode

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = {"shards": "tar", "raw": "raw"}
ALIGN = 64  # bytes, at which a clip starts; a tar's blocks are of 512
TAR_END = bytes(1024)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # of 8 bits or less
QUALITY = 90
SAMPLE = 12  # clips from which the size of the pack is estimated
NAMED = 10  # problems of a shard that are printed
Item, Done = TypeVar("Item"), TypeVar("Done")


@dataclass(frozen=True)
class Options:
    """What shapes the bytes of a pack."""

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
    listed: dict[str, Any]  # the list it is from, its hash and the row

    def where(self) -> str:
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


def read_lists(lists: Sequence[Path], root: Path | None) -> tuple[list[Clip], dict[str, list[tuple[str, int, int]]]]:
    """The clips of all lists, each once, and the rows of each list as they will be written.

    Raises:
        UserError: in one line, if a list or a clip of it cannot be used, or one name stands for two clips.
    """
    clips: dict[str, Clip] = {}
    rows: dict[str, list[tuple[str, int, int]]] = {}
    for path in lists:
        if path.stem in rows:
            raise UserError(f"{path}: another list has that name too, so one would overwrite the other")
        records = read_annotations(path, root)
        if packed_index(path) is not None:
            raise UserError(f"{path}: is packed already; pack the list that it was made of")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        index = build_index(records)
        rows[path.stem] = []
        for video, record in enumerate(records):
            frames = None
            if isinstance(index.store, FrameFiles):
                frames = [os.path.join(record.path, name) for name in index.store.names[video]]
            listed = {"list": path.name, "list_sha256": digest, "row": int(record.source.rpartition(":")[2])}
            clip = Clip(len(clips), record, frames, int(index.num_frames[video]), listed)
            known = clips.setdefault(record.name, clip)
            if known is not clip and not _same(known.record, record):
                raise UserError(
                    f"{record.source}: clip {record.name} is {known.record.source} too, of another label or folder"
                )
            rows[path.stem].append((record.name, clip.num_frames, record.label))
    return list(clips.values()), rows


def _same(a: VideoRecord, b: VideoRecord) -> bool:
    return a.label == b.label and (a.path == b.path or os.path.realpath(a.path) == os.path.realpath(b.path))


# ---- One clip


def decode_image(data: bytes) -> Image.Image:
    """A JPEG or PNG file's pixels in RGB and upright, to the bit those that the trainer's decoder gives on a CPU.

    Raises:
        Exception: whatever Pillow makes of damage.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except PIL.UnidentifiedImageError:
        raise UserError("no JPEG or PNG image") from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        if image.mode not in MODES:
            raise UserError(f"its pixels are {image.mode}, more than 8 bits")
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")


def encode_image(image: Image.Image, quality: int) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


def read_frames(clip: Clip) -> Iterator[tuple[bytes, Image.Image]]:
    """A clip's frames: the image file, empty for a video, and the picture.

    Raises:
        UserError: in one line that names the row and the file, if one cannot be read or decoded.
    """
    if clip.frames is None:
        count = 0
        try:
            for _, image in decode(clip.record.path):
                count += 1
                yield b"", image
        except (BadVideo, av.FFmpegError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{clip.where()}: {clip.record.path} cannot be decoded ({reason})") from None
        if count != clip.num_frames:
            raise UserError(
                f"{clip.where()}: {clip.record.path} has {clip.num_frames} frames, but {count} could be decoded"
            )
        return
    for path in clip.frames:
        try:
            data = Path(path).read_bytes()
            image = decode_image(data)
        except Exception as error:  # Pillow raises errors of many kinds on damaged files
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{clip.where()}: {path} cannot be decoded ({reason})") from None
        yield data, image


def pack_clip(clip: Clip, options: Options) -> Block:
    """A clip's bytes as they will stand in a shard.

    Raises:
        UserError: in one line that names the row and the file, if a frame cannot be decoded, or frames differ in size.
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
        elif _encoded(clip, options):
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


def _encoded(clip: Clip, options: Options) -> bool:
    """Whether the frames are encoded, and not pixels or the files as they are."""
    return options.format == "shards" and (options.size is not None or clip.frames is None)


def _tar_members(
    clip: Clip, options: Options, frames: Sequence[tuple[bytes, str]]
) -> tuple[bytes, Int64[np.ndarray, " T"]]:
    """The members of a clip, and where in them the frames' bytes start."""
    about = {
        "clip": clip.record.name,
        "label": clip.record.label,
        "emotion": EMOTIONS[clip.record.label],
        "classes": EMOTIONS,
        "num_frames": clip.num_frames,
        **clip.listed,
        "size": options.size,
        "quality": (options.quality or QUALITY) if _encoded(clip, options) else None,
        "dfer": version(),
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


@functools.cache
def version() -> str:
    if not (ROOT / "pyproject.toml").exists():
        return importlib.metadata.version("dfer")  # installed by pip
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def in_order(work: Callable[[Item], Done], items: Iterable[Item], workers: int) -> Iterator[Done]:
    """Results in the order of the items, some worked on at once, but never many held."""
    # Threads: nine tenths of the work is Pillow's, hashlib's and the disk's, which run beside each other.
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


# ---- Shards


class Shard:
    """A shard that is being written. It gets its name when it is whole; `record` then says all about it."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file = open(self.partial, "wb")  # noqa: SIM115
        self.position, self.hasher = 0, hashlib.sha256()
        self.blocks: list[Block] = []  # without their data

    def add(self, block: Block) -> None:
        self._write(bytes(-self.position % ALIGN))
        self.blocks.append(replace(block, data=b"", offset=block.offset + self.position))
        self._write(block.data)

    def finish(self, record: Path) -> dict[str, np.ndarray]:
        """Close and name the shard, after `record` was written: a shard without one is none of ours."""
        if self.path.suffix == ".tar":
            self._write(TAR_END)
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
        with open(f"{record}.partial", "wb") as file:
            np.savez(file, **found)
        os.replace(f"{record}.partial", record)
        os.replace(self.partial, self.path)
        return found

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # a full disk is full for what is still in memory too
            self.file.close()
        self.partial.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.hasher.update(data)
        self.position += len(data)


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finished_shards(out: Path, name: str, suffix: str) -> list[dict[str, np.ndarray]]:
    """The shards that a run which was stopped has left whole. All that comes after the first bad one is removed.

    Raises:
        UserError: in one line, if there is a shard that no run of this pack has written.
    """
    state = out / f"{name}.unfinished"
    found: list[dict[str, np.ndarray]] = []
    for record in sorted(state.glob("*.npz")):
        path = out / f"{name}-{record.stem}.{suffix}"
        if record.stem == f"{len(found):05d}":
            with contextlib.suppress(OSError, ValueError, EOFError, KeyError), np.load(record) as entries:
                done = {key: entries[key] for key in entries.files}
                if path.stat().st_size == done["size"] and hash_file(path) == str(done["sha256"]):
                    found.append(done)
                    continue
            print(f"{shown(path)} is not whole and packed again")
        path.unlink(missing_ok=True)
        record.unlink()
    for file in sorted(os.listdir(out)):
        shard = re.fullmatch(re.escape(name) + r"-(\d{5,})\.(tar|raw)(\.partial)?", file)
        if shard and shard[3]:
            (out / file).unlink()
        elif shard and (int(shard[1]) >= len(found) or shard[2] != suffix):
            raise UserError(f"{out / file}: is there already, and not of this pack; choose another --out")
    return found


def pack(
    lists: Sequence[Path], root: Path | None, out: Path, options: Options, workers: int = 1, command: str = ""
) -> list[Path]:
    """Pack the clips of all lists into `out`. Returns the lists to train on, which are written last.

    Raises:
        UserError: in one line, if a list or clip cannot be used, or if something else is in the way in `out`.
        OSError: if `out` cannot be written.
    """
    clips, rows = read_lists(lists, root)
    name = lists[0].stem if len(lists) == 1 else "clips"
    targets = [out / f"{stem}.txt" for stem in rows]
    index_path, state = out / f"{name}.npz", out / f"{name}.unfinished"
    key = hash_task(clips, rows, options)
    for target in targets:
        if target.exists() and packed_index(target) != index_path:
            raise UserError(f"{target}: is there already, and not of this pack; choose another --out")
    if index_path.exists():
        found = read_pack(index_path)
        if found.provenance.get("key") != key:
            raise UserError(
                f"{index_path}: is a pack already, of other lists, clips or options; choose another --out, or delete "
                f"it with {name}-*"
            )
        for problem in shard_problems(found):
            raise UserError(f"{problem}; delete {index_path} and {name}-* and pack again")
        print(f"{shown(index_path)} is packed already; --verify reads it again")
    else:
        if options.quality is not None and not any(_encoded(clip, options) for clip in clips):
            raise UserError("--quality: nothing is encoded: image files are copied as they are without --size")
        with _lock(state, key):
            shards = write_shards(clips, out, name, options, workers)
            write_pack(index_path, _join(clips, shards, out, name, options, _provenance(lists, options, key, command)))
    for target, listed in zip(targets, rows.values(), strict=True):
        if not target.exists():
            write_annotations(target, listed, packed=index_path.name)
    shutil.rmtree(state, ignore_errors=True)
    return targets


@contextlib.contextmanager
def _lock(state: Path, key: str) -> Iterator[None]:
    """Hold the folder of an unfinished pack, which goes if not even one shard was finished."""
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "key", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{state}: another run is packing there") from None
        except OSError:
            pass  # a file system without locks
        file.seek(0)
        if file.read() != key:
            if any(state.glob("*.npz")):
                raise UserError(
                    f"{state}: is left of a run with other lists, clips or options; delete it and the shards beside "
                    "it to start anew, or choose another --out"
                )
            file.truncate(0)
            file.write(key)
            file.flush()
        try:
            yield
        finally:
            if not any(state.glob("*.npz")):
                shutil.rmtree(state)


def hash_task(clips: Sequence[Clip], rows: dict[str, list[tuple[str, int, int]]], options: Options) -> str:
    """A hash of all that the bytes of a pack depend on, short of the content of each frame's file.

    As in the index, a file that is overwritten under its old name makes no difference; one that is added, removed or
    renamed does, and so does any change of a video.
    """
    hasher = hashlib.sha256(json.dumps([asdict(options), rows, version(), PIL.__version__]).encode())
    for clip in clips:
        found = clip.record.path.stat()
        size = found.st_size if clip.frames is None else 0
        names = [os.path.basename(path) for path in clip.frames or ()]
        hasher.update(json.dumps([clip.record.name, clip.listed, found.st_mtime_ns, size, names]).encode())
    return hasher.hexdigest()


def write_shards(
    clips: Sequence[Clip], out: Path, name: str, options: Options, workers: int
) -> list[dict[str, np.ndarray]]:
    """Write the shards that are not yet there; what is in them depends on neither the workers nor on restarts."""
    suffix = SUFFIX[options.format]
    shards = finished_shards(out, name, suffix)
    finished = sum(len(shard["num_frames"]) for shard in shards)
    if finished:
        print(f"{finished:,} of {len(clips):,} clips, in {len(shards):,} shards, were packed before")
    left = clips[finished:]
    if not left:
        return shards
    check_space(clips, left, out, options)
    shard: Shard | None = None
    with contextlib.ExitStack() as stack:
        blocks = in_order(lambda clip: pack_clip(clip, options), left, workers)
        blocks = stack.enter_context(contextlib.closing(blocks))
        try:
            for block in stack.enter_context(contextlib.closing(progress(blocks, finished, len(clips), "clips"))):
                if shard is not None and shard.position + len(block.data) > options.shard_bytes:
                    shards.append(shard.finish(_record(out, name, len(shards))))
                    shard = None
                if shard is None:
                    shard = Shard(out / f"{name}-{len(shards):05d}.{suffix}")
                shard.add(block)
            assert shard is not None
            shards.append(shard.finish(_record(out, name, len(shards))))
        except BaseException:
            if shard is not None:
                shard.discard()
            raise
    return shards


def _record(out: Path, name: str, number: int) -> Path:
    return out / f"{name}.unfinished" / f"{number:05d}.npz"


def check_space(clips: Sequence[Clip], left: Sequence[Clip], out: Path, options: Options) -> None:
    """Say how large the pack will be, judging by a sample of the clips.

    Raises:
        UserError: in one line, if the disk has no room for what is left to write.
    """
    sample = [left[i] for i in np.unique(np.linspace(0, len(left) - 1, SAMPLE).astype(int))]
    if options.size is not None:
        width, height = next(read_frames(sample[0]))[1].size
        if max(width, height) < options.size:
            print(f"note: frames of {width} x {height} pixels are enlarged to {options.size} x {options.size}")
    per_frame = sum(len(pack_clip(clip, options).data) for clip in sample) / sum(clip.num_frames for clip in sample)
    total, rest = (per_frame * sum(clip.num_frames for clip in some) for some in (clips, left))
    free = shutil.disk_usage(out).free
    frames = sum(clip.num_frames for clip in clips)
    print(f"{len(clips):,} clips, {frames:,} frames: about {_bytes(total)}; {_bytes(free)} are free in {shown(out)}")
    if 1.02 * rest > free:
        raise UserError(f"{out}: about {_bytes(rest)} are left to write, but only {_bytes(free)} are free")


def _bytes(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def progress(items: Iterator[Item], done: int, total: int, what: str) -> Iterator[Item]:
    """Pass items on and show how far it is."""
    began, start = time.monotonic(), done
    if sys.stdout.isatty():
        from rich.progress import MofNCompleteColumn, Progress, TextColumn

        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        with Progress(*columns) as bar:
            task = bar.add_task(what, total=total, completed=done, speed="")
            for done, item in enumerate(items, start=start + 1):
                speed = (done - start) / (time.monotonic() - began)
                bar.update(task, completed=done, speed=f"{speed:,.1f} {what}/s")
                yield item
        return
    for done, item in enumerate(items, start=start + 1):
        if done * 10 // total > (done - 1) * 10 // total:
            speed = (done - start) / (time.monotonic() - began)
            left = f", about {(total - done) / speed:,.0f} s left" if done < total else ""
            print(f"{done:,}/{total:,} {what}, {speed:,.1f} {what}/s{left}", flush=True)
        yield item


def _provenance(lists: Sequence[Path], options: Options, key: str, command: str) -> dict[str, Any]:
    return {
        "lists": [{"name": path.name, "sha256": hash_file(path)} for path in lists],
        "options": asdict(options),
        "key": key,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dfer": version(),
        "pillow": PIL.__version__,
    }


def _join(
    clips: Sequence[Clip],
    shards: Sequence[dict[str, np.ndarray]],
    out: Path,
    name: str,
    options: Options,
    provenance: dict[str, Any],
) -> Pack:
    whole = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0] if shards[0][key].ndim}
    counts = [len(shard["num_frames"]) for shard in shards]
    first = np.concatenate([[0], np.cumsum(whole["num_frames"])])
    assert np.array_equal(whole["num_frames"], [clip.num_frames for clip in clips])
    packed = Packed(
        kind=options.format,
        paths=[out / f"{name}-{number:05d}.{SUFFIX[options.format]}" for number in range(len(shards))],
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        first=first,
        **{key: whole[key] for key in ("offset", "length", "height", "width")},
    )
    return Pack(
        clips=packed,
        names=[clip.record.name for clip in clips],
        labels=np.array([clip.record.label for clip in clips], dtype=np.int64),
        digests=whole["digests"],
        sizes=np.array([int(shard["size"]) for shard in shards], dtype=np.int64),
        hashes=[str(shard["sha256"]) for shard in shards],
        provenance=provenance,
    )


# ---- Verification


def verify(list_path: Path, workers: int = 1) -> tuple[Pack, list[str]]:
    """Read a pack again: list, index, and all bytes of all shards. Returns the pack, and a line for each problem.

    Raises:
        UserError: in one line, if the list or its .npz file is such that there is nothing to verify by.
    """
    records = read_annotations(list_path)
    index_path = packed_index(list_path)
    if index_path is None:
        raise UserError(f"{list_path}: not packed: its header names no .npz file")
    pack = read_pack(index_path)
    problems = []
    try:
        match_records(records, pack, index_path)
    except UserError as error:
        problems.append(str(error))
    problems += shard_problems(pack)
    present = [number for number, path in enumerate(pack.clips.paths) if path.is_file()]
    tasks = [(number, clip) for number in present for clip in (None, *np.flatnonzero(pack.clips.shard == number))]

    def look(task: tuple[int, int | None]) -> list[str]:
        number, clip = task
        return list(check_shard(pack, number) if clip is None else check_clip(pack, clip))

    told = [0] * len(pack.clips.paths)
    found = in_order(look, tasks, workers)
    for (number, _), lines in zip(tasks, progress(found, 0, len(tasks), "parts"), strict=True):
        problems += lines[: max(0, NAMED - told[number])]
        told[number] += len(lines)
    problems += [
        f"{path}: {count - NAMED:,} more problems of its clips"
        for path, count in zip(pack.clips.paths, told, strict=True)
        if count > NAMED
    ]
    return pack, problems


def check_clip(pack: Pack, clip: int) -> Iterator[str]:
    """What is wrong with the bytes of a clip's frames."""
    clips, path = pack.clips, pack.clips.paths[pack.clips.shard[clip]]
    where = f"{path}: clip {pack.names[clip]}"
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for frame in range(clips.first[clip], clips.first[clip + 1]):
            file.seek(clips.offset[frame])
            data = file.read(clips.length[frame])
            hasher.update(data)
            if clips.kind == "raw":
                continue
            try:
                size = decode_image(data).size
            except Exception as error:  # Pillow raises errors of many kinds on damaged files
                yield f"{where}: frame {frame - clips.first[clip]} cannot be decoded ({type(error).__name__})"
                continue
            if size != (clips.width[clip], clips.height[clip]):
                yield f"{where}: frame {frame - clips.first[clip]} is {size[0]} x {size[1]} pixels, not as indexed"
    if hasher.digest() != pack.digests[clip].tobytes():
        yield f"{where}: its frames are not those that were packed"


def check_shard(pack: Pack, number: int) -> Iterator[str]:
    """What is wrong with a shard as a whole, and with the parts of a tar between the frames."""
    path, clips = pack.clips.paths[number], pack.clips
    if hash_file(path) != pack.hashes[number]:
        yield f"{path}: its SHA-256 is not that of the shard that was packed"
    if clips.kind == "raw":
        return
    wanted = {}
    for clip in np.flatnonzero(clips.shard == number).tolist():
        for frame in range(clips.first[clip], clips.first[clip + 1]):
            name = f"{clip:07d}.{frame - clips.first[clip]:05d}"
            wanted[name] = (int(clips.offset[frame]), int(clips.length[frame]))
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if suffix in ("json", "cls"):
                    clip = int(key)
                    said = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    known: Any = int(pack.labels[clip])
                    if suffix == "json":
                        said = [said[name] for name in ("clip", "label", "classes", "num_frames")]
                        known = [pack.names[clip], known, list(EMOTIONS), int(np.diff(clips.first)[clip])]
                    if said != known:
                        yield f"{path}: {member.name} says {said}, the index {known}"
                else:
                    found[member.name.rpartition(".")[0]] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        yield f"{path}: damaged between its frames ({' '.join(str(error).split()) or type(error).__name__})"
        return
    if found != wanted:
        yield f"{path}: its members are not those of the index"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("pack", __doc__)
    default = Options()
    parser.add_argument("lists", nargs="*", type=Path, metavar="LIST", help="lists of frame folders or of videos")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write lists, index and shards to")
    parser.add_argument("--root", type=Path, help="where the paths start (default: as for training)")
    parser.add_argument("--format", choices=tuple(SUFFIX), default=default.format, help="(default: %(default)s)")
    parser.add_argument("--size", type=in_range(int, 16, 2048), metavar="PX", help="squash frames to PX x PX")
    parser.add_argument(
        "--quality", type=in_range(int, 1, 100), help=f"of JPEG images that are encoded (default: {QUALITY})"
    )
    parser.add_argument(
        "--shard-size",
        type=in_range(int, 1, 10**6),
        metavar="MB",
        default=default.shard_bytes // 10**6,
        help="(default: %(default)s)",
    )
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--verify", type=Path, metavar="DIR/LIST.txt", help="read a pack again, and all of it")
    args = parser.parse_args(arguments)
    if args.verify is not None and (args.lists or args.out is not None):
        parser.error("--verify takes the one list that it names, and writes nothing")
    if args.verify is None and not (args.lists and args.out is not None):
        parser.error("give the lists to pack and --out DIR, or --verify DIR/LIST.txt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd files: what matters is raised
            if args.verify is not None:
                return tell_problems(*verify(args.verify, args.workers))
            options = Options(args.format, args.size, args.quality, args.shard_size * 10**6)
            command = shlex.join(["python", "scripts/pack.py", *(sys.argv[1:] if arguments is None else arguments)])
            targets = pack(args.lists, args.root, args.out, options, args.workers, command)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename or args.out}: {error.strerror}; what is finished stays finished")
    except KeyboardInterrupt:
        parser.exit(130, "pack: interrupted; what is finished stays finished: run the same again\n")
    found = read_pack(packed_index(targets[0]))
    print(_told(found))
    for target in targets:
        print(f"train on it: python train.py --data.train-list {shlex.quote(str(target))} --data.val-list VAL_LIST")
    return 0


def tell_problems(found: Pack, problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"pack: {shown(problem)}", file=sys.stderr)
    print(f"{_told(found)}: {len(problems)} problems" if problems else f"{_told(found)}: all as packed")
    return 2 if problems else 0


def _told(found: Pack) -> str:
    size, shards, ending = _bytes(float(found.sizes.sum())), len(found.sizes), SUFFIX[found.clips.kind]
    return f"{len(found.names):,} clips, {len(found.clips.offset):,} frames, {size} in {shards:,} {ending} files"


if __name__ == "__main__":
    sys.exit(main())
