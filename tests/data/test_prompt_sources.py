"""Prompts out of logs and data sets."""

import json

import pytest

from opcd_fast.data import from_data, from_logs, general_prompts
from opcd_fast.errors import InputError

ROLES = ("system", "user", "assistant", "user", "assistant")
SAID = ("the context itself", "one", "answer one", "two", "answer two")
CHAT = [{"role": role, "content": text} for role, text in zip(ROLES, SAID)]


@pytest.fixture
def logs(tmp_path):
    shared = [{"from": "human", "value": "three"}, {"from": "gpt", "value": "answer"}, {"from": "human", "value": " "}]
    rows = [{"messages": CHAT}, {"conversations": shared}, {"prompt": "four"}, {"messages": CHAT[:1]}]
    (tmp_path / "logs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "logs.jsonl"


def contents(candidates):
    return [[message["content"] for message in c.prompt.messages] for c in candidates]


@pytest.mark.parametrize(
    ("turns", "ends"),
    [("first", [["one"]]), ("last", [["one", "answer one", "two"]]),
     ("every", [["one"], ["one", "answer one", "two"]])],
)  # fmt: skip
def test_turns_of_a_chat(logs, turns, ends):
    found, empty = from_logs(logs, turns)
    assert contents(found) == [*ends, ["three"], ["four"]] and empty == 1
    assert len({c.conversation for c in found}) == 3
    assert turns == "first" or any("line 1, message 3" in c.source for c in found)


def test_the_logged_context_is_left_out_unless_asked_for(logs):
    kept = from_logs(logs, "first", keep_system=True)[0]
    assert contents(kept)[0] == ["the context itself", "one"]
    assert not any("context" in c.text for c in from_logs(logs, "every")[0])


def test_a_text_file_holds_a_message_a_line(tmp_path):
    (tmp_path / "logs.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two \n")
    found, empty = from_logs(tmp_path / "logs.txt")
    assert contents(found) == [["one"], ["two"]] and empty == 0 and "line 3" in found[1].source
    (tmp_path / "logs.txt").write_text(json.dumps({"messages": CHAT}) + "\n")
    assert contents(from_logs(tmp_path / "logs.txt")[0]) == [["one", "answer one", "two"]]


def test_arguments_of_logged_calls_become_objects(tmp_path):
    def call(arguments):
        return {"type": "function", "function": {"name": "f", "arguments": arguments}}

    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}'), call("no json"), call({"b": 2})]},
        {"role": "tool", "content": "1"},
        {"role": "user", "content": "y"},
    ]
    (tmp_path / "logs.json").write_text(json.dumps([chat]))
    (found,) = from_logs(tmp_path / "logs.json")[0]
    calls = found.prompt.messages[1]["tool_calls"]
    assert [c["function"]["arguments"] for c in calls] == [{"a": 1}, "no json", {"b": 2}]
    assert found.text == "x\n\n1\ny"


def test_a_column_of_a_data_set(tmp_path):
    (tmp_path / "d.csv").write_text("question,answer\nwhy?,so\nhow?,thus\n")
    found = from_data(tmp_path / "d.csv", "question")
    assert contents(found) == [["why?"], ["how?"]] and found[1].source == "data d.csv, row 2"
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": CHAT[1:3]}))
    assert contents(from_data(tmp_path / "m.jsonl")) == [["one"]]


def test_general_prompts_have_explicitly_no_context(tmp_path):
    found = general_prompts()
    assert len({c.text for c in found}) == len(found) == 100
    assert all(c.prompt.privileged_context == "" for c in found)
    (tmp_path / "g.jsonl").write_text('{"prompt": "x", "privileged_context": "mine"}')
    assert general_prompts(tmp_path / "g.jsonl")[0].prompt.privileged_context == ""


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x"}, "none of the columns"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "role 'alien'"),
        ({"conversations": [{"from": "human"}]}, "message 0"),
        ({"messages": 5}, "must be a string or"),
        ({"messages": [{"role": "assistant", "tool_calls": '[{"function": {"name": "f"}}]'}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": "f"}]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": ["f"]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": {"function": {}}}]}, "tool_calls"),
    ],
)
def test_a_bad_log_is_named(tmp_path, row, words):
    (tmp_path / "logs.jsonl").write_text('{"prompt": "fine"}\n' + json.dumps(row))
    with pytest.raises(InputError, match=words) as error:
        from_logs(tmp_path / "logs.jsonl")
    assert "line 2" in str(error.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(InputError, match="turns='all'"):
        from_logs(tmp_path / "x.txt", "all")
    with pytest.raises(InputError, match="does not exist"):
        from_logs(tmp_path / "x.txt")
    for read in (from_logs, from_data, general_prompts):
        with pytest.raises(InputError, match="empty file name"):
            read("")
