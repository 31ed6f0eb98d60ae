"""`dfer.predict.Predictor` is the command without its files, and the examples of its page run."""

import argparse
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from dfer.cli import UserError
from dfer.plan.resizing import resize
from dfer.predict import EMOTIONS, Predictor
from dfer.predict.options import add_arguments, build_predictor
from dfer.video.decode import decode
from scripts import export
from tests.conftest import ROOT
from tests.test_predict import moving, save_run, write_video

FRAMES = 12


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a run, a video of a face and the frames of it."""
    folder = tmp_path_factory.mktemp("python")
    save_run(folder / "logs" / "NAME")
    write_video(folder / "clip.mp4", moving(0, FRAMES))
    (folder / "frames").mkdir()
    for number, (_, image) in enumerate(decode(folder / "clip.mp4")):
        image.save(folder / "frames" / f"{number}.png")
    return folder


def by_the_command(*words: object) -> object:
    """What the command predicts with."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return build_predictor(parser.parse_args([str(word) for word in words]), resize)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"faces": "main"}, ["--faces", "main"]),
        ({"window": "8", "stride": "0.08s", "crop": False}, ["--window", "8", "--stride", "0.08s", "--no-crop"]),
    ],
)
def test_it_predicts_what_the_command_does(options, words, here):
    run = here / "logs" / "NAME"
    got = Predictor(run, device="cpu", **options).video(here / "clip.mp4")
    want = by_the_command("--checkpoint", run, "--device", "cpu", *words).predict(here / "clip.mp4")
    assert got.probabilities.shape == (FRAMES, len(EMOTIONS)) and np.isfinite(got.probabilities).any()
    assert (got.boxes is None) == (options.get("crop") is False)
    assert (got.window, got.stride) == (want.window, want.stride)
    np.testing.assert_array_equal(got.probabilities, want.probabilities)
    assert len(got.faces) == len(want.faces) == (not options.get("faces") and options.get("crop", True))
    for mine, its in zip(got.faces, want.faces, strict=True):
        np.testing.assert_array_equal(mine.probabilities, its.probabilities)


def test_frames_have_the_rate_that_is_given_and_models_are_averaged(here):
    save_run(here / "logs" / "other", seed=1)
    runs = [here / "logs" / name for name in ("NAME", "other")]
    alone = [Predictor(run, crop=False, fps=10.0, device="cpu").video(here / "frames") for run in runs]
    both = Predictor(*map(str, runs), crop=False, fps=10.0, device="cpu").video(str(here / "frames"))
    np.testing.assert_allclose(both.times, np.arange(FRAMES) / 10)
    assert not np.allclose(alone[0].probabilities, alone[1].probabilities)
    np.testing.assert_allclose(both.probabilities, np.mean([p.probabilities for p in alone], axis=0))


def test_what_is_wrong_is_one_line(here, tmp_path):
    run = here / "logs" / "NAME"
    predictor = Predictor(run, crop=False, device="cpu")
    (tmp_path / "text.mp4").write_text("no video")
    for path, line in (
        (tmp_path / "gone.mp4", "gone.mp4: no such video or folder"),
        (tmp_path, "no JPEG or PNG frames in it"),
        (tmp_path / "text.mp4", "text.mp4: "),
    ):
        with pytest.raises(UserError, match=line) as error:
            predictor.video(path)
        assert "\n" not in str(error.value)
    for wrong, line in (
        ({"window": "0s"}, "^window: .*0"),
        ({"fps": 0.0}, "^fps: .*0"),
        ({"detector": tmp_path / "none.onnx", "crop": True}, "none.onnx"),
    ):
        with pytest.raises(UserError, match=line):
            Predictor(run, **wrong)
    with pytest.raises(UserError, match="no checkpoint"):
        Predictor()
    with pytest.raises(UserError, match="gone"):
        Predictor(tmp_path / "gone")


def test_the_examples_of_the_page_run(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert export.main(["logs/NAME", "--out", "model", "--formats", "hub"]) == 0
    capsys.readouterr()
    page = (ROOT / "docs" / "python.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (here / "examples.py").write_text("".join(examples))
    names = runpy.run_path("examples.py")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.fullmatch(r" *\d+\.\d\d s  \w+  \d+%", line)]
    assert len(examples) == 3 and len(lines) == FRAMES
    assert names["probabilities"].shape == (1, len(EMOTIONS)) and names["faces"] is not names["predictor"]
    (table,) = re.findall(r"^\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    fields = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(fields) >= 6 and all(hasattr(names["prediction"], name) for name in fields)
