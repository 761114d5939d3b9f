"""What a context costs, in comparisons and reports: KLs against dense float64 ones, scores of answers drawn again."""

import json
from dataclasses import replace

import pytest
import torch
from report_runs import CONTEXT, HELD_OUT, make_run
from test_compare import comparison, has_a_vowel
from tiny import tiny_model

from opcd_fast.cli import main
from opcd_fast.data import read_prompts, student_ids, teacher_ids
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Abilities, Arm
from opcd_fast.evaluation.compare import as_markdown, run_all, summarize
from opcd_fast.evaluation.report import ReportOptions, by_pattern, measure
from opcd_fast.evaluation.report.models import ARMS, BASE, BOTH, SHOWN, STUDENT
from opcd_fast.models import load_model
from opcd_fast.rollout import TransformersRollout
from opcd_fast.runtime import stream_seed

GENERAL = read_prompts(["general one", "general two"])
SAMPLING = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 1.0}
pytestmark = pytest.mark.usefixtures("own_cache")


def rollout(model):
    return TransformersRollout(model, stop_token_ids=(256,))


def distances(p, p_prompts, q, q_prompts, answers):
    """Mean token KL(p || q) on each answer, dense and in float64."""
    found = []
    for p_ids, q_ids, answer in zip(p_prompts, q_prompts, answers, strict=True):
        logits = (model.double()(torch.tensor([[*ids, *answer]])).logits for model, ids in ((p, p_ids), (q, q_ids)))
        a, b = ((one.detach()[0, -len(answer) - 1 : -1] / 0.9).log_softmax(-1) for one in logits)
        found.append(float((a.exp() * (a - b)).sum(-1).mean()))
    return found


def student_of(run):
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_model(), run / "final").eval()


# ------------------------------------------------------------------------------------------------ compare


def asked(tokenizer, folder):
    """Two systems of one seed, and abilities."""
    found = comparison(tokenizer, folder, "opcd,off-policy", 1)
    return replace(found, yardstick=replace(found.yardstick, abilities=Abilities(("arithmetic",), 5, 4)))


