"""Reading what a batch needs in compiled code: no Python, and no lock of Python's, for any frame.

Whatever is not as it should be, or only unusual, is left to Python's way (sources.py), which finds out what it is: a
function here says no more than that a clip is done or is not. Nothing is handed on that was not checked as there.
"""

# The types of numba describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false

import contextlib
import ctypes
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dali_pipes.compiling import njit
from dali_pipes.headers import is_plain
from dfer.lists.hashes import SIZE

WAITING, READING, DONE, ODD = 0, 1, 2, 3  # states of a clip
COLUMNS = 4  # of a table of pictures: address, height, width, channels

_HERE, _DIRECTORY, _FILE = -100, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC
_END = os.SEEK_END

# The C library's, which every process has. Addresses are numbers here.
_openat = types.ExternalFunction("openat", types.intc(types.intc, types.uintp, types.intc))
_close = types.ExternalFunction("close", types.intc(types.intc))
_read = types.ExternalFunction("read", types.intp(types.intc, types.uintp, types.uintp))
_pread = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))
_lseek = types.ExternalFunction("lseek", types.int64(types.intc, types.int64, types.intc))


class Files(NamedTuple):
    """Where the frames of N videos lie in folders. Texts are bytes that end with 0."""

    folders: UInt8[np.ndarray, " _"]
    folder: Int64[np.ndarray, " N"]  # where in `folders` each begins
    names: UInt8[np.ndarray, " _"]
    name: Int64[np.ndarray, " F"]  # where in `names` each begins; an empty one: the folder is the file
    first: Int64[np.ndarray, " _"]  # (N + 1,); the frames of video i are those from first[i] to first[i + 1]


class Ranges(NamedTuple):
    """Where the frames of N videos lie in S open files."""

    files: Int32[np.ndarray, " S"]  # file descriptors
    address: Int64[np.ndarray, " S"]  # of the files in memory; only of those that hold pixels
    shard: Int32[np.ndarray, " N"]
    offset: Int64[np.ndarray, " F"]
    length: Int32[np.ndarray, " F"]
    height: Int32[np.ndarray, " N"]
    width: Int32[np.ndarray, " N"]
    first: Int64[np.ndarray, " _"]


class Digests(NamedTuple):
    """The hashes that frames must have; `function` is 0 where there are none."""

    function: int  # address of SHA256 of OpenSSL
    digests: UInt8[np.ndarray, " _"]  # SIZE of each part
    first: Int64[np.ndarray, " _"]


NO_DIGESTS = Digests(0, np.empty(0, np.uint8), np.empty(0, np.int64))


def texts(parts: Iterable[str]) -> tuple[UInt8[np.ndarray, " _"], Int64[np.ndarray, " N"]]:
    """Return texts as bytes that end with 0, and where each begins."""
    data = np.frombuffer(os.fsencode("\0".join(parts)) + b"\0", dtype=np.uint8)
    return data, np.concatenate([[0], np.flatnonzero(data == 0)[:-1] + 1])


