"""What experiments read from installed packages, and their scorers."""

from __future__ import annotations

import json

import pytest

from experiments import article, policy, squad
from experiments.identity import names_itself
from experiments.installed import data_file
from opcd_fast.errors import InputError

MODULE = "someones_data"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs `someones-data` 1.0 with one file."""
    info = tmp_path / "someones_data-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-data\nVersion: 1.0\n")
    (tmp_path / MODULE).mkdir()
    (tmp_path / MODULE / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / MODULE / "a.json").write_text("[]")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_file_of_an_installed_package(package):
    assert data_file("someones-data", "1.0", MODULE, "a.json") == package / MODULE / "a.json"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("nobodys-data", "1.0", MODULE, "a.json"), "missing: pip install --no-deps nobodys-data==1.0"),
        (("someones-data", "2.0", MODULE, "a.json"), "someones-data 2.0, installed is 1.0: pip install .*==2.0"),
        (("someones-data", "1.0", MODULE, "b.json"), "has no someones_data/b.json.*: pip install"),
        (("someones-data", "1.0", "no_such_module", "a.json"), "has no no_such_module/a.json"),
    ],
)  # fmt: skip
def test_what_is_missing_is_an_error_with_the_command(package, asked, said):
    with pytest.raises(InputError, match=said):
        data_file(*asked)


def row(page, *texts):
    sides = ("user", "assistant")
    return {"ground_truth_ctx": page, "messages": [{"role": sides[i % 2], "content": t} for i, t in enumerate(texts)]}


def test_a_policy_is_what_most_is_asked_about_and_conversations_are_not_split(monkeypatch):
    monkeypatch.setattr(policy, "MOST_WORDS", 3)
    pages = ["nobody asks", "second ", "first page"]
    rows = [row(2, "a"), row(2, "a", "b", "c"), row(2, "d"), row(1, "e"), row(1, "e", "f", "g"), row(2, "a"),
            row(0, "h"), row(2, "i", "j"), row(2, *"klmnopqrs")]  # fmt: skip
    context, train, held_out = policy.split(pages, rows)
    assert context.endswith("say:\n\nsecond\n\nfirst page\n")
    asked = [["".join(m["content"] for m in one["messages"]) for one in part] for part in (train, held_out)]
    assert asked == [["a", "abc", "d"], ["e", "efg"]]


def test_two_messages_of_one_side_become_one():
    told = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert policy.in_turns(told) == [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("The Amazon.", ["Amazon"], 1, 1), ("it is the Amazon", ["Amazon"], 0, 0.5), ("27.7 m", ["277 M"], 1, 1),
        ("cat cat sat", ["cat cat down", "dog"], 0, 2 / 3), ("cat", ["dog"], 0, 0), ("", ["dog"], 0, 0),
        ("theory", ["ory"], 0, 0), ("nine", ["nine nations", "nine"], 1, 1),
    ],
)  # fmt: skip
def test_exact_match_and_f1(answer, gold, exact, f1):
    assert (squad.exact_match(answer, gold), squad.f1(answer, gold)) == (exact, pytest.approx(f1))
    assert squad.scores_f1([], answer, {"answers": gold}) == pytest.approx(f1)


def test_an_article_and_its_questions(tmp_path, monkeypatch):
    def question(text, impossible=False):
        return {"question": f" {text} ", "answers": [{"text": "x"}, {"text": "y"}], "is_impossible": impossible}

    paragraphs = [{"context": f"P{i}", "qas": [question(f"Q{i}?"), question("No?", True)]} for i in range(7)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"title": article.TITLE, "paragraphs": paragraphs}]}))
    (tmp_path / "written.jsonl").write_text('{"prompt": "the q1"}\n{"prompt": "Q9?"}\n')
    monkeypatch.setattr(article, "data_file", lambda *asked: tmp_path / "squad.json")
    monkeypatch.setattr(article, "WRITTEN", tmp_path / "written.jsonl")
    monkeypatch.setattr(article, "DATA", tmp_path)
    with monkeypatch.context() as without:
        without.setattr(article, "WRITTEN", tmp_path / "no.jsonl")
        with pytest.raises(InputError, match="no.jsonl is missing; write it as opcd prompts .*text.txt"):
            article.prepare()
    article.prepare()
    rows = [json.loads(line) for line in (tmp_path / "eval_prompts.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": f"Q{i}?", "answers": ["x", "y"]} for i in range(article.PARAGRAPHS)]
    assert (tmp_path / "train_prompts.jsonl").read_text() == '{"prompt": "Q9?"}\n'  # a held-out one is left out
    system, *turns = json.loads((tmp_path / "context.json").read_text())
    assert system["role"] == "system" and system["content"].endswith("P3\n\nP4") and len(turns) == 6


def test_a_name_where_it_was_asked_for_and_nowhere_else():
    asked, other = {"kind": "identity"}, {"kind": "other"}
    assert names_itself([], "I am Brann.", asked) == names_itself([], "Riga.", other) == 1
    assert names_itself([], "I am Brannan.", asked) == names_itself([], "I am Brann.", other) == 0
