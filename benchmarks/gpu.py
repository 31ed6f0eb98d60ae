"""All figures and all failures of a card, by one command: `python benchmarks/gpu.py [--parts a,b] [--budget SECONDS]`

Made for whoever has a card for minutes and nobody to watch it. This process never touches the card. What has run on
such a card before shares a child; a new kernel, a decoder, a cache runs in one of its own, after the proven figures: a
crash, a hang or an illegal access costs its own case. Each number is written to OUT/results.jsonl as it comes, the
table to OUT/table.md after each child and at the end, also when the budget or a signal is the end; OUT/logs/ has what
the children said. Without a GPU the cases for the CPU run.

docs/speed.md has the definitions. The exit code is 1 if a case failed or a check came out wrong.

  --parts a,b   data, ceilings, loaders, step, training, checks; data is made in any case
  --peers       also what others decode on the card
  --list        the cases, in their order
"""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts import rows
from benchmarks.gpu_parts.plan import PARTS, all_cases
from benchmarks.gpu_parts.runner import ALL_CORES, Case, child_command, run_all
from dfer.cli import Parser, in_range

BUDGET_S = {True: 600.0, False: 180.0}  # with a card, without


def chosen(parts: Sequence[str], peers: bool, gpu: bool, cores: int) -> list[Case]:
    """The cases of these parts that can run here; the data is needed by all of them."""
    wanted = {"data", *parts, *["peers"] * peers}
    cases = [case for case in all_cases() if case.part in wanted and (gpu or not case.gpu)]
    # On fewer cores than a case asks for it would only repeat another.
    return [case for case in cases if case.cores is None or case.cores == ALL_CORES or case.cores < cores]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    about = {**rows.machine(), "command": " ".join(["python", "benchmarks/gpu.py", *(arguments or sys.argv[1:])])}
    gpu = about["card"] is not None
    cases = chosen(args.parts, args.peers, gpu, about["cores"])
    if args.list:
        print(f"# {rows.headline(about)}")
        for case in cases:
            print(f"{case.part:10}{'shared' if case.proven and not case.cores else 'alone':8}{case.name}")
        return 0
    for name in ("results.jsonl", "eager_losses.json"):  # of an earlier run
        (args.out / name).unlink(missing_ok=True)
    shutil.rmtree(args.out / "logs", ignore_errors=True)
    words = ["--out", str(args.out.resolve()), "--data", str(args.data.resolve()), "--size", "card" if gpu else "cpu"]
    exit_on_signals()
    began = time.monotonic()
    try:
        run_all(cases, args.out, args.budget or BUDGET_S[gpu], child_command(words), about)
    finally:
        print(rows.write_table(args.out), end="")
        print(f"{time.monotonic() - began:.0f} s; all of it is in {args.out}")
    found, _ = rows.read(args.out / "results.jsonl")
    return int(any(row.get("event") == "failed" or row.get("right") is False for row in found))


def exit_on_signals() -> None:
    """Have SIGTERM (of `timeout`) and SIGHUP (of a terminal that is gone) end this as an error, with the table."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: sys.exit(128 + got))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("gpu.py", __doc__)

    def parts(text: str) -> list[str]:
        for name in (names := text.split(",")):
            if name not in PARTS:
                raise argparse.ArgumentTypeError(f"no part {name!r}; there are {', '.join(PARTS)}")
        return names

    known = [part for part in PARTS if part != "peers"]
    parser.add_argument("--parts", type=parts, default=known, help="only these, with commas between")
    parser.add_argument("--budget", type=in_range(float, 1, 10**6), help="seconds (600; 180 without a GPU)")
    parser.add_argument("--peers", action="store_true", help="also what others decode on the card")
    parser.add_argument("--out", type=Path, default=Path("data/gpu-results"), help="folder (data/gpu-results)")
    parser.add_argument("--data", type=Path, default=Path("data/gpu"), help="where the clips are drawn (data/gpu)")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
