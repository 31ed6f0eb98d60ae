"""The training step: what is done with each batch, as functions that a graph can capture."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from dfer.batch import Batch, Mix
from dfer.cli import say_once
from dfer.config import RunConfig
from dfer.crf.backends import trouble
from dfer.crf.layers import GaussianCRF, MeanFieldCRF
from dfer.evaluation import probabilities
from dfer.files import reason
from dfer.metrics import DeviceClock
from dfer.model.fused import Parts, fuse, why_not
from dfer.optim.rates import DeviceRates
from dfer.precision import Precision
from dfer.run import distributed
from dfer.run.distributed import World
from dfer.run.flops import flops_a_clip
from dfer.run.graph import WARM_UP, CapturedCall, Graphs, refilled
from dfer.state import Job, Step

LossOfBatch = Callable[[Job, Batch], tuple[Tensor, dict[str, Tensor]]]  # its loss, and the model's diagnostics
Models = Sequence[nn.Module]


_NAMES = {  # of what is captured, by whether a batch is the first one and the last one of a step
    (True, True): "a training step",
    (True, False): "the first batch of a training step",
    (False, False): "a batch of a training step",
    (False, True): "the last batch of a training step",
}
_LOGGED = " that is logged"  # with the CRF's diagnostics
_END = "the end of a training step"  # of several processes, once they have exchanged gradients
LAYERS: dict[str, Parts] = {"norm": "norm", "pool": "pool", "both": "both", "all": "both"}  # of --run.fused


class TrainingStep:
    """Take batches, of which the last one of a step has the weights changed; and predict by the weights that there are.

    Where there are graphs, a batch is copied into tensors that stay where they are, and all that follows is launched at
    once. What a graph would not do again is done before it: seeds, learning rates and the average's shares are set by
    the host. What it must not do is done after it: whether the run has diverged is read some steps late. Of several
    processes a step is two graphs, and gradients are exchanged between them.
    """

    def __init__(self, job: Job, loss_of: LossOfBatch, graphs: Graphs, exchange: distributed.Exchange | None = None):
        """Take the steps of a job. Clips that are copied are rounded to what the model rounds them to in any case.

        `exchange` is that of several processes, unless the job's model is DDP, which exchanges by itself.
        """
        self.graphs = graphs
        self.flops_a_clip: float | None = None  # of convolutions and products, forwards and backwards; on a GPU
        self.notes: list[str] = []  # what is to be said besides of the graphs, each once
        self._job, self._loss_of, self._exchange = job, loss_of, exchange
        state, device = job.state, job.state.losses.device
        gpu = device.type == "cuda"
        self._dtype = job.precision.dtype if gpu else None
        self._capturable = bool(state.optimizer.capturable)  # type: ignore[attr-defined]
        # On a GPU without graphs too, so that both round alike. A CPU has them where a test has it play a GPU.
        on_device = self._capturable and (gpu or graphs.active)
        self._rates = DeviceRates(state.optimizer, device) if on_device else None
        self._num_steps = 0  # of this process
        self._clock = DeviceClock() if gpu and graphs.active else None
        self._static: Batch | None = None
        self._batch: Batch | None = None  # that is taken
        self._earlier: list[Tensor | None] = []  # gradients that the batch adds to
        # What was done last, of each kind: what a graph replays, it writes there.
        self._diagnostics: dict[str, dict[str, Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self._left: dict[str, list[Tensor | None]] = {}  # gradients, each kind of last batch in memory of its own
        self._kind = ""  # of the last batch that was the last of a step
        self._crfs = [crf for crf in _crfs_of(_models(job)) if isinstance(crf, MeanFieldCRF)]
        self._evaluation = graphs.beside()
        self._predict = captured_evaluation(state.evaluated_model(), job.precision, self._evaluation)

    def __call__(self, batch: Batch, first: bool, last: bool) -> Step | None:
        """Take a batch, the first one or the last one of a step or both; return what the last one leaves.

        The learning rate and the seed of dropout have to be set.
        """
        batch = self._job.objective.labelled(batch)
        self._batch = self._placed(batch) if self.graphs.active else batch
        if last and self._rates is not None:
            self._rates.fill()
        if last and self._job.state.ema is not None:
            self._job.state.ema.advance()
        # Of a step of several batches the first one makes the gradients, and the others add to them.
        name = _NAMES[first, last]
        warm = self._num_steps >= WARM_UP
        if self._diagnose(last and (self._job.logs(self._job.steps_done + 1) or not warm)):
            name += _LOGGED
        self._launch(name, partial(self._do, first, last, name), warm)
        end, diagnostics = name, self._diagnostics[name]
        if last and self._exchange is not None:
            with record_function("exchange"):
                self._exchange.run()
            end = _END
            if self._capturable:
                # The end's graph, if it was captured before this one, works where this one returns them.
                diagnostics = {key: value.clone() for key, value in diagnostics.items()}
                self._launch(end, partial(self._update, end), warm)
        self._num_steps += last
        self._kind = name if last else self._kind
        if last and not self._capturable:
            self._update(end)
        self._batch = None
        return Step(self._norms[end], diagnostics) if last else None

    def _launch(self, name: str, function: Callable[[], None], warm: bool) -> None:
        """Do the work of a function, as a graph where there are graphs."""
        if not self.graphs.captured(name):  # a capture may break off before the function begins
            self._earlier = [p.grad for p in self._job.state.model.parameters()]
        # A step without a graph, and the capture of one, have gaps, which the clock would take for work.
        clock = self._clock if self.graphs.captured(name) else None
        with clock.running() if clock is not None else contextlib.nullcontext():
            self.graphs.run(name, function, warm, self._recover)

    def worked_s(self) -> float | None:
        """Return for how many seconds the device has worked on steps; None where there are no graphs to say it by."""
        return self._clock.seconds() if self._clock is not None and self.graphs.active else None

    def _diagnose(self, wanted: bool) -> bool:
        """Have the CRFs diagnosed or not; return whether that makes it another graph than the one without.

        An optimizer that is not captured takes gradients from one graph alone, and a compiler would compile again.
        """
        one = (self.graphs.active and not self._capturable) or self._job.config.run.compile
        for crf in self._crfs:
            crf.diagnosed = wanted or one
        return wanted and not one

    def predict(self, clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B K"]:
        """Return the probabilities of clips by what is evaluated. The next call may overwrite them."""
        self._diagnose(False)
        return self._predict(clips)

    def take_note(self) -> str | None:
        """Return the next thing to be said of graphs and kernels, or of what could not be counted, each once."""
        return self.notes.pop(0) if self.notes else self.graphs.take_note() or self._evaluation.take_note()

    def _do(self, first: bool, last: bool, name: str) -> None:
        """Do all that is captured."""
        self._diagnostics[name] = self._gradients(first, last)
        if last and self.graphs.active:
            self._left[name] = [p.grad for p in self._job.state.model.parameters()]
        if last and self._exchange is not None:
            self._exchange.collect()
        elif last and self._capturable:
            self._update(name)

    def _placed(self, batch: Batch) -> Batch:
        """Return the static batch with the content of one; ids stay on the host."""
        old = self._static or Batch(None, None, None, batch.ids)  # type: ignore[arg-type]
        mix = batch.mix
        if mix is not None:
            mix = Mix(*(refilled(a, b) for a, b in zip(old.mix or (None, None), mix, strict=True)))
        clips = refilled(old.clips, batch.clips, self._dtype)
        labels, valid = refilled(old.labels, batch.labels), refilled(old.valid, batch.valid)
        self._static = Batch(clips, labels, valid, batch.ids, mix)
        return self._static

    def _gradients(self, first: bool, last: bool) -> dict[str, Tensor]:
        """Add the gradient of the batch to those of the step; return the model's diagnostics."""
        assert self._batch is not None
        job, state = self._job, self._job.state
        if first:
            state.optimizer.zero_grad()
            state.guard.before_forward()
        model = job.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            with record_function("forward"):
                loss, diagnostics = self._loss_of(job, self._batch)
            with record_function("backward"):
                state.backward(loss, job.config.optim.accumulate)
        return diagnostics

    def _update(self, name: str) -> None:
        """Change weights, batch statistics and the average as the gradients say, or nothing if they are not finite."""
        state, nothing = self._job.state, contextlib.nullcontext()
        with record_function("optimizer"):
            with (
                self._exchange.given() if self._exchange is not None else nothing,
                self._rates.given() if self._rates is not None else nothing,
            ):
                self._norms[name] = state.guard.step(self._job.config.optim.clip_norm)
            if state.ema is not None:
                state.ema.update(state.model)

    def show_gradients(self) -> None:
        """Have the parameters' gradients be the last step's, of several processes the means.

        A graph leaves them where it was captured; the parameters have those of the graph that was captured last.
        """
        if self._exchange is not None:
            self._exchange.show()
        elif self.graphs.active:
            for parameter, gradient in zip(self._job.state.model.parameters(), self._left[self._kind], strict=True):
                parameter.grad = gradient

    def count_flops(self) -> None:
        """Count what the model computes for a clip; where that cannot be done, have a note say why, and no more."""
        try:
            self.flops_a_clip = flops_a_clip(self._job.config)
        except Exception as error:  # of whatever cannot go without content: a number in the log must not end a run
            why = reason(error)[:200]
            self.notes.append(f"the model's FLOP cannot be counted ({why}): no share of the GPU's peak is logged")

    def close(self) -> None:
        """Free the graphs: they hold what the processes exchange by, and so have to go first."""
        self.graphs.close()
        self._evaluation.close()

    def _recover(self) -> None:
        """Forget what a capture that broke off, here or on another rank, has left on the host."""
        for parameter, gradient in zip(self._job.state.model.parameters(), self._earlier, strict=True):
            parameter.grad = gradient
        if not self.graphs.active:
            self._left.clear()
        torch.manual_seed(torch.initial_seed())  # dropout may have drawn
        scaler = self._job.state.scaler
        if scaler.is_enabled():
            scaler._per_optimizer_states.clear()  # which of its calls are done


