"""How a job ends: what a user can mend is one line and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.errors import PipelineError
from pipeline.redaction import redacted

INTERRUPTED = 130  # the shell's code for a process that Ctrl-C ended


def exit_code(work: Callable[[], object], again: str = "run the same command again") -> int:
    """Do a job's work and return its exit code.

    Args:
        work: the job, its arguments read.
        again: what to do after an interruption.
    """
    try:
        work()
    except PipelineError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"interrupted; {again}", file=sys.stderr)
        return INTERRUPTED
    return 0
