"""The policy's response log-probabilities and gradients against full logits, one unpadded row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import sage.model.loading
import sage.model.policy
from sage.config import LoraConfig, ModelConfig
from sage.data.packing import LAYOUTS, collate
from sage.data.tokens import Pair
from sage.model.loading import check_head, load_model
from sage.model.policy import Policy
from sage.model.probe import can_pack
from sage.util.errors import UserError

VOCAB = 97
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama_tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=False),
    "gemma2": transformers.Gemma2Config(
        **LLAMA,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=3.0,
        sliding_window=6,
        attn_implementation="eager",
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "cohere": transformers.CohereConfig(**LLAMA, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**LLAMA, logits_scaling=3.0, tie_word_embeddings=False),
}
each = pytest.mark.parametrize("name", CONFIGS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tiny(name: str, layout: str = "padded", **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    if name == "gemma2" and layout != "padded":
        config.sliding_window = 4096  # `can_pack` admits windows that are longer than any text
    for key, value in changes.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # larger than the init, so that soft caps and scales bite
        parameter.data.mul_(4.0) if parameter.ndim > 1 else None
    return model


def pairs(prefix: int = 0) -> list[Pair]:
    """Three pairs, whose prompts begin with the same `prefix` tokens."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=generator).tolist()

    common = ids(prefix)
    return [
        Pair(str(i), None, common + ids(p), ids(c), ids(r))
        for i, (p, c, r) in enumerate([(9, 7, 2), (3, 1, 12), (1, 5, 5)])
    ]


def naive(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


@each
@pytest.mark.parametrize("layout, prefix", [*((layout, 0) for layout in LAYOUTS), ("shared", 11)])
def test_log_probabilities_and_gradients(name, layout, prefix):
    """Protects the layouts (who sees whom, at which position; the last token of a shared prompt predicting both first
    tokens), padding, the shift by one, soft caps, logit scales, tied heads and learned positions."""
    model = tiny(name, layout)
    policy, rows = Policy(model), pairs(prefix)
    out = policy(collate(rows, layout, prefix))
    model.config._attn_implementation = policy.unpacked_attention
    expected = [
        torch.stack([naive(model, p.prompt_ids, r(p)) for p in rows])
        for r in (lambda p: p.chosen_ids, lambda p: p.rejected_ids)
    ]
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


@each_layout
def test_a_pair_does_not_depend_on_its_neighbours(layout):
    policy, rows = Policy(tiny("llama")), pairs()
    together = policy(collate(rows, layout))
    for i, row in enumerate(rows):
        alone = policy(collate([row], layout))
        assert abs(together.chosen[i] - alone.chosen[0]) < 1e-4
        assert abs(together.rejected[i] - alone.rejected[0]) < 1e-4


@each_layout
def test_long_and_short_prompts_in_one_row(layout):
    """Protects spans of very unequal length: a prompt of one token beside one of a thousand."""
    model = tiny("llama", max_position_embeddings=2048)
    ids = (torch.arange(1100) * 31 % VOCAB).tolist()
    rows = [
        Pair("long", None, ids[:1000], ids[5:30], ids[40:90]),
        Pair("short", None, ids[3:4], ids[7:8], ids[:60]),
    ]
    policy = Policy(model)
    with torch.no_grad():
        out = policy(collate(rows, layout))
        model.config._attn_implementation = policy.unpacked_attention
        for i, row in enumerate(rows):
            assert out.chosen[i] == pytest.approx(
                float(naive(model, row.prompt_ids, row.chosen_ids)), rel=1e-5
            )
            assert out.rejected[i] == pytest.approx(
                float(naive(model, row.prompt_ids, row.rejected_ids)), rel=1e-5
            )


def test_the_head_that_is_asked_for(monkeypatch):
    """`model.head` reaches the kernels, and Triton where it cannot run is refused in words."""
    used = []
    token_stats = sage.model.policy.token_stats
    monkeypatch.setattr(
        sage.model.policy, "token_stats", lambda *a, **k: used.append(k["backend"]) or token_stats(*a, **k)
    )
    Policy(tiny("llama"), "oracle")(collate(pairs(), "padded"))
    assert used == ["oracle"]
    for head in ("auto", "tiled", "oracle"):
        check_head(ModelConfig(path="", head=head), torch.device("cpu"))
    with pytest.raises(UserError, match="needs CUDA"):
        check_head(ModelConfig(path="", head="triton"), torch.device("cpu"))
    monkeypatch.setattr(sage.model.loading, "has_triton", lambda: False)
    with pytest.raises(UserError, match="Triton, which is not installed"):
        check_head(ModelConfig(path="", head="triton"), torch.device("cuda"))


def test_logit_statistics_against_autograd():
    """Protects D and U of the logit-level score: |d margin / d logits|^2 and the trace of logsumexp's Hessian."""
    model, rows = tiny("llama"), pairs()
    logps, stats = Policy(model)(collate(rows, "padded"), logit=True)
    assert torch.equal(logps.chosen, Policy(model)(collate(rows, "padded")).chosen)
    for i, row in enumerate(rows):
        squared_norm, traces = 0.0, []
        for response in (row.chosen_ids, row.rejected_ids):
            ids = torch.tensor([row.prompt_ids + response])
            logits = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].detach().requires_grad_()
            logp = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
            (slope,) = torch.autograd.grad(logp, logits)
            squared_norm += float(slope.square().sum())
            traces.append(
                float(sum(torch.diag(torch.func.hessian(lambda z: z.logsumexp(0))(z)).sum() for z in logits))
            )
        assert float(stats.squared_norm[i]) == pytest.approx(squared_norm, rel=1e-4)
        assert float(stats.chosen_uncertainty[i]) == pytest.approx(traces[0], rel=1e-4)
        assert float(stats.rejected_uncertainty[i]) == pytest.approx(traces[1], rel=1e-4)


@each
def test_who_can_pack(name):
    """Every model here packs, unless its attention looks less far back than a pair is long."""
    model = tiny(name)
    reason = can_pack(Policy(model), model, 20, torch.device("cpu"))
    assert (reason is None) == (name != "gemma2"), reason
    if name == "gemma2":
        assert "window of 6" in reason
        assert (
            can_pack(Policy(model), model, 6, torch.device("cpu")) is not None
        )  # the probe's own texts are longer


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.GptOssConfig(
            **LLAMA,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_cannot_pack_are_found_out(config):
    """Position by index, a recurrent state, attention sinks: each would be silently wrong in a packed row."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert can_pack(Policy(model), model, 20, torch.device("cpu"))


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
    batch = collate(pairs(), "shared")
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
    policy, batch = Policy(model).train(), collate(pairs(), "padded")
    assert torch.equal(policy(batch).chosen, policy(batch).chosen)


def test_attention_dropout_is_off(tmp_path):
    """Llama-like models keep their attention dropout as a number in the config, not as a module."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.5
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelConfig(path=str(tmp_path)), torch.float32, seed=0)
    policy, batch = Policy(model).train(), collate(pairs(), "padded")
    assert torch.equal(policy(batch).chosen, policy(batch).chosen)
