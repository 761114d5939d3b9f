"""What people read of a card: report.html, one file that needs nothing else, and the model card README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opcd_fast.data import Context, transcript
from opcd_fast.evaluation import CARD
from opcd_fast.evaluation.report import words
from opcd_fast.evaluation.report.models import SHOWN, STUDENT
from opcd_fast.models import SMOLLM2, SMOLLM2_ON_THE_HUB
from opcd_fast.runtime import printable, write_text


def write_report(run: Path, card: Mapping[str, Any], context: Context | None) -> list[Path]:
    """Card, README and page into the run's folder, card and README into its final/. Returns those of the folder.

    What goes into final/, the folder that gets published, holds none of the context, and no prompts or answers.
    """
    texts = {CARD: json.dumps(card, indent=1) + "\n", "README.md": readme(card), "report.html": page(card, context)}
    for name, text in texts.items():
        write_text(run / name, text)
    if (run / "final").is_dir():
        write_text(run / "final" / CARD, json.dumps(without_texts(card), indent=1) + "\n")
        write_text(run / "final" / "README.md", texts["README.md"])
    return [run / name for name in texts]


def without_texts(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card without prompts and answers; the counts stay."""
    scores = [{**score, "regressions": {**score["regressions"], "examples": []}} for score in card["scores"]]
    return {**card, "scores": scores, "side_by_side": [], "furthest": []}


def page(card: Mapping[str, Any], context: Context | None) -> str:
    """The whole page. context: shown folded up; None: the prompts brought theirs."""
    from markupsafe import Markup

    from opcd_fast.evaluation.report import charts

    drawn = {
        "before_after": Markup(charts.before_after(card["kl"])),
        "training": Markup(charts.training(card["training"])),
        "scores": [Markup(charts.score(score["arms"])) for score in card["scores"]],
    }
    text = None if context is None else transcript(context)
    return _rendered("page.html.jinja", card, charts=drawn, context=text, SHOWN=SHOWN, STUDENT=STUDENT)


def readme(card: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hub reads (https://huggingface.co/docs/hub/model-cards).

    Holds numbers and hashes, no context and no answers: it may be published with the weights.
    """
    base = SMOLLM2_ON_THE_HUB if card["base_model"] == SMOLLM2 else card["base_model"]
    hub_base = base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None
    return _rendered("readme.md.jinja", card, plain, hub_base=hub_base)


def _rendered(name: str, card: Mapping[str, Any], finalize: Callable[[Any], str] | None = None, **values: Any) -> str:
    """Every value that a template shows is escaped, for HTML or by `finalize`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=finalize is None, finalize=finalize,
        undefined=StrictUndefined, extensions=["jinja2.ext.do"],
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    for shown in (words.percent, words.nats, words.rate, words.kl, words.tokens, words.seconds):
        environment.filters[shown.__name__] = shown
    environment.filters["json"] = json.dumps
    sentences: tuple[Callable[..., Any], ...] = (
        words.rounding, words.uncounted, words.missing_arms, words.hashes, words.distances_of, words.beyond,
        words.verdict, words.title,
    )  # fmt: skip
    return environment.get_template(name).render(card=card, **{one.__name__: one for one in sentences}, **values)


def plain(value: Any) -> Any:
    """Text that neither ends a table's cell nor becomes markup or a terminal's command; what a template calls safe
    stays."""
    if hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\|`*<>\[\]#])", r"\\\1", printable(" ".join(str(value).split())))
