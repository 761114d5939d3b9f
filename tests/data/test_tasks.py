"""Tasks: scorers that can be fooled by nothing cheap, splits that share no problem."""

import json
import random
import time

import numpy
import pytest

from opcd_fast.data.tasks import TASKS, final_part, load_task
from opcd_fast.data.tasks.choice import choice_file, chosen_letter, said_yes, yes_no_file
from opcd_fast.data.tasks.episode import SPLITS, Questions, split_of
from opcd_fast.data.tasks.instructions import RULES
from opcd_fast.errors import InputError

LAKES = ("frozen-lake", "frozen-lake-gymnasium")
PROBLEMS = [*LAKES, "sokoban", "reasoning:chain_sum", "instructions"]


def task_or_skip(name):
    try:
        return load_task(name)
    except InputError as error:
        pytest.skip(str(error))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def all_episodes(task, count=1000):
    found = {}
    for split in SPLITS:
        try:
            found[split] = task.episodes(split, count)
        except InputError:
            found[split] = []
    return found


# --- splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
def test_splits_share_no_problem(name):
    task = task_or_skip(name)
    ids = {split: {episode.id for episode in task.episodes(split, 12, seed=1)} for split in SPLITS}
    for one in SPLITS:
        assert len(ids[one]) >= 3, (one, ids)
        for other in SPLITS:
            assert one == other or not ids[one] & ids[other]


@pytest.mark.parametrize("name", PROBLEMS)
def test_episodes_are_reproducible_and_leave_random_streams_alone(name):
    task = task_or_skip(name)
    random.seed(5), numpy.random.seed(5)
    expected = random.random(), numpy.random.rand()
    random.seed(5), numpy.random.seed(5)
    first = [episode.messages() for episode in task.episodes("train", 5, seed=3)]
    assert (random.random(), numpy.random.rand()) == expected
    assert first == [episode.messages() for episode in task.episodes("train", 5, seed=3)]
    assert first != [episode.messages() for episode in task.episodes("train", 5, seed=4)]


def test_a_split_depends_on_the_content_alone():
    def questions(texts):
        return Questions("t", [([{"role": "user", "content": text}], len) for text in texts])

    texts = [f"question {n}" for n in range(400)]
    one = questions(texts)
    other = questions([*texts[::-1], *texts])  # another order, and every question twice
    for split in SPLITS:
        ids = [sorted(episode.id for episode in task.episodes(split, 400)) for task in (one, other)]
        assert ids[0] == ids[1] and len(set(ids[0])) == len(ids[0])
    sizes = {split: len(one.episodes(split, 400)) for split in SPLITS}
    assert sum(sizes.values()) == 400 and 160 <= sizes["train"] <= 240 and 20 <= sizes["notes"] <= 60
    with pytest.raises(InputError, match="split='dev'"):
        one.episodes("dev", 1)
    with pytest.raises(InputError, match="no problem"):
        questions([]).episodes("test", 1)


# --- games --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAKES)
def test_lakes_are_won_by_walking_round_holes_and_lost_in_them(name):
    task = task_or_skip(name)
    for episode, loser in zip(task.episodes("train", 6), task.episodes("train", 6), strict=True):
        for move in path_on(episode.board):
            assert episode.score is None
            episode.answer(f"Perhaps [left]? No: [{move}].")
        assert episode.score == 1.0 and episode.feedback.startswith("You won.")
        for _ in range(task.max_turns):
            if loser.score is None:
                loser.answer("[up]")
        assert loser.score == 0.0 and loser.feedback.startswith("You lost.")


MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def shortest(start, is_end, after):
    """Moves from one state to an end, breadth first; none where there is no way."""
    states, seen = [(start, [])], {start}
    while states:
        state, moves = states.pop(0)
        if is_end(state):
            return moves
        for name, step in MOVES.items():
            there = after(state, step)
            if there is not None and there not in seen:
                seen.add(there)
                states.append((there, [*moves, name]))
    return []


def path_on(board):
    """From P to G on the drawn board: rows of letters, or cells between bars."""
    rows = [line.strip("|").split("|") for line in board.splitlines() if line.startswith("|")]
    rows = [[cell.strip() or "." for cell in row] for row in rows] or [line.split() for line in board.splitlines()]
    grid = {(r, c): cell for r, row in enumerate(rows) for c, cell in enumerate(row)}

    def after(at, step):
        there = (at[0] + step[0], at[1] + step[1])
        return there if grid.get(there, "H") != "H" else None

    (start,) = [at for at, cell in grid.items() if cell == "P"]
    return shortest(start, lambda at: grid[at] == "G", after)


