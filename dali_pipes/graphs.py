"""The DALI graphs: decode -> crop -> resize -> mirror -> colour and normalise. Deterministic: all draws are inputs."""

from typing import Literal

from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

INPUTS = ("frames", "anchor", "shape", "mirror", "matrix", "offset")


def frames_pipeline(
    max_frames: int, size: int, device: Literal["cpu", "gpu"], num_threads: int, device_id: int | None
) -> Pipeline:
    """Encoded images -> one batch of (size, size, 3) float32 images, normalised RGB, rows-columns-channels.

    The batch is B*T frames; the other inputs are per frame too (a clip's draw, repeated T times):
    `anchor` and `shape` (2,) float32, the crop as (y, x) shares of the image; `mirror` int32; `matrix` (3, 3) and
    `offset` (3,) float32, the affine map of RGB in 0..255.
    """
    # Queue depth 1: ClipLoader schedules run n+1 as soon as it holds the outputs of run n.
    pipeline = Pipeline(max_frames, num_threads, device_id, prefetch_queue_depth=1)
    with pipeline:
        encoded, anchor, shape, mirror, matrix, offset = (
            fn.external_source(name=name, batch=True, no_copy=True) for name in INPUTS
        )
        crop = {"normalized_anchor": True, "normalized_shape": True, "axes": [0, 1]}
        if device == "cpu":
            # Decodes only the rows of the crop; the pixels are those of decode-then-slice, to the bit.
            images = fn.decoders.image_slice(encoded, anchor, shape, **crop)
        else:
            # The interpolating chroma upsampling that the CPU decoder uses too.
            images = fn.decoders.image(encoded, device="mixed", jpeg_fancy_upsampling=True)
            images = fn.slice(images, anchor, shape, **crop)
        images = fn.resize(images, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.flip(images, horizontal=mirror)
        images = fn.coord_transform(images, M=matrix, T=offset, dtype=types.FLOAT)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline
