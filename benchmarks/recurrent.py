"""A teacher of recurrent layers beside the model's own forward from a cache: what sharing one state costs.

One call gives the hidden states of B answers of S tokens behind a context of P that was read before. `transformers`
makes its copies of the cache before the clock starts, `transformers-copies` in the call, as ours does: a forward
overwrites the states it is given, so that each needs fresh ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.schema import Values, value
from benchmarks.session import Contender, Session
from opcd_fast import ContextTeacher
from opcd_fast.models import seam

AHEAD = 24  # copies of a cache
_SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 64}
_STATES, _KEYS = ["linear_attention"] * 3, ["full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": ("Qwen3_5TextConfig", {"head_dim": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
                "linear_key_head_dim": 32, "linear_value_head_dim": 32, "layer_types": _STATES + _KEYS}),
    "Granite-4 hybrid": ("GraniteMoeHybridConfig", {**_MAMBA, "layer_types": _STATES + _KEYS, "num_local_experts": 0,
                         "shared_intermediate_size": 256}),
    "Falcon-H1": ("FalconH1Config", {**_MAMBA, "mamba_d_ssm": 256}),
    "LFM2": ("Lfm2Config", {"layer_types": ["conv"] * 3 + _KEYS}),
}  # fmt: skip


def run(session: Session, *, case_seconds: float = 5.0) -> None:
    """case_seconds: of timing a case; 9 rounds at least."""
    sizes = [(24, 8, 2)] if session.dry else [(1024, 64, 8), (256, 32, 8)]
    for name, (kind, options) in MODELS.items():
        model = make_model(kind, options)
        for context, response, batch in sizes:
            session.compare(
                f"{name}, {context}x{response}x{batch}", contenders(model, context, response, batch),
                shape={"context": context, "response": response, "batch": batch, "layers": 4},
                settings={"model": f"{name}, tiny", "dtype": "float32"}, seconds=case_seconds, min_rounds=9,
            )  # fmt: skip


def make_model(kind: str, options: dict[str, Any]) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def contenders(model: Any, context: int, response: int, batch: int) -> list[Contender]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (context,), generator=generator)
    answers = torch.randint(512, (batch, response), generator=generator)
    bounds = torch.arange(0, batch * response + 1, response, dtype=torch.int32)
    body = seam.body_of(model)
    with torch.no_grad():
        teacher = ContextTeacher(model, ids, path="pad", frozen_weights=True)
        _ = teacher.prefixes
        filled = _read(body, ids)
        exact = body(input_ids=torch.cat([ids.expand(batch, -1), answers], 1), use_cache=False).last_hidden_state
    exact = exact[:, context:].flatten(0, 1)

    def copies() -> Any:
        cache = copy.deepcopy(filled)
        cache.reorder_cache(torch.zeros(batch, dtype=torch.int64))
        return cache

    @torch.no_grad()
    def plain(make: Callable[[], Any]) -> Tensor:
        out = body(input_ids=answers, use_cache=True, **seam.cache_argument(body, make()))
        return out.last_hidden_state.flatten(0, 1)

    ahead: list[Any] = []

    def made_before() -> Any:
        if not ahead:  # one call in AHEAD pays for all: no median sees it
            ahead.extend(copies() for _ in range(AHEAD))
        return ahead.pop()

    def judge(found: Tensor) -> Values:
        return {"max_error": value(float((found - exact).abs().max()), "1")}

    return [
        Contender("opcd_fast-pad", lambda: partial(teacher.hidden_states_packed, answers.flatten(), bounds), judge),
        Contender("transformers", lambda: partial(plain, made_before), judge, "copies made ahead", has_peak=False),
        Contender("transformers-copies", lambda: partial(plain, copies), judge),
    ]


def _read(body: Any, ids: Tensor) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=body.config)
    body(input_ids=ids[None], use_cache=True, **seam.cache_argument(body, cache))
    return cache
