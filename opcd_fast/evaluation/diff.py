"""Two runs' cards, part by part. Needs neither torch nor transformers."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.data import Context
from opcd_fast.errors import InputError
from opcd_fast.evaluation.check import CARD, read_card
from opcd_fast.runtime import difference
from opcd_fast.training.run import differing, read_record
from opcd_fast.training.settings import settings_with


@dataclass(frozen=True)
class Score:
    """One measurement of both runs; low and high bound b - a with 95 % confidence."""

    name: str
    a: float
    b: float
    low: float
    high: float
    share: bool

    @property
    def beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Differences:
    """What differs between two runs. `notes` say what could not be compared."""

    settings: dict[str, tuple[Any, Any]]
    hashes: dict[str, str]
    context: list[str]  # lines of a unified diff
    scores: list[Score]
    notes: list[str]

    @property
    def differs(self) -> bool:
        return bool(self.settings or self.hashes or any(score.beyond_noise for score in self.scores))


def compare_runs(a: Path, b: Path) -> Differences:
    """a and b: runs' folders, or any folders (or files) with their cards. Raises InputError where there is none."""
    first, second = _card(a), _card(b)
    notes = []
    with_a, with_b = first["measured_with"], second["measured_with"]
    differing_measures = [name for name in with_a if with_a[name] != with_b.get(name)]
    if differing_measures:
        listed = ", ".join(f"{name} ({with_a[name]} and {with_b.get(name)})" for name in differing_measures)
        notes.append(f"measured with different {listed}")
    if first["hashes"]["held_out_sha256"] != second["hashes"]["held_out_sha256"]:
        notes.append("measured on different held-out prompts")
    found = dict(_scores(first))
    theirs = dict(_scores(second))
    alone = sorted(found.keys() ^ theirs.keys())
    if alone:
        notes.append(f"measured in one run only: {', '.join(alone)}")
    scores = []
    for name, (mine, share) in found.items():
        if name in theirs:
            other = theirs[name][0]
            _, low, high = difference(mine, other)
            scores.append(Score(name, mine["value"], other["value"], low, high, share))
    return Differences(
        settings=_settings(first["settings"], second["settings"]),
        hashes=_hashes(first["hashes"], second["hashes"]),
        context=_context(a, b, notes),
        scores=scores,
        notes=notes,
    )


def _card(path: Path) -> dict[str, Any]:
    card = read_card(path)
    if card is None:
        raise InputError(f"{str(path)!r} has no {CARD}; write it with `opcd report {path}`")
    return card


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Those that differ; one that only one run knows stands beside None."""
    names = [name for name in dict.fromkeys([*a, *b]) if name not in settings_with(belongs="place")]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _hashes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("context", "prompts", "held_out"):
        if a[f"{name}_sha256"] != b[f"{name}_sha256"]:
            found[name.replace("_", "-")] = "differs"
    if a["tokenizer"]["template_sha256"] != b["tokenizer"]["template_sha256"]:
        found["chat template"] = "differs"
    sets = {
        "tokenizer": (a["tokenizer"]["files"], b["tokenizer"]["files"]),
        "base": (a["base"]["files"], b["base"]["files"]),
        "weights": (a["weights"], b["weights"]),
    }
    for name, (mine, theirs) in sets.items():
        changes = differing(mine, theirs)
        if changes:
            found[name] = ", ".join(changes[:3]) + (" ..." if len(changes) > 3 else "")
    if not (a["base"]["files"] or b["base"]["files"]) and a["base"]["fingerprint"] != b["base"]["fingerprint"]:
        found["base"] = "other first weights"
    code_a, code_b = a["code"], b["code"]
    if (code_a["version"], code_a["commit"]) != (code_b["version"], code_b["commit"]):
        found["code"] = f"{_code(code_a)}, then {_code(code_b)}"
    return found


def _code(code: Mapping[str, Any]) -> str:
    return code["version"] + (f" at {code['commit'][:12]}" if code["commit"] else "")


def _context(a: Path, b: Path, notes: list[str]) -> list[str]:
    """Unified diff of the texts, which the runs' folders keep and their cards do not."""
    kept = [read_record(path) if path.is_dir() else None for path in (a, b)]
    if any(record is None or record["context"] is None for record in kept):
        notes.append("the contexts' texts are not both here; compared by hash alone")
        return []
    before, after = (_lines(record["context"]) for record in kept if record is not None)
    return list(difflib.unified_diff(before, after, str(a), str(b), lineterm=""))


def _lines(context: Context) -> list[str]:
    if isinstance(context, str):
        return context.splitlines()
    return [json.dumps(message, ensure_ascii=False) for message in context]


def _scores(card: Mapping[str, Any]) -> Iterator[tuple[str, tuple[dict[str, Any], bool]]]:
    """Name, and the estimate with whether it is a share."""
    for key, name in (("own", "student's own answers"), ("fixed", "answers of base + context")):
        kl, top1 = card["kl"][key], card["agreement"]["top1"][key]
        yield f"KL, {name}", (kl["after"], False)
        yield f"gap closed, {name}", (kl["gap_closed"], True)
        yield f"same most probable token, {name}", (top1["after"], True)
    yield "identical greedy answers", (card["agreement"]["greedy"]["after"]["identical"], True)
    for arm, found in card["arms"].items():
        yield f"tokens per answer, {arm}", (found["length"], False)
        yield f"cut at the limit, {arm}", (found["truncated"], True)
    for score in card["scores"]:
        for arm, found in score["arms"].items():
            yield f"{score['name']}, {arm}", (found, True)
    if card["forgetting"]:
        yield "KL to the base, unrelated prompts", (card["forgetting"]["kl"], False)
        if card["forgetting"].get("context_kl"):  # which older cards have not
            yield "KL to base + context, unrelated prompts", (card["forgetting"]["context_kl"], False)
    for one in card.get("abilities", []):
        for arm, found in one["arms"].items():
            if found is not None:
                yield f"ability {one['name']}, {arm}", (found, True)
