"""The project as the benchmark uses it: its loader, its model and its training step. All imports of it are here."""

import gc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.card import cuda
from benchmarks.gpu_parts.setting import Setting
from dali_pipes.loader import ClipLoader
from dali_pipes.options import LoaderOptions
from dali_pipes.sources import source_of
from dfer.batch import Batch
from dfer.cli import leave
from dfer.config import Config, DataConfig, ModelConfig, RunConfig
from dfer.crf.layers import CRFOutput
from dfer.lists.index import ClipIndex, load_index
from dfer.losses import build_objective
from dfer.model.build import build_model
from dfer.optim.guard import NonFiniteGuard
from dfer.optim.optimizers import build_optimizer
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import ClipSampler
from dfer.plan.transforms import IMAGENET_STD
from dfer.precision import Precision

__all__ = ["IMAGENET_STD", "Batch", "leave", "source_of"]  # the other parts import the project from here alone

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


def clip_loader(
    setting: Setting,
    source: str,
    *,
    where: Literal["card", "cpu"] = "card",
    engine: float = 0.0,
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
        device="gpu" if gpu else "cpu",
        graph="operators" if card else "fused",
        jpeg_engine=engine,
        cached=held,
        num_threads=setting.cores,
        device_id=0 if gpu else None,
    )
    listed = listed or ("held" if held else "long")
    return ClipLoader(index_of(setting, source, listed), sampler_of(setting), options)


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


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, "adamw", 1e-3, 0.05)


def loss_of(setting: Setting, config: Config, model: nn.Module, batch: Batch, dtype: torch.dtype | None) -> Tensor:
    """The trainer's loss of a batch, the forward pass under autocast to `dtype`."""
    precision = Precision(torch.device(setting.device), dtype, config.run.channels_last)
    return build_objective(config.loss, [])(precision.forward(model, batch.clips), batch)


class Step:
    """One optimizer step as the trainer takes it, in bf16: takes a batch, returns its loss."""

    def __init__(self, setting: Setting, config: Config, model: nn.Module, cudnn_benchmark: bool, bf16_input: bool):
        self.model = model
        self._setting, self._config = setting, config
        self._cudnn_benchmark, self._bf16_input = cudnn_benchmark, bf16_input
        self._optimizer = optimizer_of(model)
        scaler = torch.amp.GradScaler(setting.device, enabled=False)
        self._guard = NonFiniteGuard(model, self._optimizer, scaler)
        self._number = 0

    def __call__(self, batch: Batch) -> Tensor:
        torch.backends.cudnn.benchmark = self._cudnn_benchmark
        torch.manual_seed(zlib.crc32(f"0/{self._number}".encode()))
        self._number += 1
        if self._bf16_input and batch.clips.dtype != torch.bfloat16:
            batch = replace_clips(batch, batch.clips.to(torch.bfloat16))
        self._guard.before_forward()
        loss = loss_of(self._setting, self._config, self.model, batch, torch.bfloat16)
        finite = loss.detach().isfinite()
        (loss * torch.where(finite, 1.0, torch.nan)).backward()
        self._guard.step(1.0)
        if self._guard.diverged():
            raise FloatingPointError("the loss or the gradient is not finite, step after step")
        self._optimizer.zero_grad()
        return loss.detach()


def training_step(
    setting: Setting,
    *,
    crf_backend: str = "dense",
    bf16_input: bool = False,
    cudnn_benchmark: bool = False,
    compiled: bool = False,
    crf: bool = True,
    default: bool = False,
    nudge: float = 0.0,
) -> Step:
    """A step under some options.

    `default` takes the default model instead of the first version's. `nudge` moves each weight by up to that share of
    itself: what rounding does, to compare other differences with.
    """
    config = config_of(setting, crf_backend, default)
    model = model_of(setting, config, crf)
    if nudge:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + nudge * (2 * torch.rand_like(parameter) - 1))
    step = Step(setting, config, model, cudnn_benchmark, bf16_input)
    if compiled:
        model.compile()
    return step


def replace_clips(batch: Batch, clips: Tensor) -> Batch:
    return Batch(clips, batch.labels, batch.valid, batch.ids)


def beside(setting: Setting) -> Callable[[], int]:
    """The synthetic step, for others to run beside it; returns the clips that it did."""
    step, batch = training_step(setting), synthetic(setting, setting.batch)

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
