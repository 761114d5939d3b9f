"""Who writes the answers and what is minimised on them: each against plain forwards, and stopped runs go on."""

import json
import os
import shutil
import signal

import pytest
import torch
from tiny import logprobs_by_hand, tiny_model
from training_runs import CONTEXT, PROMPTS, losses, make

from opcd_fast.errors import InputError
from opcd_fast.training import Interrupted
from opcd_fast.training.answers import sampling_of
from opcd_fast.training.answers import sources as answer_sources
from opcd_fast.training.run import curve

SYSTEMS = {
    "off-policy": {"answers": "teacher", "divergence": "forward_kl"},
    "sequences": {"answers": "teacher", "objective": "nll"},
    "kept": {"answers": "teacher", "objective": "nll", "kept_answers": 2, "batch_size": 5, "rollouts_per_prompt": 3},
    "live": {"answers": "teacher", "teacher_mode": "live"},
    "ema": {"answers": "teacher", "teacher_mode": "ema", "teacher_ema_decay": 0.5},
}


# --- the first step by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize(
    "system",
    [{"divergence": "reverse_kl"}, SYSTEMS["off-policy"], SYSTEMS["sequences"]],
    ids=["opcd", "off-policy", "sequences"],
)
def test_the_first_loss_is_the_formula_on_the_answers(tokenizer, tmp_path, system, normalize):
    """Eq. 1 of arXiv 2602.12275 and its two baselines, from plain forward passes in float64."""
    settings = {
        "temperature": 0.8, "stop_tokens": tuple("abcdefghijklmnopqrst"), "normalize": normalize, "steps": 1, **system,
    }
    result = make(tokenizer, tmp_path / "run", eval_every=1, **settings).train()
    fresh = make(tokenizer, tmp_path / "fresh", **settings)
    drawn, rows = fresh.source.draw(0), fresh.source.rows_of(0)
    assert len({len(answer.token_ids) for answer in drawn.answers}) > 1, "the two means would be the same"
    objective, of_teacher = settings.get("objective", "reverse_kl"), "answers" in system
    model, values = tiny_model(dtype=torch.float64), []
    for row, sample, answer in zip(rows, drawn.samples, drawn.answers, strict=True):
        assert (sample.student_prompt, sample.teacher_prompt) == (row.student_ids, row.teacher_ids)
        assert tuple(sample.response) == answer.token_ids and (sample.logprobs is None) == of_teacher
        shown, response = (*fresh.prefixes[0], *row.teacher_ids), list(answer.token_ids)
        writes = shown if of_teacher else row.student_ids  # the one who wrote had this in front
        by_hand = logprobs_by_hand(model, writes, response, 0.8)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), by_hand, rtol=1e-4, atol=1e-4)
        p, q = (
            (model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].detach() / 0.8).log_softmax(-1)
            for prompt in (row.student_ids, shown)
        )
        if objective == "nll":
            values.append(-p.gather(1, torch.tensor(response)[:, None])[:, 0])
        else:
            values.append(((q.exp() * (q - p)) if of_teacher else (p.exp() * (p - q))).sum(-1))
    means = torch.stack([one.mean() for one in values]) if normalize == "sequence" else torch.cat(values)
    record = result.history[0]
    assert record["loss"] == pytest.approx(float(means.mean()), rel=1e-4)
    if of_teacher:
        named = "nll" if objective == "nll" else "forward_kl"
        assert (record["objective"], record["answers_of"], record["answers"]) == (named, "teacher", 4)
    assert ("nll_per_token" in record) == (objective == "nll") == ("kl_per_token" not in record)
    assert ("teacher" in record["seconds"]) == (objective != "nll")


def test_evaluation_is_the_same_for_every_system(tokenizer, tmp_path):
    def first(name, **settings):
        return make(tokenizer, tmp_path / name, steps=1, eval_every=1, **settings).train().evaluations[0]

    wanted = first("opcd")
    for name in ("off-policy", "sequences"):
        assert first(name, **SYSTEMS[name]) == wanted


# --- who writes ----------------------------------------------------------------------------------------------


