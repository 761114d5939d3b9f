"""From candidates to two files of prompts: limits, duplicates, a split without leakage, general prompts mixed in."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opcd_fast.data.duplicates import repeats
from opcd_fast.data.messages import Prompt
from opcd_fast.data.prompt_sources import Candidate
from opcd_fast.errors import InputError
from opcd_fast.runtime import check_replaceable, write_folder

TRAIN, HELD_OUT, SUMMARY = "train.jsonl", "held_out.jsonl", "summary.json"
FEWEST = 8  # prompts held out of a list; fewer say little


@dataclass(frozen=True)
class Selection:
    """What of the candidates is used, and how."""

    held_out: float = 0.1
    """Share of the prompts that is kept for evaluation; 0: none."""
    general_share: float = 0.2
    """Share of general prompts among the training prompts."""
    similarity: float = 0.7
    """From this Jaccard similarity of character 4-grams on, the later of two prompts is dropped; 1: only the same."""
    min_characters: int = 3
    """Shorter prompts are dropped."""
    max_characters: int = 8000
    """Longer prompts are dropped."""
    max_tokens: int | None = None
    """Prompts of more tokens, as the student will see them, are dropped; needs a model."""
    max_prompts: int | None = None
    """Use so many at most, drawn at random, the general ones not counted; None: all."""
    seed: int = 0
    """Fixes questions, split and mixture."""

    def __post_init__(self) -> None:
        for name, low, high in (("held_out", 0, 0.9), ("general_share", 0, 0.9), ("similarity", 0.1, 1)):
            if not low <= getattr(self, name) <= high:  # refuses NaN too
                raise InputError(f"{name}={getattr(self, name)!r} must be a number from {low} to {high}")
        for name in ("min_characters", "max_characters", "max_tokens", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value!r} must be a whole number of at least 1")
        if self.min_characters > self.max_characters:
            raise InputError(f"min_characters={self.min_characters} is above max_characters={self.max_characters}")


@dataclass(frozen=True)
class PromptSet:
    """Candidates chosen for training (general ones among them) and for evaluation, and what became of the others."""

    train: list[Candidate]
    held_out: list[Candidate]
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> how many
    general_wanted: int = 0


def select(
    candidates: Sequence[Candidate],
    general: Sequence[Candidate],
    selection: Selection,
    *,
    shown: Sequence[str] = (),
    count_tokens: Callable[[Candidate], int] | None = None,
) -> PromptSet:
    """Choose and split. The same arguments give the same result.

    Prompts of one conversation stay on one side of the split, and so do near-duplicates: of those only one is kept.

    Args:
        general: prompts to mix into the training ones.
        shown: texts that the context holds already (the questions of few-shot turns); prompts that repeat them are
            dropped, for the student would be measured on what it was shown.
        count_tokens: needed for `max_tokens`.
    Raises:
        InputError: too little is left for both sides.
    """
    draw = random.Random(selection.seed)

    def flaw(candidate: Candidate) -> str | None:
        length, limit = len(candidate.text.strip()), selection.max_tokens
        if length < selection.min_characters:
            return "too short"
        too_many = limit is not None and count_tokens is not None and count_tokens(candidate) > limit
        return "too long" if length > selection.max_characters or too_many else None

    flaws = [(candidate, flaw(candidate)) for candidate in (*candidates, *general)]
    dropped = Counter(why for _, why in flaws if why)
    everything = [candidate for candidate, why in flaws if not why]
    texts = [*shown, *(candidate.text for candidate in everything)]
    groups = [*(("shown", n) for n in range(len(shown))), *(candidate.conversation for candidate in everything)]
    copies = repeats(texts, selection.similarity, groups)[len(shown) :]
    for copy in copies:
        if copy is not None:
            dropped["in the context already" if copy < len(shown) else "repeated"] += 1
    of_general = set(map(id, general))
    kept = [candidate for candidate, copy in zip(everything, copies) if copy is None]
    own = [candidate for candidate in kept if id(candidate) not in of_general]
    extra = [candidate for candidate in kept if id(candidate) in of_general]
    if selection.max_prompts is not None and len(own) > selection.max_prompts:
        dropped["above max_prompts"] = len(own) - selection.max_prompts
        chosen = sorted(draw.sample(range(len(own)), selection.max_prompts))
        own = [own[place] for place in chosen]
    train, held_out = _split(own, selection.held_out, draw)
    share = selection.general_share
    wanted = round(share / (1 - share) * len(train)) if general else 0
    mixed = sorted(draw.sample(range(len(extra)), min(wanted, len(extra))))
    return PromptSet([*train, *(extra[place] for place in mixed)], held_out, dropped, wanted)


def _split(own: list[Candidate], share: float, draw: random.Random) -> tuple[list[Candidate], list[Candidate]]:
    """Whole conversations, drawn until the held-out side has its share; both sides in the order of the sources."""
    if not own:
        raise InputError("no prompt is left: all were too short, too long or repeated; loosen the limits")
    sizes = Counter(candidate.conversation for candidate in own)
    order = list(sizes)
    draw.shuffle(order)
    wanted, taken, evaluated = round(share * len(own)) or (1 if share else 0), 0, set()
    for conversation in order:
        if taken + sizes[conversation] <= wanted:
            evaluated.add(conversation)
            taken += sizes[conversation]
    train = [candidate for candidate in own if candidate.conversation not in evaluated]
    held_out = [candidate for candidate in own if candidate.conversation in evaluated]
    if not train or (share and not held_out):
        raise InputError(
            f"{len(own)} prompts of {len(sizes)} conversations cannot be split with held_out={share}: one side is "
            "empty; give more prompts, another share, or turns='last'"
        )
    return train, held_out


def hold_out(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and a tenth of the different ones, at least `FEWEST`, always the same of one list.

    Equal ones stay together, and guards against forgetting (an empty context of their own) are not held out: those of a
    question that is are dropped. From fewer than three times as many nothing is held out.
    """
    questions = [repr((prompt.messages, prompt.text)) for prompt in prompts]
    own = dict.fromkeys(q for q, prompt in zip(questions, prompts) if prompt.privileged_context != "")
    count = max(FEWEST, len(own) // 10)
    if len(own) < 3 * count:
        return list(prompts), []
    chosen = set(random.Random(0).sample(list(own), count))
    train, held_out = ([p for q, p in zip(questions, prompts) if (q in chosen) is side] for side in (False, True))
    return train, [prompt for prompt in held_out if prompt.privileged_context != ""]


def summary(chosen: PromptSet, count_tokens: Callable[[Candidate], int] | None) -> dict[str, Any]:
    """Counts for people: what was kept, what was dropped and why, how long prompts are."""
    general = [c for c in chosen.train if c.prompt.privileged_context == ""]
    sources = Counter(c.source.split(",")[0].split(" line ")[0] for c in (*chosen.train, *chosen.held_out))
    length = count_tokens or (lambda candidate: len(candidate.text.split()))
    report: dict[str, Any] = {
        "train": len(chosen.train) - len(general),
        "held_out": len(chosen.held_out),
        "general": len(general),
        "general_wanted": chosen.general_wanted,
        "dropped": dict(sorted(chosen.dropped.items())),
        "sources": dict(sorted(sources.items())),
    }
    report["median_tokens" if count_tokens else "median_words"] = statistics.median(
        length(candidate) for candidate in (*chosen.train, *chosen.held_out)
    )
    return report


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises InputError where the files would replace something that may not be replaced."""
    check_replaceable(folder, "output_dir=")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in there if name not in (TRAIN, HELD_OUT, SUMMARY)]
    if foreign:
        raise InputError(f"output_dir={str(folder)!r} holds {foreign[0]!r}, which is not ours; choose another folder")
    if there and not overwrite:
        raise InputError(f"output_dir={str(folder)!r} holds prompts already; choose another folder or use --overwrite")


def write(folder: Path, chosen: PromptSet, report: dict[str, Any]) -> None:
    """train.jsonl, held_out.jsonl (when there are any) and summary.json: all of them, or nothing."""

    def fill(scratch: Path) -> None:
        for name, candidates in ((TRAIN, chosen.train), (HELD_OUT, chosen.held_out)):
            if candidates:
                rows = (json.dumps(row(candidate), ensure_ascii=False) + "\n" for candidate in candidates)
                (scratch / name).write_text("".join(rows), encoding="utf-8")
        (scratch / SUMMARY).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    write_folder(folder.resolve(), fill)


def row(candidate: Candidate) -> dict[str, Any]:
    """The candidate as a row that `read_prompts` reads back, with its source."""
    prompt, messages = candidate.prompt, list(candidate.prompt.messages or ())
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user"
    more = {name: getattr(prompt, name) for name in ("privileged_context", "tools", "chat_template_kwargs")}
    return {
        "prompt": messages[0]["content"] if plain else messages,
        **{name: value for name, value in more.items() if value is not None},
        "source": candidate.source,
    }
