"""Baselines to compare DFERNet with. Clips of a batch never mix, and no baseline has marginals.

All but R3DNet take a backbone of timm as DFERNet does:

    num_classes: K.
    backbone: name of the network in timm.
    drop_path: that of `FrameBackbone`.
    dropout: before the head.
"""

from typing import Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.model.backbone import FrameBackbone
from dfer.model.dfernet import Prediction
from dfer.model.resize import resize, resize_time
from dfer.model.temporal import RecurrentBlock


class MeanPoolNet(nn.Module, PyTorchModelHubMixin):
    """The backbone, mean-pooled over space and time, so that the order of frames does not matter."""

    def __init__(
        self, num_classes: int = 7, *, backbone: str = "resnet18", drop_path: float = 0.0, dropout: float = 0.2
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.backbone.channels[-1], num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        return Prediction(self.head(_pooled_frames(self.backbone, clips).mean(1)), None, {})


class _RecurrentNet(nn.Module):
    """The backbone, mean-pooled over space, and a recurrent network over the frames, whose last state is classified."""

    UNIT: Literal["gru", "lstm"]

    def __init__(
        self, num_classes: int = 7, *, backbone: str = "resnet18", drop_path: float = 0.0, dropout: float = 0.2
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        width = self.backbone.channels[-1]
        self.recurrent = RecurrentBlock(width, width, self.UNIT)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        return Prediction(self.head(self.recurrent(_pooled_frames(self.backbone, clips))), None, {})


class LSTMNet(_RecurrentNet, PyTorchModelHubMixin):
    """ResNet18-LSTM of the field's tables: the recurrent network is an LSTM."""

    UNIT = "lstm"


class GRUNet(_RecurrentNet, PyTorchModelHubMixin):
    """The same with a GRU."""

    UNIT = "gru"


class R3DNet(nn.Module, PyTorchModelHubMixin):
    """R3D-18 (Tran et al., CVPR 2018, section 4.1; torchvision's, from random weights): a ResNet18 of 3-D convolutions.

    Args:
        num_classes: K.
        dropout: before the head.
    """

    def __init__(self, num_classes: int = 7, *, dropout: float = 0.2):
        super().__init__()
        from torchvision.models.video import r3d_18  # with torch's compiler, which others need not wait for

        self.backbone = r3d_18(weights=None)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.backbone.fc.in_features, num_classes))
        self.backbone.add_module("fc", nn.Identity())

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        return Prediction(self.head(self.backbone(clips.transpose(1, 2))), None, {})


class STFormer(nn.Module, PyTorchModelHubMixin):
    """A spatial and a temporal transformer after Former-DFER (Zhao and Liu, ACM Multimedia 2021).

    The spatial transformer (section 3.2: one layer, width 256) relates the cells of C4, from which the backbone's last
    stage makes C5; the temporal one (section 3.3: three layers, width 512) relates its pooled frames and a class token,
    which is classified. Both have 8 heads and MLPs twice as wide; 18 M parameters with ResNet18, as in the paper.
    Positions are learned, for 7 x 7 cells and T frames, and interpolated for other numbers.

    Args:
        num_frames: T, frames of a clip in training.

    Raises:
        UserError: if the backbone is no ResNet, whose last stage can be told apart.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        num_classes: int = 7,
        backbone: str = "resnet18",
        drop_path: float = 0.0,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        if "layer4" not in dict(self.backbone.net.named_children()):
            raise UserError(f"--model.backbone {backbone}: st-former takes a ResNet, such as resnet18")
        inner, width = self.backbone.channels
        self.cells = nn.Parameter(0.02 * torch.randn(1, inner, 7, 7))
        self.spatial = _transformer(inner, num_layers=1)
        self.frames = nn.Parameter(0.02 * torch.randn(1, width, num_frames))
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.temporal = _transformer(width, num_layers=3)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        batch, num_frames = clips.shape[:2]
        x = clips.flatten(0, 1)
        for name, stage in self.backbone.net.named_children():
            x = stage(self._relate_cells(x) if name == "layer4" else x)
        x = x.mean((2, 3)).unflatten(0, (batch, -1))  # (B, T, C)
        x = x + resize_time(self.frames, num_frames).transpose(1, 2)
        x = self.temporal(torch.cat([self.token.expand(batch, -1, -1), x], 1))
        return Prediction(self.head(x[:, 0]), None, {})

    def _relate_cells(self, c4: Float[Tensor, "F C h w"]) -> Float[Tensor, "F C h w"]:
        size = c4.shape[-2:]
        x = c4 + resize(self.cells, size)
        return self.spatial(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, size)


def _transformer(width: int, num_layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, 8, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


def _pooled_frames(backbone: FrameBackbone, clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T C"]:
    """Return C5 of each frame, mean-pooled over space."""
    return backbone(clips.flatten(0, 1))[-1].mean((2, 3)).unflatten(0, (clips.shape[0], -1))
