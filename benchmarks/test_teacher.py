"""The ways to score answers after a context, one pytest-benchmark group per case.

Small on a CPU (6 layers of SmolLM2's width, random weights), 4 layers of a Qwen3-8B on a GPU: enough to follow our own
code from commit to commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.conftest import DEVICE
from benchmarks.measure import release
from benchmarks.schema import BOUND, Row
from benchmarks.teacher import contenders
from benchmarks.teacher_cases import Case, Setting, make_model, make_setting, references
from benchmarks.teacher_model import SMOLLM2_135M

ON_GPU = DEVICE.type == "cuda"
CASES = [Case(8192, 512, 8), Case(2048, 512, 8)] if ON_GPU else [Case(256, 16, 8), Case(64, 16, 8)]
NAMES = ("opcd_fast-merge", "opcd_fast-merge-rebuilt", "opcd_fast-pad", "concat", "transformers-cache",
         "transformers-cache-rebuilt", BOUND)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    if ON_GPU:
        return make_model(DEVICE, quick=False, layers=4)[0]
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SMOLLM2_135M
    config = LlamaConfig(
        vocab_size=1024, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=6,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def prepared(request: pytest.FixtureRequest, model: Any) -> Iterator[tuple[Case, Setting, Any]]:
    case: Case = request.param
    yield case, make_setting(model, case), references(model, [case]).get(case.name)
    release(DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states(prepared: tuple[Case, Setting, Any], name: str, follow: Callable[..., Row]) -> None:
    case = prepared[0]
    (one,) = (found for found in contenders(*prepared) if found.name == name)
    row = follow(f"teacher: {case.name}", one, rounds=3)
    assert (row.get("max_error") or 0.0) <= (0.5 if ON_GPU else 1e-4)
