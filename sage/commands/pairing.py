"""Pair right answers with wrong ones."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sage.answering.attempts import Attempt
from sage.answering.problems import Problem
from sage.config import PairingConfig


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
    prompt_ids: list[int]
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
    others: Mapping[str, Sequence[Attempt]] = MappingProxyType({}),
) -> tuple[list[BuiltPair], dict[str, int]]:
    """The pairs, in the problems' order, and counts of problems, responses and pairs left out, by reason.

    Args:
        golds: a verified response made from each problem's solution, or None.
        tokenizer: fingerprint of the tokenizer of the attempts' ids.
        others: problem -> attempts of other policies, whose wrong ones replace the wrong ones of `attempts`.
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
            for a in others.get(problem.problem_id, own)
            if not (a.correct or a.undecided) and a.response.strip()
        ]
        if cfg.chosen == "gold" or (cfg.chosen == "own_then_gold" and not right):
            right = [Candidate(gold, "gold")] if gold else []
        rejects = distinct(wrong, cfg.near_duplicate)
        chosen = distinct(right, cfg.near_duplicate)
        counts["undecided_responses"] += sum(a.undecided for a in own)
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
    before = -1
    while before != len(found):  # the pairs that one cap drops make the other's share larger
        before = len(found)
        for reason, share in (("truncated", cfg.truncated), ("unparsable", cfg.unparsable)):
            kept = cap(found, reason, share, seed)
            counts[f"pairs_over_{reason}_cap"] += len(found) - len(kept)
            found = kept
    pairs = [pair for pair, _ in found]
    return pairs, {"pairs": len(pairs), **Counter(f"pairs_{p.source}" for p in pairs), **counts}


def sampled_ids(attempt: Attempt) -> list[int] | None:
    return None if attempt.finish == "stop" else attempt.response_ids


def distinct(candidates: Sequence[Candidate], near: float) -> list[Candidate]:
    """The candidates without near duplicates; the first of each kind stays.

    Two are duplicates if they differ only in white space, or if their word triples overlap by `near`
    (Jaccard), unless `near` is 1.
    """
    kept: list[tuple[Candidate, str, set[tuple[str, ...]]]] = []
    for candidate in candidates:
        words = candidate.text.split()
        text, triples = " ".join(words), {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}
        if not any(
            text == other or (near < 1 and len(triples & theirs) >= near * len(triples | theirs))
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
