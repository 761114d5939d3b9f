"""`opcd compress`: a shorter text that does what the full context does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opcd_fast.commands.arguments import (
    ComputeOptions,
    arm_of,
    check_at_least,
    context_in,
    parse,
    quiet_libraries,
    tell,
)
from opcd_fast.training.settings import Within

PART_SHOWN = 60  # characters


@dataclass(frozen=True)
class CompressCommand(ComputeOptions):
    """Look for a shorter context: candidates are written by the model or cut out of the context, and ranked by their
    exact KL to the full context on held-out prompts.

    Writes ranked.json, curve.png and, where one is good enough, shorter.txt or shorter.json.
    """

    model: str
    """Folder (full model or adapter), hub id, or "smollm2"."""
    context: str
    """The full context: a text file, or chat turns as .json or .jsonl."""
    prompts: str
    """Held-out prompts to rank on; a file as for `opcd train`."""
    output_dir: str = "runs/compress"
    """Folder for the results; earlier ones in it are replaced."""
    candidates: tuple[str, ...] = ()
    """Files with contexts of your own to rank beside the others."""
    written: int = 1
    """Texts that the model writes for each of 4 lengths and 3 styles; 0: none."""
    cuts: bool = True
    """Also try the context with whole turns, paragraphs or lines left out."""
    max_prompts: int = 64
    """Prompts used, from the beginning of the file."""
    answers_per_prompt: int = 1
    """Answers drawn for each prompt."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    max_context_tokens: int = 1024
    """Longest text that the model writes as a candidate, in tokens."""
    temperature: float = 1.0
    """Sampling temperature of the answers; it also divides the logits that are compared."""
    max_kl: float = 0.05
    """The shortest candidate with at most this KL, in nats per token, is saved."""
    rollout_batch: int = 64
    """Sequences generated at once."""
    seed: int = 0
    """Fixes candidates and answers."""


def run(arguments: list[str]) -> int:
    command = parse(CompressCommand, "compress", arguments)
    check_at_least(0, command, "written")
    check_at_least(1, command, "max_new_tokens", "max_context_tokens", "rollout_batch", "answers_per_prompt")
    check_at_least(2, command, "max_prompts")
    Within(0, 100, open_low=True)("temperature", command.temperature)
    Within(0, 1e9)("max_kl", command.max_kl)
    from opcd_fast.contexts import Candidate, Player, cut_candidates, rank, written_candidates
    from opcd_fast.data import adapt_to_tokenizer, read_prompts
    from opcd_fast.models import load_model, load_tokenizer

    quiet_libraries()
    full = context_in(command.context)
    own = [Candidate(context_in(name), f"file {name}") for name in command.candidates]
    prompts = read_prompts(command.prompts)[: command.max_prompts]
    tokenizer = load_tokenizer(command.model, command.trust_remote_code)
    prompts = adapt_to_tokenizer(tokenizer, prompts)
    model = load_model(command.model, **command.place())
    arm = arm_of(model, tokenizer, command.rollout_batch)
    candidates = own + (cut_candidates(full) if command.cuts else [])
    if command.written:
        tell("the model writes shorter texts ...")
        player = Player(arm, {"max_new_tokens": command.max_context_tokens, "temperature": 0.7})
        candidates += written_candidates(full, player.answers, command.written, command.seed)
    print(f"{len(candidates)} candidates on {len(prompts)} prompts", flush=True)
    ranked = rank(
        model, arm, full, candidates, prompts, max_new_tokens=command.max_new_tokens,
        temperature=command.temperature, answers_per_prompt=command.answers_per_prompt, seed=command.seed,
        told=lambda line: tell(f"{line} ..."),
    )  # fmt: skip
    _save(Path(command.output_dir), ranked, command)
    return 0


def _save(folder: Path, ranked: list[Any], command: CompressCommand) -> None:
    from rich.console import Console
    from rich.table import Table

    from opcd_fast.contexts import FULL, parts_that_matter, plot_ranked
    from opcd_fast.runtime import write_text

    rows = [{**vars(one), "candidate": vars(one.candidate)} for one in ranked]
    record = {"command": asdict(command), "ranked": rows}
    write_text(folder / "ranked.json", json.dumps(record, indent=1) + "\n")
    plot_ranked(folder / "curve.png", ranked)
    most = next(one.tokens for one in ranked if one.candidate.source == FULL)
    table = Table(title="tokens saved against KL lost (candidates that no other one beats)")
    for column in ("candidate", "tokens", "saved", "KL, nats per token", "95 % interval", "same first token"):
        table.add_column(column)
    for one in ranked:
        if one.front:
            interval = f"{one.low:.4f} to {one.high:.4f}"
            table.add_row(
                one.candidate.source.replace("[", "\\["), f"{one.tokens:.0f}", f"{1 - one.tokens / most:.0%}",
                f"{one.kl:.4f}", interval, f"{one.top1_agreement:.1%}",
            )  # fmt: skip
    Console().print(table)
    if worth := parts_that_matter(ranked):
        table = Table(title="what each part of the context is worth: the KL without it")
        for column in ("part", "tokens", "KL, nats per token", "95 % interval"):
            table.add_column(column)
        for one in worth:
            begins = " ".join((one.candidate.left_out or "").split())[:PART_SHOWN].replace("[", "\\[")
            table.add_row(begins, f"{most - one.tokens:.0f}", f"{one.kl:.4f}", f"{one.low:.4f} to {one.high:.4f}")
        Console().print(table)
    for old in ("shorter.txt", "shorter.json"):
        (folder / old).unlink(missing_ok=True)
    good = [one for one in ranked if one.kl <= command.max_kl and 0 < one.tokens < most]
    if not good:
        print(f"no shorter candidate has a KL of at most {command.max_kl}; raise max_kl, or `opcd train` with it")
        return
    context = good[0].candidate.context
    is_text = isinstance(context, str)
    path = folder / ("shorter.txt" if is_text else "shorter.json")
    write_text(path, context if is_text else json.dumps(context, indent=1) + "\n")
    print(f"saved: {path} ({good[0].candidate.source})")
