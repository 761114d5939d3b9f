"""Limits, duplicates, the split and the mixture, and the files that hold the result."""

import json
import random
from pathlib import Path

import pytest

from opcd_fast.data import (
    Candidate,
    Prompt,
    Selection,
    check_folder,
    general_prompts,
    hold_out,
    read_prompts,
    repeats,
    select,
    summary,
    write,
)  # fmt: skip
from opcd_fast.errors import InputError


def candidate(text, conversation=None, source="s"):
    return Candidate(Prompt(({"role": "user", "content": text},), text), source, conversation or f"c {text}")


def words(seed, count):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=30)) for _ in range(count)]


def texts(candidates):
    return [c.text for c in candidates]


def test_no_near_duplicate_and_no_conversation_straddles_the_split():
    draw = random.Random(0)
    found = []
    for number, text in enumerate(words(1, 120)):
        found.append(candidate(text, f"conversation {number // 3}"))
        if draw.random() < 0.5:
            found.append(candidate(text + draw.choice(["x", "?", " q"]), f"copy {number}"))
    for seed in range(4):
        chosen = select(found, [], Selection(held_out=0.3, seed=seed))
        assert abs(len(chosen.held_out) - 36) <= 3 and len(chosen.train) + len(chosen.held_out) == 120
        for mine in chosen.train:
            for other in chosen.held_out:
                assert repeats([mine.text, other.text], 0.7) == [None, None]
                assert mine.conversation != other.conversation
    assert texts(select(found, [], Selection(seed=3)).train) == texts(select(found, [], Selection(seed=3)).train)
    assert texts(select(found, [], Selection(seed=3)).train) != texts(select(found, [], Selection(seed=4)).train)


def test_what_is_dropped_is_counted():
    found = [candidate(t) for t in ("ab", "a" * 50, "The same?", "the same", "Asked in the context", *words(2, 10))]
    selection = Selection(min_characters=3, max_characters=40, max_prompts=8, held_out=0)
    chosen = select(found, [], selection, shown=["asked, in the context!"])
    assert chosen.dropped == {
        "too short": 1, "too long": 1, "repeated": 1, "in the context already": 1, "above max_prompts": 3,
    }  # fmt: skip
    assert len(chosen.train) == 8 and not chosen.held_out
    long = select(found[4:], [], Selection(max_tokens=1, held_out=0), count_tokens=lambda c: len(c.text.split()))
    assert all(len(c.text.split()) <= 1 for c in long.train) and long.dropped["too long"] > 0


def test_turns_of_one_conversation_are_no_duplicates_of_each_other():
    before = words(5, 1)[0] * 3
    found = [candidate(before, "one"), candidate(before + " and", "one"), candidate(before + " and so", "two")]
    chosen = select(found, [], Selection(held_out=0))
    assert texts(chosen.train) == [before, before + " and"] and chosen.dropped == {"repeated": 1}


