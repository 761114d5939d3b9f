"""Rows out of files and Python objects: JSONL, JSON, CSV, parquet, folders, Hugging Face datasets, data frames, lists.

Every row comes with the words that name it in an error ("prompts file 'p.csv' line 7"). What a row means is decided
elsewhere.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError, pip_install

ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
NESTED = ("messages", "tools", "chat_template_kwargs")  # a cell that holds text holds them as JSON

Row = tuple[str, Any]  # where it stands, and what is there


def read_rows(source: Any, name: str, columns: Sequence[str] | None = None) -> list[Row]:
    """All rows of `source`, with where each stands.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet; .txt: one a line, if it is no JSONL; any other ending is
            read as JSONL), a folder (written by `Dataset.save_to_disk`, or holding files of one of these kinds), a
            `datasets.Dataset`, a pandas data frame, or an iterable of rows.
        name: what the source is, for errors.
        columns: of a data set, only these are decoded (it may hold images).
    Returns:
        (where, row) pairs. A row of a file or table is a dict in which cells without a value are missing; an iterable's
        rows are passed on as they are.
    Raises:
        InputError: what cannot be found or read, with the line; a package that is missing.
    """
    if isinstance(source, (str, Path)):
        if not str(source):
            raise InputError(f"{name} is an empty file name; give a file")
        path = Path(source)
        return _folder_rows(path, name, columns) if os.path.isdir(path) else _file_rows(path, name)
    kind = type(source).__module__.partition(".")[0]
    if kind == "datasets" and not isinstance(source, Mapping):
        return _dataset_rows(source, name, columns)
    if kind == "pandas" and hasattr(source, "columns"):
        return _table_rows(source.to_dict(orient="records"), name)
    if isinstance(source, Mapping) and kind == "datasets":
        raise InputError(f"{name} holds several splits ({', '.join(source)}); choose one, such as data['train']")
    if not isinstance(source, Iterable) or isinstance(source, (Mapping, bytes)):
        raise InputError(f"{name} is a {type(source).__name__}; give a JSONL file or a list of prompts")
    return [(f"{name}[{index}]", row) for index, row in enumerate(source)]


def read_text(path: Path, name: str) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors write. Raises InputError."""
    if not os.path.isfile(path):  # Path's own fails for what is too long for a name
        raise InputError(f"{name} file {str(path)!r} does not exist")
    try:
        # newline="": text mode would turn a lone \r inside a cell into a line end.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} file {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _file_rows(path: Path, name: str) -> list[Row]:
    kind, where = ENDINGS.get(path.suffix.lower(), "jsonl"), f"{name} file {str(path)!r}"
    if kind == "parquet":
        return _parquet_rows(path, where)
    text = read_text(path, name)
    if path.suffix.lower() == ".txt" and text.lstrip()[:1] not in "{[":
        return [(f"{where} line {n}", line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}[kind](text, where)


def _jsonl_rows(text: str, where: str) -> list[Row]:
    """One JSON value a line; empty lines are skipped."""
    rows = []
    # Not splitlines(): JSON text may hold U+2028 and others that Python takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"{where} line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                remedy = "" if line.lstrip()[:1] in '{["' else '; a line is {"prompt": "..."}'
                wrong = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{where} line {number} is not valid JSON: {wrong}{remedy}") from error
    return rows


def _json_rows(text: str, where: str) -> list[Row]:
    """A list of rows, under a key or not; one row; or a value a line, as many a .json has it."""
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            return _jsonl_rows(text, where)
        raise InputError(f"{where} is not valid JSON: {error}") from error
    if isinstance(value, dict):
        inner = list(value.values())
        if value.keys() & {"prompt", "messages"}:
            value = [value]
        elif len(inner) == 1 and isinstance(inner[0], list):
            value = inner[0]
    if not isinstance(value, list):
        raise InputError(f"{where} must hold a list of rows, not a {type(value).__name__}")
    return [(f"{where} row {number}", row) for number, row in enumerate(value, 1)]


def _csv_rows(text: str, where: str) -> list[Row]:
    header = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=header.count)  # the comma when there is none: a single column
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter)
    names: list[str] = []
    rows: list[Row] = []
    start = 1
    try:
        for cells in reader:
            place, start = f"{where} line {start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if len(set(names)) < len(names):
                    raise InputError(f"{place} names a column twice: {', '.join(names)}")
                continue
            if len(cells) > len(names):
                raise InputError(
                    f"{place} has {len(cells)} cells, but the header names {len(names)}; put text that "
                    f"holds {delimiter!r} into double quotes"
                )
            # An empty cell is a missing one: CSV cannot tell the two apart.
            row = {column: cell for column, cell in zip(names, cells) if cell != ""}
            rows.append((place, _parsed_cells(row, place)))
    except csv.Error as error:
        raise InputError(f"{where} line {reader.line_num} is not valid CSV: {error}") from error
    return rows


def _parquet_rows(path: Path, where: str) -> list[Row]:
    if not os.path.isfile(path):
        raise InputError(f"{where} does not exist")
    parquet = require("pyarrow.parquet", "reading parquet files", "data")
    try:
        rows = parquet.ParquetFile(path).read().to_pylist()
    except Exception as error:  # pyarrow's own, and OSError
        raise InputError(f"{where} cannot be read as parquet: {' '.join(str(error).split())}") from error
    return _table_rows(rows, where)


def _folder_rows(path: Path, name: str, columns: Sequence[str] | None) -> list[Row]:
    where = f"{name} folder {str(path)!r}"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        datasets = require("datasets", "reading a folder of a data set", "data")
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:
            raise InputError(f"{where} cannot be read as a data set: {' '.join(str(error).split())}") from error
        if isinstance(loaded, Mapping):
            choices = ", ".join(repr(str(path / split)) for split in loaded)
            raise InputError(f"{where} holds several splits; give one of them: {choices}")
        return _dataset_rows(loaded, where, columns)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no data"
        raise InputError(
            f"{where} holds {found}; give a file, or a folder with one kind of "
            f"{', '.join(ENDINGS)} or one written by Dataset.save_to_disk"
        )
    return [row for file in files for row in _file_rows(file, name)]


def _dataset_rows(data: Any, name: str, columns: Sequence[str] | None) -> list[Row]:
    wanted = [column for column in data.column_names or () if columns is None or column in columns]
    return _table_rows((data.select_columns(wanted) if wanted else data).with_format(None), name)


def _table_rows(rows: Iterable[Mapping[str, Any]], where: str) -> list[Row]:
    """Rows of a typed table: a null is a missing value there, at any depth."""
    placed = ((f"{where} row {number}", row) for number, row in enumerate(rows, 1))
    return [(place, _parsed_cells(_without_nulls(row), place)) for place, row in placed]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if not _is_null(item)}
    if type(value).__name__ == "ndarray":  # pandas hands out nested lists of parquet files as arrays
        value = value.tolist()
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_null(value: Any) -> bool:
    not_a_number = isinstance(value, float) and value != value
    return value is None or not_a_number or type(value).__name__ in ("NAType", "NaTType")


def _parsed_cells(row: dict[str, Any], where: str) -> dict[str, Any]:
    for column in NESTED:
        cell = row.get(column)
        if isinstance(cell, str) and cell.strip():
            try:
                row[column] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: column {column!r} must hold JSON: {error}") from error
    return row


def require(module: str, what: str, extra: str) -> Any:
    """The module. Raises InputError where its package, or one that it needs, is missing: `extra` brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise InputError(f"{what} needs the package {package!r}: {pip_install(extra)}") from error
