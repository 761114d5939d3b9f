"""Contexts and prompts: from files or Python values to messages, which `opcd_fast.data.rendering` makes ids of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.data.messages import Context, Message, Prompt, check_text, checked_messages
from opcd_fast.data.tables import read_rows, read_text
from opcd_fast.errors import InputError

COLUMNS = ("prompt", "messages", "tools", "privileged_context", "chat_template_kwargs")
"""What a row may hold besides columns that are nobody's business here, such as `source`."""


def read_context(context: str | Path | Sequence[Message]) -> Context:
    """Text, chat messages, or a file of either (.json: a list of messages; .jsonl: one a line; else text).

    A string is taken as a file name when such a file exists or when it looks like one.
    Raises InputError: missing or empty file, not valid messages, empty context.
    """
    if isinstance(context, Path) or (isinstance(context, str) and _looks_like_file(context)):
        return _context_from_file(Path(context))
    if isinstance(context, str):
        if not context.strip():
            raise InputError("context is empty; give the text, chat turns or file that the teacher shall see")
        check_text(context, "context")
        return context
    if not isinstance(context, (list, tuple)):
        raise InputError(f"context is a {type(context).__name__}; give text, a file, or a list of messages")
    return checked_messages(context, "context")


def read_prompts(
    prompts: str | Path | Iterable[Any],
    name: str = "prompts",
    *,
    prompt_column: str | None = None,
    drop_last_answer: bool = False,
) -> list[Prompt]:
    """Prompts from a file, a folder, a data set, a data frame or a list (forms and endings: `tables.read_rows`).

    A row has `prompt` (a string or messages) or `messages`, and may have `privileged_context` (a string or messages:
    a context of its own; "": none at all), `tools` (JSON schemas) and `chat_template_kwargs`. A list holds such rows,
    or strings, or lists of messages.

    Args:
        name: what the prompts are, for errors.
        prompt_column: the column to take in place of `prompt` and `messages`.
        drop_last_answer: leave an assistant's answer at the end of a row out; without it, such a row is refused.
    Raises:
        InputError: missing file, bad row (with its line or row number), no prompt at all.
    """
    if prompt_column is not None and prompt_column in COLUMNS[2:]:
        raise InputError(f"prompt_column={prompt_column!r} has another meaning; name a column that holds the prompts")
    rows = read_rows(prompts, name, [*COLUMNS, *([prompt_column] if prompt_column else [])])
    if not rows:
        where = prompts if isinstance(prompts, (str, Path)) else f"a {type(prompts).__name__}"
        raise InputError(f"{name} is empty ({where}); give at least one")
    return [_prompt_from_row(row, where, prompt_column, drop_last_answer) for where, row in rows]


def _prompt_from_row(row: Any, where: str, prompt_column: str | None, drop_last_answer: bool) -> Prompt:
    if isinstance(row, Prompt):
        return row
    more: dict[str, Any] = {}
    if isinstance(row, Mapping):
        more["row"] = row
        raw = row.get("privileged_context")
        if raw is not None:
            more["privileged_context"] = _own_context(raw, f"{where} privileged_context")
        tools, variables = row.get("tools"), row.get("chat_template_kwargs")
        if tools is not None:
            if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
                raise InputError(f"{where}: tools must be a list of JSON schemas, got {tools!r:.80}")
            more["tools"] = tuple(map(dict, tools))
        if variables is not None:
            if not isinstance(variables, Mapping) or not all(isinstance(key, str) for key in variables):
                raise InputError(
                    f"{where}: chat_template_kwargs must be like {{'enable_thinking': false}}, got {variables!r:.80}"
                )
            more["chat_template_kwargs"] = dict(variables)
        row = _prompt_of(row, where, prompt_column)
    if isinstance(row, str):
        if not row.strip():
            raise InputError(f"{where} is an empty prompt; remove the row or fill it")
        check_text(row, where)
        return Prompt(({"role": "user", "content": row},), row, **more)
    messages = checked_messages(row, where)
    if messages[-1]["role"] == "assistant":
        if not drop_last_answer:
            raise InputError(
                f"{where} ends with an assistant message; the last message must be the one to answer "
                "(drop_last_answer leaves such an answer out)"
            )
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise InputError(f"{where} holds nothing but assistant messages; remove the row")
    return Prompt(tuple(messages), None, **more)


def _prompt_of(row: Mapping[str, Any], where: str, prompt_column: str | None) -> Any:
    names = [prompt_column] if prompt_column is not None else [c for c in ("prompt", "messages") if c in row]
    if len(names) == 2:
        raise InputError(f"{where} has both 'prompt' and 'messages'; remove one, or choose with prompt_column")
    if not names or names[0] not in row:
        found = ", ".join(map(repr, row)) or "nothing"
        column = prompt_column or "prompt"
        remedy = "; prompt_column names another one" if prompt_column is None and row else ""
        raise InputError(f"{where} has no column {column!r}, or nothing in it (found: {found}){remedy}")
    return row[names[0]]


def _own_context(raw: Any, where: str) -> Context:
    if not isinstance(raw, str):
        return checked_messages(raw, where)
    if raw and not raw.strip():
        raise InputError(f"{where}: an empty privileged_context; fill it, remove it, or make it '' for no context")
    check_text(raw, where)
    return raw


def _looks_like_file(text: str) -> bool:
    if "\n" in text or len(text) > 255:  # longer than a file system's names
        return False
    named_like_one = Path(text).suffix in (".txt", ".md", ".json", ".jsonl") and " " not in text
    return named_like_one or os.path.isfile(text)


def _context_from_file(path: Path) -> Context:
    text, where = read_text(path, "context"), f"context file {str(path)!r}"
    if not text.strip():
        raise InputError(f"{where} is empty")
    if path.suffix not in (".json", ".jsonl"):
        return text.replace("\r\n", "\n").rstrip("\n")  # the end of a file's last line is no part of what it says
    rows = [row for _, row in read_rows(path, "context")]
    if len(rows) == 1 and isinstance(rows[0], dict) and "messages" in rows[0]:
        rows = rows[0]["messages"]
    return checked_messages(rows, where)
