"""DFERNet: backbone -> two-level pyramid -> CRF -> top-down fusion -> temporal blocks -> head."""

from typing import Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.crf.backends import Backend
from dfer.crf.layers import BranchMessages, GaussianCRF, MeanFieldCRF
from dfer.model.backbone import FrameBackbone
from dfer.model.pyramid import FeaturePyramid, TopDownFusion
from dfer.model.temporal import TemporalBlock


class Prediction(NamedTuple):
    """What a model returns for a batch of clips."""

    logits: Float[Tensor, "B K"]
    marginals: Float[Tensor, "B K"] | None  # log-probabilities of the CRF's pooled marginals; None if it has no labels
    diagnostics: dict[str, Tensor]  # scalars of the CRF, on the device, without gradient


class DFERNet(nn.Module, PyTorchModelHubMixin):
    """The full model. Clips of a batch never mix.

    `DFERNet.from_pretrained` reads the folders that scripts/export.py writes: the parameters here are the keys of their
    config.json.

    Args:
        num_frames: T, frames of a clip in training; at other T the positions in time are interpolated.
        num_classes: K.
        backbone: name of the network in timm.
        drop_path: that of `FrameBackbone`.
        dim: D, width of the pyramid.
        crf: the mean-field CRF, or for comparison the messages of the original method or the continuous Gaussian CRF,
            which have no marginals and ignore `readout`, `iterations` and `max_coupling`.
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
        crf: Literal["meanfield", "messages", "gaussian"] = "meanfield",
        readout: Literal["none", "labels", "value", "both"] = "both",
        iterations: int = 3,
        max_coupling: float = 8.0,
        crf_backend: Backend = "auto",
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        self.pyramid = FeaturePyramid(self.backbone.channels, dim)
        fine, coarse = self.backbone.strides
        strides = fine, coarse
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
        """Return the CRF's probability of each class at each cell of each frame, for the fine and the coarse level.

        Over the classes they sum to at most 1; the rest is background.

        Raises:
            UserError: if the model's CRF has no labels.
        """
        if not isinstance(self.crf, MeanFieldCRF):
            raise UserError("emotion maps: the model's CRF has no labels; train with --model.crf meanfield")
        return self.crf.emotion_maps(self._levels(clips))
