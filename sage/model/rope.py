"""Rotary positions whose frequencies depend on the length of the text (longrope, dynamic NTK).

transformers takes the length from the largest position of the call. In a batch, one long text then changes
all others. Here such a module is asked once per text, so a text gets the frequencies that it would get
alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sage.data.packing import MicroBatch


class TextRopes:
    """The rotary modules of a model. `texts` is set before each forward; None leaves the model's own code
    alone.

    Modules are found by what they take (`x`, `position_ids`), not by name.
    """

    def __init__(self, model: nn.Module):
        self.texts: list[tuple[slice, slice]] | None = None  # (rows, columns) of each text
        self.modules: list[Any] = [m for m in model.modules() if _is_rotary(m)]

    def watch(self) -> None:
        """From now on, compute every text's frequencies apart."""
        for module in self.modules:
            module.forward = self.per_text(type(module).forward.__get__(module))

    def per_text(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def split(x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> Any:
            if self.texts is None:
                return forward(x, position_ids, *args, **options)
            whole: list[Tensor] = []
            for rows, columns in self.texts:
                own = position_ids[..., rows, columns]
                # Dynamic NTK keeps the longest length that it has seen. A short call makes it forget.
                forward(x, torch.zeros_like(own[..., :1]), *args, **options)
                out = forward(x, own, *args, **options)
                parts = out if isinstance(out, tuple) else (out,)
                if not whole:
                    whole = [p.new_zeros(*position_ids.shape, p.shape[-1]) for p in parts]
                for all_texts, part in zip(whole, parts, strict=True):
                    all_texts[..., rows, columns, :] = part
            return whole[0] if len(whole) == 1 else tuple(whole)

        return split

    def depend_on_length(self, longest: int, device: torch.device) -> bool:
        """Whether a text of `longest` tokens in a call changes the frequencies of a short text."""
        x = torch.zeros(1, 1, 1, device=device)
        short = torch.tensor([[0, 1]], device=device)
        both = torch.tensor([[longest - 1, 1]], device=device)
        for module in self.modules:
            forward = type(module).forward.__get__(module)
            takes_type = "layer_type" in inspect.signature(forward).parameters
            for layer_type in getattr(module, "rope_type", {}) if takes_type else [None]:
                options = {"layer_type": layer_type} if takes_type else {}
                alone, beside, _ = (_first(forward(x, p, **options))[..., 1, :] for p in (short, both, short))
                if not torch.equal(alone, beside):
                    return True
        return False


def _is_rotary(module: nn.Module) -> bool:
    parameters = list(inspect.signature(module.forward).parameters)
    return parameters[:2] == ["x", "position_ids"] and not list(module.parameters())


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def texts_of(batch: MicroBatch) -> list[tuple[slice, slice]] | None:
    """(rows, columns) of each text; None where texts share tokens, as in the shared layout."""
    if batch.spans is None:
        assert batch.attention_mask is not None
        lengths = batch.attention_mask.sum(1).tolist()
        return [(slice(i, i + 1), slice(0, length)) for i, length in enumerate(lengths)]
    if batch.prefix or any(len(span.responses) > 1 for span in batch.spans):
        return None
    return [(slice(0, 1), slice(s.start, s.start + s.prompt + s.responses[0])) for s in batch.spans]
