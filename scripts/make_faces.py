"""Write the embedded data set "faces": synthetic clips of seven facial expressions where the order of frames decides.

Each clip is a pure function of the seed and its index. Numbers come from Philox's uniform()/integers(), coordinates are
rounded to 1/16 px before drawing and all raster steps are integer, so every machine writes the same bytes.
"""

import contextlib
import functools
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, begin, in_range, progress, usable_cores
from dfer.lists.annotations import EMOTIONS, write_annotations

# ---- The data set's grammar: what makes it easy or hard.
CLASS_SHARES = (0.21, 0.16, 0.23, 0.19, 0.125, 0.015, 0.07)  # as in DFEW
SPLIT_CLIPS = {"train": 1400, "test": 350}
SPLIT_IDENTITIES = {"train": range(120), "test": range(120, 160)}  # disjoint
CLIP_FRAMES = (24, 64)
TURN_SHARE = 0.45  # clips that start in another expression
TURN_SWITCH = (0.35, 0.65)  # switch time, symmetric about the middle
TURN_SPAN = (0.15, 0.30)  # length of the cross-fade
INTENSITY = (0.45, 1.0)  # peak
ONSET_START = (0.05, 0.35)
ONSET_SPAN = ((0.08, 0.18), (0.22, 0.40), (0.15, 0.30), (0.14, 0.28), (0.06, 0.14), (0.14, 0.28), (0.20, 0.36))
OFFSET_START = (0.70, 0.95)
OFFSET_LEVEL = (0.30, 1.0)  # what is left of the peak at the end of a plain clip
AU_STYLE = (0.75, 1.1)  # how strongly one clip shows each action unit of its expression
REST_AU = 0.12  # an identity's resting face shows action units up to this
JITTER = 0.05
TREMBLE = 0.16  # of fear, in AU20 and AU26
BLINKS_PER_CLIP = (0, 3)  # inclusive, exclusive
TALK_SHARE, TALK_JAW = 0.30, 0.5
FLASH_SHARE, FLASH_FRAMES = 0.25, (1, 4)
YAW, PITCH, ROLL = 0.24, 0.09, 0.10  # radians, largest
DRIFT = 0.5  # share of the pose range that a head wanders through within a clip
GAIN, GAIN_DRIFT = (0.65, 1.15), 0.12
BLUR_SHARE, OCCLUDE_SHARE, NOISE_LEVELS = 0.25, 0.15, (1, 3, 5, 8)

