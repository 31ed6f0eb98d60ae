import dataclasses
import json
from pathlib import Path

import pytest

from dfer.config import PRESETS, Config, config_from_json, parse_config


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


def test_the_number_of_flags_stays_small():
    assert num_fields(Config) <= 42


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
        (["--model.readout", "all"], "--model.readout"),
        (["--model.dim", "30"], "--model.dim 30"),
        (["--run.amp"], "--run.amp"),
        (["--run.name", "../x"], "--run.name '../x'"),
        (["--resume"], "--run.name"),
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
