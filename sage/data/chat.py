"""The chat format: the template that writes a conversation, the text before an answer, and what ends one.

Training, generation and export take prompts and end tokens from here, so they cannot disagree.
Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template

from sage.data.fields import Message, check_prompt
from sage.data.templates import ChatFormat, choose_templates
from sage.data.thoughts import OPENED
from sage.util.errors import UserError
from sage.util.limits import TooLong, cpu_limit, memory_limit

PROBE = "sage-probe-5f2e"  # stands for a text in a rendering, to find what the template writes around it
LIMIT = 5.0  # seconds of CPU time for one conversation; a usual template takes less than a millisecond
MEMORY = 1 << 30  # bytes for one conversation, besides what the process has
HEADS = 4096  # rendered prompts to keep
MARK = re.compile(r"[<\[][^\s<>\[\]]+[>\]]")  # <|im_end|>, </s>, [/INST]: ordinary text has nothing like it

Prompt = str | list[Message]


class Renderer:
    """Writes conversations with the template that a ChatFormat chooses.

    Raises:
        UserError: the tokenizer has no such template, or the template does not use one of the arguments.
    """

    def __init__(self, tokenizer: Any, chat: ChatFormat):
        self.tokenizer = tokenizer
        self.heads: dict[str, str] = {}  # rendered prompts, which many pairs share
        self.templates = choose_templates(tokenizer, chat)
        self.excess = ""  # the message about a template that took too much time or memory

    @property
    def plain(self) -> bool:
        """Whether there is no template: prompts and responses are plain texts."""
        return not self.templates

    @cached_property
    def simple(self) -> bool:
        """Whether the tokenizer applies templates as transformers does, and not in a way of its own."""
        own = getattr(type(self.tokenizer), "apply_chat_template", None)
        return own is transformers.PreTrainedTokenizerBase.apply_chat_template

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        return dict(self.tokenizer.special_tokens_map)

    def render(
        self, messages: Sequence[Message], tools: list | None = None, *, answering: bool = False
    ) -> str:
        """The conversation as one text; `answering` adds the generation prompt.

        Raises:
            UserError: the template refuses the conversation, in its own words.
        """
        if self.excess:
            raise UserError(self.excess)
        try:
            with cpu_limit(LIMIT), memory_limit(MEMORY):
                return self._render(messages, tools, answering)
        except (TooLong, MemoryError) as error:  # remembered, so that a run does not wait for every pair
            what = f"does not end: {error}" if isinstance(error, TooLong) else "takes over 1 GB of memory"
            self.excess = f"the chat template {what} on one conversation"
            raise UserError(self.excess) from error
        except Exception as error:  # a template is a program: whatever it raises, it refuses
            raise UserError(f"the chat template refuses the conversation: {error}") from error

    def _render(self, messages: Sequence[Message], tools: list | None, answering: bool) -> str:
        default = self.templates["default"]
        if self.simple and not tools and all(map(is_plain, messages)):
            # `apply_chat_template` ends with this call. What it does before takes as long again, and
            # leaves such messages as they are.
            return _compile_jinja_template(default).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=answering,
                **self.special_tokens,
            )
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=self.templates.get("tool_use", default) if tools else default,
            add_generation_prompt=answering,
            tokenize=False,
        )

    def prompt(self, prompt: Prompt, tools: list | None = None) -> str:
        """The text that the model reads before it answers.

        A prompt that the template has written already is not wrapped again. It gets the begin token where it
        lacks it.
        """
        if self.plain:
            if not isinstance(prompt, str):
                raise UserError("the prompt is a conversation: set data.chat_template=true")
            return prompt
        if not self.is_rendered(prompt):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            key = json.dumps([messages, tools])
            if key not in self.heads:
                self.heads = self.heads if len(self.heads) < HEADS else {}
                self.heads[key] = self.render(messages, tools, answering=True)
            return self.heads[key]
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        question, turn, header = self.surroundings
        begins, closing = MARK.findall(question), turn.removesuffix(header).strip()
        last = text[text.rfind(begins[-1]) if begins else 0 :]
        if header and header.strip() not in last and last.rstrip().endswith(closing):
            text = text.rstrip().removesuffix(closing) + turn
        elif text.rstrip().endswith(turn.strip()):
            text = text.rstrip() + turn[len(turn.rstrip()) :]
        begin = self.tokenizer.bos_token
        return begin + text if begin and question.startswith(begin) and not text.startswith(begin) else text

    def is_rendered(self, prompt: Prompt) -> bool:
        """Whether a prompt is one text that this template has written already, with or without the
        generation prompt."""
        if not isinstance(prompt, str) and len(prompt) != 1:
            return False
        text = prompt if isinstance(prompt, str) else prompt[0].get("content")
        if not isinstance(text, str):
            return False
        question, turn, header = self.surroundings
        begin, closing = MARK.findall(question), turn.removesuffix(header).strip()
        ends = text.find(turn.strip())
        # A question about a mark, such as [/INST], is no turn: no turn begins before it.
        if MARK.search(turn) and ends >= 0 and (not begin or begin[-1] in text[:ends]):
            return True
        if not begin:  # a template of words: "USER: ... ASSISTANT:"
            edges = question.strip(), turn.strip()
            return all(edges) and text.lstrip().startswith(edges[0]) and text.rstrip().endswith(edges[1])
        written = bool(MARK.match(text.lstrip())) and text.rstrip().endswith(closing)
        return written and bool(header) and begin[-1] in text

    @cached_property
    def surroundings(self) -> tuple[str, str, str]:
        """What the template writes before a question, between it and the answer, and after its turn.

        The last is the header of the assistant's turn. None of them has a thought that the generation prompt
        opens.
        """
        asked = [{"role": "user", "content": PROBE}]
        try:
            answering, text = self.render(asked, answering=True), self.render(asked)
        except UserError:
            return "", "", ""
        answering = OPENED.sub("", answering)
        before, _, after = answering.rpartition(PROBE)
        return before, after, answering[len(text) :] if answering.startswith(text) else ""

    @cached_property
    def around(self) -> tuple[str, str]:
        """What the template writes between the generation prompt and an answer, and after the answer."""
        asked = [{"role": "user", "content": PROBE}]
        try:
            head = self.render(asked, answering=True)
            written = self.render([*asked, {"role": "assistant", "content": PROBE}])
        except UserError:
            return "", ""
        before, found, after = written.rpartition(PROBE)
        if not found:
            return "", ""
        return before.removeprefix(head) if before.startswith(head) else "", after

    @property
    def tail(self) -> str:
        return self.around[1]

    @cached_property
    def end_tokens(self) -> dict[str, int]:
        """Text -> id of every token that may end a turn: the special ones.

        They are known by their flag, not by name: <|end|> and its like are often neither eos nor a named
        token.
        """
        special = {str(t): i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        return special | {self.tokenizer.eos_token: self.tokenizer.eos_token_id}

    @cached_property
    def ends(self) -> list[str]:
        """Texts of the tokens that end a response: the one that closes the template's turn, and eos."""
        closing, end = ("", None) if self.plain else self.closing(self.tail)
        by_template = [
            text for text, index in self.end_tokens.items() if index == end and closing.endswith(text)
        ]
        return list(dict.fromkeys([*by_template, self.tokenizer.eos_token]))

    def closing(self, tail: str) -> tuple[str, int | None]:
        """A tail up to its first end token, and that token's id; without one, the whole tail and None."""
        found = [(tail.find(text), -len(text), text) for text in self.end_tokens if text in tail]
        if not found:
            return tail, None
        at, _, text = min(found)
        return tail[: at + len(text)], self.end_tokens[text]


