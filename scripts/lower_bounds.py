"""Print pip constraints that hold every dependency of pyproject.toml at its lower bound, for `make lowest`.

python scripts/lower_bounds.py pyproject.toml torch > constraints.txt      # all but torch
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def project(pyproject: Path) -> dict[str, Any]:
    return tomllib.loads(pyproject.read_text())["project"]


def requirements(project: dict[str, Any], *extras: str) -> list[Requirement]:
    """The dependencies of the project and of these extras, without those that only name other extras."""
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [found for found in map(Requirement, lines) if found.name != project["name"]]


def bound(requirement: Requirement, operator: str) -> str | None:
    """The version after `>=` or `<`, or None."""
    return next((s.version for s in requirement.specifier if s.operator == operator), None)


if __name__ == "__main__":
    whole = project(Path(sys.argv[1]))
    for requirement in requirements(whole, *whole["optional-dependencies"]):
        if requirement.name not in sys.argv[2:] and (lowest := bound(requirement, ">=")):
            print(f"{requirement.name}=={lowest}")
