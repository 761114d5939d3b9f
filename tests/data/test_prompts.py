"""Contexts and prompts: forms, files, rendering, shared prefixes, and what is refused."""

import json

import pytest
from tiny import tiny_tokenizer

from opcd_fast.data import adapt_to_tokenizer, read_context, read_prompts, render, student_ids, teacher_ids
from opcd_fast.errors import InputError

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4!"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


HI = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("prompt", "context", "shown"),
    [
        ("hi", "", "<|user|>hi"),
        ("hi", "be brief", "<|system|>be brief<|end|><|user|>hi"),
        ([{"role": "system", "content": "S"}, HI], TURNS,
         "<|system|>S<|end|><|user|>2+2?<|end|><|assistant|>4!<|end|><|user|>hi"),
        ([{"role": "system", "content": "S"}, HI], "C", "<|system|>C\n\nS<|end|><|user|>hi"),
    ],
)  # fmt: skip
def test_where_a_context_goes(tokenizer, prompt, context, shown):
    (read,) = read_prompts([prompt])
    assert tokenizer.decode(teacher_ids(tokenizer, read, context)) == f"{shown}<|end|><|assistant|>"
    assert tokenizer.decode(student_ids(tokenizer, read)).endswith("<|user|>hi<|end|><|assistant|>")


def test_shared_prefix_is_the_longest_common_one_and_leaves_a_token(tokenizer):
    train, held_out = read_prompts(["abc", "abd"]), read_prompts(["abx"])
    (first, second), prefixes = render(tokenizer, [train, held_out], "ctx")
    assert tokenizer.decode(prefixes[0]) == "<|system|>ctx<|end|><|user|>ab"
    for group, prompts in ((first, train), (second, held_out)):
        for row, prompt in zip(group, prompts):
            assert [*prefixes[0], *row.teacher_ids] == teacher_ids(tokenizer, prompt, "ctx")
    (rendered,), prefixes = render(tokenizer, [read_prompts(["same", "same"])], "ctx")
    assert all(len(row.teacher_ids) == 1 for row in rendered)
    assert len(prefixes[0]) == len(teacher_ids(tokenizer, read_prompts(["same"])[0], "ctx")) - 1


def test_rows_with_their_own_context_get_prefixes_of_their_own(tokenizer):
    rows = [{"prompt": "a", "privileged_context": "one"}, {"prompt": "b"}, {"prompt": "c", "privileged_context": "one"}]
    (rendered,), prefixes = render(tokenizer, [read_prompts(rows)], "two")
    assert [row.context_index for row in rendered] == [0, 1, 0]
    assert "one" in tokenizer.decode(prefixes[0]) and "two" in tokenizer.decode(prefixes[1])


def test_contexts_of_every_form(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfsome\r\nnotes")
    (tmp_path / "c.json").write_text(json.dumps(TURNS))
    (tmp_path / "m.json").write_text(json.dumps({"messages": TURNS}))
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, TURNS)))
    assert read_context(str(tmp_path / "c.txt")) == "some\nnotes"
    for name in ("c.json", "m.json", "c.jsonl"):
        assert read_context(tmp_path / name) == TURNS
    assert read_context("plain words") == "plain words"


def test_tokenizer_without_template_takes_plain_text_only():
    plain = tiny_tokenizer(template=None)
    (prompt,) = adapt_to_tokenizer(plain, read_prompts(["hi"]))
    assert plain.decode(teacher_ids(plain, prompt, "ctx")) == "ctx\n\nhi"
    with pytest.raises(InputError, match="no chat template"):
        teacher_ids(plain, prompt, TURNS)
    with pytest.raises(InputError, match="no chat template"):
        adapt_to_tokenizer(plain, read_prompts([[*TURNS, {"role": "user", "content": "x"}]]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: read_context(d / "none.txt"), "does not exist"),
        (lambda d: read_context("notes/none.md"), "does not exist"),
        (lambda d: read_context("  "), "empty"),
        (lambda d: read_context(d / "empty.txt"), "is empty"),
        (lambda d: read_context(d / "bad.json"), "not valid JSON"),
        (lambda d: read_context([{"role": "boss", "content": "x"}]), "role 'boss'"),
        (lambda d: read_context([{"role": "user"}]), "message 0"),
        (lambda d: read_prompts([]), "is empty"),
        (lambda d: read_prompts([""]), "empty prompt"),
        (lambda d: read_prompts([{"question": "x"}]), "no column 'prompt'"),
        (lambda d: read_prompts([TURNS]), "ends with an assistant"),
        (lambda d: read_context(5), "context is a int"),
        (lambda d: read_context({"role": "user", "content": "x"}), "context is a dict"),
        (lambda d: read_context(d / "string.json"), "must hold a list.*not a str"),
        (lambda d: read_context(d / "object.json"), "must hold a list.*not a dict"),
        (lambda d: read_prompts(5), "prompts is a int"),
        (lambda d: read_prompts({"prompt": "x"}), "prompts is a dict"),
        (lambda d: read_prompts([{"prompt": "x", "privileged_context": " "}]), "empty privileged_context"),
        (lambda d: read_prompts([{"prompt": "x", "privileged_context": 5}]), "privileged_context must be"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, call, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "string.json").write_text('"be brief"')
    (tmp_path / "object.json").write_text('{"role": "user"}')
    with pytest.raises(InputError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)


def test_templates_that_cannot_show_the_context_are_refused(tokenizer):
    mute = tiny_tokenizer("{{ 'what messages say is left out' }}")
    with pytest.raises(InputError, match="changes nothing"):
        render(mute, [read_prompts(["hi"])], "ctx")
    with pytest.raises(InputError, match="context is missing"):
        render(tokenizer, [read_prompts(["hi"])], None)
    strict = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        student_ids(strict, read_prompts(["hi"])[0])
