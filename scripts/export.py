"""Export a trained model for others to use: `python scripts/export.py logs/NAME --out DIR`.

DIR is new and holds model.safetensors, config.json and a model card (`DFERNet.from_pretrained(DIR)`, or push it to a
model hub), model.pt2 (torch.export) and model.onnx. The programs take float32 clips (batch, frames, 3, size, size),
normalised as config.json says, and return logits; batch and frames are free. Each is run beside the model on 20 random
shapes first, and written only if it agrees.
"""

import argparse
import contextlib
import importlib.resources
import io
import json
import logging
import os
import shutil
import string
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import begin

if __name__ == "__main__":
    begin("export", "torch, timm and ONNX")
import numpy as np
import torch
from torch import Tensor, nn

from dfer.cli import Parser, UserError, missing_packages, one_line_errors, printable, system_error
from dfer.config import Config, ModelConfig, config_from_json
from dfer.files import reason
from dfer.lists.annotations import DRAWN, EMOTIONS
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD
from dfer.report import read_run
from dfer.report.statistics import wilson
from dfer.run.checkpoint import load_checkpoint
from dfer.run.hub import local
from dfer.run.predictions import Predictions
from dfer.run.provenance import describe_starts, read_starts
from dfer.state import load_trained

FORMATS = ("hub", "pt2", "onnx")
TOLERANCE = 1e-4  # of logits, absolute
NUM_SHAPES = 20
CARD = importlib.resources.files("dfer.model") / "model_card.md"

# Licence, data and crop as the card names them, by the folder that a run's lists lie in.
DATA = {
    "dfew": (
        "dfew-agreement",
        "DFEW (Jiang et al., 2020), 11,697 single-labelled clips of films in five folds, fold as in the run's lists. "
        "It is handed out on request, under an agreement with its owners, and may not be redistributed; that agreement "
        "says what the weights, which are derived from it, may be used for.",
        "DFEW's own aligned faces (`clip_224x224`), the whole picture resized.",
    ),
    "ferv39k": (
        "ferv39k-agreement",
        "FERV39k (Wang et al., 2022), 38,935 clips of 22 scenes. It is handed out on request, under an agreement with "
        "its owners, and may not be redistributed; that agreement says what the weights, which are derived from it, "
        "may be used for.",
        "FERV39k's own face crops (`2_ClipsforFaceCrop`), the whole picture resized.",
    ),
    "faces": (
        "mit",
        "The trainer's embedded data set of drawn faces: 1,400 clips to train on, no real face among them. The model "
        "shows that everything works and is of no use on real faces.",
        "Drawn, one face filling the frame.",
    ),
}


class Logits(nn.Module):
    """A model that returns logits (B, K) of clips (B, T, 3, H, W), and nothing else, as a program does."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Tensor:
        return self.model(clips).logits


def exported(model: nn.Module, num_frames: int, size: int) -> torch.export.ExportedProgram:
    """Return a program of plain torch operators, for any number of clips and for 2 frames or more.

    The model is left in evaluation mode and without gradients.
    """
    example = torch.zeros(2, max(num_frames, 3), 3, size, size)  # 1 would be taken for a constant
    free = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("frames", min=2, max=1024)}
    model = Logits(model).eval().requires_grad_(False)  # or torch's scan is traced backwards too
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are calling torch.compile inside torch.export")  # scan does
        return torch.export.export(model, (example,), dynamic_shapes={"clips": free})


def write_onnx(program: torch.export.ExportedProgram, path: Path, config: dict[str, Any]) -> None:
    """Write a program as ONNX, with the configuration as its metadata."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it finds torchvision's operators badly annotated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        result = torch.onnx.export(program, input_names=["clips"], output_names=["logits"], verbose=False)
    result.model.metadata_props.update({name: json.dumps(value) for name, value in config.items()})
    result.save(path, external_data=False)


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the program in a file, as whoever gets the file would run it."""
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            return torch.export.load(path).module()
    import onnxruntime  # an extra, which the other formats do without

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run(["logits"], {"clips": clips.numpy()})[0])


@torch.no_grad()
def largest_difference(program: Callable[[Tensor], Tensor], model: nn.Module, num_frames: int, size: int) -> float:
    """Return the largest difference of a logit on random clips of NUM_SHAPES random shapes."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(NUM_SHAPES):
        shape = int(rng.integers(1, 5)), int(rng.integers(2, num_frames + 9)), 3, size, size
        clips = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        worst = max(worst, (program(clips) - model(clips).logits).abs().max().item())
    return worst


