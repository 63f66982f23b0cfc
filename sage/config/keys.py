"""Which config keys there are. Refuses unknown keys, with the nearest known one, and those without effect."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from sage.util.errors import UserError

ESCAPE = re.compile(r"\\[nt](?![a-z])")  # and not \nu or \text


@cache
def groups() -> dict[str, list[str]]:
    """Each config group of sage, such as `loss` or `model/lora`, and its options."""
    root = Path(str(files("sage.conf")))
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        if file.parent != root:
            found.setdefault(file.parent.relative_to(root).as_posix(), []).append(file.stem)
    return found


def schema_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys and groups of a config dataclass; NAME stands for a key that the user
    chooses.
    """
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name, hint = f"{prefix}{f.name}", hints[f.name]
        yield name
        if typing.get_origin(hint) is dict:
            name, hint = f"{name}.NAME", typing.get_args(hint)[1]
            if f.name not in groups():
                yield name
        for nested in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(nested):
                yield from schema_keys(nested, f"{name}.")  # pyright: ignore


@cache
def known_keys(schema: type) -> list[str]:
    """All keys of a command: those of its schema, and those of the options with a `_target_`."""
    known = dict.fromkeys(schema_keys(schema))
    for group, options in groups().items():
        for option in options if group in known else ():
            content: Any = OmegaConf.to_container(
                OmegaConf.load(str(files("sage.conf") / group / f"{option}.yaml"))
            )
            if "_target_" in content:
                known |= dict.fromkeys(f"{group}.{name}" for name in content)
    return list(known)


