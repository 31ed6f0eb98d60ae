"""Emotions over time: the stream against all frames in a list, the script against evaluation, and what is written."""

import csv
import gc
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

from dali_pipes import torch_stages
from dali_pipes.build import build_loader
from dfer.config import Config, DataConfig, ModelConfig, RunConfig
from dfer.evaluation import evaluate
from dfer.lists.annotations import EMOTIONS, read_annotations, write_annotations
from dfer.lists.index import build_index
from dfer.model.build import build_model
from dfer.plan.sampling import ClipSampler
from dfer.precision import Precision
from dfer.predict import output
from dfer.predict import overlay as ov
from dfer.predict.inputs import InputVideo, find_videos
from dfer.predict.output import spaced_frames
from dfer.predict.predictor import Model
from dfer.predict.progress import VideoProgress
from dfer.predict.timeline import Timeline, place_windows, segments
from dfer.report.figures import ACCENT, SECOND
from dfer.report.lanes import Lanes
from dfer.run.checkpoint import save_checkpoint
from dfer.run.distributed import World
from dfer.video.decode import BadVideo, decode
from dfer.video.detectors import make_detector
from dfer.video.faces import crop_face, find_face
from dfer.video.write import write_gif, write_mp4
from scripts import predict as pr
from scripts import prepare_videos as pv
from tests.conftest import ROOT
from tests.drawn_scenes import room
from tests.oracle import resize
from tests.test_faces import toy_yunet
from tests.test_prepare_videos import REAL, noise, person, write_video

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
FLOAT32 = Precision(torch.device("cpu"), None, True)


# ---- Windows and what is said of a frame


def test_windows_cover_each_run_of_a_face_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        track = np.repeat(rng.integers(-1, 3, 6), rng.integers(1, 12, 6))
        length = int(rng.integers(1, 9))
        stride = int(rng.integers(1, length + 1))
        windows = place_windows(track, length, stride).tolist()
        want, first = [], 0
        while first < len(track):
            end = first
            while end < len(track) and track[end] == track[first]:
                end += 1
            if track[first] >= 0:
                start = first
                while start + length < end:
                    want.append([start, start + length])
                    start += stride
                want.append([max(end - length, first), end])
            first = end
        assert windows == want
        covered = np.zeros(len(track), bool)
        for start, end in windows:
            assert len(set(track[start:end].tolist())) == 1 and end - start <= length
            covered[start:end] = True
        assert (covered == (track >= 0)).all()
    assert place_windows(np.full(5, -1), 4, 2).shape == (0, 2)


def weight(place: int, length: int) -> float:
    """How much a window counts for one of its frames: a raised cosine that is 0 just outside of it."""
    return 0.5 - 0.5 * math.cos(2 * math.pi * (place + 1) / (length + 1))


def weighted(said: list[tuple[np.ndarray, float]]) -> np.ndarray:
    return sum(p * w for p, w in said) / sum(w for _, w in said)


@pytest.mark.parametrize("case", range(12))
def test_a_frame_has_the_weighted_mean_of_its_windows(case: int) -> None:
    """Against all pictures in a list; pictures here are single numbers."""
    rng = np.random.default_rng(case)
    track = np.repeat(rng.integers(-1, 2, 5), rng.integers(1, 30, 5))
    track[0] = 0
    length = int(rng.integers(2, 20))
    stride, batch = int(rng.integers(1, length + 1)), int(rng.integers(1, 5))
    sampler = ClipSampler(0, *rng.integers(1, 4, 2).tolist(), "eval", views=1 + case % 3, mirror_views=case % 2 == 1)
    pictures = rng.random(len(track))
    weights = rng.standard_normal((sampler.clip_length, len(EMOTIONS)))

    def model(clip: np.ndarray, mirrored: bool) -> np.ndarray:
        e = np.exp((clip / 255 * (-1 if mirrored else 1)) @ weights)
        return e / e.sum()

    sizes: list[int] = []

    def look(clips, mirrored):
        sizes.append(len(clips))
        return np.stack([model(np.array(clip) / 2, mirrored) for clip in clips])

    windows = place_windows(track, length, stride)
    timeline = Timeline(len(track), windows, sampler, lambda picture: 2 * float(picture[0, 0, 0]), look, batch)
    most = 0
    for i, value in enumerate(pictures):
        if timeline.wants(i):
            pixel = np.full((1, 1, 3), round(255 * value), np.uint8)
            timeline.add(i, pixel)
            most = max(most, len(timeline._held))
    assert timeline.complete

    said: list[list[tuple[np.ndarray, float]]] = [[] for _ in track]
    for start, end in windows.tolist():
        views = []
        for view in range(sampler.num_views):
            frames = sampler.plan(view, np.array([end - start])).frames[0] + start
            views.append(model(np.round(255 * pictures)[frames], view >= sampler.views))
        for i in range(start, end):
            said[i].append((np.mean(views, axis=0), weight(i - start, end - start)))
    want = np.array([weighted(s) if s else np.full(len(EMOTIONS), np.nan) for s in said])
    np.testing.assert_allclose(timeline.probabilities(), want, atol=1e-12)
    assert np.isnan(want[:, 0]).tolist() == (track < 0).tolist()
    assert most <= length * batch and max(sizes) <= batch


def test_without_windows_a_timeline_is_complete_and_empty() -> None:
    timeline = Timeline(3, place_windows(np.full(3, -1), 4, 2), ClipSampler(0, 2, mode="eval"), int, len, 2)
    assert timeline.complete and not any(map(timeline.wants, range(3)))
    assert np.isnan(timeline.probabilities()).all() and timeline.probabilities().shape == (3, len(EMOTIONS))


