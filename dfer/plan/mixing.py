"""Mixing: what mixup and cutmix do to pairs of clips.

Neighbours in the epoch's order make a pair, the first and the second, the third and the fourth. A batch of an even
number of clips holds whole pairs, on however many processes.
"""

import numpy as np
from jaxtyping import Float32, Int64

from dfer.plan.augmentation import Augmentation

NOTHING = (1.0, 0.0, 0.0, 0.0, 0.0)


def draw_mixes(
    generator: np.random.Generator, order: Int64[np.ndarray, " N"], augmentation: Augmentation
) -> Float32[np.ndarray, "N 5"]:
    """Return `EpochPlan.mix`: of each pair, mixup's weight or cutmix's box, each in half of them if both are on.

    Mixup (Zhang et al. 2018, "mixup: beyond empirical risk minimization", eq. of section 2): weights of Beta(a, a).
    Cutmix (Yun et al. 2019, eq. 1 and 2): a box of the frame's proportions, of 1 - Beta(a, a) of its area, whose centre
    lies anywhere and which is cut to the frame.
    """
    pairs = len(order) // 2
    share = 0.5 if augmentation.mixup and augmentation.cutmix else float(augmentation.mixup == 0)
    cut = generator.random(pairs) < share
    centre = generator.random((pairs, 2))
    alpha = np.where(cut, augmentation.cutmix, augmentation.mixup)
    weight = generator.beta(alpha, alpha)
    half = np.sqrt(1 - weight)[:, None] / 2
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half, 1)
    drawn = np.concatenate([weight[:, None], low, high - low], axis=1)
    drawn[cut, 0] = 1
    drawn[~cut, 1:] = 0
    mix = np.tile(np.array(NOTHING, dtype=np.float32), (len(order), 1))
    mix[order[0 : 2 * pairs : 2]] = mix[order[1 : 2 * pairs : 2]] = drawn
    return mix
