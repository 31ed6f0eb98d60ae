"""The project as the benchmark uses it: its loader, its model and its training step. All imports of it are here."""

import contextlib
import gc
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.setting import Setting
from dali_pipes import pixels
from dali_pipes.loader import ClipLoader
from dali_pipes.options import Graph, LoaderOptions
from dali_pipes.sources import source_of
from dali_pipes.torch_stages import Stages, upload
from dfer.batch import Batch
from dfer.cli import leave
from dfer.config import Config, DataConfig, ModelConfig, RunConfig
from dfer.crf.layers import CRFOutput
from dfer.lists.index import ClipIndex, load_index
from dfer.losses import build_objective
from dfer.metrics import PEAK_FLOPS, peak_flops
from dfer.model import fused as fused_layers
from dfer.model.build import build_model
from dfer.model.fused import fuse, why_not
from dfer.optim.optimizers import build_optimizer
from dfer.optim.schedule import Schedule
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.plan.transforms import IMAGENET_STD
from dfer.precision import Precision
from dfer.run import distributed
from dfer.run.algorithms import chosen_algorithms
from dfer.run.distributed import World
from dfer.run.graph import WARM_UP, CudaGraphs, Graphs, together
from dfer.run.step import LAYERS, TrainingStep
from dfer.state import Job, TrainState

__all__ = [
    "IMAGENET_STD",
    "PEAK_FLOPS",
    "Batch",
    "Graph",
    "fuse",
    "leave",
    "peak_flops",
    "source_of",
]  # the other parts import the project from here alone

Listed = Literal["long", "short", "held"]  # as long as DFEW's; each clip once; of raw128, each eight times
LISTS = {  # by source: where its list lies in the data folder
    "frames": "faces/{}.txt",
    "shards144": "shards144/{}.txt",
    "raw128": "raw128/{}.txt",
    "video": "video/{}.txt",
}


def index_of(setting: Setting, source: str, listed: Listed = "long") -> ClipIndex:
    """The clips of a source, as often as a list has them."""
    return load_index(setting.data / LISTS[source].format(listed))


def sampler_of(setting: Setting) -> ClipSampler:
    return ClipSampler(0, setting.frames, augmentation=Augmentation(min_crop_area=0.08))


# Share of the JPEG engine; None: the cores decode; "half": one half of the images, and SMs the other.
Engine = float | Literal["half"] | None


class Route(NamedTuple):
    """How a loader decodes and makes clips on the card."""

    engine: Engine = 0.0
    nvdec: int = 0  # sessions; 0: the cores decode videos
    graph: Graph = "operators"
    dtype: torch.dtype = torch.float32  # of the clips; the trainer has bf16 on a card

    def told(self) -> str:
        """The route in words, for the name of a figure."""
        if isinstance(self.engine, float):
            images = f", engine {self.engine:g}" if self.engine else ""
        else:
            images = ", decoded on the cores" + (" and SMs" if self.engine else "")
        videos = f", NVDEC, sessions: {self.nvdec}" if self.nvdec else ""
        return images + (videos or (f", {self.graph}" if self.graph != "operators" else ""))


def clip_loader(
    setting: Setting,
    source: str,
    route: Route = Route(),  # noqa: B008
    *,
    where: Literal["card", "cpu"] = "card",
    held: bool = False,
    listed: Listed | None = None,
    batch: int | None = None,
) -> ClipLoader:
    """The trainer's loader. On a test's stub the graph for the card runs on the CPU.

    Pixels that are to be `held` in the card are those of a list of their own, whose epochs are long enough for plan and
    uploads not to be most of them, and whose pixels the card can hold.
    """
    card = where == "card"
    gpu = card and setting.device == "cuda"
    options = LoaderOptions(
        batch_size=batch or (setting.batch if card else setting.loader_batch),
        size=setting.size,
        dtype=route.dtype,
        device="gpu" if gpu else "cpu",
        graph=route.graph if card else "fused",
        jpeg_engine=0.0 if route.engine == "half" else route.engine,
        halved=route.engine == "half",
        video_decoder="nvdec" if route.nvdec else "cores",
        nvdec_sessions=route.nvdec or 1,
        cached=held,
        num_threads=setting.cores,
        device_id=0 if gpu else None,
    )
    listed = listed or ("held" if held else "long")
    loader = ClipLoader(index_of(setting, source, listed), sampler_of(setting), options)
    if loader.options != options:  # figures of DALI's operators would be taken for those of the kernel
        raise RuntimeError(pixels.why_not(options.torch_device))
    return loader


