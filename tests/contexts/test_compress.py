"""Shorter contexts are ranked by the exact KL to the full one."""

import json

import pytest
import torch
from tiny import lora_model, tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.contexts import Candidate, Ranked, cut_candidates, parts_that_matter, rank, written_candidates
from opcd_fast.contexts.compression import with_front
from opcd_fast.data import read_prompts, teacher_ids
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Arm
from opcd_fast.rollout import Completion, TransformersRollout
from opcd_fast.runtime import stream_seed

TURNS = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"}, {"role": "assistant", "content": "2"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def test_cuts_keep_whole_exchanges():
    system = {"role": "system", "content": "s"}
    cuts = cut_candidates([system, *TURNS])
    assert [cut.context for cut in cuts] == [[system, *TURNS[:2]], [system, *TURNS[2:]]]
    cuts = cut_candidates("a\nb\n\nc\n\nd")
    assert [cut.context for cut in cuts] == ["a\nb", "d", "a\nb\n\nc", "c\n\nd", "a\nb\n\nd"]
    assert [cut.left_out for cut in cuts] == [None, None, "d", "a\nb", "c"], "which part is not there"
    assert [cut.context for cut in cut_candidates("a\nb")] == ["a", "b"]
    assert cut_candidates("one line") == []


def test_written_candidates_are_shorter_and_different():
    asked = []

    def answers(questions, seed):
        asked.extend(question[0]["content"] for question in questions)
        written = ["short text", "<think>x</think>short text", "", "word " * 50]
        return [written[index % 4] for index in range(len(questions))]

    found = written_candidates("one two three four five six", answers, 1, 0)
    assert [candidate.context for candidate in found] == ["short text"] and len(asked) == 12
    assert all("one two three four five six" in question for question in asked)
    assert "at most 4 words" in asked[0] and "at most 3 words" in asked[-1]


def test_the_part_that_matters_most_comes_first():
    cuts = cut_candidates("\n".join(map(str, range(5))))
    worth = {"0": 0.1, "1": 0.0, "2": 2.0, "3": 0.2, "4": 0.3}
    ranked = [Ranked(cut, 1.0, worth.get(str(cut.left_out), 9.0), 0, 0, 1.0) for cut in cuts]
    assert [one.candidate.left_out for one in parts_that_matter(ranked)] == ["2", "4", "3", "0", "1"]
    assert {str(cut.left_out) for cut in cut_candidates("\n".join(map(str, range(99))))} == {"None", "0", "98"}
    assert parts_that_matter([Ranked(cut, 1.0, 1.0, 0, 0, 1.0) for cut in cut_candidates("a\nb")]) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_the_ranking_is_the_kl_of_plain_forward_passes(model, adapter):
    """Of the model as it answers: with its adapter."""
    model, tokenizer = lora_model().eval() if adapter else model, tiny_tokenizer()
    prompts = read_prompts(["what is it", "say more", "why"])
    rollout = TransformersRollout(model, stop_token_ids=[tokenizer.eos_token_id])
    full = "be brief\nbe kind\nbe quick"
    candidates = [*cut_candidates(full), Candidate("be brief and kind", "mine")]
    temperature = 0.8
    ranked = rank(
        model, Arm(tokenizer, rollout.generate), full, candidates, prompts,
        max_new_tokens=5, temperature=temperature, answers_per_prompt=2, micro_batch_tokens=40,
    )  # fmt: skip
    assert {str(one.candidate.context) for one in ranked} == {"", full, *(str(c.context) for c in candidates)}
    assert [one.tokens for one in ranked] == sorted(one.tokens for one in ranked)
    assert ranked[0].candidate.context == "" and ranked[0].tokens == 0
    whole = next(one for one in ranked if one.candidate.context == full)
    assert abs(whole.kl) < 1e-6 and whole.top1_agreement == 1.0
    assert all(one.kl > 1e-5 for one in ranked if one is not whole)
    with pytest.raises(InputError, match="at least two"):
        rank(model, Arm(tokenizer, rollout.generate), full, [], prompts[:1], max_new_tokens=2)

    double = [prompt for prompt in prompts for _ in range(2)]
    drawn = rollout.generate(
        [teacher_ids(tokenizer, prompt, full) for prompt in double],
        max_new_tokens=5, temperature=temperature, seed=stream_seed(0, "compress answers", 0),
    )  # fmt: skip

    @torch.no_grad()
    def logprobs(prompt, answer, context):
        ids = [*teacher_ids(tokenizer, prompt, context), *answer]
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1]
        return (logits.double() / temperature).log_softmax(-1)

    for one in ranked:
        means = []
        for prompt, answer in zip(double, drawn):
            p = logprobs(prompt, answer.token_ids, full)
            q = logprobs(prompt, answer.token_ids, one.candidate.context)
            means.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert one.kl == pytest.approx(sum(means) / len(means), abs=2e-6), one.candidate
        assert one.low <= one.kl <= one.high


