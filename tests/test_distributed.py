"""Several processes do what one does: gradients, counts, WAR and UAR."""

import json
import subprocess

import pytest
import torch
import torch.nn.functional as F

from dfer.model import DFERNet
from tests.conftest import TORCHRUN, run_python
from tests.nursery import python_path
from tests.test_train import TINY, rows

GRADIENTS = """
import sys
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from dfer.cli import leave
from dfer.run import distributed
from tests.test_distributed import clips_and_labels, frozen_model

world = distributed.setup("cpu")
model = DistributedDataParallel(frozen_model())
clips, labels = (part.chunk(world.size)[world.rank] for part in clips_and_labels())
prediction = model(clips)
(F.cross_entropy(prediction.logits, labels) + F.nll_loss(prediction.marginals, labels)).backward()
assert distributed.count_distinct([1, 3 + world.rank], 9, world) == 3 and distributed.count_distinct([], 9, world) == 0
if world.is_main:
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, sys.argv[1])
leave()
"""


def frozen_model() -> DFERNet:
    """Batch statistics are per process, so they stand still here."""
    torch.manual_seed(0)
    model = DFERNet(3, dim=16, dropout=0.0).eval()
    for parameter in model.crf.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def clips_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 3, 32, 32, generator=generator), torch.tensor([0, 3, 5, 6])


def torchrun(processes: int, *args: str) -> subprocess.CompletedProcess:
    return run_python(*TORCHRUN, "--standalone", f"--nproc_per_node={processes}", *args, PYTHONPATH=python_path())


def test_gradients_of_two_processes_equal_one(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    done = torchrun(2, str(tmp_path / "gradients.py"), str(tmp_path / "gradients.pt"))
    assert done.returncode == 0, done.stderr
    model, (clips, labels) = frozen_model(), clips_and_labels()
    prediction = model(clips)
    (F.cross_entropy(prediction.logits, labels) + F.nll_loss(prediction.marginals, labels)).backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_count_every_clip_once_and_score_as_one(clips, tmp_path, processes):
    lists = ("--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt")
    done = torchrun(processes, "train.py", *TINY, *lists, "--data.batch-size", "2", "--run.log-dir", str(tmp_path),
                    "--run.name", "several")  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = [row for row in rows(tmp_path / "several") if "val/WAR" in row][-1]
    single = run_python("scripts/evaluate.py", str(tmp_path / "several"), "--json", "--device", "cpu",
                        "--out", str(tmp_path / "single.csv"))  # fmt: skip
    assert single.returncode == 0, single.stderr
    numbers = json.loads(single.stdout.splitlines()[-1])
    assert numbers["clips"] == 9 and sum(map(sum, numbers["confusion"])) == 9
    assert (numbers["WAR"], numbers["UAR"]) == (last["val/WAR"], last["val/UAR"])
    assert (tmp_path / "single.csv").read_text() == (tmp_path / "several" / "predictions.csv").read_text()


def test_freed_memory_is_kept():
    """Counted in pages that come anew in five backward passes; 40 MB are 10,000. Heaps have holes: some still do."""
    code = """
import resource, sys, torch
from dfer.run.distributed import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
x = torch.ones(10_000_000, requires_grad=True)
for number in range(7):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.exp().mul(2).sin().sum().backward()
    x.grad = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    given_back, kept = (int(run_python("-c", code, word).stdout) for word in ("given back", "kept"))
    assert given_back > 50_000 and kept < given_back / 2
