"""What a model starts from: own runs and exports, files of backbones, the hub; frozen parts and stochastic depth."""

import copy
import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch

from dfer import cli
from dfer.cli import UserError
from dfer.config import Config, DataConfig, ModelConfig, OptimConfig, config_from_json, parse_config
from dfer.lists.annotations import EMOTIONS
from dfer.model import DFERNet
from dfer.model.build import build_model
from dfer.model.pretrained import some
from dfer.model.start import resolved
from dfer.precision import Precision
from dfer.run.checkpoint import load_checkpoint, save_checkpoint
from dfer.run.continuing import differences
from dfer.run.folder import started_config
from dfer.run.folds import with_one_start
from dfer.run.hub import local
from dfer.run.weight_files import save_weights
from dfer.state import TrainState, build_state, load_trained
from scripts.export import hub_config
from tests.conftest import TORCHRUN, run_python
from tests.test_train import TINY

NAME = "test_resnet"
CPU = Precision(torch.device("cpu"), None, False)
SMALL = ModelConfig(backbone=NAME, dim=8)


def configured(model: ModelConfig, num_frames: int = 2, ema: float = 0.0) -> Config:
    return Config(data=DataConfig(size=32, num_segments=num_frames), model=model, optim=OptimConfig(ema=ema))


def trained(state: TrainState) -> TrainState:
    """The state after a step that moves every weight and statistic, of the average otherwise than of the model."""
    generator = torch.Generator().manual_seed(1)
    for module in (state.model, *([state.ema] if state.ema else [])):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.05)
    return state


def run_of(folder: Path, config: Config) -> TrainState:
    """The state of a run whose checkpoint lies in the folder then."""
    state = trained(build_state(config, CPU, None))
    content = state.state_dict() | {"step": 1, "config": config.to_json(), "emotions": list(EMOTIONS)}
    save_checkpoint(folder / "checkpoints", content)
    return state


def from_(path: object, config: Config) -> TrainState:
    return build_state(dataclasses.replace(config, model=dataclasses.replace(config.model, init=str(path))), CPU, None)


