"""Say from predictions what holds with confidence: intervals of a share, and of WAR and UAR by resampling clips."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from dfer.cli import UserError
from dfer.metrics import ConfusionMatrix
from dfer.run.predictions import Predictions, align, confusion_matrix


def wilson(right: int | float, total: int) -> tuple[float, float]:
    """Return the 95 % confidence interval (low, high) of right / total in percent, after Wilson (1927).

    It holds for few clips too, and where none or all are right; nan without clips.

    `right` may be a mean over runs on the same clips.
    """
    if total == 0:
        return math.nan, math.nan
    z2 = 1.959964**2
    share = right / total
    centre, half = share + z2 / (2 * total), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total)
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def bootstrap(
    labels: Int64[np.ndarray, " N"],
    right: Bool[np.ndarray, "N R"],
    resamples: int = 4000,
    within_classes: bool = False,
) -> tuple[Float64[np.ndarray, "S R"], Float64[np.ndarray, "S R"]]:
    """Return WAR and UAR in percent of R runs on `resamples` draws of N clips with replacement, the same for all runs.

    Both depend only on how many clips of each kind (label, which runs are right) were drawn, and those counts are
    multinomial: no clip needs to be drawn by itself. UAR is the mean over the classes that were drawn. With
    `within_classes` as many clips of each class are drawn as there are: the sizes of the classes, which UAR does not
    depend on, then do not vary.
    """
    table = np.column_stack([labels, right]).astype(np.int64)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    rng = np.random.Generator(np.random.Philox(0))
    groups = [counts[kinds[:, 0] == label] for label in np.unique(labels)] if within_classes else [counts]
    parts = [rng.multinomial(group.sum(), group / group.sum(), size=resamples) for group in groups]
    drawn = np.concatenate(parts, axis=1)  # (S, kinds), which are sorted by label
    recalls = []
    for label in np.unique(labels):
        mine = kinds[:, 0] == label
        with np.errstate(invalid="ignore"):
            recalls.append(drawn[:, mine] @ kinds[mine, 1:] / drawn[:, mine].sum(1, keepdims=True))
    return 100 * (drawn @ kinds[:, 1:]) / len(labels), 100 * np.nanmean(recalls, axis=0)


def interval(samples: Float64[np.ndarray, " S"]) -> tuple[float, float]:
    """Return the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def precision_and_f1(
    counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"],
) -> tuple[Float64[np.ndarray, " K"], Float64[np.ndarray, " K"]]:
    """Return precision and F1 of each class in percent; rows of `counts` are labels, columns predictions.

    Precision is the share of what was taken for a class that is of it, nan where nothing was. F1 is its harmonic mean
    with the recall, 2 right / (clips + taken for it), and nan where there is neither a clip nor a prediction.
    """
    right, clips, taken = counts.diagonal().astype(np.float64), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        return 100 * right / taken, 100 * 2 * right / (clips + taken)


class Calibration(NamedTuple):
    """How often predictions of a confidence are right, in bins of equal width over (0, 1]."""

    clips: Int64[np.ndarray, " M"]  # in each bin
    right: Int64[np.ndarray, " M"]
    confidence: Float64[np.ndarray, " M"]  # mean in each bin; nan in an empty one

    @property
    def error(self) -> float:
        """Return the expected calibration error in percentage points (Guo et al. 2017, eq. 3).

        ECE = sum over the bins of clips / N x |right / clips - mean confidence|.
        """
        filled = self.clips > 0
        clips, right, confidence = (column[filled] for column in self)
        return float(100 * (clips * np.abs(right / clips - confidence)).sum() / clips.sum())


def calibration(predictions: Predictions, num_bins: int = 15) -> Calibration:
    """Return how well the probability of the predicted class tells how often it is right.

    A clip of confidence p lies in the bin m with (m - 1) / M < p <= m / M.
    """
    rows = np.arange(len(predictions.labels))
    confidence = predictions.probabilities[rows, predictions.predicted]
    right = predictions.labels == predictions.predicted
    bins = (np.searchsorted(np.arange(num_bins + 1) / num_bins, confidence) - 1).clip(0, num_bins - 1)
    clips, of_right = (np.bincount(bins, weights, num_bins) for weights in (None, right))
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, confidence, num_bins) / clips
    return Calibration(clips.astype(np.int64), of_right.astype(np.int64), mean)


class Pool(NamedTuple):
    """Predictions on the test clips of all folds: each clip is in one fold, and predicted once per seed."""

    folds: Int64[np.ndarray, " N"]  # 0 .. F - 1
    labels: Int64[np.ndarray, " N"]
    predicted: Int64[np.ndarray, "N R"]  # a column per seed

    def confusions(self) -> list[list[ConfusionMatrix]]:
        """Return the matrices of each seed and, within it, of each fold."""
        found = []
        for predicted in self.predicted.T:
            found.append([])
            for fold in range(int(self.folds.max()) + 1):
                mine = self.folds == fold
                found[-1].append(confusion_matrix(self.labels[mine], predicted[mine]))
        return found

    def intervals(self, resamples: int = 4000) -> dict[str, tuple[float, float]]:
        """Return 95 % bootstrap intervals of WAR and UAR over all folds, in percent.

        For WAR all clips are resampled, for UAR those of each class. With several seeds they are
        those of the seeds' mean: a clip that is drawn brings its predictions of all seeds, since three seeds do not
        make three clips of it.
        """
        right = self.predicted == self.labels[:, None]
        wars, _ = bootstrap(self.labels, right, resamples)
        _, uars = bootstrap(self.labels, right, resamples, within_classes=True)
        return {"WAR": interval(wars.mean(1)), "UAR": interval(uars.mean(1))}


def pool(runs: Sequence[Sequence[Predictions]]) -> Pool:
    """Put together what the runs of each seed predicted on each fold: `runs` holds a sequence of folds per seed.

    Raises:
        UserError: if two seeds were not evaluated on the same clips and labels.
    """
    columns = []
    for seed in runs:
        columns.append([])
        for number, (first, fold) in enumerate(zip(runs[0], seed, strict=True), start=1):
            order = align(first, fold)
            if order is None:
                raise UserError(f"fold {number} of two seeds was evaluated on other clips or labels")
            columns[-1].append(fold.predicted[order])
    return Pool(
        np.repeat(np.arange(len(runs[0])), [len(fold.labels) for fold in runs[0]]),
        np.concatenate([fold.labels for fold in runs[0]]),
        np.stack([np.concatenate(column) for column in columns], axis=1),
    )
