"""A mixture of experts through whole runs: the routers' loss under ZeRO-3, where the model is sharded."""

from __future__ import annotations

import many_runs
import pytest
import torch
import transformers
from conftest import make_tokenizer

pytestmark = pytest.mark.slow


def test_the_routers_loss_in_whole_runs(tmp_path, pair_file):
    """Protects the loss's place in the update: it changes the weights, and ZeRO-3 gives what ZeRO-0 gives."""
    tokenizer, folder = make_tokenizer(), tmp_path / "mixtral"
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    common = [
        "model=hf",
        f"model.path={folder}",
        "model.dtype=float32",
        f"data.path={pair_file}",
        "steps=3",
        "batch_size=4",
        "optimizer.lr=1e-2",
        "micro_batch_tokens=4096",
        f"cache_dir={tmp_path / 'cache'}",
        "+baseline=dpo",
    ]
    options = {
        "without": [],
        "with": ["model.router_aux_coef=1.0"],
        "sharded": ["model.router_aux_coef=1.0", "engine=zero3"],
    }
    runs = {name: many_runs.freeze(tmp_path / name, *common, *more) for name, more in options.items()}
    many_runs.execute(1, list(runs.values()))
    norms = {name: many_runs.column(run, "grad_norm") for name, run in runs.items()}
    assert abs(norms["with"][0] - norms["without"][0]) > 1e-3
    assert many_runs.largest_difference(norms["with"], norms["sharded"]) < 1e-3 * max(norms["with"])
    losses = {name: many_runs.column(run, "loss") for name, run in runs.items()}
    assert many_runs.largest_difference(losses["with"], losses["sharded"]) < 1e-4
