"""Experience: attempts become lessons, lessons become candidate notes, the best notes are chosen on held-out problems.

    extract     play problems of the split `notes`, write lessons about each attempt      -> attempts.jsonl
    accumulate  put lessons together under a token budget, several candidates             -> notes/notes_000.txt ...
    select      score every candidate, and no notes at all, on the split `selection`      -> scores.json, best.txt

`opcd train --context FOLDER/best.txt` then moves the notes into the weights. Every step goes on where it was stopped.
The pipeline is that of arXiv 2602.12275; unlike its scripts it never scores notes on problems that are used elsewhere.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opcd_fast.contexts.lessons import (
    as_notes,
    ask_for_lessons,
    ask_to_merge,
    lessons_in,
    within_budget,
    without_similar,
)  # fmt: skip
from opcd_fast.contexts.player import Player, token_counter
from opcd_fast.data.tasks import Task
from opcd_fast.errors import InputError
from opcd_fast.runtime import stream_seed, wilson, write_text


class ExperienceFolder:
    """What the steps keep, as files people can read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.notes = self.path / "notes"
        self.best = self.path / "best.txt"
        self.raw = self.path / "raw.txt"
        self._attempts = self.path / "attempts.jsonl"
        self._scores = self.path / "scores.json"

    def attempts(self) -> list[dict[str, Any]]:
        """Whole records; a step that was killed may leave half of one at the end."""
        if not self._attempts.is_file():
            return []
        records = []
        for line in self._attempts.read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
        return records

    def rewrite(self, records: Sequence[dict[str, Any]]) -> None:
        write_text(self._attempts, "".join(json.dumps(record) + "\n" for record in records))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        with open(self._attempts, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def candidates(self) -> dict[str, str]:
        """Notes by file name."""
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(self.notes.glob("notes_*.txt"))}

    def scores(self) -> dict[str, Any]:
        return json.loads(self._scores.read_text(encoding="utf-8")) if self._scores.is_file() else {}

    def write_scores(self, scores: dict[str, Any]) -> None:
        write_text(self._scores, json.dumps(scores, indent=1) + "\n")

    def settle(self, step: str, settings: dict[str, Any]) -> None:
        """Remember the settings of a step. InputError when it was begun with others: results would be mixed."""
        path = self.path / f"{step}.json"
        now = json.loads(json.dumps(settings))
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
        for name in now.keys() | before.keys():
            if before.get(name) != now.get(name):
                raise InputError(
                    f"output_dir={str(self.path)!r} holds {step} results with {name}={before.get(name)!r}, now it is "
                    f"{now.get(name)!r}; use the same settings or another folder"
                )
        write_text(path, json.dumps(now, indent=1) + "\n")


