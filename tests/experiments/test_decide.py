"""The registered rule on made-up results: who passes where, who goes on, who wins."""

from __future__ import annotations

import pytest

from experiments import decide
from experiments.decide import CONTEXTS, Estimate, Outcome, missing, outcomes, page, ranked
from experiments.experiment import SCREENED

PROMPTS = 40


def run(seed, own=0.05, fixed=0.05, right=40, spread=0.0, each=True):
    """own, fixed: KLs, the base's being 1. right: answers of 40 that show the behaviour."""
    found = {
        "seed": seed, "context": "key", "own_kl": own, "fixed_kl": fixed, "score": right / PROMPTS,
        "scores": [1.0] * right + [0.0] * (PROMPTS - right), "general_kl": 1.0, "own_top1": 0.9, "length": 5.0,
        "drawn_answers": 1, "drawn_tokens": 1, "trained_tokens": 1, "seconds": 1.0, "made": {},
    }  # fmt: skip
    if each:
        for name, mean in (("own_kls", own), ("fixed_kls", fixed)):
            found[name] = [mean + spread * (-1) ** i for i in range(PROMPTS)]
    return found


def results(shown=1.0, each=True, **systems):
    """A file of results; shown: base + context's behaviour, None without a scorer."""
    base = run(0, 1.0, 1.0, 0, each=each)
    if shown is None:
        for one in (base, *(run for runs in systems.values() for run in runs)):
            one["scores"], one["score"] = [], None
    return {
        "settings": {"answers_per_prompt": 1, "model": "m"},
        "baselines": {"key": {"base": base, "base + context": {"score": shown}}},
        "systems": {label.replace("_", "-"): {"system": label, "runs": runs} for label, runs in systems.items()},
    }


def failures(label, **given):
    return outcomes(results(**given))[label].failures


def test_enough_of_the_gap_and_of_the_behaviour_passes():
    assert failures("gated", reverse=[run(0, 0.5)], gated=[run(0, 0.09, right=38)]) == []
    assert failures("reverse", reverse=[run(0, 0.5)]) == ["closes 50.0 % of the gap"]
    assert failures("gated", gated=[run(0, 0.11)]) == ["closes 89.0 % of the gap"]
    assert failures("gated", gated=[run(0, right=37)]) == ["behaviour 92.5% of base + context's"]
    assert failures("gated", gated=[run(0, right=37)], shown=0.95) == []  # 95 % of what base + context does


def test_where_base_and_context_hardly_shows_it_only_the_reverse_kl_counts():
    weak = {"gated": [run(0, 0.4, right=5)], "reverse": [run(0, 0.4, right=5)]}
    assert failures("gated", shown=0.79, **weak) == []
    assert len(failures("gated", shown=0.8, **weak)) == 2
    assert failures("gated", shown=None, gated=[run(0, 0.4)], reverse=[run(0, 0.4)]) == []
    lost = failures("gated", shown=None, gated=[run(0, 0.4)], reverse=[run(0, 0.1)])
    assert lost == ["gap, own answers: -30.0 % (-30.0 to -30.0) against reverse"]


def test_a_loss_within_the_interval_is_none():
    assert failures("gated", gated=[run(0, fixed=0.1)], reverse=[run(0, fixed=0.09)]) != []
    assert failures("gated", gated=[run(0, fixed=0.1, spread=0.2)], reverse=[run(0, fixed=0.09)]) == []
    # 38 right against 40: two prompts of forty, which a bootstrap may leave out
    assert failures("gated", gated=[run(0, right=38)], reverse=[run(0)]) == []
    assert "behaviour" in failures("gated", gated=[run(0, right=30)], reverse=[run(0)])[0]


def test_a_prompt_is_drawn_with_the_answers_of_all_seeds():
    found = outcomes(results(gated=[run(0, 0.02, right=40), run(1, 0.06, right=36)]))["gated"]
    assert found.seeds == 2
    own, behaviour = found.measured["own_kls"], found.measured["scores"]
    assert own.value == pytest.approx(0.96) and (own.low, own.high) == pytest.approx((0.96, 0.96))
    assert behaviour.value == pytest.approx(0.95) and 0.85 < behaviour.low < 0.95 < behaviour.high <= 1


