"""Whether what was written computes what was trained: logits of the exported files against those of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.models import seam

ROWS, LENGTH = 2, 48
"""Probe: rows of random token ids. Few, as their logits are (ROWS, LENGTH, V) in float32."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest relative error of the logits (RMS over RMS). float32: another order of summation. The others: each weight is
off by up to 2^-11 (float16) or 2^-9 (bfloat16) of itself, and the errors of a few hundred products in a row add up."""

LOST = 0.5
"""An error above this share of what the adapter changed means that the rounding took what was learned."""


@dataclass(frozen=True)
class Probe:
    """Logits (ROWS, LENGTH, V), float32 on the CPU, of the trained model; base: without its adapter, if it has one."""

    ids: Tensor
    trained: Tensor
    base: Tensor | None


@dataclass(frozen=True)
class LogitError:
    """How far logits are from the trained model's."""

    largest: float
    """Of the absolute differences."""
    relative: float
    """RMS of the differences over RMS of the trained model's logits, each row's mean taken off."""
    kl: float
    """KL(trained || exported), nats per token."""
    adapter: float | None
    """`relative` of the base without the adapter: how much there was to keep. None: no adapter."""

    def in_words(self) -> str:
        text = f"relative error {self.relative:.1e}, largest {self.largest:.1e}, KL {self.kl:.1e} nats per token"
        return text if self.adapter is None else f"{text}; the adapter changed the logits by {self.adapter:.1e}"


@torch.no_grad()
def probe(model: Any) -> Probe:
    """Run the trained model on the probe's tokens, and without its adapters where it has any."""
    body = seam.body_of(model)
    known = seam.embedding_rows(body) or 2
    length = min(LENGTH, seam.longest_input(body) or LENGTH)
    ids = torch.randint(known, (ROWS, length), generator=torch.Generator().manual_seed(0))
    trained = logits_of(model, ids)
    base = None
    if hasattr(model, "peft_config"):
        with model.disable_adapter():
            base = logits_of(model, ids)
    return Probe(ids, trained, base)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """(B, T, V) float32 on the CPU; ids: (B, T)."""
    place = next(model.parameters()).device
    logits = model(input_ids=ids.to(place), use_cache=False).logits
    return logits[:, -ids.shape[1] :].float().cpu()  # virtual tokens of prompt tuning come first


def compare(found: Tensor, asked: Probe) -> LogitError:
    """found: logits of the same tokens by another model."""
    if found.shape != asked.trained.shape:
        raise InputError(f"the exported model's logits are {tuple(found.shape)}, not {tuple(asked.trained.shape)}")
    p, q = asked.trained.double().log_softmax(-1), found.double().log_softmax(-1)
    return LogitError(
        largest=float((found - asked.trained).abs().max()),
        relative=_relative(found, asked.trained),
        kl=max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),
        adapter=None if asked.base is None else _relative(asked.base, asked.trained),
    )


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    return float((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp_min(1e-30))


def require_equal(found: LogitError, dtype: torch.dtype, what: str) -> None:
    """Raises InputError when the error is more than `dtype` explains, or takes what the adapter had learned."""
    name = str(dtype).removeprefix("torch.")
    if not found.relative <= TOLERANCE[dtype]:  # NaN fails too
        raise InputError(
            f"{what} does not compute what was trained ({found.in_words()}; {name} allows {TOLERANCE[dtype]:.0e}); "
            "this is a bug, of this library or of peft: export the adapter without --merged, and report it"
        )
    if found.adapter and found.relative > LOST * found.adapter:
        raise InputError(
            f"{what}: rounding to {name} takes most of what was trained ({found.in_words()}); "
            "use --dtype float32, or export the adapter without --merged"
        )
