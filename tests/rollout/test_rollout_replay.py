"""Answers from a file: token ids or text, matched by the prompt's ids, with an error for every gap."""

import json

import pytest
import torch
from tiny import tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion, ReplayRollout, write_replay

END = 256


def replay(tmp_path, *rows, **options):
    file = tmp_path / "answers.jsonl"
    if rows:
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ReplayRollout(file, stop_token_ids=[END], **options)


def test_what_was_written_comes_back(tmp_path):
    prompts = [[1, 2], [3]]
    answers = [Completion((4, END), (-0.5, -0.25), True), Completion((5, 6, 7), None, False)]
    write_replay(tmp_path / "answers.jsonl", prompts, answers)
    engine = replay(tmp_path)
    assert engine.generate(prompts[::-1], max_new_tokens=9) == answers[::-1]
    assert engine.generate(prompts[:1], max_new_tokens=9, logprobs=False)[0].logprobs is None
    assert engine.generate(prompts[:1], max_new_tokens=1) == [Completion((4,), (-0.5,), False)]
    assert "2 answers to 2 prompts" in engine.explain()
    with pytest.raises(InputError, match="2 prompts, but 1 answers"):
        write_replay(tmp_path / "b.jsonl", prompts, answers[:1])


def test_tensors_are_written_as_numbers(tmp_path):
    answers = [Completion(torch.tensor([4, END]), torch.tensor([-0.5, -0.25]), True)]
    for prompts in (torch.tensor([[1, 2]]), [torch.tensor([1, 2]).numpy()], [list(torch.tensor([1, 2]).numpy())]):
        write_replay(tmp_path / "answers.jsonl", prompts, answers)
        assert replay(tmp_path).generate([[1, 2]], max_new_tokens=9) == [Completion((4, END), (-0.5, -0.25), True)]
    with pytest.raises(InputError, match=r"prompts\[0\]"):
        write_replay(tmp_path / "answers.jsonl", [1], answers)


def test_several_answers_to_a_prompt_take_turns(tmp_path):
    engine = replay(tmp_path, *({"prompt_ids": [1], "response_ids": [token]} for token in (10, 11, 12)))

    def drawn(count, seed):
        return [a.token_ids[0] for a in engine.generate([[1]] * count, max_new_tokens=1, seed=seed)]

    assert sorted(drawn(3, 0)) == [10, 11, 12] and drawn(3, 0) == drawn(3, 0)
    assert {drawn(1, seed)[0] for seed in range(20)} == {10, 11, 12}


def test_nothing_follows_the_stop_token(tmp_path):
    engine = replay(tmp_path, {"prompt_ids": [1], "response_ids": [5, END, 6], "logprobs": [-1, -2, -3]})
    assert engine.generate([[1]], max_new_tokens=9) == [Completion((5, END), (-1.0, -2.0), True)]


def test_text_is_rendered_as_the_trainer_renders_it(tmp_path):
    tokenizer = tiny_tokenizer()
    chat = [{"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B"), ("user", "C\u2028"))]
    rows = [{"prompt": "Hi?", "response": "Yes."}, {"prompt": chat, "response": "No."}]
    engine = replay(tmp_path, *(json.dumps(row, ensure_ascii=False) for row in rows), tokenizer=tokenizer)
    prompts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for messages in ([{"role": "user", "content": "Hi?"}], chat)
    ]
    answers = engine.generate(prompts, max_new_tokens=20)
    assert [tokenizer.decode(answer.token_ids) for answer in answers] == ["Yes.<|end|>", "No.<|end|>"]
    assert all(answer.finished for answer in answers)
    with pytest.raises(InputError, match="line 1: the answer is text; give tokenizer="):
        replay(tmp_path)


def test_a_missing_prompt_is_named(tmp_path):
    engine = replay(tmp_path, {"prompt_ids": [1], "response_ids": [2]})
    with pytest.raises(InputError, match=r"no answer to 2 of 3 prompts, the first is number 1 \(\[1, 1\]"):
        engine.generate([[1], [1, 1], [9]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"), ("[]", "must be an object"), ({"prompt": "x"}, "must have prompt_ids"),
        ({"prompt_ids": [], "response_ids": [1]}, "prompt_ids"), ({"prompt_ids": [1]}, "response_ids"),
        ({"prompt_ids": [1], "response_ids": [1.5]}, "response_ids"),
        ({"prompt_ids": [1], "response_ids": [True]}, "response_ids"),
        ({"prompt_ids": [1], "response_ids": [300]}, "response_ids holds the id 300"),
        ({"prompt_ids": [1], "response_ids": [2], "logprobs": []}, "logprobs"),
        ({"prompt_ids": [1], "response_ids": [2], "logprobs": [True]}, "logprobs"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=f"answers.jsonl' line 1.*{message}"):
        replay(tmp_path, row, vocab_size=261, tokenizer=tiny_tokenizer())


def test_files_without_answers(tmp_path):
    with pytest.raises(InputError, match="rollout_file.*does not exist"):
        replay(tmp_path)
    with pytest.raises(InputError, match="holds no answers"):
        replay(tmp_path, "")
