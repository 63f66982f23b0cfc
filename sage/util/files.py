"""Files that appear whole or not at all, even if the process or the machine dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to disk, and rename it.

    Several processes may write the same file at once: each has its own temporary file, and the last one wins.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    write(temporary)
    fsync(temporary)
    os.replace(temporary, file)
    fsync(file.parent)


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(file: Path, content: dict[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
