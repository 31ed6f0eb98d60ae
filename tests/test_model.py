import json

import numpy as np
import pytest
import torch

from dfer.config import ModelConfig
from dfer.model import DFERNet, MeanPoolNet
from dfer.model import resize as resizing
from dfer.model.backbone import FrameBackbone
from dfer.model.build import build_model
from dfer.model.dfernet import motion
from dfer.model.resize import multiply, resize, resize_time, upsample_aligned, weights
from dfer.model.start import start
from dfer.model.temporal import RecurrentBlock
from tests.conftest import run_python
from tests.nursery import python_path


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
        ({"name": "r3d-18", "drop_path": 0.5}, "--model.drop-path 0.5: r3d-18 has no stochastic depth"),
        ({"name": "r3d-18", "init": "timm"}, "--model.init timm: r3d-18 has no backbone of timm"),
        (
            {"name": "st-former", "backbone": "test_convnext"},
            "--model.backbone test_convnext: st-former takes a ResNet",
        ),
    ],
)
def test_what_a_baseline_cannot_take_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        start(build_model(ModelConfig(**model), 4), ModelConfig(**model), 4)


@pytest.mark.parametrize(
    "options",
    [
        *({"readout": readout, "iterations": n} for readout in ("none", "labels", "value", "both") for n in (0, 3)),
        *({"branches": branches} for branches in ("static", "dynamic")),
        *({"dynamic": dynamic, "time": "attention"} for dynamic in ("difference", "first", "original")),
        *({"crf": crf, "crf_branch": "static"} for crf in ("none", "messages", "gaussian")),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_parameter_learns_in_every_variant(options):
    torch.manual_seed(0)
    model = DFERNet(4, backbone="resnet10t", dim=32, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the CRF's readout starts at zero: what feeds it learns from the second step on
        optimizer.zero_grad()
        prediction = model(torch.randn(2, 4, 3, 48, 48))
        loss = prediction.logits[:, 0].sum()
        (loss if prediction.marginals is None else loss - prediction.marginals[:, 1].sum()).backward()
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
    assert 12 < millions <= 25


@pytest.mark.parametrize(("source", "target"), [(4, 7), (7, 14), (2, 3), (1, 1), (1, 2)])
def test_upsampling_keeps_the_phase(source, target):
    ramp = torch.arange(source, dtype=torch.float32)
    grid = (10 * ramp[:, None] + ramp).expand(1, 1, source, source)
    fine = upsample_aligned(grid, (target, target))[0, 0]
    assert fine.shape == (target, target)
    positions = torch.arange(target).div(2).clamp(max=source - 1)  # fine cell i lies at i/2; beyond: the edge
    torch.testing.assert_close(fine, 10 * positions[:, None] + positions)


SIZES = [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7), (5, 9), (6, 12), (7, 14)]  # of 32 to 224 px


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_upsampling_by_products_is_that_by_interpolation(monkeypatch, source, target):
    """A GPU's way on the CPU: values and gradients, for maps whose sides differ too."""
    torch.manual_seed(source)
    for rows, columns in ((target, target), (target, 2 * source - 1)):
        coarse = torch.randn(3, 5, source, source, dtype=torch.float64, requires_grad=True)
        to = torch.randn(3, 5, rows, columns, dtype=torch.float64)
        found = []
        for by_products in (False, True):
            monkeypatch.setattr(resizing, "by_products", lambda x, answer=by_products: answer)
            fine = upsample_aligned(coarse, (rows, columns))
            found.append((fine, *torch.autograd.grad((fine * to).sum(), coarse)))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
        halves = coarse.detach().to(torch.bfloat16)  # one rounding, as torch has it: weights are exact in bf16
        want = upsample_aligned(halves.double(), (rows, columns)).to(torch.bfloat16)
        assert torch.equal(upsample_aligned(halves, (rows, columns)), want)


@pytest.mark.parametrize(("source", "target"), [*SIZES, (7, 4), (7, 1), (16, 30)])
def test_resizing_by_products_is_that_by_interpolation(monkeypatch, source, target):
    torch.manual_seed(source)
    maps, frames = torch.randn(2, 3, source, source + 2), torch.randn(2, 3, source)
    want = resize(maps, (target, target + 1)), resize_time(frames, target)
    monkeypatch.setattr(resizing, "by_products", lambda x: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which does not round what is float32
        found = resize(maps, (target, target + 1)), resize_time(frames, target)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_product_keeps_maps_channels_last():
    maps = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    axis = weights(4, 7, 0.5, maps.device)
    assert multiply(maps, axis, axis).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["dfernet", "st-former"])
def test_a_model_that_resizes_by_products_is_the_same(monkeypatch, name):
    torch.manual_seed(0)
    model, clips = build_model(ModelConfig(name=name, dim=16), 2).eval(), torch.randn(1, 2, 3, 64, 64)
    found = []
    for by_products in (False, True):
        monkeypatch.setattr(resizing, "by_products", lambda x, answer=by_products: answer)
        found.append((model(clips).logits, list(model.state_dict())))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_other_backbones():
    names = {"resnet10t": 512, "mobilenetv3_small_050": 288}
    for name, channels in names.items():
        assert FrameBackbone(name).channels[-1] == channels


def started(init: str, backbone: str = "resnet18") -> FrameBackbone:
    model = build_model(config := ModelConfig("mean-pool", backbone, init), 1)
    start(model, config, 1)
    return model.backbone


def test_a_file_of_a_backbone_is_loaded(tmp_path):
    source = FrameBackbone("resnet18")
    torch.save(source.net.state_dict(), tmp_path / "weights.pt")
    loaded = started(str(tmp_path / "weights.pt"))
    for (name, a), (_, b) in zip(source.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "init", "message"),
    [("resnet19", "random", "timm has no such model"), ("resnet18", "nowhere.pt", "nowhere.pt: no such file")],
)
def test_bad_backbones_are_one_line(name, init, message):
    with pytest.raises(ValueError, match=message) as error:
        started(init, name)
    assert "\n" not in str(error.value)


def test_garbage_weights_are_one_line(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"garbage" * 100)
    with pytest.raises(ValueError, match=r"--model.init .*weights\.pt"):
        started(str(tmp_path / "weights.pt"))


def test_weights_out_of_reach_are_said_at_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ValueError, match="cannot be reached"):
        started("timm")


