"""A run as one page: what its records say, and what its model makes of a few clips.

The page is one file without scripts, and nothing in it is loaded from elsewhere: its Content-Security-Policy forbids
both. What it cannot show, it says.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import nn

from dfer.cli import UserError, shown
from dfer.config import config_from_json
from dfer.crf.layers import SIGMA_APPEARANCE, SIGMA_SMOOTHNESS, STATES_PER_CLASS, MeanFieldCRF
from dfer.lists.annotations import EMOTIONS
from dfer.lists.index import load_index
from dfer.plan.transforms import IMAGENET_MEAN, IMAGENET_STD
from dfer.report import figures
from dfer.report.figures import ACCENT, INK, MUTED, SECOND, Figure
from dfer.report.records import Predictions, Run, bootstrap, choose, interval, same_clips, wilson
from dfer.run.checkpoint import load_checkpoint, write_whole
from dfer.run.distributed import World

NUM_FRAMES, TILE = 8, 96  # frames of a clip that are shown, and their size in pixels
ENERGY_CLIPS = 4  # whose free energy is followed: the kernel of a long clip is large
PRIVACY = (
    "<strong>These are faces of your data.</strong> The page lies on your disk only: nothing of it is uploaded, not to "
    "Weights &amp; Biases either. Mind the data's licence before you pass it on; "
    "<code>scripts/report.py RUN --clips 0</code> writes it without faces."
)


# ---- What the model shows


class Clip(NamedTuple):
    row: int  # of predictions.csv
    frames: UInt8[np.ndarray, "T H W 3"]
    maps: Float[np.ndarray, "T K h w"] | None  # of the fine level
    course: Float[np.ndarray, "T K"] | None  # share of each emotion in the cells of a frame, background left out


class Look(NamedTuple):
    notes: list[str]  # what could not be had, and why
    clips: list[Clip]
    stride: int = 1  # pixels between two cells of the maps
    crf: MeanFieldCRF | None = None
    energies: Float64[np.ndarray, " I"] | None = None  # free energy after 0, 1, ... iterations, nats per token


@torch.inference_mode()
def look(run: Run, num_clips: int, build_loader: Callable[..., Any], trained_model: Callable[..., nn.Module]) -> Look:
    """Load the run's newest checkpoint and up to `num_clips` right and as many wrong clips, on the CPU in float32.

    `build_loader` and `trained_model` are train.py's.
    """
    try:
        state = load_checkpoint(run.path)
        config = config_from_json(state["config"], run.path)
        data = dataclasses.replace(config.data, batch_size=1, cache="off", views=1, mirror_views=False)
        settings = dataclasses.replace(config.model, crf_backend="auto")
        model = trained_model(state, dataclasses.replace(config, model=settings))
    except UserError as error:
        return Look([f"no gallery, and of the CRF its curves only: {error}"], [])

    notes, crf = [], getattr(model, "crf", None)
    steps, _ = run.series("val/WAR")
    if len(steps) and state.get("step") != steps[-1]:
        notes.append(f"the weights shown are of step {state.get('step')}, the predictions of step {steps[-1]:g}")
    if not isinstance(crf, MeanFieldCRF):
        what = f"{settings.name} has no CRF" if crf is None else f"its CRF ({settings.crf}) has no labels"
        notes.append(f"no emotion maps, course, compatibility, widths or free energy: {what}")
        crf = None
    if num_clips == 0:
        notes.append("no gallery: --clips 0")
    if num_clips == 0 or run.predictions is None:
        return Look(notes, [], crf=crf)

    clips, levels = [], []
    try:
        index = load_index(data.val_list, data.root, data.source)
        rows = {record.name: row for row, record in enumerate(index.records)}
        loader = build_loader(
            dataclasses.replace(config, data=data), index, "eval", World(0, 1, 0, 1, torch.device("cpu"))
        )
        hook = crf and crf.register_forward_pre_hook(lambda _, inputs: levels.append(inputs[0]))
        for row in (*choose(run.predictions, False, num_clips), *choose(run.predictions, True, num_clips)):
            name = run.predictions.clips[row]
            if name not in rows:
                raise UserError(f"{data.val_list}: clip {name} is not in it any more")
            pixels = next(loader(0, rows[name])).clips  # one clip per batch, in the order of the list
            maps, course = None, None
            if crf is not None:
                fine, coarse = (level[0] for level in model.emotion_maps(pixels))
                in_frame = fine.sum((2, 3)) + coarse.sum((2, 3))  # (T, K)
                maps, course = fine.numpy(), (in_frame / in_frame.sum(1, keepdim=True)).numpy()
            colours = 255 * (pixels[0].permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN)
            clips.append(Clip(row, colours.round().clip(0, 255).astype(np.uint8), maps, course))
    except UserError as error:
        return Look([*notes, f"no gallery: {error}"], [], crf=crf)
    energies = None
    if crf is not None:
        hook.remove()
        energies = free_energies(crf, [torch.cat(level) for level in zip(*levels[:ENERGY_CLIPS], strict=True)])
    return Look(notes, clips, model.backbone.strides[0], crf, energies)


def free_energies(
    crf: MeanFieldCRF, levels: list[Float[torch.Tensor, "B T D _ _"]]
) -> Float64[np.ndarray, " I"] | None:
    """Free energy per token after 0, 1, ... iterations, to twice as many as the CRF has; None if it has none."""
    if not crf.iterations:
        return None
    trained, energies = crf.iterations, []
    for crf.iterations in range(1, 2 * trained + 2):
        energies.append(crf(levels)[1].diagnostics["crf/free_energy"].item())  # before the last iteration
    crf.iterations = trained
    return np.array(energies)


# ---- Cards


class Card(NamedTuple):
    name: str  # of the figure's file
    title: str
    caption: str  # HTML
    figure: Figure | str  # or why there is none

    def html(self) -> str:
        if isinstance(self.figure, str):
            return (
                f'<div class="card"><h3>{self.title}</h3><p class="missing">Not drawn: {escape(self.figure)}.</p></div>'
            )
        drawing = figures.inline_svg(self.figure, self.name)
        drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{self.title}"', 1)
        return f'<div class="card"><h3>{self.title}</h3>{drawing}<p class="caption">{self.caption}</p></div>'


def _card(name: str, figure: Figure | str, suffix: str = "", **values: Any) -> Card:
    title, caption = figures.TEXTS[name]
    return Card(name + suffix, title.format(**values), caption.format(**values), figure)


def training_cards(run: Run) -> list[Card]:
    rates = {"throughput/compute_clips_per_s": ("computing alone", MUTED)}
    rates |= {"throughput/total_clips_per_s": ("with the wait", ACCENT)}
    waits = {"throughput/data_wait_share": ("wait", ACCENT)}
    losses = {"train/loss": ("training", MUTED), "val/loss": ("evaluation", ACCENT)}
    norms = figures.curves_figure(run, {"train/grad_norm": ("norm", ACCENT)}, log=True)
    return [
        _card("loss", figures.curves_figure(run, losses)),
        _card("war_uar", figures.curves_figure(run, {"val/WAR": ("WAR", INK), "val/UAR": ("UAR", ACCENT)})),
        _card("recalls", figures.recalls_figure(run)),
        _card("throughput", figures.throughput_figure(run, rates, waits)),
        _card("grad_norm", norms),
        _card("lr", figures.curves_figure(run, {"train/lr": ("rate", ACCENT)})),
    ]


def prediction_cards(counts: Int64[np.ndarray, "K K"] | Float64[np.ndarray, "K K"]) -> list[Card]:
    """Of a confusion matrix, or of the mean of several on the same clips."""
    wrong = [(round(float(n)), *at) for at, n in np.ndenumerate(counts) if n and at[0] != at[1]]
    worst = sorted(wrong, key=lambda entry: -entry[0])[:3]
    most = [f"{EMOTIONS[a]} taken for {EMOTIONS[b]}, {n} of {counts[a].sum():.0f}" for n, a, b in worst]
    return [
        _card("confusion", figures.confusion_figure(counts, False), most="; ".join(most) or "none is wrong"),
        _card("confusion_normalised", figures.confusion_figure(counts, True)),
        _card("recall", figures.recall_figure(counts)),
    ]


def crf_cards(run: Run, seen: Look) -> list[Card]:
    undecided = math.log(STATES_PER_CLASS * (len(EMOTIONS) + 1))
    cards = [
        _card("coupling", figures.curves_figure(run, {"crf/coupling": ("coupling", ACCENT)})),
        _card("entropy", figures.curves_figure(run, {"crf/entropy": ("entropy", ACCENT)}), undecided=undecided),
    ]
    cards = [card for card in cards if not isinstance(card.figure, str)]  # the other CRFs do not have them
    crf = seen.crf
    if seen.energies is not None:
        figure, clips = figures.energy_figure(seen.energies, crf.iterations), min(len(seen.clips), ENERGY_CLIPS)
        cards.append(_card("free_energy", figure, clips=clips, iterations=crf.iterations))
    if crf is None or not crf.iterations:
        return cards
    classes = crf.compatibility().detach().unflatten(2, (-1, STATES_PER_CLASS)).unflatten(1, (-1, STATES_PER_CLASS))
    couplings = (crf.max_coupling / 2 * crf.coupling_logit.detach().sigmoid()).tolist()
    for kernel, matrix, coupling in zip(("appearance", "smoothness"), classes.mean((2, 4)), couplings, strict=True):
        values = {"kernel": kernel, "states": STATES_PER_CLASS, "coupling": coupling, "most": crf.max_coupling / 2}
        figure = figures.compatibility_figure(matrix.numpy())
        cards.append(_card("compatibility", figure, f"_{kernel}", **values))
    learned = torch.cat([crf.log_sigma_appearance, crf.log_sigma_smoothness]).exp().tolist()
    names = [
        f"{kernel}, {axis}"
        for kernel in ("appearance", "smoothness")
        for axis in ("frames", "height", "width", "level")
    ]
    widths = list(zip(names, SIGMA_APPEARANCE + SIGMA_SMOOTHNESS, learned, strict=True))
    return [*cards, _card("widths", figures.widths_figure(widths))]


# ---- Page


def _section(title: str, lead: str, content: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{content}</section>'


def _grid(cards: Sequence[str], wide: bool = False) -> str:
    return f'<div class="grid{" wide" * wide}">{"".join(cards)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """The cells are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{lines}</tbody></table></div>'


