"""The CRF over all space-time tokens of a clip: `from dfer.crf import MeanFieldCRF`."""

from dfer.crf.layers import MeanFieldCRF

__all__ = ["MeanFieldCRF"]
