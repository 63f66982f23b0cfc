"""The one exception a user is meant to read, and how it is shown; and a full disk, which no code can foresee."""

import errno
import os
import sys
import traceback

NO_ROOM = ("No space left on device", "unexpected pos")  # as safetensors and torch.save say it


class UserError(ValueError):
    """Something the user can mend: the message names the key, file or row and says what to do.

    Commands print it without a traceback and exit with status 2 (`SAGE_DEBUG=1` shows the traceback).
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception came of a disk without room, which each library words in its own way."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


def report(error: BaseException) -> None:
    """Print what went wrong to stderr: one message, or the traceback under SAGE_DEBUG=1."""
    if os.environ.get("SAGE_DEBUG") == "1":
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
