"""The training loss: cross-entropy of the head plus the auxiliary loss on the CRF's marginals."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dfer.batch import Batch
from dfer.config import LossConfig
from dfer.lists.annotations import VideoRecord, read_votes
from dfer.model import Prediction


class Objective(NamedTuple):
    """What training minimises."""

    label_smoothing: float  # 0 <= s < 1
    aux_weight: float  # of the loss on the CRF's marginals
    votes: Float[Tensor, "N K"] | None = None  # label distributions of all videos, if training uses them

    def __call__(self, prediction: Prediction, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss of a batch, in float32."""
        labels = batch.labels
        if self.votes is not None:
            labels = self.votes[batch.ids].to(labels.device, non_blocking=True)
        return classification_loss(
            prediction.logits, prediction.marginals, labels, batch.valid, self.label_smoothing, self.aux_weight
        )


def build_objective(config: LossConfig, records: Sequence[VideoRecord]) -> Objective:
    """Return the objective that a configuration names, for training on the videos of a list.

    Raises:
        UserError: if the file of votes cannot be read, or lacks one of the videos.
    """
    votes = torch.from_numpy(read_votes(config.soft_labels, records)) if config.soft_labels else None
    return Objective(config.label_smoothing, config.aux_weight, votes)


def classification_loss(
    logits: Float[Tensor, "B K"],
    marginals: Float[Tensor, "B K"] | None,
    labels: Int64[Tensor, " B"] | Float[Tensor, "B K"],
    valid: Bool[Tensor, " B"],
    label_smoothing: float,
    aux_weight: float,
) -> Float[Tensor, ""]:
    """Return CE(head) + aux_weight * -log marginal of the label, summed over valid clips and divided by all B; float32.

    So a clip weighs the same whatever clips are left out beside it, on whichever rank. `marginals` are
    log-probabilities. `labels` are class ids or distributions over the classes (rows sum to 1).
    """
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="none")
    if marginals is not None:  # at weight 0 too: distributed training wants a gradient for every parameter
        # On log-probabilities cross_entropy is the negative log-likelihood: normalising again changes nothing.
        loss = loss + aux_weight * F.cross_entropy(marginals.float(), labels, reduction="none")
    # where, not a product: 0 * nan is nan, and padding must not be able to harm.
    return torch.where(valid, loss, 0.0).mean()
