"""A timm network as a feature extractor, with random, downloaded or given weights."""

import os
import socket
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.files import reason
from dfer.model.pretrained import Rename, load_pretrained


def _load_timm() -> ModuleType:
    """Import timm, which takes seconds, where a network is built: a wrong command need not wait for it."""
    alone = "wandb" not in sys.modules
    if alone:  # timm would load it for scripts of its own
        sys.modules["wandb"] = None  # type: ignore[assignment] (as if it were not installed)
    try:
        import timm
    finally:
        if alone:
            del sys.modules["wandb"]
    return timm


class FrameBackbone(nn.Module):
    """A timm network that returns its last two levels (C4 at stride 16, C5 at stride 32).

    Args:
        name: of the network in timm.
        weights: None = random, "timm" = timm's pretrained ones (downloaded once), else a file of weights, or a run's or
            an export's folder.

    Raises:
        UserError: if timm has no such model, or the weights cannot be had or do not fit.
    """

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        timm = _load_timm()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
            raise UserError(f"--model.backbone {name}: timm has no such model" + (f" (has {close})" if close else ""))
        if weights == "timm":
            _check_weights_can_be_had(name)
        try:
            self.net = timm.create_model(name, features_only=True, out_indices=(-2, -1), pretrained=weights == "timm")
        except Exception as error:  # hub, safetensors and torch raise different classes
            what = f"--model.weights timm: cannot be loaded into {name}" if weights else f"--model.backbone {name}"
            raise UserError(f"{what} ({reason(error)})") from None
        self.loaded: str | None = None  # what was loaded from a file, in a few words
        if weights not in (None, "timm"):
            try:
                self.loaded = load_pretrained(self.net, Path(weights), name, _rename(name))
            except UserError as error:
                hint = "" if os.path.exists(weights) else " (or 'timm' for timm's pretrained weights)"
                raise UserError(f"--model.weights {error}{hint}") from None
        levels: Any = self.net.feature_info  # timm's FeatureInfo, of which the types of nn.Module know nothing
        self.channels: list[int] = levels.channels()
        self.strides: list[int] = levels.reduction()

    def forward(self, frames: Float[Tensor, "F 3 H W"]) -> list[Float[Tensor, "F _ _ _"]]:
        """Return the features of both levels, (F, C, h, w) each."""
        return self.net(frames)


def _rename(name: str) -> Rename | None:
    """Return what renames the tensors of a network's own authors as timm calls them, if timm has it."""
    convert = getattr(sys.modules[_load_timm().model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None

    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return convert(tensors, _load_timm().create_model(name))

    return rename


def _check_weights_can_be_had(name: str) -> None:
    """Raise a UserError at once if the machine is offline: the hub's client would retry for half a minute first."""
    config = _load_timm().get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, f), str) for f in files):
        return
    if "https" in urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        raise UserError(
            f"--model.weights timm: {host} cannot be reached to download {config.hf_hub_id}; "
            "give a file with --model.weights FILE, or leave it out for random weights"
        ) from None
