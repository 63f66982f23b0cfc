"""Build preference pairs from problems: sample responses, verify them, and pair right ones with wrong ones.

RUN_DIR/generations.jsonl   every response with its verdict
RUN_DIR/pairs.jsonl         one BuiltPair a line
RUN_DIR/manifest.json       the recipe and counts; written last
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage.answering.attempts import GENERATIONS_FILE, Attempt, Sampler, write_lines
from sage.answering.problems import Problem, read_problems
from sage.config import BuildPairsConfig, PairingConfig, TrainConfig, build, load
from sage.data.chat import ChatFormat, encode_prompts, response_ends, tokenizer_fingerprint
from sage.model import loading
from sage.util import ranks
from sage.util.errors import UserError
from sage.util.files import sha256, write_json
from sage.util.progress import console

PAIRS_FILE = "pairs.jsonl"
MANIFEST_FILE = "manifest.json"
# Raise it when new code for prompts, sampling, verification or pairing gives other pairs. Cached ones are
# rebuilt.
PAIRS_VERSION = 2


@dataclass(frozen=True)
class BuiltPair:
    """One line of pairs.jsonl.

    `source` says where chosen comes from: own or gold. The ids are those that the policy read and sampled,
    and `tokenizer` is the fingerprint of the tokenizer that they belong to. A response has no ids if it is
    the problem's own solution, or if a stop text ended it: its text is then cut, and no ids spell exactly
    that.
    """

    pair_id: str
    prompt: str
    chosen: str
    rejected: str
    pass_rate: float
    answer: str
    source: str
    prompt_ids: list[int] | None
    chosen_ids: list[int] | None
    rejected_ids: list[int] | None
    tokenizer: str


@dataclass(frozen=True)
class Candidate:
    """A response that may become one side of a pair."""

    text: str
    source: str
    ids: list[int] | None = None
    unparsable: bool = False
    truncated: bool = False


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
    weights = loading.weights_of(sampler.source.folder, cfg.model)
    with sampler:
        attempts = sampler.attempts(
            problems, cfg.pairing.samples, cfg.data.problems.prompt, run_dir, "responses"
        )
        if sampler.rank != 0:
            return
        golds = [gold_response(problem) for problem in problems]
        verdicts = sampler.verifier.verify([gold or "" for gold in golds], [p.answer for p in problems])
    golds = [gold if verdict.correct else None for gold, verdict in zip(golds, verdicts, strict=True)]
    fingerprint = tokenizer_fingerprint(sampler.tokenizer)
    pairs, counts = make_pairs(problems, golds, attempts, cfg.pairing, cfg.seed, fingerprint)
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


def recipe(cfg: TrainConfig, weights: str, tokenizer: Any, problems: Sequence[Problem]) -> dict[str, Any]:
    """Everything that decides the content of the pairs: equal recipes give equal pairs.

    The ids of the prompts stand for tokenizer, chat template and template arguments; the end tokens stand for
    the generation config.
    """
    prompts = [cfg.data.problems.prompt.replace("{problem}", problem.prompt) for problem in problems]
    chat = ChatFormat.of(cfg.data)
    return {
        "version": PAIRS_VERSION,
        "sage": importlib.metadata.version("sage-align"),
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
        "pairing": asdict(cfg.pairing),
        "seed": cfg.seed,
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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


def gold_response(problem: Problem) -> str | None:
    r"""The source's solution as a response: without GSM8K's <<calculations>>, and `#### N` becomes a box."""
    if problem.solution is None:
        return None
    text = re.sub(r"<<[^<>]*>>", "", problem.solution).strip()
    return re.sub(r"\n####.*\Z", lambda _: f"\nThe answer is \\boxed{{{problem.answer}}}.", text, flags=re.S)


def pass_rates(attempts: Sequence[Attempt]) -> dict[str, float]:
    right, total = Counter[str](), Counter[str]()
    for attempt in attempts:
        right[attempt.problem_id] += attempt.correct
        total[attempt.problem_id] += 1
    return {problem_id: right[problem_id] / count for problem_id, count in total.items()}


def make_pairs(
    problems: Sequence[Problem],
    golds: Sequence[str | None],
    attempts: Sequence[Attempt],
    cfg: PairingConfig,
    seed: int,
    tokenizer: str,
) -> tuple[list[BuiltPair], dict[str, int]]:
    """The pairs, in the problems' order, and counts of problems, responses and pairs left out, by reason.

    Args:
        golds: a verified response made from each problem's solution, or None.
        tokenizer: fingerprint of the tokenizer of the attempts' ids.
    """
    counts: Counter[str] = Counter()
    by_problem: dict[str, list[Attempt]] = {problem.problem_id: [] for problem in problems}
    for attempt in attempts:
        by_problem[attempt.problem_id].append(attempt)
    rates = pass_rates(attempts)
    found: list[tuple[BuiltPair, Candidate]] = []
    for problem, gold in zip(problems, golds, strict=True):
        own = by_problem[problem.problem_id]
        right = [Candidate(a.response, "own", sampled_ids(a)) for a in own if a.correct and not a.truncated]
        wrong = [
            Candidate(a.response, "own", sampled_ids(a), a.extracted is None, a.truncated)
            for a in own
            if not a.correct and a.response.strip()
        ]
        if cfg.chosen == "gold" or (cfg.chosen == "own_then_gold" and not right):
            right = [Candidate(gold, "gold")] if gold else []
        rejects = distinct(wrong, cfg.near_duplicate)
        chosen = distinct(right, cfg.near_duplicate)
        counts["duplicate_responses"] += len(wrong) - len(rejects) + len(right) - len(chosen)
        if not chosen or not rejects:
            counts["problems_without_right" if not chosen else "problems_without_wrong"] += 1
            continue
        matched = list(match(problem.problem_id, chosen, rejects, cfg, seed))
        counts["problems_unbalanced"] += not matched
        for number, (good, bad) in enumerate(matched):
            row = BuiltPair(
                f"{problem.problem_id}-{number}",
                own[0].prompt,
                good.text,
                bad.text,
                rates[problem.problem_id],
                problem.answer,
                good.source,
                own[0].prompt_ids,
                good.ids,
                bad.ids,
                tokenizer,
            )
            found.append((row, bad))
    for reason, share in (("truncated", cfg.truncated), ("unparsable", cfg.unparsable)):
        kept = cap(found, reason, share, seed)
        counts[f"pairs_over_{reason}_cap"] = len(found) - len(kept)
        found = kept
    pairs = [pair for pair, _ in found]
    return pairs, {"pairs": len(pairs), **Counter(f"pairs_{p.source}" for p in pairs), **counts}


def sampled_ids(attempt: Attempt) -> list[int] | None:
    return None if attempt.finish == "stop" else attempt.response_ids


def distinct(candidates: Sequence[Candidate], near: float) -> list[Candidate]:
    """The candidates without near duplicates; the first of each kind stays.

    Two are duplicates if they differ only in white space, or if their word triples overlap by `near`
    (Jaccard).
    """
    kept: list[tuple[Candidate, str, set[tuple[str, ...]]]] = []
    for candidate in candidates:
        words = candidate.text.split()
        text, triples = " ".join(words), {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}
        if not any(
            text == other or len(triples & theirs) >= near * len(triples | theirs)
            for _, other, theirs in kept
        ):
            kept.append((candidate, text, triples))
    return [candidate for candidate, *_ in kept]


def match(
    problem_id: str, chosen: Sequence[Candidate], rejects: Sequence[Candidate], cfg: PairingConfig, seed: int
) -> Iterator[tuple[Candidate, Candidate]]:
    """At most `per_problem` pairs of one problem.

    Each rejected response is used at most once; parsable and complete ones come first. It is paired with the
    chosen response that is used least so far. If lengths are balanced, the closest in length wins a tie.
    """
    uses: Counter[str] = Counter()

    def drawn(candidate: Candidate) -> str:
        return hashlib.sha256(f"{seed}/{problem_id}/{candidate.text}".encode()).hexdigest()

    def ratio(a: Candidate, b: Candidate) -> float:
        if cfg.max_length_ratio is None:
            return 1.0
        short, long = sorted((len(a.text), len(b.text)))
        return long / short

    pairs = 0
    for bad in sorted(rejects, key=lambda c: (c.unparsable + c.truncated, drawn(c))):
        fitting = [good for good in chosen if ratio(good, bad) <= (cfg.max_length_ratio or 1.0)]
        if fitting and pairs < cfg.per_problem:
            good = min(fitting, key=lambda c: (uses[c.text], ratio(c, bad), drawn(c)))
            uses[good.text] += 1
            pairs += 1
            yield good, bad


def cap(
    found: list[tuple[BuiltPair, Candidate]], reason: str, share: float, seed: int
) -> list[tuple[BuiltPair, Candidate]]:
    """Drop pairs whose rejected response is truncated (or unparsable) until at most `share` of all are such.

    Which ones are dropped is random.
    """
    flagged = [pair.pair_id for pair, bad in found if getattr(bad, reason)]
    if share == 1 or not flagged:
        return found
    room = int(share / (1 - share) * (len(found) - len(flagged)) + 1e-9)
    flagged.sort(key=lambda pair_id: hashlib.sha256(f"{seed}/{pair_id}".encode()).hexdigest())
    dropped = set(flagged[room:])
    return [(pair, bad) for pair, bad in found if pair.pair_id not in dropped]


def check_built(cfg: TrainConfig, folder: Path) -> None:
    """Raise UserError if the problems gave no pair to train on."""
    if not (folder / PAIRS_FILE).read_text(encoding="utf-8").strip():
        counts = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["counts"]
        raise UserError(
            f"{cfg.model.path} made no pair from {counts['problems']} problems ({counts['right']} of "
            f"{counts['responses']} responses were right): raise pairing.samples, or set "
            f"pairing.chosen=own_then_gold; see {folder / GENERATIONS_FILE}"
        )
