"""Cards, records, settings and metrics that somebody else has written: `diff`, `check` and `report` say in one line
which file is wrong, whatever is in it, and pass nothing on that a terminal would obey."""

import copy
import json
import random
import re
import shutil

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.evaluation import CARD
from opcd_fast.evaluation.report import ReportOptions, measure, readme, write_report
from opcd_fast.runtime import misfit, printable

pytestmark = pytest.mark.usefixtures("own_cache")
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"
GARBAGE = [
    None, True, 0, -1, 1.5, 10**400, float("nan"), float("inf"), "", "x", ESCAPE, "\ud800", "a\x00b", "x" * 200_000, [],
    {}, [[]], [{}], {"": {}}, {"value": "x"}, [1, "x", None], {ESCAPE: ESCAPE}, json.loads("[" * 400 + "]" * 400),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    base = save_base(root / "base")
    run = make_run(base, root / "run", steps=2, eval_every=2)
    write_report(run, measure(run, ReportOptions(max_prompts=2)), CONTEXT)
    (root / "context.txt").write_text(CONTEXT)
    return root


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def places(value, path=()):
    """Of everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(value, rng):
    """With one to three things in it replaced, taken out, renamed or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(list(places(value)))
        if not path:
            continue
        *above, key = path
        within = value
        for step in above:
            within = within[step]
        how = rng.choice(["replace", "replace", "drop", "rename"])
        if how == "replace":
            within[key] = rng.choice(GARBAGE)
        elif how == "drop":
            del within[key]
        elif isinstance(within, dict):
            within[rng.choice(["x", ESCAPE, ""])] = within.pop(key)
    return value


def damaged(text, rng, lines=False):
    """JSON (or lines of it) after a mutation; now and then cut, or with a bit flipped."""
    if rng.random() < 0.1:
        return text[: rng.randrange(len(text))]
    if rng.random() < 0.1:
        place = rng.randrange(len(text))
        return text[:place] + chr(ord(text[place]) ^ (1 << rng.randrange(7))) + text[place + 1 :]
    if not lines:
        return json.dumps(mutated(json.loads(text), rng))
    rows = text.splitlines()
    place = rng.randrange(len(rows))
    rows[place] = json.dumps(mutated(json.loads(rows[place]), rng))
    return "\n".join(rows) + "\n"


def outcome(arguments, file, capsys):
    """The status; of a refusal also that it is one line that names the file, and no escape in any case."""
    status = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert printable(out + err) == out + err, (arguments, out, err)
    assert max(map(len, out.splitlines() or [""])) < 10_000
    if status == 2 and err:
        last = err.strip().splitlines()[-1]
        others = {  # what is wrong is what the file names, or the folder as a whole
            "adapter_config.json": rf"adapter '{re.escape(str(file.parent))}'",
            "run.json": r"^opcd: (base|model( folder)?|tokenizer of|adapter) '",
        }
        named = file.name in last or (file.name in others and re.search(others[file.name], last))
        assert last.startswith("opcd: ") and named and len(last) < 2000, last
    return status


def test_cards_in_diff_and_check(made, place, capsys):
    rng, seen = random.Random(7), {"diff": [], "check": []}
    file = place / "run" / CARD
    whole = file.read_text()
    for _ in range(400):
        file.write_text(damaged(whole, rng), encoding="utf-8", errors="surrogatepass")
        for arguments in (["diff", made / "run", place / "run"],
                          ["check", place / "run", "--context", place / "context.txt"]):  # fmt: skip
            seen[arguments[0]].append(outcome(arguments, file, capsys))
    for statuses in seen.values():
        assert statuses.count(2) > 100 and set(statuses) <= {0, 1, 2}
    assert 1 in seen["diff"]


def test_records_in_diff_and_check(made, place, capsys):
    rng, statuses = random.Random(8), []
    file = place / "run" / "run.json"
    whole = file.read_text()
    for _ in range(250):
        file.write_text(damaged(whole, rng), encoding="utf-8", errors="surrogatepass")
        statuses += [
            outcome(["diff", made / "run", place / "run"], file, capsys),
            outcome(["check", place / "run", "--context", place / "context.txt"], file, capsys),
        ]
    assert statuses.count(2) > 100 and set(statuses) == {0, 1, 2}


FILES = {"run.json": 25, "config.json": 25, "metrics.jsonl": 15, "held_out.jsonl": 12, "final/adapter_config.json": 8}


@pytest.mark.parametrize("name", FILES)
def test_what_a_report_reads(place, name, capsys, monkeypatch):
    """Up to the measuring itself, which takes seconds: models are loaded."""

    class Measured(Exception):
        pass

    def end(*_):
        raise Measured

    monkeypatch.setattr("opcd_fast.evaluation.report.measurement._against_teacher", end)
    rng, file, refused, passed = random.Random(name), place / "run" / name, 0, 0
    whole = file.read_text()
    for _ in range(FILES[name]):
        file.write_text(damaged(whole, rng, name.endswith("l")), encoding="utf-8", errors="surrogatepass")
        try:
            refused += outcome(["report", place / "run", "--max-prompts", "2"], file, capsys) == 2
        except Measured:
            out, err = capsys.readouterr()
            passed += 1
            if name == "metrics.jsonl":
                assert "damaged" not in err
    assert refused >= FILES[name] // 5, (refused, passed)


def test_escapes_reach_no_terminal_and_no_page(made, place, capsys):
    card = json.loads((place / "run" / CARD).read_text())
    card["run"] = card["base_model"] = ESCAPE + "# [x](javascript:1) <script>\n---\nlicense: evil"
    card["settings"][ESCAPE] = card["settings"]["seed"] = ESCAPE
    card["hashes"]["code"]["version"] = ESCAPE
    regressions = {"count": 1, "of": 2, "better": 0, "examples": []}
    shares = {arm: found["truncated"] for arm, found in card["arms"].items()}
    card["scores"] = [{"name": "a | b\n# c " + ESCAPE, "arms": shares, "regressions": regressions}]
    card["arms"] = {**card["arms"], "x | <b>": card["arms"]["base"]}
    write_report(place / "run", card, CONTEXT)
    record = json.loads((place / "run" / "run.json").read_text())
    (place / "run" / "run.json").write_text(json.dumps({**record, "context": CONTEXT + ESCAPE}))
    assert main(["diff", str(made / "run"), str(place / "run")]) == 1
    out = capsys.readouterr().out
    assert printable(out) == out and "owned" in out and "context  +" in out
    text = readme(card)
    assert printable(text) == text and "<script>" not in text and "\n# c" not in text and "<b>" not in text
    front = text.split("---\n")[1]
    assert "license" not in front and text.count("\n---\n") == 1
    assert not re.search(r"(?<!\\)\[x\]", text)
    table = [line for line in text.split("\n## ")[1].splitlines() if line.startswith(("| tokens per", "| a "))]
    assert len(table) == 2 and len({line.count("|") - line.count("\\|") for line in table}) == 1


def test_forms():
    shape = {"a": float, "b?": [str], "c": {str: (int, None)}}
    assert misfit({"a": 1, "c": {}}, shape) is None and misfit({"a": 1.5, "b": ["x"], "c": {"y?": None}}, shape) is None
    for value, words in (
        ([], "must be an object"), ({"c": {}}, "a is missing"), ({"a": True, "c": {}}, "a is True"),
        ({"a": float("nan"), "c": {}}, "a is nan"), ({"a": 10**400, "c": {}}, "a is"),
        ({"a": 1, "b": "x", "c": {}}, "b must be a list"), ({"a": 1, "b": ["x", 1], "c": {}}, "b[1] is 1"),
        ({"a": 1, "c": {"y": 1.5}}, "c.y is 1.5"), ({"a": 1, "c": {"y": True}}, "c.y is True"),
    ):  # fmt: skip
        assert words in misfit(value, shape)
