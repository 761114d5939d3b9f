"""Where prompts come from when nobody has written a list of them: logs of past chats, and columns of data sets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opcd_fast.data.messages import SYSTEM_ROLES, Message, Prompt, checked_messages
from opcd_fast.data.prompts import read_prompts
from opcd_fast.data.tables import read_rows
from opcd_fast.errors import InputError

GENERAL = Path(__file__).parents[1] / "prompt_data" / "general.jsonl"  # a hundred prompts about anything
TURNS = ("first", "last", "every")
SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "function": "tool"}


@dataclass(frozen=True)
class Candidate:
    """A prompt that may be used, with where it came from."""

    prompt: Prompt
    source: str  # for people: which file and row, or how it was asked for
    conversation: str  # prompts of one conversation never come apart in a split

    @property
    def text(self) -> str:
        """All that is said in the prompt; what is compared and measured."""
        return "\n".join(str(message.get("content") or "") for message in self.prompt.messages or ())


def from_logs(path: str | Path, turns: str = "last", keep_system: bool = False) -> tuple[list[Candidate], int]:
    """Prompts out of past chats, and how many rows had none.

    Args:
        path: a .txt file (a user's message a line), or a table (see `tables.read_rows`) whose rows have `messages`,
            `conversations` (from/value pairs), or `prompt` (a string or messages).
        turns: "first": what opens the chat; "last": the chat up to the user's last message; "every": one prompt for
            each message of the user, with the chat before it.
        keep_system: keep a system message at the head. It is left out otherwise: in the logs of the assistant whose
            context is distilled it is that context, and the student must not see it.
    """
    if turns not in TURNS:
        raise InputError(f"turns={turns!r} is not available; use {', '.join(map(repr, TURNS))}")
    found, empty = [], 0
    for where, row in read_rows(path, "logs"):
        chat = _chat(row, where)
        while chat and chat[0]["role"] in SYSTEM_ROLES and not keep_system:
            chat = chat[1:]
        asked = [n for n, message in enumerate(chat) if message["role"] == "user" and message["content"].strip()]
        empty += not asked
        for place in {"first": asked[:1], "last": asked[-1:], "every": asked}[turns]:
            prompt = Prompt(tuple(chat[: place + 1]))
            found.append(Candidate(prompt, f"{where}, message {place + 1}", where))
    return found, empty


def from_data(path: str | Path, column: str | None = None) -> list[Candidate]:
    """The rows of a data set as prompts (forms: `prompts.read_prompts`); answers at their end are left out."""
    return _numbered("data", Path(path), read_prompts(path, "data", prompt_column=column, drop_last_answer=True))


def general_prompts(path: str | Path | None = None) -> list[Candidate]:
    """Prompts about anything, each with an empty `privileged_context`; None: the hundred that come along."""
    path = GENERAL if path is None else path
    prompts = read_prompts(path, "general", drop_last_answer=True)
    return _numbered("general", Path(path), [replace(prompt, privileged_context="") for prompt in prompts])


def _numbered(kind: str, file: Path, prompts: Sequence[Prompt]) -> list[Candidate]:
    return [Candidate(p, f"{kind} {file.name}, row {n}", f"{kind} {n}") for n, p in enumerate(prompts, 1)]


def _chat(row: Any, where: str) -> list[Message]:
    if isinstance(row, Mapping):
        name = next((n for n in ("messages", "conversations", "conversation", "prompt") if n in row), None)
        if name is None:
            raise InputError(f"{where} has none of the columns messages, conversations and prompt")
        row = row[name]
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if isinstance(row, list) and row and all(isinstance(turn, Mapping) and "from" in turn for turn in row):
        row = [{"role": SPEAKERS.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in row]
    return [_with_arguments_as_objects(message) for message in checked_messages(row, where)]


def _with_arguments_as_objects(message: Message) -> Message:
    """Logs of the OpenAI protocol hold a call's arguments as JSON text; chat templates expect the object."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):  # a model may write what is no JSON: that stays
                function["arguments"] = json.loads(function["arguments"] or "{}")
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls}
