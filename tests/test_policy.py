"""The policy's response log-probabilities and gradients against full logits, one unpadded row at a time."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import transformers

import sage.model.head
import sage.model.loading
from sage.config import LoraConfig, ModelConfig
from sage.data.packing import LAYOUTS, MicroBatch, collate
from sage.data.tokens import Pair
from sage.model.loading import check_head, load_model, load_tokenizer, router_coefficient
from sage.model.policy import OWN, Policy
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
    "mixtral": transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
}
each = pytest.mark.parametrize("name", CONFIGS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tiny(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
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
    """Protects the layouts (who sees whom, at which position; the last token of a shared prompt predicting
    both first tokens), padding, the shift by one, soft caps, logit scales,
    tied heads and learned positions."""
    model = tiny(name)
    policy, rows = Policy(model), pairs(prefix)
    out = policy(collate(rows, layout, prefix))
    policy.use_attention(policy.attention)
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
@pytest.mark.parametrize("name", ["llama", "gemma2", "lora"])
def test_texts_of_several_pairs_are_computed_once(name, layout, tiny_model):
    """Protects sets with several pairs per problem: log-probabilities, statistics and gradients are those of
    the pairs one by one, with responses that stand in several pairs, on either side, or to two prompts."""
    policy = Policy(lora(tiny_model) if name == "lora" else tiny(name))
    for weight_name, parameter in policy.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(parameter, std=0.1)
    first, second, third = pairs(11)
    rows = [
        first,
        second,
        first._replace(chosen_ids=second.chosen_ids),
        third._replace(rejected_ids=first.chosen_ids),
        first._replace(chosen_ids=first.rejected_ids, rejected_ids=first.chosen_ids),
        second._replace(prompt_ids=first.prompt_ids),
        first,
    ]
    batch = collate(rows, layout, 11 if layout == "shared" else 0)
    assert len(batch.response_tokens) == 8
    parameters = [p for p in policy.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 2, len(rows))

    def ask(batch: MicroBatch, weights: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        logps, stats = policy(batch, logit=True)
        loss = (weights * (logps.chosen - 2 * logps.rejected)).sum()
        gradients = torch.autograd.grad(loss, parameters)
        return [x.detach() for x in (*logps, *stats)], list(gradients)

    values, gradients = ask(batch, weights)
    alone = [ask(collate([row], "padded"), weights[i : i + 1]) for i, row in enumerate(rows)]
    for ours, theirs in zip(values, zip(*(v for v, _ in alone), strict=True), strict=True):
        theirs = torch.cat(theirs)
        assert ((ours - theirs).abs() <= 1e-5 * theirs.abs().clamp_min(1)).all()
    for ours, theirs in zip(gradients, zip(*(g for _, g in alone), strict=True), strict=True):
        theirs = torch.stack(theirs).sum(0)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-6


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
        policy.use_attention(policy.attention)
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
    token_stats = sage.model.head.token_stats
    monkeypatch.setattr(
        sage.model.head, "token_stats", lambda *a, **k: used.append(k["backend"]) or token_stats(*a, **k)
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
    """Protects D and U of the logit-level score: |d margin / d logits|^2 and the trace of logsumexp's
    Hessian."""
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


def test_an_adapter_on_a_tied_embedding_is_refused(tiny_model):
    """Protects exports: merging it would change the head, which the adapter left alone in training."""
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="tied to its embedding"):
        Policy(lora(tiny_model, targets=["q_proj", "embed_tokens"]))


def test_an_adapter_that_repeats_layers_is_refused(tiny_model, tmp_path):
    """Protects the end of a run: transformers cannot save layers that share their weights."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "layer_replication": [[0, 2], [1, 2]]}
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    cfg = ModelConfig(path=str(tiny_model), lora=LoraConfig(), adapter_path=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="layer_replication"):
        load_model(str(tiny_model), cfg, torch.float32, seed=0)


OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
# Each keeps its dropout in another place: modules, numbers in modules, numbers in the config; and a
# router's jitter.
RANDOM = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        attn_pdrop=0.5,
    ),
    "llama": transformers.LlamaConfig(**LLAMA, attention_dropout=0.5),
    "opt": transformers.OPTConfig(**OPT, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
    "falcon": transformers.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.5,
        attention_dropout=0.5,
    ),
    "mixtral": transformers.MixtralConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5, attention_dropout=0.5
    ),
}