@torch.no_grad()
def outputs(model: torch.nn.Module, num_frames: int = 2) -> torch.Tensor:
    clips = torch.rand(2, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return model.eval()(clips).logits


@pytest.mark.parametrize("crf", ["meanfield", "messages", "gaussian"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_starts_with_the_outputs_of_the_one_that_it_starts_from(tmp_path, crf, ema):
    config = configured(dataclasses.replace(SMALL, crf=crf), ema=ema)
    before = run_of(tmp_path, config).evaluated_model()
    after = from_(tmp_path, config)
    assert torch.equal(outputs(after.model), outputs(before))
    assert torch.equal(outputs(after.evaluated_model()), outputs(before))  # its average begins there too
    total = len(after.model.state_dict())
    where = "ema.module.*" if ema else "model.*"
    assert after.started == f"{total} of {total} tensors of the model from {tmp_path}, as {where}"


def test_an_export_starts_a_run_with_its_outputs(tmp_path):
    config = configured(SMALL)
    model = trained(build_state(config, CPU, None)).model
    model.save_pretrained(tmp_path, config=hub_config(config, model))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(outputs(from_(path, config).model), outputs(model))


@pytest.mark.parametrize("time", ["gru", "attention"])
@pytest.mark.parametrize("exported", [False, True])
def test_what_another_number_of_frames_changes_is_fitted_and_named(tmp_path, exported, time):
    """The outputs are those of the source, as it takes so many frames itself."""
    small = dataclasses.replace(SMALL, branches="static", time=time)
    before = configured(small, 3)
    model = run_of(tmp_path / "run", before).model
    if exported:
        model.save_pretrained(tmp_path / "run", config=hub_config(before, model))
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    after = from_(tmp_path / "run", configured(small, 5))
    torch.testing.assert_close(outputs(after.model, 5), outputs(model, 5))
    total = len(after.model.state_dict())
    assert after.started.startswith(f"{total} of {total} tensors of the model from ")
    fitted = "; fitted to 5 frames for 3: crf.log_sigma_appearance, crf.log_sigma_smoothness"
    if time == "attention":
        assert after.started.endswith(f"; resampled to 5 frames: temporal.0.position, temporal.1.position{fitted}")
    else:
        assert after.started.endswith(f"{fitted}; recurrent counts in 3 frames, as it was trained")


def test_the_frames_that_a_model_counts_in_go_where_its_weights_go(tmp_path):
    """From T = 3 to a run of T = 5: on resume, in its average, its best epoch, an export, and what starts from it."""
    config = configured(SMALL, 3, ema=0.9)
    source = run_of(tmp_path / "source", config).evaluated_model()
    at_five = dataclasses.replace(config, data=dataclasses.replace(config.data, num_segments=5))
    run = from_(tmp_path / "source", at_five)
    content = copy.deepcopy(run.state_dict()) | {"config": at_five.to_json(), "emotions": list(EMOTIONS)}
    save_checkpoint(tmp_path / "run" / "checkpoints", content)
    about = {"config": at_five.to_json(), "emotions": json.dumps(list(EMOTIONS))}
    save_weights(tmp_path / "best_WAR.safetensors", run.evaluated_model().state_dict(), about)
    resumed = build_state(at_five, CPU, content)
    models = [run.model, run.evaluated_model(), resumed.model, resumed.evaluated_model()]
    for path in (tmp_path / "run", tmp_path / "best_WAR.safetensors"):
        state = load_checkpoint(path)
        trained_model = load_trained(state, config_from_json(state["config"], path))
        models += [trained_model, from_(path, configured(SMALL, 7)).model]
    trained_model.save_pretrained(tmp_path / "export", config=hub_config(at_five, trained_model))
    models += [DFERNet.from_pretrained(tmp_path / "export"), from_(tmp_path / "export", configured(SMALL, 2)).model]
    for num_frames in (3, 5):
        for model in models:
            torch.testing.assert_close(outputs(model, num_frames), outputs(source, num_frames))
    # An average moves weights, and no number of frames.
    for seed in range(2):
        a_step(resumed, seed)
    assert {m.recurrent.num_frames for m in (resumed.model, resumed.evaluated_model())} == {3}


def test_weights_of_before_count_in_the_frames_of_their_run(tmp_path):
    config = configured(SMALL, 3)
    state = trained(build_state(config, CPU, None))
    old = state.state_dict() | {"config": config.to_json(), "emotions": list(EMOTIONS)}
    del old["model"]["recurrent.num_frames"]
    save_checkpoint(tmp_path / "checkpoints", old)
    for model in (
        load_trained(old, config),
        build_state(config, CPU, old).model,
        from_(tmp_path, configured(SMALL, 5)).model,
    ):
        assert model.recurrent.num_frames == 3
        torch.testing.assert_close(outputs(model, 4), outputs(state.model, 4))
    plain = {name: tensor for name, tensor in old["model"].items() if not name.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "weights.pt")
    after = from_(tmp_path / "weights.pt", configured(SMALL, 5))
    assert after.model.recurrent.num_frames == 5
    assert after.started.endswith("; it does not say of how many frames: taken for 5")


def test_a_model_of_single_frames_tells_nothing_of_time(tmp_path):
    attention = dataclasses.replace(SMALL, time="attention")
    state = run_of(tmp_path, configured(attention, 1))
    after = from_(tmp_path, configured(attention, 4)).model
    assert all(torch.equal(row, after.temporal[0].position[0]) for row in after.temporal[0].position)
    assert torch.equal(after.crf.log_sigma_appearance, state.model.crf.log_sigma_appearance)
    run_of(tmp_path / "gru", configured(SMALL, 1))
    assert from_(tmp_path / "gru", configured(SMALL, 4)).model.recurrent.num_frames == 4


def test_options_that_change_what_the_same_weights_do_are_named(tmp_path):
    run_of(tmp_path, configured(dataclasses.replace(SMALL, dynamic="first", iterations=2, dropout=0.5)))
    after = from_(tmp_path, configured(SMALL))
    said = "; its options were others: --model.dynamic was first, is deviation, --model.iterations was 2, is 3"
    assert after.started.endswith(said)


def test_the_head_of_other_classes_stays_fresh_and_is_named(tmp_path):
    other = build_model(SMALL, 2, num_classes=8).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in other.items()}}, tmp_path / "w.pt")
    after, fresh = from_(tmp_path / "w.pt", configured(SMALL)), build_state(configured(SMALL), CPU, None).model
    classes = [name for name, tensor in fresh.state_dict().items() if tensor.shape != other[name].shape]
    assert len(classes) == 6
    total = len(other) - len(classes)
    assert after.started.startswith(
        f"{total} of {total} tensors of the model from {tmp_path}/w.pt, as state_dict.module"
    )
    assert f"; fresh, as it has other classes: {', '.join(sorted(classes)[:3])} and 3 more" in after.started
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name] if name in classes else other[name]), name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"dim": 16}, r"has \d+ of the \d+ tensors of the model; of another shape: .*pyramid.* was 16, is 8: it is"),
        (
            {"crf": "messages"},
            r"of another shape: crf\.readout\.weight; .*: --model\.crf was messages, is meanfield: it",
        ),
        ({"branches": "static"}, r"another shape: recurrent.*--model\.branches was static, is both: it is another"),
        (
            {"branches": "static", "time": "attention"},
            r"missing: dynamic_.*, --model\.time was attention, is gru: it is",
        ),
        ({"readout": "labels"}, r"of another shape: crf\.project.*: --model\.readout was labels, is both: it"),
    ],
)
def test_another_model_is_refused_and_its_backbone_taken_where_that_is_said(tmp_path, source, message):
    state = run_of(tmp_path, configured(dataclasses.replace(SMALL, **source)))
    with pytest.raises(UserError, match=message) as error:
        from_(tmp_path, configured(SMALL))
    said = str(error.value)
    assert said.startswith(f"--model.init {tmp_path}: ") and "\n" not in said
    assert said.endswith(f": it is another model, or not whole; backbone:{tmp_path} takes its backbone alone")
    after = from_(f"backbone:{tmp_path}", configured(SMALL))
    assert after.started == f"90 of 90 tensors of {NAME} from {tmp_path}, as model.backbone.net.*; all else is fresh"
    for name, tensor in after.model.backbone.state_dict().items():
        assert torch.equal(tensor, state.model.backbone.state_dict()[name])


