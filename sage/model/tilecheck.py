"""The self-check of tiles: does a model compute the same if its MLPs are computed in tiles?"""

from __future__ import annotations

from typing import Any

from sage.model.engine import Engine, Frozen
from sage.model.sample import Sample, Whole, gradient_fault
from sage.model.sharding import is_sharded
from sage.model.tiles import TILE, described, in_tiles_of
from sage.util import ranks
from sage.util.errors import UserError, describe
from sage.util.progress import console

SMALL = 32  # tokens of a tile, so that a few short texts fill several


def check_tiles(engine: Engine | Frozen, sample: Sample, layout: str, name: str) -> None:
    """Refuse a model that differs in tiles, and say what is computed in them. Every rank calls this.

    Gradients are compared where they are enabled.

    Raises:
        UserError: its log-probabilities or gradients differ.
    """
    policy: Any = engine.policy
    modules = described(policy.tiles)
    if reason := next(filter(None, ranks.gather(fault(engine, sample, layout))), None):
        raise UserError(
            f"model.tiled_mlp=true does not work with model.path={name}: with {modules} in tiles, {reason}; "
            "set model.tiled_mlp=false"
        )
    console.print(f"model.tiled_mlp: {name} computes {modules} in tiles of {TILE} tokens", markup=False)


def fault(engine: Engine | Frozen, sample: Sample, layout: str) -> str | None:
    """How log-probabilities or gradients differ in small tiles; None if they do not.

    The gradients are those of what the embedding puts out, and of the lowest MLP's weights where this rank
    has them whole.
    """
    policy: Any = engine.policy
    # Without shards, DeepSpeed is left out: it would add the gradients to those of the first step.
    whole = engine if is_sharded(policy) else Whole(policy, engine.device)
    lowest = [] if is_sharded(policy) else policy.tiles[0].module.parameters()
    weights = [weight for weight in lowest if weight.requires_grad]
    try:
        with in_tiles_of(None, policy.tiles):
            right, known = sample.gradients(whole, layout, weights)
        with in_tiles_of(SMALL, policy.tiles):
            logps, gradients = sample.gradients(whole, layout, weights)
    except Exception as e:
        return f"it fails ({describe(e)})"
    off = (logps - right).abs()
    if len(off) and not (off.mean() <= sample.limits.mean and off.max() <= sample.limits.most):
        return f"it changes a token's log-probability by {float(off.max()):.2g} nats"
    faults = (
        gradient_fault(ours, theirs, float(theirs.norm()), policy.dtype)
        for ours, theirs in zip(gradients, known, strict=True)
    )
    return next(filter(None, faults), None)
