"""What the self-check asks: a few pairs of the run, and what the model's own code says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sage.data.packing import MicroBatch, collate
from sage.data.tokens import Pair, TokenizedPairs
from sage.model.engine import Engine, Frozen
from sage.model.head import Head
from sage.model.kernels import TokenStats, token_stats
from sage.model.policy import Policy
from sage.model.sequence import ALONE
from sage.model.sharding import is_sharded, own_part
from sage.util import ranks
from sage.util.errors import describe

# A few short texts suffice: whatever is wrong is wrong in most tokens. Their lengths differ, so that rows
# pad.
PAIRS, PREFIX, PROMPT, RESPONSE = 3, 8, 24, 16
# Backends of the head sum in float32, so they differ by much less than the model's own rounding. Their
# gradients are rounded to the model's dtype.
STATISTIC_LIMIT, GRADIENT_LIMIT = 1e-3, 0.05
# Gradients in bfloat16 that have gone through all layers differ by less. A rank that misses tokens errs by
# more.
PARTS_LIMIT = 0.2


class Limits(NamedTuple):
    """The largest errors of a log-probability that count as rounding, in nats per token."""

    mean: float
    most: float


def limits(dtype: torch.dtype, effect: float) -> Limits:
    """What rounding may do, given the `effect` (mean, in nats per token) of reading another prompt.

    In small random models a leak moves log-probabilities by little, so the limits shrink with the effect.
    They stay above what rounding does: 1e-5 in float32. In bfloat16 single tokens err by tenths, and their
    mean by hundredths.
    """
    if torch.finfo(dtype).eps < 1e-6:
        limit = min(max(0.01 * effect, 2e-5), 1e-3)
        return Limits(limit, limit)
    limit = min(max(0.1 * effect, 0.05), 0.1)
    return Limits(limit, 10 * limit)


class Whole:
    """A policy that no engine has wrapped or sharded yet."""

    def __init__(self, policy: Policy, device: torch.device):
        self.policy, self.device = policy.to(device), device

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.policy(*args, **options)


class Sample:
    """A few pairs of the run, and the model's own log-probability of each token of their responses.

    All are shortened but one: the longest text of the run shows windows, chunks and sparse attention that
    begin to matter only there.
    """

    def __init__(self, engine: Engine | Frozen | Whole, sets: Sequence[TokenizedPairs]):
        """`sets` are the pairs of the run; the first one gives the sample."""
        pairs = sets[0]
        self.prefix, self.longest = (
            min(pairs.common_prefix, PREFIX),
            max(int(lengths_of(s).max()) for s in sets),
        )
        order = np.argsort(pairs.lengths().sum(1), kind="stable")
        indices = dict.fromkeys(order[np.linspace(0, len(order) - 1, PAIRS).astype(int)].tolist())
        self.pairs = [shorten(pairs[index], 3 * i) for i, index in enumerate(indices)]
        # One more pair of the first prompt, which shares a response with the first pair and adds one.
        self.pairs.append(self.pairs[0]._replace(chosen_ids=self.pairs[-1].chosen_ids))
        self.short = len(self.pairs)
        lengths = lengths_of(pairs)
        if lengths.max() > PREFIX + PROMPT + RESPONSE:
            self.pairs.append(whole(pairs[int(lengths.argmax())]))
        sides = [[pair.chosen_ids for pair in self.pairs], [p.rejected_ids for p in self.pairs[: self.short]]]
        # Log-probabilities of the tokens of each text, by the side and the number of its pair.
        self.truth = {
            (side, i): engine(alone(self.pairs[i].prompt_ids, response).to(engine.device), alone=True)
            for side, responses in enumerate(sides)
            for i, response in enumerate(responses)
        }
        prompt, response = self.pairs[0].prompt_ids, self.pairs[0].chosen_ids
        other = engine(alone(prompt[::-1], response).to(engine.device), alone=True)
        policy: Any = engine.policy
        self.limits = limits(policy.dtype, float((other - self.truth[0, 0]).abs().mean()))
        self.looks_ahead = self._looks_ahead(engine, prompt + response)

    def _looks_ahead(self, engine: Engine | Frozen | Whole, text: list[int]) -> float:
        """How far another last token changes the log-probabilities of the tokens before it, in nats; 0 if
        that is rounding. An encoder such as BERT, which reads both ways, has no log-probability of a text."""
        other = next((token for token in text if token != text[-1]), 0)
        ends = [alone(text[:1], [*text[1:-1], end]).to(engine.device) for end in (text[-1], other)]
        own, changed = (engine(batch, alone=True)[:-1] for batch in ends)
        off = (own - changed).abs()
        ahead = len(off) and bool(off.mean() > self.limits.mean or off.max() > self.limits.most)
        return float(off.max()) if ahead else 0.0

    def batches(self, layout: str) -> Iterator[tuple[Tensor, MicroBatch]]:
        """Micro-batches of the layout, with the numbers of their pairs, and -1 for one without a truth."""
        short, long = list(range(self.short)), list(range(self.short, len(self.pairs)))
        # A long text would pad all others, so it has its own rows.
        for members in [short + long] if layout != "padded" else [short, long]:
            if members:
                yield self.batch(layout, members, stranger=members != long)

    def batch(self, layout: str, members: list[int], stranger: bool) -> tuple[Tensor, MicroBatch]:
        """A micro-batch of these pairs, with their numbers. A stranger is one more pair, of number -1."""
        first, prefix = self.pairs[0], self.prefix if layout == "shared" else 0
        rows = [self.pairs[i] for i in members]
        if stranger:
            members = [*members, -1]
            beginning = first.prompt_ids[: prefix + 1]
            while any(beginning == row.prompt_ids for row in rows):  # the stranger's prompt is its own
                beginning = [*beginning, beginning[-1]]
            rows.append(Pair("", None, beginning, first.rejected_ids[:2], first.rejected_ids[:2]))
        batch = collate(rows, layout, prefix)
        if batch.spans is not None:  # the stranger stands at the last positions of the longest text
            places = batch.position_ids[0, batch.spans[-1].start :]
            places += max(self.longest - 1 - int(places.max()), 0)
        return torch.tensor(members), batch

    def compare(self, engine: Engine | Frozen | Whole, layout: str) -> str | None:
        """None where the policy agrees with the truth, else how far it is off."""
        for numbers, batch in self.batches(layout):
            logps = engine(batch.to(engine.device), tokens=True).detach()
            text = batch.slots.to(engine.device) // batch.longest
            short, long = list[Tensor](), list[Tensor]()  # errors of the shortened pairs, and of the long one
            for k, number in enumerate(batch.sides.tolist()):
                side, pair = k // len(numbers), int(numbers[k % len(numbers)])
                if (side, pair) in self.truth:
                    group = short if pair < self.short else long
                    group.append((logps[text == number] - self.truth[side, pair]).abs())
            for group in filter(None, (short, long)):
                found = torch.cat(group)
                mean, most = float(found.mean()), float(found.max())
                if not (mean <= self.limits.mean and most <= self.limits.most):
                    return f"it changes a token's log-probability by {most:.2g} nats ({mean:.2g} on average)"
        return None

    def disagreement(self, engine: Engine | Frozen, layout: str) -> str | None:
        """`compare`, or how the model's code fails. Every rank gets rank 0's verdict."""
        try:
            reason = self.compare(engine, layout)
        except Exception as e:  # a model's code fails in many ways on what it does not know
            reason = f"it fails ({describe(e)})"
        return ranks.gather(reason)[0]

    def fault_in_backward(self, whole: Engine | Frozen | Whole, layout: str) -> str | None:
        """How the gradients of the short pairs fail; None if they are finite.

        It asks one weight of each kind, in the lowest layer. To hold all gradients at once could take more
        memory than a step does. Weights that are split over ranks cannot be asked: there it asks what the
        embedding puts out, through which the gradients of all layers have gone.
        """
        policy: Any = whole.policy
        kinds: dict[str, Tensor] = {}
        for name, weight in () if is_sharded(policy) else policy.named_parameters():
            if weight.requires_grad:
                kinds.setdefault(re.sub(r"\d+", "", name), weight)
        try:
            _, batch = self.batch(layout, list(range(self.short)), stranger=True)
            with embedded_by(policy) if is_sharded(policy) else nullcontext(list(kinds.values())) as asked:
                logps = whole(batch.to(whole.device), tokens=True)
            gradients = torch.autograd.grad(logps.sum(), asked, allow_unused=True)
            known = [gradient for gradient in gradients if gradient is not None]
            finite = all(bool(gradient.isfinite().all()) for gradient in known)
        except Exception as e:
            return f"its backward pass fails ({describe(e)})"
        return None if known and finite else f"its gradients are {'not finite' if known else 'missing'}"

    def fault_in_parts(self, whole: Engine | Frozen | Whole, layout: str) -> str | None:
        """How this rank's gradients differ where ranks compute a row together; None if they do not.

        It compares the gradient of what the embedding puts out, through which the gradients of all layers
        have gone, with the same part of the whole row's. Gradients must be enabled.
        """
        policy: Any = whole.policy
        group = policy.group
        try:
            _, (part,) = self.gradients(whole, layout)
            policy.group = ALONE
            _, (right,) = self.gradients(whole, layout)
        except Exception as e:
            return f"its backward pass fails ({describe(e)})"
        finally:
            policy.group = group
        own = right[:, group.rank * part.shape[1] :][:, : part.shape[1]]
        return gradient_fault(part[:, : own.shape[1]], own, float(right.norm()), policy.dtype)

    def gradients(
        self, whole: Engine | Frozen | Whole, layout: str, weights: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the short pairs' tokens, and the gradients of their sum in what the embedding
        puts out and in `weights`; no gradients where they are disabled."""
        policy: Any = whole.policy
        _, batch = self.batch(layout, list(range(self.short)), stranger=True)
        with embedded_by(policy) if torch.is_grad_enabled() else nullcontext(list[Tensor]()) as embedded:
            logps = whole(batch.to(whole.device), tokens=True)
        asked = [*embedded, *weights] if embedded else []
        found = torch.autograd.grad(logps.sum(), asked, materialize_grads=True) if asked else ()
        return logps.detach(), [gradient.float() for gradient in found]

    def difference_from_tiled(self, engine: Engine | Frozen, layout: str) -> str | None:
        """How the policy's head differs from the tiled one on the same hidden states; None if it does not.

        The truth does not suffice here: in bfloat16 the model rounds more than a wrong kernel may hide.
        """
        policy: Any = engine.policy
        reason, found = None, []

        def compare(head: Head, args: tuple[Any, ...]) -> None:
            # Under ZeRO-3 the head's weight is whole only here, after DeepSpeed's own hook.
            found.append(difference(head, args[0], args[1], policy.backend))

        hook = policy.head.register_forward_pre_hook(compare)
        try:
            _, batch = next(self.batches(layout))
            engine(batch.to(engine.device))
            (reason,) = found
        except Exception as e:  # a kernel may not compile, or may need too much memory
            reason = f"it fails ({describe(e)})"
        finally:
            hook.remove()
        return next((r for r in ranks.gather(reason) if r), None)


