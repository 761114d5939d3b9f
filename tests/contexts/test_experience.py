"""From attempts to notes: nothing is lost when a step is stopped, and notes are judged on other problems."""

import json
import re
from types import SimpleNamespace

import pytest
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main
from opcd_fast.contexts import (
    ExperienceFolder,
    Player,
    accumulate,
    as_traces,
    extract,
    lessons_of_notes,
    select,
    within_budget,
    without_similar,
)
from opcd_fast.contexts.lessons import HEAD, as_notes, ask_for_lessons, lessons_in
from opcd_fast.data.tasks import SPLITS, Played, Questions, Turn, load_task
from opcd_fast.errors import InputError
from opcd_fast.evaluation import Arm
from opcd_fast.rollout import Completion

TOKENIZER = tiny_tokenizer()


def scripted(answer):
    """A player whose model answers with `answer(text of the prompt)`."""

    class Scripted:
        def __init__(self):
            self.asked, self.seeds = [], []  # texts of prompts, a list a batch

        def __call__(self, prompts, seed, **_):
            self.seeds.append(seed)
            self.asked.append([TOKENIZER.decode(prompt) for prompt in prompts])
            return [Completion(tuple(TOKENIZER(answer(text)).input_ids), None, True) for text in self.asked[-1]]

    return Player(Arm(TOKENIZER, Scripted()), {"max_new_tokens": 8, "temperature": 0.7})


def lessons_asked(player):
    return [text for batch in player.arm.generate.asked for text in batch if "Write down" in text]


def number_in(text):
    return re.findall(r"sum (\d+)", text)[-1]


def sums(count=120):
    return Questions(
        "sums",
        [([{"role": "user", "content": f"sum {n}"}], lambda text, n=n: text == f"right {n}") for n in range(count)],
    )


def test_lessons_are_the_marked_lines():
    answer = "<think>- LESSON: secret</think>Sure!\n- LESSON: Look first.\n2. **Lesson:** Then  move.\n"
    answer += "LESSON:\nlesson 3: x"
    assert lessons_in(answer) == ["Look first.", "Then move.", "x"]
    assert lessons_in(answer, most=1) == ["Look first."]
    assert lessons_in("I learned a lesson: nothing") == []
    assert lessons_of_notes(as_notes(["a", "b - c"])) == ["a", "b - c"] and lessons_of_notes("") == []
    with pytest.raises(InputError, match="opcd accumulate"):
        lessons_of_notes("- a\n")


def test_the_question_shows_the_attempt_and_how_it_ended_but_no_right_answer():
    turns = [Turn([{"role": "user", "content": f"board {n}"}], f"<think>hm</think>move {n}", True, 3) for n in (1, 2)]
    *examples, message = ask_for_lessons(Played("x", turns, 0.0, "You lost. A hole."), 3, known=["old"])
    assert all(lessons_in(example["content"]) for example in examples if example["role"] == "assistant")
    for part in ("board 1", "move 2", "You lost. A hole.", "at most 3", "- LESSON: old"):
        assert part in message["content"]
    assert "<think>" not in message["content"]
    *_, message = ask_for_lessons(Played("x", turns[:1], 0.0, ""), 3)
    assert "Outcome" not in message["content"]


def test_the_oldest_and_the_similar_lessons_leave_whole():
    def count(text):
        return len(text.split())

    lessons = [f"l{n} a b c d" for n in range(10)]
    fixed = count(HEAD)
    for room, kept in ((fixed + 3 * 6, lessons[-3:]), (fixed + 3 * 6 + 5, lessons[-3:]), (1000, lessons), (1, [])):
        assert within_budget(lessons, room, count, as_notes) == kept
    assert within_budget([*lessons, "word " * 500], fixed + 12, count, as_notes) == lessons[-2:]
    similar = ["Avoid the holes on the board.", "avoid the holes on the board!", "Walk to the goal.", "Mind the holes."]
    assert without_similar(similar, 0.7) == [similar[0], similar[2], similar[3]]
    assert without_similar(["a b c d", "a b c e"], 1.0) == ["a b c d", "a b c e"]


def attempt(number, turns=1, feedback=""):
    asked = [
        {"messages": [{"role": "user", "content": f"q{number}.{turn}"}], "answer": f"a{number}.{turn}"}
        for turn in range(turns)
    ]
    return {"repeat": 0, "id": str(number), "turns": asked, "feedback": feedback, "lessons": [], "score": 0.0}


