"""The batch that passes from the loader to the model, and the letters used for shapes everywhere.

B clips in a batch, T frames of a clip, C channels, H W height and width, h w those of a feature map, D feature width,
K classes, N videos of a list (in dfer/crf/layers.py: tokens of a clip).
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Batch(NamedTuple):
    """A batch of clips on their device."""

    clips: Float[Tensor, "B T 3 H W"]  # normalised; channels-last in memory
    labels: Int64[Tensor, " B"]
    valid: Bool[Tensor, " B"]  # False: padding that fills up the last batch; counts nowhere
    ids: Int64[Tensor, " B"]  # row of the video in its ClipIndex, on the CPU
