"""Files and folders that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from opcd_fast.errors import InputError


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a scratch folder, then put it in place of `path` by renaming.

    A crash at any moment leaves the old folder or the new one, never a mixture.
    Raises InputError when the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from error
    aside = scratch.with_name(scratch.name + ".old")
    try:
        scratch.chmod(0o755)
        fill(scratch)
        _sync(scratch)
        if path.exists():
            path.rename(aside)
        scratch.rename(path)
        _sync_folder(path.parent)
    except Exception as error:  # a full disk comes as OSError, or as an error of safetensors' or torch's own
        raise InputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if aside.exists() and not path.exists():
            aside.rename(path)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Atomic replacement of a file; text as UTF-8. Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_file`. Raises InputError when it cannot be written."""
    try:
        write_file(path, text)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