def test_segments_are_runs_of_one_emotion_of_one_face() -> None:
    track = np.array([-1, 0, 0, 0, 0, 1, 1, -1, 1, 1])
    likeliest = [2, 0, 0, 3, 3, 3, 3, 3, 3, 0]
    p = np.eye(7)[likeliest]
    p[track < 0] = np.nan
    assert segments(track, p) == [(1, 3, 0), (3, 5, 3), (5, 7, 3), (8, 9, 3), (9, 10, 0)]
    assert segments(np.full(4, -1), np.full((4, 7), np.nan)) == []


# ---- A run whose weights no one trained, but that tells clips apart


def save_run(folder: Path, seed: int = 0, network: str = "dfernet", **data: object) -> Path:
    config = Config(
        data=DataConfig(**{"size": 32, "num_segments": 4, "batch_size": 2, "train_list": folder / "train.txt"} | data),
        model=ModelConfig(name=network, dim=16),
        run=RunConfig(device="cpu", amp="off"),
    )
    torch.manual_seed(seed)
    model = build_model(config.model, config.data.num_segments * config.data.frames_per_segment)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    state = {"model": model.state_dict(), "ema": None, "config": config.to_json(), "emotions": list(EMOTIONS)}
    save_checkpoint(folder / "checkpoints", state | {"step": 7})
    write_annotations(folder / "train.txt", [(f"clip{n}", n, 0) for n in (8, 12, 30)])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def moving(identity: int, count: int) -> list[np.ndarray]:
    """A drawn face that drifts, on a moving ground."""
    face = person(identity)
    frames = []
    for i in range(count):
        frame = np.full((256, 320, 3), 90 + i, np.uint8)
        frame[16:240, 40 + i : 264 + i] = face
        frame[:, :, 1] = np.roll(frame[:, :, 1], i % 3, 0)
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


def make_videos(folder: Path) -> Path:
    """Of a face throughout, of one and then, after a cut, another, and of none."""
    nothing = [np.asarray(Image.fromarray(noise(1)[0][:4, :4]).resize((320, 256), Image.Resampling.BICUBIC))]
    write_video(folder / "one.mp4", moving(0, 31))
    times = [40 * i + 15 * (i % 2) for i in range(66)]
    write_video(folder / "sub" / "two.mp4", moving(0, 24) + nothing * 20 + moving(1, 22), pts_ms=times)
    write_video(folder / "none.mp4", nothing * 9)
    return folder


def load_model(path: Path) -> Model:
    return Model(path, torch.device("cpu"), None, torch_stages.resize)


def predict(*arguments: object) -> int:
    return pr.main([*map(str, arguments), "--device", "cpu"])


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(path: Path) -> np.ndarray:
    """(N, K), nan for empty cells."""
    return np.array([[float(row[f"p_{e}"] or "nan") for e in EMOTIONS] for row in rows(path)])


def all_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# ---- Against all frames in a list, and against evaluation


@pytest.mark.parametrize(("name", "window", "stride"), [("one", 12, 3), ("sub/two", 10, 7), ("one", 99, 5)])
def test_the_stream_says_what_a_list_of_all_frames_does(
    run: Path, videos: Path, tmp_path: Path, name: str, window: int, stride: int
) -> None:
    assert predict(videos, "--checkpoint", run, "--out", tmp_path, "--window", window, "--stride", stride,
                   "--annotate", "none") == 0  # fmt: skip
    model = load_model(run)
    times, frames = zip(*((t, np.asarray(image)) for t, image in decode(videos / f"{name}.mp4")), strict=True)
    for mine, plain in zip(frames, all_frames(videos / f"{name}.mp4"), strict=True):
        assert np.abs(mine.astype(int) - plain).mean() < 3  # PyAV's own colours are cheaper ones
    faces = find_face(zip(times, frames, strict=True), make_detector(), every_track=True)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    said: list[list[tuple[np.ndarray, float]]] = [[] for _ in frames]
    for face in set(faces.track.tolist()) - {-1}:
        own = np.flatnonzero(faces.track == face)
        assert (np.diff(own) == 1).all()
        length = min(window, len(own))
        for first in sorted({*range(0, len(own) - length, stride), len(own) - length}):
            inside = own[first : first + length]
            picked = [inside[int((s + 0.5) * max(length, 1) / 4)] for s in range(4)]
            clip = [(resize(crop_face(frames[i], faces.boxes[i], 224, 0.1), 32) / 255 - mean) / std for i in picked]
            tensor = torch.tensor(np.stack(clip), dtype=torch.float32).permute(0, 3, 1, 2)[None]
            with torch.inference_mode():
                p = F.softmax(model._net(tensor).logits, 1)[0].numpy()
            for place, i in enumerate(inside):
                said[i].append((p, weight(place, length)))
    want = np.array([weighted(s) if s else np.full(7, np.nan) for s in said])
    found = probabilities(tmp_path / f"{name}.csv")
    assert (~np.isnan(want[:, 0])).sum() >= {"one": 31, "sub/two": 40}[name]
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert np.ptp(want[~np.isnan(want[:, 0])], axis=0).max() > 1e-3 or window == 99  # else nothing is shown


