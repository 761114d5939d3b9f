"""Token-exact prompts: in every template family the tokens are those of `apply_chat_template` on the right messages."""

import random

import pytest
from template_families import FAMILIES, GOLDEN, SPECIAL, WITHOUT_SYSTEM_ROLE, family_tokenizer
from tiny import tiny_tokenizer

from opcd_fast.data import adapt_to_tokenizer, default_system_tokens, read_prompts, render, student_ids, teacher_ids
from opcd_fast.errors import InputError

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}]


def chat_of(*texts):
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def ids_of(tokenizer, messages, **options):
    """The oracle: transformers' text, encoded without the special tokens that the tokenizer would add to plain text."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    bos = SPECIAL[next(name for name in FAMILIES if family_tokenizer(name) is tokenizer)][0]
    assert ids.count(tokenizer.convert_tokens_to_ids(bos)) == text.count(bos)
    return ids


def random_text(draw):
    pieces = ["a", "Zeta", "ü", "日本", "🙂", " ", "\n", "\t", "\u2028", "  \n"]
    pieces += ["[x]", "{{y}}", "<", "|", "'", "\\n", "The "]
    body = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 12)))
    return draw.choice(["", " ", "\n\n"]) + f"w{draw.randint(0, 999)}" + body + draw.choice(["", " ", "\n"])


def random_rounds(draw, count):
    return [{"role": role, "content": random_text(draw)} for _ in range(count) for role in ("user", "assistant")]


def shown_to_teacher(own_system, rest, context, has_system_role):
    """What the docs promise, written a second time: (messages for apply_chat_template)."""
    if isinstance(context, str):
        head, turns = context, []
    elif context[0]["role"] == "system":
        head, turns = context[0]["content"], context[1:]
    else:
        head, turns = None, context
    texts = [text for text in (head, own_system) if text is not None]
    chat = [dict(message) for message in (*turns, *rest)]
    if texts and has_system_role:
        return [{"role": "system", "content": "\n\n".join(texts)}, *chat]
    for message in chat:
        if texts and message["role"] == "user":
            message["content"] = "\n\n".join([*texts, message["content"]])
            break
    return chat


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_write_the_documented_tokens(family):
    chat = chat_of("hi", "yo", "ü?")
    if family not in WITHOUT_SYSTEM_ROLE:
        chat.insert(0, {"role": "system", "content": "S"})
    tokenizer = family_tokenizer(family)
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == GOLDEN[family]
    for token in SPECIAL[family]:
        assert len(tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_both_prompts_are_those_of_apply_chat_template(family):
    tokenizer, draw = family_tokenizer(family), random.Random(family)
    has_system_role = family not in WITHOUT_SYSTEM_ROLE
    for _ in range(25):
        own_system = random_text(draw) if has_system_role and draw.random() < 0.4 else None
        with_system = [{"role": "system", "content": random_text(draw)}, *random_rounds(draw, 1)]
        context = draw.choice([random_text(draw), random_rounds(draw, draw.randint(1, 3)), with_system])
        rows, students, teachers = [], [], []
        for _ in range(draw.randint(1, 4)):
            rest = [*random_rounds(draw, draw.randint(0, 2)), {"role": "user", "content": random_text(draw)}]
            chat = rest if own_system is None else [{"role": "system", "content": own_system}, *rest]
            rows.append({"prompt": chat, "tools": draw.choice([None, []])})
            students.append(ids_of(tokenizer, chat))
            teachers.append(ids_of(tokenizer, shown_to_teacher(own_system, rest, context, has_system_role)))
        (rendered,), prefixes = render(tokenizer, [read_prompts(rows)], context)
        for row, student, teacher in zip(rendered, students, teachers):
            assert list(row.student_ids) == student
            assert [*prefixes[row.context_index], *row.teacher_ids] == teacher
            assert row.teacher_ids and student != teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_context_shows_the_teacher_what_the_student_sees(family):
    rows = [{"prompt": "a"}, {"prompt": "b", "privileged_context": ""}, {"prompt": "bb", "privileged_context": ""}]
    (rendered,), prefixes = render(family_tokenizer(family), [read_prompts(rows)], "be brief")
    assert [row.has_context for row in rendered] == [True, False, False]
    assert [row.context_index for row in rendered] == [0, 1, 1]
    for row in rendered[1:]:
        assert (*prefixes[1], *row.teacher_ids) == row.student_ids


@pytest.mark.parametrize("family", WITHOUT_SYSTEM_ROLE)
def test_without_a_system_role_the_text_precedes_the_first_question(family):
    tokenizer = family_tokenizer(family)
    chat = chat_of("q1", "a1", "q2")
    (prompt,) = read_prompts([chat])
    text = tokenizer.decode(teacher_ids(tokenizer, prompt, "be brief"))
    assert text.count("be brief\n\nq1") == 1 and text.count("be brief") == 1
    with pytest.raises(InputError, match="no system role"):
        student_ids(tokenizer, read_prompts([[{"role": "system", "content": "S"}, *chat]])[0])
    with pytest.raises(InputError, match="no user message"):
        teacher_ids(tokenizer, read_prompts([[{"role": "tool", "content": "x"}]])[0], "be brief")


def test_a_text_after_the_chat_leaves_a_short_shared_prefix():
    """Mistral writes the system text into the last message: what comes before it belongs to each prompt."""
    tokenizer = family_tokenizer("mistral")
    chats = [[*random_rounds(random.Random(seed), 1), {"role": "user", "content": "q"}] for seed in range(2)]
    _, prefixes = render(tokenizer, [read_prompts(chats)], "be brief")
    assert "be brief" not in tokenizer.decode(prefixes[0])


def test_variables_of_the_template_reach_both_prompts_and_a_rows_own_win():
    tokenizer = family_tokenizer("chatml_thinking")
    rows = [{"prompt": "a"}, {"prompt": "a", "chat_template_kwargs": {"enable_thinking": True}}]
    (rendered,), prefixes = render(tokenizer, [read_prompts(rows)], "be brief", {"enable_thinking": False})
    quiet, loud = rendered
    chat = chat_of("a")
    assert list(quiet.student_ids) == ids_of(tokenizer, chat, enable_thinking=False)
    assert list(loud.student_ids) == ids_of(tokenizer, chat) != list(quiet.student_ids)
    for row, ends in ((quiet, True), (loud, False)):
        teacher = tokenizer.decode((*prefixes[0], *row.teacher_ids))
        assert teacher.endswith("<think>\n\n</think>\n\n") == ends
    granite = family_tokenizer("granite")
    ids = teacher_ids(granite, read_prompts(["a"])[0], "be brief", {"thinking": True})
    assert "be brief\nRespond to every" in granite.decode(ids)


@pytest.mark.parametrize("family", ["chatml_thinking", "deepseek"])
def test_thoughts_of_earlier_answers_are_cut_as_the_template_cuts_them(family):
    answer = {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nyes"}
    chat = [{"role": "user", "content": "q"}, answer, {"role": "user", "content": "r"}]
    shown = [{"role": "user", "content": "x"}, answer]
    text = family_tokenizer(family).decode(teacher_ids(family_tokenizer(family), read_prompts([chat])[0], shown))
    assert "hmm" not in text and text.count("yes") == 2


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_tools_reach_both_prompts_and_an_empty_list_is_none(family):
    tokenizer, chat = family_tokenizer(family), chat_of("a")
    (tooled, empty) = read_prompts([{"prompt": chat, "tools": TOOLS}, {"prompt": chat, "tools": []}])
    system = {"role": "system", "content": "be brief"}
    assert student_ids(tokenizer, tooled) == ids_of(tokenizer, chat, tools=TOOLS)
    assert teacher_ids(tokenizer, tooled, "be brief") == ids_of(tokenizer, [system, *chat], tools=TOOLS)
    assert student_ids(tokenizer, empty) == ids_of(tokenizer, chat)
    assert "weather" in tokenizer.decode(teacher_ids(tokenizer, tooled, "be brief"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    if family == "chatml":  # calls without text are messages
        chat = [*chat, asked, {"role": "tool", "content": "rain"}]
        (prompt,) = read_prompts([{"prompt": chat, "tools": TOOLS}])
        assert student_ids(tokenizer, prompt) == ids_of(tokenizer, chat, tools=TOOLS)
        assert "Oslo" in tokenizer.decode(student_ids(tokenizer, prompt))


def test_what_a_template_would_ignore_is_refused():
    (prompt, tooled) = read_prompts(["a", {"prompt": "a", "tools": TOOLS}])
    with pytest.raises(InputError, match="enable_thinkng.*would ignore"):
        student_ids(family_tokenizer("chatml_thinking"), prompt, {"enable_thinkng": False})
    with pytest.raises(InputError, match="tools.*would ignore"):
        teacher_ids(family_tokenizer("phi3"), tooled, "be brief")
    for name in ("tokenize", "add_generation_prompt", "tools"):
        with pytest.raises(InputError, match="must not set"):
            student_ids(family_tokenizer("chatml"), prompt, {name: False})
    with pytest.raises(InputError, match="no chat template"):
        plain = tiny_tokenizer(template=None)
        render(plain, [adapt_to_tokenizer(plain, [prompt])], "be brief", {"enable_thinking": False})
    with pytest.raises(InputError, match="no chat template"):
        adapt_to_tokenizer(plain, [tooled])


def test_a_developers_message_is_joined_like_a_system_message():
    developer = tiny_tokenizer(
        "{% for m in messages %}{% if loop.first or m['role'] == 'user' %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    (prompt,) = read_prompts([[{"role": "developer", "content": "D"}, {"role": "user", "content": "q"}]])
    assert developer.decode(teacher_ids(developer, prompt, "C")) == "[developer]C\n\nD[user]q"


def test_a_template_with_a_system_prompt_of_its_own():
    """As SmolLM2's and Qwen2.5's have: what it adds is counted, without the markers around it."""
    own = (
        "{% if messages[0]['role'] != 'system' %}[sys]be nice[/sys]{% endif %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}[sys]{{ m['content'] }}[/sys]{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert default_system_tokens(tiny_tokenizer(own)) == len("be nice")  # a token for each byte
    for template in (None, own.replace("be nice", "")):
        assert default_system_tokens(tiny_tokenizer(template)) == 0
