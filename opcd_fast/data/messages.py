"""What a prompt and a context are, and the checks that every message passes wherever it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from opcd_fast.errors import InputError

Message = dict[str, Any]
Context: TypeAlias = str | list[Message]  # text, or chat turns
ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_ROLES = ("system", "developer")  # two names for the same place at the head of a chat


@dataclass(frozen=True)
class Prompt:
    """One prompt: its chat messages (or plain text for a tokenizer without template) and what belongs to it alone."""

    messages: tuple[Message, ...] | None
    text: str | None = None
    privileged_context: Context | None = None
    """The context of this prompt; None: that of the run; "": explicitly none, so that the teacher sees what the student
    sees and holds it to the base model."""
    tools: tuple[Any, ...] | None = None
    """JSON schemas, for templates that show tools to the model."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template, such as enable_thinking; they win over those of the run."""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The data row that it came from, all columns (of a `datasets.Dataset`: those that prompts are made of); empty for
    a bare string or list of messages."""

    @property
    def chat(self) -> tuple[Message, ...]:
        """The messages; of plain text the user's that says it."""
        return self.messages or ({"role": "user", "content": self.text or ""},)

    def context_or(self, of_run: Context | None) -> Context | None:
        """What the teacher sees in front of this prompt."""
        return of_run if self.privileged_context is None else self.privileged_context


def checked_messages(value: Any, where: str) -> list[Message]:
    """`value`, if it is a list of chat messages. Raises InputError, which begins with `where`.

    A message has a role and text; an assistant's may have `tool_calls` in place of the text. Keys whose value is None
    are dropped: tables fill them in where another row has one.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"{where} must be a string or a non-empty list of messages, got {type(value).__name__}")
    messages = []
    for index, message in enumerate(value):
        calls = (isinstance(message, Mapping) and message.get("tool_calls")) or ()
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or "role" not in message or not (isinstance(content, str) or calls):
            remedy = "; join its parts into one text" if isinstance(content, list) else ""
            raise InputError(
                f"{where}: message {index} must be {{'role': ..., 'content': text}}, got {message!r:.80}{remedy}"
            )
        if message["role"] not in ROLES:
            raise InputError(f"{where}: message {index} has role {message['role']!r}; use one of {', '.join(ROLES)}")
        if content is not None and not isinstance(content, str):
            raise InputError(f"{where}: message {index} has tool_calls and a content that is no text: {content!r:.80}")
        for call in calls if isinstance(calls, (list, tuple)) else [None]:
            if not isinstance(call, Mapping) or not isinstance(call.get("function") or {}, Mapping):
                wanted = "a list like [{'function': {'name': ..., 'arguments': ...}}]"
                raise InputError(f"{where}: tool_calls of message {index} must be {wanted}, got {calls!r:.80}")
        check_text(content or "", f"{where}: message {index}")
        messages.append({key: item for key, item in message.items() if item is not None or key == "content"})
    return messages


def transcript(context: Context | Sequence[Message]) -> str:
    """A context or a chat as text; a single message is its text alone."""
    if isinstance(context, str):
        return context
    if len(context) == 1:
        return context[0].get("content") or ""
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in context)


def check_text(text: str, where: str) -> None:
    """Half of a surrogate pair is legal in JSON but is no text that a tokenizer can encode. Raises InputError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a character ({text[error.start]!r}); mend the text") from error