def test_the_newest_attempts_stay_whole_and_in_order():
    """Raw attempts as a context."""
    records = [attempt(0), attempt(1, turns=2, feedback="lost"), attempt(2)]
    lost = "Problem: q1.0\nAttempt: a1.0\nProblem: q1.1\nAttempt: a1.1\nOutcome: lost\n"
    assert as_traces(records[1:]).endswith(f"\n\n{lost}\nProblem: q2.0\nAttempt: a2.0\n")
    room = len(as_traces(records))
    assert within_budget(records, room, len, as_traces) == records
    assert within_budget(records, room - 1, len, as_traces) == records[1:]
    # A newest one that never fits is left out.
    assert within_budget([*records, attempt(3, turns=50)], room - 1, len, as_traces) == records[1:]


def lesson_of(text):
    return f"- LESSON: lesson about {number_in(text)} nothing else" if "Write down" in text else "?"


def test_extract_goes_on_where_it_stopped(tmp_path):
    task = sums()
    whole = extract(ExperienceFolder(tmp_path / "a"), task, scripted(lesson_of), problems=6, repeats=2, batch=3)
    assert len({(record["repeat"], record["id"]) for record in whole}) == len(whole) >= 8
    assert all(len(record["lessons"]) == 1 and record["score"] == 0 for record in whole)

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 6:
            raise Stop

    folder = ExperienceFolder(tmp_path / "b")
    first = scripted(lesson_of)
    with pytest.raises(Stop):
        extract(folder, task, first, problems=6, repeats=2, batch=3, told=stop)
    with open(folder.path / "attempts.jsonl", "a") as file:
        file.write('{"repeat": 1, "id"')  # as a kill leaves it
    second = scripted(lesson_of)
    again = extract(folder, task, second, problems=6, repeats=2, batch=3)
    assert again == whole and len(lessons_asked(first)) == 6 and len(lessons_asked(second)) == len(whole) - 6
    assert ExperienceFolder(tmp_path / "b").attempts() == whole


def test_accumulate_makes_different_notes_within_the_budget(tmp_path):
    folder = ExperienceFolder(tmp_path)
    with pytest.raises(InputError, match="opcd extract"):
        accumulate(folder, TOKENIZER, max_tokens=100)
    extract(folder, sums(), scripted(lesson_of), problems=6)
    attempts = [record["lessons"][0] for record in folder.attempts()]
    room = len(as_notes(attempts[-2:])) + 5
    written = accumulate(folder, TOKENIZER, max_tokens=room, candidates=4, seed=1)
    notes = folder.candidates()
    assert set(notes) == set(written) and len(set(notes.values())) == len(notes) >= 2
    assert all(len(text) <= room for text in notes.values())  # a byte a token
    assert lessons_of_notes(notes["notes_000.txt"]) == attempts[-written["notes_000.txt"]["lessons"] :]
    assert written == json.loads((folder.notes / "notes.json").read_text())
    accumulate(folder, TOKENIZER, max_tokens=room, candidates=1, seed=1)
    assert len(folder.candidates()) == 1, "candidates of an earlier call would be scored as if they were new"
    with pytest.raises(InputError, match="max_tokens=3"):
        accumulate(folder, TOKENIZER, max_tokens=3)


def test_merged_notes_are_what_the_model_wrote_or_stay(tmp_path):
    folder = ExperienceFolder(tmp_path)
    extract(folder, sums(), scripted(lesson_of), problems=6)
    merging = scripted(lambda text: "- LESSON: one for all")
    options = {"max_tokens": 5000, "candidates": 1}
    assert accumulate(folder, TOKENIZER, **options, merge=merging)["notes_000.txt"]["merged"] is True
    assert lessons_of_notes(folder.candidates()["notes_000.txt"]) == ["one for all"]
    assert "lesson about" in merging.arm.generate.asked[0][0]
    useless = accumulate(folder, TOKENIZER, **options, merge=scripted(lambda text: "no"))
    assert useless["notes_000.txt"]["merged"] is False and useless["notes_000.txt"]["lessons"] > 1


def test_select_takes_the_notes_that_help_and_never_the_problems_of_the_lessons(tmp_path):
    folder = ExperienceFolder(tmp_path)
    task = sums()
    folder.notes.mkdir(parents=True)
    for number, text in enumerate(("useless", "magic", "magic, but longer")):
        (folder.notes / f"notes_{number:03}.txt").write_text(as_notes([text]))
    player, told = scripted(lambda text: f"right {number_in(text)}" if "magic" in text else "?"), []

    def scored():
        return select(folder, task, player, problems=10, told=lambda name, score: told.append(name))

    scores = scored()
    assert {name: score["score"] for name, score in scores.items()} == {
        "": 0.0, "notes_000.txt": 0.0, "notes_001.txt": 1.0, "notes_002.txt": 1.0,
    }  # fmt: skip
    assert folder.best.read_text() == as_notes(["magic"])
    asked = {number_in(text) for batch in player.arm.generate.asked for text in batch}
    for split in SPLITS:
        of_split = {number_in(episode.messages()[0]["content"]) for episode in task.episodes(split, 120)}
        assert split == "selection" or not asked & of_split
    assert len(told) == 4
    scored()
    assert len(told) == 4, "scored again what was scored"
    (folder.notes / "notes_000.txt").write_text(as_notes(["other"]))
    scored()
    assert told[4:] == ["notes_000.txt"], "new notes under an old name have no score yet"


