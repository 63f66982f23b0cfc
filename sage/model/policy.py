"""The policy: the one module that the engine wraps. A micro-batch goes in, response log-probabilities come out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import transformers
from torch import Tensor, nn

from sage.data.packing import MicroBatch
from sage.model import attention
from sage.model.kernels import TokenStats, token_stats
from sage.model.logps import LogitStats, PairLogps
from sage.util.errors import UserError


class Head(nn.Module):
    """Statistics of labels from hidden states, without logits of the unscored positions.

    It owns the head's weight as a parameter of its own (the same object as the model's), so that ZeRO-3 gathers it for
    this module's forward and again before its backward.
    """

    def __init__(self, lm_head: nn.Module, config: transformers.PretrainedConfig, backend: str):
        super().__init__()
        if type(lm_head) is not nn.Linear:
            raise UserError(
                f"the model's head is a {type(lm_head).__name__}: adapters on the head are not supported"
            )
        self.weight, self.bias, self.backend = lm_head.weight, lm_head.bias, backend
        self.softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        # Cohere multiplies its logits by logit_scale, Granite divides them by logits_scaling.
        self.scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def forward(self, hidden: Tensor, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
        return token_stats(
            hidden,
            self.weight,
            labels,
            bias=self.bias,
            softcap=self.softcap,
            scale=self.scale,
            stats=stats,
            backend=self.backend,
        )


class Policy(nn.Module):
    """The one module the engine wraps: micro-batch in, response log-probabilities out."""

    def __init__(self, model: Any, head: str = "auto"):
        super().__init__()
        self.model: Any = model
        self.head = Head(self.causal.get_output_embeddings(), self.causal.config, head)
        self.unpacked_attention = self.causal.config._attn_implementation

    @property
    def causal(self) -> Any:
        """The transformers model, inside its adapter where there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: MicroBatch, reference: bool = False, logit: bool = False) -> Any:
        """PairLogps of a micro-batch of n pairs; with `logit`, (PairLogps, LogitStats).

        `reference` switches a freshly initialised adapter off, which gives back the initial model.
        """
        causal, arguments = self.causal, {}
        if batch.spans is None:
            causal.config._attn_implementation = self.unpacked_attention
        else:
            causal.config._attn_implementation = attention.IMPLEMENTATION
            arguments["packed_mask"] = attention.packed_mask(
                batch.prefix, batch.spans, batch.input_ids.shape[1], batch.input_ids.device
            )
        with self.model.disable_adapter() if reference else nullcontext():
            hidden = causal.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                **arguments,
            ).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        stats = self.head(hidden, batch.labels, ("logps", "sum_sq_probs") if logit else ("logps",))
        logps = PairLogps(*per_response(stats.logps, batch).chunk(2), *batch.response_tokens.chunk(2))
        if not logit:
            return logps
        squared_norms = per_response(1 - 2 * stats.logps.detach().exp() + stats.sum_sq_probs, batch)
        uncertainties = per_response(1 - stats.sum_sq_probs, batch)
        chosen_norm, rejected_norm = squared_norms.chunk(2)
        return logps, LogitStats(chosen_norm + rejected_norm, *uncertainties.chunk(2))


def per_response(values: Tensor, batch: MicroBatch) -> Tensor:
    """Sum [s] per-token values over each response, [2n].

    Every slot is written once, so this sum, unlike index_add, is deterministic on CUDA.
    """
    table = values.new_zeros(len(batch.response_tokens) * batch.longest).scatter(0, batch.slots, values)
    return table.view(-1, batch.longest).sum(1)
