"""A folder of prefixes, so that a second run does not read its contexts again.

One safetensors file for each prefix (`SharedPrefix.save`), named after everything its numbers depend on. A file also
holds that key and a checksum of its tensors. What does not match is refused with one line in the log, and rebuilt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from opcd_fast import fingerprint
from opcd_fast import transformers_seam as seam
from opcd_fast.prefix import SharedPrefix, describe

logger = logging.getLogger("opcd_fast")

FORMAT = 1
"""Raised when the meaning of a key or the layout of a file changes; older files are then not found."""

_ABANDONED_SECONDS = 24 * 3600  # a partial file this old has lost its writer
# Entries of a configuration that no key or value depends on.
_WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


class PrefixStore:
    """Prefixes in `folder`, which is made when the first one is written.

    Several processes may share it: a file appears whole, by renaming, or not at all. Trust the folder as you trust the
    weights: the checksum is a guard against accidents only.

    Raises ValueError when `folder` is something else than a folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"store: {os.fspath(folder)!r} is not a folder")
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished."""
        for partial in self.folder.glob("*.safetensors.*.partial"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()

    def path_of(self, identity: str, token_ids: Tensor) -> Path:
        """Where the prefix of `token_ids` is kept for the teacher that `identity_of` describes."""
        return self.folder / f"{_key(identity, token_ids)}.safetensors"

    def read(
        self, identity: str, token_ids: Tensor, model: nn.Module, device: torch.device | None = None
    ) -> SharedPrefix | None:
        """The prefix on `device`, None for `model`'s; None when there is none, or none that can be trusted."""
        path = self.path_of(identity, token_ids)
        if not path.is_file():
            return None
        try:
            prefix = SharedPrefix.load(path, model=model, device=device)
            metadata = dict(prefix.metadata)
            if metadata.pop("store_key", None) != path.stem:
                raise ValueError("it was written for another teacher or context")
            if not torch.equal(prefix.token_ids, token_ids):
                raise ValueError("it holds other token ids")
            if metadata.pop("checksum", None) != fingerprint.of_tensors(prefix.tensors().items()):
                raise ValueError("its checksum does not match")
        except (ValueError, OSError, RuntimeError) as error:
            logger.warning("prefix store: %s is refused and will be rebuilt: %s", path.name, error)
            return None
        return dataclasses.replace(prefix, metadata=metadata)

    def write(self, identity: str, prefix: SharedPrefix) -> None:
        """Keep `prefix`; a folder that cannot be written to is told in the log and changes nothing else."""
        path = self.path_of(identity, prefix.token_ids)
        metadata = {
            **prefix.metadata,
            "store_key": path.stem,
            "checksum": fingerprint.of_tensors(prefix.tensors().items()),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            dataclasses.replace(prefix, metadata=metadata).save(path)
        except Exception as error:  # safetensors raises its own type for a full disk
            logger.warning("prefix store: %s was not written: %s", path.name, error)


def identity_of(model: nn.Module, weights: str, stored: torch.dtype | None = None) -> str:
    """All that a prefix depends on besides its token ids, as JSON.

    The format of this store; transformers' version; the body's class, dtype and whole configuration, RoPE included;
    its attention function; autocast; weights, buffers and adapters (`weights`, from `fingerprint.of_teacher`); the type
    that keys and values are kept in, unless it is the model's (`stored`).
    """
    body = seam.body_of(model)
    device = next(body.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    config = {
        name: value
        for name, value in seam.config_of(body).to_dict().items()
        if name not in _WITHOUT_EFFECT and not name.startswith("_attn")
    }
    return json.dumps(
        {
            "format": FORMAT,
            "transformers": transformers.__version__,
            "body": describe(body),
            "config": config,
            "attention": seam.config_of(body)._attn_implementation,
            "autocast": autocast,
            "weights": weights,
            **({} if stored is None else {"stored": str(stored)}),
        },
        sort_keys=True,
        default=str,
    )


def _key(identity: str, token_ids: Tensor) -> str:
    ids = token_ids.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(identity.encode() + b"\0" + ids).hexdigest()
