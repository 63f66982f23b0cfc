"""Chat templates: the ones that `data.chat_template` and `data.template_arguments` choose, and what an export
carries of them.

A tokenizer has one template, or several with names. Of those, transformers takes "tool_use" for conversations
with tools, where there is one, else "default". Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage.config import ChatConfig
from sage.util.errors import UserError

OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # template variables that sage sets
DEFAULTS = ("default", "tool_use")  # names of templates that are used without being asked for
ORIGINAL = "original"  # the name of a model's own template after training on plain text


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes one text: `data.chat_template` and `data.template_arguments`.

    Args:
        template: True for the tokenizer's own chat template, False for plain text, else the name of one of
            the tokenizer's templates or the path of a .jinja file.
        arguments: variables for the template, such as enable_thinking.
    """

    template: bool | str = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: ChatConfig) -> ChatFormat:
        return cls(data.chat_template, data.template_arguments)


def choose_templates(tokenizer: Any, chat: ChatFormat) -> dict[str, str]:
    """Name -> template for "default" and, where the tokenizer has one and no other is chosen, "tool_use".
    Empty for plain text.

    The arguments are part of the templates: see `with_arguments`.

    Raises:
        UserError: there is no such template, or it does not use one of the arguments.
    """
    if chat.template is False:
        if chat.arguments:
            raise UserError("data.template_arguments needs a chat template, but data.chat_template=false")
        return {}
    chosen = _own(tokenizer) if chat.template is True else {"default": _other(tokenizer, str(chat.template))}
    written = "".join(chosen.values())
    for name in chat.arguments:
        if name in OWN_NAMES or not name.isidentifier() or not re.search(rf"\b{name}\b", written):
            raise UserError(f"data.template_arguments.{name}: the chat template has no such argument")
    return {name: with_arguments(template, chat.arguments) for name, template in chosen.items()}


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A template that takes these values where it is called without them.

    So the template of an export writes what was trained, whoever applies it. transformers removes the line
    break after a tag, and nothing else of the template.
    """
    head = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_literal(name, value)} %}}\n"
        for name, value in arguments.items()
    )
    return head + template


def exported_templates(tokenizer: Any, chat: ChatFormat) -> str | dict[str, str] | None:
    """The chat template of a tokenizer that goes with a trained model: its default is the one trained with.

    The tokenizer's named templates keep their names. After training on plain text there is no default, and
    whoever wants a template has to name it.
    """
    own = tokenizer.chat_template
    named = dict(own) if isinstance(own, dict) else {"default": own} if own else {}
    if chat.template is False:
        if "default" in named:
            named[ORIGINAL] = named.pop("default")
        return named or None
    trained = choose_templates(tokenizer, chat)
    named["default"] = trained["default"]
    if "tool_use" in named:
        named["tool_use"] = trained.get("tool_use", trained["default"])
    if chat.template in named:
        named[str(chat.template)] = trained["default"]
    return named if len(named) > 1 else named["default"]


def _own(tokenizer: Any) -> dict[str, str]:
    own = tokenizer.chat_template
    if not own:
        raise UserError(
            "the tokenizer has no chat template: set data.chat_template=false, or give a .jinja file"
        )
    if not isinstance(own, dict):
        return {"default": own}
    if "default" not in own:
        why = "a model trained on plain text, with data.chat_template=false, is saved like this; " * (
            ORIGINAL in own
        )
        raise UserError(
            f"the tokenizer has chat templates but no default; {why}set data.chat_template to false or to "
            f"one of {', '.join(sorted(own))}"
        )
    return {name: own[name] for name in DEFAULTS if name in own}


def _other(tokenizer: Any, choice: str) -> str:
    """The template of that name, or in that file."""
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if choice in named:
        return named[choice]
    file = Path(choice).expanduser()
    if not file.is_file():
        has = f"its templates are {', '.join(sorted(named))}" if named else "it has no named templates"
        raise UserError(
            f"data.chat_template={choice}: no such file, and no such template of the tokenizer ({has})"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={choice}: cannot be read as text: {error}") from error


def _literal(name: str, value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, Mapping):
        pairs = (f"{_literal(name, str(key))}: {_literal(name, part)}" for key, part in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(name, part) for part in value)}]"
    if value is None:
        return "none"
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"data.template_arguments.{name}: a template takes no value such as {value!r}")
    return json.dumps(value, ensure_ascii=False)