def unknown_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of what a composed config holds beside the fields of its dataclasses.

    Hydra lets `+key=value` add any key to a dataclass, and OmegaConf then drops it without a word.
    """
    cls = OmegaConf.get_type(node)
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else node.keys()
    for name in map(str, node):
        if name not in known:
            yield f"{prefix}{name}"
            continue
        unread = OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)
        if not unread and isinstance(child := node[name], DictConfig):
            yield from unknown_keys(child, f"{prefix}{name}.")


def refusal(key: str, known: Iterable[str], command: str) -> UserError:
    """The error for an unknown key: it names the nearest known key."""
    known, group = list(known), key.rpartition(".")[0]
    if key in known:
        return UserError(f"{key} is a key of another option of {group} than the one that is chosen")
    return UserError(
        f"unknown config key {key!r}{suggestion(key, known)}; `sage {command} --help` lists all keys"
    )


def suggestion(key: str, known: Iterable[str]) -> str:
    """The known key that was most likely meant; where none is near, the keys of the same group."""
    parts = key.split(".")
    names = []
    for name in (
        name for name in known if not name.endswith(".NAME")
    ):  # benchmark.NAME.limit -> benchmark.gsm8k.limit
        mine = name.split(".")
        if len(mine) == len(parts):
            mine = [given if part == "NAME" else part for part, given in zip(mine, parts, strict=True)]
        names.append(".".join(mine))
    group, _, last = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    if close := difflib.get_close_matches(last, siblings, n=1, cutoff=0.7):
        return f" (did you mean {siblings[close[0]]!r}?)"
    if group and siblings:
        return f" ({group} has {', '.join(siblings)})"
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(names)}  # the first of equal ends counts
    for candidates, word in ((elsewhere, last), ({name: name for name in names}, key)):
        if close := difflib.get_close_matches(word, candidates, n=1, cutoff=0.7):
            return f" (did you mean {candidates[close[0]]!r}?)"
    return ""


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def key_of(override: str) -> str:
    return re.split("[=@]", override.lstrip("+~"))[0]


def because(reason: str, *keys: str) -> dict[str, str]:
    """Keys without effect, each with the reason."""
    return dict.fromkeys(keys, reason)


def refuse_ignored(ignored: dict[str, str], typed: Iterable[str], command: str) -> None:
    """Refuse an override from the command line that has no effect on this command.

    Only what the user typed counts: an experiment may set keys for several commands.

    Raises:
        UserError: names the key and says why it has no effect.
    """
    for override in typed:
        key = key_of(override).replace("/", ".")
        for prefix, reason in ignored.items():
            if f"{key}.".startswith(f"{prefix}."):
                raise UserError(
                    f"{override}: {key} has no effect on `sage {command}`, {reason}: leave it out"
                )


LITERALS = (int, float, list)  # what Hydra makes of true, 007, 1e3 and [true]


def refuse_altered(cfg: Any, typed: Iterable[str]) -> None:
    """Refuse an unquoted override of a text that Hydra reads as a number or as true or false, and a line
    break that it does not read.

    `model.revision=12e4567` would become inf, and `name=007` would become 7. `sampling.stop=["\\n"]` would be
    a backslash and an n.

    Raises:
        UserError: says how to write the text.
    """
    for override in typed:
        key, _, text = override.lstrip("+").partition("=")
        value: Any = OverridesParser.create().parse_override(override).value()
        if key.rpartition(".")[2] in ("prompt", "stop") and (escape := ESCAPE.search(text)):
            raise UserError(
                f"{override}: {escape[0]} is read as a backslash and a letter. Write a real line break or "
                f"tab, in bash with $'{key}=\"...{escape[0]}...\"', or set {key} in a YAML file of yours"
            )
        read = OmegaConf.select(OmegaConf.structured(cfg), key) if isinstance(value, LITERALS) else None
        if isinstance(read, str) and str(value) != text.strip():
            raise UserError(f"{override} is read as {value}; to set this text, write '{key}=\"{text}\"'")
        if isinstance(read, ListConfig) and isinstance(value, list):
            items = zip(value, read, strict=False)
            altered = [
                item for item, leaf in items if isinstance(leaf, str) and isinstance(item, (bool, float))
            ]
            if altered:
                raise UserError(
                    f"{override}: {altered[0]} is no text here; write each text of the list in quotes, as in "
                    f"'{key}=[\"true\"]'"
                )


def refuse_overruled(cfg: Any, typed: Iterable[str], own: Iterable[Path] = ()) -> None:
    """Refuse an option from the command line whose values an experiment replaces.

    Hydra lets an experiment's own keys win, so `+experiment=tulu3_dpo model=qwen2.5-0.5b` would train Tulu 3.
    The option that lists all keys of its group chooses none of them, so its defaults may be replaced. `own`
    are the user's folders of options.

    Raises:
        UserError: names the first such key, and how to have the option's value.
    """
    split = (override.lstrip("+").partition("=") for override in typed)
    chosen = {key: value for key, _, value in split}
    whole, defaults = OmegaConf.structured(cfg), OmegaConf.structured(type(cfg))
    for group, option in chosen.items():
        places = (Path(root, group, f"{option}.yaml") for root in (str(files("sage.conf")), *own))
        file = next((file for file in places if file.is_file()), None)
        if file is None or "@package _global_" in file.read_text(encoding="utf-8"):
            continue
        package = group.replace("/", ".")
        content = dict(flatten(OmegaConf.to_container(OmegaConf.load(file)), f"{package}."))
        listed = {key.removeprefix(f"{package}.").partition(".")[0] for key in content}
        lists_all = {*(OmegaConf.select(defaults, package) or {})} <= listed
        for key, wanted in content.items():
            given = any(f"{key}.".startswith(f"{name}.") for name in chosen if name != group)
            open_ = isinstance(wanted, str) and ("${" in wanted or wanted == "???")
            found, usual = (OmegaConf.select(node, key) for node in (whole, defaults))
            if not (given or open_ or wanted == found or (lists_all and wanted == usual)):
                wanted = "null" if wanted is None else wanted
                raise UserError(
                    f"{group}={option} sets {key}={wanted}, and the experiment sets {key}={found}, which "
                    f"wins: add {key}={wanted} to have it, or leave the experiment out"
                )


def refuse_hidden(own: Iterable[Path]) -> None:
    """Refuse an option in the user's folders that has the name of one of ours, which Hydra would take."""
    for root in own:
        for group, options in groups().items():
            if found := next((f for o in options if (f := root / group / f"{o}.yaml").is_file()), None):
                raise UserError(f"{found}: sage has an option of this name, and would take it: rename yours")


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; a list is a leaf."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), node