def hub_config(config: Config, model: nn.Module) -> dict[str, Any]:
    """Return what `from_pretrained` builds the model from, and what its user has to know about its input."""
    data, settings = config.data, config.model
    shared = {"num_classes": len(EMOTIONS), "backbone": settings.backbone, "dropout": settings.dropout}
    if settings.name == "dfernet":
        names = ("dim", "branches", "dynamic", "time", "crf", "crf_branch", "readout", "iterations", "max_coupling")
        shared |= {name: getattr(settings, name) for name in names}
    num_frames = data.num_segments * data.frames_per_segment
    about = {"classes": list(EMOTIONS), "size": data.size, "segments": data.num_segments}
    about |= {"mean": IMAGENET_MEAN.tolist(), "std": IMAGENET_STD.tolist(), "network": type(model).__name__}
    return {"num_frames": num_frames} | shared | about


def results_table(predictions: Predictions) -> str:
    """Return WAR, UAR and recall per class with 95 % intervals, as Markdown."""
    confusion = predictions.confusion()
    lines = [
        f"{len(predictions.labels):,} clips of the run's validation list, last epoch: **WAR {confusion.war():.2f} %, "
        f"UAR {confusion.uar():.2f} %**.",
        "",
        "| class | clips | recall | 95 % interval |",
        "|---|---|---|---|",
    ]
    for k, emotion in enumerate(EMOTIONS):
        total = int((predictions.labels == k).sum())
        right = int(((predictions.labels == k) & (predictions.predicted == k)).sum())
        if total:
            low, high = wilson(right, total)
            lines.append(f"| {emotion} | {total} | {100 * right / total:.1f} % | {low:.1f} to {high:.1f} % |")
        else:
            lines.append(f"| {emotion} | 0 | - | - |")
    return "\n".join(lines)


