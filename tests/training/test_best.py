"""The best evaluation and the early stop, from records alone."""

import pytest

from opcd_fast.training.run.best import best_step, evaluations_without_gain, stops_early


def evaluations(*values, name="own_kl", error=0.1):
    return [{"step": 2 * i, name: value, f"{name}_error": error} for i, value in enumerate(values)]


def test_the_best_step_is_the_lowest_kl_or_the_highest_score():
    assert best_step(evaluations(1.0, 0.5, 0.3, 0.4), "kl") == 4
    assert best_step(evaluations(1.0, 0.5, 0.3, 0.4, name="score"), "score") == 2
    assert best_step(evaluations(0.1, 0.5, 0.3, 0.4, name="fixed_kl"), "fixed_kl") == 4, "step 0 trained nothing"
    assert best_step(evaluations(1.0, 0.3, 0.3), "kl") == 2, "the first of equals"
    assert best_step([], "kl") is None and best_step(evaluations(1.0), "kl") is None


@pytest.mark.parametrize(
    ("values", "delta", "since"),
    [
        ((), None, 0), ((1.0,), None, 0), ((1.0, 0.8), None, 0), ((1.0, 0.95), None, 1), ((1.0, 0.95), 0.0, 0),
        ((1.0, 0.95, 0.92, 0.89), None, 0),  # small gains add up
        ((1.0, 0.5, 0.45, 0.6), None, 2), ((1.0, 1.5, 1.2, 0.95), 0.0, 0), ((1.0, 0.5, 0.45, 0.3), 0.3, 2),
    ],
)  # fmt: skip
def test_how_long_nothing_improved(values, delta, since):
    assert evaluations_without_gain(evaluations(*values), "kl", delta) == since
    assert evaluations_without_gain(evaluations(*[-v for v in values], name="score"), "score", delta) == since


def test_patience():
    records = evaluations(1.0, 0.5, 0.45, 0.6)
    assert stops_early(records, "kl", 2, None) and not stops_early(records, "kl", 3, None)
    assert not stops_early(records, "kl", 0, None)
