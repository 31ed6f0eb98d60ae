"""How published methods train: what `--recipe` sets in the configuration, from their public code.

Approximated in all: boxes that do not fit are drawn again there (here cut to the frame), most draw the aspect ratio
uniformly (here log-uniform), and most repeat the first or the last frame of a short video (here all of them, evenly).
"""

import dataclasses
from typing import Any, NamedTuple

from dfer.plan.augmentation import Augmentation


class Recipe(NamedTuple):
    """A published method's training."""

    settings: dict[str, dict[str, Any]]  # section of the configuration -> field -> value
    differs: tuple[str, ...]  # what is otherwise here, whatever is set
    unknown: tuple[str, ...] = ()  # what is not published, as far as was found: ours stays


ON_TEST_FOLD = "the last epoch is the result (theirs: the best one on the test fold)"
NETWORK = "the network is ours"
NO_NORM = "clips are normalised with ImageNet's mean and deviation (theirs are not)"
NESTEROV = "SGD's momentum is Nesterov's (theirs is not)"
NEARLY_ALL = ("optimizer", "schedule", "batch", "epochs", "input and augmentation", "loss", "which epoch counts")

RECIPES: dict[str, Recipe] = {
    # zengqunzhao/Former-DFER: main_DFEW.py, dataloader/dataset_DFEW.py, dataloader/video_transform.py
    "former-dfer": Recipe(
        {
            "data": {
                "num_segments": 8,
                "frames_per_segment": 2,
                "size": 112,
                "batch_size": 32,
                "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0),
            },
            "model": {"init": "random"},
            "optim": {
                "optimizer": "sgd",
                "lr": 0.01,
                "weight_decay": 1e-4,
                "schedule": "step",
                "decay_epochs": (40,),
                "decay_rate": 0.1,
                "warmup_epochs": 0.0,
                "epochs": 100,
            },
        },
        (NETWORK, NO_NORM, NESTEROV, ON_TEST_FOLD),
        ("label smoothing", "clipping of the gradient"),
    ),
    # zengqunzhao/DFER-CLIP: main.py, train_DFEW.sh, dataloader/video_dataloader.py, dataloader/video_transform.py; on
    # FERV39k it turns clips (--data.augmentation.rotation 4 --data.augmentation.brightness 0) instead.
    "dfer-clip": Recipe(
        {
            "data": {
                "num_segments": 16,
                "frames_per_segment": 1,
                "size": 224,
                "batch_size": 48,
                "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0, brightness=0.5),
            },
            "optim": {
                "optimizer": "sgd",
                "lr": 0.01,
                "weight_decay": 1e-4,
                "schedule": "multistep",
                "decay_epochs": (30, 40),
                "decay_rate": 0.1,
                "warmup_epochs": 0.0,
                "clip_norm": 0.0,
                "epochs": 50,
            },
            "loss": {"label_smoothing": 0.0},
        },
        (
            f"{NETWORK}, and so is its start (theirs: CLIP's ViT-B/32 and text)",
            "one learning rate for all (theirs: 1e-5 for the image encoder, 1e-3 for the prompts)",
            NO_NORM,
            NESTEROV,
            ON_TEST_FOLD,
        ),
    ),
    # muse1998/IAL-for-Facial-Expression-Recognition: dataset_DFEW.py, video_transform.py. It draws ratios of up to 5/3,
    # but of an area of 0.85 or more only those up to 1/0.85 fit. Approximated: what a rotation lays open is black.
    # What main.py has beside the published table is said and not set (docs/LOG.md).
    "ial": Recipe(
        {
            "data": {
                "num_segments": 16,
                "frames_per_segment": 1,
                "size": 112,
                "augmentation": Augmentation(
                    min_crop_area=0.85, max_crop_ratio=1.18, colour=0.0, brightness=0.6, rotation=4.0
                ),
            },
            "model": {"init": "random"},
            "optim": {"optimizer": "sgd", "lr": 1e-3},
        },
        (
            NETWORK,
            "its intensity-aware loss is not here",
            "batch, weight decay, schedule and epochs are ours: not in the published table (its code: 40 clips, 0.1, "
            "half the rate every 7 epochs, 1,000)",
            NO_NORM,
            NESTEROV,
            ON_TEST_FOLD,
        ),
        ("label smoothing", "clipping of the gradient"),
    ),
    # LSTPNet: models/emotion_hyp_single_i_resnet18.py
    "lstpnet": Recipe(
        {"data": {"num_segments": 16, "frames_per_segment": 1}},
        (f"{NETWORK}, and so is its start (theirs: a ResNet18 of MS-Celeb-1M)",),
        NEARLY_ALL,
    ),
    # ResNet18-LSTM of FERV39k's authors: the data set's README has its results and its start.
    "r18-lstm": Recipe(
        {"model": {"init": "random"}},
        (f"{NETWORK} (--model.name r18-lstm is one like theirs)",),
        ("clips", *NEARLY_ALL),
    ),
    # ECNU-Cross-Innovation-Lab/M3DFEL_replicate: options.py, datasets/dataset_DFEW.py, datasets/video_transform.py.
    # Approximated: hue turns in HSV there; each frame is drawn from the 16 that follow its segment's start, which may
    # run backwards, in testing too (here: within its segment, and the centre in testing).
    "m3dfel": Recipe(
        {
            "data": {
                "num_segments": 16,
                "frames_per_segment": 1,
                "size": 112,
                "batch_size": 256,
                "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.4, hue=0.4),
            },
            "optim": {
                "optimizer": "adamw",
                "lr": 5e-4,
                "min_lr": 5e-6,
                "weight_decay": 0.05,
                "schedule": "cosine",
                "decay_epochs": (),
                "warmup_epochs": 20.0,
                "epochs": 300,
            },
            "loss": {"label_smoothing": 0.1},
        },
        (f"{NETWORK}, and so is its start (theirs: R3D-18 of Kinetics-400)", NO_NORM, ON_TEST_FOLD),
        ("clipping of the gradient",),
    ),
    # sunlicai/MAE-DFER: run_class_finetuning.py, kinetics.py, scripts/dfew/*.sh. Approximated: its clip is 64
    # consecutive frames or the whole video where that is shorter (here: up to 1.2 times shorter than the video, about
    # DFEW's median of 70 frames); rand-m7-n4-mstd0.5-inc1, read as timm does, skips each of its 4 operations half of
    # the time, may draw the non-linear ones, and comes before the crop; erased pixels are noise; the two views in time
    # are the first and the last 64 frames (its two crops are one and the same). The rates are those of 3 x 32 clips.
    "mae-dfer": Recipe(
        {
            "data": {
                "num_segments": 16,
                "frames_per_segment": 1,
                "size": 160,
                "views": 2,
                "batch_size": 96,
                "augmentation": Augmentation(
                    min_crop_area=0.08,
                    max_crop_ratio=4 / 3,
                    colour=0.0,
                    speed=1.2,
                    randaugment=2,
                    magnitude=7.0,
                    erase=0.25,
                    mixup=0.8,
                    cutmix=1.0,
                ),
            },
            "optim": {
                "optimizer": "adamw",
                "lr": 1e-3 * 96 / 256,
                "min_lr": 1e-6 * 96 / 256,
                "weight_decay": 0.05,
                "schedule": "cosine",
                "decay_epochs": (),
                "warmup_epochs": 5.0,
                "clip_norm": 0.0,
                "epochs": 100,
            },
            "loss": {"label_smoothing": 0.1},
        },
        (
            f"{NETWORK}, and so is its start (theirs: a masked autoencoder of VoxCeleb2)",
            "no layer decay (theirs: 0.75, which is for pre-trained layers) and no drop path (theirs: 0.1)",
            "mixup and cutmix are drawn for each pair of clips (theirs: once for a batch)",
        ),
    ),
}


