"""Tells weights, and any tensors, apart by every byte they hold; fast enough to do whenever a file is used.

A tensor is read as 64-bit words x_i, in runs of 2^17 words. Each run gives one number, the sum of x_i w_i modulo 2^64
with fixed odd pseudo-random w_i, and SHA-256 over those numbers, the last bytes, shape, dtype and name is the result.
Integer sums are exact, so that every device gives the same one. A single changed word always changes it (an odd factor
has an inverse modulo 2^64), and so do swapped and moved values, which a plain sum would miss. It is a guard against
accidents; somebody who constructs a collision can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast import transformers_seam as seam

_WORDS = 1 << 17  # of a run: small enough for a CPU's cache
_RUNS_AT_ONCE = {"cpu": 1}
_RUNS_ON_DEVICES = 64  # one launch for 64 MiB


class NoFingerprintError(ValueError):
    """Some weights cannot be read as plain bytes; the message says which."""


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal SHA-256 over names, shapes, dtypes and every byte of the tensors, in the order given.

    Weights that bitsandbytes packed to 4 bits are described by their bytes and all of their scales. Raises
    NoFingerprintError for other tensor subclasses (quantized, distributed), whose meaning is not all in their bytes,
    and for tensors without data.
    """
    seen = hashlib.sha256()
    factors: dict[torch.device, Tensor] = {}
    for name, x in (part for whole in named for part in described(*whole)):
        if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided:
            raise NoFingerprintError(f"{name} is a {type(x).__name__}, which plain bytes do not describe")
        if x.is_meta:
            raise NoFingerprintError(f"{name} has no data (device meta)")
        if x.device not in factors:
            factors[x.device] = _factors(x.device)
        seen.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        seen.update(_sums(x.detach(), factors[x.device]))
    return seen.hexdigest()


def described(name: str, x: Tensor) -> list[tuple[str, Tensor]]:
    """Plain tensors that together say what a packed weight is; any other tensor is its own only part."""
    state: Any = getattr(x, "quant_state", None)
    if state is None or not hasattr(state, "as_dict"):
        return [(name, x)]
    described = state.as_dict(packed=True)
    return [(name, x.detach().as_subclass(Tensor)), *((f"{name}.{key}", described[key]) for key in sorted(described))]


def _factors(device: torch.device) -> Tensor:
    """(_WORDS,) odd int64: a counter through a multiply-xorshift mixer; products wrap modulo 2^64."""
    x = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device) * -7046029254386353131
    x = (x ^ (x >> 29)) * -4658895280553007687
    return (x ^ (x >> 32)) | 1


def _sums(x: Tensor, factors: Tensor) -> bytes:
    flat = x.contiguous().view(-1)
    if flat.numel() == 0:
        return b""
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words must begin at a multiple of 8 bytes
    raw = flat.view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words, rest = raw[:whole].view(torch.int64), raw[whole:]
    runs = words.numel() // _WORDS
    step = _RUNS_AT_ONCE.get(x.device.type, _RUNS_ON_DEVICES)
    table = words[: runs * _WORDS].view(runs, _WORDS)
    sums = [(table[i : i + step] * factors).sum(1) for i in range(0, runs, step)]
    last = words[runs * _WORDS :]
    sums.append((last * factors[: last.numel()]).sum().view(1))
    return torch.cat(sums).cpu().numpy().astype("<i8").tobytes() + rest.cpu().numpy().tobytes()


def of_teacher(model: nn.Module, adapter: str) -> str:
    """Fingerprint of what a forward pass of the teacher reads: weights, buffers and, when they act, adapters.

    adapter: "disabled" leaves PEFT's own parameters out, so that the base model has the same fingerprint with and
    without PEFT around it. The lm-head is left out: no key or value depends on it. Not seen: hooks, and code that was
    changed at run time. Raises NoFingerprintError, see `of_tensors`.
    """
    body = seam.body_of(model)
    read: list[tuple[str, Tensor]] = list(body.named_parameters())
    if adapter == "disabled":
        base = {id(p) for p in seam.base_parameters(model)}
        read = [(_without_wrappers(name), p) for name, p in read if id(p) in base]
    elif seam.adapter_modules(model):
        read.append(("adapters " + _adapters(model), torch.empty(0)))
    return of_tensors([*read, *((f"buffer {name}", x) for name, x in body.named_buffers())])


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _adapters(model: nn.Module) -> str:
    """What PEFT's layers do besides their parameters: which act, how strongly, and how they were configured."""
    modules: list[Any] = list(seam.adapter_modules(model))
    strengths = [(type(m).__name__, getattr(m, "scaling", None)) for m in modules]
    peft: dict[str, Any] = getattr(model, "peft_config", {})
    configs = {name: config.to_dict() for name, config in peft.items()} if isinstance(peft, dict) else str(peft)
    return json.dumps([seam.adapter_state(model), strengths, configs], sort_keys=True, default=_as_json)


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
