"""The mutants fit the code as it is; that the tests kill them is for `make test-slow`, as it takes minutes."""

from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import MUTANTS, ROOT, mutate


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fits_the_code(name, tmp_path):
    for file, *_ in MUTANTS[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    mutate(tmp_path, MUTANTS[name])
    for file, *_ in MUTANTS[name]:
        compile(Path(tmp_path / file).read_text(), file, "exec")


@pytest.mark.slow
def test_every_mutant_is_killed(capsys):
    assert mutants.main([]) == 0, capsys.readouterr().out
