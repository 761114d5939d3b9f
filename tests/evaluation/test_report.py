"""The card against plain forward passes in float64, its files, and what must not pass without a word."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from report_runs import CONTEXT, HELD_OUT, make_run, save_base, write_lines
from tiny import tiny_model

from opcd_fast import OPCDConfig, OPCDTrainer
from opcd_fast.cli import main
from opcd_fast.data import read_prompts, student_ids, teacher_ids
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Distance, distances
from opcd_fast.evaluation.report import ReportOptions, by_function, by_pattern, measure, readme, write_report
from opcd_fast.evaluation.report.estimates import agreement, first_difference, identical_greedy, share
from opcd_fast.evaluation.report.measurement import GENERAL
from opcd_fast.evaluation.report.models import ARMS, BASE, BOTH, SHOWN, STUDENT, load_run
from opcd_fast.evaluation.report.scores import Behaviour
from opcd_fast.models import load_model, load_tokenizer
from opcd_fast.training.run import read_record, run_settings

pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = {
    "lora": {"lora_rank": 4, "learning_rate": 1e-2},
    "full": {"lora_rank": 0, "learning_rate": 3e-3},
    "prefix": {"lora_rank": 0, "num_virtual_tokens": 6, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, base, tmp_path_factory):
    return make_run(base, tmp_path_factory.mktemp("runs") / "r", **KINDS[request.param])


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory):
    return make_run(base, tmp_path_factory.mktemp("runs") / "l")


def long_answers(messages, answer, row):
    return min(1.0, len(answer) / 6)


@pytest.fixture(scope="module")
def card(lora_run):
    scorers = [by_pattern("[a-z]"), by_function("test_report:long_answers")]
    return measure(lora_run, ReportOptions(behaviours=scorers, tasks=["instructions"], max_prompts=4))


def logits_of(model, prompt, answer):
    with torch.no_grad():
        return model.double()(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_kl_is_that_of_plain_forwards_in_float64(run, base, temperature):
    models = load_run(run, read_record(run), run_settings(run), None)
    tokenizer = load_tokenizer(base)
    prompts = read_prompts(HELD_OUT)
    without = [student_ids(tokenizer, prompt) for prompt in prompts]
    within = [teacher_ids(tokenizer, prompt, CONTEXT) for prompt in prompts]
    responses = [[70, 71], [256], [100, 90, 80, 70, 256], [3, 4, 5]]
    readings = {name: getattr(models, name).reader(without).read(responses) for name in ("base", "student")}
    teacher = models.teacher.reader(within).read(responses)
    plain = {
        name: load_model(folder, dtype="float32", device="cpu")
        for name, folder in {"base": base, "student": run / "final"}.items()
    }
    wrong = 0.0
    for name, reading in readings.items():
        found = distances(reading, teacher, temperature)
        for one, p, q, answer in zip(found, without, within, responses):
            log_p = (logits_of(plain[name], p, answer) / temperature).log_softmax(-1)
            log_q = (logits_of(plain["base"], q, answer) / temperature).log_softmax(-1)
            by_hand = (log_p.exp() * (log_p - log_q)).sum(-1)
            torch.testing.assert_close(torch.tensor(one.token_kl, dtype=torch.float64), by_hand, atol=2e-5, rtol=2e-4)
            assert one.same_first == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
            wrong += float(by_hand.sum())
    assert wrong > 1e-2  # else everything would pass


def test_most_probable_tokens_say_where_greedy_answers_part(run):
    models = load_run(run, read_record(run), run_settings(run), None)
    prompts = [student_ids(models.tokenizer, prompt) for prompt in read_prompts(HELD_OUT)]
    greedy = {"max_new_tokens": 6, "temperature": 0.0}
    wanted = [one.token_ids for one in models.base.answers(prompts, **greedy)]
    written = [one.token_ids for one in models.student.answers(prompts, **greedy)]
    best = models.student.reader(prompts).read(wanted).most_probable()
    assert [first_difference(a, b) for a, b in zip(best, wanted)] == [
        first_difference(a, b) for a, b in zip(written, wanted)
    ]
    assert identical_greedy(models.base.reader(prompts).read(wanted).most_probable(), wanted)["identical"]["value"] == 1


def test_the_card_is_measured(card, lora_run):
    assert card["schema"] == 1
    for key in ("own", "fixed"):
        kl = card["kl"][key]
        assert kl["after"]["value"] < kl["before"]["value"]
        assert kl["gap_closed"]["value"] == pytest.approx(1 - kl["after"]["value"] / kl["before"]["value"])
        assert kl["before"]["low"] <= kl["before"]["value"] <= kl["before"]["high"]
        assert kl["before"]["p50"] <= kl["before"]["p90"] <= kl["before"]["p99"]
    assert card["forgetting"]["kl"]["value"] > 0
    assert {score["name"] for score in card["scores"]} == {"[a-z]", "test_report:long_answers", "instructions"}
    for score in card["scores"]:
        assert set(score["arms"]) == set(ARMS)
    context = len(teacher_ids(load_tokenizer(lora_run / "final"), read_prompts(["x"])[0], CONTEXT))
    alone = len(student_ids(load_tokenizer(lora_run / "final"), read_prompts(["x"])[0]))
    assert card["saved"]["tokens"] == context - alone > 0
    assert len(card["training"]["steps"]) == 12 and len(card["training"]["evaluations"]) == 3
    assert json.loads(json.dumps(card)) == card
    assert str(lora_run.parent) not in json.dumps(card)  # folders of this machine
    docs = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    keys = [*card, *(key for name in ("kl", "arms", "forgetting", "saved", "hashes") for key in card[name])]
    assert not [key for key in keys if f"`{key}`" not in docs]


def test_scores_and_regressions_are_those_of_the_answers(base, tmp_path):
    """The scorer is told what was asked, and the arms differ by what the scorer sees alone."""
    seen, rows = [], []

    def scorer(messages, answer, row):
        seen.append((answer, messages[-1]["content"]))
        rows.append(row)
        return len(answer) % 2

    given = [{"prompt": text, "tone": index, "array": np.zeros(2)} for index, text in enumerate(HELD_OUT)]
    run = make_run(base, tmp_path / "r", held_out=given)
    card = measure(run, ReportOptions(behaviours=[Behaviour("odd", "function", scorer)], samples=2))
    # Rows as training's scorers see them; what JSON cannot hold is not kept.
    wanted = [{"prompt": text, "tone": index} for index, text in enumerate(HELD_OUT)]
    per_arm = len(HELD_OUT) * 2
    assert rows[: len(ARMS) * per_arm : 2] == wanted * len(ARMS)
    assert rows[len(ARMS) * per_arm :] == wanted * len(ARMS)  # second turns
    assert [asked for _, asked in seen[len(ARMS) * per_arm :]] == HELD_OUT * len(ARMS)
    (score,) = card["scores"]
    assert [asked for _, asked in seen[:per_arm]] == [text for text in HELD_OUT for _ in range(2)]
    for index, arm in enumerate(ARMS):
        answers = [answer for answer, _ in seen[index * per_arm : (index + 1) * per_arm]]
        assert score["arms"][arm]["value"] == pytest.approx(sum(len(a) % 2 for a in answers) / per_arm)
    shown, student = (seen[ARMS.index(arm) * per_arm :][:per_arm] for arm in (SHOWN, STUDENT))
    worse = [(a, b) for (a, _), (b, _) in zip(shown, student) if len(b) % 2 < len(a) % 2]
    found = score["regressions"]
    assert found["count"] == len(worse) and found["of"] == per_arm
    assert [(e["answers"][SHOWN], e["answers"][STUDENT]) for e in found["examples"]] == worse
    for far in card["furthest"]:  # the first answer of each
        place = 2 * HELD_OUT.index(far["prompt"])
        assert far["answers"] == {SHOWN: shown[place][0], STUDENT: student[place][0]}


def test_the_arms_are_base_and_student_with_and_without_the_context(lora_run, monkeypatch):
    from opcd_fast.evaluation.report import models as module

    asked = []

    def answers(self, prompts, **sampling):
        asked.append((self, [tuple(prompt) for prompt in prompts], sampling.get("seed")))
        return original(self, prompts, **sampling)

    original = module.Side.answers
    monkeypatch.setattr(module.Side, "answers", answers)
    measure(lora_run, ReportOptions())
    tokenizer = load_tokenizer(lora_run / "final")
    without = [tuple(student_ids(tokenizer, prompt)) for prompt in read_prompts(HELD_OUT)]
    within = [tuple(teacher_ids(tokenizer, prompt, CONTEXT)) for prompt in read_prompts(HELD_OUT)]
    calls = dict(zip(ARMS, asked))
    assert [calls[arm][1] for arm in ARMS] == [without, within, without, within]
    assert calls[BASE][0] is calls[SHOWN][0] and calls[STUDENT][0] is calls[BOTH][0]
    assert calls[BASE][0] is not calls[STUDENT][0]
    assert len({seed for _, _, seed in asked[:4]}) == 4


def test_intervals_of_rates():
    for per_prompt in (1, 3):  # all or nothing has one, too
        found = share([1.0] * 12, per_prompt)
        assert found["interval"] == "wilson" and found["low"] < 0.8
    assert share([1 / 3, 1.0, 0.0, 1.0], 3)["interval"] == "bootstrap"
    assert share([0.2, 0.9])["interval"] == "bootstrap"  # scores between 0 and 1 are no successes
    found = agreement([Distance([0.1] * 3, [True, True, False]), Distance([0.1], [False])])
    assert (found["value"], found["n"], found["interval"]) == (0.5, 2, "bootstrap")  # over tokens, and over prompts
    assert (found["low"], found["high"]) == (0.0, pytest.approx(2 / 3))


def test_general_prompts_that_were_trained_on_do_not_show_forgetting(base, tmp_path):
    general = read_prompts(GENERAL)
    trained_on = [{"messages": list(prompt.messages), "privileged_context": ""} for prompt in general[:10]]
    run = make_run(base, tmp_path / "r", train=["q1", "q2", *trained_on], steps=1, eval_every=0)
    card = measure(run, ReportOptions(max_prompts=500))
    assert card["forgetting"]["left_out_as_trained_on"] == 10
    assert card["forgetting"]["prompts"] == len(general) - 10


def test_general_prompts_that_fit_no_window_cost_nothing_else(lora_run):
    card = measure(lora_run, ReportOptions(general=read_prompts(["x" * 600, "y" * 600])))
    assert card["forgetting"] is None and card["kl"]["own"]


def test_held_out_prompts_that_were_trained_on_are_left_out(base, tmp_path):
    run = make_run(base, tmp_path / "r", train=["q1", "q2"], held_out=["q1", "new", "newer"], steps=1, eval_every=0)
    assert measure(run, ReportOptions())["measured_with"]["held_out_prompts"] == 2
    only = make_run(base, tmp_path / "only", train=["q1", "q2"], held_out=["q1", "q2"], steps=1, eval_every=0)
    with pytest.raises(InputError, match="2 of 2 were trained on"):
        measure(only, ReportOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": read_prompts(["question 1", "new"])}, "1 of 2 were trained on"),
        ({"general": read_prompts(["question 1", "new"])}, "at least 2"),
        ({"max_new_tokens": 600}, "max_position_embeddings|max_new_tokens"),
        ({"model": "nowhere/at-all/x"}, "does not exist"),
    ],
)
def test_what_would_measure_something_else_is_refused(lora_run, options, words):
    with pytest.raises(InputError, match=words):
        measure(lora_run, ReportOptions(**options))


def test_another_base_than_the_runs_is_refused(lora_run, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"model.safetensors has other content"):
        measure(lora_run, ReportOptions(model=str(other)))
    shutil.copytree(lora_run, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**run_settings(lora_run), "quantization": "nf4"}))
    with pytest.raises(InputError, match="quantization='nf4'"):
        measure(tmp_path / "packed", ReportOptions())


def test_a_device_that_is_not_here_is_no_obstacle(lora_run):
    settings = {**run_settings(lora_run), "device": "cuda:99"}
    assert load_run(lora_run, read_record(lora_run), settings, None).base.model.device.index != 99


def test_a_run_without_held_out_prompts_needs_some_and_one_without_a_record_is_none(lora_run, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(lora_run, old)
    (old / "held_out.jsonl").write_text("")
    with pytest.raises(InputError, match="--prompts"):
        measure(old, ReportOptions())
    card = measure(old, ReportOptions(prompts=read_prompts(HELD_OUT)))
    assert card["kl"]["own"]["after"]["value"] < card["kl"]["own"]["before"]["value"]
    (old / "run.json").unlink()
    with pytest.raises(InputError, match="no run of `opcd train`"):
        measure(old, ReportOptions(prompts=read_prompts(HELD_OUT)))


def train_with_teacher(base, teacher, folder):
    config = OPCDConfig(output_dir=str(folder), steps=1, batch_size=2, max_new_tokens=6, lora_rank=2,
                        device="cpu", dtype="float32", eval_every=0)  # fmt: skip
    OPCDTrainer(load_model(base, dtype="float32", device="cpu"), load_tokenizer(base), CONTEXT, ["a", "b"], config,
                teacher_model=teacher, teacher_tokenizer=load_tokenizer(base), eval_prompts=HELD_OUT,
                quiet=True).train()  # fmt: skip


def test_a_larger_teacher_is_loaded_again_and_scores(base, tmp_path):
    other = save_base(tmp_path / "other", seed=7)
    train_with_teacher(base, load_model(other, dtype="float32", device="cpu"), tmp_path / "r")
    card = measure(tmp_path / "r", ReportOptions())
    assert card["teacher_model"] == "other" and list(card["arms"]) == list(ARMS)
    assert card["kl"]["own"]["before"]["value"] > 1  # two random models are far apart, a context less
    train_with_teacher(base, tiny_model(3), tmp_path / "memory")  # one that nobody can load again
    with pytest.raises(InputError, match="teacher was a model in memory"):
        measure(tmp_path / "memory", ReportOptions())


def test_an_arm_that_the_students_window_is_too_short_for_is_left_out(tmp_path):
    base, other = (save_base(tmp_path / name, seed=seed) for seed, name in enumerate(("short", "other")))
    tokenizer, asked = load_tokenizer(base), [{"role": "user", "content": max(HELD_OUT, key=len)}]
    shown = [{"role": "system", "content": CONTEXT}, *asked]
    template = {"add_generation_prompt": True, "return_dict": False}
    without, within = (len(tokenizer.apply_chat_template(said, **template)) for said in (asked, shown))
    assert within > without
    settings = Path(base) / "config.json"
    window = {"max_position_embeddings": without + 6}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | window))
    train_with_teacher(base, load_model(other, dtype="float32", device="cpu"), tmp_path / "r")
    options = ReportOptions(behaviours=(by_pattern("[a-z]"),), general=tuple(read_prompts(["hi", "you"])))
    card = measure(tmp_path / "r", options)
    assert list(card["arms"]) == list(card["scores"][0]["arms"]) == [BASE, SHOWN, STUDENT]
    pages = [file.read_text() for file in write_report(tmp_path / "r", card, CONTEXT) if file.suffix != ".json"]
    assert len(pages) == 2
    assert all("Without student + context: the context does not fit the student" in page for page in pages)


def test_scorers_are_held_to_their_range(lora_run):
    with pytest.raises(InputError, match="regular expression"):
        by_pattern("(")
    scorer = by_pattern("^a").scorer
    assert scorer([], "abc", {}) == 1 and scorer([], " abc", {}) == 1 and scorer([], "cba", {}) == 0
    for bad, words in ((lambda *_: 2, "from 0 to 1"), (lambda *_: 1 / 0, "ZeroDivisionError")):
        with pytest.raises(InputError, match=f"'mine'.*{words}"):
            measure(lora_run, ReportOptions(behaviours=[Behaviour("mine", "function", bad)]))


def test_the_readme_is_what_the_hub_reads(card):
    for base_model, adapter, wanted in (
        ("some/model", True, {"base_model": "some/model", "base_model_relation": "adapter", "library_name": "peft"}),
        ("some/model", False, {"base_model": "some/model", "base_model_relation": "finetune"}),
        ("smollm2", True, {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
    ):
        text = readme({**card, "base_model": base_model, "adapter": adapter})
        front = yaml.safe_load(text.split("---\n")[1])
        assert {key: front[key] for key in wanted} == wanted
    front = yaml.safe_load(readme({**card, "base_model": "folder"}).split("---\n")[1])
    assert "base_model" not in front and "opcd" in front["tags"]
    assert card["warning"] in text
    rows = [line for line in text.splitlines() if line.startswith("| instructions")]
    assert len(rows) == 1 and rows[0].count("|") == len(ARMS) + 2


def test_what_gets_published_holds_no_context_and_no_answers(card, tmp_path):
    card = copy.deepcopy(card)
    for score in card["scores"]:
        score["regressions"]["examples"] = [
            {"prompt": "pqr", "scores": {SHOWN: 1, STUDENT: 0}, "answers": {SHOWN: "stu", STUDENT: "vwx"}}
        ]
    (tmp_path / "final").mkdir()
    write_report(tmp_path, card, CONTEXT)
    for path in (tmp_path / "final").iterdir():
        text = path.read_text()
        for word in (CONTEXT, "pqr", "vwx", HELD_OUT[0], str(tmp_path.parent)):
            assert word not in text, (path.name, word)
    assert CONTEXT in (tmp_path / "report.html").read_text()


def test_the_command_writes_all_files_and_says_so(lora_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    general = write_lines(tmp_path / "general.jsonl", [{"prompt": f"general {i}"} for i in range(3)])
    status = main(["report", str(lora_run), "--general", str(general), "--regex", "[a-z]", "^z", "--max-prompts", "3"])
    out = capsys.readouterr().out
    assert status == 0
    for name in ("opcd_card.json", "README.md", "report.html", "final/README.md", "final/opcd_card.json"):
        assert (lora_run / name).is_file()
    assert "gap closed" in out
    card = json.loads((lora_run / "opcd_card.json").read_text())
    assert [score["name"] for score in card["scores"]] == ["[a-z]", "^z"]
    assert card["forgetting"]["prompts"] == 3
    assert card["measured_with"]["held_out_prompts"] == 3 and card["measured_with"]["of"] == len(HELD_OUT)
    assert card["measured_with"]["max_new_tokens"] == 6
    assert card["saved"]["virtual_tokens"] == 0 and "virtual" not in (lora_run / "README.md").read_text()


def test_a_trained_prefix_is_reported_and_not_counted_as_prompt(base, tmp_path):
    run = make_run(base, tmp_path / "r", **{**KINDS["prefix"], "steps": 3, "eval_every": 0})
    card = measure(run, ReportOptions())
    write_report(run, card, CONTEXT)
    assert card["adapter"] and card["saved"]["virtual_tokens"] == 6
    assert card["kl"]["own"]["before"]["value"] != card["kl"]["own"]["after"]["value"]
    for name in ("README.md", "report.html"):
        assert "trained prefix of 6 virtual tokens" in (run / name).read_text()


@pytest.mark.parametrize("argument", [["--max-prompts", "1"], ["--samples", "0"], ["--temperature", "0"],
                                      ["--task", "nothing"], ["--regex", "("], ["--scorer", "x"],
                                      ["--abilities", "no-such"], ["--ability-problems", "1"],
                                      ["--ability-tokens", "0"]])  # fmt: skip
def test_bad_arguments_are_one_line_before_anything_is_loaded(lora_run, argument, capsys, monkeypatch):
    monkeypatch.setattr("opcd_fast.evaluation.report.measurement.load_run", lambda *a: pytest.fail("loaded"))
    assert main(["report", str(lora_run), *argument]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["report", str(lora_run.parent / "nothing")]) == 2
    assert "is not a run" in capsys.readouterr().err
