"""Ctrl-C and SIGTERM as something a loop can live with: work that can be made again stops at once, the rest is
finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal. `status` is the exit status shells expect: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        return 128 + self.number


class Interruption:
    """Handles SIGINT and SIGTERM while it is entered; only in the main thread, elsewhere signals keep their meaning.

    The first signal raises `Interrupted` where the code is `abandonable()`, or else as soon as it becomes so. A Ctrl-C
    after it is an ordinary KeyboardInterrupt; a second SIGTERM is ignored, because supervisors send one to the process
    and one to its group.

    agree: for several ranks, which must stop at the same place: given this rank's signal number or None, the number
    that all stop for, or None. All ranks ask it where something abandonable begins; nothing is abandoned half-way.
    """

    def __init__(self, agree: Callable[[int | None], int | None] | None = None) -> None:
        self._agree = agree
        self._pending: int | None = None
        self._abandonable = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._before = {}

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """What happens inside changes nothing that lasts: a signal raises `Interrupted` here."""
        self._abandonable = self._agree is None
        try:
            self.check()
            yield
        finally:
            self._abandonable = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal came while that was not possible."""
        number = self._pending if self._agree is None else self._agree(self._pending)
        if number is not None:
            raise Interrupted(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._pending is None:
            self._pending = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._abandonable:
            self.check()
