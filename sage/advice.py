"""What to write instead of a command line that Hydra refuses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sage import config
from sage.config import nearest
from sage.config.keys import key_of


def explain(error: BaseException, word: str, arguments: Sequence[str]) -> str:
    """What to write instead of overrides that Hydra refuses, or Hydra's own message in one line."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(map(str, causes))
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before not in WITH_VALUE and (advice := unreadable(argument)):
            return advice
    for pattern, advise in ADVICE.items():
        if match := re.search(pattern, text, re.DOTALL):
            typed = [a for a in reversed(arguments) if key_of(a) == match[1]] or [f"{match[1]}=..."]
            named = next((a for a in typed if a.lstrip("+") in text), typed[0])
            return advise(named, match[1], text)
    if match := re.search(r"[Kk]ey '([^']+)' (?:is not in struct|not in)|Could not override '([^']+)'", text):
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else match[1] or match[2]
        if key.startswith("hydra."):
            return unknown_to_hydra(key, word)
        known = config.known_keys(config.SCHEMAS[word])
        if f"{key.rpartition('.')[0]}.NAME" in known:
            return f"{key} does not exist yet, so it is added: write +{key}=..."
        return str(config.refusal(key, known, word))
    lines = [line.strip() for line in text.splitlines() if line.strip() and "_type" not in line]
    if match := re.match(r"Error merging override (.*)", text):
        null = f"; write {key_of(match[1])}=null" if match[1].endswith("=None") else ""
        return f"{match[1]}: {lines[1]}{null}"
    return "; ".join(dict.fromkeys(lines))


def unknown_to_hydra(key: str, word: str) -> str:
    return f"unknown key {key!r} of Hydra; `sage {word} --cfg hydra` prints Hydra's config"


def no_option(argument: str, missing: str, text: str) -> str:
    group, _, option = missing.rpartition("/")
    listed = text.split("Available options in", 1)[-1].split("Config search path")[0]
    options = [line.strip() for line in listed.splitlines()[1:] if line.strip()]
    return f"no {group or 'option'} {option!r}{nearest(option, options)}; there are: {', '.join(options)}"


def without_plus(argument: str, key: str, text: str) -> str:
    if not argument.startswith("+"):
        return (
            f"{key} is chosen more than once: keep one, or write `override /{key}: OPTION` in the experiment"
        )
    return f"{argument}: {key} is set already: write {argument.lstrip('+')}, without the +"


# Hydra's options whose next word is their value, and so no override.
WITH_VALUE = {"--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"}
WITH_VALUE |= {"--package", "-p", "--info", "-i"}
# What Hydra raises as a bare AssertionError and ValueError.
NULL_GROUP = "Unexpected type for root: (NoneType)"
NOT_AN_OPTION = r"Config group override must be a string or a list\. Got (\w+)"
BARE = f"{NULL_GROUP}|{NOT_AN_OPTION}"
# Hydra's messages, with the key in the first group -> advice for the argument that set it.
ADVICE: dict[str, Callable[[str, str, str], str]] = {
    r"Could not find '([^']+)'": no_option,
    r"Could not override '([^']+)'\. ?\s*No match in the defaults list": lambda argument, key, _: (
        f"{argument}: {key} is a config group without a default, so its option is added: write +{argument}"
    ),
    r"(\S+) appears more than once in the final defaults list": without_plus,
    r"Multiple values for (\S+)\. To override": without_plus,
    r"An item is already at '([^']+)'": without_plus,
    r"Ambiguous value for argument '([^'=]+)=": lambda argument, key, _: (
        f"{argument}: a comma separates the values of a sweep, which needs -m. As one text, write "
        f"{quoted(argument)}; "
        + ("several files are data.sources" if key == "data.path" else f"as a list, {key}=[...]")
    ),
    NULL_GROUP: lambda *_: (
        "a key of a group that is null cannot be set; choose an option of the group first: "
        "+model/lora=default"
    ),
    r"Error merging override \+?(data\.sources\.[^=]+)=.*SourceConfig": lambda argument, key, _: (
        f"{argument}: sources are added all at once: write '+data.sources={{NAME: {{path: FILE}}, ...}}' in "
        "quotes"
    ),
    NOT_AN_OPTION: lambda *_: (
        "a config group takes the name of one of its options, such as loss=dpo, not a number"
    ),
}


def unreadable(argument: str) -> str | None:
    """How to write an argument that Hydra's grammar does not read; None if it reads it."""
    if argument.startswith("-"):
        return None
    if not key_of(argument):
        return f"{argument!r} is not of the form key=value; `sage COMMAND --help` lists all keys"
    try:
        OverridesParser.create().parse_override(argument)
        return None
    except HydraException:
        if "=" not in argument:
            return f"{argument!r} is not of the form key=value; `sage COMMAND --help` lists all keys"
        if form := quoted(argument):
            return f"{argument}: a value with special characters needs quotes: write {form}"
        return f"{argument!r} cannot be read; write key='value' in quotes"


def quoted(argument: str) -> str | None:
    """The argument as a shell and Hydra both read it as one text, or None if there is no such form."""
    key, _, value = argument.partition("=")
    value = value.strip("\"'")
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + (m[2] and '\\"'), value)
    form = f'{key}="{escaped}"'
    try:
        read = OverridesParser.create().parse_override(form).value()
    except HydraException:
        return None
    return shlex.quote(form) if read == value else None
