"""`opcd train`: the loop on files, every setting an option or a line of a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from opcd_fast.commands.arguments import context_in, parse, quiet_libraries
from opcd_fast.commands.helping import long_help, short_help
from opcd_fast.commands.presets import in_words, settled
from opcd_fast.errors import InputError
from opcd_fast.runtime import launched, launched_rank
from opcd_fast.training.settings import OPCDConfig, check_names, group_of, option_names, read_yaml, typed_values

given = group_of("Model and data")


@dataclass(frozen=True)
class TrainOptions(OPCDConfig):
    """The same options, checked only once those of a YAML file, the command line and the preset are together."""

    def __post_init__(self) -> None:
        pass

    def checked(self, **preset: Any) -> OPCDConfig:
        return OPCDConfig(**{**dataclasses.asdict(self), **preset})


@dataclass(frozen=True)
class TrainCommand:
    """Train a model to answer as it would with the context in front.

    Writes metrics.jsonl, checkpoints/ and final/ (the adapter, or the whole model) into the output folder.
    Options may also come from a YAML file: `--config FILE`, the same names; the command line wins.
    """

    # fmt: off
    model: str = given(MISSING, 'Folder, hub id, or "smollm2" (the packaged SmolLM2-135M-Instruct).')
    prompts: str | None = given(None, """What users ask: a .txt file (one a line), JSONL ({"prompt": text or messages}
        a line), JSON, CSV or parquet, or a Hugging Face data set's folder.""")
    context: str | None = given(None, "What the teacher sees: a text file, or chat turns as .json or .jsonl.")
    eval_prompts: str | None = given(None, """Held-out prompts, same form, for evaluation during the run. Left out: a
        tenth of the prompts, at least 8, is not trained on. "none": no evaluation.""")
    preset: str = given("small", """What the options are that you do not give. "small": LoRA of rank 16, at most 16
        prompts a step, answers of at most 128 tokens, steps by the number of prompts. "paper": as arXiv 2602.12275 has
        them.""")
    task: str | None = given(None, """A task in place of prompts: "frozen-lake", "sokoban", "math:FILE", "choice:FILE",
        "reasoning:NAME" ... Its split "train" is played at every step, its split "selection" at evaluations.""")
    task_options: str | None = given(None, 'Options of the task as JSON, such as {"size": 4}.')
    teacher_model: str | None = given(None, """Another model as the teacher (same tokenizer); default: the model without
        a trained adapter, as it was at the start (LoRA: the base with the adapter off).""")
    init: str | None = given(None, """Output folder of an earlier run on the same model: go on from its weights, with an
        edited context.""")
    replay: str | None = given(None, """With init: prompts whose teacher keeps the OLD context, a file or a share of the
        training prompts (0.2).""")

    run: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    # fmt: on


def run(arguments: list[str]) -> int:
    command, named = train_command(arguments)
    trainer = trainer_of(command, named)
    if trainer.config.preview and launched() == 1:
        _tell_memory(trainer, command)
    result = trainer.train()
    if not launched_rank():
        folder = trainer.config.output_dir
        print(f"trained {result.steps} steps in {result.seconds:.0f} s; weights in {folder}/final")
        print(f"next: opcd generate --model {folder} --prompt TEXT\n      opcd report {folder}")
    return 0


def _tell_memory(trainer: Any, command: TrainCommand) -> None:
    from opcd_fast.models import load_settings
    from opcd_fast.planning import foreseen

    other = command.teacher_model and load_settings(command.teacher_model, trainer.config.trust_remote_code)
    if seen := foreseen(trainer, other or None):
        _say(f"memory: {seen.nbytes / 2**30:.1f} GiB where a step needs most")


def trainer_of(command: TrainCommand, named: Collection[str]) -> Any:
    """The trainer of a run; nothing is written yet. named: the options that its user gave."""
    # Small files first: a wrong name must not cost the loading of a model, or of the libraries for it.
    context_in(command.context)
    config, prompts, held_out = settings_and_prompts(command, named, _say)
    if command.preset != "paper":
        _say(in_words(config))
    from opcd_fast.models import cpu_has_bf16, load_model, load_tokenizer, pick_device
    from opcd_fast.training import OPCDTrainer
    from opcd_fast.training.engines import join
    from opcd_fast.training.run import start_from

    quiet_libraries()
    join(config.device)
    start, replayed = None, []
    if command.replay is not None and command.init is None:
        raise InputError("replay needs init: the earlier run whose context shall stay")
    if command.init is not None:
        if command.teacher_model is not None:
            raise InputError("init: the teacher is the base of that run; drop teacher_model")
        start = start_from(command.init, command.model, config)
        if command.replay is not None and command.task is not None:
            raise InputError("replay: a task's turns cannot be mixed with prompts; drop replay or task")
        if command.replay is not None:
            replayed = start.replayed(command.replay, prompts, held_out or (), config.seed)
            _say(f"{len(replayed)} replayed prompts keep the context of {command.init}")
    tokenizer = load_tokenizer(command.model, config.trust_remote_code)
    teacher_tokenizer = teacher = None
    if command.teacher_model is not None:
        teacher_tokenizer = load_tokenizer(command.teacher_model, config.trust_remote_code)
        teacher = load_teacher(command.teacher_model, config)
    place = loading(config, config.quantization)
    if config.dtype == "bfloat16" and pick_device(config.device).type == "cpu" and not cpu_has_bf16():
        _say("dtype bfloat16: this CPU only imitates it; float32, the default here, is several times faster")
    if start is not None:
        model, teacher = start.models(**place)
    else:
        model = load_model(command.model, **place)
    trainer = OPCDTrainer(
        model, tokenizer, None if command.context is None else Path(command.context),
        [*prompts, *replayed] if replayed else prompts, config,
        teacher_model=teacher, teacher_tokenizer=teacher_tokenizer, eval_prompts=held_out,
    )  # fmt: skip
    if start is not None:
        start.described(trainer.origins, len(replayed))
    return trainer