def test_of_too_many_prompts_some_are_drawn():
    found = [candidate(text) for text in words(6, 50)]
    drawn = [texts(select(found, [], Selection(max_prompts=10, held_out=0, seed=seed)).train) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert drawn[0] != texts(found[:10]) and sorted(drawn[0], key=texts(found).index) == drawn[0]


def test_general_prompts_have_their_share_of_training_and_none_of_the_evaluation():
    found = [candidate(text) for text in words(3, 100)]
    general = [*general_prompts(), candidate(found[0].text + "!")]
    chosen = select(found, general, Selection(held_out=0.2, general_share=0.2))
    mixed = [c for c in chosen.train if c.prompt.privileged_context == ""]
    assert len(mixed) == 20 == chosen.general_wanted and len(chosen.train) == 100 and len(chosen.held_out) == 20
    assert chosen.dropped == {"repeated": 1}
    assert not [c for c in chosen.held_out if c.prompt.privileged_context == ""]
    short = select(found, general_prompts(), Selection(general_share=0.9))
    assert short.general_wanted == 810 and summary(short, None)["general"] == 100


def test_too_little_for_both_sides_is_refused():
    pair = [candidate("abcdef", "a"), candidate("xyzuvw", "a")]
    for found, words in (
        ([candidate("x")], "no prompt is left"),
        ([candidate("abc")], "one side is empty"),
        (pair, "2 prompts of 1 conversations"),
    ):
        with pytest.raises(InputError, match=words):
            select(found, [], Selection())
    assert len(select([candidate("abcdef"), candidate("xyzuvw")], [], Selection()).held_out) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"held_out": -0.1}, {"held_out": 1.0}, {"held_out": float("nan")}, {"general_share": 0.95}, {"similarity": 0},
        {"similarity": 1.5}, {"max_tokens": 0}, {"min_characters": 0}, {"max_prompts": 0},
        {"min_characters": 9, "max_characters": 8},
    ],
)  # fmt: skip
def test_a_bad_selection_is_named(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Selection(**settings)


def test_files_are_read_back_as_they_were_and_name_every_source(tmp_path):
    tools = ({"type": "function", "function": {"name": "f"}},)
    chat = tuple({"role": role, "content": x} for role, x in zip(("user", "assistant", "user"), ("ü\u2028", "b", "c")))
    rich = Candidate(Prompt(chat, None, "own", tools, {"enable_thinking": False}), "logs x line 3, message 2", "g")
    bare = general_prompts()[0]
    chosen = select([rich, *(candidate(text) for text in words(4, 9))], [bare], Selection(held_out=0.5))
    write(tmp_path / "out", chosen, summary(chosen, None))
    for name, wanted in (("train.jsonl", chosen.train), ("held_out.jsonl", chosen.held_out)):
        assert [p.messages for p in read_prompts(tmp_path / "out" / name)] == [c.prompt.messages for c in wanted]
        rows = [json.loads(line) for line in (tmp_path / "out" / name).read_text().split("\n")[:-1]]
        assert [row["source"] for row in rows] == [c.source for c in wanted]
    (back,) = [p for n in ("train", "held_out") for p in read_prompts(tmp_path / "out" / f"{n}.jsonl") if not p.text]
    assert (back.privileged_context, back.tools) == ("own", tools)
    assert back.chat_template_kwargs == {"enable_thinking": False}
    report = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert report["train"] + report["held_out"] == 10 and report["sources"]["logs x"] == 1


def test_nothing_is_replaced_unasked_and_nothing_foreign_ever(tmp_path):
    check_folder(tmp_path / "none", False)
    check_folder(tmp_path, False)
    (tmp_path / "train.jsonl").write_text("old")
    check_folder(tmp_path, True)
    with pytest.raises(InputError, match="--overwrite"):
        check_folder(tmp_path, False)
    (tmp_path / "thesis.tex").write_text("mine")
    for folder, words in ((tmp_path, "thesis.tex"), (tmp_path / "thesis.tex", "is a file")):
        with pytest.raises(InputError, match=words):
            check_folder(folder, True)


def test_what_cannot_be_replaced_is_refused_at_once_and_a_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (Path("."), tmp_path / "here", tmp_path / "link", Path("/")):
        with pytest.raises(InputError, match="output_dir"):
            check_folder(folder, True)
    monkeypatch.chdir(tmp_path)
    check_folder(tmp_path / "link", False)
    write(tmp_path / "link", select([candidate("abcdef")], [], Selection(held_out=0)), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]
    assert (tmp_path / "here" / "train.jsonl").is_file()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mounted")
    with pytest.raises(InputError, match="cannot be replaced"):
        check_folder(tmp_path / "mounted", False)


def test_a_guard_is_never_held_out():
    rows = [{"prompt": f"question {n}"} for n in range(40)]
    guards = [{**row, "privileged_context": ""} for row in rows]
    train, held_out = hold_out(read_prompts([*rows, *guards]))
    assert len(held_out) == 8 and not any(prompt.privileged_context == "" for prompt in held_out)
    assert len(train) == 2 * (40 - 8) and not {p.text for p in train} & {p.text for p in held_out}
