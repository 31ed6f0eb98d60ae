"""Clips out of a table of decoded frames: the table, and the GPU's kernel in Triton's interpreter and its compiler.

The same checks run in the interpreter and on a GPU. The rules are those of the CPU's kernel and of the oracle's loops.
"""

import dataclasses
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dali_pipes
from dali_pipes import pixels, torch_stages
from dali_pipes.kernels import COLOUR, ERASE, MIRROR, NUM_PARAMETERS, cut, fused, parameters
from dali_pipes.loader import usable
from dali_pipes.options import LoaderOptions
from dfer.plan.augmentation import Augmentation
from dfer.plan.sampling import EpochPlan, epoch_plan
from tests.conftest import no_waiting
from tests.oracle import crop, oracle_clip
from tests.test_kernels import EVERYTHING

COLOURED = Augmentation(min_crop_area=0.05, max_crop_ratio=1.4, colour=0.4, hue=0.1, erase=0.9)  # no warp, no blur
TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Enlarged, as they are, reduced by less and by more than 2; single rows and columns.
SMALL = [(7, 5), (9, 10), (20, 7), (12, 21), (1, 6), (9, 1)]
LARGE = [*SMALL, (128, 128), (224, 200), (720, 1280), (90, 2000)]


def drawn(augmentation: Augmentation, num_videos: int, size: int) -> EpochPlan:
    """Clips of two frames. Of the first, an edge of what is erased lies in the middle of a pixel."""
    plan = epoch_plan(3, 0, np.full(num_videos, 9), 2, augmentation=augmentation)
    plan.erase[0] = np.array([1.5, 2.5, 2.0, 3.0]) / size
    assert plan.erase[0, 1] * np.float32(size) == 2.5
    return plan


class Pictures:
    """Frames of several sizes, two a clip, in one piece of memory with other bytes between them."""

    def __init__(self, shapes: list[tuple[int, int]], augmentation: Augmentation, size: int):
        rng = np.random.default_rng(0)
        self.plan, self.size = drawn(augmentation, len(shapes), size), size
        sizes = np.array([shapes, shapes[1:] + shapes[:1]]).transpose(1, 0, 2)  # (N, T, 2)
        ends = np.cumsum(13 + sizes.prod(2).ravel() * 3).reshape(-1, 2)
        self.memory = rng.integers(0, 256, int(ends[-1, -1]) + 13, dtype=np.uint8)
        self.start, self.sizes = ends - 3 * sizes.prod(2), sizes
        self.frames = [
            [self.memory[a : a + 3 * h * w].reshape(h, w, 3) for a, (h, w) in zip(*clip, strict=True)]
            for clip in zip(self.start.tolist(), sizes.tolist(), strict=True)
        ]

    def table(self, memory: torch.Tensor) -> pixels.Frames:
        """The table, where the frames lie in this copy of the memory."""
        address = memory.data_ptr() + self.start
        cuts = pixels.cut_out(address, self.sizes[:, :, 0], self.sizes[:, :, 1], self.plan.box)
        made = pixels.Frames(torch.from_numpy(cuts), torch.from_numpy(parameters(self.plan, self.rows, crop=False)))
        return pixels.Frames(*(part.to(memory.device) for part in made))

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.frames))

    def want(self) -> np.ndarray:
        """What the oracle makes of them, (N, T, S, S, 3)."""
        made = [oracle_clip(frames, self.plan, row, self.size) for row, frames in enumerate(self.frames)]
        return np.stack(made).transpose(0, 1, 3, 4, 2)

    def by_the_cpu(self) -> np.ndarray:
        """What the CPU's kernel makes of the whole frames, one by one."""
        out = np.empty((*self.sizes.shape[:2], self.size, self.size, 3), np.float32)
        for row, p in enumerate(parameters(self.plan, self.rows)):
            for t, frame in enumerate(self.frames[row]):
                fused(out[row, t], frame, p)
        return out


