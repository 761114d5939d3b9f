"""Raw attempts as a context: whole attempts, the newest, within the budget."""

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.contexts.traces import as_trace, traces_within_budget
from opcd_fast.errors import InputError


def record(number, turns=1, feedback=""):
    asked = [
        {"messages": [{"role": "user", "content": f"q{number}.{turn}"}], "answer": f"a{number}.{turn}"}
        for turn in range(turns)
    ]
    return {"repeat": 0, "id": str(number), "turns": asked, "feedback": feedback, "lessons": [], "score": 0.0}


def test_the_newest_attempts_stay_whole_and_in_order():
    records = [record(0), record(1, turns=2, feedback="lost"), record(2)]
    assert as_trace(records[1]) == "Problem: q1.0\nAttempt: a1.0\nProblem: q1.1\nAttempt: a1.1\nOutcome: lost"
    whole, kept = traces_within_budget(records, 10_000, len)
    assert kept == 3 and [whole.index(f"q{n}.0") for n in range(3)] == sorted(whole.index(f"q{n}.0") for n in range(3))
    less, kept = traces_within_budget(records, len(whole) - 1, len)
    assert kept == 2 and "q0" not in less and "q1.0" in less and "q2" in less and len(less) < len(whole)
    assert traces_within_budget(records, len(whole), len) == (whole, 3)
    last, kept = traces_within_budget([*records, record(3, turns=50)], len(less), len)
    assert (last, kept) == (less, 2)  # a newest one that never fits is left out
    with pytest.raises(InputError, match="max_tokens=3"):
        traces_within_budget(records, 3, len)


def test_the_command(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    folder = tmp_path / "runs"
    command = ["accumulate", "--raw", "--model", str(tmp_path / "model"), "--output-dir", str(folder)]
    assert main(command) == 2 and "no attempts" in capsys.readouterr().err
    folder.mkdir()
    (folder / "attempts.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(9)))
    assert main([*command, "--max-tokens", "120"]) == 0
    text = (folder / "raw.txt").read_text()
    assert 60 < len(text) <= 120 and "q8.0" in text and "q0.0" not in text
    assert main([*command, "--merge"]) == 2
