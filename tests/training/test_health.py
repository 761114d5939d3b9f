"""Warnings: each where its reason is, and nowhere else."""

import pytest

from opcd_fast.errors import InputError
from opcd_fast.training.monitoring import check_finite
from opcd_fast.training.monitoring.health import warning_before_training, warnings_of
from opcd_fast.training.settings import OPCDConfig

WELL = {"response_length": 30.0, "student_entropy": 1.0, "finished": 0.9, "sampler_kl": 0.001}


def run(*changes, steps=12, from_step=7):
    """A run that is well up to `from_step`, and changed from then on."""
    changed = {key: value for change in changes for key, value in change.items()}
    return [{**WELL, **(changed if step >= from_step else {}), "step": step} for step in range(1, steps + 1)]


def names(history, told=(), teacher_length=None, **options):
    return [name for name, _ in warnings_of(history, set(told), teacher_length, **options)]


def test_a_run_that_goes_well_warns_of_nothing():
    assert names(run()) == [] and names(run(), teacher_length=29.0) == []
    assert names(run(steps=4, from_step=1)) == []


@pytest.mark.parametrize(
    ("name", "change", "harmless"),
    [
        ("short_answers", {"response_length": 9.0}, {"response_length": 11.0}),
        ("low_entropy", {"student_entropy": 0.09}, {"student_entropy": 0.11}),
        ("cut_answers", {"finished": 0.4}, {"finished": 0.6}),
        ("sampler_drift", {"sampler_kl": 0.03}, {"sampler_kl": 0.01}),
    ],
)
def test_each_warning_has_its_reason(name, change, harmless):
    found = list(warnings_of(run(change), set(), None))
    assert [which for which, _ in found] == [name] and "\n" not in found[0][1] and "step 12" in found[0][1]
    assert names(run(harmless)) == []
    assert names(run(change), told=[name]) == []
    assert names(run(change, from_step=12)) == [], "one step is no trend"


def test_the_normal_length_is_the_teachers():
    assert names(run(steps=8, from_step=1), teacher_length=100.0) == ["short_answers"]
    assert names(run({"response_length": 9.0}), teacher_length=9.0) == []


def test_a_truncated_distribution_is_no_drift():
    assert names(run({"sampler_kl": 0.5}), full_sampling=False) == []
    without = [{k: v for k, v in record.items() if k != "sampler_kl"} for record in run()]
    assert names(without) == []


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_ruinous_step_is_refused(loss, norm):
    check_finite(1, 1.0, 2.0)
    with pytest.raises(InputError, match="at step 3"):
        check_finite(3, loss, norm)


UNSAID = {"step": 0, "fixed_first_token": 1e-6}


@pytest.mark.parametrize(
    ("record", "settings", "found"),
    [
        (UNSAID, {}, True),
        (UNSAID, {"divergence": "topk_reverse_kl", "k": 5}, True),
        (UNSAID, {"divergence": "forward_kl"}, False),
        (UNSAID, {"answers": "teacher"}, False),
        (UNSAID, {"rollout": "replay", "rollout_file": "answers.jsonl"}, False),
        ({**UNSAID, "fixed_first_token": 2e-3}, {}, False),
        ({**UNSAID, "step": 10}, {}, False),
        ({"step": 0}, {}, False),
    ],
)
def test_answers_that_the_student_never_gives(record, settings, found):
    told = list(warning_before_training(record, OPCDConfig(**settings)))
    assert [name for name, _ in told] == (["unsaid_answers"] if found else [])
    assert all("1e-06" in text and "forward_kl" in text for _, text in told)
