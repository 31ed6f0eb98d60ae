"""The CRF's benchmark: its rivals compute what they are said to, and its figures are what it says."""

import json

import pytest
import torch

from benchmarks import crf_peers, crf_speed
from benchmarks.crf_peers import STATES, VALUES, make_problem, naive, ours, window
from benchmarks.crf_speed import passes, ratios_of, saved_bytes
from dfer.crf.layers import VALUE_DIM


def test_the_naive_one_gives_our_numbers_and_gradients():
    difference = crf_speed.differences(passes("dense", 104, 2, "cpu")(), passes("naive dense", 104, 2, "cpu")())
    assert difference["marginals"] < 2e-6 and difference["values_and_gradients"] < 2e-5


def test_a_window_over_everything_is_exact(monkeypatch):
    """Without the smoothness kernel, which the window has not, it then has nothing left to approximate."""
    monkeypatch.setattr(crf_peers, "WINDOW", 25)
    problem = make_problem(104, 2, "cpu")
    problem = problem._replace(compatibility=torch.stack([torch.eye(STATES), torch.zeros(STATES, STATES)]))
    for got, want, exact in zip(window(problem), naive(problem), ours(problem, "dense", torch.float32), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(exact, want, atol=2e-6, rtol=1e-5)
    monkeypatch.setattr(crf_peers, "WINDOW", 3)
    assert (window(problem)[0] - naive(problem)[0]).abs().max() > 1e-3


def test_saved_bytes_counts_shared_storage_once():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 4000
    assert saved_bytes(lambda: (x * x).exp() * x) == 8000  # x, and the exponentials that exp and the product both keep


def test_ratios_are_medians_of_rounds():
    cells = {
        "n8_b1": {"ms": {"dense": [1, 2, 4], "naive dense": [3, 4, 4], "layer": [2, 2, 2], "attention": [4, 2, 1]}}
    }
    assert ratios_of(cells) == {"naive_dense_n8_b1": 2, "attention_n8_b1": 1}


def test_the_whole_command(tmp_path, capsys):
    words = ["--tokens", "104", "--batches", "1", "2", "--rounds", "1", "--patience", "0", "--device", "cpu"]
    designs = ["--designs", "dense", "naive dense", "layer", "attention"]
    pytest.importorskip("matplotlib")
    assert crf_speed.main([*words, *designs, "--json", f"{tmp_path}/r.json", "--plot", f"{tmp_path}/r.svg"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"naive_dense_n104_b1", "attention_n104_b2"} <= report["ratios"].keys() and "<svg" in (
        tmp_path / "r.svg"
    ).read_text()
    assert report["cells"]["n104_b2"]["difference"]["marginals"] < 2e-6
    assert "104, 2" in capsys.readouterr().out


def test_the_share_of_a_step(monkeypatch, tmp_path, capsys):
    """Each kind of step is warmed up for real; then its time is given."""
    monkeypatch.setitem(crf_speed.STEPS, "cpu", [(32, 2, 2)])
    naive_calls = []

    def steps_of(model, optimizer, clips, labels, amp, naive):
        step = crf_speed_step_of(model, optimizer, clips, labels, amp, naive)
        step.cost = (200 if isinstance(model.crf, crf_speed.NoCRF) else 250) + 150 * naive
        return step

    def naive_meanfield(*args, **options):
        naive_calls.append(1)
        return crf_peers.naive_meanfield(*args, **options)

    crf_speed_step_of = crf_speed.step_of
    monkeypatch.setattr(crf_speed, "step_of", steps_of)
    monkeypatch.setattr(crf_speed, "naive_meanfield", naive_meanfield)
    monkeypatch.setattr(crf_speed, "timed", lambda run, device: getattr(run, "cost", 1))
    words = ["--tokens", "104", "--batches", "1", "--designs", "dense", "--rounds", "1", "--patience", "0"]
    assert crf_speed.main([*words, "--step", "--device", "cpu", "--json", f"{tmp_path}/r.json"]) == 0
    (report,) = json.loads((tmp_path / "r.json").read_text())["steps"].values()
    assert report["share"] == {"ours": 1 - 200 / 250, "naive dense": 0.5}
    assert len(naive_calls) == 1  # the warm-up of that step, and of no other
    assert "ours 20.0 %, naive dense 50.0 %" in capsys.readouterr().out


def test_what_would_take_too_long_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crf_speed, "timed", lambda run, device: 1.0)
    words = ["--tokens", "104", "256", "--batches", "1", "--designs", "dense", "--rounds", "1", "--patience", "0"]
    assert crf_speed.main([*words, "--limit", "5", "--device", "cpu", "--json", f"{tmp_path}/r.json"]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["not_run"] == {"n256_b1 dense": "time: some 6 s for one pass"}
    assert "not run: n256_b1 dense" in capsys.readouterr().out and not report["cells"]["n256_b1"]["ms"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "x.pdf"], "does not end in"),
        (["--json", "nowhere/x.json"], "its folder is missing"),
        (["--tokens", "17"], "17"),
        (["--rounds", "0"], "rounds"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        crf_speed.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_values_have_the_width_of_the_layer():
    assert VALUES == VALUE_DIM
