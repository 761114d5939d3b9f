"""What is measured of a run: held-out prompts against plain transformers in float64, a user's own score, warnings, and
which evaluation was the best."""

import json
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import TEMPLATE, tiny_model, tiny_tokenizer
from training_runs import PROMPTS, make

from opcd_fast.data import Sample, pack, read_prompts, total_weight
from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion
from opcd_fast.runtime import mean_and_error, wilson
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.monitoring import health
from opcd_fast.training.monitoring.health import warning_before_training, warnings_of
from opcd_fast.training.run.best import best_step, evaluations_without_gain, stops_early
from opcd_fast.training.scorer import HeldOutScore, load_scorer
from opcd_fast.training.settings import OPCDConfig
from opcd_fast.training.step import context_kl, divergence

TEMPERATURE = 0.7


def random_samples(count):
    draw = torch.Generator().manual_seed(3)

    def ids(length):
        return torch.randint(3, 200, (length,), generator=draw).tolist()

    answers = [ids(1 + 2 * index) for index in range(count)]
    return [Sample(ids(4 + index), ids(3), 0, answer, [-1.0] * len(answer)) for index, answer in enumerate(answers)]


@pytest.mark.parametrize("tokens", [None, 40])
def test_means_and_the_probability_of_first_tokens(tokens):
    model, other = tiny_model(), tiny_model(seed=5)
    samples = random_samples(5)
    options = {
        "temperature": TEMPERATURE, "compute_dtype": torch.float32, "device": torch.device("cpu"),
        "micro_batch_tokens": tokens,
    }  # fmt: skip
    teacher = ContextTeacher(other, [torch.arange(10, 30)])
    measured = divergence(samples, model, teacher, **options)
    found = measured["first_token"]
    for normalize, name in (("sequence", "kl"), ("token", "kl_per_token")):
        batch, weight = pack(samples, normalize=normalize), total_weight(samples, normalize)
        common = {"temperature": TEMPERATURE, "compute_dtype": torch.float32}
        loss = float(context_kl(batch, model, teacher, denominator=weight, **common)[0].detach())
        assert measured[name] == pytest.approx(loss, rel=1e-4), name
    exact = tiny_model().double()
    wanted = []
    for sample in samples:
        with torch.no_grad():
            logits = exact(torch.tensor([sample.student_prompt])).logits[0, -1]
        wanted.append(float((logits / TEMPERATURE).softmax(-1)[sample.response[0]]))
    assert found == pytest.approx(statistics.median(wanted), rel=1e-4)
    without = [replace(sample, logprobs=None) for sample in samples]
    assert "first_token" not in divergence(without, model, teacher, **options)


def test_a_run_is_warned_before_it_trains_and_once(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(health, "UNSAID", 1.1)
    first = make(tokenizer, tmp_path / "run", steps=2, divergence="reverse_kl").train()
    assert [(warning["name"], warning["step"]) for warning in first.warnings] == [("unsaid_answers", 0)]
    assert caplog.text.count("begins as the teacher does") == 1
    again = make(tokenizer, tmp_path / "run", steps=4, resume=True).train()
    assert [warning["name"] for warning in again.warnings] == ["unsaid_answers"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records if record["kind"] == "warning"] == ["unsaid_answers"]
    assert 0 < records[0]["fixed_first_token"] < 1
    assert make(tokenizer, tmp_path / "other", steps=2).train().warnings == []


def test_held_out_prompts_that_are_trained_on_are_counted(tokenizer, tmp_path, caplog):
    make(tokenizer, tmp_path / "apart")
    assert "held-out" not in caplog.text
    make(tokenizer, tmp_path / "run", eval_prompts=[PROMPTS[2], "other", PROMPTS[2], PROMPTS[0]])
    assert "3 of 4 held-out prompts are among the training prompts" in caplog.text
    make(tokenizer, tmp_path / "never", eval_prompts=[PROMPTS[2]], eval_every=0)
    assert caplog.text.count("held-out") == 1


@pytest.mark.parametrize(
    ("ending", "settings", "warned"),
    [
        ("<think>", {}, True),  # as DeepSeek-R1's
        ("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}", {}, True),  # Qwen3's
        (
            "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
            {"chat_template_kwargs": '{"enable_thinking": false}'},
            False,
        ),
        ("", {}, False),
    ],
)
def test_a_model_that_thinks_is_warned_of(tmp_path, caplog, ending, settings, warned):
    tokenizer = tiny_tokenizer(TEMPLATE.replace("<|assistant|>{% endif %}", f"<|assistant|>{ending}{{% endif %}}"))
    make(tokenizer, tmp_path / "run", **settings)
    assert caplog.text.count("thinks before it answers") == warned


# --- a user's own score --------------------------------------------------------------------------------------


def record(scores):
    values = iter(scores)
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "a")
    score = HeldOutScore(lambda *_: next(values), "mine", tokenizer, read_prompts(["x"] * 4))
    return score([SimpleNamespace(token_ids=(1,))] * 4)