def is_plain(message: Message) -> bool:
    """Whether a message has nothing but a role and a text."""
    return len(message) == 2 and type(message.get("role")) is type(message.get("content")) is str


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], chat: ChatFormat) -> list[list[int]]:
    """Ids of each prompt as the model reads it before it answers, the same in training and generation.

    Args:
        prompts: texts, or messages as the template takes them.

    Raises:
        UserError: tokenizer and chat format do not suit each other, or the template refuses a prompt, or
            leaves out a part of it.
    """
    renderer = Renderer(tokenizer, chat)
    texts = []
    for prompt in prompts:
        texts.append(renderer.prompt(prompt))
        if not renderer.is_rendered(prompt):
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            check_prompt(asked, None, texts[-1])
    return encode_heads(tokenizer, texts, renderer.plain)


def encode_heads(tokenizer: Any, texts: Sequence[str], plain: bool) -> list[list[int]]:
    """Ids of rendered prompts. A plain one gets the tokenizer's begin tokens unless its text has them."""
    if not texts:
        return []
    ids = encode_texts(tokenizer, texts)
    begin = begin_ids(tokenizer) if plain else []
    return [row if row[: len(begin)] == begin else [*begin, *row] for row in ids]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, without begin and end tokens. Equal texts share one list."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return []
    encode = getattr(type(tokenizer), "_encode_plus", None)
    if encode is transformers.PreTrainedTokenizerFast._encode_plus:
        # The tokenizer's own call gives the same ids, but it also computes offsets, which takes half as long
        # again. Calling it on one text sets truncation, padding and the handling of special tokens.
        tokenizer(distinct[:1], add_special_tokens=False, verbose=False)
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
    else:
        ids = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    known = dict(zip(distinct, ids, strict=True))
    return [known[text] for text in texts]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of sampled ids. Special tokens are kept, because some tokenizers have `<think>` among them."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def begin_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a plain text: often a begin token, often none."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]


def training_end(tokenizer: Any, chat: ChatFormat) -> int:
    """The token that ends a response in training: the one that closes the template's turn, else eos."""
    renderer = Renderer(tokenizer, chat)
    end = None if renderer.plain else renderer.closing(renderer.tail)[1]
    return tokenizer.eos_token_id if end is None else end


def response_ends(tokenizer: Any, chat: ChatFormat) -> set[int]:
    """Tokens at which generation stops: the one that ends responses in training, eos, and the model's own.

    The model's own are those of generation_config.json in the folder that the tokenizer was loaded from.
    """
    ends = {training_end(tokenizer, chat), tokenizer.eos_token_id}
    folder = str(tokenizer.name_or_path or "")
    file = Path(folder, "generation_config.json")
    if os.path.isdir(folder) and file.is_file():
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") or []
        ends.update([more] if isinstance(more, int) else more)
    return ends


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Names what token ids mean: tokenizers with the same token for every id have the same fingerprint."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:32]
