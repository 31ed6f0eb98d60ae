"""The demo: what is behind the page without Gradio, and the page itself in a browser where there are both."""

import base64
import contextlib
import fcntl
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipes import torch_stages
from dfer.cli import Parser
from dfer.lists.annotations import DRAWN, EMOTIONS
from dfer.predict import own
from dfer.predict.maps import surest_window
from dfer.predict.options import add_arguments, build_predictor
from dfer.predict.predictor import Predictor
from dfer.predict.timeline import place_windows
from dfer.run.checkpoint import load_checkpoint, save_checkpoint
from dfer.video.decode import decode
from dfer.video.faces import crop_face
from scripts import demo
from scripts import predict as pr
from tests.conftest import ROOT
from tests.oracle import resize
from tests.test_predict import make_videos, moving, probabilities, save_frames, save_run
from tests.test_prepare_videos import REAL


class Browser:
    """Headless Chromium, by the DevTools protocol over a pipe: JSON, each message ended by a zero byte."""

    def __init__(self, program: str, profile: Path, camera: Path | None = None):
        ends = (*os.pipe(), *os.pipe())
        to_read, self._write, self._read, to_write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
        for end in ends:  # which may be 3 and 4, the browser's
            os.close(end)
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={profile}", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"]
        command += ["--disable-background-networking", "--disable-component-update", "about:blank"]
        if camera:  # a file that it takes for a webcam
            command[1:1] = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
            command[1:1] = [f"--use-file-for-fake-video-capture={camera}"]
        redirect = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._count, self.requests = b"", 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        session = getattr(self, "_session", {})
        message = {"id": self._count, "method": method, "params": parameters} | session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 120
        while (answer := self._message(until)).get("id") != self._count:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 180) -> Any:
        """What the expression gives, once that is true."""
        until = time.monotonic() + seconds
        while not (found := self.evaluate(script)):
            assert time.monotonic() < until, (script, self.evaluate("document.body.innerText"))
            time.sleep(0.3)
        return found

    def resize(self, width: int, height: int = 900) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def upload(self, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector='input[type="file"]')["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        """All of the page."""
        time.sleep(1)  # for what moves
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError, TimeoutError):
            self.call("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def predictor_of(run: Path, *flags: object) -> Predictor:
    parser = Parser("demo", None)
    add_arguments(parser)
    given = ["--checkpoint", run, "--device", "cpu", "--window", 12, *flags]
    args = parser.parse_args([str(flag) for flag in given])
    return build_predictor(args, torch_stages.resize)


LIMITS = demo.Limits(10, 20)


# ---- What is behind the page


def test_the_page_shows_what_predict_writes(run: Path, videos: Path, tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    video = videos / "sub" / "two.mp4"
    page = tmp_path / "page"
    result = demo.analyse(video, predictor_of(run), LIMITS, page, lambda *shown: said.append(shown))
    assert pr.main([str(video), "--checkpoint", str(run), "--device", "cpu", "--window", "12",
                    "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    assert [path.name for path in result.files] == ["two.mp4", "two.png", "two.csv", "two.json"]
    assert result.video == page / "two.mp4"
    for path in result.files[1:]:
        assert path.parent == page and path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert len(list(decode(result.video))) == 66
    mean = np.nanmean(probabilities(page / "two.csv"), axis=0)
    np.testing.assert_allclose([result.probabilities[e] for e in EMOTIONS], mean, atol=2e-6)
    best = EMOTIONS[int(mean.argmax())]
    assert result.message == f"{best} {100 * mean.max():.0f} %, a face in 46 of 66 frames"
    for words in ("<b>two</b>", str(run), "step 7", "was not recorded", "For research"):
        assert words in result.about, result.about
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert {what for _, what in said} <= set(demo.PASSES) and said[0][1] == demo.PASSES[0]


@pytest.mark.parametrize("no_crop", [False, True])
def test_maps_are_of_the_frames_that_are_shown(
    run: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, no_crop: bool
) -> None:
    """Against all frames in a list, and the network called by hand."""
    video, predictor = videos / "sub" / "two.mp4", predictor_of(run, *(["--no-crop"] if no_crop else []))
    prediction = predictor.predict(video)
    drawn = {}

    def strip(clip, stride, layers):
        drawn.update(clip=clip, stride=stride, layers=layers)
        return real_strip(clip, stride, layers)

    real_strip = demo.strip
    monkeypatch.setattr(demo, "strip", strip)
    html = demo.emotion_maps(video, prediction, predictor)

    order = np.argsort(-np.nanmean(prediction.probabilities, axis=0))
    assert [k for k, _ in drawn["layers"]] == order[:2].tolist()
    surest, window = -1.0, None
    for first in range(len(prediction.times)):
        for end in (first + 12,):
            starts = [w for w in place_windows(prediction.track, 12, 3).tolist() if w == [first, end]]
            mean = prediction.probabilities[first:end, order[0]].mean()
            if starts and mean > surest:
                surest, window = mean, (first, end)
    assert surest_window(prediction, int(order[0])) == window
    frames = [window[0] + int((s + 0.5) * 12 / 4) for s in range(4)]
    images = [np.asarray(image) for _, image in decode(video)]
    crops = [images[i] if no_crop else crop_face(images[i], prediction.boxes[i], 224) for i in frames]
    model = predictor.models[0]
    small = [(resize(crop, 32) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225] for crop in crops]
    with torch.inference_mode():
        clip = torch.tensor(np.stack(small), dtype=torch.float32).permute(0, 3, 1, 2)[None]
        fine, _ = model._net.emotion_maps(clip)
    assert fine.shape[:3] == (1, 4, 7) and np.ptp(fine.numpy()) > 0.01
    np.testing.assert_allclose(drawn["clip"].maps, fine[0].numpy(), atol=1e-3)
    assert drawn["clip"].frames.shape == (4, 224, 224, 3)
    for shown, crop in zip(drawn["clip"].frames, crops, strict=True):
        wanted = np.asarray(Image.fromarray(crop).resize((224, 224)))
        assert np.abs(shown.astype(int) - wanted).max() <= 1
    assert drawn["stride"] == 224 // 32 * 16  # a cell is 16 px of the 32 that the model sees
    assert html.count("<figure>") == 4
    assert f"from {prediction.edges[window[0]]:.1f} to {prediction.edges[window[1]]:.1f} s" in html


def test_a_model_without_a_crf_has_no_maps(videos: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", network="mean-pool")
    result = demo.analyse(videos / "one.mp4", predictor_of(run), LIMITS, tmp_path / "out")
    assert result.maps == '<p class="caption">No emotion maps: mean-pool has no CRF.</p>'
    assert result.video.exists() and result.probabilities is not None


def test_limits_and_what_cannot_be_read_are_one_line(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, out = predictor_of(run), tmp_path / "out"
    with open(tmp_path / "large.mp4", "wb") as file:
        file.truncate(11 * 2**20)
    (tmp_path / "bad.mp4").write_bytes(b"nonsense" * 100)
    one = videos / "one.mp4"
    cases = [
        (tmp_path / "large.mp4", LIMITS, "The video has 11.0 MB, and no more than 10 MB are looked at here."),
        (one, demo.Limits(10, 0.5), "The video is 1.2 s long, and no more than 0.5 s are looked at here."),
        (tmp_path / "bad.mp4", LIMITS, "The video cannot be read: Invalid data found when processing input."),
        (tmp_path / "gone.mp4", LIMITS, "The video cannot be read: no such file or folder."),
    ]
    for path, limits, line in cases:
        with pytest.raises(ValueError) as error:
            demo.analyse(path, predictor, limits, out)
        assert str(error.value) == line
    for claim in (None, 0.1):  # by the header
        monkeypatch.setattr(demo, "claimed_seconds", lambda path, claim=claim: claim)
        with pytest.raises(ValueError, match=r"^The video is longer than the 0\.5 s that are looked at here\.$"):
            demo.analyse(one, predictor, demo.Limits(10, 0.5), out)
        assert demo.analyse(one, predictor, demo.Limits(10, 1.3), tmp_path / f"out {claim}").video.exists()
    assert not out.exists()


def test_without_a_face_there_is_a_message_and_nothing_else(run: Path, videos: Path, tmp_path: Path) -> None:
    result = demo.analyse(videos / "none.mp4", predictor_of(run), LIMITS, tmp_path / "out")
    assert result == demo.Result(f"No face is seen in any of the 9 frames: {demo.NO_FACE}.")
    assert not (tmp_path / "out").exists()


def test_examples_are_videos_that_browsers_play(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = predictor_of(run)
    frames = save_frames(tmp_path / "frames", [frame[:95, :97] for frame in moving(0, 3)])
    (tmp_path / "in" / "sub").mkdir(parents=True)
    shutil.copy(videos / "one.mp4", tmp_path / "in" / "sub" / "a.mkv")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    found = demo.make_examples([videos / "one.mp4", frames, tmp_path / "in"], predictor, tmp_path / "out")
    assert capsys.readouterr().err == f"demo: {tmp_path}/in/round: a link in a circle, not followed\n"
    assert found == [videos / "one.mp4", tmp_path / "out" / "frames.mp4", tmp_path / "out" / "sub" / "a.mp4"]
    assert [image.size for _, image in decode(found[1])] == [(96, 94)] * 3
    assert len(list(decode(found[2]))) == 31
    assert demo.make_examples([], predictor, tmp_path) == []
    (tmp_path / "bad.avi").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match=r"^--examples .*bad\.avi: Invalid data"):
        demo.make_examples([tmp_path / "bad.avi"], predictor, tmp_path / "out")


def test_without_a_checkpoint_the_newest_run_is_shown(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "LOGS", tmp_path)
    for age, name in enumerate(("newest", "older", "oldest")):
        shutil.copytree(run, tmp_path / name)
        os.utime(tmp_path / name / "checkpoints", (10_000 - age, 10_000 - age))
    (tmp_path / "no run").mkdir()
    assert own.own_checkpoint() == tmp_path / "newest"


def test_without_a_run_one_is_trained_on_drawn_faces(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, ...]] = []

    def start(file: Path, *words: str) -> None:
        begun.append((file.name, *words))
        if file.name == "train.py":
            shutil.copytree(run, tmp_path / "logs" / "made")

    monkeypatch.setattr(own, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(own, "start", start)
    assert own.own_checkpoint() == tmp_path / "logs" / "made"
    assert [words[0] for words in begun] == ["make_faces.py", "train.py"] and begun[1][1] == "debug"
    assert begun[1][3].startswith(begun[0][2])  # on what was drawn
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^make_faces.py ended with exit code 2; give a run of your own"):
        own.start(ROOT / "scripts" / "make_faces.py", "--size", "0")


def test_a_model_of_drawn_faces_says_so_above_the_page_and_in_each_result(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run")
    state = load_checkpoint(run) | {"faces": DRAWN}
    save_checkpoint(run / "checkpoints", state | {"step": 8})
    text = demo.about_models(predictor_of(run))
    assert "step 8: trained on drawn faces (make_faces): what it says of people means nothing" in text
    assert "guesses" not in text
    config = json.loads(state["config"]) | {"preset": "debug"}
    save_checkpoint(run / "checkpoints", state | {"step": 9, "config": json.dumps(config)})
    assert "guesses" in demo.about_models(predictor_of(run))


def test_examples_of_its_own_are_drawn_faces_that_the_detector_sees(run: Path, tmp_path: Path) -> None:
    predictor = predictor_of(run)
    videos = own.own_examples(tmp_path, predictor.detect)
    assert len(videos) == 3 and all(len(list(decode(video))) >= 24 for video in videos)
    assert (predictor.predict(videos[0]).track >= 0).mean() > 0.9
    assert own.own_examples(tmp_path, lambda _: np.zeros((0, 4))) == []


def test_without_gradio_a_line_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "as it was")  # and is put back
    assert demo.main(["--checkpoint", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: ") and line.endswith("make demo installs and starts it")


# ---- The page

MISSING = [
    what
    for what, there in (
        ("Gradio (make demo installs it into .venv-demo/)", importlib.util.find_spec("gradio")),
        ("Chromium", shutil.which("chromium")),
        ("the real clips beside this checkout", REAL.is_dir()),
    )
    if not there
]
# Every connection to another machine is told.
SERVER = """
import socket, sys

def hear(event, arguments):
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        if arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
            print("OUTSIDE", arguments[1], flush=True)

sys.addaudithook(hear)
from scripts import demo
demo.KEPT, demo.CHECKED = 60, 2
sys.exit(demo.main(sys.argv[1:]))
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with av.open(str(REAL / "single_face.mp4")) as source, av.open(str(tmp_path / "camera.mjpeg"), "w") as file:
        video = file.add_stream("mjpeg", rate=30, options={"qmin": "2", "qmax": "2"})
        video.width, video.height, video.pix_fmt = 640, 480, "yuvj420p"
        for number, frame in enumerate(source.decode(video=0)):
            small = frame.reformat(640, 480, "yuvj420p")
            small.time_base, small.pts = Fraction(1, 30), number
            file.mux(video.encode(small))
    browser = Browser("chromium", tmp_path / "profile", tmp_path / "camera.mjpeg")
    yield browser
    browser.close()


@pytest.fixture
def server(run: Path, videos: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """The page's address, its process, and the folder that holds its files."""
    (tmp_path / "files").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--checkpoint", str(run), "--window", "12", "--max-mb", "2"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--examples", str(videos / "one.mp4")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "files"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        found = re.match(r"http://\S+", line)
        assert found, line
        yield found[0], process, tmp_path / "files"
    finally:
        process.kill()
        process.communicate()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")
def test_the_page_in_a_browser(server: tuple[str, subprocess.Popen, Path], browser: Browser, tmp_path: Path) -> None:
    url, process, files = server
    message = "document.querySelector('#message')?.innerText.trim()"
    browser.resize(1280)
    browser.call("Page.navigate", url=url)
    browser.wait("document.querySelector('input[type=file]') !== null")
    browser.wait(f"{message} === 'Upload or record a video: it is looked at right away.'")

    browser.upload(REAL / "single_face.mp4")
    said = browser.wait(f"/ %/.test({message}) && {message}")
    assert re.fullmatch(r"\w+ \d+ %", said), said
    browser.wait("document.querySelectorAll('.strip img').length === 4")
    browser.wait("[...document.querySelectorAll('video')].some(video => video.readyState === 4)")
    shown = browser.evaluate("document.body.innerText")
    assert "was not recorded" in shown and "For research" in shown and str(process.args[4]) in shown
    names = json.dumps([*EMOTIONS, "single_face"])
    browser.wait(f"{names}.every(name => document.body.innerText.includes(name))")
    uploaded = (REAL / "single_face.mp4").read_bytes()
    assert uploaded not in [path.read_bytes() for path in files.rglob("*") if path.is_file()]
    for width in (1280, 390):
        browser.resize(width)
        browser.screenshot(tmp_path / f"{width}.png")
        with Image.open(tmp_path / f"{width}.png") as image:
            assert image.width == width and image.height > 900 and len(image.convert("RGB").getcolors(2**20)) > 5000
        assert browser.evaluate("document.documentElement.scrollWidth") <= width

    until = time.monotonic() + 180  # then the results are gone
    while any(name.startswith("single_face") for name in files_in(files)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not any(name.startswith(("single_face", "image")) for name in files_in(files)), files_in(files)

    browser.upload(REAL / "no_face.mp4")
    browser.wait(f"{message}.startsWith('No face is seen in any of the 95 frames: use a video')")
    assert not browser.evaluate("document.querySelectorAll('.strip img').length")
    (tmp_path / "large.mp4").write_bytes(bytes(2**21 + 1))
    browser.upload(tmp_path / "large.mp4")
    browser.wait("/exceed the maximum allowed size of 2(\\.0)? M/i.test(document.body.innerText)")
    browser.evaluate("document.querySelector('button.gallery-item').click()")
    browser.wait(f"/^\\w+ \\d+ %$/.test({message})")

    own = (url, "data:", "blob:")
    assert len(browser.requests) > 20 and not [request for request in browser.requests if not request.startswith(own)]
    blocked = "fetch('https://example.org/').then(() => 'loaded', () => 'blocked')"
    assert browser.evaluate(blocked) == "blocked" and browser.evaluate(f"fetch('{url}').then(() => 'loaded')")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "OUTSIDE" not in rest, rest
    assert files_in(files) == []


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")
def test_a_webcam_is_recorded_and_looked_at(
    server: tuple[str, subprocess.Popen, Path], browser: Browser, tmp_path: Path
) -> None:
    """Without a word from the microphone; what was recorded is gone when it was looked at."""
    url, _, files = server
    browser.resize(1280)
    browser.call("Page.navigate", url=url)
    button = "document.querySelector('#upload button[aria-label=\"{}\"]')"
    browser.wait(button.format("Capture from camera") + " !== null")
    browser.evaluate(
        "window.asked = []; const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices); "
        "navigator.mediaDevices.getUserMedia = wanted => { window.asked.push(wanted.audio); return ask(wanted); }; 1"
    )
    browser.evaluate(button.format("Capture from camera") + ".click()")
    browser.wait("/webcam/i.test(document.querySelector('#upload button')?.innerText)")
    browser.evaluate("document.querySelector('#upload button').click()")
    browser.wait("document.querySelector('#upload video')?.readyState >= 2")
    record = button.format("start recording")
    browser.wait(f"{record} !== null")
    browser.evaluate(f"{record}.click()")
    browser.wait(f"/stop/i.test({record}.innerText)")
    time.sleep(3)
    browser.evaluate(f"{record}.click()")
    browser.wait("/^\\w+ \\d+ %/.test(document.querySelector('#message').innerText)")
    assert browser.evaluate("window.asked.length > 0 && window.asked.every(audio => audio === false)")
    for width in (1280, 390):
        browser.resize(width)
        browser.screenshot(tmp_path / f"webcam-{width}.png")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert not [name for name in files_in(files) if name.endswith(".webm")], files_in(files)
