"""The models, contexts and answers for benchmarks of the teacher.

Token ids are random and all answers of a case equally long: padding would only slow down the paths that pad, and the
model of teacher_model.py is then exact.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import SHAPES, Shape, random_model

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
    def dtype(self) -> torch.dtype:
        return next(self.body.parameters()).dtype

    @property
    def shape(self) -> Shape:
        return Shape.of(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.answers.device

    @property
    def kv_bytes(self) -> int:
        """Keys and values of the context, once."""
        return self.shape.kv_bytes(self.context.numel(), self.dtype.itemsize)


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The table's cases, what matters most first: a run that is stopped leaves the best part."""
    if dry:
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


def make_model(device: torch.device, dry: bool, layers: int = 0) -> tuple[Any, str]:
    """(model, its name for rows): SmolLM2-135M-Instruct in float32 on a CPU; on a GPU a Qwen3-8B of random weights in
    bfloat16, or its first `layers` layers, with a small vocabulary, which no row reads.

    Raises `InputError` when SmolLM2 is not installed, ValueError for `layers` that cannot be had.
    """
    if dry:
        return random_model(SHAPES["tiny Llama"], torch.float32, device), "tiny Llama"
    shape = replace(SHAPES["Qwen3-8B"], vocabulary=8192)
    if layers and not (device.type == "cuda" and layers <= shape.layers):
        raise ValueError(f"layers is for the model on a GPU, 1 to {shape.layers}; got {layers}")
    if device.type != "cuda":
        from opcd_fast.models import load_model

        return load_model("smollm2", dtype="float32", device="cpu"), "SmolLM2-135M"
    name = f"{layers} layers of a Qwen3-8B" if 0 < layers < shape.layers else "Qwen3-8B"
    return random_model(replace(shape, layers=layers or shape.layers), torch.bfloat16, device), name


@torch.no_grad()
def reference(setting: Setting) -> Tensor | None:
    """Hidden states (2, S, D) in float32 of the first and the last answer, each alone after the context.

    Plain transformers. None for more than `REFERENCE_LIMIT` tokens on a GPU.
    """
    start = setting.context.numel()
    if setting.device.type == "cuda" and start + setting.answers.shape[1] > REFERENCE_LIMIT:
        return None
    body = setting.body if setting.dtype == torch.float32 else copy.deepcopy(setting.body).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        rows = [torch.cat([setting.context, setting.answers[i]])[None] for i in (0, -1)]
        return torch.stack([body(input_ids=row, use_cache=False).last_hidden_state[0, start:] for row in rows])
    finally:
        torch.set_float32_matmul_precision(before)
