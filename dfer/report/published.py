"""Set published results beside those of a cross-validation, where both are of DFEW's five folds."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from dfer.lists.releases import DFEW_TEST_COUNTS
from dfer.report.markup import section, table

PROTOCOL = (
    "Protocol: DFEW's 11,697 single-labelled clips in the release's five folds, WAR and UAR as means of the folds. "
    "Most of them pick the best epoch on the test fold, so they stand beside the best epoch here; MAE-DFER reports the "
    "last. None holds out a validation set. One standard error of a WAR of 11,697 clips is 0.4, of UAR 0.5."
)
# As printed by others, of DFEW's five folds: method, what the weights start from, UAR and WAR.
PUBLISHED = (
    ("ResNet18-LSTM", "ResNet18, from scratch", 51.32, 63.85),
    ("Former-DFER", "ResNet18 and transformer, from scratch", 53.69, 65.70),
    ("NR-DFERNet", "ResNet18", 54.21, 68.19),
    ("LOGO-Former", "ResNet18", 54.21, 66.98),
    ("IAL", "ResNet18", 55.71, 69.24),
    ("M3DFEL", "R3D-18, Kinetics", 56.10, 69.25),
    ("LSTPNet", "ResNet18, pre-trained on face images", 60.18, 71.16),
    ("LSGTNet", "ResNet18", 61.33, 72.34),
    ("DFER-CLIP", "CLIP B/32", 59.61, 71.25),
    ("MAE-DFER", "masked autoencoder, VoxCeleb2", 63.41, 74.43),
    ("S4D", "VoxCeleb2 and AffectNet", 66.80, 76.68),
    ("FineCLIPER", "CLIP B/16 and text", 65.98, 76.21),
)


def published_results(counts: Sequence[Sequence[int]]) -> tuple[dict[str, Any] | None, str]:
    """Return published results if the test folds are DFEW's, and a note ("" if there is nothing to note).

    Args:
        counts: test clips of each fold and class. Up to 1 % of DFEW's may be missing.
    """
    if len(counts) == len(DFEW_TEST_COUNTS):
        missing = np.array(DFEW_TEST_COUNTS) - np.array(counts)
        if missing.min() >= 0 and missing.sum() <= 0.01 * np.sum(DFEW_TEST_COUNTS):
            rows = [{"method": m, "start": start, "UAR": uar, "WAR": war} for m, start, uar, war in PUBLISHED]
            note = f"{missing.sum()} of DFEW's {np.sum(DFEW_TEST_COUNTS):,} clips are not in these lists"
            return {"protocol": PROTOCOL, "rows": rows}, note if missing.sum() else ""
    return (
        None,
        "no published figures beside these: the test lists do not have the clips per class of DFEW's five folds",
    )


def published_section(results: dict[str, Any]) -> str:
    """Return the published results as HTML, set off from what was measured here; `results`: of results.json."""
    rows = []
    for kind, text in (("last", "this model, last epoch"), ("best", "this model, best epoch")):
        means = results[kind]["mean_of_folds"]
        cells = [text, *(f"{means[name]['mean']:.2f}" for name in ("WAR", "UAR"))]
        rows.append([f'<span class="seen">{cell}</span>' for cell in cells])
    for row in results["published"]["rows"]:
        name = f"{escape(row['method'])}<small>{escape(row['start'])}</small>"
        rows.append([name, f"{row['WAR']:.2f}", f"{row['UAR']:.2f}"])
    methods = table(["method, and what its weights start from", "WAR, %", "UAR, %"], rows, "runs published")
    lead = (
        "All but the rows in orange are others' figures, as their papers print them: nothing of them was run or "
        f"checked here. {escape(results['published']['protocol'])}"
    )
    return section("Beside what is published", lead, f'<div class="card others">{methods}</div>')