def interpreted():
    """The module with its kernels in Triton's interpreter."""
    spec = importlib.util.find_spec("dali_pipes.pixel_kernel")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def check(shapes, augmentation, size: int, device: str, types=TYPES) -> None:
    """The kernel, and torch's stages behind it, against the oracle and against the CPU's kernel."""
    pictures = Pictures(shapes, augmentation, size)
    memory = torch.from_numpy(pictures.memory).to(device)
    stages = torch_stages.Stages(pictures.plan)
    table, rows = pictures.table(memory), torch.from_numpy(pictures.rows[::-1].copy()).to(device)
    whole, *short = (pixels.on_gpu(table, rows, stages, size, dtype).cpu() for dtype in types)
    bound = 5e-4 if stages.touches_geometry else 2e-5  # a step of 255 is about 0.02
    assert np.abs(whole.numpy() - pictures.want()[::-1]).max() < bound
    assert np.abs(whole.numpy() - pictures.by_the_cpu()[::-1]).max() < 5e-4
    for dtype, got in zip(types[1:], short, strict=True):
        assert got.dtype == dtype
        if device == "cpu" and dtype == torch.bfloat16 and not stages.touches_geometry:  # the interpreter cuts off
            assert torch.equal(got, (whole.view(torch.int32) & -65536).view(torch.float32).bfloat16())
        else:  # each type is compiled by itself
            assert (got != whole.to(dtype)).float().mean() < 1e-3
            torch.testing.assert_close(got, whole.to(dtype), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("augmentation", [COLOURED, EVERYTHING], ids=["plain", "everything"])
def test_the_kernel_in_the_interpreter(monkeypatch, augmentation):
    monkeypatch.setitem(sys.modules, "dali_pipes.pixel_kernel", module := interpreted())
    monkeypatch.setattr(dali_pipes, "pixel_kernel", module, raising=False)
    monkeypatch.setattr(module, "BLOCK", 64)  # so that a frame of 9 x 9 needs two, the last one in part
    check(SMALL, augmentation, 9, "cpu", TYPES[: 2 if augmentation is COLOURED else 1])


def test_the_table_on_a_cpu_gives_the_clips_of_its_kernel():
    pictures = Pictures(SMALL, EVERYTHING, 10)
    memory = torch.from_numpy(pictures.memory)
    stages = torch_stages.Stages(pictures.plan)
    got = pixels.clips(pictures.table(memory), torch.tensor([4, 0, 4]), stages, 10, torch.float32)
    assert np.array_equal(got.numpy(), pictures.by_the_cpu()[[4, 0, 4]])
    half = pixels.clips(pictures.table(memory), torch.tensor([4, 0, 4]), stages, 10, torch.bfloat16)
    assert torch.equal(half, got.bfloat16())


@pytest.mark.parametrize("one_piece", [True, False])
def test_decoded_frames_may_lie_apart(one_piece):
    """DALI's own lists of both kinds."""
    pictures, stages = Pictures(SMALL, EVERYTHING, 10), torch_stages.Stages(drawn(EVERYTHING, len(SMALL), 10))
    rows = pictures.rows[::-1].copy()
    frames = [TensorCPU(frame, "HWC") for row in rows for frame in pictures.frames[row]]
    decoded = TensorListCPU(frames, "HWC", one_piece)
    if not one_piece:
        with pytest.raises(RuntimeError, match="contiguous"):
            decoded.as_reshaped_tensor([int(pictures.sizes.prod(2).sum()) * 3])
    cpu = torch.device("cpu")
    sizes = np.array(decoded.shape()).reshape(len(rows), -1, 3)
    got = pixels.of_decoded(decoded, sizes, pictures.plan, rows, stages, 10, torch.float32, cpu)
    assert np.array_equal(got.numpy(), pictures.by_the_cpu()[::-1])


def test_cuts_are_those_of_the_oracle_and_of_the_kernel():
    """Random boxes, boxes that end between two pixels, at an edge, and empty ones."""
    rng = np.random.default_rng(1)
    height, width = rng.integers(1, 70, (2, 4000, 1))
    start = rng.random((4000, 2))
    box = np.concatenate([start, rng.random((4000, 2)) * (1 - start)], axis=1)
    sides = np.concatenate([height, width], axis=1)
    halves = (rng.integers(0, 2 * sides + 1) / (2 * sides)).clip(0, 1)  # pixels and a half
    box[1000:3000, :2] = halves[1000:3000]
    box[2000:3000, 2:] = (rng.integers(0, 2 * sides + 1) / (2 * sides))[2000:3000].clip(0, 1 - halves[2000:3000])
    box[3000:3100, 2:] = 0
    box[3100:3200] = [0, 0, 1, 1]
    got = pixels.cut_out(np.zeros((4000, 1), np.int64), height, width, box)[:, 0]
    for (h, w), found, share in zip(sides.tolist(), got.tolist(), box, strict=True):
        number = np.arange(h * w).reshape(h, w)  # of each pixel
        want = crop(number, share)
        assert found == [3 * want[0, 0], 3 * w, *want.shape]
        top, rows = cut(np.float32(share[0]), np.float32(share[2]), h)
        left, columns = cut(np.float32(share[1]), np.float32(share[3]), w)
        assert found == [3 * (top * w + left), 3 * w, rows, columns]


@pytest.mark.parametrize(
    ("capability", "types"),
    [
        (90, ("*bf16",)),
        pytest.param(90, ("*fp32", "*fp16"), marks=pytest.mark.slow),
        pytest.param(80, ("*fp32", "*bf16", "*fp16"), marks=pytest.mark.slow),
    ],
)
def test_the_kernel_compiles_for_gpus(tmp_path, monkeypatch, capability, types):
    """To machine code, without shared memory and without a spilled register."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from dali_pipes import pixel_kernel

    for out in types:
        for finished in {out != "*fp32", True}:
            constants = {"T": 16, "SIZE": 112, "P": NUM_PARAMETERS, "MIRROR": MIRROR, "ERASE": ERASE, "COLOUR": COLOUR}
            constants |= {"FINISHED": finished, "BLOCK": pixel_kernel.BLOCK}
            kinds = {"out": out, "rows": "*i64", "cuts": "*i64", "parameters": "*fp32"}
            signature = kinds | dict.fromkeys(constants, "constexpr")
            source = ASTSource(fn=pixel_kernel._clips_kernel, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert made.metadata.shared == 0 and ".local" not in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
    assert any(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", [COLOURED, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("size", [10, 112, 224])
def test_the_kernel_on_a_gpu(augmentation, size):
    check(LARGE, augmentation, size, "cuda")


@pytest.mark.gpu
def test_the_kernel_waits_for_nothing():
    pictures = Pictures(SMALL, COLOURED, 112)
    table = pictures.table(torch.from_numpy(pictures.memory).cuda())
    rows, stages = torch.arange(6, device="cuda"), torch_stages.Stages(pictures.plan)
    pixels.clips(table, rows, stages, 112, torch.bfloat16)  # compiles
    with no_waiting():
        pixels.clips(table, rows, stages, 112, torch.bfloat16)


def test_stages_are_those_of_the_plan():
    every = torch_stages.Stages(drawn(EVERYTHING, 30, 9))
    assert every.warps and every.largest_blur > 0 and every.erases and every.touches_geometry
    plain = torch_stages.Stages(drawn(COLOURED, 30, 9))
    assert plain.erases and not plain.touches_geometry
    none = dataclasses.replace(drawn(COLOURED, 30, 9), erase=np.zeros((30, 4), np.float32))
    assert not torch_stages.Stages(none).erases


def test_a_kernel_that_does_not_do_what_it_should_is_not_used(monkeypatch, capsys):
    """Whether it runs, or makes something else: it is said, and the clips are made in another way."""
    pixels.why_not.cache_clear()
    assert pixels.why_not(torch.device("cpu")) is None
    real = pixels.clips
    for wrong in (lambda made: made + 0.01, lambda made: made * torch.nan, lambda made: 1 / 0):
        number = iter(range(2))
        monkeypatch.setattr(
            pixels, "clips", lambda *args, w=wrong, n=number: (w if next(n) else torch.clone)(real(*args))
        )
        pixels.why_not.cache_clear()
        assert "Triton's kernel for clips" in pixels.why_not(torch.device("cpu"))
    pixels.why_not.cache_clear()
    options, index = LoaderOptions(2, 8, device="gpu", device_id=0), SimpleNamespace(source="frames")
    monkeypatch.setattr(pixels, "why_not", lambda device: "it burns")
    assert usable(options, index) == dataclasses.replace(options, graph="operators")
    held = dataclasses.replace(options, cached=True)
    assert usable(held, SimpleNamespace(source="raw")) == dataclasses.replace(options, graph="operators")
    assert usable(options, SimpleNamespace(source="video")) == options
    assert capsys.readouterr().err.splitlines() == [
        "note: it burns: DALI's operators make the clips",
        "note: it burns: DALI's operators make the clips; none are held in memory",
    ]
    monkeypatch.setattr(pixels, "why_not", lambda device: None)
    assert usable(held, SimpleNamespace(source="raw")) == held
