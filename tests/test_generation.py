"""generation=hf gives what transformers' own `generate` gives, sampling follows its distribution, and vLLM
gets the same requests."""

from __future__ import annotations

import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sage.answering.generation import HF, Source
from sage.answering.responses import Request, sample
from sage.answering.vllm import VLLM
from sage.config import ModelConfig, SamplingConfig
from sage.data.chat import ChatFormat, decode, encode_prompts
from sage.model import loading
from sage.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tiny_model) -> Source:
    return Source(str(tiny_model), ModelConfig(path=str(tiny_model), dtype="float32"), CPU, {1})


@pytest.fixture(scope="module")
def prompts(source) -> list[list[int]]:
    """Ids of eleven prompts of different lengths, two of them equal."""
    texts = [f"How many apples are {'left ' * (i % 5)}after {i} days?" for i in range(10)] + [
        "How many apples?"
    ] * 2
    return encode_prompts(loading.load_tokenizer(source.folder, source.model), texts, ChatFormat())


def run(source: Source, requests: list[Request], sampling: SamplingConfig, **options) -> list:
    with HF(**options).open(source, sampling) as generate:
        generate.prepare([request.prompt_ids for request in requests])
        responses = dict(generate(requests))
    return [responses[i] for i in range(len(requests))]


def naive(source: Source, ids: list[int], tokens: int) -> tuple[str, list[int], str]:
    """(text, ids, finish) of transformers' greedy `generate`, one prompt at a time."""
    tokenizer = loading.load_tokenizer(source.folder, source.model)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    made = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()  # pyright: ignore
    finish = "end" if made[-1] == tokenizer.eos_token_id else "length"
    return str(tokenizer.decode(made[:-1] if finish == "end" else made)), made, finish


@pytest.mark.parametrize(
    "options", [{"batch_size": 4}, {"batch_size": 16}, {"batch_size": 3, "prefill_tokens": 100}]
)
def test_greedy_responses_equal_plain_generate(source, prompts, options):
    """Refilled places, copied prompts and prefill waves change no response; rooms differ, so rows end at all
    times.
    """
    rooms = [3 + 5 * (i % 4) for i in range(len(prompts))]
    requests = [Request(ids, 0, room) for ids, room in zip(prompts, rooms, strict=True)]
    got = run(source, requests, SamplingConfig(temperature=0.0), **options)
    assert [tuple(r) for r in got] == [
        naive(source, ids, room) for ids, room in zip(prompts, rooms, strict=True)
    ]


def test_an_end_token_ends_a_response(source, prompts):
    """A model whose every token is an end token answers with an empty text, and its ids hold the one it
    sampled.
    """
    got = run(
        source._replace(ends=set(range(320))), [Request(ids, 0, 9) for ids in prompts], SamplingConfig()
    )
    assert {(r.text, len(r.ids), r.finish) for r in got} == {("", 1, "end")}


def test_special_tokens_that_end_nothing_stay_in_the_text(source):
    """Some tokenizers have <think> as a special token; without it, a text does not show its thought."""
    tokenizer = loading.load_tokenizer(source.folder, source.model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    text = "<think>She sells 3.</think>The answer is 12."
    assert decode(tokenizer, tokenizer(text)["input_ids"]) == text


def test_sampled_responses_equal_a_naive_loop_in_any_batch(source, prompts):
    """Each request draws from its own seed, whatever surrounds it: a forward over the whole text per token
    says what.
    """
    sampling = SamplingConfig(temperature=1.0, top_p=0.9)
    requests = [Request(ids, seed, 12) for seed, ids in enumerate(prompts)]
    tokenizer = loading.load_tokenizer(source.folder, source.model)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    expected = []
    for request in requests:
        uniforms = np.random.default_rng(request.seed).random(12)
        tokens: list[int] = []
        while len(tokens) < 12 and tokens[-1:] != [tokenizer.eos_token_id]:
            logits = model(torch.tensor([request.prompt_ids + tokens])).logits[:, -1]
            tokens += sample(logits, torch.tensor(uniforms[len(tokens) : len(tokens) + 1]), 1.0, 0.9).tolist()
        expected.append(tokens)
    for batch_size in (1, 2, 5):
        got = run(source, requests, sampling, batch_size=batch_size)
        assert [r.ids for r in got] == expected
    assert run(source, requests[::-1], sampling)[::-1] == got
    assert run(source, [r._replace(seed=r.seed + 99) for r in requests], sampling) != got


def test_stop_texts_end_a_response_and_are_cut_off(source, prompts):
    requests = [Request(ids, seed, 40) for seed, ids in enumerate(prompts)]
    plain = run(source, requests, SamplingConfig())
    stop = next(match[0] for r in plain if (match := re.search(r"(?<=.{4})[ -~]{2}", r.text)))
    for whole, stopped in zip(plain, run(source, requests, SamplingConfig(stop=[stop])), strict=True):
        assert stopped.text == whole.text.split(stop)[0]
        assert (stopped.finish == "stop") == (stop in whole.text)
        assert len(stopped.ids) < len(whole.ids) or stop not in whole.text
        assert stopped.ids == whole.ids[: len(stopped.ids)]


def test_a_prompt_that_fills_the_context_gets_no_response(source, prompts):
    long = [5] * 256
    first, second = run(
        source, [Request(long, 0, 9), Request(long[:250], 0, 9)], SamplingConfig(temperature=0.0)
    )
    assert first == ("", [], "no_room")
    assert len(second.ids) <= 6


def test_eager_attention_gives_the_same_responses(source, prompts):
    requests = [Request(ids, 3, 12) for ids in prompts]
    eager = source._replace(model=ModelConfig(path=source.folder, dtype="float32", attention="eager"))
    assert run(eager, requests, SamplingConfig()) == run(source, requests, SamplingConfig())


def test_sampling_follows_the_distribution():
    """Frequencies over an even grid of uniform numbers equal softmax probabilities, cut to the nucleus under
    top_p.
    """
    torch.manual_seed(0)
    logits, n = torch.randn(12), 20_000
    uniforms = (torch.arange(n) + 0.5) / n
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.3)):
        expected = (logits / temperature).softmax(0)
        ranked, order = expected.sort(descending=True)
        nucleus = [0.0] * 12
        mass = 0.0
        for p, token in zip(ranked.tolist(), order.tolist(), strict=True):
            if mass < top_p:
                nucleus[token] = p
                mass += p
        drawn = sample(logits.expand(n, -1), uniforms, temperature, top_p)
        counted = torch.bincount(drawn, minlength=12) / n
        assert torch.allclose(counted, torch.tensor(nucleus) / mass, atol=2e-4)
    wide = torch.zeros(50, 5000)  # a nucleus of more than the first few, and of all where masses tie
    wide[:, 4000:] = -1e-3
    drawn = sample(wide, (torch.arange(50) + 0.5) / 50, 1.0, 0.5)
    assert drawn.max() < 4000 and len(set(drawn.tolist())) == 50
    assert sample(logits[None], uniforms[:1], 0.0, 1.0).item() == logits.argmax()


