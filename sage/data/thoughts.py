"""The marks between which models think: <think>, <thinking>, [THINK], <seed:think>, ◁think▷ and so on."""

import re

THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
# A mark in quotes or backticks is spoken of: "write `<think>` first". The patterns begin with the bracket
# and look back from there, because `re` skips quickly to a character that a match must begin with.
OPEN, CLOSE = (
    re.compile(rf"[<\[◁](?:(?<![`'\"][<\[◁]){word}|{word}(?![`'\"]))", re.IGNORECASE)
    for word in (rf"{THOUGHT}[>\]▷]", rf"/{THOUGHT}[>\]▷]")
)
OPENED = re.compile(rf"{OPEN.pattern}\s*\Z", re.IGNORECASE)  # a text that ends with a thought just opened
