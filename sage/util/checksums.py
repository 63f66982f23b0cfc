"""Checksums of what a run goes on from, so that damage is noticed before anything is read from it.

`seal` and `damaged` are for whole folders: ranks share the work, and every rank calls them. `seal_file` and
`intact` are for single files. `claim` keeps together what was made from the same inputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage.util import ranks
from sage.util.errors import UserError
from sage.util.files import checksum, write_json, write_text
from sage.util.progress import console

CHECKSUMS_FILE = "checksums.json"


def seal(folder: Path, without: Sequence[str] = ()) -> None:
    """Write the checksums of all files in a folder that is complete, in place of any that are there.

    Folders in it with one of the names `without` are left out.
    """

    def unsealed() -> list[str]:
        files = (file for file in folder.rglob("*") if file.is_file())
        names = (file.relative_to(folder) for file in files)
        return sorted(str(n) for n in names if str(n) != CHECKSUMS_FILE and not {*without} & {*n.parts})

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


def seal_file(file: Path) -> None:
    """Write the checksum of a file that is complete to another file beside it."""
    write_text(_beside(file), checksum(file))


def intact(file: Path) -> bool:
    """Whether `seal_file` has seen this file, and it is what it was. One line says if it is damaged."""
    if not file.exists() or not _beside(file).exists():
        return False
    if _digest(file) != _beside(file).read_text(encoding="utf-8", errors="replace"):
        console.print(f"{file} is damaged, so it is made again", markup=False)
        return False
    return True


def digest(value: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def claim(file: Path, inputs: dict[str, Any]) -> None:
    """Write what the results in a folder depend on, or refuse if the folder was begun with something else.

    Raises:
        UserError: naming the first part that differs.
    """
    if not file.exists():
        write_json(file, inputs)
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
        differing = [part for part, value in inputs.items() if begun.get(part) != value]
    except (ValueError, AttributeError) as e:
        raise UserError(
            f"{file} is damaged, so sage cannot tell what its folder was begun with: choose another "
            "hydra.run.dir"
        ) from e
    if differing:
        part = differing[0]
        raise UserError(
            f"{file.parent} was begun with another {part}: {begun.get(part)}, and now it is {inputs[part]}. "
            "Their results must not be mixed: restore the old one, or choose another hydra.run.dir"
        )


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.xxh3")


def _digests(folder: Path, files: list[str]) -> dict[str, str]:
    """The checksums of this rank's share of the files; empty for one that cannot be read."""
    return {name: _digest(folder / name) for name in files[ranks.rank() :: ranks.world_size()]}


def _digest(file: Path) -> str:
    try:
        return checksum(file)
    except OSError:
        return ""


def _read(folder: Path) -> dict[str, str] | None:
    try:
        sealed = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in sealed.items()} or None
    except (OSError, ValueError, AttributeError):
        return None
