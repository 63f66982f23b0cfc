"""The model that a run starts from."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from sage.config import EngineConfig, ModelConfig
from sage.model import loading
from sage.model.adapters import needs_whole_model
from sage.model.engine import split_weights
from sage.model.policy import Policy
from sage.model.reference import identity
from sage.model.sharding import load_sharded
from sage.util import ranks


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
        dtype = dtype or self.dtype

        def read() -> Any:
            return loading.load_model(self.folder, self.cfg, dtype, self.seed)

        if engine and engine.zero_stage == 3:
            split = partial(split_weights, engine=engine, dtype=dtype)
            model = load_sharded(read, split, dtype, at_once=needs_whole_model(self.cfg))
        else:
            model = read()
        return Policy(model, self.cfg.head, loading.router_coefficient(self.cfg, model))

    def identity(self) -> dict[str, str]:
        """What the model's log-probabilities depend on. Reads all weights."""
        return identity(self.folder, self.cfg, self.dtype)


def open_model(model: ModelConfig, device: torch.device, seed: int, cache_dir: str) -> BaseModel:
    """Find a model's folder, downloading or converting it if needed, and load its tokenizer."""
    dtype = ranks.main_only(lambda: loading.compute_dtype(model, device))
    loading.check_head(model, device)
    folder = ranks.machine_first(lambda: loading.resolve_model(model, cache_dir))
    return BaseModel(model, folder, loading.load_tokenizer(folder, model), dtype, seed)
