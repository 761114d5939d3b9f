"""run.json, prompts.jsonl and held_out.jsonl: what a run was started with, for `opcd report`, `check` and `diff`.

run.json         the context itself, hashes of context, prompts, template, tokenizer and base, versions
prompts.jsonl    the training prompts; --replay of a later run draws from them
held_out.jsonl   the held-out prompts, which the report measures on
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opcd_fast.data import Context, Prompt, checked_messages, read_prompts
from opcd_fast.errors import InputError
from opcd_fast.runtime import is_name, misfit, read_object, write_text
from opcd_fast.training.run.provenance import FileHashes, hash_of, of_code, of_model, of_tokenizer

RECORD, PROMPTS, HELD_OUT = "run.json", "prompts.jsonl", "held_out.jsonl"
ROW = "row"  # the column of held_out.jsonl that holds a prompt's data row
SCHEMA = 1

TEXT_OR_NONE, NAME_OR_NONE = (str, None), (is_name, None)
FILES_SHAPE = {str: {"size?": int, "sha256": str}}
MODEL_SHAPE = {"name": NAME_OR_NONE, "commit": TEXT_OR_NONE, "files": FILES_SHAPE}
HASHES_SHAPE = {  # what run.json and a card say of where a run came from, see `misfit`
    "context_sha256": TEXT_OR_NONE, "prompts_sha256": TEXT_OR_NONE, "held_out_sha256": TEXT_OR_NONE,
    "base": {**MODEL_SHAPE, "fingerprint": TEXT_OR_NONE}, "teacher": (None, MODEL_SHAPE), "started": TEXT_OR_NONE,
    "tokenizer": {"name": NAME_OR_NONE, "files": FILES_SHAPE, "template_sha256": TEXT_OR_NONE},
    "code": {"version": str, "commit": TEXT_OR_NONE, "changed": (bool, None)},
}  # fmt: skip


@dataclass
class Origins:
    """Where the parts of a run came from. A trainer fills it; what starts from another run corrects it."""

    context: Context | None
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    base: str | None  # name of the model before training, without any adapter
    teacher: str | None  # name of another model as the teacher
    tokenizer: str | None
    template: Any
    weights: Sequence[str] = ()  # fingerprints of the model's and the teacher's first weights
    more: dict[str, Any] = field(default_factory=dict)  # further keys of run.json


def write_record(folder: Path, origins: Origins) -> None:
    """Write the three files. Raises InputError when that is not possible."""
    hashes = FileHashes()
    record = {
        "schema": SCHEMA,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "context": origins.context,
        "context_sha256": None if origins.context is None else hash_of(origins.context),
        "prompts_sha256": hash_of([row_of(prompt) for prompt in origins.prompts]),
        "held_out_sha256": hash_of([row_of(prompt) for prompt in origins.held_out]),
        "base": {**of_model(origins.base, hashes), "fingerprint": next(iter(origins.weights), None)},
        "teacher": None if origins.teacher is None else of_model(origins.teacher, hashes),
        "tokenizer": of_tokenizer(origins.tokenizer, origins.template, hashes),
        "code": of_code(),
        "versions": versions(),
        **origins.more,
    }
    write_text(folder / PROMPTS, "".join(json.dumps(row_of(prompt)) + "\n" for prompt in origins.prompts))
    scored = ({**row_of(prompt), ROW: _plain(prompt.row)} for prompt in origins.held_out)
    write_text(folder / HELD_OUT, "".join(json.dumps(row) + "\n" for row in scored))
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")  # last: where it is, the others are


def read_record(folder: Path) -> dict[str, Any] | None:
    """run.json of a run, or None where there is none. Raises InputError for a folder that is no run, or a bad file."""
    path = folder / RECORD
    if not path.is_file():
        inside = [found.parent for found in folder.glob(f"*/{RECORD}")] if folder.is_dir() else []
        if inside and not (folder / "config.json").is_file():
            raise InputError(f"{str(folder)!r} is not a run; did you mean {str(inside[0])!r}?")
        return None
    record = read_object(path)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{str(path)!r} has schema {record.get('schema')!r:.60}, this version reads {SCHEMA}")
    if why := misfit(record, {**HASHES_SHAPE, "context": (str, None, list), "started": str}):
        raise InputError(f"{str(path)!r} is damaged: {why}")
    if isinstance(record["context"], list):
        checked_messages(record["context"], f"{str(path)!r}: context")
    return record


def question_hash(prompt: Prompt) -> str:
    """Of what a prompt asks, whatever its context."""
    return hash_of(row_of(prompt).get("messages") or prompt.text)


def row_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row that `read_prompts` reads back."""
    row: dict[str, Any] = {"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
    for name in ("privileged_context", "tools", "chat_template_kwargs"):
        value = getattr(prompt, name)
        if value is not None:
            row[name] = dict(value) if isinstance(value, Mapping) else list(value) if name == "tools" else value
    return row


def held_out_count(folder: Path) -> int | None:
    """How many prompts a run holds out; None where there is no run."""
    file = folder / HELD_OUT
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else None


def kept_held_out(folder: Path) -> list[Prompt]:
    """A run's held-out prompts with the data rows that they came from, which its scorers look at."""
    if not (folder / HELD_OUT).stat().st_size:
        return []
    found = read_prompts(folder / HELD_OUT, "held-out prompts")
    rows = [prompt.row.get(ROW, prompt.row) for prompt in found]
    if not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{str(folder / HELD_OUT)!r}: a {ROW!r} is no object")
    return [replace(prompt, row=row) for prompt, row in zip(found, rows)]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that JSON can hold."""
    kept = {}
    for name, value in row.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            continue
        kept[str(name)] = value
    return kept


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
