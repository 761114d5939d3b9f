"""The files of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.data import Context
from opcd_fast.evaluation import CARD
from opcd_fast.evaluation.report.hub_card import readme
from opcd_fast.evaluation.report.page import page
from opcd_fast.runtime import write_text


def write_report(run: Path, card: Mapping[str, Any], context: Context | None) -> list[Path]:
    """Card, README and page into the run's folder, card and README into its final/. Returns those of the folder.

    What goes into final/, the folder that gets published, holds none of the context, and no prompts or answers.
    """
    text = readme(card)
    full = run / CARD
    write_text(full, json.dumps(card, indent=1) + "\n")
    write_text(run / "README.md", text)
    write_text(run / "report.html", page(card, context))
    if (run / "final").is_dir():
        write_text(run / "final" / CARD, json.dumps(without_texts(card), indent=1) + "\n")
        write_text(run / "final" / "README.md", text)
    return [full, run / "README.md", run / "report.html"]


def without_texts(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card without prompts and answers; the counts stay."""
    scores = [{**score, "regressions": {**score["regressions"], "examples": []}} for score in card["scores"]]
    return {**card, "scores": scores, "furthest": []}
