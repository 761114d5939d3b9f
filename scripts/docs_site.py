"""What the site needs beside docs/: a hook of mkdocs (`make docs`).

Pages link to files of the repository outside docs/, as `../experiments/results/persona.md`, so that the links work
where the pages are read in the repository. Here these files become part of the site, under `files/`, with their own
links, which mkdocs then checks as it checks all others. A link to a folder becomes plain text.

`<!-- settings -->` on a page becomes the table of all settings, `<!-- commands -->` that of the commands.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
DOCS, OUTSIDE = "docs/", "files/"
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def in_repository(page: str) -> str:
    """Where a page of the site comes from: `data.md` from docs/data.md, `files/README.md` from README.md."""
    return page.removeprefix(OUTSIDE) if page.startswith(OUTSIDE) else DOCS + page


def published(path: str) -> str:
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path


def targets(page: str, text: str) -> set[str]:
    """Files outside docs/ that a page links to, from the repository's root."""
    here = posixpath.dirname(in_repository(page))
    links = (posixpath.normpath(posixpath.join(here, link["path"])) for link in LINK.finditer(FENCE.sub("", text)))
    return {path for path in links if not path.startswith((DOCS, "..")) and (ROOT / path).is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Add what is linked to, and what that links to."""
    waiting = {page.src_uri: page.content_string for page in files.documentation_pages()}
    while waiting:
        name, text = waiting.popitem()
        for path in targets(name, text):
            if files.get_file_from_path(published(path)) is None:
                added = File.generated(
                    config, published(path), abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(added)
                if path.endswith(".md"):
                    waiting[added.src_uri] = added.content_string
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    site = page.file.src_uri
    here, there = posixpath.dirname(in_repository(site)), posixpath.dirname(site)

    def rewritten(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link["path"]))
        if (ROOT / path).is_dir():
            return link["text"].strip("[]")
        return f"{link['text']}({posixpath.relpath(published(path), there or '.')}{link['anchor'] or ''})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    text = "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
    for mark, table in (("<!-- settings -->", settings), ("<!-- commands -->", commands)):
        text = text.replace(mark, table()) if mark in text else text
    return text


def settings() -> str:
    """Every setting with its default and meaning, under the titles that `opcd train --help-all` has."""
    sys.path.insert(0, str(ROOT))
    from opcd_fast.training.settings import OPCDConfig, settings_of

    lines, group = [], None
    for field, known in settings_of(OPCDConfig):
        if known.group != group:
            group = known.group
            lines += ["", f"## {group}", "", "| setting | default | |", "|---|---|---|"]
        help = known.help.replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {help} |")
    return "\n".join(lines)


def commands() -> str:
    sys.path.insert(0, str(ROOT))
    from opcd_fast.commands import COMMANDS

    return "\n".join(["| | |", "|---|---|", *(f"| `opcd {name}` | {what} |" for name, what in COMMANDS.items())])
