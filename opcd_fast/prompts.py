"""Contexts and prompts: from files or Python values to token ids, rendered by the tokenizer's chat template.

A context is text, a list of chat messages (few-shot turns), or a file of either. The teacher's prompts are
rendered whole, context included, and the shared prefix of one context is the longest common token prefix of
those rendered prompts: templates merge tokens and may put a prompt's own words before the context, so nothing
else is assumed about where the context ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from opcd_fast.errors import InputError
from opcd_fast.token_prefix import common_prefix_length

Message = dict[str, Any]
Context: TypeAlias = str | list[Message]  # text, or chat turns
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its chat messages (or plain text for a tokenizer without template) and its own context."""

    messages: tuple[Message, ...] | None
    text: str | None = None
    privileged_context: Context | None = None
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The data row it came from, all columns; empty for a bare string or list of messages."""


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids of one prompt as the student sees it and as the teacher sees it (without the shared prefix)."""

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]  # what follows the shared prefix of its context; never empty
    context_index: int


@dataclass(frozen=True)
class RenderedPrompts:
    """All prompts of a run. `prefixes[i]` are the token ids shared by every teacher prompt of context i."""

    rows: tuple[RenderedPrompt, ...]
    prefixes: tuple[tuple[int, ...], ...]


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
        return context
    if not isinstance(context, (list, tuple)):
        raise InputError(f"context is a {type(context).__name__}; give text, a file, or a list of messages")
    return _checked_messages(list(context), "context")


def read_prompts(prompts: str | Path | Iterable[Any], name: str = "prompts") -> list[Prompt]:
    """Prompts from a JSONL file or a list.

    A JSONL row is `{"prompt": string or messages}`, with `privileged_context` (string or messages) when the row
    has a context of its own. A list holds such rows, or strings, or lists of messages.
    Raises InputError: missing file, bad row (with its line number), no prompt at all.
    """
    if isinstance(prompts, (str, Path)):
        rows = _jsonl_rows(Path(prompts), name)
    elif not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, bytes)):
        raise InputError(f"{name} is a {type(prompts).__name__}; give a JSONL file or a list of prompts")
    else:
        rows = [(f"{name}[{index}]", row) for index, row in enumerate(prompts)]
    if not rows:
        where = prompts if isinstance(prompts, (str, Path)) else "a list"
        raise InputError(f"{name} is empty ({where}); give at least one")
    return [_prompt_from_row(row, where) for where, row in rows]


def render(
    tokenizer: Any, groups: Sequence[Sequence[Prompt]], context: Context | None
) -> tuple[list[RenderedPrompts], tuple[tuple[int, ...], ...]]:
    """Token ids of several lists of prompts (say training and held-out) over one set of shared prefixes.

    Args:
        tokenizer: a transformers tokenizer; its chat template renders the prompts.
        groups: lists of prompts; the prefixes are shared over all of them.
        context: what the teacher sees in front; rows with a `privileged_context` use their own instead.
    Returns:
        one RenderedPrompts per group, and the prefixes (token ids, one per distinct context).
    Raises:
        InputError: a prompt without any context, or a context that leaves every rendered prompt unchanged.
    """
    index_of: dict[str, int] = {}  # distinct contexts, as JSON, in order of appearance
    rendered: list[list[tuple[list[int], list[int], int]]] = []
    for group in groups:
        rows = []
        for prompt in group:
            own = prompt.privileged_context if prompt.privileged_context is not None else context
            if own is None:
                raise InputError("context is missing: give context= or a `privileged_context` in every prompt row")
            index = index_of.setdefault(json.dumps(own), len(index_of))
            rows.append((student_ids(tokenizer, prompt), teacher_ids(tokenizer, prompt, own), index))
        rendered.append(rows)
    everything = [row for rows in rendered for row in rows]
    if all(student == teacher for student, teacher, _ in everything):
        raise InputError(
            "context changes nothing: with and without it the rendered prompts are the same tokens; "
            "check the context and the tokenizer's chat template"
        )
    rows_of: list[list[list[int]]] = [[] for _ in index_of]
    for _, teacher, index in everything:
        rows_of[index].append(teacher)
    prefixes = tuple(tuple(own_rows[0][: common_prefix_length(own_rows)]) for own_rows in rows_of)
    result = [
        RenderedPrompts(
            tuple(
                RenderedPrompt(tuple(student), tuple(teacher[len(prefixes[index]) :]), index)
                for student, teacher, index in rows
            ),
            prefixes,
        )
        for rows in rendered
    ]
    return result, prefixes