def with_step(job: Job, loss_of: LossOfBatch, graphs: Graphs) -> Job:
    """Return a job with what takes its steps."""
    optim = job.config.optim
    several = job.world.size > 1
    precision, one_by_one = _with_casts(job.config.run, job.precision, by_ddp=several and not graphs.active)
    job = job._replace(precision=precision)
    exchange = distributed.Exchange(job.state.model, job.world) if several and graphs.active else None
    step = TrainingStep(job, loss_of, graphs, exchange)
    step.notes += [one_by_one] if one_by_one is not None else []
    step.notes += with_kernels(_models(job), job.config.run, job.precision, job.world)
    if graphs.active and not job.state.optimizer.capturable:  # type: ignore[attr-defined]
        step.notes.append(f"--run.graph: {optim.optimizer} reads its learning rate on the host; its step runs outside")
    if job.world.is_main and job.world.device.type == "cuda":  # whose peak it is held against
        step.count_flops()
    return job._replace(step=step)


def _with_casts(run: RunConfig, precision: Precision, by_ddp: bool) -> tuple[Precision, str | None]:
    """Return a precision that casts all weights of training at once, if it is to; and why it cannot."""
    if run.fused not in ("weights", "all"):
        return precision, None
    if precision.dtype is None:
        why = "there are no casts"
    elif run.compile:
        why = "the compiler fuses casts"
    elif by_ddp:
        why = "gradients would all be exchanged after the backward pass, none during it"
    else:
        return precision._replace(at_once=True), None
    return precision, f"--run.fused {run.fused}: {why}; weights are cast one by one"


