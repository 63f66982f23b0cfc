"""Checks of config values: ranges, choices, and the options of classes named by `_target_`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from inspect import signature
from typing import TYPE_CHECKING, Any

from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.config.data import DataConfig, ProblemsConfig
from sage.config.keys import groups, suggestion
from sage.util.errors import UserError

if TYPE_CHECKING:
    from sage.config.command import CommandConfig
    from sage.config.schema import TrainConfig

# Group -> the class that its `_target_` must extend. By name, so that `sage --help` does not import torch.
BASES = {
    "loss": "sage.losses.Loss",
    "scorer": "sage.scorers.Scorer",
    "curriculum": "sage.curriculum.Curriculum",
    "generation": "sage.answering.generation.Backend",
    "hooks": "sage.training.hooks.Hook",
}


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yield (dotted key, its field, its value) for every leaf of a config dataclass."""
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        nested = value if isinstance(value, dict) else {}
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        elif nested and all(dataclasses.is_dataclass(item) for item in nested.values()):
            for name, item in nested.items():
                yield from walk(item, f"{prefix}{f.name}.{name}.")
        else:
            yield f"{prefix}{f.name}", f, value


def check(cfg: CommandConfig) -> None:
    """Raise UserError for values out of range and for combinations that cannot run."""
    for name, f, value in walk(cfg):
        check_value(name, f.metadata, value)
    cfg.check()


def check_value(name: str, metadata: Mapping[str, Any], value: Any) -> None:
    """Check one value, and each item of a list, against the metadata of its field (`groups.key`)."""
    if isinstance(value, (list, tuple)):
        if (length := metadata.get("length")) and len(value) != length:
            raise UserError(f"{name}={list(value)}: must have {length} values")
        for item in value:
            check_value(name, {**metadata, "length": None}, item)
        return
    if value == "None":
        raise UserError(f"{name}=None: None is a text here; write {name}=null")
    if metadata.get("choices") and value not in metadata["choices"]:
        raise UserError(f"{name}={value}: must be one of {', '.join(map(shown, metadata['choices']))}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{name}={value}: must be a finite number")
    for bound, words, allowed in (
        ("low", "at least", lambda limit: value >= limit),
        ("above", "greater than", lambda limit: value > limit),
        ("high", "at most", lambda limit: value <= limit),
        ("below", "less than", lambda limit: value < limit),
    ):
        if (limit := metadata.get(bound)) is not None and not allowed(limit):
            raise UserError(f"{name}={value}: must be {words} {limit}")


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def class_of(key: str, node: Mapping[str, Any], group: str | None = None) -> Any:
    """The class that a `_target_` group names (by default the group `key`), which must be one of its kind.

    Raises:
        UserError: it is not.
    """
    group = group or key
    if "_target_" not in node:
        option = group if key == group else f"+{group}@{key}"
        choose = f"choose one with {option}=NAME, or " if group in groups() else ""
        raise UserError(f"{key}: {choose}give {key}._target_")
    target = node["_target_"]
    try:
        cls = get_class(target)
    except Exception as e:
        raise UserError(f"{key}._target_={target} cannot be imported: {e}") from e
    if not issubclass(cls, get_class(BASES[group])):
        raise UserError(f"{key}._target_={target}: must be a subclass of {BASES[group]}")
    return cls


def build(key: str, node: Mapping[str, Any], group: str | None = None, **arguments: Any) -> Any:
    """An object of the class that a `_target_` group names, and of nothing else that the config may hold.

    Raises:
        UserError: the class is not one of the group's, or refuses the values that it was given.
    """
    cls = class_of(key, node, group)
    try:
        return cls(**{name: value for name, value in node.items() if name != "_target_"}, **arguments)
    except (TypeError, ValueError) as e:
        raise UserError(f"{key}: {e}") from e


