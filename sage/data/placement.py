"""Where a pair's responses stand in the conversation that the chat template writes.

One rule: the texts trained on are those of the whole conversation as the template writes it, cut where the
prompt ends, with the responses unchanged in them. Where a template changes a response, the response stands
unchanged after the generation prompt instead. RULES names each case in which sage departs from the template's
own text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sage.data.chat import MARK, PROBE, Message, Prompt, Renderer
from sage.data.fields import Refused, check_prompt, check_response, content_of, fields_of, with_objects
from sage.data.thoughts import CLOSE, OPEN, OPENED
from sage.util.errors import UserError

CLOSED = re.compile(rf"{CLOSE.pattern}\s*\Z", re.IGNORECASE)  # a text that ends with a thought just closed

RULES = {
    "raw": "the chat template would change a response, so both stand unchanged after the generation prompt",
    "rendered": "the chat template has written the data already, so it is not applied again",
    "opened_by_prompt": "the prompt opens the thought, so a response's own opening mark is left out",
    "closed_first": "a plain answer follows a prompt that opens a thought, so an empty thought is closed "
    "before it",
    "not_opened": "the chat template writes plain answers without the thought that its generation prompt "
    "opens",
    "unclosed": "a thought that never ends was cut off, so no end token follows it",
}


class Placed(NamedTuple):
    """A pair as texts.

    prompt: what the model reads before it answers, with the started answer where there is one.
    lead: what the template adds before the response, alike on both sides; it is not scored. White space alone
        is the response's.
    chosen, rejected: the responses, each with the text of its end token.
    ends: whether the eos token must follow chosen and rejected, because their texts have no end token.
    rules: the keys of RULES that apply.
    """

    prompt: str
    lead: str
    chosen: str
    rejected: str
    ends: tuple[bool, bool]
    rules: frozenset[str]


class Side(NamedTuple):
    """One response.

    text: what follows the prompt and the template's lead, without its end token.
    full: the whole conversation as the template writes it; None where the data are rendered already.
    closing: the text of its end token where the template wrote a thought or tool calls into `text`, else
        None.
    """

    text: str
    full: str | None
    closing: str | None = None

    @property
    def kind(self) -> str:
        """own: begins with a thought. inside: ends a thought that it does not begin. plain: neither."""
        if OPEN.match(self.text.lstrip()):
            return "own"
        opening, close = OPEN.search(self.text), CLOSE.search(self.text)
        return "inside" if close and not (opening and opening.start() < close.start()) else "plain"


def place(
    renderer: Renderer,
    prompt: Prompt,
    chosen: Prompt,
    rejected: Prompt,
    tools: list | None = None,
    *,
    fixed: bool = False,
) -> Placed:
    """The texts of a pair.

    Args:
        prompt: a text, or messages; the last may be an answer that the assistant has started.
        chosen, rejected: texts, or lists that hold one assistant's message each.
        fixed: the prompt must be what the model reads at generation, because a response was sampled after it.

    Raises:
        Refused: the template refuses the conversation or loses a part of it, or a response contradicts the
            prompt.
        UserError: the pair is a conversation, and there is no chat template.
    """
    if renderer.plain:
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            raise UserError("it is a conversation: set data.chat_template=true")
        chosen, rejected = (without_end(text, renderer.ends) for text in (chosen, rejected))
        return Placed(prompt, "", chosen, rejected, (True, True), frozenset())
    turns = [_messages("user", prompt), _messages("assistant", chosen), _messages("assistant", rejected)]
    objects = [[with_objects(message) for message in messages] for messages in turns]
    # Some templates want the arguments of tool calls as objects, some as text.
    forms = (objects, turns) if objects != turns else (turns,)
    refusals = []
    for form in forms:
        try:
            return _place(renderer, form[0], [answers[-1] for answers in form[1:]], tools, fixed)
        except UserError as error:
            refusals.append(error)
    error = refusals[0]
    raise error if isinstance(error, Refused) else Refused("template_refuses", str(error)) from error


def _messages(role: str, turns: Prompt) -> list[Message]:
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def _place(
    renderer: Renderer, messages: list[Message], answers: list[Message], tools: list | None, fixed: bool
) -> Placed:
    messages, started = _split_started(messages, answers)
    head = renderer.prompt(messages, tools)
    rendered = renderer.is_rendered(messages)
    if not rendered:
        check_prompt(messages, tools, head)
    rules = {"rendered"} if rendered else set()
    sides, (added, tail) = [], renderer.around
    for answer in answers:
        if fields_of(answer):
            sides.append(_structured(renderer, messages, answer, tools, head))
            continue
        text = _without_header(started + content_of(answer), renderer.surroundings[2])
        if text != started + content_of(answer):
            rules.add("rendered")
        text = without_end(text, renderer.ends)
        full = None if rendered else renderer.render([*messages, {**answer, "content": text}], tools)
        sides.append(Side(text, full))
    leads = [_lead(side, head, tail) for side in sides]
    if not rendered and (None in leads or any(side.closing is not None for side in sides)):
        added, tail = _around(renderer, messages, tools, head)
        sides = [_without_lead(side, head, added) for side in sides]
        leads = [_lead(side, head, tail) for side in sides]
    if rendered and (CLOSE.search(added) or any(re.match(rf"\s|{MARK.pattern}", s.text) for s in sides)):
        added = ""  # rendered data say themselves what stands there
    leads = [added if lead is None else lead for lead in leads]
    lead = leads[0] if leads[0] == leads[1] else ""
    if leads[0] != leads[1]:  # a space, or the name of a channel; an empty thought is left out
        sides = [
            side if CLOSE.search(own) else side._replace(text=own + side.text)
            for side, own in zip(sides, leads, strict=True)
        ]
    prompt, lead, texts, cut, mended = _resolve(head, lead, added, tail, sides, fixed)
    if all(
        side.full is None or side.closing is not None or prompt + lead + text + tail == side.full
        for side, text in zip(sides, texts, strict=True)
    ):
        mended -= {"opened_by_prompt"}  # so does the template
    elif not mended:
        mended = {"raw"}
    if lead.isspace():  # the model writes it, often as a part of its first token
        lead, texts = "", [lead + text for text in texts]
    if started:
        prompt, lead, texts = _after_started(prompt + lead, answers, renderer.ends, texts)
    if not all(text.strip() for text in texts):
        raise Refused("empty_response", "a response is empty")
    closing, end = renderer.closing(tail)
    ends = [False, False]
    for i, side in enumerate(sides):
        if not cut[i]:
            texts[i] += closing if side.closing is None else side.closing
            ends[i] = end is None if side.closing is None else not side.closing
    return Placed(prompt, lead, texts[0], texts[1], (ends[0], ends[1]), frozenset(rules | mended))


def _split_started(messages: list[Message], answers: list[Message]) -> tuple[list[Message], str]:
    """The messages before the answer, and the part of the answer that the prompt has started."""
    if messages[-1]["role"] != "assistant":
        return messages, ""
    *before, last = messages
    if not before or any(fields_of(message) for message in (last, *answers)):
        raise Refused(
            "started_answer",
            "the prompt ends with an assistant's message that the response continues: both may only have "
            "content",
        )
    return before, content_of(last)


def _after_started(
    prompt: str, answers: list[Message], ends: Sequence[str], texts: list[str]
) -> tuple[str, str, list[str]]:
    """Prompt, lead and responses where the prompt takes the started answer."""
    rests = [without_end(content_of(answer), ends) for answer in answers]
    given = [text.removesuffix(rest) for text, rest in zip(texts, rests, strict=True)]
    if given[0] != given[1] or any(text == start for text, start in zip(texts, given, strict=True)):
        raise Refused("started_answer", "the responses do not continue the same started answer")
    return prompt + given[0], "", rests


def _structured(
    renderer: Renderer, messages: list[Message], answer: Message, tools: list | None, head: str
) -> Side:
    """A response with a thought or tool calls of its own, which only the template can write."""
    full = renderer.render([*messages, answer], tools)
    opened = OPENED.search(head)
    bases = (head, head[: opened.start()]) if opened else (head,)
    base = next((base for base in bases if full.startswith(base)), None)
    if renderer.is_rendered(messages) or base is None:
        raise Refused(
            "template_refuses",
            f"the response has {fields_of(answer)[0]}, which the template does not write after this prompt",
        )
    body = full[len(base) :]
    check_response(answer, body)
    if renderer.tail and body.endswith(renderer.tail):
        return Side(body.removesuffix(renderer.tail), full, renderer.closing(renderer.tail)[0])
    text = without_end(body, list(renderer.end_tokens))
    return Side(text, full, body.rstrip().removeprefix(text) if text != body else "")


def _lead(side: Side, head: str, tail: str) -> str | None:
    """What the template writes between generation prompt and response; None where it changes either."""
    if side.full is None or not side.full.startswith(head):
        return None
    if side.closing is not None:
        at = side.full.find(side.text, len(head))
        return side.full[len(head) : at] if at >= 0 else None
    end = len(side.full) - len(side.text) - len(tail)
    return side.full[len(head) : end] if end >= len(head) and side.full.endswith(side.text + tail) else None


def _around(renderer: Renderer, messages: list[Message], tools: list | None, head: str) -> tuple[str, str]:
    """What the template writes before and after a plain answer to these messages."""
    written = renderer.render([*messages, {"role": "assistant", "content": PROBE}], tools)
    if PROBE not in written:
        raise Refused("lost", "the chat template leaves out the assistant's answer")
    before, _, after = written.rpartition(PROBE)
    if before.startswith(head):
        return before.removeprefix(head), after
    # Some templates write the prompt differently once there is an answer. The white space before it stays.
    return renderer.around[0] if renderer.around[0].isspace() else "", after


def _without_lead(side: Side, head: str, added: str) -> Side:
    """A structured response without what the template adds before plain answers, such as an empty thought."""
    if side.closing is None or not added or not (side.full or "").startswith(head + added):
        return side
    return side._replace(text=side.text.removeprefix(added))


def _without_header(text: str, header: str) -> str:
    """A response without the header of its turn, where its source was rendered."""
    if not MARK.search(header) or not text.lstrip().startswith(header.strip()):
        return text
    return text.lstrip().removeprefix(header.strip()).removeprefix(header[len(header.rstrip()) :])


def without_end(text: str, ends: Sequence[str]) -> str:
    """A response without the end tokens that its source wrote after it."""
    while end := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(end)
    return text


def _resolve(
    head: str, lead: str, added: str, tail: str, sides: list[Side], fixed: bool
) -> tuple[str, str, list[str], list[bool], set[str]]:
    """Prompt, lead and responses with the thought opened once; which are cut off; the rules used."""
    kinds, texts = [side.kind for side in sides], [side.text for side in sides]
    plain = kinds == ["plain", "plain"]
    structured = any(side.closing is not None for side in sides)
    if CLOSE.search(lead) and not plain:
        lead = ""  # else an empty thought would precede the response's own
    opened, rules = OPENED.search(head + lead), set()
    cut = [side.kind == "own" and not CLOSE.search(side.text) for side in sides]
    if opened is None:
        if CLOSED.search(head) and not plain:
            raise Refused(
                "second_thought",
                "the prompt closes the thought, and a response brings its own; leave thinking on in "
                "data.template_arguments",
            )
    elif plain:
        base = (head + lead)[: opened.start()]
        leads = [_lead(side, base, tail) for side in sides]
        if not fixed and leads[0] is not None and leads[0] == leads[1] and not OPEN.search(leads[0]):
            return base, leads[0], texts, cut, {"not_opened"}
        lead += _close(opened[0], added)
        rules.add("closed_first")
    else:
        for i, kind in enumerate(kinds):
            if kind == "own":
                texts[i] = _without_opening(texts[i], opened[0])
                rules.add("opened_by_prompt")
            elif kind == "plain" and kinds[1 - i] == "inside" and not structured:
                cut[i] = True  # as the other side, it goes on with the prompt's thought
            elif kind == "plain":
                texts[i] = _close(opened[0], added) + texts[i]
                rules.add("closed_first")
    if any(cut):
        rules.add("unclosed")
    return head, lead, texts, cut, rules


def _close(opening: str, added: str) -> str:
    """What closes a thought that was just opened: the template's own words, or the mark that matches."""
    mark = opening.strip()
    return added if CLOSE.search(added) else f"\n{mark[0]}/{mark[1:]}\n\n"


def _without_opening(text: str, opening: str) -> str:
    """A response without its opening mark, which the prompt ends with."""
    text = text.lstrip()
    if text.startswith(opening):
        return text.removeprefix(opening)
    text = OPEN.sub("", text, count=1)
    return text.removeprefix("\n") if opening.endswith("\n") else text
