"""The DALI graphs: decode -> crop -> resize -> mirror -> colour and normalise. Deterministic: all draws are inputs.

Graphs for the same clip. `fused` does everything in our own CPU kernels, and `sliced` all but decoding, of images that
these do not decode; `operators` uses DALI's operators, on the GPU, or on the CPU, where it is several times slower and
serves the tests; `decoded` leaves all but decoding to pixels.py.
"""

# numba's types describe Python's side of compiled functions, not the functions.
# pyright: reportCallIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import numba
import numpy as np
from numba import carray
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.numba import NumbaFunction

from dali_pipes import jpeg, kernels
from dali_pipes.compiling import cfunc, pointer
from dali_pipes.options import Kind

_FLOAT, _UINT8, _INT64 = types.DALIDataType.FLOAT, types.DALIDataType.UINT8, types.DALIDataType.INT64
_TYPES = {"float32": _FLOAT, "uint16": types.DALIDataType.UINT16, "uint8": _UINT8}


# What our kernel is given: files of frames, the pixels that a decoder has cut out of one, or where pixels lie.
Given = Literal["files", "crop", "addresses"]


@functools.cache  # each time the machine code takes 300 kB again, which nothing gives back
def compiled_kernel(size: int, dtype: str, given: Given) -> tuple[int, int]:
    """Return the addresses of two C functions for DALI's NumbaFuncImpl operator: the kernel, and its outputs' shapes.

    The operator's inputs are what is given and the parameters of a clip. Of a crop the output is one frame as (size,
    size, 3) `dtype`: float32, uint16 (the bits of bfloat16) or uint8. Else a sample is several frames of one clip, as
    each sample costs DALI most of a microsecond, however small: what is given and the output have a first axis more.
    An address is four int64: where the pixels lie, height, width, channels. Of files there is another output, of a
    uint8 for each: 1 if jpeg.py does not decode it. The first call on a machine compiles for some seconds, later ones
    find the machine code in numba's cache.
    """
    out_type = np.dtype(dtype).type
    number = numba.types.int32
    addresses, dimensions = numba.types.CPointer(numba.types.voidptr), numba.types.CPointer(number)
    shapes = numba.types.CPointer(numba.types.CPointer(numba.types.int64))
    arrays = (addresses, shapes, dimensions, number)

    @cfunc(numba.types.void(*arrays, *arrays))
    def run(outs, out_shapes, out_dimensions, num_outs, ins, in_shapes, in_dimensions, num_ins):
        parameters, shape = carray(ins[1], (kernels.NUM_PARAMETERS,), np.float32), in_shapes[0]
        if given == "crop":
            out = carray(outs[0], (size, size, 3), out_type)
            kernels.fused(out, carray(ins[0], (shape[0], shape[1], shape[2]), np.uint8), parameters)
            return
        clip = carray(outs[0], (shape[0], size, size, 3), out_type)
        if given == "files":
            files, others = carray(ins[0], (shape[0], shape[1]), np.uint8), carray(outs[1], (shape[0],), np.uint8)
            box = parameters[kernels.BOX : kernels.MIRROR]
            others[:] = 1  # first: numba prints errors of memory here, and goes on
            resize = kernels.resize_of(1, 1, size, parameters)
            for i in range(shape[0]):
                rows, width, left, columns = jpeg.crop_shape(files[i], box)
                pixels = np.empty((rows, width, 3), np.uint8)
                if rows > 0 and jpeg.decode_crop(files[i], box, pixels):
                    resize = kernels.fitting(resize, rows, columns, size, parameters)
                    kernels.write(clip[i], pixels, 0, left, resize, parameters)
                    others[i] = 0
        else:
            places, resize = carray(ins[0], (shape[0], 4), np.int64), kernels.resize_of(1, 1, size, parameters)
            for i in range(shape[0]):
                pixels = carray(pointer(places[i, 0]), (places[i, 1], places[i, 2], places[i, 3]), np.uint8)
                top, left, rows, columns = kernels.crop(parameters, places[i, 1], places[i, 2])
                resize = kernels.fitting(resize, rows, columns, size, parameters)
                kernels.write(clip[i], pixels, top, left, resize, parameters)

    @cfunc(numba.types.void(shapes, dimensions, number, shapes, dimensions, number, number))
    def setup(out_shapes, out_dimensions, num_outs, in_shapes, in_dimensions, num_ins, num_samples):
        frames = 0 if given == "crop" else 1
        for i in range(num_samples):
            if frames:
                out_shapes[i][0] = in_shapes[i][0]
            out_shapes[i][frames] = size
            out_shapes[i][frames + 1] = size
            out_shapes[i][frames + 2] = 3
        for i in range(num_samples, num_outs * num_samples):
            out_shapes[i][0] = in_shapes[i - num_samples][0]

    return run.address, setup.address


class _Compiled(NumbaFunction):
    """DALI's operator for compiled Python, given machine code: by itself it would compile 6 seconds at every start."""

    def _get_run_fn_cpu(self, run_fn: int, *_: object) -> int:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: int) -> int:
        return setup_fn