def _range(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"{low:.1f} to {high:.1f}"


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    items = "".join(f"<li>{escape(shown(note))}</li>" for note in notes)
    return [f'<div class="notes"><strong>Missing, or to be known</strong><ul>{items}</ul></div>']


def _tiles(made: Sequence[tuple[str, str, str]]) -> str:
    """Of (kind, number, text)."""
    cards = [f'<div class="card tile {kind}"><b>{number}</b><span>{text}</span></div>' for kind, number, text in made]
    return f'<div class="tiles">{"".join(cards)}</div>' if cards else ""


def _document(title: str, lead: str, body: Sequence[str], writer: str) -> str:
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), lead=escape(shown(lead)), body="\n".join(body), writer=writer
    )


def headline(run: Run) -> str:
    """Tiles with the numbers that are looked for first."""
    made = []
    if run.predictions is not None:
        confusion, right = run.predictions.confusion(), run.predictions.labels == run.predictions.predicted
        _, uars = bootstrap(run.predictions.labels, right[:, None])
        war = f"WAR, %: {right.sum()} of {len(right)} clips; 95 %: {_range(*wilson(int(right.sum()), len(right)))}"
        uar = f"UAR, %; 95 % (bootstrap): {_range(*interval(uars[:, 0]))}"
        made += [("main", f"{confusion.war():.2f}", war), ("main", f"{confusion.uar():.2f}", uar)]
    for name in ("WAR", "UAR"):
        _, values = run.series(f"val/{name}")
        if np.isfinite(values).any():
            best = int(np.nanargmax(values))
            text = f"best {name}, %: evaluation {best + 1} of {len(values)}, picked on this list"
            made.append(("", f"{values[best]:.2f}", text))
    (_, rates), (_, waits) = (run.series(f"throughput/{k}") for k in ("total_clips_per_s", "data_wait_share"))
    if np.isfinite(rates).any():
        made.append(("", f"{np.nanmedian(rates):.1f}", "clips/s in training, median of the rows"))
    if np.isfinite(waits).any():
        made.append(("", f"{100 * np.nanmedian(waits):.1f} %", "of the time waiting for data, median of the rows"))
    return _tiles(made)