def by_hand(model: Model, frames: list[np.ndarray], boxes: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The weighted mean of the windows over one face, which has a box in each of the frames."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    said: list[list[tuple[np.ndarray, float]]] = [[] for _ in frames]
    length = min(window, len(frames))
    for first in sorted({*range(0, len(frames) - length, stride), len(frames) - length}):
        picked = [first + int((s + 0.5) * length / 4) for s in range(4)]
        clip = [(resize(crop_face(frames[i], boxes[i], 224, 0.1), 32) / 255 - mean) / std for i in picked]
        tensor = torch.tensor(np.stack(clip), dtype=torch.float32).permute(0, 3, 1, 2)[None]
        with torch.inference_mode():
            p = F.softmax(model._net(tensor).logits, 1)[0].numpy()
        for i in range(first, first + length):
            said[i].append((p, weight(i - first, length)))
    return np.array([weighted(s) for s in said])


def test_every_face_is_predicted_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One who is there throughout, and one who comes later and goes earlier; to the detector a white cell is a face."""
    (tmp_path / "toy.onnx").write_bytes(toy_yunet(0.2))
    pair = [room(3, 96, 128) // 2 + np.uint8(i) for i in range(48)]
    for i, frame in enumerate(pair):
        frame[40:48, 64:72] = 255
        if 12 <= i < 42:
            frame[72:80, 8:16] = 255
    video = write_video(tmp_path / "pair.mp4", pair)
    flags = ("--checkpoint", run, "--window", 14, "--stride", 5, "--detector", tmp_path / "toy.onnx")
    assert predict(video, *flags, "--out", tmp_path / "all") == 0
    assert "2 faces at once" in (line := capsys.readouterr().out) and "NAME.csv and NAME.json have each" in line
    assert predict(video, *flags, "--out", tmp_path / "main", "--faces", "main", "--annotate", "none") == 0
    assert "NAME" not in capsys.readouterr().out
    frames = [np.asarray(image) for _, image in decode(video)]
    found = find_face(
        ((i / 25, f) for i, f in enumerate(frames)), make_detector(tmp_path / "toy.onnx"), every_track=True
    )
    assert len(found.tracks) == found.faces_at_once == 2 and found.tracks[1].first == 12
    table, about = rows(tmp_path / "all" / "pair.csv"), json.loads((tmp_path / "all" / "pair.json").read_text())
    assert (about["faces_followed"], len(about["faces"])) == ("all", len(found.tracks))
    assert [row["frame"] for row in table] == sorted((row["frame"] for row in table), key=int)
    for number, (track, summary) in enumerate(zip(found.tracks, about["faces"], strict=True), start=1):
        own = [row for row in table if row["face"] == str(number)]
        assert [int(row["frame"]) for row in own] == list(range(track.first, track.end))
        want = by_hand(load_model(run), frames[track.first : track.end], track.boxes, 14, 5)
        given = np.array([[float(row[f"p_{e}"]) for e in EMOTIONS] for row in own])
        np.testing.assert_allclose(given, want, atol=1e-4)
        assert (summary["face"], summary["first_frame"], summary["last_frame"]) == (number, track.first, track.end - 1)
        np.testing.assert_allclose([summary["mean_probabilities"][e] for e in EMOTIONS], given.mean(0), atol=2e-6)
        np.testing.assert_allclose([float(row["box_x"]) for row in own], track.boxes[:, 0], atol=0.06)
    best = rows(tmp_path / "main" / "pair.csv")
    assert [row["frame"] for row in best] == [str(i) for i in range(48)]
    assert [row for row in best if row["face"] == "1"] == [row for row in table if row["face"] == "1"]
    assert {row["face"] for row in best[: found.tracks[0].end]} == {"1"}
    main = json.loads((tmp_path / "main" / "pair.json").read_text())
    assert main["faces_followed"] == "main" and main["segments"] == about["segments"]  # the timeline is the same
    teal = np.array([int(SECOND[i : i + 2], 16) for i in (1, 3, 5)])
    drawn = [
        (np.abs(frame[:200].astype(int) - teal).max(2) < 30).sum()
        for frame in all_frames(tmp_path / "all" / "pair.mp4")
    ]
    assert (np.array(drawn)[[2, 25, 46]] > 150).tolist() == [False, True, False]  # the other one's tag


@pytest.mark.parametrize("views", [1, 2])
def test_it_agrees_with_evaluation(run: Path, videos: Path, tmp_path: Path, views: int) -> None:
    """On the clips that prepare_videos.py makes, but for JPEG's loss; on a video as it is, but for roundings."""
    checkpoint = save_run(tmp_path / "run", views=views, mirror_views=views > 1)
    prepared = tmp_path / "prepared"
    assert pv.main([str(videos / "one.mp4"), "--out", str(prepared), "--label", "0", "--workers", "1",
                    "--clip-length", "10", "--quality", "100"]) == 0  # fmt: skip
    write_annotations(tmp_path / "list.txt", [(str(videos / "one.mp4"), 31, 0)])
    model = load_model(checkpoint)
    cases = (
        (prepared / "list.txt", ("--window", "10", "--stride", "10"), slice(0, 30, 10), 0.02),
        (tmp_path / "list.txt", ("--window", "31", "--no-crop"), slice(0, 1), 0.005),
    )
    for list_path, flags, clips, tolerance in cases:
        index = build_index(read_annotations(list_path))
        result = evaluate(model._net, build_loader(model.config, index, "eval", WORLD), WORLD, FLOAT32)
        out = tmp_path / f"out{len(flags)}{list_path.parent.name}"
        assert predict(videos / "one.mp4", "--checkpoint", checkpoint, "--out", out, "--annotate", "none", *flags) == 0
        found = probabilities(out / "one.csv")[clips]
        np.testing.assert_allclose(found, result.probabilities, atol=tolerance)


# ---- Folders of frames, and GIF


def save_frames(folder: Path, frames: list[np.ndarray]) -> Path:
    """Losslessly, as 1.png, 2.PNG, 3.png ... 10.PNG, with what is no frame between them."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / f"{i}.{'png' if i % 2 else 'PNG'}", "PNG", compress_level=1)
    (folder / "._1.png").write_bytes(b"of macOS")
    (folder / "times.txt").write_text("0\n")
    return folder


def save_gif(path: Path, frames: list[np.ndarray], durations: list[int]) -> list[np.ndarray]:
    """With Pillow, 256 colours a frame; `durations` in ms. Returns the frames as Pillow reads them."""
    images = [Image.fromarray(frame).quantize(256) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return read_gif(path)[0]


def read_gif(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """Frames and durations in ms, by Pillow."""
    with Image.open(path) as image:
        shown = [(np.asarray(f.convert("RGB")), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    return [frame for frame, _ in shown], [duration for _, duration in shown]


def test_a_folder_of_frames_is_what_its_video_is(run: Path, videos: Path, tmp_path: Path) -> None:
    frames = [np.asarray(image) for _, image in decode(videos / "one.mp4")]
    folder = save_frames(tmp_path / "take 1.2", frames)  # no part of the name is a suffix
    (folder / "@eaDir").mkdir()
    (folder / "@eaDir" / "FILM.mp4").write_bytes(b"of a disk station")
    flags = ("--checkpoint", run, "--out", tmp_path / "out", "--window", 12)
    assert predict(videos / "one.mp4", folder, *flags, "--annotate", "none") == 0
    assert (tmp_path / "out" / "take 1.2.csv").read_text() == (tmp_path / "out" / "one.csv").read_text()
    fast = ("--out", tmp_path / "fast", "--fps", 50, "--window", "0.24s", "--annotate", "gif")
    assert predict(folder, "--checkpoint", run, *fast) == 0
    about = json.loads((tmp_path / "fast" / "take 1.2.json").read_text())
    assert (about["frames"], about["fps"], about["seconds"], about["window_frames"]) == (31, 50, 0.62, 12)
    assert [float(row["time"]) for row in rows(tmp_path / "fast" / "take 1.2.csv")] == [i / 50 for i in range(31)]
    assert len(read_gif(tmp_path / "fast" / "take 1.2.gif")[0]) == 8  # of 31 every fourth: 12.5 a second


def test_an_animated_gif_is_what_its_frames_are(run: Path, videos: Path, tmp_path: Path) -> None:
    frames = save_gif(tmp_path / "a.gif", moving(0, 20), [40] * 20)
    folder = save_frames(tmp_path / "frames", frames)
    flags = ("--checkpoint", run, "--out", tmp_path / "out", "--window", 8, "--annotate", "none")
    assert predict(tmp_path / "a.gif", folder, *flags) == 0
    assert (tmp_path / "out" / "a.csv").read_text() == (tmp_path / "out" / "frames.csv").read_text()
    assert np.ptp(probabilities(tmp_path / "out" / "a.csv"), axis=0).max() > 1e-3


def test_a_gif_has_the_times_and_colours_that_pillow_reads(tmp_path: Path) -> None:
    durations = [40, 80, 20, 100, 250, 10, 30, 70]
    frames = save_gif(tmp_path / "a.gif", [frame[::4, ::4] for frame in moving(0, 8)], durations)
    found = list(decode(tmp_path / "a.gif"))
    np.testing.assert_allclose([time for time, _ in found], np.cumsum([0, *durations[:-1]]) / 1000, atol=1e-6)
    assert all((np.asarray(image) == frame).all() for (_, image), frame in zip(found, frames, strict=True))
    whole = (tmp_path / "a.gif").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1):  # FFmpeg takes both for whole
        (tmp_path / "a.gif").write_bytes(whole[:cut])
        with pytest.raises(BadVideo, match="truncated"):
            list(decode(tmp_path / "a.gif"))
    (tmp_path / "a.gif").write_bytes(whole + bytes(3))  # which some programs append
    assert len(list(decode(tmp_path / "a.gif"))) == 8


def test_the_annotated_gif_shows_what_the_overlay_draws(run: Path, videos: Path, tmp_path: Path) -> None:
    video = videos / "sub" / "two.mp4"
    flags = ("--checkpoint", run, "--out", tmp_path, "--window", 12)
    assert predict(video, *flags) == 0 and (tmp_path / "two.mp4").exists()
    assert predict(video, *flags, "--annotate", "gif") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two.csv", "two.gif", "two.json", "two.png"]
    found, durations = read_gif(tmp_path / "two.gif")
    decoded = list(decode(video))
    times = [moment for moment, _ in decoded]
    kept = [0]
    while (later := [i for i in range(len(times)) if times[i] - times[kept[-1]] > 0.066]) != []:
        kept.append(later[0])
    assert len(kept) > 25 and len(found) == len(kept)
    np.testing.assert_allclose(np.cumsum([0, *durations[:-1]]) / 1000, [times[i] for i in kept], atol=0.0051)

    table, p = rows(tmp_path / "two.csv"), probabilities(tmp_path / "two.csv")
    boxes = np.array([[float(r[f"box_{c}"] or "nan") for c in ("x", "y", "side", "tilt")] for r in table])
    overlay = ov.Overlay(256, 320, np.append(times, times[-1] + np.median(np.diff(times))), boxes, p, longest=480)
    wanted = [overlay.draw(number, decoded[number][1]).astype(int) for number in kept]
    for place, image in enumerate(found):
        assert image.shape == (604, 480, 3) and np.abs(image - wanted[place])[390:].mean() < 1
        assert np.abs(image - wanted[place]).mean() < 8  # a drawn face of more than 256 colours, on noise
        assert np.argmin([np.abs(image[410] - want[410]).mean() for want in wanted]) == place  # by the cursor
    assert predict(video, *flags) == 0 and not (tmp_path / "two.gif").exists()


def test_the_picture_of_a_gif_is_small() -> None:
    overlay = ov.Overlay(1080, 1920, np.arange(2) / 10, None, np.eye(7)[[0]], longest=480)
    assert overlay.draw(0, Image.new("RGB", (1920, 1080))).shape[1] == overlay._size[0] == 480


def test_spaced_frames_are_the_first_that_are_far_enough() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(rng.integers(1, 9, 40)) / 100
        numbers = spaced_frames(times, 0.05)
        assert numbers[0] == 0
        for a, b in zip(numbers, [*numbers[1:], None], strict=True):
            enough = [i for i in range(a, 40) if times[i] - times[a] > 0.0489]
            assert b == (enough[0] if enough else None)


def test_a_gif_is_written_as_its_frames_come_or_not_at_all(tmp_path: Path) -> None:
    pictures = noise(60)
    sizes = []

    def frames():
        for i, picture in enumerate(pictures):
            yield i / 10, picture
            (partial,) = tmp_path.glob("a.gif.*.partial")
            sizes.append(partial.stat().st_size)

    write_gif(tmp_path / "a.gif", frames(), pictures[::20])
    assert 0 < sizes[40] < sizes[59] and sizes[59] > 0.6 * (tmp_path / "a.gif").stat().st_size  # 256 kB at a time

    def broken():
        yield 0.0, pictures[0]
        raise OSError("no more")

    before = (tmp_path / "a.gif").read_bytes()
    with pytest.raises(OSError, match="no more"):
        write_gif(tmp_path / "a.gif", broken(), pictures[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"] and (tmp_path / "a.gif").read_bytes() == before


def test_images_beside_videos_are_no_frames(run: Path, videos: Path, tmp_path: Path) -> None:
    save_frames(tmp_path / "in", moving(0, 2))
    (tmp_path / "in" / "below").mkdir()
    os.link(videos / "none.mp4", tmp_path / "in" / "below" / "none.mp4")
    found = find_videos([tmp_path / "in"], tmp_path / "out", print)
    assert found == [InputVideo(tmp_path / "in" / "below" / "none.mp4", "below/none")]
    found = find_videos([tmp_path / "in"], tmp_path / "in" / "below", print)  # results of an earlier call
    assert found == [InputVideo(tmp_path / "in", "in")]


def test_a_bad_frame_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = moving(0, 4)
    for name in ("damaged", "pipe", "claims", "long"):
        save_frames(tmp_path / name, small)
        (tmp_path / name / "3.png").unlink()
    whole = (tmp_path / "pipe" / "2.PNG").read_bytes()
    (tmp_path / "damaged" / "3.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(tmp_path / "pipe" / "3.png")
    header = whole[12:16] + (80000).to_bytes(4) + whole[20:29]
    (tmp_path / "claims" / "3.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:])
    with open(tmp_path / "long" / "3.png", "wb") as file:
        file.truncate(2**26 + 1)
    folders = [tmp_path / name for name in ("damaged", "pipe", "claims", "long")]
    assert predict(*folders, "--checkpoint", run, "--out", tmp_path / "out", "--window", 4) == 1
    lines = capsys.readouterr().err.splitlines()
    expected = ("truncated", "not a file", "pixels, more than 16,777,216", "more than 67,108,864 bytes")
    for folder, line, words in zip(folders, lines, expected, strict=True):
        assert line.startswith(f"predict: {folder}: frame 3.png: ") and words in line, line
    assert not list((tmp_path / "out").iterdir())


def test_an_ensemble_is_the_mean_of_its_members(run: Path, videos: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", seed=1, size=48, num_segments=3)
    for name, checkpoints in (("a", [run]), ("b", [other]), ("both", [run, other])):
        flags = ("--out", tmp_path / name, "--window", 9, "--annotate", "none")
        assert predict(videos / "one.mp4", "--checkpoint", *checkpoints, *flags) == 0
    a, b, both = (probabilities(tmp_path / name / "one.csv") for name in ("a", "b", "both"))
    assert np.abs(a - b).max() > 0.01
    np.testing.assert_allclose(both, (a + b) / 2, atol=2e-6)
    models = json.loads((tmp_path / "both" / "one.json").read_text())["models"]
    assert [(m["checkpoint"], m["step"], m["frames"], m["size"]) for m in models] == [
        (str(run), 7, 4, 32),
        (str(other), 7, 3, 48),
    ]


# ---- What is written


def test_a_folder_with_a_bad_video_and_one_without_a_face(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("one.mp4", "sub/two.mp4", "none.mp4"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(videos / name, source / name)
    (source / "bad.mp4").write_bytes(b"nonsense" * 100)
    (source / "cut.mp4").write_bytes((videos / "one.mp4").read_bytes()[:9000])
    for _ in range(2):  # again: what it wrote is not taken for a video
        assert predict(source, "--checkpoint", run, "--out", out, "--window", 12) == 1
        captured = capsys.readouterr()
        bad = sorted(captured.err.splitlines())
        assert len(bad) == 2 and bad[0].startswith(f"predict: {source}/bad.mp4: Invalid data")
        assert bad[1].startswith(f"predict: {source}/cut.mp4: ")
        said, *lines = captured.out.splitlines()
        assert said.startswith("the model is trained on ") and lines[0] == "none: no face in 9 frames"
        assert lines[1].startswith("one: ") and lines[1].endswith(" %")
        assert lines[2].startswith("sub/two: ") and "a face in 46 of 66 frames" in lines[2]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == ["none.csv", "none.json", *(f"{name}.{suffix}" for name in ("one", "sub/two")
                                                  for suffix in ("csv", "json", "mp4", "png"))]  # fmt: skip

    about = {name: json.loads((out / f"{name}.json").read_text()) for name in ("none", "one", "sub/two")}
    assert [about[n]["outcome"] for n in about] == ["no face", "ok", "ok"]
    assert about["none"]["emotion"] is None and about["none"]["mean_probabilities"] is None
    assert about["none"]["segments"] == [] and about["none"]["frames"] == 9
    two, table = about["sub/two"], rows(out / "sub" / "two.csv")
    assert (two["frames"], two["frames_with_face"], two["cuts"], two["faces_at_once"]) == (66, 46, 2, 1)
    assert (two["width"], two["height"], two["window_frames"], two["stride_frames"]) == (320, 256, 12, 3)
    times = np.array([40 * i + 15 * (i % 2) for i in range(66)]) / 1000
    assert [row["frame"] for row in table] == [str(i) for i in range(66)]
    np.testing.assert_allclose([float(row["time"]) for row in table], times, atol=1e-3)
    p = probabilities(out / "sub" / "two.csv")
    np.testing.assert_allclose(np.nansum(p, 1), [1.0] * 24 + [0.0] * 20 + [1.0] * 22, atol=1e-5)
    for row, likely in zip(table, p, strict=True):
        cells = [row[c] for c in ("box_x", "box_y", "box_side", "box_tilt", "emotion")]
        assert all(cells) if likely[0] == likely[0] else not any(cells)
        assert row["emotion"] in ("", EMOTIONS[int(np.nan_to_num(likely).argmax())])
    mean = np.nanmean(p, axis=0)
    np.testing.assert_allclose([two["mean_probabilities"][e] for e in EMOTIONS], mean, atol=2e-6)
    assert two["emotion"] == EMOTIONS[int(mean.argmax())]
    spans = [(s["first_frame"], s["last_frame"]) for s in two["segments"]]
    assert spans[0][0] == 0 and spans[-1][1] == 65
    assert sum(last - first + 1 for first, last in spans) == 46
    for span in two["segments"]:
        emotions = {row["emotion"] for row in table[span["first_frame"] : span["last_frame"] + 1]}
        assert emotions == {span["emotion"]}

    with av.open(str(out / "sub" / "two.mp4")) as container:
        frames = list(container.decode(video=0))
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=1e-3)
    assert frames[0].width == 480 and frames[0].height % 2 == 0
    with Image.open(out / "one.png") as image:
        assert image.width == 1800


def test_the_square_is_where_the_face_is(run: Path, videos: Path, tmp_path: Path) -> None:
    assert predict(videos / "one.mp4", "--checkpoint", run, "--out", tmp_path, "--margin", 0, "--annotate", "none") == 0
    wide = tmp_path / "wide"
    assert predict(videos / "one.mp4", "--checkpoint", run, "--out", wide, "--margin", 0.5, "--annotate", "none") == 0
    for i, (near, far) in enumerate(zip(rows(tmp_path / "one.csv"), rows(wide / "one.csv"), strict=True)):
        assert abs(float(near["box_x"]) - (152 + i)) < 20 and abs(float(near["box_y"]) - 128) < 25
        assert float(far["box_side"]) == pytest.approx(2 * float(near["box_side"]), abs=0.2)
    assert np.abs(probabilities(tmp_path / "one.csv") - probabilities(wide / "one.csv")).max() > 1e-3
    assert json.loads((wide / "one.json").read_text())["window_frames"] == 25  # a second


def test_nothing_is_left_half_written(
    run: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (videos / "one.mp4", "--checkpoint", run, "--out", tmp_path, "--window", 12)
    assert predict(*flags) == 0
    draw = ov.Overlay.draw

    def stopped(self: ov.Overlay, number: int, frame: Image.Image) -> np.ndarray:
        if number == 9:
            raise KeyboardInterrupt
        return draw(self, number, frame)

    monkeypatch.setattr(ov.Overlay, "draw", stopped)
    assert predict(*flags) == 130
    assert capsys.readouterr().err == "predict: interrupted; what is written is whole\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.csv", "one.png"]  # of this call, and whole

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_mp4", full)
    assert predict(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"predict: {tmp_path}/one: cannot be written ([Errno 28] No space left on device)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("{v}/gone.mp4",), "gone.mp4: no such video or folder"),
        (("{t}",), "{t}: no videos in it, and no JPEG or PNG frames"),
        ((), "no CLIP: name a video, a folder of videos or frames, or a --camera"),
        (("{v}/one.mp4", "--checkpoint", "{t}"), "{t}: holds no checkpoint"),
        (("{v}/one.mp4", "--window", "0"), "argument --window: '0' is not a whole number from 1 to 10,000,000"),
        (
            ("{v}/one.mp4", "--window", "12", "--stride", "20"),
            "--stride: 20 frames are more than the window's 12: some would not be seen",
        ),
        (("{v}/one.mp4", "--window", "xs"), "argument --window: 'x' is not a number from 0.01 to 100,000.0"),
        (("{v}/one.mp4", "--detector", "{v}/one.mp4"), "one.mp4: not a YuNet model"),
        (("{v}/one.mp4", "--out", "{v}"), "--out {v}: one.mp4 lies there and would be overwritten"),
        (("{v}/one.mp4", "--out", "{v}/one.mp4"), "--out {v}/one.mp4: is no folder"),
        (("{f}", "--out", "{f}"), "--out {f}: the results would lie among the frames"),
        (("{f}/a.gif", "--out", "{f}"), "--out {f}: a.gif lies there and would be overwritten"),
        (("{v}/one.mp4", "--fps", "0"), "argument --fps: '0' is not a number from 0.1 to 1,000"),
        (("--camera", "{v}/gone.mp4"), "{v}/gone.mp4: no such file or folder"),
        (("--camera", "7", "{v}/one.mp4"), "--camera 7 and CLIP {v}/one.mp4: one or the other"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    before = (videos / "one.mp4").read_bytes()
    (tmp_path / "t").mkdir()
    save_frames(tmp_path / "f", moving(0, 1))
    places = {"v": videos, "t": tmp_path / "t", "f": tmp_path / "f"}
    if flags[:1] == ("{f}/a.gif",):
        save_gif(tmp_path / "f" / "a.gif", moving(0, 2), [40, 40])
    given = [flag.format(**places) for flag in flags]
    for name, default in (("--checkpoint", run), ("--out", tmp_path / "out")):
        given += [] if name in given else [name, str(default)]
    try:
        assert predict(*given) == 2
    except SystemExit as stop:
        assert stop.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict: ") and message.format(**places) in line
    assert (videos / "one.mp4").read_bytes() == before


def test_a_window_is_a_second_at_the_video_s_own_rate(run: Path, videos: Path, tmp_path: Path) -> None:
    """Whatever the run was trained on: its list may be gone."""
    run = save_run(tmp_path / "run")
    (run / "train.txt").unlink()
    frames = [np.asarray(image) for _, image in decode(videos / "none.mp4")]
    for fps, window, stride in ((5, 5, 1), (25, 25, 6), (60, 60, 15)):
        write_video(tmp_path / f"{fps}.mp4", frames, pts_ms=[round(1000 * i / fps) for i in range(len(frames))])
        flags = ("--checkpoint", run, "--out", tmp_path / "out", "--annotate", "none")
        assert predict(tmp_path / f"{fps}.mp4", *flags) == 0
        about = json.loads((tmp_path / "out" / f"{fps}.json").read_text())
        assert (about["window_frames"], about["stride_frames"]) == (window, stride)
        assert about["window_seconds"] == about["latency_seconds"] == pytest.approx(1, abs=0.03)
        assert about["stride_seconds"] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(("window", "faces"), [("0.4s", "all"), ("0.4s", "main"), ("2.2s", "main")])
def test_frames_are_marked_where_no_window_has_them_in_its_middle(
    run: Path, videos: Path, tmp_path: Path, window: str, faces: str
) -> None:
    """The longest window is twice as long as a face is seen."""
    flags = ("--checkpoint", run, "--out", tmp_path, "--window", window, "--faces", faces, "--annotate", "none")
    assert predict(videos / "sub" / "two.mp4", *flags) == 0
    table, about = rows(tmp_path / "two.csv"), json.loads((tmp_path / "two.json").read_text())
    half = about["window_frames"] // 2
    seen = np.array([int(row["face"] or 0) for row in table])
    for i, row in enumerate(table):
        inside = all(0 <= j < len(table) and seen[j] == seen[i] for j in range(i - half, i + half + 1))
        assert row["at_end"] == ("" if not seen[i] else str(int(not inside)))
    marked = [sum(row["at_end"] == "1" for row in table if row["face"] == str(f["face"])) for f in about["faces"]]
    assert [face["frames_at_end"] for face in about["faces"]] == marked
    assert 0 < sum(marked) < (seen > 0).sum() or window == "2.2s"


# ---- Pictures


def test_bars_are_as_long_as_probabilities_and_the_likeliest_is_in_colour() -> None:
    lanes = Lanes(800, 1.0)
    panel = Image.new("RGB", (lanes.width, lanes.height), "white")
    p = np.array([0.05, 0.1, 0.5, 0.0, 0.25, 0.1, 0.0])
    ov.bar_chart(lanes, panel, p)
    left, right = lanes.bar
    for k in range(7):
        row = np.asarray(panel)[lanes.top + k * lanes.lane + lanes.lane // 2, left:right]
        empty = (row == [0xDD, 0xE2, 0xE8]).all(1)
        filled = (~empty).sum()
        assert filled == round(p[k] * (right - left)) and (k in (3, 6)) == (filled == 0)
        accent = tuple(int(ACCENT[i : i + 2], 16) for i in (1, 3, 5))
        assert ((row == accent).all(1).sum() > 0) == (k == 2)


def test_lanes_are_filled_as_high_as_probabilities() -> None:
    p = np.full((100, 7), 0.1)
    p[:50, 0], p[50:, 3] = 0.4, 0.4
    p[70:] = np.nan
    image = np.asarray(ov.timeline_picture(np.arange(101) / 10, p, unit=1.0)).astype(int)
    lanes = Lanes(900, 1.0)
    left, right = lanes.extent
    orange = (image[:, :, 0] - image[:, :, 2]) > 100
    for k, share in ((0, 0.25), (3, 0.6)):
        x = round(left + share * (right - left))
        lane = orange[lanes.top + k * lanes.lane : lanes.top + (k + 1) * lanes.lane, x]
        assert lane.sum() == pytest.approx(0.4 * 0.92 * lanes.lane, abs=1)
    assert not orange[:, round(left + 0.75 * (right - left)) : right].any()
    assert not orange[lanes.top : lanes.top + lanes.lane, round(left + 0.52 * (right - left)) : right].any()


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [(64, 48, (480, 360)), (3840, 2160, (1280, 720)), (1080, 1920, (720, 1280)), (101, 999, (100, 1000))],
)
def test_frames_of_any_size_become_legible_ones(width: int, height: int, shown: tuple[int, int]) -> None:
    edges, p = np.arange(4) / 10, np.eye(7)[[0, 1, 2]]
    p[2] = np.nan
    boxes = np.tile([width / 2, height / 2, min(width, height) / 2, 0.2], (3, 1))
    overlay = ov.Overlay(height, width, edges, boxes, p)
    frame = Image.new("RGB", (width, height), (40, 200, 90))
    drawn = [overlay.draw(i, frame) for i in range(3)]
    assert overlay._size == shown
    (whole,) = {image.shape for image in drawn}
    assert whole[0] % 2 == 0 and whole[1] % 2 == 0 and whole[1] == max(shown[0], 480)
    green = (drawn[0] == [40, 200, 90]).all(2)
    assert not green[shown[1] :].any() and green[: shown[1]].sum() > 0.5 * shown[0] * shown[1]
    # The cursor: the darkest column of the lanes moves a third of the course with each frame.
    lanes = overlay._lanes
    strip = [image[shown[1] + lanes.top + 2 : shown[1] + lanes.top + 4, slice(*lanes.extent)] for image in drawn]
    at = [int(s.astype(int).sum((0, 2)).argmin()) for s in strip]
    span = lanes.extent[1] - lanes.extent[0]
    np.testing.assert_allclose(at, [span / 6, span / 2, 5 * span / 6], atol=3)


def test_the_box_is_drawn_where_the_crop_is_taken() -> None:
    """What `crop_face` cuts out of a picture of the drawn outline has the outline along its edges."""
    for tilt in (0.0, 0.3):
        boxes = np.array([[300.0, 200.0, 160.0, tilt]])
        overlay = ov.Overlay(400, 600, np.arange(2) / 10, boxes, np.eye(7)[[0]])
        drawn = overlay.draw(0, Image.new("RGB", (600, 400)))[:400]
        crop = crop_face(drawn, boxes[0], 160).astype(int).sum(2)
        crop[:, :60] = 0  # the tag may cover a corner
        assert (crop[:2, 70:150].mean() > 200) and (crop[-2:, 70:150].mean() > 200) and (crop[30:150, -2:].mean() > 200)
        assert crop[20:140, 70:140].max() == 0


def test_progress_counts_seconds_of_video(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    paths = [videos / "none.mp4", videos / "one.mp4", videos / "gone.mp4"]
    progress = VideoProgress([InputVideo(path, path.stem) for path in paths], passes=2, fps=25.0)
    (task,) = progress._bar.tasks
    assert task.total == pytest.approx(2 * (9 + 31) / 25, abs=0.1)
    progress.begin(1, "one")
    assert task.completed == pytest.approx(2 * 9 / 25, abs=0.1)
    for _ in range(2):
        assert len(list(progress.show(decode(paths[1])))) == 31
    assert task.completed == pytest.approx(task.total, abs=0.2) and task.fields["rate"] > 0


# ---- What is written, and long videos


def test_frames_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken():
        yield 0.0, np.zeros((32, 32, 3), np.uint8)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_mp4(tmp_path / "a.mp4", broken())
    assert not list(tmp_path.iterdir())
    colours = [np.full((32, 48, 3), c, np.uint8) for c in ([200, 30, 30], [30, 200, 30], [30, 30, 200])]
    write_mp4(tmp_path / "a.mp4", ((t, c) for t, c in zip((0.0, 0.5, 0.51), colours, strict=True)))
    found = list(decode(tmp_path / "a.mp4"))
    np.testing.assert_allclose([time for time, _ in found], [0, 0.5, 0.51], atol=1e-4)
    for (_, image), colour in zip(found, colours, strict=True):
        np.testing.assert_allclose(np.asarray(image).mean((0, 1)), colour[0, 0], atol=4)


def test_decoded_frames_are_freed_at_once(videos: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
        assert sum(1 for _ in decode(videos / "one.mp4")) == 31
        after = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert after - before < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ten minutes", "4K"])
def test_memory_does_not_grow_with_the_video(run: Path, tmp_path: Path, kind: str) -> None:
    """Below 2 GB for 10 minutes, and for 4K, of which 80 frames would be as much."""
    frames = moving(0, 50)
    if kind == "4K":
        count, images = 120, (np.kron(frames[i % 2], np.ones((8, 12, 1), np.uint8)) for i in range(120))
    else:
        count, images = 15000, (frames[min(i % 100, 99 - i % 100)] for i in range(15000))
    write_mp4(tmp_path / "v.mp4", ((i / 25, image) for i, image in enumerate(images)))
    script = (
        "import sys; from scripts import predict; code = predict.main(sys.argv[1:]); "
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "v.mp4"), "--checkpoint", str(run)]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out" / "v.csv")) == count
    # In kB. What getrusage() tells begins with the memory of whoever started the process: that of all tests before.
    peak = int(done.stdout.split()[-2])
    print(f"{kind}: {peak / 1e6:.2f} GB")
    assert peak < 2e6


@pytest.mark.skipif(not REAL.is_dir(), reason="the real clips are not beside this checkout")
def test_real_videos(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = (REAL / "single_face.mp4", REAL / "no_face.mp4", REAL / "face_noface.mov")
    assert predict(*clips, "--checkpoint", run, "--out", tmp_path, "--window", "1s") == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[1] == "no_face: no face in 95 frames" and lines[2].endswith("a face in 72 of 169 frames")
    assert np.isfinite(probabilities(tmp_path / "single_face.csv")).all()
    assert len(all_frames(tmp_path / "single_face.mp4")) == 72
    assert json.loads((tmp_path / "single_face.json").read_text())["window_frames"] == 30


def test_a_window_of_a_second_shows_when_a_smile_comes_and_goes() -> None:
    """With a model that says how much of a smile is in its clip on average: 70 frames at once would hide it."""
    times = np.arange(100) / 25
    share = np.clip((times - 1.3) / 0.3 + 0.5, 0, 1) * np.clip((2.7 - times) / 0.3 + 0.5, 0, 1)
    courses = {}
    for window in (25, 70):
        sampler = ClipSampler(0, 8, 1, "eval")
        windows = place_windows(np.zeros(100, np.int64), window, window // 4)

        def look(clips: list[list[float]], mirrored: bool) -> np.ndarray:
            return np.array([[np.mean(clip), *[(1 - np.mean(clip)) / 6] * 6] for clip in clips])

        timeline = Timeline(100, windows, sampler, lambda picture: float(picture[0, 0, 0]) / 255, look, 4)
        for number, smile in enumerate(share):
            if timeline.wants(number):
                timeline.add(number, np.full((1, 1, 3), round(255 * smile), np.uint8))
        courses[window] = timeline.probabilities()[:, 0]
    course = courses[25]
    above = times[course > (course.min() + course.max()) / 2]
    assert above[0] == pytest.approx(1.3, abs=0.5) and above[-1] == pytest.approx(2.7, abs=0.5)
    assert np.ptp(course) > 0.6 > 2 * np.ptp(courses[70])
