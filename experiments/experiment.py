"""What the experiments share: the registered systems, one budget, and runs that are merged into one file of results."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import record
from experiments.variants import VARIANTS
from opcd_fast.commands.compare import CompareCommand, compare
from opcd_fast.commands.train import TrainOptions
from opcd_fast.data import GENERAL
from opcd_fast.errors import InputError
from opcd_fast.evaluation import where_it_ran
from opcd_fast.runtime import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = Path("runs/experiments")
SYSTEMS = {
    "reverse": "opcd:divergence=reverse_kl",
    "forward": "opcd:divergence=forward_kl",
    "gated": "opcd:divergence=gated_kl,gate=kl",
    "gated-tv": "opcd:divergence=gated_kl,gate=tv",
    "gated-begun": "opcd:divergence=gated_kl,gate=kl,teacher_tokens=8",  # taught no better, and is gone since
    # These two are no part of the package: variants.py says what they compute in the gated KL's place.
    "forward-then-reverse": "opcd:divergence=gated_kl,gate=kl,loss_backend=torch",
    "todi": "opcd:divergence=gated_kl,gate=kl,loss_backend=torch",
    "off-policy": "off-policy:divergence=forward_kl",
    # What other trainers have, each by itself.
    "gated-linear": "opcd:divergence=gated_kl,gate=kl,lr_scheduler_type=linear",
    "gated-shared": "opcd:divergence=gated_kl,gate=kl,off_policy_share=0.25",
    "gated-growing": "opcd:divergence=gated_kl,gate=kl,answer_growth=0.5",
    "sft": "sft",
    "live": "live:divergence=reverse_kl",
    # It looks back over 1 / (1 - 0.9) = 10 steps; the default's 100 are more than a run has.
    "ema": "ema:divergence=reverse_kl,teacher_ema_decay=0.9",
}
"""By label, as `opcd compare` takes a system. Each names its divergence, whatever the package's default is."""
SCREENED = tuple(SYSTEMS)[: 1 + tuple(SYSTEMS).index("off-policy")]
"""Systems that take part in the decision (experiments/README.md)."""


@dataclass(frozen=True)
class Experiment:
    """A context, prompts, and what a good answer is: a pattern, or "module:function" (see `opcd_fast.training.Scorer`).

    temperature: of all answers, and of the loss. general: unrelated prompts on which forgetting is measured, if not the
    hundred that come along. prepare: writes the files first, where they come from an installed package. also: more
    `abilities` of a finished run, from its folder; with None those of the arms of the baseline, by name.
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
    systems: tuple[str, ...] = SCREENED
    prepare: Callable[[], None] | None = None
    also: Callable[[Path | None], dict[str, Any]] | None = None


def run(experiment: Experiment) -> None:
    """Run it from the command line."""
    given = _arguments(experiment)
    try:
        run_missing(experiment, given)
    except InputError as error:
        raise SystemExit(f"experiments.{experiment.name}: {error}") from error


def run_missing(experiment: Experiment, given: argparse.Namespace) -> None:
    """Make what the file of results does not have yet, one system and seed after the other; each is saved at once."""
    name = experiment.name
    if given.steps is not None:
        name += f"_{given.steps}_steps"
    if given.smoke:
        name += "_smoke"
    if experiment.prepare is not None:
        experiment.prepare()
    if given.smoke:
        label = given.systems[0]
        with VARIANTS[label](2) if label in VARIANTS else nullcontext():
            compare(command(experiment, label, 0, name, steps=2, device=given.device, smoke=True))
        return
    file = RESULTS / f"{name}.json"
    kept = record.read(file)
    for seed in range(given.seeds):
        for label in given.systems:
            made_before = record.has(kept, label, seed)
            if made_before and not given.again:
                print(f"{label}, seed {seed}: in {file.name} already")
                continue
            wanted = command(experiment, label, seed, name, given.steps or experiment.steps, given.device)
            settings = settings_of(wanted)
            record.check(kept, settings, label, SYSTEMS[label], file)
            folder = RUNS / name / label / f"seed-{seed}"
            if made_before:
                shutil.rmtree(folder, ignore_errors=True)
            made = _begun(RUNS / name / "made" / f"{label}-seed-{seed}.json", again=made_before)
            with VARIANTS[label](wanted.run.steps) if label in VARIANTS else nullcontext():
                found = compare(wanted)
            if experiment.also is not None:
                _add_abilities(found, label, experiment.also, folder, first=not kept)
            # Read anew: another process may have saved a run meanwhile.
            kept = record.merge(record.read(file), found, settings, label, SYSTEMS[label], made)
            record.write(file, kept)
            print(f"saved: {file}, .md and .png")


def _add_abilities(
    found: dict[str, Any], label: str, also: Callable[[Path | None], dict[str, Any]], folder: Path, first: bool
) -> None:
    """To the run, and to the baseline's arms where it is the first run in its file."""
    (run,) = found["systems"][label]["runs"]
    (baseline,) = found["baselines"].values()
    arms = also(None) if first else {}
    for measured, more in ((run, also(folder)), *((baseline[name], arms[name]) for name in arms)):
        measured["abilities"] = {**measured.get("abilities", {}), **more}