def test_a_teacher_that_sees_what_the_student_sees_writes_what_the_student_writes(tokenizer, tmp_path):
    prompts = [{"prompt": text, "privileged_context": ""} for text in PROMPTS[:-1]] + [PROMPTS[-1]]
    trainer = make(tokenizer, tmp_path / "run", prompts=prompts, merge_for_rollout=False, answers="teacher")
    alike = [row for row in trainer.train_rows if not row.has_context]
    sampling = sampling_of(trainer.config, "rollout", 0)
    mine, teachers = trainer.samplers.student_writes(alike, sampling), trainer.samplers.teacher_writes(alike, sampling)
    assert len(alike) == 5 and [a.token_ids for a in mine] == [a.token_ids for a in teachers]
    rows = trainer.train_rows
    shown = [a.token_ids for a in trainer.samplers.teacher_writes(rows[-1:] * 8, sampling)]
    assert shown != [a.token_ids for a in trainer.samplers.student_writes(rows[-1:] * 8, sampling)]


@pytest.mark.parametrize("lora_rank", [4, 0])
@pytest.mark.parametrize("mode", ["frozen", "live", "ema", "periodic"])
def test_the_teacher_writes_with_the_weights_that_its_mode_says(tokenizer, tmp_path, mode, lora_rank):
    more = {"teacher_ema_decay": 0.5} if mode == "ema" else {"teacher_sync_every": 2} if mode == "periodic" else {}
    trainer = make(
        tokenizer, tmp_path / "run", teacher_mode=mode, lora_rank=lora_rank, answers="teacher", steps=3,
        learning_rate=1e-2 if lora_rank else 3e-3, eval_prompts=["one"], **more,
    )  # fmt: skip
    trainer.train()
    rows = trainer.train_rows
    prompts = [(*trainer.prefixes[0], *row.teacher_ids) for row in rows]
    (answer, *_) = answers = trainer.samplers.teacher_writes(rows, sampling_of(trainer.config, "x", 0))
    got = torch.cat([torch.tensor(a.logprobs).double() for a in answers])

    def by_hand(model):
        return torch.cat([logprobs_by_hand(model, p, a.token_ids, 1.0) for p, a in zip(prompts, answers)])

    candidates = {"frozen": tiny_model(), "live": trainer.model}
    if mode in ("ema", "periodic"):
        candidates[mode] = trainer.teachers.pair.teacher
    torch.testing.assert_close(got, by_hand(candidates.pop(mode)), rtol=1e-4, atol=1e-4)
    for other, model in candidates.items():
        assert (got - by_hand(model)).abs().max() > 1e-2, f"cannot tell {mode} from {other}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_stopped_run_goes_on_bit_for_bit(tokenizer, tmp_path, system):
    settings = {**SYSTEMS[system], "steps": 4, "save_every": 1, "keep_checkpoints": 9}
    whole = make(tokenizer, tmp_path / "run", **settings).train()
    assert len(set(losses(whole))) == 4
    shutil.rmtree(tmp_path / "run" / "final")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    again = make(tokenizer, tmp_path / "run", **settings, resume=True).train()
    assert losses(again) == losses(whole) and again.evaluations[-1] == whole.evaluations[-1]


# --- kept answers --------------------------------------------------------------------------------------------


def test_kept_answers_are_drawn_once_and_used_in_turn(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path / "run", **{**SYSTEMS["kept"], "batch_size": 6, "eval_every": 0})
    calls, inner = [], trainer.teacher_rollout.generate
    trainer.teacher_rollout.generate = lambda prompts, **kw: calls.append(len(prompts)) or inner(prompts, **kw)
    trainer.train()
    assert calls == [12]  # two answers to each of six prompts
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    held = {}
    for line in lines:
        held.setdefault(tuple(line["prompt_ids"]), []).append(line["response_ids"])
    assert [len(answers) for answers in held.values()] == [2] * 6
    counts = json.loads((tmp_path / "run" / "answers.json").read_text())
    assert counts["answers"] == 12 and counts["response_tokens"] == sum(len(line["response_ids"]) for line in lines)
    seen = set()
    for step in range(6):
        drawn = trainer.source.draw(step)
        for start in range(0, 18, 3):  # three answers to each prompt: one of the two comes twice
            group = drawn.samples[start : start + 3]
            answers = held[tuple(group[0].student_prompt)]
            order = [answers.index(list(sample.response)) for sample in group]
            assert order in ([0, 1, 0], [1, 0, 1])
            seen.add(tuple(order))
    assert len(seen) == 2


