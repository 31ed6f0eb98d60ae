"""A live view: the newest frame only, what is said of it against all frames in a list, the page, and how it ends."""

import errno
import http.client
import io
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dfer.cli import UserError
from dfer.lists.annotations import EMOTIONS
from dfer.predict import live as lv
from dfer.predict.live_page import LivePage
from dfer.predict.overlay import SeenFace, live_picture
from dfer.predict.predictor import Duration, Predictor
from dfer.report.figures import ACCENT
from dfer.report.lanes import Lanes
from dfer.video import camera as cam
from dfer.video.camera import Camera, LiveFrame
from dfer.video.decode import decode
from scripts import predict as pr
from tests.test_predict import by_hand, load_model, make_videos, moving, rows, save_run

FPS = 25.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def pictures(count: int) -> list[np.ndarray]:
    return [np.full((32, 48, 3), 20 + i, np.uint8) for i in range(count)]


# ---- The camera


def scripted(
    monkeypatch: pytest.MonkeyPatch, count: int, error: Exception | None = None
) -> tuple[threading.Event, threading.Event]:
    """Have cameras give one frame, and the others at once, when the second event is set, which the first one tells."""
    given, go = threading.Event(), threading.Event()

    def decode_all(self: Camera) -> Iterator[LiveFrame]:
        for i, pixels in enumerate(pictures(count)):
            if i == 1:
                assert go.wait(60)
            yield LiveFrame(i / FPS, 0.0, pixels)
        given.set()
        if error is not None:
            raise error

    monkeypatch.setattr(Camera, "_decode", decode_all)
    return given, go


def test_frames_that_come_meanwhile_are_dropped_and_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given, go = scripted(monkeypatch, 9)
    with Camera("0", recording=tmp_path / "a.mp4") as camera:
        frames = camera.frames()
        first = next(frames)
        go.set()
        assert given.wait(60)  # while the first one is looked at
        rest = list(frames)
    assert [f.time for f in (first, *rest)] == [0, 8 / FPS] and rest[0].pixels[0, 0, 0] == 28
    assert (camera.came, camera.taken, camera.lost) == (9, 2, None)
    found = list(decode(tmp_path / "a.mp4"))
    np.testing.assert_allclose([time for time, _ in found], np.arange(9) / FPS, atol=1e-4)
    np.testing.assert_allclose([np.asarray(image).mean() for _, image in found], 20 + np.arange(9), atol=3)


