"""Rows out of every kind of file and object, and errors that say where."""

import csv
import json
import sys

import pytest

from opcd_fast.data import read_prompts, read_rows
from opcd_fast.errors import InputError

TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4!"}]
ROWS = [
    {"prompt": "plain ü 日本\u2028", "privileged_context": "one"},
    {"prompt": 'two\nlines\r, "quoted"; and more', "privileged_context": None},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def texts(prompts):
    return [(prompt.text, prompt.privileged_context) for prompt in prompts]


WANTED = [(row["prompt"], row["privileged_context"]) for row in ROWS]


def write_csv(path, delimiter=",", newline="\r\n", encoding="utf-8-sig"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=newline)
        writer.writerow(["id", "prompt", "privileged_context"])
        for number, row in enumerate(ROWS):
            writer.writerow([number, row["prompt"], row["privileged_context"]])
            writer.writerow([])  # a blank line


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "d.json").write_text(lines)  # a value a line, in spite of the name
    write_csv(tmp_path / "e.csv")
    write_csv(tmp_path / "f.csv", ";", "\n", "utf-8")
    write_csv(tmp_path / "g.tsv", "\t")
    for file in sorted(tmp_path.iterdir()):
        assert texts(read_prompts(file)) == WANTED, file.name
        assert texts(read_prompts(str(file))) == WANTED


def test_parquet_datasets_and_frames(tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    data = datasets.Dataset.from_list([{**row, "id": n} for n, row in enumerate(ROWS)])
    frame = pandas.DataFrame(ROWS)
    frame.loc[1, "privileged_context"] = float("nan")
    data.save_to_disk(tmp_path / "saved")
    frame.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "shards").mkdir()
    for number, row in enumerate(ROWS):
        pandas.DataFrame([row]).to_parquet(tmp_path / "shards" / f"{number}.parquet")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    files = [tmp_path / name for name in ("saved", "p.parquet", "shards", "splits/test")]
    for source in (data, frame, *files):
        assert texts(read_prompts(source)) == WANTED
    with pytest.raises(InputError, match="splits.*splits/train"):
        read_prompts(tmp_path / "splits")
    with pytest.raises(InputError, match="several splits .train, test."):
        read_prompts(datasets.DatasetDict({"train": data, "test": data}))
    with pytest.raises(InputError, match="several kinds"):
        write_csv(tmp_path / "shards" / "x.csv")
        read_prompts(tmp_path / "shards")
    with pytest.raises(InputError, match="p.parquet' row 2 has no column 'id', or nothing"):
        pandas.DataFrame({"id": ["a", None]}).to_parquet(tmp_path / "p.parquet")
        read_prompts(tmp_path / "p.parquet", prompt_column="id")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="bad.parquet' cannot be read as parquet"):
        read_prompts(tmp_path / "bad.parquet")


def test_messages_and_tools_survive_a_typed_table(tmp_path):
    """Arrow gives every row the keys of all rows, null where a row had none."""
    datasets = pytest.importorskip("datasets")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chats = [
        [{"role": "user", "content": "hi"}],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "name": "f"},
        ],
    ]
    rows = [
        {"messages": chats[0], "tools": None, "chat_template_kwargs": '{"a": null}'},
        {"messages": chats[1], "tools": [TOOL], "chat_template_kwargs": None},
    ]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "p.parquet"))
    data.save_to_disk(tmp_path / "saved")
    for source in (data, data.to_pandas(), tmp_path / "p.parquet", tmp_path / "saved"):
        first, second = read_prompts(source)
        assert [dict(m) for m in first.messages] == chats[0] and not first.tools
        assert first.chat_template_kwargs == {"a": None}
        assert second.messages[1]["tool_calls"] == [call] and second.messages[1].get("content") is None
        assert second.messages[2] == chats[1][2] and second.tools == (TOOL,)


