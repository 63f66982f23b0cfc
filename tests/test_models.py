"""Models of many kinds: sage computes what their own code computes, or refuses them by name.

`scripts/model_table.py` asks all of transformers; here are the kinds that differ in what they need.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from typing import Any

import pytest
import torch
import transformers
from conftest import REPO

from sage.data.packing import collate
from sage.model import kernels, sample, selfcheck
from sage.model.policy import OWN, Policy
from sage.model.selfcheck import check_unwrapped, settle
from sage.model.sequence import SequenceGroup
from sage.util.errors import UserError

spec = importlib.util.spec_from_file_location("model_table", REPO / "scripts" / "model_table.py")
assert spec and spec.loader
table = importlib.util.module_from_spec(spec)
sys.modules["model_table"] = table
spec.loader.exec_module(table)

# Type -> how sage trains its tiny form. Windows are shorter than the texts; heads scale and cap their logits.
WAYS = {
    "llama": "packed",
    "qwen2": "packed",
    "qwen3": "packed",
    "qwen3_moe": "packed",
    "qwen3_next": "padded",
    "gemma2": "packed",
    "gemma3": "packed, own logits",
    "gemma3_text": "packed",
    "gemma3n_text": "packed",
    "gemma4": "packed",
    "gemma4_text": "packed",
    "phi3": "packed",
    "phimoe": "packed",  # a jitter that it computes with outside of training, too
    "mistral": "packed",
    "mixtral": "packed",
    "gpt_oss": "padded",
    "granite": "packed",
    "granitemoe": "packed",
    "hyperclovax": "packed, own logits",
    "nemotron": "padded",
    "falcon_h1": "padded, own logits",
    "lfm2": "padded",
    "llama4_text": "padded, own logits",
    "olmo2": "packed",
    "olmo3": "packed",
    "deepseek_v3": "packed",
    "glm4": "packed",
    "mamba": "padded",
    "mpt": "padded",
    "bloom": "padded",
    "gpt_neo": "padded",
    "minimax": "padded",
    "modernbert-decoder": "packed, own logits",
    "bart": "padded",
    "cpmant": "refused",
    "rwkv": "refused",  # its forward changes its weights
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WAYS)
def test_models_match_their_own_code(model_type, monkeypatch):
    """Protects against training something else: log-probabilities within 1e-5 per token, and gradients."""
    monkeypatch.setattr(table, "TOLERANCE", 1e-5)
    verdict = table.examine(table.tiny_model(table.tiny_config(model_type)), model_type)
    assert not verdict.wrong, verdict
    assert verdict.way == WAYS[model_type], verdict
    assert (verdict.note == "") == (verdict.way == "packed")  # every fallback and refusal is said


ENCODERS = {"bert": {"is_decoder": False}, "xlnet": {}}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_models_that_see_later_tokens_are_refused(model_type):
    """Protects from training on log-probabilities that were given the answer: sage would agree with them."""
    config = table.tiny_config(model_type)
    config.update(ENCODERS[model_type])
    verdict = table.examine(table.tiny_model(config), model_type)
    assert verdict.way == "refused" and "not a causal language model" in verdict.note


LLAMA = {
    "vocab_size": table.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ORIGINAL = 40  # tokens beyond which frequencies change
ROPES = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "longrope": transformers.Phi3Config(
        **LLAMA,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "dynamic": transformers.LlamaConfig(
        **{**LLAMA, "max_position_embeddings": ORIGINAL},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}


@pytest.mark.parametrize("packing", ["auto", "padded"])
@pytest.mark.parametrize("name", ROPES)
def test_a_pairs_margin_among_ten_sets_of_neighbours(name, packing):
    """Protects the reference: the same pair has the same margin beside long and short texts, with and without
    gradients, before and after a call on other texts."""
    config = copy.deepcopy(ROPES[name])
    policy, pairs = Policy(table.tiny_model(config)), table.some_pairs()
    layout = settle(table.Asked(policy), [pairs], packing, name)
    assert layout == ("padded" if packing == "padded" else "shared" if name == "llama" else "unshared")
    rows = [pairs[i] for i in range(len(pairs))]
    oracle = table.tiny_model(copy.deepcopy(ROPES[name]))  # its own, with no memory of other texts
    for member in (0, 1, 3):  # short, beyond the original length in one response, and in both
        with torch.no_grad():
            truth = [
                float(table.naive(copy.deepcopy(oracle), text)) for text in table.texts_of([rows[member]])
            ]
        margins = []
        for k in range(10):
            generator = torch.Generator().manual_seed(k)
            others = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist() if i != member]
            batch = collate([*others[: k % 5], rows[member]], layout)
            with torch.set_grad_enabled(k % 2 == 0):
                out = policy(batch)
            margins.append((out.chosen[-1] - out.rejected[-1]).item())
        assert max(margins) - min(margins) < 1e-3
        assert margins[0] == pytest.approx(truth[0] - truth[1], abs=1e-3)


def test_texts_that_share_a_prompt_cannot_differ_in_frequencies():
    policy = Policy(table.tiny_model(copy.deepcopy(ROPES["longrope"])))
    with pytest.raises(UserError, match=r"data.packing=shared.*depend on a text's length"):
        settle(table.Asked(policy), [table.some_pairs()], "shared", "longrope")
    policy, short = Policy(table.tiny_model(copy.deepcopy(ROPES["longrope"]))), table.some_pairs()
    short = type(short)(short.data.select([0]), {}, "")  # all texts below the original length
    assert settle(table.Asked(policy), [short], "shared", "longrope") == "shared"


def policy_of(model_type: str, **changes) -> Policy:
    config = table.tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    return Policy(table.tiny_model(config))


def test_a_head_that_disagrees_gives_way(capsys):
    """Protects models that transform their logits in a way that sage's head does not know, here by a wrong
    scale."""
    policy = policy_of("llama")
    assert policy.head
    policy.head.scale = 1.01
    assert settle(table.Asked(policy), [table.some_pairs()], "auto", "llama") == "shared"
    assert policy.backend == OWN
    said = capsys.readouterr().out
    assert (
        "log-probabilities come from the model's own logits" in said
        and "since model.head=tiled disagrees" in said
    )


def test_a_model_that_agrees_with_nothing_is_refused_by_name(monkeypatch):
    policy = policy_of("llama")
    monkeypatch.setattr(policy, "use_attention", lambda _: (_ for _ in ()).throw(RuntimeError()))
    with pytest.raises(UserError, match=r"model.path=somebody/model: its own code fails.*RuntimeError"):
        settle(table.Asked(policy), [table.some_pairs()], "auto", "somebody/model")
    policy = policy_of("llama")
    ask = policy.ask

    def wrong(*a):
        stats: Any = ask(*a)[0]
        return stats._replace(logps=stats.logps + 0.01), None

    monkeypatch.setattr(policy, "ask", wrong)
    with pytest.raises(
        UserError, match=r"somebody/model: sage cannot compute what .* changes a token's log-prob"
    ):
        settle(table.Asked(policy), [table.some_pairs()], "auto", "somebody/model")


def test_weights_that_are_not_finite_are_recognised():
    policy = policy_of("llama")
    policy.model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(UserError, match="its own logits are not finite"):
        settle(table.Asked(policy), [table.some_pairs()], "auto", "x")


@pytest.mark.parametrize("model_type", ["gpt_oss", "mamba", "bloom"])
def test_models_that_pad_are_refused(model_type):
    """Padded rows are never cut, and a recurrent model would miss what came before the cut."""
    policy = policy_of(model_type)
    policy.group = SequenceGroup(2)
    with pytest.raises(UserError, match=r"engine.sequence_parallel=2 needs packed attention.* not support: "):
        settle(table.Asked(policy), [table.some_pairs()], "auto", model_type)


def test_frequencies_that_depend_on_a_texts_length_are_refused():
    policy = Policy(table.tiny_model(copy.deepcopy(ROPES["longrope"])), group=SequenceGroup(2))
    with pytest.raises(UserError, match=r"engine.sequence_parallel=2 does not work with .*frequencies"):
        settle(table.Asked(policy), [table.some_pairs()], "auto", "longrope")


@pytest.mark.parametrize("model_type", ["minimax", "mamba", "qwen3_next", "bloom"])
def test_leaks_show_in_small_weights(model_type, monkeypatch):
    """A model at its usual init, whose logits hardly depend on the text: wrong packing must not pass for
    rounding."""
    monkeypatch.setattr(table, "SCALE", 0.02)
    policy = policy_of(model_type)
    assert settle(table.Asked(policy), [table.some_pairs()], "auto", model_type) == "padded"


@pytest.mark.parametrize("model_type", ["minimax", "mamba2", "falcon_h1"])
def test_leaks_show_in_bfloat16(model_type, monkeypatch):
    """Protects models in bfloat16, whose rounding hides what packing changes: they are asked in float32
    first, and keep their weights."""
    monkeypatch.setattr(table, "SCALE", 0.06)
    model = table.tiny_model(table.tiny_config(model_type)).to(torch.bfloat16)
    policy, sets = Policy(model), [table.some_pairs()]
    before = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}
    known = check_unwrapped(policy, torch.device("cpu"), sets, "auto", model_type)
    assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == before
    assert policy.dtype == torch.bfloat16
    assert settle(table.Asked(policy), sets, "auto", model_type, known) == "padded"


def test_without_memory_for_float32_the_own_dtype_decides(monkeypatch, capsys):
    policy, sets = Policy(policy_of("llama").model.to(torch.bfloat16)), [table.some_pairs()]
    monkeypatch.setattr(selfcheck, "free_memory", lambda _: 0)
    assert check_unwrapped(policy, torch.device("cpu"), sets, "auto", "x") == {}
    assert "the self-check runs in bfloat16 only" in capsys.readouterr().out


def test_what_begins_in_long_texts_only():
    """Protects long texts: this model attends to 8 blocks of 8 tokens, so texts of 48 tokens may pack and
    longer ones may not."""
    config = table.tiny_config("minimax_m3_vl_text")
    config.layer_types, config.index_block_size, config.index_topk_blocks = ["minimax_m3_sparse"] * 2, 8, 8
    policy = Policy(table.tiny_model(config))
    assert settle(table.Asked(policy), [table.some_pairs()], "auto", "x") == "padded"
    policy, short = Policy(table.tiny_model(config)), table.some_pairs()
    short = type(short)(short.data.select([0]), {}, "")
    assert settle(table.Asked(policy), [short], "auto", "x") == "shared"


def test_training_mode_that_computes_something_else_is_refused():
    policy = policy_of("llama")
    policy.trains = True
    policy.model.model.norm.register_forward_hook(lambda m, _, out: out * 1.01 if m.training else out)
    with pytest.raises(UserError, match=r"in training mode.*gradient_checkpointing=false"):
        settle(table.Asked(policy), [table.some_pairs()], "auto", "x")


class Broken(torch.autograd.Function):
    """The identity, whose gradient is NaN or fails."""

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.fails:
            raise RuntimeError("no such derivative")
        return gradients[0] * torch.nan, None


def chosen(policy: Policy) -> str:
    """The layout that a run would choose."""
    cpu, pairs = torch.device("cpu"), [table.some_pairs()]
    return settle(table.Asked(policy), pairs, "auto", "x", check_unwrapped(policy, cpu, pairs, "auto", "x"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fails, reason", [(True, r"its backward pass fails \(RuntimeError: no such der"), (False, "not finite")]
)
def test_gradients_that_fail_are_found_before_training(capsys, fails, reason, dtype):
    """Protects against a run that dies, or is refused every step, after all its preparation."""
    policy = policy_of("llama").to(dtype)
    policy.model.model.norm.register_forward_hook(lambda m, _, out: Broken.apply(out, fails))
    with pytest.raises(UserError, match=rf"model.path=x: sage cannot compute.*with padded rows.*{reason}"):
        chosen(policy)
    assert chosen(policy.requires_grad_(False)) == "shared"  # as in `sage score-dataset`

    policy = policy_of("llama").to(dtype)
    policy.model.model.norm.register_forward_hook(
        lambda m, _, out: Broken.apply(out, fails) if policy.in_use == "sage_packed" else out
    )
    capsys.readouterr()
    assert chosen(policy) == "padded"
    assert "cannot pack" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_gradients_that_fail_in_checkpointed_layers():
    policy = policy_of("llama")
    policy.trains = True
    policy.model.model.norm.register_forward_hook(
        lambda m, _, out: Broken.apply(out, True) if m.training else out
    )
    with pytest.raises(UserError, match=r"perhaps it can with model.gradient_checkpointing=false"):
        chosen(policy)
    policy.trains = False
    assert chosen(policy) == "shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_changes_its_own_weights_is_refused(dtype):
    """Protects exports: RWKV divides weights in its first forward, and would divide an export's again."""
    policy = policy_of("rwkv")
    policy.model.to(dtype)
    with pytest.raises(UserError, match=r"model.path=x: its own code changes weights.*blocks.1.attention"):
        check_unwrapped(policy, torch.device("cpu"), [table.some_pairs()], "auto", "x")


