"""Exact match and F1 of SQuAD v1.1 (arXiv 1606.05250), the best of the gold answers.

Words count without case, punctuation and articles.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


def words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact_match(answer: str, gold: Iterable[str]) -> float:
    return float(any(words(answer) == words(one) for one in gold))


def f1(answer: str, gold: Iterable[str]) -> float:
    return max(_f1(words(answer), words(one)) for one in gold)


def _f1(answer: list[str], gold: list[str]) -> float:
    """2 P R / (P + R) of words in common, as often as both have them."""
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold)) if common else 0.0


def scores_f1(messages: list[dict[str, Any]], answer: str, row: Mapping[str, Any]) -> float:
    """A scorer: F1 against the row's answers."""
    return f1(answer, row["answers"])
