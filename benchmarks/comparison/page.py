"""The tables of the record: means over seeds with intervals, and paired differences to the first row."""

import functools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.comparison.record import Result, computed_with, portable, recorded_config
from benchmarks.comparison.tables import BUDGETS, SEGMENTS, tables
from dfer.config import Config, parse_config

# 97.5th percentiles of Student's t, by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLUMNS = ("", "seeds", "WAR", "UAR", "rarest class", *(f"WAR at {n}" for n in SEGMENTS))
COLUMNS += ("largest loss at another T", "WAR ahead by", "UAR ahead by", "parameters", "GFLOP", "clips/s")

PRECISION = {"off": "fp32", "bf16": "bf16", "fp16": "fp16"}


class Setting(NamedTuple):
    """What the runs of one table share, so that its differences are those of the rows."""

    data: str
    fingerprint: str  # as JSON
    clips: int
    budget: str
    extra: tuple[str, ...]  # words for train.py that the harness was given
    device: str
    amp: str  # precision
    machine: str  # its kind: cores or card


def setting_of(result: Result) -> Setting:
    fingerprint = json.dumps(result["fingerprint"], sort_keys=True)
    where = (*computed_with(result), result["machine"]["kind"])
    return Setting(result["data"], fingerprint, result["clips"], result["budget"], tuple(result["extra"]), *where)


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the standard error of a mean and half its 95 % interval (Student's t); None of fewer than two values."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    degrees = len(values) - 1
    return error, T_QUANTILE.get(degrees, 1.96 + 2.5 / degrees) * error  # beyond 9 within 1 %


def with_interval(values: Sequence[float]) -> str:
    """Return the mean, and of several values its 95 % interval."""
    found = spread(values)
    return f"{statistics.mean(values):.1f}" + (f" ± {found[1]:.1f}" if found else "")


def largest_loss(result: Result) -> float:
    """Return the WAR at the T of training less the smallest one at T from 4 to 32, in points."""
    return result["WAR"] - min(result["WAR_at"][str(n)] for n in SEGMENTS)


def at_lengths(runs: list[Result]) -> list[str]:
    """Return the cells of WAR at other T, of those runs that were evaluated there, and of the largest loss."""
    found = [run for run in runs if all(str(n) in run["WAR_at"] for n in SEGMENTS)]
    if not found:
        return [""] * (len(SEGMENTS) + 1)
    row = [with_interval([run["WAR_at"][str(n)] for run in found]) for n in SEGMENTS]
    return [*row, with_interval([largest_loss(run) for run in found])]


def difference(first: dict[int, Result], other: dict[int, Result], key: str) -> str:
    """Return by how much the first row is ahead on the seeds that both have: mean, standard error, 95 % interval."""
    gains = [first[seed][key] - other[seed][key] for seed in sorted(first.keys() & other.keys())]
    if not gains:
        return "-"
    found = spread(gains)
    mean = statistics.mean(gains)
    if found is None:
        return f"{mean:+.1f} (one seed)"
    return f"{mean:+.1f} (s.e. {found[0]:.1f}, {mean - found[1]:+.1f} to {mean + found[1]:+.1f})"


def rows_of(
    results: Iterable[Result], names: dict[str, tuple[str, ...]], shared: Sequence[str] = ()
) -> dict[str, dict[int, Result]]:
    """Return row -> seed -> run, in the order of a table.

    Runs of the same words that other defaults made another model of are a row of their own, with the commit that made
    them. What the words mean today has the plain name; if that was never run, what was run last.

    Args:
        results: the runs of one setting.
        names: row -> words for train.py.
        shared: the words that all rows share: the preset and the budget.
    """
    rows: dict[str, dict[int, Result]] = {}
    results = list(results)
    for name, words in names.items():
        variants: dict[Any, dict[int, Result]] = {}
        for result in (r for r in results if tuple(r["words"]) == words):
            variant = _variant(recorded_config(result), result)
            variants[variant] = variants.pop(variant, {}) | {result["seed"]: result}  # the last one moves to the end
        if len(variants) > 1 and (today := _meaning((*shared, *words))) in variants:
            variants[today] = variants.pop(today)
        for number, runs in enumerate(reversed(variants.values())):
            commit = next(iter(runs.values()))["commit"]
            rows[name if number == 0 else f"{name}, as of {commit[:7]}"] = runs
    return rows


def _variant(config: Config | None, result: Result) -> str:
    """Return what tells runs of other defaults apart."""
    return _settings(config) if config else json.dumps(dict(result["config"]) | {"seed": None}, sort_keys=True)


def _settings(config: Config) -> str:
    """Return a configuration without its seed, and without device and precision, which all runs of a table share."""
    return json.dumps(json.loads(config.to_json()) | {"seed": None, "run": config.run.channels_last}, sort_keys=True)


@functools.cache
def _meaning(words: tuple[str, ...]) -> str:
    """Return what words for train.py make today."""
    return _settings(portable(parse_config(list(words))))


def cells(name: str, runs: dict[int, Result], first: dict[int, Result]) -> list[str]:
    """Return a row of a table."""
    ours = list(runs.values())
    rarest = ours[0]["rarest"]
    row = [name, str(len(ours)), *(with_interval([r[key] for r in ours]) for key in ("WAR", "UAR"))]
    row.append(f"{rarest} {with_interval([r['recalls'][rarest] for r in ours])}")
    row += at_lengths(ours)
    row += ["", ""] if runs is first else [difference(first, runs, key) for key in ("WAR", "UAR")]
    speeds = [r["clips_per_s"] for r in ours]
    row += [f"{ours[0]['parameters'] / 1e6:.1f} M", f"{ours[0]['flops'] / 1e9:.2f}"]
    return [*row, f"{statistics.median(speeds):.0f}"]


def all_tables(results: list[Result]) -> list[tuple[str, list[list[str]], list[Result]]]:
    """Return (title, rows, runs) of each table of each setting that has runs of more than one row."""
    found = []
    for setting in sorted({setting_of(result) for result in results}):
        mine = [result for result in results if setting_of(result) == setting]
        for table, names in tables().items():
            rows = rows_of(mine, names, ("faces", *BUDGETS[setting.budget], *setting.extra))
            if len({name.split(",")[0] for name in rows}) < 2:
                continue
            first = next(iter(rows.values()))
            title = f"{table}: {setting.data}, {setting.clips:,} clips, budget {setting.budget}"
            extra = re.sub(r"(?<= sha256:[0-9a-f]{8})[0-9a-f]{56}\b", "", " ".join(setting.extra))
            title += f", {extra}" if extra else ""
            title += f", {setting.device} in {PRECISION[setting.amp]}, {setting.machine}"
            runs = [run for by_seed in rows.values() for run in by_seed.values()]
            found.append((title, [cells(name, by_seed, first) for name, by_seed in rows.items()], runs))
    return found


def page(results: list[Result]) -> str:
    """Return docs/comparison.md."""
    lines = [
        "# Models compared",
        "",
        "Written by `python benchmarks/model_comparison.py --write-page` from the runs in",
        "`benchmarks/results/model_comparison.jsonl`; not to be edited. The rows of a table were trained on the same",
        "list with the same budget, by the same kind of machine: another processor rounds otherwise, which moves the",
        "WAR of a seed as far as another seed does. WAR and UAR of the last epoch in percent: the mean ± half the 95 %",
        "interval over seeds (Student's t). *Ahead by*: how much the first row is ahead, paired by seed, with its",
        "standard error and 95 % interval. *WAR at n*: the test clips are cut into n segments, whatever the model was",
        "trained with. *Largest loss at another T*: WAR at the T of training less the smallest WAR at n, mean over",
        "seeds. FLOP: of one clip forward, multiplications and additions counted apart. clips/s: of training, not",
        "comparable where trainings shared a machine. Faces are drawn: of DFEW and FERV39k they say nothing.",
        "",
        "Models differ in what they do at another T. The GRU of `dfernet` scales its gate by T: at twice the frames of",
        "training each counts half. The recurrent units of `r18-gru` and `r18-lstm` do not: each frame counts as one.",
    ]
    found = all_tables(results)
    for title, rows, runs in found:
        commits = sorted({run["commit"][:7] + "+" * run["changed"] for run in runs})
        shared = " Several trainings shared it." if any(run["jobs"] > 1 for run in runs) else ""
        lines += ["", f"## {title}", "", f"Commits {', '.join(commits)}.{shared}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    if not found:
        lines += ["", "No table has two rows yet."]
    return "\n".join(lines) + "\n"
