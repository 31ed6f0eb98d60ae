"""A page to try a trained model on: `make demo ARGS="--checkpoint RUN"`, or with requirements-demo.txt installed
`python scripts/demo.py --checkpoint RUN`. Without --checkpoint it takes the newest run in logs/, or trains a tiny one.

Upload a video, record one with the webcam, or choose an example: the page shows how likely each emotion is on average,
the video with their course, where in the face they are seen and what the model was trained on, and gives
scripts/predict.py's files. One video is predicted on at a time.

Nothing leaves this machine: the page loads nothing from elsewhere, no usage is reported, and there is no public link.
A video is deleted as soon as it was looked at, the results an hour later or when the server ends. Whoever can reach
--host can use the page: there are no passwords.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("demo", "torch and timm")
from dali_pipes.torch_stages import resize
from dfer.cli import Parser, UserError, command_of, in_range, one_line_errors, printable
from dfer.files import reason
from dfer.lists.annotations import EMOTIONS
from dfer.predict.inputs import Frames, InputVideo, find_videos, read_pictures
from dfer.predict.maps import map_emotions
from dfer.predict.options import add_arguments, build_predictor
from dfer.predict.output import PURPOSE, describe, write_outputs
from dfer.predict.own import own_checkpoint, own_examples
from dfer.predict.predictor import Predictor, VideoPrediction
from dfer.report.figures import ACCENT, SECOND
from dfer.report.gallery import strip
from dfer.report.inspection import Clip
from dfer.video.decode import VIDEO_ERRORS, claimed_seconds
from dfer.video.write import write_mp4

KEPT, CHECKED = 3600, 60  # seconds that results are kept, as someone may look at them; how often they are checked
WAITING = 20  # visitors; more are asked to come back
NO_FACE = (
    "use a video in which one face looks towards the camera, well lit and at least a fifth of the picture's height; if "
    "your videos are nothing but a face, start the demo with --no-crop"
)
PASSES = ("following the face", "predicting", "drawing")  # through a video
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
.likeliest {{ color: {ACCENT}; font-weight: 600; }}
.model {{ border-left: 3px solid {ACCENT}; padding-left: 10px; }}
.second {{ color: {SECOND}; font-weight: 600; }}
#message p {{ font-size: 17px; font-weight: 600; }}
#files .label-clear-button, #upload button[aria-label^="Trim"] {{ display: none; }}
@media (max-width: 640px) {{ .strip {{ grid-template-columns: repeat(4, 1fr); }} }}
"""


class Limits(NamedTuple):
    megabytes: float
    seconds: float


class Result(NamedTuple):
    """What the page shows of a video; without a face no more than the message."""

    message: str  # one line
    probabilities: dict[str, float] | None = None
    about: str = ""  # HTML: the video, the model, its data and what it is for
    maps: str = ""  # HTML
    video: Path | None = None
    files: Sequence[Path] = ()


class PassProgress:
    """How far the passes through a video are, in calls of `show` with the share that is done and what is being done."""

    def __init__(self, show: Callable[[float, str], Any], claimed: float | None, limit: float):
        self._show, self._claimed, self._limit = show, claimed, limit
        self._done, self._shown = 0, 0.0

    def follow(self, frames: Frames) -> Frames:
        """Pass on the frames of one pass.

        Raises:
            UserError: if the video is longer than the limit, whatever its header claims.
        """
        first = None
        for moment, image in frames:
            first = moment if first is None else first
            if moment - first > self._limit:
                raise UserError(f"The video is longer than the {self._limit:g} s that are looked at here.")
            if time.monotonic() - self._shown > 0.3:
                self._shown = time.monotonic()
                share = min((moment - first) / (self._claimed or self._limit), 1)
                self._show((self._done + share) / len(PASSES), PASSES[self._done])
            yield moment, image
        self._done += 1


