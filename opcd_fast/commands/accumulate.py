"""`opcd accumulate`: lessons as notes of a bounded length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opcd_fast.commands.arguments import ComputeOptions, arm_of, check_at_least, parse, quiet_libraries
from opcd_fast.errors import InputError
from opcd_fast.training.settings import Within


@dataclass(frozen=True)
class AccumulateCommand(ComputeOptions):
    """Put the lessons of `opcd extract` together as candidate notes, each within a budget of tokens.

    Where lessons do not fit, the oldest leave whole. Writes the folder `notes`; earlier candidates are replaced.
    """

    model: str
    """Its tokenizer counts the tokens; with --merge it also rewrites the notes."""
    output_dir: str = "runs/experience"
    """Folder of the attempts, the notes and their scores."""
    max_tokens: int = 4096
    """Longest notes, in tokens."""
    candidates: int = 8
    """How many different notes are made; all but the first take the attempts in a random order."""
    duplicates: float = 0.7
    """Lessons at least this similar to an earlier one are dropped: above 0 up to 1, which drops equal ones only."""
    merge: bool = False
    """Let the model rewrite each candidate as a shorter list."""
    raw: bool = False
    """Write raw.txt in place of notes: the attempts themselves, the newest that fit, to compare with lessons."""
    max_new_tokens: int = 1024
    """Longest rewritten notes, in tokens."""
    seed: int = 0
    """Fixes the orders and the model's samples."""


def run(arguments: list[str]) -> int:
    command = parse(AccumulateCommand, "accumulate", arguments)
    check_at_least(1, command, "max_tokens", "candidates", "max_new_tokens")
    Within(0, 1, open_low=True)("duplicates", command.duplicates)
    from opcd_fast.contexts import ExperienceFolder, Player, accumulate
    from opcd_fast.models import load_model, load_tokenizer

    quiet_libraries()
    folder = ExperienceFolder(command.output_dir)
    tokenizer = load_tokenizer(command.model, command.trust_remote_code)
    if command.raw:
        return _write_raw(folder, tokenizer, command)
    merge = None
    if command.merge:
        model = load_model(command.model, **command.place())
        merge = Player(arm_of(model, tokenizer), {"max_new_tokens": command.max_new_tokens, "temperature": 0.0})
    written = accumulate(
        folder, tokenizer, max_tokens=command.max_tokens, candidates=command.candidates, seed=command.seed,
        threshold=command.duplicates, merge=merge,
    )  # fmt: skip
    for name, counts in written.items():
        rewritten = {None: "", True: ", rewritten", False: ", kept as it was: the model wrote no usable list"}
        print(
            f"{name}: {counts['lessons']} lessons, {counts['tokens']} tokens; {counts['duplicates']} duplicates and "
            f"{counts['over_budget']} over the budget dropped{rewritten[counts['merged']]}"
        )
    print(f"saved: {folder.notes}; next: opcd select")
    return 0


def _write_raw(folder: Any, tokenizer: Any, command: AccumulateCommand) -> int:
    from opcd_fast.contexts import as_traces, token_counter, within_budget
    from opcd_fast.runtime import write_text

    if command.merge:
        raise InputError("raw and merge: raw attempts are not rewritten; drop one of them")
    records, count = folder.attempts(), token_counter(tokenizer)
    if not records:
        raise InputError(f"no attempts in {str(folder.path)!r}; run `opcd extract` first")
    kept = within_budget(records, command.max_tokens, count, as_traces)
    if not kept:
        raise InputError(f"max_tokens={command.max_tokens} leaves no room for a single attempt; give more")
    text = as_traces(kept)
    write_text(folder.raw, text)
    print(f"saved: {folder.raw}, {len(kept)} of {len(records)} attempts, {count(text)} tokens")
    return 0