def saved(path: Path, tensors: dict[str, torch.Tensor], config: Config | None = None) -> Path:
    """A file of weights, with the configuration of the run that they are from or without."""
    torch.save({"model": tensors} | ({"config": config.to_json()} if config else {}), path)
    return path


BESIDE = ("recurrent", "head", "crf", "pyramid", "fusion", "dynamic")  # the backbone


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    "lacking", ["recurrent.", "head.", "head.2.bias", "crf.log_scale", "backbone.net.bn1.w", BESIDE]
)
def test_half_a_model_is_refused(tmp_path, lacking, with_config):
    """Whatever small share it lacks. A backbone is taken alone, unless it says that it is of more."""
    config = configured(SMALL)
    whole = build_state(config, CPU, None).model.state_dict()
    half = {name: tensor for name, tensor in whole.items() if not name.startswith(lacking)}
    path = saved(tmp_path / "w.pt", half, config if with_config else None)
    if lacking is BESIDE and not with_config:
        assert from_(path, config).started.endswith("; all else is fresh")
        return
    with pytest.raises(UserError) as error:
        from_(path, config)
    said, first = str(error.value), next(name for name in whole if name not in half)
    assert f"{path}: has {len(half)} of the {len(whole)} tensors of the model; missing: {first}" in said
    assert said.endswith(f": it is another model, or not whole; backbone:{path} takes its backbone alone")


