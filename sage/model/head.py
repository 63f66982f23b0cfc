"""The head: log-probabilities of labels from hidden states, ours and the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from sage.model.kernels import TokenStats, token_stats


class Head(nn.Module):
    """Statistics of labels from hidden states, without logits of the positions that are not scored.

    It holds the head's weight as its own parameter (the same object as the model's), so that ZeRO-3 gathers
    it for this module's forward and again before its backward.
    """

    def __init__(self, lm_head: nn.Linear, config: transformers.PreTrainedConfig):
        super().__init__()
        self.weight, self.bias = lm_head.weight, lm_head.bias
        # Models transform their logits in many ways. These are the common ones; the self-check finds the
        # others.
        self.softcap = number(config, "final_logit_softcapping") or None  # Gemma 2
        # Cohere multiplies its logits by logit_scale, and Granite divides them by logits_scaling.
        self.scale = (number(config, "logit_scale") or 1.0) / (number(config, "logits_scaling") or 1.0)

    def forward(self, hidden: Tensor, labels: Tensor, stats: tuple[str, ...], backend: str) -> TokenStats:
        return token_stats(
            hidden,
            self.weight,
            labels,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            stats=stats,
            backend=backend,
        )


def number(config: transformers.PreTrainedConfig, name: str) -> float | None:
    """A field of a config, where it has it as a number."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def own_stats(logits: Tensor, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
    """`sage.model.kernels.token_stats` from [s, v] logits that the model computed itself."""
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return TokenStats(
        logps=logps.gather(1, labels[:, None]).squeeze(1),
        sum_sq_probs=logps.detach().exp().square().sum(-1) if "sum_sq_probs" in stats else None,
    )


@contextmanager
def float32_head(causal: Any) -> Iterator[None]:
    """The model's own logits in float32: the product of its head would round them to the model's dtype."""
    lm_head = causal.get_output_embeddings()
    if type(lm_head) is not nn.Linear or lm_head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return

    def product(x: Tensor) -> Tensor:
        bias = None if lm_head.bias is None else lm_head.bias.float()
        return F.linear(x.float(), lm_head.weight.float(), bias)

    lm_head.forward = product  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del lm_head.forward
