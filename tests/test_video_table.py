"""Videos of many kinds give what tests/video_table.py wants of them, and the same to all that reads videos."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dfer.lists.index import ClipIndex, load_index
from dfer.plan.sampling import ClipSampler
from dfer.predict.inputs import read_pictures
from dfer.video.decode import VIDEO_ERRORS, decode, plain_pixels
from dfer.video.random_access import read_frames, scan_video
from scripts import prepare_videos
from tests.test_dali_pipes import SIZE, T, check_against_oracle
from tests.video_table import Found, Row, examine, make_all, outcome, problem, rows

FEW = [  # (codec, container, oddity)
    ("h264", "mp4", ""),
    ("vp9", "mp4", "turned"),
    ("h264", "mp4", "turned, pixels 2:1"),
    ("mjpeg", "avi", "odd sides"),
    ("h264", "mp4", "PQ"),
    ("h264", "mkv", "longer subtitles"),
    ("vp9", "webm", "header claims more"),
    ("h264", "mp4", "header claims more"),
    ("h264", "ts", "joined, sound"),
    ("webp", "webp", "animated"),
    ("vp9", "webm", "cut, header claims more"),
    ("h264", "mkv", "cut between frames"),
    ("h264", "ts", "a part is missing"),
]


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def videos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Row, Path, Found]]:
    table = [row for row in rows() if request.param == "all" or row[:3] in FEW]
    assert len(table) == len(FEW) or (request.param == "all" and len(table) > 150)
    paths = make_all(tmp_path_factory.mktemp("table"), table)
    return [(row, path, examine(row, path)) for row, path in zip(table, paths, strict=True)]


def test_the_table_is_as_it_says(videos: list[tuple[Row, Path, Found]]) -> None:
    wrong = [f"{row[:3]}: {problem(row, found)}" for row, _, found in videos if problem(row, found)]
    assert not wrong, "\n".join(wrong)
    assert all(outcome(found).startswith("refused") == bool(row.refusal) for row, _, found in videos)


def test_what_is_refused_is_refused_by_the_trainer_as_well(videos: list[tuple[Row, Path, Found]]) -> None:
    """At the latest when its frames are read, as damage shows by decoding only."""
    for row, path, found in videos:
        assert "matrix" not in row.refusal or re.search(row.refusal, found.scan_refusal)  # which the first frame shows
        if row.refusal:
            with pytest.raises(VIDEO_ERRORS):
                scan = scan_video(path)
                read_frames(path, scan.pts, scan.key, np.arange(len(scan.pts)), scan.matrix, scan.full_range)
                pytest.fail(f"{row[:3]} was read")


def listed(videos: list[tuple[Row, Path, Found]], name: str) -> ClipIndex:
    """The index of the videos that are to be read."""
    text = "".join(f"{path.name} {len(row.numbers)} 0\n" for row, path, _ in videos if not row.refusal)
    list_path = videos[0][1].parent / name
    list_path.write_text(text)
    return load_index(list_path)


def as_stored(index: ClipIndex, video: int) -> list[np.ndarray]:
    return [np.asarray(image) for _, image in decode(index.records[video].path, square=False)]


def loader(index: ClipIndex, **options: object) -> ClipLoader:
    return ClipLoader(index, ClipSampler(0, T, mode="eval"), LoaderOptions(4, SIZE, **options))


def test_the_trainer_reads_the_frames_that_a_player_shows(videos: list[tuple[Row, Path, Found]]) -> None:
    # Chroma is upsampled otherwise, and colours are clamped later: edges of black and white show it. Of interlaced
    # pictures `decode` upsamples each field by itself, which the trainer does not.
    index = listed([row for row in videos if row[0].oddity != "interlaced"], "all.txt")
    assert index.num_miscounted() == 0
    check_against_oracle(loader(index), 0, lambda video: as_stored(index, video), worst=45, mean=0.5)


@pytest.mark.parametrize("decoder", ["cores", "nvdec"])
def test_the_graph_of_a_gpu_shows_them_all(videos: list[tuple[Row, Path, Found]], decoder: str) -> None:
    """What DALI cannot decode, or would show otherwise, the cores decode, in the same batches."""
    index = listed([row for row in videos if row[0].oddity != "interlaced"], "all.txt")
    ours = loader(index, graph="operators", video_decoder=decoder)
    check_against_oracle(ours, 0, lambda video: as_stored(index, video), worst=45, mean=0.5)
    by_dali = [index.records[video] for video in range(len(index)) if ours._source.is_for_nvdec(video)]
    assert all(plain_pixels(record.path) in ("yuv420p", "yuvj420p") for record in by_dali)
    assert (len(by_dali) > 0) == (decoder == "nvdec") and len(by_dali) < len(index)


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["cores", "nvdec"])
def test_a_gpu_shows_them_all(videos: list[tuple[Row, Path, Found]], decoder: str) -> None:
    index = listed([row for row in videos if row[0].oddity != "interlaced"], "all.txt")
    ours = loader(index, device="gpu", device_id=0, video_decoder=decoder)
    check_against_oracle(ours, 0, lambda video: as_stored(index, video), worst=45, mean=0.5)


def test_preparing_and_predicting_read_the_same(videos: list[tuple[Row, Path, Found]], tmp_path: Path) -> None:
    listing = tmp_path / "videos.txt"
    listing.write_text("".join(f"{path}\n" for _, path, _ in videos))
    options = ["--out", str(tmp_path), "--no-crop", "--unlabelled", "--workers", "1"]
    assert prepare_videos.main([str(listing), *options]) == 1
    with open(tmp_path / "report.csv", newline="") as file:
        report = list(csv.DictReader(file))
    for (row, path, found), line in zip(videos, report, strict=True):
        if row.refusal:
            assert line["outcome"].startswith(f"failed: {found.refusal}") and line["clips"] == ""
            with pytest.raises(VIDEO_ERRORS):
                list(read_pictures(path, 25.0))
            continue
        assert (line["outcome"], line["notes"]) == ("ok", "; ".join(found.notes))
        written = sorted((tmp_path / line["clips"]).iterdir())
        assert len(written) == len(row.numbers) == len(list(read_pictures(path, 25.0)))
        with Image.open(written[0]) as image:
            assert image.size == row.size[::-1]