@pytest.mark.parametrize(
    ("was", "now", "fresh", "left", "option"),
    [
        ({}, {"crf": "none"}, "", "crf.", "--model.crf was meanfield, is none"),
        ({"crf": "none"}, {}, "crf.", "", "--model.crf was none, is meanfield"),
        ({"iterations": 0}, {}, "crf.a crf.c crf.log_sigma_sm", "", "--model.iterations was 0, is 3"),
        ({}, {"iterations": 0}, "", "crf.a crf.c crf.log_sigma_sm", "--model.iterations was 3, is 0"),
    ],
)
def test_what_an_option_adds_to_the_crf_or_takes_away_is_named(tmp_path, was, now, fresh, left, option):
    begun = configured(dataclasses.replace(SMALL, **was), ema=0.9)
    source = run_of(tmp_path, begun).evaluated_model().state_dict()
    config = configured(dataclasses.replace(SMALL, **now))
    after, random = from_(tmp_path, config), build_state(config, CPU, None).model.state_dict()
    new = [name for name in random if name.startswith(tuple(fresh.split()) or "-")]
    gone = [name for name in source if name.startswith(tuple(left.split()) or "-")]
    assert random.keys() - source.keys() == set(new) and source.keys() - random.keys() == set(gone)
    parts = (("fresh, as the other model has none", new), ("left behind, as this model has none", gone))
    said = "".join(f"; {what}: {some(sorted(names))}" for what, names in parts if names)
    total = len(random) - len(new)
    came = f"{total} of {total} tensors of the model from {tmp_path}, as ema.module.*"
    assert after.started == f"{came}{said}; its options were others: {option}"
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, random[name] if name in new else source[name]), name


def test_fresh_widths_in_time_are_not_fitted_to_frames_that_they_never_were_of(tmp_path):
    run_of(tmp_path, configured(dataclasses.replace(SMALL, iterations=0), 3))
    after, fresh = from_(tmp_path, configured(SMALL, 5)), build_state(configured(SMALL, 5), CPU, None)
    assert torch.equal(after.model.crf.log_sigma_smoothness, fresh.model.crf.log_sigma_smoothness)
    assert "; fitted to 5 frames for 3: crf.log_sigma_appearance; " in after.started


def test_what_no_option_explains_is_refused(tmp_path):
    """A tensor too many among those of the model's own parts; a file of weights alone does not say its options."""
    config = configured(SMALL)
    whole = build_state(config, CPU, None).model.state_dict()
    path = saved(tmp_path / "w.pt", whole | {"crf.gone": torch.zeros(1)}, config)
    with pytest.raises(UserError, match=r"which the model has no place for: crf\.gone: it is another model"):
        from_(path, config)
    saved(path, whole)
    with pytest.raises(UserError, match=r"which the model has no place for: crf\.log_sigma_smoothness"):
        from_(path, configured(dataclasses.replace(SMALL, iterations=0)))
    started = from_(path, configured(dataclasses.replace(SMALL, crf="none"))).started
    assert (
        "; left behind, as this model has none: crf.affinity, crf.coupling_logit, crf.log_scale and 9 more" in started
    )


def test_a_smaller_backbone_is_not_taken_for_a_part_of_a_larger_one(tmp_path):
    """All tensors of a ResNet18 have the names and shapes of tensors of a ResNet34, whose others would be fresh."""
    small, large = (configured(ModelConfig("mean-pool", name)) for name in ("resnet18", "resnet34"))
    path = saved(tmp_path / "w.pt", build_model(small.model, 2).state_dict(), small)
    with pytest.raises(UserError, match=r"--model\.backbone was resnet18, is resnet34: it is another model"):
        from_(path, large)