def test_the_interval_is_one_over_prompts(model):
    """The same answer of a prompt again and again tells no more of it."""
    tokenizer, full = tiny_tokenizer(), "be brief\nbe kind"
    prompts = read_prompts(["what is it", "say more", "why"])

    class Fixed:
        def generate(self, rows, **_):
            return [Completion((5, 6, 7), None, True) for _ in rows]

    once, often = (
        rank(model, Arm(tokenizer, Fixed().generate), full, [], prompts, max_new_tokens=3, answers_per_prompt=count)[0]
        for count in (1, 9)
    )
    assert once.kl == pytest.approx(often.kl) and once.high - once.low == pytest.approx(often.high - often.low)


def test_the_front_is_what_nothing_beats():
    points = [(0, 1.0), (3, 1.2), (5, 0.4), (5, 0.5), (9, 0.4), (12, 0.0)]
    ranked = [Ranked(Candidate(str(p), ""), p[0], p[1], 0, 0, 1.0) for p in points]
    assert [one.front for one in with_front(ranked)] == [True, False, True, False, False, True]


def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "context.json").write_text(json.dumps(TURNS))
    (tmp_path / "own.txt").write_text("count up")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p {n}"}) + "\n" for n in range(4)))
    arguments = [
        "compress", "--model", str(tmp_path / "model"), "--context", str(tmp_path / "context.json"),
        "--prompts", str(tmp_path / "prompts.jsonl"), "--output-dir", str(tmp_path / "out"), "--max-new-tokens", "4",
        "--max-context-tokens", "6", "--candidates", str(tmp_path / "own.txt"), "--device", "cpu",
    ]  # fmt: skip
    assert main([*arguments, "--max-kl", "100"]) == 0
    assert "saved" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "ranked.json").read_text())
    sources = {row["candidate"]["source"] for row in record["ranked"]}
    assert {"none", "the full context", f"file {tmp_path / 'own.txt'}", "first 1 of 2 parts"} <= sources
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    # The shortest that is good enough, and is shorter than the whole.
    (most,) = (row["tokens"] for row in record["ranked"] if row["candidate"]["source"] == "the full context")
    shorter = [row for row in record["ranked"] if 0 < row["tokens"] < most]
    (saved,) = (tmp_path / "out").glob("shorter.*")
    text = saved.read_text()
    assert shorter[0]["candidate"]["context"] == (text if saved.suffix == ".txt" else json.loads(text))
    middle = sorted(row["kl"] for row in shorter)[len(shorter) // 2]
    assert main([*arguments, "--max-kl", str(middle)]) == 0
    source = next(row["candidate"]["source"] for row in shorter if row["kl"] <= middle)
    assert f"({source})" in capsys.readouterr().out
    assert main([*arguments, "--max-kl", "0", "--written", "0"]) == 0
    assert "no shorter candidate" in capsys.readouterr().out and not list((tmp_path / "out").glob("shorter.*"))
    assert main([*arguments, "--temperature", "0"]) == 2
    for more in (["--max-new-tokens", "500", "--written", "0"], ["--max-context-tokens", "500"]):
        assert main([*arguments, *more]) == 2 and "the model's window of 512" in capsys.readouterr().err
    (tmp_path / "context.txt").write_text("be brief")
    (tmp_path / "own.txt").write_text("be brief, and do not say more than is asked for")
    assert main([*arguments, "--context", str(tmp_path / "context.txt"), "--written", "0", "--max-kl", "100"]) == 0
    assert "no shorter candidate" in capsys.readouterr().out  # the one that is there is longer than the full context
