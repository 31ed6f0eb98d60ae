"""Lists of videos: which there are, what their labels mean, and where their frames lie."""

from dfer.lists.index import load_index

__all__ = ["load_index"]