def analyse(
    path: Path,
    predictor: Predictor,
    limits: Limits,
    folder: Path,
    show: Callable[[float, str], Any] = lambda *_: None,
) -> Result:
    """Predict on a video, and write scripts/predict.py's files about it into `folder`.

    `show` is called now and then, with the share that is done and what is being done.

    Raises:
        UserError: with a line for the page, if it is too large or too long, or cannot be read.
    """
    try:
        passes = PassProgress(show, check_size(path, limits), limits.seconds)
        prediction = predictor.predict(path, passes.follow)
        if not (prediction.track >= 0).any():
            return Result(f"No face is seen in any of the {len(prediction.times)} frames: {NO_FACE}.")
        video = InputVideo(path, path.stem)
        summary = write_outputs(video, prediction, predictor, folder, "mp4", passes.follow)
        maps = emotion_maps(path, prediction, predictor)
    except VIDEO_ERRORS as error:
        raise UserError(f"The video cannot be read: {printable(reason(error))}.") from None
    files = [folder / f"{video.name}{suffix}" for suffix in (".mp4", ".png", ".csv", ".json")]
    about = f'<p class="caption"><b>{escape(printable(video.name))}</b>. {about_models(predictor)} {PURPOSE}</p>'
    return Result(describe(summary), summary["mean_probabilities"], about, maps, files[0], files)


def about_models(predictor: Predictor) -> str:
    """Return as HTML what the models are and what they were trained on."""
    lines = []
    for model in predictor.models:
        step = f", step {model.step}" if model.step else ""
        few = "; a few steps of the preset debug, to see that all works: its answers are guesses"
        line = f"{printable(model.path)}{step}: {printable(model.trained_on)}{few * (model.config.preset == 'debug')}."
        lines.append(f"Model {escape(line)}")
    return " ".join(lines)


def check_size(path: Path, limits: Limits) -> float | None:
    """Return how many seconds a video claims to have; refuse it if it is too large, or claims to be too long."""
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
    return claimed


def emotion_maps(path: Path, prediction: VideoPrediction, predictor: Predictor) -> str:
    """Return HTML of frames of the clip where the likeliest emotion is surest, and of where it and the next lie.

    Raises:
        BadVideo, av.FFmpegError, OSError: as `read_pictures`.
    """
    try:
        clip = map_emotions(path, prediction, predictor)
    except UserError as error:
        return f'<p class="caption">No emotion maps: {escape(str(error))}.</p>'
    emotion, other = clip.emotions
    layers = [(emotion, ACCENT), (other, SECOND)]
    cells, (peak, next_peak) = strip(Clip(0, clip.pictures, clip.maps, None), clip.cell, layers)
    start, end = prediction.edges[clip.first], prediction.edges[clip.end]
    return (
        f'<p class="caption">Where in the face <span class="likeliest">{EMOTIONS[emotion]}</span> is seen (orange, at '
        f'most {peak:.2f}) and <span class="second">{EMOTIONS[other]}</span> (teal, at most {next_peak:.2f}), from '
        f"{start:.1f} to {end:.1f} s, where {EMOTIONS[emotion]} is likeliest: the CRF's "
        f"marginal probabilities. Full colour is the highest of each.</p>{cells}"
    )


def warn(line: str) -> None:
    print(f"demo: {printable(line)}", file=sys.stderr)


def make_examples(clips: Sequence[Path], predictor: Predictor, folder: Path) -> list[Path]:
    """Return videos to choose from, which browsers play; of others, write what they play into `folder`.

    Raises:
        UserError: if there are none, or one cannot be read.
    """
    examples = []
    for video in find_videos(clips, folder, warn) if clips else ():
        if video.path.suffix.lower() in PLAYED and video.path.is_file():
            examples.append(video.path)
            continue
        examples.append(folder / f"{video.name}.mp4")
        try:
            examples[-1].parent.mkdir(parents=True, exist_ok=True)
            frames = read_pictures(video.path, predictor.fps)
            write_mp4(examples[-1], ((moment, even(image)) for moment, image in frames))
        except VIDEO_ERRORS as error:
            raise UserError(f"--examples {video.path}: {reason(error)}") from None
    return examples


