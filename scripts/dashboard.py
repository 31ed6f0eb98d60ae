"""The project's W&B workspace as code: `python scripts/dashboard.py --entity NAME` saves it as a view of project dfer.

Sections: throughput, recognition (WAR, UAR, losses), per class, CRF, folds. NAME is the user or team that has the
project (default: $WANDB_ENTITY). Each call saves a new view. Where there is no W&B key, and with --json, the view is
written to a file instead.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("dashboard", "torch")
from dfer.cli import Parser, UserError, missing_packages, one_line_errors
from dfer.files import reason, write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.run.wandb_log import has_wandb_key

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import BarPlot, CustomChart, LinePlot, ScalarChart, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Workspace

    Panel = LinePlot | BarPlot | ScalarChart | CustomChart | WeavePanelSummaryTable

# wandb_workspaces is imported in functions: with wandb it takes two seconds, which a wrong command need not wait for.
NO_KEY = Path("logs/dashboard.json")


def workspace(entity: str, project: str) -> "Workspace":
    """Build the workspace, which is not saved yet. Lines are over what `dfer.run.wandb_log.AXES` says."""
    import wandb_workspaces.workspaces as ws

    sections = {
        "Throughput": throughput_panels(),
        "Recognition": recognition_panels(),
        "Per class": class_panels(),
        "CRF": crf_panels(),
        "Folds": [*fold_panels("WAR"), *fold_panels("UAR")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="dfer",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        runset_settings=ws.RunsetSettings(
            pinned_columns=["summary:val/WAR", "summary:val/UAR", "config:dataset", "config:fold", "config:seed"]
        ),
    )


def lines(x: Literal["step", "epoch"], title: str, *keys: str) -> "LinePlot":
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=x, y=list(keys))


def throughput_panels() -> "list[Panel]":
    rates = "throughput/total_clips_per_s", "throughput/compute_clips_per_s"
    evaluation_rates = "val/total_clips_per_s", "val/compute_clips_per_s"
    return [
        lines("step", "clips/s, and without waiting for data", *rates),
        lines("step", "clips/s of one GPU", "throughput/per_gpu_clips_per_s"),
        lines("step", "share of the time waiting for data", "throughput/data_wait_share"),
        lines("step", "ms per optimizer step", "throughput/step_ms"),
        lines("step", "share of the time in which the device worked", "throughput/busy"),
        lines("step", "share of the GPU's peak FLOP/s", "throughput/mfu"),
        lines("step", "peak memory, GB", "throughput/memory_gb"),
        lines("epoch", "evaluation: clips/s, and without waiting for data", *evaluation_rates),
        lines("epoch", "evaluation: share of the time waiting for data", "val/data_wait_share"),
    ]


def recognition_panels() -> "list[Panel]":
    import wandb_workspaces.reports.v2 as wr

    return [
        lines("epoch", "WAR, %", "val/WAR"),
        lines("epoch", "UAR, %", "val/UAR"),
        wr.ScalarChart(title="best WAR, picked on the evaluation list", metric="best/WAR", groupby_aggfunc="max"),
        wr.ScalarChart(title="best UAR, picked on the evaluation list", metric="best/UAR", groupby_aggfunc="max"),
        lines("step", "training loss", "train/loss"),
        lines("epoch", "evaluation loss", "val/loss"),
        lines("step", "learning rate", "train/lr"),
        lines("step", "norm of the gradient", "train/grad_norm"),
        lines("step", "steps skipped, as not finite", "train/skipped_steps"),
    ]


def class_panels() -> "list[Panel]":
    import wandb_workspaces.reports.v2 as wr

    confusion = wr.CustomChart(
        query={"summaryTable": {"tableKey": "val/confusion_matrix_table"}},
        chart_name="wandb/confusion_matrix/v1",
        chart_fields={name: name for name in ("Actual", "Predicted", "nPredictions")},
        chart_strings={"title": "Confusion of the last epoch"},
    )
    recalls = [lines("epoch", f"recall of {emotion}, %", f"val/recall/{emotion}") for emotion in EMOTIONS]
    return [*recalls, confusion, wr.WeavePanelSummaryTable(table_name="val/hardest_clips")]


def crf_panels() -> "list[Panel]":
    return [
        lines("step", "coupling; its optimum is unique below 2", "crf/coupling"),
        lines("step", "damping", "crf/damping"),
        lines("step", "entropy of the marginals, nats", "crf/entropy"),
        lines("step", "residual of the last iteration", "crf/residual"),
        lines("step", "free energy, nats per token", "crf/free_energy"),
        lines("step", "increases of the free energy; must be 0", "crf/energy_increases"),
        lines("step", "neighbours of a token: mean and fewest", "crf/degree_mean", "crf/degree_min"),
    ]


def fold_panels(name: str) -> "list[Panel]":
    """Build panels of means over the runs of a group, which are the seeds of a data set's fold."""
    import wandb_workspaces.reports.v2 as wr

    key, mean = f"val/{name}", {"groupby": "Group", "groupby_aggfunc": "mean"}
    return [
        wr.LinePlot(title=f"{name} by fold, %", x="epoch", y=[key], groupby_rangefunc="minmax", **mean),
        wr.BarPlot(title=f"{name} of the last epoch by fold, %", metrics=[key], groupby_rangefunc="stddev", **mean),
    ]


def run(args: argparse.Namespace) -> None:
    if missing := missing_packages("wandb", "wandb-workspaces"):
        raise UserError(f"a dashboard needs packages that are not installed: pip install {' '.join(missing)}")
    if args.json or not has_wandb_key():
        path = args.json or NO_KEY
        spec = workspace(args.entity or "", args.project)._to_model().spec  # what save() sends
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, spec.model_dump_json(by_alias=True, exclude_none=True))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({reason(error)})") from None
        print(f"written: {path}")
        if not args.json:
            print("there is no W&B key here: after `wandb login` the same command saves this view to W&B")
        return
    if not args.entity:
        raise UserError("--entity NAME: say whose project it is, or set WANDB_ENTITY")
    view = workspace(args.entity, args.project)
    try:
        view.save()  # which prints its address
    except Exception as error:  # network, key, rights: all of them mean "not saved"
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"W&B did not save it: {cause}; --json FILE writes it to a file") from None


def main(arguments: list[str]) -> int:
    parser = Parser("dashboard", __doc__)
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="the user or team ($WANDB_ENTITY)")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "dfer"), help="($WANDB_PROJECT, or dfer)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the view there instead of saving it")
    args = parser.parse_args(arguments)
    return one_line_errors("dashboard", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
