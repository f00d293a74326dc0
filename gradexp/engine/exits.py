"""How commands end on errors that the user can fix and on signals: a one-line message and a nonzero exit code."""

from __future__ import annotations

import atexit
import ctypes
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from gradexp.base.errors import BUSY, STOPPED, BusyError, Stopped, UserError

FIXES = {
    errno.ENOSPC: "the disk is full; make room and type the command again, it goes on from the last checkpoint",
    errno.EDQUOT: "the disk quota is used up; make room and type the command again, it goes on from the last checkpoint",
    errno.EROFS: "the file system is read-only; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.EFBIG: "a file may not be that large here (ulimit -f, or the file system); name another folder: paths.outputs=FOLDER",
    errno.ESTALE: "the network file system lost the file; the same command goes on from the last checkpoint",
    errno.EPERM: "writing is not permitted; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.EACCES: "writing is not permitted; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.EISDIR: "a folder is where a file should be; delete it",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk failed; the same command goes on from the last checkpoint, when it works again or elsewhere",
    errno.ENOTDIR: "a file is where a folder should be; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
}

MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)  # in torch's RuntimeErrors
NO_MEMORY = (
    "the memory is used up; do fewer runs at a time (WORKERS=1), or keep fewer of a teacher's targets (trainer.store_gib=1); "
    "a smaller batch or network is another run. The same command goes on from the last checkpoint"
)
PRINTED = "the message is printed"
INTERRUPTED = "interrupted; the same command goes on from what is finished"

# trainer.strict=true needs it; CUDA reads it when it starts, so it is set before torch is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or MEMORY.search(str(error)) is not None


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Ends the process with a one-line message instead of a traceback after an error that the user can fix."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")
    except BusyError as error:
        print(error, flush=True)
        sys.exit(BUSY)
    except BrokenPipeError:  # as after `make table-2.1 | head`
        _discard_output()
        sys.exit(1)
    except OSError as error:
        if (fix := fix_of(error)) is None:
            raise
        _discard_output()
        sys.exit(f"error: {fix}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {NO_MEMORY}")
    except Stopped as error:
        print(error, flush=True)
        if error.number == signal.SIGINT:
            raise KeyboardInterrupt(PRINTED) from None
        sys.exit(STOPPED)


def fix_of(error: OSError) -> str | None:
    """What could not be written, and what to do; None for another error."""
    if error.errno not in FIXES:
        return None
    return f"{error.filename2 or error.filename or 'the output'} can't be written: {FIXES[error.errno]}"


def _discard_output() -> None:
    """Discards what standard output does not take; Python would try to write it again at the exit, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def keeping_handlers(numbers: Iterable[int]) -> Iterator[dict[int, Any]]:
    """Afterwards these signals have the handlers that they had before, which are yielded; none outside the main thread."""
    here = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers if here}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Makes Linux kill this process when the one that started it ends; it would wait for that one, and hold its GPU."""
    kill_at_death = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    with suppress(AttributeError, OSError):  # another system
        ctypes.CDLL(None).prctl(kill_at_death, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before
        os._exit(1)


def die_of_interrupt(error: BaseException | None = None) -> NoReturn:
    """Ends the process by SIGINT at once, without cleaning up; prints a line for the error, unless it has one already."""
    if error is not None and error.args != (PRINTED,):
        print(INTERRUPTED, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(128 + signal.SIGINT)  # on systems where a process can't signal itself


def _print_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints one line for Ctrl-C, and ends the process by SIGINT as shells and `make` expect (exit code 130)."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    atexit._run_exitfuncs()  # Python itself ends by SIGINT after these, unless one of them resets its note of the interrupt
    die_of_interrupt(error)


for name, number in (("stdout", 1), ("stderr", 2)):
    if getattr(sys, name) is None:  # closed: the next file that is opened would get its number, and what libraries print
        setattr(sys, name, os.fdopen(os.dup2(os.open(os.devnull, os.O_WRONLY), number), "w"))
    elif hasattr(getattr(sys, name), "reconfigure"):  # takes any text, also where the terminal is not UTF-8
        getattr(sys, name).reconfigure(errors="backslashreplace")
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _print_exception
