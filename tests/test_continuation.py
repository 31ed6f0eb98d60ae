"""A run goes on as what it was, whatever a newer version would choose by itself."""

import dataclasses
import json
import os
import tarfile

import pytest

from dfer.cli import UserError
from dfer.config import PRESETS, Config, begun_config, config_from_json, parse_config
from dfer.run.continuing import differences
from tests.begun_run import how_it_ended, start
from tests.conftest import ROOT, make_clips


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A function that leaves the run that some words begin, as after its first step."""

    def begin(*words):
        config = parse_config([*words, "--run.log-dir", str(tmp_path), "--run.name", "a"])
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, crf_backend="dense"))  # a CPU's
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "config.json").write_text(config.to_json())
        (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
        return config

    return begin


def again(tmp_path, *words):
    return parse_config([*words, "--run.log-dir", str(tmp_path), "--run.name", "a"])


def change_the_default(monkeypatch, preset, **optim):
    """As a newer version may."""
    before = PRESETS[preset]

    def changed(gpu):
        config = before(gpu)
        return dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim))

    monkeypatch.setitem(PRESETS, preset, changed)


@pytest.mark.parametrize("words", [("debug", "--optim.ema", "0.5"), ()])
def test_a_changed_default_does_not_reach_a_run_that_has_begun(begun, tmp_path, monkeypatch, words):
    config = begun("debug", "--optim.ema", "0.5", "--data.views", "2")
    change_the_default(monkeypatch, "debug", lr=0.5, accumulate=3)
    assert parse_config(["debug"]).optim.lr == 0.5
    assert again(tmp_path, *words) == config  # the same command, or none of it but the name


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (("--optim.schedule", "step", "--optim.decay-epochs", "1"), ("--optim.schedule", "step")),
        (("--model.init", "timm", "--model.freeze", "backbone"), ("--model.freeze", "backbone")),
        (
            ("--optim.min-lr", "0", "--optim.lr", "1e-6", "--recipe", "m3dfel"),
            ("--optim.lr", "1e-6", "--recipe", "m3dfel"),
        ),
    ],
)
def test_what_is_typed_is_checked_with_what_the_run_has(begun, tmp_path, words, typed):
    """Alone, or with the preset's values, these words are refused."""
    config = begun("debug", *words)
    with pytest.raises(UserError):
        parse_config(["debug", *typed])
    assert again(tmp_path, "debug", *typed) == config


def test_a_run_from_before_triton_was_the_default_keeps_dense_pairs_and_all_passes(begun, tmp_path):
    config = begun("debug")
    saved = json.loads(config.to_json())
    saved["model"]["crf_backend"] = "auto"
    del saved["run"]["fused"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(saved))
    now = again(tmp_path, "debug")
    assert (now.model.crf_backend, now.run.fused) == ("dense", "off") and differences(config, now) == []


def test_what_is_typed_is_compared(begun, tmp_path):
    config = begun("debug", "--optim.lr", "0.02")
    assert differences(config, again(tmp_path, "debug", "--optim.lr", "0.03")) == ["--optim.lr was 0.02, is 0.03"]
    assert differences(config, again(tmp_path, "debug", "--optim.lr", "0.02")) == []
    assert differences(config, again(tmp_path, "dfew")) == ["preset was debug, is dfew"]
    for flag in ("--recipe", "--data.recipe"):  # as it was called in older versions
        assert differences(config, again(tmp_path, "debug", flag, "ial")) == ["--recipe was none, is ial"]


@pytest.mark.parametrize("typed", [["--data.recipe=ial"], []])
def test_a_run_that_an_older_version_began_with_a_recipe_goes_on(begun, tmp_path, typed):
    """Which set clips and augmentation alone: optimizer, schedule and loss stay what they were."""
    begun("debug", "--data.size", "48", "--data.augmentation.rotation", "4")
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    saved["data"]["recipe"] = "ial"
    del saved["recipe"], saved["loss"]["kind"], saved["data"]["balance"]
    for name in ("schedule", "min_lr", "decay_epochs", "decay_rate", "layer_decay"):
        del saved["optim"][name]
    (tmp_path / "a" / "config.json").write_text(json.dumps(saved))
    config = begun_config(tmp_path / "a")
    assert (config.recipe, config.data.size, config.data.augmentation.rotation) == ("ial", 48, 4.0)
    assert (config.optim.optimizer, config.optim.schedule, config.loss.kind) == ("adamw", "cosine", "cross-entropy")
    now = again(tmp_path, "debug", *typed)
    assert now == config and differences(config, now) == []
    assert differences(config, again(tmp_path, "--data.recipe", "m3dfel")) == ["--recipe was ial, is m3dfel"]


