"""Verified responses to problems, for build-pairs, eval and train. They are saved in chunks, so a run can
resume.

    folder/progress/chunk_N.jsonl   during the work; written whole or not at all, with a checksum beside it
    folder/generations.jsonl        one attempt a line, in the problems' order; written after the last chunk
    folder/.begun.json              what the attempts depend on, which must not change under a run

A chunk holds whole problems and is generated from an empty batch, so a resumed run makes the same chunks as
an undisturbed one. Ranks take chunks in turn.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sage.answering.generation import Source
from sage.answering.problems import Problem, prompts_of
from sage.answering.responses import Generator, Request, seed_of
from sage.answering.verify import UNDECIDED, Verifier
from sage.config import ModelConfig, SamplingConfig
from sage.data.chat import ChatFormat, encode_prompts, response_ends
from sage.data.thoughts import OPENED
from sage.model import loading
from sage.util import ranks, stopping
from sage.util.checksums import claim, digest, intact, seal_file
from sage.util.files import write_text
from sage.util.progress import Activity, activity, console

GENERATIONS_FILE, BEGUN_FILE = "generations.jsonl", ".begun.json"
PROBLEMS = "set of problems"  # in BEGUN_FILE
PROBE_TOKENS = 16
OPENING_TOKENS = 16  # at a prompt's end, among which the mark of a thought is


@dataclass(frozen=True)
class Attempt:
    """One response to one problem, verified: a line of generations.jsonl.

    `prompt` is the text before the chat template, `prompt_ids` what the model read. `response_ids` are all
    sampled tokens, with the end token if there is one; None once they are known to be another tokenizer's.
    `in_thought` says that the prompt opens a thought, in which the response begins.
    """

    problem_id: str
    sample: int
    prompt: str
    response: str
    tokens: int
    finish: str  # see sage.answering.responses.Response
    answer: str
    extracted: str | None
    correct: bool
    rule: str  # the rule that decided, see sage.answering.verify.Verdict
    group: str | None
    prompt_ids: list[int]
    response_ids: list[int] | None
    in_thought: bool

    @property
    def whole(self) -> str:
        """The response with the thought that its prompt opens, as it is verified."""
        return f"{'<think>' if self.in_thought else ''}{self.response}"

    @property
    def truncated(self) -> bool:
        return self.finish in ("length", "no_room")

    @property
    def undecided(self) -> bool:
        """Whether the answer could not be compared, so it counts as wrong but may be right."""
        return self.rule.endswith(UNDECIDED)


class Sampler:
    """Answers problems with one policy. The model is loaded when the first response is needed.

    Args:
        backend: sage.answering.generation.HF or sage.answering.vllm.VLLM.
        seed: every response draws from a seed made of this one, the problem's id and the sample's number.
    """

    def __init__(
        self,
        model: ModelConfig,
        backend: Any,
        sampling: SamplingConfig,
        *,
        seed: int,
        chat: ChatFormat,
        cache_dir: str,
    ):
        if ranks.world_size() > 1:
            ranks.join("gloo")
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", ranks.local_rank()) if on_gpu else torch.device("cpu")
        folder = ranks.machine_first(lambda: loading.resolve_model(model, cache_dir))
        self.tokenizer = loading.load_tokenizer(folder, model)
        self.source = Source(folder, model, device, response_ends(self.tokenizer, chat))
        self.backend, self.sampling, self.seed, self.chat = backend, sampling, seed, chat
        self.generator: Generator | None = None
        self.stack = ExitStack()

    def __enter__(self) -> Sampler:
        self.verifier = self.stack.enter_context(Verifier())
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stack.close()

    def attempts(
        self,
        problems: Sequence[Problem],
        samples: int,
        prompt: str,
        folder: Path,
        name: str,
        weights: str | None = None,
    ) -> list[Attempt]:
        """Attempts at each problem, in order. Ranks other than 0 get an empty list.

        Args:
            samples: attempts at each problem that does not say how many it wants.
            prompt: the text of a prompt, with {problem} in it.
            folder: where the attempts are kept. An interrupted run's attempts in it are used.
            name: a name for the progress bar.
            weights: fingerprint of the model; None if it cannot have changed under an interrupted run.

        Raises:
            UserError: the attempts in `folder` were begun with another model or other problems.
            Stopped: a signal came in the middle of a training run.
        """
        final, finished = folder / GENERATIONS_FILE, folder / "progress"
        prompts = prompts_of(problems, prompt)
        ids = ranks.main_only(lambda: encode_prompts(self.tokenizer, prompts, self.chat))
        inputs = {
            "model": weights,
            PROBLEMS: digest([asdict(problem) for problem in problems]),
            "tokenizer or chat template": digest([ids, sorted(self.source.ends)]),
        }
        ranks.main_only(lambda: claim(folder / BEGUN_FILE, inputs))
        if not ranks.main_only(final.exists):
            finished.mkdir(parents=True, exist_ok=True)
            counts = [problem.samples or samples for problem in problems]
            chunks = self.chunks(ids, counts)
            missing = [
                (file, chunk)
                for number, chunk in list(enumerate(chunks))[ranks.rank() :: ranks.world_size()]
                if not intact(file := finished / f"chunk_{number}.jsonl")
            ]
            if missing:
                if self.generator is None:
                    self.generator = self.stack.enter_context(self.backend.open(self.source, self.sampling))
                # On all prompts, so that a resumed run comes to the same decision.
                self.generator.prepare(ids)
            left = [i for _, chunk in missing for i in chunk]
            self.estimate([ids[i] for i in left], sum(counts[i] for i in left), len(missing))
            with activity(name, sum(counts[i] for i in left)) as progress:
                for file, chunk in missing:
                    if stopping.asked():
                        break
                    work = [(problems[i], prompts[i], ids[i], n) for i in chunk for n in range(counts[i])]
                    write_lines(file, self.chunk(work, progress))
                    seal_file(file)
            if any(ranks.gather(stopping.asked())):
                raise stopping.Stopped(f"while it answered {name}, at step")
            if ranks.rank() == 0:
                found = [a for n in range(len(chunks)) for a in read_attempts(finished / f"chunk_{n}.jsonl")]
                order = {problem.problem_id: place for place, problem in enumerate(problems)}
                write_lines(final, sorted(found, key=lambda a: (order[a.problem_id], a.sample)))
        if ranks.rank() != 0:
            return []
        shutil.rmtree(finished, ignore_errors=True)
        return read_attempts(final)

    def chunks(self, ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
        """Indices of problems in chunks of similar prompt length, the longest (most memory) first.

        `counts` are the responses to each problem. A chunk has at most `backend.chunk` responses, or one
        problem.
        """
        chunks: list[list[int]] = []
        room = 0
        for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i)):
            if not chunks or counts[i] > room:
                chunks.append([])
                room = self.backend.chunk
            chunks[-1].append(i)
            room -= counts[i]
        return chunks

    def chunk(self, work: Sequence[tuple[Problem, str, list[int], int]], progress: Activity) -> list[Attempt]:
        """One attempt for each (problem, prompt, its ids, sample)."""
        assert self.generator is not None
        requests = [
            Request(ids, seed_of(self.seed, problem.problem_id, sample), self.sampling.max_new_tokens)
            for problem, _, ids, sample in work
        ]
        found = {}
        for index, response in self.generator(requests):
            found[index] = response
            progress.advance()
        attempts = [
            Attempt(
                problem_id=problem.problem_id,
                sample=sample,
                prompt=prompt,
                response=found[i].text,
                tokens=len(found[i].ids),
                finish=found[i].finish,
                answer=problem.answer,
                extracted=None,
                correct=False,
                rule="",
                group=problem.group,
                prompt_ids=ids,
                response_ids=found[i].ids,
                in_thought=OPENED.search(str(self.tokenizer.decode(ids[-OPENING_TOKENS:]))) is not None,
            )
            for i, (problem, prompt, ids, sample) in enumerate(work)
        ]
        verdicts = self.verifier.verify([a.whole for a in attempts], [a.answer for a in attempts])
        return [replace(a, **v._asdict()) for a, v in zip(attempts, verdicts, strict=True)]

    def estimate(self, ids: Sequence[list[int]], responses: int, chunks: int) -> None:
        """Print the longest time that the work can take, estimated from a few tokens, if it has several
        chunks.
        """
        if chunks < 2 or self.generator is None:
            return
        probe = ids[: max(self.backend.chunk // 4, 1)]
        seconds = []
        # The long probe runs first, so that it pays for whatever only a first call costs.
        for tokens in (1 + PROBE_TOKENS, 1):
            started = time.perf_counter()
            list(self.generator([Request(prompt, 0, tokens) for prompt in probe]))
            seconds.append(time.perf_counter() - started)
        # On a busy machine the short probe may take longer than the long one.
        step = max(seconds[0] - seconds[1], seconds[0] / 4) / PROBE_TOKENS
        longest = responses / len(probe) * (seconds[1] + step * (self.sampling.max_new_tokens - 1))
        console.print(
            f"at most {minutes(longest)} for {responses} responses of up to "
            f"{self.sampling.max_new_tokens} tokens: a probe made {len(probe) / step:.0f} tokens/s"
        )


def minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 1):.0f} minutes"


def read_attempts(file: Path) -> list[Attempt]:
    """The attempts in a generations.jsonl."""
    with file.open(encoding="utf-8") as lines:
        return [Attempt(**json.loads(line)) for line in lines]


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """Dataclasses of plain values as JSON lines."""
    # Not `asdict`, which copies every token id: that took as long as a sixth of sampling them.
    write_text(file, "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows))
