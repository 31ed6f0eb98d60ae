"""Faces: each step of the way from detections to crops against a slow way to say the same."""

import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from dfer.video import detectors
from dfer.video import faces as fa
from scripts import make_faces as mf

FRAME = np.zeros((100, 160, 3), np.uint8)


def toy_yunet(tilt: float) -> bytes:
    """An .onnx file that OpenCV takes for YuNet: it sees a face of 32 px, so tilted, around each white 8 px cell.

    YuNet has outputs for cells of 8, 16 and 32 px: the logits of "face" twice, the box and the landmarks, in cells.
    """

    def number(n: int) -> bytes:
        return bytes([n & 127 | 128]) + number(n >> 7) if n > 127 else bytes([n])

    def field(key: int, value: int | str | bytes) -> bytes:  # of a protocol buffer
        if isinstance(value, int):
            return number(key << 3) + number(value % 2**64)
        value = value.encode() if isinstance(value, str) else value
        return number(key << 3 | 2) + number(len(value)) + value

    def tensor(name: str, array: np.ndarray) -> bytes:
        kind = {"float32": 1, "int64": 7}[array.dtype.name]
        return b"".join(field(1, n) for n in array.shape) + field(2, kind) + field(8, name) + field(9, array.tobytes())

    def node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> bytes:
        ints = (
            field(1, name) + b"".join(field(8, n) for n in values) + field(20, 7) for name, values in attributes.items()
        )
        ends = b"".join(field(1, name) for name in inputs) + field(2, output)
        return ends + field(4, kind) + b"".join(field(5, attribute) for attribute in ints)

    def value(name: str, *shape: int) -> bytes:
        dims = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    slope = math.tan(tilt)
    eyes = (-0.5, -0.5 * slope, 1.5, 1.5 * slope)
    graph = field(2, "toy") + field(11, value("input", 1, 3, 64, 64))
    for cell, (what, bias) in itertools.product(
        (8, 16, 32),
        {"cls": [-30], "obj": [-30], "bbox": [0.5, 0.5, *[math.log(4)] * 2], "kps": [*eyes, *[0] * 6]}.items(),
    ):
        name, channels = f"{what}_{cell}", len(bias)
        weight = np.full(
            (channels, 3, cell, cell), 60 / (255 * 3 * 64) if (cell, channels) == (8, 1) else 0, np.float32
        )
        shape = np.array([1, -1, channels])
        for key, array in (("w", weight), ("b", np.array(bias, np.float32)), ("s", shape)):
            graph += field(5, tensor(name + key, array))
        for one in (
            node("Conv", ["input", name + "w", name + "b"], name + "c", kernel_shape=[cell] * 2, strides=[cell] * 2),
            node("Transpose", [name + "c"], name + "t", perm=[0, 2, 3, 1]),
            node("Reshape", [name + "t", name + "s"], name + "r" if channels == 1 else name),
            *([node("Sigmoid", [name + "r"], name)] if channels == 1 else []),
        ):
            graph += field(1, one)
        graph += field(12, value(name, 1, 64, channels))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 12))


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float64).reshape(-1, 4)


def overlap_by_pixels(a: np.ndarray, b: np.ndarray) -> float:
    """Of squares with whole corners."""
    pictures = []
    for x, y, side, _ in (a, b):
        picture = np.zeros((40, 40), bool)
        picture[round(y - side / 2) : round(y + side / 2), round(x - side / 2) : round(x + side / 2)] = True
        pictures.append(picture)
    return (pictures[0] & pictures[1]).sum() / (pictures[0] | pictures[1]).sum()


def test_overlaps_count_pixels() -> None:
    rng = np.random.default_rng(0)
    rows = boxes(*[(*(rng.integers(8, 32, 2)), 2 * rng.integers(1, 8), rng.random()) for _ in range(60)])
    for box in rows[:20]:
        np.testing.assert_allclose(fa.overlaps(box, rows), [overlap_by_pixels(box, row) for row in rows], atol=1e-12)
    assert fa.overlaps(rows[0], rows[:0]).shape == (0,)


