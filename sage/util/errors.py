"""The one exception that users are meant to read, how it is shown, and the system's errors in such words."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence

NO_MEMORY = ("out of memory", "can't allocate memory")  # the words of CUDA and of torch's allocator on CPUs
NO_ROOM = ("No space left on device", "unexpected pos")  # the words of safetensors and of torch.save

NO_HOME = "Could not determine home directory"  # the words of pathlib
NO_THREAD = "can't start new thread"  # the words of Python
# Errors that have a cause outside of the file that they name, if they name one, and what to do about it.
REMEDIES = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit with `ulimit -n`"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another place"),
    errno.EFBIG: "raise the limit with `ulimit -f`, or choose another place",
    errno.EAGAIN: "raise the limit on processes with `ulimit -u`, or that of the container",
}


class UserError(ValueError):
    """Something that the user can fix: the message names the key, file or row and says what to do.

    Commands print it without a traceback and exit with status 2 (`SAGE_DEBUG=1` shows the traceback).
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def describe(error: BaseException) -> str:
    """An unexpected exception in a message: its type and the first line of its text, if it has one."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


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


def refusal(error: BaseException) -> UserError | None:
    """What the user can do about an error of the system: a file that it refuses, or no memory. Else None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        remedy = REMEDIES.get(error.errno, "make it usable, or choose another place")
        return UserError(f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}: {remedy}")
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return UserError(f"{error.strerror}: {REMEDIES[error.errno]}")
    if isinstance(error, RuntimeError) and NO_THREAD in str(error):
        return UserError(f"{NO_THREAD}: {REMEDIES[errno.EAGAIN]}")
    if isinstance(error, RuntimeError) and NO_HOME in str(error):
        return UserError("a path begins with ~, and this user has no home: set HOME, or cache_dir=FOLDER")
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if no_memory or any(words in str(error) for words in NO_MEMORY):
        return UserError(
            f"out of memory: {first_line(error)}. To train or score pairs, lower micro_batch_tokens and "
            "data.max_length, set model.gradient_checkpointing=true, or choose an engine that shards or "
            "offloads. To sample responses, lower generation.batch_size"
        )
    return None


def report(error: BaseException) -> None:
    """Print what went wrong to stderr: one message, or the traceback under SAGE_DEBUG=1."""
    if os.environ.get("SAGE_DEBUG") == "1":
        traceback.print_exception(error)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
