"""A timm network as a feature extractor."""

import sys
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.files import reason
from dfer.model.convolution import with_products
from dfer.model.pretrained import Rename
from dfer.run.hub import cached, out_of_reach


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
    """A timm network that returns its last two levels (C4 at stride 16, C5 at stride 32), with random weights.

    Args:
        name: of the network in timm.
        drop_path: stochastic depth: the probability that its last residual branch is left out for a frame, in training;
            those before it are left out less, as timm has it.

    Raises:
        UserError: if timm has no such model, or this one has no stochastic depth and is to have it.
    """

    def __init__(self, name: str, drop_path: float = 0.0):
        super().__init__()
        timm = _load_timm()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
            raise UserError(f"--model.backbone {name}: timm has no such model" + (f" (has {close})" if close else ""))
        self.name, self.frozen = name, False
        no_depth = UserError(
            f"--model.drop-path {drop_path}: {name} has no stochastic depth; leave it out, or choose another "
            "--model.backbone"
        )
        try:
            self.net = with_products(_extractor(name, **({"drop_path_rate": drop_path} if drop_path else {})))
        except Exception as error:  # of timm, whose networks raise different classes
            unknown = drop_path and isinstance(error, TypeError)
            raise no_depth if unknown else UserError(f"--model.backbone {name} ({reason(error)})") from None
        if drop_path and not any(isinstance(module, timm.layers.DropPath) for module in self.net.modules()):
            raise no_depth
        levels: Any = self.net.feature_info  # timm's FeatureInfo, of which the types of nn.Module know nothing
        self.channels: list[int] = levels.channels()
        self.strides: list[int] = levels.reduction()

    def forward(self, frames: Float[Tensor, "F 3 H W"]) -> list[Float[Tensor, "F _ _ _"]]:
        """Return the features of both levels, (F, C, h, w) each."""
        return self.net(frames)

    def freeze(self) -> None:
        """Keep all of it as it is from now on: no gradients, and batch statistics and dropout as in evaluation."""
        self.frozen = True
        self.net.requires_grad_(requires_grad=False)
        self.net.eval()

    def train(self, mode: bool = True) -> "FrameBackbone":
        """Set the mode of training; a frozen network stays in that of evaluation."""
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def load_timm(self) -> str:
        """Load timm's pretrained weights, downloaded once, and return which in a few words.

        Raises:
            UserError: if they cannot be had.
        """
        if (why := timm_out_of_reach(self.name)) is not None:
            raise UserError(f"timm: {why}; give a file with --model.init FILE, or leave it out for random weights")
        try:
            net = _extractor(self.name, pretrained=True)
        except Exception as error:  # hub, safetensors and torch raise different classes
            raise UserError(f"timm: cannot be loaded into {self.name} ({reason(error)})") from None
        self.net.load_state_dict(net.state_dict())
        config = _load_timm().get_pretrained_cfg(self.name)
        return f"timm's weights of {self.name} ({config.hf_hub_id or config.url})"  # type: ignore[union-attr]

    def rename(self) -> Rename | None:
        """Return what renames the tensors of the network's own authors as timm calls them, if timm has it."""
        timm = _load_timm()
        convert = getattr(sys.modules[timm.model_entrypoint(self.name).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return None

        def rename(tensors: dict[str, Any]) -> dict[str, Any]:
            return convert(tensors, timm.create_model(self.name))

        return rename


def _extractor(name: str, **options: Any) -> nn.Module:
    return _load_timm().create_model(name, features_only=True, out_indices=(-2, -1), **options)


def timm_out_of_reach(name: str) -> str | None:
    """Return why timm's weights of a network cannot be had; None if they are in the cache, or can be downloaded."""
    config = _load_timm().get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        return f"it has no weights of {name}"
    if config.hf_hub_id and cached(config.hf_hub_id) is not None:
        return None
    return None if (why := out_of_reach()) is None else f"{why} to download {config.hf_hub_id or config.url}"
