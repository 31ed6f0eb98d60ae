"""Files of weights, whoever wrote them: told apart by their content, and named as what they are if they are none."""

import argparse
import hashlib
import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from dfer.cli import UserError
from dfer.files import read_file, reason, write_whole

_MAX_HEADER = 10**8  # bytes, of safetensors' own limit
# What files begin with that are taken for weights by mistake, and what is to be done.
_POINTERS = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the file itself: run `git lfs pull` where it comes from",
    b"version https://hawser": "is a pointer of git-lfs, not the file itself: run `git lfs pull` where it comes from",
    b"/annex/objects/": "is a pointer of git-annex, not the file itself: run `git annex get` where it comes from",
    b"outs:": "is a pointer of DVC, not the file itself: run `dvc pull` where it comes from",
}
_OTHERS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras writes them; weights of PyTorch are wanted",
    b"\x93NUMPY": "a NumPy array; weights of PyTorch are wanted",
    b"GGUF": "a GGUF file of quantised weights; weights of PyTorch are wanted",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"%PDF": "a PDF file, not weights",
    b"\xff\xd8\xff": "a JPEG image, not weights",
    b"\x89PNG": "a PNG image, not weights",
}
# Members of a zip file that tell what wrote it; the first that is found counts.
_ZIPS = (
    (r"^[^/]+/(constants\.pkl$|code/)", "a TorchScript program; save the state_dict() of the model it was made of"),
    (r"archive_format$|models/model\.json$", "a program of torch.export; weights lie beside it in model.safetensors"),
    (r"\.npy$", "an archive of NumPy arrays; weights of PyTorch are wanted"),
    (r"\.h5$", "a Keras model; weights of PyTorch are wanted"),
)  # fmt: skip


class WeightFile(NamedTuple):
    """What a file of weights holds."""

    content: dict[str, Any]  # tensors on the CPU and plain values, maybe in dictionaries in it
    about: dict[str, str]  # metadata, which safetensors files may have


def read_weight_file(path: Path) -> WeightFile:
    """Read what `torch.save` or safetensors wrote, without executing anything.

    Raises:
        UserError: if the file cannot be read, is damaged, or is none of weights; it says what it is then.
    """
    data = read_file(path)
    if not data:
        raise UserError(f"{path}: is empty; copy or download it again")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _MAX_HEADER:
        return _read_safetensors(data, path)
    if data.startswith(b"PK\x03\x04"):
        _check_zip(data, path)
    elif not (data[0] == 0x80 and data[1:2] in (b"\2", b"\3", b"\4", b"\5")):  # a pickle, as torch.save wrote before
        raise UserError(f"{path}: {_what_it_is(data)}")
    return WeightFile(_read_torch(data, path), {})


def _read_safetensors(data: bytes, path: Path) -> WeightFile:
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end]) if end <= len(data) else None
        about = dict(header.pop("__metadata__", {})) if header is not None else {}
        size = end if header is None else end + max((x["data_offsets"][1] for x in header.values()), default=0)
        if len(data) < size:
            at_least = " or more" * (header is None)
            raise UserError(f"{path}: is cut off: {len(data):,} of {size:,} bytes{at_least}; copy or download it again")
        return WeightFile(dict(safetensors.torch.load(data)), about)
    except UserError:
        raise
    except Exception as error:  # of header, offsets and types, each of another kind
        raise UserError(f"{path}: damaged, or no safetensors file ({type(error).__name__})") from None


def _check_zip(data: bytes, path: Path) -> None:
    """Check that a zip file is whole and one of `torch.save`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            names = file.namelist()
    except Exception:  # of a damaged zip file, of many kinds
        raise UserError(
            f"{path}: is cut off or damaged (a zip file without its end); copy or download it again"
        ) from None
    for pattern, kind in _ZIPS:
        if any(re.search(pattern, name) for name in names):
            raise UserError(f"{path}: is {kind}")
    if not any(re.fullmatch(r"[^/]+/data\.pkl", name) for name in names):
        raise UserError(
            f"{path}: is a zip archive of something else ({', '.join(names[:2]) or 'nothing'}), not weights"
        )


def _read_torch(data: bytes, path: Path) -> dict[str, Any]:
    try:
        # Many training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors are of many kinds
        # Torch's own words advise to execute what the file says.
        if pickled := re.search(r"GLOBAL `?([\w.]+)", str(error)):
            raise UserError(
                f"{path}: holds pickled Python objects ({pickled[1]}), which could execute anything and are not "
                "loaded; have torch.save(model.state_dict(), FILE) called where it was made"
            ) from None
        raise UserError(f"{path}: damaged, cut off, or a pickle of something else ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not weights by their names (a state_dict)")
    return content


def _what_it_is(data: bytes) -> str:
    """Return what a file is that neither torch nor safetensors wrote, and what is to be done."""
    head = data[:2048].removeprefix(b"\xef\xbb\xbf").lstrip()
    lower = head.lower()
    for start, pointer in _POINTERS.items():
        if head.startswith(start) or (start == b"/annex/objects/" and start in head[:200] and len(data) < 32768):
            return pointer
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<script", b"<!--")) or b"<html" in lower:
        return "is a web page, not weights: whoever downloaded it got a login or an error; download the file itself"
    if head.startswith(b"<"):
        return "is XML, not weights: maybe an error of the server that it was downloaded from; download it again"
    if head.startswith((b"{", b"[")):
        if b'"weight_map"' in data:
            return "is the index of weights that lie in several files; save them as one"
        return "is JSON, not weights; the weights lie in another file or folder"
    for start, other in _OTHERS.items():
        if data.startswith(start):
            return f"is {other}"
    if data[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    if (
        data[0] == 8
        and 3 <= data[1] < 32
        and data[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x32", b"\x3a", b"\x42")
    ):
        return "is an ONNX program; weights of PyTorch are wanted, as model.safetensors of an export"
    if not data.strip(b"\0"):
        return f"is {len(data):,} zeros: a download or copy that did not end; do it again"
    text = data[:512].decode(errors="replace")[:120]
    if all((c.isprintable() and c != "\ufffd") or c.isspace() for c in text):
        return f"is text, not weights (it begins with {text.split(chr(10))[0][:40]!r})"
    return f"is no file of weights that torch or safetensors wrote (it begins with {data[:8].hex(' ')}), or damaged"


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write weights and `about` in one .safetensors file, whose metadata hold a SHA-256 of both.

    Raises:
        UserError: if it cannot be written; a file of that name stays as it was.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(weights, about | {"sha256": digest(weights, about)})
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot write the weights ({reason(error)})") from None


def digest(weights: dict[str, Tensor], about: dict[str, str]) -> str:
    """Return the SHA-256 of weights, and of what is said about them."""
    sha256 = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name]
        sha256.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
