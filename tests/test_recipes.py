"""Published methods' recipes, against a table of what their public code does."""

import dataclasses
import typing

import pytest

from dfer.config import Config, config_from_json, parse_config
from dfer.plan.sampling import ClipSampler
from dfer.recipes import RECIPES, deviations

# Optimizer, learning rate, its lowest, weight decay; schedule, epochs of steps down, warm-up; batch, epochs; segments x
# frames, pixels; smallest crop, colour, brightness, rotation; label smoothing. None: not found, ours stays.
TABLE = {
    "former-dfer": ("sgd", 0.01, None, 1e-4, "step", (40,), 0, 32, 100, (8, 2), 112, 0.08, 0.0, 0.0, 0.0, None),
    "m3dfel": ("adamw", 5e-4, 5e-6, 0.05, "cosine", (), 20, 256, 300, (16, 1), 112, 0.08, 0.4, 0.0, 0.0, 0.1),
    "ial": ("sgd", 1e-3, None, None, None, None, None, None, None, (16, 1), 112, 0.85, 0.0, 0.6, 4.0, None),
    "lstpnet": (None,) * 9 + ((16, 1),) + (None,) * 6,
    "dfer-clip": ("sgd", 0.01, None, 1e-4, "multistep", (30, 40), 0, 48, 50, (16, 1), 224, 0.08, 0.0, 0.5, 0.0, 0.0),
    "mae-dfer": ("adamw", 3.75e-4, 3.75e-7, 0.05, "cosine", (), 5, 96, 100, (16, 1), 160, 0.08, 0.0, 0.0, 0.0, 0.1),
}


def row(config: Config) -> tuple:
    data, optim, augmentation = config.data, config.optim, config.data.augmentation
    clip = data.num_segments, data.frames_per_segment
    return (
        optim.optimizer, optim.lr, optim.min_lr, optim.weight_decay,
        optim.schedule, optim.decay_epochs, optim.warmup_epochs,
        data.batch_size, optim.epochs, clip, data.size,
        augmentation.min_crop_area, augmentation.colour, augmentation.brightness, augmentation.rotation,
        config.loss.label_smoothing,
    )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_as_published_and_leaves_ours_where_nothing_was_found(name):
    ours, theirs = row(parse_config(["dfew"])), row(parse_config(["dfew", "--recipe", name]))
    for found, published, own in zip(theirs, TABLE[name], ours, strict=True):
        assert found == pytest.approx(own if published is None else published), name
    if name != "lstpnet":  # whose augmentation is not known
        assert RECIPES[name].settings["data"]["augmentation"].flip == 0.5
    assert RECIPES[name].settings.get("optim", {}).get("decay_rate", 0.1) == 0.1


def test_every_recipe_is_offered_and_valid_and_takes_16_frames(tmp_path):
    assert set(typing.get_args(typing.get_type_hints(Config)["recipe"])) == {"none", *RECIPES}
    assert TABLE.keys() == RECIPES.keys()
    for name in RECIPES:
        config = parse_config(["--recipe", name])
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
    assert "Kinetics" in said("--recipe", "m3dfel") and "MS-Celeb-1M" in said("--recipe", "lstpnet")
    assert all(line.startswith("recipe former-dfer: ") for line in text.splitlines())
