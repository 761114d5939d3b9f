"""The command line `opcd`: demo, train, generate, info.

Every mistake a user can correct ends with one line on stderr and exit status 2. `OPCD_DEBUG=1` shows where it
came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from opcd_fast.config import OPCDConfig, check_names, option_names, read_yaml, typed_values
from opcd_fast.errors import InputError

OVERVIEW = """\
opcd: move a context (system prompt, few-shot turns, notes) into the weights of a language model.

  opcd demo       watch it happen on a small real model, on this machine, in a few minutes
  opcd train      do it with your model, context and prompts
  opcd generate   answer a prompt with a trained (or any) model
  opcd info       what is installed here and what is missing

`opcd COMMAND --help` lists the options of a command. The first run to try:

  opcd train --model smollm2 --context turns.json --prompts questions.jsonl --lora-rank 16
"""


# What the extra `train` installs, as modules.
TRAIN_PACKAGES = ("tyro", "transformers", "peft", "accelerate", "safetensors", "yaml", "rich", "matplotlib")


@dataclass(frozen=True)
class TrainOptions(OPCDConfig):
    """The same options, checked only once those of a YAML file and of the command line are together."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class TrainCommand:
    """Train a model to answer as it would with the context in front.

    Writes metrics.jsonl, checkpoints/ and final/ (the adapter, or the whole model) into the output folder.
    Options may also come from a YAML file: `--config FILE`, the same names; the command line wins.
    """

    model: str
    """Folder, hub id, or "smollm2" (the packaged SmolLM2-135M-Instruct)."""
    prompts: str
    """JSONL file, one {"prompt": text or messages} a line."""
    context: str | None = None
    """What the teacher sees: a text file, or chat turns as .json or .jsonl."""
    eval_prompts: str | None = None
    """Held-out prompts, same form, for evaluation during the run."""
    teacher_model: str | None = None
    """Another model as the teacher (same tokenizer); default: the model without a trained adapter, as it was at the
    start (LoRA: the base with the adapter off)."""
    run: TrainOptions = dataclasses.field(default_factory=TrainOptions)


@dataclass(frozen=True)
class GenerateCommand:
    """Print a model's answer to a prompt."""

    model: str
    """Folder (full model or adapter), hub id, or "smollm2"."""
    prompt: str
    """The user's message."""
    context: str | None = None
    """A text file, or chat turns as .json or .jsonl, put in front."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the most probable token each time; above 0 samples."""
    top_p: float = 1.0
    """Nucleus sampling."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer besides the tokenizer's and the model's end tokens."""
    seed: int = 0
    """Fixes the samples."""
    dtype: str = "auto"
    """"auto" | "float32" | "bfloat16"."""
    device: str = "auto"
    """"auto" | "cpu" | "cuda" | "cuda:N"."""