def model_card(config: Config, hub: dict[str, Any], run: str, predictions: Predictions | None) -> str:
    """Return the model card of the run called `run`, as Markdown."""
    name = next((name for name in DATA if name in config.data.train_list.parts), None)
    name = "faces" if hub.get("faces") == DRAWN else name
    unknown = (
        "unknown",
        f"The lists `{config.data.train_list.name}` and `{config.data.val_list.name}` of the run. **To be filled in by "
        "whoever publishes it: what the clips are, their licence, whether the people in them agreed.**",
        "**To be filled in: how faces were found and cropped** (scripts/prepare_videos.py says what it did).",
    )
    licence, data, crop = DATA[name] if name else unknown
    return string.Template(CARD.read_text(encoding="utf-8")).substitute(
        title=f"{hub['network']}, {hub['backbone']}, trained on {name or 'other clips'}",
        licence=licence if licence == "mit" else f"other\nlicense_name: {licence}",
        classes=", ".join(EMOTIONS),
        run=run,
        network=hub["network"],
        num_frames=hub["num_frames"],
        size=hub["size"],
        mean=[round(x, 3) for x in hub["mean"]],
        std=[round(x, 3) for x in hub["std"]],
        results="Not evaluated." if predictions is None else results_table(predictions),
        data=data,
        crop=crop,
    )


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write to, which appears under its name at the end, or not at all.

    Raises:
        UserError: if there is something of that name or it cannot be made.
    """
    if os.path.lexists(path):  # a link to nothing too, which no folder can take the place of
        raise UserError(f"--out {path}: exists already: give a new folder")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.absolute().parent))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be made ({reason(error)})") from None
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(path)
    except Exception as error:
        if system_error(error) is None:  # safetensors and ONNX have their own classes for a full disk
            raise
        raise UserError(f"--out {path}: cannot be written ({reason(error)})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_hub(args: argparse.Namespace, folder: Path, config: Config, model: nn.Module, hub: dict[str, Any]) -> None:
    """Write weights, config.json and the model card, and read the weights back."""
    path = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    if config.preset == "exported" and (path / "README.md").exists():
        card = (path / "README.md").read_text(encoding="utf-8")
    else:
        whole_run = path == args.checkpoint and (path / "metrics.jsonl").exists()
        predictions = read_run(path).predictions if whole_run else None
        name, made_by = printable(path.resolve().name), printable(describe_starts(read_starts(path)))
        card = model_card(config, hub, f"{name}`: `{made_by}" if made_by else name, predictions)
    (folder / "README.md").write_text(card, encoding="utf-8")
    model.save_pretrained(folder, config=hub)
    (folder / "model.safetensors").chmod(0o644)
    with contextlib.redirect_stdout(io.StringIO()):  # the hub's client says where it reads from
        again = type(model).from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    print(f"{args.out}/model.safetensors: equal to the bit when read again")


def export_programs(
    args: argparse.Namespace, folder: Path, plain: nn.Module, model: nn.Module, hub: dict[str, Any]
) -> None:
    """Write the programs that are asked for, and compare each with the model. `plain` is the same model, to be traced.

    Raises:
        UserError: if one differs.
    """
    if hasattr(plain, "crf") and hasattr(plain.crf, "backend"):
        plain.crf.backend = "sdpa"  # plain operators; the others are one of our own
    shape = hub["num_frames"], hub["size"]
    program = exported(plain, *shape)
    for kind in (kind for kind in ("pt2", "onnx") if kind in args.formats):
        path = folder / f"model.{kind}"
        if kind == "pt2":
            torch.export.save(program, path, extra_files={"config.json": json.dumps(hub)})
        else:
            write_onnx(program, path, hub)
        difference = largest_difference(runner(path), model, *shape)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{args.checkpoint}: {path.name} differs from the model by {difference:.2g} in a logit: "
                f"nothing was written; leave it out with --formats {' '.join(k for k in FORMATS if k != kind)}"
            )
        megabytes = path.stat().st_size / 1e6
        print(f"{args.out}/{path.name}: {megabytes:.0f} MB, within {difference:.1e} on {NUM_SHAPES} shapes")


def no_program(model: ModelConfig) -> str | None:
    """Return why a model cannot be written as a program for any number of frames; None if it can."""
    if model.name == "dfernet" and model.crf == "gaussian":
        return "the Gaussian CRF, there for comparison, is no program of plain operators"
    if model.name == "r3d-18":
        return "r3d-18, there for comparison, halves the frames three times, which fixes how many there may be"
    return None


def run(args: argparse.Namespace) -> None:
    if "onnx" in args.formats and (missing := missing_packages("onnx", "onnxscript", "onnxruntime")):
        others = " ".join(kind for kind in FORMATS if kind != "onnx")
        raise UserError(f"--formats onnx: not installed: pip install {' '.join(missing)}; or --formats {others}")
    args.checkpoint = local(args.checkpoint)  # beside which a model card may lie
    state = load_checkpoint(args.checkpoint)
    config = config_from_json(state["config"], source=args.checkpoint)
    model = load_trained(state, config)
    hub = hub_config(config, model) | ({"faces": state["faces"]} if "faces" in state else {})
    with new_folder(args.out) as folder:
        if "hub" in args.formats:
            export_hub(args, folder, config, model, hub)
        if {"pt2", "onnx"} & set(args.formats):
            if reason_against := no_program(config.model):
                raise UserError(f"{args.checkpoint}: {reason_against}: --formats hub is what it can be exported to")
            export_programs(args, folder, load_trained(state, config), model, hub)


def main(arguments: list[str]) -> int:
    parser = Parser("export", __doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a run's folder, its best_WAR.safetensors, one checkpoint, or an export"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    args = parser.parse_args(arguments)
    return one_line_errors("export", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
