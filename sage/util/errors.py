"""The one exception that users are meant to read, and how it is shown; also a full disk."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

NO_ROOM = ("No space left on device", "unexpected pos")  # the words of safetensors and of torch.save


class UserError(ValueError):
    """Something that the user can fix: the message names the key, file or row and says what to do.

    Commands print it without a traceback and exit with status 2 (`SAGE_DEBUG=1` shows the traceback).
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named(names: Sequence[str], shown: int = 5) -> str:
    """The first few of many names, for a message."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk caused this exception. Each library words that in its own way."""
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
