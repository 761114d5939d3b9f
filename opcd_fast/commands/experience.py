"""What `opcd extract`, `opcd accumulate` and `opcd select` have in common: a task, a model and how it is sampled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from opcd_fast.commands.arguments import SamplingOptions, arm_of, check_sampling, quiet_libraries


@dataclass(frozen=True)
class PlayOptions(SamplingOptions):
    """A model that plays a task."""

    model: str
    """Folder (full model or adapter), hub id, or "smollm2"."""
    task: str
    """"frozen-lake", "sokoban", "math:FILE", "choice:FILE", "yes-no:FILE", "reasoning:NAME", "instructions" ..."""
    output_dir: str = "runs/experience"
    """Folder of the attempts, the notes and their scores."""
    task_options: str = "{}"
    """Options of the task as JSON, such as {"size": 4}."""
    problems: int = 30
    """How many problems are played; fewer when the task has no more in its split."""
    rollout_batch: int = 64
    """Sequences generated at once."""


def begin(options: PlayOptions, step: str) -> tuple[Any, Any, Any]:
    """The folder, which remembers what decides the step's results; the task; and the model, ready to answer.

    Raises InputError for numbers out of range, a task, file or option that is not there, or results of other settings
    in the folder.
    """
    check_sampling(options, "problems", "max_new_tokens", "rollout_batch")
    from opcd_fast.contexts import ExperienceFolder, Player
    from opcd_fast.data.tasks import load_task, options_of
    from opcd_fast.models import load_model, load_tokenizer

    task = load_task(options.task, **options_of(options.task_options))
    free = ("output_dir", "rollout_batch", *options.place())
    folder = ExperienceFolder(options.output_dir)
    folder.settle(step, {name: value for name, value in asdict(options).items() if name not in free})
    quiet_libraries()
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    model = load_model(options.model, **options.place())
    return folder, task, Player(arm_of(model, tokenizer, options.rollout_batch), options.sampling())
