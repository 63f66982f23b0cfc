"""What lands in final/, weight by weight."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tokenizer
from many_runs import freeze, weights

from sage import config
from sage.model.export import export
from sage.model.loading import load_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_is_merged_in_float32(tiny_model, tmp_path, dtype):
    """The exported weight is the exact sum, rounded once. A sum in bfloat16 would lose small changes."""
    run = freeze(
        tmp_path / "run",
        *["model=hf", f"model.path={tiny_model}", "data.path=none.jsonl", "+model/lora=default", "steps=1"],
        *["data.max_length=130", "micro_batch_tokens=260"],
    )
    cfg = config.load(run)
    model = load_model(str(tiny_model), cfg.model, dtype, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 1e-4).to(parameter.dtype)
    state = {f"model.{name}": value.to(dtype) for name, value in model.state_dict().items()}
    export(run / "final", state, str(tiny_model), cfg, make_tokenizer())

    key = "model.layers.0.self_attn.q_proj"
    inside = f"model.base_model.model.{key}"
    base, a, b = (
        state[f"{inside}.{part}.weight"].double()
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    merged = weights(run / "final")[f"{key}.weight"]
    exact = base + cfg.model.lora.alpha / cfg.model.lora.r * (b @ a)
    assert merged.dtype == dtype and not torch.equal(merged.double(), base)
    if dtype == torch.bfloat16:
        assert torch.equal(merged, exact.float().to(dtype))
    else:
        torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-8)
    untouched = "model.embed_tokens.weight"
    assert torch.equal(weights(run / "final")[untouched], state[f"model.base_model.model.{untouched}"])
