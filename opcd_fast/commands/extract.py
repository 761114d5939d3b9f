"""`opcd extract`: attempts at problems, and the lessons a model draws from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opcd_fast.commands.arguments import check_at_least, parse
from opcd_fast.commands.experience import PlayOptions, begin


@dataclass(frozen=True)
class ExtractCommand(PlayOptions):
    """Let a model work on problems and write lessons about its own attempts; nobody tells it the right answers.

    Writes attempts.jsonl into the folder and goes on from there when run again.
    """

    repeats: int = 1
    """Attempts at each problem."""
    lessons: int = 3
    """Lessons taken from one attempt."""
    known: str | None = None
    """Notes whose lessons the model is shown, so that it writes others (a file of the folder `notes`)."""


def run(arguments: list[str]) -> int:
    command = parse(ExtractCommand, "extract", arguments)
    check_at_least(1, command, "repeats", "lessons")
    from opcd_fast.contexts import extract, lessons_of_notes
    from opcd_fast.data import read_text

    known = [] if command.known is None else lessons_of_notes(read_text(Path(command.known), "known"))
    folder, task, player = begin(command, "extract")
    records = extract(
        folder, task, player, problems=command.problems, repeats=command.repeats, most=command.lessons, known=known,
        seed=command.seed, told=lambda done, total: print(f"{done} of {total} attempts", flush=True),
    )  # fmt: skip
    lessons = sum(len(record["lessons"]) for record in records)
    without = sum(not record["lessons"] for record in records)
    score = sum(record["score"] for record in records) / len(records)
    print(f"{len(records)} attempts, mean score {score:.3f}; {lessons} lessons, {without} attempts without one")
    print(f"saved: {folder.path / 'attempts.jsonl'}; next: opcd accumulate")
    return 0
