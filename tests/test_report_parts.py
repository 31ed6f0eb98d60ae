"""The parts of a run's page: precision, F1, calibration against loops; scenes, times, mistakes, what was fed."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipes.build import build_loader
from dfer.config import Config
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import load_index
from dfer.plan.augmentation import Augmentation
from dfer.report import page as report
from dfer.report import read_run
from dfer.report.facts import epoch_seconds, made_section, scene_of, scenes_section
from dfer.report.gallery import mistakes_section
from dfer.report.inspection import Clip, read_fed
from dfer.report.live import FIRST_S, SHARE, LivePage
from dfer.report.statistics import calibration, precision_and_f1
from dfer.run.distributed import World
from tests.test_report import (
    Page,
    as_predictions,
    closed_in_itself,
    read_page,
    some_predictions,
    some_rows,
    tiny_config,
    write_run,
)

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


# ---- Numbers


def test_precision_and_f1_against_loops():
    predictions = as_predictions(some_predictions(200, 7))
    predictions.predicted[predictions.predicted == 4] = 3  # nothing is taken for 4; and there are no clips of 5
    found = precision_and_f1(predictions.confusion().counts.numpy())
    pairs = list(zip(predictions.labels.tolist(), predictions.predicted.tolist(), strict=True))
    for k, (precision, f1) in enumerate(zip(*found, strict=True)):
        taken = [label == k for label, predicted in pairs if predicted == k]
        of_class = [predicted == k for label, predicted in pairs if label == k]
        if not taken:
            assert math.isnan(precision)
        else:
            assert precision == pytest.approx(100 * sum(taken) / len(taken))
        if taken and of_class and sum(taken):
            p, r = sum(taken) / len(taken), sum(of_class) / len(of_class)
            assert f1 == pytest.approx(100 * 2 * p * r / (p + r))
        else:
            assert (math.isnan(f1) and not taken and not of_class) or f1 == 0
    assert math.isnan(found[0][4]) and found[1][4] == 0


def naive_ece(predictions, num_bins):
    """Bin by bin, clip by clip, as the paper writes it."""
    total, n = 0.0, len(predictions.labels)
    for m in range(1, num_bins + 1):
        inside = []
        for label, predicted, p in zip(
            predictions.labels, predictions.predicted, predictions.probabilities, strict=True
        ):
            if (m - 1) / num_bins < p[predicted] <= m / num_bins:
                inside.append((label == predicted, p[predicted]))
        if inside:
            right = sum(hit for hit, _ in inside) / len(inside)
            sure = sum(p for _, p in inside) / len(inside)
            total += len(inside) / n * abs(right - sure)
    return 100 * total


@pytest.mark.parametrize("num_bins", [1, 5, 10, 15])
def test_calibration_against_loops(num_bins):
    predictions = as_predictions(some_predictions(300, 11))
    for i, share in enumerate((0.2, 0.4, 0.6, 1.0, 1 / 3)):  # on the edges of bins
        predictions.probabilities[i, predictions.predicted[i]] = share
    found = calibration(predictions, num_bins)
    assert found.error == pytest.approx(naive_ece(predictions, num_bins), abs=1e-9)
    sure = [p[k] for p, k in zip(predictions.probabilities, predictions.predicted, strict=True)]
    bins = [sum(m / num_bins < p <= (m + 1) / num_bins for p in sure) for m in range(num_bins)]
    assert found.clips.tolist() == bins and found.clips.sum() == 300
    assert found.right.sum() == (predictions.labels == predictions.predicted).sum()


def test_a_model_that_knows_how_sure_it_may_be_has_no_calibration_error():
    rows = [("c", 0, 0 if i < 80 else 1, *((0.8, 0.2) if i < 80 else (0.2, 0.8)), *[0] * 5) for i in range(100)]
    assert calibration(as_predictions(rows)).error == pytest.approx(0, abs=1e-9)
    sure = as_predictions([(*row[:3], *(1.0 if k == row[2] else 0.0 for k in range(7))) for row in rows])
    assert calibration(sure).error == pytest.approx(20)


# ---- Scenes and times


@pytest.mark.parametrize(
    ("name", "scene"),
    [
        ("2_ClipsforFaceCrop/Action/Happy/0267", "Action"),
        ("/data/Daily Life/Sadness/1.mp4", "Daily Life"),
        ("clips/0001", None),
        ("Happy/0001", None),
        ("a/b/0001", None),
        ("Happy", None),
        ("", None),
    ],
)
def test_the_scene_is_the_folder_above_the_emotions(name, scene):
    assert scene_of(name) == scene


def test_scenes_are_counted_apart():
    names = [f"x/{('Action', 'War')[i % 2]}/{EMOTIONS[0]}/{i}" if i < 90 else f"odd/{i}" for i in range(100)]
    predictions = as_predictions(some_predictions(100, 2, names=names))
    words = Page(scenes_section(predictions)).words
    for scene, mine in (("Action", range(0, 90, 2)), ("War", range(1, 90, 2)), ("none in its path", range(90, 100))):
        right = [predictions.labels[i] == predictions.predicted[i] for i in mine]
        at = words.index(scene)
        assert words[at + 1 : at + 3] == [str(len(right)), f"{100 * sum(right) / len(right):.1f}"]
    one = as_predictions(some_predictions(3, 2, names=["a/Action/Happy/1", "a/Action/Sad/2", "b"]))
    assert scenes_section(one) is None


def test_the_time_of_an_epoch_leaves_out_where_the_run_was_stopped(tmp_path):
    def at(minute):
        return f"2026-01-01T10:{minute:02d}:00+00:00"

    rows = [{"step": m, "val/WAR": 1.0, "time": at(m)} for m in (2, 5, 8, 30, 33)]
    rows.insert(1, {"step": 3, "train/loss": 1.0, "time": at(3)})
    folder = write_run(tmp_path / "run", Config(), None, rows)
    starts = [{"time": at(0), "faces": ""}, {"time": at(20), "faces": "", "cpu": "A <b>", "cores": 3}]
    (folder / "started.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    run = read_run(folder)
    assert epoch_seconds(run) == [180, 180, 180]
    words = Page(made_section(run)).words
    assert words[words.index("processor") + 1] == "A <b>" and words[words.index("cores") + 1] == "3"
    assert words[words.index("time per epoch") + 1].startswith("3 min 0 s")
    older = read_run(write_run(tmp_path / "older", Config(), None, [{"step": 1, "val/WAR": 1.0}] * 2))
    assert epoch_seconds(older) == [] and "was not recorded" in made_section(older)


# ---- Clips


def test_mistakes_can_be_sorted_and_filtered():
    """What the page's script needs: the values stand at the clips, and the classes to choose from are those there."""
    predictions = as_predictions(some_predictions(60, 4))
    wrong = np.flatnonzero(predictions.labels != predictions.predicted).tolist()
    clips = [Clip(row, np.zeros((6, 40, 40, 3), np.uint8), None, None) for row in wrong]
    page = Page(mistakes_section(predictions, clips))
    minis = [a for tag, a in page.elements if tag == "figure"]
    for row, found in zip(wrong, minis, strict=True):
        label, predicted = predictions.labels[row], predictions.predicted[row]
        assert (int(found["data-label"]), int(found["data-seen"])) == (label, predicted)
        assert float(found["data-share"]) == pytest.approx(predictions.probabilities[row, predicted], abs=1e-6)
    values = [a["value"] for tag, a in page.elements if tag == "option"]
    assert values == ["share", "label", "seen", "", *map(str, sorted(set(predictions.labels[wrong].tolist())))]
    assert all(f"data-{value}" in minis[0] for value in values[:3])