def gradient_fault(ours: Tensor, right: Tensor, size: float, dtype: torch.dtype) -> str | None:
    """How far a gradient is off, in parts of `size`; None if rounding explains it."""
    off, limit = float((ours - right).norm()), 1e-3 if torch.finfo(dtype).eps < 1e-6 else PARTS_LIMIT
    return None if off <= limit * size else f"its gradients are off by {off / max(size, 1e-30):.2g}"


@torch.enable_grad()
def difference(head: Head, hidden: Tensor, labels: Tensor, backend: str) -> str | None:
    """How `backend` differs from tiled, in the statistics of these tokens or in their gradients."""
    if not len(labels):  # a rank that shares the row, without a scored token of its own
        return None
    found: list[tuple[Any, tuple[Tensor, ...]]] = []
    for name in (backend, "tiled"):
        leaves = hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
        stats: Any = token_stats(
            *leaves,
            labels,
            bias=head.bias,
            softcap=head.softcap,
            scale=head.scale,
            stats=TokenStats._fields,
            backend=name,
        )
        upstream = torch.linspace(-1, 1, len(labels), device=hidden.device)
        found.append((stats, torch.autograd.grad(stats.logps, leaves, upstream.to(stats.logps.dtype))))
    (stats, gradients), (known, right) = found
    for name, ours, theirs in zip(TokenStats._fields, stats, known, strict=True):
        if not (off := float((ours - theirs).detach().abs().max())) <= STATISTIC_LIMIT:
            return f"its {name} differ from the tiled head's by {off:.2g}"
    for name, ours, theirs in zip(("hidden states", "weight"), gradients, right, strict=True):
        size = float(theirs.float().norm())
        if not (off := float((ours.float() - theirs.float()).norm())) <= GRADIENT_LIMIT * size:
            return f"its gradient of the {name} is off by {off / max(size, 1e-30):.2g} of its size"
    return None


