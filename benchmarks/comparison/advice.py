"""docs/recipes.md: what to use for how many clips, and the runs of the record that speak for it."""

import statistics
from itertools import groupby
from typing import NamedTuple

from benchmarks.comparison.faults import FAULTS
from benchmarks.comparison.page import PRECISION, Setting, difference, rows_of, setting_of, with_interval
from benchmarks.comparison.record import Result, recorded_config
from benchmarks.comparison.tables import BUDGETS, CHOICES, MODELS, Choice, Words, tables

ABOUT = 1.4  # "about N clips" are those within this factor
COLUMNS = ("start", "row", "data", "clips", "budget", "device", "seeds", "WAR", "UAR", "rarest class")
COLUMNS += ("best baseline", "its WAR", "WAR ahead by", "UAR ahead by")
LISTS = ("--data.train-list", "data/mine/train.txt", "--data.val-list", "data/mine/test.txt")


class Evidence(NamedTuple):
    """The runs of a recommended row in one setting, beside those of the best of the other models there."""

    setting: Setting
    init: str
    runs: dict[int, Result]  # by seed
    baseline: str | None  # None: no other model was trained there
    others: dict[int, Result]  # its runs


def words_of(choice: Choice) -> Words:
    return tables()[choice.table][choice.row]


def command(choice: Choice) -> str:
    """Return the command line that trains as a choice says."""
    name = ("--run.name", f"mine-{choice.init}")
    words = (*words_of(choice), *choice.more, "--model.init", choice.init)
    return " ".join(("python train.py", choice.preset, *words, *LISTS, *name))


def evidence(results: list[Result], choice: Choice) -> list[Evidence]:
    """Return what the record has of a choice: each setting with about as many clips and a start of that kind.

    The lists for single faults, on which models are taught one thing, are left out.
    """
    fitting: dict[tuple[Setting, str], list[Result]] = {}
    for result in results:
        config = recorded_config(result)
        if config is None or result["data"] in FAULTS:
            continue
        init = config.model.init  # "auto" may have found weights or not
        about = max(result["clips"] / choice.clips, choice.clips / result["clips"]) <= ABOUT
        if about and init != "auto" and (init == "random") == (choice.init == "random"):
            fitting.setdefault((setting_of(result), init), []).append(result)
    found = []
    for (setting, init), mine in sorted(fitting.items(), key=lambda item: item[0]):
        names = {choice.row: words_of(choice)} | {n: w for n, w in MODELS.items() if w != words_of(choice)}
        rows = rows_of(mine, names, ("faces", *BUDGETS[setting.budget], *setting.extra))
        if choice.row in rows:
            wars = {name: statistics.mean(r["WAR"] for r in rows[name].values()) for name in names if name in rows}
            best = max(wars.keys() - {choice.row}, key=lambda name: wars[name], default=None)
            found.append(Evidence(setting, init, rows[choice.row], best, rows[best] if best else {}))
    return found


def cells(choice: Choice, found: Evidence) -> list[str]:
    """Return a row of a table: figures in percent, differences in points."""
    setting, runs = found.setting, list(found.runs.values())
    rarest = runs[0]["rarest"]
    row = [found.init, choice.row, setting.data, f"{setting.clips:,}", " ".join((setting.budget, *setting.extra))]
    row.append(f"{setting.device} in {PRECISION[setting.amp]}, {setting.machine}")
    row += [str(len(runs)), *(with_interval([run[key] for run in runs]) for key in ("WAR", "UAR"))]
    row.append(f"{rarest} {with_interval([run['recalls'][rarest] for run in runs])}")
    if found.baseline is None:
        return [*row, "not measured", "", "", ""]
    row += [found.baseline, with_interval([run["WAR"] for run in found.others.values()])]
    return row + [difference(found.runs, found.others, key) for key in ("WAR", "UAR")]


def page(results: list[Result]) -> str:
    """Return docs/recipes.md."""
    lines = [
        "# What to use",
        "",
        "Written by `python benchmarks/model_comparison.py --write-page` from the runs in",
        "`benchmarks/results/model_comparison.jsonl`; not to be edited. For about so many clips to train on (within a",
        f"factor of {ABOUT}) a command without and one with weights to start from, and what their rows of",
        "[the comparison](comparison.md) found there. It is the default model wherever nothing else was shown to win.",
        "",
        "**The faces of `faces` and `faces-hard` are drawn**: what they say about DFEW and FERV39k is not known.",
        "",
        "`data/mine` are your own lists, as in [your-data.md](your-data.md). `timm` stands for any weights to start",
        "from: it is ImageNet's, which all can download. [weights.md](weights.md) has those that know faces, and how",
        "to begin with labelled stills.",
        "",
        "Figures are of the last epoch, in percent: the mean over seeds ± half its 95 % interval (Student's t). The",
        "best baseline is the other model with the highest WAR on the same clips; *ahead by*: paired by seed. The",
        "budget `short`, 48 px, T = 8 and 10 epochs, is the preset `faces` on a CPU; `long` has 30. With a GPU they",
        "take larger clips and train for longer, as the presets `dfew` and `ferv39k` always do.",
    ]
    for clips, choices in groupby(CHOICES, key=lambda choice: choice.clips):
        both = list(choices)
        lines += ["", f"## About {clips:,} clips", "", "```bash", *map(command, both), "```", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for choice in both:
            rows = [cells(choice, found) for found in evidence(results, choice)]
            start = "random" if choice.init == "random" else "weights"
            nothing = [start, choice.row, "not measured"] + [""] * (len(COLUMNS) - 3)
            lines += [f"| {' | '.join(row)} |" for row in rows or [nothing]]
    return "\n".join(lines) + "\n"
