"""Build preference pairs from problems: sample responses, verify them, and pair right ones with wrong ones.

RUN_DIR/generations.jsonl   every response with its verdict
RUN_DIR/pairs.jsonl         one BuiltPair a line
RUN_DIR/manifest.json       the recipe and counts; written last
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sage.answering.attempts import GENERATIONS_FILE, Attempt, Sampler, read_attempts, write_lines
from sage.answering.problems import Problem, prompts_of, read_problems
from sage.answering.verify import rules_of_verdicts
from sage.commands.pairing import gold_response, make_pairs, pass_rates
from sage.config import BuildPairsConfig, TrainConfig, build, load
from sage.data.chat import ChatFormat, encode_prompts, response_ends, tokenizer_fingerprint
from sage.model import loading
from sage.util import ranks
from sage.util.checksums import digest
from sage.util.errors import UserError
from sage.util.files import sha256, source_digest, write_json
from sage.util.progress import console

PAIRS_FILE = "pairs.jsonl"
MANIFEST_FILE = "manifest.json"


def build_pairs(run_dir: Path) -> None:
    """Build the pairs of the frozen config in `run_dir`, or resume. Every rank calls this."""
    cfg = load(run_dir)
    assert isinstance(cfg, BuildPairsConfig) and cfg.data.problems.path is not None
    sampler = Sampler(
        cfg.model,
        build("generation", cfg.generation),
        cfg.sampling,
        seed=cfg.seed,
        chat=ChatFormat.of(cfg.data),
        cache_dir=cfg.cache_dir,
    )
    problems = ranks.main_only(lambda: read_problems(cfg.data.problems))
    if cfg.pairing.chosen != "own" and not any(problem.solution for problem in problems):
        raise UserError(
            f"pairing.chosen={cfg.pairing.chosen}: no problem of {cfg.data.problems.path} has a solution: "
            "name their column with data.problems.columns.solution=COLUMN, or set pairing.chosen=own"
        )
    weights = loading.weights_of(sampler.source.folder, cfg.model)
    with sampler:
        attempts = sampler.attempts(
            problems, cfg.pairing.samples, cfg.data.problems.prompt, run_dir, "responses", weights
        )
        if ranks.rank() != 0:
            return
        golds = [gold_response(problem) for problem in problems]
        verdicts = sampler.verifier.verify([gold or "" for gold in golds], [p.answer for p in problems])
    golds = [gold if verdict.correct else None for gold, verdict in zip(golds, verdicts, strict=True)]
    fingerprint = tokenizer_fingerprint(sampler.tokenizer)
    others = other_attempts(cfg, problems, fingerprint)
    pairs, counts = make_pairs(problems, golds, attempts, cfg.pairing, cfg.seed, fingerprint, others)
    write_lines(run_dir / PAIRS_FILE, pairs)
    manifest = {
        **recipe(cfg, weights, sampler.tokenizer, problems),
        "counts": {
            "problems": len(problems),
            "responses": len(attempts),
            "right": sum(a.correct for a in attempts),
            "truncated": sum(a.truncated for a in attempts),
            "unparsable": sum(a.extracted is None for a in attempts),
            "response_tokens": sum(a.tokens for a in attempts),
            **counts,
        },
        "checksum": sha256(run_dir / PAIRS_FILE),
        "pass_rates": dict(sorted(Counter(f"{rate:.2f}" for rate in pass_rates(attempts).values()).items())),
    }
    write_json(run_dir / MANIFEST_FILE, manifest)
    console.print(f"{len(pairs)} pairs of {len(problems)} problems: {run_dir / PAIRS_FILE}")
    for reason, count in counts.items():
        console.print(f"  {reason.replace('_', ' ')}: {count}")


def check_finished(folders: Sequence[str]) -> None:
    """Refuse folders of `pairing.rejected_from` that hold no finished `sage build-pairs`."""
    for folder in folders:
        if not intact(Path(folder)) or not Path(folder, GENERATIONS_FILE).is_file():
            raise UserError(f"pairing.rejected_from: {folder} holds no finished `sage build-pairs`")


def other_attempts(
    cfg: TrainConfig, problems: Sequence[Problem], fingerprint: str
) -> dict[str, list[Attempt]]:
    """The wrong attempts of other policies: for each problem, those of the first folder that has some.

    Raises:
        UserError: a folder has another problem of the same id.
    """
    texts = prompts_of(problems, cfg.data.problems.prompt)
    asked = {p.problem_id: (text, p) for p, text in zip(problems, texts, strict=True)}
    found: dict[str, list[Attempt]] = {}
    for folder in cfg.pairing.rejected_from:
        tokenizer = json.loads(Path(folder, MANIFEST_FILE).read_text(encoding="utf-8"))["tokenizer"]
        here: dict[str, list[Attempt]] = {}
        for attempt in read_attempts(Path(folder, GENERATIONS_FILE)):
            if attempt.problem_id not in asked or attempt.problem_id in found:
                continue
            text, problem = asked[attempt.problem_id]
            if (attempt.prompt, attempt.answer) != (text, problem.answer):
                raise UserError(
                    f"pairing.rejected_from: problem {problem.problem_id} of {folder} is not that of "
                    f"{cfg.data.problems.path}: its prompt or its answer differs"
                )
            if not (attempt.correct or attempt.undecided) and attempt.response.strip():
                ids = attempt.response_ids if tokenizer == fingerprint else None
                here.setdefault(problem.problem_id, []).append(replace(attempt, response_ids=ids))
        found |= here
    return found


def recipe(cfg: TrainConfig, weights: str, tokenizer: Any, problems: Sequence[Problem]) -> dict[str, Any]:
    """Everything that decides the content of the pairs: equal recipes give equal pairs.

    The ids of the prompts stand for tokenizer, chat template and template arguments; the end tokens stand for
    the generation config.
    """
    prompts = prompts_of(problems, cfg.data.problems.prompt)
    chat = ChatFormat.of(cfg.data)
    return {
        "code": source_digest("data", "commands/pairing.py"),
        "verdicts": rules_of_verdicts(),
        "model": {
            "path": cfg.model.path,
            "weights": weights,
            "dtype": cfg.model.dtype,
            "attention": cfg.model.attention,
        },
        "problems": {
            "path": cfg.data.problems.path,
            "content": digest([asdict(problem) for problem in problems]),
        },
        "prompt": cfg.data.problems.prompt,
        "prompt_ids": digest(encode_prompts(tokenizer, prompts, chat)),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "ends": sorted(response_ends(tokenizer, chat)),
        "chat": asdict(chat),
        "generation": cfg.generation,
        "sampling": asdict(cfg.sampling),
        "pairing": {
            **asdict(cfg.pairing),
            "rejected_from": [sha256(Path(f) / GENERATIONS_FILE) for f in cfg.pairing.rejected_from],
        },
        "seed": cfg.seed,
    }


def intact(folder: Path) -> bool:
    """Whether the pairs that were built in `folder` are finished and as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return manifest["checksum"] == sha256(folder / PAIRS_FILE)
    except (OSError, ValueError, KeyError):
        return False


def recipe_key(cfg: TrainConfig) -> str:
    """The cache key of the pairs that `sage train` builds from this config's problems."""
    folder = loading.resolve_model(cfg.model, cfg.cache_dir)
    tokenizer = loading.load_tokenizer(folder, cfg.model)
    weights = loading.weights_of(folder, cfg.model)
    return digest(recipe(cfg, weights, tokenizer, read_problems(cfg.data.problems)))[:24]


def check_built(cfg: TrainConfig, folder: Path) -> None:
    """Raise UserError if the problems gave no pair to train on."""
    if not (folder / PAIRS_FILE).read_text(encoding="utf-8").strip():
        counts = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["counts"]
        raise UserError(
            f"{cfg.model.path} made no pair from {counts['problems']} problems ({counts['right']} of "
            f"{counts['responses']} responses were right): raise pairing.samples, or set "
            f"pairing.chosen=own_then_gold; see {folder / GENERATIONS_FILE}"
        )
