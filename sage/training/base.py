"""The model that a run starts from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from sage.config import EngineConfig, ModelConfig, TrainConfig
from sage.data.tokens import TokenizedPairs
from sage.model import loading
from sage.model.adapters import needs_whole_model
from sage.model.engine import Frozen, split_weights
from sage.model.policy import Policy
from sage.model.selfcheck import Reasons, check_sharded, check_unwrapped, settle
from sage.model.sequence import sequence_group
from sage.model.sharding import load_sharded
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.progress import activity


class BaseModel(NamedTuple):
    """A model on disk. Its weights are not loaded yet."""

    cfg: ModelConfig
    folder: str
    tokenizer: Any
    dtype: torch.dtype
    seed: int  # of the weights that are not in the folder: a fresh adapter's

    def load(self, engine: EngineConfig | None = None, dtype: torch.dtype | None = None) -> Policy:
        """The policy, in the run's dtype or in `dtype`. Every rank calls this.

        Under an `engine` of ZeRO stage 3 its weights are split over the ranks as they are read, or after all
        have been read where an adapter needs that.
        """
        dtype, together = dtype or self.dtype, engine.sequence_parallel if engine else 1
        if together > 1:
            loading.check_heads(self.folder, self.cfg, together)

        def read() -> Any:
            return loading.load_model(self.folder, self.cfg, dtype, self.seed)

        if engine and engine.zero_stage == 3:
            split = partial(split_weights, engine=engine, dtype=dtype)
            model = load_sharded(read, split, dtype, at_once=needs_whole_model(self.cfg))
        else:
            model = read()
        coefficient = loading.router_coefficient(self.cfg, model)
        return Policy(model, self.cfg.head, coefficient, sequence_group(together), self.cfg.tiled_mlp)

    def identity(self) -> dict[str, str]:
        """What the model's log-probabilities depend on. Reads all weights, and every rank calls this."""
        weights = loading.weights_of(self.folder, self.cfg)
        how = {"dtype": str(self.dtype), "attention": self.cfg.attention, "head": self.cfg.head}
        return {"weights": weights, **how}


def check_policy(
    policy: Policy,
    base: BaseModel,
    engine: EngineConfig,
    device: torch.device,
    sets: Sequence[TokenizedPairs],
    packing: str,
) -> Reasons:
    """What must not be used for this policy, found before an engine takes it."""
    if engine.zero_stage == 3:
        return check_sharded(policy, partial(base.load, engine), device, sets, packing, base.cfg.path)
    return check_unwrapped(policy, device, sets, packing, base.cfg.path)


def load_frozen(
    base: BaseModel, cfg: TrainConfig, device: torch.device, sets: Sequence[TokenizedPairs], packing: str
) -> tuple[Frozen, str]:
    """A model that is not trained, checked as a policy is, and the layout in which it agrees."""
    with activity(f"loading {base.cfg.path}"):
        policy = base.load(cfg.engine).requires_grad_(False)
    with activity(f"checking log-probabilities of {base.cfg.path} against its own code"):
        known = check_policy(policy, base, cfg.engine, device, sets, packing)
        frozen = Frozen(policy, cfg.engine.zero_stage == 3, base.dtype, device)
        return frozen, settle(frozen, sets, packing, base.cfg.path, known)


def open_model(model: ModelConfig, device: torch.device, seed: int, cache_dir: str) -> BaseModel:
    """Find a model's folder, downloading or converting it if needed, and load its tokenizer."""
    dtype = ranks.main_only(lambda: loading.compute_dtype(model, device))
    loading.check_head(model, device)
    loading.check_offload(model, device)
    folder = ranks.machine_first(lambda: loading.resolve_model(model, cache_dir))
    return BaseModel(model, folder, loading.load_tokenizer(folder, model), dtype, seed)


def open_reference(cfg: TrainConfig, base: BaseModel, device: torch.device) -> BaseModel | None:
    """Find the model of `reference_model`; None if the policy in `base` is its own reference.

    Raises:
        UserError: its tokens are not those of the policy.
    """
    if cfg.reference_model is None:
        return None
    model = ModelConfig(
        cfg.reference_model,
        dtype=cfg.model.dtype,
        attention=cfg.model.attention,
        head=cfg.model.head,
        tiled_mlp=cfg.model.tiled_mlp,
    )
    found = open_model(model, device, cfg.seed, cfg.cache_dir)
    if len({json.dumps(m.tokenizer.get_vocab(), sort_keys=True) for m in (base, found)}) > 1:
        raise UserError(
            f"reference_model={cfg.reference_model}: its tokens are not those of model.path={cfg.model.path}"
        )
    return found
