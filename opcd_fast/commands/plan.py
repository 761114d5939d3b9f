"""`opcd plan`: does a run fit on a GPU, and with which settings."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from opcd_fast.commands.arguments import check_at_least, context_in, parse, quiet_libraries, tell
from opcd_fast.commands.presets import settled
from opcd_fast.commands.train import TrainOptions, read_defaults, settings_and_prompts
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

CONTEXT_TOKENS = 1024


@dataclass(frozen=True)
class PlanCommand:
    """Predict the memory of a training run from the models' configurations alone, and find settings that fit.

    The config of a run is read by `--config FILE`, the same file and names as for `opcd train`; the command line wins.
    Exit status 0: it fits, perhaps with the settings printed; 1: it does not; 2: wrong usage.
    """

    model: str
    """Folder, hub id, or "smollm2"; only its config is read."""
    gpu: str
    """Memory of the GPU: 24GB (a GB is 2^30 bytes here, as GPUs are sold), 80GiB or 512MB."""
    context: str | None = None
    """What the teacher sees, as for `opcd train`; needs the model's tokenizer. Left out where every row of `prompts`
    has a `privileged_context`."""
    context_tokens: int | None = None
    """In place of `context`: how many tokens it has; 1024 where neither it nor prompts are given."""
    prompts: str | None = None
    """Training prompts, as for `opcd train`; needs the tokenizer."""
    prompt_tokens: int = 256
    """Without `prompts`: tokens of the longest prompt."""
    eval_prompts: str | None = None
    """Held-out prompts, or "none", as for `opcd train`."""
    task: str | None = None
    """A task in place of prompts, as for `opcd train`; it is played without a model, to see how long its turns get."""
    task_options: str | None = None
    """Options of the task as JSON."""
    teacher_model: str | None = None
    """Another model as the teacher; only its config is read."""
    preset: str = "small"
    """What the options are that you do not give, as for `opcd train`: "small" or "paper"."""
    search: bool = True
    """Look for settings that fit when the given ones do not."""
    json: bool = False
    """Print an object in place of a table."""
    run: TrainOptions = dataclasses.field(default_factory=TrainOptions)


def run(arguments: list[str]) -> int:
    command, named = plan_command(arguments)
    quiet_libraries()
    from opcd_fast.models import load_settings
    from opcd_fast.planning import as_json, plan_run, show

    trust = command.run.trust_remote_code
    student = load_settings(command.model, trust)
    teacher = None if command.teacher_model is None else load_settings(command.teacher_model, trust)
    if command.prompts or command.task or command.task_options:
        config, prompts, held_out = settings_and_prompts(command, named, tell)
    else:
        config, prompts, held_out = settled(command, named), None, None
    job = _job(command, config, prompts, held_out)
    plan = plan_run(config, job, student, teacher, gpu=command.gpu, search=command.search, told=tell)
    if command.json:
        print(json.dumps(as_json(plan), indent=1))
    else:
        show(plan)
    return 0 if plan.found.fits else 1


def _job(command: PlanCommand, config: OPCDConfig, prompts: Any, held_out: Any) -> Any:
    """From files and a task, read with the model's tokenizer, or from numbers of tokens."""
    from opcd_fast.models import load_tokenizer
    from opcd_fast.planning.rehearsal import Job, job_of
    from opcd_fast.training.answers import read_training_prompts

    tokens = command.context_tokens
    if command.context and tokens is not None:
        raise InputError("plan: give context, a file, or context_tokens, a number; not both")
    if command.context is tokens is prompts is None:
        tokens = CONTEXT_TOKENS
        tell(f"no context given: planning for one of {tokens:,} tokens (--context FILE or --context-tokens N)")
    check_at_least(1, command, "context_tokens", "prompt_tokens")
    if tokens is not None:
        if prompts is not None or command.eval_prompts not in (None, "none"):
            raise InputError("plan: prompts and tasks are rendered with their context; give context, the file itself")
        rows = ((command.prompt_tokens, command.prompt_tokens, 0),)
        evaluates = config.eval_every and command.eval_prompts is None
        return Job((tokens,), rows, rows * config.eval_batch if evaluates else ())
    tokenizer = load_tokenizer(command.model, config.trust_remote_code)
    if prompts is None:
        prompts = ["word " * command.prompt_tokens]
        held_out = {None: prompts * config.eval_batch, "none": None}.get(command.eval_prompts, command.eval_prompts)
    context = context_in(command.context)
    return job_of(read_training_prompts(prompts, held_out, context, tokenizer, config), config)


def plan_command(arguments: list[str]) -> tuple[PlanCommand, set[str]]:
    """What the command line says, in front of what the YAML file of a run says; and the options that either names."""
    import tyro

    arguments, values, options, named = read_defaults(arguments)
    for name in ("init", "replay"):
        if values.pop(name, None) is not None:
            raise InputError(f"plan: {name} goes on from an earlier run, not read here; plan with that run's config")
    default = PlanCommand(**{"model": tyro.MISSING, "gpu": tyro.MISSING, **values}, run=TrainOptions(**options))
    command = parse(PlanCommand, "plan", arguments, default=default)
    if command.context_tokens is not None and "context" in values and command.context == values["context"]:
        # A number in place of the file; then the prompts, which would be rendered with it, are numbers too.
        files = {name: None for name in ("context", "prompts", "eval_prompts")
                 if getattr(command, name) == values.get(name) != "none"}  # fmt: skip
        command = dataclasses.replace(command, **files)
    return command, named
