"""Checks of config values: ranges, choices, and the options of classes named by `_target_`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.config.groups import ProblemsConfig

if TYPE_CHECKING:
    from sage.config.schema import RunConfig
from sage.util.errors import UserError


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (dotted key, its field, its value) for every leaf of a config dataclass."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f, value


def check(cfg: RunConfig) -> None:
    """Raise UserError for values out of range and for combinations that cannot run."""
    for name, f, value in walk(cfg):
        m = f.metadata
        if m.get("choices") and value not in m["choices"]:
            raise UserError(f"{name}={value}: must be one of {', '.join(map(str, m['choices']))}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if m.get("low") is not None and value < m["low"]:
                raise UserError(f"{name}={value}: must be at least {m['low']}")
            if m.get("high") is not None and value > m["high"]:
                raise UserError(f"{name}={value}: must be at most {m['high']}")
    cfg.check()


def check_target(group: str, node: dict[str, Any]) -> None:
    """Check a `_target_` group against the dataclass it names, so that typos fail before a model is loaded."""
    if "_target_" not in node:
        raise UserError(f"{group}: choose one with {group}=NAME, or give {group}._target_")
    try:
        cls = get_class(node["_target_"])
    except Exception as e:
        raise UserError(f"{group}._target_={node['_target_']} cannot be imported: {e}") from e
    if not dataclasses.is_dataclass(cls):
        return
    given = {k: v for k, v in node.items() if not k.startswith("_")}
    try:
        schema = OmegaConf.structured(cls)
        OmegaConf.merge(schema, given)
    except OmegaConfBaseException as e:
        raise UserError(f"{group}: {str(e).splitlines()[0]} (key {group}.{e.full_key})") from e


def check_benchmarks(benchmarks: dict[str, ProblemsConfig]) -> None:
    for name, problems in benchmarks.items():
        check_prompt(f"benchmark.{name}", problems)


def check_prompt(name: str, problems: ProblemsConfig) -> None:
    if "{problem}" not in problems.prompt:
        raise UserError(f"{name}.prompt must hold {{problem}}, the place of the problem's text")
