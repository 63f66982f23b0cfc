"""Generation is checked before the work: what the check accepts gives `model.generate`'s tokens, and faults
are found.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from sage.answering.agreement import Expected, find_decoder, probe_prompts
from sage.answering.decoders import PlainGenerate, RefilledBatch
from sage.answering.generation import HF, HFGenerator
from sage.answering.responses import Request, ResponseRow
from sage.config import SamplingConfig
from sage.util.errors import UserError

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LINEAR = {
    f"linear_{name}": size
    for name, size in zip(
        ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim"), (4, 2, 8, 8), strict=True
    )
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# name -> config class, its options, and the decoder that serves it
MODELS: dict[str, tuple[str, dict[str, Any], type]] = {
    "llama": ("LlamaConfig", SIZES, RefilledBatch),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 16}, RefilledBatch),
    "gemma2": ("Gemma2Config", {**SIZES, "sliding_window": 16}, RefilledBatch),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**SIZES, "sliding_window": 16},
            "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        },
        RefilledBatch,
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16, **ENDS}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256},
        RefilledBatch,
    ),
    "llama4": (
        "Llama4TextConfig",
        {**SIZES, "attention_chunk_size": 16, "intermediate_size_mlp": 64, "num_local_experts": 2},
        RefilledBatch,
    ),
    "phi3_longrope": (
        "Phi3Config",
        {**SIZES, "original_max_position_embeddings": 32}
        | {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}},
        PlainGenerate,
    ),
    "dynamic_ntk": (
        "LlamaConfig",
        {**SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        RefilledBatch,
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**SIZES, **MOE, **LINEAR, "layer_types": ["linear_attention", "full_attention"]},
        PlainGenerate,
    ),
    "lfm2": ("Lfm2Config", {**SIZES, "layer_types": ["conv", "full_attention"]}, PlainGenerate),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4, **ENDS},
        RefilledBatch,
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
        RefilledBatch,
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        PlainGenerate,
    ),
}


def build(name: str) -> Any:
    """A tiny model of random weights, large enough that a wrong mask or position changes its choices."""
    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.3:
                parameter.mul_(0.3 / parameter.std().clamp(min=1e-9))
    model.config.use_cache = False  # as training leaves it
    model.generation_config = transformers.GenerationConfig()  # plain generate below then has no end token
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 5, 5, 9, 12, 20)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def greedy(logits: torch.Tensor, rows: Any) -> None:
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.tokens.append(token)
        row.finish = "length" if len(row.tokens) == row.room else ""


def decoded(decoder: Any, ids: list[list[int]], rooms: list[int]) -> list[list[int]]:
    rows = [ResponseRow(i, prompt, room) for i, (prompt, room) in enumerate(zip(ids, rooms, strict=True))]
    return [row.tokens for row in sorted(decoder.decode(rows, greedy), key=lambda row: row.index)]


@pytest.mark.parametrize("name", MODELS)
def test_what_the_check_accepts_gives_the_tokens_of_plain_generate(name):
    """Six prompts in three places, past every window, chunk and original length; alone, each gives the same
    tokens.
    """
    model, ids = build(name), prompts()
    decoder, faults = find_decoder(model, ids, max_new_tokens=40, batch_size=3, prefill_tokens=30)
    assert type(decoder) is MODELS[name][2] and len(faults) == (type(decoder) is PlainGenerate)
    rooms = [40, 7, 30, 20, 38, 25]
    got = decoded(decoder, ids, rooms)
    for prompt, room, mine in zip(ids, rooms, got, strict=True):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=room, do_sample=False, use_cache=True)
        assert mine == plain[0, len(prompt) :].tolist()
    assert decoded(decoder, ids[:1], rooms[:1]) == got[:1]


def test_a_model_with_an_adapter_runs_in_a_refilled_batch(capsys):
    """Protects speed: peft's forward does not name positions, so its model did without them and failed."""
    import peft

    ids, config = prompts(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(build("llama"), config).eval()
    generator = HFGenerator(adapted, None, {2}, SamplingConfig(temperature=0.0, max_new_tokens=10), HF(3))
    generator.prepare(ids)
    assert isinstance(generator.decoder, RefilledBatch) and not capsys.readouterr().out
    for prompt, mine in zip(ids, decoded(generator.decoder, ids, [10] * len(ids)), strict=True):
        plain = adapted.generate(input_ids=torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
        assert mine == plain[0, len(prompt) :].tolist()


class IgnoresWindows(RefilledBatch):
    """Shows every row all of its past, whatever the model's masks say."""

    def step(self, slots, rows):
        visible = torch.arange(slots.end + 1) >= slots.end - torch.tensor([[len(row) - 1] for row in rows])
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None, None]
        forward = self.model.forward
        self.model.forward = lambda **options: forward(**{**options, "attention_mask": mask})
        try:
            return super().step(slots, rows)
        finally:
            self.model.forward = forward


class IgnoresPadding(RefilledBatch):
    def step(self, slots, rows):
        forward = self.model.forward
        self.model.forward = lambda **options: forward(**{**options, "attention_mask": None})
        try:
            return super().step(slots, rows)
        finally:
            self.model.forward = forward


class CountsFromOne(RefilledBatch):
    def step(self, slots, rows):
        forward = self.model.forward
        self.model.forward = lambda position_ids, **options: forward(position_ids=position_ids + 1, **options)
        try:
            return super().step(slots, rows)
        finally:
            self.model.forward = forward


class Raises(RefilledBatch):
    def step(self, slots, rows):
        raise IndexError


@pytest.mark.parametrize(
    "name, fault, said",
    [
        ("mistral", IgnoresWindows, "differ from those of model.generate by up to .* nats"),
        ("llama4", IgnoresWindows, "differ"),
        ("llama", IgnoresPadding, "differ"),
        ("llama", CountsFromOne, "differ"),
        ("llama", Raises, r"it fails \(IndexError\)"),
        ("phi3_longrope", RefilledBatch, "differ"),
        ("llama", RefilledBatch, None),
        ("llama", IgnoresWindows, None),  # a model without windows: the mask is right
    ],
)
def test_the_check_finds_faults(name, fault, said):
    """Faults that generation has had, each alone; and no false alarm."""
    model, ids = build(name), prompts()
    expected = Expected(PlainGenerate(model, 1), probe_prompts(model.config, ids, 60, 8), 8)
    found = expected.compare(fault(model, 3, 30))
    assert found is None if said is None else re.search(said, found or "")


def test_a_model_that_cannot_generate_is_refused_by_name():
    model = build("llama")

    def fails(*_, **__):
        raise NotImplementedError("no cache")

    model.forward = fails
    with pytest.raises(UserError, match=r"cannot run this llama.*NotImplementedError: no cache"):
        find_decoder(model, prompts(), 60, 3, 30)


@pytest.mark.parametrize("config", ["BertConfig", "RobertaConfig", "ElectraConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_refused(config, dtype):
    """Its outputs predict masked tokens, not the next one, so `sage eval` would measure noise and exit 0."""
    settings = getattr(transformers, config)(**SIZES)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    with pytest.raises(UserError, match="not a causal language model: changing the last token of a prompt"):
        find_decoder(model, prompts(), 60, 3, 30)


class Letters:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize("name", ["phi3_longrope", "dynamic_ntk", "gemma2"])
def test_a_response_does_not_depend_on_its_neighbours(name, capsys):
    """RoPE's frequencies may follow the longest row of a call, or of all calls so far. Responses must not."""
    model, ids = build(name), prompts()
    requests = [Request(prompt, seed, 40 - 5 * seed) for seed, prompt in enumerate(ids)]
    generator = HFGenerator(model, Letters(), {2}, SamplingConfig(max_new_tokens=40), HF(batch_size=3))
    generator.prepare(ids)
    said = capsys.readouterr().out
    together = dict(generator(requests))
    alone = {index: dict(generator([requests[index]]))[0] for index in reversed(range(len(requests)))}
    assert alone == together and max(len(response.ids) for response in alone.values()) == 40
    if name == "phi3_longrope":
        assert "generation=hf runs model.generate, equally long prompts together" in said
        assert said.count("\n") == 1
    else:
        assert not said


def test_the_check_runs_in_float32_and_leaves_every_tensor_as_it_was():
    """In 16 bits, rounding would hide a fault or be taken for one; RoPE's frequencies stay in float32
    throughout.
    """
    model = build("gemma2").to(torch.bfloat16)
    model.model.rotary_emb.to(torch.float32)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    decoder, faults = find_decoder(model, prompts(), 40, 3, 30)
    assert isinstance(decoder, RefilledBatch) and not faults
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
