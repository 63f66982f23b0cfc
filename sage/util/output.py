"""Standard output and standard error that outlive their reader."""

import io
import os
import sys


class Outliving(io.FileIO):
    """A file descriptor that writes to nowhere once its reader is gone, as after `sage train ... | head`."""

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlive_reader() -> None:
    """Replace sys.stdout and sys.stderr, so that the process goes on when nobody reads them any more.

    Whoever has replaced them already, such as a test or a notebook, keeps theirs.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        raw = Outliving(stream.fileno(), "w", closefd=False)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering or name == "stderr",
            ),
        )