def test_what_a_command_is_for_is_not_taken_from_the_run(begun, tmp_path):
    config = begun("debug", "--profile", "3", "--run.timeout", "7", "--run.wandb", "off")
    more = ("--run.save-minutes", "2", "--data.batch-size", "4", "--data.jpeg-decoder", "engine")
    more += ("--data.video-decoder", "cores")
    now = again(tmp_path, "--resume", *more)
    assert (now.profile, now.resume, now.run.timeout, now.run.save_minutes) == (0, True, 7, 2)
    assert differences(config, now) == []


def test_a_run_that_took_no_step_is_begun_anew(begun, tmp_path):
    begun("debug", "--optim.lr", "0.02")
    (tmp_path / "a" / "metrics.jsonl").unlink()
    assert begun_config(tmp_path / "a") is None and again(tmp_path, "debug").optim.lr == 1e-3


def test_a_field_that_an_old_run_lacks_means_what_that_run_did(tmp_path):
    saved = json.loads(parse_config(["debug"]).to_json())
    for name in ("jpeg_decoder", "video_decoder", "cache"):
        del saved["data"][name]
    config = config_from_json(json.dumps(saved), tmp_path)
    data = config.data
    assert (data.jpeg_decoder, data.video_decoder, data.cache) == ("mixed", "nvdec", "off")
    for share, decoder in ((0.0, "sms"), (0.65, "mixed"), (1.0, "engine")):  # as it was saved for a while
        saved["data"]["jpeg_engine"] = share
        assert config_from_json(json.dumps(saved), tmp_path).data.jpeg_decoder == decoder


def test_an_average_that_an_older_version_began_goes_on_as_it_was(tmp_path):
    def old(ema: str) -> Config:
        saved = json.loads(parse_config(["debug", "--optim.ema", ema]).to_json())
        del saved["optim"]["ema_warmup"]
        return config_from_json(json.dumps(saved), tmp_path)

    assert not old("0.999").optim.ema_warmup
    assert differences(old("0"), parse_config(["debug"])) == []  # it has none: folds of both go together
    now = parse_config(["debug", "--optim.ema", "0.999"])
    assert differences(old("0.999"), now) == ["--optim.ema-warmup was False, is True"]
    assert differences(old("0.999"), parse_config(["debug", "--optim.ema", "0.999", "--optim.no-ema-warmup"])) == []


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"data": {"size": "112"}}, "--data.size is '112'"),
        ({"data": {"size": None}}, "--data.size is None"),
        ({"data": {"size": 5}}, "--data.size 5: must be between 32 and 1024"),
        ({"data": {"source": "mxnet"}}, "--data.source is 'mxnet'"),
        ({"data": {"augmentation": {"flip": True}}}, "--data.augmentation.flip is True"),
        ({"data": {"augmentation": []}}, "not a run's configuration"),
        ({"data": {"train_list": "a\0b"}}, "--data.train-list is"),
        ({"run": {"timeout": None}}, "--run.timeout is None"),
        ({"run": {"compile": 1}}, "--run.compile is 1"),
        ({"optim": {"lr": "fast"}}, "--optim.lr is 'fast'"),
        ({"seed": "7"}, "--seed is '7'"),
        ({"model": {"weights": 3}}, "--model.weights is 3"),
        ({"model": {"init": None}}, "--model.init is None"),
        ({"model": []}, "not a run's configuration"),
    ],
)
def test_a_damaged_value_is_one_line_that_names_the_file(tmp_path, saved, message):
    with pytest.raises(UserError) as error:
        config_from_json(json.dumps(saved), tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_looked_into_is_one_line(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"--run\.log-dir: cannot use .*/a \(Permission denied\)"):
        again(tmp_path, "debug")


BY_THE_LIBRARY = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from dfer.model.convolution import Convolution
Convolution._is_small = lambda *given: False
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [None, BY_THE_LIBRARY], ids=["as it is", "convolutions by the library"])
@pytest.mark.parametrize("name", ["run-of-0ce724e", "averaged-run-of-0ce724e"])
def test_a_run_of_the_first_version_goes_on_as_it_would_have(tmp_path, name, code):
    """To the bit, but for small convolutions, which have been products since then and round otherwise."""
    make_clips(tmp_path)
    with tarfile.open(ROOT / "tests" / "data" / f"{name}.tar.xz") as tar:
        tar.extractall(tmp_path / "logs", filter="data")
    want = json.loads((tmp_path / "logs" / "final.json").read_text())
    process = start(ROOT, tmp_path, "begun", code=code)  # nothing typed but the name
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "continuing from step 7" in printed
    found = json.loads(json.dumps(how_it_ended(tmp_path / "logs" / "begun")))
    if code is not None and found["machine"] == want["machine"]:  # other processors round otherwise
        assert found == want
    for step, loss in want["losses"].items():
        assert found["losses"][step] == pytest.approx(loss, rel=1e-4)
    for name, sums in want["weights"].items():
        assert found["weights"][name] == pytest.approx(sums, rel=1e-3, abs=1e-3), name
