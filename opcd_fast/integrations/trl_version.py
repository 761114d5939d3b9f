"""Which TRL the integration was written for. Its hooks are private and move between minor versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

TESTED = (1, 16)


def check_trl() -> None:
    """Raise ImportError when TRL is missing or is another minor version than the one whose hooks are known."""
    wanted = f"{TESTED[0]}.{TESTED[1]}"
    remedy = f"pip install 'trl>={wanted},<{TESTED[0]}.{TESTED[1] + 1}'"
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise ImportError(f"opcd_fast.integrations.trl needs trl: {remedy}") from error
    if tuple(found.split(".")[:2]) != (str(TESTED[0]), str(TESTED[1])):
        raise ImportError(
            f"trl {found} is installed, and the hooks that opcd_fast.integrations.trl uses are private and known of "
            f"{wanted} only: {remedy}"
        )
