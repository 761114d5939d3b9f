"""`opcd prompts`: questions to train on, for people who have a context and no questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opcd_fast.commands.arguments import as_file, check_seed, parse, quiet_libraries
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

GENERAL_SHARE = 0.2


@dataclass(frozen=True)
class PromptsCommand:
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
    general_share: float | None = None
    """Share of general prompts among the training prompts; default 0.2."""
    held_out: float = 0.1
    """Share of the prompts that is kept for evaluation; 0: none."""
    similarity: float = 0.7
    """From this similarity on the later of two prompts is dropped; 1: only equal ones (case and punctuation aside)."""
    min_characters: int = 3
    """Shorter prompts are dropped."""
    max_characters: int = 8000
    """Longer prompts are dropped."""
    max_tokens: int | None = None
    """Longer prompts are dropped; needs --model."""
    max_prompts: int | None = None
    """Use so many at most, drawn at random; default: all."""
    temperature: float = 0.8
    """Sampling temperature of the asked model."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template, as a JSON object: '{"enable_thinking": false}'."""
    overwrite: bool = False
    """Replace earlier prompts in the output folder."""
    seed: int = 0
    """Fixes questions, split and mixture."""
    dtype: str = "auto"
    """"auto" | "float32" | "bfloat16"."""
    device: str = "auto"
    """"auto" | "cpu" | "cuda" | "cuda:N"."""


def run(arguments: list[str]) -> int:
    command = parse(PromptsCommand, "prompts", arguments)
    _check(command)
    from opcd_fast.contexts import make_prompts
    from opcd_fast.data import Selection, read_context

    names = ("held_out", "similarity", "min_characters", "max_characters", "max_tokens", "max_prompts", "seed")
    share = GENERAL_SHARE if command.general_share is None else command.general_share
    selection = Selection(general_share=share, **{name: getattr(command, name) for name in names})
    file = as_file(command.context)
    if command.model is not None:
        quiet_libraries()
    passed = ("model", "logs", "turns", "keep_system", "data", "column", "general", "temperature", "dtype", "device")
    make_prompts(
        Path(command.output_dir),
        selection,
        context=None if file is None else read_context(file),
        ask_for=command.ask,
        variables=OPCDConfig(chat_template_kwargs=command.chat_template_kwargs).template_variables(),
        overwrite=command.overwrite,
        told=partial(print, flush=True),
        **{name: getattr(command, name) for name in passed},
    )
    return 0


def _check(command: PromptsCommand) -> None:
    check_seed(command.seed)
    if command.ask is None and command.logs is None and command.data is None:
        raise InputError("no source: give --ask N (with --context and --model), --logs FILE or --data FILE")
    if command.ask is not None:
        if command.ask < 1:
            raise InputError(f"ask={command.ask} must be at least 1")
        missing = [f"--{name}" for name in ("context", "model") if getattr(command, name) is None]
        if missing:
            raise InputError(f"--ask needs {' and '.join(missing)}")
    if not 0 < command.temperature <= 10:  # refuses NaN too
        raise InputError(f"temperature={command.temperature} must be a number above 0 up to 10")
    # What would be accepted and ignored.
    for name, unset, needs in (
        ("turns", "last", "logs"),
        ("keep_system", False, "logs"),
        ("column", None, "data"),
        ("general_share", None, "general"),
        ("max_tokens", None, "model"),
        ("chat_template_kwargs", None, "model"),
        ("temperature", 0.8, "ask"),
    ):
        if getattr(command, name) != unset and getattr(command, needs) is None:
            raise InputError(f"{name} is set, but it needs --{needs}")