def pixel_stages(setting: Setting, batch: int, side: int, dtype: torch.dtype) -> tuple[Callable[[], int], float]:
    """The kernel on a batch of clips of noise, `side` x `side` px, that lie on the card; returns the clips it made.

    And the bytes that a clip needs: of its boxes and of what is written.
    """
    length, device = setting.frames, torch.device(setting.device)
    frame = 3 * side**2
    memory = torch.randint(0, 256, (batch * length * frame,), dtype=torch.uint8, device=device)
    plan, rows = sampler_of(setting).plan(0, np.full(batch, length)), np.arange(batch)
    address = memory.data_ptr() + frame * np.arange(batch * length).reshape(batch, length)
    cuts = pixels.cut_out(address, np.array([[side]]), np.array([[side]]), plan.box)
    words = upload(pixels.pack(cuts, pixels.parameters(plan, rows)), device)
    table, stages = pixels.Frames.unpack(words, batch, length), Stages(plan)

    def run() -> int:
        made = pixels.clips(*table, stages, setting.size, dtype)
        return len(made) if len(memory) else 0  # the memory lives as long as this function

    written = length * 3 * setting.size**2 * dtype.itemsize
    return run, 3 * float(cuts[:, :, 2:].prod(2).sum()) / batch + written


def boxes(setting: Setting, count: int) -> np.ndarray:
    """(count, 4) crops as training draws them: top, left, height, width as shares of a frame."""
    plan = sampler_of(setting).plan(0, np.full(count, setting.frames, dtype=np.int64))
    return plan.box.astype(np.float32)


