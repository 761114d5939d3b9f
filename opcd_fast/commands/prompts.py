"""`opcd prompts`: questions to train on, for people who have a context and no questions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from opcd_fast.commands.arguments import ComputeOptions, arm_of, check_at_least, context_in, parse, quiet_libraries
from opcd_fast.data import Candidate, Selection
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, Within

say = partial(print, flush=True)


@dataclass(frozen=True, kw_only=True)
class PromptsCommand(Selection, ComputeOptions):
    """Make files of training and held-out prompts for a context.

    Sources, which may be combined: a model is asked what users would ask (--ask N), logs of past chats (--logs), a
    data set (--data). Prompts that repeat others are dropped. Writes train.jsonl, held_out.jsonl and summary.json, each
    prompt with its source: read them before you train on them.
    """

    output_dir: str = "prompts"
    """Folder for the files; written at the end, all or none."""
    context: str | None = None
    """The context: a text file, or chat turns as .json or .jsonl. Questions that its turns hold are left out."""
    model: str | None = None
    """Who is asked, and whose tokens are counted: folder, hub id, or "smollm2"."""
    ask: int | None = None
    """How many different prompts to ask the model for; needs --context and --model."""
    logs: str | None = None
    """Past chats: .txt (a user's message a line), or a table with messages, conversations or prompt."""
    turns: str = "last"
    """Of a logged chat: "first" (the opening message), "last" (up to the user's last), "every" (one for each)."""
    keep_system: bool = False
    """Keep logged system messages; they are left out otherwise: the student must not see the context."""
    data: str | None = None
    """JSONL, JSON, CSV, parquet, or the folder of a Hugging Face data set."""
    column: str | None = None
    """Column of --data that holds the prompts; default: prompt, or messages."""
    general: str | None = None
    """Prompts to mix into the training ones as a guard against forgetting: a file, or "builtin" (a hundred). Their
    teacher sees no context, so that the student stays what it was there."""
    temperature: float = 0.8
    """Sampling temperature of the asked model."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template, as a JSON object: '{"enable_thinking": false}'."""
    overwrite: bool = False
    """Replace earlier prompts in the output folder."""


def run(arguments: list[str]) -> int:
    command = parse(PromptsCommand, "prompts", arguments)
    _check(command)
    from opcd_fast.data import (
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
    from opcd_fast.models import load_tokenizer

    folder = Path(command.output_dir)
    variables = OPCDConfig(chat_template_kwargs=command.chat_template_kwargs).template_variables()
    # Small files first: a wrong name must not cost the loading of a model.
    context = context_in(command.context)
    check_folder(folder, command.overwrite)
    candidates: list[Candidate] = []
    if command.logs is not None:
        candidates, empty = from_logs(command.logs, command.turns, command.keep_system)
        say(f"logs: {len(candidates)} prompts" + (f"; {empty} chats without a user's message" if empty else ""))
    if command.data is not None:
        rows = from_data(command.data, command.column)
        say(f"data: {len(rows)} prompts")
        candidates += rows
    general = general_prompts(None if command.general == "builtin" else command.general) if command.general else []
    count_tokens = None
    if command.model is not None:
        quiet_libraries()
        tokenizer = load_tokenizer(command.model, command.trust_remote_code)

        def count_tokens(candidate: Candidate) -> int:
            (prompt,) = adapt_to_tokenizer(tokenizer, [candidate.prompt])
            return len(student_ids(tokenizer, prompt, variables))

        if command.ask is not None:
            candidates += _asked(command, command.model, command.ask, tokenizer, context, variables)
    chat = [] if context is None or isinstance(context, str) else context
    shown = [message["content"] for message in chat if message["role"] == "user"]
    chosen = select(candidates, general, command, shown=shown, count_tokens=count_tokens)
    report = summary(chosen, count_tokens)
    write(folder, chosen, report)
    _tell(report, folder)
    return 0


def _asked(
    command: PromptsCommand, name: str, count: int, tokenizer: Any, context: Any, variables: dict[str, Any]
) -> list[Candidate]:
    from opcd_fast.contexts import ask
    from opcd_fast.models import load_model

    model = load_model(name, **command.place())
    found = ask(
        replace(arm_of(model, tokenizer), variables=variables), context, count, similarity=command.similarity,
        temperature=command.temperature, seed=command.seed,
        report=lambda found, requests: say(f"asked {requests} times: {found} of {count} different prompts"),
    )  # fmt: skip
    if len(found) < count:
        say(f"the model repeats itself: {len(found)} different prompts; a larger one, or --temperature, gives more")
    return found


def _tell(report: dict[str, Any], folder: Path) -> None:
    kind = "tokens" if "median_tokens" in report else "words"
    say(f"{report['train']} training and {report['held_out']} held-out prompts in {str(folder)!r}")
    if report["general_wanted"]:
        short = report["general_wanted"] - report["general"]
        more = f"; {short} more were wanted, give a larger file" if short > 0 else ""
        say(f"{report['general']} general prompts mixed in{more}")
    if report["dropped"]:
        say("dropped: " + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()))
    say(f"median length: {report[f'median_{kind}']:g} {kind}")
    say(f"from: {json.dumps(report['sources'], ensure_ascii=False)}")


def _check(command: PromptsCommand) -> None:
    if command.ask is None and command.logs is None and command.data is None:
        raise InputError("no source: give --ask N (with --context and --model), --logs FILE or --data FILE")
    check_at_least(1, command, "ask")
    if command.ask is not None:
        missing = [f"--{name}" for name in ("context", "model") if getattr(command, name) is None]
        if missing:
            raise InputError(f"--ask needs {' and '.join(missing)}")
    Within(0, 10, open_low=True)("temperature", command.temperature)
    # What would be accepted and ignored.
    for name, unset, needs in (
        ("turns", "last", "logs"),
        ("keep_system", False, "logs"),
        ("column", None, "data"),
        ("general_share", 0.2, "general"),
        ("max_tokens", None, "model"),
        ("chat_template_kwargs", None, "model"),
        ("temperature", 0.8, "ask"),
    ):
        if getattr(command, name) != unset and getattr(command, needs) is None:
            raise InputError(f"{name} is set, but it needs --{needs}")