@contextmanager
def embedded_by(policy: Any) -> Iterator[list[Tensor]]:
    """What the policy's embedding puts out while the block lasts, with gradients."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, out: Tensor) -> None:
        found.append(out.requires_grad_())

    hook = policy.causal.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def changed_by_asking(whole: Engine | Frozen | Whole, pairs: TokenizedPairs) -> list[str]:
    """The weights that the model's own code changes while it computes, seen by the first numbers of each.

    Empty also where that code fails, which the check of the log-probabilities reports.
    """

    def beginnings() -> dict[str, Tensor]:
        # As bytes, since NaN does not equal itself.
        named = whole.policy.named_parameters()
        return {n: own_part(w).detach().flatten()[:64].clone().view(torch.uint8) for n, w in named}

    before = beginnings()
    pair = shorten(pairs[0], 0)
    with suppress(Exception):
        whole(alone(pair.prompt_ids, pair.chosen_ids).to(whole.device), alone=True)
    return [n for n, values in beginnings().items() if not torch.equal(values, before[n])]


def lengths_of(pairs: TokenizedPairs) -> np.ndarray:
    """Tokens of each pair's longer text, [n]."""
    lengths = pairs.lengths()
    return lengths[:, 0] + lengths[:, 1:].max(1)


def shorten(pair: Pair, by: int) -> Pair:
    """The prompt's first and last tokens and each response's first ones; `by` makes the lengths of pairs
    differ."""
    prompt = pair.prompt_ids
    if len(prompt) > PREFIX + PROMPT - by:
        prompt = prompt[:PREFIX] + prompt[by - PROMPT :]
    return pair._replace(
        prompt_ids=prompt,
        chosen_ids=pair.chosen_ids[: RESPONSE - by],
        rejected_ids=pair.rejected_ids[: RESPONSE - by // 2],
    )


def whole(pair: Pair) -> Pair:
    """The pair's longer text, of which only the last tokens are its response."""
    longer, other = pair.chosen_ids, pair.rejected_ids
    if len(longer) < len(other):
        longer, other = other, longer
    text, scored = pair.prompt_ids + longer, min(RESPONSE, len(longer))
    return Pair("", None, text[:-scored], text[-scored:], other[:RESPONSE])


def alone(prompt: list[int], response: list[int]) -> MicroBatch:
    """One text without padding or neighbours."""
    batch = collate([Pair("", None, prompt, response, response)], "padded")
    return batch._replace(attention_mask=None)