def test_two_faces_that_come_and_go_are_two_tracks() -> None:
    left, right = (
        lambda s: (30.0 + 2 * s, 40, 30, 0),
        lambda s: (110.0 - s, 50, 40, 0),
    )
    faces = [boxes(left(s), right(s)) if s % 2 else boxes(right(s), left(s)) for s in range(10)]
    faces[3], faces[4], faces[5] = boxes(right(3)), boxes(), boxes(right(5))
    tracks = fa.link_tracks(faces, np.zeros(10, np.int64))
    assert len(tracks) == 2
    for track, face, missed in ((tracks[0], right, {4}), (tracks[1], left, {3, 4, 5})):
        assert track.samples.tolist() == [s for s in range(10) if s not in missed]
        np.testing.assert_array_equal(track.boxes, [face(s) for s in track.samples])


def close_by_pixels(track: fa.Track, i: int) -> float:
    """Of detection i of a track and what was there before it: pixels counted at four for each one."""
    (s, a), (t, b) = ((track.samples[k], track.boxes[k]) for k in (i - 1, i))
    places = [a[:2]]
    if i > 1:
        r, before = track.samples[i - 2], track.boxes[i - 2]
        places.append(a[:2] + (a[:2] - before[:2]) * ((t - s) / (s - r)))
    y, x = np.mgrid[-40:180, -40:180] / 2
    inside = [np.maximum(abs(x - px), abs(y - py)) < side / 2 for (px, py), side in
              [*((place, a[2]) for place in places), (b[:2], b[2])]]  # fmt: skip
    best = max((one & inside[-1]).sum() / (one | inside[-1]).sum() for one in inside[:-1])
    return best * min(a[2] / b[2], b[2] / a[2])


def test_faces_that_are_close_overlap_and_are_of_one_size() -> None:
    rng = np.random.default_rng(5)
    for length in (1, 2, 3):
        for _ in range(6):
            rows = boxes(*[(*rng.uniform(30, 50, 2), rng.uniform(15, 40), 0) for _ in range(length + 1)])
            samples = np.cumsum(rng.integers(1, 4, length + 1))
            history = [(int(s), box) for s, box in zip(samples[:-1], rows[:-1], strict=True)]
            (close,) = fa.closeness(history, int(samples[-1]), rows[-1:])
            assert close == pytest.approx(close_by_pixels(fa.Track(samples, rows), length), abs=0.03)


def test_a_fast_face_is_followed_as_it_moved() -> None:
    still = [boxes((50, 50, 20, 0))] * 3
    moving = [boxes((x, 50, 20, 0)) for x in (20, 30, 44, 62, 82)]  # in the end it leaves the place where it was
    far = [boxes((75, 50, 20, 0))] * 3
    assert [len(fa.link_tracks(rows, np.zeros(len(rows), np.int64))) for rows in (moving, still + far)] == [1, 2]


