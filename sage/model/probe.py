"""Can a model read packed rows? Ask it, and compare with padded rows."""

from __future__ import annotations

from typing import Any

import torch

from sage.data.packing import collate
from sage.data.tokens import Pair


@torch.no_grad()
def can_pack(model: Any, causal: Any, max_length: int, device: torch.device) -> str | None:
    """None when the model reads a packed row as it reads padded ones, else why it does not.

    `model` is a Policy, or the engine around it; `causal` is the transformers model in it. Every rank calls this.
    """
    if not causal._supports_attention_backend:
        return "its attention cannot be replaced"
    ids = (torch.arange(36) * 7919 % (causal.config.vocab_size - 1)).tolist()
    pairs = [
        Pair("", None, ids[:5], ids[5:12], ids[12:16]),
        Pair("", None, [*ids[:3], ids[16]], ids[17:26], ids[26:]),
    ]
    logps = []
    for layout, prefix in (("shared", 3), ("padded", 0)):
        try:
            logps.append(torch.cat(model(collate(pairs, layout, prefix).to(device))[:2]))
        except Exception as e:
            return f"it fails on a packed row ({type(e).__name__}: {str(e).splitlines()[0]})"
    packed, padded = logps
    # What leaks, or lies at a wrong place, moves a log-probability by whole nats; bfloat16 moves it by hundredths.
    if not torch.allclose(packed, padded, rtol=1e-2, atol=1e-2):
        return f"its log-probabilities change by up to {float((packed - padded).abs().max()):.3g} in a packed row"
    return None
