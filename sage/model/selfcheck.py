"""The self-check: does sage compute what the model's own code computes?

Every run asks at its start, on its own device and dtype and on a few of its own pairs. The model's own
logits of one text alone are the truth. What disagrees, or has no finite gradients, gives way to a slower path
that agrees, and one line says so. Rounding in bfloat16 hides small errors, so such a model is asked in
float32 first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from sage.data.tokens import TokenizedPairs
from sage.model.dropout import as_in_training
from sage.model.engine import Engine, Frozen
from sage.model.float32 import free_memory, in_float32
from sage.model.kernels import BACKENDS, choose_backend
from sage.model.policy import OWN, Policy
from sage.model.rope import TextRopes
from sage.model.sample import Sample, Whole, changed_by_asking, lengths_of
from sage.model.sharding import is_sharded, size_of
from sage.model.tilecheck import check_tiles
from sage.util import ranks
from sage.util.errors import UserError, describe, named
from sage.util.progress import console
from sage.util.ranks import main_only

HEADS = {OWN: "the model's own logits, which take more memory", "tiled": "the tiled head"}
Reasons = dict[tuple[str, str], str]  # (layout, head) -> why it is not used


@torch.no_grad()
def check_unwrapped(
    policy: Policy, device: torch.device, sets: Sequence[TokenizedPairs], packing: str, name: str
) -> Reasons:
    """What disagrees in float32, and what gives no gradients in the run's own dtype, before an engine wraps
    the policy.

    Rank 0 asks, and with sequence parallelism all ranks do. A forward pass that fails here is left to
    `settle`. A policy without trainable weights is asked for no gradients.

    Raises:
        UserError: the model's own code changes its weights, so that copies of it would be other models; or it
            is no causal language model.
    """
    whole = Whole(policy, device)
    watch_ropes(policy, device, sets)
    layouts = layouts_of(policy, packing, name)
    heads = ["tiled", OWN] if policy.head else [OWN]
    together = policy.group.size > 1
    here = local_ranks(device) if together else 1
    needed = here * sum(4 * p.numel() for p in policy.parameters() if p.dtype != torch.float32)
    trained = any(p.requires_grad for p in policy.parameters())

    def agreed(fault: Any) -> Any:
        return first_fault(fault) if together else fault

    def ask() -> Reasons:
        refuse_changes(agreed(changed_by_asking(whole, sets[0])), name)
        copied = not agreed(needed > free_memory(device))
        if not copied:
            console.print(
                f"the self-check runs in {str(policy.dtype).removeprefix('torch.')} only: a float32 copy "
                f"takes {needed / 2**30:.0f} GiB, and {free_memory(device) / 2**30:.0f} GiB are free"
            )
        backend, reasons = policy.backend, Reasons()
        try:
            with in_float32(policy) if copied else nullcontext():
                sample = Sample(whole, sets)
            refuse_encoder(agreed(sample.looks_ahead), name)
            for layout, head in [(layout, head) for layout in layouts for head in heads]:
                policy.backend = head
                try:
                    with in_float32(policy) if copied else nullcontext():
                        reason = agreed(sample.compare(whole, layout))
                except Exception:
                    continue
                if reason is None and trained:
                    with as_in_training(policy):
                        reason = agreed(sample.fault_in_backward(whole, layout))
                        if reason is None and together:
                            with in_float32(policy) if copied else nullcontext():
                                reason = agreed(sample.fault_in_parts(whole, layout))
                if reason is None:
                    break
                reasons[layout, head] = reason
                if head == "tiled":  # other kernels compute the same
                    reasons |= {(layout, kernel): reason for kernel in BACKENDS}
        except UserError:
            raise
        except Exception:  # the model's own code fails on a plain text
            return {}
        finally:
            policy.backend = backend
        return reasons

    return ask() if together else main_only(ask)


@torch.no_grad()
def check_sharded(
    policy: Policy,
    load: Callable[..., Policy],
    device: torch.device,
    sets: Sequence[TokenizedPairs],
    packing: str,
    name: str,
) -> Reasons:
    """What disagrees in float32, of a policy whose weights are split over the ranks. Every rank calls this.

    A second one in float32, from `load(dtype=torch.float32)`, is asked, and freed again. In a float32 run the
    policy itself is asked under its engine, by `settle`.
    """
    if policy.dtype == torch.float32:
        return {}
    needed = 4 * local_ranks(device) * sum(map(size_of, policy.parameters())) // ranks.world_size()
    if not all(ranks.gather(needed <= free_memory(device))):
        console.print(
            f"the self-check runs in {str(policy.dtype).removeprefix('torch.')} only: a float32 copy takes "
            f"{needed / 2**30:.0f} GiB, which are not free on every rank"
        )
        return {}
    copy = load(dtype=torch.float32)
    copy.backend = policy.backend
    frozen = Frozen(copy, True, torch.float32, device)
    watch_ropes(copy, device, sets)
    layouts, heads = layouts_of(copy, packing, name), ["tiled", OWN] if copy.head else [OWN]
    reasons, sample = Reasons(), None
    try:
        sample = Sample(frozen, sets)
        refuse_encoder(ranks.broadcast(sample.looks_ahead), name)
        for layout, head in [(layout, head) for layout in layouts for head in heads]:
            copy.backend = head
            try:
                reason = sample.compare(frozen, layout)
            except Exception:  # `settle` will see it
                continue
            reason = ranks.broadcast(reason)
            if reason is None:
                break
            reasons[layout, head] = reason
            if head == "tiled":
                reasons |= {(layout, kernel): reason for kernel in BACKENDS}
    except UserError:
        raise
    except Exception:  # the model's own code fails on a plain text, as `settle` will see
        reasons = Reasons()
    del copy, sample
    frozen.close()
    return reasons


def first_fault(fault: Any) -> Any:
    """What the first rank with a fault has found; None if no rank has any. Every rank calls this."""
    return next((found for found in ranks.gather(fault) if found), None)


def refuse_changes(weights: Sequence[str] | None, name: str) -> None:
    if weights:
        raise UserError(
            f"model.path={name}: its own code changes weights in the forward pass ({named(weights)}), so "
            "sage cannot train it"
        )


def refuse_encoder(looks_ahead: float, name: str) -> None:
    if looks_ahead:
        raise UserError(
            f"model.path={name}: it is not a causal language model: changing the last token of a text "
            f"changes the log-probabilities of the tokens before it by {looks_ahead:.2g} nats. An encoder "
            "such as BERT cannot be trained on preference pairs"
        )


def local_ranks(device: torch.device) -> int:
    """Ranks that share a device's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def settle(
    engine: Engine | Frozen,
    pairs: Sequence[TokenizedPairs],
    packing: str,
    name: str,
    known: Reasons | None = None,
) -> str:
    """Choose the layout of the pairs' rows and the policy's head, so that they agree with the model's own
    code.

    Args:
        engine: around the policy, whose `backend` is lowered to one that agrees.
        pairs: the sets that the run asks about.
        packing: a layout of `sage.data.packing.LAYOUTS`, or auto for the fastest that agrees.
        name: of the model, for messages.
        known: what `check_unwrapped` found.

    Raises:
        UserError: nothing that `packing` admits agrees and has gradients, or the model's own logits are not
            finite, or depend on later tokens.
    """
    policy: Any = engine.policy
    watch_ropes(policy, engine.device, pairs)
    trained = any(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        if sharded := is_sharded(policy):  # else `check_unwrapped` has asked
            changed = ranks.gather(changed_by_asking(engine, pairs[0]))
            refuse_changes(sorted({weight for found in changed for weight in found}), name)
        sample = read_sample(engine, pairs, name)
        layouts, heads = layouts_of(policy, packing, name), heads_of(policy, engine.device)
        reasons = dict(known or {})
        for layout, head in [(layout, head) for layout in layouts for head in heads]:
            if (layout, head) in reasons:
                continue
            policy.backend = head
            reason = sample.disagreement(engine, layout)
            if reason is None and head not in (OWN, "tiled"):
                reason = sample.difference_from_tiled(engine, layout)
            if reason is None and sharded and trained:
                with as_in_training(policy):
                    reason = ranks.broadcast(sample.fault_in_backward(engine, layout))
                    if reason is None and policy.group.size > 1:
                        reason = first_fault(sample.fault_in_parts(engine, layout))
            if reason is None:
                break
            reasons[layout, head] = reason
        else:
            if policy.group.size > 1:
                raise UserError(
                    f"engine.sequence_parallel={policy.group.size} needs packed attention, which this model "
                    f"does not support: {reasons[layouts[0], heads[-1]]}; set engine.sequence_parallel=1"
                )
            if packing not in ("auto", "padded"):
                raise UserError(
                    f"data.packing={packing} does not work with this model: {reasons[packing, heads[-1]]}; "
                    "set data.packing=padded"
                )
            raise UserError(
                f"model.path={name}: sage cannot compute what this model's own code computes, so it does "
                f"not train it: with padded rows {reasons['padded', heads[-1]]}"
                + ("; perhaps it can with model.gradient_checkpointing=false" if policy.trains else "")
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
    if policy.trains and trained:
        with as_in_training(policy):
            reason = sample.disagreement(engine, layout)
        if reason:
            raise UserError(
                f"model.path={name}: in training mode, which gradient checkpointing and adapter dropout "
                f"need, {reason}; set model.gradient_checkpointing=false and model.lora.dropout=0"
            )
    if policy.tiles:
        with as_in_training(policy) if trained else torch.no_grad():
            check_tiles(engine, sample, layout, name)
    return layout


def watch_ropes(policy: Policy, device: torch.device, sets: Sequence[TokenizedPairs]) -> None:
    """Give each text its own frequencies where they depend on its length."""
    ropes = TextRopes(policy.causal)
    if ropes.depend_on_length(max(int(lengths_of(s).max()) for s in sets), device):
        ropes.watch()
        policy.ropes = ropes


def read_sample(engine: Engine | Frozen, pairs: Sequence[TokenizedPairs], name: str) -> Sample:
    fault, sample = None, None
    try:
        sample = Sample(engine, pairs)
        if not all(bool(logps.isfinite().all()) for logps in sample.truth.values()):
            fault = "its own logits are not finite: look for NaN or infinity in its weights"
    except Exception as e:
        policy: Any = engine.policy
        code = "its own code" if policy.causal is policy.model else "its own code with peft's adapter"
        fault = f"{code} fails on a plain text ({describe(e)})"
    fault = ranks.gather(fault)[0]
    if fault or sample is None:
        raise UserError(f"model.path={name}: {fault}")
    refuse_encoder(ranks.gather(sample.looks_ahead)[0], name)
    return sample


def layouts_of(policy: Policy, packing: str, name: str) -> list[str]:
    """The layouts to try, the fastest first. Texts that share a prompt must share its frequencies."""
    if packing == "shared" and policy.ropes:
        raise UserError(
            f"data.packing=shared does not work with model.path={name}: its rotary frequencies depend on a "
            "text's length, and the responses of a pair differ in length; set data.packing=auto"
        )
    if policy.group.size > 1 and policy.ropes:
        raise UserError(
            f"engine.sequence_parallel={policy.group.size} does not work with model.path={name}: its rotary "
            "frequencies depend on a text's length, and no rank has whole texts; set "
            "engine.sequence_parallel=1, or lower data.max_length"
        )
    if packing != "auto":
        return [packing]
    if policy.group.size > 1:  # padded rows are never cut
        return ["shared"]
    return ["unshared" if policy.ropes else "shared", "padded"]


def heads_of(policy: Policy, device: torch.device) -> list[str]:
    """The heads to try, the one that the config asks for first."""
    chosen = choose_backend(device, policy.dtype) if policy.backend == "auto" else policy.backend
    return list(dict.fromkeys([chosen, *(["tiled"] if chosen == "triton" else []), OWN]))
