"""Settings as they come from Python, YAML or the command line, in the types and under the names of a dataclass."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from opcd_fast.data import read_text
from opcd_fast.errors import InputError
from opcd_fast.training.settings.setting import settings_of


def typed_values(cls: type, values: Mapping[str, Any], numbers_as_text: bool = False) -> dict[str, Any]:
    """Values of `cls`'s fields in the types that these declare: lists become tuples, paths become text.

    Raises InputError for every other type: `resume="false"` is true in Python, and a string is a tuple of letters.
    With `numbers_as_text` a float may be written out, as YAML reads 1e-4.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    readers = {field.name: known.read for field, known in settings_of(cls) if known.read is not None}
    read = {name: readers[name](name, value) if name in readers else value for name, value in values.items()}
    return {name: _typed(name, kinds[name], value, numbers_as_text) for name, value in read.items()}


def _typed(name: str, declared: str, value: Any, numbers_as_text: bool) -> Any:
    kind, _, none = declared.partition(" | ")
    if value is None and none:
        return None
    if kind == "float" and numbers_as_text and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind == "str" and isinstance(value, PurePath):
        value = str(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    texts = [value] if isinstance(value, str) else ["<end>"]
    good, wanted = {
        "bool": (isinstance(value, bool), "True or False"),
        "int": (is_number and isinstance(value, int), "a whole number"),
        "float": (is_number, "a number"),
        "str": (isinstance(value, str) and value.strip() != "", "text, and not empty"),
        "tuple[str, ...]": (is_list and all(isinstance(v, str) and v for v in value), f"a list of texts: {texts}"),
    }[kind]
    if not good:
        raise InputError(f"{name}={value!r:.80} must be {wanted}{' (or None)' if none else ''}")
    return tuple(value) if is_list else value


def comma_separated(name: str, value: Any) -> Any:
    """["q_proj", "v_proj"] and "q_proj, v_proj" as "q_proj,v_proj"; anything else as it is."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return value
    return ",".join(name.strip() for name in names if name.strip())


def json_object(name: str, value: Any) -> Any:
    """{"a": False} and '{"a": false}' as the second; text that is no object raises InputError, other types pass."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}={value!r:.80} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(f"{name}={json.dumps(value)} must be an object: '{{\"name\": value}}'")
    try:
        return json.dumps(dict(value), sort_keys=True) if isinstance(value, Mapping) else value
    except TypeError as error:
        raise InputError(f"{name}={value!r:.80} must hold JSON values: {error}") from error


def check_names(values: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raises InputError for a name that is not an option, with the closest one that is."""
    for name in values:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; options: {', '.join(allowed)}"
            raise InputError(f"{where}: unknown option {name!r}{hint}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, names spelled as in Python (dashes allowed). Raises InputError."""
    import yaml

    text = read_text(Path(path), "config")
    try:
        values, written = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise InputError(f"config file {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config file {str(path)!r} must hold `name: value` lines")
    assert written is not None
    names = [str(name.value).replace("-", "_") for name, _ in written.value]  # the library keeps the last of equal ones
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"config file {str(path)!r} sets {name} {names.count(name)} times; keep one of them")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def option_names(*classes: type) -> list[str]:
    return [field.name for cls in classes for field in dataclasses.fields(cls)]