def test_a_track_ends_where_the_box_jumps_and_the_face_changes() -> None:
    """Each of the two alone ends none, nor does a gap."""
    rng = np.random.default_rng(6)
    one, other = rng.integers(0, 256, (2, 192), dtype=np.uint8)
    here, there = boxes((50, 50, 20, 0)), boxes((59, 50, 20, 0))  # they overlap by 0.38
    shots = np.zeros(4, np.int64)
    for rows, looks, count in (
        ([here] * 4, [one, one, other, other], 1),
        ([here, here, there, there], [one] * 4, 1),
        ([here, here, there, there], [one, one, one // 2 + 60, one], 1),  # another light
        ([here, here, there, there], [one, one, other, other], 2),
        ([here, boxes(), here, here], [one, None, one, one], 1),
        ([here, boxes(), here, here], [one, None, other, other], 2),  # who comes when the other was lost
    ):
        assert len(fa.link_tracks(rows, shots, [[] if look is None else [look] for look in looks])) == count


def test_the_look_of_a_face_is_its_square_made_small() -> None:
    frame = np.zeros((100, 160, 3), np.uint8)
    frame[30:70, 60:80], frame[30:70, 80:100] = 200, 40
    look = fa.face_look(frame, np.array([80.0, 50, 40, 0.7])).reshape(fa.LOOK, fa.LOOK, 3)
    assert (look[:, :4] == 200).all() and (look[:, 4:] == 40).all()
    for outside in ((-50, 50), (500, 50), (80, -90), (80, 400), (0, 0)):  # a box may reach over the edge, or lie beyond
        assert fa.face_look(frame, np.array([*outside, 40.0, 0])).shape == (3 * fa.LOOK**2,)


@pytest.mark.parametrize(("missed", "count"), [(fa.MAX_GAP - 1, 1), (fa.MAX_GAP, 2)])
def test_a_track_bridges_short_gaps_only(missed: int, count: int) -> None:
    faces = [boxes((50, 50, 20, 0)), *[boxes()] * missed, boxes((51, 50, 20, 0))]
    assert len(fa.link_tracks(faces, np.zeros(len(faces), np.int64))) == count


def test_a_track_ends_at_a_cut_and_where_the_face_jumps() -> None:
    faces = [boxes((50, 50, 20, 0))] * 4
    assert [t.samples.tolist() for t in fa.link_tracks(faces, np.array([0, 0, 1, 1]))] == [[0, 1], [2, 3]]
    faces = [boxes((50, 50, 20, 0))] * 2 + [boxes((64, 50, 20, 0))] * 2
    assert len(fa.link_tracks(faces, np.zeros(4, np.int64))) == 2


def test_the_best_overlap_goes_first_and_every_detection_is_in_one_track() -> None:
    rng = np.random.default_rng(1)
    faces = [boxes(*[(*rng.uniform(0, 60, 2), rng.uniform(20, 40), 0) for _ in range(rng.integers(0, 5))])]
    for _ in range(40):
        faces.append(boxes(*[(*rng.uniform(0, 60, 2), rng.uniform(20, 40), 0) for _ in range(rng.integers(0, 5))]))
    tracks = fa.link_tracks(faces, np.arange(41) // 15)
    linked = sorted((int(s), *box) for track in tracks for s, box in zip(track.samples, track.boxes, strict=True))
    assert linked == sorted((s, *box) for s, rows in enumerate(faces) for box in rows)
    for track in tracks:
        for s, t in itertools.pairwise(track.samples):
            assert s < t <= s + fa.MAX_GAP
            assert s // 15 == t // 15
        for i in range(1, len(track.samples)):
            assert close_by_pixels(track, i) >= fa.MIN_CLOSENESS - 0.05
    near, far = (50, 50, 20, 0), (55, 50, 20, 0)
    a, b = fa.link_tracks([boxes((49, 50, 20, 0)), boxes(far, near)], np.zeros(2, np.int64))
    assert (a.boxes[-1][0], b.boxes[0][0]) == (50, 55)


def track(first: int, count: int, *box: float, step: int = 1) -> fa.Track:
    return fa.Track(first + step * np.arange(count), np.tile(np.array(box, np.float64), (count, 1)))


def test_the_chosen_face_is_large_central_and_long() -> None:
    middle, corner = (80, 50, 30, 0), (20, 15, 30, 0)
    for wanted, others in (
        (track(0, 10, *middle), [track(0, 10, *corner)]),
        (track(0, 10, 80, 50, 40, 0), [track(0, 10, *middle)]),
        (track(4, 12, *middle), [track(0, 8, *middle)]),
        (track(0, 10, 20, 15, 62, 0), [track(0, 10, *middle)]),  # twice as large makes up for the place
    ):
        for tracks in ([wanted, *others], [*others, wanted]):
            ranked, _ = fa.rank_tracks(tracks, 20, 100, 160)
            assert ranked[0] is wanted and len(ranked) == len(tracks)


def test_false_alarms_are_neither_chosen_nor_counted() -> None:
    face = track(0, 8, 80, 50, 20, 0)
    short, sparse = track(0, fa.MIN_DETECTIONS - 1, 80, 50, 90, 0), track(0, 6, 80, 50, 90, 0, step=3)
    assert fa.rank_tracks([short, face, sparse], 20, 100, 160) == ([face], 1)
    assert fa.rank_tracks([short, sparse], 20, 100, 160) == ([], 0)
    assert fa.rank_tracks([], 20, 100, 160) == ([], 0)
    assert fa.rank_tracks([short], 2 * len(short.samples), 100, 160)[0] == [short]  # half of a short video
    tracks = [track(0, 5, 80, 50, 20, 0), track(5, 5, 80, 50, 20, 0), track(4, 5, 20, 20, 20, 0)]
    assert fa.rank_tracks(tracks, 10, 100, 160)[1] == 2
    assert fa.rank_tracks(tracks[:2], 10, 100, 160)[1] == 1
    assert fa.rank_tracks(tracks[::2], 10, 100, 160)[1] == 2  # in sample 4


def test_smoothing_is_a_weighted_line_through_the_neighbours() -> None:
    rng = np.random.default_rng(2)
    times = np.cumsum(rng.uniform(0.01, 0.2, 50))  # a variable rate
    noisy = rng.normal(100, 5, (50, 4))
    smooth = fa.smooth_boxes(noisy, times)
    for i, time in enumerate(times):
        near = np.abs(times - time) <= 3 * fa.SMOOTH_S
        weights = np.exp(-0.5 * ((times[near] - time) / fa.SMOOTH_S) ** 2)
        line = np.polyfit(times[near] - time, noisy[near], 1, w=np.sqrt(weights))
        np.testing.assert_allclose(smooth[i], line[1], atol=1e-6)
    steady = np.array((10, 90, 20, 0)) + np.outer(times, (30, -5, 2, 0.1))
    np.testing.assert_allclose(fa.smooth_boxes(steady, times), steady, atol=1e-9)
    np.testing.assert_array_equal(fa.smooth_boxes(noisy[:1], times[:1]), noisy[:1])
    apart = np.array([0.0, 100.0])
    np.testing.assert_allclose(fa.smooth_boxes(noisy[:2], apart), noisy[:2])


def bilinear(frame: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture at a place, where pixel (i, j) has its centre at (i + 0.5, j + 0.5)."""
    height, width = frame.shape[:2]
    x0, y0 = math.floor(x - 0.5), math.floor(y - 0.5)
    value = np.zeros(3)
    for i, j in itertools.product((0, 1), (0, 1)):
        weight = (1 - abs(x - 0.5 - x0 - i)) * (1 - abs(y - 0.5 - y0 - j))
        value += weight * frame[np.clip(y0 + j, 0, height - 1), np.clip(x0 + i, 0, width - 1)]
    return value


@pytest.mark.parametrize(
    ("box", "margin"),
    [
        ((80, 50, 40, 0), 0.0),
        ((80.4, 49.7, 40, 0), 0.0),
        ((80.4, 49.7, 30, 0), 0.2),
        ((70, 55, 60, 0.3), 0.0),
        ((70, 55, 61.7, -1.1), 0.1),
        ((5, 95, 50, 0.2), 0.1),  # over the edge
        ((-200, 400, 50, 0), 0.0),  # far beyond it
    ],
)
def test_crop_takes_each_pixel_from_its_place(box: tuple[float, ...], margin: float) -> None:
    y, x = np.mgrid[:100, :160]
    frame = np.stack([x + 40, 2 * y + 10, 120 + 50 * np.sin(x / 25) * np.cos(y / 20)], axis=2).astype(np.uint8)
    size = 40
    crop = fa.crop_face(frame, np.array(box, np.float64), size, margin)
    step = box[2] * (1 + 2 * margin) / size
    along, down = np.array([math.cos(box[3]), math.sin(box[3])]), np.array([-math.sin(box[3]), math.cos(box[3])])
    expected = np.zeros((size, size, 3))
    for v, u in itertools.product(range(size), range(size)):
        place = box[:2] + step * ((u + 0.5 - size / 2) * along + (v + 0.5 - size / 2) * down)
        expected[v, u] = bilinear(frame, *place)
    assert crop.dtype == np.uint8
    assert np.abs(crop - expected).mean() < 1
    assert np.abs(crop - expected).max() < 4


def test_crop_moves_by_less_than_a_pixel() -> None:
    frame = FRAME.copy()
    frame[:, 80:] = 255
    edge = [int(fa.crop_face(frame, np.array([80.0 + x, 50, 40, 0]), 40)[20, 19, 0]) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert edge[0] == 0
    assert edge[2] == pytest.approx(127.5, abs=3)
    assert edge[4] == 255
    assert all(b - a > 20 for a, b in itertools.pairwise(edge))


def test_a_large_face_is_averaged_not_thinned_out() -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[::2] = 255
    crop = fa.crop_face(stripes, np.array([200.0, 200, 360, 0]), 70)
    assert np.abs(crop.astype(float) - 127.5).max() < 8


def test_a_tilted_face_comes_out_level() -> None:
    left, right = (60, 40), (100, 60)  # eyes
    frame = FRAME.copy()
    for eye in (left, right):
        cv2.circle(frame, eye, 5, (255, 255, 255), -1)
    row = np.zeros((1, 15))
    row[0, :8] = 50, 20, 60, 70, *left, *right
    (box,) = detectors.yunet_boxes(row)
    np.testing.assert_allclose(box, (80, 55, 70, math.atan2(20, 40)))
    crop = fa.crop_face(frame, box, 70)
    left_eye, right_eye = (np.argwhere(half.max(axis=2) > 128).mean(axis=0) for half in (crop[:, :35], crop[:, 35:]))
    assert abs(left_eye[0] - right_eye[0]) < 1
    assert right_eye[1] + 35 - left_eye[1] == pytest.approx(math.hypot(20, 40), abs=1)
    assert detectors.yunet_boxes(np.zeros((0, 15))).shape == (0, 4)


def follow(
    rows: list[np.ndarray], scene: list[int] | None = None, fps: float = 30, every_track: bool = False
) -> tuple[fa.Faces, list[int]]:
    """`find_face` where frame i shows scene[i] and rows[i] are its faces; and the frames that were searched."""
    rng = np.random.default_rng(4)
    scenes = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    searched: list[int] = []
    frames = [
        cv2.resize(scenes[0 if scene is None else scene[i]], (160, 100), interpolation=cv2.INTER_NEAREST)
        for i in range(len(rows))
    ]
    for i, frame in enumerate(frames):
        frame[0, 0] = i, 0, 0  # so that the detector can tell

    def detect(frame: np.ndarray) -> np.ndarray:
        searched.append(int(frame[0, 0, 0]))
        return rows[searched[-1]]

    return fa.find_face(((i / fps, frame) for i, frame in enumerate(frames)), detect, every_track), searched


def kept(found: fa.Faces) -> list[int]:
    return np.flatnonzero(~np.isnan(found.boxes[:, 0])).tolist()


def test_a_moving_face_is_followed_with_few_searches() -> None:
    rows = [boxes((40 + i, 50, 30 + 0.1 * i, 0)) for i in range(60)]
    found, searched = follow(rows)
    assert searched == list(range(0, 60, 3))
    assert kept(found) == list(range(60))
    assert (found.faces_at_once, found.cuts) == (1, 0)
    np.testing.assert_allclose(found.boxes[:57], np.concatenate(rows[:57]), atol=0.5)
    np.testing.assert_allclose(found.times, np.arange(60) / 30)
    assert follow(rows[:20], fps=8)[1] == list(range(20))


def test_only_the_frames_around_the_face_are_kept() -> None:
    face, nothing = boxes((80, 50, 30, 0)), boxes()
    found, _ = follow([nothing] * 30 + [face] * 30 + [nothing] * 9 + [face] * 3 + [nothing] * 30)
    assert kept(found) == list(range(30, 72))  # nine frames are bridged
    assert np.ptp(found.boxes[30:72], axis=0).max() < 1e-9
    found, _ = follow([nothing] * 60)
    assert kept(found) == []
    assert found.faces_at_once == 0


def test_a_cut_ends_the_track_and_is_searched() -> None:
    face = boxes((80, 50, 30, 0))
    found, searched = follow([face] * 40 + [face] * 50, [0] * 40 + [1] * 50)
    assert any(40 <= frame < 43 for frame in searched)
    assert kept(found) == list(range(40, 90))
    assert found.cuts == 1
    found, _ = follow([face] * 50 + [boxes()] * 40, [0] * 50 + [1] * 40)
    assert kept(found) == list(range(50))


def test_each_frame_has_the_best_track_that_knows_it() -> None:
    face, other, nothing = (80, 50, 30, 0), (30, 30, 20, 0), boxes()
    rows = [boxes(other)] * 30 + [boxes(other, face)] * 30 + [boxes(face)] * 40 + [nothing] * 30 + [boxes(face)] * 30
    scene = [0] * 130 + [1] * 30
    one, _ = follow(rows, scene)
    best = list(range(30, 102))  # to the next search
    assert kept(one) == best and one.track[best].tolist() == [0] * 72 and (np.delete(one.track, best) == -1).all()
    every, _ = follow(rows, scene, every_track=True)
    assert every.track.tolist() == [2] * 30 + [0] * 72 + [-1] * 28 + [1] * 30
    assert np.isnan(every.boxes[:, 0]).tolist() == (every.track < 0).tolist()
    np.testing.assert_array_equal(every.boxes[best], one.boxes[best])
    np.testing.assert_allclose(every.boxes[:30], np.tile(other, (30, 1)))  # of the lesser face, while it is alone
    assert (every.faces_at_once, every.cuts) == (one.faces_at_once, one.cuts) == (2, 1)


def test_faces_seen_at_once() -> None:
    large, small = (80, 50, 40, 0), (20, 20, 15, 0)
    found, _ = follow([boxes(small, large)] * 30)
    assert found.faces_at_once == 2
    np.testing.assert_allclose(found.boxes, np.tile(large, (30, 1)))
    none = fa.find_face(iter(()), lambda frame: boxes())
    assert (len(none.times), len(none.boxes), none.faces_at_once, none.cuts) == (0, 0, 0, 0)


def test_drawn_faces_are_found_and_framed() -> None:
    detect = detectors.make_detector()
    for person, emotion in ((0, 0), (1, 2), (3, 4)):  # not all drawings are found
        image = next(mf.frames(mf.apex_script(0, person, emotion)))[:, :, ::-1].copy()
        (box,) = detect(image)
        assert np.abs(box[:2] - 112).max() < 25
        assert 100 < box[2] < 224
        large = cv2.copyMakeBorder(cv2.resize(image, (672, 672)), 100, 300, 500, 200, cv2.BORDER_REPLICATE)
        (again,) = detect(large)
        np.testing.assert_allclose((again[:2] - (500, 100)) / 3, box[:2], atol=6)
        assert again[2] / 3 == pytest.approx(box[2], rel=0.15)
    assert len(detect(FRAME)) == 0


def test_yunet_by_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.onnx").write_bytes(toy_yunet(0.3))
    detect = detectors.make_detector(tmp_path / "toy.onnx")
    for width, height in ((128, 96), (130, 90), (64, 64)):
        frame = np.zeros((height, width, 3), np.uint8)
        assert len(detect(frame)) == 0
        frame[40:48, 32:40] = 255
        np.testing.assert_allclose(detect(frame), [(36, 44, 32, 0.3)], atol=1e-3)
    wide = np.zeros((200, 1920, 3), np.uint8)  # four times too large
    wide[64:96, 320:352], wide[64:96, 1600:1632] = 153, 255  # the surer one is not put first
    np.testing.assert_allclose(detect(wide), [(336, 80, 128, 0.3), (1616, 80, 128, 0.3)], atol=1e-3)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, content in (("a.onnx", b"nonsense"), ("b.onnx", b""), ("c.txt", b"x"), ("gone.onnx", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a YuNet model"):
            detectors.make_detector(tmp_path / name)
    assert capfd.readouterr() == ("", "")
