"""Intervals against published examples and simulation."""

import random
import statistics

import pytest

from opcd_fast.runtime import bootstrap, difference, wilson


def test_wilson_against_known_values():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 128) == (0, pytest.approx(0.0291, abs=2e-4)) and wilson(128, 128)[1] == pytest.approx(1)
    for successes, trials in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, trials)


def test_newcombes_example():
    """R. G. Newcombe (1998), table II, 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    a, b = ({"value": x / n, "low": wilson(x, n)[0], "high": wilson(x, n)[1]} for x, n in ((48, 80), (56, 70)))
    assert difference(a, b) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference(b, a) == pytest.approx((-0.2, -0.3339, -0.0524), abs=1e-4)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng, hits = random.Random(0), 0
    for trial in range(200):
        sample = [rng.expovariate(1) for _ in range(60)]
        low, high = bootstrap(sample, statistics.fmean, draws=300, seed=trial)
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.98
    assert bootstrap([1.0, 2.0, 5.0], statistics.fmean) == bootstrap([1.0, 2.0, 5.0], statistics.fmean)
    with pytest.raises(ValueError, match="1 units"):
        bootstrap([1.0], statistics.fmean)
