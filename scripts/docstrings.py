"""How docstrings are shown on the site: a griffe extension (`make docs`).

In a docstring here an argument is told as `name: what it is`, at the beginning of a line. Markdown would run such lines
together; this makes list items of them.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

TOLD = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<rest>.*)")


def listed(text: str, names: set[str]) -> str:
    """`text` with a list item for each line that tells of some of `names`, up to a blank line."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = TOLD.fullmatch(line)
        if found and set(found["names"].split(", ")) <= names:
            lines += [""] if lines and not inside else []
            lines.append(f"- `{found['names']}`: {found['rest']}")
            inside = True
        else:
            inside = inside and bool(line)
            lines.append(line)
    return "\n".join(lines)


class ListedArguments(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = listed(func.docstring.value, {one.name for one in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            names = {*cls.members, *(one.name for one in getattr(cls.members.get("__init__"), "parameters", ()))}
            cls.docstring.value = listed(cls.docstring.value, names)