def options_of(cls: Any) -> dict[str, dataclasses.Field]:
    """The options of a class that a config may name: the fields of its dataclass."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}


def is_option(group: str, node: Mapping[str, Any], exactly: bool) -> bool:
    """Whether a group holds one of sage's own options, unchanged if `exactly`.

    It is right then, as the tests show. To look at its class would import torch, which takes seconds.
    """
    folder = files("sage.conf") / group
    texts = [(folder / f"{option}.yaml").read_text() for option in groups().get(group, ())]
    alike = [text for text in texts if f"_target_: {node.get('_target_')}\n" in text]
    return any(not exactly or OmegaConf.to_container(OmegaConf.create(text)) == node for text in alike)


def check_target(key: str, node: dict[str, Any], group: str | None = None, used: bool = True) -> None:
    """Check the options of a `_target_` group (by default the one that `key` names) before a model is loaded.

    The class must belong to its group, so that a run folder from elsewhere cannot name another program. Its
    options are the fields of a dataclass. A class that needs only its options is built once, which runs its
    own checks. If the group is not `used`, only its class counts.

    Raises:
        UserError: the class is not one of the group's, or an option is unknown, of the wrong type or out of
            range.
    """
    if is_option(group or key, node, exactly=used):
        return
    cls, target = class_of(key, node, group), node["_target_"]
    options = options_of(cls)
    given = {name: value for name, value in node.items() if name != "_target_"}
    for name in given:
        if name not in options:
            near = suggestion(f"{key}.{name}", [f"{key}.{option}" for option in options])
            raise UserError(f"unknown config key '{key}.{name}'{near}: {target} has no such dataclass field")
    if not options:
        return
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), given)
        values: Any = {name: OmegaConf.to_container(typed)[name] for name in given}  # pyright: ignore
    except OmegaConfBaseException as e:
        raise UserError(f"{key}: {str(e).splitlines()[0]} (key {key}.{e.full_key})") from e
    for name, value in values.items():
        check_value(f"{key}.{name}", options[name].metadata, value)
    if signature(cls).parameters.keys() - options.keys():
        return  # it needs more, as a curriculum needs the pairs
    try:
        cls(**values)
    except (TypeError, ValueError) as e:
        raise UserError(str(e) if str(e).startswith(f"{key}.") else f"{key}: {e}") from e


def check_benchmarks(benchmarks: dict[str, ProblemsConfig]) -> None:
    for name, problems in benchmarks.items():
        if problems.path is None:
            raise UserError(
                f"benchmark.{name}.path is not set: give its problems with benchmark.{name}.path=FILE"
            )
        if problems.columns.samples is not None:
            raise UserError(
                f"benchmark.{name}.columns.samples: all problems of a benchmark get as many responses"
            )
        check_prompt(f"benchmark.{name}", problems)


def check_sources(data: DataConfig) -> None:
    if data.path is not None and data.sources:
        raise UserError(f"data.path={data.path} and data.sources are both set: add data.path=null")
    for name in data.sources:
        if not re.fullmatch(r"\w[\w.-]*", name):  # also a file's name, so not ".."
            raise UserError(
                f"data.sources: the name {name!r} begins the ids of its pairs, so it may hold only letters, "
                "digits and the signs _ - . and not begin with one of the last two"
            )
    if data.sources:
        for name in data.unread():
            remedy = {"split": "data.split=train", "limit": "data.limit=null"}.get(name, "data=pairs")
            raise UserError(
                f"data.{name} is set, by the experiment or an option of data, and data.sources does not read "
                f"it: give data.sources.NAME.{name} instead, and add {remedy}"
            )
    without = [name for name, source in data.sources.items() if source.weight is None]
    if 0 < len(without) < len(data.sources):
        raise UserError(
            f"data.sources.{without[0]}.weight is not set, and other sources have weights: give all of them "
            "a weight, or none"
        )


def check_patience(patience: int | None, select: str | None, eval_every: int) -> None:
    if patience is None:
        return
    if select is None:
        raise UserError(
            f"patience={patience} needs a metric to watch: give select=eval/policy_accuracies "
            "or select=benchmark/NAME/accuracy"
        )
    if not eval_every:
        raise UserError(f"patience={patience} counts evaluations: give eval_every=N, the steps between them")


def check_prompt(name: str, problems: ProblemsConfig) -> None:
    if "{problem}" not in problems.prompt:
        raise UserError(f"{name}.prompt must hold {{problem}}, the place of the problem's text")


def check_building(cfg: TrainConfig) -> None:
    """Check what builds pairs from problems."""
    if cfg.data.problems.path is None:
        raise UserError(
            "data.problems is not set: choose data=gsm8k, or give your own problems with "
            "data.problems.path=FILE"
        )
    check_prompt("data.problems", cfg.data.problems)
    own = cfg.pairing.chosen == "own" and not cfg.pairing.rejected_from
    if own and cfg.sampling.temperature == 0:
        raise UserError(
            "sampling.temperature=0: all responses to a problem are the same, so no right one is beside a "
            "wrong one: set sampling.temperature=1"
        )