@dataclass(frozen=True)
class DemoCommand:
    """Move six few-shot turns into SmolLM2-135M-Instruct and measure what changed."""

    output_dir: str = "runs/demo"
    """Folder for the report; an earlier demo in it is replaced."""
    steps: int | None = None
    """Training steps; default: enough for the form to move in wholly."""
    samples: int = 128
    """Sampled answers behind each rate."""
    seed: int = 0
    """Fixes prompt order and samples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] == "--version":
        from opcd_fast import __version__

        print(__version__)
        return 0
    commands = {"demo": _demo, "train": _train, "generate": _generate, "info": _info}
    try:
        if arguments[0] not in commands:
            close = difflib.get_close_matches(arguments[0], commands, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(commands)}"
            raise InputError(f"unknown command {arguments[0]!r}; {hint}")
        return commands[arguments[0]](arguments[1:])
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("OPCD_DEBUG"):
            raise
        print(f"opcd: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("opcd: interrupted; finished checkpoints are intact, go on with --resume", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str | None:
    """What to tell the user; None for a bug, which keeps its traceback."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in (*TRAIN_PACKAGES, "gguf"):
            return None
        extra = "gguf" if package == "gguf" else "train"
        return f"the package {package!r} is missing: pip install 'opcd-fast[{extra}]'"
    # By name: neither torch nor safetensors need be there.
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory: lower micro_batch_tokens and rollout_batch, or max_new_tokens ({first})"
    if isinstance(error, (NotImplementedError, RecursionError)):
        return None
    expected = isinstance(error, (ValueError, OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"
    return f"{first} (OPCD_DEBUG=1 shows where)" if expected else None


def _train(arguments: list[str]) -> int:
    command, config = _train_command(arguments)
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.prompts import read_context, read_prompts
    from opcd_fast.trainer import OPCDTrainer

    _quiet_libraries()
    # Small files first: a wrong name must not cost the loading of a model.
    context = _as_file(command.context)
    if context is not None:
        read_context(context)
    prompts = read_prompts(command.prompts)
    held_out = None if command.eval_prompts is None else read_prompts(command.eval_prompts, "eval_prompts")
    tokenizer = load_tokenizer(command.model)
    teacher_tokenizer = teacher = None
    if command.teacher_model is not None:
        teacher_tokenizer = load_tokenizer(command.teacher_model)
        place = config.device if config.teacher_device == "auto" else config.teacher_device
        teacher = load_model(command.teacher_model, **_loading(config, config.teacher_quantization, place))
    trainer = OPCDTrainer(
        load_model(command.model, **_loading(config, config.quantization, config.device)),
        tokenizer,
        context,
        prompts,
        config,
        teacher_model=teacher,
        teacher_tokenizer=teacher_tokenizer,
        eval_prompts=held_out,
    )
    result = trainer.train()
    print(f"trained {result.steps} steps in {result.seconds:.0f} s; weights in {config.output_dir}/final")
    return 0


def _loading(config: OPCDConfig, quantization: str, device: str) -> dict[str, str]:
    """Type and place to load a model with. What is to be packed waits on the CPU: whole it might not fit the GPU."""
    from opcd_fast.models import pick_device, pick_dtype

    if quantization == "none":
        return {"dtype": config.dtype, "device": device}
    dtype = pick_dtype(config.dtype, pick_device(device, make_current=False))
    return {"dtype": str(dtype).removeprefix("torch."), "device": "cpu"}


def _generate(arguments: list[str]) -> int:
    command = _parse(GenerateCommand, "generate", arguments)
    if command.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={command.max_new_tokens} must be at least 1")
    if not 0 <= command.temperature < math.inf:  # refuses NaN too
        raise InputError(f"temperature={command.temperature} must be a number, 0 or more")
    if not 0 < command.top_p <= 1:
        raise InputError(f"top_p={command.top_p} must be a number above 0 up to 1")
    _check_seed(command.seed)
    from opcd_fast import transformers_seam as seam
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.preflight import check_prompt_length
    from opcd_fast.prompts import adapt_to_tokenizer, read_context, read_prompts, student_ids, teacher_ids
    from opcd_fast.rollout import TransformersRollout, stop_token_ids

    _quiet_libraries()
    file = _as_file(command.context)
    context = None if file is None else read_context(file)
    tokenizer = load_tokenizer(command.model)
    (prompt,) = adapt_to_tokenizer(tokenizer, read_prompts([command.prompt], "prompt"))
    ids = student_ids(tokenizer, prompt) if context is None else teacher_ids(tokenizer, prompt, context)
    model = load_model(command.model, dtype=command.dtype, device=command.device)
    check_prompt_length(len(ids), command.max_new_tokens, seam.longest_input(seam.body_of(model)))
    stop_ids = stop_token_ids(tokenizer, model, command.stop_tokens)
    rollout = TransformersRollout(model, stop_token_ids=stop_ids, merge_adapter=False)
    (answer,) = rollout.generate(
        [ids],
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
        seed=command.seed,
    )
    print(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return 0


def _demo(arguments: list[str]) -> int:
    command = _parse(DemoCommand, "demo", arguments)
    if command.steps is not None and command.steps < 1:
        raise InputError(f"steps={command.steps} must be at least 1")
    _check_seed(command.seed)
    import matplotlib  # noqa: F401  the plot comes last: minutes too late to learn that it cannot be drawn

    from opcd_fast.demo import run_demo

    _quiet_libraries()
    return 0 if run_demo(**dataclasses.asdict(command)) else 1


def _info(arguments: list[str]) -> int:
    """Without tyro: this command tells what is missing."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: opcd info\n\nShow versions, devices and which optional parts are there.")
        return 0
    if arguments:
        raise InputError(f"info: unknown option {arguments[0]!r}; info takes none")
    from opcd_fast.info import describe

    print(describe(), end="")
    return 0


def _quiet_libraries() -> None:
    """A bar for a second of loading, or a library's note to its own callers, hides the line that matters."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} must be a whole number from 0 up to 2**63 - 1")


def _as_file(context: str | None) -> Path | None:
    """On the command line a context is always a file: a mistyped name must not become the context's text."""
    return None if context is None else Path(context)


def _train_command(arguments: list[str]) -> tuple[TrainCommand, OPCDConfig]:
    """A YAML file's values become the command line's defaults; only what both make together is checked."""
    import tyro

    arguments, path = _take_config(arguments)
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if path is not None:
        found, where = read_yaml(path), f"config file {path!r}"
        of_command = [name for name in option_names(TrainCommand) if name != "run"]
        check_names(found, of_command + option_names(TrainOptions), where)
        try:
            values = typed_values(TrainCommand, {k: v for k, v in found.items() if k in of_command})
            options = {k: v for k, v in found.items() if k not in of_command}
            options = typed_values(TrainOptions, options, numbers_as_text=True)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    required = {"model": tyro.MISSING, "prompts": tyro.MISSING}
    default = TrainCommand(**{**required, **values}, run=TrainOptions(**options))
    command = _parse(TrainCommand, "train", arguments, default=default)
    return command, OPCDConfig(**dataclasses.asdict(command.run))


def _take_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` off."""
    rest, path = [], None
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            if path is not None:
                raise InputError("--config is given twice; put the options into one file")
            path = word.partition("=")[2] if "=" in word else next(words, "")
            if not path:
                raise InputError("--config needs a file")
        else:
            rest.append(word)
    return rest, path


def _parse(kind: type, name: str, arguments: list[str], **settings: Any) -> Any:
    """Arguments to a command's dataclass. Raises InputError with tyro's complaint in one line."""
    import tyro

    flat: Any = Annotated[kind, tyro.conf.OmitArgPrefixes]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(flat, prog=f"opcd {name}", args=arguments, **settings)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro's boxes: drawn characters, or rules of dashes where the terminal is not UTF-8.
        words = re.sub(r"[╭╮╰╯│─]+|(?<!\S)-{3,}(?!\S)", " ", complaint.getvalue()).split("For full helptext")[0]
        raise InputError(f"{name}: {' '.join(words.split())}; see `opcd {name} --help`") from stop


if __name__ == "__main__":
    sys.exit(main())
