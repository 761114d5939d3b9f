"""Multiple choice (MedMCQA's form) and yes/no labels, read from local files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from opcd_fast.data import read_rows
from opcd_fast.data.tasks.episode import Questions, as_user
from opcd_fast.errors import InputError

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
ASK_LETTER = "Answer with the letter of the right option in the form `Answer: X`."
ASK_YES = "Answer with yes or no."

YES = frozenset({"yes", "true", "1", "safe", "y"})
NO = frozenset({"no", "false", "0", "unsafe", "n"})
# "answer", "answer is" or either with a colon, and what may stand before the answer itself: emphasis, quotes, \boxed{
_NAMED = r"(?im)answer[\s*_]*(?:is\b[\s*_]*)?(:)?(?:[\s*_(\[`\"'$]|\\(?:[(\[]|\w+\{))*"
_END = r"(?![^\W_])"  # of a word or letter


def choice_file(path: str, first: int | None = None) -> Questions:
    """Rows of MedMCQA (`question`, `opa` ... `opd`, `cop`), from the authors' JSON or a hub's parquet.

    first: the number that `cop` has for the first option. None: found out; the authors' files count from 1, those of
    huggingface.co/datasets/openlifescienceai/medmcqa from 0. Raises InputError when that cannot be told, and for bad
    rows. Rows without a label (a test split's -1) are an error too: nothing could be scored.
    """
    rows = read_rows(path, "choice")
    labels = [_label(row, where) for where, row in rows]
    if first is None:
        if (0 in labels) == (4 in labels):
            raise InputError(
                f"choice file {path!r}: `cop` runs from {min(labels, default=None)} to {max(labels, default=None)}; "
                "whether it counts from 0 or 1 is open: give first=0 or first=1"
            )
        first = int(4 in labels)
    questions = []
    for (where, row), label in zip(rows, labels, strict=True):
        if not 0 <= label - first < len(LETTERS):
            raise InputError(f"{where}: cop={label} names no option when counting from {first}")
        options = [str(row[name]) for name in OPTIONS]
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
        prompt = f"{row['question']}\n\n{listed}\n\n{ASK_LETTER}"
        right = LETTERS[label - first]
        questions.append((as_user(prompt), lambda text, right=right: chosen_letter(text) == right))
    return Questions("choice", questions)


def _label(row: Any, where: str) -> int:
    missing = [name for name in ("question", *OPTIONS, "cop") if not isinstance(row, Mapping) or name not in row]
    if missing:
        raise InputError(f"{where} has no {missing[0]}; MedMCQA's rows have question, opa, opb, opc, opd and cop")
    try:
        return int(row["cop"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: cop={row['cop']!r} must be a number") from error


def chosen_letter(text: str) -> str | None:
    """The option that an answer names, or None: the last `Answer: X`, else a text that begins with one letter alone."""
    # Of the letters "a" alone is a word too, where another follows.
    named = re.findall(rf"{_NAMED}([b-d]|(?-i:A)|a(?! +\S)){_END}(?!'|-\w)", text)
    if named:
        return named[-1][1].upper()
    # "A man ..." begins with a word, not with an option.
    alone = re.match(r"(?!\s*A\s+[a-z])[\s*_(\[]*([A-D])(?:[\s*_)\].:]|$)", text)
    return alone.group(1) if alone else None


def yes_no_file(path: str) -> Questions:
    """Rows of `prompt` and a `label` that is yes or no (also true/false, 1/0, safe/unsafe)."""
    questions = []
    for where, row in read_rows(path, "yes-no"):
        text, right = _labelled(row, where)
        questions.append((as_user(f"{text}\n\n{ASK_YES}"), lambda answer, right=right: said_yes(answer) is right))
    return Questions("yes-no", questions)


def _labelled(row: Any, where: str) -> tuple[str, bool]:
    for name in ("prompt", "label"):
        if not isinstance(row, Mapping) or name not in row:
            raise InputError(f"{where} has no column {name!r}; its rows have prompt and label")
    label = str(row["label"]).strip().lower()
    if label not in YES | NO:
        raise InputError(f"{where}: label={row['label']!r} must be yes or no (true/false, 1/0, safe/unsafe)")
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt), label in YES


def said_yes(text: str) -> bool | None:
    """True for yes, False for no, None for neither: the last `Answer: ...`, else the first word of the text."""
    # Without a colon it ends there: an answer that "is no longer valid" is none.
    ends = r"(?(1)|(?=[*_\"'`$})\]]* *(?:[.,;:!?]|$)))"
    named = re.findall(rf"{_NAMED}(yes|no|safe|unsafe|true|false){_END}{ends}", text)
    word = named[-1][1].lower() if named else (re.findall(r"[a-zA-Z]+", text.lower()) or [""])[0]
    return True if word in YES else False if word in NO else None