# --- vLLM, played by a module of a few lines

FAKE = """
from types import SimpleNamespace as N
class SamplingParams:
    def __init__(self, **options): self.__dict__.update(options)
class LLM:
    def __init__(self, **options):
        self.llm_engine = N(model_config=N(max_model_len=20))
        assert options["tensor_parallel_size"] == 2 and options["gpu_memory_utilization"] == 0.5
    def generate(self, prompts, parameters, use_tqdm):
        outs = []
        for prompt, p in zip(prompts, parameters):
            assert (p.temperature, p.top_p, p.stop, p.stop_token_ids) == (0.5, 0.8, ["#"], [1])
            ids = [len(prompt["prompt_token_ids"]), 30 + p.seed, 40 + p.max_tokens]
            reason = {1: ("length", None), 2: ("stop", "#"), 4: ("stop", None)}[p.seed]
            ids += {1: [], 2: [4], 4: [1]}[p.seed]
            outs.append(N(outputs=[N(token_ids=tuple(ids), finish_reason=reason[0], stop_reason=reason[1])]))
        return outs
"""


def test_vllm_gets_the_same_requests_and_stop_rules(source, tmp_path, monkeypatch):
    """In its own process: ids, seeds, room and end tokens arrive; finish reasons come back in our words."""
    (tmp_path / "vllm.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    requests = [Request([4] * 5, 1, 9), Request([4] * 15, 2, 9), Request([4] * 20, 3, 9), Request([4], 4, 9)]
    sampling = SamplingConfig(temperature=0.5, top_p=0.8, stop=["#"])
    tokenizer = loading.load_tokenizer(source.folder, source.model)
    assert tokenizer.decode([4]) == "#"
    with VLLM(tensor_parallel=2, memory_fraction=0.5).open(source, sampling) as generate:
        generate.prepare([request.prompt_ids for request in requests])
        got = [response for _, response in sorted(generate(requests))]
    assert got == [
        (tokenizer.decode([5, 31, 49]), [5, 31, 49], "length"),
        (tokenizer.decode([15, 32, 45]), [15, 32, 45, 4], "stop"),
        ("", [], "no_room"),
        (tokenizer.decode([1, 34, 49]), [1, 34, 49, 1], "end"),
    ]
    assert not multiprocessing.active_children(), "vLLM's process holds GPU memory as long as it lives"


def test_each_rank_gives_vllm_gpus_of_its_own(monkeypatch):
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert VLLM().gpus(torch.device("cpu")) == []
    assert VLLM().gpus(cuda) == ["1"] and VLLM(tensor_parallel=2).gpus(cuda) == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    assert VLLM().gpus(cuda) == ["7"]
    with pytest.raises(UserError, match=r"generation.tensor_parallel=2.*has 3: lower it, or world_size"):
        VLLM(tensor_parallel=2).gpus(cuda)


@pytest.mark.skipif(
    "vllm" in sys.modules or any((Path(p) / "vllm").is_dir() for p in sys.path if p), reason="vLLM is here"
)
def test_vllm_refuses_an_adapter_instead_of_leaving_it_out(source):
    adapted = source._replace(model=replace(source.model, adapter_path="somewhere"))
    with (
        pytest.raises(UserError, match=r"takes no adapter \(model.adapter_path=somewhere\).*RUN_DIR/final"),
        VLLM().open(adapted, SamplingConfig()),
    ):
        pass


def test_vllm_that_is_not_installed_says_how_to_install_it(source):
    with (
        pytest.raises(UserError, match=r"pip install 'sage-align\[vllm\]'"),
        VLLM().open(source, SamplingConfig()),
    ):
        pass
