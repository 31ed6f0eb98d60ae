"""Problems for mean-field inference: small ones at random, and one of the size that a clip has."""

import torch

from dfer.crf.layers import cell_positions
from dfer.crf.meanfield import Features, MeanField, Sums, meanfield
from dfer.crf.pairs import normalised_kernel
from tests import crf_oracle

DOUBLE = torch.float64


class Problem:
    """Random clips over a fine and a coarse level, in float64; `parameters` are what gradients are taken of."""

    def __init__(
        self,
        seed: int,
        coupling: float = 2.0,
        batch: int = 1,
        frames: int = 3,
        sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 3), (1, 2)),
        states: int = 4,
        dim: int = 5,
        spread: float = 1.0,
        indefinite: bool = False,
        width: int = 3,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=DOUBLE)

        self.time = torch.arange(frames, dtype=DOUBLE)[:, None]
        self.cells = cell_positions([torch.Size(s) for s in sizes], (16, 32), torch.device("cpu")).double()
        num_tokens = frames * len(self.cells)
        factor = draw(2, states, states)
        matrix = factor + factor.mT if indefinite else factor @ factor.mT
        self.parameters = {
            "unary": draw(batch, num_tokens, states),
            "embedding": spread * draw(batch, num_tokens, dim),
            "sigmas": draw(2, 4).mul(0.3).exp(),  # of appearance and smoothness: frame, height, width, level
            "compatibility": coupling / 2 * matrix / matrix.abs().sum(-1).amax(-1)[:, None, None],
            "values": draw(batch, num_tokens, width),
        }

    def features(self, smooth: bool = True, **changed: torch.Tensor) -> Features:
        p = self.parameters | changed
        appearance, smoothness = p["sigmas"]
        over_time = (self.time / appearance[0])[:, None].expand(-1, len(self.cells), -1)
        over_cells = (self.cells / appearance[1:]).expand(len(self.time), -1, -1)
        position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1)
        points = torch.cat([p["embedding"], position.expand(len(p["embedding"]), -1, -1)], dim=-1)
        if not smooth:
            return Features(points)
        frames = normalised_kernel((self.time / smoothness[0]).expand(len(points), -1, -1))
        return Features(points, frames, normalised_kernel(self.cells / smoothness[1:]))

    def solve(
        self, iterations: int = 3, smooth: bool = True, dtype: torch.dtype = DOUBLE, **options: object
    ) -> MeanField:
        """Options that are parameters replace them; the others go to `meanfield`."""
        p = self.parameters | {name: options.pop(name) for name in self.parameters if name in options}
        features = Features(*(f.to(dtype) for f in self.features(smooth, **p) if f is not None))
        matrices = p["compatibility"] if smooth else p["compatibility"][:1]
        inputs = (p["unary"].to(dtype), features, matrices.to(dtype), iterations)
        sums = Sums(**{name: options.pop(name) for name in Sums._fields if name in options})
        return meanfield(*inputs, values=p["values"].to(dtype), sums=sums, **options)

    def slow_kernels(self, clip: int = 0, smooth: bool = True) -> list[list[list[float]]]:
        position = [[*t, *c] for t in self.time.tolist() for c in self.cells.tolist()]
        scaled = [
            [[x / s for x, s in zip(p, sigma, strict=True)] for p in position]
            for sigma in self.parameters["sigmas"].tolist()
        ]
        points = [e + p for e, p in zip(self.parameters["embedding"][clip].tolist(), scaled[0], strict=True)]
        return [crf_oracle.kernel(points)] + ([crf_oracle.kernel(scaled[1])] if smooth else [])


class FullSize:
    """16 frames of 7x7 and 4x4 cells, 16 states, 64 values: N = 1040, float64."""

    def __init__(self, batch: int = 1, frames: int = 16, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        sizes, num_tokens = [torch.Size((7, 7)), torch.Size((4, 4))], frames * 65
        cells = cell_positions(sizes, (16, 32), torch.device("cpu")).double()
        time = torch.arange(frames, dtype=DOUBLE)[:, None]
        embedding = torch.randn(batch, num_tokens, 28, generator=generator, dtype=DOUBLE)
        embedding = 2 * embedding / embedding.norm(dim=-1, keepdim=True)
        over_time, over_cells = time[:, None].expand(-1, 65, -1) / 4, cells.expand(frames, -1, -1) / 0.5
        position = torch.cat([over_time, over_cells], dim=-1).flatten(0, 1).expand(batch, -1, -1)
        self.points = torch.cat([embedding, position], dim=-1)
        self.frames = normalised_kernel((time / 2).expand(batch, -1, -1))
        self.cells = normalised_kernel(cells / 0.15)
        self.unary = torch.randn(batch, num_tokens, 16, generator=generator, dtype=DOUBLE)
        self.values = torch.randn(batch, num_tokens, 64, generator=generator, dtype=DOUBLE)
        self.compatibility = torch.eye(16, dtype=DOUBLE).repeat(2, 1, 1)
        self.weights = [torch.randn(x.shape, generator=generator, dtype=DOUBLE) for x in (self.unary, self.values)]

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = (self.unary, self.points, self.frames, self.cells, self.compatibility, self.values)
        return [x.to(dtype, copy=True).requires_grad_() for x in tensors]

    def run(self, dtype: torch.dtype, operands: torch.dtype, backend: str = "dense", factor: float = 1.0):
        """Outputs, and gradients of `factor` times a weighted sum of them."""
        inputs = self.inputs(dtype)
        unary, points, frames, cells, compatibility, values = inputs
        features = Features(points, frames, cells)
        options = {"values": values, "sums": Sums(backend, operands)}
        field = meanfield(unary, features, compatibility, 3, **options)
        total = sum((w.to(dtype) * x).sum() for w, x in zip(self.weights, field[:2], strict=True))
        return [x.detach() for x in field[:2]], torch.autograd.grad(factor * total, inputs)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()
