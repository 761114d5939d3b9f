"""What `--help` prints, and what to say of a command line that cannot be read."""

from __future__ import annotations

import dataclasses
import difflib
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opcd_fast.commands.presets import IN_WORDS
from opcd_fast.errors import InputError
from opcd_fast.training.settings import settings_of

# The options that a first run needs; the others are in `--help-all`.
MAIN = ("model", "context", "prompts", "eval_prompts", "output_dir", "steps", "batch_size", "max_new_tokens",
        "lora_rank", "learning_rate")  # fmt: skip
EXAMPLE = "opcd {name} --model smollm2 --context persona.txt --prompts questions.txt"
KINDS = {"bool": "True or False", "int": "a whole number", "float": "a number"}


def options_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """The options of a command's dataclass, those of the dataclasses in it included, spelled as in Python."""
    types = typing.get_type_hints(kind)
    found: dict[str, dataclasses.Field[Any]] = {}
    for field in dataclasses.fields(kind):
        inner = types[field.name]
        found |= options_of(inner) if dataclasses.is_dataclass(inner) else {field.name: field}  # type: ignore[arg-type]
    return found


def check_names(name: str, kind: type, arguments: Sequence[str]) -> None:
    """Raises InputError for an option that the command does not have, with the closest one."""
    known = options_of(kind)
    names = {option.replace("_", "-") for option in known} | {"help", "help-all"}
    switches = (option for option, field in known.items() if str(field.type).startswith("bool"))
    names |= {f"no-{option.replace('_', '-')}" for option in switches}
    for word in arguments:
        given = word[2:].partition("=")[0].replace("_", "-")
        if word[:2] == "--" and given and given not in names:
            close = difflib.get_close_matches(given, names, 1)
            hint = f"did you mean --{close[0]}?" if close else f"see `opcd {name} --help`"
            raise InputError(f"{name}: there is no option --{given}; {hint}")


def in_words(complaint: str, kind: type, arguments: Sequence[str]) -> str:
    """What tyro complains of, in one line that a user understands."""
    # tyro's boxes: drawn characters, or rules of dashes where the terminal is not UTF-8.
    text = re.sub(r"[╭╮╰╯│─]+|(?<!\S)-{3,}(?!\S)", " ", complaint).split("For full helptext")[0]
    text = " ".join(text.split())
    wrong = re.search(r"Error parsing --([\w-]+)", text)
    if wrong:
        option = wrong[1].removeprefix("no-")
        kinds = str(options_of(kind)[option.replace("-", "_")].type).partition(" | ")[0]
        words = iter(arguments)
        value = next((w.partition("=")[2] if "=" in w else next(words, "")
                      for w in words if w.partition("=")[0].replace("_", "-") == f"--{option}"), "")  # fmt: skip
        return f"--{option} {value} must be {KINDS.get(kinds, kinds)}"
    lacks = re.search(r"Missing value for argument '(--[\w-]+)", text)
    if lacks:
        return f"{lacks[1]} needs a value"
    if "Required options" in text:
        named = [*dict.fromkeys(re.findall(r"(--[a-z][a-z-]*) [A-Z]", text))]
        places = [option.upper() for option, field in options_of(kind).items() if "Positional" in str(field.type)]
        missing = named + places[len(places) + len(named) - text.count("(required)") :]  # the last ones, without names
        return f"{' and '.join(missing)} must be given"
    extra = re.search(r"Unrecognized options: (.+?)(?: Perhaps|$)", text)
    if extra:
        return f"{extra[1]} belongs to no option; put a text with spaces into quotes"
    return re.sub(r".*Error parsing \w+: ", "", text)  # a dataclass's own complaint


def short_help(name: str, kind: type) -> str:
    """On one screen: what the command is for, an example, and the options that a first run needs."""
    lines = [f"usage: {EXAMPLE.format(name=name)}", "", *_purpose(kind), ""]
    known = {field.name: (field, setting) for one in (kind, *_inner(kind)) for field, setting in settings_of(one)}
    for option in MAIN:
        lines += _option(*known[option], first_sentence=True)
    lines += ["", f"`opcd {name} --help-all` lists all options; they may also stand in a file: --config run.yaml"]
    return "\n".join(lines) + "\n"


def long_help(name: str, kind: type) -> str:
    """Every option, group by group."""
    lines, group = [f"usage: {EXAMPLE.format(name=name)} [OPTIONS]", "", *_purpose(kind)], ""
    for one in (kind, *_inner(kind)):
        for field, setting in settings_of(one):
            if setting.group != group:
                group = setting.group
                lines += ["", group]
            lines += _option(field, setting)
    return "\n".join(lines) + "\n"


def without_none(text: str) -> str:
    """tyro's help without its words for what may be left out, which stand for nothing a user could type."""
    return re.sub(r" ?\(default: None\)", "", text.replace("{None}|", ""))


def _inner(kind: type) -> Iterator[type]:
    types = typing.get_type_hints(kind)
    yield from (types[field.name] for field in dataclasses.fields(kind) if dataclasses.is_dataclass(types[field.name]))


def _purpose(kind: type) -> list[str]:
    paragraphs = textwrap.dedent("    " + (kind.__doc__ or "")).strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), _width()) for part in paragraphs).split("\n")


def _option(field: dataclasses.Field[Any], setting: Any, first_sentence: bool = False) -> list[str]:
    kind = str(field.type).partition(" | ")[0]
    option = f"--{field.name.replace('_', '-')}" + ("" if kind == "bool" else f" {METAVARS.get(kind, 'TEXT')}")
    text = re.split(r"(?<=[^.])\. (?=[A-Z])", setting.help)[0].rstrip(".") + "." if first_sentence else setting.help
    default = IN_WORDS.get(field.name, field.default)
    if default not in (None, (), "", dataclasses.MISSING):
        text += f" (default: {default})"
    indent = " " * 28
    wrapped = textwrap.wrap(text, _width(), initial_indent=indent, subsequent_indent=indent)
    head = f"  {option:<26}"
    return [head + wrapped[0][28:], *wrapped[1:]] if len(head) <= 28 else [head.rstrip(), *wrapped]


METAVARS: Mapping[str, str] = {"int": "N", "float": "X", "tuple[str, ...]": "TEXT …"}


def _width() -> int:
    return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
