"""Which problems to ask a policy next, and how often: a coarse curriculum over problems.

A problem's difficulty is its pass rate as last seen. It is open if it was not asked yet, or if some of its
answers were right and some wrong: only such problems give pairs. It is settled if all were right (mastered)
or all were wrong (hopeless).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple


class Outcome(NamedTuple):
    """What came of a problem when it was last asked."""

    samples: int
    right: int

    @property
    def kind(self) -> str:
        if self.right == 0:
            return "hopeless"
        return "mastered" if self.right == self.samples else "frontier"


def choose(
    samples: Mapping[str, int],
    seen: Mapping[str, Outcome],
    *,
    max_samples: int,
    floor: float,
    budget: int | None,
    seed: str,
) -> dict[str, int]:
    """The problems of a round, in the order of `samples`, and how many responses each gets.

    All open problems are asked, and the share `floor` of the mastered and of the hopeless ones, rounded up.
    If the budget does not pay for that, a random part of these problems is asked. Every draw depends only
    on the seed and the problem's id.

    Args:
        samples: the responses that each problem starts with.
        seen: the last outcome of each problem that was asked before.
        max_samples: a hopeless problem gets twice as many as last time, up to this.
        budget: responses to all problems together, and so also to one; None = no limit.
    """

    def drawn(problem_id: str) -> str:
        return hashlib.sha256(f"{seed}/{problem_id}".encode()).hexdigest()

    kinds: dict[str, list[str]] = {}
    for problem_id in sorted(samples, key=drawn):
        kind = seen[problem_id].kind if problem_id in seen else "unseen"
        kinds.setdefault(kind, []).append(problem_id)
    asked = [*kinds.get("unseen", []), *kinds.get("frontier", [])]
    for kind in ("mastered", "hopeless"):
        settled = kinds.get(kind, [])
        asked += settled[: math.ceil(floor * len(settled))]
    room = math.inf if budget is None else budget
    chosen: dict[str, int] = {}
    for problem_id in sorted(asked, key=drawn):
        count = samples_of(seen.get(problem_id), samples[problem_id], max_samples)
        if budget is not None:
            count = min(count, budget)  # or nobody could ever ask it
        if count <= room:
            chosen[problem_id] = count
            room -= count
    return {problem_id: chosen[problem_id] for problem_id in samples if problem_id in chosen}


def samples_of(last: Outcome | None, samples: int, most: int) -> int:
    """Responses to sample to one problem. It needed more than `samples` for a right answer: it keeps them."""
    if last is None or last.right * samples >= last.samples:
        return samples
    return max(samples, last.samples if last.right else min(2 * last.samples, most))
