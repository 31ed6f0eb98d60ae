"""Several processes of one test, each a fork of this one."""

import os
import sys
import traceback
from collections.abc import Callable


def in_forks(count: int, work: Callable[[int], None]) -> int:
    """Do `work` of each rank in a process of its own; return the largest exit code. Who fails says why."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
