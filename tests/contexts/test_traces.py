"""Raw attempts as a context: whole attempts, the newest, within the budget."""

import json

from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.contexts import as_traces, within_budget


def record(number, turns=1, feedback=""):
    asked = [
        {"messages": [{"role": "user", "content": f"q{number}.{turn}"}], "answer": f"a{number}.{turn}"}
        for turn in range(turns)
    ]
    return {"repeat": 0, "id": str(number), "turns": asked, "feedback": feedback, "lessons": [], "score": 0.0}


def test_the_newest_attempts_stay_whole_and_in_order():
    records = [record(0), record(1, turns=2, feedback="lost"), record(2)]
    lost = "Problem: q1.0\nAttempt: a1.0\nProblem: q1.1\nAttempt: a1.1\nOutcome: lost\n"
    assert as_traces(records[1:]).endswith(f"\n\n{lost}\nProblem: q2.0\nAttempt: a2.0\n")
    room = len(as_traces(records))
    assert within_budget(records, room, len, as_traces) == records
    assert within_budget(records, room - 1, len, as_traces) == records[1:]
    # A newest one that never fits is left out.
    assert within_budget([*records, record(3, turns=50)], room - 1, len, as_traces) == records[1:]


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
    assert main([*command, "--max-tokens", "3"]) == 2 and "max_tokens=3" in capsys.readouterr().err
