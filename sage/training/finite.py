"""What to say of a step whose loss or gradient is not finite. The engine has refused its update by then."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sage.util.errors import UserError, named


def not_finite(step: int, pair_ids: Sequence[str], losses: Tensor, grad_norm: float) -> UserError:
    """The error for step `step` (from 1): the pairs to blame, as far as their losses show it, and what to do.

    Args:
        pair_ids: the n pairs of the step.
        losses: [n] over all ranks.
        grad_norm: the global gradient norm, nan if there was no update because of the losses.
    """
    broken = [name for name, finite in zip(pair_ids, losses.isfinite().tolist(), strict=True) if not finite]
    if not broken:
        return UserError(
            f"step {step}: the gradient is not finite (norm {grad_norm}), though the loss of each pair is; "
            f"the pairs of the step are {named(pair_ids)}. Nothing was updated. Lower optimizer.lr, or use "
            "model.dtype=float32; checkpoints of earlier steps are good"
        )
    found = f"step {step}: the loss is not finite for {len(broken)} of {len(pair_ids)} pairs: {named(broken)}"
    if step == 1:
        return UserError(
            f"{found}. The model has not been trained yet, so the model itself gives log-probabilities that "
            "are not finite for these pairs. Use model.dtype=float32 or another model, or look at these pairs"
        )
    return UserError(
        f"{found}. Nothing was updated. Lower optimizer.lr, or use model.dtype=float32; checkpoints of "
        "earlier steps are good"
    )
