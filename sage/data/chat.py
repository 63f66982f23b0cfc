"""The chat format: which template writes a conversation, what a model reads before it answers, and where it must stop.

Training, generation and export all take prompts and end tokens from here, so they cannot disagree.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sage.config import ChatConfig
from sage.util.errors import UserError

PROBE = "sage-probe-5f2e"  # stands for a text in a rendering, to find what the template writes around it
OWN_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # template variables that sage sets
MARK = re.compile(
    r"[<\[][^\s<>\[\]]+[>\]]"
)  # <|im_end|>, </s>, [/INST]: markup that ordinary text does not have

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes one text: `data.chat_template` and `data.template_arguments`.

    Args:
        template: True for the tokenizer's own chat template, False for plain text, else the name of one of its
            named templates or the path of a .jinja file.
        arguments: variables for the template, such as enable_thinking.
    """

    template: bool | str = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, data: ChatConfig) -> ChatFormat:
        return cls(data.chat_template, data.template_arguments)


class Renderer:
    """Writes conversations with the template that a ChatFormat chooses.

    Raises:
        UserError: the tokenizer has no such template, or the template does not use an argument.
    """

    def __init__(self, tokenizer: Any, chat: ChatFormat):
        self.tokenizer = tokenizer
        self.arguments = dict(chat.arguments)
        self.template = None if chat.template is False else choose_template(tokenizer, chat.template)
        text = json.dumps(self.template)
        for name in self.arguments:
            if self.template is None:
                raise UserError("data.template_arguments needs a chat template, and data.chat_template=false")
            if name in OWN_NAMES or not re.search(rf"\b{re.escape(name)}\b", text):
                raise UserError(f"data.template_arguments.{name}: the chat template takes no such argument")

    def render(self, messages: list[Message], tools: list | None = None, *, answering: bool = False) -> str:
        """The conversation as one text; `answering` adds the generation prompt.

        Raises:
            UserError: the template refuses the conversation, in its own words.
        """
        assert self.template is not None
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self.template if isinstance(self.template, str) else None,
                add_generation_prompt=answering,
                tokenize=False,
                **self.arguments,
            )
        except Exception as error:  # a template is a program: whatever it raises, it refuses
            raise UserError(f"the chat template refuses the conversation: {error}") from error

    @cached_property
    def turn(self) -> str:
        """What the template writes between a question and its answer, or "" where that has no markup.

        A thought that the generation prompt opens is left out.
        """
        try:
            text = self.render([{"role": "user", "content": PROBE}], answering=True)
        except UserError:
            return ""
        between = OPENED.sub("", text[text.rfind(PROBE) + len(PROBE) :]).strip()
        return between if MARK.search(between) else ""

    def is_rendered(self, text: str) -> bool:
        """Whether a prompt's text is a whole conversation that this template has written already."""
        return bool(self.turn) and self.turn in text

    def prompt(self, prompt: Prompt, tools: list | None = None) -> str:
        """The text that the model reads before it answers.

        A prompt that the template has already written is not wrapped again. It gets the begin token where it lacks it.
        """
        if self.template is None:
            if not isinstance(prompt, str):
                raise UserError("the prompt is a conversation, which needs data.chat_template=true")
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        content = messages[0]["content"] if len(messages) == 1 else None
        if isinstance(content, str) and self.is_rendered(content):
            begin = self.tokenizer.bos_token
            head = self.render([{"role": "user", "content": PROBE}], answering=True)
            lacks = begin and head.startswith(begin) and not content.startswith(begin)
            return begin + content if lacks else content
        return self.render(messages, tools, answering=True)

    @cached_property
    def tail(self) -> str:
        """What the template writes after an assistant's last turn."""
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        text = self.render(messages)
        return text[text.rfind(PROBE) + len(PROBE) :]

    def closing(self, tail: str) -> tuple[str, int | None]:
        """The tail up to its first end token, and that token's id; the whole tail and None where it has no end token."""
        special = {str(t): i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        special[self.tokenizer.eos_token] = self.tokenizer.eos_token_id
        found = [(tail.find(text), -len(text), text) for text in special if text in tail]
        if not found:
            return tail, None
        at, _, text = min(found)
        return tail[: at + len(text)], special[text]


# The mark that opens or closes a thought: <think>, <thinking>, [THINK], ◁think▷, <seed:think>, ...
NAMES = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
OPEN = re.compile(rf"[<\[◁]{NAMES}[>\]▷]", re.IGNORECASE)
CLOSE = re.compile(rf"[<\[◁]/{NAMES}[>\]▷]", re.IGNORECASE)
OPENED = re.compile(rf"{OPEN.pattern}\s*\Z", re.IGNORECASE)  # a text that ends in an open thought


def choose_template(tokenizer: Any, choice: bool | str) -> str | dict[str, str]:
    """The text of a template; all named ones where there are several and `choice` is True.

    Raises:
        UserError: there is none, or none of that name.
    """
    own = tokenizer.chat_template
    if choice is True:
        if not own:
            raise UserError(
                "the tokenizer has no chat template: set data.chat_template=false, or name a .jinja file"
            )
        if isinstance(own, dict) and "default" not in own:
            raise UserError(
                f"data.chat_template: the tokenizer has several, choose one of {', '.join(sorted(own))}"
            )
        return own
    named = own if isinstance(own, dict) else {}
    if choice in named:
        return named[choice]
    file = Path(str(choice)).expanduser()
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if named:
        there = f"its templates are {', '.join(sorted(named))}"
    else:
        there = "it has no named templates"
    raise UserError(f"data.chat_template={choice}: no template of the tokenizer ({there}) and no file")


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], chat: ChatFormat) -> list[list[int]]:
    """Ids of each prompt as the model reads it before it answers, the same in training and generation.

    Args:
        prompts: texts, or messages as the template takes them.

    Raises:
        UserError: tokenizer and chat format do not suit each other, or the template refuses a prompt.
    """
    renderer = Renderer(tokenizer, chat)
    return encode_heads(tokenizer, [renderer.prompt(prompt) for prompt in prompts], renderer.template is None)


def encode_heads(tokenizer: Any, texts: Sequence[str], plain: bool) -> list[list[int]]:
    """Ids of rendered prompts. A plain one gets the tokenizer's begin tokens, unless its text has them already."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    begin = begin_ids(tokenizer) if plain else []
    return [row if row[: len(begin)] == begin else [*begin, *row] for row in ids]


def begin_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a plain text (often a begin token, often none)."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]


def training_end(tokenizer: Any, chat: ChatFormat) -> int:
    """The token that ends a response in training: the one by which the template closes the turn, else eos."""
    renderer = Renderer(tokenizer, chat)
    if renderer.template is None:
        return tokenizer.eos_token_id
    try:
        _, end = renderer.closing(renderer.tail)
    except UserError:  # a template that wants more than a question and an answer
        end = None
    return tokenizer.eos_token_id if end is None else end


def response_ends(tokenizer: Any, chat: ChatFormat) -> set[int]:
    """Tokens at which generation stops: the one that ends responses in training, eos, and the model's own.

    The model's own are those of generation_config.json in the folder that the tokenizer came from.
    """
    ends = {training_end(tokenizer, chat), tokenizer.eos_token_id}
    folder = str(getattr(tokenizer, "name_or_path", "") or "")
    file = Path(folder, "generation_config.json")
    if os.path.isdir(folder) and file.is_file():
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") or []
        ends.update([more] if isinstance(more, int) else more)
    return ends - {None}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Names what token ids mean: two tokenizers with the same token for every id have the same fingerprint."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:32]
