"""Frames to files that any browser shows: H.264 and GIF."""

import contextlib
import itertools
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from jaxtyping import UInt8

from dfer.files import partial
from dfer.video.colour import EXACT

_GIF_TIME = Fraction(1, 100)  # seconds, the unit of a GIF's times


def write_mp4(path: Path, frames: Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]]) -> None:
    """Write frames, of one even height and width, at their times in seconds, rising, as H.264 that any browser plays.

    The file is there whole or not at all.

    Raises:
        OSError, av.FFmpegError: if it cannot be written.
    """
    with (
        partial(path) as name,
        av.open(str(name), "w", format="mp4", container_options={"movflags": "faststart"}) as container,
    ):
        options = {"preset": "veryfast", "crf": "21"}
        video, reformatter = container.add_stream("libx264", rate=25, options=options), VideoReformatter()
        video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 90000)
        # Players guess BT.709 for large pictures that state nothing.
        video.codec_context.colorspace, video.codec_context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        for time, pixels in frames:
            if not video.codec_context.is_open:
                video.height, video.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = reformatter.reformat(
                frame, format="yuv420p", dst_colorspace=Colorspace.SMPTE170M, interpolation=EXACT
            )
            frame.time_base, frame.pts = video.codec_context.time_base, round(90000 * time)
            container.mux(video.encode(frame))
        container.mux(video.encode())


def write_gif(
    path: Path,
    frames: Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]],
    samples: Iterable[UInt8[np.ndarray, "H W 3"]],
) -> None:
    """Write frames, of one height and width, as a GIF that repeats, with its 256 colours chosen from the samples.

    Times are in seconds, rising, and rounded to 1/100; browsers slow down what is faster than 50 frames/s. One frame is
    held at a time. The file is there whole or not at all.

    Raises:
        OSError, av.FFmpegError: if it cannot be written.
    """
    palette, frames = _choose_palette(samples), iter(frames)
    start, first = next(frames)
    height, width = first.shape[:2]
    _graph, source, sink = _palette_filter(palette, height, width)  # a graph is not kept by its ends
    with partial(path) as name, av.open(str(name), "w", format="gif") as container:
        video = container.add_stream("gif", rate=25)
        video.pix_fmt, video.codec_context.time_base = "pal8", _GIF_TIME
        video.height, video.width = height, width
        for time, pixels in itertools.chain([(start, first)], frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base, frame.pts = _GIF_TIME, round(100 * time)
            source.push(frame)
            _drain(sink, container, video)
        source.push(None)
        _drain(sink, container, video)
        container.mux(video.encode())


def _choose_palette(samples: Iterable[UInt8[np.ndarray, "H W 3"]]) -> av.VideoFrame:
    """Return the 256 colours that the samples are shown best with, as a frame of 16 x 16 pixels."""
    samples = iter(samples)
    first = next(samples)
    height, width = first.shape[:2]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=_GIF_TIME)
    generator, sink = graph.add("palettegen", "reserve_transparent=1"), graph.add("buffersink")
    source.link_to(generator)
    generator.link_to(sink)
    graph.configure()
    for number, pixels in enumerate(itertools.chain([first], samples)):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.time_base, frame.pts = _GIF_TIME, number
        source.push(frame)
    source.push(None)
    return _pull(sink)


def _palette_filter(palette: av.VideoFrame, height: int, width: int) -> tuple[Graph, FilterContext, FilterContext]:
    """Return a filter and its ends, to push RGB frames into and to pull frames in the palette's colours from."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=_GIF_TIME)
    colours = graph.add_buffer(width=16, height=16, format=palette.format, time_base=_GIF_TIME)
    # Its pattern lies still, where the usual dithering would have all of a frame flicker for one pixel that changes.
    mapped, sink = graph.add("paletteuse", "dither=bayer:bayer_scale=5"), graph.add("buffersink")
    source.link_to(mapped, 0, 0)
    colours.link_to(mapped, 0, 1)
    mapped.link_to(sink)
    graph.configure()
    palette.pts, palette.time_base = 0, _GIF_TIME
    colours.push(palette)
    colours.push(None)
    return graph, source, sink


def _drain(sink: FilterContext, container: OutputContainer, video: av.VideoStream) -> None:
    """Write all frames that have come out of a filter."""
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            container.mux(video.encode(_pull(sink)))


def _pull(sink: FilterContext) -> av.VideoFrame:
    """Return the next frame that has come out of a filter.

    Raises:
        BlockingIOError, EOFError: if none has, or none will.
    """
    frame = sink.pull()
    assert isinstance(frame, av.VideoFrame)
    return frame
