"""The error that users see, and the exception that ends a run after a signal."""

from collections.abc import Iterable
from difflib import get_close_matches

STOPPED = 143  # exit code of a process that was asked to stop and did, as a shell reports one that SIGTERM ended


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, what was expected and what to type; it is shown without
    a traceback."""


class Stopped(BaseException):
    """A signal asked the training to stop, and its checkpoint is written."""


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence: ', did you mean X?' with the word most like `word`, or '.' when none is near."""
    matches = get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else "."


def choose(name: str, value: str, *allowed: str) -> str:
    """`value`, if it is allowed; otherwise a UserError about the setting `name`."""
    if value not in allowed:
        *others, last = allowed
        raise UserError(f"{name}={value}: it is {', '.join(others)} or {last}{nearest(str(value), allowed).removesuffix('.')}")
    return value
