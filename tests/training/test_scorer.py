"""A user's own measure: found by name, asked with the right things, its mistakes named."""

import math

import pytest

from opcd_fast.errors import InputError
from opcd_fast.runtime import mean_and_error, wilson
from opcd_fast.training.scorer import load_scorer, score_record

SHOWN = [[{"role": "user", "content": str(i)}] for i in range(4)]


def record(scores):
    values = iter(scores)
    return score_record(lambda *_: next(values), SHOWN, ["a"] * 4, [{}] * 4)


def test_mean_and_interval():
    found = record([1.0, 2.0, 4.0, 5.0])
    error = math.sqrt((4 + 1 + 1 + 4) / 3 / 4)
    assert found == pytest.approx(
        {"score": 3.0, "score_error": error, "score_low": 3 - 1.96 * error, "score_high": 3 + 1.96 * error}
    )
    rates = record([1, 0, True, 1])
    assert (rates["score_low"], rates["score_high"]) == pytest.approx(wilson(3, 4)) and rates["score"] == 0.75
    assert mean_and_error([3.0]) == (3.0, 0.0)


def test_what_a_scorer_sees():
    seen = []

    def scorer(messages, answer, row):
        messages[0]["content"] = "mine now"  # must not reach the next evaluation
        seen.append((answer, row))
        return 1

    score_record(scorer, SHOWN, list("abcd"), [{"id": i} for i in range(4)])
    assert seen == [("a", {"id": 0}), ("b", {"id": 1}), ("c", {"id": 2}), ("d", {"id": 3})]
    assert SHOWN[0][0]["content"] == "0"


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", None])
def test_a_bad_score_is_refused(value):
    with pytest.raises(InputError, match="scorer .* held-out answer 0"):
        record([value] * 4)


def test_a_scorer_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_scores_of_this_test.py").write_text("def z(m, a, r):\n    return a.count('z')\nNOTHING = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_scorer("my_scores_of_this_test:z")([], "zazz", {}) == 3
    for name in ("z", "my_scores_of_this_test:", "no_such_module_here:z", "my_scores_of_this_test:other",
                 "my_scores_of_this_test:NOTHING"):  # fmt: skip
        with pytest.raises(InputError, match="scorer="):
            load_scorer(name)
