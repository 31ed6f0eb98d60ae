"""Write a page about each run: `python scripts/report.py RUN [RUN ...]` writes RUN/report.html, which opens offline.

Of several runs, each page compares its own with the others, clip by clip. The pages show faces of the data: they stay
on this machine, and --clips 0 leaves the faces out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfer.cli import begin

if __name__ == "__main__":
    begin("report", "torch, DALI and timm")
from dali_pipes.build import build_loader
from dfer.cli import Parser, UserError, in_range, one_line_errors
from dfer.report import read_run
from dfer.report.page import write_report
from dfer.state import load_trained


def run(args: argparse.Namespace) -> None:
    runs = [read_run(path) for path in args.runs]
    if args.figures and len({run.name for run in runs}) < len(runs):
        raise UserError("--figures: two of the runs have the same name; draw them one by one, into other folders")
    for run in runs:
        others = [other for other in runs if other is not run]
        folder = args.figures / run.name if args.figures else None
        print(write_report(run, build_loader, load_trained, others, args.clips, folder))


def main(arguments: list[str]) -> int:
    parser = Parser("report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, logs/NAME")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="also write DIR/NAME/*.svg and *.png")
    parser.add_argument(
        "--clips", type=in_range(int, 0, 12), default=4, help="right clips and as many wrong ones (4); 0 = no faces"
    )
    args = parser.parse_args(arguments)
    return one_line_errors("report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
