"""Math with answers that can be checked: files in DAPO-Math-17K's form, or plain question and answer columns.

A row of DAPO-Math-17K holds `prompt` (chat messages) and `reward_model` = {"ground_truth": answer}
(huggingface.co/datasets/BytedTsinghua-SIA/DAPO-Math-17k). Whether two answers are the same is decided by math-verify.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from opcd_fast.data import Message, checked_messages, read_rows, require
from opcd_fast.data.tasks.episode import Questions, as_user
from opcd_fast.errors import InputError

ASK = "Solve the problem. Write the last line as `Answer: ` followed by the answer alone.\n\n"
_ANSWER_LINE = re.compile(
    r"(?im)^[\s>*_#-]*(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[*_]*\s*[:=][*_\s]*(.+?)[\s*_]*$"
)
# What sympy may work at for ever: sums, large factorials and exponents, powers in exponents, large powers of powers.
_ENDLESS = re.compile(
    r"\\(?:sum|prod|int|lim)|\d{5}!|[})!]!|binom.*(?:\d{5}|[\^!])|\^.*[})|]\^\{?\d{3}"
    r"|\^(?:\\\w+[{(]|[\d.]{5}|\w+[\^!]|\{(?:[^\d}]*\d){5}|\{[^}]*(?:[{\^!]|binom|Gamma))"
)


def math_file(path: str) -> Questions:
    """Task of the problems in a file. Raises InputError for a row without a question or an answer."""
    require("math_verify", "math", "tasks")  # now, not after an hour of sampling
    problems = [_problem(row, where) for where, row in read_rows(path, "math")]
    return Questions("math", [(messages, partial(same_answer, truth=truth)) for messages, truth in problems])


def _problem(row: Any, where: str) -> tuple[list[Message], str]:
    if not isinstance(row, Mapping):
        raise InputError(f"{where} must be a row with a question and an answer, got {type(row).__name__}")
    judge = row.get("reward_model")
    try:
        judge = json.loads(judge) if isinstance(judge, str) else judge
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: reward_model must be a mapping or its JSON: {error}") from error
    truth = judge.get("ground_truth") if isinstance(judge, Mapping) else row.get("answer", row.get("solution"))
    prompt = row.get("prompt", row.get("question", row.get("problem")))
    if truth is None or not str(truth).strip() or prompt is None:
        raise InputError(
            f"{where} has no question or no answer; give `prompt` and `reward_model.ground_truth` as DAPO-Math-17K has "
            "them, or `question` and `answer`"
        )
    if isinstance(prompt, str):
        return as_user(ASK + prompt), str(truth)
    return checked_messages(prompt, f"{where}: prompt"), str(truth)


def same_answer(text: str, truth: str) -> bool:
    """Whether the answer that `text` ends in equals `truth`.

    That is its last \\boxed{...} or `Answer:` line, whichever is later. A text with neither gives no answer: numbers
    picked out of prose would reward guessing.
    """
    from math_verify import parse, verify

    given = stated_answer(text)
    if given is None:
        return False
    sides = _plain(truth), _plain(given)
    if sides[0] == sides[1] or any(map(_is_endless, sides)):
        return sides[0] == sides[1]
    # Timeouts of math-verify use signals, which only the main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    left, right = (parse(f"${side}$", parsing_timeout=limit) for side in sides)
    return bool(left and right and verify(left, right, timeout_seconds=limit))


def _is_endless(answer: str) -> bool:
    """A timeout does not end a power of whole numbers."""
    text = re.sub(r"\\left|\\right|\s|(?<=\^)[-+]", "", answer.replace("**", "^"))
    text, before = text.translate(str.maketrans("()[]", "{}{}")), ""
    while text != before:  # braces remain around exponents, and around what holds powers
        text, before = re.sub(r"(?<!\^)\{([^{}^!]*)\}", r"(\1)", text), text
    return _ENDLESS.search(text) is not None


def stated_answer(text: str) -> str | None:
    """What a text says its answer is, or None."""
    boxed = _last_boxed(text)
    lines = list(_ANSWER_LINE.finditer(text))
    if lines and (boxed is None or lines[-1].start() > boxed[0]):
        line = lines[-1].group(1)
        inside = _last_boxed(line)
        return inside[1] if inside is not None else line
    return None if boxed is None else boxed[1]


def _last_boxed(text: str) -> tuple[int, str] | None:
    """Where the last \\boxed{...} begins, and what is in it. Braces may nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return start, text[start + len("\\boxed{") : place]
    return None


def _plain(answer: str) -> str:
    answer = answer.strip().strip("$").strip()
    for start, end in (("\\(", "\\)"), ("\\[", "\\]"), ("`", "`")):
        if answer.startswith(start) and answer.endswith(end) and len(answer) > len(start):
            answer = answer[len(start) : -len(end)].strip()
    answer = answer.rstrip(".").strip()
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)  # thousands
