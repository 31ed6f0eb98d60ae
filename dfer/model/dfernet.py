"""DFERNet: backbone -> two-level pyramid -> CRF -> top-down fusion -> temporal block -> head."""

import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Literal, NamedTuple

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.crf.backends import Backend
from dfer.crf.layers import BranchMessages, GaussianCRF, MeanFieldCRF


class Prediction(NamedTuple):
    logits: Float[Tensor, "B K"]
    marginals: Float[Tensor, "B K"] | None  # log-probabilities of the CRF's pooled marginals; None without a CRF
    diagnostics: dict[str, Tensor]  # scalars of the CRF, on the device, without gradient


class FrameBackbone(nn.Module):
    """A timm network as a feature extractor: the last two levels (C4 at stride 16, C5 at stride 32)."""

    def __init__(self, name: str, weights: str | None = None):
        """`weights`: None = random, "timm" = timm's pretrained ones (downloaded once), else a file of weights.

        Raises:
            UserError: if timm has no such model, or the weights cannot be had or do not fit.
        """
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
            raise UserError(f"--model.backbone {name}: timm has no such model" + (f" (has {close})" if close else ""))
        kwargs = {}
        if weights == "timm":
            _check_weights_within_reach(name)
            kwargs["pretrained"] = True
        elif weights is not None:
            if not Path(weights).is_file():
                raise UserError(f"--model.weights {weights}: no such file (or 'timm' for timm's pretrained weights)")
            kwargs.update(pretrained=True, pretrained_cfg_overlay={"file": weights})
        try:
            levels = timm.create_model(name, features_only=True, out_indices=(-2, -1), **kwargs)
        except Exception as error:  # hub, safetensors and torch each raise their own kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"--model.weights {weights}: cannot be loaded into" if weights else "--model.backbone"
            raise UserError(f"{what} {name} ({reason})") from None
        self.net = levels
        self.channels: list[int] = levels.feature_info.channels()
        self.strides: list[int] = levels.feature_info.reduction()

    def forward(self, frames: Float[Tensor, "F 3 H W"]) -> list[Float[Tensor, "F C h w"]]:
        return self.net(frames)


def _check_weights_within_reach(name: str) -> None:
    """Say at once that the machine is offline: the hub's client retries for half a minute first."""
    config = timm.get_pretrained_cfg(name)
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


class FeaturePyramid(nn.Module):
    """1x1 laterals: both levels to one width D."""

    def __init__(self, channels: list[int], dim: int):
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, dim, 1, bias=False), nn.BatchNorm2d(dim)) for c in channels
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]


