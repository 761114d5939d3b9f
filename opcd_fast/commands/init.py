"""`opcd init`: a config with every setting explained, and an example small enough to train at once."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.commands.arguments import parse
from opcd_fast.commands.train import TrainCommand
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, settings_of

# The example's settings: enough to see the KL fall on a laptop, too little to be a result.
EXAMPLE: dict[str, Any] = {
    "output_dir": "runs/first", "steps": 10, "batch_size": 8, "max_new_tokens": 16, "lora_rank": 16,
}  # fmt: skip
EXAMPLE_FILES = {
    "context.json": "turns.json",
    "prompts.jsonl": "train_prompts.jsonl",
    "held_out.jsonl": "eval_prompts.jsonl",
}
CONFIG = "opcd.yaml"


@dataclass(frozen=True)
class InitCommand:
    """Write opcd.yaml, in which every setting is explained, and an example context with prompts.

    Then `opcd train --config opcd.yaml` trains at once. Nothing that exists is replaced.
    """

    folder: str = "."
    """Where the files go."""
    model: str = "smollm2"
    """Folder, hub id, or "smollm2" (the packaged SmolLM2-135M-Instruct)."""


def run(arguments: list[str]) -> int:
    command = parse(InitCommand, "init", arguments)
    if not command.model.strip():
        raise InputError("model is empty; give a folder, a hub id or 'smollm2'")
    import opcd_fast
    from opcd_fast.runtime import write_text

    folder = Path(command.folder)
    examples = Path(opcd_fast.__file__).parent / "demo_data"
    texts = {name: (examples / source).read_text(encoding="utf-8") for name, source in EXAMPLE_FILES.items()}
    given = {
        "model": command.model,
        "prompts": (folder / "prompts.jsonl").as_posix(),
        "context": (folder / "context.json").as_posix(),
        "eval_prompts": (folder / "held_out.jsonl").as_posix(),
        **EXAMPLE,
    }
    texts[CONFIG] = config_text(given)
    for name in texts:
        if (folder / name).exists():
            raise InputError(f"{str(folder / name)!r} exists already; choose another --folder, or move it away")
    written = []
    try:
        for name, text in texts.items():
            write_text(folder / name, text)
            written.append(folder / name)
    except InputError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    print(f"wrote {', '.join(texts)} in {str(folder)!r}; next: opcd train --config {folder / CONFIG}")
    return 0


def config_text(values: dict[str, Any]) -> str:
    """A YAML file of every setting of `opcd train` with what it means: those in `values` set, the others commented
    out with their defaults."""
    lines = [
        "# Settings of `opcd train --config opcd.yaml`. Every one has the same name on the command line, which wins,",
        "# and in Python (OPCDConfig). Those commented out stand at their defaults. Paths start where opcd is started.",
    ]
    group = None
    for field, known in (*settings_of(TrainCommand), *settings_of(OPCDConfig)):
        if known.group != group:
            group = known.group
            lines += ["", f"# ---- {group} ----"]
        lines += ["", *textwrap.wrap(known.help, 116, initial_indent="# ", subsequent_indent="# ")]
        default = None if field.default is dataclasses.MISSING else field.default
        value = values.get(field.name, default)
        lines.append(f"{'' if field.name in values else '# '}{field.name}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
