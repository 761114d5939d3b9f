"""The ways to score answers after a context side by side, one pytest-benchmark group per case.

Small on a CPU (6 layers of SmolLM2's width, random weights), 4 layers of a Qwen3-8B on a GPU: enough to follow our own
code from commit to commit. For the whole models, peak memory and interleaved times, `benchmarks.teacher_table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.measure import Failure, attempt, release
from benchmarks.schema import BOUND
from benchmarks.teacher_cases import Case, Setting, make_model, make_setting, references
from benchmarks.teacher_implementations import CONCAT, implementations
from benchmarks.teacher_model import SMOLLM2_135M

ROUNDS = 3
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CASES = (
    [Case(8192, 512, 8), Case(2048, 512, 8)] if _DEVICE.type == "cuda" else [Case(256, 16, 8), Case(64, 16, 8)]
)
_NAMES = ("opcd_fast-merge", "opcd_fast-merge-rebuilt", "opcd_fast-pad", CONCAT, "transformers-cache",
          "transformers-cache-rebuilt", BOUND)  # fmt: skip


@dataclass
class Prepared:
    case: Case
    setting: Setting
    exact: torch.Tensor | None


@pytest.fixture(scope="module")
def model() -> Any:
    if _DEVICE.type == "cuda":
        return make_model(_DEVICE, quick=False, layers=4)[0]
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SMOLLM2_135M
    config = LlamaConfig(
        vocab_size=1024, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=6,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", params=_CASES, ids=lambda case: case.name)
def prepared(request: pytest.FixtureRequest, model: Any) -> Iterator[Prepared]:
    case: Case = request.param
    yield Prepared(case, make_setting(model, case), references(model, [case]).get(case.name))
    release(_DEVICE)


@pytest.mark.parametrize("name", _NAMES)
def test_hidden_states(prepared: Prepared, name: str, benchmark: Any) -> None:
    case = prepared.case
    (one,) = (i for i in implementations(case, prepared.setting) if i.name == name)
    if one.skip:
        pytest.skip(one.skip)
    benchmark.group = f"teacher: {case.name}"
    contender = one.build(prepared.setting)
    hidden = attempt(contender.call, _DEVICE)
    if isinstance(hidden, Failure):
        if hidden.status == "out of memory" and not one.ours:
            pytest.skip(hidden.note)
        pytest.fail(hidden.note)
    if name != BOUND and prepared.exact is not None:
        first_and_last = hidden.view(case.batch, case.response, -1)[[0, -1]]
        error = float((first_and_last.float() - prepared.exact).abs().max())
        benchmark.extra_info.update(max_error=error, prefix_bytes=contender.held())
        assert error <= (1e-4 if hidden.dtype == torch.float32 else 0.5)
    del hidden

    def timed() -> None:
        contender.call()
        if _DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=ROUNDS, iterations=1)
