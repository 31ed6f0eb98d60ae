"""The training loss: cross-entropy of the head plus the auxiliary loss on the CRF's marginals."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def classification_loss(
    logits: Float[Tensor, "B K"],
    marginals: Float[Tensor, "B K"] | None,
    labels: Int64[Tensor, " B"] | Float[Tensor, "B K"],
    valid: Bool[Tensor, " B"],
    label_smoothing: float,
    aux_weight: float,
) -> Float[Tensor, ""]:
    """CE(head) + aux_weight * -log marginal of the label, summed over the valid clips and divided by all B; float32.

    So a clip weighs the same whatever clips are left out beside it, on whichever rank. `marginals` are
    log-probabilities. `labels` are class ids or distributions over the classes (rows sum to 1).
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
    if marginals is not None:  # at weight 0 too: distributed training wants a gradient for every parameter
        # of log-probabilities, cross_entropy is the negative log-likelihood: it normalises what is normalised already
        loss = loss + aux_weight * F.cross_entropy(marginals.float(), labels, reduction="none")
    # where, not a product: 0 * nan is nan, and padding must not be able to harm.
    return torch.where(valid, loss, 0.0).mean()
