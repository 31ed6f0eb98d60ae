"""What leaves the repository computes what the model computes, and says what it is."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Literal

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dfer.config import Config, DataConfig, ModelConfig, config_from_json
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet
from dfer.model.build import build_model
from dfer.model.dfernet import Prediction
from dfer.model.temporal import RecurrentBlock, TemporalBlock
from dfer.run.checkpoint import load_checkpoint, save_checkpoint
from dfer.run.predictions import Predictions
from dfer.state import load_weights
from scripts import export

pytestmark = pytest.mark.usefixtures("exports_as_outside")
SIZE, NUM_FRAMES = 32, 4


def a_run(folder: Path, **model) -> nn.Module:
    """A run's folder with one checkpoint; its model, away from where it starts."""
    data = DataConfig(train_list=Path("data/faces/train.txt"), size=SIZE, num_segments=NUM_FRAMES)
    config = Config(data=data, model=ModelConfig(backbone="test_resnet", **{"dim": 16, **model}))
    torch.manual_seed(0)
    net = build_model(config.model, NUM_FRAMES).eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1
    state = {"step": 20, "model": net.state_dict(), "ema": None, "config": config.to_json()}
    save_checkpoint(folder / "checkpoints", state | {"emotions": list(EMOTIONS)})
    (folder / "config.json").write_text(config.to_json())
    (folder / "metrics.jsonl").write_text("")
    return net


@pytest.fixture
def exports_as_outside(monkeypatch):
    """Symbols that stand for any number are no numbers to the checkers of signatures; and where somebody listens to
    all loggers, as pytest does, torch writes down every step of an export, which takes five times as long.
    """
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def run_export(*words: str) -> int:
    return export.main(list(words))


def random_clips(batch: int, num_frames: int) -> Tensor:
    return torch.randn(batch, num_frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch + num_frames))


def test_onnx_without_its_packages_is_one_line_and_the_rest_goes_without(tmp_path, monkeypatch, capsys):
    a_run(tmp_path / "run", iterations=1)
    monkeypatch.setattr(export, "missing_packages", lambda *names: list(names))
    assert run_export(str(tmp_path / "run"), "--out", str(tmp_path / "out")) == 2
    line = "export: --formats onnx: not installed: pip install onnx onnxscript onnxruntime; or --formats hub pt2\n"
    assert capsys.readouterr().err == line and not (tmp_path / "out").exists()
    assert run_export(str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--formats", "hub") == 0


def test_the_folder_is_the_model(tmp_path, capsys):
    net = a_run(tmp_path / "run", iterations=1)
    out = tmp_path / "made" / "out"
    assert run_export(str(tmp_path / "run"), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    names = {"README.md", "config.json", "model.safetensors", "model.pt2", "model.onnx"}
    assert {p.name for p in out.iterdir()} == names and not list(out.parent.glob("*partial*"))
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in out.iterdir())

    again = DFERNet.from_pretrained(out).eval()
    program = torch.export.load(out / "model.pt2").module()
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[2:]) == ("clips", "tensor(float)", [3, SIZE, SIZE])
    with torch.no_grad():
        for shape in ((1, 4), (3, 4), (2, 9), (5, 2), (1, 3)):
            clips = random_clips(*shape)
            want = net(clips).logits
            assert torch.equal(again(clips).logits, want)
            assert (program(clips) - want).abs().max() < 1e-4
            assert np.abs(session.run(["logits"], {"clips": clips.numpy()})[0] - want.numpy()).max() < 1e-4
        moved = net(random_clips(2, 4)).logits
        assert (moved[0] - moved[1]).abs().max() > 1e-2  # it is a model that tells clips apart

    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == list(EMOTIONS) and config["size"] == SIZE and config["num_frames"] == NUM_FRAMES
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in metadata.items()} == config
    assert "equal to the bit" in printed and printed.count("on 20 shapes") == 2 and "Loading" not in printed


@pytest.mark.parametrize(
    "model",
    [
        {"name": "mean-pool"},
        pytest.param({"name": "r18-lstm"}, marks=pytest.mark.slow),
        pytest.param({"name": "r18-gru"}, marks=pytest.mark.slow),
        pytest.param({"name": "st-former"}, marks=pytest.mark.slow),
        pytest.param({"crf": "messages"}, marks=pytest.mark.slow),
        pytest.param({"readout": "none", "iterations": 0}, marks=pytest.mark.slow),
    ],
)
def test_other_models_too(tmp_path, capsys, model):
    net = a_run(tmp_path / "run", **model)
    assert run_export(str(tmp_path / "run"), "--out", str(tmp_path / "out")) == 0
    again = type(net).from_pretrained(tmp_path / "out").eval()
    assert isinstance(again, DFERNet) == ("name" not in model)
    assert config_from_json(load_checkpoint(tmp_path / "out")["config"], tmp_path).model.name == model.get(
        "name", "dfernet"
    )
    with torch.no_grad():
        assert torch.equal(again(random_clips(2, 4)).logits, net(random_clips(2, 4)).logits)
    assert capsys.readouterr().out.count("on 20 shapes") == 2


class OfPixels(nn.Module):
    """A recurrent network that reads the pixels of the frames."""

    def __init__(self, unit: Literal["gru", "lstm"]):
        super().__init__()
        self.recurrent = RecurrentBlock(3 * 4 * 4, 5, unit)

    def forward(self, clips: Tensor) -> Prediction:
        return Prediction(self.recurrent(clips.flatten(2)), None, {})