def features(num_frames: int = 5) -> torch.Tensor:
    return torch.randn(2, num_frames, 3, 2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["deviation", "difference", "first", "original"])
def test_motion_against_loops(kind):
    x = features()
    for b, t in np.ndindex(2, 5):
        others = {
            "deviation": sum(x[b, i] for i in range(5)) / 5,
            "difference": x[b, max(t - 1, 0)],
            "first": x[b, 0],
            "original": x[b, t],
        }
        minuend = x[b, (t + 1) % 5] if kind == "original" else x[b, t]
        torch.testing.assert_close(motion(x, kind)[b, t], minuend - others[kind])


def test_the_dynamic_branch_does_not_see_what_stays_the_same():
    """Person and light add the same to each frame: the dynamic branch alone does not tell two of them apart."""
    torch.manual_seed(0)
    model = DFERNet(4, backbone="resnet10t", dim=16, branches="dynamic", dropout=0.0).eval()
    shown = [features(4) for _ in range(2)]
    person = [torch.randn(2, 1, 3, 2, 4) for _ in range(2)]
    for x, still in zip(shown, person, strict=True):
        torch.testing.assert_close(motion(x + still, "deviation"), motion(x, "deviation"), atol=1e-5, rtol=1e-5)
    held = torch.randn(1, 1, 3, 48, 48).expand(-1, 4, -1, -1, -1)
    other = torch.randn(1, 1, 3, 48, 48).expand(-1, 4, -1, -1, -1)
    with torch.inference_mode():
        torch.testing.assert_close(model(held).logits, model(other).logits, atol=1e-4, rtol=1e-4)
        both = DFERNet(4, backbone="resnet10t", dim=16, dropout=0.0).eval()
        assert (both(held).logits - both(other).logits).abs().max() > 1e-3  # the static one does


def test_a_deviation_is_exact_in_half_precision():
    """The mean of a clip in bf16 would be off by more than what a subtle expression changes."""
    x = (100 + torch.arange(8.0).view(1, 8, 1, 1, 1) / 2).bfloat16()
    want = x.double() - x.double().mean(1, keepdim=True)
    torch.testing.assert_close(motion(x, "deviation").double(), want, atol=1e-6, rtol=0)


def last_state(block: RecurrentBlock, x: torch.Tensor) -> torch.Tensor:
    """The equations of both papers as torch writes them, one clip, frame and gate at a time."""
    gates = "rzn" if isinstance(block.cell, torch.nn.GRUCell) else "ifgo"
    parts = {name: dict(zip(gates, p.chunk(len(gates)), strict=True)) for name, p in block.cell.named_parameters()}
    states = []
    for clip in torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias):
        h, memory = torch.zeros(2, block.cell.hidden_size)
        for frame in clip:
            i = {g: parts["weight_ih"][g] @ frame + parts["bias_ih"][g] for g in gates}
            j = {g: parts["weight_hh"][g] @ h + parts["bias_hh"][g] for g in gates}
            if gates == "rzn":
                r, z = (i["r"] + j["r"]).sigmoid(), (i["z"] + j["z"]).sigmoid()
                z = z ** ((block.num_frames or len(clip)) / len(clip))
                h = (1 - z) * (i["n"] + r * j["n"]).tanh() + z * h
            else:
                opened = {g: (i[g] + j[g]).sigmoid() for g in "ifo"}
                memory = opened["f"] * memory + opened["i"] * (i["g"] + j["g"]).tanh()
                h = opened["o"] * memory.tanh()
        states.append(h)
    return torch.stack(states)


