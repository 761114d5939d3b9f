import pytest

from opcd_fast.runtime.intervals import wilson


def test_wilson_against_known_values():
    low, high = wilson(8, 10)  # Wilson 95 %: 0.490 .. 0.943
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert wilson(0, 128)[0] == 0 and wilson(128, 128)[1] == pytest.approx(1)
    low, high = wilson(0, 128)
    assert 0.02 < high < 0.04


def test_wilson_refuses_impossible_counts():
    for successes, trials in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, trials)
