"""Weights & Biases, a view of metrics.jsonl: it never prompts, blocks or stops a run."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dfer.cli import UserError, missing_packages, say_once
from dfer.config import Config
from dfer.files import reason, write_whole
from dfer.lists.annotations import EMOTIONS
from dfer.metrics import ConfusionMatrix
from dfer.run.predictions import Predictions
from dfer.run.provenance import describe_starts, read_starts

if TYPE_CHECKING:
    import wandb

# What W&B draws each row's values over: training by step, evaluations by epoch, which is the same for runs with other
# numbers of clips per step. Every row has both. No summary="max" here: a continued run forgets its maximum.
AXES = {"train/*": "step", "throughput/*": "step", "crf/*": "step", "val/*": "epoch"}
HARDEST = 50  # clips in W&B's table


class WandbLog:
    """A run as W&B records it, online, offline or not at all. What goes wrong there is said and ends only that.

    A row has the same number there as in metrics.jsonl. So a continued run skips what W&B has already, and sends what
    a killed process did not get there.

    Args:
        run_dir: the run's folder.
        config: the run's configuration.
        earlier: the rows of metrics.jsonl so far.
        wandb_id: the run's id, if a checkpoint has one.
        done: nothing is left of the run to do.
        say: takes a line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        earlier: list[dict],
        wandb_id: str | None,
        done: bool,
        say: Callable[[str], None],
    ):
        self._run_dir, self._config, self._say = run_dir, config, say
        self._run: wandb.Run | None = None
        self._next = 0  # number of the row that W&B lacks
        self.id = wandb_id
        mode = config.run.wandb
        if mode == "off":
            return
        if mode == "auto" and (mode := mode_of_machine()) == "off":
            return
        folders = list((run_dir / "wandb").glob("*run-*/"))  # of earlier processes
        unsent = [f for f in folders if f.name.startswith("offline-") and not list(f.glob("*.synced"))]
        if done and (unsent or mode == "offline"):
            return  # the folder of the process that ended the run has its tables
        self.id = _run_id(run_dir / "wandb-id.txt", wandb_id)
        for attempt in dict.fromkeys((mode, "offline")):
            if self._open(attempt, folders, unsent, len(earlier)):
                break
        for number, values in enumerate(earlier):
            self.row(number, values)

    def _open(self, mode: Literal["online", "offline"], folders: list[Path], unsent: list[Path], num_rows: int) -> bool:
        """Start recording in one mode. Return False, with a line that says why, if that cannot be."""
        import wandb  # its import costs a second, which a run without it need not pay

        # Bounded delays at both ends; no terminal capture, no git or machine details beyond what the run logs itself.
        settings = wandb.Settings(init_timeout=30, finish_timeout=60, console="off", silent=True, disable_git=True)
        try:
            run = wandb.init(mode=mode, settings=settings, **self._options())
            for names, axis in AXES.items():
                run.define_metric(names, step_metric=axis)
            # Nobody can say what a process got into its folder offline. Where W&B has all else, or nothing was sent
            # yet, this process records the rows again, and what is unsent goes where `wandb sync` does not look.
            # Otherwise that is taken for all rows up to the checkpoint.
            whole = mode == "online" or unsent == folders
            for folder in unsent if whole else ():
                (folder.parent / "replaced").mkdir(exist_ok=True)
                folder.rename(folder.parent / "replaced" / folder.name)
        except Exception as error:  # network, key, disk: all of them mean "not this way"
            instead = "; recording offline" if mode == "online" else ""
            self._say(f"W&B cannot record {mode} ({reason(error)}){instead}")
            wandb.teardown()  # its service still holds the run's id
            for folder in set((self._run_dir / "wandb").glob("run-*/")) - set(folders):  # nothing was sent from it
                shutil.rmtree(folder, ignore_errors=True)
            return False
        self._run = run
        self._next = run.starting_step if whole else num_rows
        return True

    def _options(self) -> dict:
        """Return the arguments of wandb.init: project, group, tags, name and configuration."""
        about = _grouping(self._config) | {"made_by": describe_starts(read_starts(self._run_dir))}
        fold = [f"fold{about['fold']}"] if about["fold"] else []
        return {
            "project": project_of(self._config),
            "group": "-".join([str(about["dataset"]), *fold]),
            "job_type": "train",
            "tags": [about["dataset"], *fold, f"seed{self._config.seed}", self._config.model.name],
            "name": self._run_dir.name,
            "id": self.id,
            "dir": self._run_dir,
            "config": json.loads(self._config.to_json())
            | about
            | {"made_by": describe_starts(read_starts(self._run_dir))},
            "resume": "allow",
        }

    def row(self, number: int, values: dict[str, int | float | None]) -> None:
        """Send row `number` of metrics.jsonl, unless W&B has it."""
        if number >= self._next:
            self._send(lambda run: run.log(values, step=number))

    def best(self, best: dict[str, list[int | float]]) -> None:
        """Send the best values, which W&B by itself forgets of a run that is continued."""
        values = {f"best/{name}": value for name, (value, _) in best.items()}
        self._send(lambda run: run.summary.update(values))

    def result(self, confusion: ConfusionMatrix, predictions: Callable[[], Predictions], last_row: int) -> None:
        """Send the tables of the last evaluation, with row `last_row`: W&B has no row more than metrics.jsonl."""
        self._send(lambda run: run.log(_tables(confusion, predictions()), step=last_row))

    def close(self) -> None:
        """End the recording; W&B gets at most a minute."""
        self._send(lambda run: run.finish())

    def _send(self, work: Callable[["wandb.Run"], None]) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        except Exception as error:
            self._run = None
            self._say(f"W&B failed ({reason(error)}); nothing more goes there, metrics.jsonl has everything")


