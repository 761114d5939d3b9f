"""`opcd generate`: answers of a trained model, or of any other."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from opcd_fast.commands.arguments import (
    SamplingOptions,
    check_sampling,
    context_in,
    parse,
    quiet_libraries,
    sampler,
    trained_weights,
    window_of,
)
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(SamplingOptions):
    """Print a model's answer to a prompt, or to each prompt of a file.

    Of a file: one line of JSON per prompt, with "prompt" (the row's text or messages), "answer", and "finished" (false:
    cut at max_new_tokens).
    """

    model: str
    """A run's folder, a folder with a model or an adapter, a hub id, or "smollm2"."""
    prompt: str | None = None
    """The user's message."""
    prompts: str | None = None
    """A file of prompts instead, as for `opcd train`; "-": standard input, one a line. Contexts of its rows
    (privileged_context) are shown only together with --context, in its place: without it, the model answers as a
    trained student does."""
    batch_size: int = 16
    """Prompts of a file answered at once."""
    context: str | None = None
    """A text file, or chat turns as .json or .jsonl, put in front."""
    temperature: float = 0.0
    """0 takes the most probable token each time; above 0 samples."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer besides the tokenizer's and the model's end tokens."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template, as a JSON object: '{"enable_thinking": false}'."""


def run(arguments: list[str]) -> int:
    command = parse(GenerateCommand, "generate", arguments)
    if (command.prompt is None) == (command.prompts is None):
        raise InputError("give either a prompt (--prompt TEXT) or a file of them (--prompts FILE)")
    if command.prompt is not None and not command.prompt.strip():
        raise InputError("prompt is empty; give the user's message")
    check_sampling(command, "max_new_tokens", "batch_size")
    variables = OPCDConfig(chat_template_kwargs=command.chat_template_kwargs).template_variables()
    from opcd_fast.data import adapt_to_tokenizer, read_prompts, teacher_ids
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.training.step import check_prompt_length

    quiet_libraries()
    context = context_in(command.context)
    name = trained_weights(command.model)
    if command.prompt is not None:
        read = read_prompts([command.prompt], "prompt")
    elif command.prompts == "-":
        read = read_prompts([line.rstrip("\r\n") for line in sys.stdin if line.strip()], "standard input")
    else:
        read = read_prompts(command.prompts)
    tokenizer = load_tokenizer(name, command.trust_remote_code)
    ids = []
    for prompt in adapt_to_tokenizer(tokenizer, read):
        shown = None if context is None else prompt.context_or(context)
        ids.append(teacher_ids(tokenizer, prompt, shown or "", variables))
    model = load_model(name, **command.place())
    check_prompt_length(max(map(len, ids)), command.max_new_tokens, window_of(model))
    rollout = sampler(model, tokenizer, command.batch_size, command.stop_tokens)
    for start in range(0, len(ids), command.batch_size):
        part = slice(start, start + command.batch_size)
        answers = rollout.generate(ids[part], **command.sampling(), seed=command.seed + start)
        for prompt, answer in zip(read[part], answers):
            text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            if command.prompt is None:
                asked = list(prompt.messages or ()) if prompt.text is None else prompt.text
                line = {"prompt": asked, "answer": text, "finished": answer.finished}
                text = json.dumps(line, ensure_ascii=False)
            print(text, flush=True)
    return 0