def _differences(mine: Predictions, theirs: Predictions, order: Int64[np.ndarray, " N"]) -> list[str]:
    """HTML of theirs less mine, for WAR and UAR; `order`: rows of theirs in the order of mine."""
    right = np.column_stack([mine.labels == mine.predicted, (theirs.labels == theirs.predicted)[order]])
    one, other = mine.confusion(), theirs.confusion()
    texts = []
    for difference, drawn in zip(
        (other.war() - one.war(), other.uar() - one.uar()), bootstrap(mine.labels, right), strict=True
    ):
        low, high = interval(drawn[:, 1] - drawn[:, 0])
        kind = ' class="beyond"' if low > 0 or high < 0 else ""
        texts.append(f"<small{kind}>{difference:+.2f}<br>({low:+.1f} to {high:+.1f})</small>")
    return texts


def comparison(run: Run, others: Sequence[Run]) -> str:
    """A table of the other runs against this one, on the same draws of the same clips."""
    rows, notes = [], []
    for other in (run, *others):
        if other.predictions is None:
            notes.append(f"{other.name} has no predictions")
            continue
        confusion = other.predictions.confusion()
        values, differences = (confusion.war(), confusion.uar()), ["", ""]
        if other is not run and run.predictions is not None:
            order = same_clips(run.predictions, other.predictions)
            if order is None:
                notes.append(f"{other.name} was evaluated on other clips or labels than {run.name}: no difference")
            else:
                differences = _differences(run.predictions, other.predictions, order)
        cells = [f"{value:.2f}{difference}" for value, difference in zip(values, differences, strict=True)]
        rows.append([f"{escape(other.name)}<small>{confusion.total()} clips</small>", *cells])
    table = _table(["run", "WAR, %", "UAR, %"], rows, "runs")
    remarks = "".join(f'<p class="caption">{escape(note)}.</p>' for note in notes)
    lead = (
        f"Below each value: its difference to that of {escape(run.name)}, in percentage points, with the 95 % interval "
        "of a paired bootstrap over the clips; in orange where it leaves out 0. What another seed would change, it "
        "cannot see."
    )
    return _section("Compared", lead, f'<div class="card">{table}{remarks}</div>')


