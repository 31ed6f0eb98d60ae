import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfer.batch import Batch, empty_batch
from dfer.evaluation import Evaluation, evaluate
from dfer.metrics import ConfusionMatrix, DeviceClock, Throughput, flop_share
from dfer.model import Prediction
from dfer.optim.average import build_ema
from dfer.plan.sampling import shard
from dfer.precision import Precision
from dfer.run import distributed
from dfer.run.distributed import World


@pytest.mark.parametrize("num_clips", [1, 7, 500])
def test_war_and_uar_equal_a_loop_over_samples(num_clips):
    rng = np.random.default_rng(num_clips)
    labels = rng.choice(7, num_clips, p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.0, 0.05])  # class 5 never occurs ...
    predictions = rng.integers(0, 7, num_clips)  # ... but is predicted
    valid = rng.random(num_clips) < 0.9
    valid[0] = True
    confusion = ConfusionMatrix(7)
    for part in np.array_split(np.arange(num_clips), 3):
        confusion.update(*(torch.from_numpy(x[part]) for x in (predictions, labels, valid)))

    right, seen = [0] * 7, [0] * 7
    for label, prediction, counts in zip(labels, predictions, valid, strict=True):
        if counts:
            seen[label] += 1
            right[label] += label == prediction
    recalls = [100 * r / s for r, s in zip(right, seen, strict=True) if s]
    assert confusion.total() == sum(seen)
    assert confusion.war() == pytest.approx(100 * sum(right) / sum(seen), abs=1e-12)
    assert confusion.uar() == pytest.approx(sum(recalls) / len(recalls), abs=1e-12)
    assert math.isnan(confusion.per_class_recall()[5])


class Ranks:
    """Threads that exchange tensors as processes would."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch):
        self.size, self.parts, self.mine = size, [None] * size, threading.local()
        self.barrier = threading.Barrier(size, timeout=60)
        monkeypatch.setattr(distributed, "gather", lambda tensor, world: torch.cat(self.exchange(tensor)))
        monkeypatch.setattr(ConfusionMatrix, "all_reduce", lambda m: m.counts.copy_(sum(self.exchange(m.counts))))

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.mine.rank] = tensor.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def evaluate(self, rank: int, order: np.ndarray, labels: np.ndarray, guesses: np.ndarray, size: int) -> Evaluation:
        self.mine.rank = rank
        ids, valid = shard(order, rank, self.size, size, pad=True)

        def batches(epoch: int):
            for row, row_valid in zip(ids, valid, strict=True):
                # What fills up the last batch is guessed wrong: it would show.
                guess = torch.from_numpy(np.where(row_valid, guesses[row], (labels[row] + 1) % 7))
                clips = guess.float()[:, None, None, None, None].expand(-1, 1, 3, 1, 1)
                yield Batch(clips, torch.from_numpy(labels[row]), torch.from_numpy(row_valid), torch.from_numpy(row))

        class Loader(SimpleNamespace):
            def __call__(self, epoch: int):
                return batches(epoch)

            def prepare(self, epoch: int, start_step: int = 0) -> None: ...

            def __len__(self) -> int:
                return len(ids)

        class Index(SimpleNamespace):
            def __len__(self) -> int:
                return len(self.labels)

        class Model(torch.nn.Module):
            def forward(self, clips: torch.Tensor) -> Prediction:
                return Prediction(3.0 * F.one_hot(clips[:, 0, 0, 0, 0].long(), 7), None, {})

        loader = Loader(index=Index(labels=labels), sampler=SimpleNamespace(num_views=1), bad_clips={})
        world = World(rank, self.size, rank, self.size, torch.device("cpu"))
        try:
            return evaluate(Model(), loader, world, Precision(torch.device("cpu"), None, True))
        except BaseException:
            self.barrier.abort()
            raise


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_clip_counts_once_for_any_number_of_clips_ranks_and_batch(world, monkeypatch):
    """train.py's own evaluation, from the shards to the gathered probabilities, on threads in place of processes."""
    rng, ranks = np.random.default_rng(world), Ranks(world, monkeypatch)
    with ThreadPoolExecutor(world) as pool:
        for n, size in itertools.product(range(1, 34), range(1, 9)):
            order, labels, guesses = rng.permutation(n), rng.integers(0, 7, n), rng.integers(0, 7, n)
            counts = np.zeros((7, 7), dtype=np.int64)
            for label, guess in zip(labels, guesses, strict=True):
                counts[label, guess] += 1
            jobs = [pool.submit(ranks.evaluate, rank, order, labels, guesses, size) for rank in range(world)]
            for found in [job.result() for job in jobs]:
                assert np.array_equal(found.confusion.counts, counts), (n, size)
                assert found.ids == list(range(n))
                assert np.array_equal(np.argmax(found.probabilities, axis=1), guesses), (n, size)


