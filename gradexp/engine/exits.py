"""How commands end on errors that the user can fix and on signals: a one-line message and a nonzero exit code."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from gradexp.base.errors import STOPPED, Stopped, UserError

FIXES = {
    errno.ENOSPC: "the disk is full; make room and type the command again, it goes on from the last checkpoint",
    errno.EDQUOT: "the disk quota is used up; make room and type the command again, it goes on from the last checkpoint",
    errno.EROFS: "the file system is read-only; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.EACCES: "writing is not permitted; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.ENOTDIR: "a file is where a folder should be; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
}

PRINTED = "the message is printed"
INTERRUPTED = "interrupted; the same command goes on from what is finished"

# trainer.strict=true needs it; CUDA reads it when it starts, so it is set before torch is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Output:
    """Standard output that may stop taking text, as when a disk is full or after `| head`: the work goes on without it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # takes what is buffered, at the latest at the exit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Ends the process with a one-line message instead of a traceback after an error that the user can fix.

    Also where standard output could not be written; the work is done then.
    """
    if isinstance(sys.stdout, Output):  # inside another one
        with _one_line():
            yield
        return
    output = sys.stdout = Output(sys.stdout)
    try:
        with _one_line():
            yield
            output.flush()
            if isinstance(output.error, BrokenPipeError):  # as after `make table-2.1 | head`
                sys.exit(1)
            if output.error:
                sys.exit(f"error: standard output can't be written ({output.error.strerror}); what was asked for is done")
    finally:
        sys.stdout = output.stream


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in FIXES:
            raise
        sys.exit(f"error: {error.filename2 or error.filename or 'a file'} can't be written: {FIXES[error.errno]}")
    except Stopped as error:
        print(error, flush=True)
        if error.number == signal.SIGINT:
            raise KeyboardInterrupt(PRINTED) from None
        sys.exit(STOPPED)


def die_of_interrupt() -> NoReturn:
    """Ends the process by SIGINT at once, without cleaning up, as Python itself does after a KeyboardInterrupt."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit(128 + signal.SIGINT)  # on systems where a process can't signal itself


_interrupted = False


@atexit.register  # the first to be registered, so the last to be called
def _end() -> None:
    if _interrupted:
        die_of_interrupt()


def _print_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints one line for Ctrl-C, and ends the process by SIGINT as shells and `make` expect (exit code 130).

    Python itself does so too, unless something that runs at the exit resets its note of the interrupt.
    """
    if issubclass(kind, KeyboardInterrupt):
        global _interrupted
        _interrupted = True
        if error.args != (PRINTED,):
            print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _open_streams() -> None:
    """Makes standard output and error take any text: where they are closed, and where the terminal is not UTF-8."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)  # or the next file that is opened gets this number, and what libraries print
            setattr(sys, name, os.fdopen(number, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


_open_streams()
if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _print_exception