def even(image: Image.Image) -> np.ndarray:
    """Return the pixels with sides that a video can have: the last row or column goes."""
    return np.asarray(image)[: image.height // 2 * 2, : image.width // 2 * 2]


def make_page(gr: Any, predictor: Predictor, limits: Limits, examples: Sequence[Path]) -> Any:
    """Return the page. `gr` is Gradio, which is loaded only after its settings stand."""

    def answer(path: str | None, keep: bool, progress: Any) -> Iterator[list[Any]]:
        """Yield what the page's parts become; until this goes on, their files are there to be copied."""
        if path is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = analyse(Path(path), predictor, limits, Path(folder), lambda share, what: progress(share, what))
            except UserError as error:
                result = Result(str(error))
            finally:
                if not keep:
                    Path(path).unlink(missing_ok=True)
            yield show_result(gr, result)

    def answer_upload(path: str | None, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008 (Gradio's)
        for parts in answer(path, False, progress):
            yield [None, *parts]

    def answer_example(path: str | None, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008
        yield from answer(path, True, progress)

    with gr.Blocks(title="dfer", analytics_enabled=False, delete_cache=(CHECKED, KEPT)) as page:
        video, examples_row, parts = lay_out(gr, limits, predictor)
        once = {"concurrency_id": "predict", "concurrency_limit": 1, "api_visibility": "private"}
        once["show_progress_on"] = video
        for given in (video.upload, video.stop_recording):
            given(answer_upload, video, [video, *parts], **once)
        if examples:
            with examples_row:
                chosen = gr.Examples([[str(path)] for path in examples], video, label="Or one of these")
            chosen.load_input_event.then(answer_example, video, parts, **once)
    return page.queue(max_size=WAITING)


def show_result(gr: Any, result: Result) -> list[Any]:
    """Return what the parts of `lay_out` become."""
    visible = result.probabilities is not None
    return [
        result.message,
        gr.HTML(result.about, visible=visible),
        gr.Label(result.probabilities, visible=visible),
        gr.Video(result.video, visible=visible),
        gr.HTML(result.maps, visible=visible),
        gr.File([str(file) for file in result.files] or None, visible=visible),
    ]


def lay_out(gr: Any, limits: Limits, predictor: Predictor) -> tuple[Any, Any, list[Any]]:
    """Place the page's parts; return where videos are uploaded, the row for examples and the parts of a result."""
    gr.HTML(
        "<h1>Which emotion a face shows, over time</h1>"
        f'<p class="caption">Videos of up to {limits.seconds:g} s and {limits.megabytes:g} MB. What you upload '
        "or record is deleted as soon as it was looked at; nothing leaves the machine that this page comes from.</p>"
        f'<p class="caption model">{about_models(predictor)} {PURPOSE}</p>'
    )
    with gr.Row():
        with gr.Column():
            # Not by include_audio: for that Gradio starts ffmpeg, which may not be there.
            silent = gr.WebcamOptions(constraints={"audio": False, "video": {"width": {"ideal": 640}}})
            sources = ["upload", "webcam"]
            video = gr.Video(label="A video", sources=sources, webcam_options=silent, height=330, elem_id="upload")
            examples_row = gr.Row()
        with gr.Column():
            message = gr.Markdown("Upload or record a video: it is looked at right away.", elem_id="message")
            about = gr.HTML(visible=False)
            label = gr.Label(label="The mean over all frames with a face", num_top_classes=7, visible=False)
    bare = {"visible": False, "interactive": False, "show_label": False, "buttons": []}  # a label lies on the picture
    with gr.Row():
        with gr.Column():
            annotated = gr.Video(label="Annotated", autoplay=True, loop=True, **bare)
        with gr.Column():
            maps = gr.HTML(visible=False)
    files = gr.File(label="To take away", visible=False, interactive=False, file_count="multiple", elem_id="files")
    return video, examples_row, [message, about, label, annotated, maps, files]


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
            how = "pip install gradio" if command_of("demo") == "dfer demo" else "make demo installs and starts it"
            raise UserError(f"{error}, which the page is made with: {how}") from None
        args.checkpoint = args.checkpoint or [own_checkpoint()]
        predictor = build_predictor(args, resize)
        examples = make_examples(
            args.examples or own_examples(Path(folder, "drawn"), predictor.detect), predictor, Path(folder)
        )
        limits = Limits(args.max_mb, args.max_seconds)
        page = make_page(gr, predictor, limits, examples)
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
    add_arguments(parser, required=False)
    parser.add_argument(
        "--examples",
        type=Path,
        nargs="+",
        default=[],
        metavar="CLIP",
        help="videos, folders of videos or of frames to choose from in the page, as of predict.py (three drawn ones)",
    )
    parser.add_argument("--max-mb", type=in_range(float, 0.1, 10000), default=100.0, help="of a video (100)")
    parser.add_argument("--max-seconds", type=in_range(float, 0.1, 3600), default=60.0, help="of a video (60)")
    parser.add_argument("--host", default="127.0.0.1", help="whose requests are answered: 0.0.0.0 for all (127.0.0.1)")
    parser.add_argument("--port", type=in_range(int, 1, 65535), default=7860, help="(7860)")
    args = parser.parse_args(arguments)

    def serve() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            run(args)

    return one_line_errors("demo", serve)


if __name__ == "__main__":
    sys.exit(main())
