"""All figures and all failures of a card, by one command: `python benchmarks/gpu.py [--parts a,b] [--budget SECONDS]`

Made for whoever has a card for minutes and nobody to watch it. This process never touches the card. What matters most
comes first. Children do a case or a series of them: a crash, a hang or an illegal access costs its own case, and what
follows in the series begins another child. Each number is written to OUT/results.jsonl as it comes, the table to
OUT/table.md after each child and at the end, also when the budget or a signal is the end; OUT/logs/ has what the
children said. Without a GPU the cases for the CPU run.

docs/speed.md has the definitions. The exit code is 1 if a case failed or a check came out wrong.

  --parts a,b   data, ceilings, loaders, step, training, checks; data is made in any case. Only if they are named:
                peers; grid, all options on all batches; warm, alone, fills Triton's cache and needs no data
  --cases a,b   only these, by name or pattern ('busy *'), of all parts; added to what OUT has of an earlier call
  --peers       also what others decode on the card
  --list        the cases in their order; + before those that share the child of the one above
"""

import argparse
import fnmatch
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts import rows
from benchmarks.gpu_parts.plan import ASKED, PARTS, all_cases
from benchmarks.gpu_parts.runner import ALL_CORES, Case, child_command, run_all
from dfer.cli import Parser, in_range

BUDGET_S = {True: 600.0, False: 180.0}  # with a card, without


def chosen(parts: Sequence[str], peers: bool, gpu: bool, cores: int, patterns: Sequence[str] = ()) -> list[Case]:
    """The cases of these parts, or of these patterns, that can run here, and the data, which all but `warm` need."""
    wanted = {*parts, *["peers"] * peers}
    cases = [case for case in all_cases() if (named(case.name, patterns) if patterns else case.part in wanted)]
    if {case.part for case in cases} != {"warm"}:
        cases = [case for case in all_cases() if case in cases or case.part == "data"]
    cases = [case for case in cases if gpu or not case.gpu]
    # On fewer cores than a case asks for it would only repeat another.
    return [case for case in cases if case.cores is None or case.cores == ALL_CORES or case.cores < cores]


def named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def show(cases: Sequence[Case], gpu: bool) -> None:
    """Print a line for each case."""
    for before, case in zip([None, *cases], cases, strict=False):
        goes_on = before is not None and case.child is not None and case.child == before.child
        left_out = "  (on a GPU)" if case.gpu and not gpu else ""
        print(f"{case.part:10}{'+' if goes_on else ' '} {case.name}{left_out}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    about = {**rows.machine(), "command": " ".join(["python", "benchmarks/gpu.py", *(arguments or sys.argv[1:])])}
    gpu = about["card"] is not None
    if args.list:
        print(f"# {rows.headline(about)}")
        show(chosen(args.parts, args.peers, True, about["cores"], args.cases), gpu)
        return 0
    cases = chosen(args.parts, args.peers, gpu, about["cores"], args.cases)
    if not args.cases:
        for name in ("results.jsonl", "eager_losses.json"):  # of an earlier run
            (args.out / name).unlink(missing_ok=True)
        shutil.rmtree(args.out / "logs", ignore_errors=True)
    words = ["--out", str(args.out.resolve()), "--data", str(args.data.resolve()), "--size", "card" if gpu else "cpu"]
    exit_on_signals()
    began, (_, place) = time.monotonic(), rows.read(args.out / "results.jsonl")
    try:
        run_all(cases, args.out, args.budget or BUDGET_S[gpu], child_command(words), about)
    finally:
        print(rows.write_table(args.out), end="")
        print(f"{time.monotonic() - began:.0f} s; all of it is in {args.out}")
    found, _ = rows.read(args.out / "results.jsonl", place)
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

    def patterns(text: str) -> list[str]:
        names = [case.name for case in all_cases()]
        for pattern in (given := text.split(",")):
            if not any(named(name, [pattern]) for name in names):
                raise argparse.ArgumentTypeError(f"no case {pattern!r}; --list prints them")
        return given

    known = [part for part in PARTS if part not in ASKED]
    parser.add_argument("--parts", type=parts, default=known, help="only these, with commas between")
    parser.add_argument("--cases", type=patterns, default=[], help="only these, by name or pattern")
    parser.add_argument("--budget", type=in_range(float, 1, 10**6), help="seconds (600; 180 without a GPU)")
    parser.add_argument("--peers", action="store_true", help="also what others decode on the card")
    parser.add_argument("--out", type=Path, default=Path("data/gpu-results"), help="folder (data/gpu-results)")
    parser.add_argument("--data", type=Path, default=Path("data/gpu"), help="where the clips are drawn (data/gpu)")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