@pytest.fixture(scope="module")
def compared(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, run_all(asked(tokenizer, folder), lambda text: None)


@pytest.fixture(scope="module")
def rendered(tokenizer):
    """The unrelated prompts without the context, and with it."""
    return [student_ids(tokenizer, one) for one in GENERAL], [teacher_ids(tokenizer, one, CONTEXT) for one in GENERAL]


def test_unrelated_prompts_are_measured_from_base_and_from_base_with_context(compared, rendered):
    folder, found = compared
    without, within = rendered
    run, base = found["runs"]["opcd"][0], tiny_model()
    for arm, model, seed in ((run, student_of(folder / "opcd" / "seed-0"), 0),
                             (next(iter(found["baselines"].values()))["base"], tiny_model(), 0)):  # fmt: skip
        drawn = rollout(model).generate(without, **SAMPLING, seed=stream_seed(seed, "compare general", 0))
        answers = [one.token_ids for one in drawn]
        wanted = distances(model, without, base, within, answers)
        assert arm["general_context_kls"] == pytest.approx(wanted, rel=1e-3) and min(wanted) > 1e-3
        wanted = distances(model, without, base, without, answers)
        assert arm["general_kls"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        for name in ("general", "general_context"):
            assert arm[f"{name}_kl"] == pytest.approx(sum(arm[f"{name}_kls"]) / 2)
    assert run["general_kl"] > 1e-4


def test_the_yardstick_is_base_with_context_against_base_on_its_own_answers(compared, rendered):
    without, within = rendered
    (shown,) = (found["base + context"] for found in compared[1]["baselines"].values())
    drawn = rollout(tiny_model()).generate(within, **SAMPLING, seed=stream_seed(0, "compare general fixed", 0))
    wanted = distances(tiny_model(), within, tiny_model(), without, [one.token_ids for one in drawn])
    assert shown["general_kls"] == pytest.approx(wanted, rel=1e-3) and min(wanted) > 1e-3
    assert shown["general_kl"] == pytest.approx(sum(wanted) / 2, rel=1e-3)


def test_every_number_of_a_prompt_is_kept_in_order(compared, tokenizer):
    folder, found = compared
    (baseline,) = found["baselines"].values()
    for run in (*found["runs"]["opcd"], *found["runs"]["off-policy"], baseline["base"]):
        for name in ("own", "fixed"):
            assert len(run[f"{name}_kls"]) == 10
            assert run[f"{name}_kl"] == pytest.approx(sum(run[f"{name}_kls"]) / 10)
    run, student = found["runs"]["opcd"][0], student_of(folder / "opcd" / "seed-0")
    kept = json.loads(next(folder.glob("baseline/*/fixed.json")).read_text())["samples"]
    prompts = [student_ids(tokenizer, one) for one in read_prompts([f"another {i}" for i in range(5)])] * 2
    shown = [teacher_ids(tokenizer, one, CONTEXT) for one in read_prompts([f"another {i}" for i in range(5)])] * 2
    wanted = distances(student, prompts, tiny_model(), shown, [one["response"] for one in kept])
    assert run["fixed_kls"] == pytest.approx(wanted, rel=1e-3) and len({f"{one:.4f}" for one in wanted}) > 5


@pytest.mark.parametrize("arm", ["student", "base + context"])
def test_probes_are_of_the_arms_own_answers(compared, tokenizer, arm):
    folder, found = compared
    prompts = read_prompts([f"another {i}" for i in range(5)])
    kept = json.loads(next(folder.glob("baseline/*/fixed.json")).read_text())["samples"]
    if arm == "student":
        numbers, model, context = found["runs"]["off-policy"][0], student_of(folder / "off-policy" / "seed-0"), None
        ids = [student_ids(tokenizer, one) for one in prompts] * 2
        drawn = rollout(model).generate(ids, **SAMPLING, seed=stream_seed(0, "compare own", 0))
        firsts = [one.token_ids for one in drawn]
    else:
        (numbers,) = (one["base + context"] for one in found["baselines"].values())
        model, context = tiny_model(), CONTEXT
        firsts = [one["response"] for one in kept]
    by_hand = Arm(tokenizer, rollout(model).generate, context)
    second = by_hand.second_answers(prompts, firsts[:5], 0, **SAMPLING)
    scores = [float(has_a_vowel([], by_hand.text(one.token_ids), {})) for one in second]
    assert numbers["second_turn"] == {"score": sum(scores) / 5, "scores": scores}
    assert numbers["other_context"]["scores"] == by_hand.obeys(prompts, 0, **SAMPLING)
    assert numbers["abilities"]["arithmetic"] == {"score": 0.0, "scores": [0.0] * 5}


def test_results_with_other_abilities_are_not_mixed_in(compared, tokenizer):
    other = asked(tokenizer, compared[0])
    other = replace(other, yardstick=replace(other.yardstick, abilities=Abilities(("arithmetic",), 6, 4)))
    with pytest.raises(InputError, match="abilities"):
        run_all(other, lambda text: None)
    assert "abilities" not in replace(other.yardstick, abilities=Abilities()).identity()  # as an earlier version's


def test_the_second_table_has_base_and_base_with_context_on_top(compared):
    results = json.loads(json.dumps(compared[1]))
    for number, run in enumerate((*results["runs"]["opcd"], *results["runs"]["off-policy"])):
        run["abilities"]["arithmetic"] = {"score": 0.5 + number / 4, "scores": [1.0, 0.0]}
        run["other_context"], run["general_context_kl"] = None, 0.125
    summary = summarize(results)
    page = as_markdown(summary, "title")
    head, rule, *rows = page.partition("Beyond the held-out prompts")[2].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert [row[0] for row in cells] == ["", "base", "base + context", "opcd", "off-policy"]
    table = {row[0]: dict(zip(cells[0], row)) for row in cells[1:]}
    assert table["base + context"]["KL to base + context, unrelated prompts"] == "0.0000"
    assert table["opcd"]["KL to base + context, unrelated prompts"] == "0.1250"
    shares = [table[name]["ability: arithmetic"].split()[0] for name in ("base", "opcd", "off-policy")]
    assert shares == ["0.0%", "50.0%", "75.0%"]
    assert "obeys another context" not in table["opcd"]  # no system has it
    assert "+25.0%" in page.partition("Differences")[2]
    numbers = summary["systems"]["opcd"]["summary"]["ability arithmetic"]
    assert numbers["answers"] == 2 and 0 < numbers["answers_low"] < 0.1


@pytest.mark.parametrize("which", [("opcd", "off-policy"), ("off-policy",)])
def test_results_of_an_earlier_version_are_read(compared, which):
    """All of them, or a system's that were there before the others."""
    results = json.loads(json.dumps(compared[1]))
    runs = [run for label in which for run in results["runs"][label]]
    for numbers in (*runs, *(arm for found in results["baselines"].values() for arm in found.values())):
        for name in ("own_kls", "fixed_kls", "general_kls", "general_context_kl", "general_context_kls", "abilities",
                     "other_context", "second_turn"):  # fmt: skip
            numbers.pop(name, None)
    page = as_markdown(summarize(results), "title")
    assert "KL to the base, unrelated prompts" in page and ("ability: arithmetic" in page) == (len(which) == 1)
    if len(which) == 1:
        row = next(line for line in page.partition("Beyond")[2].splitlines() if line.startswith("| off-policy"))
        assert row.count("not measured") == 4 and "not measured" not in page.partition("| opcd |")[2].split("\n")[0]


# ------------------------------------------------------------------------------------------------ report


def measured(run, **options):
    return measure(run, ReportOptions(general=GENERAL, temperature=0.9, **options))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return make_run(base, tmp_path_factory.mktemp("runs") / "r")


@pytest.fixture(scope="module")
def card(run):
    abilities = Abilities(("arithmetic", "instructions"), problems=6, tokens=5)
    return measured(run, behaviours=[by_pattern("[aeiou]")], abilities=abilities)


def test_the_reports_distances_are_dense_ones(card, run, base, rendered):
    without, within = rendered
    student, plain = student_of(run), load_model(base, dtype="float32", device="cpu")
    names = (("report general", student, without), ("report general context", plain, within),
             ("report general base", plain, without))  # fmt: skip
    own, shown, before = (
        [one.token_ids for one in rollout(model).generate(ids, **SAMPLING, seed=stream_seed(0, name, 0))]
        for name, model, ids in names
    )
    found = card["forgetting"]
    for name, wanted in {
        "kl": distances(student, without, plain, without, own),
        "context_kl": distances(student, without, plain, within, own),
        "context_kl_before": distances(plain, without, plain, within, before),
        "yardstick": distances(plain, within, plain, without, shown),
    }.items():
        assert found[name]["value"] == pytest.approx(sum(wanted) / 2, rel=1e-3), name
        assert found[name]["value"] > 1e-3 and found[name]["n"] == 2


def test_a_student_that_is_the_base_is_at_no_distance_from_it(base, tmp_path):
    found = measured(make_run(base, tmp_path / "r", steps=1, learning_rate=1e-12, eval_every=0))["forgetting"]
    assert abs(found["kl"]["value"]) < 1e-6
    assert min(found[name]["value"] for name in ("context_kl", "context_kl_before", "yardstick")) > 0.01


def test_the_reports_arms_answer_by_themselves(card, run, base, tokenizer):
    student, plain = student_of(run), load_model(base, dtype="float32", device="cpu")
    prompts, sampling = read_prompts(HELD_OUT), SAMPLING
    for arm, model, context in ((BASE, plain, None), (SHOWN, plain, CONTEXT), (STUDENT, student, None),
                                (BOTH, student, CONTEXT)):  # fmt: skip
        by_hand = Arm(tokenizer, rollout(model).generate, context)
        firsts = by_hand.answers(prompts, **sampling, seed=stream_seed(0, f"report {arm}", 0))
        second = by_hand.second_answers(prompts, [one.token_ids for one in firsts], 0, **sampling)
        score = by_pattern("[aeiou]").scorer
        wanted = sum(score([], by_hand.text(one.token_ids), {}) for one in second) / len(prompts)
        assert card["second_turn"][0]["arms"][arm]["value"] == wanted
        assert card["other_context"][arm]["value"] == sum(by_hand.obeys(prompts, 0, **sampling)) / len(prompts)
        plays = by_hand.plays(Abilities(("instructions",), 6, 5))["instructions"]
        assert card["abilities"][1]["arms"][arm]["value"] == pytest.approx(sum(plays) / 6)
    assert [one["name"] for one in card["abilities"]] == ["arithmetic", "instructions"]
    assert card["abilities"][0]["arms"][BASE]["n"] == 6 and list(card["other_context"]) == list(ARMS)


def test_the_command_shows_them_all(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    options = ["--abilities", "arithmetic", "--ability-problems", "3", "--ability-tokens", "2", "--regex", "a"]
    assert main(["report", str(run), *options]) == 0
    out = capsys.readouterr().out
    pages = [(run / name).read_text() for name in ("report.html", "README.md")]
    for text in (out, *(page.replace("\\", "") for page in pages)):
        assert "KL(student || base + context)" in text and "KL(base + context || base), the yardstick" in text
    for text in (page.replace("\\", "") for page in pages):
        assert "ability: arithmetic" in text and "obeys another context" in text and "second turn: a" in text
    assert json.loads((run / "opcd_card.json").read_text())["abilities"][0]["arms"][BASE]["n"] == 3