def _say(text: str) -> None:
    if not launched_rank():
        print(text, flush=True)


def settings_and_prompts(
    command: Any, named: Collection[str], say: Callable[[str], None]
) -> tuple[OPCDConfig, Any, Sequence[Any] | None]:
    """A run's settings, what it trains on (prompts, or a task) and the prompts it evaluates on; None: a task's own, or
    no evaluation. named: the options that its user gave."""
    from opcd_fast.data import read_prompts

    prompts, options = prompts_or_task(command), command.run
    held_out: Any = None
    general = sum(prompt.privileged_context == "" for prompt in prompts) if isinstance(prompts, list) else 0
    if general:
        say(f"{general} of {len(prompts)} prompts have an empty privileged_context: their teacher sees no context")
    if command.eval_prompts not in (None, "none"):
        held_out = read_prompts(command.eval_prompts, "eval_prompts", **options.columns())
    elif command.eval_prompts is None and command.task is None and options.eval_every:
        prompts, held_out = _split(prompts, options, say)
    return settled(command, named, prompts), prompts, held_out


def _split(
    prompts: Sequence[Any], config: OPCDConfig, say: Callable[[str], None]
) -> tuple[Sequence[Any], Sequence[Any] | None]:
    """Prompts to train on, and to hold out; a run that goes on holds out what it did, which may be none."""
    from opcd_fast.data import hold_out
    from opcd_fast.training.run import held_out_count

    count = held_out_count(Path(config.output_dir)) if config.resume else None
    if count == 0:
        return prompts, None
    train, held_out = hold_out(prompts)
    if not held_out:
        say(f"{len(prompts)} prompts are too few to hold some out; give --eval-prompts to see how the run fares")
        return prompts, None
    say(f"{len(held_out)} of {len(prompts)} prompts are held out for evaluation (--eval-prompts FILE or none)")
    return train, held_out


def prompts_or_task(command: Any) -> Any:
    """What `prompts` names, or the task. Raises InputError for both, or neither."""
    from opcd_fast.data import read_prompts
    from opcd_fast.data.tasks import load_task, options_of

    if (command.prompts is None) == (command.task is None):
        raise InputError("give --prompts FILE, or --task NAME in its place")
    if command.task is None:
        if command.task_options is not None:
            raise InputError("task_options is set, but no task; drop it, or give --task")
        return read_prompts(command.prompts, **command.run.columns())
    return load_task(command.task, **options_of(command.task_options))


def load_teacher(name: str, config: OPCDConfig) -> Any:
    """A teacher of its own, where and as the run wants it."""
    from opcd_fast.models import load_model

    elsewhere = config.teacher_device != "auto"
    return load_model(name, **loading(config, config.teacher_quantization, elsewhere, waits=config.teacher_offload))


def loading(config: OPCDConfig, quantization: str, elsewhere: bool = False, waits: bool = False) -> dict[str, Any]:
    """How and where to load a model. One that is to be packed, sharded, to run elsewhere, or to wait for its turn
    is loaded on the CPU: it might not fit whole on the device, and loading it elsewhere would make that the current
    one."""
    from opcd_fast.models import pick_device, pick_dtype
    from opcd_fast.training.engines import shards

    if quantization == "none" and not elsewhere and not waits and not shards():
        return {"dtype": config.dtype, "device": config.device, "trust_remote_code": config.trust_remote_code}
    name = "teacher_device" if elsewhere else "device"
    dtype = pick_dtype(config.dtype, pick_device(getattr(config, name), name=name, make_current=False))
    return {"dtype": str(dtype).removeprefix("torch."), "device": "cpu", "trust_remote_code": config.trust_remote_code}


def train_command(arguments: list[str], name: str = "train") -> tuple[TrainCommand, set[str]]:
    """A YAML file's values become the command line's defaults. With the names of the options that either gives.

    Whether the options go together can be said only when the preset has set the others, see `settled`.
    """
    import tyro

    for words, show in ((("-h", "--help"), short_help), (("--help-all",), long_help)):
        if set(words) & set(arguments):
            print(show(name, TrainCommand), end="")
            raise SystemExit(0)
    arguments, values, options, named = read_defaults(arguments)
    default = TrainCommand(**{"model": tyro.MISSING, **values}, run=TrainOptions(**options))
    return parse(TrainCommand, name, arguments, default=default), named


def read_defaults(arguments: list[str]) -> tuple[list[str], dict[str, Any], dict[str, Any], set[str]]:
    """Arguments without `--config FILE`, what that file sets (fields of `TrainCommand`, and of its options), and the
    names of all options that have a value here or there, spelled as in Python.

    Raises InputError for a file that `opcd train` would not take.
    """
    arguments, path = _take_config(arguments)
    words = (word[2:].partition("=")[0] for word in arguments if word.startswith("--"))
    named = {word.removeprefix("no-").replace("-", "_") for word in words}
    if path is None:
        return arguments, {}, {}, named
    found, where = read_yaml(path), f"config file {path!r}"
    if found.get("trust_remote_code"):
        raise InputError(f"{where}: trust_remote_code is taken from the command line alone: --trust-remote-code")
    of_command = [name for name in option_names(TrainCommand) if name != "run"]
    check_names(found, of_command + option_names(TrainOptions), where)
    try:
        values = typed_values(TrainCommand, {k: v for k, v in found.items() if k in of_command})
        options = {k: v for k, v in found.items() if k not in of_command}
        return arguments, values, typed_values(TrainOptions, options, numbers_as_text=True), named | found.keys()
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


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
