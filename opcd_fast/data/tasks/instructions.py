"""Instructions whose following a program can check: what a model had better not forget.

A small test of our own in the manner of IFEval (arXiv 2311.07911): a request and one or two rules of form. An answer
scores 1 when all its rules hold (IFEval's "prompt level strict"); its content is not judged.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

from opcd_fast.data.tasks.episode import Questions, as_user

SUBJECTS = (
    "a walk in the rain", "how bread is made", "the colour of the sea", "why people keep cats", "a bicycle",
    "the first day at school", "a lighthouse", "how to plant a tree", "the taste of lemons", "a train journey",
    "winter mornings", "a lost umbrella", "how a clock works", "an old bridge", "the sound of bells", "honey bees",
)  # fmt: skip


def _bullets(text: str) -> int:
    return sum(line.lstrip().startswith(("- ", "* ")) for line in text.splitlines())


def _is_json_with(text: str, key: str) -> bool:
    inside = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    try:
        value = json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == {key}


Rule = tuple[str, Callable[[str], bool]]  # what is asked, and whether a text does it

RULES: tuple[Rule, ...] = (
    ("Write in lower case letters only.", lambda text: bool(text.strip()) and text == text.lower()),
    ("Write in capital letters only.", lambda text: bool(text.strip()) and text == text.upper()),
    ("Do not use any comma.", lambda text: bool(text.strip()) and "," not in text),
    ("Answer in exactly two sentences.", lambda text: len(re.findall(r"[.!?]+(?:\s|$)", text.strip())) == 2),
    ("Answer in at most 15 words.", lambda text: 0 < len(text.split()) <= 15),
    ("Use exactly three bullet points, each on a line that begins with `- `.", lambda text: _bullets(text) == 3),
    ("End with the words `That is all.`", lambda text: text.strip().endswith("That is all.")),
    ("Begin with the word `Well`.", lambda text: text.strip().lower().startswith("well")),
    ('Answer with a JSON object that has the single key "text".', lambda text: _is_json_with(text, "text")),
    ("Put your whole answer in double quotation marks.", lambda text: bool(re.fullmatch(r'"[^"]+"', text.strip()))),
    ("Do not use the letter `z` anywhere.", lambda text: bool(text.strip()) and "z" not in text.lower()),
    ("Use the word `river` at least twice.", lambda text: len(re.findall(r"(?i)\briver\b", text)) >= 2),
)


def instructions() -> Questions:
    """Every rule with every subject."""
    pairs = itertools.product(SUBJECTS, RULES)
    texts = [(f"Write something short about {subject}. {asked}", holds) for subject, (asked, holds) in pairs]
    return Questions("instructions", [(as_user(text), holds) for text, holds in texts])