class TopDownFusion(nn.Module):
    """F4 = GELU(BN(conv3x3(P4 + up(P5)))): the coarse level's context reaches the fine one."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, fine: Float[Tensor, "F D h w"], coarse: Float[Tensor, "F D h2 w2"]) -> Float[Tensor, "F D h w"]:
        return F.gelu(self.norm(self.conv(fine + upsample_aligned(coarse, fine.shape[-2:]))))


def upsample_aligned(
    coarse: Float[Tensor, "F D h2 w2"], size: tuple[int, int] | torch.Size
) -> Float[Tensor, "F D h w"]:
    """Double the resolution without shifting phase: coarse cell k lies on fine cell 2k exactly.

    Strided convolutions with padding k//2 put cell k of stride s on pixel s*k, so 4 -> 7 is bilinear with
    align_corners (0, .5, 1, ...); an even fine size has one more cell beyond the last coarse one: it repeats the edge.
    """
    height, width = 2 * coarse.shape[-2] - 1, 2 * coarse.shape[-1] - 1
    fine = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    pad_bottom, pad_right = size[0] - height, size[1] - width
    return F.pad(fine, (0, pad_right, 0, pad_bottom), mode="replicate") if pad_bottom or pad_right else fine


class TemporalBlock(nn.Module):
    """Frames see each other: depthwise convolution (motion), attention (order), MLP; pre-norm residuals."""

    def __init__(self, dim: int, num_frames: int, num_heads: int = 4):
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_frames, dim) * 0.02)
        self.conv_norm, self.conv = nn.LayerNorm(dim), nn.Conv1d(dim, dim, 3, padding=1, groups=dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.num_heads = num_heads

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.positions(x.shape[1])
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)

    def positions(self, num_frames: int) -> Float[Tensor, "T D"]:
        """Of a clip with another number of frames than in training: the same course of time, interpolated."""
        trained = len(self.position)
        if not torch.compiler.is_exporting() and num_frames == trained:  # an exported program asks nothing of T
            return self.position
        at = torch.arange(num_frames, device=self.position.device) * ((trained - 1) / max(num_frames - 1, 1))
        distance = (at[:, None] - torch.arange(trained, device=self.position.device)).abs()
        return ((1 - distance).clamp(min=0)[..., None] * self.position).sum(1)  # (T, trained, D), small


class DFERNet(nn.Module, PyTorchModelHubMixin):
    """The full model. Everything after the backbone works clip by clip: frames of two clips never mix.

    `DFERNet.from_pretrained` reads the folders that scripts/export.py writes.

    Args:
        num_frames: T, frames of a clip in training; at other T the positions in time are interpolated.
        dim: D, width of the pyramid.
        crf: the mean-field CRF, or for comparison the messages of the original method or the continuous Gaussian CRF,
            neither of which has marginals or heeds the other options.
        readout: what the CRF writes back into the features: nothing, its label beliefs, the value path, or both.
        iterations: mean-field iterations.
        max_coupling: bound on the CRF's coupling; up to 2 its optimum is unique.
        crf_backend: how the CRF's sums are computed.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        num_classes: int = 7,
        backbone: str = "resnet18",
        weights: str | None = None,
        dim: int = 256,
        crf: Literal["meanfield", "messages", "gaussian"] = "meanfield",
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
        max_coupling: float = 8.0,
        crf_backend: Backend = "auto",
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, weights)
        self.pyramid = FeaturePyramid(self.backbone.channels, dim)
        strides = tuple(self.backbone.strides)
        if crf == "messages":
            self.crf = BranchMessages(dim)
        elif crf == "gaussian":
            self.crf = GaussianCRF(dim, strides, crf_backend)
        else:
            self.crf = MeanFieldCRF(dim, num_classes, strides, readout, iterations, max_coupling, crf_backend)
        self.fusion = TopDownFusion(dim)
        self.temporal = nn.ModuleList(TemporalBlock(dim, num_frames) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(2 * dim), nn.Dropout(dropout), nn.Linear(2 * dim, num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        batch = clips.shape[0]
        levels, crf = self.crf(self._levels(clips))
        fine, coarse = (level.flatten(0, 1) for level in levels)
        fine = self.fusion(fine, coarse)
        pooled = [
            temporal(level.mean((2, 3)).unflatten(0, (batch, -1))).mean(1)  # (B, D)
            for temporal, level in zip(self.temporal, (fine, coarse), strict=True)
        ]
        return Prediction(self.head(torch.cat(pooled, 1)), crf.pooled, crf.diagnostics)

    def _levels(self, clips: Float[Tensor, "B T 3 H W"]) -> list[Float[Tensor, "B T D _ _"]]:
        levels = self.pyramid(self.backbone(clips.flatten(0, 1)))
        return [level.unflatten(0, (clips.shape[0], -1)) for level in levels]

    def emotion_maps(self, clips: Float[Tensor, "B T 3 H W"]) -> list[Float[Tensor, "B T K _ _"]]:
        """Where in each frame which emotion is seen: the CRF's marginals, cell by cell, for the fine and coarse level.

        Probabilities in [0, 1]; over the classes they sum to at most 1, the rest is background.

        Raises:
            UserError: if the model's CRF has no labels.
        """
        if not isinstance(self.crf, MeanFieldCRF):
            raise UserError("emotion maps: the model's CRF has no labels; train with --model.crf meanfield")
        return self.crf.emotion_maps(self._levels(clips))


class MeanPoolNet(nn.Module, PyTorchModelHubMixin):
    """The baseline: the same backbone, mean-pooled over space and time. It cannot see the order of frames."""

    def __init__(
        self,
        num_classes: int = 7,
        *,
        backbone: str = "resnet18",
        weights: str | None = None,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, weights)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.backbone.channels[-1], num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        features = self.backbone(clips.flatten(0, 1))[-1].mean((2, 3))  # (B*T, C)
        return Prediction(self.head(features.unflatten(0, (clips.shape[0], -1)).mean(1)), None, {})
