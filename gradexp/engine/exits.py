"""How every command ends on an error: a one-line message with a fix, and a nonzero exit code."""

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

# Read when CUDA starts, so it is there before torch is imported; trainer.strict=true needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def honest() -> Iterator[None]:
    """Ends the process with a one-line message instead of a traceback for errors that the user can fix."""
    try:
        yield
    except UserError as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # of `make table-2.1 | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in FIXES:
            raise
        sys.exit(f"error: {error.filename2 or error.filename or 'a file'} can't be written: {FIXES[error.errno]}")
    except Stopped as error:
        print(error, flush=True)
        sys.exit(STOPPED)
