"""`opcd chat`: talk to a trained model in the terminal."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from opcd_fast.commands.arguments import (
    SamplingOptions,
    arm_of,
    check_sampling,
    context_in,
    parse,
    quiet_libraries,
    trained_weights,
    window_of,
)
from opcd_fast.errors import InputError
from opcd_fast.runtime import printable


@dataclass(frozen=True)
class ChatCommand(SamplingOptions):
    """Ask questions one line at a time. An empty line begins a new conversation; Ctrl-D ends the program.

    With --context the base model, which sees it, answers beside the student, in a conversation of its own.
    """

    model: str
    """A run's folder, a folder with a model or an adapter, a hub id, or "smollm2"."""
    context: str | None = None
    """What the base sees: a text file, or chat turns as .json or .jsonl."""


def run(arguments: list[str]) -> int:
    command = parse(ChatCommand, "chat", arguments)
    check_sampling(command, "max_new_tokens")
    context = context_in(command.context)
    from opcd_fast.data import read_prompts
    from opcd_fast.models import load_model, load_tokenizer, seam

    quiet_libraries()
    name = trained_weights(command.model)
    tokenizer = load_tokenizer(name, command.trust_remote_code)
    model = load_model(name, **command.place())
    # Two speakers switch the adapter at every turn: a merged copy would be made anew each time.
    arm = arm_of(model, tokenizer, 1, merge_adapter=None if context is None else False)
    speakers: dict[str, tuple[Any, Any]] = {"student": (arm, nullcontext)}
    if context is not None:
        if not hasattr(model, "peft_config"):
            raise InputError("context: this model has no adapter to switch off; start another chat with its base")
        with seam.without_adapters(model):  # a trained prefix among them
            base = replace(arm, context=context, window=window_of(model))
        speakers["base + context"] = (base, lambda: seam.without_adapters(model))
    spoken: dict[str, list[dict[str, str]]] = {speaker: [] for speaker in speakers}
    asked = 0
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not line.strip():
            spoken = {speaker: [] for speaker in speakers}
        else:
            for speaker, (arm, weights) in speakers.items():
                said = spoken[speaker]
                said.append({"role": "user", "content": line.strip()})
                with weights():
                    prompts = read_prompts([list(said)])
                    (answer,) = arm.answers(prompts, **command.sampling(), seed=command.seed + asked)
                text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                said.append({"role": "assistant", "content": text})
                print(f"{speaker}: {printable(text).strip()}", flush=True)
            asked += 1
        print("> ", end="", flush=True)
    print()
    return 0
