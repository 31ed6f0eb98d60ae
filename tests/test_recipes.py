"""Published methods' recipes, against a table of what their public code does."""

import dataclasses
import typing
from typing import Any, NamedTuple

import pytest
from torch import nn

from dfer.config import Config, config_from_json, parse_config
from dfer.optim.optimizers import build_optimizer
from dfer.plan.sampling import ClipSampler
from dfer.recipes import RECIPES, deviations


class Row(NamedTuple):
    """What is published of a method's training. None: not found, or not here, and ours stays."""

    start: Any = None
    optimizer: Any = None
    lr: Any = None
    min_lr: Any = None
    momentum: Any = None  # SGD's
    weight_decay: Any = None
    clip_norm: Any = None
    schedule: Any = None
    decay_epochs: Any = None
    decay_rate: Any = None
    warmup: Any = None  # epochs
    batch: Any = None
    epochs: Any = None
    frames: Any = None  # segments x frames of each
    pixels: Any = None
    area: Any = None  # of the smallest crop
    aspect: Any = None  # of the widest one
    flip: Any = None
    colour: Any = None
    hue: Any = None
    brightness: Any = None
    degrees: Any = None
    smoothing: Any = None  # of labels


SGD = {"optimizer": "sgd", "momentum": 0.9}
ADAMW = {"optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "decay_epochs": (), "smoothing": 0.1}
CROP = {"area": 0.08, "aspect": 4 / 3, "flip": 0.5, "colour": 0.0, "hue": 0.0, "brightness": 0.0, "degrees": 0.0}
TABLE = {
    "former-dfer": Row(
        **SGD, lr=0.01, weight_decay=1e-4, schedule="step", decay_epochs=(40,), decay_rate=0.1, warmup=0, batch=32,
        epochs=100, frames=(8, 2), pixels=112, **CROP, start="random",
    ),
    "m3dfel": Row(
        **ADAMW, lr=5e-4, min_lr=5e-6, warmup=20, batch=256, epochs=300, frames=(16, 1), pixels=112,
        **CROP | {"colour": 0.4, "hue": 0.4},
    ),
    "ial": Row(
        **SGD, lr=1e-3, frames=(16, 1), pixels=112, start="random",
        **CROP | {"area": 0.85, "aspect": 1.18, "brightness": 0.6, "degrees": 4.0},
    ),
    "lstpnet": Row(frames=(16, 1)),
    "r18-lstm": Row(start="random"),
    "dfer-clip": Row(
        **SGD, lr=0.01, weight_decay=1e-4, schedule="multistep", decay_epochs=(30, 40), decay_rate=0.1, warmup=0,
        batch=48, epochs=50, frames=(16, 1), pixels=224, **CROP | {"brightness": 0.5}, smoothing=0.0, clip_norm=0.0,
    ),
    "mae-dfer": Row(
        **ADAMW, lr=3.75e-4, min_lr=3.75e-7, warmup=5, batch=96, epochs=100, frames=(16, 1), pixels=160, **CROP,
        clip_norm=0.0,
    ),
}  # fmt: skip


def row(config: Config) -> Row:
    data, optim, augmentation = config.data, config.optim, config.data.augmentation
    built = build_optimizer(nn.Linear(1, 1), optim.optimizer, optim.lr, optim.weight_decay)
    return Row(
        start=config.model.init, optimizer=optim.optimizer, lr=optim.lr, min_lr=optim.min_lr,
        momentum=built.param_groups[0].get("momentum"), weight_decay=optim.weight_decay, clip_norm=optim.clip_norm,
        schedule=optim.schedule, decay_epochs=optim.decay_epochs, decay_rate=optim.decay_rate,
        warmup=optim.warmup_epochs, batch=data.batch_size, epochs=optim.epochs,
        frames=(data.num_segments, data.frames_per_segment), pixels=data.size, area=augmentation.min_crop_area,
        aspect=augmentation.max_crop_ratio, flip=augmentation.flip, colour=augmentation.colour, hue=augmentation.hue,
        brightness=augmentation.brightness, degrees=augmentation.rotation, smoothing=config.loss.label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_as_published_and_leaves_ours_where_nothing_was_found(name):
    ours, theirs = row(parse_config(["dfew"])), row(parse_config(["dfew", "--recipe", name]))
    for field, found, published, own in zip(Row._fields, theirs, TABLE[name], ours, strict=True):
        assert found == pytest.approx(own if published is None else published), (name, field)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_leaves_ours_is_said(name):
    said = "; ".join(deviations(name, parse_config(["dfew", "--recipe", name]), 1))
    fields = {"schedule": "schedule", "batch": "batch", "epochs": "epochs", "pixels": "input", "start": "start (theirs"}
    fields |= {"weight_decay": "weight decay", "smoothing": "label smoothing", "clip_norm": "clipping"}
    if TABLE[name].optimizer is None:  # of which nothing is known
        fields |= {"weight_decay": "optimizer", "smoothing": "loss", "clip_norm": "optimizer"}
    for field, word in fields.items():
        assert getattr(TABLE[name], field) is not None or word in said, field


def test_every_recipe_is_offered_and_valid_and_takes_16_frames(tmp_path):
    assert set(typing.get_args(typing.get_type_hints(Config)["recipe"])) == {"none", *RECIPES}
    assert TABLE.keys() == RECIPES.keys()
    for name in RECIPES:
        config = parse_config(["--recipe", name])
        if TABLE[name].frames:
            assert ClipSampler(0, config.data.num_segments, config.data.frames_per_segment).clip_length == 16
        assert config_from_json(config.to_json(), tmp_path) == config and config.recipe == name
    assert parse_config(["dfew", "--recipe", "none"]) == parse_config(["dfew"])


def test_a_recipe_goes_over_the_preset_and_flags_over_the_recipe():
    plain, recipe = parse_config(["debug"]), parse_config(["debug", "--recipe", "mae-dfer"])
    assert recipe.run == plain.run and recipe.model == plain.model
    assert recipe.optim.steps_per_epoch == plain.optim.steps_per_epoch == 4  # of which the recipe says nothing
    assert (plain.data.size, recipe.data.size, recipe.data.views, recipe.data.augmentation.erase) == (32, 160, 2, 0.25)
    assert (recipe.data.augmentation.mixup, recipe.data.augmentation.cutmix) == (0.8, 1.0)
    for words in (
        ["--data.size", "64", "--data.augmentation.erase", "0.5", "--recipe", "mae-dfer", "--optim.lr", "0.1"],
        ["--recipe=ial", "--recipe=mae-dfer", "--data.size=64", "--data.augmentation.erase=0.5", "--optim.lr=0.1"],
    ):
        config = parse_config(words)
        assert (config.recipe, config.data.size, config.optim.lr, config.optim.epochs) == ("mae-dfer", 64, 0.1, 100)
        assert config.data.augmentation == dataclasses.replace(recipe.data.augmentation, erase=0.5)
    over = parse_config(["--recipe", "former-dfer", "--optim.schedule", "cosine"])
    assert (over.optim.schedule, over.optim.decay_epochs) == ("cosine", ())


def test_what_is_not_as_published_is_said():
    def said(*words: str, world_size: int = 1) -> str:
        config = parse_config(["dfew", *words])
        return "\n".join(deviations(config.recipe, config, world_size))

    text = said("--recipe", "former-dfer")
    assert "Nesterov" in text and "the network is ours" in text and "best one on the test fold" in text
    assert "ours stays: label smoothing, clipping of the gradient" in text and "(published: " not in text
    text = said("--recipe", "former-dfer", "--optim.lr", "0.1", "--data.size", "96", world_size=4)
    assert "--optim.lr 0.1 (published: 0.01)" in text and "--data.size 96 (published: 112)" in text
    assert "128 clips per step (published: 32)" in text and "--data.batch-size" not in text
    text = said("--recipe", "former-dfer", "--data.augmentation.flip", "0")
    assert "--data.augmentation.flip 0.0 (published: 0.5)" in text and text.count("(published: ") == 1
    text = said("--recipe", "former-dfer", "--data.batch-size", "8", world_size=4)
    assert "clips per step" not in text
    assert all(line.startswith("recipe former-dfer: ") for line in text.splitlines())
    text = said("--recipe", "ial")
    assert "not in the published table (its code: 40 clips, 0.1, half the rate every 7 epochs, 1,000)" in text
    assert text.splitlines()[1].endswith("ours stays: label smoothing, clipping of the gradient")
    assert "--model.name r18-lstm is one like theirs" in said("--recipe", "r18-lstm", world_size=4)
    assert "Kinetics" in said("--recipe", "m3dfel") and "MS-Celeb-1M" in said("--recipe", "lstpnet")