@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_the_models_dropout_stays_off_after_the_check(packing):
    """Protects a run whose reference is cached: nothing asks without gradients between check and training."""
    policy, pairs = policy_of("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3), table.some_pairs()
    policy.trains = True
    layout = settle(table.Asked(policy), [pairs], packing, "gpt2")
    batch = collate([pairs[0], pairs[1]], layout)
    first, second = policy(batch), policy(batch)
    assert policy.model.training
    assert torch.equal(first.chosen, second.chosen)
    with torch.no_grad():
        assert torch.allclose(first.chosen, policy(batch).chosen, atol=1e-4)


def test_rank_0_decides(monkeypatch):
    """Protects the other ranks from a layout of their own, which would hang all."""
    policy = policy_of("llama")

    def layout() -> bool:
        return policy.model.config._attn_implementation == "sage_packed"

    def gather(value):
        return ["rank 0 has seen something" if value is None and layout() else value, value]

    monkeypatch.setattr("sage.util.ranks.gather", gather)
    assert settle(table.Asked(policy), [table.some_pairs()], "auto", "x") == "padded"


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-3), (torch.bfloat16, 1.0)], ids=str)
def test_limits(dtype, most):
    """What counts as rounding grows with what the text does to the model, between rounding itself and a
    ceiling."""
    small, large = sample.limits(dtype, 0.0), sample.limits(dtype, 100.0)
    assert 0 < small.mean <= small.most < large.most == most


