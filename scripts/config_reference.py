"""Write the reference of all config keys and options: python scripts/config_reference.py docs/config.md."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from sage.config import SCHEMAS, LoraConfig, ModelConfig, TrainConfig

CONF = Path(__file__).resolve().parent.parent / "conf"
HEAD = """\
# Config reference

`make docs` writes this page from `sage/config/` and `conf/`. Do not edit it by hand.

Set a key with `key=value`, choose a group's option with `group=option`, and add one with `+group=option`.
Keys that are not listed here are refused, and the error names the nearest key that is.

## Keys

`???` must be given. An option or an experiment may set other values than these defaults. An experiment's own
keys win over an option: where `loss=NAME` or `model=NAME` would not have its values, sage refuses it and says
which key to add.
"""
TABLE = "| key | type | default | meaning |\n|---|---|---|---|\n"
GROUPS = """
## Options of each group

`(default)` marks the option that `sage train` uses if you name none. The last column lists what an option
sets; all other keys of the group keep their defaults.
"""


def main(target: Path) -> None:
    target.write_text(reference())


def reference() -> str:
    further = "".join(further_keys(word) for word in SCHEMAS)
    return HEAD + "".join(keys(TrainConfig)) + further + GROUPS + "".join(options())


def keys(root: type) -> Iterator[str]:
    """One table for the top level and one for each nested dataclass."""
    queue: list[tuple[str, type]] = [("", root)]
    for prefix, cls in queue:
        yield f"\n### {prefix.rstrip('.') or 'top level'}\n\n{TABLE}"
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            nested = [
                t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)
            ]
            queue += [(f"{prefix}{f.name}.", t) for t in nested]  # pyright: ignore
            if f.metadata:
                yield row(f, hints[f.name], prefix)


def further_keys(word: str) -> str:
    """What a command's schema adds to that of `sage train`."""
    hints = typing.get_type_hints(SCHEMAS[word])
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    rows = []
    for f in dataclasses.fields(SCHEMAS[word]):
        if f.name not in known and dataclasses.is_dataclass(group := hints[f.name]):
            nested = typing.get_type_hints(group)
            rows += [row(g, nested[g.name], f"{f.name}.") for g in dataclasses.fields(group)]
        elif f.name not in known:
            rows.append(row(f, hints[f.name]))
    return f"\n### only in `sage {word}`\n\n{TABLE}{''.join(rows)}" if rows else ""


def row(f: dataclasses.Field, hint: typing.Any, prefix: str = "") -> str:
    meaning = cell(f.metadata["help"] + limits(f.metadata))
    return f"| `{prefix}{f.name}` | {type_name(hint)} | `{default(f)}` | {meaning} |\n"


def type_name(hint: typing.Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(t) for t in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a group"
    return str(hint).replace("typing.", "") if typing.get_args(hint) else hint.__name__


def default(f: dataclasses.Field) -> str:
    factory = f.default_factory
    value = f.default if factory is dataclasses.MISSING else factory()
    return MISSING if value == MISSING else flow(value)


def flow(value: typing.Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("\n", "\\n")


def limits(metadata: typing.Mapping[str, typing.Any]) -> str:
    if metadata["choices"]:
        return f" ({', '.join(map(flow, metadata['choices']))})"
    bounds = {"low": "at least", "above": "greater than", "high": "at most", "below": "less than"}
    said = [f"{words} {metadata[name]}" for name, words in bounds.items() if metadata[name] is not None]
    return f" ({' and '.join(said)})" if said else ""


def options() -> Iterator[str]:
    files = (OmegaConf.load(CONF / name) for name in ("groups.yaml", "train.yaml"))
    defaults = [entry for file in files for entry in file["defaults"]]  # pyright: ignore
    taken = {(k, v) for entry in defaults if not isinstance(entry, str) for k, v in entry.items()}
    groups = sorted({file.parent for file in CONF.rglob("*.yaml")} - {CONF})
    for folder in groups:
        group = folder.relative_to(CONF).as_posix()
        sign = "" if any(group == k for k, _ in taken) else "+"
        yield f"\n### {sign}{group}=\n\n| option | | sets |\n|---|---|---|\n"
        for file in sorted(folder.glob("*.yaml")):
            star = " (default)" if (group, file.stem) in taken else ""
            yield f"| `{file.stem}`{star} | {cell(description(file))} | {cell(settings(file, group))} |\n"


def description(file: Path) -> str:
    """The comment that opens the file."""
    lines: list[str] = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def settings(file: Path, group: str) -> str:
    """What the file writes into the config, and the options it builds upon."""
    content: typing.Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    chosen = []
    for entry in content.pop("defaults", []):
        pairs = [(None, entry)] if isinstance(entry, str) else list(entry.items())
        chosen += [re.sub(r"^(override )?/", "", f"{k}={v}") if k else f"all of {v}" for k, v in pairs]
    prefix = "" if group == "experiment" else group.replace("/", ".") + "."
    default = [] if group == "experiment" else list(leaves(schema_defaults(group), prefix))
    chosen += [leaf for leaf in leaves(content, prefix) if leaf not in default]
    return ", ".join(f"`{text}`" if "=" in text else text for text in chosen) or "the defaults"


def schema_defaults(group: str) -> dict:
    """The defaults of a group in the schema of `sage train`; empty if an option's class has them."""
    root = TrainConfig(model=ModelConfig(lora=LoraConfig())) if group == "model/lora" else TrainConfig()
    found = OmegaConf.select(OmegaConf.structured(root), group.replace("/", "."))
    return typing.cast(dict, OmegaConf.to_container(found)) if found else {}


def leaves(node: dict, prefix: str) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={flow(value)}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
