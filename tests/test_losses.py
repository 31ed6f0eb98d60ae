"""Losses, against NumPy and plain loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfer.batch import Batch, Mix
from dfer.config import LossConfig
from dfer.lists.annotations import VideoRecord
from dfer.losses import BETA, Objective, build_objective, class_weights, classification_loss
from dfer.model import Prediction

COUNTS = [50, 20, 1, 9, 3, 0, 17]
KINDS = ["cross-entropy", "focal", "class-balanced", "logit-adjusted"]


def test_loss_ignores_padding_even_if_it_is_nan():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 7, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 5])
    marginals = F.log_softmax(torch.randn(6, 7), 1)
    valid = torch.tensor([True, True, False, True, False, True])
    with torch.no_grad():
        logits[2] = torch.nan
    loss = classification_loss(logits, marginals, labels, valid, label_smoothing=0.1, aux_weight=0.3)
    want = sum(
        F.cross_entropy(logits[i], labels[i], label_smoothing=0.1) - 0.3 * marginals[i, labels[i]] for i in (0, 1, 3, 5)
    )
    torch.testing.assert_close(loss, want / 6)
    loss.backward()
    assert logits.grad[[0, 1, 3, 5]].isfinite().all() and not logits.grad[4].any()
    # On two ranks, one of which has nothing but good clips, each clip weighs what it weighs here.
    parts = [
        classification_loss(logits[s], marginals[s], labels[s], valid[s], label_smoothing=0.1, aux_weight=0.3)
        for s in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts) / 3, loss)
    nothing = classification_loss(logits, None, labels, torch.zeros(6, dtype=torch.bool), 0.0, 0.3)
    assert nothing == 0


def test_loss_of_distributions_equals_the_sum_over_classes():
    torch.manual_seed(0)
    logits, marginals = torch.randn(3, 7), F.log_softmax(torch.randn(3, 7), 1)
    valid, labels = torch.tensor([True, False, True]), torch.tensor([2, 0, 5])
    votes = torch.rand(3, 7).softmax(1)
    want = sum(
        -votes[i, c] * (F.log_softmax(logits[i], 0)[c] + 0.3 * marginals[i, c]) for i in (0, 2) for c in range(7)
    )
    torch.testing.assert_close(classification_loss(logits, marginals, votes, valid, 0.0, 0.3), want / 3)
    hard = classification_loss(logits, marginals, labels, valid, 0.1, 0.3)
    torch.testing.assert_close(
        classification_loss(logits, marginals, F.one_hot(labels, 7).float(), valid, 0.1, 0.3), hard
    )


def records() -> list[VideoRecord]:
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    return [VideoRecord(f"v{i}", Path("x"), 9, label, "list:1") for i, label in enumerate(labels)]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def slow_loss(kind: str, logits: np.ndarray, target: np.ndarray) -> float:
    """The oracle: one clip, the papers' formulas as they stand there, float64."""
    counts, total = COUNTS, 0.0
    if kind == "logit-adjusted":  # Menon et al. 2021, eq. 10, tau = 1
        logits = logits + np.log([max(n, 1) / sum(counts) for n in counts])
    p = softmax(logits)
    effective = [(1 - BETA**n) / (1 - BETA) for n in counts]  # Cui et al. 2019, eq. 2
    weights = [1 / e if e else 0.0 for e in effective]
    weights = [w * sum(n > 0 for n in counts) / sum(weights) for w in weights]
    for c in range(7):
        factor = {"focal": (1 - p[c]) ** 2, "class-balanced": weights[c]}.get(kind, 1.0)
        total -= target[c] * factor * np.log(p[c])
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_kind_is_its_papers_formula(kind, smoothing):
    rng = np.random.default_rng(1)
    objective = build_objective(LossConfig(kind=kind, label_smoothing=smoothing, aux_weight=0.3), records())
    logits = rng.normal(0, 2, (5, 7))
    marginals = np.log([softmax(row) for row in rng.normal(0, 2, (5, 7))])
    labels, valid = np.array([0, 2, 4, 6, 1]), np.array([True, True, False, True, True])
    for hard in (True, False):
        target = np.eye(7)[labels] if hard else np.array([softmax(row) for row in rng.normal(0, 1, (5, 7))])
        smooth = (1 - smoothing) * target + smoothing / 7
        want = [
            slow_loss(kind, logits[i], smooth[i]) + 0.3 * slow_loss(kind, marginals[i], target[i])
            for i in np.flatnonzero(valid)
        ]
        given = torch.from_numpy(labels) if hard else torch.from_numpy(target).float()
        scores = torch.from_numpy(logits).float().requires_grad_()
        loss = classification_loss(
            scores, torch.from_numpy(marginals).float(), given, torch.from_numpy(valid), smoothing, 0.3,
            objective.of_clips,
        )  # fmt: skip
        assert loss.item() == pytest.approx(sum(want) / 5, rel=1e-5), (kind, hard)
        loss.backward()
        assert scores.grad.isfinite().all() and not scores.grad[2].any()


