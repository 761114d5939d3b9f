"""Prompts and contexts to token ids, by the tokenizer's own chat template.

The teacher's prompts are rendered whole, context included, and the shared prefix of one context is the longest common
token prefix of those rendered prompts: templates merge tokens and may put a prompt's own words before the context, so
nothing else is assumed about where the context ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.data.messages import SYSTEM_ROLES, Context, Message, Prompt
from opcd_fast.errors import InputError

PROBE = "opcd probe of the system role"
# What the code that renders sets itself; a row must not undo it.
RESERVED = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
    "tools", "truncation",
)  # fmt: skip


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids of one prompt as the student sees it and as the teacher sees it (without the shared prefix)."""

    student_ids: tuple[int, ...]
    teacher_ids: tuple[int, ...]  # what follows the shared prefix of its context; never empty
    context_index: int
    has_context: bool = True
    """False: the teacher sees what the student sees, and holds it to the base model."""


def whole_prompt(row: RenderedPrompt, prefixes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The whole prompt as the teacher sees it. prefixes: of all contexts."""
    return (*prefixes[row.context_index], *row.teacher_ids)


def common_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows share at their beginning, always leaving every row at least one token of its own.

    The smallest and the largest row in dictionary order share what all rows share.
    """
    ordered = [tuple(row) for row in rows]
    low, high = min(ordered), max(ordered)
    limit = min(map(len, ordered)) - 1
    return next((place for place in range(limit) if low[place] != high[place]), max(limit, 0))


def render(
    tokenizer: Any,
    groups: Sequence[Sequence[Prompt]],
    context: Context | None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[tuple[RenderedPrompt, ...]], tuple[tuple[int, ...], ...]]:
    """Token ids of several lists of prompts (say training and held-out) over one set of shared prefixes.

    Args:
        tokenizer: a transformers tokenizer; its chat template renders the prompts.
        groups: lists of prompts; the prefixes are shared over all of them.
        context: what the teacher sees in front; rows with a `privileged_context` use their own instead.
        template_kwargs: variables of the chat template for every prompt; a prompt's own win.
    Returns:
        the prompts of each group, and the prefixes (token ids, one per distinct context).
    Raises:
        InputError: a prompt without any context, or a context that leaves every rendered prompt unchanged.
    """
    contexts: dict[str, int] = {}  # distinct ones, as JSON, in order of appearance

    def whole(prompt: Prompt) -> RenderedPrompt:
        own = prompt.context_or(context)
        if own is None:
            raise InputError("context is missing: give context= or a `privileged_context` in every prompt row")
        student = student_ids(tokenizer, prompt, template_kwargs)
        teacher = teacher_ids(tokenizer, prompt, own, template_kwargs)
        index = contexts.setdefault(json.dumps(own), len(contexts))
        return RenderedPrompt(tuple(student), tuple(teacher), index, own != "")

    rendered = [[whole(prompt) for prompt in group] for group in groups]
    everything = [row for rows in rendered for row in rows]
    if not any(row.has_context for row in everything):
        raise InputError("context is missing: every prompt has an empty `privileged_context`")
    if all(row.student_ids == row.teacher_ids for row in everything):
        raise InputError(
            "context changes nothing: with and without it the rendered prompts are the same tokens; "
            "check the context and the tokenizer's chat template"
        )
    prefixes = []
    for index in range(len(contexts)):
        own_rows = [row.teacher_ids for row in everything if row.context_index == index]
        prefixes.append(own_rows[0][: common_prefix_length(own_rows)])

    def suffix(row: RenderedPrompt) -> RenderedPrompt:
        return replace(row, teacher_ids=row.teacher_ids[len(prefixes[row.context_index]) :])

    return [tuple(map(suffix, rows)) for rows in rendered], tuple(prefixes)


def student_ids(tokenizer: Any, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of the prompt without any context, up to where the answer begins."""
    if prompt.messages is None:
        return _encode(tokenizer, prompt.text or "", template_kwargs)
    messages = list(prompt.messages)
    template = _Template(tokenizer, prompt, template_kwargs)
    if messages[0]["role"] in SYSTEM_ROLES and not template.shows_system():
        raise InputError(
            "prompt begins with a system message, but the tokenizer's chat template has no system role; "
            "put its text into the first user message"
        )
    return template.ids(messages)


def teacher_ids(
    tokenizer: Any, prompt: Prompt, context: Context, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of the prompt with the context in front, up to where the answer begins; "" is no context.

    Text becomes (the beginning of) the system message. Turns go between the prompt's system message and the rest;
    when both the turns and the prompt start with a system message, their texts are joined, the context's first.
    In a template without a system role the text goes in front of the first user message, with a blank line between
    (https://ai.google.dev/gemma/docs/core/prompt-structure, "System instructions").
    Without a chat template, text is put in front with a blank line between, and turns are refused.
    """
    if context == "":
        return student_ids(tokenizer, prompt, template_kwargs)
    if prompt.messages is None:
        if not isinstance(context, str):
            raise InputError("context holds chat messages, but this tokenizer has no chat template; give plain text")
        return _encode(tokenizer, f"{context}\n\n{prompt.text}", template_kwargs)
    template = _Template(tokenizer, prompt, template_kwargs)
    messages = with_context(list(prompt.messages), context)
    if messages[0]["role"] in SYSTEM_ROLES and not template.shows_system():
        messages = without_system_role(messages)
    return template.ids(messages)


def default_system_tokens(tokenizer: Any) -> int:
    """How many tokens of a system prompt of its own the chat template puts into a chat without one; 0 for most."""
    user: list[Message] = [{"role": "user", "content": "?"}]
    try:
        plain, empty = (
            len(student_ids(tokenizer, Prompt(messages=tuple(chat))))
            for chat in (user, [{"role": "system", "content": ""}, *user])
        )
    except InputError:  # no such template, or no system role
        return 0
    return max(0, plain - empty)


def with_context(messages: list[Message], context: Context) -> list[Message]:
    """The chat that the teacher sees."""
    turns = [{"role": "system", "content": context}] if isinstance(context, str) else list(context)
    rest = list(messages)
    if rest and rest[0]["role"] in SYSTEM_ROLES:
        own = rest.pop(0)
        if turns and turns[0]["role"] in SYSTEM_ROLES:
            turns[0] = {**own, "content": f"{turns[0]['content']}\n\n{own['content']}"}
        else:
            turns.insert(0, own)
    return turns + rest


def without_system_role(messages: list[Message]) -> list[Message]:
    """The same chat with the text of its system message in front of the first user message. Raises InputError."""
    system, *rest = messages
    first = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise InputError("context is text, but the chat template has no system role and the prompt no user message")
    rest[first] = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return rest


def adapt_to_tokenizer(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Plain prompts for a tokenizer without chat template. Raises InputError when a prompt needs the template."""
    if getattr(tokenizer, "chat_template", None):
        return list(prompts)
    plain = []
    for prompt in prompts:
        messages = prompt.messages or ()
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise InputError("prompt holds chat messages, but this tokenizer has no chat template; give plain strings")
        for name in ("tools", "chat_template_kwargs"):
            if getattr(prompt, name):
                raise InputError(f"prompt has {name}, but this tokenizer has no chat template; remove them")
        plain.append(replace(prompt, messages=None, text=messages[0]["content"]))
    return plain


class _Template:
    """The chat template as one prompt uses it: its tools and variables. Raises InputError for what it would ignore."""

    def __init__(self, tokenizer: Any, prompt: Prompt, template_kwargs: Mapping[str, Any] | None) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {**(template_kwargs or {}), **(prompt.chat_template_kwargs or {})}
        for name in self._options:
            if name in RESERVED:
                raise InputError(f"chat_template_kwargs must not set {name!r}; it belongs to the code that renders")
        if prompt.tools:  # an empty list is no tools: some templates would announce that there are none
            self._options["tools"] = list(prompt.tools)
        if not self._options:
            return
        try:
            source = tokenizer.get_chat_template(tools=self._options.get("tools"))
        except ValueError as error:
            raise InputError(f"the tokenizer has no usable chat template: {error}") from error
        for name in self._options:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                what = "tools" if name == "tools" else f"chat_template_kwargs: {name!r}"
                raise InputError(f"{what}: the tokenizer's chat template has no such variable and would ignore it")

    def shows_system(self) -> bool:
        """False for a template that refuses a system message, and for one that leaves it out without a word."""
        probe = [{"role": "system", "content": PROBE}, {"role": "user", "content": "?"}]
        try:
            return PROBE in self._apply(probe, tokenize=False)
        except Exception:  # a template's own complaint, of any type
            return False

    def ids(self, messages: list[Message]) -> list[int]:
        try:
            return [int(token) for token in self._apply(messages, tokenize=True)]
        except Exception as error:  # templates raise their own (jinja) errors, say for an unknown role order
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            roles = [message["role"] for message in messages]
            raise InputError(f"the tokenizer's chat template refuses messages with roles {roles}: {reason}") from error

    def _apply(self, messages: list[Message], tokenize: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False, **self._options
        )


def _encode(tokenizer: Any, text: str, template_kwargs: Mapping[str, Any] | None) -> list[int]:
    if template_kwargs:
        raise InputError("chat_template_kwargs is set, but this tokenizer has no chat template; drop it")
    return [int(token) for token in tokenizer(text).input_ids]
