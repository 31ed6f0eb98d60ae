"""The walls between the rooms: who may import what."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONLY_IN = {
    "timm": {"dfer/model.py"},
    "huggingface_hub": {"dfer/model.py"},
    "wandb": {"dfer/logger.py"},
    "tyro": {"dfer/config.py"},
    "nvidia": {"dali_pipes/graphs.py", "benchmarks/peers.py"},
    "cv2": {"dfer/faces.py", "scripts/make_faces.py", "benchmarks/peers.py"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def sources() -> list[Path]:
    folders = (ROOT / "dfer", ROOT / "dali_pipes", ROOT / "scripts", ROOT / "benchmarks")
    return [ROOT / "train.py", *(p for folder in folders for p in folder.rglob("*.py"))]


def test_each_library_has_one_door():
    found = {library: set() for library in ONLY_IN}
    for path in sources():
        for name in imports(path):
            library = name.split(".")[0]
            if library in ONLY_IN:
                found[library].add(str(path.relative_to(ROOT)))
    assert found == ONLY_IN


def test_the_core_knows_neither_the_loader_nor_the_scripts():
    for path in (ROOT / "dfer").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"dali_pipes", "scripts", "benchmarks", "tests", "train"}, path


def test_no_drawers():
    names = {p.stem for p in sources()}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc", "manager", "trainer"}
