"""The references of a run's pair sets: the policy before its first step, or another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from sage.config import TrainConfig
from sage.data.tokens import TokenizedPairs
from sage.model.engine import Frozen
from sage.model.forward import PairForward
from sage.model.policy import Policy
from sage.model.reference import Cached, Online, Reference, Scored
from sage.training.base import BaseModel, load_frozen
from sage.util.progress import activity

NAMES = "training", "held-out"  # of the pair sets; a run may have no held-out pairs


def own_references(
    cfg: TrainConfig,
    base: BaseModel,
    identity: dict[str, str],
    forward: PairForward,
    sets: Sequence[TokenizedPairs],
    scored: Scored | None,
) -> list[Reference]:
    """The references of the pair sets, if the reference is the policy as it is now.

    Args:
        scored: the reference of the first set, if `sage score-dataset` has computed it.
    """
    engine, policy = forward.engine, forward.engine.policy
    assert isinstance(policy, Policy)

    @cache
    def frozen() -> Frozen:  # one copy serves both
        with activity("loading the reference"):
            copy = base.load(cfg.engine)
        copy.follow(policy)
        return Frozen(copy, cfg.engine.zero_stage == 3, base.dtype, engine.device)

    def reference_of(pairs: TokenizedPairs, name: str) -> Reference:
        if cfg.reference == "online" and cfg.model.lora and not cfg.model.adapter_path:
            return Online(engine, adapters_off=True)
        if cfg.reference == "online":
            return Online(frozen(), adapters_off=False)
        key = {**identity, "layout": forward.layout, "backend": policy.backend}
        return Cached(forward, pairs, key, cfg.cache_dir, name)

    return each(sets, scored, reference_of)


def other_references(
    cfg: TrainConfig,
    other: BaseModel,
    identity: dict[str, str],
    forward: PairForward,
    sets: Sequence[TokenizedPairs],
    scored: Scored | None,
) -> list[Reference]:
    """The references of the pair sets, if the reference is not the policy but the model in `other`.

    It is checked as the policy is. Unless it computes in every step, it is in memory only for its pass over
    the pairs.
    """
    online = cfg.reference == "online"
    packing = forward.layout if online else cfg.data.packing  # online, both compute the same micro-batches

    @cache
    def loaded() -> PairForward:
        frozen, layout = load_frozen(other, cfg, forward.engine.device, sets, packing)
        return PairForward(frozen, forward.budget, layout)

    def reference_of(pairs: TokenizedPairs, name: str) -> Reference:
        passes = loaded()
        if online:
            return Online(passes.engine, adapters_off=False)
        key = {**identity, "layout": passes.layout, "backend": passes.engine.policy.backend}
        return Cached(passes, pairs, key, cfg.cache_dir, name, of_policy=False)

    found = each(sets, scored, reference_of)
    if not online and loaded.cache_info().currsize:
        frozen = loaded().engine
        assert isinstance(frozen, Frozen)
        frozen.close()
    return found


def each(
    sets: Sequence[TokenizedPairs],
    scored: Scored | None,
    reference_of: Callable[[TokenizedPairs, str], Reference],
) -> list[Reference]:
    """The references of the sets: `scored` is that of the first one, if it is given."""
    given = [scored] if scored else []
    named = list(zip(sets, NAMES, strict=False))
    return [*given, *(reference_of(pairs, name) for pairs, name in named[len(given) :])]