def test_a_file_of_a_backbone_gives_the_backbone_alone(tmp_path):
    """Whatever lies around it: heads, transformers, another model of ours."""
    weights = {f"s_former.{name}": tensor for name, tensor in timm.create_model(NAME).state_dict().items()}
    weights |= {"t_former.layers.0.norm.weight": torch.zeros(8), "fc.weight": torch.zeros(7, 8)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "former.pth")
    mean_pool = ModelConfig("mean-pool", NAME)
    run_of(tmp_path / "run", configured(mean_pool))
    for path in (tmp_path / "former.pth", tmp_path / "run"):
        for model in (SMALL, mean_pool):
            after, fresh = from_(path, configured(model)), build_state(configured(model), CPU, None)
            if model is mean_pool and path == tmp_path / "run":
                assert after.started.startswith("92 of 92 tensors of the model")
                continue
            assert after.started.startswith(f"90 of 90 tensors of {NAME} from {path}, as ")
            kept = {k: v for k, v in after.model.state_dict().items() if not k.startswith("backbone.")}
            assert all(torch.equal(v, fresh.model.state_dict()[k]) for k, v in kept.items())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the hub's client, and nothing behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", lambda *args, **kwargs: (_ for _ in ()).throw(OSError()))

    def put(name: str, model: torch.nn.Module, config: Config | None = None) -> None:
        repo = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c0ffee")
        folder = repo / "snapshots" / "c0ffee"
        folder.mkdir(parents=True)
        if config:
            model.save_pretrained(folder, config=hub_config(config, model))
        else:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")

    return put


def test_a_model_of_the_hub_starts_a_run_and_is_evaluated(hub):
    config = configured(SMALL)
    model = trained(build_state(config, CPU, None)).model
    hub("some.one/a-model", model, config)
    after = from_("hf:some.one/a-model", config)
    assert torch.equal(outputs(after.model), outputs(model))
    assert " of the model from hf:some.one/a-model at c0ffee, as model.*" in after.started
    state = load_checkpoint(Path("hf:some.one/a-model"))
    assert torch.equal(outputs(load_trained(state, config_from_json(state["config"], Path("x")))), outputs(model))
    net = timm.create_model(NAME)
    hub("timm/plain", net)
    assert from_("hf:timm/plain", config).started.startswith(f"90 of 90 tensors of {NAME} from ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:timm/gone", "hf:timm/gone: is not in the cache, and huggingface.co cannot be reached; give a file"),
        ("hf:gone", "hf:gone: a model of the hub is written hf:ORG/NAME"),
        ("backbone:hf:../../etc", "is written hf:ORG/NAME"),
        ("backbone:gone.pt", "gone.pt: no such file"),
        ("gone", "gone: no such file (or random, timm, auto, hf:ORG/NAME)"),
        ("hf:a--b/c", "hf:a--b/c: a model of the hub is written hf:ORG/NAME"),
        ("hf:" + "a" * 99 + "/c", "a model of the hub is written hf:ORG/NAME"),
        ("timm", "timm: huggingface.co cannot be reached to download timm/test_resnet.r160_in1k; give a file"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, name, message):
    with pytest.raises(UserError) as error:
        from_(name, configured(SMALL))
    assert str(error.value).startswith("--model.init ") and message in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_downloaded_is_one_line(hub, monkeypatch):
    def refuse(name, file):
        raise ConnectionError("the line went dead\nand more")

    monkeypatch.setattr("dfer.run.hub.out_of_reach", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"--model\.init hf:a/b: config\.json cannot be downloaded \(the line"):
        from_("hf:a/b", configured(SMALL))


