"""One process at a time writes into a run's folder."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from pathlib import Path

from opcd_fast.errors import InputError

logger = logging.getLogger("opcd_fast")
LOCK = "run.lock"


class RunLock:
    """`run.lock` in `folder`: who writes there, {"pid", "host"}, held by the operating system as long as that process
    lives. What a killed one left is taken over; on another host nobody can tell whether it lives."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._handle: int | None = None

    def take(self) -> None:
        """Raises InputError where another process has it, or a process on another host had it last."""
        if self._handle is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise InputError(f"cannot write {str(self._path)!r}: {error.strerror or error}") from error
        try:
            self._claim(handle)
        finally:
            if self._handle is None:
                os.close(handle)
        self.take()  # again, where its owner removed the file before it was locked here

    def _claim(self, handle: int) -> None:
        free, (pid, host) = _locked(handle), _owner(os.pread(handle, 4096, 0))
        where, here = f"output_dir={str(self._path.parent)!r}", socket.gethostname()
        if not free:
            raise InputError(f"{where}: process {pid} on host {host!r} writes there; wait, or take another folder")
        if not _is_at(self._path, handle):
            return
        if host not in (None, here):
            raise InputError(
                f"{where}: process {pid} on host {host!r} writes there, or was killed; this is {here!r}, which cannot "
                f"tell: if it is gone, remove {str(self._path)!r}"
            )
        if pid not in (None, os.getpid()):
            logger.warning("%s was left by process %s, which is gone; this one takes over", self._path, pid)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": here}).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _locked(handle: int) -> bool:
    """Whether the file is this process's now. Record locks: a child does not inherit them, and NFS keeps them."""
    import fcntl

    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("this file system has no locks (%s): see yourself that no other process writes there", error)
    return True


def _is_at(path: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _owner(text: bytes) -> tuple[int | None, str | None]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(text)
        return int(found["pid"]), str(found["host"])
    return None, None
