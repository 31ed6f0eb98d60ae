"""The project's W&B workspace as code: `python scripts/dashboard.py --entity NAME` saves it as a view of project dfer.

Sections: throughput, recognition (WAR, UAR, losses), per class, CRF, folds. NAME is the user or team that has the
project (default: $WANDB_ENTITY). Each call saves a new view. Where there is no W&B key, and with --json, the view is
written to a file instead.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dfer.cli import Parser
from dfer.lists.annotations import EMOTIONS
from dfer.run.checkpoint import write_whole
from dfer.run.wandb_log import has_wandb_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NO_KEY = Path("logs/dashboard.json")


def workspace(entity: str, project: str) -> "Workspace":
    """The workspace, not yet saved. Lines are over what `dfer.run.wandb_log.AXES` says."""
    import wandb_workspaces.reports.v2 as wr  # with wandb two seconds, which a wrong command need not wait for
    import wandb_workspaces.workspaces as ws

    def over_steps(title: str, *keys: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="step", y=list(keys))

    def over_epochs(title: str, *keys: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="epoch", y=list(keys))

    def folds(name: str) -> list[wr.LinePlot | wr.BarPlot]:
        """Means over the runs of a group: the seeds of a data set's fold."""
        key, mean = f"val/{name}", {"groupby": "Group", "groupby_aggfunc": "mean"}
        return [
            wr.LinePlot(title=f"{name} by fold, %", x="epoch", y=[key], groupby_rangefunc="minmax", **mean),
            wr.BarPlot(title=f"{name} of the last epoch by fold, %", metrics=[key], groupby_rangefunc="stddev", **mean),
        ]

    counts = {name: name for name in ("Actual", "Predicted", "nPredictions")}
    confusion = wr.CustomChart(
        query={"summaryTable": {"tableKey": "val/confusion_matrix_table"}},
        chart_name="wandb/confusion_matrix/v1",
        chart_fields=counts,
        chart_strings={"title": "Confusion of the last epoch"},
    )
    sections = {
        "Throughput": [
            over_steps(
                "clips/s, and without waiting for data",
                "throughput/total_clips_per_s",
                "throughput/compute_clips_per_s",
            ),
            over_steps("clips/s of one GPU", "throughput/per_gpu_clips_per_s"),
            over_steps("share of the time waiting for data", "throughput/data_wait_share"),
            over_steps("ms per optimizer step", "throughput/step_ms"),
            over_steps("peak memory, GB", "throughput/memory_gb"),
            over_epochs(
                "evaluation: clips/s, and without waiting for data", "val/total_clips_per_s", "val/compute_clips_per_s"
            ),
            over_epochs("evaluation: share of the time waiting for data", "val/data_wait_share"),
        ],
        "Recognition": [
            over_epochs("WAR, %", "val/WAR"),
            over_epochs("UAR, %", "val/UAR"),
            wr.ScalarChart(title="best WAR, picked on the evaluation list", metric="best/WAR", groupby_aggfunc="max"),
            wr.ScalarChart(title="best UAR, picked on the evaluation list", metric="best/UAR", groupby_aggfunc="max"),
            over_steps("training loss", "train/loss"),
            over_epochs("evaluation loss", "val/loss"),
            over_steps("learning rate", "train/lr"),
            over_steps("norm of the gradient", "train/grad_norm"),
            over_steps("steps skipped, as not finite", "train/skipped_steps"),
        ],
        "Per class": [
            *(over_epochs(f"recall of {emotion}, %", f"val/recall/{emotion}") for emotion in EMOTIONS),
            confusion,
            wr.WeavePanelSummaryTable(table_name="val/hardest_clips"),
        ],
        "CRF": [
            over_steps("coupling; its optimum is unique below 2", "crf/coupling"),
            over_steps("damping", "crf/damping"),
            over_steps("entropy of the marginals, nats", "crf/entropy"),
            over_steps("residual of the last iteration", "crf/residual"),
            over_steps("free energy, nats per token", "crf/free_energy"),
            over_steps("increases of the free energy; must be 0", "crf/energy_increases"),
            over_steps("neighbours of a token: mean and fewest", "crf/degree_mean", "crf/degree_min"),
        ],
        "Folds": [*folds("WAR"), *folds("UAR")],
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


def main(args: argparse.Namespace, parser: Parser) -> None:
    if args.json or not has_wandb_key():
        path = args.json or NO_KEY
        spec = workspace(args.entity or "", args.project)._to_model().spec  # what save() sends
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(spec.model_dump_json(by_alias=True, exclude_none=True).encode()))
        except OSError as error:
            parser.error(f"{path}: cannot be written ({error.strerror})")
        print(f"written: {path}")
        if not args.json:
            print("there is no W&B key here: after `wandb login` the same command saves this view to W&B")
        return
    if not args.entity:
        parser.error("--entity NAME: say whose project it is, or set WANDB_ENTITY")
    try:
        workspace(args.entity, args.project).save()  # which prints its address
    except Exception as error:  # network, key, rights: all of them mean "not saved"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        parser.error(f"W&B did not save it: {reason}; --json FILE writes it to a file")


if __name__ == "__main__":
    command = Parser("dashboard", __doc__)
    command.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="the user or team ($WANDB_ENTITY)")
    command.add_argument("--project", default="dfer", help="the project (dfer)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the view there instead of saving it")
    main(command.parse_args(), command)