def sha256_address() -> int:
    """Return the address of OpenSSL's SHA256(data, length, out), which Python's own hashlib uses; 0 if it has none."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import _hashlib

        return ctypes.cast(ctypes.CDLL(_hashlib.__file__).SHA256, ctypes.c_void_p).value or 0
    return 0


@njit(nogil=True)
def read_files(table, digests, videos, frames, out, lengths, states):
    """Read the image files of some clips into rows of `out`, one for each frame.

    Args:
        table: Files.
        digests: Digests.
        videos: (B,) int64.
        frames: (B, T) int64.
        out: (B * T, L) uint8; behind the bytes of a file, its row is as it was.
        lengths: (B * T, 1) int32, of the files.
        states: (B,) uint8; DONE if all files of a clip are read, fit, are plain and have their hash, else ODD. Clips
            that are ODD already are left alone.
    """
    for clip in range(len(videos)):
        if states[clip] == ODD:
            continue
        states[clip] = READING
        video, done = videos[clip], True
        where = table.folders[table.folder[video] :].ctypes.data
        still = table.names[table.name[table.first[video]]] == 0
        folder = _HERE if still else _openat(_HERE, where, _DIRECTORY)
        if folder == -1:
            states[clip] = ODD
            continue
        for i in range(frames.shape[1]):
            row = clip * frames.shape[1] + i
            name = table.names[table.name[table.first[video] + frames[clip, i]] :].ctypes.data
            file = _openat(folder, where if still else name, _FILE)
            if file == -1:
                done = False
                break
            length = _read(file, out[row].ctypes.data, out.shape[1])
            _close(file)
            # One call reads a file. What a signal or a network cut off is not plain, as it lacks its end.
            if length < 0 or length == out.shape[1] or not _is_good(out[row, :length], digests, video, frames[clip, i]):
                done = False
                break
            lengths[row, 0] = length
        if not still:
            _close(folder)
        states[clip] = DONE if done else ODD


@njit(nogil=True)
def read_ranges(table, digests, videos, frames, out, lengths, states):
    """Read the image files of some clips out of packed ones. As `read_files`, with Ranges."""
    for clip in range(len(videos)):
        if states[clip] == ODD:
            continue
        states[clip] = READING
        video, done = videos[clip], True
        file = table.files[table.shard[video]]
        for i in range(frames.shape[1]):
            row, frame = clip * frames.shape[1] + i, table.first[video] + frames[clip, i]
            length, got = table.length[frame], 0
            if length > out.shape[1]:
                done = False
                break
            while got < length:
                more = _pread(file, out[row, got:].ctypes.data, length - got, table.offset[frame] + got)
                if more <= 0:
                    break
                got += more
            if got < length or not _is_good(out[row, :length], digests, video, frames[clip, i]):
                done = False
                break
            lengths[row, 0] = length
        states[clip] = DONE if done else ODD


@njit(nogil=True)
def find_pixels(table, digests, videos, frames, out, states):
    """Write where the pictures of some clips lie in memory. As `read_ranges`, but for `out`.

    Args:
        out: (B * T, COLUMNS) int64.
    """
    for clip in range(len(videos)):
        if states[clip] == ODD:
            continue
        states[clip] = READING
        video, done = videos[clip], True
        shard = table.shard[video]
        size = _lseek(table.files[shard], 0, _END)  # who reads behind the end of a file's map is killed
        for i in range(frames.shape[1]):
            frame = table.first[video] + frames[clip, i]
            if table.offset[frame] + table.length[frame] > size:
                done = False
                break
            out[clip * frames.shape[1] + i, 0] = table.address[shard] + table.offset[frame]
            out[clip * frames.shape[1] + i, 1] = table.height[video]
            out[clip * frames.shape[1] + i, 2] = table.width[video]
            out[clip * frames.shape[1] + i, 3] = 3
            if digests.function != 0:
                address = table.address[shard] + table.offset[frame]
                if not _fits(address, table.length[frame], digests, video, frames[clip, i]):
                    done = False
                    break
        states[clip] = DONE if done else ODD


@njit(nogil=True)
def check_hashes(digests, videos, frames, address, size, states):
    """Make ODD what is DONE of clips in memory, but has a frame without its hash.

    Args:
        digests: Digests.
        videos: (B,) int64.
        frames: (B, T) int64.
        address: (B,) int64, of clips whose frames follow each other.
        size: (B,) int64, bytes of a frame.
        states: (B,) uint8.
    """
    for clip in range(len(videos)):
        for i in range(frames.shape[1]):
            if states[clip] == DONE:
                place = address[clip] + i * size[clip]
                if not _fits(place, size[clip], digests, videos[clip], frames[clip, i]):
                    states[clip] = ODD


@njit(nogil=True)
def _is_good(data, digests, video, frame):
    if digests.function != 0 and not _fits(data.ctypes.data, len(data), digests, video, frame):
        return False
    return is_plain(data)


@njit(nogil=True)
def _fits(address, length, digests, video, part):
    """Return whether bytes in memory have the hash that a part of a video must have."""
    found = np.empty(32, np.uint8)
    _call_sha256(digests.function, address, length, found.ctypes.data)
    start = SIZE * (digests.first[video] + part)
    for i in range(SIZE):  # noqa: SIM110
        if found[i] != digests.digests[start + i]:
            return False
    return True


@intrinsic
def _call_sha256(typingctx, function, data, length, out):
    """Call the C function at an address with three numbers."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        words = [context.cast(builder, arg, kind, types.int64) for arg, kind in zip(args, signature.args, strict=True)]
        kind = ir.FunctionType(word, [word] * 3)
        builder.call(builder.inttoptr(words[0], kind.as_pointer()), words[1:])
        return context.get_dummy_value()

    return types.void(function, data, length, out), codegen
