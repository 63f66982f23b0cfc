"""The self-check: does sage compute what the model's own code computes?

Every run asks at its start, on its own device and dtype and on a few of its own pairs. The model's own
logits of one text alone are the truth. What disagrees gives way to a slower path that agrees, and one line
says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sage.data.packing import MicroBatch, collate
from sage.data.tokens import Pair, TokenizedPairs
from sage.model.engine import Engine, Frozen
from sage.model.kernels import TokenStats, choose_backend, token_stats
from sage.model.policy import OWN, Head, Policy
from sage.model.rope import TextRopes
from sage.util.errors import UserError, first_line
from sage.util.progress import console

# A few short texts suffice: whatever is wrong is wrong in most tokens. Their lengths differ, so that rows
# pad.
PAIRS, PREFIX, PROMPT, RESPONSE = 3, 8, 24, 16
# Backends of the head sum in float32, so they differ by much less than the model's own rounding. Their
# gradients are rounded to the model's dtype.
STATISTIC_LIMIT, GRADIENT_LIMIT = 1e-3, 0.05
HEADS = {OWN: "the model's own logits, which take more memory", "tiled": "the tiled head"}


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


class Sample:
    """Shortened pairs of the run, and what the model's own code says of each token of their responses."""

    def __init__(self, engine: Engine | Frozen, pairs: TokenizedPairs, longest: int):
        """`longest` is the longest text of the run, in tokens."""
        self.prefix, self.longest = min(pairs.common_prefix, PREFIX), longest
        order = np.argsort(pairs.lengths().sum(1), kind="stable")
        indices = dict.fromkeys(order[np.linspace(0, len(order) - 1, PAIRS).astype(int)].tolist())
        self.pairs = [shorten(pairs[index], 3 * i) for i, index in enumerate(indices)]
        texts = [(pair.prompt_ids, pair.chosen_ids) for pair in self.pairs]
        texts += [(pair.prompt_ids, pair.rejected_ids) for pair in self.pairs]
        logps = [engine(alone(*text).to(engine.device), alone=True) for text in texts]
        self.truth = torch.cat(logps)
        prompt, response = texts[0]
        other = engine(alone(prompt[::-1], response).to(engine.device), alone=True)
        policy: Any = engine.policy
        self.limits = limits(policy.dtype, float((other - logps[0]).abs().mean()))

    def batch(self, layout: str) -> tuple[MicroBatch, Tensor]:
        """The pairs and a neighbour at the last positions of the run's longest text; which scored tokens are
        the pairs' own."""
        prefix = self.prefix if layout == "shared" else 0
        first = self.pairs[0]
        stranger = Pair(
            "", None, first.prompt_ids[: prefix + 1], first.rejected_ids[:2], first.chosen_ids[:2]
        )
        rows = [*self.pairs, stranger]
        batch = collate(rows, layout, prefix)
        if batch.spans is not None:
            start = batch.spans[-1 if layout == "shared" else -2].start
            places = batch.position_ids[0, start:]
            places += max(self.longest - 1 - int(places.max()), 0)
        sides = [[pair.chosen_ids for pair in rows], [pair.rejected_ids for pair in rows]]
        known = [i < len(self.pairs) for side in sides for i, response in enumerate(side) for _ in response]
        return batch, torch.tensor(known)

    def disagreement(self, engine: Engine | Frozen, layout: str) -> str | None:
        """None where the policy agrees with the truth, else how far it is off. Every rank gets rank 0's
        verdict."""
        reason = None
        try:
            batch, known = self.batch(layout)
            logps = engine(batch.to(engine.device), tokens=True).detach()[known.to(engine.device)]
            errors = (logps - self.truth).abs()
            mean, most = float(errors.mean()), float(errors.max())
            if not (mean <= self.limits.mean and most <= self.limits.most):
                reason = f"it changes a token's log-probability by {most:.2g} nats ({mean:.2g} on average)"
        except Exception as e:  # a model's code fails in many ways on what it does not know
            reason = f"it fails ({type(e).__name__}: {first_line(e)})"
        return engine.gather(reason)[0]

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
            engine(self.batch(layout)[0].to(engine.device))
            (reason,) = found
        except Exception as e:  # a kernel may not compile, or may need too much memory
            reason = f"it fails ({type(e).__name__}: {first_line(e)})"
        finally:
            hook.remove()
        return next((r for r in engine.gather(reason) if r), None)


@torch.enable_grad()
def difference(head: Head, hidden: Tensor, labels: Tensor, backend: str) -> str | None:
    """How `backend` differs from tiled, in the statistics of these tokens or in their gradients."""
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


