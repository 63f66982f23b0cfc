"""Responses from vLLM, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from sage.answering.generation import Generator, Request, Response, Source, cut, end_tokens
from sage.config import SamplingConfig
from sage.model import loading
from sage.util.errors import UserError


@dataclass
class VLLM:
    """vLLM in a process of its own, whose GPU memory is free again when it ends.

    tensor_parallel: GPUs that share one copy of the model.
    memory_fraction: share of each GPU's memory that vLLM may take.
    chunk: responses between two saves of a command's progress.
    """

    tensor_parallel: int = 1
    memory_fraction: float = 0.9
    chunk: int = 2048

    @contextmanager
    def open(self, source: Source, sampling: SamplingConfig) -> Iterator[Generator]:
        if find_spec("vllm") is None:
            raise UserError(
                "generation=vllm needs vLLM and a GPU that it supports: pip install 'sage-align[vllm]', or use generation=hf"
            )
        tokenizer = loading.load_tokenizer(source.folder, source.model)
        options = {
            "model": source.folder,
            "dtype": source.model.dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.memory_fraction,
            "trust_remote_code": source.model.trust_remote_code,
        }
        ends = sorted(end_tokens(source.folder, tokenizer))
        # Spawned, because CUDA cannot be used in a fork.
        with ProcessPoolExecutor(1, get_context("spawn"), vllm_start, (options,)) as process:

            def generate(requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
                yield from enumerate(process.submit(vllm_generate, list(requests), sampling, ends).result())

            yield generate


def vllm_start(options: dict[str, Any]) -> None:
    global llm
    import vllm

    llm = vllm.LLM(**options)  # pyright: ignore[reportAttributeAccessIssue]


def vllm_generate(requests: list[Request], sampling: SamplingConfig, ends: list[int]) -> list[Response]:
    """Runs in vLLM's process. Stop texts are cut here, as for the other engine."""
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    context = llm.llm_engine.model_config.max_model_len  # pyright: ignore[reportUndefinedVariable]
    responses = [Response("", 0, "no_room")] * len(requests)
    fitting = [index for index, request in enumerate(requests) if len(request.prompt_ids) < context]
    prompts = [{"prompt_token_ids": requests[index].prompt_ids} for index in fitting]
    parameters = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=min(requests[index].max_new_tokens, context - len(requests[index].prompt_ids)),
            seed=requests[index].seed,
            stop=list(sampling.stop),
            stop_token_ids=ends,
        )
        for index in fitting
    ]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)  # pyright: ignore[reportUndefinedVariable]
    for index, output in zip(fitting, outputs, strict=True):
        made = output.outputs[0]
        finish = "length" if made.finish_reason == "length" else "end"
        if isinstance(made.stop_reason, str):
            finish = "stop"
        responses[index] = Response(cut(made.text, sampling.stop), len(made.token_ids), finish)
    return responses
