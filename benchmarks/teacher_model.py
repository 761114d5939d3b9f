"""`python -m benchmarks.teacher_model`: what a teacher forward must compute, and what sharing the context saves.

Arithmetic alone, unmeasured. Of a dense decoder, per token, 2 FLOPs for each weight of its linear maps; per pair of a
query and a key that it may look at, 4 d FLOPs for each query head and layer (d multiplications and additions for the
score, d for the weighted value). This is the count of Kaplan et al., arXiv 2001.08361, section 2.1, with attention
over exactly the pairs that the causal mask leaves. Norms, activations, RoPE, the embedding, the lm-head, memory traffic
and launches are left out: the time that follows from it is a lower limit, at a rate that somebody measured.

B answers of S tokens after a context of P tokens; all of one length, so that padding plays no part.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A dense decoder. Widths in numbers, `kv_heads` keys and values shared by `heads` queries (GQA)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration of a Llama-like model."""
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.intermediate_size,
        )

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear map of one layer: queries, keys, values, output, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden, self.intermediate
        return (d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.layers * sum(a * b for a, b in self.products)

    @property
    def flops_per_pair(self) -> int:
        return 4 * self.layers * self.heads * self.head_dim

    def kv_bytes(self, context: int, element_size: int) -> int:
        """Keys and values of one context, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * element_size


QWEN3_8B = Shape(layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=12288)
SMOLLM2_135M = Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)


def concat_flops(shape: Shape, context: int, response: int, batch: int) -> int:
    """Every sequence reads the context again."""
    return batch * _forward(shape, 0, context + response)


def shared_flops(shape: Shape, context: int, response: int, batch: int, *, build: bool) -> int:
    """The context is read once (`build`) or was read before."""
    return (_forward(shape, 0, context) if build else 0) + batch * _forward(shape, context, response)


def _forward(shape: Shape, before: int, tokens: int) -> int:
    """`tokens` tokens after `before` others whose keys are there."""
    pairs = tokens * before + tokens * (tokens + 1) // 2
    return tokens * shape.flops_per_token + pairs * shape.flops_per_pair


def speedups(shape: Shape, context: int, response: int, batch: int) -> tuple[float, float]:
    """Modelled speed-up over concatenation: with the prefix rebuilt for each batch, and with it built before."""
    whole = concat_flops(shape, context, response, batch)
    rebuilt, built = (shared_flops(shape, context, response, batch, build=build) for build in (True, False))
    return whole / rebuilt, whole / built


CASES = (
    (512, 4096, 64),
    (2048, 512, 8),
    (2048, 1024, 64),
    (2048, 4096, 64),
    (8192, 512, 64),
    (8192, 4096, 8),
    (32768, 512, 8),
    (32768, 1024, 64),
)


def markdown() -> list[str]:
    """The model's table, for Qwen3-8B in bf16."""
    shape = QWEN3_8B
    lines = [
        "**Model, unmeasured on a device**: FLOPs of a Qwen3-8B's body alone, as `benchmarks/teacher_model.py` counts "
        "them. Every FLOP is taken to cost the same; the speed-up over reading the context again for every answer "
        "then needs no rate.",
        "",
        "| context | answer | batch | TFLOP, concatenated | TFLOP, shared | of it attention | speed-up, prefix rebuilt "
        "for each batch | speed-up, prefix kept | KV of the context, GiB: once | for every answer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for context, response, batch in CASES:
        shared = shared_flops(shape, context, response, batch, build=False)
        attention = 1 - batch * response * shape.flops_per_token / shared
        rebuilt, built = speedups(shape, context, response, batch)
        kv = shape.kv_bytes(context, 2) / 2**30
        lines.append(
            f"| {context:,} | {response:,} | {batch} | {concat_flops(shape, context, response, batch) / 1e12:,.0f} | "
            f"{shared / 1e12:,.0f} | {attention:.0%} | {rebuilt:.1f} | {built:.1f} | {kv:.2f} | {kv * batch:.2f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(markdown()))
    sys.exit(0)
