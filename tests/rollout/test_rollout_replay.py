"""Answers from a file: token ids or text, matched by the prompt's ids, with an error for every gap."""

import json
from dataclasses import replace

import pytest
from tiny import tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.rollout.protocol import Completion
from opcd_fast.rollout.replay import ReplayRollout, write_replay
from opcd_fast.training.samplers import make_rollout
from opcd_fast.training.settings.config import OPCDConfig

END = 256


def written(tmp_path, *rows):
    file = tmp_path / "answers.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def replay(file, **options):
    return ReplayRollout(file, stop_token_ids=[END], **options)


def test_what_was_written_comes_back(tmp_path):
    prompts = [[1, 2], [3]]
    answers = [Completion((4, END), (-0.5, -0.25), True), Completion((5, 6, 7), None, False)]
    write_replay(tmp_path / "a.jsonl", prompts, answers)
    engine = replay(tmp_path / "a.jsonl")
    assert engine.generate(prompts[::-1], max_new_tokens=9) == answers[::-1]
    assert engine.generate(prompts[:1], max_new_tokens=9, logprobs=False)[0].logprobs is None
    (cut,) = engine.generate(prompts[:1], max_new_tokens=1)
    assert cut == Completion((4,), (-0.5,), False)
    engine.sync(None)
    assert "2 answers to 2 prompts" in engine.explain()
    with pytest.raises(InputError, match="2 prompts, but 1 answers"):
        write_replay(tmp_path / "b.jsonl", prompts, answers[:1])


def test_several_answers_to_a_prompt_take_turns(tmp_path):
    rows = [{"prompt_ids": [1], "response_ids": [token]} for token in (10, 11, 12)]
    engine = replay(written(tmp_path, *rows))
    drawn = [a.token_ids[0] for a in engine.generate([[1]] * 3, max_new_tokens=1, seed=0)]
    assert sorted(drawn) == [10, 11, 12]
    firsts = {engine.generate([[1]], max_new_tokens=1, seed=seed)[0].token_ids[0] for seed in range(20)}
    assert firsts == {10, 11, 12}
    assert drawn == [a.token_ids[0] for a in engine.generate([[1]] * 3, max_new_tokens=1, seed=0)]


def test_nothing_follows_the_stop_token(tmp_path):
    engine = replay(written(tmp_path, {"prompt_ids": [1], "response_ids": [5, END, 6], "logprobs": [-1, -2, -3]}))
    assert engine.generate([[1]], max_new_tokens=9) == [Completion((5, END), (-1.0, -2.0), True)]


def test_text_is_rendered_as_the_trainer_renders_it(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "Hi?", "response": "Yes."},
        {"prompt": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"},
                    {"role": "user", "content": "C"}], "response": "No."},
    ]  # fmt: skip
    engine = replay(written(tmp_path, *rows), tokenizer=tokenizer)
    messages = [[{"role": "user", "content": "Hi?"}], rows[1]["prompt"]]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages]
    first, second = engine.generate(prompts, max_new_tokens=20)
    assert tokenizer.decode(first.token_ids) == "Yes.<|end|>" and first.finished
    assert tokenizer.decode(second.token_ids) == "No.<|end|>"
    with pytest.raises(InputError, match="answers.jsonl:1: the answer is text; give tokenizer="):
        replay(written(tmp_path, *rows))


def test_a_missing_prompt_is_named(tmp_path):
    engine = replay(written(tmp_path, {"prompt_ids": [1], "response_ids": [2]}))
    with pytest.raises(InputError, match=r"no answer to 2 of 3 prompts, the first is number 1 \(\[1, 1\]"):
        engine.generate([[1], [1, 1], [9]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: must be an object"),
        ({"prompt_ids": [], "response_ids": [1]}, ":1: prompt_ids must be a list of token ids, and not empty"),
        ({"prompt_ids": [1]}, ":1: response_ids must be"),
        ({"prompt_ids": [1], "response_ids": [1.5]}, ":1: response_ids must be"),
        ({"prompt_ids": [1], "response_ids": [True]}, ":1: response_ids must be"),
        ({"prompt_ids": [1], "response_ids": [300]}, ":1: token 300 is not in the vocabulary of 261"),
        ({"prompt_ids": [1], "response_ids": [2], "logprobs": []}, ":1: logprobs must be a number for each of the 1"),
        ({"prompt": "x"}, ":1: must have prompt_ids"),
    ],
)
def test_bad_lines_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        replay(written(tmp_path, row), vocab_size=261, tokenizer=tiny_tokenizer())


def test_a_correction_needs_every_answers_logprobs(tmp_path):
    prompts, answers = [[1, 2], [3]], [Completion((4, 5), (-0.5, -0.25), False), Completion((6,), None, False)]
    config = OPCDConfig(rollout="replay", rollout_file=str(tmp_path / "a.jsonl"), importance_correction="token")

    def make(config):
        return make_rollout(config, None, stop_token_ids=[256], vocab_size=None, prompts=prompts)

    write_replay(tmp_path / "a.jsonl", prompts, answers)
    with pytest.raises(InputError, match="importance_correction needs log-probabilities, and 1 answers of rollout_fi"):
        make(config)
    make(replace(config, importance_correction="none"))
    write_replay(tmp_path / "a.jsonl", prompts, [answers[0], replace(answers[1], logprobs=(-0.1,))])
    make(config)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="rollout_file=.*cannot be read"):
        replay(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no answers"):
        replay(written(tmp_path))