def test_cells_of_text_hold_nested_values_as_json(tmp_path):
    cell = json.dumps([TOOL]).replace('"', '""')
    (tmp_path / "p.csv").write_text(f'prompt,tools\nhi,"{cell}"\nho,\n')
    first, second = read_prompts(tmp_path / "p.csv")
    assert first.tools == (TOOL,) and second.tools is None
    (tmp_path / "p.csv").write_text('prompt,tools\n"h\ni",[\n')
    with pytest.raises(InputError, match="line 2: column 'tools' must hold JSON"):
        read_prompts(tmp_path / "p.csv")


def test_a_column_of_another_name_and_answers_that_are_left_out(tmp_path):
    (tmp_path / "p.csv").write_text("question,prompt\nwhy?,no\n")
    assert read_prompts(tmp_path / "p.csv", prompt_column="question")[0].text == "why?"
    for column, words in (("query", "no column 'query'"), ("tools", "another meaning")):
        with pytest.raises(InputError, match=words):
            read_prompts(tmp_path / "p.csv", prompt_column=column)
    with pytest.raises(InputError, match="drop_last_answer"):
        read_prompts([{"messages": TURNS}])
    (prompt,) = read_prompts([{"messages": [*TURNS, TURNS[1]]}], drop_last_answer=True)
    assert prompt.messages == (TURNS[0],)
    with pytest.raises(InputError, match="nothing but assistant"):
        read_prompts([{"messages": TURNS[1:]}], drop_last_answer=True)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", 'id,prompt\n1,"two\nlines"\n\n2,"  "\n', "line 5 is an empty prompt"),
        ("p.csv", 'id,prompt\n1,"two\nlines"\n3,\n', "line 4 has no column 'prompt', or nothing in it"),
        ("p.csv", "id,prompt\n1,hello, you\n", "line 2 has 3 cells"),
        ("p.csv", "prompt,prompt\n1,2\n", "line 1 names a column twice"),
        ("p.jsonl", '\ufeff\r\n{"prompt": "x"}\r\n\r\n{"prompt": ""}\r\n', "line 4 is an empty prompt"),
        ("p.jsonl", "hello there\n", 'line 1 is not valid JSON.*a line is {"prompt": "..."}'),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '"x"', "must hold a list of rows, not a str"),
        ("p.json", '{"a": [1], "b": [2]}', "must hold a list of rows, not a dict"),
        ("p.json", "", "prompts is empty"),
        ("p.csv", "prompt\n", "prompts is empty"),
        ("p.csv", b"prompt\n\xff\xfe\n", "UTF-8"),
    ],
)
def test_errors_name_the_file_and_count_its_lines(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "x", "messages": TURNS[:1]}, "both 'prompt' and 'messages'"),
        ({"prompt": "\ud800x"}, "half a character"),
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, "half a character"),
        ({"prompt": "x", "privileged_context": "\ud800"}, "half a character"),
        ({"prompt": "x", "tools": "f"}, "tools must be a list"),
        ({"prompt": "x", "tools": [1]}, "tools must be a list"),
        ({"prompt": "x", "chat_template_kwargs": [1]}, "chat_template_kwargs must be like"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "join its parts"),
        ({"prompt": [{"role": "user", "content": None}]}, "message 0"),
        ({"prompt": [{"role": "assistant", "content": [], "tool_calls": [1]}]}, "no text"),
        ({"prompt": 5}, "must be a string or"),
        ({"prompt": []}, "must be a string or"),
    ],
)
def test_a_bad_row_is_named(row, words):
    with pytest.raises(InputError, match=words) as error:
        read_prompts([{"prompt": "fine"}, row])
    assert "prompts[1]" in str(error.value) and "\n" not in str(error.value)


def test_other_things_that_are_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, words in ((tmp_path / "empty", "holds no data"), (tmp_path / "none.csv", "does not exist"),
                          (tmp_path / "none.parquet", "does not exist"), (b"x", "is a bytes")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            read_rows(source, "prompts")


@pytest.mark.parametrize(("package", "source"), [("pyarrow.parquet", "p.parquet"), ("datasets", "saved")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, source):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install .*\[data\]'"):
        read_rows(tmp_path / source, "prompts")
