"""Files of training and held-out prompts for a context: from a model that is asked, logs of chats, and data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opcd_fast.contexts.asking import ANSWER_TOKENS, ask, request
from opcd_fast.data import (
    Candidate,
    Context,
    Prompt,
    Selection,
    adapt_to_tokenizer,
    check_folder,
    from_data,
    from_logs,
    general_prompts,
    select,
    student_ids,
    summary,
    write,
)
from opcd_fast.models import load_model, load_tokenizer, seam
from opcd_fast.rollout import TransformersRollout, stop_token_ids
from opcd_fast.training.step import check_prompt_length

BUILT_IN = "builtin"


def make_prompts(
    folder: Path,
    selection: Selection,
    *,
    context: Context | None = None,
    model: str | None = None,
    ask_for: int | None = None,
    logs: str | None = None,
    turns: str = "last",
    keep_system: bool = False,
    data: str | None = None,
    column: str | None = None,
    general: str | None = None,
    temperature: float = 0.8,
    variables: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    told: Callable[[str], None] = print,
) -> None:
    """Writes train.jsonl, held_out.jsonl and summary.json into `folder`, all or none.

    context: questions that its turns hold are left out. model: its name; it counts tokens, and is asked for `ask_for`
    prompts at `temperature`. logs, turns, keep_system: see `from_logs`; data, column: see `from_data`; general: a file
    for `general_prompts`, or "builtin". variables: of the chat template. told: gets lines on what was found.

    Raises InputError: files that cannot be read, a context too long for the model, or nothing left to write.
    """
    check_folder(folder, overwrite)
    # Small files first: a wrong name must not cost the loading of a model.
    candidates: list[Candidate] = []
    if logs is not None:
        found, empty = from_logs(logs, turns, keep_system)
        told(f"logs: {len(found)} prompts" + (f"; {empty} chats without a user's message" if empty else ""))
        candidates += found
    if data is not None:
        rows = from_data(data, column)
        told(f"data: {len(rows)} prompts")
        candidates += rows
    mixed_in = general_prompts(None if general == BUILT_IN else general) if general else []
    count_tokens = None
    if model is not None:
        tokenizer = load_tokenizer(model)

        def count_tokens(candidate: Candidate) -> int:
            (prompt,) = adapt_to_tokenizer(tokenizer, [candidate.prompt])
            return len(student_ids(tokenizer, prompt, variables))

        if ask_for is not None:
            lm = load_model(model, dtype=dtype, device=device)
            candidates += _asked(
                lm, tokenizer, context or "", ask_for, told, similarity=selection.similarity, temperature=temperature,
                seed=selection.seed, template_kwargs=variables,
            )  # fmt: skip
    chat = [] if context is None or isinstance(context, str) else context
    shown = [message["content"] for message in chat if message["role"] == "user"]
    chosen = select(candidates, mixed_in, selection, shown=shown, count_tokens=count_tokens)
    report = summary(chosen, count_tokens)
    write(folder, chosen, report)
    for line in _in_words(report, folder):
        told(line)


def _asked(
    model: Any, tokenizer: Any, context: Context, count: int, told: Callable[[str], None], **options: Any
) -> list[Candidate]:
    prompt = Prompt(tuple(request(context, "")))
    length = len(student_ids(tokenizer, prompt, options["template_kwargs"])) + 32  # who the users are
    check_prompt_length(length, ANSWER_TOKENS, seam.longest_input(seam.body_of(model)))

    def report(found: int, requests: int) -> None:
        told(f"asked {requests} times: {found} of {count} different prompts")

    stop_ids = stop_token_ids(tokenizer, model)
    rollout = TransformersRollout(model, stop_token_ids=stop_ids, merge_adapter=False)
    found = ask(rollout, tokenizer, context, count, report=report, **options)
    if len(found) < count:
        told(f"the model repeats itself: {len(found)} different prompts; a larger one, or --temperature, gives more")
    return found


def _in_words(report: dict[str, Any], folder: Path) -> list[str]:
    kind = "tokens" if "median_tokens" in report else "words"
    lines = [f"{report['train']} training and {report['held_out']} held-out prompts in {str(folder)!r}"]
    if report["general_wanted"]:
        short = report["general_wanted"] - report["general"]
        more = f"; {short} more were wanted, give a larger file" if short > 0 else ""
        lines.append(f"{report['general']} general prompts mixed in{more}")
    if report["dropped"]:
        lines.append("dropped: " + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()))
    lines.append(f"median length: {report[f'median_{kind}']:g} {kind}")
    return [*lines, f"from: {json.dumps(report['sources'], ensure_ascii=False)}"]
