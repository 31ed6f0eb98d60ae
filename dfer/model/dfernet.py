"""DFERNet: backbone -> two-level pyramid of each branch -> CRF -> top-down fusion -> recurrent unit -> head."""

from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.crf.backends import Backend
from dfer.crf.layers import BranchMessages, GaussianCRF, MeanFieldCRF
from dfer.model.backbone import FrameBackbone
from dfer.model.pyramid import FeaturePyramid, TopDownFusion
from dfer.model.temporal import RecurrentBlock, TemporalBlock

Motion = Literal["deviation", "difference", "first", "original"]


class Prediction(NamedTuple):
    """What a model returns for a batch of clips."""

    logits: Float[Tensor, "B K"]
    marginals: Float[Tensor, "B K"] | None  # log-probabilities of the CRF's pooled marginals; None if it has no labels
    diagnostics: dict[str, Tensor]  # scalars of the CRF, on the device, without gradient


class DFERNet(nn.Module, PyTorchModelHubMixin):
    """The full model. Clips of a batch never mix.

    Two branches share the backbone: the *static* one sees each frame, the *dynamic* one how it differs from the rest of
    its clip, which takes away what stays the same: the person, the light. Each has a pyramid and a fusion of its own.

    `DFERNet.from_pretrained` reads the folders that scripts/export.py writes: the parameters here are the keys of their
    config.json.

    Args:
        num_frames: T, frames of a clip in training.
        num_classes: K.
        backbone: name of the network in timm.
        drop_path: that of `FrameBackbone`.
        dim: D, width of the pyramids.
        branches: which there are.
        dynamic: what the dynamic branch sees; see `motion`.
        time: what reads the frames: a recurrent unit, or attention with the mean over time, which has a position for
            each frame of training and interpolates them at other T.
        crf: the mean-field CRF, none, or for comparison the messages of the original method or the continuous Gaussian
            CRF, which have no marginals and ignore `readout`, `iterations` and `max_coupling`.
        crf_branch: the branch whose cells it couples, where there are both.
        readout: what the CRF adds to the features: nothing, its marginals, the value path, or both.
        iterations: mean-field iterations.
        max_coupling: bound on the CRF's coupling; up to 2 its optimum is unique.
        crf_backend: how the CRF's sums are computed; see dfer/crf/backends.py.
        dropout: before the head.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        num_classes: int = 7,
        backbone: str = "resnet18",
        drop_path: float = 0.0,
        dim: int = 256,
        branches: Literal["static", "dynamic", "both"] = "both",
        dynamic: Motion = "deviation",
        time: Literal["gru", "attention"] = "gru",
        crf: Literal["meanfield", "messages", "gaussian", "none"] = "meanfield",
        crf_branch: Literal["static", "dynamic"] = "dynamic",
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
        max_coupling: float = 8.0,
        crf_backend: Backend = "auto",
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        self.dynamic: Motion = dynamic
        self.pyramid = self.fusion = self.dynamic_pyramid = self.dynamic_fusion = self.crf = self.recurrent = None
        channels, (fine, coarse) = self.backbone.channels, self.backbone.strides
        strides = fine, coarse
        # In the order of the first version, so that a seed gives its branch the same weights as then.
        if branches != "dynamic":
            self.pyramid = FeaturePyramid(channels, dim)
        if crf == "messages":
            self.crf = BranchMessages(dim)
        elif crf == "gaussian":
            self.crf = GaussianCRF(dim, strides, num_frames, crf_backend)
        elif crf == "meanfield":
            self.crf = MeanFieldCRF(
                dim, num_classes, strides, num_frames, readout, iterations, max_coupling, crf_backend
            )
        self.crf_branch = crf_branch if branches == "both" else branches
        if branches != "dynamic":
            self.fusion = TopDownFusion(dim)
        if branches != "static":
            self.dynamic_pyramid, self.dynamic_fusion = FeaturePyramid(channels, dim), TopDownFusion(dim)
            if num_frames == 1:  # nothing moves: statistics of it would say that any motion is enormous
                _keep_statistics(self.dynamic_pyramid, self.dynamic_fusion)
        num_levels = 4 if branches == "both" else 2
        width = 2 * dim if time == "gru" else num_levels * dim
        if time == "gru":
            self.recurrent = RecurrentBlock(num_levels * dim, width, num_frames=num_frames)
        else:
            self.temporal = nn.ModuleList(TemporalBlock(dim, num_frames) for _ in range(num_levels))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_classes))

    @classmethod
    def _from_pretrained(cls, **settings: Any) -> "DFERNet":  # type: ignore[override]
        """Return the model of an exported folder: one that names no branches was written when there was one."""
        before: dict[str, Any] = {"branches": "static", "time": "attention"}
        return super()._from_pretrained(**(before | settings))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        branches = self._branches(clips)
        marginals, diagnostics = None, {}
        if self.crf is not None:
            branches[self.crf_branch], crf = self.crf(branches[self.crf_branch])
            marginals, diagnostics = crf.pooled, crf.diagnostics
        fusions = {"static": self.fusion, "dynamic": self.dynamic_fusion}
        pooled = [level for name, levels in branches.items() for level in _pooled(levels, fusions[name])]
        return Prediction(self.head(self._read(pooled)), marginals, diagnostics)

    def _branches(self, clips: Float[Tensor, "B T 3 H W"]) -> dict[str, list[Float[Tensor, "B T D _ _"]]]:
        """Return the pyramid's levels, the fine and the coarse one, of each branch."""
        features = [f.unflatten(0, clips.shape[:2]) for f in self.backbone(clips.flatten(0, 1))]
        branches = {}
        if self.pyramid is not None:
            branches["static"] = _levels(self.pyramid, features)
        if self.dynamic_pyramid is not None:
            branches["dynamic"] = _levels(self.dynamic_pyramid, [motion(f, self.dynamic) for f in features])
        return branches

    def _read(self, pooled: list[Float[Tensor, "B T D"]]) -> Float[Tensor, "B E"]:
        """Return the features of clips from those of their frames, at each level of each branch."""
        if self.recurrent is not None:
            return self.recurrent(torch.cat(pooled, -1))
        return torch.cat([temporal(x).mean(1) for temporal, x in zip(self.temporal, pooled, strict=True)], 1)

    def emotion_maps(self, clips: Float[Tensor, "B T 3 H W"]) -> list[Float[Tensor, "B T K _ _"]]:
        """Return the CRF's probability of each class at each cell of each frame, for the fine and the coarse level.

        Over the classes they sum to at most 1; the rest is background.

        Raises:
            UserError: if the model's CRF has no labels.
        """
        if not isinstance(self.crf, MeanFieldCRF):
            raise UserError("emotion maps: the model's CRF has no labels; train with --model.crf meanfield")
        return self.crf.emotion_maps(self._branches(clips)[self.crf_branch])


