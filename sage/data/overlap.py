"""Which problems are trained on? Accuracy on those does not show what a policy does on others.

A problem counts if its own tokens are part of a training prompt, so another instruction around it hides
nothing. A short one, such as `12 + 7`, counts only if the whole prompt is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sage.data.chat import ChatFormat, encode_prompts, encode_texts
from sage.data.tokens import TokenizedPairs

WINDOW = 16  # tokens by which a problem is looked for, a power of 2
EDGE = 2  # tokens at both ends of a problem that may differ, since they join with what stands beside it
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
    parts: dict[int, list[tuple[int, np.ndarray]]] = defaultdict(list)  # hash of the first tokens -> problems
    for place, ids in enumerate(encode_texts(tokenizer, texts)):
        inner = np.array(ids[EDGE:-EDGE], dtype=np.int32)
        if len(inner) >= WINDOW:
            parts[int(_hashes(inner)[0])].append((place, inner))
    table = np.zeros(1 << BITS, dtype=bool)
    table[_short(np.array([*parts], dtype=np.uint64))] = True
    found, wholes, known = [False] * len(texts), set[bytes](), {*asked}
    for starts, ids in pairs.prompts():
        wholes |= known & {_bytes(ids[start:end]) for start, end in pairwise(starts.tolist())}
        hashes = _hashes(ids)
        for at in np.flatnonzero(table[_short(hashes)]).tolist():
            for place, inner in parts.get(int(hashes[at]), ()):
                found[place] = found[place] or np.array_equal(ids[at : at + len(inner)], inner)
    return [inside or whole in wholes for inside, whole in zip(found, asked, strict=True)]


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
