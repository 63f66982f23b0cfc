"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: the message names the key, file or row and says what to do.

    Commands print it without a traceback and exit with status 2 (`SAGE_DEBUG=1` shows the traceback).
    """
