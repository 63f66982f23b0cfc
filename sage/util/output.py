"""Standard output and standard error that never end a run."""

import errno
import io
import os
import select
import sys

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class Outliving(io.FileIO):
    """A file descriptor whose text is lost where it cannot be written: no error ends the process.

    Its reader may be gone, as after `sage train ... | head`, or its terminal, as after a lost connection.
    Then it writes to nowhere. On a full disk it goes on once there is room.
    """

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            while (written := super().write(data)) is None:  # whoever made the pipe set it to be non-blocking
                select.select([], [self], [])
            return written
        except OSError as e:
            if e.errno not in NO_ROOM:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            return len(data)


def outlive_reader() -> None:
    """Replace sys.stdout and sys.stderr, so that the process goes on when nobody reads them any more.

    Characters that their encoding lacks are written as escapes. Standard streams that are closed are opened:
    otherwise the next file that is opened gets their number, and what is printed. Whoever has replaced the
    streams already, such as a test or a notebook, keeps theirs.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == descriptor  # the lowest free number
            os.set_inheritable(descriptor, True)
    for descriptor, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        encoding, errors, by_line = "utf-8", "strict", False
        if stream is not None:
            stream.flush()
            encoding, errors, by_line = stream.encoding, stream.errors, stream.line_buffering
            descriptor = stream.fileno()
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(Outliving(descriptor, "w", closefd=False)),
                encoding=encoding,
                errors="backslashreplace" if errors == "strict" else errors,
                line_buffering=by_line or name == "stderr",
            ),
        )
