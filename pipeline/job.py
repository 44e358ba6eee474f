"""How a job ends: what a user can mend is one line and an exit code, never a traceback.

0    done
2    a mistake that the user can mend, told in one line (3: a promotion was refused by its gates)
75   stopped before the end, by SIGTERM or for want of nodes; nothing is lost: the same command goes on
130  Ctrl-C; the same command goes on
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline import logs
from pipeline.errors import PipelineError, StoppedError
from pipeline.redaction import redacted
from pipeline.termination import on_sigterm

INTERRUPTED = 130  # the shell's code for a process that Ctrl-C ended


def exit_code(work: Callable[[], object], again: str = "run the same command again") -> int:
    """Do a job's work and return its exit code.

    Args:
        work: the job, its arguments read.
        again: what to do after an interruption.
    """
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # as Ctrl-C: everything that must be closed is

    try:
        logs.configure()
        with on_sigterm(terminate):
            work()
    except StoppedError as stopped:
        logs.complain(f"stopped: {stopped}; {again}")
        return stopped.exit_code
    except Exception as error:
        if terminated:  # a library that is interrupted where it does not expect it may raise anything
            logs.complain(f"terminated; {again}")
            return StoppedError.exit_code
        if not isinstance(error, PipelineError):
            raise
        logs.complain(f"error: {redacted(str(error))}")
        return error.exit_code
    except KeyboardInterrupt:
        logs.complain(f"{'terminated' if terminated else 'interrupted'}; {again}")
        return StoppedError.exit_code if terminated else INTERRUPTED
    return 0
