"""The attention of one new token in each row, over a prefix that lies there once, or over a copy in each row's keys.

A case is named by the numbers a layer that copies would add, by which `HOLD_ONCE` in rollout/decoding.py decides.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.models import SHAPES
from benchmarks.schema import Values, value
from benchmarks.session import Contender, Session
from opcd_fast.attention import step_attention

OWN = 32  # tokens of its own that a row's new token sees


def run(session: Session) -> None:
    shape = SHAPES["SmolLM2-135M"]
    width = 2 * shape.kv_heads * shape.head_dim
    for rows in (4,) if session.dry else (4, 16, 64):
        for power in (12, 14) if session.dry else range(17, 24):
            prefix = -(-(2**power) // ((rows - 1) * width))
            session.compare(
                f"2^{power} numbers, {rows} rows", _attentions(session, rows, prefix),
                shape={"rows": rows, "prefix": prefix, "own": OWN, "numbers": (rows - 1) * prefix * width},
                settings={"heads": f"{shape.heads}/{shape.kv_heads} of {shape.head_dim}", "dtype": "float32"},
                seconds=3.0, min_rounds=7,
            )  # fmt: skip


def _attentions(session: Session, rows: int, prefix: int) -> list[Contender]:
    shape, device = SHAPES["SmolLM2-135M"], session.device
    generator = torch.Generator(device).manual_seed(prefix)

    def normal(batch: int, heads: int, count: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, shape.head_dim, generator=generator, device=device)

    query = normal(rows, shape.heads, 1)
    own = normal(rows, shape.kv_heads, OWN), normal(rows, shape.kv_heads, OWN)
    shared = normal(1, shape.kv_heads, prefix), normal(1, shape.kv_heads, prefix)
    copied = [torch.cat([x.expand(rows, -1, -1, -1), y], 2) for x, y in zip(shared, own, strict=True)]
    calls = max(1, min(100, 2**25 // (copied[0].numel())))  # so that one sample takes milliseconds at least

    @torch.no_grad()
    def repeated(*keys: Any) -> torch.Tensor:
        for _ in range(calls):
            found = step_attention(query, *keys)
        return found

    scale, note = shape.head_dim**-0.5, f"{calls} calls in a sample"
    exact = repeated(*copied, scale)

    def judge(found: torch.Tensor) -> Values:
        return {"calls": value(calls, "1"), "max_error": value(float((found - exact).abs().max()), "1")}

    return [
        Contender("opcd_fast-held once", lambda: partial(repeated, *own, scale, shared), judge, note, has_peak=False),
        Contender("opcd_fast-copied", lambda: partial(repeated, *copied, scale), judge, note, has_peak=False),
    ]
