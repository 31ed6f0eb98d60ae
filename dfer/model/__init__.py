"""The networks: `from dfer.model import DFERNet`."""

from dfer.model.baselines import MeanPoolNet
from dfer.model.dfernet import DFERNet, Prediction

__all__ = ["DFERNet", "MeanPoolNet", "Prediction"]
