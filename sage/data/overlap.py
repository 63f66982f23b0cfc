"""Which problems are trained on? Accuracy on those does not show what a policy does on others.

A problem counts if its text stands in a training prompt, so another instruction around it hides nothing. A
short one, such as `12 + 7`, counts only if the whole prompt is the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sage.data.chat import ChatFormat, encode_prompts, encode_texts
from sage.data.tokens import TokenizedPairs

WINDOW = 16  # tokens by which a problem is looked for, a power of 2
EDGE = 4  # tokens at both ends of a problem that may differ, since they join with what stands beside it
BITS = 24  # of a hash, for a table that rules out most places at once
FACTOR = 0x9E3779B97F4A7C15  # odd, so that no bit of a token is lost


def trained_on(
    pairs: TokenizedPairs, texts: Sequence[str], prompts: Sequence[str], tokenizer: Any, chat: ChatFormat
) -> list[bool]:
    """Whether each problem is trained on.

    Args:
        texts: the problems.
        prompts: the whole prompts in which they are asked.
    """
    asked = [_bytes(ids) for ids in encode_prompts(tokenizer, prompts, chat)]
    encoded = encode_texts(tokenizer, texts)
    windows = _windows(encoded)
    table = np.zeros(1 << BITS, dtype=bool)
    table[_short(np.array([*windows], dtype=np.uint64))] = True
    patterns = [_pattern(_text(tokenizer, ids)) for ids in encoded]
    found, wholes, known = [False] * len(texts), set[bytes](), {*asked}
    compared = set[tuple[bytes, int]]()  # a prompt, and the window that both have
    for starts, ids in pairs.prompts():
        wholes |= known & {_bytes(ids[start:end]) for start, end in pairwise(starts.tolist())}
        hashes = _hashes(ids)
        for at in np.flatnonzero(table[_short(hashes)]).tolist():
            places = [place for place in windows.get(int(hashes[at]), ()) if not found[place]]
            row = int(np.searchsorted(starts, at, side="right"))
            prompt = ids[starts[row - 1] : starts[row]]
            if places and (key := (_bytes(prompt), int(hashes[at]))) not in compared:
                compared.add(key)
                text = _text(tokenizer, prompt.tolist())
                for place in places:
                    found[place] = patterns[place].search(text) is not None
    return [inside or whole in wholes for inside, whole in zip(found, asked, strict=True)]


def _windows(encoded: Sequence[list[int]]) -> dict[int, list[int]]:
    """Hash of a window -> the problems that are looked for by it. Each has its rarest, not at its ends."""
    hashes = [_hashes(np.array(ids[EDGE:-EDGE], dtype=np.int32)) for ids in encoded]
    _, inverse, counts = np.unique(
        np.concatenate([np.empty(0, np.uint64), *hashes]), return_inverse=True, return_counts=True
    )
    windows = defaultdict[int, list[int]](list)
    ends = np.cumsum([len(of_problem) for of_problem in hashes])
    for place, (of_problem, end) in enumerate(zip(hashes, ends.tolist(), strict=True)):
        if len(of_problem):
            rarest = counts[inverse[end - len(of_problem) : end]].argmin()
            windows[int(of_problem[rarest])].append(place)
    return windows


def _text(tokenizer: Any, ids: list[int]) -> str:
    """What the tokens say, with single spaces."""
    return " ".join(tokenizer.decode(ids).split())


def _pattern(problem: str) -> re.Pattern[str]:
    """Matches the problem, but not as a part of longer words or numbers."""
    start, end = (r"\b" if edge.isalnum() else "" for edge in (problem[:1], problem[-1:]))
    return re.compile(start + re.escape(problem) + end)


def _bytes(ids: Any) -> bytes:
    return np.asarray(ids, dtype=np.int32).tobytes()


def _hashes(ids: np.ndarray) -> np.ndarray:
    """uint64: a hash of the WINDOW tokens that begin at each place, from those of half as many tokens."""
    hashes, width = ids.astype(np.uint64), 1
    while width < WINDOW:
        factor = np.uint64(pow(FACTOR, width, 1 << 64))
        hashes, width = hashes[:-width] * factor + hashes[width:], 2 * width
    return hashes * np.uint64(FACTOR)


def _short(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - BITS)
