"""A run goes on with the same data, wherever it lies and however it is written, and is refused with other data."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dfer.cli import UserError
from dfer.config import Config, DataConfig, LossConfig, ModelConfig, RunConfig
from dfer.lists.hashes import write_hashes
from dfer.lists.index import load_index
from dfer.losses import build_objective
from dfer.precision import Precision
from dfer.run.continuing import differences
from dfer.run.fingerprints import changes, check_data, data_fingerprints, fingerprint, relocated
from dfer.state import build_state
from tests.conftest import smooth_image

VOTES = "clip,Happy,Sad,Neutral,Angry,Surprise,Disgust,Fear\n"


def make_data(folder: Path) -> Path:
    """Five clips to train on and four to evaluate on, and votes."""
    for part, count in (("train", 5), ("test", 4)):
        for clip in range(count):
            there = folder / "faces" / part / f"{clip:03d}"
            there.mkdir(parents=True)
            for frame in range(2 + clip % 2):
                (there / f"{frame}.jpg").write_bytes(f"{part} {clip} {frame}".encode())
        rows = [f"faces/{part}/{clip:03d} {2 + clip % 2} {clip}\n" for clip in range(count)]
        (folder / f"{part}.txt").write_text("".join(rows))
        if part == "train":
            votes = [f"{row.split()[0]},{i},1,2,0,0,0,4\n" for i, row in enumerate(rows)]
            (folder / "votes.csv").write_text(VOTES + "".join(votes))
    return folder


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "job1")


def config_at(folder: Path, votes: bool = True, **data) -> Config:
    soft = folder / "votes.csv" if votes else None
    lists = {"train_list": folder / "train.txt", "val_list": folder / "test.txt"}
    return Config(data=DataConfig(**(lists | data)), loss=LossConfig(soft_labels=soft), run=RunConfig(name="a"))


def prints(config: Config) -> dict:
    train, val = (load_index(path, config.data.root) for path in (config.data.train_list, config.data.val_list))
    return data_fingerprints(train, val, build_objective(config.loss, train.records))


def saved(config: Config) -> dict:
    return {"config": config.to_json(), "data": prints(config)}


def goes_on(state: dict, config: Config) -> list[str]:
    """The lines about what is not as it was."""
    check_data(state, prints(config), config, "a", "--run.name")
    return changes(state, config, prints(config))


def refused(state: dict, config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_data(state, prints(config), config, "a", "--run.name")
    assert "\n" not in str(error.value) and "--run.name" in str(error.value)


def rewrite(path: Path, change) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def test_the_same_clips_elsewhere_go_on_and_are_named(data, tmp_path, monkeypatch):
    begun = config_at(data)
    state = saved(begun)
    assert goes_on(state, begun) == []
    there = tmp_path / "job2"
    shutil.copytree(data, there)
    now = config_at(there)
    assert differences(begun, now) == []
    (line,) = goes_on(state, now)
    assert f"--data.train-list was {data}/train.txt, is {there}/train.txt; --data.val-list was" in line
    assert "--loss.soft-labels was" in line and line.endswith("the same clips by name, label and number of frames")
    monkeypatch.chdir(there)
    assert len(goes_on(state, config_at(Path()))) == 1  # by relative paths
    (tmp_path / "mount").symlink_to(data)
    assert len(goes_on(state, config_at(tmp_path / "mount"))) == 1
    here = relocated(begun, now)
    assert here.data == now.data and dataclasses.replace(here, data=begun.data, loss=begun.loss) == begun


@pytest.mark.parametrize(
    ("base", "header", "root"),
    [("{data}/faces/", "", None), ("./faces//", "", None), ("../job1/faces/", "", None), ("", "# root: faces\n", None),
     ("", "", "faces"), ("faces/", "# root: {data}\n", None)],
)  # fmt: skip
def test_the_same_clips_written_otherwise_go_on(data, base, header, root):
    state, lists = saved(config_at(data, votes=False)), {}
    for part, key in (("train", "train_list"), ("test", "val_list")):
        lists[key] = data / f"{part} again.txt"
        text = header + (data / f"{part}.txt").read_text().replace("faces/", base)
        lists[key].write_text(text.replace("{data}", str(data)))
    lines = goes_on(state, config_at(data, votes=False, root=root and data / root, **lists))
    said = [line for line in lines if "writes the paths of its clips otherwise" in line]
    assert len(said) == (0 if base == "faces/" else 2)


def test_no_number_depends_on_the_order_of_evaluation(data):
    config = config_at(data, votes=False)
    for name in ("train.txt", "test.txt"):
        hash_list(data / name)
    state = saved(config)
    rewrite(data / "test.txt", lambda rows: rows[::-1])
    parts = [[f"{i} {j}".encode().ljust(16)[:16] for j in range(2 + i % 2)] for i in range(4)]
    write_hashes(data / "test.txt", load_index(data / "test.txt", hashed=False).records, parts[::-1])
    assert goes_on(state, config) == []


def test_a_list_of_relative_and_absolute_paths_may_move(data):
    config = config_at(data, votes=False)
    index = load_index(config.data.train_list)
    far = data.parent / "far" / "clip"
    shutil.copytree(index.records[0].path, far)
    rewrite(config.data.train_list, lambda rows: [f"{far} {rows[0].split()[-2]} {rows[0].split()[-1]}\n", *rows[1:]])
    state = saved(config)
    there = data.parent / "mount" / "of" / "another" / "disk"
    shutil.copytree(data, there)
    assert any("was" in line for line in goes_on(state, config_at(there, votes=False)))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[0]],
        lambda rows: [rows[0].replace(" 0\n", " 6\n"), *rows[1:]],
        lambda rows: [rows[0].replace("000", "001"), *rows[1:]],
    ],
)
def test_other_clips_are_refused(data, part, change):
    config = config_at(data, votes=False)
    state = saved(config)
    rewrite(data / f"{part}.txt", change)
    refused(state, config, rf"{part}\.txt: not the clips that a was {'trained' if part == 'train' else 'evaluated'} on")


def test_frames_that_came_or_went_and_another_order_of_training_are_refused(data):
    config = config_at(data, votes=False)
    state = saved(config)
    rewrite(data / "train.txt", lambda rows: rows[::-1])
    refused(
        state, config, r"train\.txt: not the clips that a was trained on so far \(names, labels or numbers of frames"
    )
    rewrite(data / "train.txt", lambda rows: rows[::-1])
    (data / "faces" / "test" / "002" / "9.jpg").touch()
    refused(state, config, r"test\.txt: not the clips that a was evaluated on so far")


def test_other_votes_are_refused_and_the_same_go_on(data):
    config = config_at(data)
    state = saved(config)
    rewrite(data / "votes.csv", lambda rows: [rows[0], *rows[:0:-1], "unused,1,0,0,0,0,0,0\n"])
    assert goes_on(state, config) == []
    refused(state, config_at(data, votes=False), "--loss.soft-labels None: not the votes that a was trained on")
    refused(saved(config_at(data, votes=False)), config, r"--loss.soft-labels .*votes\.csv: not the votes")
    rewrite(data / "votes.csv", lambda rows: [rows[0], rows[1].replace("0,0,4", "0,1,4"), *rows[2:]])
    refused(state, config, r"votes\.csv: not the votes")


def hash_list(path: Path, salt: str = "") -> None:
    index = load_index(path, hashed=False)
    parts = [[f"{salt}{i} {j}".encode().ljust(16)[:16] for j in range(n)] for i, n in enumerate(index.num_frames)]
    write_hashes(path, index.records, parts)


def test_the_hashes_beside_a_list_tell_other_bytes(data, tmp_path):
    config = config_at(data, votes=False)
    without = saved(config)
    for name in ("train.txt", "test.txt"):
        hash_list(data / name)
    state = saved(config)
    assert goes_on(state, config) == goes_on(without, config) == []
    shutil.copytree(data, tmp_path / "job2")
    assert len(goes_on(state, config_at(tmp_path / "job2", votes=False))) == 1
    for name in ("train.txt", "test.txt"):
        hash_list(data / name, salt="other")
        refused(
            state, config, rf"{name}: its clips have other bytes than when a began \(the hashes beside it changed\)"
        )
        hash_list(data / name)
    (data / "test.txt.hashes.npz").unlink()
    (line,) = goes_on(state, config)
    assert "test.txt: has no hashes beside it any more" in line


def test_a_pack_made_anew_of_other_pictures_is_refused(tmp_path):
    from scripts import pack  # it loads PyAV, which the other tests here do without

    def packed(seed: int, name: str) -> Config:
        source, rng = tmp_path / f"source {name}", np.random.default_rng(seed)
        for part in ("train", "test"):
            (source / part / "0").mkdir(parents=True)
            smooth_image(rng, 64, 64).save(source / part / "0" / "1.jpg")
            (source / f"{part}.txt").write_text(f"{part}/0 1 3\n")
        lists = [str(source / "train.txt"), str(source / "test.txt")]
        assert pack.main([*lists, "--out", str(tmp_path / name), "--workers", "1"]) == 0
        return config_at(tmp_path / name, votes=False)

    state = saved(packed(0, "pack"))
    assert len(goes_on(state, packed(0, "again"))) == 1
    refused(state, packed(1, "other"), r"train\.txt: its clips have other bytes .* \(the pack that it names changed\)")
    lines = goes_on(state, config_at(tmp_path / "source pack", votes=False))
    assert any("train.txt: its clips were read as shards so far, and are as frames now" in line for line in lines)


def test_a_run_of_an_older_version_goes_on(data, tmp_path):
    config = config_at(data)
    state = {"config": config.to_json(), "train_list": fingerprint(load_index(data / "train.txt"))}
    assert goes_on(state, config) == []
    shutil.copytree(data, tmp_path / "job2")
    (line,) = goes_on(state, config_at(tmp_path / "job2"))
    assert line.endswith("whether evaluation list and votes are the same cannot be told")
    refused(state, config_at(data, votes=False), "--loss.soft-labels None: not the votes")
    without = {"config": config_at(data, votes=False).to_json(), "train_list": state["train_list"]}
    refused(without, config, r"--loss.soft-labels .*votes\.csv: not the votes")
    rewrite(data / "train.txt", lambda rows: rows[:-1])
    refused(state, config, r"train\.txt: not the clips")


def test_the_first_weights_are_not_asked_for_again(data, tmp_path):
    small = ModelConfig(backbone="test_resnet", dim=8)
    begun = dataclasses.replace(config_at(data, votes=False), model=small)
    precision = Precision(torch.device("cpu"), None, False)
    state = build_state(begun, precision, None)
    for weights in (str(tmp_path / "gone.pt"), "timm"):
        with_weights = dataclasses.replace(begun, model=dataclasses.replace(small, init=weights))
        again = build_state(with_weights, precision, state.state_dict())
        for a, b in zip(state.model.state_dict().values(), again.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)

    def given(weights):
        return dataclasses.replace(begun, model=dataclasses.replace(small, init=weights))

    assert differences(given("w.pt"), given("moved.pt")) == []
    assert changes({"config": given("w.pt").to_json()}, given("moved.pt"), prints(begun)) == [
        "--model.init moved.pt is not read: the checkpoint has all weights"
    ]
    assert differences(given("random"), given("w.pt")) == ["--model.init was random, is a file"]
    assert differences(given("timm"), given("w.pt")) == ["--model.init was timm, is a file"]
    assert differences(given("timm"), given("auto")) == differences(given("random"), given("auto")) == []