def motion(x: Float[Tensor, "B T C h w"], kind: Motion) -> Float[Tensor, "B T C h w"]:
    """Return how the features of each frame differ from others of their clip.

    Args:
        x: the features.
        kind: from their mean over the clip ("deviation"), from those of the frame before ("difference"; 0 for the
            first frame), from those of the first frame ("first"), or those of the next frame less them, and for the
            last frame the first ones less them ("original"). Only deviation and first mean the same at another T.
    """
    match kind:
        case "deviation":
            # A small difference of large numbers: not in bf16.
            return x - x.mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        case "difference":
            return x - torch.cat([x[:, :1], x[:, :-1]], 1)
        case "first":
            return x - x[:, :1]
        case "original":
            return x.roll(-1, 1) - x


def _keep_statistics(*modules: nn.Module) -> None:
    """Let batch norm learn no running statistics: they stay a mean of 0 and a variance of 1."""
    for module in (m for branch in modules for m in branch.modules() if isinstance(m, nn.BatchNorm2d)):
        module.momentum = 0.0


def _levels(pyramid: nn.Module, features: list[Float[Tensor, "B T _ _ _"]]) -> list[Float[Tensor, "B T D _ _"]]:
    levels = pyramid([f.flatten(0, 1) for f in features])
    return [level.unflatten(0, f.shape[:2]) for level, f in zip(levels, features, strict=True)]


def _pooled(levels: list[Float[Tensor, "B T D _ _"]], fusion: nn.Module | None) -> list[Float[Tensor, "B T D"]]:
    """Return the features of each frame at both levels, after the fusion of the coarse into the fine."""
    assert fusion is not None, "each branch has a fusion"
    fine, coarse = (level.flatten(0, 1) for level in levels)
    frames = levels[0].shape[:2]
    return [level.mean((2, 3)).unflatten(0, frames) for level in (fusion(fine, coarse), coarse)]
