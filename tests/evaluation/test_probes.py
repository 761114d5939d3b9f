"""What arms are asked besides the held-out prompts: exact chats, scores of canned answers, and what cannot be asked."""

import re

import pytest
from tiny import tiny_tokenizer

from opcd_fast.data import Prompt, read_prompts
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Abilities, Arm, tried
from opcd_fast.evaluation.probes import OTHER_CONTEXT
from opcd_fast.rollout import Completion

ASKED = read_prompts(["one", [{"role": "system", "content": "S"}, {"role": "user", "content": "two"}], "three"])
TURNS = "".join(f"<|{turn['role']}|>{turn['content']}<|end|>" for turn in OTHER_CONTEXT)


class Canned:
    """Answers from a function of the prompt's text; keeps what it was asked."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.asked, self.sampling = tokenizer, answer, [], []

    def generate(self, prompts, **sampling):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.asked += texts
        self.sampling.append(sampling)
        return [Completion(tuple(self.tokenizer(self.answer(text)).input_ids), None, True) for text in texts]


def arm(tokenizer, answer, context=None, **more):
    canned = Canned(tokenizer, answer)
    return Arm(tokenizer, canned.generate, context, **more), canned


def test_abilities_are_scored_by_their_task_and_answered_greedily(tokenizer):
    def adds_but_not_large(text):
        a, b = map(int, re.findall(r"What is (\d+) \+ (\d+)\?", text)[-1])
        return f"{a} + {b} = {a + b if a + b < 20 else 0}"

    alone, canned = arm(tokenizer, adds_but_not_large)
    found = alone.plays(Abilities(["arithmetic"], problems=40, tokens=9))["arithmetic"]
    sums = [sum(map(int, re.findall(r"What is (\d+) \+ (\d+)\?", text)[-1])) for text in canned.asked]
    assert found == [float(total < 20) for total in sums] and 5 < sum(found) < 35
    assert canned.sampling[0] | {"seed": 0} == {"max_new_tokens": 9, "temperature": 0.0, "seed": 0}
    shown, with_context = arm(tokenizer, adds_but_not_large, "the context")
    assert shown.plays(Abilities(["arithmetic"], problems=40, tokens=9))["arithmetic"] == found
    assert with_context.asked == ["<|system|>the context<|end|>" + text for text in canned.asked]


@pytest.mark.parametrize("context", [None, "C"])
def test_another_context_stands_before_the_prompt(tokenizer, context):
    answers = {"one": "YES 1!", "two": "Yes", "three": "12"}
    one, canned = arm(tokenizer, lambda text: answers[re.findall(r"<\|user\|>(.*?)<", text)[-1]], context)
    assert one.obeys(ASKED, 3, max_new_tokens=4, temperature=0.7, top_p=0.9) == [1.0, 0.0, 0.0]  # no letter, no capital
    first = "<|system|>C<|end|>" if context else ""
    second = "<|system|>C\n\nS<|end|>" if context else "<|system|>S<|end|>"
    ends = [f"<|user|>{text}<|end|><|assistant|>" for text in ("one", "two", "three")]
    assert canned.asked == [first + TURNS + ends[0], second + TURNS + ends[1], first + TURNS + ends[2]]
    assert canned.sampling[0] | {"seed": 0} == {"max_new_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 0}


def test_second_questions_follow_the_arms_own_answer_to_the_prompt_before(tokenizer):
    one, canned = arm(tokenizer, lambda text: "z", "C")
    firsts = [tokenizer(text).input_ids for text in ("a1 <|end|>", "a2", "a3", "of another round")]
    given = one.second_answers(ASKED, firsts, 0, max_new_tokens=4, temperature=1.0)
    assert [one.text(answer.token_ids) for answer in given] == ["z"] * 3
    assert canned.asked == [
        "<|system|>C<|end|><|user|>three<|end|><|assistant|>a3<|end|><|user|>one<|end|><|assistant|>",
        "<|system|>C<|end|><|user|>one<|end|><|assistant|>a1<|end|><|user|>two<|end|><|assistant|>",
        "<|system|>C\n\nS<|end|><|user|>two<|end|><|assistant|>a2<|end|><|user|>three<|end|><|assistant|>",
    ]


def test_a_prompts_own_context_wins(tokenizer):
    own = [Prompt(({"role": "user", "content": "x"},), privileged_context=text) for text in ("own", "", None)]
    shown, canned = arm(tokenizer, lambda text: "z", "C")
    shown.answers(own, max_new_tokens=1, temperature=1.0)
    contexts = [text.partition("<|user|>")[0] for text in canned.asked]
    assert contexts == ["<|system|>own<|end|>", "", "<|system|>C<|end|>"]
    alone, canned = arm(tokenizer, lambda text: "z")
    alone.answers(own, max_new_tokens=1, temperature=1.0)
    assert {text.partition("<|user|>")[0] for text in canned.asked} == {""}


def test_what_has_no_place_is_not_measured_and_said(tokenizer):
    told = []
    size = len(tokenizer(TURNS + "<|user|>three<|end|><|assistant|>").input_ids)
    for room, wanted in ((size + 4, [0.0]), (size + 3, None)):
        one, _ = arm(tokenizer, lambda text: "z", window=room)
        assert tried("it", told.append, one.obeys, ASKED[2:], 0, max_new_tokens=4, temperature=1.0) == wanted
    assert len(told) == 1 and told[0].startswith("it not measured:") and "exceeds the model's window" in told[0]
    plain, _ = arm(tiny_tokenizer(template=None), lambda text: "z")
    assert tried("it", told.append, plain.obeys, ASKED[:1], 0, max_new_tokens=4, temperature=1.0) is None
    assert "no chat template" in told[1]


def test_an_ability_that_is_not_there_is_an_error_at_once():
    with pytest.raises(InputError, match="arithmetik"):
        Abilities(["arithmetik"]).check()
