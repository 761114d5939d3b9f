"""What a sampler decided for itself, with its reasons, and where that is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.runtime import launched_rank, write_text


class Choice:
    """Decisions by name with their reasons, kept in a JSON file (or nowhere, with None)."""

    def __init__(self, file: str | Path | None = None) -> None:
        self.values: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}
        self._file = None if file is None else Path(file)
        self._written: dict[str, Any] = {}

    @classmethod
    def of_file(cls, file: str | Path) -> Choice:
        """What an earlier run decided; nothing where it did not get that far. Raises InputError for a damaged file."""
        choice = cls(file)
        if Path(file).is_file():
            try:
                kept = json.loads(Path(file).read_text(encoding="utf-8"))
                choice.values, choice._reasons = dict(kept["values"]), dict(kept["reasons"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(f"{str(file)!r} cannot be read ({error}); delete it to decide anew") from error
        choice._written = dict(choice.values)
        return choice

    def fixed(self, name: str, given: Any, reason: str) -> Any:
        """What the caller gave, else what the file holds, else None."""
        if given is not None:
            return self.set(name, given, f"{reason} was given")
        return self.values.get(name)

    def set(self, name: str, value: Any, reason: str) -> Any:
        self.values[name], self._reasons[name] = value, reason
        return value

    def write(self) -> None:
        """Only when something is new, where the folder exists, and by the first of several processes."""
        if self._file is None or self._written == self.values or not self._file.parent.is_dir() or launched_rank():
            return
        write_text(self._file, json.dumps({"values": self.values, "reasons": self._reasons}, indent=1) + "\n")
        self._written = dict(self.values)

    def explain(self) -> str:
        return "\n".join(f"{name}: {value} ({self._reasons.get(name)})" for name, value in self.values.items())
