"""A room's door: one list of imports, which type checkers read, and whose names load when they are first used."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def door(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the imports under its `if TYPE_CHECKING:`.

    Importing the package imports nothing of that. What is imported from the package itself is a module, public as a
    whole. A name is looked up anew each time: a test may put something else into its module.
    """
    home_of = _listed(sys.modules[package])
    names = sorted(home_of)

    def load(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home_of[name] == package:
            return importlib.import_module(f"{package}.{name}")
        return getattr(importlib.import_module(home_of[name]), name)

    return load, lambda: names, names


def _listed(package: Any) -> dict[str, str]:
    """The names under `if TYPE_CHECKING:` in a package's source, each with the module that it comes from."""
    tree = ast.parse(package.__loader__.get_source(package.__name__))
    checked = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in checked for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