def test_auto_is_saved_as_what_was_found_and_says_where_that_is_nothing(hub, capsys, monkeypatch, tmp_path):
    cli.say_once.cache_clear()
    config = parse_config(["dfew", "--model.backbone", NAME])
    assert config.model.init == parse_config(["ferv39k"]).model.init == "auto"
    assert started_config(config).model.init == "random"
    said = capsys.readouterr().err
    assert "random weights, as timm's of test_resnet cannot be had (huggingface.co cannot be reached" in said
    assert said.count("\n") == 1
    with pytest.MonkeyPatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        resolved(dataclasses.replace(config.model, backbone="resnet18"))
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert resolved(dataclasses.replace(config.model, backbone="test_vit4")).init == "random"
    with pytest.raises(UserError, match=r"--model\.freeze backbone would keep them"):
        resolved(dataclasses.replace(config.model, freeze="backbone"))
    hub("timm/test_resnet.r160_in1k", timm.create_model(NAME))
    found = started_config(config)
    assert found.model.init == "timm" and resolved(SMALL) == SMALL
    # A run that has begun is what it was, though nothing can be had by now, or all.
    words = ["dfew", "--run.log-dir", str(tmp_path), "--run.name", "seed0-fold1"]
    (tmp_path / "seed0-fold1").mkdir()
    (tmp_path / "seed0-fold1" / "metrics.jsonl").write_text("{}\n")
    for init in ("timm", "random"):
        begun = dataclasses.replace(found, model=dataclasses.replace(found.model, init=init))
        (tmp_path / "seed0-fold1" / "config.json").write_text(begun.to_json())
        for more in ([], ["--model.init", "auto"]):
            assert differences(begun, again := parse_config([*words, *more])) == []
            assert again.model.init == init
        own, told = with_one_start(config, ["--seed", "1"], tmp_path)
        assert own.model.init == init and told == ["--seed", "1", "--model.init", init]
    other, _ = with_one_start(config, [], tmp_path / "none")
    assert other.model.init == "timm"


def test_the_words_of_before_are_understood(tmp_path):
    for words, init in (
        (["--model.weights", "w.pt"], "backbone:w.pt"),
        (["--model.weights=logs/a=b"], "backbone:logs/a=b"),
        (["--model.weights", "timm"], "timm"),
        (["--model.weights", "None"], "random"),
    ):
        assert parse_config(["debug", *words]).model.init == parse_config(words).model.init == init
    with pytest.raises(UserError, match=r"--model\.weights"):
        parse_config(["debug", "--model.weights"])
    saved = json.loads(parse_config(["dfew"]).to_json())
    del saved["model"]["init"], saved["model"]["freeze"], saved["model"]["drop_path"]
    for weights, init in ((None, "random"), ("timm", "timm"), ("w.pt", "backbone:w.pt")):
        saved["model"]["weights"] = weights
        found = config_from_json(json.dumps(saved), tmp_path).model
        assert (found.init, found.freeze, found.drop_path) == (init, "none", 0.0)


# ---- Frozen, and of stochastic depth