def test_answers_to_one_prompt_are_one_unit():
    kept = results(gated=[run(0)])
    kept["settings"]["answers_per_prompt"] = 2
    scores = kept["systems"]["gated"]["runs"][0]["scores"]
    scores[:] = [1.0] * 20 + [0.0] * 20  # each of twenty prompts once right, once wrong
    behaviour = outcomes(kept)["gated"].measured["scores"]
    assert (behaviour.low, behaviour.value, behaviour.high) == (0.5, 0.5, 0.5)


def test_runs_without_kls_of_prompts_have_an_interval_over_seeds():
    old = [run(0, 0.05, each=False), run(1, 0.07, each=False), run(2, 0.09, each=False)]
    own = outcomes(results(each=False, reverse=old))["reverse"].measured["own_kls"]
    assert own.value == pytest.approx(0.93) and (own.low, own.high) == pytest.approx((0.8803, 0.9797), abs=1e-4)
    mixed = outcomes(results(reverse=old, gated=[run(0, 0.2), run(1, 0.22), run(2, 0.24)]))["gated"]
    assert mixed.failures[0].startswith("gap, own answers: -15.0 % (-15.0 to -15.0)")
    assert outcomes(results(reverse=old[:1], gated=[run(0, 0.2)]))["gated"].failures == ["closes 80.0 % of the gap"]


def outcome(gap=0.95, seeds=3, failed=()):
    return Outcome({"own_kls": Estimate(gap)}, list(failed), seeds)


def table(contexts=CONTEXTS, labels=SCREENED, **changes):
    """Everybody passes everywhere, but for `changes`: LABEL or LABEL__CONTEXT."""
    found = {}
    for context in contexts:
        found[context] = {}
        for label in labels:
            name = label.replace("-", "_")
            found[context][label] = changes.get(f"{name}__{context}", changes.get(name, outcome()))
    return found


FAILS = outcome(failed=["fails"])


def test_of_several_the_cheapest_wins_then_the_larger_gap():
    others = {"reverse": FAILS, "forward": FAILS, "todi": FAILS, "forward_then_reverse": FAILS}
    assert "The winner is gated:" in page(table(gated_tv=outcome(0.99), gated_begun=outcome(0.99), **others))
    assert "The winner is gated-tv:" in page(table(gated=FAILS, gated_begun=outcome(0.99), **others))
    assert ranked(table(forward=outcome(0.96), **{"gated": outcome(0.97)}), CONTEXTS)[:2] == ["gated", "forward"]


def test_the_yardstick_cannot_win():
    assert "off-policy" not in ranked(table(off_policy=outcome(1.0)), CONTEXTS)


def test_without_a_winner_the_one_that_passes_on_most_and_where_it_fails():
    nobody = {label.replace("-", "_"): FAILS for label in decide.COST}
    few = {**nobody, "gated": outcome(), "gated__policy": outcome(failed=["it loses"])}
    assert "None passes on every context. gated passes on most; it fails on policy (it loses)." in page(table(**few))


def test_what_is_still_to_be_run():
    begun = table(decide.SCREENING, labels=("reverse",))
    assert missing(begun)[0].startswith("python -m experiments.persona --systems forward,gated,")
    assert len(missing(begun)) == 3 and all(command.endswith("--seeds 1") for command in missing(begun))
    screened = table(decide.SCREENING, gated=outcome(0.98, seeds=1), todi=outcome(0.99))
    second = missing(screened)  # the best of the screening, whatever more seeds say, and the reverse KL
    assert "python -m experiments.persona --systems gated --seeds 3" in second
    assert "python -m experiments.answer_tag --systems gated,reverse --seeds 3" in second
    assert "python -m experiments.policy --systems gated,reverse --seeds 1" in second
    assert len(second) == 6  # (b), (c) and (e) too, where gated has one seed
    assert missing(table()) == []
    assert "Not decided yet" in page(screened) and "winner" not in page(screened)