@pytest.mark.parametrize("name", LAKES)
def test_progress_is_not_a_win_and_a_game_ends_at_its_limit(name):
    task = task_or_skip(name)  # textarena pays 0.5 for half of the way
    for episode in task.episodes("train", 4):
        episode.answer(f"[{path_on(episode.board)[0]}]")
        turns = 1
        while episode.score is None:
            episode.answer("I do not know.")
            turns += 1
        assert episode.score == 0.0 and turns <= task.max_turns
        assert name == "frozen-lake" or (turns == task.max_turns and "limit" in episode.feedback)


def test_sokoban_is_won_by_pushing_the_box_home():
    task = task_or_skip("sokoban")
    won = 0
    for episode in task.episodes("train", 6):
        for move in solution(episode.board):
            if episode.score is None:
                episode.answer(f"[{move}]")
        won += episode.score == 1.0
    assert won >= 3, "boards that need more than max_turns moves are lost; most need fewer"


def solution(board):
    lines = [line.split() for line in board.splitlines() if line.startswith("#")]
    grid = {(r, c): cell for r, row in enumerate(lines) for c, cell in enumerate(row)}
    (me,) = [p for p, cell in grid.items() if cell in "PS"]
    (box,) = [p for p, cell in grid.items() if cell in "X√"]
    goals = {p for p, cell in grid.items() if cell in "OS√"} or {me}  # a goal under the player is drawn as P

    def after(state, step):
        me, box = state
        there = (me[0] + step[0], me[1] + step[1])
        moved = (box[0] + step[0], box[1] + step[1]) if there == box else box
        return (there, moved) if "#" not in (grid[there], grid[moved]) else None

    return shortest((me, box), lambda state: state[1] in goals, after)


# --- math ---------------------------------------------------------------------------------------------------

DAPO = {
    "prompt": [{"role": "user", "content": "What is 17 * 2? ... Answer: $Answer ..."}],
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "data_source": "math_dapo", "ability": "MATH", "extra_info": {"index": "x"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "truth", "same"),
    [
        ("So it is.\nAnswer: 34", "34", True), ("Answer: $34$.", "34", True), ("**Answer:** 34", "34", True),
        ("The answer is: 34", "34", True), ("Answer: 1,234", "1234", True), ("Answer: (1, 2)", "(1,2)", True),
        ("Answer: 34 \nAnswer: 35", "34", False),  # the last one counts
        ("\\boxed{34} first.\nAnswer: 35\n", "34", False),
        ("Answer: \\boxed{\\frac{1}{2}}", "0.5", True),
        ("we get \\boxed{\\frac{3}{6}}", "\\frac{1}{2}", True),
        ("Answer: -3", "3", False), ("34 is a nice number, but who knows", "34", False), ("", "34", False),
        ("Answer: 340", "34", False), ("Answer: 2^{2024}-1", "-1 + 2^{2024}", True), ("Answer: 2^{10}", "1024", True),
        ("Answer: 2^{\\frac{1}{2}}", "\\sqrt{2}", True), ("Answer: 5!", "120", True),
    ],
)  # fmt: skip
def test_math_answers(text, truth, same):
    pytest.importorskip("math_verify")
    from opcd_fast.data.tasks.math import same_answer

    assert same_answer(text, truth) is same


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9}}", "9^9^9", "9**9**9", "9^{\\frac{9^{9}}{1}}", "9^{\\left(9^9\\right)}", "10^{1000000}",
     "10^{1000 \\cdot 100}", "9^(99999999)", "9^{-(9^9)}", "9^{9^{9", "(9!)!", "9!!!", "9999999!",
     "((9^{999})^{999})^{999}", "9^{9!}", "\\binom{1000000000}{500000000}", "9^{\\binom{99}{49}}",
     "\\sum_{n=1}^{9999} n!"],
)  # fmt: skip
def test_math_that_nobody_works_out_in_time_is_no_answer(text):
    pytest.importorskip("math_verify")
    from opcd_fast.data.tasks.math import same_answer

    start = time.monotonic()
    assert not same_answer(f"Answer: {text}", "4") and not same_answer("Answer: 4", text)
    assert same_answer(f"Answer: {text}", text) and time.monotonic() - start < 5


