"""The processes of a run: one under plain python, several under torchrun."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup(device: Literal["auto", "cpu", "cuda"]) -> World:
    """Find rank and device, and join the others if there are any (NCCL on GPUs, gloo on CPUs).

    Raises:
        ValueError: if a GPU is asked for that is not there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not available:
        raise ValueError("--run.device cuda: no NVIDIA GPU is visible here")
    if device != "cpu" and 0 < available < local_size:
        raise ValueError(f"{local_size} processes for {available} GPUs: lower --nproc_per_node or --run.device cpu")
    use_gpu = device != "cpu" and available > 0
    torch_device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(torch_device)
    if size > 1:
        # The time-out must cover the slowest first step (compilation) and the slowest evaluation.
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=timedelta(minutes=10))
    return World(rank, size, local_rank, local_size, torch_device)


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the batch statistics of rank 0, so that they evaluate one and the same model."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(tensor: Tensor, world: World) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along the first axis."""
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
