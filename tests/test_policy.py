"""The policy's response log-probabilities and gradients against full logits, one unpadded row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from sage.config import LoraConfig, ModelConfig
from sage.errors import UserError
from sage.packing import collate
from sage.pairs import Pair
from sage.policy import Policy, load_model

VOCAB = 97
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False),
    "gemma2": transformers.Gemma2Config(
        **LLAMA, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, attn_logit_softcapping=3.0,
        sliding_window=6, attn_implementation="eager",
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "cohere": transformers.CohereConfig(**LLAMA, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**LLAMA, logits_scaling=3.0, tie_word_embeddings=False),
}  # fmt: skip
each = pytest.mark.parametrize("name", CONFIGS)


def tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    for parameter in model.parameters():  # larger than the init, so that soft caps and scales bite
        parameter.data.mul_(4.0) if parameter.ndim > 1 else None
    return model


def pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    return [
        Pair(str(i), None, ids(p), ids(c), ids(r))
        for i, (p, c, r) in enumerate([(9, 7, 2), (3, 1, 12), (1, 5, 5)])
    ]


def naive(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


@each
def test_log_probabilities_and_gradients(name):
    """Protects padding, the mask, the shift by one, soft caps, logit scales, tied heads and learned positions."""
    model = tiny(name)
    policy, rows = Policy(model), pairs()
    out = policy(collate(rows))
    expected = [torch.stack([naive(model, p.prompt_ids, r(p)) for p in rows])
                for r in (lambda p: p.chosen_ids, lambda p: p.rejected_ids)]  # fmt: skip
    for ours, theirs in zip(out[:2], expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 and ((ours - theirs) / theirs).abs().max() < 1e-5
    assert out.chosen_tokens.tolist() == [7, 1, 5] and out.rejected_tokens.tolist() == [2, 12, 5]

    parameters = list(model.parameters())
    ours = torch.autograd.grad((out.chosen - 2 * out.rejected).sum(), parameters)
    theirs = torch.autograd.grad((expected[0] - 2 * expected[1]).sum(), parameters)
    for g, e in zip(ours, theirs, strict=True):
        assert (g - e).abs().max() <= 1e-4 * e.abs().max() + 1e-5


@each
def test_the_head_shares_the_models_weight(name):
    """Tied or not, training the head trains the model: no parameter is a copy."""
    model = tiny(name)
    policy = Policy(model)
    assert policy.head.weight is model.get_output_embeddings().weight
    assert sum(p.numel() for p in policy.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_pair_does_not_depend_on_its_neighbours():
    policy, rows = Policy(tiny("llama")), pairs()
    together = policy(collate(rows))
    for i, row in enumerate(rows):
        alone = policy(collate([row]))
        assert abs(together.chosen[i] - alone.chosen[0]) < 1e-4
        assert abs(together.rejected[i] - alone.rejected[0]) < 1e-4


def lora(tiny_model, **options) -> torch.nn.Module:
    cfg = ModelConfig(path=str(tiny_model), lora=LoraConfig(**options))
    return load_model(str(tiny_model), cfg, torch.float32, seed=0)


def test_lora_reference_is_the_base_model(tiny_model):
    pytest.importorskip("peft")
    policy = Policy(lora(tiny_model))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = collate(pairs())
    with torch.no_grad():
        initial, reference, adapted = Policy(base)(batch), policy(batch, reference=True), policy(batch)
    assert torch.equal(initial.chosen, reference.chosen) and torch.equal(initial.rejected, reference.rejected)
    assert (adapted.chosen - reference.chosen).abs().min() > 1e-3


def test_lora_init_is_the_seeds(tiny_model):
    pytest.importorskip("peft")
    first, again = (lora(tiny_model).state_dict() for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("targets, word", [(["lm_head"], "head"), (["no_such_layer"], "no_such_layer")])
def test_adapters_that_cannot_be_are_refused_by_name(tiny_model, targets, word):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=word):
        Policy(lora(tiny_model, targets=targets))


def test_dropout_is_off(tmp_path):
    """Dropout would make policy and reference differ at step 0."""
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelConfig(path=str(tmp_path)), torch.float32, seed=0)
    policy, batch = Policy(model).train(), collate(pairs())
    assert torch.equal(policy(batch).chosen, policy(batch).chosen)


def test_attention_dropout_is_off(tmp_path):
    """Llama-like models keep their attention dropout as a number in the config, not as a module."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelConfig(path=str(tmp_path)), torch.float32, seed=0)
    policy, batch = Policy(model).train(), collate(pairs())
    assert torch.equal(policy(batch).chosen, policy(batch).chosen)
