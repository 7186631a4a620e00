"""Ends the process with exit code 1 where a thread's failure was still nobody's when the program ended.

A thread cannot raise in the main one, and Python's exit code is the main one's alone. So the program ends, and then the
failure is shown as an uncaught exception is: by `sys.excepthook`, which under a launcher files it there.
"""

from __future__ import annotations

import atexit
import os
import sys

from craken.log import logger

_unheard: list[BaseException] = []


def hold(error: BaseException) -> None:
    """Let the process fail with `error` at its end, unless it is dropped before; for any thread."""
    if not _unheard:
        atexit.register(_fail)  # the last to come is the first to run
    _unheard.append(error)


def drop(error: BaseException) -> None:
    """Forget `error`, if it is held: somebody has been told."""
    if error in _unheard:
        _unheard.remove(error)
    if not _unheard:
        atexit.unregister(_fail)


def _fail() -> None:
    error = _unheard[0]
    if hasattr(sys, "last_value"):  # it ends with another uncaught exception, and so with 1
        logger.error(str(error))
        return
    sys.excepthook(type(error), error, error.__traceback__)
    atexit.unregister(_fail)
    atexit._run_exitfuncs()  # all others, as `_exit` runs none
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
