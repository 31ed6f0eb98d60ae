"""The notebook: valid, stored without outputs, and what it shows is done (slow)."""

import ast
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "first-run.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_plain_python_without_outputs():
    """The fields that version 4.5 of the format asks for."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    for cell in NOTEBOOK["cells"]:
        own = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | own and cell["cell_type"] in (
            "code",
            "markdown",
        )
        assert not own or (cell["outputs"], cell["execution_count"]) == ([], None)
        assert "".join(cell["source"]).strip() and all(line.endswith("\n") for line in cell["source"][:-1])
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and len(CODE) >= 6
    for code in CODE:
        ast.parse(code)


@pytest.mark.slow
def test_its_cells_run_one_after_the_other(tmp_path):
    for name in ("train.py", "scripts", "dfer", "dali_pipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "cells.py").write_text("\n\n".join(CODE))
    env = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "cells.py"]  # in docs/, as Jupyter starts a notebook where it lies
    done = subprocess.run(command, cwd=tmp_path / "docs", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val/WAR {" in done.stdout and " frames, " in done.stdout
    assert (tmp_path / "logs" / "notebook" / "config.json").exists() and not (tmp_path / "docs" / "logs").exists()
