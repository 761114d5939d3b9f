"""What the experiments share: four systems, one budget, three seeds, and a file of results that says where it ran."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opcd_fast.commands.compare import CompareCommand, compare
from opcd_fast.commands.train import TrainOptions
from opcd_fast.runtime import write_text

HERE = Path(__file__).parent
SYSTEMS = {
    "opcd": "opcd",
    "off-policy": "off-policy",
    "live": "live",
    # It looks back over 1 / (1 - 0.9) = 10 steps; the default's 100 are more than a run has.
    "ema": "ema:teacher_ema_decay=0.9",
}


@dataclass(frozen=True)
class Experiment:
    """A context, prompts, and what a good answer is: a pattern, or "module:function" (see `opcd_fast.training.Scorer`).

    temperature: of all answers, and of the loss. general: unrelated prompts on which forgetting is measured, if not the
    hundred that come along.
    """

    name: str
    context: Path
    prompts: Path
    eval_prompts: Path
    max_new_tokens: int
    regex: str | None = None
    scorer: str | None = None
    answers_per_prompt: int = 1
    temperature: float = 1.0
    steps: int = 40
    batch_size: int = 16
    general: Path | None = None
    more_systems: Mapping[str, str] = field(default_factory=dict)
    """Beside the four: name on the command line, and system as `opcd compare` takes it."""

    @property
    def systems(self) -> dict[str, str]:
        return {**SYSTEMS, **self.more_systems}


def run(experiment: Experiment) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=f"The experiment {experiment.name}.")
    parser.add_argument("--systems", default=",".join(experiment.systems), help="some of them, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each system")
    parser.add_argument("--steps", type=int, help="another budget, in a folder and a file of results of its own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="a short run of OPCD alone; its numbers mean nothing")
    given = parser.parse_args()
    unknown = set(given.systems.split(",")) - set(experiment.systems)
    if unknown:
        parser.error(f"--systems: {', '.join(sorted(unknown))} unknown; use some of {', '.join(experiment.systems)}")
    name = experiment.name
    if given.steps is not None:
        name += f"_{given.steps}_steps"
    if given.smoke:
        name += "_smoke"
    folder = Path("runs/experiments") / name
    started = time.perf_counter()
    found = compare(_command(experiment, folder, given))
    command = " ".join(["python -m", f"experiments.{experiment.name}", *sys.argv[1:]])
    found["ran"] |= {"commit": _commit(), "command": command}
    found["ran"]["seconds_in_all"] = round(time.perf_counter() - started)  # of this call; finished runs are skipped
    if given.smoke:
        return
    results = HERE / "results"
    write_text(results / f"{name}.json", json.dumps(found, indent=1) + "\n")
    for kind in ("md", "png"):
        shutil.copyfile(folder / f"compare.{kind}", results / f"{name}.{kind}")
    print(f"saved: {results / name}.json, .md and .png")


def _command(experiment: Experiment, folder: Path, given: argparse.Namespace) -> CompareCommand:
    steps = 2 if given.smoke else given.steps or experiment.steps
    systems = ["opcd"] if given.smoke else given.systems.split(",")
    held_out = _shown(experiment.eval_prompts)
    general = "builtin" if experiment.general is None else _shown(experiment.general)
    if given.smoke:
        held_out = _first_lines(experiment.eval_prompts, folder.with_name(f"{folder.name}_prompts"))
        general = held_out
    return CompareCommand(
        model="smollm2",
        context=_shown(experiment.context),
        prompts=_shown(experiment.prompts),
        eval_prompts=held_out,
        general=general,
        systems=tuple(system for name, system in experiment.systems.items() if name in systems),
        seeds=1 if given.smoke else given.seeds,
        regex=experiment.regex,
        answers_per_prompt=experiment.answers_per_prompt,
        run=TrainOptions(
            output_dir=str(folder),
            steps=steps,
            batch_size=4 if given.smoke else experiment.batch_size,
            max_new_tokens=experiment.max_new_tokens,
            temperature=experiment.temperature,
            scorer=experiment.scorer,
            lora_rank=16,
            eval_every=steps,
            save_every=10,
            keep_checkpoints=1,
            device=given.device,
        ),
    )


def _first_lines(path: Path, folder: Path, count: int = 8) -> str:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    write_text(folder / path.name, "".join(lines))
    return str(folder / path.name)


def _shown(path: Path) -> str:
    """From the repository's root, so that results hold no path of one machine."""
    return path.resolve().relative_to(HERE.parent.resolve()).as_posix()


def _commit() -> str:
    """Of this checkout, "+" behind it where files differ from it; "unknown" outside of one."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=HERE, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