def test_play_shows_the_context_and_asks_only_those_that_go_on():
    class Counting:
        feedback = ""

        def __init__(self, turns):
            self.left, self.score, self.id = turns, None, f"c{turns}"

        def messages(self):
            return [{"role": "user", "content": f"left {self.left}"}]

        def answer(self, text):
            self.left -= 1
            self.score = 1.0 if self.left == 0 else None

    player = scripted(lambda text: "x")
    task = SimpleNamespace(max_turns=4)
    played = player.play(task, [Counting(1), Counting(3), Counting(9)], 0, context="remember")
    told = player.arm.generate
    assert [len(batch) for batch in told.asked] == [3, 2, 2, 1] and len(set(told.seeds)) == 4
    assert all("remember" in prompt for batch in told.asked for prompt in batch)
    assert [one.score for one in played] == [1.0, 1.0, 0.0] and [len(one.turns) for one in played] == [1, 3, 4]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_commands_from_attempts_to_the_best_notes(tmp_path, model_folder, monkeypatch, capsys):
    monkeypatch.setattr("opcd_fast.contexts.experience.lessons_in", lambda text, most=None: [f"note {text[:5]!r}"])
    shared = ["--model", model_folder, "--output-dir", str(tmp_path), "--device", "cpu"]
    playing = [*shared, "--task", "instructions", "--problems", "3", "--max-new-tokens", "4"]
    assert main(["select", *playing]) == 2
    assert "opcd accumulate" in capsys.readouterr().err
    assert main(["extract", *playing]) == 0
    assert "3 attempts" in capsys.readouterr().out
    assert main(["extract", *playing[:-1], "5"]) == 2  # would be mixed with results of other settings
    assert "max_new_tokens=4, now it is 5" in capsys.readouterr().err
    assert main(["accumulate", *shared, "--candidates", "2"]) == 0
    assert main(["select", *playing]) == 0
    out = capsys.readouterr().out
    assert "no notes: " in out and (tmp_path / "best.txt").read_text().startswith(HEAD)
    task = load_task("instructions")
    used = {record["id"] for record in ExperienceFolder(tmp_path).attempts()}
    assert used <= {episode.id for episode in task.episodes("notes", 1000)}


def test_the_command_writes_raw_attempts(tmp_path, model_folder, capsys):
    folder = tmp_path / "runs"
    command = ["accumulate", "--raw", "--model", model_folder, "--output-dir", str(folder)]
    assert main(command) == 2 and "no attempts" in capsys.readouterr().err
    folder.mkdir()
    (folder / "attempts.jsonl").write_text("".join(json.dumps(attempt(n)) + "\n" for n in range(9)))
    assert main([*command, "--max-tokens", "120"]) == 0
    text = (folder / "raw.txt").read_text()
    assert 60 < len(text) <= 120 and "q8.0" in text and "q0.0" not in text
    assert main([*command, "--merge"]) == 2
    assert main([*command, "--max-tokens", "3"]) == 2 and "max_tokens=3" in capsys.readouterr().err


def test_what_no_window_holds_is_refused(model_folder, tmp_path, capsys):
    shared = ["--model", model_folder, "--max-new-tokens", "2040", "--device", "cpu", "--output-dir"]
    assert main(["extract", "--task", "instructions", "--problems", "2", *shared, str(tmp_path / "a")]) == 2
    assert "the model's window of 2048" in capsys.readouterr().err
    (tmp_path / "attempts.jsonl").write_text(json.dumps(attempt(0) | {"lessons": ["look first", "then move"]}) + "\n")
    assert main(["accumulate", "--merge", *shared, str(tmp_path)]) == 2
    assert "the model's window of 2048" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--problems", "0"], "problems"), (["--temperature", "-1"], "temperature"), (["--task-options", "{"], "JSON"),
        (["--task-options", "[1]"], "JSON"), (["--task", "chess"], "use one of"), (["--top-p", "0"], "top_p"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(model_folder, tmp_path, capsys, more, named):
    arguments = ["extract", "--model", model_folder, "--task", "instructions", "--output-dir", str(tmp_path / "x")]
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
