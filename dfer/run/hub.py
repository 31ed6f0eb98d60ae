"""Models on the Hugging Face hub, as folders on this machine: what the cache has, else what is downloaded once."""

import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from dfer.cli import UserError
from dfer.files import reason

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
_ABOUT = ("config.json", "README.md")  # beside them, of an export


def local(path: Path) -> Path:
    """Return the folder that hf:ORG/NAME has in the cache, downloaded if it is not there; any other path as it is.

    What the cache has is taken without a look at the hub, so that a run starts from the same weights again.

    Raises:
        UserError: if there is no such model, or it can neither be found nor downloaded.
    """
    name = os.fspath(path)
    if not name.startswith("hf:"):
        return path
    name = name.removeprefix("hf:")
    try:
        validate_repo_id(name if "/" in name else "")
    except HFValidationError:
        raise UserError(f"hf:{name}: a model of the hub is written hf:ORG/NAME") from None
    if (folder := cached(name)) is not None:
        return folder
    if (why := out_of_reach()) is not None:
        raise UserError(f"hf:{name}: is not in the cache, and {why}; give a file or a folder instead")
    for file in _ABOUT:  # first: a model whose weights are there is taken to be whole
        _download(name, file)
    found = next(filter(None, (_download(name, file) for file in WEIGHTS)), None)
    if found is None:
        raise UserError(f"hf:{name}: holds neither {' nor '.join(WEIGHTS)}")
    return found.parent


def cached(name: str) -> Path | None:
    """Return the folder of a model in the cache; None if it or its weights are not there."""
    for file in WEIGHTS:
        if isinstance(path := huggingface_hub.try_to_load_from_cache(name, file), str):
            return Path(path).parent
    return None


def out_of_reach() -> str | None:
    """Return why nothing can be downloaded, at once: the hub's client would try for half a minute. None if it can."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if "https" in urllib.request.getproxies():
        return None  # which may reach what we cannot
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return f"{host} cannot be reached"
    return None


def _download(name: str, file: str) -> Path | None:
    """Return where a file of a model lies now; None if the model has none of that name."""
    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # of the network, of rights, of the disk: each of another kind
        raise UserError(f"hf:{name}: {file} cannot be downloaded ({reason(error)})") from None
