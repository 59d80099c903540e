"""Work in a forked child: a process that may crash or be looked at, without loading anything again."""

import os
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object], crash_at: str = "") -> int:
    """Do `work` in a child of this process and give its exit code: 0, 1 where it raised, 137 where it crashed as asked."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ["SHARDMILL_CRASH_AT"] = crash_at
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
