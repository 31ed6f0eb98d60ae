"""Weights from whoever: counted, or refused for what they are; own runs and exports wherever weights are taken."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save as save_safetensors

from dfer.cli import UserError
from dfer.config import Config, DataConfig, ModelConfig, config_from_json
from dfer.lists.annotations import EMOTIONS
from dfer.model.build import build_model
from dfer.model.pretrained import find_tensors, held_tensors, load_found
from dfer.model.start import start
from dfer.predict.predictor import Model
from dfer.run.checkpoint import load_checkpoint, load_tensors, save_checkpoint
from dfer.run.weight_files import save_weights
from dfer.state import load_trained
from scripts import evaluate, export
from scripts.export import hub_config

NAME = "test_resnet"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return timm.create_model(NAME).state_dict()


class Started:
    """A backbone that has started from a file, and what is said of that."""

    def __init__(self, name: str, path: Path | str):
        model = build_model(config := ModelConfig("mean-pool", name, f"backbone:{path}"), 1)
        self.loaded = start(model, config, 1)
        self.net = model.backbone.net


def zip_of(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def torch_file(content: object, **how: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


class Trainer:
    """Of a module that whoever opens the file does not have."""


TENSOR = {"a": torch.zeros(1000)}
NO_WEIGHTS = {
    "empty": (b"", "is empty"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s9--00.pt\n", "git annex get"),
    "dvc": (b"outs:\n- md5: 00\n  path: w.pt\n", "dvc pull"),
    "login": (b"\n<!DOCTYPE html>\n<html><title>Sign in", "is a web page"),
    "denied": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "is XML"),
    "quota": (b'{"error": "rate limit"}', "is JSON"),
    "index": (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "several files"),
    "cut zip": (torch_file(TENSOR)[:-100], "is cut off"),
    "cut pickle": (torch_file(TENSOR, _use_new_zipfile_serialization=False)[:-100], "cut off"),
    "cut safetensors": (save_safetensors(TENSOR)[:-1], "is cut off: 4,0.. of 4,0.. bytes"),
    "cut header": (save_safetensors(TENSOR)[:20], "is cut off: 20 of .* bytes or more"),
    "hole": (bytes(4096), "4,096 zeros"),
    "object": (torch_file(Trainer()), r"pickled Python objects \(tests\.test_weight_files\.Trainer\)"),
    "old object": (torch_file(Trainer(), _use_new_zipfile_serialization=False), "pickled Python objects"),
    "beside": (torch_file({"state_dict": TENSOR, "best": np.float64(3)}), "pickled Python objects"),
    "pickle": (b"\x80\x04K\x01.", "cut off, or a pickle of something else"),
    "list": (torch_file([1, 2]), "holds a list"),
    "zip": (zip_of("readme.txt"), r"zip archive of something else \(readme\.txt\)"),
    "script": (zip_of("m/data.pkl", "m/constants.pkl", "m/code/m.py"), "TorchScript"),
    "export": (zip_of("m/archive_format", "m/models/model.json"), "program of torch.export"),
    "keras": (zip_of("config.json", "model.weights.h5"), "Keras"),
    "npz": (zip_of("a.npy"), "NumPy"),
    "onnx": (b"\x08\x0a\x12\x07pytorch\x1a\x052.0.1:\xff", "ONNX"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
    "tar": (b"w.pt".ljust(257, b"\0") + b"ustar\0", "tar archive"),
    "gzip": (b"\x1f\x8b\x08\0", "gzip"),
    "text": (b"see https://example.org/weights\n", "is text"),
    "noise": (bytes(range(150, 256)), "no file of weights"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_holds_no_weights_is_called_what_it_is(tmp_path, kind):
    content, message = NO_WEIGHTS[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for load in (lambda: Started(NAME, path), lambda: load_checkpoint(path)):
        with pytest.raises(UserError, match=message) as error:
            load()
        said = str(error.value)
        assert str(path) in said and "\n" not in said and "weights_only" not in said


def test_what_is_no_file_is_named(tmp_path, capsys):
    (tmp_path / "dangling.pt").symlink_to("../blobs/0123")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    messages = {"dangling.pt": r"a link to \.\./blobs/0123, which is not there", "gone": "no such file"}
    messages |= {"loop": "Too many levels", "x" * 300: "name too long", "a\0b": "null byte", "/dev/zero": "is no file"}
    for name, message in (messages | {"empty": "a folder without weights|holds no checkpoint"}).items():
        for load in (lambda path: Started(NAME, path), load_checkpoint):
            with pytest.raises(UserError, match=message):
                load(tmp_path / name)
    (tmp_path / "empty" / "best_WAR.safetensors").touch()
    assert evaluate.main([str(tmp_path / "empty")]) == 2
    assert "holds no checkpoint, but best_WAR.safetensors, which can be given" in capsys.readouterr().err


def is_loaded(backbone: Started, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in backbone.net.state_dict().items())


PREFIXES = ("", "module.", "backbone.", "encoder.", "model.", "module.encoder_q.", "_orig_mod.module.", "net.0.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_under_any_prefix_are_loaded_and_counted(tmp_path, weights, prefix):
    named = {f"{prefix}{name}": tensor for name, tensor in weights.items()} | {"neck.weight": torch.zeros(3)}
    torch.save(
        {"epoch": 3, "state_dict": named, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, tmp_path / "w"
    )
    backbone = Started(NAME, tmp_path / "w")
    assert is_loaded(backbone, weights) and backbone.loaded.startswith(f"90 of 90 tensors of {NAME} from {tmp_path}/w")
    assert f", as state_dict.{prefix}*" in backbone.loaded


def test_the_form_of_the_file_is_of_no_matter(tmp_path, weights):
    path = tmp_path / "0123abcd"  # as a blob of a cache is called
    (tmp_path / "model.bin").symlink_to(path)
    old = {name: tensor for name, tensor in weights.items() if "num_batches" not in name}
    for content, total in (
        (save_safetensors(weights), 90),
        (torch_file(weights, _use_new_zipfile_serialization=False), 90),
        (torch_file(old), 75),  # of before batches were counted
        (torch_file({"model": {name: 2 * tensor for name, tensor in weights.items()}, "model_ema": weights}), 90),
        (torch_file({name: t.double() if t.is_floating_point() else t for name, t in weights.items()}), 90),
    ):
        path.write_bytes(content)
        for there in (path, tmp_path / "model.bin"):
            backbone = Started(NAME, there)
            assert is_loaded(backbone, weights) and backbone.loaded.startswith(f"{total} of {total} tensors")


def test_what_wraps_an_extractor_is_no_part_of_its_names(tmp_path):
    weights = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
    torch.save(weights, tmp_path / "w.pt")
    for wrapper in ("model", "body"):
        net = torch.nn.ModuleDict({wrapper: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))})
        held = held_tensors(load_tensors(tmp_path / "w.pt"))
        said = load_found(net, find_tensors(net, held), held, "w.pt", "toy")
        assert said.startswith("7 of 7 tensors of toy")
        assert torch.equal(net[wrapper][0].weight, weights["0.weight"])


def test_a_file_may_have_any_name(tmp_path, weights):
    torch.save(weights, tmp_path / "code.pt")  # which names the folder in the zip file after it
    assert is_loaded(Started(NAME, tmp_path / "code.pt"), weights)


def test_a_table_of_positions_is_resized_as_timm_does(tmp_path):
    weights = timm.create_model("test_vit", img_size=96).state_dict()
    weights["pos_embed"] = torch.full_like(weights["pos_embed"], 7.0)
    torch.save(weights, tmp_path / "vit.pt")
    backbone = Started("test_vit", tmp_path / "vit.pt")
    (table,) = (tensor for name, tensor in backbone.net.state_dict().items() if "pos_embed" in name)
    assert table.shape != weights["pos_embed"].shape and torch.allclose(table, torch.tensor(7.0))


def test_a_network_whose_extractor_has_other_names(tmp_path):
    for name in ("test_convnext", "test_vit"):
        weights = timm.create_model(name).state_dict()
        torch.save({f"encoder.{k}": v for k, v in weights.items()}, tmp_path / name)
        backbone = Started(name, tmp_path / name)
        total = len(backbone.net.state_dict())
        assert backbone.loaded.startswith(f"{total} of {total} tensors")
        plain = {k.replace(".", "_"): v for k, v in weights.items()}
        for key, tensor in backbone.net.state_dict().items():
            assert torch.equal(tensor, plain[key.removeprefix("model.").replace(".", "_")])


def test_weights_that_fit_in_part_are_refused_and_named(tmp_path, weights):
    fewer = {name: tensor for name, tensor in weights.items() if not name.startswith("layer4.0")}
    deeper = weights | {k.replace("layer4.0", f"layer4.{i}"): v for k, v in weights.items() for i in (7, 8)}
    wider = {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in weights.items()}
    odd = weights | {"conv1.0.weight": weights["conv1.0.weight"].sum(1, keepdim=True)}  # for gray images
    others = {f"features.{i}": tensor for i, tensor in enumerate(weights.values())}
    nan = weights | {"conv1.0.weight": weights["conv1.0.weight"] * torch.nan}
    for given, message in (
        (fewer, r"has \d\d of the 90 tensors of test_resnet; missing: layer4\.0\.conv1\.weight, .* and \d+ more: give"),
        (deeper, r"has 90 of the 90 tensors .* no place for: layer4\.7\.conv1\.weight"),
        (odd, r"has 89 of the 90 tensors .* of another shape: conv1\.0\.weight"),
        (wider, r"has 15 of the 90 tensors .* of another shape: conv1\.0\.weight"),
        (others, r"has 0 of the 90 tensors .*; it has features\.0, features\.1, features\.2 and \d+ more"),
        (nan, r"not finite \(conv1\.0\.weight\)"),
    ):
        torch.save(given, tmp_path / "w.pt")
        with pytest.raises(UserError, match=message) as error:
            Started(NAME, tmp_path / "w.pt")
        assert str(error.value).startswith(f"--model.init {tmp_path}/w.pt: ") and "\n" not in str(error.value)
    torch.save({k: v for k, v in weights.items() if k != "conv1.0.weight"}, tmp_path / "w.pt")
    assert "89 of 90 tensors" in (loaded := Started(NAME, tmp_path / "w.pt").loaded)
    assert loaded.endswith("; missing: conv1.0.weight; all else is fresh")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """What a run and its export leave, and their model."""
    folder = tmp_path_factory.mktemp("own")
    config = Config(
        data=DataConfig(size=32, num_segments=2, frames_per_segment=2), model=ModelConfig(backbone=NAME, dim=8)
    )
    model = build_model(config.model, 4)
    about = {"config": config.to_json(), "emotions": json.dumps(list(EMOTIONS))}
    state = {"step": 7, "model": model.state_dict(), "ema": None, "config": config.to_json()}
    save_checkpoint(folder / "run" / "checkpoints", state | {"emotions": list(EMOTIONS)})
    (state_file,) = (folder / "run" / "checkpoints").glob("*.pt")
    save_weights(folder / "run" / "best_WAR.safetensors", model.state_dict(), about)
    model.save_pretrained(folder / "export", config=hub_config(config, model))
    shutil.copy(state_file, folder / "renamed.bin")
    (folder / "linked run" / "checkpoints").mkdir(parents=True)
    for path in state_file.parent.iterdir():
        (folder / "linked run" / "checkpoints" / path.name).symlink_to(path)
    (folder / "link").symlink_to(folder / "run" / "best_WAR.safetensors")
    (folder / "linked state.pt").symlink_to(state_file)
    (folder / "snapshot").mkdir()
    (folder / "blob").write_bytes((folder / "export" / "model.safetensors").read_bytes())
    (folder / "snapshot" / "model.safetensors").symlink_to("../blob")
    shutil.copy(folder / "export" / "config.json", folder / "snapshot")
    return folder, model


@pytest.mark.parametrize("name", [
    "run", "run/checkpoints", "run/checkpoints/*.json", "run/best_WAR.safetensors", "run/checkpoints/*.pt", "link",
    "renamed.bin", "linked run", "linked run/checkpoints/*.pt", "linked state.pt", "export", "export/model.safetensors",
    "snapshot", "snapshot/model.safetensors",
])  # fmt: skip
def test_own_runs_and_exports_are_understood_wherever_weights_are_taken(own, name):
    folder, model = own
    (path,) = folder.glob(name)
    state = load_checkpoint(path)
    config = config_from_json(state["config"], path)
    assert (config.data.size, config.data.num_segments, config.data.frames_per_segment) == (32, 2, 2)
    loaded = load_trained(state, config).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    backbone = Started(NAME, path)
    assert backbone.loaded.startswith("90 of 90 tensors")
    assert all(torch.equal(v, model.backbone.net.state_dict()[k]) for k, v in backbone.net.state_dict().items())


def test_an_export_says_what_it_lacks(own, capsys, tmp_path):
    folder, _ = own
    assert evaluate.main([str(folder / "export")]) == 2
    assert "give --list" in capsys.readouterr().err
    shutil.copy(folder / "export" / "model.safetensors", tmp_path)
    assert evaluate.main([str(tmp_path / "model.safetensors")]) == 2
    assert "not a checkpoint of this project" in capsys.readouterr().err
    hub = json.loads((folder / "export" / "config.json").read_text())
    for wrong in ({}, [], hub | {"segments": 0}, hub | {"network": "ResNet"}, hub | {"classes": sorted(EMOTIONS)}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"config\.json beside it is not of python scripts|its model's classes"):
            load_checkpoint(tmp_path / "model.safetensors")


def test_an_export_is_exported_with_its_card_and_predicts(own, tmp_path):
    shutil.copytree(own[0] / "export", tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text("whose clips")
    assert export.main([str(tmp_path / "export"), "--out", str(tmp_path / "again"), "--formats", "hub"]) == 0
    assert (tmp_path / "again" / "README.md").read_text() == "whose clips"
    again, before = (load_checkpoint(tmp_path / name) for name in ("again", "export"))
    assert again["config"] == before["config"]
    assert all(torch.equal(again["model"][k], v) for k, v in before["model"].items())
    assert Model(tmp_path / "again", torch.device("cpu"), None, lambda *_: torch.zeros(0)).step == before.get("step")


def test_a_flipped_bit_in_a_copy_without_its_manifest_is_noticed(own, tmp_path):
    content = (own[0] / "renamed.bin").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(64, len(content) - 2000, 20).tolist():
        damaged = content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
        (tmp_path / "copy.pt").write_bytes(damaged)
        try:
            state = load_checkpoint(tmp_path / "copy.pt")
        except UserError:
            continue
        assert state["model"].keys() == own[1].state_dict().keys()  # a bit between the members
        assert all(torch.equal(state["model"][k], v) for k, v in own[1].state_dict().items())


def test_weights_of_something_else_are_no_checkpoint(tmp_path, weights):
    Path(tmp_path / "w.safetensors").write_bytes(save_safetensors(weights))
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        torch.save(weights, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"not a checkpoint of this project.*--model\.init"):
            load_checkpoint(path)
