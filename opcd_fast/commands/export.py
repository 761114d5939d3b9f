"""`opcd export`: a finished run as files that other programs load, here or on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from opcd_fast.commands.arguments import parse, quiet_libraries
from opcd_fast.errors import InputError
from opcd_fast.export import ExportOptions


@dataclass(frozen=True)
class ExportCommand(ExportOptions):
    """Write the weights of a finished run as a new folder that transformers, PEFT, vLLM and llama.cpp load.

    What was written is loaded again and its logits are compared with those of the trained model; on a mismatch nothing
    is left. Whoever has the weights can draw the context out of them.
    """

    run: Positional[str]
    """Output folder of `opcd train`, or a folder with an adapter or a model."""
    output_dir: str | None = None
    """Folder to write, which must not exist; can be left out with push_to_hub."""
    push_to_hub: str | None = None
    """Upload to this repository of the Hugging Face Hub, as one commit."""
    private: bool = False
    """Make the repository private."""
    without_card: bool = False
    """Push without a model card; otherwise `opcd report` has to be run first."""


def run(arguments: list[str]) -> int:
    command = parse(ExportCommand, "export", arguments)
    if command.output_dir is None and command.push_to_hub is None:
        raise InputError("output_dir is missing; name the folder to write, or a repository with --push-to-hub")
    for name in ("private", "without_card"):
        if getattr(command, name) and command.push_to_hub is None:
            raise InputError(f"{name} is for --push-to-hub REPO; add that, or drop it")
    from opcd_fast.export import card_of, check_can_push, export, find_source, push, refuse, refuse_local_base
    from opcd_fast.models import base_of_adapter

    quiet_libraries()
    scratch = None if command.output_dir else tempfile.mkdtemp(prefix="opcd-export-")
    try:
        target = Path(command.output_dir).expanduser() if command.output_dir else Path(str(scratch)) / "export"
        repo = None
        if command.push_to_hub is not None:
            source = find_source(command.run, command.model, command.trust_remote_code)
            refuse(source, target, command)
            if card_of(source.folder) is None and not command.without_card:
                raise InputError(
                    f"push_to_hub: there is no model card yet; `opcd report {command.run}` measures the run and writes "
                    "one, or push without it by --without-card"
                )
            if source.base is not None and not command.merged:
                refuse_local_base(command.base_name or source.base)
            repo = check_can_push(command.push_to_hub, command.private)
        done = export(command.run, target, command, told=lambda line: print(f"{line} ...", flush=True))
        print(f"check: {done.comparison.in_words()}")
        files = "file" if done.shards == 1 else "files"
        where = f" in {target}" if command.output_dir else ""
        print(f"{done.kind}: {done.bytes / 1e6:.1f} MB, {done.dtype}, {done.shards} {files} of weights{where}")
        base = base_of_adapter(target)
        if base is not None and Path(base).is_dir():
            print(f"base: {base}, a folder of this machine; for others, --merged or --base-name ID")
        if not done.has_card:
            print(f"no model card: `opcd report {command.run}` measures the run and writes one; then export again")
        if repo is not None:
            print(f"pushed: {push(target, repo, command.private)}")
        return 0
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
