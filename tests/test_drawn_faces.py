"""A model of drawn faces says so: the mark goes from make_faces to lists, runs, weights, exports and predictions."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import scripts.check_list
import scripts.make_faces
from dfer.cli import UserError
from dfer.config import Config, DataConfig, ModelConfig
from dfer.lists.annotations import DRAWN, EMOTIONS, listed_faces
from dfer.lists.folds import write_folds
from dfer.lists.packing import Options, pack
from dfer.model.build import build_model
from dfer.run.checkpoint import load_checkpoint, save_checkpoint
from dfer.run.provenance import read_starts, trained_on
from dfer.run.weight_files import save_weights
from scripts import export
from tests.test_train import tiny_run


@pytest.fixture
def drawn(clips: Path, tmp_path: Path) -> Path:
    """Lists as make_faces.py writes them, of other clips."""
    shutil.copytree(clips, tmp_path / "drawn")
    for name in ("train.txt", "test.txt"):
        path = tmp_path / "drawn" / name
        path.write_text(f"# faces: {DRAWN}\n{path.read_text()}")
    return tmp_path / "drawn"


def test_make_faces_marks_its_lists(tmp_path):
    for path in scripts.make_faces.make_data_set(tmp_path, size=0.001):
        assert listed_faces(path) == DRAWN


def test_the_mark_goes_with_the_clips(drawn, clips, tmp_path):
    train = drawn / "train.txt"
    assert listed_faces(train) == DRAWN and listed_faces(clips / "train.txt") == ""
    assert scripts.check_list.main([str(train), "--write", str(tmp_path / "written.txt")]) == 0
    write_folds([train, drawn / "test.txt"], tmp_path / "folds", 3)
    pack([train], None, tmp_path / "pack", Options(), 1)
    write_folds([clips / "train.txt"], tmp_path / "others", 3)
    for path in ("written.txt", "folds/set_2_train.txt", "pack/train.txt"):
        assert listed_faces(tmp_path / path) == DRAWN, path
    assert listed_faces(tmp_path / "others" / "set_2_train.txt") == ""


def test_only_the_header_counts_and_what_cannot_be_read_is_said(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a 3 1\n# faces: drawn\n")
    assert listed_faces(path) == ""
    path.write_text("# faces: of films\na 3 1\n")
    assert listed_faces(path) == "of films"
    with pytest.raises(UserError, match="nowhere"):
        listed_faces(tmp_path / "nowhere.txt")


def test_what_is_said():
    assert "drawn faces" in trained_on(DRAWN, "lists/dfew/set_1_train.txt")
    assert trained_on("", Path("lists/a.txt")) == "trained on lists/a.txt"
    assert trained_on(None, "lists/a.txt") == "trained on lists/a.txt; whether on drawn faces was not recorded"
    assert "model card" in trained_on("", "unknown")


@pytest.mark.parametrize("faces", [DRAWN, "", None])
def test_checkpoints_weights_and_exports_keep_the_mark(tmp_path, faces):
    config = Config(
        data=DataConfig(train_list=Path("mine/train.txt"), size=32, num_segments=2),
        model=ModelConfig(backbone="test_resnet", dim=16),
    )
    model = build_model(config.model, 2)
    mark = {} if faces is None else {"faces": faces}
    state = {"step": 1, "model": model.state_dict(), "ema": None, "config": config.to_json()} | mark
    save_checkpoint(tmp_path / "run" / "checkpoints", state | {"emotions": list(EMOTIONS)})
    about = {"step": "1", "config": config.to_json(), "emotions": json.dumps(EMOTIONS)} | mark
    save_weights(tmp_path / "best_WAR.safetensors", model.state_dict(), about)
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--formats", "hub"]) == 0
    for path in (tmp_path / "run", tmp_path / "best_WAR.safetensors", tmp_path / "out"):
        assert load_checkpoint(path).get("faces") == faces, path
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("no use on real faces" in card) == (faces == DRAWN) and ("To be filled in" in card) == (faces != DRAWN)
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_a_run_records_what_it_was_trained_on(drawn, clips, tmp_path):
    for lists, want in ((drawn, DRAWN), (clips, "")):
        tiny_run(lists, tmp_path, f"run{want}")
        run = tmp_path / f"run{want}"
        assert load_checkpoint(run)["faces"] == load_checkpoint(run / "best_UAR.safetensors")["faces"] == want
        assert read_starts(run)[-1]["faces"] == want
