"""Run a model on a few clips of its run, to show what it makes of them: frames, emotion maps, free energies."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from dfer.cli import UserError
from dfer.config import Config, config_from_json
from dfer.crf.layers import MeanFieldCRF
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import load_index
from dfer.model import DFERNet
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD
from dfer.report.records import Run
from dfer.run.checkpoint import load_checkpoint
from dfer.run.distributed import World
from dfer.run.predictions import Predictions

MISTAKES = 48  # wrong clips that are listed
FED = 8  # clips of training's first batch that are shown
ENERGY_CLIPS = 4  # whose free energy is followed: the kernel of a long clip is large


class Clip(NamedTuple):
    """A clip of the gallery."""

    row: int  # of predictions.csv
    frames: UInt8[np.ndarray, "T H W 3"]
    maps: Float[np.ndarray, "T K h w"] | None  # marginals of the fine level
    shares: Float[np.ndarray, "T K"] | None  # of each emotion in the cells of a frame, background left out


class Fed(NamedTuple):
    """A clip of training's first batch."""

    name: str
    text: str  # its label as the loader gave it, and what is mixed into it
    frames: UInt8[np.ndarray, "T H W 3"]  # as training gets them, augmented
    plain: UInt8[np.ndarray, "T H W 3"]  # of the same video, as evaluation gets them


class Inspection(NamedTuple):
    """What a run's model makes of a few clips, and what the loader makes of them for it."""

    notes: list[str]  # what is missing, and why
    clips: list[Clip]
    stride: int = 1  # pixels between two cells of the maps
    crf: MeanFieldCRF | None = None
    energies: Float64[np.ndarray, " I"] | None = None  # free energy after 0, 1, ... iterations, nats per token
    mistakes: Sequence[Clip] = ()  # frames only, the surest first
    fed: Sequence[Fed] = ()


@torch.inference_mode()
def inspect_model(
    run: Run, num_clips: int, build_loader: Callable[..., Any], load_trained: Callable[..., nn.Module]
) -> Inspection:
    """Load the newest checkpoint and run it on up to `num_clips` right and as many wrong clips, on the CPU in float32.

    With them come the frames of up to MISTAKES wrong clips, and of FED clips that training began with.

    Args:
        run: the records.
        num_clips: 0 for none; what the CRF has learned is shown all the same.
        build_loader: (config, index, mode, world) -> an iterator of batches; handed in, as dfer/ imports no DALI.
        load_trained: (state, config) -> the model of a checkpoint.
    """
    try:
        config, model, step = _load_model(run, load_trained)
    except UserError as error:
        return Inspection([f"no gallery, and of the CRF its curves only: {error}"], [])

    notes, crf = [], model.crf if isinstance(model, DFERNet) else None
    steps, _ = run.series("val/WAR")
    if len(steps) and step != steps[-1]:
        notes.append(f"the weights shown are of step {step}, the predictions of step {steps[-1]:g}")
    if not isinstance(crf, MeanFieldCRF):
        what = f"{config.model.name} has no CRF" if crf is None else f"its CRF ({config.model.crf}) has no labels"
        notes.append(f"no emotion maps, probabilities over time, compatibility, widths or free energy: {what}")
        crf = None
    if num_clips == 0:
        notes.append("no gallery: --clips 0")
    if num_clips == 0 or run.predictions is None:
        return Inspection(notes, [], crf=crf)

    fed: Sequence[Fed] = ()
    try:
        fed = read_fed(config, build_loader)
    except UserError as error:
        notes.append(f"no picture of what training is fed: {error}")
    wrong, right = choose(run.predictions, False, MISTAKES), choose(run.predictions, True, num_clips)
    names = [run.predictions.clips[row] for row in [*wrong, *right]]
    try:
        pixels = _read_clips(names, config, build_loader)
    except UserError as error:
        return Inspection([*notes, f"no gallery: {error}"], [], crf=crf, fed=fed)
    mistakes = [Clip(row, _frames(clip), None, None) for row, clip in zip(wrong, pixels, strict=False)]
    rows, pixels = [*wrong[:num_clips], *right], [*pixels[: len(wrong)][:num_clips], *pixels[len(wrong) :]]
    if crf is None or not isinstance(model, DFERNet):
        clips = [Clip(row, _frames(clip), None, None) for row, clip in zip(rows, pixels, strict=True)]
        return Inspection(notes, clips, mistakes=mistakes, fed=fed)
    clips, levels = _map_clips(model, crf, rows, pixels)
    energies = free_energies(crf, [torch.cat(level) for level in zip(*levels[:ENERGY_CLIPS], strict=True)])
    return Inspection(notes, clips, model.backbone.strides[0], crf, energies, mistakes, fed)


