"""A checksum for every file of a folder, so that damage is noticed before anything is read from it.

Ranks share the work, and every rank calls these functions.
"""

from __future__ import annotations

import json
from pathlib import Path

from sage.util import ranks
from sage.util.files import crc32, write_json

CHECKSUMS_FILE = "checksums.json"


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder that is complete, in place of any that are there."""

    def unsealed() -> list[str]:
        names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        return sorted(name for name in names if name != CHECKSUMS_FILE)

    files = ranks.main_only(unsealed)
    found = {name: digest for part in ranks.gather(_digests(folder, files)) for name, digest in part.items()}
    if ranks.rank() == 0:
        write_json(folder / CHECKSUMS_FILE, dict(sorted(found.items())))


def damaged(folder: Path) -> list[str]:
    """Files of a sealed folder that are missing or are not what they were."""
    sealed = ranks.main_only(lambda: _read(folder))
    if sealed is None:
        return [CHECKSUMS_FILE]
    found = {
        name: digest
        for part in ranks.gather(_digests(folder, sorted(sealed)))
        for name, digest in part.items()
    }
    return [name for name, digest in sorted(sealed.items()) if found[name] != digest]


def _digests(folder: Path, files: list[str]) -> dict[str, str]:
    """The checksums of this rank's share of the files; empty for one that cannot be read."""
    return {name: _digest(folder / name) for name in files[ranks.rank() :: ranks.world_size()]}


def _digest(file: Path) -> str:
    try:
        return crc32(file)
    except OSError:
        return ""


def _read(folder: Path) -> dict[str, str] | None:
    try:
        sealed = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in sealed.items()} or None
    except (OSError, ValueError, AttributeError):
        return None
