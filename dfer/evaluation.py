"""Evaluation: every clip of a list exactly once, whatever the number of processes and the size of a batch."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dfer.batch import Batch, Loader
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix, Throughput
from dfer.precision import Precision
from dfer.run import distributed
from dfer.run.distributed import World
from dfer.run.signals import StopSignals

Predict: TypeAlias = Callable[[Float[Tensor, "B T 3 H W"]], Float[Tensor, "B K"]]  # clips -> probabilities
Watch: TypeAlias = Callable[[Iterable[Batch], int], Iterable[Batch]]  # batches and their number -> the batches


class Evaluation(NamedTuple):
    confusion: ConfusionMatrix
    loss: float  # mean cross-entropy
    ids: list[int]  # rows of the index, in its order
    probabilities: list[list[float]]
    throughput: dict[str, float]


class _OfRank(NamedTuple):
    """What one rank predicts, the padding of its last batch included."""

    ids: Int64[Tensor, " M"]
    valid: Bool[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    probabilities: Float[Tensor, "M K"]  # averaged over the views of a clip


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    world: World,
    precision: Precision,
    stop: StopSignals | None = None,
    watch: Watch = lambda batches, _: batches,
    predict: Predict | None = None,
) -> Evaluation | None:
    """Evaluate every clip of the loader's list exactly once. Return None if a signal ended it.

    Of a clip of several views the probabilities are averaged, and their largest is the prediction. `watch` passes the
    batches on and shows how many of them are done. `predict` does what `probabilities` does with the model, in another
    way; its next call may overwrite what it returned.
    """
    model.eval()
    distributed.broadcast_buffers(model)
    throughput = Throughput(world.size)
    found = _predict(predict or partial(probabilities, model, precision), loader, throughput, stop, watch)
    if found is None:
        return None
    confusion = ConfusionMatrix(len(EMOTIONS), world.device)
    confusion.update(found.probabilities.argmax(1), found.labels, found.valid)
    confusion.all_reduce()
    parts = (found.ids.to(world.device), found.valid, found.probabilities)
    ids, valid, predicted = (distributed.gather(part, world).cpu() for part in parts)
    ids, predicted = ids[valid], predicted[valid]
    order = ids.argsort()
    ids, predicted = ids[order], predicted[order]
    assert confusion.total() == len(loader.index) == len(ids.unique()), "a clip was lost or counted twice"
    labels = torch.from_numpy(loader.index.labels)[ids]
    loss = float(F.nll_loss(predicted.clamp_min(1e-12).log(), labels))
    return Evaluation(confusion, loss, ids.tolist(), predicted.tolist(), throughput.read())


def probabilities(model: nn.Module, precision: Precision, clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B K"]:
    """Return the probabilities of the classes for clips, float32."""
    return F.softmax(precision.forward(model, clips).logits.float(), 1)


def _predict(
    predict: Predict,
    loader: Loader,
    throughput: Throughput,
    stop: StopSignals | None,
    watch: Watch,
) -> _OfRank | None:
    """Return what this rank predicts, or None if a signal ended it."""
    num_views = loader.sampler.num_views
    ids, valid, labels, found = [], [], [], []
    for i, batch in enumerate(watch(throughput.timed(_views(loader)), num_views * len(loader))):
        if stop is not None and stop.requested():
            return None
        of_batch = predict(batch.clips)
        if i < len(loader):  # the first view
            ids.append(batch.ids)
            valid.append(batch.valid)
            labels.append(batch.labels)
            found.append(of_batch.clone())
        else:  # another view of the same clips, batch by batch
            assert torch.equal(batch.ids, ids[i % len(loader)]), "the views of a clip were taken apart"
            found[i % len(loader)] += of_batch
    return _OfRank(torch.cat(ids), torch.cat(valid), torch.cat(labels), torch.cat(found) / num_views)


def _views(loader: Loader) -> Iterator[Batch]:
    """Yield the batches of all views, of which each begins to be loaded before the one ahead of it ends."""
    for view in range(loader.sampler.num_views):
        for number, batch in enumerate(loader(epoch=view)):
            if number >= len(loader) - 2 and view + 1 < loader.sampler.num_views:
                loader.prepare(view + 1)
            yield batch
