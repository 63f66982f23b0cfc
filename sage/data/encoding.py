"""From a pair's texts to its token ids: the ids of the whole conversation, cut where the prompt ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sage.data.chat import Renderer, decode, encode_heads, encode_texts, tokenizer_fingerprint
from sage.data.columns import IDS
from sage.data.fields import Refused
from sage.data.placement import Placed, place
from sage.util.errors import UserError

SIDES = ("chosen", "rejected")
# Texts that may stand before a response in place of its prompt, to encode it as no text's beginning.
CONTEXTS = ("\n", ".", "a", "1")


class Encoder:
    """Encodes batches of pair records; see `__call__`."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.tokenizer = renderer, renderer.tokenizer
        self.plain = renderer.plain

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """The columns pair_id, pass_rate, IDS, rules, reason and detail for a batch of pair records.

        A pair that cannot be trained on has no ids but a reason and a detail.

        The prompt's ids are those that the model reads at generation, with what the template adds before the
        response; both sides share them. A response's ids are the others of the whole conversation. Where a
        token would straddle the border, the prompt keeps the ids that it has alone, and the response is
        encoded apart, as a text that continues another. Sampled ids are taken as they are.
        """
        count = len(batch["pair_id"])
        out: dict[str, list] = {"pair_id": batch["pair_id"], "pass_rate": batch["pass_rate"]}
        out |= {name: [None] * count for name in (*IDS, "rules", "reason", "detail")}
        placed: dict[int, Placed] = {}
        sampled: dict[int, list[list[int] | None]] = {}
        for i in range(count):
            record = {name: column[i] for name, column in batch.items()}
            out["rules"][i] = []
            try:
                if record.get("prompt_ids") is not None:
                    if record["tokenizer"] != self.fingerprint:
                        out["rules"][i].append("other_tokenizer")
                    elif not self.gives(record):
                        out["rules"][i].append("other_text")
                    else:
                        sampled[i] = [record[name] for name in IDS]
                if i not in sampled or None in sampled[i]:
                    prompt, chosen, rejected = (json.loads(record[name]) for name in ("prompt", *SIDES))
                    tools = json.loads(record["tools"]) if record.get("tools") else None
                    placed[i] = place(self.renderer, prompt, chosen, rejected, tools, fixed=i in sampled)
                    out["rules"][i] += sorted(placed[i].rules)
            except Refused as refusal:
                out["reason"][i], out["detail"][i] = refusal.reason, str(refusal)
            except UserError as error:
                raise UserError(f"pair {record['pair_id']}: {error}") from error
        free = [i for i in placed if i not in sampled]
        for i, ids in zip(free, self.encode([placed[i] for i in free]), strict=True):
            sampled[i] = ids
            if self.loses_characters(placed[i], ids):
                out["rules"][i].append("unknown")
        for i in sampled.keys() & placed.keys() - set(free):
            self.complete(placed[i], sampled[i])
        for i, ids in sampled.items():
            if out["reason"][i] is not None:
                continue
            if None in ids:
                out["reason"][i] = "merged"
                out["detail"][i] = "the tokenizer does not show where the response begins"
                continue
            for name, row in zip(IDS, ids, strict=True):
                out[name][i] = row
        return out

    def gives(self, record: dict[str, Any]) -> bool:
        """Whether the sampled ids of a record are those of its texts and of the template: a column may have
        been mapped to others, or texts edited."""
        prompt, *texts = (json.loads(record[name]) for name in ("prompt", *SIDES))
        for ids, turns in zip((record[name] for name in IDS[1:]), texts, strict=True):
            text = (turns if isinstance(turns, str) else turns[-1]["content"]).strip()
            # The last token may end the response, and is then no part of its text.
            if ids is not None and text not in [decode(self.tokenizer, i).strip() for i in (ids, ids[:-1])]:
                return False
        head = encode_heads(self.tokenizer, [self.renderer.prompt(prompt)], self.plain)[0]
        return head == list(record["prompt_ids"])

    @cached_property
    def fingerprint(self) -> str:
        return tokenizer_fingerprint(self.tokenizer)

    def encode(self, pairs: Sequence[Placed]) -> list[list[list[int] | None]]:
        """Ids of prompt, chosen and rejected for each pair."""
        if not pairs:
            return []
        contexts = [pair.prompt + pair.lead for pair in pairs]
        prompts = encode_heads(self.tokenizer, contexts, self.plain)
        texts = [getattr(pair, side) for side in SIDES for pair in pairs]
        found = self.after(contexts * 2, prompts * 2, texts)
        return [
            [prompts[i], self.ended(pair, 0, found[i]), self.ended(pair, 1, found[len(pairs) + i])]
            for i, pair in enumerate(pairs)
        ]

    def loses_characters(self, pair: Placed, ids: Sequence[list[int] | None]) -> bool:
        """Whether the tokenizer reads some of the texts as its unknown token."""
        tokenizer, known = self.tokenizer, [part for part in ids if part is not None]
        if (unknown := tokenizer.unk_token_id) is None or len(known) < len(ids):
            return False
        written = f"{pair.prompt}{pair.lead}\0{pair.chosen}\0{pair.rejected}".count(tokenizer.unk_token)
        begun = known[0][:1] == [unknown] == [tokenizer.bos_token_id]
        ended = sum(pair.ends) if unknown == tokenizer.eos_token_id else 0
        return sum(part.count(unknown) for part in known) > written + begun + ended

    def complete(self, pair: Placed, ids: list[list[int] | None]) -> None:
        """Encode the response that was not sampled, to follow the prompt that was."""
        prompt = ids[0]
        assert prompt is not None
        for number, name in enumerate(SIDES):
            if ids[number + 1] is None:
                lead, text = pair.lead, getattr(pair, name)
                found = self.after([pair.prompt], [prompt], [lead + text])[0]
                ids[number + 1] = self.ended(pair, number, found, lead)

    def ended(self, pair: Placed, number: int, ids: list[int] | None, lead: str = "") -> list[int] | None:
        """A response's ids with eos where its text has no end token. Without ids, it is encoded apart."""
        ids = self.apart(lead + getattr(pair, SIDES[number])) if ids is None else ids
        return [*ids, self.tokenizer.eos_token_id] if ids is not None and pair.ends[number] else ids

    def after(
        self, contexts: Sequence[str], prompts: Sequence[list[int]], texts: Sequence[str]
    ) -> list[list[int] | None]:
        """Ids of each text as it follows its context; None where a token straddles the border.

        Only the end of the context is encoded again, from its last special token on. No token crosses that.
        """
        near = [context[self.last_mark(context) :] for context in contexts]
        starts = encode_texts(self.tokenizer, near)
        joined = encode_texts(self.tokenizer, [start + text for start, text in zip(near, texts, strict=True)])
        return [
            ids[len(start) :] if ids[: len(start)] == start == prompt[len(prompt) - len(start) :] else None
            for ids, start, prompt in zip(joined, starts, prompts, strict=True)
        ]

    def apart(self, text: str) -> list[int] | None:
        """Ids of a text that continues another one; None where no context shows where it begins."""
        for context in CONTEXTS:
            known, ids = encode_texts(self.tokenizer, [context, context + text])
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return None

    def last_mark(self, context: str) -> int:
        """Where the last special token of the context begins; 0 where it has none."""
        return max(0, *(context.rfind(mark) for mark in self.marks)) if self.marks else 0

    @cached_property
    def marks(self) -> list[str]:
        """The special tokens that the template writes between a question and its answer."""
        if self.plain:
            return []
        turn = self.renderer.surroundings[1]
        return [text for text in self.renderer.end_tokens if text in turn]
