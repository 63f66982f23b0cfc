"""The one exception a user is meant to read, and how it is shown."""

import os
import sys
import traceback


class UserError(ValueError):
    """Something the user can mend: the message names the key, file or row and says what to do.

    Commands print it without a traceback and exit with status 2 (`SAGE_DEBUG=1` shows the traceback).
    """


def report(error: BaseException) -> None:
    """Print what went wrong to stderr: one message, or the traceback under SAGE_DEBUG=1."""
    if os.environ.get("SAGE_DEBUG") == "1":
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