def strip(clip: Clip, stride: int, layers: Sequence[tuple[int, str]]) -> tuple[str, list[float]]:
    """HTML of frames with, below each, one picture per layer (class, colour); and what has full colour in each."""
    num_frames, size = len(clip.frames), clip.frames.shape[1]
    peaks = [float(clip.maps[:, k].max()) for k, _ in layers]
    cells = []
    for t in np.unique(np.linspace(0, num_frames - 1, min(num_frames, NUM_FRAMES)).round().astype(int)):
        pictures, grey = [clip.frames[t]], clip.frames[t].mean(-1, keepdims=True)
        for (k, colour), peak in zip(layers, peaks, strict=True):
            shade = 0.8 * spread(clip.maps[t, k], stride, size)[..., None] / max(peak, 1e-9)
            rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            pictures.append((grey * (1 - shade) + rgb * shade).astype(np.uint8))
        image = Image.fromarray(np.concatenate(pictures))
        content = io.BytesIO()
        image.resize((TILE, TILE * len(pictures)), Image.Resampling.BICUBIC).save(content, format="JPEG", quality=82)
        uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        cells.append(f'<figure><img src="{uri}" alt="frame {t + 1}"><figcaption>{t + 1}</figcaption></figure>')
    return f'<div class="strip">{"".join(cells)}</div>', peaks


def spread(cells: Float[np.ndarray, "h w"], stride: int, size: int) -> Float[np.ndarray, "S S"]:
    """Cells on the pixels they lie on: cell c on pixel c * stride, linear between, and the last one goes on."""
    at = np.arange(size) / stride
    down = np.stack([np.interp(at, np.arange(len(cells)), column) for column in cells.T], axis=1)
    return np.stack([np.interp(at, np.arange(cells.shape[1]), row) for row in down])