def captured_evaluation(model: nn.Module, precision: Precision, graphs: Graphs) -> CapturedCall:
    """Return `probabilities` of a model for batches of one shape, each launched at once where there are graphs."""
    dtype = precision.dtype if precision.device.type == "cuda" else None  # to which the model rounds in any case
    return CapturedCall(graphs, "an evaluated batch", partial(probabilities, model, precision), dtype)


def ready_to_evaluate(model: nn.Module, run: RunConfig, precision: Precision, world: World) -> list[str]:
    """Have a trained model, which is on its device, computed there as a run evaluates it; return why that cannot be.

    On a CPU its numbers stay what they were, to the bit.
    """
    for crf in _crfs_of([model]):
        if isinstance(crf, MeanFieldCRF):
            crf.diagnosed = False
    if precision.device.type != "cuda":
        return []
    precision.layout_weights(model)
    return with_kernels([model], run, precision, world)


def with_kernels(models: Models, run: RunConfig, precision: Precision, world: World) -> list[str]:
    """Have models computed by the kernels that a run is to take, where all ranks can; return why they cannot."""
    triton = run.fused in LAYERS or any(crf.backend == "triton" for crf in _crfs_of(models))
    if triton and world.device.type == "cuda":
        say_once("Triton's kernels for this GPU are compiled, if they were not before")
    notes = (_fused(models, run, precision, world), _crf(models, precision, world))
    return [note for note in notes if note is not None]


def _fused(models: Models, run: RunConfig, precision: Precision, world: World) -> str | None:
    """Have models take fewer passes, if they are to and all ranks can; return why one cannot."""
    if run.fused not in LAYERS or precision.device.type != "cuda":
        return None
    if (why := _agreed(why_not(precision.device, _operands(precision)), world)) is not None:
        return f"--run.fused {run.fused}: {why}; torch's operators are taken"
    for model in models:
        fuse(model, LAYERS[run.fused])
    return None


def _crf(models: Models, precision: Precision, world: World) -> str | None:
    """Have CRFs take dense pairs if not all ranks can take Triton's; return why one cannot."""
    crfs = [crf for crf in _crfs_of(models) if crf.backend == "triton"]
    if not crfs or (why := _agreed(trouble(precision.device, _operands(precision)), world)) is None:
        return None
    for crf in crfs:
        crf.backend = "dense"
    return f"--model.crf-backend triton: {why}; dense is taken"


def _models(job: Job) -> Models:
    return job.state.model, job.state.evaluated_model()


def _crfs_of(models: Models) -> list[MeanFieldCRF | GaussianCRF]:
    return [m for model in models for m in model.modules() if isinstance(m, (MeanFieldCRF, GaussianCRF))]


def _operands(precision: Precision) -> torch.dtype:
    return precision.dtype or torch.float32


def _agreed(why: str | None, world: World) -> str | None:
    """Return on all ranks why the first of those cannot that cannot: they compute alike, and rank 0 alone speaks."""
    return why if world.size == 1 else distributed.first_failure(why, world)
