"""`opcd select`: the notes that help most on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opcd_fast.commands.arguments import parse
from opcd_fast.commands.experience import PlayOptions, begin


@dataclass(frozen=True)
class SelectCommand(PlayOptions):
    """Score every candidate of `opcd accumulate`, and no notes at all, on problems that no lesson was drawn from.

    Writes scores.json and the best notes as best.txt, and goes on where it was stopped.
    """


def run(arguments: list[str]) -> int:
    command = parse(SelectCommand, "select", arguments)
    from opcd_fast.contexts import select

    folder, task, player = begin(command, "select")
    scores = select(folder, task, player, problems=command.problems, seed=command.seed, told=_tell)
    best = max((name for name in scores if name), key=lambda name: scores[name]["score"])
    if scores[best]["score"] <= scores[""]["score"]:
        print("No notes are better than none on these problems: train with them only if you know why.")
    print(f"saved: {folder.best}; next: opcd train --context {folder.best}")
    return 0


def _tell(name: str, score: dict[str, Any]) -> None:
    interval = f"{score['low']:.3f} to {score['high']:.3f}"
    print(f"{name or 'no notes'}: {score['score']:.3f} ({interval}) on {score['problems']} problems", flush=True)
