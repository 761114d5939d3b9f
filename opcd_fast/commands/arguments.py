"""What the commands share: arguments to a dataclass, and checks of options that several have."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from opcd_fast.commands.helping import check_names, in_words, without_none
from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig, Within, check_values, settings_of


def parse(kind: type, name: str, arguments: list[str], **settings: Any) -> Any:
    """Arguments to a command's dataclass. Raises InputError, in one line, for what it cannot take, a bad seed, and a
    setting of a run that cannot have its value, whatever the others are."""
    import tyro

    check_names(name, kind, arguments)
    flat: Any = Annotated[_explained(kind), tyro.conf.OmitArgPrefixes]
    said, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            command = tyro.cli(flat, prog=f"opcd {name}", args=arguments, **settings)
    except SystemExit as stop:
        if not stop.code:  # --help
            print(without_none(said.getvalue()), end="")
            raise
        wrong = in_words(complaint.getvalue(), kind, arguments)
        raise InputError(f"{name}: {wrong}; see `opcd {name} --help`") from stop
    seed = getattr(command, "seed", 0)
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} must be a whole number from 0 up to 2**63 - 1")
    if isinstance(chosen := getattr(command, "run", None), OPCDConfig):
        check_values(dataclasses.asdict(chosen))
    return command


@cache
def _explained(kind: type) -> type:
    """`kind`, whose settings have their help in their types, where tyro looks for it, besides their metadata."""
    import tyro

    types = get_type_hints(kind, include_extras=True)
    for field, known in settings_of(kind):
        types[field.name] = Annotated[types[field.name], tyro.conf.arg(help=known.help)]
    for inner in types.values():
        if dataclasses.is_dataclass(inner):
            _explained(inner)  # type: ignore[arg-type]
    kind.__annotations__ = types
    return kind


def quiet_libraries() -> None:
    """A bar for a second of loading, or a library's note to its own callers, hides the line that matters."""
    import logging
    import warnings

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that another package would have
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def tell(line: str) -> None:
    """How far a command is, beside its result, which a program may read."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and in which type a command's model computes."""

    dtype: str = "auto"
    """"auto" | "float32" | "bfloat16"."""
    device: str = "auto"
    """"auto" | "cpu" | "cuda" | "cuda:N"."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Without it such a model is refused."""

    def place(self) -> dict[str, Any]:
        """Keywords of `load_model`."""
        return {name: getattr(self, name) for name in ("dtype", "device", "trust_remote_code")}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(ComputeOptions):
    """And how it answers."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 takes the most probable token each time; above 0 samples."""
    top_p: float = 1.0
    """Nucleus sampling."""
    seed: int = 0
    """Fixes what is drawn."""

    def sampling(self) -> dict[str, Any]:
        """Keywords of `Rollout.generate`, without the seed."""
        return {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p")}


def check_at_least(least: int, command: Any, *names: str) -> None:
    """Raises InputError for an option that is set, and smaller."""
    for name in names:
        value = getattr(command, name)
        if value is not None and value < least:
            raise InputError(f"{name}={value} must be at least {least}")


def check_sampling(command: Any, *counts: str) -> None:
    """Raises InputError for a temperature or top_p out of range, and for one of `counts` below 1."""
    check_at_least(1, command, *counts)
    Within(0, 100)("temperature", command.temperature)
    Within(0, 1, open_low=True)("top_p", command.top_p)


def context_in(file: str | None) -> Any:
    """What the file of a context holds; None for none. Raises InputError.

    On the command line a context is always a file: a mistyped name must not become the context's text.
    """
    from opcd_fast.data import read_context

    return None if file is None else read_context(Path(file))


def trained_weights(name: str) -> str:
    """The weights that a run's folder holds; any other name as it is. Raises InputError for a run without."""
    if not (Path(name) / "run.json").is_file():
        return name
    if not (Path(name) / "final").is_dir():
        raise InputError(f"model={name!r} is a run that has not ended; go on with it: opcd train --resume")
    return str(Path(name) / "final")


def arm_of(model: Any, tokenizer: Any, max_batch: int = 64, **options: Any) -> Any:
    """`model` as it answers chats. options: of `TransformersRollout`."""
    from opcd_fast.evaluation import Arm

    return Arm(tokenizer, sampler(model, tokenizer, max_batch, **options).generate, window=window_of(model))


def window_of(model: Any) -> int | None:
    """Most tokens of a prompt and its answer: a trained prefix takes some of the model's. None: no limit."""
    from opcd_fast.models import seam, virtual_tokens

    longest = seam.longest_input(seam.body_of(model))
    return longest and longest - virtual_tokens(model)


def sampler(model: Any, tokenizer: Any, max_batch: int = 64, stop_tokens: Sequence[str] = (), **options: Any) -> Any:
    """Answers of `model`, which stays as it is, `max_batch` sequences at once; `stop_tokens` end them as well."""
    from opcd_fast.rollout import TransformersRollout, stop_token_ids

    stop_ids = stop_token_ids(tokenizer, model, stop_tokens)
    return TransformersRollout(model, stop_token_ids=stop_ids, max_batch=max_batch, frozen_base=True, **options)
