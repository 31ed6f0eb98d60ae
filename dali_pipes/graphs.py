"""The DALI graphs: decode -> crop -> resize -> mirror -> colour and normalise. Deterministic: all draws are inputs.

Graphs for the same clip. `fused` does everything after decoding in our own CPU kernel; `operators` uses DALI's
operators, on the GPU, or on the CPU, where it is several times slower and serves the tests; `decoded` leaves all but
decoding to pixels.py.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.numba import NumbaFunction

from dali_pipes import kernels
from dali_pipes.options import Kind

_FLOAT, _UINT8 = types.DALIDataType.FLOAT, types.DALIDataType.UINT8
_TYPES = {"float32": _FLOAT, "uint16": types.DALIDataType.UINT16, "uint8": _UINT8}


class _Compiled(NumbaFunction):
    """DALI's operator for compiled Python, given machine code: by itself it would compile 6 seconds at every start."""

    def _get_run_fn_cpu(self, run_fn: int, *_: object) -> int:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: int) -> int:
        return setup_fn


def fused(kind: Kind, max_frames: int, size: int, dtype: str, num_threads: int) -> Pipeline:
    """Build the graph from images or pixels to one batch of (size, size, 3) `dtype` pictures, on the CPU.

    Inputs, per frame: "source"; "parameters" as kernels.parameters makes them; and for images "anchor" and "shape",
    (2,) float32, the crop as (y, x) shares of the image.
    """

    def define() -> DataNode:
        frames = _input("source")
        if kind == "images":
            # Decodes only the rows of the crop; the pixels are those of decode-then-slice, to the bit.
            frames = _node(fn.decoders.image_slice(frames, _input("anchor"), _input("shape"), **_CROP))
        run, setup = (cast(Any, address) for address in kernels.compiled(size, dtype))  # not functions: see _Compiled
        operator = _Compiled(run, [_TYPES[dtype]], [_UINT8, _FLOAT], outs_ndim=[3], ins_ndim=[3, 1], setup_fn=setup)
        return _node(operator(frames, _input("parameters")))

    return _build(define, max_frames, num_threads, None)


def operators(
    kind: Kind,
    max_samples: int,
    size: int,
    num_threads: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    jpeg_engine: float,
) -> Pipeline:
    """Build the graph from images, pixels or videos to one batch of float32 pictures by DALI's operators.

    The pictures are (size, size, 3), from videos (T, size, size, 3).

    Inputs, per frame, or per clip for videos: "source", "anchor" and "shape" as in `fused`; "mirror" int32; "matrix"
    (3, 3) and "offset" (3,) float32, the affine map of RGB in 0..255; for videos "frames" (T,) int32.
    """

    def define() -> DataNode:
        source, crop = _input("source"), (_input("anchor"), _input("shape"))
        mixed = "mixed" if device == "gpu" else "cpu"
        if kind == "images" and device == "cpu":
            frames = _node(fn.decoders.image_slice(source, *crop, **_CROP))
        elif kind == "images":
            frames = _node(fn.decoders.image(source, device=mixed, hw_decoder_load=jpeg_engine, **_FOR_NVJPEG))
            frames = _node(fn.slice(frames, *crop, **_CROP))
        elif kind == "pixels":
            frames = _node(fn.slice(source.gpu() if device == "gpu" else source, *crop, **_CROP))
        else:
            # Without padding a frame that does not exist is an error; by default it would be black.
            frames = _node(fn.decoders.video(source, device=mixed, frames=_input("frames"), pad_mode="none"))
            frames = _node(fn.slice(frames, *crop, normalized_anchor=True, normalized_shape=True, axes=[1, 2]))
        linear = types.DALIInterpType.INTERP_LINEAR
        frames = _node(fn.resize(frames, size=[size, size], interp_type=linear, antialias=True, dtype=_FLOAT))
        frames = _node(fn.flip(frames, horizontal=_input("mirror")))
        return _node(fn.coord_transform(frames, M=_input("matrix"), T=_input("offset"), dtype=_FLOAT))

    return _build(define, max_samples, num_threads, device_id)


def decoded(
    max_frames: int, num_threads: int, device: Literal["cpu", "gpu"], device_id: int | None, jpeg_engine: float
) -> Pipeline:
    """Build the graph from images, the input "source", to their pixels, (H, W, 3) uint8 each."""

    def define() -> DataNode:
        source = _input("source")
        if device == "cpu":
            return _node(fn.decoders.image(source, device="cpu"))
        return _node(fn.decoders.image(source, device="mixed", hw_decoder_load=jpeg_engine, **_FOR_NVJPEG))

    return _build(define, max_frames, num_threads, device_id)


# The interpolating chroma upsampling that the CPU decoder uses too. Hints: no allocation while it runs.
_FOR_NVJPEG: dict[str, Any] = {
    "jpeg_fancy_upsampling": True,
    "preallocate_width_hint": 256,
    "preallocate_height_hint": 256,
}
_CROP: dict[str, Any] = {"normalized_anchor": True, "normalized_shape": True, "axes": [0, 1]}


def _input(name: str) -> DataNode:
    return _node(fn.external_source(name=name, batch=True, no_copy=True))


def _node(output: object) -> DataNode:
    """Return the only output of an operator; the types of DALI allow for several."""
    assert isinstance(output, DataNode)
    return output


def _build(define: Callable[[], DataNode], max_samples: int, num_threads: int, device_id: int | None) -> Pipeline:
    # Queue depth 1: ClipLoader schedules run n + 1 as soon as it holds the outputs of run n.
    pipeline = Pipeline(max_samples, num_threads, device_id, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(define())
    pipeline.build()
    return pipeline
