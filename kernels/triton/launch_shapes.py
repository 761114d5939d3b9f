"""With which blocks and how many warps the Triton kernels start: a table in a file, which a sweep on a device writes.

    {"schema": 1,
     "source": "not measured yet",   or {"device": "...", "date": "...", "commit": "..."}
     "divergence_rows": [[columns up to, block, warps], ...], and so on for every kernel in KERNELS}

A kernel's entries rise in their columns; the last one serves whatever is wider. For the row kernels, columns are those
of the logits and block the columns that a program reads at once; for merge_attention, columns are the head size and
block the elements of a program's tile. The environment variable OPCD_LAUNCH_SHAPES names another table.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
VARIABLE = "OPCD_LAUNCH_SHAPES"
PACKAGED = Path(__file__).with_suffix(".json")
KERNELS = ("divergence_rows", "logprob_rows", "merge_attention")
SOURCE_KEYS = ("device", "date", "commit")

_forced: dict[str, tuple[int, int]] = {}


class Shape(NamedTuple):
    columns: int  # up to so many
    block: int
    warps: int


class Table(NamedTuple):
    source: str | dict[str, str]
    shapes: dict[str, tuple[Shape, ...]]  # by kernel


def read_table(path: str | os.PathLike[str]) -> Table:
    """The table in a file. Raises ValueError that names the file and the entry, for one that no kernel could use."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the launch shapes in {path} cannot be read: {error}") from error
    keys = {"schema", "source", *KERNELS}
    if not isinstance(found, dict) or set(found) != keys or found["schema"] != SCHEMA:
        raise ValueError(
            f"the launch shapes in {path} are not a table of schema {SCHEMA}: it has the keys {', '.join(sorted(keys))}"
        )
    source = found["source"]
    if not isinstance(source, str) and not (isinstance(source, dict) and set(source) == set(SOURCE_KEYS)):
        raise ValueError(
            f"the launch shapes in {path}: source is {source!r}; expected a string, or {', '.join(SOURCE_KEYS)}"
        )
    return Table(source, {kernel: _shapes(found[kernel], f"{kernel} in {path}") for kernel in KERNELS})


def _shapes(entries: Any, where: str) -> tuple[Shape, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"the launch shapes of {where} are {entries!r}; expected [[columns up to, block, warps], ...]")
    before = 0
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 3 and all(type(number) is int for number in entry)):
            raise ValueError(f"the launch shapes of {where}: {entry!r} is not [columns up to, block, warps]")
        if entry[0] <= before:
            raise ValueError(f"the launch shapes of {where}: columns must rise, but {entry[0]} follows {before}")
        before = entry[0]
        _check(entry[1], entry[2], f"of {where}")
    return tuple(Shape(*entry) for entry in entries)


def _check(block: int, warps: int, where: str) -> None:
    powers = all(number > 0 and number & (number - 1) == 0 for number in (block, warps))
    if not powers or warps > 32 or not 128 * warps <= block <= 1 << 16:
        raise ValueError(
            f"the launch shapes {where}: block {block} with {warps} warps; both must be powers of two, with at most "
            "32 warps and a block from 128 a warp (one 128-bit load a lane) to 65536"
        )


@functools.cache
def _read_once(path: str) -> Table:
    return read_table(path)


def current_table() -> Table:
    """The table in use: the packaged one, or the file that OPCD_LAUNCH_SHAPES names; read once in a process."""
    path = os.environ.get(VARIABLE)
    if not path:
        return _read_once(str(PACKAGED))
    try:
        return _read_once(path)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={path}: {error}; unset it for the packaged table") from error


def launch_shape(kernel: str, columns: int) -> tuple[int, int]:
    """(block, warps) of a kernel for rows of so many columns."""
    if kernel in _forced:
        return _forced[kernel]
    shapes = current_table().shapes[kernel]
    return next((shape for shape in shapes if columns <= shape.columns), shapes[-1])[1:]


@contextmanager
def forced_shape(kernel: str, block: int, warps: int) -> Iterator[None]:
    """Within it, `kernel` starts with this shape whatever the table says: for sweeps, in one thread."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; expected one of {', '.join(KERNELS)}")
    _check(block, warps, f"forced on {kernel}")
    before = _forced.get(kernel)
    _forced[kernel] = (block, warps)
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before
