"""The options of the loader, without DALI."""

from dataclasses import dataclass
from typing import Literal

import torch

from dfer.lists.index import Source
from dfer.run.neighbours import Neighbours

# How clips are made: by the CPU's kernel in DALI's graph; by DALI's operators; decoded by DALI, the rest by one kernel
# (pixels.py); without DALI, of what threads have read or decoded (streaming.py, image_stream.py, video_stream.py). The
# CPU's kernel makes clips of videos where they are decoded, without a graph: "fused" is "streamed" there.
Graph = Literal["fused", "operators", "decoded", "streamed"]
AHEAD = 2  # batches that are read, and videos decoded, before their turn
Kind = Literal["images", "pixels", "videos"]  # of a source: encoded images, uint8 pictures, encoded video files


@dataclass(frozen=True)
class LoaderOptions:
    """Options of a `ClipLoader`: the batch, the machine, and the policy on clips that cannot be read."""

    batch_size: int  # clips per batch and rank
    size: int  # height and width of the clips in pixels
    dtype: torch.dtype = torch.float32  # or bfloat16, float16; or uint8: colours 0..255, not normalised (fused only)

    # Where clips end up.
    device: Literal["cpu", "gpu"] = "cpu"
    device_id: int | None = None  # number of the GPU
    graph: Graph | None = None  # None: as `route` says
    # Share of the images for the GPU's JPEG engine, if it has one; its SMs do the others. 0 until a card has shown that
    # it does not mix the pixels of two batches (benchmarks/gpu.py). None: the machine's cores decode.
    jpeg_engine: float | None = 0.0
    halved: bool = False  # the cores decode every other image, whatever is said above of the others
    # What decodes videos for a GPU: the cores, or NVDEC those that it takes; "auto" is the cores.
    video_decoder: Literal["auto", "cores", "nvdec"] = "auto"
    # Of NVDEC, beside each other: sessions x depth DALI pipelines. Only benchmarks/gpu.py sets it; a run has one.
    nvdec_sessions: int = 1
    cached: bool = False  # hold all pictures of a raw source in memory of devices; nothing is loaded after the start
    neighbours: Neighbours | None = None  # who hold shares of them, of which this device has one; None: it has all
    num_threads: int = 2  # of the graph, or at least of the readers
    rank: int = 0
    world_size: int = 1

    # What becomes of a clip that cannot be read: "error", or "skip", which names it on stderr, once, and goes on. Its
    # row of the batch is not valid and holds another clip's pixels, or zeros where no clip of the batch can be read. No
    # other row and no number of batches changes.
    bad_clips: Literal["error", "skip"] = "error"
    patience: float = 300.0  # seconds to wait for storage or a decoder before giving up on it

    @property
    def fused(self) -> bool:
        """Return True for the graph with our CPU kernel, False for the one of DALI's operators."""
        return (self.graph or ("operators" if self.device == "gpu" else "fused")) == "fused"

    def route(self, source: Source) -> Graph:
        """Return how the clips of a source are made, if they are not held in memory."""
        if source == "video" and self.fused:
            return "streamed"
        if self.graph is not None or self.device == "cpu":
            return self.graph or "fused"
        if source == "video":
            return "operators"
        return "streamed" if source == "raw" or self.jpeg_engine is None or self.halved else "decoded"

    @property
    def depth(self) -> int:
        """Return how many batches are decoded at a time: on a GPU the stages of one leave room for another."""
        return 2 if self.device == "gpu" else 1

    @property
    def torch_device(self) -> torch.device:
        """Return the device where clips end up."""
        return torch.device("cuda", self.device_id or 0) if self.device == "gpu" else torch.device("cpu")
