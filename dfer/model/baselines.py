"""Baselines to compare DFERNet with."""

from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float
from torch import Tensor, nn

from dfer.model.backbone import FrameBackbone
from dfer.model.dfernet import Prediction


class MeanPoolNet(nn.Module, PyTorchModelHubMixin):
    """The same backbone, mean-pooled over space and time, so that the order of frames does not matter.

    Args:
        num_classes: K.
        backbone: name of the network in timm.
        drop_path: that of `FrameBackbone`.
        dropout: before the head.
    """

    def __init__(
        self,
        num_classes: int = 7,
        *,
        backbone: str = "resnet18",
        drop_path: float = 0.0,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.backbone = FrameBackbone(backbone, drop_path)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.backbone.channels[-1], num_classes))

    def forward(self, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        features = self.backbone(clips.flatten(0, 1))[-1].mean((2, 3))  # (B*T, C)
        return Prediction(self.head(features.unflatten(0, (clips.shape[0], -1)).mean(1)), None, {})
