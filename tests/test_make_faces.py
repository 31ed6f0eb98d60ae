"""The synthetic data set: the same bytes everywhere, lists that tell the truth, and order that decides the label."""

import dataclasses
import errno
import hashlib
import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from dfer.lists.annotations import EMOTIONS
from scripts import make_faces as mf

TINY = 0.006  # 8 train and 2 test clips
GOLDEN = "b471929d2ba45480f2a8d43fd17b73fcd160018bb4d7a8a02f603bce65428769"  # of the frames that are drawn

PLANNED = {  # of what they are drawn from
    "normal": "f199733e50a36266c9620ee206a76bf582d2c5aa7d9164109ad6e8b06016aea5",
    "large": "f199733e50a36266c9620ee206a76bf582d2c5aa7d9164109ad6e8b06016aea5",  # as normal: its test list is longer
    "hard": "016d7260ea2e64f08729c16a3fc9721fd8224ba22a8dfe60b06e5f4056086be6",
}


def _digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _rows(path: Path) -> list[tuple[str, int, int]]:
    rows = (line.rsplit(" ", 2) for line in path.read_text().splitlines() if not line.startswith("# "))
    return [(name, int(frames), int(label)) for name, frames, label in rows]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faces")
    mf.make_data_set(out, TINY, seed=3)
    return out


def test_bytes_do_not_depend_on_workers_or_on_what_was_there(tiny: Path, tmp_path: Path) -> None:
    stale = tmp_path / "clips" / "00001" / "00099.jpg"
    stale.parent.mkdir(parents=True)
    for number in range(1, 100):
        stale.with_name(f"{number:05d}.jpg").write_bytes(b"old")
    mf.make_data_set(tmp_path, TINY, seed=3, workers=2)
    assert _digest(tmp_path) == _digest(tiny)


def test_seed_and_index_change_the_clip() -> None:
    clips = [mf.render_clip(mf.plan_clip(seed, index, 0, range(120)))[0] for seed, index in ((0, 1), (1, 1), (0, 2))]
    assert not np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_lists_match_frames_on_disk(tiny: Path) -> None:
    names = []
    for split, count in (("train", 8), ("test", 2)):
        rows = _rows(tiny / f"{split}.txt")
        assert Counter(label for _, _, label in rows) == +Counter(dict(enumerate(mf.class_counts(count))))
        for name, count, _ in rows:
            files = sorted(path.name for path in (tiny / name).iterdir())
            assert files == [f"{number:05d}.jpg" for number in range(1, count + 1)]
            assert cv2.imread(str(tiny / name / files[0])).shape == (224, 224, 3)
        names += [name for name, _, _ in rows]
    assert names == [f"clips/{number:05d}" for number in range(1, 11)]


def test_class_counts_are_exact() -> None:
    assert mf.class_counts(1400) == [294, 224, 322, 266, 175, 21, 98]
    assert sum(mf.CLASS_SHARES) == pytest.approx(1)
    for count in range(1, 100):
        counts = mf.class_counts(count)
        assert sum(counts) == count
        assert min(counts) >= (count >= len(EMOTIONS))
        assert np.bincount(mf.plan_labels(5, "test", count), minlength=7).tolist() == counts


