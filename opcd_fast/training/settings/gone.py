"""Settings and values that earlier versions had, and what to use in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opcd_fast.errors import InputError

# Each with the default it had, which is what every run does now.
SETTINGS: dict[str, tuple[Any, str]] = {
    "prefix_store": (None, "every run reads its contexts itself; drop it"),
    "prefix_dtype": (
        None,
        "contexts' caches have the teacher's type; drop it, or use prefix_device='cpu' where they are too large",
    ),
    "teacher_tokens": (0, "answers that the teacher began taught no better (docs/experiments.md); drop it, or use "
                       "off_policy_share"),
}
VALUES: dict[tuple[str, Any], str] = {
    ("teacher_path", "mask"): "use 'auto', or 'pad'",
    ("rollout", "continuous"): "use 'transformers', or 'generate'",
}


def refuse_gone(values: Mapping[str, Any], where: str = "") -> None:
    """Raises InputError for a setting or a value that is gone, with what to use. where: how the message begins."""
    for name, value in values.items():
        remedy, said = VALUES.get((name, value)) if isinstance(value, str) else None, f"{name}={value!r}"
        if name in SETTINGS:
            remedy, said = SETTINGS[name][1], name
        if remedy is not None:
            raise InputError(f"{where}{where and ': '}{said} does not exist any more; {remedy}")


def without_gone(values: Mapping[str, Any], where: str, remedy: str) -> dict[str, Any]:
    """The settings of an earlier run without those that are gone and had their default.

    Raises InputError where one had another value: what was done then is not what would be done now.
    """
    kept = {}
    for name, value in values.items():
        if name in SETTINGS and value == SETTINGS[name][0]:
            continue
        if name in SETTINGS or (isinstance(value, str) and (name, value) in VALUES):
            raise InputError(f"{where} has {name}={value!r}, which does not exist any more; {remedy}")
        kept[name] = value
    return kept