def test_mean_and_interval():
    found = record([1.0, 2.0, 4.0, 5.0])
    error = math.sqrt((4 + 1 + 1 + 4) / 3 / 4)
    assert found == pytest.approx(
        {"score": 3.0, "score_error": error, "score_low": 3 - 1.96 * error, "score_high": 3 + 1.96 * error}
    )
    rates = record([1, 0, True, 1])
    assert (rates["score_low"], rates["score_high"]) == pytest.approx(wilson(3, 4)) and rates["score"] == 0.75
    assert mean_and_error([3.0]) == (3.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, "good", None])
def test_a_bad_score_is_refused(value):
    with pytest.raises(InputError, match="scorer .* held-out answer 0"):
        record([value] * 4)


def test_a_scorer_sees_an_answer_without_the_white_space_around_it():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " yes\n")
    score = HeldOutScore(lambda messages, answer, row: float(answer == "yes"), "mine", tokenizer, read_prompts(["x"]))
    assert score([Completion((1,), None, True)])["score"] == 1 and score.shares([Completion((1,), None, True)]) == [1.0]


def test_a_scorer_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_scores_of_this_test.py").write_text("def z(m, a, r):\n    return a.count('z')\nNOTHING = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_scorer("my_scores_of_this_test:z")([], "zazz", {}) == 3
    for name in ("z", "my_scores_of_this_test:", "no_such_module_here:z", "my_scores_of_this_test:other",
                 "my_scores_of_this_test:NOTHING"):  # fmt: skip
        with pytest.raises(InputError, match="scorer="):
            load_scorer(name)


# --- warnings ------------------------------------------------------------------------------------------------


WELL = {"response_length": 30.0, "student_entropy": 1.0, "finished": 0.9, "sampler_kl": 0.001}


def history(change=(), steps=12, from_step=7):
    """A run that is well up to `from_step`, and changed from then on."""
    return [{**WELL, **(dict(change) if step >= from_step else {}), "step": step} for step in range(1, steps + 1)]


def names(records, told=(), teacher_length=None, **options):
    return [name for name, _ in warnings_of(records, set(told), teacher_length, **options)]


def test_a_run_that_goes_well_warns_of_nothing():
    assert names(history()) == [] and names(history(), teacher_length=29.0) == []
    assert names(history(steps=4, from_step=1)) == []


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
    found = list(warnings_of(history(change), set(), None))
    assert [which for which, _ in found] == [name] and "\n" not in found[0][1] and "step 12" in found[0][1]
    assert names(history(harmless)) == []
    assert names(history(change), told=[name]) == []
    assert names(history(change, from_step=12)) == [], "one step is no trend"


def test_the_normal_length_is_the_teachers():
    assert names(history(steps=8, from_step=1), teacher_length=100.0) == ["short_answers"]
    assert names(history({"response_length": 9.0}), teacher_length=9.0) == []


def test_a_truncated_distribution_is_no_drift():
    assert names(history({"sampler_kl": 0.5}), full_sampling=False) == []
    without = [{k: v for k, v in record.items() if k != "sampler_kl"} for record in history()]
    assert names(without) == []


def test_a_sampler_of_another_model_is_told_of_at_once():
    other = history({"sampler_kl": 0.8}, steps=1, from_step=1)
    assert names(other) == ["sampler_differs"] and names(other, told=["sampler_differs"]) == []
    assert names(history({"sampler_kl": 0.04}, steps=1, from_step=1)) == [] == names(other, full_sampling=False)
    assert names([{**other[0], "answers_of": "file"}]) == [] == names([])


UNSAID, BLIND = {"step": 0, "fixed_first_token": 1e-6}, {"divergence": "reverse_kl"}


@pytest.mark.parametrize(
    ("record", "settings", "found"),
    [
        (UNSAID, {}, False),
        (UNSAID, BLIND, True),
        (UNSAID, {"divergence": "topk_reverse_kl", "k": 5}, True),
        (UNSAID, {"divergence": "jsd"}, True),
        (UNSAID, {"divergence": "jsd", "beta": 0.0}, False),
        (UNSAID, {"divergence": "forward_kl"}, False),
        (UNSAID, {**BLIND, "answers": "teacher"}, False),
        (UNSAID, {**BLIND, "off_policy_share": 0.5}, False),
        (UNSAID, {**BLIND, "rollout": "replay", "rollout_file": "answers.jsonl"}, False),
        ({**UNSAID, "fixed_first_token": 2e-3}, BLIND, False),
        ({**UNSAID, "step": 10}, BLIND, False),
        ({"step": 0}, BLIND, False),
    ],
)
def test_answers_that_the_student_never_gives(record, settings, found):
    told = list(warning_before_training(record, OPCDConfig(**settings)))
    assert [name for name, _ in told] == (["unsaid_answers"] if found else [])
    assert all("1e-06" in text and "gated_kl" in text for _, text in told)


# --- best, and the early stop --------------------------------------------------------------------------------


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