def test_train_and_test_share_no_identity() -> None:
    train, test = (
        {mf.plan_clip(0, index, index % 7, mf.SPLIT_IDENTITIES[split]).identity_id for index in range(60)}
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test
    assert not set(mf.SPLIT_IDENTITIES["train"]) & set(mf.SPLIT_IDENTITIES["test"])


def test_starts_are_as_frequent_as_ends() -> None:
    joint = mf._start_shares() * np.array(mf.CLASS_SHARES)[:, None]
    np.testing.assert_allclose(joint, joint.T, atol=1e-9)
    assert np.all(np.diag(joint) == 0)


def test_turning_clips_end_in_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without distractors, the last frame shows action units of the label only and the first one those of the start.
    for name, value in {"JITTER": 0, "REST_AU": 0, "BLINKS_PER_CLIP": (0, 1)}.items():
        monkeypatch.setattr(mf, name, value)
    level = dataclasses.replace(mf.NORMAL, talking=0, flashing=0)
    scripts = [mf.plan_clip(0, index, index % 7, range(120), level) for index in range(210)]
    turning = [script for script in scripts if script.start != mf.PLAIN]
    assert 0.3 < len(turning) / len(scripts) < 0.6
    trembling = {20, 26}  # fear's tremble may silence them for a frame
    for script in turning:
        assert script.start != script.label
        for frame, emotion in ((0, script.start), (-1, script.label)):
            shown = {au for au, level in zip(mf.AUS, script.aus[frame], strict=True) if level > 1e-6}
            assert shown - trembling == set(mf.EMOTION_AUS[emotion]) - trembling
    assert all(not script.aus[0].any() for script in scripts if script.start == mf.PLAIN)


def test_drawing_is_pinned() -> None:
    clip = mf.render_clip(mf.plan_clip(0, 7, mf.FEAR, range(120)))[::8]
    assert clip.dtype == np.uint8
    assert hashlib.sha256(clip.tobytes()).hexdigest() == GOLDEN


@pytest.mark.parametrize("difficulty", mf.DIFFICULTIES)
def test_the_plan_is_pinned(difficulty: str) -> None:
    """All that is drawn from, in data sets that figures were published of."""
    digest, level = hashlib.sha256(), mf.DIFFICULTIES[difficulty]
    for index in range(1, 120):
        script = mf.plan_clip(0, index, index % 7, mf.SPLIT_IDENTITIES["train"], level)
        for part in (script.aus, script.pose, script.gain, script.noise_at, script.occluder, script.identity.rest):
            digest.update(np.rint(np.asarray(part) * 2**20).astype(np.int64).tobytes())
        digest.update(repr((script.start, script.identity_id, script.blur, script.noise)).encode())
    digest.update(repr([mf.plan_labels(0, split, count) for split, count in (("train", 1400), ("test", 350))]).encode())
    assert digest.hexdigest() == PLANNED[difficulty]


def test_the_hard_setting_is_what_it_says() -> None:
    hard, people = mf.DIFFICULTIES["hard"], mf.SPLIT_IDENTITIES["test"]
    counts = mf.class_counts(hard.test_clips, hard.test_shares)
    assert sum(counts) == 3000 and min(counts) == counts[mf.DISGUST] == 150
    scripts = [mf.plan_clip(0, index, index % 7, people, hard) for index in range(280)]
    held = [script for script in scripts if script.start == mf.HELD]
    turning = [script for script in scripts if script.start >= 0]
    assert 0.12 < len(held) / len(scripts) < 0.28  # of all
    assert 0.5 < len(turning) / (len(scripts) - len(held)) < 0.7  # of the others
    assert {script.label for script in held} == set(range(7))
    # The looks of people: an expression's action units at rest, more than any face of the normal setting has.
    rest = np.stack([script.identity.rest for script in scripts])
    assert 0.2 < (rest.max(axis=1) > mf.REST_AU).mean() < 0.95 and rest.max() <= hard.looks
    same = [script for script in scripts if script.identity_id == scripts[0].identity_id]
    assert len(same) > 1 and all(np.array_equal(script.identity.rest, same[0].identity.rest) for script in same)


def test_held_expressions_do_not_move_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JITTER": 0, "BLINKS_PER_CLIP": (0, 1)}.items():
        monkeypatch.setattr(mf, name, value)
    level = dataclasses.replace(mf.DIFFICULTIES["hard"], talking=0, flashing=0, held=0.5)
    for index in range(60):
        script = mf.plan_clip(0, index, index % 7, range(120), level)
        moved = np.ptp(script.aus, axis=0).max()
        if script.start == mf.HELD:
            assert moved == 0
            assert script.label == mf.NEUTRAL or (script.aus[0] - script.identity.rest).max() > 0.2
        elif script.label != mf.NEUTRAL:
            assert moved > 0.1


def test_difficulty_is_taken_from_the_command_line(tmp_path: Path) -> None:
    assert mf.main(["--out", str(tmp_path), "--size", "0.001", "--difficulty", "hard", "--workers", "1"]) == 0
    assert [len(_rows(tmp_path / f"{split}.txt")) for split in ("train", "test")] == [1, 3]


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_videos_hold_the_same_frames(codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    mf.make_data_set(tmp_path, 0.001, seed=1, codec=codec)
    ((name, count, label),) = _rows(tmp_path / f"train_{codec}.txt")
    script = mf.plan_clip(1, 1, label, mf.SPLIT_IDENTITIES["train"])
    with av.open(str(tmp_path / name)) as container:
        decoded = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == mf.FPS
    assert len(decoded) == count == len(script.aus)
    error = np.abs(decoded[-1].astype(int) - mf.render_clip(script)[-1].astype(int)).mean()
    assert error < 8


@pytest.mark.parametrize(
    "arguments",
    [["--size", "0"], ["--size", "x"], ["--seed", "-1"], ["--video", "gif"], ["--workers", "0"], ["--out", "FILE/x"]],
)
def test_bad_arguments_exit_with_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "FILE").write_text("not a folder")
    try:
        code = mf.main([argument.replace("FILE", str(tmp_path / "FILE")) for argument in arguments])
    except SystemExit as stop:  # of argparse
        code = stop.code
    assert code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mf, "_write_frames", full)
    assert mf.main(["--out", str(tmp_path), "--size", "0.001", "--workers", "1"]) == 2
    assert capsys.readouterr().err == f"make_faces: {tmp_path}: cannot be written: No space left on device\n"


def test_half_done_run_leaves_no_list(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mf.make_data_set(tmp_path, 0.001, seed=1)
    assert (tmp_path / "train.txt").exists()

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(mf, "_write_frames", fail)
    with pytest.raises(OSError, match="disk full"):
        mf.make_data_set(tmp_path, 0.001, seed=1)
    assert not list(tmp_path.glob("*.txt"))


def test_contact_sheet_shows_all_emotions() -> None:
    sheet = mf.contact_sheet(people=2, side=32)
    assert sheet.shape == (14 * 32, 120 + 2 * 32, 3)
