"""Which texts say the same: equal after normalisation, or nearly so by the character n-grams that they share."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

GRAM = 4  # characters; short enough for one-line questions, long enough to tell words apart


def _normalised(text: str) -> str:
    """Case, width of characters, punctuation and spaces aside. A text of punctuation alone keeps it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = "".join(c if unicodedata.category(c)[0] not in "PZCS" else " " for c in folded)
    return " ".join(letters.split()) or " ".join(folded.split())


def repeats(texts: Sequence[str], threshold: float, groups: Sequence[Hashable] | None = None) -> list[int | None]:
    """For each text the index of an earlier kept one that it repeats, or None: then it is itself kept.

    Two texts repeat each other when they are equal after normalisation, or when the Jaccard similarity of their sets
    of character 4-grams is at least `threshold` and they are not of the same group (two turns of one conversation share
    what went before). No pair of kept texts of different groups is that similar. Exact, not sampled: candidates come
    from the prefix filter (a pair that is similar enough shares one of the |x| - ceil(t |x|) + 1 rarest n-grams of
    each; Chaudhuri et al., ICDE 2006).

    Args:
        threshold: above 0 up to 1; 1 means the same n-grams.
    """
    plain = [_normalised(text) for text in texts]
    grams = [_grams(text) for text in plain]
    counts = Counter(gram for own in grams for gram in own)
    result: list[int | None] = []
    first_with: dict[str, int] = {}
    kept_with: dict[str, list[int]] = defaultdict(list)
    for index, own in enumerate(grams):
        same = first_with.get(plain[index])
        rare = sorted(own, key=lambda gram: (counts[gram], gram))
        rare = rare[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        if same is None:
            for other in sorted({place for gram in rare for place in kept_with[gram]}):
                if groups is not None and groups[index] == groups[other]:
                    continue
                shared = len(own & grams[other])
                if shared >= threshold * (len(own) + len(grams[other]) - shared) - 1e-9:
                    same = other
                    break
        result.append(same)
        if same is None:
            first_with[plain[index]] = index
            for gram in rare:
                kept_with[gram].append(index)
    return result


def _grams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[start : start + GRAM] for start in range(max(1, len(padded) - GRAM + 1))}
