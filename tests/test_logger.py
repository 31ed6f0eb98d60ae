"""Rows of a run that is killed and continued: each once, in metrics.jsonl and at W&B."""

import importlib
import itertools
import json
import math
import sys
import time
import types
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from dfer.batch import empty_batch
from dfer.cli import UserError
from dfer.config import Config, DataConfig, OptimConfig, RunConfig
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix
from dfer.run.logger import Logger, _Pending, endless_warm_up, print_result
from dfer.run.predictions import Predictions
from dfer.run.tensorboard_log import check_tensorboard
from dfer.run.wandb_log import _tables


class Server:
    """W&B as far as a run needs it: rows by number, those below the number that a run starts with are refused."""

    def __init__(self):
        self.rows, self.summary, self.ids = {}, {}, set()

    def module(self):
        return types.SimpleNamespace(init=self.init, Settings=lambda **settings: settings, teardown=lambda: None)

    def init(self, mode, id, **options):
        self.ids.add(id)
        self.options = options
        assert options["settings"]["finish_timeout"] <= 60 and options["settings"]["init_timeout"] <= 60
        return types.SimpleNamespace(
            starting_step=max(self.rows, default=-1) + 1,
            log=self.log,
            define_metric=lambda *_, **__: None,
            summary=self.summary,
            finish=lambda: None,
        )

    def log(self, values, step):
        assert step not in self.rows, "a duplicate"
        self.rows[step] = values


@pytest.fixture
def server(monkeypatch):
    importlib.import_module("wandb.sdk.wandb_setup")  # parts of the real one that a run asks of, whoever comes first
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server.module())
    return server


CONFIG = Config(run=RunConfig(wandb="online"))


def rows(run_dir):
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in written]


def log_steps(logger, first, last):
    """Rows as a run of three steps per epoch writes them."""
    for step in range(first, last + 1):
        logger.row(step, {"train/loss": 1 / step})
        if step % 3 == 0:
            logger.row(step, {"val/WAR": float(step)})


@pytest.mark.parametrize("arrived", range(9))
@pytest.mark.parametrize(("checkpoint", "evaluated"), [(0, False), (2, False), (3, False), (3, True), (5, False)])
def test_no_row_is_lost_or_doubled(server, tmp_path, arrived, checkpoint, evaluated):
    killed = Logger(tmp_path, CONFIG, 9)
    log_steps(killed, 1, 6)
    killed.close()
    assert len(server.rows) == 8 and list(server.rows.values()) == rows(tmp_path)
    for number in range(arrived, 8):  # a kill takes the last ones
        del server.rows[number]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "tra')  # torn

    continued = Logger(tmp_path, CONFIG, 9, checkpoint, evaluated)
    if checkpoint and checkpoint % 3 == 0 and not evaluated:
        continued.row(checkpoint, {"val/WAR": float(checkpoint)})
    log_steps(continued, checkpoint + 1, 9)
    continued.evaluated("epoch", {"WAR": [9.0, 9]})
    continued.close()
    want = [(s, k) for s in range(1, 10) for k in ("train/loss", "val/WAR") if k == "train/loss" or s % 3 == 0]
    assert [(row["step"], next(k for k in row if k != "step")) for row in rows(tmp_path)] == want
    assert [server.rows[number] for number in range(len(want))] == rows(tmp_path) and len(server.rows) == len(want)
    assert len(server.ids) == 1 and server.summary == {"best/WAR": 9.0}


