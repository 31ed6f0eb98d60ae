"""Plans: which frames of which videos, in what order, and what is done to them. ALL randomness of training is here.

A plan is a pure function of (seed, epoch, video). Neither ranks nor batches nor threads enter it, so training order and
augmentation are the same on 1 GPU and on 8, and resuming needs a step number, not a saved state.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from dfer.plan.augmentation import (
    MAX_RANDAUGMENT,
    Augmentation,
    blurs,
    colours,
    crop_boxes,
    erase_boxes,
    rand_augment,
    warps,
)
from dfer.plan.balance import Balance, balanced_videos, expected_times
from dfer.plan.mixing import draw_mixes
from dfer.plan.transforms import colour_matrices


@dataclass(frozen=True)
class EpochPlan:
    """One epoch as a struct of arrays; row r of every array but `order` belongs to a clip of video `video[r]`.

    Row v is that of video v, but where classes are balanced: then the rows of videos that do not come belong to further
    clips of others.

    A frame is treated in this order: the box is cut out, resized to S x S (linear, antialiased, not rounded to whole
    numbers) and mirrored; then warp, blur, colour, erase.

    Warp: pixel (x, y) of the S x S output lies at p = ((x + 0.5) / S - 0.5, (y + 0.5) / S - 0.5) and takes the value of
    the mirrored picture at `warp[:, :2] @ p + warp[:, 2]`, in the same centred coordinates; interpolation is bilinear,
    and outside of the picture lies its edge pixel.

    Blur: `sigma = blur * S` pixels; a separable window of radius `r = min(ceil(3 * sigma), S - 1)` with weights
    exp(-d^2 / (2 sigma^2)) that sum to 1; beyond the border lies the mirror image without the border pixel itself
    (reflect-101).

    Erase: the rows from `round(top * S)` to before `round((top + height) * S)` and the columns likewise become 0 after
    normalisation, ImageNet's mean colour.

    `blur * S` and the edges of `erase` are calculated in float32, and np.round goes to the even number in a tie.
    """

    order: Int64[np.ndarray, " N"]  # of the rows
    video: Int64[np.ndarray, " N"]  # of the list
    frames: Int64[np.ndarray, "N T"]  # frame indices, each below the video's frame count; rising, falling if reversed
    box: Float64[np.ndarray, "N 4"]  # top, left, height, width of the crop as shares of the frame, inside [0, 1]
    mirror: Bool[np.ndarray, " N"]
    warp: Float32[np.ndarray, "N 2 3"]  # exactly [[1, 0, 0], [0, 1, 0]] for none
    blur: Float32[np.ndarray, " N"]  # sigma in shares of the clip's side, exactly 0 for none
    colour: Float32[np.ndarray, "N 3 4"]  # RGB in 0..255 -> normalised output: out = colour[:, :3] @ rgb + colour[:, 3]
    erase: Float32[np.ndarray, "N 4"]  # top, left, height, width in shares of the output; all exactly 0 for none
    # Of training with mixup or cutmix: the weight of a clip's own pixels against those of its neighbour, `order[i ^ 1]`
    # for `order[i]`, and the box (as of `erase`) that is the neighbour's; (1, 0, 0, 0, 0) for none.
    mix: Float32[np.ndarray, "N 5"] | None = None


def segment_frames(
    num_frames: Int64[np.ndarray, " N"], num_segments: int, frames_per_segment: int, u: Float64[np.ndarray, "N S"]
) -> Int64[np.ndarray, "N T"]:
    """Return frame indices by TSN sampling: `frames_per_segment` consecutive frames from each segment of each video.

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
    views: int = 1,
) -> EpochPlan:
    """Return the plan of one epoch over all videos.

    Mode "eval" plans view `epoch` of every video, whatever the seed. Of V = `views` views, view v takes the frames at
    share (v + 0.5) / V of their segments; one view is the centre. Views V to 2V-1 are their mirror images, and view 2V
    is view 0 again.
    """
    num_videos = len(num_frames)
    if mode == "eval":
        share = np.full((num_videos, num_segments), (epoch % views + 0.5) / views)
        return EpochPlan(
            order=np.arange(num_videos),
            video=np.arange(num_videos),
            frames=segment_frames(num_frames, num_segments, frames_per_segment, share),
            box=np.tile([0.0, 0.0, 1.0, 1.0], (num_videos, 1)),
            mirror=np.full(num_videos, epoch // views % 2 == 1),
            warp=np.tile(np.eye(2, 3, dtype=np.float32), (num_videos, 1, 1)),
            blur=np.zeros(num_videos, dtype=np.float32),
            colour=colour_matrices(np.ones(num_videos), np.zeros(num_videos), np.ones(num_videos, dtype=complex)),
            erase=np.zeros((num_videos, 4), dtype=np.float32),
        )
    augmentation = augmentation or Augmentation()
    # One generator for the order and one block of uniforms for the clips: row v of the block does not depend on how
    # many videos follow it.
    order = _generator(seed, 2 * epoch).permutation(num_videos)
    u = _generator(seed, 2 * epoch + 1).random((num_videos, num_segments + 8))
    # What was added later has a block of its own, so that the draws above stay what they were; seeds are below 2^63.
    later = _generator(seed + 2**63, epoch).random((num_videos, 14 + 2 * MAX_RANDAUGMENT))
    steps = rand_augment(later[:, 14:], augmentation)
    mixes = bool(augmentation.mixup or augmentation.cutmix)
    return EpochPlan(
        order=order,
        video=np.arange(num_videos),
        frames=_train_frames(num_frames, num_segments, frames_per_segment, u[:, 8:], later[:, :3], augmentation),
        box=crop_boxes(u[:, :4], augmentation),
        mirror=u[:, 4] < augmentation.flip,
        warp=warps(later[:, 3], steps, augmentation),
        blur=blurs(later[:, 4:6], steps, augmentation),
        colour=colours(u[:, 5:8], later[:, 6:9], steps, augmentation),
        erase=erase_boxes(later[:, 9:14], augmentation),
        mix=draw_mixes(_generator(seed + 2**63, 2**61 + epoch), order, augmentation) if mixes else None,
    )


def _generator(*key: int) -> np.random.Generator:
    """Return a generator of two 64-bit key words: counter-based, so that it is the same everywhere."""
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def _train_frames(
    num_frames: Int64[np.ndarray, " N"],
    num_segments: int,
    frames_per_segment: int,
    u: Float64[np.ndarray, "N S"],
    later: Float64[np.ndarray, "N 3"],
    augmentation: Augmentation,
) -> Int64[np.ndarray, "N T"]:
    """Return frames from segments of a window of num_frames/f frames, anywhere in the video; some run backwards."""
    window = np.maximum(np.rint(num_frames / augmentation.speed ** later[:, 0]), 1).astype(np.int64)
    start = np.floor(later[:, 1] * (num_frames - window + 1)).astype(np.int64)
    frames = start[:, None] + segment_frames(window, num_segments, frames_per_segment, u)
    return np.where(later[:, 2:] < augmentation.reverse, frames[:, ::-1], frames)


def shard(
    order: Int64[np.ndarray, " N"], rank: int, world_size: int, batch_size: int, pad: bool
) -> tuple[Int64[np.ndarray, "S B"], Bool[np.ndarray, "S B"]]:
    """Return the videos of one rank, step by step: rank r takes the r-th B of global batch s, `order[s*B*W:(s+1)*B*W]`.

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
    """How clips are taken from videos: `plan` returns what is drawn for an epoch."""

    seed: int
    num_segments: int = 16
    frames_per_segment: int = 1
    mode: Literal["train", "eval"] = "train"
    augmentation: Augmentation = field(default_factory=Augmentation)
    views: int = 1  # mode "eval": clips of a video, at different times
    mirror_views: bool = False  # and the mirror image of each
    balance: Balance = "none"  # mode "train": how often the videos of small classes come

    @property
    def clip_length(self) -> int:
        """Return T, frames of a clip."""
        return self.num_segments * self.frames_per_segment

    @property
    def num_views(self) -> int:
        """Return the number of views in mode "eval", which are `plan(0)` to `plan(num_views - 1)`."""
        return self.views * (1 + self.mirror_views)

    def plan(
        self, epoch: int, num_frames: Int64[np.ndarray, " N"], labels: Int64[np.ndarray, " N"] | None = None
    ) -> EpochPlan:
        """Return the plan of an epoch, or of a view, over videos of these numbers of frames.

        `labels` are needed where classes are balanced.
        """
        if self.mode == "eval":
            epoch %= self.num_views
        elif self.balance != "none":
            assert labels is not None, "classes are balanced by the labels"
            generator = _generator(self.seed + 2**63, 2**62 + epoch)
            times = expected_times(labels, self.balance)
            video = balanced_videos(times, generator.permutation(len(labels)), generator.random())
            return dataclasses.replace(self._plan(epoch, num_frames[video]), video=video)
        return self._plan(epoch, num_frames)

    def _plan(self, epoch: int, num_frames: Int64[np.ndarray, " N"]) -> EpochPlan:
        return epoch_plan(
            self.seed,
            epoch,
            num_frames,
            self.num_segments,
            self.frames_per_segment,
            self.mode,
            self.augmentation,
            self.views,
        )