def test_a_run_stopped_while_answers_are_drawn_draws_them_when_it_goes_on(tokenizer, tmp_path):
    whole = make(tokenizer, tmp_path / "whole", **SYSTEMS["kept"]).train()
    stopped = make(tokenizer, tmp_path / "run", **SYSTEMS["kept"])

    def interrupted(prompts, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("a signal ends this at once")

    stopped.teacher_rollout.generate = interrupted
    with pytest.raises(Interrupted, match="step 0 is saved"):
        stopped.train()
    assert not (tmp_path / "run" / answer_sources.FILE).exists()
    again = make(tokenizer, tmp_path / "run", **SYSTEMS["kept"], resume=True).train()
    assert losses(again) == losses(whole)
    name = answer_sources.FILE
    assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_run_begun_anew_has_answers_of_its_own(tokenizer, tmp_path):
    """One that was killed before its first checkpoint leaves a file, which the next run does not take over."""
    (tmp_path / "run").mkdir()
    for name in (answer_sources.FILE, answer_sources.KEPT_COUNTS):
        (tmp_path / "run" / name).write_text("left behind")
    make(tokenizer, tmp_path / "run", **SYSTEMS["kept"], steps=1).train()
    assert json.loads((tmp_path / "run" / answer_sources.KEPT_COUNTS).read_text())["answers"] == 12
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / answer_sources.FILE).write_text("left behind")
    make(tokenizer, tmp_path / "other", steps=1).train()
    assert not (tmp_path / "other" / answer_sources.FILE).exists()


@pytest.mark.parametrize("system", ["off-policy", "sequences"])
def test_records_warnings_and_pictures_of_answers_that_are_not_the_students(tokenizer, tmp_path, caplog, system):
    """Six steps: enough to be judged. Nobody else's answers collapse, and a likelihood has no entropy or KL."""
    settings = {"steps": 6, "eval_every": 6, "plots": True, **SYSTEMS[system]}
    with caplog.at_level("WARNING", "opcd_fast"):
        result = make(tokenizer, tmp_path / "run", **settings).train()
    assert {w["name"] for w in result.warnings} <= {"cut_answers"}
    assert all(r["answers_of"] == "teacher" and "sampler_kl" not in r for r in result.history)
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"kl.png", "seconds.png", "answers.png"}
    drawn = curve(tmp_path / "run")  # by a report, as KL to the teacher
    assert len(drawn["steps"]) == (6 if system == "off-policy" else 0) and len(drawn["evaluations"]) == 2
    alone = make(tokenizer, tmp_path / "alone", **{**settings, "eval_every": 0}).train()
    assert (tmp_path / "alone" / "kl.png").exists() == (system == "off-policy") and len(alone.history) == 6


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda f: f.unlink(), "cannot be read"), (lambda f: f.write_text("{}\n"), "cannot be read"),
     (lambda f: f.write_text("\n".join(f.read_text().splitlines()[::-1])), "other prompts")],
)  # fmt: skip
def test_kept_answers_that_are_lost_are_not_drawn_anew(tokenizer, tmp_path, damage, words):
    make(tokenizer, tmp_path / "run", **SYSTEMS["kept"]).train()
    damage(tmp_path / "run" / answer_sources.FILE)
    for found in (answer_sources.FILE, words):  # by the checkpoint's manifest, and without one, as in older runs
        with pytest.raises(InputError, match=found):
            make(tokenizer, tmp_path / "run", **SYSTEMS["kept"], resume=True, steps=6).train()
        for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
            manifest.unlink()


def test_contexts_of_rows_keep_their_own_answers(tokenizer, tmp_path):
    rows = [{"prompt": "q", "privileged_context": c} for c in (CONTEXT, "never say anything at all, at all")]
    trainer = make(
        tokenizer, tmp_path / "run", prompts=rows, answers="teacher", kept_answers=1, batch_size=2, eval_prompts=None
    )
    trainer.source.prepare(0)
    drawn = trainer.source.draw(0)
    model = tiny_model()
    for sample, answer in zip(drawn.samples, drawn.answers):
        shown = (*trainer.prefixes[sample.context_index], *sample.teacher_prompt)
        by_hand = logprobs_by_hand(model, shown, answer.token_ids, 1.0)
        torch.testing.assert_close(torch.tensor(answer.logprobs).double(), by_hand, rtol=1e-4, atol=1e-4)