def off_in_logps(stats):
    return stats._replace(logps=stats.logps + 0.01)


def off_in_squares(stats):
    return stats._replace(sum_sq_probs=stats.sum_sq_probs * 1.1)


def off_in_gradients(stats):
    return stats._replace(logps=1.2 * stats.logps - 0.2 * stats.logps.detach())


def broken(stats):
    raise RuntimeError("no compiler\nin this place")


@pytest.mark.parametrize(
    "fault, reason",
    [
        (off_in_logps, "its logps differ from the tiled head's by 0.01"),
        (off_in_squares, "its sum_sq_probs differ"),
        (off_in_gradients, "its gradient of the hidden states is off by 0.2 of its size"),
        (broken, "it fails (RuntimeError: no compiler)"),
        (None, ""),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
)
def test_a_fast_kernel_is_compared_with_tiled(monkeypatch, capsys, fault, reason):
    """Protects bfloat16 runs on CUDA, where auto takes a kernel that was compiled a moment ago.

    Such faults are smaller than the rounding of the model, so its own logits do not show them.
    """
    calls = []

    def kernel(*args, **options):
        calls.append(options)
        stats = kernels.tiled.token_stats(*args, **options)
        return fault(stats) if fault and (stats.sum_sq_probs is not None or fault is broken) else stats

    monkeypatch.setitem(kernels.BACKENDS, "triton", kernel)
    policy = Policy(table.tiny_model(table.tiny_config("llama")).bfloat16())
    with torch.no_grad():
        policy(collate([table.some_pairs()[0]], "padded"))
    assert not calls  # without the self-check, auto means tiled

    monkeypatch.setattr(selfcheck, "choose_backend", lambda device, dtype: "triton")
    settle(table.Asked(policy), [table.some_pairs()], "auto", "llama")
    said = " ".join(capsys.readouterr().out.split())
    assert calls
    if fault is None:
        assert policy.backend == "triton" and not said
    else:
        assert policy.backend == "tiled"
        assert said.count("disagrees") == 1
        assert said.startswith(
            "log-probabilities come from the tiled head, since model.head=triton disagrees: "
        )
        assert reason in said
