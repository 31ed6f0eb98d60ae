"""Cross-validate: `python scripts/crossval.py dfew [--seeds 3] [--parallel 4] [-- words for train.py]`.

Each fold, of each seed, is a run of train.py on the lists set_1_train.txt and set_1_test.txt, set_2 ... of --lists, as
prepare_dfew.py writes them to lists/dfew; the embedded data set is split into five folds here. All lies in
LOG_DIR/NAME/: a run's folder for each seed and fold, results.json and report.html. The same command goes on where it
was ended, by whatever; what is done is not done again. `--parallel 4` works on four folds at once, on a GPU each, and
`--part 2/5` does a fifth of the runs, for machines that share LOG_DIR (scripts/slurm/crossval.sbatch): whichever part
ends last writes the results.

Exit codes: 0 done; 2 something is to be changed, which one line says; 75 stopped by a signal (as train.py) with
everything saved; otherwise that of the run that failed.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("crossval", "torch and timm")
from dfer.cli import Parser, UserError, command_of, in_range, one_line_errors
from dfer.config import PRESETS, Config, begun_config, parse_config
from dfer.files import reason, write_whole
from dfer.lists.folds import check_folds, find_folds, write_folds
from dfer.report.fold_results import collect, read_finished
from dfer.report.folds import write_folds_report
from dfer.run.console import show_table
from dfer.run.folds import (
    BEST,
    FoldRun,
    drive,
    fold_fingerprints,
    fold_runs,
    is_trained,
    locked,
    remaining_jobs,
    slots_for,
    with_one_start,
)
from dfer.run.signals import EXIT_STOPPED

APP = Path(__file__).resolve().parents[1]  # train.py and scripts/ lie here
NUM_FOLDS = 5  # of the embedded data set
OWN = {"--seed": "--seeds", "--data.train-list": "--lists", "--data.val-list": "--lists", "--run.name": "--name",
       "--run.log-dir": "--log-dir", "--resume": "nothing: the same command goes on"}  # fmt: skip


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Train and evaluate what is not done yet, and if then all is done, write the results. Return the exit code."""
    config = train_config(args.preset, words)
    name = args.name or f"{args.preset}-crossval"
    if Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name {name!r}: must be a plain folder name")
    folder = args.log_dir / name
    slots = slots_for(args.parallel, config.run.device)
    lists, notes = choose_lists(args.lists, config, folder)
    folds = find_folds(lists)
    check_folds(folds, config.data.root)
    config, words = with_one_start(config, words, folder)
    runs = fold_runs(config, folds, args.seeds, folder, [args.preset, *words])
    data = fold_fingerprints(config)

    def trained(run: FoldRun) -> bool:
        return is_trained(run, data)

    part, parts = args.part
    jobs = remaining_jobs(runs[part - 1 :: parts], [args.preset, *words], APP, trained)
    if jobs:
        with locked(folder):
            pass  # that it can be written is known before hours have passed
        code = drive(jobs, slots, folder)
        if code == EXIT_STOPPED:
            print("crossval: stopped by a signal; the same command goes on", flush=True)
        if code:
            return code
    # What others have not evaluated, they may be working on: their checkpoints are left alone until then.
    waiting = [run.path.name for run in runs if not (run.path / BEST).exists() or not trained(run)]
    if waiting:
        print(f"crossval: this part is done; {len(waiting)} of {len(runs)} runs are not yet ({', '.join(waiting)})")
        return 0
    write_results(runs, folder, notes)
    return 0


def train_config(preset: str, words: list[str]) -> Config:
    """Return what train.py would make of the words behind `--`.

    Raises:
        UserError: if they are wrong, or set what is another one in each run.
    """
    for word in words:
        flag = word.split("=")[0].replace("_", "-").replace("--no-resume", "--resume")
        if flag in OWN:
            raise UserError(f"{flag} is set here for each run; use {OWN[flag]}")
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    return parse_config([preset, *words])


def choose_lists(lists: Path | None, config: Config, folder: Path) -> tuple[Path, list[str]]:
    """Return the folder of the lists, and notes about them; the embedded data set is split.

    Raises:
        UserError: if there are none.
    """
    data = config.data
    if lists is not None:
        return lists, []
    if data.train_list.name == "set_1_train.txt":
        return data.train_list.parent, []
    if data.train_list.parent == Path("data/faces"):
        with locked(folder):
            write_folds([data.train_list, data.val_list], folder / "lists", NUM_FOLDS)
        note = "the embedded data set's lists do not name the drawn people: one of them may be in training and test"
        return folder / "lists", [note]
    raise UserError(f"{config.preset} has no folds of its own: --lists DIR, with set_1_train.txt, set_1_test.txt ...")


def write_results(runs: list[FoldRun], folder: Path, notes: list[str]) -> None:
    """Write and print the results of all runs."""
    path = folder / "results.json"
    starts = sorted({begun.model.init for run in runs if (begun := begun_config(run.path)) is not None})
    if len(starts) > 1:  # parts of several machines, of which one had no way to the weights
        notes = [*notes, f"the runs do not start alike, but from {' and '.join(starts)}"]
    with locked(folder):
        finished = [read_finished(run) for run in runs]
        command = f"{command_of('crossval')} {shlex.join(sys.argv[1:])}"
        results = {"command": command, "name": folder.name} | collect(finished, notes)
        try:
            write_whole(path, json.dumps(results, indent=1))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({reason(error)})") from None
        report = write_folds_report(folder, results, [run.run for run in finished])
    print_results(results)
    print(f"{path}\n{report}")


def print_results(results: dict[str, Any]) -> None:
    table = Table(title=results["name"], title_justify="left")
    table.add_column("%")
    for name in ("WAR", "UAR"):
        table.add_column(name, justify="right")
    for kind in ("last", "best"):
        means, pooled = ([results[kind][what][name] for name in ("WAR", "UAR")] for what in ("mean_of_folds", "pooled"))
        table.add_row(
            f"{kind} epoch, mean of folds ± sd", *(f"{m['mean']:.2f} ± {m['sd_of_folds']:.2f}" for m in means)
        )
        cells = ("{:.2f} ({:.1f} to {:.1f})".format(p["mean"], *p["interval"]) for p in pooled)
        table.add_row(f"{kind} epoch, pooled (95 %)", *cells)
    show_table(table)
    print("the best epoch is picked on the test folds")


def part_of(text: str) -> tuple[int, int]:
    """Parse an argument: "2/5" is the second of five parts."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 2/5")
    return int(found[1]), int(found[2])


def main(arguments: list[str]) -> int:
    parser = Parser("crossval", __doc__)
    parser.add_argument("preset", help=f"of train.py: {', '.join(PRESETS)}")
    parser.add_argument("--lists", type=Path, metavar="DIR", help="set_1_train.txt, set_1_test.txt, set_2 ... lie here")
    parser.add_argument("--seeds", type=in_range(int, 1, 1000), default=1, help="how often, with seeds 0, 1, ... (1)")
    parser.add_argument("--parallel", type=in_range(int, 1, 64), default=1, metavar="N", help="runs at once (1)")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="only each N-th run, from the I-th")
    parser.add_argument("--name", help="the folder in --log-dir; PRESET-crossval if not given")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"))
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    args, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"unknown: {shlex.join(unknown)}; words for train.py go after --")
    words = arguments[len(own) + 1 :]
    return one_line_errors("crossval", lambda: run(args, words))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
