"""The model card of an exported folder: the one that `opcd report` wrote, fitted to the form of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError

CARD = "opcd_card.json"


def card_of(folder: Path) -> Mapping[str, Any] | None:
    """The card beside the trained weights; None when `opcd report` has not been run.

    Raises InputError for a damaged card, or one that was measured on other weights.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    from opcd_fast.models import Place
    from opcd_fast.training.run import FileHashes, differing, weight_files

    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        measured = card["hashes"]["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is damaged ({error}); write it again with `opcd report`") from error
    there = weight_files(Place(folder), FileHashes())
    changed = differing(measured, there)
    if changed and differing(card.get("exported") or {}, there):
        raise InputError(f"{str(path)!r} was measured on other weights ({changed[0]}); run `opcd report` again")
    return card


def write_card(folder: Path, card: Mapping[str, Any], adapter: bool) -> None:
    """README.md and opcd_card.json, without the context, prompts and answers, into a folder with all its weights.

    adapter: the form of the weights here. The card keeps the hashes of the weights that were measured, and gets those
    of the files here as `exported`.
    """
    from opcd_fast.evaluation.report import readme, without_texts
    from opcd_fast.models import Place
    from opcd_fast.training.run import FileHashes, weight_files

    shown = {**without_texts(card), "adapter": adapter, "exported": weight_files(Place(folder), FileHashes())}
    (folder / CARD).write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(shown), encoding="utf-8")
