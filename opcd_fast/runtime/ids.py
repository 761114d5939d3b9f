"""Token ids, in whatever a caller keeps them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from opcd_fast.errors import InputError


def token_ids(name: str, given: Any, vocabulary: int | None = None) -> list[int]:
    """A sequence, an array or a 1-D tensor as Python integers. Raises InputError for all but whole numbers from 0 on,
    below `vocabulary` if given."""
    if isinstance(given, str | Mapping):
        what = "text" if isinstance(given, str) else f"a {type(given).__name__}"
        raise InputError(f"{name} is {what}; give token ids, such as tokenizer(text).input_ids")
    try:
        values = given.tolist() if hasattr(given, "tolist") else list(given)
        if bool in map(type, values):
            raise TypeError("True and False are no ids, though Python takes them for 1 and 0")
        found = [*map(operator.index, values)]
    except TypeError as error:
        got = " ".join(repr(given).split())[:60]
        raise InputError(f"{name} must be token ids, a list or a 1-D tensor of integers; got {got}") from error
    wrong = [i for i in found if i < 0 or (vocabulary is not None and i >= vocabulary)]
    if wrong:
        bounds = "start at 0" if vocabulary is None else f"must lie in [0, {vocabulary})"
        raise InputError(f"{name} holds the id {wrong[0]}; token ids {bounds}")
    return found
