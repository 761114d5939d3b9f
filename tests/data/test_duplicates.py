"""Near-duplicates: the index finds exactly what comparing all pairs finds."""

import random

import pytest

from opcd_fast.data import repeats
from opcd_fast.data.duplicates import _grams, _normalised


def similarity(a, b):
    x, y = _grams(_normalised(a)), _grams(_normalised(b))
    return len(x & y) / len(x | y)


def by_all_pairs(texts, threshold, groups=None):
    kept, result = [], []
    for index, text in enumerate(texts):
        same = next((k for k in kept if _normalised(texts[k]) == _normalised(text)), None)
        for other in kept:
            if same is None and (groups is None or groups[index] != groups[other]):
                same = other if similarity(texts[other], text) >= threshold - 1e-12 else None
        result.append(same)
        kept += [index] if same is None else []
    return result


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 2 / 3, 0.8, 1.0])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_index_finds_what_all_pairs_find(threshold, grouped):
    draw = random.Random(int(threshold * 100))
    texts = []
    for _ in range(150):
        base = "".join(draw.choices("abcde ", k=draw.randint(0, 40)))
        base = draw.choice(texts) if texts and draw.random() < 0.6 else base
        place = draw.randint(0, len(base))
        texts.append(base[:place] + draw.choice(["", "x", "a b", "?!"]) + base[place + draw.randint(0, 3) :])
    groups = [draw.randint(0, 20) for _ in texts] if grouped else None
    found = repeats(texts, threshold, groups)
    assert found == by_all_pairs(texts, threshold, groups)
    assert 0 < sum(f is None for f in found) < len(found)


@pytest.mark.parametrize(
    ("texts", "threshold", "wanted"),
    [
        (["What is it?", " what  IS it!!", "Ｗｈａｔ is it", "???", "!!!", "??? "], 1.0, [None, 0, 0, None, None, 3]),
        (["How deep do I plant garlic?", "How deep do I plant the garlic?"], 0.7, [None, 0]),
        (["What is the capital of Norway?", "What is the capital of Peru?"], 0.7, [None, None]),
        (["日本の首都はどこですか", "日本の首都はどこですか。", "フランスの首都はどこですか"], 0.8, [None, 0, None]),
        # " ab cd " has the 4-grams " ab ", "ab c", "b cd", " cd "; " ab ce " shares the first two: 2 of 6.
        (["ab cd", "Ab, ce"], 0.33, [None, 0]),
        (["ab cd", "Ab, ce"], 0.34, [None, None]),
    ],
)
def test_what_counts_as_the_same(texts, threshold, wanted):
    assert repeats(texts, threshold) == wanted
