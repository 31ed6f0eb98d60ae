"""How published methods take and augment clips: what `--data.recipe` sets in DataConfig, from their public code.

Approximated in all: boxes that do not fit are drawn again there (here cut to the frame), most draw the aspect ratio
uniformly (here log-uniform), and most repeat the first or the last frame of a short video (here all of them, evenly).
Only MAE-DFER normalises its input.
"""

from typing import Any

from dfer.plan.augmentation import Augmentation

RECIPES: dict[str, dict[str, Any]] = {
    # zengqunzhao/Former-DFER: dataloader/dataset_DFEW.py, dataloader/video_transform.py
    "former-dfer": {
        "num_segments": 8,
        "frames_per_segment": 2,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0),
    },
    # zengqunzhao/DFER-CLIP: main.py, dataloader/video_dataloader.py, dataloader/video_transform.py. As on DFEW; on
    # FERV39k it turns clips (--data.augmentation.rotation 4 --data.augmentation.brightness 0) instead.
    "dfer-clip": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 224,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0, brightness=0.5),
    },
    # muse1998/IAL-for-Facial-Expression-Recognition: dataset_DFEW.py, video_transform.py. It draws ratios of up to 5/3,
    # but of an area of 0.85 or more only those up to 1/0.85 fit. Approximated: what a rotation lays open is black.
    "ial": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.85, max_crop_ratio=1.18, colour=0.0, brightness=0.6, rotation=4.0),
    },
    # ECNU-Cross-Innovation-Lab/M3DFEL_replicate: options.py, datasets/dataset_DFEW.py, datasets/video_transform.py.
    # Approximated: hue turns in HSV there; each frame is drawn from the 16 that follow its segment's start, which may
    # run backwards, in testing too (here: within its segment, and the centre in testing).
    "m3dfel": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 112,
        "augmentation": Augmentation(min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.4, hue=0.4),
    },
    # sunlicai/MAE-DFER: run_class_finetuning.py, kinetics.py, scripts/dfew/*.sh. Approximated: its clip is 64
    # consecutive frames or the whole video where that is shorter (here: up to 1.2 times shorter than the video, about
    # DFEW's median of 70 frames); rand-m7-n4-mstd0.5-inc1, read as timm does, skips each of its 4 operations half of
    # the time, may draw the non-linear ones, and comes before the crop; erased pixels are noise; the two views in time
    # are the first and the last 64 frames (its two crops are one and the same).
    "mae-dfer": {
        "num_segments": 16,
        "frames_per_segment": 1,
        "size": 160,
        "views": 2,
        "augmentation": Augmentation(
            min_crop_area=0.08, max_crop_ratio=4 / 3, colour=0.0, speed=1.2, randaugment=2, magnitude=7.0, erase=0.25
        ),
    },
}
