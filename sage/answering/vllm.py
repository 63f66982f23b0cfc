"""Responses from vLLM, in a process of its own: the `generation=vllm` option."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch

from sage.answering.generation import Backend, Source
from sage.answering.responses import NO_ROOM, Request, Response, response_of
from sage.config import SamplingConfig, key
from sage.model import loading
from sage.util import ranks
from sage.util.errors import UserError


@dataclass
class VLLM(Backend):
    """vLLM in a process of its own, whose GPU memory is free again when it ends."""

    tensor_parallel: int = key(1, "GPUs that share one copy of the model", low=1)
    memory_fraction: float = key(0.9, "share of each GPU's memory that vLLM may take", above=0, high=1)
    chunk: int = key(2048, "responses between two saves of a command's progress", low=1)

    @contextmanager
    def open(self, source: Source, sampling: SamplingConfig) -> Iterator[VLLMGenerator]:
        if source.model.adapter_path is not None:
            raise UserError(
                f"generation=vllm takes no adapter (model.adapter_path={source.model.adapter_path}): give "
                "model.path a folder with the adapter merged, such as RUN_DIR/final, or use generation=hf"
            )
        if find_spec("vllm") is None:
            raise UserError(
                "generation=vllm needs vLLM and a GPU that it supports: pip install 'sage-align[vllm]', "
                "or use generation=hf"
            )
        tokenizer = loading.load_tokenizer(source.folder, source.model)
        options = {
            "model": source.folder,
            "dtype": str(loading.compute_dtype(source.model, source.device)).removeprefix("torch."),
            "tensor_parallel_size": self.tensor_parallel,
            "gpu_memory_utilization": self.memory_fraction,
            "load_format": "safetensors",  # never pickled weights
            "trust_remote_code": source.model.trust_remote_code,
        }
        # Spawned, because CUDA cannot be used in a fork.
        start = (options, self.gpus(source.device))
        with ProcessPoolExecutor(1, get_context("spawn"), vllm_start, start) as process:
            yield VLLMGenerator(process, tokenizer, source.ends, sampling)

    def gpus(self, device: torch.device) -> list[str]:
        """The GPUs of this rank's vLLM, as CUDA_VISIBLE_DEVICES names them. Each rank has its own.

        Raises:
            UserError: this machine has too few.
        """
        if device.type != "cuda":
            return []
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = visible or [str(number) for number in range(torch.cuda.device_count())]
        first = ranks.local_rank() * self.tensor_parallel
        if len(mine := names[first : first + self.tensor_parallel]) < self.tensor_parallel:
            raise UserError(
                f"generation.tensor_parallel={self.tensor_parallel}: each rank needs as many GPUs for vLLM, "
                f"and this machine has {len(names)}: lower it, or world_size"
            )
        return mine


class VLLMGenerator:
    """A Generator that sends its requests to vLLM's process."""

    def __init__(
        self, process: ProcessPoolExecutor, tokenizer: Any, ends: set[int], sampling: SamplingConfig
    ):
        self.process, self.tokenizer, self.ends, self.sampling = process, tokenizer, ends, sampling

    def prepare(self, prompts: Sequence[list[int]]) -> None:
        """Nothing: vLLM has its own tests of the models that it supports."""

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        job = self.process.submit(vllm_generate, list(requests), self.sampling, sorted(self.ends))
        for index, made in enumerate(job.result()):
            if made is None:
                yield index, NO_ROOM
            else:
                ids, finish = made
                yield index, response_of(self.tokenizer, ids, finish, self.ends, self.sampling.stop)


def vllm_start(options: dict[str, Any], gpus: list[str]) -> None:
    global llm
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # nothing has looked for GPUs in this process yet
    import vllm

    llm = vllm.LLM(**options)  # pyright: ignore[reportAttributeAccessIssue]


def vllm_generate(
    requests: list[Request], sampling: SamplingConfig, ends: list[int]
) -> list[tuple[list[int], str] | None]:
    """(sampled ids, finish) of each request, None if its prompt fills the context. In vLLM's process."""
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    context = llm.llm_engine.model_config.max_model_len  # pyright: ignore[reportUndefinedVariable]
    made: list[tuple[list[int], str] | None] = [None] * len(requests)
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
        response = output.outputs[0]
        finish = "length" if response.finish_reason == "length" else "end"
        if isinstance(response.stop_reason, str):
            finish = "stop"
        made[index] = list(response.token_ids), finish
    return made