def synthetic(setting: Setting, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """A batch that lies on the card: noise, in the loader's order of memory."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, setting.frames, setting.size, setting.size, 3)
    clips = torch.randn(shape, generator=generator).to(setting.device, dtype).permute(0, 1, 4, 2, 3)
    labels = torch.arange(batch, device=setting.device) % 7
    return Batch(clips, labels, torch.ones(batch, dtype=torch.bool, device=setting.device), torch.arange(batch))


def config_of(setting: Setting, crf_backend: str = "dense", default: bool = False) -> Config:
    """Return the configuration of a run whose model is the default, or the first version's, so that figures compare."""
    data = DataConfig(size=setting.size, num_segments=setting.frames)
    model = ModelConfig(dim=setting.dim, crf_backend=crf_backend)  # type: ignore[arg-type]
    if not default:
        model = replace(model, branches="static", time="attention")
    return Config(data=data, model=model, run=RunConfig(wandb="off"))


class NoCRF(nn.Module):
    """In the CRF's place: the features as they are."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], CRFOutput]:
        return levels, CRFOutput(None, None, {})


def fresh_model(setting: Setting, config: Config) -> nn.Module:
    return build_model(config.model, setting.frames)


def model_of(setting: Setting, config: Config, crf: bool = True) -> nn.Module:
    """The model on the device, in the order of memory that training has; always the same weights."""
    torch.manual_seed(0)
    model = fresh_model(setting, config)
    if not crf:
        model.crf = NoCRF()
    return model.to(setting.device, memory_format=torch.channels_last).train()


def fused_operators_called() -> contextlib.AbstractContextManager[object]:
    """Have fused layers call their operators on tensors without content, for which no kernel is launched."""
    return mock.patch.object(fused_layers, "taken", lambda x: True)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, "adamw", 1e-3, 0.05)


def loss_of(setting: Setting, config: Config, model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> Tensor:
    """The trainer's loss of a batch, the forward pass under autocast to `dtype`."""
    precision = Precision(torch.device(setting.device), dtype, config.run.channels_last)
    return build_objective(config.loss, [])(precision.forward(model, batch.clips), batch)


class Called:
    """Plays graphs for a test's stub, which has none: what is captured is called."""

    def stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


class Step:
    """The trainer's own optimizer step, in bf16: takes a batch, returns its loss, which the next one may overwrite."""

    def __init__(self, setting: Setting, config: Config, model: nn.Module, options: "StepOptions"):
        self.model, self._options, self._number = model, options, 0
        device = torch.device(setting.device)
        precision = Precision(device, torch.bfloat16, config.run.channels_last, options.at_once)
        self.state = TrainState(model, optimizer_of(model), precision.scaler(), None)
        world, schedule = World(0, 1, 0, 1, device), Schedule(1e-3, 0, 10**6, 10**6)
        objective, nothing = build_objective(config.loss, []), cast(Any, None)  # it takes its batches from elsewhere
        backend = CudaGraphs(device) if setting.device == "cuda" else Called()
        graphs = Graphs(backend if options.graph else None)
        if options.ddp:
            join_alone(setting)
            graphs = together(backend if options.graph else None, world)
            if not options.graph:
                model = distributed.parallel(model, world)
        job = Job(config, world, nothing, nothing, self.state, model, objective, schedule, precision)
        exchange = distributed.Exchange(self.model, world) if options.ddp and options.graph else None
        self._take = TrainingStep(job, self._loss_of, graphs, exchange)
        self._algorithms = RunConfig(deterministic=options.deterministic)

    def _loss_of(self, job: Job, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        prediction = job.precision.forward(job.model, batch.clips)
        loss = job.objective(prediction, batch)
        self._loss = loss.detach()
        return loss, prediction.diagnostics

    def __call__(self, batch: Batch) -> Tensor:
        torch.manual_seed(zlib.crc32(f"0/{self._number}".encode()))
        self._number += 1
        if self._options.bf16_input and batch.clips.dtype != torch.bfloat16:
            batch = replace_clips(batch, batch.clips.to(torch.bfloat16))
        with chosen_algorithms(self._algorithms):
            torch.backends.cudnn.benchmark = self._options.cudnn_benchmark
            self._take(batch, True, True)
        if note := self._take.take_note():
            raise RuntimeError(note)  # figures of an eager step would be taken for those of a graph
        if self.state.guard.diverged():
            raise FloatingPointError("the loss or the gradient is not finite, step after step")
        return self._loss

    @property
    def warm_up(self) -> int:
        """How many steps it takes until all that follow are alike: with a graph the next one is its replay."""
        return WARM_UP + 1

    def worked_s(self) -> float | None:
        """The seconds that the card has worked on steps that are graphs, by its own clock; None of other steps."""
        return self._take.worked_s()

    def restore(self, saved: dict[str, Any], number: int) -> None:
        """Go on from a state, as the step of this number."""
        self.state.load_state_dict(saved)
        self._number = number


def join_alone(setting: Setting) -> None:
    """Make this process the only one of a group, which NCCL takes on one card: it exchanges gradients with itself."""
    if not dist.is_initialized():
        backend = "nccl" if setting.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class StepOptions(NamedTuple):
    """How a step is taken."""

    cudnn_benchmark: bool = False
    bf16_input: bool = False
    graph: bool = False
    deterministic: bool = False
    ddp: bool = False  # of one process
    at_once: bool = False  # casts of weights


def training_step(
    setting: Setting,
    *,
    crf_backend: str = "dense",
    compiled: bool = False,
    crf: bool = True,
    default: bool = False,
    nudge: float = 0.0,
    fused: str = "off",
    **how: bool,
) -> Step:
    """A step under some options, those of `StepOptions` among them.

    `default` takes the default model instead of the first version's. `nudge` moves each weight by up to that share of
    itself: what rounding does, to compare other differences with. `fused` is --run.fused.
    """
    config = config_of(setting, crf_backend, default)
    model = model_of(setting, config, crf)
    if fused in LAYERS:
        if setting.device == "cuda" and (why := why_not(torch.device("cuda"), torch.bfloat16)) is not None:
            raise RuntimeError(why)  # figures of torch's operators would be taken for those of the kernels
        fuse(model, LAYERS[fused])
    if nudge:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + nudge * (2 * torch.rand_like(parameter) - 1))
    step = Step(setting, config, model, StepOptions(at_once=fused in ("weights", "all"), **how))
    if compiled:
        model.compile()
    return step


def replace_clips(batch: Batch, clips: Tensor) -> Batch:
    return Batch(clips, batch.labels, batch.valid, batch.ids)


def beside(setting: Setting, how: Mapping[str, Any]) -> Callable[[], int]:
    """The synthetic step under some options, for others to run beside it; returns the clips that it did."""
    step, batch = training_step(setting, **how), synthetic(setting, setting.batch)

    def run() -> int:
        step(batch)
        return setting.batch

    return run


def gradients(
    setting: Setting, batch: Batch, wrap: Callable[[nn.Module], nn.Module] = lambda m: m
) -> dict[str, Tensor]:
    """The gradients of one batch in float32, by name; batch statistics and dropout stand still."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions, a 1,000th off
    config = config_of(setting)
    config = replace(config, model=replace(config.model, dropout=0.0))
    model = model_of(setting, config).eval()
    wrapped = wrap(model)  # has to live until the gradients are there: DDP sums them
    loss = loss_of(setting, config, wrapped, batch, None)
    loss.backward()
    return {name: p.grad.detach().cpu() for name, p in model.named_parameters()}


def batches(loader: ClipLoader) -> Iterator[Batch]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        yield from loader(epoch)
        epoch += 1


def free_card() -> None:
    """Give back what torch keeps of freed memory, so that the next peak is its own."""
    gc.collect()
    cuda.empty_cache()