def settle(engine: Engine | Frozen, pairs: Sequence[TokenizedPairs], packing: str, name: str) -> str:
    """Choose the layout of the pairs' rows and the policy's head, so that they agree with the model's own
    code.

    Args:
        engine: around the policy, whose `backend` is lowered to one that agrees.
        pairs: the sets that the run asks about.
        packing: a layout of `sage.data.packing.LAYOUTS`, or auto for the fastest that agrees.
        name: of the model, for messages.

    Raises:
        UserError: nothing that `packing` admits agrees, or the model's own code gives no finite numbers.
    """
    policy: Any = engine.policy
    longest = max(int((s.lengths()[:, 0] + s.lengths()[:, 1:].max(1)).max()) for s in pairs)
    ropes = TextRopes(policy.causal)
    if ropes.depend_on_length(longest, engine.device):
        ropes.watch()
        policy.ropes = ropes
    with torch.no_grad():
        sample = read_sample(engine, pairs[0], longest, name)
        layouts, heads = layouts_of(policy, packing, name), heads_of(policy, engine.device)
        reasons: dict[tuple[str, str], str] = {}
        for layout, head in [(layout, head) for layout in layouts for head in heads]:
            policy.backend = head
            reason = sample.disagreement(engine, layout)
            if reason is None and head not in (OWN, "tiled"):
                reason = sample.difference_from_tiled(engine, layout)
            if reason is None:
                break
            reasons[layout, head] = reason
        else:
            if packing not in ("auto", "padded"):
                raise UserError(
                    f"data.packing={packing} does not suit this model: {reasons[packing, heads[-1]]}; set "
                    "data.packing=padded"
                )
            raise UserError(
                f"model.path={name}: sage cannot compute what this model's own code computes, so it does "
                f"not train it: with padded rows {reasons['padded', heads[-1]]}"
            )
    if layout != layouts[0]:
        console.print(
            "rows are padded and prompts computed twice, since this model cannot pack: "
            f"{reasons[layouts[0], heads[-1]]}"
        )
    if head != heads[0]:
        console.print(
            f"log-probabilities come from {HEADS[head]}, since model.head={heads[0]} disagrees: "
            f"{reasons[layout, heads[0]]}"
        )
    if policy.trains and any(p.requires_grad for p in policy.parameters()):
        with torch.enable_grad(), without_dropout(policy):
            reason = sample.disagreement(engine, layout)
        if reason:
            raise UserError(
                f"model.path={name}: in training mode, which gradient checkpointing and adapter dropout "
                f"need, {reason}; set model.gradient_checkpointing=false and model.lora.dropout=0"
            )
    return layout


def read_sample(engine: Engine | Frozen, pairs: TokenizedPairs, longest: int, name: str) -> Sample:
    fault, sample = None, None
    try:
        sample = Sample(engine, pairs, longest)
        if not bool(sample.truth.isfinite().all()):
            fault = "its own logits are not finite: look for NaN or infinity in its weights"
    except Exception as e:
        fault = f"its own code fails on a plain text ({type(e).__name__}: {first_line(e)})"
    fault = engine.gather(fault)[0]
    if fault or sample is None:
        raise UserError(f"model.path={name}: {fault}")
    return sample


def layouts_of(policy: Policy, packing: str, name: str) -> list[str]:
    """The layouts to try, the fastest first. Texts that share a prompt must share its frequencies."""
    if packing == "shared" and policy.ropes:
        raise UserError(
            f"data.packing=shared does not suit model.path={name}: its rotary frequencies depend on a text's "
            "length, and the responses of a pair differ in length; set data.packing=auto"
        )
    if packing != "auto":
        return [packing]
    return ["unshared" if policy.ropes else "shared", "padded"]


def heads_of(policy: Policy, device: torch.device) -> list[str]:
    """The heads to try, the one that the config asks for first."""
    chosen = choose_backend(device, policy.dtype) if policy.backend == "auto" else policy.backend
    return list(dict.fromkeys([chosen, *(["tiled"] if chosen == "triton" else []), OWN]))


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


def alone(prompt: list[int], response: list[int]) -> MicroBatch:
    """One text without padding or neighbours."""
    batch = collate([Pair("", None, prompt, response, response)], "padded")
    n = len(response)
    return batch._replace(
        input_ids=batch.input_ids[:1],
        position_ids=batch.position_ids[:1],
        attention_mask=None,
        positions=batch.positions[:n],
        labels=batch.labels[:n],
        slots=batch.slots[:n],
    )


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of an adapter, which lives in training, is off for a while."""
    rates: dict[Any, float] = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    for module in rates:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in rates.items():
            module.p = rate