@pytest.mark.parametrize("unit", ["gru", "lstm"])
def test_a_program_with_a_recurrent_network_takes_any_number_of_frames(tmp_path, unit):
    torch.manual_seed(0)
    model = OfPixels(unit)
    program = export.exported(model, 4, 4)
    torch.export.save(program, tmp_path / "model.pt2")
    export.write_onnx(program, tmp_path / "model.onnx", {})
    for path in (tmp_path / "model.pt2", tmp_path / "model.onnx"):
        run = export.runner(path)
        for batch, num_frames in ((1, 4), (3, 2), (2, 33)):
            clips = torch.randn(batch, num_frames, 3, 4, 4)
            want = model(clips).logits
            torch.testing.assert_close(run(clips), want)
            assert batch == 1 or (want[0] - want[1]).abs().max() > 1e-2


def test_what_cannot_be_exported_leaves_nothing(tmp_path, capsys, monkeypatch):
    assert "halves the frames" in export.no_program(ModelConfig(name="r3d-18"))
    a_run(tmp_path / "run", crf="gaussian")
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert run_export(run, "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--formats hub" in error and not list(tmp_path.glob("out*"))
    assert run_export(run, "--out", str(out), "--formats", "hub") == 0

    (out / "mine.txt").write_text("mine")
    assert run_export(run, "--out", str(out), "--formats", "hub") == 2
    assert "exists already" in capsys.readouterr().err and (out / "mine.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert run_export(run, "--out", str(tmp_path / "link"), "--formats", "hub") == 2
    assert "exists already" in capsys.readouterr().err
    disk = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as full:
        full.setattr(DFERNet, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(disk))
        assert run_export(run, "--out", str(tmp_path / "new"), "--formats", "hub") == 2
    assert capsys.readouterr().err == f"export: --out {tmp_path}/new: cannot be written ({disk})\n"
    (tmp_path / "file").write_text("")
    assert run_export(run, "--out", str(tmp_path / "file" / "out"), "--formats", "hub") == 2
    assert "cannot be made" in capsys.readouterr().err
    assert run_export(run, "--out", str(tmp_path / ("a" * 300)), "--formats", "hub") == 2
    assert "cannot be made (File name too long)" in capsys.readouterr().err
    assert run_export(str(tmp_path / "gone"), "--out", str(tmp_path / "new")) == 2
    assert not (tmp_path / "new").exists()


def test_a_program_that_differs_is_not_written(tmp_path, capsys, monkeypatch):
    a_run(tmp_path / "run", name="mean-pool")  # the quickest to export

    def off_by_a_little(path: Path):
        program = runner(path)
        return lambda clips: program(clips) + 2e-4

    runner = export.runner
    monkeypatch.setattr(export, "runner", off_by_a_little)
    assert run_export(str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--formats", "pt2") == 2
    assert "model.pt2 differs from the model by 0.0002" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_the_card_says_what_is_known_and_what_is_not():
    labels = np.array([0] * 40 + [1] * 10)
    predicted = np.array([0] * 30 + [1] * 20)
    predictions = Predictions([""] * 50, labels, predicted, np.full((50, 7), 1 / 7))
    config = Config(model=ModelConfig(backbone="test_resnet", dim=16))
    hub = export.hub_config(config, build_model(config.model, 4))

    def card(train_list: str, predictions: Predictions | None = predictions) -> str:
        data = dataclasses.replace(config.data, train_list=Path(train_list))
        text = export.model_card(dataclasses.replace(config, data=data), hub, "fold1", predictions)
        assert "$" not in text and text.startswith("---\n")
        return text

    dfew = card("lists/dfew/set_1_train.txt")
    assert "license: other\nlicense_name: dfew-agreement" in dfew and "may not be redistributed" in dfew
    assert "WAR 80.00 %, UAR 87.50 %" in dfew
    assert "| Happy | 40 | 75.0 % | 59.8 to 85.8 % |" in dfew and "| Fear | 0 | - | - |" in dfew
    assert "license: mit\n" in card("data/faces/train.txt") and "of no use on real faces" in card(
        "data/faces/train.txt"
    )
    mine = card("mine/train.txt", None)
    assert "To be filled in by whoever publishes it" in mine and "license_name: unknown" in mine
    assert "Not evaluated" in mine and "mine" not in mine.split("## Training data")[0].replace("determine", "")


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8, 16, 31])
def test_positions_of_other_numbers_of_frames_lie_on_the_same_course(num_frames):
    block = TemporalBlock(4, 8)
    trained = block.position.detach().numpy()
    at = np.linspace(0, 7, num_frames)
    want = np.stack([np.interp(at, np.arange(8), trained[:, k]) for k in range(4)], axis=1)
    got = block.positions(num_frames)
    assert np.allclose(got.detach().numpy(), want, atol=1e-6)
    if num_frames == 8:
        assert got is block.position


def test_weights_of_another_version_are_named(tmp_path):
    net = a_run(tmp_path / "run")
    weights = net.state_dict()
    weights["crf.old.weight"] = weights.pop("crf.project.weight")
    weights["head.0.weight"] = weights["head.0.weight"][:-1]
    with pytest.raises(ValueError, match="another version of the model") as error:
        load_weights(net, weights)
    text = str(error.value)
    assert "lacks crf.project.weight" in text and "crf.old.weight" in text and "another shape head.0.weight" in text
    assert "\n" not in text
