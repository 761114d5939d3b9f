"""Text for people and files, without what its owner alone may know, and without what a terminal would obey."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # not tab, line end
KEYS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")  # names of environment variables that hold one


def redacted(text: str, *secrets: str) -> str:
    """`text` without users, passwords and queries of addresses, `secrets` of four letters or more, and the keys of the
    environment."""
    text = re.sub(r"(^(?!\S*://)|://)[^\s'\"]*@", rf"\1{HIDDEN}@", text)
    text = re.sub(r"(\S)[?#][^\s'\"]+", rf"\1?{HIDDEN}", text)
    keys = (value for name, value in os.environ.items() if KEYS.search(name) and len(value) >= 8)
    for secret in (*(one for one in secrets if len(one) >= 4), *keys):
        text = text.replace(secret, HIDDEN)
    return text


def printable(text: str) -> str:
    """`text` with control characters, those that turn the direction of writing, and half ones written out as \\x1b."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
