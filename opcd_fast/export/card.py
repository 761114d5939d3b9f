"""The model card of an exported folder: the one that `opcd report` wrote, fitted to the form of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.evaluation import CARD, read_card
from opcd_fast.models import Place
from opcd_fast.training.run import FileHashes, differing, weight_files


def card_of(folder: Path) -> Mapping[str, Any] | None:
    """The card beside the trained weights; None when `opcd report` has not been run.

    Raises InputError for a damaged card, or one that was measured on other weights.
    """
    card = read_card(folder)
    if card is None:
        return None
    there = weight_files(Place(folder), FileHashes())
    changed = differing(card["hashes"]["weights"], there)
    if changed and differing(card.get("exported") or {}, there):
        where = str(folder / CARD)
        raise InputError(f"{where!r} was measured on other weights ({changed[0]}); run `opcd report` again")
    return card


def write_card(folder: Path, card: Mapping[str, Any], adapter: bool) -> None:
    """README.md and opcd_card.json, without the context, prompts and answers, into a folder with all its weights.

    adapter: the form of the weights here. The card keeps the hashes of the weights that were measured, and gets those
    of the files here as `exported`.
    """
    from opcd_fast.evaluation.report import readme, without_texts

    shown = {**without_texts(card), "adapter": adapter, "exported": weight_files(Place(folder), FileHashes())}
    (folder / CARD).write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(shown), encoding="utf-8")
