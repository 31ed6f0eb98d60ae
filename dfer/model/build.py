"""The model that a configuration names."""

from torch import nn

from dfer.config import ModelConfig
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet, MeanPoolNet


def build_model(config: ModelConfig, num_frames: int) -> nn.Module:
    """Return the model that a configuration names, with fresh weights, for clips of `num_frames` frames.

    Raises:
        UserError: if there is no such backbone, or its weights cannot be had.
    """
    backbone = {"backbone": config.backbone, "weights": config.weights, "dropout": config.dropout}
    if config.name == "mean-pool":
        return MeanPoolNet(len(EMOTIONS), **backbone)
    return DFERNet(
        num_frames,
        num_classes=len(EMOTIONS),
        dim=config.dim,
        branches=config.branches,
        dynamic=config.dynamic,
        time=config.time,
        crf=config.crf,
        crf_branch=config.crf_branch,
        readout=config.readout,
        iterations=config.iterations,
        max_coupling=config.max_coupling,
        crf_backend=config.crf_backend,
        **backbone,
    )
