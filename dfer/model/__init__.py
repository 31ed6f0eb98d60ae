"""The network: `from dfer.model import DFERNet`."""

from dfer.model.dfernet import DFERNet, MeanPoolNet, Prediction

__all__ = ["DFERNet", "MeanPoolNet", "Prediction"]
