"""Draw the faces of the embedded data set: action units to pixels.

Coordinates are rounded to 1/16 px before drawing and all raster steps are integer, so every machine draws the same
bytes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

SIZE = 224  # height and width of a frame, px
PLAIN, HELD = -1, -2  # ClipScript.start of a clip that starts in a resting face, and of one that does not change
AUS = (1, 2, 4, 5, 6, 7, 9, 12, 15, 16, 20, 23, 26, 45)
COLUMN = {au: column for column, au in enumerate(AUS)}


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
    start: int  # the expression a turning clip starts in, PLAIN or HELD
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


def philox(seed: int, stream: int) -> np.random.Generator:
    """Return a generator that gives the same numbers everywhere, a sequence of its own for each stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


class _Shapes:
    """Display list of a clip of N frames: filled polygons in face coordinates (px, origin between the cheeks)."""

    def __init__(self, n: int):
        self.n = n
        self.corners: list[np.ndarray] = []  # (2, S, N, P) each: S polygons of P corners that share their colour
        self.traits: list[tuple[float, ...]] = []  # (turns with the head, moves with it, relief)
        self.colors: list[np.ndarray] = []  # (N, 4): BGR and how visible
        self.soft = 0  # number of shapes that are drawn before the blur

    def add(
        self, x, y, color, over=None, weight: float | np.ndarray = 1.0, line=0, flat=False, fixed=False, relief=0.0
    ) -> None:
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
    au = {name: script.aus[:, column, None] for name, column in COLUMN.items()}  # (N, 1) each
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
    noise = philox(0, 2**48).integers(-256, 257, (2, 2 * SIZE, 2 * SIZE, 3)).sum(axis=0) * peak // 256
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