def saved(folder, config) -> str:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", RANDOM)
def test_training_mode_is_deterministic(tmp_path, name):
    """Dropout would make policy and reference differ at step 0."""
    folder = saved(tmp_path, RANDOM[name])
    cfg = ModelConfig(path=folder, gradient_checkpointing=True)
    policy, batch = Policy(load_model(folder, cfg, torch.float32, seed=0)), collate(pairs(), "padded")
    first, again = policy(batch).chosen, policy(batch).chosen
    assert policy.model.training
    modes: list[bool] = []
    policy.causal.base_model.register_forward_hook(lambda module, _args, _out: modes.append(module.training))
    with torch.no_grad():
        asked = policy(batch).chosen
    assert modes == [False] and policy.model.training  # a backward may still compute layers again
    assert torch.equal(first, again) and (first - asked).abs().max() < 1e-4


def test_a_question_between_forward_and_backward_changes_no_gradient(tiny_model):
    """Layers that the backward computes again must find the mode of their forward, although the reference
    was asked in between."""
    pytest.importorskip("peft")
    cfg = ModelConfig(path=str(tiny_model), gradient_checkpointing=True, lora=LoraConfig(dropout=0.5))
    policy, batch = (
        Policy(load_model(str(tiny_model), cfg, torch.float32, seed=0)),
        collate(pairs(), "shared"),
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    gradients = []
    for ask in (False, True):
        torch.manual_seed(0)
        out = policy(batch)
        if ask:
            with torch.no_grad():
                policy(batch, reference=True)
        policy.zero_grad()
        out.chosen.sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout, backend", [("padded", "auto"), ("padded", OWN), ("unshared", "auto")])
def test_the_routers_loss_is_the_models_own(layout, backend):
    """Protects the load-balancing loss of a mixture of experts and its gradient,
    in padded and packed rows."""
    model = tiny("mixtral")
    rows = pairs() if layout == "padded" else [pairs()[2]]  # equal lengths: no row has padding
    policy, batch = Policy(model, backend, router_coefficient=0.5), collate(rows, layout)
    logps, ours = policy(batch, router=True)
    ours = 2 * ours
    assert torch.allclose(logps.chosen, policy(batch).chosen)
    own = collate(rows, "padded")
    policy.use_attention(policy.attention)
    theirs = model(own.input_ids, attention_mask=own.attention_mask, output_router_logits=True).aux_loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5) and ours > 1
    gate = [p for n, p in model.named_parameters() if "gate.weight" in n]
    for a, b in zip(torch.autograd.grad(ours, gate), torch.autograd.grad(theirs, gate), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7) and a.abs().max() > 0


def test_the_routers_coefficient():
    """Ours, else the model's own where its config asks for the loss. A model without
    routers cannot have one."""
    model, dense = tiny("mixtral", router_aux_loss_coef=0.02), tiny("llama")
    assert router_coefficient(ModelConfig(path=""), model) == 0
    model.config.output_router_logits = True
    assert router_coefficient(ModelConfig(path=""), model) == 0.02
    assert router_coefficient(ModelConfig(path="", router_aux_coef=0.0), model) == 0
    assert router_coefficient(ModelConfig(path="", router_aux_coef=0.3), model) == 0.3
    assert router_coefficient(ModelConfig(path=""), dense) == 0
    with pytest.raises(UserError, match="has no routers"):
        router_coefficient(ModelConfig(path="", router_aux_coef=0.3), dense)


