"""Run any command under one name, which `pip install` puts on the path: `dfer train dfew` is `python train.py dfew`.

`dfer evaluate ...` is `python scripts/evaluate.py ...`, and so on, with hyphens for underscores. Several processes:
`torchrun --nproc_per_node=4 -m dfer train dfew`. `dfer --version` says which version this is.
"""

import ast
import re
import runpy
import sys
from pathlib import Path

from dfer import __version__
from dfer.cli import APP, EXIT_USAGE, begin


def commands() -> dict[str, Path]:
    """Return the files that can be started, train.py and each of the scripts, by the names of their commands."""
    files = [APP / "train.py", *sorted(APP.glob("scripts/[!_]*.py"))]
    return {file.stem.replace("_", "-"): file for file in files}


def main() -> int:
    """Run the command that the command line names, as `python FILE` would, and return an exit code."""
    begin("dfer")
    known, name = commands(), sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in known:
        del sys.argv[1]
        # As for `python FILE`, first on the path: it comes before whatever else is called train or scripts. Processes
        # that are spawned get this path too.
        sys.path.insert(0, str(APP))
        runpy.run_path(str(known[name]), run_name="__main__")
        return 0
    if name == "--version":
        print(f"dfer {__version__}")
        return 0
    if name not in ("-h", "--help"):
        print(f"dfer: unknown command {name!r}: choose from {', '.join(known)}", file=sys.stderr)
        return EXIT_USAGE
    for command, file in known.items():
        summary = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        print(f"dfer {command:16}{re.split(': `|[.;:]$', summary.splitlines()[0])[0]}")
    print("dfer COMMAND --help: all its options; dfer --version")
    return 0


if __name__ == "__main__":
    sys.exit(main())
