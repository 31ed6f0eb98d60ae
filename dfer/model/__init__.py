"""The network: `from dfer.model import DFERNet`."""

from dfer.model.dfernet import DFERNet, MeanPoolNet

__all__ = ["DFERNet", "MeanPoolNet"]
