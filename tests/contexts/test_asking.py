"""Prompts that a model writes: what is asked, what is read out of its answer, and what a round keeps."""

import pytest
from tiny import tiny_tokenizer

from opcd_fast.contexts.asking import EXAMPLES, USERS, ask, listed, request
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Arm
from opcd_fast.rollout import Completion


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1. One is it?\n2. Two", ["One is it?", "Two"]),
        ("Sure! Here are five:\n\n1) **One?**\n2) \"Two?\"\n\nHope that helps!", ["One?", "Two?"]),
        ("- One?\n* Two?\n• Three?", ["One?", "Two?", "Three?"]),
        ("**1.** One?\n(2) Two?\n[3] Three?", ["One?", "Two?", "Three?"]),
        ('Here:\n["One?", "Two?"]', ["One?", "Two?"]),
        ("One?\nTwo?\n\nThree?", ["One?", "Two?", "Three?"]),
        ("<think>\n1. a thought\n</think>\n1. yes", ["yes"]),
        ("1. User: hello there\n2. Question 2: why?", ["hello there", "why?"]),
        ("1. [Your item] costs 2.50?\n2. 3.5 litres, is it", ["[Your item] costs 2.50?", "3.5 litres, is it"]),
        ("Here are the messages:\n", []),
        ("1.\n2. ...\n3. 42", []),
        ("", []),
    ],
)  # fmt: skip
def test_lists_in_every_dress(text, wanted):
    assert listed(text) == wanted


def test_a_line_that_the_limit_cut_is_dropped():
    assert listed("1. One?\n2. Two", finished=False) == ["One?"]
    assert listed("1. One?\n2. Two", finished=True) == ["One?", "Two"]


def test_the_request_shows_the_context_and_who_asks():
    chat = request("Be a pirate.", USERS[0])
    assert [m["role"] for m in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert "Be a pirate." in chat[-1]["content"] and USERS[0] in chat[-1]["content"]
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4, matey"}]
    assert "user: 2+2?\nassistant: 4, matey" in request(turns, USERS[0])[-1]["content"]


class Written:
    """A rollout that answers with given texts, one after the other, and keeps what it was asked."""

    def __init__(self, tokenizer, texts, finished=True):
        self.tokenizer, self.texts, self.finished, self.calls = tokenizer, list(texts), finished, []

    def generate(self, prompts, **settings):
        self.calls.append((prompts, settings))
        answers = []
        for _ in prompts:
            text = self.texts.pop(0) if self.texts else "1. the same question again?"
            answers.append(Completion(tuple(self.tokenizer(text).input_ids), (), self.finished))
        return answers


def numbered(*lines):
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))


def test_rounds_go_on_until_enough_different_prompts_are_there():
    tokenizer = tiny_tokenizer()
    animals = ["otter", "walrus", "badger", "heron", "gecko", "mongoose", "quokka", "ibex", "lynx", "cobra", "flamingo"]
    texts = [numbered(f"{a} {a}?", f"{a.upper()} {a}!", EXAMPLES[0][2][0]) for a in animals]
    rollout = Written(tokenizer, texts)
    found = ask(Arm(tokenizer, rollout.generate), "ctx", 10, seed=3)
    # Neither repeated nor taken from the examples; 10 of the 12, without the sixth and the last.
    assert [c.text for c in found] == [f"{a} {a}?" for a in (*animals[:5], *animals[6:])]
    assert len(rollout.calls) == 2
    (first, settings), (second, later) = rollout.calls
    assert settings["seed"] != later["seed"] and len({tuple(p) for p in (*first, *second)}) == len(USERS)
    assert "request 11" in found[9].source and USERS[0] in found[9].source
    assert len({c.conversation for c in found}) == 10
    again = ask(Arm(tokenizer, Written(tokenizer, texts).generate), "ctx", 10, seed=3)
    assert [c.source for c in again] == [c.source for c in found]


def test_a_model_that_repeats_itself_ends_and_one_that_writes_no_list_is_named():
    tokenizer = tiny_tokenizer()
    rollout = Written(tokenizer, [])
    assert len(ask(Arm(tokenizer, rollout.generate), "ctx", 100)) == 1 and len(rollout.calls) < 20
    with pytest.raises(InputError, match="no list of messages"):
        ask(Arm(tokenizer, Written(tokenizer, ["?"] * 99, True).generate), "ctx", 1)
    with pytest.raises(InputError, match="chat template"):
        ask(Arm(tiny_tokenizer(template=None), rollout.generate), "ctx", 1)