def test_a_camera_that_is_unplugged_leaves_a_whole_recording(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, go = scripted(monkeypatch, 31, OSError(errno.ENODEV, "No such device"))
    go.set()
    flags = ("--checkpoint", str(run), "--no-crop", "--device", "cpu", "--annotate", "none")
    assert pr.main(["--camera", *flags, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "predict: camera 0: lost after 1.2 s (No such device): it was unplugged, or does not work\n"
    )
    (recording,) = (tmp_path / "recordings").iterdir()
    assert len(rows(tmp_path / f"{recording.stem}.csv")) == 31


@pytest.mark.parametrize(
    ("source", "number", "line"),
    [
        ("0", errno.ENOENT, "no camera 0 (here are 2, 10): give another number, a stream's URL or a video file"),
        ("0", errno.ENODEV, "no camera 0 (here are 2, 10): give another number, a stream's URL or a video file"),
        ("2", errno.EBUSY, "camera 2: another program uses it: close that one"),
        ("2", errno.EACCES, "camera 2: this user may not use it, who is not in the group `video`"),
        ("2", errno.ENOTTY, "camera 2: Inappropriate ioctl for device"),
        ("rtsp://host/a", errno.ECONNREFUSED, "rtsp://host/a: Connection refused"),
    ],
)
def test_why_there_is_no_camera_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, number: int, line: str
) -> None:
    for name in ("video10", "video2", "videos", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(cam, "DEVICES", tmp_path)
    opened = []

    open_file = cam.av.open

    def refuse(place: str, mode: str = "r", **options: object) -> object:
        if mode == "w":
            return open_file(place, mode, **options)
        opened.append((place, options["format"]))
        raise OSError(number, os.strerror(number), place)

    monkeypatch.setattr(cam.av, "open", refuse)
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"), Camera(source, recording=tmp_path / "a.mp4") as camera:
        next(camera.frames())
    assert opened == [(str(tmp_path / f"video{source}"), "v4l2") if source.isdecimal() else (source, None)]
    assert not (tmp_path / "a.mp4").exists()
    (tmp_path / "video10").unlink()
    (tmp_path / "video2").unlink()
    assert "(this machine has none)" in cam.refusal("0", OSError(errno.ENOENT, ""))


def test_a_camera_that_gives_nothing_or_cannot_be_recorded_is_one_line(
    videos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorded = Camera(str(videos / "none.mp4"), recording=tmp_path / "gone" / "a.mp4")
    with pytest.raises(UserError, match=r"gone/a\.mp4: cannot be written \(no such file or folder\)$"), recorded:
        list(recorded.frames())
    scripted(monkeypatch, 0)
    with pytest.raises(UserError, match=r"^camera 3: no frames came from it$"), Camera("3") as camera:
        list(camera.frames())
    assert not list(tmp_path.iterdir())


def test_a_file_comes_at_its_own_rate_and_no_longer_than_asked(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only while the camera waits."""
    now = 100.0

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            now += timeout
            return False

    camera = Camera(str(videos / "one.mp4"), seconds=0.5)
    monkeypatch.setattr(cam, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(camera, "_stopped", Clock())
    shown = list(camera._decode())
    assert len(shown) == 13 and camera.fps == FPS  # to 0.48 s, and not to 0.52
    np.testing.assert_allclose([frame.time for frame in shown], np.arange(13) / FPS, atol=1e-4)
    np.testing.assert_allclose([frame.arrived for frame in shown], 100 + np.arange(13) / FPS, atol=1e-4)
    assert shown[0].pixels.shape == (256, 320, 3)


# ---- What is said of a frame


def predictor_of(run: Path, **options: object) -> Predictor:
    given = {
        "detect": None,
        "margin": 0.1,
        "window": Duration(0.56, True),
        "stride": None,
        "fps": 25.0,
        "faces": "all",
    } | options
    return Predictor([load_model(run)], **given)


def test_a_face_is_said_what_a_list_of_its_window_s_frames_is(run: Path) -> None:
    """With frames left out, as where the machine is slow; the face drifts, and its box is known for certain."""
    frames = moving(0, 40)
    kept = [i for i in range(40) if i % 7 not in (3, 4)]
    # The box of a face that is found for the first time is the detection itself.
    predictor = predictor_of(run, detect=lambda frame: np.array([[150.0, 128.0, 200.0, 0.0]]))
    live = lv.LivePredictor(predictor, FPS)
    before, changes, boxes = None, [], np.tile([150.0, 128.0, 200.0, 0.0], (40, 1))
    for i in kept:
        (face,) = live.see(i / FPS, frames[i])
        assert face.number == 1 and face.box.tolist() == pytest.approx([150, 128, 240, 0])
        if face.probabilities is not None and (before is None or (face.probabilities != before).any()):
            changes.append(i)
            before = face.probabilities
            if i not in (7, 20, 34):
                continue  # by hand it takes longer
            inside = [j for j in kept if i - 14 < j <= i]  # 0.56 s are 14 frames
            picked = [frames[j] for j in inside]
            want = by_hand(load_model(run), picked, boxes, len(picked), 1)  # the same for each frame
            np.testing.assert_allclose(np.broadcast_to(face.probabilities, want.shape), want, atol=1e-4)
        assert (face.probabilities is None) == (i < 7)  # half a window
    assert changes == [7, 12, 16, 20, 26, 30, 34]  # a quarter of a window, 3.5 frames, or the next that there is
    with pytest.raises(UserError, match="more than the window's"):
        lv.LivePredictor(predictor_of(run, stride=Duration(20, False)), FPS)


@pytest.mark.parametrize(
    ("window", "every", "first"),
    [(1, 1, 0), (2, 1, 1), (3, 1, 2), (1, 3, 0), (2, 3, 3), (6, 8, 8)],  # each frame is looked at, or few of them
)
def test_a_window_of_few_frames_has_numbers(
    window: int, every: int, first: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = lv.LivePredictor(predictor_of(run, window=Duration(window, False)), FPS)
    monkeypatch.setattr(lv, "_predict", lambda predictor, pictures: np.full(7, 1 / 7))
    times = [i for i in range(0, 20, every) if live.see(i / FPS, pictures(1)[0])[0].probabilities is not None]
    assert times == list(range(first, 20, every))


def test_what_is_done_once_is_done_before_a_frame_comes(run: Path) -> None:
    """By the detector and by each model; neither remembers it."""
    seen: list[tuple[int, ...]] = []
    predictor = predictor_of(run, detect=lambda frame: seen.append(frame.shape) or np.empty((0, 4)))
    (model,), window = predictor.models, pictures(3)
    before = lv._predict(predictor, window)
    passes = model._net.register_forward_hook(lambda *_: seen.append(()))
    lv.warm_up(predictor)
    assert seen == [(lv.CROP_SIZE, lv.CROP_SIZE, 3), ()]
    passes.remove()
    np.testing.assert_array_equal(lv._predict(predictor, window), before)


def test_a_camera_that_is_stopped_before_its_first_frame_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, go = scripted(monkeypatch, 1)
    go.set()
    with Camera("0") as camera:
        assert given.wait(60)
        camera.stop()
        watched = lv.watch(camera, predictor_of(run), print, print, print)
    assert str(watched) == "0.0 s: it ended before a picture was shown" and watched.came == 1


def watch_boxes(run: Path, rows_of_boxes: list[list[tuple[float, ...]]], **options: object) -> list[list[SeenFace]]:
    """What is seen where the detector finds these boxes, one search after the other; a frame each."""
    found = iter(rows_of_boxes)
    detect = lambda _: np.array(next(found), np.float64).reshape(-1, 4)  # noqa: E731
    live = lv.LivePredictor(predictor_of(run, detect=detect, **{"window": Duration(0.4, True)} | options), FPS)
    frame = np.full((200, 400, 3), 90, np.uint8)
    frame[::8] = 160
    return [live.see(0.1 * i, frame) for i in range(len(rows_of_boxes))]


NEVER = Duration(1e4, True)  # is half of it seen
LEFT, RIGHT = (100.0, 100.0, 80.0, 0.0), (300.0, 100.0, 60.0, 0.0)


def test_faces_keep_their_numbers_and_are_predicted_on_one_per_frame(run: Path) -> None:
    both, left, none = [LEFT, RIGHT], [LEFT], []
    seen = watch_boxes(run, [left, both, both, both, both, left, left, both, none, none, none, both])
    assert [[face.number for face in faces] for faces in seen] == [
        *([1], [1, 2], [1, 2], [1, 2], [1, 2], [1, 2], [1], [1, 2], [1, 2], [], [], [1, 2])
    ]
    known = [[face.probabilities is not None for face in faces] for faces in seen[:5]]
    assert known == [[False], [False, False], [True, False], [True, True], [True, True]]
    changed = [
        sum(
            now.probabilities is not before.probabilities
            for now in faces
            for before in earlier
            if now.number == before.number
        )
        for earlier, faces in itertools.pairwise(seen)
    ]
    assert max(changed) == 1 and sum(changed) > 5  # each is due in each frame


def test_a_face_that_comes_back_has_no_new_numbers_until_half_a_window_of_it_was_seen(run: Path) -> None:
    seen = watch_boxes(run, [*[[LEFT]] * 4, [], [], [], *[[LEFT]] * 4])
    assert seen[5:7] == [[], []]
    before, *after = (faces[0].probabilities for faces in (seen[4], *seen[7:]))
    assert before is not None and [now is before for now in after] == [True, True, False, False]


def test_the_main_face_is_the_largest_and_most_central_one(run: Path) -> None:
    seen = watch_boxes(run, [[LEFT, RIGHT]] * 2, faces="main")
    assert [[face.number for face in faces] for faces in seen] == [[1], [1]]
    seen = watch_boxes(run, [[LEFT, (210.0, 100.0, 76.0, 0.0)]] * 2, faces="main")
    assert [[face.number for face in faces] for faces in seen] == [[2], [2]]


def test_a_box_follows_a_face_and_does_not_shake(run: Path) -> None:
    shaking = [[(100.0 + 4 * (i % 2), 100.0, 80.0, 0.0)] for i in range(30)]
    x = np.array([faces[0].box[0] for faces in watch_boxes(run, shaking, window=NEVER)])
    assert np.ptp(x[10:]) < 2 and abs(x[10:].mean() - 102) < 0.3
    walking = [[(100.0 + 3 * i, 100.0, 80.0, 0.0)] for i in range(30)]
    x = np.array([faces[0].box[0] for faces in watch_boxes(run, walking, window=NEVER)])
    behind = 100 + 3 * np.arange(30) - x
    assert behind.min() >= 0 and behind.max() < 7  # by 0.2 s at 30 px/s


# ---- The picture and the page


def test_the_picture_has_each_face_its_numbers_and_the_small_print() -> None:
    accent = [int(ACCENT[i : i + 2], 16) for i in (1, 3, 5)]
    p = np.array([[0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05], [0.0, 0.0, 0.25, 0.0, 0.75, 0.0, 0.0]])
    faces = [SeenFace(1, np.array([150.0, 120, 100, 0]), p[0]), SeenFace(4, np.array([480.0, 120, 100, 0]), p[1])]
    image = np.asarray(live_picture(np.zeros((360, 640, 3), np.uint8), faces, "small print"))
    lanes = Lanes(640, 1.0)
    assert image.shape == (360 + lanes.height, 640, 3)
    orange = (image == accent).all(2)
    for x in (100, 200, 430, 530):  # the squares' sides
        assert orange[100:160, x - 1 : x + 2].any(1).all()
    width = (640 - lanes.extent[0]) // 2
    for place, (emotion, share) in enumerate([(0, 0.7), (4, 0.75)]):
        left = lanes.extent[0] + place * width
        row = orange[360 + lanes.top + emotion * lanes.lane + lanes.lane // 2, left : left + width]
        assert row.sum() == pytest.approx(share * (width - lanes.px(60)), abs=1)
    plain = live_picture(np.zeros((360, 640, 3), np.uint8), faces, "")
    assert (image != np.asarray(plain))[-lanes.px(36) :].any() and not (image != np.asarray(plain))[:500].any()
    nobody = np.asarray(live_picture(np.zeros((360, 640, 3), np.uint8), [], ""))
    assert not (nobody == accent).all(2).any() and nobody[:40, :100].any()  # "no face"
    assert live_picture(np.zeros((1080, 1920, 3), np.uint8), faces, "").width == 960
    just_come = live_picture(np.zeros((100, 60, 3), np.uint8), [SeenFace(1, None, None)], "")
    assert just_come.width == 480


def test_the_page_shows_the_newest_picture_to_who_knows_its_address() -> None:
    def ask(where: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(*page.url.split("/")[2].split(":"), timeout=10)
        connection.request("GET", where)
        return connection.getresponse()

    with LivePage("camera 0", ["The model is <drawn>."]) as page:
        place = f"/{page.url.split('/')[3]}/"
        html = ask(place).read().decode()
        assert "<h1>camera 0</h1>" in html and "The model is &lt;drawn&gt;." in html and 'src="stream"' in html
        assert [ask(wrong).status for wrong in ("/", "/stream", "/x/stream", f"{place}x")] == [404] * 4
        page.show(b"first")
        stream = ask(f"{place}stream")
        assert stream.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=picture"
        head = b"Content-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n--picture\r\n"
        part = b"--picture\r\n" + head % (5, b"first")
        assert stream.read(len(part)) == part
        page.show(b"second")
        part = head % (6, b"second")
        assert stream.read(len(part)) == part
        with LivePage("another", []) as other:
            assert other.url.split("/")[2] != page.url.split("/")[2]  # on another port
    assert stream.read() == b""  # it ended with the page


# ---- The command


def test_a_file_in_place_of_a_camera_is_shown_recorded_and_predicted_on(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[bytes] = []
    monkeypatch.setattr(LivePage, "show", lambda self, jpeg: shown.append(jpeg))
    flags = ("--checkpoint", str(run), "--window", "12", "--annotate", "none", "--device", "cpu", "--no-crop")
    assert pr.main(["--camera", str(videos / "one.mp4"), *flags, "--out", str(tmp_path)]) == 0
    said, err = capsys.readouterr()
    lines = said.splitlines()
    assert not err and "was not recorded" in lines[0]
    assert re.fullmatch(r".*one\.mp4: http://127\.0\.0\.1:\d+/[\w-]{12}/ shows it; numbers are of the last 0\.48 s, "
                        r"new every 0\.12 s; Ctrl-C ends it", lines[1])  # fmt: skip
    counted = re.search(
        r"1\.2 s: of 31 frames (\d+) were shown, (\d+) dropped, as .* ms typically, \d+ at most", lines[2]
    )
    assert int(counted[1]) == len(shown) and int(counted[1]) + int(counted[2]) == 31
    assert Image.open(io.BytesIO(shown[-1])).size == (480, 384 + Lanes(480, 1.0).height)
    (recording,) = (tmp_path / "recordings").iterdir()
    assert len(rows(tmp_path / f"{recording.stem}.csv")) == len(list(decode(recording))) == 31


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing_half_written(
    kind: signal.Signals, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shown = threading.Semaphore(0)

    def decode_two(self: Camera) -> Iterator[LiveFrame]:
        for i, pixels in enumerate(pictures(2)):
            yield LiveFrame(i / FPS, 0.0, pixels)
            assert shown.acquire(timeout=60)
        os.kill(os.getpid(), kind)
        assert self._stopped.wait(60)

    monkeypatch.setattr(Camera, "_decode", decode_two)
    monkeypatch.setattr(LivePage, "show", lambda self, jpeg: shown.release())
    before = signal.getsignal(kind)
    flags = ("--checkpoint", str(run), "--annotate", "none", "--device", "cpu", "--no-crop")
    assert pr.main(["--camera", *flags, "--out", str(tmp_path)]) == 0
    assert signal.getsignal(kind) is before and not capsys.readouterr().err
    (recording,) = (tmp_path / "recordings").iterdir()
    assert len(rows(tmp_path / f"{recording.stem}.csv")) == len(list(decode(recording))) == 2


def test_nothing_is_written_that_was_not_asked_for(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--checkpoint", str(run), "--no-crop", "--device", "cpu", "--seconds", "0.2")
    assert pr.main(["--camera", str(videos / "one.mp4"), *flags]) == 0
    assert not list(tmp_path.iterdir()) and "0.2 s: of 5 frames" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        pr.main([str(videos / "one.mp4"), *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "predict: no --out: name a folder for the results\n"
    with pytest.raises(SystemExit) as stop:
        pr.main([str(videos / "one.mp4"), *flags, "--out", "out"])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == (
        "predict: --seconds: is how long a --camera is shown, and there is none; leave it out\n"
    )


def test_a_face_in_words() -> None:
    p = np.array([0.9, 0.0, 0.06, 0.0, 0.04, 0.0, 0.0])
    shares = ", ".join(f"{name} {100 * x:.0f}" for name, x in zip(EMOTIONS, p, strict=True))
    assert lv.in_words(SeenFace(2, None, p)) == f"face 2: Happy ({shares} %)"
    assert lv.in_words(SeenFace(3, None, None)) == "face 3: just come"