def scalars(run_dir):
    """What TensorBoard's own reader finds: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parametrize(("checkpoint", "evaluated"), [(0, False), (3, True), (5, False)])
def test_tensorboards_reader_finds_each_row_once(tmp_path, checkpoint, evaluated):
    pytest.importorskip("tensorboard")
    config = Config(run=RunConfig(wandb="off", tensorboard=True))
    killed = Logger(tmp_path, config, 9)
    log_steps(killed, 1, 6)
    killed.row(6, {"epoch": 2, "train/loss": math.nan})
    killed.close()
    assert scalars(tmp_path)["val/WAR"] == [(3, 3.0), (6, 6.0)] and len(scalars(tmp_path)["train/loss"]) == 6

    continued = Logger(tmp_path, config, 9, checkpoint, evaluated)
    log_steps(continued, checkpoint + 1, 9)
    continued.close()
    want = {"train/loss": [(step, pytest.approx(1 / step)) for step in range(1, 10)]}
    assert scalars(tmp_path) == want | {"val/WAR": [(3, 3.0), (6, 6.0), (9, 9.0)]}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_that_cannot_write_ends_itself_and_not_the_run(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    logger = Logger(tmp_path, Config(run=RunConfig(wandb="off", tensorboard=True)), 9)
    logger._tensorboard._writer.add_scalar = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    log_steps(logger, 1, 6)
    logger.close()
    assert len(rows(tmp_path)) == 8
    assert capsys.readouterr().out.count("TensorBoard's files end here") == 1


def test_tensorboard_that_is_not_installed_is_said_before_a_run_begins(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    check_tensorboard(False)
    with pytest.raises(UserError, match=r"--run.tensorboard: .* pip install tensorboard") as error:
        check_tensorboard(True)
    assert "\n" not in str(error.value)


def test_the_id_of_the_checkpoint_is_used_where_its_file_is_gone(server, tmp_path):
    Logger(tmp_path, CONFIG, 9, wandb_id="abcd1234").close()
    assert server.ids == {"abcd1234"} and (tmp_path / "wandb-id.txt").read_text() == "abcd1234"


@pytest.mark.parametrize(
    ("path", "dataset", "fold"),
    [
        ("data/faces/train.txt", "faces", None),
        ("lists/dfew/set_1_train.txt", "dfew", 1),
        ("/d/ferv39k/train_All.txt", "ferv39k", None),
        ("logs/faces-crossval/lists/set_12_train.txt", "faces-crossval", 12),
        ("set_2_train.txt", Path.cwd().name, 2),
        ("/train.txt", "data", None),
        (f"{'x' * 200}/set_1_train.txt", "x" * 50, 1),
    ],
)
def test_runs_are_grouped_by_data_set_and_fold(server, tmp_path, path, dataset, fold):
    config = Config(seed=3, data=DataConfig(train_list=Path(path)), run=RunConfig(wandb="online"))
    Logger(tmp_path, config, 9).close()
    told = server.options
    assert (told["config"]["dataset"], told["config"]["fold"], told["config"]["seed"]) == (dataset, fold, 3)
    assert told["group"] == (f"{dataset}-fold{fold}" if fold else dataset) and told["job_type"] == "train"
    assert told["tags"] == [dataset, *([f"fold{fold}"] if fold else []), "seed3", "dfernet"]
    assert all(len(tag) <= 64 for tag in told["tags"])


def test_the_hardest_clips_are_few_and_nameless():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(7), 60)
    labels, predicted = rng.integers(0, 7, 60), p.argmax(1)
    predictions = Predictions([f"someone's name {i}" for i in range(60)], labels, predicted, p)
    tables = _tables(predictions.confusion(), predictions)
    data = tables["val/hardest_clips"].data
    hardness = [p[i, labels[i]] for i in range(60)]
    assert [row[0] - 2 for row in data] == sorted(range(60), key=lambda i: hardness[i])[:50]
    for line, label, prediction, p_label, p_prediction in data:
        assert (EMOTIONS.index(label), EMOTIONS.index(prediction)) == (labels[line - 2], predicted[line - 2])
        assert (p_label, p_prediction) == (hardness[line - 2], max(p[line - 2]))
    cells = {(a, b): n for a, b, n in tables["val/confusion_matrix"].table.data}
    for a, b in itertools.product(range(7), repeat=2):
        assert cells[EMOTIONS[a], EMOTIONS[b]] == sum((labels == a) & (predicted == b))


def test_numbers_that_json_has_not_are_null(tmp_path):
    logger = Logger(tmp_path, Config(run=RunConfig(wandb="off")), 9)
    logger.row(1, {"a": float("nan"), "b": float("inf"), "c": 1.5, "epoch": 1})
    logger.close()
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.5, "epoch": 1}]


def test_a_full_disk_is_one_line(tmp_path):
    logger = Logger(tmp_path, Config(run=RunConfig(wandb="off")), 9)
    with open("/dev/full", "a", buffering=1) as full:
        before, logger._rows = logger._rows, full
        with pytest.raises(ValueError, match=r"cannot write \(No space left on device\); the last checkpoint counts"):
            logger.row(1, {"a": 1.0})
        logger.close()
    before.close()


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_records_have_dates_with_a_zone_and_wandb_none(server, tmp_path, monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = datetime.now(UTC).replace(microsecond=0)
        for step in (0, 1):  # and of a run that is continued
            logger = Logger(tmp_path, CONFIG, 9, step)
            logger.row(step + 1, {"a": 1.0})
            logger.say("a line")
            logger.close()
        stamps = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        stamps += [line.removesuffix(" a line") for line in (tmp_path / "log.txt").read_text().splitlines()]
        assert len(stamps) == 4
        for stamp in map(datetime.fromisoformat, stamps):
            assert before <= stamp <= datetime.now(UTC) and stamp.utcoffset() == datetime.now().astimezone().utcoffset()
        assert list(server.rows.values()) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 1.0}]
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("columns", ["200", "80", "70", "60", "30", "10", "1", "0"])
@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_the_result_is_whole_on_any_terminal(capsys, monkeypatch, columns, term):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    confusion = ConfusionMatrix(7)
    confusion.counts += torch.arange(49).view(7, 7) * 9973 % 1009
    print_result("a run: last epoch", confusion)
    told = capsys.readouterr().out
    figures = [f"{confusion.war():.2f}", f"{confusion.uar():.2f}", f"{confusion.total()}"]
    figures += [f"{r:.1f}" for r in confusion.per_class_recall().tolist()] + list(
        map(str, confusion.counts.sum(1).tolist())
    )
    for word in (*figures, *EMOTIONS, "WAR", "UAR"):
        assert word in told, told
    assert "\N{HORIZONTAL ELLIPSIS}" not in told
    if int(columns) >= 60:
        assert all(len(line) <= int(columns) for line in told.splitlines())


@pytest.mark.parametrize(
    ("epochs", "warm_up", "said"), [(2, 5.0, True), (3, 3.0, True), (1, 1.5, True), (2, 1.0, False), (1, 0.0, False)]
)
def test_a_warm_up_that_does_not_end_is_named(epochs, warm_up, said):
    note = endless_warm_up(Config(optim=OptimConfig(epochs=epochs, warmup_epochs=warm_up)))
    assert (note is not None) == said
    assert not said or note.startswith(f"--optim.warmup-epochs {warm_up:g}: as long as the run of {epochs} epochs")


def test_the_bar_of_an_evaluation_moves_and_the_steps_are_counted_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", True)
    logger = Logger(tmp_path, Config(run=RunConfig(wandb="off")), 9)
    batches, seen = [empty_batch(1, 1, 32, torch.device("cpu"))] * 3, []
    for batch in logger.evaluating(batches, 3):
        seen.append((batch, [(t.description, t.completed, t.total) for t in logger._progress.tasks]))
    assert seen == [(batches[0], [("training", 0, 9), ("evaluating", i, 3)]) for i in range(3)]
    assert [task.description for task in logger._progress.tasks] == ["training"]
    logger._pending = _Pending(4, {"epoch": 1, "throughput/total_clips_per_s": 5.0, "throughput/data_wait_share": 0.5},
                               ["train/loss"], torch.tensor([1.5]), None)  # fmt: skip
    logger.flush()
    assert logger._progress.tasks[0].description == "epoch 1  loss 1.500  5.0 clips/s  data wait 50 %"
    logger.close()
    assert "step 4/9" in (tmp_path / "log.txt").read_text()
    assert list(Logger(None, Config(), 9).evaluating(batches, 3)) == batches