def test_what_training_is_fed_is_what_the_loader_hands_out(clips):
    config = tiny_config(clips)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    index = load_index(config.data.train_list)
    fed = read_fed(config, build_loader)
    labels = dict(line.rsplit(maxsplit=2)[::2] for line in (clips / "train.txt").read_text().splitlines())
    assert len(fed) == len({clip.name for clip in fed}) == 8
    assert [clip.text for clip in fed] == [EMOTIONS[int(labels[clip.name])] for clip in fed]
    row = {record.name: number for number, record in enumerate(index.records)}[fed[3].name]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for mode, position, frames in (("train", 3, fed[3].frames), ("eval", row, fed[3].plain)):
        loader = build_loader(config, index, mode, ALONE)
        pixels = next(loader(0, position)).clips[0].permute(0, 2, 3, 1).numpy()
        shown = (255 * (pixels * std + mean)).clip(0, 255)  # brightening goes beyond what a picture can show
        assert np.abs(shown - frames).max() <= 0.51, mode
    assert any((clip.frames != clip.plain).any() for clip in fed)
    augmentation = Augmentation(mixup=0.4)
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, augmentation=augmentation))
    texts = [clip.text for clip in read_fed(mixed, build_loader)]
    assert all(re.fullmatch(r"(\d+% \w+, \d+% \w+)|\w+", text) for text in texts) and any("%" in t for t in texts)


def test_values_are_said_where_one_points(tmp_path):
    rows = some_predictions(60, 1)
    folder = write_run(tmp_path / "run", Config(), rows, some_rows(3))
    report.write_records(read_run(folder))
    said = [word for word in read_page(folder).words if " taken for " in word and " of " in word]
    counts = as_predictions(rows).confusion().counts.tolist()
    for i, label in enumerate(EMOTIONS):
        for j, other in enumerate(EMOTIONS):
            assert f"{label} taken for {other}: {counts[i][j]} of {sum(counts[i])}" in said
    assert "WAR, step 20: 22" in read_page(folder).words
    assert "Happy, evaluation 3: 0.0 %" in read_page(folder).words


# ---- While the run goes on


def test_the_page_of_a_run_that_goes_on_takes_no_more_than_its_share(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", Config(), some_predictions(30, 0), some_rows(1))
    now, cost, said = [0.0], [1.0], []
    monkeypatch.setattr("dfer.report.live.time.perf_counter", lambda: now[0])
    written = []

    def write(run):
        written.append(now[0])
        now[0] += cost[0]

    monkeypatch.setattr(report, "write_records", write)
    page = LivePage(folder, said.append)
    for _ in range(400):
        now[0] += 10
        page.write()
    assert written[0] == pytest.approx(FIRST_S / SHARE, abs=11) and 60 < len(written) < 80  # of 4,000 s and 1 s each
    assert sum(cost[0] for _ in written) <= SHARE * now[0] and not said
    LivePage(None, said.append).write()


def test_a_page_that_cannot_be_written_costs_one_line_and_not_the_run(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", Config(), some_predictions(30, 0), some_rows(1))
    now, said = [0.0], []
    monkeypatch.setattr("dfer.report.live.time.perf_counter", lambda: now[0])
    page = LivePage(folder, said.append)
    now[0] = 1e6
    page.write()
    closed_in_itself(read_page(folder))
    assert "the run goes on" in read_page(folder).text and not said
    (folder / "config.json").write_text("torn")
    for now[0] in (2e6, 3e6):
        page.write()
    assert len(said) == 1 and said[0].startswith("no report before the end of the run (") and "\n" not in said[0]
    assert not list(Path(folder).glob("*.partial"))