def fused(kind: Kind, max_samples: int, size: int, dtype: str, num_threads: int) -> Pipeline:
    """Build the graph from images or pixels to one batch of (G, size, size, 3) `dtype` pictures, on the CPU.

    Inputs, per sample, which is G frames of one clip: "source", (G, L) image files, or where pixels lie as
    `compiled_kernel` says, (G, 4), and "parameters" as kernels.parameters makes them. Behind an image file may stand
    more bytes: decoders stop at its end, which headers.is_plain has seen. Images have a second output, which frames
    `sliced` must make.
    """
    images = kind == "images"

    def define() -> list[DataNode]:
        # Not functions: see _Compiled.
        given: Given = "files" if images else "addresses"
        run, setup = (cast(Any, address) for address in compiled_kernel(size, dtype, given))
        outs, ins = [_TYPES[dtype], *([_UINT8] if images else [])], [_UINT8 if images else _INT64, _FLOAT]
        operator = _Compiled(run, outs, ins, outs_ndim=[4, 1][: len(outs)], ins_ndim=[2, 1], setup_fn=setup)
        pictures = operator(_input("source"), _input("parameters"))
        return [_node(output) for output in pictures] if images else [_node(pictures)]

    return _build(define, max_samples, num_threads, None)


def sliced(max_frames: int, size: int, dtype: str, num_threads: int) -> Pipeline:
    """Build the graph of `fused` for images that DALI has to decode.

    Inputs, per frame: "source", an image file; "parameters" as of `fused`, but without a crop; "anchor" and "shape",
    (2,) float32, the crop as (y, x) shares of the image.
    """

    def define() -> list[DataNode]:
        # Decodes only the rows of the crop; the pixels are those of decode-then-slice, to the bit.
        frames = fn.decoders.image_slice(_input("source"), _input("anchor"), _input("shape"), **_CROP)
        run, setup = (cast(Any, address) for address in compiled_kernel(size, dtype, "crop"))
        operator = _Compiled(run, [_TYPES[dtype]], [_UINT8, _FLOAT], outs_ndim=[3], ins_ndim=[3, 1], setup_fn=setup)
        return [_node(operator(_node(frames), _input("parameters")))]

    return _build(define, max_frames, num_threads, None)


def operators(
    kind: Kind,
    max_samples: int,
    size: int,
    num_threads: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    jpeg_engine: float | None,
) -> Pipeline:
    """Build the graph from images, pixels or videos to one batch of float32 pictures by DALI's operators.

    The pictures are (size, size, 3), from videos (T, size, size, 3).

    Inputs, per frame, or per clip for videos: "source", a file or the pixels themselves, "anchor" and "shape" as of
    `sliced`; for images "length" (1,) int32, the bytes of the file; "mirror" int32; "matrix"
    (3, 3) and "offset" (3,) float32, the affine map of RGB in 0..255; for videos "frames" (T,) int32.
    """

    def define() -> list[DataNode]:
        source, crop = _input("source"), (_input("anchor"), _input("shape"))
        mixed = "mixed" if device == "gpu" else "cpu"
        if kind == "images":
            source = _file(source)
        if kind == "images" and (device == "cpu" or jpeg_engine is None):
            frames = _node(fn.decoders.image_slice(source, *crop, **_CROP))
            frames = frames.gpu() if device == "gpu" else frames
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
        return [_node(fn.coord_transform(frames, M=_input("matrix"), T=_input("offset"), dtype=_FLOAT))]

    return _build(define, max_samples, num_threads, device_id)


def decoded(
    max_frames: int, num_threads: int, device: Literal["cpu", "gpu"], device_id: int | None, jpeg_engine: float
) -> Pipeline:
    """Build the graph from images, the inputs "source" and "length" as of `operators`, to pixels, (H, W, 3) uint8.

    On a GPU nvJPEG decodes them, that share of them by its engine. On a CPU it serves the tests.
    """

    def define() -> list[DataNode]:
        source = _file(_input("source"))
        if device == "cpu":
            return [_node(fn.decoders.image(source, device="cpu"))]
        return [_node(fn.decoders.image(source, device="mixed", hw_decoder_load=jpeg_engine, **_FOR_NVJPEG))]

    return _build(define, max_frames, num_threads, device_id)


# The interpolating chroma upsampling that the CPU decoder uses too. Hints: no allocation while it runs.
_FOR_NVJPEG: dict[str, Any] = {
    "jpeg_fancy_upsampling": True,
    "preallocate_width_hint": 256,
    "preallocate_height_hint": 256,
}
_CROP: dict[str, Any] = {"normalized_anchor": True, "normalized_shape": True, "axes": [0, 1]}


def _file(data: DataNode) -> DataNode:
    """Return copies of image files without what lies behind them, as nobody knows how a GPU's decoders take that."""
    return _node(fn.slice(data, 0, _input("length"), axes=[0]))


def _input(name: str) -> DataNode:
    return _node(fn.external_source(name=name, batch=True, no_copy=True))


def _node(output: object) -> DataNode:
    """Return the only output of an operator; the types of DALI allow for several."""
    assert isinstance(output, DataNode)
    return output


def _build(define: Callable[[], list[DataNode]], max_samples: int, num_threads: int, device_id: int | None) -> Pipeline:
    pipeline = Pipeline(max_samples, num_threads, device_id, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(*define())
    pipeline.build()
    return pipeline
