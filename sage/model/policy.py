"""The policy: the one module that the engine wraps. A micro-batch goes in, response log-probabilities come
out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sage.data.packing import MicroBatch
from sage.model import attention
from sage.model.adapters import inside_adapter
from sage.model.dropout import random_rates
from sage.model.head import Head, float32_head, own_stats
from sage.model.kernels import TokenStats
from sage.model.logps import LogitStats, PairLogps
from sage.model.rope import TextRopes, texts_of
from sage.model.sequence import ALONE, SequenceGroup
from sage.model.tiles import Tiles, in_tiles_of, token_wise
from sage.util.errors import UserError

OWN = "own"  # as `Policy.backend`: the logits come from the model's own full forward


class Policy(nn.Module):
    """The one module that the engine wraps: micro-batch in, response log-probabilities out.

    Dropout, router jitter and their like are off in training mode too: they would make policy and reference
    differ.
    """

    def __init__(
        self,
        model: Any,
        backend: str = "auto",
        router_coefficient: float = 0.0,
        group: SequenceGroup = ALONE,
        tiled_mlp: bool = False,
    ):
        """`backend` computes the head: a backend of `sage.model.kernels`, auto, or OWN.

        With auto the self-check may choose a faster backend. Until then auto means tiled. All ranks of
        `group` call the policy together, with the same micro-batch, and get the same results. `tiled_mlp`
        computes the modules in `tiles` in tiles along the tokens.
        """
        super().__init__()
        if router_coefficient and group.size > 1:
            raise UserError(
                f"engine.sequence_parallel={group.size}: the load-balancing loss of this model's routers "
                "needs all tokens of a row on one rank: set model.router_aux_coef=0"
            )
        self.router_coefficient, self.group = router_coefficient, group
        self.model: Any = model.eval()  # all of it: peft's outer module begins in training mode
        causal = self.causal
        self.rates = random_rates(causal)
        self.tiles: list[Tiles] = []
        if tiled_mlp:
            if router_coefficient:
                raise UserError(
                    "model.tiled_mlp=true: the load-balancing loss of this model's routers needs all tokens "
                    "of a row at once: set model.router_aux_coef=0, or model.tiled_mlp=false"
                )
            self.tiles = [Tiles(m) for m in token_wise(causal, causal.config.get_text_config().hidden_size)]
            if not self.tiles:
                raise UserError(
                    f"model.tiled_mlp=true: no part of {type(causal).__name__} computes each token by itself "
                    "from one tensor, as an MLP does: set model.tiled_mlp=false"
                )
        lm_head = causal.get_output_embeddings()
        if hasattr(lm_head, "base_layer"):
            raise UserError(
                f"the model's head is a {type(lm_head).__name__}: adapters on the head are not supported"
            )
        embedding: Any = causal.get_input_embeddings() if causal is not model else None
        if hasattr(embedding, "lora_embedding_A") and embedding.base_layer.weight is lm_head.weight:
            raise UserError(
                "the model's head is tied to its embedding, and merging an adapter on the embedding would "
                "change the head: such adapters are not supported"
            )
        fits = type(lm_head) is nn.Linear and causal.base_model is not causal
        self.head = Head(lm_head, causal.config.get_text_config()) if fits else None
        self.backend = backend if fits else OWN
        self.attention = self.in_use = causal.config._attn_implementation  # of rows that are not packed
        self.ropes: TextRopes | None = None  # set where frequencies depend on a text's length
        # Layers checkpoint only in training mode, and an adapter's dropout lives only there.
        named = model.named_modules()
        adapter_dropouts = [
            m for n, m in named if "lora_dropout" in n.split(".") and isinstance(m, nn.Dropout)
        ]
        self.trains = any(m.p > 0 for m in adapter_dropouts) or any(
            getattr(m, "gradient_checkpointing", False) for m in model.modules()
        )

    @property
    def causal(self) -> Any:
        """The transformers model, inside its adapter where there is one."""
        return inside_adapter(self.model)

    def forward(
        self,
        batch: MicroBatch,
        reference: bool = False,
        logit: bool = False,
        router: bool = False,
        tokens: bool = False,
        alone: bool = False,
    ) -> Any:
        """PairLogps of a micro-batch of n pairs.

        Args:
            reference: switch a freshly initialised adapter off, which gives back the initial model.
            logit: return (PairLogps, LogitStats).
            router: return (PairLogps, the routers' own load-balancing loss times its coefficient, a scalar).
            tokens: return the log-probability of each scored token instead, [s].
            alone: return them from the model's own full forward on one text, to which it gives only the ids.
        """
        wanted = ("logps", "sum_sq_probs") if logit else ("logps",)
        with self.mode(reference), self.model.disable_adapter() if reference else nullcontext():
            if alone:
                return self.own_logps(batch)
            stats, router_loss = self.ask(batch, wanted, router and self.router_coefficient > 0)
        assert stats.logps is not None
        if tokens:
            return stats.logps
        logps = PairLogps(*per_side(stats.logps, batch), *batch.response_tokens[batch.sides].chunk(2))
        if router:
            return logps, 0.0 if router_loss is None else self.router_coefficient * router_loss
        if not logit:
            return logps
        assert stats.sum_sq_probs is not None
        chosen_norm, rejected_norm = per_side(1 - 2 * stats.logps.detach().exp() + stats.sum_sq_probs, batch)
        return logps, LogitStats(chosen_norm + rejected_norm, *per_side(1 - stats.sum_sq_probs, batch))

    @contextmanager
    def mode(self, reference: bool) -> Iterator[None]:
        """Training mode where it is needed and gradients flow.

        It lasts until their backward, which may compute layers again, also if the model is asked in between.
        """
        before = self.model.training
        training = self.trains and torch.is_grad_enabled() and not reference
        if before != training:
            self.set_mode(training)
        try:
            yield
        finally:
            if before and not training:
                self.set_mode(True)

    def set_mode(self, training: bool) -> None:
        """Training mode without its randomness. Out of it a model keeps its numbers: some compute with them
        there."""
        self.model.train(training)
        for holder, name, value in self.rates:
            setattr(holder, name, 0.0 if training else value)

    @property
    def can_answer(self) -> bool:
        """Whether `answering` computes what the exported folder would: no adapter, no attached rope."""
        return self.causal is self.model and self.ropes is None

    @contextmanager
    def answering(self) -> Iterator[Any]:
        """The transformers model as its exported folder would load, to generate with for a while."""
        assert self.can_answer
        training = self.model.training
        if training:
            self.set_mode(False)
        self.use_attention(self.attention)
        try:
            yield self.causal
        finally:
            if training:
                self.set_mode(True)
            # Generation runs in inference mode. What a model keeps from there could not be trained with.
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_inference():
                        setattr(module, name, buffer.clone())

    def own_logps(self, batch: MicroBatch) -> Tensor:
        """The truth that the self-check compares with."""
        causal = self.causal
        self.use_attention(self.attention)
        if self.ropes:  # one text: the frequencies forget the texts before it
            self.ropes.texts = [(slice(0, 1), slice(0, batch.input_ids.shape[1]))]
        with float32_head(causal), in_tiles_of(None, self.tiles):
            kept = self.last_logits(batch.input_ids.shape[1] - int(batch.positions[0]))
            logits = causal(input_ids=batch.input_ids, use_cache=False, **kept).logits[0]
        places = batch.positions - (batch.input_ids.shape[1] - len(logits))
        stats = own_stats(logits[places], batch.labels, ("logps",))
        assert stats.logps is not None
        return stats.logps

    def last_logits(self, count: int) -> dict[str, int]:
        """The option of the model's own forward that keeps its last `count` logits, where it has it."""
        taken = inspect.signature(self.causal.forward).parameters
        return {"logits_to_keep": count} if "logits_to_keep" in taken else {}

    def ask(
        self, batch: MicroBatch, stats: tuple[str, ...], router: bool
    ) -> tuple[TokenStats, Tensor | None]:
        """Statistics of the scored tokens, and the routers' loss where `router` asks for it."""
        part, own = self.group.cut(batch)
        found, router_loss = self.ask_part(part, stats, router)
        values = (x if x is None else self.group.gather(x, own, len(batch.labels)) for x in found)
        return TokenStats(*values), router_loss

    def ask_part(
        self, batch: MicroBatch, stats: tuple[str, ...], router: bool
    ) -> tuple[TokenStats, Tensor | None]:
        """`ask` for this rank's part of the micro-batch."""
        causal, inputs = self.causal, self.inputs(batch)
        if self.backend == OWN:
            with float32_head(causal):
                out = causal(**inputs, **({"output_router_logits": True} if router else {}))
            logits = out.logits.flatten(0, 1)[batch.positions]
            return own_stats(logits, batch.labels, stats), router_loss_of(out) if router else None
        assert self.head is not None
        if router:  # the model's own code around its body computes the loss; its logits are of no use here
            bodies: list[Any] = []
            hook = causal.base_model.register_forward_hook(lambda _module, _args, out: bodies.append(out))
            try:
                out = causal(**inputs, output_router_logits=True, logits_to_keep=1)
            finally:
                hook.remove()
            body, router_loss = bodies[0], router_loss_of(out)
        else:
            body, router_loss = causal.base_model(**inputs), None
        hidden = body.last_hidden_state.flatten(0, 1)[batch.positions]
        backend = "tiled" if self.backend == "auto" else self.backend
        return self.head(hidden, batch.labels, stats, backend), router_loss

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """What the model's forward takes, with its attention set for this batch."""
        causal = self.causal
        packed = batch.spans is not None
        self.use_attention(attention.IMPLEMENTATION if packed else self.attention)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.spans is not None:
            length, device = batch.input_ids.shape[1] * self.group.size, batch.input_ids.device
            inputs["packed_row"] = attention.PackedRow(
                batch.prefix, batch.spans, length, device, group=self.group
            )
        else:
            inputs["attention_mask"] = batch.attention_mask
        if self.ropes:
            self.ropes.texts = texts_of(batch)
        if packed or self.ropes:  # padding is on the right, so the model's own positions are right elsewhere
            inputs["position_ids"] = batch.position_ids
        taken = inspect.signature((causal if self.backend == OWN else causal.base_model).forward).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            return inputs
        if packed:
            raise NotImplementedError("its code does not hand the row on to its attention")
        return {name: value for name, value in inputs.items() if name in taken}

    def use_attention(self, implementation: str) -> None:
        causal = self.causal
        if self.in_use == implementation:
            return
        causal.set_attn_implementation(implementation)
        if causal.config.get_text_config()._attn_implementation != implementation:
            causal.set_attn_implementation(self.attention)  # parts of a model may have taken the other one
            self.in_use = self.attention
            raise NotImplementedError("its attention cannot be replaced")
        self.in_use = implementation

    @property
    def dtype(self) -> torch.dtype:
        return self.causal.dtype

    def follow(self, other: Policy) -> None:
        """Compute as `other`, a policy of the same model, was found to agree with the model's own code."""
        self.backend = other.backend
        if other.ropes:
            self.ropes = TextRopes(self.causal)
            self.ropes.watch()


def router_loss_of(out: Any) -> Tensor:
    """The load-balancing loss in the output of a model's full forward."""
    if not isinstance(loss := getattr(out, "aux_loss", None), Tensor):
        raise UserError("the model gives no load-balancing loss of its routers: set model.router_aux_coef=0")
    return loss


def per_side(values: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sum [s] per-token values over each text's response: for n chosen and n rejected, [n] each.

    Every slot is written once, so this sum, unlike index_add, is deterministic on CUDA.
    """
    table = values.new_zeros(len(batch.response_tokens) * batch.longest).scatter(0, batch.slots, values)
    chosen, rejected = table.view(-1, batch.longest).sum(1)[batch.sides].chunk(2)
    return chosen, rejected
