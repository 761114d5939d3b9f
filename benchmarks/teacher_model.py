"""`python -m benchmarks.teacher_model`: what a teacher forward must compute, and what sharing the context saves.

Arithmetic alone, unmeasured. Of a dense decoder, per token, 2 FLOPs for each weight of its linear maps; per pair of a
query and a key that it may look at, 4 d FLOPs for each query head and layer (d multiplications and additions for the
score, d for the weighted value). This is the count of Kaplan et al., arXiv 2001.08361, section 2.1, with attention
over exactly the pairs that the causal mask leaves. Norms, activations, RoPE, the embedding, the lm-head, memory traffic
and launches are left out: the time that follows from it is a lower limit, at a rate that somebody measured.

B answers of S tokens after a context of P tokens; all of one length, so that padding plays no part.
"""

from __future__ import annotations

from benchmarks.models import SHAPES, Shape

CASES = (  # context, answer, batch
    (512, 4096, 64),
    (2048, 512, 8),
    (2048, 1024, 64),
    (2048, 4096, 64),
    (8192, 512, 64),
    (8192, 4096, 8),
    (32768, 512, 8),
    (32768, 1024, 64),
)


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


def markdown() -> list[str]:
    """The model's table, for Qwen3-8B in bf16."""
    shape = SHAPES["Qwen3-8B"]
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
        whole = concat_flops(shape, context, response, batch)
        shared = shared_flops(shape, context, response, batch, build=False)
        attention = 1 - batch * response * shape.flops_per_token / shared
        rebuilt, built = speedups(shape, context, response, batch)
        kv = shape.kv_bytes(context, 2) / 2**30
        lines.append(
            f"| {context:,} | {response:,} | {batch} | {whole / 1e12:,.0f} | {shared / 1e12:,.0f} | {attention:.0%} | "
            f"{rebuilt:.1f} | {built:.1f} | {kv:.2f} | {kv * batch:.2f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(markdown()))
