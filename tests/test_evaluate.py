"""Testing on several views of a clip: averaged in one process by hand, and by evaluate in one and in two."""

import argparse
import copy
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dali_pipes.build import build_loader
from dfer.config import Config, DataConfig, ModelConfig, RunConfig, config_from_json
from dfer.evaluation import evaluate
from dfer.lists.annotations import EMOTIONS, read_annotations
from dfer.lists.index import build_index
from dfer.model.build import build_model
from dfer.precision import Precision
from dfer.run.checkpoint import save_checkpoint
from dfer.run.distributed import World
from dfer.run.graph import WARM_UP, Graphs
from dfer.run.step import ready_to_evaluate
from scripts.evaluate import evaluated_config, main
from tests.recorded import Recorder, Refusing
from tests.test_distributed import torchrun

WORLD = World(0, 1, 0, 1, torch.device("cpu"))
FLOAT32 = Precision(torch.device("cpu"), None, True)


@pytest.fixture(scope="module")
def config(clips) -> Config:
    data = DataConfig(val_list=clips / "test.txt", size=32, num_segments=2, batch_size=2, views=2, mirror_views=True)
    return Config(data=data, model=ModelConfig(dim=16), run=RunConfig(device="cpu", amp="off"))


@pytest.fixture(scope="module")
def model(config):
    """Weights that no one trained, but that tell the clips apart."""
    torch.manual_seed(0)
    model = build_model(config.model, 2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def with_views(config: Config, views: int, mirror_views: bool) -> Config:
    data = dataclasses.replace(config.data, views=views, mirror_views=mirror_views)
    return dataclasses.replace(config, data=data)


def by_hand(config: Config, model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Clip -> the mean of its probabilities over all views."""
    loader = build_loader(config, build_index(read_annotations(config.data.val_list)), "eval", WORLD)
    found = {}
    for view in range(config.data.views * (1 + config.data.mirror_views)):
        for batch in loader(epoch=view):
            with torch.inference_mode():
                probabilities = F.softmax(model(batch.clips).logits, 1)
            for video, valid, p in zip(batch.ids.tolist(), batch.valid.tolist(), probabilities, strict=True):
                if valid:
                    found.setdefault(video, []).append(p)
    return {video: torch.stack(ps).mean(0) for video, ps in found.items()}


@pytest.mark.parametrize(("views", "mirrored"), [(1, False), (1, True), (2, False), (3, True)])
def test_probabilities_are_averaged_over_the_views_and_clips_counted_once(config, model, views, mirrored):
    config = with_views(config, views, mirrored)
    index = build_index(read_annotations(config.data.val_list))
    loader = build_loader(config, index, "eval", WORLD)
    assert loader.sampler.num_views == views * (1 + mirrored)
    want = by_hand(config, model)
    result = evaluate(model, loader, WORLD, FLOAT32)
    assert result.ids == list(range(9)) and result.confusion.total() == 9
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for video, p in zip(result.ids, result.probabilities, strict=True):
        torch.testing.assert_close(torch.tensor(p), want[video], atol=1e-6, rtol=1e-5)
        confusion[index.labels[video], want[video].argmax()] += 1
    assert torch.equal(result.confusion.counts, confusion)
    log_loss = sum(-want[v][index.labels[v]].log() for v in range(9)) / 9
    assert result.loss == pytest.approx(float(log_loss), rel=1e-4)


def test_views_differ(config, model):
    """Otherwise the tests above could not fail."""
    results = []
    for views, mirrored in ((1, False), (1, True), (2, False), (2, True)):
        wanted = with_views(config, views, mirrored)
        index = build_index(read_annotations(config.data.val_list))
        result = evaluate(model, build_loader(wanted, index, "eval", WORLD), WORLD, FLOAT32)
        results.append(torch.tensor(result.probabilities))
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-5


def test_two_processes_and_the_script_average_alike(config, model, tmp_path):
    saved = with_views(config, 1, False)  # the flags say what the run did not
    trained(saved, model, tmp_path)
    done = torchrun(2, "scripts/evaluate.py", str(tmp_path), "--views", "2", "--mirror-views",
                    "--device", "cpu", "--json", "--out", str(tmp_path / "p.csv"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["clips"] == 9 and sum(map(sum, numbers["confusion"])) == 9
    want = by_hand(config, model)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for video, row in enumerate(rows):
        found = torch.tensor([float(row[f"p_{e}"]) for e in EMOTIONS])
        torch.testing.assert_close(found, want[video], atol=2e-6, rtol=0)
        assert int(row["prediction"]) == int(want[video].argmax())


def trained(config: Config, model: torch.nn.Module, folder: Path) -> Path:
    """The folder of a run that has such a model."""
    state = {"model": model.state_dict(), "ema": None, "config": config.to_json(), "emotions": list(EMOTIONS)}
    save_checkpoint(folder / "checkpoints", state | {"step": 1})
    return folder


def test_batches_are_graphs_of_the_same_bits_and_a_capture_that_fails_is_said(
    config, model, tmp_path, capsys, monkeypatch
):
    """The last batch is padded, as in training; of another number of segments there is another graph."""
    run, found = str(trained(with_views(config, 1, False), model, tmp_path / "run")), []
    refusing = Refusing(lambda: list(model.state_dict().values()), "_softmax", 1)
    for backend in (None, recorder := Recorder(), refusing):
        monkeypatch.setattr("scripts.evaluate.build_graphs", lambda run, world, backend=backend: Graphs(backend))
        assert main([run, "--device", "cpu", "--out", str(tmp_path / "p.csv")]) == 0
        said = capsys.readouterr().err
        assert ("--run.graph: an evaluated batch cannot be captured (" in said) == (backend is refusing)
        found.append((tmp_path / "p.csv").read_bytes())
    assert found[0] == found[1] == found[2] and found[0].count(b"\n") == 10
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (WARM_UP, 1, 3)  # of two clips, nine in all
    monkeypatch.setattr("scripts.evaluate.build_graphs", lambda run, world: Graphs(recorder))
    assert main([run, "--device", "cpu", "--segments", "1", "2"]) == 0
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (3 * WARM_UP, 3, 9)


def test_a_model_is_made_ready_for_a_gpu_as_training_makes_it(config, model, monkeypatch):
    """And on a CPU stays what it was, but for the diagnostics that evaluation drops."""
    monkeypatch.setattr("dfer.run.step.why_not", lambda device, dtype: None)
    monkeypatch.setattr("dfer.run.step.trouble", lambda device, operands: "they burn")
    run = dataclasses.replace(config.run, fused="both")
    for device, crf, kind in (("cpu", "triton", "BatchNorm2d"), ("cuda", "dense", "FusedNorm")):
        ours = copy.deepcopy(model)
        ours.crf.backend = "triton"
        where = torch.device(device)
        notes = ready_to_evaluate(ours, run, FLOAT32._replace(device=where), dataclasses.replace(WORLD, device=where))
        kinds = {type(m).__name__ for m in ours.modules()}
        assert kind in kinds and ours.crf.backend == crf and not ours.crf.diagnosed
        assert notes == ["--model.crf-backend triton: they burn; dense is taken"] * (device == "cuda")
        weight = next(w for w in ours.parameters() if w.dim() == 4 and w.shape[2] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")


@pytest.mark.gpu
def test_on_a_gpu_a_graph_with_fused_layers_predicts_as_torchs_operators(config, model, tmp_path):
    config, found = with_views(config, 2, True), []
    for graph, fused, crf in (("off", "off", "dense"), ("on", "both", "triton")):
        run = dataclasses.replace(config.run, device="cuda", graph=graph, fused=fused)
        other = dataclasses.replace(config, run=run, model=dataclasses.replace(config.model, crf_backend=crf))
        assert main([str(trained(other, model, tmp_path / graph)), "--out", str(tmp_path / "p.csv")]) == 0
        with open(tmp_path / "p.csv", newline="") as file:
            found.append(torch.tensor([[float(row[f"p_{e}"]) for e in EMOTIONS] for row in csv.DictReader(file)]))
    torch.testing.assert_close(*found, atol=5e-3, rtol=0)  # of TF32


def test_the_runs_own_list_is_read_as_the_run_reads_it(config, tmp_path):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="frames", root=tmp_path))
    same = ("list", "root", "batch_size", "views", "mirror_views", "amp")
    args = argparse.Namespace(device="cpu", **dict.fromkeys(same))
    data = evaluated_config(config, args).data
    assert data == config.data
    args.list = tmp_path / "other.txt"
    data = evaluated_config(config, args).data
    assert (data.source, data.root, data.val_list) == ("auto", None, args.list)


def test_videos_are_decoded_as_the_run_did_and_of_an_export_by_the_cores(config, tmp_path):
    """An export's file has no decoder, as files of runs that knew none but NVDEC have none."""
    args = argparse.Namespace(
        list=tmp_path / "a.txt", root=None, device="cpu", batch_size=None, views=None, mirror_views=None, amp=None
    )
    for preset, decoder in (("faces", "nvdec"), ("exported", "cores")):
        text = json.dumps({"preset": preset, "data": {"size": 48, "train_list": "a", "val_list": "b"}})
        saved = config_from_json(text, tmp_path)
        assert saved.data.video_decoder == "nvdec"
        assert evaluated_config(saved, args).data.video_decoder == decoder


@pytest.mark.parametrize(
    "words", [("--batch-size", "0"), ("--batch-size", "-3"), ("--views", "0"), ("--segments", "0")]
)
def test_what_cannot_be_is_one_line(words, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), *words])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"evaluate: argument {words[0]}: '{words[1]}'")
    assert main([str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.startswith("evaluate: ")


def test_predictions_are_of_one_number_of_segments(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--segments", "4", "8", "--out", str(tmp_path / "p.csv")])
    assert stop.value.code == 2 and "one number of --segments" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["no/p.csv", ".", "n" * 300])
def test_where_it_is_to_write_is_looked_at_first(out, capsys, tmp_path):
    """Before the checkpoint, which is not there either."""
    assert main([str(tmp_path / "gone"), "--out", str(tmp_path / out)]) == 2
    line = capsys.readouterr().err
    assert str(tmp_path / out) in line and "gone" not in line and line.count("\n") == 1


def test_the_file_is_kept_before_anything_is_told(config, model, tmp_path, monkeypatch):
    state = {"model": model.state_dict(), "ema": None, "config": config.to_json(), "emotions": list(EMOTIONS)}
    save_checkpoint(tmp_path / "checkpoints", state | {"step": 1})

    def deaf(*_):
        raise BrokenPipeError

    monkeypatch.setattr("scripts.evaluate.print_result", deaf)
    with pytest.raises(BrokenPipeError):
        main([str(tmp_path), "--device", "cpu", "--out", str(tmp_path / "p.csv")])
    assert (tmp_path / "p.csv").read_text().count("\n") == 10
