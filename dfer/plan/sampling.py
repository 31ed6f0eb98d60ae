"""Plans: which frames of which videos, in what order, cut and coloured how. ALL randomness of training is here.

A plan is a pure function of (seed, epoch, video). It knows nothing of ranks, batches or threads, so training order and
augmentation are the same on 1 GPU and on 8, and resuming needs a step number, not a saved state.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Complex128, Float32, Float64, Int64

from dfer.cli import Range

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])
# RGB -> YIQ. The first row is BT.601's luma, as in DALI and torchvision; the others sum to 0: grey has no colour.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_LUMA = np.tile(_YIQ[0], (3, 1))
# A quarter turn of the colour plane, grey to black: red turns towards yellow, as in DALI and torchvision.
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ

# SimCLR blurs with 0.1 to 2 pixels; here in shares of the clip's side, as if clips were 112 px.
BLUR_SIGMA = (0.1 / 112, 2.0 / 112)
# Area (share of the clip) and aspect ratio of an erased rectangle, as in timm and torchvision.
ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
# What RandAugment may draw. Strengths at magnitude 10 are timm's: 30 degrees, shear 0.3, a translation by 0.45 of the
# side, factors 1 +- 0.9; blur (BLUR_SIGMA's upper end) is the half of timm's sharpness that a Gaussian can express.
# Left out: posterize, solarize, equalize, autocontrast and invert, of which no affine map of colours is capable or none
# that suits a face.
RANDAUGMENT_OPS = (
    "identity", "rotate", "shear-x", "shear-y", "translate-x", "translate-y", "brightness", "contrast", "saturation",
    "blur",
)  # fmt: skip
MAX_RANDAUGMENT = 4  # operations; MAE-DFER's rand-m7-n4 is the longest of the field


@dataclass(frozen=True)
class Augmentation:
    """What training may do to a clip: one draw per clip, the same for all its frames."""

    # share of the frame that a crop keeps, drawn from [min_crop_area, 1]
    min_crop_area: Annotated[float, Range(0.01, 1.0)] = 0.6
    # aspect ratio of the crop, drawn from [1/r, r], log-uniform
    max_crop_ratio: Annotated[float, Range(1.0, 4.0)] = 1.2
    # probability of a mirror image
    flip: Annotated[float, Range(0.0, 1.0)] = 0.5
    # brightness, contrast and saturation factors are drawn from [1-c, 1+c]
    colour: Annotated[float, Range(0.0, 0.99)] = 0.2
    # brightness alone: one more factor, drawn from [1-b, 1+b]
    brightness: Annotated[float, Range(0.0, 0.99)] = 0.0
    # largest turn of the hue as a share of the colour circle, in YIQ; drawn from [-h, h]
    hue: Annotated[float, Range(0.0, 0.5)] = 0.0
    # probability of a grey clip (BT.601 luma)
    grayscale: Annotated[float, Range(0.0, 1.0)] = 0.0
    # largest angle in degrees, drawn from [-r, r]; beyond the picture its edge is repeated
    rotation: Annotated[float, Range(0.0, 180.0)] = 0.0
    # probability of a Gaussian blur, sigma 0.1 to 2 px of 112
    blur: Annotated[float, Range(0.0, 1.0)] = 0.0
    # probability that a rectangle of 2 to 33 % of the area, ratio 0.3 to 3.3, turns mean grey
    erase: Annotated[float, Range(0.0, 1.0)] = 0.0
    # a clip is spread over 1/f of its video, f drawn from [1, speed], log-uniform: slower by f
    speed: Annotated[float, Range(1.0, 8.0)] = 1.0
    # probability that time runs backwards
    reverse: Annotated[float, Range(0.0, 1.0)] = 0.0
    # operations drawn per clip: geometry, colour or blur, but nothing non-linear; 0 = off
    randaugment: Annotated[int, Range(0, MAX_RANDAUGMENT)] = 0
    # strength of these operations, 0 to 10
    magnitude: Annotated[float, Range(0.0, 10.0)] = 7.0


@dataclass(frozen=True)
class EpochPlan:
    """One epoch as a struct of arrays; row v of every array but `order` belongs to video v of the list.

    What is done to a frame, in this order: the box is cut out, resized to S x S (linear, antialiased, not rounded to
    whole numbers) and mirrored; then warp, blur, colour, erase.

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

    order: Int64[np.ndarray, " N"]
    frames: Int64[np.ndarray, "N T"]  # frame indices, each below the video's frame count; rising, falling if reversed
    box: Float64[np.ndarray, "N 4"]  # top, left, height, width of the crop as shares of the frame, inside [0, 1]
    mirror: Bool[np.ndarray, " N"]
    warp: Float32[np.ndarray, "N 2 3"]  # exactly [[1, 0, 0], [0, 1, 0]] for none
    blur: Float32[np.ndarray, " N"]  # sigma in shares of the clip's side, exactly 0 for none
    colour: Float32[np.ndarray, "N 3 4"]  # RGB in 0..255 -> normalised output: out = colour[:, :3] @ rgb + colour[:, 3]
    erase: Float32[np.ndarray, "N 4"]  # top, left, height, width in shares of the output; all exactly 0 for none


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
    views: int = 1,
) -> EpochPlan:
    """Plan one epoch over all videos, vectorised.

    Mode "eval" plans view `epoch` of every video, whatever the seed. Of V = `views` views, view v takes the frames at
    share (v + 0.5) / V of their segments; one view is the centre. Views V to 2V-1 are their mirror images, and after
    these they come again.
    """
    num_videos = len(num_frames)
    if mode == "eval":
        share = np.full((num_videos, num_segments), (epoch % views + 0.5) / views)
        return EpochPlan(
            order=np.arange(num_videos),
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
    # What came later has a block of its own, so that the draws above stay what they were; seeds end below 2^63.
    later = _generator(seed + 2**63, epoch).random((num_videos, 14 + 2 * MAX_RANDAUGMENT))
    steps = _rand_augment(later[:, 14:], augmentation)
    return EpochPlan(
        order=order,
        frames=_train_frames(num_frames, num_segments, frames_per_segment, u[:, 8:], later[:, :3], augmentation),
        box=_crop_boxes(u[:, :4], augmentation),
        mirror=u[:, 4] < augmentation.flip,
        warp=_warps(later[:, 3], steps, augmentation),
        blur=_blurs(later[:, 4:6], steps, augmentation),
        colour=_colours(u[:, 5:8], later[:, 6:9], steps, augmentation),
        erase=_erase_boxes(later[:, 9:14], augmentation),
    )


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def _train_frames(
    num_frames: Int64[np.ndarray, " N"],
    num_segments: int,
    frames_per_segment: int,
    u: Float64[np.ndarray, "N S"],
    later: Float64[np.ndarray, "N 3"],
    augmentation: Augmentation,
) -> Int64[np.ndarray, "N T"]:
    """Segments of a window of N/f consecutive frames, anywhere in the video; some clips run backwards."""
    window = np.maximum(np.rint(num_frames / augmentation.speed ** later[:, 0]), 1).astype(np.int64)
    start = np.floor(later[:, 1] * (num_frames - window + 1)).astype(np.int64)
    frames = start[:, None] + segment_frames(window, num_segments, frames_per_segment, u)
    return np.where(later[:, 2:] < augmentation.reverse, frames[:, ::-1], frames)


def _rand_augment(u: Float64[np.ndarray, "N _"], augmentation: Augmentation) -> list[dict[str, np.ndarray]]:
    """The steps of RandAugment: for each operation, its signed strength (N,) float64, 1 at magnitude 10.

    One operation is drawn per step and clip, with equal chances for both signs; the strength of the others is 0.
    """
    steps = []
    for which, sign in u.T.reshape(-1, 2, len(u))[: augmentation.randaugment]:
        drawn = (which * len(RANDAUGMENT_OPS)).astype(np.int64)
        strength = np.where(sign < 0.5, -0.1, 0.1) * augmentation.magnitude
        steps.append({name: np.where(drawn == i, strength, 0.0) for i, name in enumerate(RANDAUGMENT_OPS)})
    return steps


def _warps(
    u: Float64[np.ndarray, " N"], steps: list[dict[str, np.ndarray]], augmentation: Augmentation
) -> Float32[np.ndarray, "N 2 3"]:
    zero, one = np.zeros(len(u)), np.ones(len(u))

    def way_back(degrees: np.ndarray, shear_x=zero, shear_y=zero, move_x=zero, move_y=zero) -> np.ndarray:
        """From the output to its source; at most one argument differs from 0.

        As y points down, a positive angle turns the picture counter-clockwise.
        """
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        rows = [cos, shear_x - sin, move_x, shear_y + sin, cos, move_y, zero, zero, one]
        return np.stack(rows, axis=1).reshape(-1, 3, 3)

    warp = way_back(augmentation.rotation * (2 * u - 1))
    for step in steps:
        shears, moves = (0.3 * step["shear-x"], 0.3 * step["shear-y"]), (step["translate-x"], step["translate-y"])
        # What is done to the picture last comes first on the way back.
        warp = warp @ way_back(30 * step["rotate"], *shears, *(0.45 * move for move in moves))
    return warp[:, :2].astype(np.float32)


def _blurs(
    u: Float64[np.ndarray, "N 2"], steps: list[dict[str, np.ndarray]], augmentation: Augmentation
) -> Float32[np.ndarray, " N"]:
    low, high = BLUR_SIGMA
    variance = np.where(u[:, 0] < augmentation.blur, low + (high - low) * u[:, 1], 0.0) ** 2
    for step in steps:  # a Gaussian after a Gaussian is one whose variance is the sum
        variance = variance + (high * step["blur"]) ** 2
    return np.sqrt(variance).astype(np.float32)


def _colours(
    u: Float64[np.ndarray, "N 3"],
    later: Float64[np.ndarray, "N 3"],
    steps: list[dict[str, np.ndarray]],
    augmentation: Augmentation,
) -> Float32[np.ndarray, "N 3 4"]:
    brightness, contrast, saturation = (1 + augmentation.colour * (2 * u - 1)).T
    light, turn, grey = later.T
    chroma = saturation * np.exp(2j * np.pi * augmentation.hue * (2 * turn - 1))
    factors = [(brightness * (1 + augmentation.brightness * (2 * light - 1)), contrast)]
    for step in steps:
        factors.append((1 + 0.9 * step["brightness"], 1 + 0.9 * step["contrast"]))
        chroma = chroma * (1 + 0.9 * step["saturation"])
    gain, offset = np.ones(len(u)), np.zeros(len(u))
    for brightness, contrast in factors:
        gain, offset = gain * brightness * contrast, offset * brightness * contrast + 128 * (1 - contrast)
    return colour_matrices(gain, offset, np.where(grey < augmentation.grayscale, 0, chroma))


def colour_matrices(
    gain: Float64[np.ndarray, " N"], offset: Float64[np.ndarray, " N"], chroma: Complex128[np.ndarray, " N"]
) -> Float32[np.ndarray, "N 3 4"]:
    """Fold a change of colour and ImageNet normalisation together: EpochPlan.colour.

    All that is done to colours is affine, as nothing is clamped between or after. Brightness f scales RGB by f;
    contrast f scales it about mid-grey 128, so a clip's brightness and contrast are one `gain` and one `offset` (in
    0..255). Saturation and hue leave BT.601's luma as it is and act on the two axes of colour of YIQ alone: saturation
    is the length of `chroma` and hue its angle; 0 is grey and 1 leaves the colour as it is.
    """
    gain, offset, stretch, turn = (x[:, None, None] for x in (gain, offset, chroma.real, chroma.imag))
    matrix = gain * (stretch * np.eye(3) + (1 - stretch) * _LUMA + turn * _QUARTER_TURN)
    scale = 1 / (255 * IMAGENET_STD)[:, None]
    shift = (IMAGENET_MEAN / IMAGENET_STD)[:, None]
    return np.concatenate([matrix * scale, offset * scale - shift], axis=2).astype(np.float32)


def _crop_boxes(u: Float64[np.ndarray, "N 4"], augmentation: Augmentation) -> Float64[np.ndarray, "N 4"]:
    area = augmentation.min_crop_area + (1 - augmentation.min_crop_area) * u[:, 0]
    ratio = augmentation.max_crop_ratio ** (2 * u[:, 1] - 1)
    return _boxes(area, ratio, u[:, 2:])


def _erase_boxes(u: Float64[np.ndarray, "N 5"], augmentation: Augmentation) -> Float32[np.ndarray, "N 4"]:
    area = ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * u[:, 1]
    ratio = ERASE_RATIO[0] * (ERASE_RATIO[1] / ERASE_RATIO[0]) ** u[:, 2]
    return np.where(u[:, :1] < augmentation.erase, _boxes(area, ratio, u[:, 3:]), 0.0).astype(np.float32)


def _boxes(
    area: Float64[np.ndarray, " N"], ratio: Float64[np.ndarray, " N"], place: Float64[np.ndarray, "N 2"]
) -> Float64[np.ndarray, "N 4"]:
    """Boxes of an area and a ratio of width to height, cut to the whole side at most, anywhere in the unit square."""
    height = np.minimum(np.sqrt(area / ratio), 1.0)
    width = np.minimum(np.sqrt(area * ratio), 1.0)
    return np.stack([place[:, 0] * (1 - height), place[:, 1] * (1 - width), height, width], axis=1)


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
    views: int = 1  # mode "eval": places in time that a video is looked at
    mirror_views: bool = False  # and each of them mirrored too

    @property
    def clip_length(self) -> int:
        """T, frames of a clip."""
        return self.num_segments * self.frames_per_segment

    @property
    def num_views(self) -> int:
        """Mode "eval": `plan(0)` to `plan(num_views - 1)` are the views of every video."""
        return self.views * (1 + self.mirror_views)

    def plan(self, epoch: int, num_frames: Int64[np.ndarray, " N"]) -> EpochPlan:
        if self.mode == "eval":
            epoch %= self.num_views
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
