"""The error that users see, and the exception that ends a run after a signal."""

import signal
from collections.abc import Iterable
from difflib import get_close_matches

STOPPED = 143  # exit code of a process that stopped on request; a shell reports the same for one that SIGTERM ended
BUSY = 75  # exit code of a process that left its run to another process; EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """An error that the user can fix, shown without a traceback: what is wrong, what is expected, what to type."""


class MissingError(UserError):
    """Runs are missing of what is to be drawn."""


class Stopped(BaseException):
    """A signal stopped the work. number: the signal, which decides how the process ends."""

    def __init__(self, message: str = "", number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


class BusyError(Exception):
    """Another process is doing the run, and this one was asked not to wait for it."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a message: ', did you mean X?' with the word most like `word`, or '.' if none is similar."""
    matches = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else "."


def choose(name: str, value: str, *allowed: str) -> str:
    """`value`, if it is allowed. Raises UserError about the setting `name` otherwise."""
    if value not in allowed:
        *others, last = allowed
        raise UserError(f"{name}={value}: it is {', '.join(others)} or {last}{nearest(str(value), allowed).removesuffix('.')}")
    return value