def _clip_card(number: int, clip: Clip, predictions: Predictions, stride: int) -> str:
    predicted, label = int(predictions.predicted[clip.row]), int(predictions.labels[clip.row])
    layers = [(predicted, ACCENT), (label, SECOND)][: 1 + (predicted != label)] if clip.maps is not None else []
    pictures, peaks = strip(clip, stride, layers)
    probability = 100 * predictions.probabilities[clip.row, predicted]
    text = f'<span class="seen">{EMOTIONS[predicted]}</span>'
    if predicted == label:
        text += f", recognised with {probability:.0f} %"
    else:
        text = f'<span class="label">{EMOTIONS[label]}</span>, taken for {text} with {probability:.0f} %'
    text = f"<h3>{escape(shown(predictions.clips[clip.row]))}</h3><p>{text}</p>{pictures}"
    if clip.maps is not None:
        kinds = zip(layers, peaks, ("orange", "teal"), strict=False)
        scales = "; ".join(f"{EMOTIONS[k]} in {colour}, at most {peak:.2f}" for (k, _), peak, colour in kinds)
        drawing = figures.inline_svg(figures.course_figure(clip.course, predicted, label), f"clip{number}")
        text += f'<p class="caption">Where it is seen: {scales} (full colour).</p>{drawing}'
    return f'<article class="card">{text}</article>'


def gallery(run: Run, seen: Look) -> str:
    lead = f"{PRIVACY} Shown are the clips that the model is surest of, each pair of classes once before any twice. "
    if seen.crf is not None:
        lead += (
            "Maps: the CRF's marginal probability of an emotion at each cell of the fine level. Curves: the share of "
            "each emotion in all cells of a frame, background left out; the thin gray lines are the other emotions."
        )
    parts = []
    for title, right in (("Wrong", False), ("Right", True)):
        cards = [
            _clip_card(number, clip, run.predictions, seen.stride)
            for number, clip in enumerate(seen.clips)
            if (run.predictions.labels[clip.row] == run.predictions.predicted[clip.row]) == right
        ]
        parts.append(f"<h3>{title}</h3>" + (_grid(cards, wide=True) if cards else '<p class="missing">None.</p>'))
    return _section("Clips", lead, "".join(parts))


def _settings(config: dict[str, Any], prefix: str = "--") -> list[list[str]]:
    rows = []
    for key, value in config.items():
        name = f"{prefix}{key}".replace("_", "-")
        rows += _settings(value, f"{name}.") if isinstance(value, dict) else [[escape(shown(x)) for x in (name, value)]]
    return rows


def page(run: Run, others: Sequence[Run], seen: Look) -> tuple[str, list[Card]]:
    """The HTML, and the cards whose figures are in it; `others` are compared with the run."""
    training, crf = training_cards(run), crf_cards(run, seen)
    predicted = prediction_cards(run.predictions.confusion().counts.numpy()) if run.predictions is not None else []
    notes = [*run.notes, *seen.notes]
    _, skipped = run.series("train/skipped_steps")
    if np.nansum(skipped):
        notes.append(f"{np.nanmax(skipped):g} steps were skipped, as their loss or gradient was not finite")
    body = [headline(run)]
    body += _notes(notes)
    if others:
        body.append(comparison(run, others))
    if predicted:
        counts = run.predictions.confusion().counts
        rows = [
            [e, str(total), str(right), f"{100 * right / total:.1f}" if total else "-", _range(*wilson(right, total))]
            for e, right, total in zip(EMOTIONS, counts.diag().tolist(), counts.sum(1).tolist(), strict=True)
        ]
        table = _table(["class", "clips", "right", "recall, %", "95 %"], rows)
        cards = [*(card.html() for card in predicted), f'<div class="card"><h3>In numbers</h3>{table}</div>']
        lead = "From predictions.csv, of the last evaluation: every clip counts once."
        body.append(_section("What is recognised", lead, _grid(cards, wide=True)))
    lead = "From metrics.jsonl, over optimizer steps. Points of long curves are means of neighbouring rows."
    body.append(_section("Training", lead, _grid([card.html() for card in training])))
    if crf:
        lead = "Every cell of every frame holds beliefs about the emotion and hears all other cells of its clip."
        body.append(_section("What the CRF did", lead, _grid([card.html() for card in crf])))
    if seen.clips:
        body.append(gallery(run, seen))
    settings = f'<div class="card">{_table([], _settings(run.config), "settings")}</div>'
    body.append(f"<h2>Settings</h2><details><summary>all flags of this run</summary>{settings}</details>")
    optim = run.config.get("optim")
    planned = optim.get("epochs", "?") if isinstance(optim, dict) else "?"
    lead = f"{run.config.get('preset', 'run')}, {len(run.series('val/WAR')[0])} of {planned} epochs evaluated"
    text = _document(run.name, f"{lead}, seed {run.config.get('seed', '?')}", body, "scripts/report.py")
    return text, [*predicted, *training, *crf]


