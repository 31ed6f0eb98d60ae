"""Write the embedded data set "faces": synthetic clips of seven facial expressions where the order of frames decides.

Each clip is a pure function of the seed and its index. Numbers come from Philox's uniform()/integers(), and drawing is
exact (dfer/video/drawn.py), so every machine writes the same bytes.
"""

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import Parser, begin, in_range, one_line_errors, progress, usable_cores
from dfer.files import disk_errors, write_whole
from dfer.lists.annotations import DRAWN, EMOTIONS, write_annotations
from dfer.video.drawn import AUS, COLUMN, HELD, PLAIN, SIZE, ClipScript, Identity, frames, philox, render_clip

# ---- The data set's grammar: what makes it easy or hard.
CLASS_SHARES = (0.21, 0.16, 0.23, 0.19, 0.125, 0.015, 0.07)  # as in DFEW
SPLITS = ("train", "test")
SPLIT_IDENTITIES = {"train": range(120), "test": range(120, 160)}  # disjoint
CLIP_FRAMES = (24, 64)
TURN_SWITCH = (0.35, 0.65)  # switch time, symmetric about the middle
TURN_SPAN = (0.15, 0.30)  # length of the cross-fade
ONSET_START = (0.05, 0.35)
ONSET_SPAN = ((0.08, 0.18), (0.22, 0.40), (0.15, 0.30), (0.14, 0.28), (0.06, 0.14), (0.14, 0.28), (0.20, 0.36))
OFFSET_START = (0.70, 0.95)
OFFSET_LEVEL = (0.30, 1.0)  # what is left of the peak at the end of a plain clip
AU_STYLE = (0.75, 1.1)  # how strongly one clip shows each action unit of its expression
REST_AU = 0.12  # an identity's resting face shows action units up to this
JITTER = 0.05
TREMBLE = 0.16  # of fear, in AU20 and AU26
BLINKS_PER_CLIP = (0, 3)  # inclusive, exclusive
TALK_JAW, FLASH_FRAMES = 0.5, (1, 4)
YAW, PITCH, ROLL = 0.24, 0.09, 0.10  # radians, largest
GAIN, GAIN_DRIFT = (0.65, 1.15), 0.12
BLUR_SHARE, NOISE_LEVELS = 0.25, (1, 3, 5, 8)


@dataclass(frozen=True)
class Difficulty:
    """What sets a setting apart: numbers of clips, shares of clips, ranges of intensity."""

    test_clips: int = 350
    test_shares: tuple[float, ...] = CLASS_SHARES
    held: float = 0.0  # in which the expression does not change, so that only a still look tells
    held_intensity: tuple[float, float] = (0.7, 1.0)
    turning: float = 0.45  # of the others: that start in another expression, so that order decides
    intensity: tuple[float, float] = (0.45, 1.0)  # peak
    looks: float = 0.0  # how strongly a resting face may look like an expression, so that a still look misleads
    talking: float = 0.30
    flashing: float = 0.25
    drift: float = 0.5  # share of the pose range that a head wanders through within a clip
    occluded: float = 0.15