def test_math_files(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{**DAPO, "prompt": [{"role": "user", "content": f"{n} + 1?"}],
             "reward_model": {"ground_truth": str(n + 1)}} for n in range(40)]  # fmt: skip
    task = load_task("math:" + write_rows(tmp_path / "dapo.jsonl", rows))
    episodes = task.episodes("train", 10)
    assert len(episodes) == 10
    for episode in episodes:
        number = int(episode.messages()[0]["content"].split()[0])
        episode.answer(f"<think>Answer: 5</think> Let me see.\nAnswer: {number + 1}")
        assert episode.score == 1.0
    plain = load_task("math:" + write_rows(tmp_path / "plain.jsonl", [{"question": "1+1?", "answer": 2}]))
    (split,) = [split for split, found in all_episodes(plain).items() if found]
    (episode,) = plain.episodes(split, 5)
    assert "Answer: " in episode.messages()[0]["content"]
    episode.answer("<think> Answer: 2")  # never stopped thinking
    assert episode.score == 0.0
    with pytest.raises(InputError, match="line 1.*no answer"):
        load_task("math:" + write_rows(tmp_path / "bad.jsonl", [{"prompt": "1+1?"}]))
    with pytest.raises(InputError, match="line 2: reward_model"):
        load_task("math:" + write_rows(tmp_path / "bad.jsonl", [DAPO, {**DAPO, "reward_model": "{34"}]))


# --- choice and labels --------------------------------------------------------------------------------------


def medmcqa(first, count=24):
    return [
        {"question": f"Question {n}?", "opa": "one", "opb": "two", "opc": "three", "opd": "four", "cop": n % 4 + first}
        for n in range(count)
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_medmcqa_counts_from_where_the_file_does(tmp_path, first):
    path = write_rows(tmp_path / "m.jsonl", medmcqa(first))
    for task in (choice_file(path), load_task(f"choice:{path}", first=first)):
        checked = 0
        for episodes in all_episodes(task).values():
            for episode in episodes:
                right = int(episode.messages()[0]["content"].split()[1].rstrip("?")) % 4
                episode.answer(f"Answer: {'ABCD'[right]}")
                assert episode.score == 1.0
                checked += 1
        assert checked == 24


def test_medmcqa_errors(tmp_path):
    unclear = write_rows(tmp_path / "u.jsonl", [row for row in medmcqa(1) if row["cop"] in (1, 2)])
    with pytest.raises(InputError, match="0 or 1 is open: give first=0"):
        choice_file(unclear)
    assert choice_file(unclear, first=1)
    with pytest.raises(InputError, match="line 1.*no opa"):
        choice_file(write_rows(tmp_path / "x.jsonl", [{"question": "?"}]))
    test_split = [{**row, "cop": -1} for row in medmcqa(0)]
    with pytest.raises(InputError, match="-1"):
        choice_file(write_rows(tmp_path / "t.jsonl", test_split), first=0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"), ("The answer is (c).", "C"), ("**Answer: D**", "D"), ("B", "B"), ("B. because", "B"),
        ("(A) fever", "A"), ("A fever is likely", None), ("I do not know", None), ("Answer: A\nno, answer: B", "B"),
        ("", None), ("Answer: E", None), ("A", "A"), ("Cats purr", None),
        ("**Answer:** B", "B"), ("**Answer:** **B**", "B"), ("Answer: \\boxed{B}", "B"), ("_Answer:_ _d_", "D"),
        ("The answer is $\\boxed{\\text{C}}$.", "C"), ("Answer: `B`", "B"), ("### Answer\n\nB", "B"),
        ("I cannot answer a question like this", None), ("The answer is a combination of B and C", None),
        ("Answer: C ... The answer is a rare disease.", "C"), ("Answer: C-reactive protein", None),
        ("The answer is not B", None), ("Answer: a\nor", "A"), ("The answer is A because", "A"),
    ],
)  # fmt: skip
def test_letters(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "yes"),
    [("Yes.", True), ("no, it is not", False), ("Well, yes", None), ("Answer: No", False), ("Yesterday", None),
     ("unsafe", False), ("I said yes. Answer: no", False), ("", None), ("**Answer:** Yes", True),
     ("**Answer**: **No**", False), ("Answer: \\boxed{no}", False), ("The answer is **yes**.\nFor", True),
     ("The answer is no longer valid; yes.", None), ("I cannot answer yes or no.", None), ("Answer: no, it is", False)],
)  # fmt: skip
def test_yes_and_no(text, yes):
    assert said_yes(text) is yes


