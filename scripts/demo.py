"""A page to try a trained model on: `make demo ARGS="--checkpoint RUN"`, or with requirements-demo.txt installed
`python scripts/demo.py --checkpoint RUN`.

Upload a video, or choose an example: the page shows how likely each emotion is, their course over time, where in the
face they are seen and the annotated video, and gives scripts/predict.py's files. One video is looked at at a time.

Nothing leaves this machine: the page loads nothing from elsewhere, no usage is reported, and there is no public link.
An upload is deleted as soon as it was looked at, the results an hour later or when the server ends. Whoever can reach
--host can use the page: there are no passwords.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import Parser, UserError, in_range, one_line_errors, shown
from dfer.lists.annotations import EMOTIONS
from dfer.predict.overlay import course_picture
from dfer.predict.timeline import place_windows
from dfer.report.figures import ACCENT, SECOND
from dfer.report.gallery import Clip, strip
from dfer.video.decode import BadVideo, claimed_seconds, write_mp4
from dfer.video.faces import crop_face
from scripts.predict import (
    CROP_SIZE,
    Seen,
    Sight,
    Video,
    add_arguments,
    find_videos,
    look_with,
    pictures,
    reason,
    told,
    watch,
    write,
)

KEPT, CHECKED = 3600, 60  # seconds that results are kept, as someone may look at them; how often they are checked
WAITING = 20  # visitors; more are told to come back
COURSE_WIDTH = 440  # px; legible on a telephone, too
PASSES = ("following the face", "looking at it", "drawing")  # through a video
PLAYED = (".mp4", ".webm")  # by browsers
# Gradio's pages are not all its own: to trim a video, for one, they fetch a program from elsewhere. Browsers obey this.
ONLY_OWN = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
CSS = f"""
.gradio-container {{ width: 100%; max-width: 1180px !important; margin: 0 auto !important; }}
h1 {{ font-size: 26px; margin: 8px 0 0; }}
.strip {{ display: grid; gap: 4px; grid-template-columns: repeat(8, 1fr); }}
.strip figure {{ margin: 0; text-align: center; font-size: 11px; }}
.strip img {{ display: block; width: 100%; border-radius: 4px; }}
.caption {{ font-size: 13px; line-height: 1.4; margin: 0 0 8px; }}
.seen {{ color: {ACCENT}; font-weight: 600; }}
.second {{ color: {SECOND}; font-weight: 600; }}
#message p {{ font-size: 17px; font-weight: 600; }}
#files .label-clear-button, #upload button[aria-label^="Trim"] {{ display: none; }}
@media (max-width: 640px) {{ .strip {{ grid-template-columns: repeat(4, 1fr); }} }}
"""


class Limits(NamedTuple):
    megabytes: float
    seconds: float


class Result(NamedTuple):
    """What is to be seen of a video; without a face no more than the message."""

    message: str  # one line
    probabilities: dict[str, float] | None = None
    maps: str = ""  # HTML
    course: Image.Image | None = None
    video: Path | None = None
    files: Sequence[Path] = ()


def analyse(
    path: Path, sight: Sight, limits: Limits, folder: Path, show: Callable[[float, str], Any] = lambda *_: None
) -> Result:
    """Look at a video, and write scripts/predict.py's files about it into `folder`.

    `show` is told, now and then, which share is done, and what is being done.

    Raises:
        UserError: in one line for the page, if it is too large or too long, or cannot be read.
    """
    done, said = 0, 0.0

    def tick(frames: Iterator[tuple[float, Image.Image]]) -> Iterator[tuple[float, Image.Image]]:
        nonlocal done, said
        first = None
        for moment, image in frames:
            first = moment if first is None else first
            if moment - first > limits.seconds:  # headers may claim less
                raise UserError(f"The video is longer than the {limits.seconds:g} s that are looked at here.")
            if time.monotonic() - said > 0.3:
                said = time.monotonic()
                share = min((moment - first) / (claimed or limits.seconds), 1)
                show((done + share) / len(PASSES), PASSES[done])
            yield moment, image
        done += 1

    try:
        megabytes = path.stat().st_size / 2**20  # as Gradio counts
        if megabytes > limits.megabytes:
            raise UserError(
                f"The video has {megabytes:,.1f} MB, and no more than {limits.megabytes:g} MB are looked at here."
            )
        claimed = claimed_seconds(path)
        if claimed is not None and claimed > limits.seconds + 0.5:  # what it claims may be a little more than there is
            raise UserError(
                f"The video is {claimed:,.1f} s long, and no more than {limits.seconds:g} s are looked at here."
            )
        seen = watch(path, sight, tick)
        if not (seen.track >= 0).any():
            return Result(f"No face is seen in any of the {len(seen.times)} frames.")
        video = Video(path, path.stem)
        about = write(video, seen, sight, folder, "mp4", tick)
        maps = emotion_maps(path, seen, sight)
    except (av.FFmpegError, BadVideo, OSError) as error:
        raise UserError(f"The video cannot be read: {shown(reason(error))}.") from None
    files = [folder / f"{video.name}{suffix}" for suffix in (".mp4", ".png", ".csv", ".json")]
    course = course_picture(seen.edges, seen.probabilities, COURSE_WIDTH)
    return Result(told(about), about["mean_probabilities"], maps, course, files[0], files)


def surest_clip(seen: Seen, emotion: int) -> tuple[int, int]:
    """The window in whose frames the emotion is likeliest, on average: its first frame, and the one after its last."""
    windows = place_windows(seen.track, seen.window, seen.stride)
    means = [seen.probabilities[first:end, emotion].mean() for first, end in windows]
    first, end = windows[int(np.argmax(means))]
    return int(first), int(end)


def emotion_maps(path: Path, seen: Seen, sight: Sight) -> str:
    """HTML of frames of the clip where the likeliest emotion is surest, and of where in them it and the next are seen.

    Of several models the first is asked.

    Raises:
        BadVideo, av.FFmpegError, OSError: as `pictures`.
    """
    model = sight.models[0]
    emotion, other = np.argsort(-np.nanmean(seen.probabilities, axis=0))[:2].tolist()
    first, end = surest_clip(seen, emotion)
    frames = (model.sampler.plan(0, np.array([end - first])).frames[0] + first).tolist()
    scale = max(CROP_SIZE // model.config.data.size, 1)
    side = scale * model.config.data.size
    crops = {}
    for number, (_, image) in enumerate(pictures(path, sight.fps)):
        if number in frames:
            picture = np.asarray(image)
            if seen.boxes is not None:
                picture = crop_face(picture, seen.boxes[number], CROP_SIZE)
            crops[number] = picture
        if number == frames[-1]:
            break
    if len(crops) < len(set(frames)):
        raise BadVideo("it changed while it was read")
    try:
        maps = model.maps([model.prepare(crops[number]) for number in frames])
    except UserError as error:
        return f'<p class="caption">No emotion maps: {escape(str(error))}.</p>'
    squares = [np.asarray(Image.fromarray(crops[number]).resize((side, side))) for number in frames]
    layers = [(emotion, ACCENT), (other, SECOND)]
    cells, (peak, next_peak) = strip(Clip(0, np.stack(squares), maps, None), scale * model.cell, layers)
    return (
        f'<p class="caption">Where in the face <span class="seen">{EMOTIONS[emotion]}</span> is seen (orange, at most '
        f'{peak:.2f}) and <span class="second">{EMOTIONS[other]}</span> (teal, at most {next_peak:.2f}), from '
        f"{seen.edges[first]:.1f} to {seen.edges[end]:.1f} s, where {EMOTIONS[emotion]} is likeliest: the CRF's "
        f"marginal probabilities. Full colour is the highest of each.</p>{cells}"
    )


def make_examples(clips: Sequence[Path], sight: Sight, folder: Path) -> list[Path]:
    """Videos to choose from, which browsers play; what they do not becomes one.

    Raises:
        UserError: in one line, if there are none, or one cannot be read.
    """
    examples = []
    for video in find_videos(clips, folder) if clips else ():
        if video.path.suffix.lower() in PLAYED and video.path.is_file():
            examples.append(video.path)
            continue
        examples.append(folder / f"{video.name}.mp4")
        try:
            examples[-1].parent.mkdir(parents=True, exist_ok=True)
            frames = pictures(video.path, sight.fps)
            write_mp4(examples[-1], ((moment, even(image)) for moment, image in frames))
        except (av.FFmpegError, BadVideo, OSError) as error:
            raise UserError(f"--examples {video.path}: {reason(error)}") from None
    return examples


def even(image: Image.Image) -> np.ndarray:
    """With sides that a video can have: the last row or column goes."""
    return np.asarray(image)[: image.height // 2 * 2, : image.width // 2 * 2]


def make_page(gr: Any, sight: Sight, limits: Limits, examples: Sequence[Path]) -> Any:
    """The page. `gr` is Gradio, which is loaded only after its settings stand."""

    def look(path: str | None, keep: bool, progress: Any) -> Iterator[list[Any]]:
        """What the page's parts become; until this goes on, their files are there to be copied."""
        if path is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = analyse(Path(path), sight, limits, Path(folder), lambda share, what: progress(share, what))
            except UserError as error:
                result = Result(str(error))
            finally:
                if not keep:
                    Path(path).unlink(missing_ok=True)
            there = result.probabilities is not None
            yield [
                result.message,
                gr.Label(result.probabilities, visible=there),
                gr.Video(result.video, visible=there),
                gr.Image(result.course, visible=there),
                gr.HTML(result.maps, visible=there),
                gr.File([str(file) for file in result.files] or None, visible=there),
            ]

    def look_at_upload(path: str | None, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008 (Gradio's)
        for parts in look(path, False, progress):
            yield [None, *parts]

    def look_at_example(path: str | None, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008
        yield from look(path, True, progress)

    with gr.Blocks(title="dfer", analytics_enabled=False, delete_cache=(CHECKED, KEPT)) as page:
        gr.HTML(
            "<h1>Which emotion a face shows, over time</h1>"
            f'<p class="caption">Videos of up to {limits.seconds:g} s and {limits.megabytes:g} MB. An upload is '
            "deleted as soon as it was looked at; nothing leaves the machine that this page comes from.</p>"
        )
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="A video", sources=["upload"], height=280, elem_id="upload")
                examples_row = gr.Row()
            with gr.Column():
                message = gr.Markdown("Upload a video: it is looked at right away.", elem_id="message")
                label = gr.Label(label="The mean over all frames with a face", num_top_classes=7, visible=False)
        with gr.Row():
            with gr.Column():
                annotated = gr.Video(
                    label="Annotated",
                    visible=False,
                    interactive=False,
                    show_label=False,  # it would lie on the picture
                    autoplay=True,
                    loop=True,
                    buttons=[],
                )
            with gr.Column():
                course = gr.Image(
                    label="The course of the emotions",
                    visible=False,
                    interactive=False,
                    show_label=False,
                    buttons=[],
                )
                maps = gr.HTML(visible=False)
        files = gr.File(label="To take away", visible=False, interactive=False, file_count="multiple", elem_id="files")
        parts = [message, label, annotated, course, maps, files]
        once = {"concurrency_id": "look", "concurrency_limit": 1, "api_visibility": "private"}
        once["show_progress_on"] = video
        video.upload(look_at_upload, video, [video, *parts], **once)
        if examples:
            with examples_row:
                chosen = gr.Examples([[str(path)] for path in examples], video, label="Or one of these")
            chosen.load_input_event.then(look_at_example, video, parts, **once)
    return page.queue(max_size=WAITING)


class OwnOnly:
    """ASGI middleware: browsers load nothing from elsewhere, whatever the page asks for."""

    def __init__(self, app: Callable[..., Any]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        async def send_on(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"content-security-policy", ONLY_OWN)]}
            await send(message)

        await self.app(scope, receive, send_on)


def run(args: argparse.Namespace) -> int:
    """Serve the page until SIGINT or SIGTERM."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory(prefix="dfer-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results: gone when this ends, whatever happened before
        try:
            import gradio as gr
            from starlette.middleware import Middleware
        except ImportError as error:
            raise UserError(f'{error}: make demo ARGS="--checkpoint ..." installs and starts it') from None
        sight = look_with(args)
        examples = make_examples(args.examples, sight, Path(folder))
        limits = Limits(args.max_mb, args.max_seconds)
        page = make_page(gr, sight, limits, examples)
        fonts = {"font": gr.themes.Font("system-ui"), "font_mono": gr.themes.Font("monospace")}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            page.launch(
                server_name=args.host,
                server_port=args.port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                theme=gr.themes.Default(primary_hue="orange", **fonts),
                css=CSS,
                max_file_size=round(2**20 * limits.megabytes),
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(OwnOnly)]},
            )
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot be listened on ({error})") from None
        print(f"http://{args.host}:{page.server_port} shows the page; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(0.5)  # signal.pause() goes on where another thread was given the signal
        finally:
            page.close(verbose=False)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("demo", __doc__)
    add_arguments(parser)
    parser.add_argument(
        "--examples",
        type=Path,
        nargs="+",
        default=[],
        metavar="CLIP",
        help="videos, folders of videos or of frames to choose from in the page, as of predict.py",
    )
    parser.add_argument("--max-mb", type=in_range(float, 0.1, 10000), default=100.0, help="of a video (100)")
    parser.add_argument("--max-seconds", type=in_range(float, 0.1, 3600), default=60.0, help="of a video (60)")
    parser.add_argument("--host", default="127.0.0.1", help="whose requests are heard: 0.0.0.0 for all (127.0.0.1)")
    parser.add_argument("--port", type=in_range(int, 1, 65535), default=7860, help="(7860)")
    args = parser.parse_args(arguments)
    try:
        return one_line_errors("demo", lambda: run(args))
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