def extract(
    folder: ExperienceFolder,
    task: Task,
    player: Player,
    *,
    problems: int,
    repeats: int = 1,
    most: int = 3,
    known: Sequence[str] = (),
    seed: int = 0,
    batch: int = 32,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Attempts at `problems` episodes of the split `notes`, `repeats` times each, with the lessons drawn from them.

    Args:
        most: lessons taken from one attempt.
        known: lessons that the model is shown when it writes new ones.
        batch: attempts between two writes to disk.
        told: called with (attempts done, attempts in all) after each batch.
    Returns:
        all records of the folder: round, id, score, feedback, turns, lessons, and the text they were read from.
    Attempts are made without notes and nobody tells the model whether it was right; games say how they ended.
    """
    done = {(record["repeat"], record["id"]): record for record in folder.attempts()}
    folder.rewrite(list(done.values()))
    episodes = {
        (repeat, episode.id): episode
        for repeat in range(repeats)
        for episode in task.episodes("notes", problems, seed=seed)
    }
    wanted = [(key[0], episode) for key, episode in episodes.items() if key not in done]
    total = len(done) + len(wanted)
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        # Named after what comes first in the batch: a step that goes on draws what it would have drawn.
        own = stream_seed(seed, f"extract {part[0][1].id}", part[0][0])
        played = player.play(task, [episode for _, episode in part], own)
        texts = player.answers([ask_for_lessons(one, most, known) for one in played], stream_seed(own, "lessons", 0))
        records = [
            {"repeat": repeat, **asdict(one), "written": text, "lessons": lessons_in(text, most)}
            for (repeat, _), one, text in zip(part, played, texts, strict=True)
        ]
        folder.append(records)
        done.update({(record["repeat"], record["id"]): record for record in records})
        told(len(done), total)
    return list(done.values())


def accumulate(
    folder: ExperienceFolder,
    tokenizer: Any,
    *,
    max_tokens: int,
    candidates: int = 8,
    seed: int = 0,
    threshold: float = 1.0,
    merge: Player | None = None,
) -> dict[str, dict[str, Any]]:
    """Candidate notes of at most `max_tokens` tokens out of the folder's lessons.

    Candidate 0 has the lessons in the order they were written; the others have the attempts in random orders, so that
    other ones are the newest. threshold: see `without_similar`. merge: a model that then rewrites
    each candidate as a shorter list; what it writes must again fit, and a candidate it writes nothing usable for
    stays as it was. Returns, by file name, counts of lessons and tokens. Raises InputError when there is no lesson.
    """
    of_attempts = [record["lessons"] for record in folder.attempts() if record["lessons"]]
    if not of_attempts:
        raise InputError(
            f"no lesson in {str(folder.path)!r}; run `opcd extract` first, with a model that can write them"
        )
    count = token_counter(tokenizer)
    written: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for number in range(candidates):
        order = list(of_attempts)
        if number:
            random.Random(stream_seed(seed, "accumulate", number)).shuffle(order)
        lessons = list(dict.fromkeys(lesson for attempt in order for lesson in attempt))
        unique = without_similar(lessons, threshold)
        kept = within_budget(unique, max_tokens, count, as_notes)
        dropped = len(unique) - len(kept)
        merged = None
        if merge is not None and len(kept) > 1:
            (text,) = merge.answers([ask_to_merge(kept)], stream_seed(seed, "merge", number))
            joined = within_budget(lessons_in(text), max_tokens, count, as_notes)
            merged = bool(joined)
            kept = joined or kept
        notes = as_notes(kept)
        if not kept:
            raise InputError(f"max_tokens={max_tokens} leaves no room for a single lesson; give more")
        if notes in texts.values():
            continue  # the same notes would be scored twice
        name = f"notes_{number:03}.txt"
        texts[name] = notes
        written[name] = {
            "lessons": len(kept), "tokens": count(notes), "duplicates": len(lessons) - len(unique),
            "over_budget": dropped, "merged": merged,
        }  # fmt: skip
    for old in folder.notes.glob("notes_*.txt"):
        if old.name not in texts:
            old.unlink()
    for name, notes in texts.items():
        write_text(folder.notes / name, notes)
    write_text(folder.notes / "notes.json", json.dumps(written, indent=1) + "\n")
    return written


def select(
    folder: ExperienceFolder,
    task: Task,
    player: Player,
    *,
    problems: int,
    seed: int = 0,
    told: Callable[[str, dict[str, Any]], None] = lambda name, score: None,
) -> dict[str, dict[str, Any]]:
    """Mean score of every candidate, and of no notes (""), on the same problems of the split `selection`.

    The best candidate becomes best.txt; of equals the shorter one, as it costs the teacher less. Returns scores with
    95 % intervals by file name. Raises InputError when there are no candidates.
    """
    candidates = folder.candidates()
    if not candidates:
        raise InputError(f"no notes in {str(folder.notes)!r}; run `opcd accumulate` first")
    scores = folder.scores()
    for name, notes in {"": "", **candidates}.items():
        if scores.get(name, {}).get("notes") == notes:
            continue
        episodes = task.episodes("selection", problems, seed=seed)
        played = player.play(task, episodes, stream_seed(seed, "select", 0), context=notes)
        won = sum(one.score for one in played)
        low, high = wilson(round(won), len(played))
        scores[name] = {"score": won / len(played), "low": low, "high": high, "problems": len(played), "notes": notes}
        folder.write_scores(scores)
        told(name, scores[name])
    scores = {name: score for name, score in scores.items() if not name or name in candidates}
    folder.write_scores(scores)
    best = max(candidates, key=lambda name: (scores[name]["score"], -len(candidates[name])))
    write_text(folder.best, candidates[best])
    return scores