TRAIN_CLIPS = 1400
_LARGE = Difficulty(  # tested on 150 clips of Disgust, 5 % instead of 1.5; the others keep their proportions
    test_clips=3000, test_shares=(0.2025, 0.1545, 0.2218, 0.1833, 0.1205, 0.05, 0.0674)
)  # fmt: skip
DIFFICULTIES = {
    "normal": Difficulty(),
    "large": _LARGE,  # the same clips to train on
    "hard": dataclasses.replace(
        _LARGE, held=0.2, turning=0.6, intensity=(0.35, 0.75), looks=0.65, talking=0.5, flashing=0.4, drift=0.75,
        occluded=0.2,
    ),
}  # fmt: skip
NORMAL = DIFFICULTIES["normal"]

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
JPEG_QUALITY, FPS = 92, 25
_SKINS = ((202, 222, 252), (150, 188, 236), (110, 150, 205), (66, 100, 150), (42, 62, 98))  # BGR
_HAIRS = ((24, 22, 26), (30, 42, 62), (44, 76, 120), (96, 160, 214), (40, 66, 150), (170, 172, 176))
_IRISES = ((30, 50, 84), (150, 110, 60), (70, 110, 70), (40, 80, 130))
_CODECS = {  # name -> (encoder, suffix, pixel format, options)
    "h264": ("libx264", ".mp4", "yuv420p", {"crf": "18", "preset": "veryfast"}),
    "vp9": ("libvpx-vp9", ".webm", "yuv420p", {"crf": "24", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
    "mjpeg": ("mjpeg", ".avi", "yuvj420p", {"qmin": "3", "qmax": "3"}),
}


def class_counts(count: int, shares: Sequence[float] = CLASS_SHARES) -> list[int]:
    """Clips per class by largest remainder; every class gets one as soon as there are enough clips."""
    quotas = [Fraction(str(share)) * count for share in shares]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda c: counts[c] - quotas[c])
    for c in order[: count - sum(counts)]:
        counts[c] += 1
    while count >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def plan_labels(seed: int, split: str, count: int, shares: Sequence[float] = CLASS_SHARES) -> list[int]:
    """Labels of a split's clips: exact class counts, shuffled."""
    labels = np.repeat(np.arange(len(EMOTIONS)), class_counts(count, shares))
    keys = philox(seed, 2**40 + SPLITS.index(split)).integers(0, 2**62, count)
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
    rng = philox(seed, 2**32 + identity_id)
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


def _with_look(person: Identity, seed: int, identity_id: int, most: float) -> Identity:
    """The person with a resting face that looks like one of the expressions, neutral included; jaw and lids apart."""
    rng = philox(seed, 2**45 + identity_id)
    look, strength = EMOTION_AUS[int(rng.integers(0, len(EMOTIONS)))], rng.uniform(0.5, 1) * most
    vector = np.array([strength * look.get(au, 0.0) if au != 26 else 0.0 for au in AUS])
    return replace(person, rest=np.maximum(person.rest, vector))


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _wander(rng: np.random.Generator, u: np.ndarray, columns: int, cycles: float) -> np.ndarray:
    """(N, columns) slow random curves in [-1, 1]: two sines each, of up to `cycles` cycles per clip."""
    frequency, phase = rng.uniform(0.3, 1, (2, columns)) * cycles, rng.uniform(0, 1, (2, columns))
    return np.sin(2 * np.pi * (u[:, None, None] * frequency + phase)).mean(axis=1)


def _expression(
    rng: np.random.Generator, emotion: int, u: np.ndarray, intensity: tuple[float, float] = NORMAL.intensity
) -> np.ndarray:
    """(N, AUS): an expression at its peak, in one clip's style."""
    peak = rng.uniform(*intensity)
    style = rng.uniform(*AU_STYLE, len(AUS))
    vector = np.array([EMOTION_AUS[emotion].get(au, 0.0) for au in AUS])
    curves = np.repeat((peak * style * vector)[None], len(u), axis=0)
    shake = TREMBLE * peak * np.sin(2 * np.pi * (u * len(u) / rng.uniform(4, 7) + rng.uniform()))
    if emotion == FEAR:
        curves[:, [COLUMN[20], COLUMN[26]]] += shake[:, None]
    return curves


def _distracted(
    rng: np.random.Generator, aus: np.ndarray, u: np.ndarray, person: Identity, level: Difficulty
) -> np.ndarray:
    """(N, AUS): an expression on a person's face, with what distracts from it, the same in all classes."""
    n = len(u)
    # On a face that looks like something an expression adds up, or a change within the look would not be seen.
    aus = 1 - (1 - aus) * (1 - person.rest) if level.looks else np.maximum(aus, person.rest)
    aus = aus + JITTER * _wander(rng, u, len(AUS), 4)
    if rng.uniform() < level.talking:
        beat = np.abs(np.sin(np.pi * (u * n / rng.uniform(5, 9) + rng.uniform())))
        begin = rng.uniform(-0.3, 0.7)
        talk = beat * _smoothstep((0.3 - np.abs(u - begin - 0.3)) / 0.1 + 0.5) * rng.uniform(0.5, 1)
        for au, weight in ((26, TALK_JAW), (20, 0.15), (12, 0.12)):
            aus[:, COLUMN[au]] += weight * talk
    if rng.uniform() < level.flashing:
        at = int(rng.integers(0, n))
        aus[at : at + int(rng.integers(*FLASH_FRAMES)), [COLUMN[1], COLUMN[2]]] += 0.7
    aus[:, COLUMN[45]] = 0
    for _ in range(int(rng.integers(*BLINKS_PER_CLIP))):
        at, lasts = int(rng.integers(0, n)), int(rng.integers(2, 5))
        aus[at : at + lasts, COLUMN[45]] = np.array((0.7, 1, 0.9, 0.5))[: min(lasts, n - at)]
    return np.clip(aus, 0, 1)


def plan_clip(seed: int, index: int, label: int, identities: range, level: Difficulty = NORMAL) -> ClipScript:
    """Script of a clip that ends in `label`, acted by one of `identities`."""
    rng = philox(seed, index)
    n = int(rng.integers(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
    u = (np.arange(n) + 0.5) / n
    identity_id = identities[int(rng.integers(0, len(identities)))]
    person = plan_identity(seed, identity_id)

    if level.looks:
        person = _with_look(person, seed, identity_id, level.looks)
    held = philox(seed, 2**44 + index).uniform() < level.held

    turning, which = rng.uniform() < level.turning and not held, rng.uniform()
    start = int((np.cumsum(_start_shares()[label])[:-1] < which).sum()) if turning else HELD if held else PLAIN
    after = _expression(rng, label, u, level.held_intensity if held else level.intensity)
    if held:
        aus = np.repeat(after[:1], n, axis=0)
    elif turning:
        span = rng.uniform(*TURN_SPAN)
        fade = _smoothstep((u - rng.uniform(*TURN_SWITCH)) / span + 0.5)[:, None]
        aus = (1 - fade) * _expression(rng, start, u, level.intensity) + fade * after
    else:
        rise = _smoothstep((u - rng.uniform(*ONSET_START)) / rng.uniform(*ONSET_SPAN[label]))
        leave = rng.uniform(*OFFSET_START)
        fall = 1 - (1 - rng.uniform(*OFFSET_LEVEL)) * _smoothstep((u - leave) / (1 - leave))
        aus = (rise * fall)[:, None] * after

    aus = _distracted(rng, aus, u, person, level)
    limits = np.array((YAW, PITCH, ROLL, 5, 3))
    pose = limits * ((1 - level.drift) * rng.uniform(-1, 1, 5) + level.drift * _wander(rng, u, 5, 1))
    occluded, hand = rng.uniform() < level.occluded, rng.uniform() < 0.5
    spot, travel = rng.uniform((40, 120), (184, 200)), rng.uniform(-40, 40, 2)
    skin, thing = person.skin * rng.uniform(0.85, 1.0), rng.uniform(10, 200) + rng.uniform(-10, 30, 3)
    background = np.clip(rng.uniform(20, 210, (2, 1)) + rng.uniform(-30, 30, (2, 3)), 0, 255)
    gain = rng.uniform(*GAIN) * (1 + GAIN_DRIFT * _wander(rng, u, 1, 1.5)[:, 0])
    gain = np.rint(64 * gain) / 64  # in steps: few backgrounds to fill
    return ClipScript(
        label=label, start=start, identity_id=identity_id, identity=person, aus=aus, pose=pose,
        gain=gain, light=rng.uniform((-12, -10), (12, 2)), background=background,
        blur=int(rng.integers(1, 3)) * 2 + 1 if rng.uniform() < BLUR_SHARE else 1,
        noise=NOISE_LEVELS[int(rng.integers(0, len(NOISE_LEVELS)))], noise_at=rng.integers(0, SIZE, (n, 2)),
        occluder=spot + (u[:, None] - 0.5) * travel * 2 if occluded else np.zeros((0, 2)), occluder_hand=hand,
        occluder_angle=rng.uniform(-0.7, 0.7), occluder_color=skin if hand else thing,
    )  # fmt: skip


def apex_script(seed: int, identity_id: int, emotion: int, level: Difficulty = NORMAL) -> ClipScript:
    """One frame of an expression at full intensity, near frontal, without distractors."""
    script = plan_clip(seed, 2**33 + identity_id, emotion, range(identity_id, identity_id + 1), level)
    aus = np.maximum([[EMOTION_AUS[emotion].get(au, 0.0) for au in AUS]], script.identity.rest)
    still = {"pose": script.pose[:1] * 0.6, "gain": np.ones(1), "occluder": np.zeros((0, 2)), "blur": 1, "noise": 3}
    return replace(script, aus=aus, noise_at=script.noise_at[:1], **still)


def contact_sheet(seed: int = 0, people: int = 8, side: int = 160, level: Difficulty = NORMAL) -> np.ndarray:
    """Picture to look at: a row per emotion with several people at apex, then a time strip per emotion; uint8, BGR."""

    def row(text: str, images: list[np.ndarray]) -> np.ndarray:
        label = np.full((side, 120, 3), 255, dtype=np.uint8)
        for k, line in enumerate(text.split("\n")):
            cv2.putText(label, line, (4, 40 + 24 * k), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
        return np.hstack([label] + [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])

    rows = []
    for emotion, name in enumerate(EMOTIONS):
        rows.append(row(name, [next(frames(apex_script(seed, person, emotion, level))) for person in range(people)]))
    for emotion, name in enumerate(EMOTIONS):
        script = plan_clip(seed, 2**34 + emotion, emotion, SPLIT_IDENTITIES["train"], level)
        clip = render_clip(script)
        begin = {PLAIN: "plain", HELD: "held"}.get(script.start) or EMOTIONS[script.start]
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


def _write_clip(job: tuple[Path, int, int, int, str, str | None, Difficulty]) -> tuple[str, tuple[str, int, int]]:
    """Worker: write one clip; its split and its row of the list."""
    out, seed, number, label, split, codec, level = job
    cv2.setNumThreads(1)  # the workers are the parallelism
    script = plan_clip(seed, number, label, SPLIT_IDENTITIES[split], level)
    name = f"{number:05d}"
    where = _write_frames(out, name, script) if codec is None else _write_video(out, name, script, codec)
    return split, (where, len(script.aus), label)


def make_data_set(
    out: Path,
    size: float = 1.0,
    seed: int = 0,
    codec: str | None = None,
    workers: int = 1,
    level: Difficulty = NORMAL,
) -> list[Path]:
    """Write all clips, then the lists (atomically, so that a half-done run is never taken for a finished one)."""
    suffix = f"_{codec}" if codec else ""
    lists = {split: out / f"{split}{suffix}.txt" for split in SPLITS}
    out.mkdir(parents=True, exist_ok=True)
    for path in lists.values():
        path.unlink(missing_ok=True)
    jobs = []
    sizes = ("train", TRAIN_CLIPS, CLASS_SHARES), ("test", level.test_clips, level.test_shares)
    for split, clips, shares in sizes:
        for label in plan_labels(seed, split, max(1, round(clips * size)), shares):
            jobs.append((out, seed, len(jobs) + 1, label, split, codec, level))

    rows: dict[str, list[tuple[str, int, int]]] = {split: [] for split in lists}
    with contextlib.ExitStack() as stack:
        results = map(_write_clip, jobs)
        if workers > 1:  # spawned, as forking a process that has threads is unsafe
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            results = pool.imap(_write_clip, jobs, chunksize=4)
        for split, row in progress(results, len(jobs), "clips"):
            rows[split].append(row)
    for split, path in lists.items():
        write_annotations(path, rows[split], faces=DRAWN)
    return list(lists.values())


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("make_faces", "Write the synthetic data set 'faces'.")
    parser.add_argument("--out", type=Path, default=Path("data/faces"), help="folder to write to")
    parser.add_argument(
        "--size", type=in_range(float, 0.001, 50), default=1.0, help="1.0 is 1,400 train and 350 test clips"
    )
    parser.add_argument(
        "--difficulty",
        choices=tuple(DIFFICULTIES),
        default="normal",
        help="large: 3,000 test clips; hard: so many, and subtle, distracted, held and turning expressions on faces "
        "that mislead at rest",
    )
    parser.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0)
    parser.add_argument("--video", choices=tuple(_CODECS), help="write the clips as video files instead of frames")
    parser.add_argument("--workers", type=in_range(int, 1, 512), default=usable_cores())
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="write only a picture to look at")
    args = parser.parse_args(arguments)
    return one_line_errors("make_faces", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write the data set, or only a picture of it."""
    level = DIFFICULTIES[args.difficulty]
    if args.contact_sheet:
        with disk_errors("cannot write"):
            write_whole(args.contact_sheet, cv2.imencode(".png", contact_sheet(args.seed, level=level))[1].tobytes())
        print(f"wrote {args.contact_sheet}")
        return
    print(f"make_faces: drawing on {args.workers} cores", flush=True)
    with disk_errors(f"{args.out}: cannot be written"):
        lists = make_data_set(args.out, args.size, args.seed, args.video, args.workers, level)
    for path in lists:
        print(f"wrote {path}")


if __name__ == "__main__":
    begin("make_faces")
    sys.exit(main())