@torch.inference_mode()
@pytest.mark.parametrize("unit", ["gru", "lstm"])
@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_the_recurrent_block_against_its_equations(unit, num_frames):
    torch.manual_seed(num_frames)
    block, x = RecurrentBlock(6, 4, unit), torch.randn(3, num_frames, 6)
    torch.testing.assert_close(block(x), last_state(block, x))
    if unit == "gru":
        block.num_frames = 4  # of training
        torch.testing.assert_close(block(x), last_state(block, x))


def test_a_gate_that_is_shut_has_a_gradient_at_another_number_of_frames():
    """A sigmoid that rounds to 0, of which a power has none."""
    block = RecurrentBlock(6, 4, num_frames=4)
    block.cell.bias_ih.data[4:8] = -200.0
    block(torch.randn(3, 8, 6)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in block.parameters())


@torch.inference_mode()
def test_a_frame_that_is_shown_again_and_again_is_read_as_one_that_lasts():
    """Exactly so where the gates do not hear of the state, which is in between anew."""
    torch.manual_seed(0)
    block, x = RecurrentBlock(6, 4, num_frames=4), torch.randn(3, 4, 6)
    block.cell.weight_hh.zero_()
    want = block(x)
    for times in (2, 3, 8):
        torch.testing.assert_close(block(x.repeat_interleave(times, 1)), want)
    block.num_frames = None
    assert (block(x.repeat_interleave(2, 1)) - want).abs().max() > 0.01


@torch.inference_mode()
@pytest.mark.parametrize("crf", ["meanfield", "gaussian"])
def test_a_clip_is_as_long_whatever_its_frames(crf):
    """A CRF trained at T = 4 gives a clip of 8 frames, each of the 4 shown twice, the kernel of the 4 frames."""
    torch.manual_seed(0)
    model = DFERNet(4, backbone="resnet10t", dim=16, crf=crf).eval()
    for num_frames in (2, 4, 8):
        time, _ = model.crf.positions([torch.zeros(1, num_frames, 16, 2, 2), torch.zeros(1, num_frames, 16, 1, 1)])
        assert time.flatten().tolist() == [4 / num_frames * t for t in range(num_frames)]


def test_exports_without_branches_are_what_they_were(tmp_path):
    """A folder that was written when there was one branch, read by attention."""
    torch.manual_seed(0)
    old = DFERNet(4, backbone="resnet10t", dim=16, branches="static", time="attention").eval()
    config = {"num_frames": 4, "backbone": "resnet10t", "dim": 16, "network": "DFERNet"}
    old.save_pretrained(tmp_path, config=config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, clips = DFERNet.from_pretrained(tmp_path).eval(), torch.randn(1, 4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(again(clips).logits, old(clips).logits)


def test_a_model_of_stills_keeps_its_measure_of_motion():
    """At T = 1 nothing moves, and a variance of nothing would make any motion of later clips enormous."""
    torch.manual_seed(0)
    model = DFERNet(1, backbone="resnet10t", dim=16, dropout=0.0).train()
    for _ in range(30):
        model(torch.randn(4, 1, 3, 32, 32))
    model.eval()
    with torch.inference_mode():
        shown = model._branches(torch.randn(2, 1, 3, 32, 32) + 0.1 * torch.randn(2, 4, 3, 32, 32))
    assert max(level.abs().max() for level in shown["dynamic"]) < max(level.abs().max() for level in shown["static"])


COMPILED = """
import torch
from dfer.model.temporal import RecurrentBlock
from tests.conftest import ROOT, run_python
torch.manual_seed(0)
block, x, graphs = RecurrentBlock(6, 4, num_frames=3), torch.randn(2, 3, 6), []
def keep(graph, _):
    graphs.append(graph)
    return graph.forward
torch.testing.assert_close(torch.compile(block, backend=keep, fullgraph=True)(x), block(x))
assert len(graphs) == 1 and not any("scan" in str(node.target) for node in graphs[0].graph.nodes)
"""


def test_a_compiled_block_is_the_loop_and_not_the_program_of_an_export():
    """Torch's scan, which only an export needs, does not go through the compiler's later stages. Without this suite's
    checks of shapes, which the compiler does not know.
    """
    done = run_python("-c", COMPILED, PYTHONPATH=python_path())
    assert done.returncode == 0, done.stderr
