"""Files and folders that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError

UNFINISHED = ".opcd-new"  # how names end of what is being written; a killed process leaves them


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a scratch folder, then put it in place of `path` by renaming.

    A crash at any moment leaves the old folder or the new one, never a mixture.
    Raises InputError when the place cannot be written, or not be renamed.
    """
    check_replaceable(path)
    scratch = _beside(path)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {str(path.parent)!r}: {error.strerror}") from error
    aside = _beside(path)
    try:
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


def check_replaceable(path: Path, name: str = "") -> None:
    """Raises InputError, which begins with `name`, for a file, a mount point and the folder that the user stands in."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{name}{str(path)!r} is a file; choose a folder")
    if os.path.ismount(path.resolve()) or path.resolve() == Path.cwd():
        raise InputError(f"{name}{str(path)!r} cannot be replaced by another folder; name one inside of it")


def write_file(path: Path, content: str | bytes) -> None:
    """Atomic replacement of a file; text as UTF-8. Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(path)
    try:
        with open(scratch, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_file`. Raises InputError when it cannot be written."""
    try:
        write_file(path, text)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def remove_folder(path: Path) -> None:
    """Hidden first: half of it removed would look whole."""
    shutil.rmtree(path.rename(_beside(path)), ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes were writing in `folder`, at any depth."""
    for scratch in folder.rglob(f".*{UNFINISHED}"):
        shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)


def read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with `remedy`, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}{remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object{remedy}")
    return value


def _beside(path: Path) -> Path:
    """A name for what shall become `path`. Not tempfile's, whose files only their owner may read: here the umask
    decides."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}"


def _sync(folder: Path) -> None:
    """Onto the disk, readable for whom the umask says: safetensors lets the owner alone read what it writes."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
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