def write_report(
    run: Run,
    build_loader: Callable[..., Any],
    trained_model: Callable[..., nn.Module],
    others: Sequence[Run] = (),
    num_clips: int = 4,
    folder: Path | None = None,
) -> Path:
    """Write report.html into the run's folder, and its figures as .svg and .png into `folder`.

    Raises:
        UserError: in one line, if they cannot be written.
    """
    seen = look(run, num_clips, build_loader, trained_model)
    path = run.path / "report.html"
    with figures.style():
        text, cards = page(run, others, seen)
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for card in (card for card in cards if isinstance(card.figure, Figure)):
                    for kind in ("svg", "png"):
                        content = figures.picture(card.figure, kind)
                        write_whole(folder / f"{card.name}.{kind}", lambda file, content=content: file.write(content))
            write_whole(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot write the report ({error.strerror})") from None
    return path


# ---- Of several folds


def _tested(results: dict[str, Any]) -> str:
    """HTML: a row per run, below them what is said of all."""
    rows = []
    for row in results["runs"]:
        last, best = row["last"], row["best"]
        name = f"fold {row['fold']}" if len(results["seeds"]) == 1 else f"seed {row['seed']}, fold {row['fold']}"
        cells = [last["WAR"], last["UAR"], best["WAR"], best["UAR"]]
        rows.append([name, str(last["clips"]), *(f"{cell:.2f}" for cell in cells), str(best["epoch"])])
    values = [results[kind][what][name] for what in ("mean_of_folds", "pooled") for kind in ("last", "best")
              for name in ("WAR", "UAR")]  # fmt: skip
    means = [f"<b>{v['mean']:.2f}</b><small>± {v['sd_of_folds']:.2f}</small>" for v in values[:4]]
    pooled = [f"<b>{v['mean']:.2f}</b><small>{_range(*v['interval'])}</small>" for v in values[4:]]
    clips = str(sum(recall["clips"] for recall in results["last"]["recall"].values()))
    rows.append(["mean of the folds<small>± standard deviation of the folds</small>", "", *means, ""])
    rows.append(["all clips pooled<small>95 % interval</small>", clips, *pooled, ""])
    if len(results["seeds"]) > 1:
        for text, part in (("mean of the folds", values[:4]), ("pooled", values[4:])):
            spreads = [f"± {v['sd_of_seeds']:.2f}" for v in part]
            rows.append([f"standard deviation of the seeds<small>{text}</small>", "", *spreads, ""])
    head = ["", "clips", "last WAR", "UAR", "best WAR", "UAR", "epoch"]
    return f'<div class="card">{_table(head, rows, "runs")}</div>'


def _beside_published(results: dict[str, Any]) -> str:
    """HTML: what others have printed, set off from what was measured here."""
    rows = []
    for kind, text in (("last", "this model, last epoch"), ("best", "this model, best epoch")):
        means = results[kind]["mean_of_folds"]
        cells = [text, *(f"{means[name]['mean']:.2f}" for name in ("WAR", "UAR"))]
        rows.append([f'<span class="seen">{cell}</span>' for cell in cells])
    for row in results["published"]["rows"]:
        name = f"{escape(row['method'])}<small>{escape(row['start'])}</small>"
        rows.append([name, f"{row['WAR']:.2f}", f"{row['UAR']:.2f}"])
    table = _table(["method, and what its weights start from", "WAR, %", "UAR, %"], rows, "runs published")
    lead = (
        "All but the rows in orange are others' figures, as their papers print them: nothing of them was run or "
        f"checked here. {escape(results['published']['protocol'])}"
    )
    return _section("Beside what is published", lead, f'<div class="card others">{table}</div>')


def folds_page(results: dict[str, Any], runs: Sequence[Run]) -> str:
    """The HTML about the results of scripts/crossval.py (its results.json); `runs` have the curves."""
    seeds, last, best = len(results["seeds"]), results["last"], results["best"]
    clips = sum(recall["clips"] for recall in last["recall"].values())
    made = []
    for name in ("WAR", "UAR"):
        mean = last["mean_of_folds"][name]
        text = f"{name}, %: last epoch, mean of {results['folds']} folds{f' and {seeds} seeds' if seeds > 1 else ''}"
        made.append(("main", f"{mean['mean']:.2f}", f"{text}; ± {mean['sd_of_folds']:.2f} over the folds"))
    for name in ("WAR", "UAR"):
        value = last["pooled"][name]
        text = f"{name}, %: last epoch, pooled; 95 % (bootstrap): {_range(*value['interval'])}"
        made.append(("", f"{value['mean']:.2f}", text))
    for name in ("WAR", "UAR"):
        text = f"{name}, %: best epoch, mean of folds; picked on the test folds by WAR"
        made.append(("", f"{best['mean_of_folds'][name]['mean']:.2f}", text))
    body = [_tiles(made), *_notes(results["notes"])]
    lead = (
        "Each clip is tested in one fold, by a model that was not trained on it. The last epoch is the headline; the "
        "best epoch has seen the test fold, as its weights were picked there. Intervals: bootstrap over the clips, of "
        "WAR over all of them, of UAR within each class; they do not know what another seed would change."
    )
    body.append(_section("Folds", lead, _tested(results)))
    counts = np.mean(last["confusion_per_seed"], axis=0)
    rows = []
    for emotion in EMOTIONS:
        recalls = [results[kind]["recall"][emotion] for kind in ("last", "best")]
        cells = [f"{r['mean']:.1f}<small>{_range(*r['interval'])}</small>" if r["clips"] else "-" for r in recalls]
        rows.append([emotion, str(recalls[0]["clips"]), *cells])
    table = _table(["class", "clips", "last, %", "best, %"], rows, "runs")
    cards = [card.html() for card in prediction_cards(counts)]
    cards.append(f'<div class="card"><h3>In numbers</h3>{table}</div>')
    lead = f"The last epoch on all {clips:,} clips{'' if seeds == 1 else f', mean of {seeds} seeds'}."
    body.append(_section("What is recognised", lead, _grid(cards, wide=True)))
    if results["published"]:
        body.append(_beside_published(results))
    caption = "Thin: each run; thick: their mean."
    curves = [Card(f"folds_{name}", f"{name}, %", caption, figures.folds_figure(runs, f"val/{name}"))
              for name in ("WAR", "UAR")]  # fmt: skip
    lead = "On each run's own test fold. The page of each run lies in its folder."
    body.append(_section("Over the epochs", lead, _grid([card.html() for card in curves], wide=True)))
    settings = f'<div class="card">{_table([], _settings(runs[0].config), "settings")}</div>'
    summary = f"all flags of {escape(runs[0].name)}; the others differ in lists, seed and name"
    body.append(f"<h2>Settings</h2><details><summary>{summary}</summary>{settings}</details>")
    numbers = ", ".join(map(str, results["seeds"]))
    lead = f"{results['preset']}, {results['folds']} folds of {results['lists']}, seed{'s' * (seeds > 1)} {numbers}, "
    lead += f"{results['epochs']} epoch{'s' * (results['epochs'] > 1)}"
    return _document(results["name"], lead, body, "scripts/crossval.py")


def write_folds_report(folder: Path, results: dict[str, Any], runs: Sequence[Run]) -> Path:
    """Write FOLDER/report.html about the results of scripts/crossval.py.

    Raises:
        UserError: in one line, if it cannot be written.
    """
    path = folder / "report.html"
    with figures.style():
        text = folds_page(results, runs)
    try:
        write_whole(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot write the report ({error.strerror})") from None
    return path
