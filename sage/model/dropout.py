"""What a model would draw at random while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def random_rates(model: nn.Module) -> list[tuple[Any, str, float]]:
    """(holder, name, value) of every dropout and jitter: in modules, in numbers that modules keep, and in
    configs.

    A dropout that peft added is not among them: its user asked for it.
    """
    holders: dict[int, Any] = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name.split("."):
            continue
        holders[id(module)] = module
        if isinstance(config := getattr(module, "config", None), transformers.PreTrainedConfig):
            holders[id(config)] = config
    return [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, float)
        and ("drop" in name or "jitter" in name or (name == "p" and isinstance(holder, DROPOUTS)))
    ]


@contextmanager
def as_in_training(policy: Any) -> Iterator[None]:
    """Gradients flow, and an adapter's dropout is off, for a while."""
    rates: dict[Any, float] = {m: m.p for m in policy.modules() if isinstance(m, nn.Dropout)}
    for module in rates:
        module.p = 0.0
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, rate in rates.items():
            module.p = rate
        policy.set_mode(False)  # rates were set back that are 0 in training mode
