"""How a run with --run.wandb auto is recorded is W&B's to say: by its modes, settings and keys."""

import dataclasses
import json
import os

import pytest
import wandb

from dfer.cli import UserError
from dfer.config import config_from_json, parse_config
from dfer.run.continuing import differences
from dfer.run.wandb_log import check_settings, has_wandb_key, mode_of_machine, project_of
from tests.conftest import run_python

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def nothing(tmp_path, monkeypatch):
    """A home without W&B, and a W&B that has read nothing yet."""
    for name in [name for name in os.environ if name.startswith("WANDB") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


def netrc(path, host="api.wandb.ai", mode=0o600):
    path.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    path.chmod(mode)


@pytest.mark.parametrize(
    ("name", "host", "mode", "env"),
    [
        (".netrc", "api.wandb.ai", 0o600, {}),
        (".netrc", "api.wandb.ai", 0o644, {}),
        ("_netrc", "api.wandb.ai", 0o600, {}),
        ("elsewhere", "api.wandb.ai", 0o640, {"NETRC": "elsewhere"}),
        (".netrc", "metrics.example.org", 0o600, {"WANDB_BASE_URL": "https://metrics.example.org"}),
        (".netrc", "localhost:8080", 0o600, {"WANDB_BASE_URL": "http://localhost:8080"}),
    ],
)
def test_a_key_is_found_where_wandb_finds_it(name, host, mode, env, tmp_path, monkeypatch):
    assert not has_wandb_key() and mode_of_machine() == "offline"
    netrc(tmp_path / name, host, mode)
    for variable, value in env.items():
        monkeypatch.setenv(variable, str(tmp_path / value) if variable == "NETRC" else value)
    wandb.teardown()
    assert has_wandb_key() and mode_of_machine() == "online"


@pytest.mark.parametrize("text", [f"machine other.org\n  login a\n  password {KEY}\n", "machine", ""])
def test_no_key_for_this_server_is_none(text, tmp_path):
    (tmp_path / ".netrc").write_text(text)
    assert not has_wandb_key() and mode_of_machine() == "offline"


def test_a_key_of_the_environment_or_the_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "no key")  # the attempt says so
    assert has_wandb_key()
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    assert has_wandb_key()


@pytest.mark.parametrize(
    ("mode", "recorded"),
    [("disabled", "off"), ("offline", "offline"), ("dryrun", "offline"), ("online", "online"), ("run", "online")],
)
@pytest.mark.parametrize("where", ["environment", "settings"])
def test_wandb_mode_is_obeyed(mode, recorded, where, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if where == "environment":
        monkeypatch.setenv("WANDB_MODE", mode)
    else:  # as `wandb offline` leaves it in the working folder
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text(f"[default]\nmode = {mode}\n")
    assert mode_of_machine() == recorded
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    assert mode_of_machine() == ("off" if recorded == "off" else "offline")  # it never asks for a key


def test_an_unknown_mode_is_one_line(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match=r"^W&B's settings cannot be used: .*mode"):
        mode_of_machine()


def test_without_the_package_a_run_does_without_it_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("dfer.run.wandb_log.missing_packages", lambda *names: list(names))
    assert mode_of_machine() == "off"
    check_settings(parse_config(["debug", "--run.wandb", "auto"]))
    check_settings(parse_config(["debug", "--run.wandb", "off"]))
    assert capsys.readouterr().err.count("W&B is not installed") <= 1  # said once in a process
    with pytest.raises(UserError, match=r"^--run\.wandb offline: W&B is not installed: pip install wandb, or .* off$"):
        check_settings(parse_config(["debug", "--run.wandb", "offline"]))


def test_the_project(monkeypatch):
    config = parse_config(["debug"])
    assert project_of(config) == "dfer"
    monkeypatch.setenv("WANDB_PROJECT", "faces in the wild")
    wandb.teardown()
    assert project_of(config) == "faces in the wild"
    assert project_of(parse_config(["debug", "--run.wandb-project", "mine"])) == "mine"
    for name in ("a/b", "a%", "?", "x" * 129, "a:b", "a\\b"):
        with pytest.raises(UserError, match="W&B takes 1 to 128 letters"):
            project_of(parse_config(["debug", "--run.wandb-project", name]))


def test_a_run_stays_in_the_project_that_it_began_in(tmp_path, monkeypatch):
    """One of before there was the option is in dfer, whatever the environment says by now; a flag moves it."""
    saved = json.loads(parse_config(["debug"]).to_json())
    del saved["run"]["wandb_project"], saved["run"]["grace"]
    monkeypatch.setenv("WANDB_PROJECT", "other")
    config = config_from_json(json.dumps(saved), tmp_path)
    assert project_of(config) == "dfer" and config.run.grace == 0
    moved = dataclasses.replace(config, run=dataclasses.replace(config.run, wandb_project="mine", grace=8.0))
    assert differences(config, moved) == []


def test_a_netrc_in_another_encoding_costs_no_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "netrc").write_bytes(b"machine example.org login me password gr\xfc\xdf\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert has_wandb_key() is False
    assert "W&B's key cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--validate-only",)])
@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({"WANDB_MODE": "nonsense"}, ("--run.wandb", "auto"), "W&B's settings cannot be used"),
        ({"WANDB_BASE_URL": "nonsense"}, ("--run.wandb", "auto"), "W&B's settings cannot be used"),
        ({"WANDB_PROJECT": "a:b"}, ("--run.wandb", "offline"), "W&B's settings cannot be used"),
        ({}, ("--run.wandb", "offline", "--run.wandb-project", "a/b"), "--run.wandb-project 'a/b'"),
    ],
)
def test_wrong_settings_are_found_before_a_run_begins(tmp_path, environment, flags, said, words):
    """Not with the folder of a run left behind; --validate-only finds them too."""
    command = ("debug", *flags, *words, "--run.log-dir", str(tmp_path / "logs"))
    done = run_python("train.py", *command, fresh=False, **environment)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "logs").exists()
