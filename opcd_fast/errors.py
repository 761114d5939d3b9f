"""The one exception for mistakes that a user can correct."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, what it was, and the remedy.

    The command line prints the message alone and exits with status 2.
    """
