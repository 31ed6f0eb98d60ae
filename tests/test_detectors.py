"""Detectors: where YuNet's weights come from, what Haar says when it takes their place, and faces of known places."""

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dfer import cli
from dfer.cli import UserError
from dfer.video import detectors
from dfer.video.decode import decode
from dfer.video.detectors import find_weights, make_detector
from dfer.video.faces import Faces, FaceTrack, find_face
from tests.conftest import ROOT, YUNET
from tests.drawn_scenes import Actor, play, room

REAL = ROOT.parent / "shared" / "videos"
needs_yunet = pytest.mark.skipif(not YUNET.is_file(), reason="YuNet's weights are not beside this checkout")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A server in the place of the authors', which answers with the last of a list, or 404; a cache of its own."""
    contents: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if contents else 404)
            self.end_headers()
            self.wfile.write(contents[-1] if contents else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", detectors.VARIABLE):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(detectors, "YUNET_URL", f"http://127.0.0.1:{server.server_address[1]}/yunet.onnx")
        monkeypatch.setattr(detectors, "YUNET_SHA256", hashlib.sha256(b"weights").hexdigest())
        cli.say_once.cache_clear()
        yield contents
        server.shutdown()
        thread.join()


def test_weights_are_fetched_once(served: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served.append(b"weights")
    cached = tmp_path / "cache" / "dfer" / "yunet_n_640_640.onnx"
    assert find_weights(None) == cached and cached.read_bytes() == b"weights"
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: fetching YuNet's weights (0.3 MB, Apache-2.0), once, from http" in line and str(cached) in line
    served.clear()  # now there is no server to ask
    assert find_weights(None) == find_weights(detectors.YUNET) == cached
    served.append(b"weights")
    cached.write_bytes(b"weight")  # damaged: fetched again
    assert find_weights(None) == cached and cached.read_bytes() == b"weights"
    assert capsys.readouterr().err.count("\n") <= 1
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


@pytest.mark.parametrize("content", [None, b"<html>Log in to this network</html>"])
def test_haar_says_that_it_takes_the_place(
    served: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    served += [content] if content else []
    why = "another file came than expected, of 35 bytes" if content else "HTTP Error 404: Not Found"
    assert find_weights(None) is None
    first, line = capsys.readouterr().err.splitlines()
    assert first.startswith("note: fetching YuNet's weights")
    for part in (why, "Haar", "frontal ones only", detectors.YUNET_URL, str(tmp_path / "cache"), "--detector"):
        assert part in line
    assert not (tmp_path / "cache").exists()  # nothing is left of what was not wanted
    with pytest.raises(UserError, match=r"cannot be fetched.*put http.* there as"):
        find_weights(detectors.YUNET)  # who asks for it gets nothing else
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written(
    served: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.append(b"weights")
    (tmp_path / "cache").write_bytes(b"a file")
    assert find_weights(None) is None
    assert "cannot be fetched" in capsys.readouterr().err


def test_what_is_named_is_taken(
    served: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = Path("mine.onnx"), Path("other.onnx")
    assert find_weights(mine) == mine and find_weights(detectors.HAAR) is None
    monkeypatch.setenv(detectors.VARIABLE, str(other))
    assert find_weights(None) == other and find_weights(mine) == mine and find_weights(detectors.HAAR) is None
    monkeypatch.setenv(detectors.VARIABLE, "haar")
    assert find_weights(None) is None
    assert capsys.readouterr().err == ""


# ---- Drawn people whose places are known


def follow(frames: Sequence[np.ndarray], fps: float = 25) -> Faces:
    return find_face(((i / fps, frame) for i, frame in enumerate(frames)), make_detector(YUNET), every_track=True)


def assert_followed(track: FaceTrack, actor: Actor, height: int, count: int) -> None:
    """In all frames, within a fifth of the drawing's side; a drawing's face is some 0.75 of that."""
    assert (track.first, track.end) == (0, count)
    for number, box in enumerate(track.boxes):
        left, top, side = actor.square(number / (count - 1), height)
        assert np.hypot(box[0] - left - side / 2, box[1] - top - side / 2) < 0.2 * side
        assert 0.6 * side < box[2] < 1.1 * side


@needs_yunet
@pytest.mark.parametrize("width", [320, 640, 1280, 1920])
def test_every_person_of_a_scene_is_followed(width: int) -> None:
    height, count = width * 9 // 16, 26 if width < 1000 else 9
    actors = [
        Actor(0, (0.3, 0.45), (0.45, 0.5), (0.5, 0.5)),
        Actor(4, (1.5, 0.4), (1.35, 0.4), (0.4, 0.4)),
        Actor(2, (0.9, 0.6), (0.9, 0.55), (0.3, 0.35)),
    ]
    faces = follow(list(play(room(7, height, width), actors, count)), count)
    assert faces.cuts == 0 and faces.faces_at_once == len(faces.tracks) == 3
    for track in faces.tracks:
        nearest = min(actors, key=lambda actor: abs(actor.start[0] - track.boxes[0, 0] / height))
        actors.remove(nearest)
        assert_followed(track, nearest, height, count)
    assert actors == [] and (faces.track == 0).all()


@needs_yunet
def test_another_person_in_the_same_place_is_another_face() -> None:
    one, other = (list(play(room(1), [Actor(who, (0.9, 0.5), (1.0, 0.5), (0.7, 0.7))], 30)) for who in (0, 1))
    faces = follow(one + other)
    assert [(track.first, track.end) for track in sorted(faces.tracks, key=lambda t: t.first)] == [(0, 30), (30, 60)]
    assert faces.cuts == 1


@needs_yunet
def test_people_who_pass_each_other_keep_their_tracks() -> None:
    """The one behind may be lost for a while; nobody takes over another's track."""
    actors = [Actor(3, (0.25, 0.5), (1.5, 0.5), (0.4, 0.4)), Actor(5, (1.5, 0.52), (0.25, 0.52), (0.45, 0.45))]
    faces = follow(list(play(room(8, 180, 320), actors, 50)))
    for track in faces.tracks:
        places = [[actor.square(i / 49, 180) for i in range(track.first, track.end)] for actor in actors]
        away = [np.abs(track.boxes[:, 0] - [left + side / 2 for left, _, side in place]) for place in places]
        assert min(a.max() for a in away) < 25
    assert sum(len(track.boxes) == 50 for track in faces.tracks) >= 1  # who is in front


@needs_yunet
@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
def test_yunet_levels_tilted_eyes_if_it_is_to() -> None:
    frame = np.asarray(next(image for _, image in decode(REAL / "single_face.mp4")))
    tilts = []
    for degrees in (-20, 0, 15):
        turn = cv2.getRotationMatrix2D((260, 180), -degrees, 1)
        turned = cv2.warpAffine(frame, turn, frame.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        (box,) = make_detector(YUNET)(turned)
        tilts.append(np.degrees(box[3]))
        np.testing.assert_array_equal(make_detector(YUNET, level=False)(turned), [[*box[:3], 0]])
    assert np.diff(tilts) == pytest.approx([20, 15], abs=5)


@needs_yunet
def test_the_file_that_is_fetched_is_the_one_that_tests_use() -> None:
    assert hashlib.sha256(YUNET.read_bytes()).hexdigest() == detectors.YUNET_SHA256
    (frame,) = play(room(3), [Actor(0, (0.9, 0.5), (0.9, 0.5), (0.8, 0.8))], 1)
    for height in (90, 137, 181, 270, 400):  # the file is called 640, and takes any size
        (box,) = make_detector(YUNET)(cv2.resize(frame, (height * 16 // 9, height)))
        assert abs(box[0] / height - 0.9) < 0.08
    assert os.environ[detectors.VARIABLE] == "haar"  # no test depends on what lies in a user's cache
