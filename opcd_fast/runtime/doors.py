"""A room's door: names that load when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def door(
    package: str, homes: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names come from its modules.

    homes: module, as seen from the package, to the names that come from it. A module may be a room with a door.
    modules: those that are public as a whole, where their name belongs to what they hold. Importing the package imports
        nothing. What is loaded is looked up anew each time: a test may put something else into the module.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    names = sorted([*home_of, *modules])

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)

    return load, lambda: names, names
