"""The models, contexts and answers for benchmarks of the teacher.

Token ids are random and all answers of a case equally long: padding would only slow down the paths that pad, and the
model of teacher_model.py is then exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.teacher_model import QWEN3_8B, Shape

GROUPS = ("main", "context", "response", "batch")
REFERENCE_LIMIT = 16_384  # tokens of a sequence; beyond, float32 on a GPU takes minutes


@dataclass(frozen=True)
class Case:
    context: int  # P
    response: int  # S
    batch: int  # B
    group: str = "main"

    @property
    def name(self) -> str:
        return f"{self.context}x{self.response}x{self.batch}"


@dataclass(frozen=True, eq=False)
class Setting:
    """What all contenders of a case work on."""

    model: Any  # a transformers causal LM in eval mode, its attention "sdpa"
    context: Tensor  # (P,) int64
    answers: Tensor  # (B, S) int64

    @property
    def body(self) -> Any:
        return self.model.base_model

    @property
    def shape(self) -> Shape:
        return Shape.of(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.answers.device


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The table's cases, what matters most first: a run that is stopped leaves the best part."""
    if quick:
        return [Case(24, 8, 4), Case(12, 8, 4, "context"), Case(24, 3, 4, "response"), Case(24, 8, 2, "batch")]
    if device.type == "cuda":
        return [Case(8192, 512, 64), Case(2048, 512, 8, "context"), Case(32768, 512, 8, "context")]
    return [
        Case(1024, 64, 16),
        Case(256, 64, 16, "context"),
        Case(1024, 64, 4, "batch"),
        Case(1024, 16, 4, "response"),
        Case(1024, 256, 4, "response"),
        Case(256, 64, 4, "batch"),
    ]


def make_setting(model: Any, case: Case) -> Setting:
    """Random ids, the same whenever it is asked for."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1000 * case.context + 10 * case.response + case.batch)
    draw = lambda *size: torch.randint(3, model.config.vocab_size, size, generator=generator).to(device)  # noqa: E731
    return Setting(model, draw(case.context), draw(case.batch, case.response))


def make_model(device: torch.device, quick: bool, layers: int | None = None) -> tuple[Any, str, str]:
    """(model, its name for rows, what a reader must know of it).

    SmolLM2-135M-Instruct in float32 on a CPU; a Qwen3-8B of random weights in bfloat16 on a GPU, or its first
    `layers` layers. Raises `InputError` when SmolLM2 is not installed, ValueError for `layers` that cannot be had.
    """
    if layers is not None and (quick or device.type != "cuda"):
        raise ValueError("--layers is for the model on a GPU; leave it out")
    if quick:
        return tiny_model(device), "tiny Llama", "The model is a tiny Llama with random weights."
    if device.type == "cuda":
        return _large_model(device, layers)
    from opcd_fast.models import load_model

    model = load_model("smollm2", dtype="float32", device="cpu")
    return model, "SmolLM2-135M", "The model is SmolLM2-135M-Instruct with its own weights."


def _large_model(device: torch.device, layers: int | None) -> tuple[Any, str, str]:
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape = QWEN3_8B
    if layers is not None and not 1 <= layers <= shape.layers:
        raise ValueError(f"--layers: expected 1 to {shape.layers}, got {layers}")
    config = Qwen3Config(
        num_hidden_layers=layers or shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        max_position_embeddings=40_960, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        vocab_size=8192, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    name = "Qwen3-8B" if config.num_hidden_layers == shape.layers else f"{layers} layers of a Qwen3-8B"
    note = f"The model has the shape of {name}, random weights and a vocabulary of 8,192, which no row reads."
    return model.eval(), name, note


def tiny_model(device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).eval()


@torch.no_grad()
def references(model: Any, chosen: Sequence[Case]) -> dict[str, Tensor]:
    """By case, hidden states (2, S, D) in float32 of its first and last answer, each alone after the context.

    Plain transformers, one sequence at a time. Cases with more than `REFERENCE_LIMIT` tokens have none on a GPU.
    """
    on_gpu = next(model.parameters()).is_cuda
    exact = model if next(model.parameters()).dtype == torch.float32 else copy.deepcopy(model.base_model).float()
    body = exact.base_model if exact is model else exact
    found = {}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for case in chosen:
            if on_gpu and case.context + case.response > REFERENCE_LIMIT:
                continue
            setting = make_setting(model, case)
            rows = [torch.cat([setting.context, setting.answers[i]])[None] for i in (0, -1)]
            states = [body(input_ids=row, use_cache=False).last_hidden_state[0, case.context :] for row in rows]
            found[case.name] = torch.stack(states)
    finally:
        torch.set_float32_matmul_precision(before)
    return found
