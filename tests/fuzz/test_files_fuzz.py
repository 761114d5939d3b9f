"""Random prompts, contexts, settings and damaged files: what was written is read, or one error says what is wrong."""

import csv
import io
import json

import pytest
import yaml
from cases import examples
from hypothesis import given
from hypothesis import strategies as st
from template_families import FAMILIES, SPECIAL, WITHOUT_SYSTEM_ROLE, family_tokenizer

from opcd_fast.cli import main
from opcd_fast.data import read_context, read_prompts, render, whole_prompt
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, option_names

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300).filter(str.strip)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "narrator", None, 3, ["user"]])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES | st.fixed_dictionaries({"role": ROLES, "content": LEAVES}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["prompt", "messages", "tools", "privileged_context", "chat_template_kwargs", "source"]),
        inner, max_size=3,
    ),
    max_leaves=8,
)  # fmt: skip
OPTIONS = [f"--{name.replace('_', '-')}" for name in option_names(OPCDConfig)]
ENDINGS = ("jsonl", "json", "csv", "tsv", "txt", "md", "parquet")


def outcome(call, *given):
    """What comes of it, and the error where nothing does."""
    try:
        return call(*given), ""
    except InputError as error:
        return None, str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@st.composite
def damaged(draw):
    """What stands in a file, more or less."""
    rows = draw(st.lists(JSON, max_size=3))
    text = draw(st.sampled_from([json.dumps(rows), "\n".join(map(json.dumps, rows)), draw(st.text(max_size=60))]))
    data = bytearray(text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), "replace"))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(data)))
        some = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"[" * 3000, b"\0", b"\r", b"9" * 5000]))
        data[place : place + draw(st.integers(0, 5))] = some
    return bytes(data)


@examples(200)
@given(data=damaged(), ending=st.sampled_from(ENDINGS), read=st.sampled_from([read_prompts, read_context]))
def test_any_file_is_read_or_named(folder, data, ending, read):
    path = folder / f"any.{ending}"
    path.write_bytes(data)
    found, wrong = outcome(read, path)
    assert found or path.name in wrong


@examples(60)
@given(prompts=st.lists(TEXT, min_size=1, max_size=4), ending=st.sampled_from(["jsonl", "json", "csv"]))
def test_prompts_are_read_as_they_were_written(folder, prompts, ending):
    path, rows = folder / f"prompts.{ending}", [{"prompt": prompt} for prompt in prompts]
    if ending == "csv":
        text = io.StringIO(newline="")
        csv.DictWriter(text, ["prompt"]).writerows([{"prompt": "prompt"}, *rows])
        path.write_bytes(text.getvalue().encode())
    else:
        path.write_text(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    assert [prompt.text for prompt in read_prompts(path)] == prompts == [p.text for p in read_prompts(prompts)]


@examples(100)
@given(TEXT)
def test_any_text_is_a_context(text):
    assert text.endswith((".txt", ".md", ".json", ".jsonl")) or read_context(text) == text  # or names a file


@examples(100)
@given(st.lists(JSON, max_size=3) | JSON)
def test_any_value_is_a_list_of_prompts_or_an_error(value):
    for read in (read_prompts, read_context):
        if not isinstance(value, str):  # the name of a file
            found, wrong = outcome(read, value)
            assert found or wrong


@st.composite
def chats(draw):
    """System message (or none), turns and context of a prompt, whose texts are all different."""
    count = iter(range(100))
    text = lambda: f"t{next(count)}: {draw(TEXT)}"  # noqa: E731
    system = [{"role": "system", "content": text()}] if draw(st.booleans()) else []
    turns, inner = ([text() for _ in range(2 * draw(st.integers(0, 2)) + odd)] for odd in (1, 2))
    said = lambda texts: [{"role": ("user", "assistant")[n % 2], "content": x} for n, x in enumerate(texts)]  # noqa: E731
    return system + said(turns), text() if draw(st.booleans()) else said(inner)


@examples(100)
@given(st.sampled_from(FAMILIES), chats(), chats())
def test_no_template_loses_a_text(family, chat, other):
    tokenizer, (messages, context) = family_tokenizer(family), chat
    shown = [context] if isinstance(context, str) else [turn["content"] for turn in context]
    asked = [message["content"] for message in messages]
    if any(token.strip("<>|[]/ ") in text for text in [*asked, *shown] for token in [*SPECIAL[family], "think"]):
        return  # a text with a template's own marks may be cut by it
    found, wrong = outcome(render, tokenizer, [read_prompts([messages, other[0]])], context)
    if found is None:
        assert family in WITHOUT_SYSTEM_ROLE and "no system role" in wrong
        return
    ((first, _),), prefixes = found
    student, teacher = (tokenizer.decode(ids) for ids in (first.student_ids, whole_prompt(first, prefixes)))
    for text, parts in ((student, asked), (teacher, [*shown, *asked])):
        assert not [part for part in parts if part.strip() not in text], text
    assert not [part for part in shown if part.strip() in student]
    assert first.teacher_ids and whole_prompt(first, prefixes)[: len(prefixes[0])] == prefixes[0]


@examples(60)
@given(st.dictionaries(st.sampled_from([*option_names(OPCDConfig), "prompt", "lora_rnak"]), JSON, max_size=4))
def test_any_settings_end_in_one_line(folder, capsys, settings):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings, allow_unicode=True))
    status = main(["train", "--config", str(path), "--model", str(folder / "none"), "--prompts", str(folder / "none")])
    told = capsys.readouterr().err
    assert status == 2 and told.count("\n") == 1 and told.startswith("opcd: ")


@examples(60)
@given(st.lists(st.sampled_from(OPTIONS) | TEXT, max_size=5))
def test_any_words_end_in_one_line(folder, capsys, words):
    start = ["train", "--model", str(folder / "none"), "--prompts", str(folder / "none")]
    if not {"-h", "--help", "--help-all"} & set(words):
        assert main([*start, *words]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith("opcd: ")