def check_settings(config: Config) -> None:
    """Look at what a run will be recorded by, before it begins.

    Raises:
        UserError: if W&B is asked for and not installed, cannot use the settings of this machine, or takes no project
            of the name that is given.
    """
    if config.run.wandb == "auto":
        mode_of_machine()
    if config.run.wandb == "off" or (config.run.wandb == "auto" and missing_packages("wandb")):
        return
    if missing_packages("wandb"):
        raise UserError(f"--run.wandb {config.run.wandb}: W&B is not installed: pip install wandb, or --run.wandb off")
    project_of(config)


def project_of(config: Config) -> str:
    """Return the project that a run is recorded in: --run.wandb-project, else W&B's own setting, else dfer.

    Raises:
        UserError: if W&B takes no project of that name.
    """
    project = config.run.wandb_project or _settings().project or "dfer"
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", project):
        raise UserError(f"--run.wandb-project {project!r}: W&B takes 1 to 128 letters, and none of / \\ # ? % :")
    return project


def _run_id(id_file: Path, wandb_id: str | None) -> str:
    """Return the id of a run in W&B, which its folder keeps from the first process on."""
    if not id_file.exists():
        # A sweep's agent has named the run already, and would not let another name pass.
        swept = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        write_whole(id_file, wandb_id or swept or secrets.token_hex(4))
    return id_file.read_text(encoding="utf-8", errors="replace")


def _tables(confusion: ConfusionMatrix, predictions: Predictions) -> dict[str, "wandb.plot.CustomChart | wandb.Table"]:
    """Return what W&B shows of the last evaluation: the confusion matrix and the hardest clips.

    Clips are named by their line in predictions.csv, since their own names may be names of people. The hardest are
    those whose label got the lowest probability.
    """
    import wandb

    counts = confusion.counts.cpu().numpy()
    labels, predicted = np.nonzero(counts)
    repeats = counts[labels, predicted]
    plot = wandb.plot.confusion_matrix(
        y_true=np.repeat(labels, repeats).tolist(),
        preds=np.repeat(predicted, repeats).tolist(),
        class_names=list(EMOTIONS),
    )
    table = wandb.Table(["line of predictions.csv", "label", "prediction", "p(label)", "p(prediction)"])
    p_label = predictions.probabilities[np.arange(len(predictions.labels)), predictions.labels]
    for i in np.argsort(p_label, kind="stable")[:HARDEST].tolist():
        label, prediction = EMOTIONS[predictions.labels[i]], EMOTIONS[predictions.predicted[i]]
        table.add_data(i + 2, label, prediction, float(p_label[i]), float(predictions.probabilities[i].max()))
    return {"val/confusion_matrix": plot, "val/hardest_clips": table}


def _grouping(config: Config) -> dict[str, str | int | None]:
    """Return the data set, named after the folder of its lists, and the fold if these are the lists of one."""
    path = config.data.train_list.absolute()
    folder = path.parent.parent if path.parent.name == "lists" else path.parent  # logs/NAME/lists of crossval.py
    fold = re.match(r"set_(\d+)_", path.name)
    return {"dataset": folder.name[:50] or "data", "fold": int(fold[1]) if fold else None}  # a tag may have 64 letters


def mode_of_machine() -> Literal["online", "offline", "off"]:
    """Return how W&B would record here by itself, but that it never asks for a key: without one it is offline.

    WANDB_MODE and the settings that `wandb offline` and `wandb disabled` leave count. It is off where W&B is not
    installed.
    """
    if missing_packages("wandb"):
        say_once("W&B is not installed: metrics.jsonl has what it would record (pip install wandb)")
        return "off"
    mode = _settings().mode
    if mode == "disabled":
        return "off"
    return "online" if mode in ("online", "run", "shared") and has_wandb_key() else "offline"


def has_wandb_key() -> bool:
    """Return whether W&B finds a key for its server, WANDB_BASE_URL's or its own, wherever it looks for one."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    host = _settings().base_url
    try:
        return wbauth.authenticate_session(host=host, source="", prompt=False, update_session=False) is not None
    except AuthenticationError:  # there is one, and the server's refusal of it will be told
        return True
    except (OSError, ValueError) as error:  # a .netrc in another encoding, which costs the dashboard and not the run
        say_once(f"W&B's key cannot be read ({reason(error)}): its records stay here")
        return False


def _settings() -> "wandb.Settings":
    """Return W&B's settings by its files and the environment."""
    from wandb.errors import UsageError
    from wandb.sdk import wandb_setup

    try:
        return wandb_setup.singleton().settings
    except (ValueError, UsageError) as error:  # pydantic's is of several lines
        raise UserError(
            f"W&B's settings cannot be used: {reason(error)}; WANDB_* in the environment sets them"
        ) from None