def bytes_saved(policy: Policy) -> int:
    """Bytes that autograd keeps of one forward for its backward, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = policy(collate(pairs(), "padded"))
    (out.chosen - out.rejected).sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "opt", "lora"])
def test_gradient_checkpointing_saves_memory(tmp_path, name):
    """Layers checkpoint only in training mode: what they compute inside is not kept, and
    gradients stay the same."""
    size = {"num_hidden_layers": 8}
    config = (
        transformers.OPTConfig(**{**OPT, **size})
        if name == "opt"
        else transformers.LlamaConfig(**{**LLAMA, **size})
    )
    folder, lora_config = saved(tmp_path, config), None
    if name == "lora":
        pytest.importorskip("peft")
        lora_config = LoraConfig(r=4)
    sizes, gradients = {}, {}
    for checkpointing in (False, True):
        cfg = ModelConfig(path=folder, gradient_checkpointing=checkpointing, lora=lora_config)
        policy = Policy(load_model(folder, cfg, torch.float32, seed=0))
        sizes[checkpointing] = bytes_saved(policy)
        gradients[checkpointing] = [p.grad for p in policy.parameters() if p.grad is not None]
    assert sizes[True] < sizes[False] / 4, sizes
    assert gradients[True]
    for ours, theirs in zip(gradients[True], gradients[False], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_adapters_dropout_lives_in_training_alone(tiny_model):
    """The user asked for it. Reference passes and scores are without it."""
    pytest.importorskip("peft")
    policy, batch = Policy(lora(tiny_model, dropout=0.5)), collate(pairs(), "shared")
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(policy(batch).chosen, policy(batch).chosen)
    with torch.no_grad():
        assert torch.equal(policy(batch).chosen, policy(batch).chosen)
    assert torch.equal(policy(batch, reference=True).chosen, policy(batch, reference=True).chosen)


def without(folder, *words: str, rename: str = "") -> None:
    """Remove the weights whose names hold one of the words, or rename the first."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not any(word in k for word in words)}
    if rename:
        kept[rename] = kept.pop(next(iter(kept)))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_there_are_refused_by_name(tmp_path):
    """Random weights in place of a head or a layer would be trained with exit 0.
    A tied head is not missing."""
    untied = tmp_path / "untied"
    saved(untied, transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False))
    shutil.copytree(untied, tmp_path / "renamed")
    shutil.copytree(untied, tmp_path / "reshaped")
    without(untied, "lm_head", "layers.1.")
    cfg = ModelConfig(path=str(untied))
    with pytest.raises(
        UserError, match=r"10 weights are missing.*lm_head.*layers\.1.* and 2 more.*allow_missing"
    ):
        load_model(str(untied), cfg, torch.float32, seed=0)
    cfg.allow_missing = True
    first, again = (load_model(str(untied), cfg, torch.float32, seed) for seed in (0, 1))
    # The reference is loaded again, and its cached log-probabilities serve runs with other seeds.
    assert all(map(torch.equal, first.parameters(), again.parameters()))

    without(tmp_path / "renamed", rename="somebody.elses.weight")
    with pytest.raises(UserError, match=r"somebody.elses.weight"):
        load_model(str(tmp_path / "renamed"), ModelConfig(path=""), torch.float32, seed=0)

    config = transformers.AutoConfig.from_pretrained(tmp_path / "reshaped")
    config.intermediate_size = 40
    config.save_pretrained(tmp_path / "reshaped")
    with pytest.raises(UserError, match=r"6 weights are of another shape.*down_proj"):
        load_model(str(tmp_path / "reshaped"), ModelConfig(path=""), torch.float32, seed=0)

    saved(tmp_path / "tied", transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True))
    load_model(str(tmp_path / "tied"), ModelConfig(path=""), torch.float32, seed=0)


def test_broken_files_are_one_message(tmp_path):
    folder = saved(tmp_path, transformers.LlamaConfig(**LLAMA))
    with pytest.raises(UserError, match="the folder has no tokenizer"):
        load_tokenizer(folder, ModelConfig(path=folder))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_model(folder, ModelConfig(path=folder), torch.float32, seed=0)


def test_attention_that_a_model_refuses_falls_back(tmp_path, capsys, monkeypatch):
    """`model.attention=auto` takes sdpa where the model supports it; transformers' refusal becomes a line."""
    folder = saved(tmp_path, transformers.LlamaConfig(**LLAMA))
    model = load_model(folder, ModelConfig(path=folder), torch.float32, seed=0)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_sdpa", False)
    monkeypatch.setattr(transformers.LlamaModel, "_supports_sdpa", False)
    model = load_model(folder, ModelConfig(path=folder), torch.float32, seed=0)
    assert model.config._attn_implementation == "eager"
    assert "attention is eager, since transformers refuses sdpa" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"sdpa|scaled_dot_product_attention"):
        load_model(folder, ModelConfig(path=folder, attention="sdpa"), torch.float32, seed=0)
