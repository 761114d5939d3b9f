"""The one exception for mistakes that a user can correct, and the remedy that many of its messages name."""

from __future__ import annotations

import functools


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, what it was, and the remedy.

    The command line prints the message alone and exits with status 2.
    """


@functools.cache
def pip_install(extra: str) -> str:
    """The command that adds an extra, as this package was installed: from the index, or from a folder."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        found = json.loads(distribution("opcd-fast").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        found = {}
    if "dir_info" not in found:  # a file or the index
        return f"pip install 'opcd-fast[{extra}]'"
    editable = "-e " if found["dir_info"].get("editable") else ""
    return f"pip install --no-build-isolation {editable}'{unquote(urlsplit(found['url']).path)}[{extra}]'"