def deviations(name: str, config: Any, world_size: int) -> list[str]:
    """Return in a few lines in what a run with a recipe, as it is configured, is not as published."""
    recipe = RECIPES[name]
    lines = [f"recipe {name}: not as published: {'; '.join(recipe.differs)}"]
    if recipe.unknown:
        lines.append(f"recipe {name}: not found in what is published, ours stays: {', '.join(recipe.unknown)}")
    changed = []
    for section, values in recipe.settings.items():
        for field, value in values.items():
            if field != "batch_size":
                flag, now = f"--{section}.{field}".replace("_", "-"), getattr(getattr(config, section), field)
                changed += _changed(flag, now, value)
    clips, published = config.data.batch_size * world_size * config.optim.accumulate, recipe.settings.get("data", {})
    if published.get("batch_size", clips) != clips:
        changed.append(f"{clips} clips per step (published: {published['batch_size']})")
    return lines + [f"recipe {name}: {line}" for line in changed]


def _changed(flag: str, now: Any, published: Any) -> list[str]:
    """Return in a line for each flag what is not as published."""
    if dataclasses.is_dataclass(published):
        names = [field.name for field in dataclasses.fields(published)]
        pairs = ((f"{flag}.{n.replace('_', '-')}", getattr(now, n), getattr(published, n)) for n in names)
        return [line for pair in pairs for line in _changed(*pair)]
    return [] if now == published else [f"{flag} {now} (published: {published})"]
