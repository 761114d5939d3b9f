"""How a server gets the weights that are being trained."""

from __future__ import annotations

import hashlib
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.rollout.http import JsonServer, Refused
from opcd_fast.rollout.protocol import weights_version
from opcd_fast.runtime import redacted, write_folder

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def rank_for_vllm(rank: int) -> int:
    """The smallest that vLLM takes for adapters of this rank. Raises InputError."""
    if rank > LORA_RANKS[-1]:
        raise InputError(f"lora_rank={rank} is more than vLLM's {LORA_RANKS[-1]}; lower it, or use rollout_command")
    return next(size for size in LORA_RANKS if size >= rank)


class AdapterFolder:
    """Adapters on disk, each under a name that this object and the content decide: no two processes share one."""

    def __init__(self, folder: str | Path, name: str = "opcd") -> None:
        self.folder = Path(folder).absolute()
        self.name = name
        self.own_name = f"{name}-{secrets.token_hex(4)}"
        self._version: Any = None
        self._written: Path | None = None

    def write(self, model: Any) -> Path:
        """The folder that holds `model`'s adapter as it is now; written only when the weights moved."""
        if not hasattr(model, "peft_config"):
            raise InputError(
                "this engine gets LoRA adapters, and the model has none: set lora_rank, or use rollout='server' with "
                "rollout_command"
            )
        version = weights_version(model)
        if self._written is not None and version == self._version:
            return self._written
        scratch = self.folder / f"{self.own_name}-new"
        _save(scratch, model)
        target = self.folder / f"{self.own_name}-{_digest(scratch)}"
        if target.exists():
            shutil.rmtree(scratch)
        else:
            scratch.rename(target)
        self._version, self._written = version, target
        return target

    def others(self, kept: Path) -> list[Path]:
        """Versions before `kept`, those of an earlier process included."""
        return [path for path in sorted(self.folder.glob(f"{self.name}-*")) if path != kept]

    def keep_only(self, kept: Path) -> None:
        for path in self.others(kept):
            shutil.rmtree(path, ignore_errors=True)


class LoRAWeights:
    """The adapter, through vLLM's endpoints for loading LoRA adapters at run time.

    The adapter is saved to `folder/<name>`, which the server must be able to read under the same path, and loaded
    under a name that its content and this object decide, so that no cache of the server can mix two versions, or two
    runs. Only the newest stays. The server needs `--enable-lora --max-lora-rank R` and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

    Args:
        folder: where adapters are written. name: what their names begin with.
    """

    def __init__(self, folder: str | Path, name: str = "opcd") -> None:
        self._adapters = AdapterFolder(folder, name)
        self._loaded: str | None = None

    def push(self, server: JsonServer, model: Any) -> str:
        path = self._adapters.write(model)
        if path.name != self._loaded:
            self._load(server, path.name)
            for old in self._adapters.others(path):
                self._forget(server, old.name)
            self._adapters.keep_only(path)
            self._loaded = path.name
        return path.name

    def lost(self, server: JsonServer, name: str) -> str:
        self._load(server, name)
        return name

    def _load(self, server: JsonServer, name: str) -> None:
        try:
            server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._adapters.folder / name)})
        except Refused as error:
            if "already" in str(error):  # the answer to an earlier try was lost on the way
                return
            if error.status in (404, 405) and "adapter" not in str(error).lower():
                raise InputError(
                    f"{server.url} has no /v1/load_lora_adapter; start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or give rollout_command for another server"
                ) from error
            if found := re.search(r"LoRA rank (\d+) is greater than max_lora_rank", str(error)):
                raise InputError(
                    f"rollout server {server.url}: {error}; start it with --max-lora-rank "
                    f"{rank_for_vllm(int(found[1]))}, or lower lora_rank"
                ) from error
            raise

    def _forget(self, server: JsonServer, name: str) -> None:
        try:
            server.post("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != 404:  # 404: the server was started anew in between
                raise


class CommandWeights:
    """Anything else: the weights are saved, then a command (or function) makes the server load them.

    Args:
        folder: the adapter or the whole model is written to `folder/weights`, the same place every time.
        model_name: what the server calls the model.
        command: run with the folder as its last argument; must return 0 when the server answers with the new weights.
            Or a function of the folder, which may return a new model name.
        timeout: seconds for the command.
    """

    def __init__(
        self,
        folder: str | Path,
        model_name: str,
        command: str | Callable[[Path], str | None],
        *,
        timeout: float = 600.0,
    ) -> None:
        self.folder = Path(folder).absolute() / "weights"
        self.model_name, self.command, self.timeout = model_name, command, timeout
        self._version: Any = None

    def push(self, server: JsonServer, model: Any) -> str:
        version = weights_version(model)
        if version != self._version:
            _save(self.folder, model)
            self._reload()
            self._version = version
        return self.model_name

    def lost(self, server: JsonServer, name: str) -> str:
        self._reload()
        return self.model_name

    def _reload(self) -> None:
        if callable(self.command):
            self.model_name = self.command(self.folder) or self.model_name
            return
        words: Sequence[str] = [*shlex.split(self.command), str(self.folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise InputError(f"rollout_command did not end within {self.timeout:g} s") from None
        except OSError as error:
            raise InputError(f"rollout_command cannot be run: {error.strerror}") from error
        if done.returncode:  # what it says may repeat what it was given
            said = redacted(" ".join((done.stderr or done.stdout).split()), *words[1:-1])[-200:]
            raise InputError(f"rollout_command failed with status {done.returncode}: {said}")


def _save(folder: Path, model: Any) -> None:
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    write_folder(folder, lambda scratch: model.save_pretrained(scratch, **options))


def _digest(folder: Path) -> str:
    """Of the content of every weight file and of the adapter's settings, 12 hexadecimal digits."""
    total = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in [*weights, folder / "adapter_config.json"]:
        total.update(file.read_bytes())
    return total.hexdigest()[:12]
