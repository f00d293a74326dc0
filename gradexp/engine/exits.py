"""How commands end on errors that the user can fix: a one-line message and a nonzero exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gradexp.base.errors import STOPPED, Stopped, UserError

FIXES = {
    errno.ENOSPC: "the disk is full; make room and type the command again, it goes on from the last checkpoint",
    errno.EDQUOT: "the disk quota is used up; make room and type the command again, it goes on from the last checkpoint",
    errno.EROFS: "the file system is read-only; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.EACCES: "writing is not permitted; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
    errno.ENOTDIR: "a file is where a folder should be; name another folder: paths.results=FOLDER paths.outputs=FOLDER",
}

# trainer.strict=true needs it; CUDA reads it when it starts, so it is set before torch is imported.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Ends the process with a one-line message instead of a traceback after an error that the user can fix."""
    try:
        yield
    except UserError as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # as after `make table-2.1 | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in FIXES:
            raise
        sys.exit(f"error: {error.filename2 or error.filename or 'a file'} can't be written: {FIXES[error.errno]}")
    except Stopped as error:
        print(error, flush=True)
        sys.exit(STOPPED)
