"""`opcd plan`: does a run fit on a GPU, and with which settings."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_fast.commands.arguments import parse, quiet_libraries
from opcd_fast.commands.train import TrainOptions, prompts_or_task, read_defaults
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig

RESERVED = 768 << 20  # bytes of a GPU that no tensor gets: driver, kernels, libraries' workspaces. Not measured.
USABLE = 0.94  # of the rest; the allocator's pieces do not fill it. Not measured.


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
    """In place of `context`: how many tokens it has."""
    prompts: str | None = None
    """Training prompts, as for `opcd train`; needs the tokenizer."""
    prompt_tokens: int = 256
    """Without `prompts`: tokens of the longest prompt."""
    eval_prompts: str | None = None
    """Held-out prompts, as for `opcd train`."""
    task: str | None = None
    """A task in place of prompts, as for `opcd train`; it is played without a model, to see how long its turns get."""
    task_options: str | None = None
    """Options of the task as JSON."""
    teacher_model: str | None = None
    """Another model as the teacher; only its config is read."""
    search: bool = True
    """Look for settings that fit when the given ones do not."""
    json: bool = False
    """Print an object in place of a table."""
    run: TrainOptions = dataclasses.field(default_factory=TrainOptions)


def run(arguments: list[str]) -> int:
    command, config = plan_command(arguments)
    gpu = gpu_bytes(command.gpu)
    given = [value is not None for value in (command.context, command.context_tokens)]
    if all(given) or not (any(given) or command.prompts):
        raise InputError(
            "plan: give context, a file, or context_tokens, a number; one of them, or neither where every row of "
            "prompts has a privileged_context"
        )
    for name in ("context_tokens", "prompt_tokens"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    quiet_libraries()

    import torch

    from opcd_fast.models import pick_dtype, seam
    from opcd_fast.planning import Found, as_json, can_extrapolate, extrapolated, find, show
    from opcd_fast.planning.rehearsal import Rehearsal, rehearse
    from opcd_fast.rollout import memory as rollout_memory
    from opcd_fast.teacher import default_batch_bytes
    from opcd_fast.training.step import Windows, check_length

    on_cpu = config.device == "cpu"
    limit = int(gpu if on_cpu else (gpu - RESERVED) * USABLE)
    if limit <= 0:
        raise InputError(f"gpu={command.gpu!r} is less than the {RESERVED >> 20} MiB that CUDA itself takes")
    student = _config_of(command.model)
    teacher = None if command.teacher_model is None else _config_of(command.teacher_model)
    job = _job(command, config)
    own, other = (seam.longest_input_of(source.get_text_config()) for source in (student, teacher or student))
    windows = Windows(own, other, config.num_virtual_tokens)
    for prompt, suffix, index in (*job.prompts, *job.held_out):
        check_length(prompt, job.contexts[index], suffix, config.max_new_tokens, windows)
    # A GPU computes in bf16 unless told otherwise; it need not be here for that.
    dtype = pick_dtype(config.dtype, torch.device("cpu")) if on_cpu or config.dtype != "auto" else torch.bfloat16

    device = "cpu" if on_cpu else "cuda"
    if config.teacher_batch_bytes is None:
        # Its default is a share of the weights: of all layers, also in a rehearsal of a few.
        bound = default_batch_bytes(_body_of(teacher or student, dtype))
        config = dataclasses.replace(config, teacher_batch_bytes=bound)

    def whole(settings: OPCDConfig, layers: int | None = None) -> Rehearsal:
        return rehearse(
            settings, job, student, teacher, device=device, dtype=dtype, backend=_backend(settings, device),
            limit=limit, layers=layers,
        )  # fmt: skip

    def quick(settings: OPCDConfig) -> Rehearsal:
        return extrapolated(lambda layers: whole(settings, layers), student.get_text_config().num_hidden_layers)

    asked, found = config, None
    if command.search and can_extrapolate(student, teacher):
        # A batch sized to memory would be sized to that of a few layers.
        answers = config.batch_size * config.rollouts_per_prompt
        sized = config.rollout_batch or min(answers, rollout_memory.MOST)
        found = find(quick, dataclasses.replace(config, rollout_batch=sized), limit, device=device)
        config = found.config
    if command.search:
        found = find(whole, config, limit, device=device) if found is None or found.fits else found
    else:
        seen = whole(config)
        found = Found(config, seen, seen.nbytes <= limit)
    config = asked
    if command.json:
        print(json.dumps(as_json(config, found, limit, gpu), indent=1))
    else:
        show(config, found, limit)
    return 0 if found.fits else 1


def plan_command(arguments: list[str]) -> tuple[PlanCommand, OPCDConfig]:
    """What the command line says, in front of what the YAML file of a run says."""
    import tyro

    arguments, values, options = read_defaults(arguments)
    for name in ("init", "replay"):
        if values.pop(name, None) is not None:
            raise InputError(
                f"plan: {name} goes on from an earlier run, which is not read; plan with that run's own config"
            )
    required = {"model": tyro.MISSING, "gpu": tyro.MISSING}
    default = PlanCommand(**{**required, **values}, run=TrainOptions(**options))
    command = parse(PlanCommand, "plan", arguments, default=default)
    if command.context_tokens is not None and "context" in values and command.context == values["context"]:
        # A number in place of the file; then the prompts, which would be rendered with it, are numbers too.
        files = {name: None for name in ("context", "prompts", "eval_prompts")
                 if getattr(command, name) == values.get(name)}  # fmt: skip
        command = dataclasses.replace(command, **files)
    return command, OPCDConfig(**dataclasses.asdict(command.run))


def gpu_bytes(text: str) -> int:
    """ "24GB", "23.5 GiB", "800MB" in bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"gpu={text!r} is no size of memory; write 24GB or 800MB")
    return int(float(match[1]) * (2**30 if match[2].upper() == "G" else 2**20))


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    from opcd_fast.models import resolve

    try:
        return AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: its config cannot be read: {str(error).splitlines()[0]}") from error


def _body_of(source: Any, dtype: Any) -> Any:
    """Without data."""
    import torch
    from transformers import AutoModelForCausalLM

    from opcd_fast.models import seam

    with torch.device("meta"):
        return seam.body_of(AutoModelForCausalLM.from_config(source, dtype=dtype))


def _job(command: PlanCommand, config: OPCDConfig) -> Any:
    from opcd_fast.planning.rehearsal import Job, job_of

    rendered = (command.prompts, command.eval_prompts, command.task, command.task_options)
    if command.context_tokens is not None and not any(rendered):
        tokens = command.prompt_tokens
        return Job((command.context_tokens,), ((tokens, tokens, 0),))
    if command.context_tokens is not None:
        raise InputError(
            "plan: prompts and tasks are rendered with their context; give context, the file, in place of its tokens"
        )
    from opcd_fast.data import read_context
    from opcd_fast.models import load_tokenizer
    from opcd_fast.training.answers import read_training_prompts

    without = not (command.prompts or command.task or command.task_options)
    prompts = ["word " * command.prompt_tokens] if without else prompts_or_task(command, config)
    tokenizer = load_tokenizer(command.model)
    context = None if command.context is None else read_context(Path(command.context))
    return job_of(read_training_prompts(prompts, command.eval_prompts, context, tokenizer, config), config)


def _backend(config: OPCDConfig, device: str) -> str:
    if device == "cuda":
        return "triton" if config.loss_backend == "auto" else config.loss_backend
    import torch

    from opcd_fast.loss import resolve_backend

    return resolve_backend(config.loss_backend, torch.device("cpu"), torch.float32)
