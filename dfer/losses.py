"""The training loss: that of the head plus the auxiliary loss on the CRF's marginals, which is of the same kind."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dfer.batch import Batch
from dfer.config import LossConfig
from dfer.lists.annotations import EMOTIONS, VideoRecord, read_votes
from dfer.model import Prediction

GAMMA = 2.0  # of the focal loss: the best in its paper
# Of the class-balanced loss, whose paper tries 0.9 to 0.9999. On lists of this field (2,000 videos of the largest
# class, 100 of the smallest) 0.9999 weighs about as the inverse of the counts does, 18 to 1; 0.999 weighs 9 to 1.
BETA = 0.999

Labels = Int64[Tensor, " B"] | Float[Tensor, "B K"]  # class ids, or distributions over the classes (rows sum to 1)
# The loss of each clip, from logits or log-probabilities, which are logits too; labels; and label smoothing.
LossOfClips = Callable[[Float[Tensor, "B K"], Tensor, float], Float[Tensor, " B"]]


def cross_entropy(logits: Float[Tensor, "B K"], labels: Labels, smoothing: float) -> Float[Tensor, " B"]:
    """Return the cross-entropy of each clip, float32."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")


def focal(logits: Float[Tensor, "B K"], labels: Labels, smoothing: float) -> Float[Tensor, " B"]:
    """Return the focal loss of each clip (Lin et al. 2017, eq. 4), -(1 - p)^GAMMA log p, float32.

    Of a distribution over the classes, and so of smoothed labels, it is the mean.
    """
    log_p = F.log_softmax(logits.float(), 1)
    target = labels if labels.is_floating_point() else F.one_hot(labels, log_p.shape[1])
    target = (1 - smoothing) * target + smoothing / log_p.shape[1]
    return -(target * (1 - log_p.exp()) ** GAMMA * log_p).sum(1)


def class_balanced(
    logits: Float[Tensor, "B K"], labels: Labels, smoothing: float, weights: Float[Tensor, " K"]
) -> Float[Tensor, " B"]:
    """Return the cross-entropy of each clip (Cui et al. 2019, eq. 12) with the classes' weights, float32."""
    return F.cross_entropy(logits.float(), labels, weights, label_smoothing=smoothing, reduction="none")


def class_weights(counts: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return the weights of classes by their videos: (1 - BETA) / (1 - BETA^n), with a mean of 1; 0 without videos."""
    weights = torch.where(counts > 0, (1 - BETA) / (1 - BETA**counts), 0.0)
    return weights * ((counts > 0).sum() / weights.sum())


def logit_adjusted(
    logits: Float[Tensor, "B K"], labels: Labels, smoothing: float, log_prior: Float[Tensor, " K"]
) -> Float[Tensor, " B"]:
    """Return the cross-entropy of each clip with logits that know the classes' shares (Menon et al. 2021, eq. 10).

    Evaluation takes the logits as they are: those of classes of equal size. float32.
    """
    return F.cross_entropy(logits.float() + log_prior, labels, label_smoothing=smoothing, reduction="none")


class Objective(NamedTuple):
    """What training minimises."""

    label_smoothing: float  # 0 <= s < 1
    aux_weight: float  # of the loss on the CRF's marginals
    votes: Float[Tensor, "N K"] | None = None  # label distributions of all videos, if training uses them
    of_clips: LossOfClips = cross_entropy

    def on(self, device: torch.device) -> "Objective":
        """Return the same with what it knows of the classes on a device, where every step would copy it otherwise."""
        if not isinstance(self.of_clips, partial):
            return self
        known = {name: tensor.to(device) for name, tensor in self.of_clips.keywords.items()}
        return self._replace(of_clips=partial(self.of_clips.func, **known))

    def labelled(self, batch: Batch) -> Batch:
        """Return the batch with the labels of training: the annotators' votes if it uses them, looked up on the host.

        A batch that has them already stays as it is.
        """
        if self.votes is None or batch.labels.is_floating_point():
            return batch
        return batch._replace(labels=self.votes[batch.ids].to(batch.labels.device, non_blocking=True))

    def __call__(self, prediction: Prediction, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss of a batch, in float32."""
        labels, mix = self.labelled(batch).labels, batch.mix
        if mix is not None:
            labels = labels if self.votes is not None else F.one_hot(labels, len(EMOTIONS)).float()
            labels = mix.share[:, None] * labels + (1 - mix.share[:, None]) * labels[mix.partner]
        kinds = self.label_smoothing, self.aux_weight, self.of_clips
        return classification_loss(prediction.logits, prediction.marginals, labels, batch.valid, *kinds)


def build_objective(config: LossConfig, records: Sequence[VideoRecord]) -> Objective:
    """Return the objective that a configuration names, for training on the videos of a list.

    Raises:
        UserError: if the file of votes cannot be read, or lacks one of the videos.
    """
    votes = torch.from_numpy(read_votes(config.soft_labels, records)) if config.soft_labels else None
    return Objective(config.label_smoothing, config.aux_weight, votes, _loss_of_clips(config, records, votes))


def _loss_of_clips(
    config: LossConfig, records: Sequence[VideoRecord], votes: Float[Tensor, "N K"] | None
) -> LossOfClips:
    """Return the kind of loss, with what it knows of the sizes of the classes: by the labels, or by all votes."""
    if config.kind == "cross-entropy":
        return cross_entropy
    if config.kind == "focal":
        return focal
    labels = torch.tensor([record.label for record in records], dtype=torch.int64)
    counts = (torch.bincount(labels, minlength=len(EMOTIONS)) if votes is None else votes.sum(0)).double()
    if config.kind == "class-balanced":
        return partial(class_balanced, weights=class_weights(counts).float())
    # A class without videos is taken for one with one, as no logit can be adjusted by minus infinity.
    return partial(logit_adjusted, log_prior=(counts.clamp(min=1) / counts.sum()).log().float())


def classification_loss(
    logits: Float[Tensor, "B K"],
    marginals: Float[Tensor, "B K"] | None,
    labels: Labels,
    valid: Bool[Tensor, " B"],
    label_smoothing: float,
    aux_weight: float,
    of_clips: LossOfClips = cross_entropy,
) -> Float[Tensor, ""]:
    """Return the loss of the head + aux_weight * that of the marginals, summed over valid clips and divided by all B.

    So a clip weighs the same whatever clips are left out beside it, on whichever rank. `marginals` are
    log-probabilities. float32.
    """
    loss = of_clips(logits, labels, label_smoothing)
    if marginals is not None:  # at weight 0 too: distributed training wants a gradient for every parameter
        # On log-probabilities cross_entropy is the negative log-likelihood: normalising again changes nothing.
        loss = loss + aux_weight * of_clips(marginals, labels, 0.0)
    # where, not a product: 0 * nan is nan, and padding must not be able to harm.
    return torch.where(valid, loss, 0.0).mean()
