"""Plans: which frames of which videos, in what order, cut and coloured how. ALL randomness of training is here.

A plan is a pure function of (seed, epoch, video). It knows nothing of ranks, batches or threads, so training order and
augmentation are the same on 1 GPU and on 8, and resuming needs a step number, not a saved state.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])
_LUMA = np.array([0.299, 0.587, 0.114])  # BT.601, as DALI and torchvision


@dataclass(frozen=True)
class Augmentation:
    """What training may do to a clip: one draw per clip, the same for all its frames."""

    min_crop_area: float = 0.6  # share of the frame that a crop keeps, drawn from [min_crop_area, 1]
    max_crop_ratio: float = 1.2  # aspect ratio of the crop, drawn from [1/r, r], log-uniform
    flip: float = 0.5  # probability of a mirror image
    colour: float = 0.2  # brightness, contrast and saturation factors are drawn from [1-c, 1+c]


@dataclass(frozen=True)
class EpochPlan:
    """One epoch as a struct of arrays; row v of every array but `order` belongs to video v of the list."""

    order: Int64[np.ndarray, " N"]
    frames: Int64[np.ndarray, "N T"]  # frame indices, rising, each below the video's frame count
    box: Float64[np.ndarray, "N 4"]  # top, left, height, width of the crop as shares of the frame, inside [0, 1]
    mirror: Bool[np.ndarray, " N"]
    colour: Float32[np.ndarray, "N 3 4"]  # RGB in 0..255 -> normalised output: out = colour[:, :3] @ rgb + colour[:, 3]


def segment_frames(
    num_frames: Int64[np.ndarray, " N"], num_segments: int, frames_per_segment: int, u: Float64[np.ndarray, "N S"]
) -> Int64[np.ndarray, "N T"]:
    """TSN sampling: cut each video into segments and take `frames_per_segment` consecutive frames from each.

    `u` in [0, 1) places the frames within a segment: 0.5 is the centre. A video shorter than T repeats frames evenly,
    which keeps the motion (repeating the first or the last frame does not).
    """
    starts_available = np.maximum(num_frames - frames_per_segment + 1, 1)[:, None]
    starts = np.floor((np.arange(num_segments) + u) * starts_available / num_segments).astype(np.int64)
    frames = (starts[:, :, None] + np.arange(frames_per_segment)).reshape(len(num_frames), -1)
    # Segments of a short video overlap: sorting keeps time running forwards.
    return np.sort(np.minimum(frames, num_frames[:, None] - 1), axis=1)


def epoch_plan(
    seed: int,
    epoch: int,
    num_frames: Int64[np.ndarray, " N"],
    num_segments: int,
    frames_per_segment: int = 1,
    mode: Literal["train", "eval"] = "train",
    augmentation: Augmentation | None = None,
) -> EpochPlan:
    """Plan one epoch over all videos, vectorised. Mode "eval" is the same plan for every seed and epoch."""
    num_videos = len(num_frames)
    if mode == "eval":
        centre = np.full((num_videos, num_segments), 0.5)
        return EpochPlan(
            order=np.arange(num_videos),
            frames=segment_frames(num_frames, num_segments, frames_per_segment, centre),
            box=np.tile([0.0, 0.0, 1.0, 1.0], (num_videos, 1)),
            mirror=np.zeros(num_videos, dtype=bool),
            colour=colour_matrices(np.ones((num_videos, 3))),
        )
    augmentation = augmentation or Augmentation()
    # One generator for the order and one block of uniforms for the clips: row v of the block does not depend on how
    # many videos follow it.
    order = np.random.Generator(np.random.Philox(key=[seed, 2 * epoch])).permutation(num_videos)
    u = np.random.Generator(np.random.Philox(key=[seed, 2 * epoch + 1])).random((num_videos, num_segments + 8))
    return EpochPlan(
        order=order,
        frames=segment_frames(num_frames, num_segments, frames_per_segment, u[:, 8:]),
        box=_crop_boxes(u[:, :4], augmentation),
        mirror=u[:, 4] < augmentation.flip,
        colour=colour_matrices(1 + augmentation.colour * (2 * u[:, 5:8] - 1)),
    )


def colour_matrices(factors: Float64[np.ndarray, "N 3"]) -> Float32[np.ndarray, "N 3 4"]:
    """Fold brightness, contrast, saturation (columns of `factors`, 1 = unchanged) and ImageNet normalisation together.

    Brightness scales, contrast scales about mid-grey 128, saturation blends with BT.601 luma; nothing is clamped
    between or after, so the whole is one affine map of RGB.
    """
    brightness, contrast, saturation = factors.T[:, :, None, None]
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1)))
    offset = np.broadcast_to(128 * (1 - contrast), (len(factors), 3, 1))
    scale = 1 / (255 * IMAGENET_STD)[:, None]
    shift = (IMAGENET_MEAN / IMAGENET_STD)[:, None]
    return np.concatenate([matrix * scale, offset * scale - shift], axis=2).astype(np.float32)


def _crop_boxes(u: Float64[np.ndarray, "N 4"], augmentation: Augmentation) -> Float64[np.ndarray, "N 4"]:
    area = augmentation.min_crop_area + (1 - augmentation.min_crop_area) * u[:, 0]
    ratio = augmentation.max_crop_ratio ** (2 * u[:, 1] - 1)
    height = np.minimum(np.sqrt(area / ratio), 1.0)
    width = np.minimum(np.sqrt(area * ratio), 1.0)
    return np.stack([u[:, 2] * (1 - height), u[:, 3] * (1 - width), height, width], axis=1)


def shard(
    order: Int64[np.ndarray, " N"], rank: int, world_size: int, batch_size: int, pad: bool
) -> tuple[Int64[np.ndarray, "S B"], Bool[np.ndarray, "S B"]]:
    """The videos of one rank, step by step: global batch s is `order[s*B*W : (s+1)*B*W]`, rank r takes its r-th B.

    The last, partial global batch is dropped (`pad=False`, training: the tail differs every epoch) or filled up with
    repeats marked invalid (`pad=True`, evaluation: every video is valid exactly once over all ranks).
    """
    global_batch = batch_size * world_size
    num_steps = -(-len(order) // global_batch) if pad else len(order) // global_batch
    ids = np.resize(order, num_steps * global_batch)  # repeats from the start where it runs out
    valid = np.arange(len(ids)) < len(order)
    shape = (num_steps, world_size, batch_size)
    return ids.reshape(shape)[:, rank], valid.reshape(shape)[:, rank]


@dataclass(frozen=True)
class ClipSampler:
    """How clips are taken from videos; `plan(epoch, ...)` is the only thing it does."""

    seed: int
    num_segments: int = 16
    frames_per_segment: int = 1
    mode: Literal["train", "eval"] = "train"
    augmentation: Augmentation = Augmentation()

    @property
    def clip_length(self) -> int:
        """T, frames of a clip."""
        return self.num_segments * self.frames_per_segment

    def plan(self, epoch: int, num_frames: Int64[np.ndarray, " N"]) -> EpochPlan:
        return epoch_plan(
            self.seed, epoch, num_frames, self.num_segments, self.frames_per_segment, self.mode, self.augmentation
        )
