"""The dashboard and the sweeps name what a real run logs and train.py takes: nothing else, and nothing is left out."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from dfer.config import PRESETS, parse_config
from dfer.run.wandb_log import AXES
from tests.conftest import ROOT, nursery
from tests.test_train import TINY, rows, tiny_run
from tests.wandb_server import FakeWandb

KEY = "0123456789abcdef" * 2 + "canary00"
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


def dashboard(cwd, *words, expect=0, **env):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    command = [str(ROOT / "scripts/dashboard.py"), *words]
    done = nursery().run(command, {**outside, "HOME": str(cwd), **env}, 600, cwd)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def logged(clips, tmp_path_factory):
    """What W&B has of a real run: the keys of its rows, of its summary and of its settings."""
    log_dir = tmp_path_factory.mktemp("logs")
    tiny_run(clips, log_dir, "a", "--run.wandb", "offline")
    (folder,) = (log_dir / "a" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    found = {"rows": set(), "summary": set(), "config": set()}
    for record in map(json.loads, done.stdout.splitlines()):
        if record["type"] == "history":
            found["rows"] |= {key.split(".")[0] for key in record["history"]["item"] if key[0] != "_"}
        elif record["type"] == "summary":
            found["summary"] |= {key.split(".")[0] for key in record["summary"]["update"] if key[0] != "_"}
        elif record["type"] == "run":
            found["config"] |= set(record["run"]["config"]["update"])
    assert {key for row in rows(log_dir / "a") for key in row} < found["rows"] < found["summary"]
    return found


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    folder = tmp_path_factory.mktemp("view")
    dashboard(folder, "--json", "new folder/view.json")
    return json.loads((folder / "new folder" / "view.json").read_text())


def panels(view):
    return [panel for section in view["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def keys(panel):
    if panel["viewType"] == "Vega2":
        return set(re.findall(r'"tableKey", "value": "([^"]+)"', json.dumps(panel)))
    if panel["viewType"] == "Weave":
        return set(re.findall(r'"type": "string", "val": "([^"]+)"', json.dumps(panel)))
    return set(panel["config"]["metrics"])


def test_the_panels_show_all_that_a_run_logs_and_nothing_else(view, logged):
    shown = [keys(panel) for panel in panels(view)]  # one of them a GPU logs alone
    assert all(shown) and set().union(*shown) == logged["summary"] - {"step", "epoch"} | {"throughput/mfu"}
    for panel in panels(view):
        if panel["viewType"] == "Run History Line Plot":
            assert keys(panel) <= logged["rows"] | {"throughput/mfu"}
            assert {AXES[key.split("/")[0] + "/*"] for key in keys(panel)} == {panel["config"]["xAxis"]}


def test_the_sections_and_the_columns_of_runs(view, logged):
    names = [section["name"] for section in view["section"]["panelBankConfig"]["sections"]]
    assert names == ["Throughput", "Recognition", "Per class", "CRF", "Folds"]
    folds = view["section"]["panelBankConfig"]["sections"][-1]["panels"]
    assert {(key, panel["config"]["groupBy"]) for panel in folds for key in keys(panel)} == {
        ("val/WAR", "group"),
        ("val/UAR", "group"),
    }
    (run_set,) = view["section"]["runSets"]
    columns = [column.split(":") for column in run_set["runFeed"]["columnOrder"]]
    assert len(columns) == 6
    for kind, name in columns:
        assert name in logged[kind] if kind != "run" else name == "displayName"


def without_ids(node):
    if isinstance(node, dict):
        return {key: without_ids(value) for key, value in node.items() if key != "__id__"}
    return [without_ids(value) for value in node] if isinstance(node, list) else node


def test_it_is_saved_where_there_is_a_key(view, tmp_path):
    with FakeWandb() as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        done = dashboard(tmp_path, "--entity", "me", **env)
        (saved,) = server.views
        assert not server.unknown
        assert (saved["entityName"], saved["projectName"], saved["type"]) == ("me", "dfer", "project-view")
        assert without_ids(json.loads(saved["spec"])) == without_ids(view)
        assert re.search(r"View saved: http\S+/me/dfer\?nw=\w+\n", done.stdout + done.stderr)

        done = dashboard(tmp_path, expect=2, **env)
        assert done.stderr == "dashboard: --entity NAME: say whose project it is, or set WANDB_ENTITY\n"
        server.state = "unauthorized"
        done = dashboard(tmp_path, expect=2, WANDB_ENTITY="me", **env)
        assert "dashboard: W&B did not save it: " in done.stderr and done.stderr.endswith("writes it to a file\n")
        assert "Traceback" not in done.stderr and KEY not in done.stderr + done.stdout and len(server.views) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_without_a_key_it_is_a_file(view, tmp_path):
    done = dashboard(tmp_path)
    assert done.stdout.splitlines() == [
        "written: logs/dashboard.json",
        "there is no W&B key here: after `wandb login` the same command saves this view to W&B",
    ]
    assert without_ids(json.loads((tmp_path / "logs" / "dashboard.json").read_text())) == without_ids(view)
    (tmp_path / "file").write_text("")
    done = dashboard(tmp_path, "--json", "file/view.json", expect=2)
    assert re.fullmatch(r"dashboard: file/view\.json: cannot be written \(.+\)\n", done.stderr)


def options(parameter):
    """The values of a sweep's parameter, of a range its ends."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_is_one_that_training_takes(path):
    sweep = yaml.safe_load(path.read_text())
    assert (ROOT / sweep["program"]).name == "train.py"
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"] and sweep["command"][-1] == "${args}"
    words = sweep["command"][3:-1]
    assert words[0] in PRESETS
    for name, parameter in sweep["parameters"].items():
        found = set()
        for value in options(parameter):
            args = create_sweep_command_args({"args": {name: {"value": value}}})["args"]  # as W&B's agent writes them
            config = dataclasses.asdict(parse_config([*words, *args]))
            for part in name.replace("-", "_").split("."):
                config = config[part]
            assert config == value
            found.add(config)
        assert len(found) >= 2
    everything = {name: {"value": options(parameter)[-1]} for name, parameter in sweep["parameters"].items()}
    parse_config([*words, *create_sweep_command_args({"args": everything})["args"]])
    assert create_sweep_command(sweep["command"]) == sweep["command"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_looks_at_what_is_logged(path, logged):
    metric = yaml.safe_load(path.read_text())["metric"]
    assert metric["name"] in logged["rows"] and metric["goal"] == "maximize"


def wandb_command(server, folder, *words):
    outside = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # an agent starts `python`
    env = {**outside, "PATH": path, "OMP_NUM_THREADS": "1", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *words], cwd=ROOT, env=env | {"WANDB_DIR": str(folder)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_is_created_and_an_agent_works_on_it(clips, tmp_path):
    assert [path.stem for path in SWEEPS] == ["crf", "recipe"]
    with FakeWandb() as server:
        for path in SWEEPS:
            wandb_command(server, tmp_path, "sweep", "--project", "dfer", str(path.relative_to(ROOT)))
        assert [yaml.safe_load(config) for config in server.sweeps] == [yaml.safe_load(p.read_text()) for p in SWEEPS]

        sweep = yaml.safe_load(SWEEPS[0].read_text())
        lists = ["--data.train-list", f"{clips}/train.txt", "--data.val-list", f"{clips}/test.txt"]
        words = [*TINY, *lists, "--run.log-dir", str(tmp_path), "--run.wandb", "auto"]
        sweep["command"][3:-1] = words  # for `faces`, which takes minutes
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        said = wandb_command(server, tmp_path, "sweep", "--project", "dfer", str(tmp_path / "sweep.yaml"))
        (told,) = re.findall(r"wandb agent (\S+)", said)
        chosen = {name: {"value": options(parameter)[1]} for name, parameter in sweep["parameters"].items()}
        server.commands = [{"type": "run", "run_id": "trial1", "program": sweep["program"], "args": chosen}]
        wandb_command(server, tmp_path, "agent", "--count", "1", told)
        assert list(server.runs) == ["trial1"] and server.runs["trial1"].complete and not server.unknown
    (run_dir,) = tmp_path.glob("debug-*")
    assert (run_dir / "wandb-id.txt").read_text() == "trial1"
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["model"]["readout"], config["model"]["max_coupling"], config["seed"]) == ("labels", 8.0, 1)
    assert server.runs["trial1"].rows[-1]["val/WAR"] == rows(run_dir)[-1]["val/WAR"]
