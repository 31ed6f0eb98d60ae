"""The model that a configuration names."""

from torch import nn

from dfer.cli import UserError
from dfer.config import ModelConfig
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet
from dfer.model.backbone import FrameBackbone
from dfer.model.baselines import GRUNet, LSTMNet, MeanPoolNet, R3DNet, STFormer

_OF_FRAMES = {"mean-pool": MeanPoolNet, "r18-lstm": LSTMNet, "r18-gru": GRUNet}


def build_model(config: ModelConfig, num_frames: int, num_classes: int = len(EMOTIONS)) -> nn.Module:
    """Return the model that a configuration names, with random weights, for clips of `num_frames` frames.

    Raises:
        UserError: if there is no such backbone, or it has no stochastic depth and is to have it.
    """
    model = _network(config, num_frames, num_classes)
    if config.freeze == "backbone":
        for module in model.modules():
            if isinstance(module, FrameBackbone):
                module.freeze()
    return model


def _network(config: ModelConfig, num_frames: int, num_classes: int) -> nn.Module:
    if config.name == "r3d-18":
        if config.drop_path:
            raise UserError(f"--model.drop-path {config.drop_path}: r3d-18 has no stochastic depth; leave it out")
        return R3DNet(num_classes, dropout=config.dropout)
    backbone = {"backbone": config.backbone, "drop_path": config.drop_path, "dropout": config.dropout}
    if config.name in _OF_FRAMES:
        return _OF_FRAMES[config.name](num_classes, **backbone)
    if config.name == "st-former":
        return STFormer(num_frames, num_classes=num_classes, **backbone)
    return DFERNet(
        num_frames,
        num_classes=num_classes,
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
