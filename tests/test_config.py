import dataclasses
import json
from pathlib import Path

import pytest

from dfer.config import PRESETS, Config, config_from_json, parse_config
from dfer.plan.augmentation import Augmentation


def num_fields(cls) -> int:
    return sum(
        num_fields(f.default_factory) if dataclasses.is_dataclass(f.default_factory) else 1
        for f in dataclasses.fields(cls)
    )


def test_every_preset_parses_and_survives_json():
    for preset in PRESETS:
        config = parse_config([preset])
        assert config.preset == preset
        assert config_from_json(config.to_json(), source=Path("config.json")) == config
    assert parse_config([]) == parse_config(["faces"])


def test_overrides():
    config = parse_config(["dfew", "--data.root", "/d", "--optim.lr", "1e-4", "--model.readout", "value", "--resume",
                           "--run.name", "a"])  # fmt: skip
    assert (str(config.data.root), config.optim.lr, config.model.readout, config.resume) == ("/d", 1e-4, "value", True)


def test_every_number_of_an_augmentation_has_a_range():
    for field in dataclasses.fields(Augmentation):
        for value in ("-1", "1000"):
            with pytest.raises(ValueError, match=f"{field.name.replace('_', '-')} {value}"):
                parse_config([f"--data.augmentation.{field.name.replace('_', '-')}", value])


def test_the_number_of_flags_stays_small():
    """83, and seven of which nothing depends that is trained: validate_only, profile, run.grace, run.wandb_project,
    run.graph, run.fused, run.tensorboard.
    """
    assert num_fields(Config) <= 90


def test_a_config_saved_by_an_older_version_is_read():
    """Without the fields that came later, which take the values that change nothing."""
    config = parse_config(["dfew", "--data.augmentation.colour", "0.3"])
    saved = json.loads(config.to_json())
    for name in ("source", "cache", "views", "mirror_views", "balance"):
        del saved["data"][name]
    for name in ("schedule", "min_lr", "decay_epochs", "decay_rate", "layer_decay"):
        del saved["optim"][name]
    del saved["loss"]["kind"], saved["recipe"]
    saved["data"]["augmentation"] = {"min_crop_area": 0.6, "max_crop_ratio": 1.2, "flip": 0.5, "colour": 0.3}
    assert config_from_json(json.dumps(saved), source=Path("config.json")) == config
    assert Augmentation() == Augmentation(0.6, 1.2, 0.5, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 7.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fases"], "unknown preset 'fases'"),
        (["--data.siez", "3"], "--data.siez"),
        (["--optim.lr", "fast"], "--optim.lr"),
        (["--optim.lr", "nan"], "--optim.lr nan"),
        (["--optim.lr", "-1"], "--optim.lr -1"),
        (["--optim.lr", "inf"], "--optim.lr inf"),
        (["--data.batch-size", "0"], "--data.batch-size 0"),
        (["--data.num-segments", "0"], "--data.num-segments 0"),
        (["--data.frames-per-segment", "0"], "--data.frames-per-segment 0"),
        (["--recipe", "original"], "--recipe"),
        (["--recipe"], "--recipe"),
        (["--data.recipe", "ial"], "--data.recipe: is --recipe now, and sets optimizer, schedule"),
        (["--data.jpeg-engine", "0.5"], "--data.jpeg-engine: is --data.jpeg-decoder now; sms is 0, engine 1"),
        (["--data.jpeg_engine=1"], "--data.jpeg-engine: is --data.jpeg-decoder now; sms is 0, engine 1"),
        (["--data.recipe=ial"], "--data.recipe: is --recipe now, and sets optimizer, schedule"),
        (["--data.balance", "half"], "--data.balance"),
        (["--loss.kind", "hinge"], "--loss.kind"),
        (["--data.source", "tar"], "--data.source"),
        (["--data.cache", "disk"], "--data.cache"),
        (["--data.views", "0"], "--data.views 0: must be between 1 and 64"),
        (["--data.views", "65"], "--data.views 65"),
        (["--data.augmentation.brightness", "1"], "--data.augmentation.brightness 1.0: must be between 0.0 and 0.99"),
        (["--data.augmentation.hue", "0.6"], "--data.augmentation.hue 0.6: must be between 0.0 and 0.5"),
        (["--data.augmentation.grayscale", "-0.1"], "--data.augmentation.grayscale -0.1"),
        (["--data.augmentation.rotation", "181"], "--data.augmentation.rotation 181.0"),
        (["--data.augmentation.blur", "2"], "--data.augmentation.blur 2.0: must be between 0.0 and 1.0"),
        (["--data.augmentation.erase", "nan"], "--data.augmentation.erase nan"),
        (["--data.augmentation.speed", "0.5"], "--data.augmentation.speed 0.5: must be between 1.0 and 8.0"),
        (["--data.augmentation.reverse", "1.1"], "--data.augmentation.reverse 1.1"),
        (["--data.augmentation.randaugment", "5"], "--data.augmentation.randaugment 5: must be between 0 and 4"),
        (["--data.augmentation.randaugment", "1.5"], "--data.augmentation.randaugment"),
        (["--data.augmentation.magnitude", "11"], "--data.augmentation.magnitude 11.0: must be between 0.0 and 10.0"),
        (["--model.readout", "all"], "--model.readout"),
        (["--model.dim", "30"], "--model.dim 30"),
        (["--run.amp"], "--run.amp"),
        (["--run.name", "../x"], "--run.name '../x'"),
        (["--profile", "-1"], "--profile -1: must be between 0 and 1000"),
        (["--seed", "1.5"], "--seed"),
    ],
)
def test_bad_values_are_one_line(args, message):
    with pytest.raises(ValueError) as error:
        parse_config(args)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"data": {"siez": 3}}), json.dumps({"colour": 1})])
def test_a_damaged_config_is_one_line(text):
    with pytest.raises(ValueError, match=r"config\.json: not a run's configuration"):
        config_from_json(text, source=Path("config.json"))


def test_a_name_that_no_file_system_takes_is_refused():
    for name, size in (("a" * 256, 256), ("\u9577" * 86, 258), ("lr=0.001," * 40, 360)):
        with pytest.raises(ValueError, match=f"is {size} bytes long, and file systems take 255"):
            parse_config(["--run.name", name])
    assert parse_config(["--run.name", "\u9577" * 85]).run.name == "\u9577" * 85


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run.graph", "maybe"], "invalid choice 'maybe' for argument '--run.graph'. Expected one of "),
        (["--optim.lr", "x"], "Error parsing --optim.lr: could not convert string to float: 'x'"),
        (["--data.balance"], "Missing value for argument '--data.balance'."),
        (["--optim.epochz", "3"], "Unrecognized options: --optim.epochz, 3 - perhaps you meant --optim.epochs INT"),
    ],
)
def test_what_is_wrong_with_a_flag_is_said_once(words, said):
    with pytest.raises(ValueError) as error:
        parse_config(words)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