AUS = (1, 2, 4, 5, 6, 7, 9, 12, 15, 16, 20, 23, 26, 45)
_COLUMN = {au: column for column, au in enumerate(AUS)}
EMOTION_AUS = (
    {6: 1.0, 12: 1.0},
    {1: 1.0, 4: 0.75, 15: 1.0},
    {},
    {4: 1.0, 5: 0.7, 7: 0.6, 23: 1.0},
    {1: 1.0, 2: 1.0, 5: 0.9, 26: 1.0},
    {9: 1.0, 15: 0.7, 16: 0.8},
    {1: 1.0, 2: 0.45, 4: 0.75, 5: 1.0, 20: 1.0, 26: 0.35},
)
HAPPY, SAD, NEUTRAL, ANGRY, SURPRISE, DISGUST, FEAR = range(len(EMOTIONS))
PLAIN = -1  # ClipScript.start of a clip that starts in a resting face and is not turning
SIZE, JPEG_QUALITY, FPS = 224, 92, 25
_SKINS = ((202, 222, 252), (150, 188, 236), (110, 150, 205), (66, 100, 150), (42, 62, 98))  # BGR
_HAIRS = ((24, 22, 26), (30, 42, 62), (44, 76, 120), (96, 160, 214), (40, 66, 150), (170, 172, 176))
_IRISES = ((30, 50, 84), (150, 110, 60), (70, 110, 70), (40, 80, 130))
_CODECS = {  # name -> (encoder, suffix, pixel format, options)
    "h264": ("libx264", ".mp4", "yuv420p", {"crf": "18", "preset": "veryfast"}),
    "vp9": ("libvpx-vp9", ".webm", "yuv420p", {"crf": "24", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
    "mjpeg": ("mjpeg", ".avi", "yuvj420p", {"qmin": "3", "qmax": "3"}),
}


@dataclass(frozen=True)
class Identity:
    """One person: lengths in px of the 224 px frame, colours as (3,) BGR."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lip: np.ndarray
    width: float  # half of the head's width
    chin: float
    taper: float
    eye_x: float
    eye_size: float
    brow: float
    brow_y: float
    nose: float
    nose_width: float
    mouth_y: float
    mouth: float
    lips: float
    age: float  # 0..1: folds that show at rest
    style: int  # hair: 0 none, 1 short, 2 long, 3 fringe, 4 round
    beard: int  # 0 none, 1 moustache, 2 beard, 3 both
    glasses: bool
    rest: np.ndarray  # (AUS,) intensities of the resting face


@dataclass(frozen=True)
class ClipScript:
    """All that is needed to draw a clip of N frames."""

    label: int
    start: int  # the expression a turning clip starts in, or PLAIN
    identity_id: int
    identity: Identity
    aus: np.ndarray  # (N, AUS) in [0, 1]
    pose: np.ndarray  # (N, 5): yaw, pitch, roll in radians, dx, dy in px
    gain: np.ndarray  # (N,)
    light: np.ndarray  # (2,) px: where the light comes from
    background: np.ndarray  # (2, 3) BGR: top, bottom
    blur: int  # kernel size, 1 for none
    noise: int  # peak
    noise_at: np.ndarray  # (N, 2) offset into the noise tile
    occluder: np.ndarray  # (N, 2) centre in px, (0, 2) for none
    occluder_hand: bool  # or a bar
    occluder_angle: float
    occluder_color: np.ndarray


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def class_counts(count: int) -> list[int]:
    """Clips per class by largest remainder; every class gets one as soon as there are enough clips."""
    quotas = [Fraction(str(share)) * count for share in CLASS_SHARES]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda c: counts[c] - quotas[c])
    for c in order[: count - sum(counts)]:
        counts[c] += 1
    while count >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def plan_labels(seed: int, split: str, count: int) -> list[int]:
    """Labels of a split's clips: exact class counts, shuffled."""
    labels = np.repeat(np.arange(len(EMOTIONS)), class_counts(count))
    keys = _rng(seed, 2**40 + list(SPLIT_CLIPS).index(split)).integers(0, 2**62, count)
    return labels[np.argsort(keys, kind="stable")].tolist()


@functools.cache
def _start_shares() -> np.ndarray:
    """(7, 7): share of each start for each label.

    The joint share of (A, B) equals that of (B, A): blind to order, one cannot tell which of the two is the label.
    """
    shares, x = np.array(CLASS_SHARES), np.array(CLASS_SHARES)
    for _ in range(200):
        x = 0.5 * (x + shares / (x.sum() - x))
    joint = x[:, None] * x[None, :]
    np.fill_diagonal(joint, 0)
    return joint / joint.sum(axis=1, keepdims=True)


def plan_identity(seed: int, identity_id: int) -> Identity:
    """The person with this number: a pure function of both arguments."""
    rng = _rng(seed, 2**32 + identity_id)
    tone = rng.uniform(0, len(_SKINS) - 1.001)
    skins = np.array(_SKINS, dtype=float)
    skin = skins[int(tone)] + (tone - int(tone)) * (skins[int(tone) + 1] - skins[int(tone)]) + rng.uniform(-8, 8, 3)
    # Dark skin mostly comes with dark hair and eyes.
    hair = _HAIRS[int(rng.integers(0, len(_HAIRS) if tone < 2 else 2))]
    iris = _IRISES[int(rng.integers(0, len(_IRISES) if tone < 2 else 1))]
    male = rng.uniform() < 0.5
    lip = np.clip(skin * (0.72, 0.62, 0.86) + rng.uniform(0, 1) * np.array((6, -12, 34)), 10, 240)
    return Identity(
        skin=skin, hair=np.array(hair, dtype=float), iris=np.array(iris, dtype=float), lip=lip,
        width=rng.uniform(76, 90), chin=rng.uniform(90, 102), taper=rng.uniform(0.12, 0.34),
        eye_x=rng.uniform(34, 40), eye_size=rng.uniform(0.92, 1.12), brow=rng.uniform(6, 10) - (0 if male else 1.5),
        brow_y=rng.uniform(-3, 3), nose=rng.uniform(18, 26), nose_width=rng.uniform(12, 17),
        mouth_y=rng.uniform(49, 55), mouth=rng.uniform(26, 33), lips=rng.uniform(0.75, 1.35),
        age=rng.uniform(0, 1) ** 2, style=int(rng.integers(0, 5) if male else rng.integers(1, 5)),
        beard=int(rng.integers(0, 4)) if male and rng.uniform() < 0.5 else 0, glasses=bool(rng.uniform() < 0.2),
        rest=np.array([rng.uniform(0, REST_AU) if au not in (26, 45) else 0.0 for au in AUS]),
    )  # fmt: skip


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _wander(rng: np.random.Generator, u: np.ndarray, columns: int, cycles: float) -> np.ndarray:
    """(N, columns) slow random curves in [-1, 1]: two sines each, of up to `cycles` cycles per clip."""
    frequency, phase = rng.uniform(0.3, 1, (2, columns)) * cycles, rng.uniform(0, 1, (2, columns))
    return np.sin(2 * np.pi * (u[:, None, None] * frequency + phase)).mean(axis=1)


def _expression(rng: np.random.Generator, emotion: int, u: np.ndarray) -> np.ndarray:
    """(N, AUS): an expression at its peak, in one clip's style."""
    peak = rng.uniform(*INTENSITY)
    style = rng.uniform(*AU_STYLE, len(AUS))
    vector = np.array([EMOTION_AUS[emotion].get(au, 0.0) for au in AUS])
    curves = np.repeat((peak * style * vector)[None], len(u), axis=0)
    shake = TREMBLE * peak * np.sin(2 * np.pi * (u * len(u) / rng.uniform(4, 7) + rng.uniform()))
    if emotion == FEAR:
        curves[:, [_COLUMN[20], _COLUMN[26]]] += shake[:, None]
    return curves


def plan_clip(seed: int, index: int, label: int, identities: range) -> ClipScript:
    """Script of a clip that ends in `label`, acted by one of `identities`."""
    rng = _rng(seed, index)
    n = int(rng.integers(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
    u = (np.arange(n) + 0.5) / n
    identity_id = identities[int(rng.integers(0, len(identities)))]
    person = plan_identity(seed, identity_id)

    turning, which = rng.uniform() < TURN_SHARE, rng.uniform()
    start = int((np.cumsum(_start_shares()[label])[:-1] < which).sum()) if turning else PLAIN
    after = _expression(rng, label, u)
    if turning:
        span = rng.uniform(*TURN_SPAN)
        fade = _smoothstep((u - rng.uniform(*TURN_SWITCH)) / span + 0.5)[:, None]
        aus = (1 - fade) * _expression(rng, start, u) + fade * after
    else:
        rise = _smoothstep((u - rng.uniform(*ONSET_START)) / rng.uniform(*ONSET_SPAN[label]))
        leave = rng.uniform(*OFFSET_START)
        fall = 1 - (1 - rng.uniform(*OFFSET_LEVEL)) * _smoothstep((u - leave) / (1 - leave))
        aus = (rise * fall)[:, None] * after

    # Distractors, the same in all classes.
    aus = np.maximum(aus, person.rest) + JITTER * _wander(rng, u, len(AUS), 4)
    if rng.uniform() < TALK_SHARE:
        beat = np.abs(np.sin(np.pi * (u * n / rng.uniform(5, 9) + rng.uniform())))
        begin = rng.uniform(-0.3, 0.7)
        talk = beat * _smoothstep((0.3 - np.abs(u - begin - 0.3)) / 0.1 + 0.5) * rng.uniform(0.5, 1)
        for au, weight in ((26, TALK_JAW), (20, 0.15), (12, 0.12)):
            aus[:, _COLUMN[au]] += weight * talk
    if rng.uniform() < FLASH_SHARE:
        at = int(rng.integers(0, n))
        aus[at : at + int(rng.integers(*FLASH_FRAMES)), [_COLUMN[1], _COLUMN[2]]] += 0.7
    aus[:, _COLUMN[45]] = 0
    for _ in range(int(rng.integers(*BLINKS_PER_CLIP))):
        at, lasts = int(rng.integers(0, n)), int(rng.integers(2, 5))
        aus[at : at + lasts, _COLUMN[45]] = np.array((0.7, 1, 0.9, 0.5))[: min(lasts, n - at)]

    limits = np.array((YAW, PITCH, ROLL, 5, 3))
    pose = limits * ((1 - DRIFT) * rng.uniform(-1, 1, 5) + DRIFT * _wander(rng, u, 5, 1))
    occluded, hand = rng.uniform() < OCCLUDE_SHARE, rng.uniform() < 0.5
    spot, travel = rng.uniform((40, 120), (184, 200)), rng.uniform(-40, 40, 2)
    skin, thing = person.skin * rng.uniform(0.85, 1.0), rng.uniform(10, 200) + rng.uniform(-10, 30, 3)
    background = np.clip(rng.uniform(20, 210, (2, 1)) + rng.uniform(-30, 30, (2, 3)), 0, 255)
    gain = rng.uniform(*GAIN) * (1 + GAIN_DRIFT * _wander(rng, u, 1, 1.5)[:, 0])
    gain = np.rint(64 * gain) / 64  # in steps: few backgrounds to fill
    return ClipScript(
        label=label, start=start, identity_id=identity_id, identity=person, aus=np.clip(aus, 0, 1), pose=pose,
gain=gain, light=rng.uniform((-12, -10), (12, 2)), background=background,
        blur=int(rng.integers(1, 3)) * 2 + 1 if rng.uniform() < BLUR_SHARE else 1,
        noise=NOISE_LEVELS[int(rng.integers(0, len(NOISE_LEVELS)))], noise_at=rng.integers(0, SIZE, (n, 2)),
        occluder=spot + (u[:, None] - 0.5) * travel * 2 if occluded else np.zeros((0, 2)), occluder_hand=hand,
        occluder_angle=rng.uniform(-0.7, 0.7), occluder_color=skin if hand else thing,
    )  # fmt: skip


class _Shapes:
    """Display list of a clip of N frames: filled polygons in face coordinates (px, origin between the cheeks)."""

    def __init__(self, n: int):
        self.n = n
        self.corners: list[np.ndarray] = []  # (2, S, N, P) each: S polygons of P corners that share their colour
        self.traits: list[tuple[float, ...]] = []  # (turns with the head, moves with it, relief)
        self.colors: list[np.ndarray] = []  # (N, 4): BGR and how visible
        self.soft = 0  # number of shapes that are drawn before the blur

    def add(self, x, y, color, over=None, weight=1.0, line=0, flat=False, fixed=False, relief=0.0) -> None:
        """Append a polygon, or a line of that many px.

        x, y: broadcast to (S, N, P), S disjoint copies. color: (3,) or (N, 3). It fades to the colour `over` with
        weight, (N, 1) or a number; tiny weights draw nothing. flat: in the plane of the head's outline; fixed: in the
        frame's coordinates.
        """
        x, y, _ = np.broadcast_arrays(np.asarray(x, dtype=float), y, np.zeros((1, self.n, 1)))
        if line:  # as a strip: much faster than cv2.polylines
            dx, dy = (np.diff(v, axis=-1) for v in (x, y))
            dx, dy = (np.concatenate((d[..., :1], d[..., 1:] + d[..., :-1], d[..., -1:]), axis=-1) for d in (dx, dy))
            scale = (line - 0.6) / 2 / np.sqrt(np.maximum(dx * dx + dy * dy, 1e-6))
            x = np.concatenate((x - dy * scale, (x + dy * scale)[..., ::-1]), axis=-1)
            y = np.concatenate((y + dx * scale, (y - dx * scale)[..., ::-1]), axis=-1)
        self.corners.append(np.stack((x, y)))
        self.traits.append((not (flat or fixed), not fixed, relief))
        color = color if over is None else _mix(over, color, weight)
        weight = np.broadcast_to(weight, (self.n, 1))
        self.colors.append(np.concatenate((np.broadcast_to(color, (self.n, 3)), weight), axis=1))

    def render(self, script: ClipScript) -> Iterator[list[tuple[list[np.ndarray], list[int], bool]]]:
        """Per frame, what to draw: polygons (P, 2) in 1/16 px, their colour, and whether they are visible."""
        copies, sizes = [c.shape[1] for c in self.corners], [c.shape[3] for c in self.corners]
        turns, moves, relief = np.repeat(np.array(self.traits, dtype=float), np.multiply(copies, sizes), axis=0).T
        x, y = np.concatenate([c.transpose(0, 2, 1, 3).reshape(2, self.n, -1) for c in self.corners], axis=2)
        yaw, pitch, roll, dx, dy = (column[:, None] for column in script.pose.T)
        # Inner features sit on an ellipsoid that turns: they shift against the outline.
        z = turns * (70 * np.sqrt(np.clip(1 - (x / 105) ** 2 - (y / 135) ** 2, 0, 1)) + relief)
        fx, fy = x * (1 + turns * (np.cos(yaw) - 1)) + z * np.sin(yaw), y + z * np.sin(pitch)
        fx, fy = fx * np.cos(roll) - fy * np.sin(roll) + dx + 112, fx * np.sin(roll) + fy * np.cos(roll) + dy + 114
        points = np.stack((np.where(moves > 0, fx, x), np.where(moves > 0, fy, y)), axis=-1)
        points = np.rint(points * 16).astype(np.int32)
        spans, end = [], 0
        for copy, size in zip(copies, sizes, strict=True):
            spans.append([slice(end + k * size, end + (k + 1) * size) for k in range(copy)])
            end += copy * size
        colors = np.stack(self.colors, axis=1)
        seen = (colors[..., 3] > 0.05).tolist()
        colors = np.rint(np.clip(colors[..., :3] * script.gain[:, None, None], 0, 255)).astype(int).tolist()
        for frame, paint, show in zip(points, colors, seen, strict=True):
            polygons = [[frame[s] for s in span] for span in spans]
            yield list(zip(polygons, paint, show, strict=True))


def _mix(a, b, weight) -> np.ndarray:
    """Colour between a and b: (3,) or (N, 3), for a weight that is a number or (N, 1)."""
    return a + np.clip(weight, 0, 1) * (np.asarray(b, dtype=float) - a)


def _oval(cx, cy, rx, ry, points: int = 16) -> tuple[np.ndarray, np.ndarray]:
    a = np.arange(points) * (2 * np.pi / points)
    return cx + rx * np.cos(a), cy + ry * np.sin(a)


def _ring(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closed polygon between two curves over the same x."""
    x, upper, lower = np.broadcast_arrays(x, upper, lower)
    return np.concatenate((x, x[..., ::-1]), axis=-1), np.concatenate((upper, lower[..., ::-1]), axis=-1)


def _compose(script: ClipScript) -> _Shapes:
    """Turn action units into shapes, back to front."""
    shapes, p = _Shapes(len(script.aus)), script.identity
    add = shapes.add
    au = {name: script.aus[:, column, None] for name, column in _COLUMN.items()}  # (N, 1) each
    side, rows = np.array((-1.0, 1.0))[:, None, None], np.arange(3.0)[:, None, None]
    light = np.minimum(p.skin * 1.13 + 8, 255)
    skin, dark, deep = _mix(p.skin, light, 0.4), p.skin * 0.72, p.skin * 0.42

    # Head, lit from one side: nested outlines melt into a shaded ball when blurred.
    cos, sin = (f(np.arange(32) * (2 * np.pi / 32)) for f in (np.cos, np.sin))
    chin = p.chin + 15 * au[26] - 2 * au[23]
    rim_x = p.width * np.sign(cos) * np.abs(cos) ** 0.85 * (1 - p.taper * np.clip(sin, 0, 1) ** 2.5)
    rim_y = np.where(sin > 0, chin, 104.0) * sin
    if p.style in (2, 4):  # hair behind the head
        low = 112 if p.style == 2 else 20
        add(*_oval(0, (low - 112) / 2, p.width + 17, (low + 112) / 2 + 4, 32), p.hair, flat=True)
    for grow, shift, tone in ((1, 0, 0.62), (0.94, 0.4, 0.8), (0.84, 1, 1)):
        x, y = grow * rim_x + shift * script.light[0], grow * rim_y + shift * script.light[1]
        add(x, y, skin * tone, flat=True)

    # Soft parts: eye sockets, cheeks, nose, folds.
    corner_x = p.mouth + 9 * au[12] + 10 * au[20] - 7 * au[23] - 10 * au[26] * (1 - au[20]) * (1 - au[12])
    corner_y = p.mouth_y - 12 * au[12] + 11 * au[15] + 6 * au[26] + 2 * au[20]
    nose_y = p.nose - 4 * au[9]
    wing = p.nose_width + 3 * au[9] + 2 * au[12]
    q = np.linspace(0, 1, 9)
    add(*_oval(side * p.eye_x, -22, 24, 15), dark, skin, 0.35)
    add(*_oval(side * (p.eye_x + 4), 21 - 5 * au[6], 21, 13), light, skin, au[6] + 0.4 * au[12])
    fold = np.clip(0.25 * p.age + 0.8 * au[12] + 0.9 * au[9] + 0.3 * au[20], 0, 1)
    x = side * (wing + 3 + (corner_x + 9 - wing) * q + 5 * np.sin(np.pi * q))
    add(x, nose_y - 6 + (corner_y + 6 - nose_y) * q, deep, skin, 0.85 * fold, line=4)
    x = (6 + (wing - 5) * q**2) * (-1 if script.light[0] > 0 else 1)
    add(x, -26 + (nose_y + 23) * q, dark, skin, 0.6, line=5, relief=8)
    add(*_oval(0, nose_y - 3, 7, 7, 12), light, relief=14)
    add(*_oval(0, p.mouth_y + 22 + 16 * au[26], 16, 4, 12), dark, skin, 0.6 + 0.4 * au[15])
    raised, x = np.maximum(au[1], au[2]), np.linspace(-30, 30, 7)
    y = -74 + 8 * rows[:2] - 5 * raised + 0.003 * x * x
    add(x, y, deep, skin, 0.15 * p.age + 0.6 * raised**1.5, line=2)
    if p.beard >= 2:
        x, y = 0.96 * rim_x[1:16], 0.96 * rim_y[:, 1:16]
        add(*_ring(x, y, np.minimum(p.mouth_y - 12 - 30 * (x / p.width) ** 2, y)), _mix(skin, p.hair, 0.75), flat=True)
    shapes.soft = len(shapes.colors)

    # Eyes. Lids are curves, which the iris is cut off at.
    k, gaze = p.eye_size, 30 * script.pose[:, :1]
    t = np.linspace(-1, 1, 11)
    arch = (1 - t * t) ** 0.75
    seen = np.clip(1 - 1.2 * au[45], 0, 1)
    up = k * (10 + 6 * au[5] - 3.5 * au[7] - 2 * au[6] - 3 * au[9])
    down = k * (7 + 1.5 * au[5] - 4.5 * au[6] - 3.5 * au[7] - 3 * au[9])
    up = (1 - au[45]) * up - au[45] * (down - 0.5)
    slant = side * (1.5 - 5 * au[1] * (1 - au[2]) * (1 - au[5]) + 1.5 * au[4] * (1 - au[1]))  # sad lids hang outwards
    x = side * p.eye_x + 20 * k * t
    upper, lower = -18 - slant * t - up * arch, -18 - slant * t + down * arch
    add(*_ring(x, upper, lower), (238, 242, 244), dark, seen)
    for radius, color in ((9.5 * k, p.iris), (4.8 * k, (12, 10, 10))):
        ix, iy = _oval(side * p.eye_x + gaze, -19, radius, radius)
        at = np.clip((ix - side * p.eye_x) / (20 * k), -0.98, 0.98)
        bend = (1 - at * at) ** 0.75
        add(ix, np.clip(iy, -18 - slant * at - up * bend, -18 - slant * at + down * bend), color, dark, seen)
    add(x, lower, deep, dark, 0.1 + au[7], line=1)
    add(x, upper, deep * 0.5, line=3)
    add(x[..., 1:-1], (upper - 5 - 2 * au[45])[..., 1:-1], dark * 0.9, line=1)
    add(x[..., ::2], (lower + 5 - au[6])[..., ::2], deep, skin, 0.7 * (au[6] + 0.6 * au[7] + 0.2 * p.age), line=2)
    for row in (-1, 1):  # crow's feet
        add(side * (p.eye_x + 22 + np.array((0.0, 9))), -16 + row * np.array((1.5, 6)), deep, skin, 0.7 * au[6], line=2)

    # Brows: heights of the inner end, middle and outer end, joined by a parabola.
    inner = -13 * au[1] + 13 * au[4] * (1 - 0.85 * au[1]) + 6 * au[9]
    middle = -11 * au[2] - 4 * au[1] + 7 * au[4] * (1 - 0.5 * au[1]) + 4 * au[9]
    outer = -10 * au[2] + 4 * au[1] * (1 - au[2]) - 2 * au[4] * (1 - au[1])
    y = inner * (1 - q) * (1 - 2 * q) + middle * 4 * q * (1 - q) + outer * q * (2 * q - 1)
    y = y + p.brow_y - 39 - 10 * q * (1.15 - q)
    half = p.brow * (0.5 - 0.33 * q**2)
    x = side * (p.eye_x - 22 - 4 * au[4] + (46 + 4 * au[4]) * q)
    add(*_ring(x, y - half, y + half), np.minimum(p.hair * 0.75, p.skin * 0.5))
    frown = 0.9 * au[4] * (1 - 0.5 * au[1]) + 0.45 * au[9]
    add(side * np.array((6.0, 5, 7)), np.array((-50.0, -42, -33)), deep, skin, frown, line=2)

    # Nose, with wrinkles across it and creases around its wings.
    x = np.linspace(-10, 10, 7)
    add(x, -14 + 8 * rows - 0.05 * x * x, deep, skin, 1.1 * au[9], line=2, relief=8)
    x, y = _oval(0, nose_y - 1, wing, 7, 24)
    add(side * x[:, :8], y[:, :8], deep, skin, 0.75, line=2, relief=6)
    add(*_oval(side * wing * 0.5, nose_y + 3, 4, 2.5, 10), deep * 0.6, relief=6)
    x, y = side * (wing + np.array((-3.0, 1, 1))), nose_y + np.array((-11.0, -6, 0))
    add(x, y, deep, dark, au[9], line=2, relief=4)

    # Mouth: inner lip curves, lips around them, teeth inside.
    gap = (11 * au[12] + 13 * au[16] + 3 * au[9] + 8 * au[20] + 32 * au[26]) * (1 - 0.95 * au[23])
    middle = p.mouth_y + 1 * au[12] - 6 * au[9] - 3 * au[15] - 3 * au[26] - 2 * au[20]
    t = np.linspace(-1, 1, 17)
    bow = 1 - np.abs(t) ** (2 + 2.5 * au[20] + au[26])  # a square mouth when stretched
    mx, cap = corner_x * t, 1 - np.abs(t) ** 3
    top, bottom = corner_y + (middle - corner_y) * bow, corner_y + (middle + gap - corner_y) * bow
    thin = np.clip(1 - 0.75 * au[23] - 0.35 * au[20] - 0.3 * au[12], 0.15, 1) * p.lips
    if p.beard in (1, 3):
        y = (corner_y + middle) / 2 - 6 + 4 * t**2
        add(*_ring((p.mouth + 4 + 4 * au[12]) * t, y - 8 * cap, y + 2 * cap), _mix(skin, p.hair, 0.85), relief=2)
    notch = 5.5 - 1.6 * np.exp(-((t / 0.15) ** 2))
    add(*_ring(mx, top - thin * notch * cap, bottom + thin * (8 + 2 * au[16] + 2 * au[15]) * cap), p.lip)
    inside = _mix(p.lip * 0.4, (28, 16, 48), gap / 6)
    add(*_ring(mx, top, bottom), inside)
    teeth = np.clip((gap - 2) / 4, 0, 1)
    x, high, low = (v[:, 3:14] for v in (mx, top, bottom))
    add(*_ring(x, 0.3 * high + 0.7 * low, low - 1), (70, 60, 150), inside, np.clip((gap - 16) / 10, 0, 1))  # tongue
    lower_teeth = teeth * np.clip(1.3 * au[16] + au[20] - 0.2, 0, 1)
    add(*_ring(x, low - np.minimum((low - high) * 0.25, 6), low), (214, 222, 222), inside, lower_teeth)
    x, high, low = (v[:, 2:15] for v in (mx, top, bottom))
    depth = np.minimum((low - high) * 0.62, 9) * (1 - 0.55 * au[26] * (1 - au[20]))
    add(*_ring(x, high, high + depth), (236, 240, 240), inside, teeth)
    x, y = side * (corner_x + np.array((0.0, 4, 5))), corner_y + np.array((0.0, 0, 4)) * (au[15] - au[12])
    add(x, y, p.lip * 0.55, line=2)

    # Hair in front, glasses, what hides the face.
    if p.style:
        x, (start, drop) = np.linspace(-0.9, 0.9, 17), (-70, 24) if p.style == 3 else (-82, 42)
        crown = -112 * np.sqrt(1 - (x / 1.015) ** 2)
        low = start + drop * np.abs(x) ** 4 + 3 * np.sin(9 * x + p.brow)
        add(*_ring(x * p.width * 1.01, np.minimum(crown, low), low), p.hair, flat=True)
        add(x[3:9] * p.width, (crown + low)[3:9] / 2, _mix(p.hair, (255, 255, 255), 0.2), line=3, flat=True)
    if p.glasses:
        x, y = _oval(side * p.eye_x, -15, 27, 22, 24)
        add(np.append(x, x[..., :1], axis=-1), np.append(y, y[:1]), np.minimum(p.hair, 60), line=3, relief=6)
        add(np.array((-9.0, 0, 9)), np.array((-16.0, -19, -16)), np.minimum(p.hair, 60), line=3, relief=8)
    if len(script.occluder):
        (cx, cy), c, s = script.occluder.T[..., None], np.cos(script.occluder_angle), np.sin(script.occluder_angle)
        parts = [(np.array((-130.0, 130, 130, -130)), np.array((-15.0, -15, 15, 15)), 1.0)]
        if script.occluder_hand:
            parts = [(*_oval(0, 44, 30, 36, 24), 1.0)]
            for x, y in ((-24, 6), (-8, 2), (8, 2), (24, 6)):
                parts += [(*_oval(x, y, 9, 36), 0.72), (*_oval(x, y, 7, 34), 1.0)]
        for x, y, tone in parts:
            add(cx + x * c - y * s, cy + x * s + y * c, script.occluder_color * tone, fixed=True)
    return shapes


@functools.cache
def _noise_tiles(peak: int) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative part of a tile of noise, (448, 448, 3) uint8 each."""
    noise = _rng(0, 2**48).integers(-256, 257, (2, 2 * SIZE, 2 * SIZE, 3)).sum(axis=0) * peak // 256
    return np.maximum(noise, 0).astype(np.uint8), np.maximum(-noise, 0).astype(np.uint8)


def frames(script: ClipScript) -> Iterator[np.ndarray]:
    """Draw a clip frame by frame: (224, 224, 3) uint8, BGR."""
    shapes = _compose(script)
    ramp = np.arange(SIZE)[:, None, None] / SIZE
    column = script.background[0] + (script.background[1] - script.background[0]) * ramp
    bases = {}
    for gain in set(script.gain.tolist()):
        rows = np.rint(np.clip(column * gain, 0, 255)).astype(np.uint8)
        bases[gain] = cv2.resize(rows, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST)  # copies the column
    lx, ly = np.rint(script.light * 16).astype(int)
    away = (-lx * (np.arange(SIZE)[None] - 112) - ly * (np.arange(SIZE)[:, None] - 112)) // 700
    shade = np.repeat(np.clip(away, 0, 90)[:, :, None], 3, axis=2).astype(np.uint8)
    more, less = _noise_tiles(script.noise)
    for i, items in enumerate(shapes.render(script)):
        image = bases[script.gain[i]].copy()
        for polygons, color, visible in items[: shapes.soft]:
            if visible:  # the blur does for smooth edges
                cv2.fillPoly(image, polygons, color, cv2.LINE_8, 4)
        image = cv2.GaussianBlur(image, (5, 5), 0)
        for polygons, color, visible in items[shapes.soft :]:
            if visible:
                cv2.fillPoly(image, polygons, color, cv2.LINE_AA, 4)
        image = cv2.subtract(image, shade)
        if script.blur > 1:
            image = cv2.GaussianBlur(image, (script.blur, script.blur), 0)
        y, x = script.noise_at[i]
        window = (slice(y, y + SIZE), slice(x, x + SIZE))
        yield cv2.subtract(cv2.add(image, more[window]), less[window])


def render_clip(script: ClipScript) -> np.ndarray:
    """Draw a clip: (N, 224, 224, 3) uint8, BGR."""
    return np.stack(list(frames(script)))


def apex_script(seed: int, identity_id: int, emotion: int) -> ClipScript:
    """One frame of an expression at full intensity, near frontal, without distractors."""
    script = plan_clip(seed, 2**33 + identity_id, emotion, range(identity_id, identity_id + 1))
    aus = np.maximum([[EMOTION_AUS[emotion].get(au, 0.0) for au in AUS]], script.identity.rest)
    still = {"pose": script.pose[:1] * 0.6, "gain": np.ones(1), "occluder": np.zeros((0, 2)), "blur": 1, "noise": 3}
    return ClipScript(**{**vars(script), "aus": aus, "noise_at": script.noise_at[:1], **still})


def contact_sheet(seed: int = 0, people: int = 8, side: int = 160) -> np.ndarray:
    """Picture to look at: a row per emotion with several people at apex, then a time strip per emotion; uint8, BGR."""

    def row(text: str, images: list[np.ndarray]) -> np.ndarray:
        label = np.full((side, 120, 3), 255, dtype=np.uint8)
        for k, line in enumerate(text.split("\n")):
            cv2.putText(label, line, (4, 40 + 24 * k), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        return np.hstack([label] + [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])

    rows = []
    for emotion, name in enumerate(EMOTIONS):
        rows.append(row(name, [next(frames(apex_script(seed, person, emotion))) for person in range(people)]))
    for emotion, name in enumerate(EMOTIONS):
        script = plan_clip(seed, 2**34 + emotion, emotion, SPLIT_IDENTITIES["train"])
        clip = render_clip(script)
        begin = "plain" if script.start == PLAIN else EMOTIONS[script.start]
        rows.append(row(f"{begin}\n-> {name}", [clip[(2 * k + 1) * len(clip) // (2 * people)] for k in range(people)]))
    return np.vstack(rows)


def _write_frames(out: Path, name: str, script: ClipScript) -> str:
    folder = out / "clips" / name
    folder.mkdir(parents=True, exist_ok=True)
    for stale in sorted(folder.glob("*.jpg"))[len(script.aus) :]:  # left by an earlier run's longer clip
        stale.unlink()
    for frame, image in enumerate(frames(script), start=1):
        _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
        with open(f"{folder}/{frame:05d}.jpg", "wb", buffering=0) as file:
            file.write(data)
    return f"clips/{name}"


def _write_video(out: Path, name: str, script: ClipScript, codec: str) -> str:
    import av

    encoder, suffix, pixels, options = _CODECS[codec]
    path = out / f"videos_{codec}" / (name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=FPS, options={**options, "threads": "1", "flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, pixels
        for image in frames(script):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode())
    return str(path.relative_to(out).as_posix())


def _write_clip(job: tuple[Path, int, int, int, str, str | None]) -> tuple[str, tuple[str, int, int]]:
    """Worker: write one clip; its split and its row of the list."""
    out, seed, number, label, split, codec = job
    cv2.setNumThreads(1)  # the workers are the parallelism
    script = plan_clip(seed, number, label, SPLIT_IDENTITIES[split])
    name = f"{number:05d}"
    where = _write_frames(out, name, script) if codec is None else _write_video(out, name, script, codec)
    return split, (where, len(script.aus), label)


def make_data_set(
    out: Path, size: float = 1.0, seed: int = 0, codec: str | None = None, workers: int = 1
) -> list[Path]:
    """Write all clips, then the lists (atomically, so that a half-done run is never taken for a finished one)."""
    suffix = f"_{codec}" if codec else ""
    lists = {split: out / f"{split}{suffix}.txt" for split in SPLIT_CLIPS}
    out.mkdir(parents=True, exist_ok=True)
    for path in lists.values():
        path.unlink(missing_ok=True)
    jobs = []
    for split, clips in SPLIT_CLIPS.items():
        for label in plan_labels(seed, split, max(1, round(clips * size))):
            jobs.append((out, seed, len(jobs) + 1, label, split, codec))

    rows: dict[str, list[tuple[str, int, int]]] = {split: [] for split in lists}
    with contextlib.ExitStack() as stack:
        results = map(_write_clip, jobs)
        if workers > 1:  # spawned, as forking a process that has threads is unsafe
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            results = pool.imap(_write_clip, jobs, chunksize=4)
        for split, row in progress(results, len(jobs), "clips"):
            rows[split].append(row)
    for split, path in lists.items():
        write_annotations(path, rows[split])
    return list(lists.values())


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("make_faces", "Write the synthetic data set 'faces'.")
    parser.add_argument("--out", type=Path, default=Path("data/faces"), help="folder to write to")
    parser.add_argument("--size", type=in_range(float, 0.001, 50), default=1.0, help="1.0: 1,400 and 350 test clips")
    parser.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0)
    parser.add_argument("--video", choices=tuple(_CODECS), help="write the clips as video files instead of frames")
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=usable_cores())
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="write only a picture to look at")
    args = parser.parse_args(arguments)
    try:
        if args.contact_sheet:
            args.contact_sheet.write_bytes(cv2.imencode(".png", contact_sheet(args.seed))[1])
            print(f"wrote {args.contact_sheet}")
            return 0
        for path in make_data_set(args.out, args.size, args.seed, args.video, args.workers):
            print(f"wrote {path}")
    except OSError as error:
        parser.error(f"cannot write: {error}")
    return 0


if __name__ == "__main__":
    begin("make_faces")
    sys.exit(main())