def test_throughput_separates_waiting_from_computing():
    throughput = Throughput(world_size=2)

    def slow_batches():
        import time

        for _ in range(3):
            time.sleep(0.02)
            yield empty_batch(5, 1, 1, torch.device("cpu"))

    for number, _ in enumerate(throughput.timed(slow_batches()), start=1):
        assert throughput.snapshot().num_clips == 2 * 5 * number
    rates = throughput.read()
    assert throughput.snapshot().num_clips == 30 and throughput.snapshot().wait_s >= 0.06
    assert rates["compute_clips_per_s"] > rates["total_clips_per_s"] > 0
    assert 0.5 < rates["data_wait_share"] <= 1
    assert throughput.read(since=throughput.snapshot())["total_clips_per_s"] == 0  # the clock stands still outside


class Card:
    """Plays a GPU's stream: work is queued by the host at its own time, and takes as long as it says."""

    def __init__(self):
        self.host = self.free_at = 0.0  # seconds

    def event(self, enable_timing):
        assert enable_timing
        card, at = self, []
        return SimpleNamespace(
            record=lambda: at.append(max(card.free_at, card.host)),
            query=lambda: at[0] <= card.host,
            elapsed_time=lambda end: 1000 * (end.at[0] - at[0]),
            at=at,
        )

    def work(self, seconds):
        self.free_at = max(self.free_at, self.host) + seconds


def test_the_busy_share_is_that_of_the_card(monkeypatch):
    """Against the sum of what it did, with the host waiting for data before some steps, and far ahead in others."""
    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr("dfer.metrics.time", SimpleNamespace(perf_counter=lambda: card.host))
    clock = DeviceClock()
    throughput = Throughput(1, clock.seconds)

    def batches():
        for number in range(40):
            card.host += 0.5 if number % 2 else 0.001
            yield empty_batch(2, 1, 1, torch.device("cpu"))

    began = throughput.snapshot()
    for _ in throughput.timed(batches()):
        with clock.running():
            card.work(0.1)
        assert len(clock._pairs) <= 3  # and not one for each step of a row
    card.host = max(card.host, card.free_at)
    found = throughput.read(since=began)
    assert found["busy"] == pytest.approx(40 * 0.1 / (20 * 0.501), rel=1e-6) and clock.seconds() == pytest.approx(4.0)
    assert "busy" not in throughput.read() and "busy" not in Throughput().read(since=Throughput().snapshot())


def test_a_card_is_never_busier_than_the_time(monkeypatch):
    worked = iter((0.0, 9.0))
    throughput = Throughput(1, lambda: next(worked))
    assert throughput.read(since=throughput.snapshot())["busy"] == 1.0


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_torchs_to_the_bit(warmup):
    """Torch's, whose shares are numbers on the host: runs that it began go on as they were."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 20, 3), torch.nn.BatchNorm2d(20))

    def update(averaged, current, _):
        n = int(want.n_averaged)
        get_ema_multi_avg_fn(min(0.99, (1 + n) / (10 + n)) if warmup else 0.99)(averaged, current, n)

    ema, want = build_ema(model, 0.99, warmup), AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(2, 3, 8, 8))
        for average in (ema, want):
            average.update_parameters(model)
        assert ema.state_dict().keys() == want.state_dict().keys()
        assert all(torch.equal(value, want.state_dict()[key]) for key, value in ema.state_dict().items())


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_average_is_that_of_a_loop_and_follows_a_short_run(decay, warmup):
    """Across a restart too: how many updates there were lies in its state."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema, mean = build_ema(model, decay, warmup), None
    for n in range(30):
        with torch.no_grad():
            model[0].weight.fill_(float(n))
            model[1].running_mean.fill_(2.0 * n)
        if n == 11:
            again = build_ema(model, decay, warmup)
            again.load_state_dict(ema.state_dict())
            ema = again
        ema.update_parameters(model)
        keep = min(decay, (1 + n) / (10 + n)) if warmup else decay
        mean = float(n) if mean is None else keep * mean + (1 - keep) * n
        assert ema.module[0].weight.detach() == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert ema.module[1].running_mean == pytest.approx(2 * mean, rel=1e-5, abs=1e-6)
    assert (mean > 25) == (warmup or decay == 0.5)  # else the weights of the first steps


def test_the_share_of_a_peak_is_told_of_known_cards_alone(monkeypatch):
    card = torch.device("cuda", 0)
    for name, want in (("NVIDIA H200", 0.25), ("NVIDIA GeForce RTX 4090", 0.25 * 989 / 165.2), ("NVIDIA T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flop_share(50e9, 0.25 * 989e12 / 50e9, card) == (want if want is None else pytest.approx(want))
    assert flop_share(None, 1.0, card) is None and flop_share(50e9, 1.0, torch.device("cpu")) is None