def a_step(state: TrainState, seed: int) -> None:
    clips = torch.rand(4, 2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    state.model.train()
    state.guard.before_forward()
    state.backward(state.model(clips).logits.square().mean(), 1)
    state.guard.step(1.0)
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update_parameters(state.model)
    state.step += 1


@pytest.mark.parametrize("name", ["dfernet", "mean-pool"])
def test_a_frozen_backbone_stays_as_it_is_and_all_else_is_trained(name):
    config = configured(dataclasses.replace(SMALL, name=name, freeze="backbone"), ema=0.5)
    state = build_state(config, CPU, None)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    parameters = {name for name, _ in state.model.named_parameters()}
    for seed in range(2):
        a_step(state, seed)
    for key, value in state.model.state_dict().items():
        frozen = key.startswith("backbone.") or key == "recurrent.num_frames"
        assert torch.equal(value, before[key]) == (frozen or (key in parameters and not value.any())), key
        assert not frozen or torch.equal(value, state.ema.module.state_dict()[key])
    assert all(p.grad is None and not p.requires_grad for p in state.model.backbone.parameters())
    trained_parameters = sum(len(group["params"]) for group in state.optimizer.param_groups)
    assert trained_parameters == len([n for n in parameters if not n.startswith("backbone.")])
    # And it goes on, from what was saved, as the unbroken one does.
    again = build_state(config, CPU, copy.deepcopy(state.state_dict()))
    for each in (state, again):
        a_step(each, 7)
    for (key, a), b in zip(state.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_options_that_are_off_change_nothing_and_drop_path_draws_by_torchs_seed():
    off, on = (build_state(configured(dataclasses.replace(SMALL, drop_path=p)), CPU, None) for p in (0.0, 0.5))
    for (key, a), (other, b) in zip(off.model.state_dict().items(), on.model.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)  # no weights of its own, and none drawn otherwise
    assert torch.equal(outputs(off.model), outputs(on.model))  # in evaluation nothing is dropped
    kinds = {type(module).__name__ for module in off.model.modules()}
    assert "DropPath" not in kinds and "DropPath" in {type(module).__name__ for module in on.model.modules()}
    clips = torch.rand(2, 2, 3, 32, 32)
    trained(on).model.train()  # timm's residual branches begin at nothing

    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return on.model.backbone(clips.flatten(0, 1))[1]

    assert torch.equal(features(1), features(1)) and not torch.equal(features(1), features(2))


@pytest.mark.parametrize("name", ["vgg11", "resnet18d"])
def test_a_backbone_without_stochastic_depth_is_refused(name, monkeypatch):
    config = ModelConfig("mean-pool", name, drop_path=0.1)
    if name == "resnet18d":  # as a network that takes the word and does nothing
        monkeypatch.setattr("timm.create_model", without_depth(timm.create_model))
    with pytest.raises(UserError, match=rf"--model\.drop-path 0\.1: {name} has no stochastic depth; leave it out"):
        build_model(config, 1)


def test_what_freezing_makes_senseless_is_refused():
    for words, message in (
        (
            ["--model.init", "timm", "--model.drop-path", "0.1"],
            r"--model\.drop-path 0\.1: nothing of a frozen backbone",
        ),
        ([], r"--model\.freeze backbone: of random weights; say with --model\.init"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config([*words, "--model.freeze", "backbone"])


def without_depth(create):
    return lambda name, drop_path_rate=0.0, **options: create(name, **options)


@pytest.mark.slow
def test_the_saved_run_of_the_first_version_starts_another(tmp_path):
    """Its averaged weights are read by the names that it wrote."""
    root = Path(__file__).parent / "data"
    with tarfile.open(root / "averaged-run-of-0ce724e.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    run = tmp_path / "begun"
    state = load_checkpoint(run)
    config = config_from_json(state["config"], run)
    after = from_(f"backbone:{run}", config)
    assert after.started.startswith("80 of 80 tensors of test_efficientnet from ")
    assert after.started.endswith(", as ema.module.backbone.net.*; all else is fresh")


@pytest.mark.slow
def test_two_processes_train_beside_a_frozen_backbone(clips, tmp_path):
    run_of(tmp_path / "source", configured(ModelConfig("mean-pool", NAME)))
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    more = ("--model.backbone", NAME, "--model.freeze", "backbone", "--model.init", str(tmp_path / "source"))
    words = ("train.py", *TINY, *lists, *more, "--run.log-dir", str(tmp_path), "--run.name", "two")
    done = run_python(*TORCHRUN, "--standalone", "--nproc_per_node=2", *words)
    assert done.returncode == 0, done.stderr
    before, after = (load_checkpoint(tmp_path / name)["model"] for name in ("source", "two"))
    frozen = [name for name in after if name.startswith("backbone.")]
    assert len(frozen) == 90 and all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_baseline_has_no_options_of_the_full_model(tmp_path):
    config = configured(dataclasses.replace(SMALL, name="mean-pool"))
    run_of(tmp_path, dataclasses.replace(config, model=dataclasses.replace(config.model, branches="static")))
    assert "its options were others" not in from_(tmp_path, config).started


def test_what_describes_a_model_is_downloaded_before_its_weights(monkeypatch):
    """A model whose weights are in the cache is taken to be whole."""
    monkeypatch.setattr("dfer.run.hub.cached", lambda name: None)
    monkeypatch.setattr("dfer.run.hub.out_of_reach", lambda: None)
    asked = []

    def download(name, file):
        asked.append(file)
        return Path("there", file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert local(Path("hf:a/b")) == Path("there") and asked == ["config.json", "README.md", "model.safetensors"]
