"""What a run was made of, as hashes, and whether that is still so. Needs neither torch nor transformers.

A hash of a file is SHA-256 over its bytes. It is kept in the cache folder with the file's size and times, so that
gigabytes of weights are read again only when one of these has moved. Files of the hub's cache are named by their hash
already.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.models import SMOLLM2, Place, cache_dir, is_path, place_of
from opcd_fast.runtime import misfit, read_object, write_file

Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "sha256": hexadecimal}

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
RACY_SECONDS = 2.0  # a file changed this shortly before it was hashed may change again without its times moving


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value; the order of an object's keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class FileHashes:
    """SHA-256 of files, kept in `kept` (None: `file-hashes.json` in the cache folder) by path, size and times.

    again: read every file, whatever is kept.
    """

    def __init__(self, kept: Path | None = None, again: bool = False) -> None:
        self._path = kept or cache_dir() / "file-hashes.json"
        self._again = again
        self._kept: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            self._kept = found if isinstance(found, dict) else {}

    def of(self, path: Path) -> str:
        """Hexadecimal SHA-256 of the file's bytes. Raises InputError when it cannot be read."""
        try:
            real = path.resolve()
            named = re.fullmatch(r"[0-9a-f]{64}", real.name)
            if named and real.parent.name == "blobs" and not self._again:  # the hub's cache: large files by SHA-256
                return real.name
            state = self._state(real)
            kept = self._kept.get(str(real))
            if not self._again and isinstance(kept, list) and kept[:-1] == state:
                return kept[-1]
            found = content_of(real)["sha256"]
            if self._state(real) == state and time.time() - max(state[1], state[2]) / 1e9 > RACY_SECONDS:
                self._keep(str(real), [*state, found])
            return found
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error

    @staticmethod
    def _state(path: Path) -> list[int]:
        """Size, and nanoseconds of the last change of content and of status: the first can be set by hand."""
        found = path.stat()
        return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]

    def _keep(self, name: str, entry: list[Any]) -> None:
        """Best effort: without it the next hash takes longer, and is right all the same."""
        self._kept[name] = entry
        with contextlib.suppress(OSError):
            write_file(self._path, json.dumps(self._kept))


def content_of(path: Path, most: int | None = None) -> dict[str, Any]:
    """Size and SHA-256 of a file, of its first `most` bytes if given. Raises InputError when it cannot be read."""
    seen, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 22 if most is None else min(1 << 22, most - size)):
                seen.update(block)
                size += len(block)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return {"size": size, "sha256": seen.hexdigest()}


def weight_files(place: Place, hashes: FileHashes) -> Files:
    """Weights and settings of a model: what decides its numbers, without the tokenizer."""
    if place.source is not None:
        paths = [place.source]
    else:
        every = sorted(path for path in place.folder.iterdir() if path.is_file())
        paths = [p for p in every if p.suffix == ".safetensors"] or [p for p in every if p.suffix in (".bin", ".pt")]
        paths += [p for p in every if p.name in ("config.json", "generation_config.json", "adapter_config.json")]
    return {path.name: {"size": path.stat().st_size, "sha256": hashes.of(path)} for path in paths}


def tokenizer_files(folder: Path, hashes: FileHashes) -> Files:
    """Files of a tokenizer; its chat template, which has a hash of its own, is left out of tokenizer_config.json."""
    files: Files = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        files[name] = {"size": path.stat().st_size, "sha256": hashes.of(path)}
        if name == "tokenizer_config.json":
            settings = read_object(path)
            settings.pop("chat_template", None)
            files[name] = {"size": None, "sha256": hash_of(settings)}
    return files


def template_in(folder: Path) -> str | dict[str, str] | None:
    """The chat template that a tokenizer loaded from `folder` has: text, named ones, or None.

    Where each version of transformers keeps it: chat_template.jinja and additional_chat_templates/, before that
    tokenizer_config.json.
    """
    single = folder / "chat_template.jinja"
    if single.is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        text = _text(single)
        return {"default": text, **{path.stem: _text(path) for path in more}} if more else text
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):
        if why := misfit(found, [{"name": str, "template": str}], "chat_template"):
            raise InputError(f"{str(config)!r} is damaged: {why}")
        return {row["name"]: row["template"] for row in found}
    return found


def template_hash(template: Any) -> str | None:
    """Of text, of {name: text}, or None for a tokenizer without any."""
    return None if template is None else hash_of(template)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error


def of_model(name: str | None, hashes: FileHashes) -> dict[str, Any]:
    """Name, commit and files of a model; no files for one that exists in memory only. A folder's name is made whole."""
    place = _place_or_none(name)
    if place is None:
        return {"name": None, "commit": None, "files": {}}
    return {"name": _whole(name), "commit": place.commit, "files": weight_files(place, hashes)}


def of_tokenizer(name: str | None, template: Any, hashes: FileHashes) -> dict[str, Any]:
    """Name, files and the template as it was used, which need not be that of the files."""
    place = _place_or_none(name)
    files = tokenizer_files(place.folder, hashes) if place is not None else {}
    return {"name": _whole(name) if files else None, "files": files, "template_sha256": template_hash(template)}


def _place_or_none(name: str | None) -> Place | None:
    """A model made in memory may carry any name."""
    with contextlib.suppress(InputError):
        return place_of(name) if name else None
    return None


def _whole(name: str | None) -> str | None:
    """A folder's name that means the same from everywhere."""
    return str(Path(name).expanduser().resolve()) if name and name != SMOLLM2 and is_path(name) else name


def of_code() -> dict[str, Any]:
    """Version of this package, and the commit when it runs from a checkout; `changed`: it has edits besides."""
    from opcd_fast import __version__

    code: dict[str, Any] = {"version": __version__, "commit": None, "changed": None}
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return code
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        code["commit"] = _git(root, "rev-parse", "HEAD").strip()
        code["changed"] = bool(_git(root, "status", "--porcelain", "--", "opcd_fast", "kernels").strip())
    return code


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True).stdout


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of files, in words; empty when nothing does."""
    found = [f"{name} is gone" for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before]
    changed = (name for name in before if name in now and before[name]["sha256"] != now[name]["sha256"])
    return sorted([*found, *(f"{name} has other content" for name in changed)])
