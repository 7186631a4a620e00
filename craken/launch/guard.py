"""Runs a rank's script and files its last exception with the launcher, so that the first cause is shown and shown once.

Started by path (`python guard.py script.py args` or `python guard.py -m module args`), never imported: it must
not load craken, torch or anything else before the user's first line, which may still set variables that torch reads.
The script runs as `__main__` with its own `sys.argv` and `sys.path[0]`, and its frames alone appear in the traceback.

    rank raises -> excepthook -> FOLDER/<rank>.json {pid, attempt, time_s, type, message, traceback}
                -> launcher prints the first
"""

import faulthandler
import io
import json
import os
import runpy
import signal
import sys
import time
import traceback
import types

ERROR_FOLDER = "CRAKEN_ERROR_FOLDER"
_PR_SET_PDEATHSIG = 1


def file_exception(kind: type[BaseException], error: BaseException, frames: types.TracebackType | None) -> None:
    """Write the exception to the launcher's error folder; print it as Python would when nobody is there to read it."""
    folder = os.environ.get(ERROR_FOLDER, "")
    if os.getpid() != _own_pid or os.getppid() != _launcher_pid or not os.path.isdir(folder):
        sys.__excepthook__(kind, error, frames)
        return
    record = {
        "pid": _own_pid,
        "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "time_s": time.monotonic(),
        "type": kind.__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(kind, error, _user_frames(frames))),
    }
    path = os.path.join(folder, f"{os.environ.get('RANK', '0')}.json")
    with open(path + ".part", "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(record, file)
    os.replace(path + ".part", path)


def run(arguments: list[str]) -> None:
    """Run `script args...` or `-m module args...` as `__main__`."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    path = arguments[0]
    sys.argv = arguments
    if os.path.isdir(path) or path.endswith((".zip", ".pyz")):
        del sys.path[0]
        runpy.run_path(path, run_name="__main__")
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __cached__=None)
    sys.modules["__craken_guard__"] = sys.modules["__main__"]  # keeps this module's globals alive for the hook
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, main.__dict__)


def _user_frames(frames: types.TracebackType | None) -> types.TracebackType | None:
    """Drop the frames of this file and of runpy that lie above the user's first one."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    return frames


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, killed or not; Linux only."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


if __name__ == "__main__":
    _own_pid, _launcher_pid = os.getpid(), os.getppid()
    die_with_parent()
    faulthandler.enable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True, write_through=False
        )  # not -u, which writes word by word and so mixes ranks' lines
    sys.excepthook = file_exception
    run(sys.argv[1:])