def _arguments(experiment: Experiment) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"The experiment {experiment.name}.")
    parser.add_argument("--systems", default=",".join(experiment.systems), help=f"some of {', '.join(SYSTEMS)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each system; 3: the seeds 0, 1 and 2")
    parser.add_argument("--steps", type=int, help="another budget, in a folder and a file of results of its own")
    parser.add_argument("--again", action="store_true", help="also make runs that the results have, and replace them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--smoke", action="store_true", help="a short run of the first system, without results")
    given = parser.parse_args()
    given.systems = given.systems.split(",")
    unknown = [label for label in given.systems if label not in SYSTEMS]
    if unknown:
        parser.error(f"--systems: {', '.join(unknown)} unknown; use some of {', '.join(SYSTEMS)}")
    if given.seeds < 1:
        parser.error(f"--seeds: {given.seeds} must be at least 1")
    return given


def command(
    experiment: Experiment, label: str, seed: int, name: str, steps: int, device: str = "auto", smoke: bool = False
) -> CompareCommand:
    """One run, as `opcd compare` takes it. In float32: in bfloat16 machines would round differently."""
    held_out = _shown(experiment.eval_prompts)
    general = "builtin" if experiment.general is None else _shown(experiment.general)
    if smoke:
        held_out = general = _first_lines(experiment.eval_prompts, RUNS / f"{name}_prompts")
    system = SYSTEMS[label]
    return CompareCommand(
        model="smollm2",
        context=_shown(experiment.context),
        prompts=_shown(experiment.prompts),
        eval_prompts=held_out,
        general=general,
        systems=(f"{label}={system}" if ":" in system else system,),
        seeds=1,
        regex=experiment.regex,
        answers_per_prompt=experiment.answers_per_prompt,
        run=TrainOptions(
            output_dir=str(RUNS / name),
            seed=seed,
            steps=steps,
            batch_size=4 if smoke else experiment.batch_size,
            max_new_tokens=experiment.max_new_tokens,
            temperature=experiment.temperature,
            scorer=experiment.scorer,
            lora_rank=16,
            eval_every=steps,
            save_every=10,
            keep_checkpoints=1,
            dtype="float32",
            device=device,
        ),
    )


def settings_of(wanted: CompareCommand) -> dict[str, Any]:
    """What all runs of a file of results have in common, and the contents of the files they read."""
    names = ("context", "prompts", "eval_prompts", "general")
    files = {name: HERE.parent / getattr(wanted, name) for name in names}
    if wanted.general == "builtin":
        files["general"] = Path(GENERAL)
    return record.settings_of(wanted, files)


def _begun(path: Path, again: bool) -> dict[str, str]:
    """With what a run is made, kept beside it from its beginning: it may be finished by a later call."""
    if again or not path.is_file():
        this = " ".join(["python -m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        write_text(path, record.as_json({**where_it_ran(), "commit": _commit(), "command": this}))
    return record.read(path)


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
        # What a finished run changed does not make the next one another.
        status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude)results"]
        changed = subprocess.run(status, cwd=HERE, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
