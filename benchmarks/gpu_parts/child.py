"""The child's side: do some cases, one after another, and write each row as it comes.

After a case that fails the child ends, as it cannot know what the failure has left behind: an illegal access breaks all
that a process does on the card from then on. The parent starts another one for the rest.
"""

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu_parts import rows
from benchmarks.gpu_parts.plan import all_cases
from benchmarks.gpu_parts.runner import Case
from benchmarks.gpu_parts.setting import NotHere, Setting, setting_of
from benchmarks.quiet import Usage


def do_cases(names: Sequence[str], known: Mapping[str, Case], setting: Setting) -> int:
    """Do the cases of these names; the exit code."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of a process on a card takes many GB and a minute
    die_first()
    results = setting.out / "results.jsonl"
    for name in names:
        case = known[name]
        about = {"part": case.part, "case": case.name}
        rows.append(results, {"event": "begin", **about})
        start = Usage.now()
        try:
            if case.cores is not None:  # before any library makes threads: they inherit it, as under taskset
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case.cores])
            work = getattr(importlib.import_module(case.module), case.function)
            for row in work(setting, **case.options):
                rows.append(results, {"event": "figure", **about, **row})
        except NotHere as reason:
            rows.append(results, {"event": "left out", **about, "reason": str(reason)})
        except BaseException as error:  # beartype, CUDA, SystemExit: whatever it is, it is this case's
            traceback.print_exc()
            rows.append(results, {"event": "failed", **about, "reason": in_one_line(error)})
            return 1
        else:
            used = Usage.now().since(start)
            told = {"seconds": used["seconds"], "cores_used": used["cpu_s"] / used["seconds"]}
            rows.append(results, {"event": "end", **about, **told, "foreign_cores": used["foreign_cores"]})
        gc.collect()  # a model that waits for it would count in the next case's memory
    return 0


def die_first() -> None:
    """Have the system end this process, not its parent, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def in_one_line(error: BaseException) -> str:
    """Name an error and the last two places that it came through."""
    places = traceback.extract_tb(error.__traceback__)[-2:]
    where = ", ".join(f"{Path(place.filename).name}:{place.lineno}" for place in places)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", choices=("card", "cpu", "toy"), required=True)
    parser.add_argument("--cases", type=json.loads, required=True, help="names, as JSON")
    args = parser.parse_args(arguments)
    known = {case.name: case for case in all_cases()}
    return do_cases(args.cases, known, setting_of(args.size, args.data, args.out))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no library's last works: all is written, and a crash at the end would look like one of a case