def test_classes_are_counted_by_the_votes_where_there_are_votes(tmp_path):
    votes = np.full((100, 7), 0.1)
    votes[:, 3] = 0.4
    rows = [f"v{i}," + ",".join(f"{10 * v:g}" for v in row) for i, row in enumerate(votes)]
    from dfer.lists.annotations import EMOTIONS

    (tmp_path / "votes.csv").write_text("\n".join(["clip," + ",".join(EMOTIONS), *rows]) + "\n")
    config = LossConfig(kind="logit-adjusted", soft_labels=tmp_path / "votes.csv")
    prior = build_objective(config, records()).of_clips.keywords["log_prior"].exp()
    torch.testing.assert_close(prior, torch.tensor([0.1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1]))


def test_rare_classes_weigh_more_and_absent_ones_nothing():
    weights = class_weights(torch.tensor(COUNTS).double()).tolist()
    assert sum(weights) == pytest.approx(6) and weights[5] == 0
    assert weights[2] > weights[4] > weights[3] > weights[6] > weights[1] > weights[0] > 0


@pytest.mark.parametrize("votes", [False, True])
def test_labels_are_mixed_as_the_pixels_were(votes):
    torch.manual_seed(0)
    logits, table = torch.randn(4, 7), torch.rand(9, 7).softmax(1)
    ids, labels, valid = torch.tensor([3, 8, 0, 5]), torch.tensor([1, 6, 2, 2]), torch.ones(4, dtype=torch.bool)
    share, partner = torch.tensor([0.7, 0.7, 1.0, 0.25]), torch.tensor([1, 0, 2, 2])
    batch = Batch(torch.zeros(4, 1, 3, 8, 8), labels, valid, ids, Mix(partner, share))
    loss = Objective(0.1, 0.2, table if votes else None)(Prediction(logits, None, {}), batch)
    target = table[ids] if votes else F.one_hot(labels, 7).float()
    want = 0.0
    for i in range(4):
        mixed = share[i] * target[i] + (1 - share[i]) * target[partner[i]]
        want += -((0.9 * mixed + 0.1 / 7) * F.log_softmax(logits[i], 0)).sum() / 4
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("kind", ["cross-entropy", "focal", "class-balanced", "logit-adjusted"])
def test_what_is_known_of_the_classes_moves_to_a_device_once(kind):
    """A step that copied it would do so from memory that is not pinned."""
    objective = build_objective(LossConfig(kind=kind), records())
    moved = objective.on(torch.device("meta"))
    known = getattr(moved.of_clips, "keywords", {})
    assert len(known) == (kind in ("class-balanced", "logit-adjusted"))
    assert all(tensor.device.type == "meta" for tensor in known.values())
    assert moved._replace(of_clips=objective.of_clips) == objective