def _load_model(run: Run, load_trained: Callable[..., nn.Module]) -> tuple[Config, nn.Module, int | None]:
    """Return the configuration to evaluate single clips, the model, and the step of its checkpoint.

    Raises:
        UserError: if there is no checkpoint that can be used.
    """
    state = load_checkpoint(run.path)
    config = config_from_json(state["config"], run.path)
    data = dataclasses.replace(config.data, batch_size=1, cache="off", views=1, mirror_views=False)
    config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, crf_backend="auto"))
    return config, load_trained(state, config), state.get("step")


def choose(predictions: Predictions, right: bool, count: int) -> list[int]:
    """Return rows of the surest right or wrong clips: first one of each (label, prediction), then the next of each."""
    rows = np.flatnonzero((predictions.labels == predictions.predicted) == right)
    chosen: dict[tuple[int, int], int] = {}
    ranked = []
    for row in sorted(rows.tolist(), key=lambda r: -predictions.probabilities[r].max()):
        kind = int(predictions.labels[row]), int(predictions.predicted[row])
        chosen[kind] = chosen.get(kind, 0) + 1
        ranked.append((chosen[kind], len(ranked), row))
    return [row for *_, row in sorted(ranked)[:count]]


def _read_clips(
    names: Sequence[str], config: Config, build_loader: Callable[..., Any]
) -> list[Float[Tensor, "1 T 3 H W"]]:
    """Return the clips of these names, as the model gets them.

    Raises:
        UserError: if the list, a clip in it or its file is gone or damaged.
    """
    data = config.data
    index = load_index(data.val_list, data.root, data.source)
    rows = {record.name: row for row, record in enumerate(index.records)}
    loader = build_loader(config, index, "eval", World(0, 1, 0, 1, torch.device("cpu")))
    clips = []
    for name in names:
        if name not in rows:
            raise UserError(f"{data.val_list}: clip {name} is not in it any more")
        # One clip per batch, in the order of the list. The loader may use its memory again.
        clips.append(next(loader(0, rows[name])).clips.clone())
    return clips


def read_fed(config: Config, build_loader: Callable[..., Any]) -> list[Fed]:
    """Return the first clips of training's first epoch, as the loader hands them out, beside what evaluation would get.

    Raises:
        UserError: if the training list, a clip in it or its file is gone or damaged.
    """
    data, world = config.data, World(0, 1, 0, 1, torch.device("cpu"))
    index = load_index(data.train_list, data.root, data.source, bad_videos=data.bad_clips)
    several = dataclasses.replace(data, batch_size=min(FED, len(index)))
    loader = build_loader(dataclasses.replace(config, data=several), index, "train", world)
    batch = next(loader(0))
    clips = batch.clips.clone()  # of memory that goes with its loader
    loader = build_loader(config, index, "eval", world)
    found = []
    for number in torch.nonzero(batch.valid).flatten().tolist():
        row, text = int(batch.ids[number]), EMOTIONS[int(batch.labels[number])]
        if batch.mix is not None and (share := float(batch.mix.share[number])) < 1:
            other = EMOTIONS[int(batch.labels[int(batch.mix.partner[number])])]
            text = f"{share:.0%} {text}, {1 - share:.0%} {other}"
        plain = _frames(next(loader(0, row)).clips)
        found.append(Fed(index.records[row].name, text, _frames(clips[number : number + 1]), plain))
    return found


def _frames(pixels: Float[Tensor, "1 T 3 H W"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Return the frames of a normalised clip as they were."""
    colours = 255 * (pixels[0].permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN)
    return colours.round().clip(0, 255).astype(np.uint8)


def _map_clips(
    model: DFERNet, crf: MeanFieldCRF, rows: Sequence[int], pixels: Sequence[Float[Tensor, "1 T 3 H W"]]
) -> tuple[list[Clip], list[list[Tensor]]]:
    """Return the clips with their emotion maps, and the two levels of features that the CRF got of each."""
    levels: list[list[Tensor]] = []
    hook = crf.register_forward_pre_hook(lambda _, inputs: levels.append(inputs[0]))
    clips = []
    for row, clip in zip(rows, pixels, strict=True):
        fine, coarse = (level[0] for level in model.emotion_maps(clip))
        in_frame = fine.sum((2, 3)) + coarse.sum((2, 3))  # (T, K)
        clips.append(Clip(row, _frames(clip), fine.numpy(), (in_frame / in_frame.sum(1, keepdim=True)).numpy()))
    hook.remove()
    return clips, levels


def free_energies(crf: MeanFieldCRF, levels: list[Float[Tensor, "B T D _ _"]]) -> Float64[np.ndarray, " I"] | None:
    """Return the free energy after 0, 1, ... iterations to twice those of the CRF, in nats per token.

    None if the CRF has no iterations.
    """
    if not crf.iterations:
        return None
    trained, energies = crf.iterations, []
    for crf.iterations in range(1, 2 * trained + 2):
        energies.append(crf(levels)[1].diagnostics["crf/free_energy"].item())  # before the last iteration
    crf.iterations = trained
    return np.array(energies)