def test_labels(tmp_path):
    rows = [{"prompt": f"Is {n} even?", "label": ["unsafe", "safe", 0, True][n % 4]} for n in range(20)]
    task = yes_no_file(write_rows(tmp_path / "l.jsonl", rows))
    for episodes in all_episodes(task).values():
        for episode in episodes:
            number = int(episode.messages()[0]["content"].split()[1])
            episode.answer("yes" if number % 4 in (1, 3) else "no")
            assert episode.score == 1.0
    with pytest.raises(InputError, match="no column 'prompt'"):
        yes_no_file(write_rows(tmp_path / "c.jsonl", [{"label": "yes"}]))
    with pytest.raises(InputError, match="must be yes or no"):
        yes_no_file(write_rows(tmp_path / "b.jsonl", [{"prompt": "?", "label": "perhaps"}]))


# --- instructions -------------------------------------------------------------------------------------------

GOOD = {
    "Write in lower case letters only.": ("all small.", "Not small."),
    "Write in capital letters only.": ("BIG!", "Big!"),
    "Do not use any comma.": ("none here", "one, here"),
    "Answer in exactly two sentences.": ("One. Two!", "One. Two. Three."),
    "Answer in at most 15 words.": ("short", "word " * 16),
    "Use exactly three bullet points, each on a line that begins with `- `.": ("- a\n- b\n- c", "- a\n- b"),
    "End with the words `That is all.`": ("x That is all.\n", "That is all. x"),
    "Begin with the word `Well`.": ("Well, x", "So well"),
    'Answer with a JSON object that has the single key "text".': ('```json\n{"text": "x"}\n```', '{"text": 1, "b": 2}'),
    "Put your whole answer in double quotation marks.": ('"x y"', '"x" y'),
    "Do not use the letter `z` anywhere.": ("abc", "Zoo"),
    "Use the word `river` at least twice.": ("River, river", "river rivers"),
}


def test_every_rule_tells_good_from_bad():
    rules = dict(RULES)
    assert set(GOOD) == set(rules) and len(rules) == len(RULES)
    for asked, (good, bad) in GOOD.items():
        holds = rules[asked]
        assert holds(good), asked
        assert not holds(bad), asked
        assert not holds(""), asked


# --- the rest -----------------------------------------------------------------------------------------------


def test_final_part():
    assert final_part("<think>a</think> b ") == "b"
    assert final_part(" <think> a") == ""
    assert final_part(" b ") == "b"
    assert {split_of(str(n)) for n in range(100)} == set(SPLITS)


@pytest.mark.parametrize("name", ["mathematics", "math", "frozen-lake:x", "choice:", ""])
def test_unknown_tasks(name):
    with pytest.raises(InputError, match="use one of"):
        load_task(name)


@pytest.mark.parametrize("name", ["frozen-lake", "frozen-lake-gymnasium", "sokoban", "choice:missing.jsonl"])
@pytest.mark.parametrize("value", ["4", 4.5, float("inf"), True, None, [], {}, 10**400, -1])
def test_options_of_a_wrong_kind_are_refused_before_use(name, value):
    option = {"sokoban": "boxes", "choice:missing.jsonl": "first"}.get(name, "size")
    for one in [option] if option == "first" else [option, "max_turns"]:
        with pytest.raises(InputError, match=f"{one}=.* must be a whole number"):
            load_task(name, **{one: value})


def test_options_and_missing_packages(monkeypatch):
    for name, option in (("instructions", "colour"), ("math:x", "path"), ("sokoban", "size"), ("choice:x", "boxes")):
        with pytest.raises(InputError, match=f"no option '{option}'"):
            load_task(name, **{option: 4})
    for name, least in (("frozen-lake", {"size": 2}), ("sokoban", {"boxes": 0}), ("sokoban", {"max_turns": 0})):
        with pytest.raises(InputError, match="must be a whole number"):
            load_task(name, **least)
    assert "sokoban" in TASKS
    monkeypatch.setitem(__import__("sys").modules, "textarena", None)
    with pytest.raises(InputError, match=r"pip install .*\[tasks\]'"):
        load_task("sokoban")
