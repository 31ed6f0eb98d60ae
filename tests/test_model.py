import pytest
import torch

from dfer.config import ModelConfig
from dfer.model import DFERNet, MeanPoolNet
from dfer.model.backbone import FrameBackbone
from dfer.model.build import build_model
from dfer.model.pyramid import upsample_aligned


@pytest.fixture(scope="module")
def model() -> DFERNet:
    torch.manual_seed(0)
    model = DFERNet(4, dim=64, dropout=0.0)
    for parameter in model.crf.parameters():  # away from its identity at the start, so that the CRF takes part
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@torch.inference_mode()
def test_a_clip_does_not_depend_on_its_batch_mates(model):
    clips = torch.randn(3, 4, 3, 64, 64)
    together = model(clips)
    for i in range(3):
        alone = model(clips[i : i + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.marginals[0], together.marginals[i], atol=1e-5, rtol=1e-5)
    swapped = model(torch.cat([clips[:1], torch.randn(2, 4, 3, 64, 64)]))
    torch.testing.assert_close(swapped.logits[0], together.logits[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_order_matters_to_the_model_and_not_to_the_baseline(model):
    clips = torch.randn(2, 4, 3, 64, 64)
    backwards = clips.flip(1)
    assert (model(clips).logits - model(backwards).logits).abs().max() > 1e-4
    baseline = MeanPoolNet().eval()
    torch.testing.assert_close(baseline(clips).logits, baseline(backwards).logits, atol=1e-5, rtol=1e-5)


BASELINES = ["mean-pool", "r18-lstm", "r18-gru", "r3d-18", "st-former"]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name):
    """A clip counts by itself, for any number of frames; order matters to all but the mean; every parameter learns."""
    torch.manual_seed(0)
    net = build_model(ModelConfig(name=name, backbone="test_resnet", dropout=0.0), 4).eval()
    clips = torch.randn(2, 4, 3, 32, 32)
    prediction = net(clips)
    assert prediction.logits.shape == (2, 7) and prediction.marginals is None and prediction.diagnostics == {}
    torch.testing.assert_close(net(clips[1:]).logits, prediction.logits[1:], atol=1e-5, rtol=1e-4)
    assert (prediction.logits[0] - prediction.logits[1]).abs().max() > 1e-3
    moved = (net(clips.flip(1)).logits - prediction.logits).abs().max()
    assert moved < 1e-5 if name == "mean-pool" else moved > 1e-4
    prediction.logits[:, 0].sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert all(net(torch.randn(1, frames, 3, 48, 32)).logits.isfinite().all() for frames in (1, 7))


def test_sizes_of_the_baselines():
    """Former-DFER's paper has 18 M; the others are ResNet18's 11.2 M (Tran et al.: 33.2 M in 3-D) and their layer."""
    with torch.device("meta"):
        nets = {name: build_model(ModelConfig(name=name), 16) for name in BASELINES}
    millions = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in nets.items()}
    want = {"mean-pool": 11.18, "r18-lstm": 13.28, "r18-gru": 12.76, "r3d-18": 33.17, "st-former": 18.04}
    assert millions == pytest.approx(want, abs=0.01)


def test_frames_of_training_keep_their_positions():
    """The interpolation for another number of frames is exact for that of training."""
    torch.manual_seed(0)
    net = build_model(ModelConfig(name="st-former", backbone="test_resnet"), 5)
    table = torch.nn.functional.interpolate(net.frames, size=5, mode="linear", align_corners=True)
    assert torch.equal(table, net.frames)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "r3d-18", "weights": "timm"}, "--model.weights: r3d-18 has no backbone of timm"),
        (
            {"name": "st-former", "backbone": "test_convnext"},
            "--model.backbone test_convnext: st-former takes a ResNet",
        ),
    ],
)
def test_what_a_baseline_cannot_take_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**model), 4)


@pytest.mark.parametrize("readout", ["none", "labels", "value", "both"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_every_parameter_learns_in_every_variant(readout, iterations):
    torch.manual_seed(0)
    model = DFERNet(4, dim=32, readout=readout, iterations=iterations)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the CRF's readout starts at zero: what feeds it learns from the second step on
        optimizer.zero_grad()
        prediction = model(torch.randn(2, 4, 3, 48, 48))
        (prediction.logits[:, 0].sum() - prediction.marginals[:, 1].sum()).backward()
        optimizer.step()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert not missing, "distributed training needs a gradient for every parameter"


@pytest.mark.parametrize("size", [32, 48, 64, 96, 112])
def test_sizes(size):
    prediction = DFERNet(2, dim=16).eval()(torch.randn(1, 2, 3, size, size))
    assert prediction.logits.shape == prediction.marginals.shape == (1, 7)
    torch.testing.assert_close(prediction.marginals.exp().sum(1), torch.ones(1))


def test_size_of_the_default_model():
    millions = sum(p.numel() for p in DFERNet(16).parameters()) / 1e6
    assert 12 < millions <= 15


@pytest.mark.parametrize(("source", "target"), [(4, 7), (7, 14), (2, 3), (1, 1), (1, 2)])
def test_upsampling_keeps_the_phase(source, target):
    ramp = torch.arange(source, dtype=torch.float32)
    grid = (10 * ramp[:, None] + ramp).expand(1, 1, source, source)
    fine = upsample_aligned(grid, (target, target))[0, 0]
    assert fine.shape == (target, target)
    positions = torch.arange(target).div(2).clamp(max=source - 1)  # fine cell i lies at i/2; beyond: the edge
    torch.testing.assert_close(fine, 10 * positions[:, None] + positions)


def test_other_backbones_and_weight_files(tmp_path):
    names = {"resnet10t": 512, "mobilenetv3_small_050": 288}
    for name, channels in names.items():
        assert FrameBackbone(name).channels[-1] == channels
    source = FrameBackbone("resnet18")
    torch.save(source.net.state_dict(), tmp_path / "weights.pt")
    loaded = FrameBackbone("resnet18", str(tmp_path / "weights.pt"))
    for (name, a), (_, b) in zip(source.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [("resnet19", None, "timm has no such model"), ("resnet18", "nowhere.pt", "nowhere.pt: no such file")],
)
def test_bad_backbones_are_one_line(name, weights, message):
    with pytest.raises(ValueError, match=message) as error:
        FrameBackbone(name, weights)
    assert "\n" not in str(error.value)


def test_garbage_weights_are_one_line(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match=r"--model.weights .*weights\.pt"):
        FrameBackbone("resnet18", str(tmp_path / "weights.pt"))


def test_weights_out_of_reach_are_said_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ValueError, match="cannot be reached"):
        FrameBackbone("resnet18", "timm")
