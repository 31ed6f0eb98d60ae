"""All commands behind one name, which `pip install` puts on the path: `dfer train dfew` is `python train.py dfew`.

`dfer evaluate ...` is `python scripts/evaluate.py ...`, and so on, with hyphens for underscores. Several processes:
`torchrun --nproc_per_node=4 -m dfer train dfew`.
"""

import ast
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # train.py and scripts/ lie beside this package, installed or not


def commands() -> dict[str, Path]:
    """What can be started: train.py, and each of the scripts."""
    files = [ROOT / "train.py", *sorted(ROOT.glob("scripts/[!_]*.py"))]
    return {file.stem.replace("_", "-"): file for file in files}


def main() -> int:
    """Play `python FILE` as the command line asks for it, which then may end the process. Returns the exit code."""
    known, name = commands(), sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in known:
        del sys.argv[1]
        runpy.run_path(str(known[name]), run_name="__main__")
        return 0
    if name not in ("-h", "--help"):
        print(f"dfer: unknown command {name!r}: choose from {', '.join(known)}", file=sys.stderr)
        return 2
    for command, file in known.items():
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"dfer {command:16}{re.split(': `|[.;:]$', about.splitlines()[0])[0]}")
    print("dfer COMMAND --help: all its options")
    return 0


if __name__ == "__main__":
    sys.exit(main())
