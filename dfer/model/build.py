"""The model that a configuration names."""

from torch import nn

from dfer.cli import UserError
from dfer.config import ModelConfig
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet
from dfer.model.baselines import GRUNet, LSTMNet, MeanPoolNet, R3DNet, STFormer

_OF_FRAMES = {"mean-pool": MeanPoolNet, "r18-lstm": LSTMNet, "r18-gru": GRUNet}


def build_model(config: ModelConfig, num_frames: int) -> nn.Module:
    """Return the model that a configuration names, with fresh weights, for clips of `num_frames` frames.

    Raises:
        UserError: if there is no such backbone, or its weights cannot be had.
    """
    if config.name == "r3d-18":
        if config.weights is not None:
            raise UserError("--model.weights: r3d-18 has no backbone of timm, and starts from random weights")
        return R3DNet(len(EMOTIONS), dropout=config.dropout)
    backbone = {"backbone": config.backbone, "weights": config.weights, "dropout": config.dropout}
    if config.name in _OF_FRAMES:
        return _OF_FRAMES[config.name](len(EMOTIONS), **backbone)
    if config.name == "st-former":
        return STFormer(num_frames, num_classes=len(EMOTIONS), **backbone)
    return DFERNet(
        num_frames,
        num_classes=len(EMOTIONS),
        dim=config.dim,
        crf=config.crf,
        readout=config.readout,
        iterations=config.iterations,
        max_coupling=config.max_coupling,
        crf_backend=config.crf_backend,
        **backbone,
    )