def student_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of the prompt without any context, up to where the answer begins."""
    if prompt.messages is None:
        return _encode(tokenizer, prompt.text or "")
    return _apply_template(tokenizer, list(prompt.messages))


def teacher_ids(tokenizer: Any, prompt: Prompt, context: Context) -> list[int]:
    """Token ids of the prompt with the context in front, up to where the answer begins.

    Text becomes (the beginning of) the system message. Turns go between the prompt's system message and the rest;
    when both the turns and the prompt start with a system message, their texts are joined, the context's first.
    Without a chat template, text is put in front with a blank line between, and turns are refused.
    """
    if prompt.messages is None:
        if not isinstance(context, str):
            raise InputError("context holds chat messages, but this tokenizer has no chat template; give plain text")
        return _encode(tokenizer, f"{context}\n\n{prompt.text}")
    turns = [{"role": "system", "content": context}] if isinstance(context, str) else list(context)
    rest = list(prompt.messages)
    if rest and rest[0]["role"] == "system":
        own = rest.pop(0)
        if turns and turns[0]["role"] == "system":
            turns[0] = {**turns[0], "content": f"{turns[0]['content']}\n\n{own['content']}"}
        else:
            turns.insert(0, own)
    return _apply_template(tokenizer, turns + rest)


def adapt_to_tokenizer(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Plain prompts for a tokenizer without chat template. Raises InputError when a prompt needs the template."""
    if getattr(tokenizer, "chat_template", None):
        return list(prompts)
    plain = []
    for prompt in prompts:
        messages = prompt.messages or ()
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise InputError("prompt holds chat messages, but this tokenizer has no chat template; give plain strings")
        plain.append(replace(prompt, messages=None, text=messages[0]["content"]))
    return plain


def _looks_like_file(text: str) -> bool:
    if "\n" in text or len(text) > 255:  # longer than a file system's names
        return False
    named_like_one = Path(text).suffix in (".txt", ".md", ".json", ".jsonl") and " " not in text
    return named_like_one or Path(text).is_file()


def _context_from_file(path: Path) -> Context:
    if not path.is_file():
        raise InputError(f"context file {str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"context file {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InputError(f"context file {str(path)!r} is empty")
    if path.suffix == ".jsonl":
        return _checked_messages([row for _, row in _jsonl_rows(path, "context")], f"context file {str(path)!r}")
    if path.suffix == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"context file {str(path)!r} is not valid JSON: {error}") from error
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list):
            raise InputError(
                f"context file {str(path)!r} must hold a list of messages or {{'messages': [...]}}, "
                f"not a {type(value).__name__}; plain text belongs in a .txt file"
            )
        return _checked_messages(messages, f"context file {str(path)!r}")
    return text


def _jsonl_rows(path: Path, name: str) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise InputError(f"{name} file {str(path)!r} does not exist")
    rows = []
    try:
        # Not splitlines(): JSON text may hold U+2028 and others that Python takes for line ends.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} file {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name} file {str(path)!r} line {number}"
        try:
            rows.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not valid JSON: {error}") from error
    return rows


def _prompt_from_row(row: Any, where: str) -> Prompt:
    own: Context | None = None
    whole: Mapping[str, Any] = {}
    if isinstance(row, Prompt):
        return row
    if isinstance(row, dict):
        whole = row
        if "prompt" not in row:
            raise InputError(f"{where} has no column 'prompt' (found: {', '.join(map(repr, row)) or 'nothing'})")
        raw = row.get("privileged_context")
        if raw is not None:
            if isinstance(raw, str) and not raw.strip():
                raise InputError(f"{where} has an empty privileged_context; fill it or remove the column")
            own = raw if isinstance(raw, str) else _checked_messages(raw, f"{where} privileged_context")
        row = row["prompt"]
    if isinstance(row, str):
        if not row.strip():
            raise InputError(f"{where} is an empty prompt; remove the row or fill it")
        return Prompt(({"role": "user", "content": row},), row, own, whole)
    messages = _checked_messages(row, where)
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where} ends with an assistant message; the last message must be the one to answer")
    return Prompt(tuple(messages), None, own, whole)


def _checked_messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} must be a string or a non-empty list of messages, got {type(value).__name__}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise InputError(f"{where}: message {index} must be {{'role': ..., 'content': text}}, got {message!r:.80}")
        if message["role"] not in ROLES:
            raise InputError(f"{where}: message {index} has role {message['role']!r}; use one of {', '.join(ROLES)}")
    return value


def _apply_template(tokenizer: Any, messages: list[Message]) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # templates raise their own (jinja) errors, say for an unknown role order
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        roles = [message["role"] for message in messages]
        raise InputError(f"the tokenizer's chat template refuses messages with roles {roles}: {reason}") from error
    return [int(token) for token in ids]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text).input_ids]
