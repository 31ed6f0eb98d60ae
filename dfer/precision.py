"""Mixed precision and memory layout: how every forward pass of a model is computed, in training and everywhere else."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dfer.cli import UserError
from dfer.config import Amp, RunConfig
from dfer.model import Prediction
from dfer.model.casts import cast_weights


class Precision(NamedTuple):
    device: torch.device
    dtype: torch.dtype | None  # of autocast; None: float32, which cuDNN's convolutions round to TF32 on a GPU
    channels_last: bool
    at_once: bool = False  # autocast's casts of weights are done by one kernel; the bits are the same

    def forward(self, model: nn.Module, clips: Float[Tensor, "B T 3 H W"]) -> Prediction:
        """Return what a model makes of clips as the loader gives them, which are channels-last in memory."""
        clips = self.layout(clips)
        with self.autocast():
            if self.dtype is None or not self.at_once:
                return model(clips)
            return functional_call(model, cast_weights(model, self.dtype), (clips,), tie_weights=False)

    def autocast(self) -> torch.autocast:
        """Return the context in which a forward pass runs."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def layout(self, clips: Float[Tensor, "B T 3 H W"]) -> Float[Tensor, "B T 3 H W"]:
        """Return channels-last clips in the memory format that the model takes."""
        return clips if self.channels_last else clips.contiguous()

    def layout_weights(self, model: nn.Module) -> None:
        """Have the weights of a model's 2-D convolutions lie in memory as the maps do."""
        for weight in model.parameters() if self.channels_last else ():
            if weight.dim() == 4:  # 3-D convolutions have a format of their own, which their clips do not come in
                weight.data = weight.data.to(memory_format=torch.channels_last)

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler that fp16 needs; with any other type it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def auto_amp(gpu: bool) -> Literal["bf16", "off"]:
    """Return what --run.amp auto means here: bfloat16 where the hardware computes it.

    That is on GPUs, and on CPUs with AVX512-BF16 or AMX.
    """
    native = gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "off"


def amp_of_trained(run: RunConfig, device: Literal["cpu", "cuda"]) -> Amp:
    """Return the --run.amp with which a trained model is computed: its run's, or what suits another kind of device.

    A GPU's run has "off" only where that was typed: it holds on a CPU too.
    """
    return run.amp if run.device in ("auto", device) or (run.device, run.amp) == ("cuda", "off") else "auto"


def build_precision(run: RunConfig, device: torch.device) -> Precision:
    """Return the precision that a configuration names.

    Raises:
        UserError: if fp16 is asked for on a CPU.
    """
    gpu = device.type == "cuda"
    if run.amp == "fp16" and not gpu:
        raise UserError("--run.amp fp16: needs a GPU; on a CPU use bf16 or off")
    amp = auto_amp(gpu) if run.amp == "auto" else run.amp
    dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return Precision(device, dtype, run.channels_last)
