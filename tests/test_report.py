"""The page about a run: its numbers are those of the records, nothing is loaded, and what is missing is said."""

import base64
import csv
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import scripts.report
from dali_pipes.build import build_loader
from dfer.config import Config, DataConfig, ModelConfig
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import load_index
from dfer.model.build import build_model
from dfer.report import figures, read_run
from dfer.report import page as report
from dfer.report.cards import TEXTS
from dfer.report.gallery import upsample
from dfer.report.inspection import MISTAKES, Clip, Inspection, choose, free_energies, inspect_model
from dfer.report.live import print_report
from dfer.report.statistics import bootstrap, interval, wilson
from dfer.run.checkpoint import save_checkpoint
from dfer.run.distributed import World
from dfer.run.predictions import Predictions, align
from dfer.state import load_trained
from tests.conftest import run_python

TEMPLATE = Path(report.__file__).with_name("report.html").read_text()
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A stupid browser: which elements there are, whether all are closed in order, and the text of each."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.words, self.open, self.styles = [], [], [], ""
        self.script = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"{tag} closes nothing, at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif self.open and self.open[-1] == "script":
            self.script += data
        elif data.strip():
            self.words.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def read_page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def closed_in_itself(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form", "foreignobject", "a", "video"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, name, value[:80])
                assert not value.startswith("#") or value[1:] in ids
            for target in re.findall(r"url\((.*?)\)", value or ""):
                assert target.startswith("#") and target[1:] in ids, (tag, target)
    for style in (page.styles, *(a["style"] for _, a in page.elements if "style" in a)):
        assert "@import" not in style and "http" not in style
    assert "url(" not in page.styles
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    # One script, that of the template, which reaches nothing outside the page; a browser runs it by its hash alone.
    assert [tag for tag, _ in page.elements].count("script") == 1 and page.script in TEMPLATE
    assert not re.search(r"fetch|XMLHttp|import|eval|http|innerHTML|document\.(write|cookie)", page.script)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'") and policy.count("script") == 1


def write_run(folder: Path, config: Config, predictions: list[tuple] | None = None, rows: list[dict] | None = None):
    """A run's folder, with records as train.py leaves them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if predictions is not None:
        with open(folder / "predictions.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["clip", "label", "prediction", *(f"p_{e}" for e in EMOTIONS)])
            writer.writerows(predictions)
    return folder


def some_predictions(count: int, seed: int, labels: list[int] | None = None, names=None) -> list[tuple]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        label = labels[i] if labels else int(rng.choice([0, 0, 0, 1, 2, 2, 3, 4, 6]))  # no Disgust
        p = rng.dirichlet(np.ones(7) * 0.5 + 2 * (np.arange(7) == label))
        name = names[i] if names else f"clips/{i:03d}"
        rows.append((name, label, int(p.argmax()), *(f"{x:.6f}" for x in p)))
    return rows


def some_rows(evaluations: int = 2, **values) -> list[dict]:
    rows = []
    for epoch in range(1, evaluations + 1):
        step = 10 * epoch
        rows.append({"step": step, "epoch": epoch, "train/loss": 2 / epoch, "train/lr": 1e-3, "train/grad_norm": 0.5})
        rows[-1] |= {"throughput/total_clips_per_s": 90.0, "throughput/compute_clips_per_s": 100.0}
        rows[-1] |= {"throughput/data_wait_share": 0.1, "crf/coupling": 2.0, "crf/entropy": 2.5} | values
        rows.append({"step": step, "epoch": epoch, "val/WAR": 20.0 + epoch, "val/UAR": 10.0 + epoch, "val/loss": 1.5})
        rows[-1] |= {f"val/recall/{e}": 10.0 * k for k, e in enumerate(EMOTIONS) if e != "Disgust"}
    return rows


def tiny_config(clips: Path, **model) -> Config:
    lists = {"train_list": clips / "train.txt", "val_list": clips / "test.txt"}
    data = DataConfig(**lists, size=64, num_segments=3, batch_size=2)
    return Config(data=data, model=ModelConfig(backbone="test_resnet", dim=16, **model))


def add_checkpoint(folder: Path, config: Config, step: int = 20) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(config.model, config.data.num_segments).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {"step": step, "model": model.state_dict(), "ema": None, "config": config.to_json()}
    save_checkpoint(folder / "checkpoints", state | {"emotions": list(EMOTIONS)})
    return model


def listed(clips: Path) -> tuple[list[str], list[int]]:
    rows = [line.rsplit(maxsplit=2) for line in (clips / "test.txt").read_text().splitlines()]
    return [name for name, _, _ in rows], [int(label) for _, _, label in rows]


def trained(clips: Path, folder: Path, **model) -> Path:
    """A run with everything."""
    names, labels = listed(clips)
    config = tiny_config(clips, **model)
    write_run(folder, config, some_predictions(len(names), 0, labels, names), some_rows())
    add_checkpoint(folder, config)
    return folder


def write_page(run_dir: Path, *others: Path, **options) -> Page:
    run = read_run(run_dir)
    path = report.write_report(run, build_loader, load_trained, [read_run(other) for other in others], **options)
    assert path == run_dir / "report.html" and path.stat().st_size < 5e6 and not list(run_dir.glob("*.partial"))
    page = read_page(run_dir)
    closed_in_itself(page)
    return page


@pytest.fixture(scope="module")
def whole(clips, tmp_path_factory) -> tuple[Path, Page]:
    folder = trained(clips, tmp_path_factory.mktemp("runs") / "whole")
    return folder, write_page(folder, num_clips=2)


# ---- Statistics


@pytest.mark.parametrize(("right", "total"), [(0, 5), (1, 1), (3, 24), (29, 58), (2341, 2341), (199, 350)])
def test_wilson_is_where_the_normal_test_turns(right, total):
    """The interval holds the shares p that a test with the variance p (1 - p) / n does not reject, by a search."""
    shares = np.linspace(0, 1, 200_001)
    kept = shares[(right / total - shares) ** 2 <= 1.959964**2 * shares * (1 - shares) / total + 1e-15]
    assert wilson(right, total) == pytest.approx((100 * kept.min(), 100 * kept.max()), abs=1.1e-3)


def test_wilson_known_values():
    assert wilson(0, 10) == pytest.approx((0, 27.753), abs=1e-3)
    assert wilson(10, 10) == pytest.approx((72.247, 100), abs=1e-3)
    assert wilson(5, 10) == pytest.approx((23.659, 76.341), abs=1e-3)
    assert all(math.isnan(x) for x in wilson(0, 0))


def naive_bootstrap(labels, right, resamples, rng):
    """Clip by clip, in loops."""
    wars, uars = [], []
    for _ in range(resamples):
        drawn = [int(rng.integers(len(labels))) for _ in labels]
        recalls = []
        for k in sorted({int(labels[i]) for i in drawn}):
            mine = [i for i in drawn if labels[i] == k]
            recalls.append(sum(right[i] for i in mine) / len(mine))
        wars.append(100 * sum(right[i] for i in drawn) / len(drawn))
        uars.append(100 * sum(recalls) / len(recalls))
    return np.array(wars), np.array(uars)


def test_bootstrap_has_the_distribution_of_the_naive_one():
    rng = np.random.default_rng(1)
    labels = np.array([0] * 30 + [1] * 20 + [5] * 2)  # two clips: often not drawn at all
    right = rng.random((52, 1)) < 0.6
    right[-1] = True
    naive = naive_bootstrap(labels, right[:, 0], 1500, rng)
    for fast, slow in zip(bootstrap(labels, right), naive, strict=True):
        assert fast.shape == (4000, 1) and np.isfinite(fast).all()
        assert fast.mean() == pytest.approx(slow.mean(), abs=5 * slow.std() / math.sqrt(1500))
        assert fast.std() == pytest.approx(slow.std(), rel=0.1)


def test_bootstrap_is_paired_and_deterministic():
    rng = np.random.default_rng(2)
    labels, right = rng.integers(0, 7, 200), rng.random((200, 1)) < 0.5
    both = np.column_stack([right, right])
    for samples, again in zip(bootstrap(labels, both), bootstrap(labels, both), strict=True):
        assert np.array_equal(samples[:, 0], samples[:, 1]) and np.array_equal(samples, again)
        assert samples.std() > 1


def test_bootstrap_interval_covers_the_true_difference():
    """Two models of known accuracy, correlated over the clips, on 100 test sets: some 95 % of the intervals hold it."""
    rng = np.random.default_rng(3)
    covered = np.zeros(2)
    for _ in range(100):
        labels = rng.integers(0, 3, 300)
        hard = rng.random(300)
        right = np.column_stack([hard < 0.5 + 0.1 * (labels == 0), rng.permuted(hard) < 0.6 + 0.1 * (labels == 0)])
        right[:, 1] = np.where(rng.random(300) < 0.5, hard < 0.6 + 0.1 * (labels == 0), right[:, 1])
        for i, samples in enumerate(bootstrap(labels, right, resamples=1000)):
            low, high = interval(samples[:, 1] - samples[:, 0])
            covered[i] += low <= 10 <= high
    assert ((covered >= 88) & (covered <= 100)).all() and covered.mean() < 99.5, covered


def as_predictions(rows) -> Predictions:
    table = np.array([[float(x) for x in row[1:]] for row in rows])
    return Predictions([r[0] for r in rows], table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:])


def test_same_clips_in_any_order():
    rows = [*some_predictions(20, 0), ("clips/003", 6, 0, *["0"] * 7)]  # a clip that is listed twice
    order = np.random.default_rng(0).permutation(len(rows))
    one, other = as_predictions(rows), as_predictions([rows[i] for i in order])
    found = align(one, other)
    assert [(other.clips[i], other.labels[i]) for i in found] == list(zip(one.clips, one.labels, strict=True))
    assert sorted(found) == list(range(len(rows)))
    relabelled = other._replace(labels=(other.labels + 1) % 7)
    assert align(one, relabelled) is None and align(one, as_predictions(rows[:-1])) is None


def test_choose_shows_different_confusions_first():
    rows = [("a", 0, 1, 0.05, 0.9), ("b", 0, 1, 0.1, 0.8), ("c", 0, 2, 0.1, 0.1, 0.5), ("d", 1, 1, 0, 1)]
    predictions = as_predictions([(*row, *[0] * (10 - len(row))) for row in rows])
    assert choose(predictions, False, 3) == [0, 2, 1] and choose(predictions, False, 2) == [0, 2]
    assert choose(predictions, True, 5) == [3]


# ---- The page


def test_numbers_are_those_of_the_predictions(tmp_path):
    rows = some_predictions(120, 4)
    folder = write_run(tmp_path / "numbers", Config(), rows, some_rows(3))
    words = write_page(folder, num_clips=0).words
    labels, predicted = [r[1] for r in rows], [r[2] for r in rows]
    hits = [a == b for a, b in zip(labels, predicted, strict=True)]
    recalls = {}
    for k, emotion in enumerate(EMOTIONS):
        of_class = [hit for hit, label in zip(hits, labels, strict=True) if label == k]
        at = words.index(emotion, words.index("In numbers"))
        clips, right, recall, span = words[at + 1 : at + 5]
        assert (int(clips), int(right)) == (len(of_class), sum(of_class))
        if of_class:
            recalls[emotion] = 100 * sum(of_class) / len(of_class)
            low, high = wilson(sum(of_class), len(of_class))
            assert recall == f"{recalls[emotion]:.1f}" and span == f"{low:.1f} to {high:.1f}"
        else:
            assert emotion == "Disgust" and recall == span == "-"
    assert f"{100 * sum(hits) / 120:.2f}" in words
    assert f"{sum(recalls.values()) / len(recalls):.2f}" in words and len(recalls) == 6
    assert any(w.startswith(f"WAR, %: {sum(hits)} of 120 clips") for w in words)
    assert "23.00" in words and any("evaluation 3 of 3" in w for w in words)  # the best, from metrics.jsonl
    assert "90.0" in words and "10.0 %" in words  # clips/s and wait

    counts = [
        [sum((a, b) == (i, j) for a, b in zip(labels, predicted, strict=True)) for j in range(7)] for i in range(7)
    ]
    svg = (folder / "report.html").read_text().split('aria-label="Confusion matrix, clips"')[1].split("</svg>")[0]
    drawn = [int(n) for n in re.findall(r">(\d+)</text>", svg)]
    assert drawn == [n for row in counts for n in row]
    worst = max((counts[i][j], -i, -j) for i in range(7) for j in range(7) if i != j)
    text = f"{EMOTIONS[-worst[1]]} taken for {EMOTIONS[-worst[2]]}, {worst[0]} of {sum(counts[-worst[1]])}"
    assert any(f"Most frequent: {text}" in w for w in words)


def test_a_whole_page(whole):
    folder, page = whole
    assert "Missing, or to be known" not in page.text and "Not drawn" not in page.text
    titles = [text.split(" {")[0].split(",")[0] for text, _ in TEXTS.values()]
    assert all(any(word.startswith(title) for word in page.words) for title in titles)
    assert page.words.count(", taken for") == 3 * 2  # with their maps, beside the matrix, in the list of mistakes
    assert "uploaded" in page.text
    assert sum(word.startswith(", recognised with") for word in page.words) == 2
    pictures = [a["src"] for tag, a in page.elements if tag == "img"]
    assert len(pictures) == 4 * 3 + 2 * 2 + 2 * 8  # clips x frames, mistakes twice, clips that were fed in two states
    before = (folder / "report.html").read_bytes()
    write_page(folder, num_clips=2)
    assert (folder / "report.html").read_bytes() == before


def test_without_faces(whole, tmp_path):
    page = write_page(whole[0], num_clips=0)
    assert not [tag for tag, _ in page.elements if tag == "img"] and "--clips 0" in page.text


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>&\"$x$${title}"
    config = dataclasses.replace(Config(), preset=evil)
    rows = some_predictions(9, 0, names=[evil] * 9)
    names = (f"{prefix}{evil.replace('/', '|')}" for prefix in "xy")
    folder, other = (write_run(tmp_path / name, config, rows, some_rows()) for name in names)
    write_page(folder, other)
    run = read_run(folder)
    clip = Clip(0, np.zeros((2, 64, 64, 3), np.uint8), None, None)
    with figures.style():
        text, _ = report.page(run, [read_run(other)], Inspection([evil], [clip]))
    page = Page(text)
    closed_in_itself(page)
    assert folder.name in page.words and any(other.name in word for word in page.words)
    assert [evil in word for word in page.words].count(True) == 4  # below the title, note, clip, setting


def test_compared(clips, tmp_path):
    one, two = some_predictions(150, 5), some_predictions(150, 5)
    two = [(*row[:2], row[1] if i % 3 else row[2], *row[3:]) for i, row in enumerate(two)]  # better on two thirds
    folders = [
        write_run(tmp_path / name, Config(), rows, [])
        for name, rows in (("a", one), ("b", two[::-1]), ("c", one[:-1]), ("d", None), ("e", one[::-1]))
    ]
    page = write_page(*folders, num_clips=0)
    words = page.words[page.words.index("Compared") :]
    wars = [100 * sum(r[1] == r[2] for r in rows) / len(rows) for rows in (one, two)]
    at = words.index("b")
    assert words[at + 1 : at + 4] == ["150 clips", f"{wars[1]:.2f}", f"{wars[1] - wars[0]:+.2f}"]
    low, high = (float(x) for x in re.fullmatch(r"\(([-+.\d]+) to ([-+.\d]+)\)", words[at + 4]).groups())
    assert 0 < low < wars[1] - wars[0] < high
    small = [attributes.get("class") for tag, attributes in page.elements if tag == "small"]
    assert small == [
        None,
        None,
        "beyond",
        "beyond",
        None,
        None,
        None,
        None,
    ]  # a; b and how it differs; c; e, which is a
    assert words[words.index("e") + 3 : words.index("e") + 5] == ["+0.00", "(+0.0 to +0.0)"]
    assert (
        "c was evaluated on other clips or labels than a: no difference." in words and "d has no predictions." in words
    )


# ---- What is missing


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"crf": "gaussian"}, "its CRF (gaussian) has no labels"),
        ({"crf": "messages"}, "its CRF (messages) has no labels"),
        ({"name": "mean-pool"}, "mean-pool has no CRF"),
    ],
)
def test_models_without_labels(clips, tmp_path, model, said):
    page = write_page(trained(clips, tmp_path / "run", **model), num_clips=1)
    assert said in page.text and "Compatibility" not in page.text and "Where it is seen" not in page.text
    assert [tag for tag, _ in page.elements].count("img") == 6 + 4 + 16  # frames are shown all the same


@pytest.mark.parametrize("model", [{"iterations": 0}, {"iterations": 0, "readout": "none"}, {"readout": "none"}])
def test_crfs_with_less(clips, tmp_path, model):
    page = write_page(trained(clips, tmp_path / "run", **model), num_clips=1)
    assert "Where it is seen" in page.text
    assert ("Compatibility" in page.text) == ("Free energy" in page.text) == ("iterations" not in model)


def test_a_run_that_has_only_begun(tmp_path):
    page = write_page(write_run(tmp_path / "run", Config()))
    assert "no curves: metrics.jsonl cannot be read (No such file or directory)" in page.text
    assert "no epoch is evaluated yet" in page.text and "holds no checkpoint" in page.text
    assert page.text.count("Not drawn") == 6 and "0 of 60 epochs evaluated" in page.text
    page = write_page(write_run(tmp_path / "empty", Config(), None, []))
    assert page.text.count("Not drawn") == 6


def test_before_the_first_evaluation(tmp_path):
    rows = [row for row in some_rows() if "val/WAR" not in row]
    page = write_page(write_run(tmp_path / "run", Config(), None, rows))
    assert page.text.count("Not drawn") == 2 and "no confusion matrix" in page.text  # WAR and UAR; recalls


def test_values_that_are_not_finite(tmp_path):
    rows = some_rows(3)
    rows[0] |= {"train/loss": None, "train/grad_norm": math.inf, "throughput/total_clips_per_s": math.nan}
    rows[1] |= {"val/WAR": None, "val/UAR": "broken"}
    rows[2] |= {"train/loss": None, "train/skipped_steps": 3, "crf/entropy": None}
    page = write_page(write_run(tmp_path / "run", Config(), some_predictions(30, 0), rows), num_clips=0)
    assert "Not drawn" not in page.text and "3 steps were skipped" in page.text and "23.00" in page.text
    nothing = [row | dict.fromkeys(set(row) - {"step", "epoch"}) for row in rows]
    page = write_page(write_run(tmp_path / "null", Config(), some_predictions(30, 0), nothing), num_clips=0)
    assert "metrics.jsonl holds no finite value of train/loss or val/loss" in page.text


@pytest.mark.parametrize(("busy", "said"), [(0.9, False), (0.7, True)])  # waiting takes 0.1, as some_rows says
def test_how_busy_a_device_was_is_said_unless_waiting_tells_it(busy, said, tmp_path):
    rows = some_rows(2, **{"throughput/busy": busy})
    page = write_page(write_run(tmp_path / "run", Config(), some_predictions(30, 0), rows), num_clips=0)
    assert "waiting for data" in page.text and ("the device worked" in page.text) == said


def test_rows_that_are_torn(tmp_path):
    folder = write_run(tmp_path / "run", Config(), some_predictions(9, 0), some_rows())
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 30, "train/lo\n[1]\n\xff\n{"step": null}\n')
    assert "4 of 8 rows of metrics.jsonl cannot be read" in write_page(folder, num_clips=0).text


@pytest.mark.parametrize(
    "line",
    ["clips/9,7,0" + ",0.1" * 7, "clips/9,0,0" + ",nan" * 7, "clips/9,0", "clips/9,-1,0" + ",0.1" * 7, "a,b,c"],
)
def test_predictions_that_are_damaged(tmp_path, line):
    folder = write_run(tmp_path / "run", Config(), some_predictions(3, 0), some_rows())
    with open(folder / "predictions.csv", "a") as file:
        file.write(line + "\n")
    page = write_page(folder)
    assert "predictions.csv is damaged in line 5" in page.text and "Confusion" not in page.text


def test_clips_that_are_gone(clips, tmp_path):
    folder = trained(clips, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config = dataclasses.replace(
        tiny_config(clips), data=dataclasses.replace(tiny_config(clips).data, val_list=tmp_path / "gone.txt")
    )
    add_checkpoint(folder, config, step=30)
    page = write_page(folder)
    assert "no gallery" in page.text and "gone.txt: no such annotation list" in page.text
    assert "the weights shown are of step 30, the predictions of step 20" in page.text
    assert "Compatibility" in page.text and "uploaded" not in page.text


def test_a_clip_that_is_not_in_the_list_any_more(clips, tmp_path):
    folder = trained(clips, tmp_path / "run")
    text = (folder / "predictions.csv").read_text().replace(listed(clips)[0][0], "renamed")
    (folder / "predictions.csv").write_text(text)
    assert "clip renamed is not in it any more" in write_page(folder, num_clips=9).text


def test_a_checkpoint_that_is_damaged(clips, tmp_path):
    folder = trained(clips, tmp_path / "run")
    (file,) = (folder / "checkpoints").glob("*.pt")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    page = write_page(folder)
    assert "SHA-256 differs" in page.text and "Coupling" in page.text and "Compatibility" not in page.text


def test_the_largest_page_is_small_enough(tmp_path):
    """24 clips of noise, which no JPEG makes small, as many mistakes as are listed, and ten thousand rows."""
    folder = write_run(tmp_path / "run", Config(), some_predictions(40, 0))
    rows = some_rows(2)
    run = read_run(folder)._replace(rows=[row | {"step": i} for i, row in enumerate(rows * 5000)])
    rng = np.random.default_rng(0)
    shape = (16, 112, 112, 3)
    clips = [
        Clip(row, rng.integers(0, 256, shape, np.uint8), rng.random((16, 7, 7, 7)), rng.random((16, 7)))
        for row in range(24)
    ]
    with figures.style():
        mistakes = [clips[i % 24]._replace(row=i % 40) for i in range(MISTAKES)]
        text, _ = report.page(run, [], Inspection([], clips, 16, mistakes=mistakes))
    assert 1e6 < len(text.encode()) < 5e6


# ---- What the model shows


def test_upsampling_against_loops():
    cells = np.random.default_rng(0).random((4, 4))
    pixels = upsample(cells, 16, 60)
    for y in range(60):
        for x in range(60):
            i, j = min(y // 16, 3), min(x // 16, 3)
            a, b = y / 16 - i if i < 3 else 0, x / 16 - j if j < 3 else 0
            k, m = min(i + 1, 3), min(j + 1, 3)
            top = (1 - b) * cells[i, j] + b * cells[i, m]
            bottom = (1 - b) * cells[k, j] + b * cells[k, m]
            assert pixels[y, x] == pytest.approx((1 - a) * top + a * bottom)


def test_what_is_shown_of_a_clip(clips, tmp_path):
    """Frames, maps and shares against the loader's and the model's own words."""
    folder = trained(clips, tmp_path / "run")
    run = read_run(folder)
    inspection = inspect_model(run, 9, build_loader, load_trained)
    assert (
        sorted(clip.row for clip in inspection.clips) == list(range(9))
        and inspection.notes == []
        and inspection.stride == 16
    )
    config = dataclasses.replace(tiny_config(clips), data=dataclasses.replace(tiny_config(clips).data, batch_size=9))
    index = load_index(config.data.val_list)
    batch = next(build_loader(config, index, "eval", World(0, 1, 0, 1, torch.device("cpu")))(0))
    model = add_checkpoint(tmp_path / "again", config)
    with torch.inference_mode():
        prediction = model(batch.clips)
        fine, _ = model.emotion_maps(batch.clips)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for clip in inspection.clips:
        colours = 255 * (batch.clips[clip.row].permute(0, 2, 3, 1) * std + mean)
        assert np.abs(clip.frames - colours.numpy()).max() <= 0.51
        assert np.allclose(clip.maps, fine[clip.row].numpy(), atol=1e-5)
        assert clip.shares.shape == (3, 7) and np.allclose(clip.shares.sum(1), 1)
    # Averaged over the frames with their weights, the shares are what the CRF hands to the loss.
    with torch.inference_mode():
        for clip in inspection.clips:
            parts = model.emotion_maps(batch.clips[clip.row : clip.row + 1])
            per_frame = sum(part[0].sum((1, 2, 3)) for part in parts).numpy()
            pooled = (clip.shares * per_frame[:, None]).sum(0) / per_frame.sum()
            assert np.allclose(pooled, prediction.marginals[clip.row].exp().numpy(), atol=1e-5)


def test_free_energies(clips):
    config = tiny_config(clips, max_coupling=8.0)
    torch.manual_seed(0)
    crf = build_model(config.model, 3).crf.eval()
    crf.project.weight.data[: crf.num_states] *= 5
    levels = [torch.randn(2, 3, 16, 4, 4), torch.randn(2, 3, 16, 2, 2)]
    with torch.inference_mode():
        energies = free_energies(crf, levels)
        assert crf.iterations == 3 and len(energies) == 7
        assert (np.diff(energies) < 1e-6).all() and energies[0] - energies[3] > 1e-4
        assert energies[2] == pytest.approx(crf(levels)[1].diagnostics["crf/free_energy"].item(), abs=1e-6)


# ---- Commands


def test_figures_are_the_same_files_each_time(whole, tmp_path):
    for name in ("one", "two"):
        write_page(whole[0], num_clips=1, folder=tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert {
        f"{name}.{kind}" for name in ("confusion", "loss", "compatibility_appearance") for kind in ("svg", "png")
    } <= set(files)
    assert len(files) == 2 * (len(TEXTS) + 1)  # two kernels
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, capsys):
    print_report(tmp_path / "nowhere", build_loader, load_trained)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("no report (") and "no such run" in err


def test_a_folder_that_cannot_be_written(whole, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the report") as error:
        write_page(whole[0], num_clips=0, folder=tmp_path / "file")
    assert "\n" not in str(error.value)


def test_not_a_run(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    for path, said in ((tmp_path / "x", "no such run"), (tmp_path, "not a run's configuration")):
        with pytest.raises(ValueError, match=said):
            read_run(path)


def test_the_command(whole, tmp_path):
    done = run_python("scripts/report.py", str(whole[0]), "--clips", "0", "--figures", str(tmp_path / "f"))
    assert done.returncode == 0 and done.stdout == f"{whole[0]}/report.html\n", done.stderr
    assert (tmp_path / "f" / "whole" / "loss.svg").exists()


def test_errors_of_the_command_are_one_line(whole, tmp_path, capsys):
    for path, said in (
        (tmp_path, "not a run: it holds no config.json"),
        (tmp_path / "x", "no such run"),
        ("a" * 300, "no such run"),
    ):
        assert scripts.report.main([str(whole[0]), str(path), "--clips", "0"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"report: {path}: {said}") and err.count("\n") == 1
    assert scripts.report.main([str(whole[0]), str(whole[0]), "--figures", str(tmp_path)]) == 2
    assert "same name" in capsys.readouterr().err
