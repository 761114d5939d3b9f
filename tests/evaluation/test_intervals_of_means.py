"""Bootstrap and differences, against published examples and simulation."""

import random
import statistics

import pytest

from opcd_fast.runtime.intervals import bootstrap, difference, wilson


def test_newcombes_example():
    """R. G. Newcombe (1998), table II, 56/70 against 48/80, method 10: 0.0524 to 0.3339."""
    a, b = ({"value": x / n, "low": wilson(x, n)[0], "high": wilson(x, n)[1]} for x, n in ((48, 80), (56, 70)))
    value, low, high = difference(a, b)
    assert value == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))
    back = difference(b, a)
    assert (back[1], back[2]) == (pytest.approx(-high), pytest.approx(-low))


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng, hits = random.Random(0), 0
    for trial in range(200):
        sample = [rng.expovariate(1) for _ in range(60)]
        low, high = bootstrap(sample, statistics.fmean, draws=300, seed=trial)
        hits += low <= 1 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_one_unit_none():
    units = [1.0, 2.0, 5.0]
    assert bootstrap(units, statistics.fmean) == bootstrap(units, statistics.fmean)
    with pytest.raises(ValueError, match="1 units"):
        bootstrap([1.0], statistics.fmean)
