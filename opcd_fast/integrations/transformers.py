"""`transformers.Trainer` with a fused distillation loss, on answers that the data set holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from opcd_fast.integrations.forward import (
    Heads,
    chosen_divergence,
    divergence,
    hidden_states,
    inside_forward,
    refuse_settings,
    refuse_sharding,
)
from opcd_fast.loss import LMHead
from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher

__all__ = ["FusedDistillationTrainer"]

MORE = ("temperature", "backend", "workspace_bytes", "projection")  # what else `distillation` takes


class FusedDistillationTrainer(Trainer):
    """Minimises the divergence from a teacher at every token that `labels` marks; no logits are made.

    Batches are those of supervised fine-tuning: `input_ids` and `labels` (B, T), `labels` -100 where a token is not
    scored, perhaps `attention_mask`. Student and teacher read the same ids; what the labels hold besides -100 does not
    matter.

    Args:
        teacher: a frozen causal language model with the same vocabulary, or a `ContextTeacher`, which reads its context
            in front of the ids (then a batch must be padded on the right, and of one context). With
            `ContextTeacher(model, context)` of the PEFT model that is trained, the teacher is that model without its
            adapter.
        distillation: the divergence and its parameters, temperature, backend, workspace_bytes and projection, as
            keywords of `fused_linear_divergence`; the default is the reverse KL at temperature 1.
        others: as for `Trainer`.

    The loss is the mean over all scored tokens of the step: Trainer's count, micro-batches and processes included. For
    one process or DDP. Raises ValueError for what `distillation` does not take, for `compute_metrics` (it needs
    logits), for FSDP and DeepSpeed, and for a teacher that is itself trained.
    """

    def __init__(self, *args: Any, teacher: Any, distillation: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(*args, **others)
        refuse_settings(self)
        refuse_sharding(self)
        scoring = teacher.model if isinstance(teacher, ContextTeacher) else teacher
        student: Any = self.model
        if scoring is teacher and seam.causal_lm(scoring) is seam.causal_lm(student):
            raise ValueError(
                "teacher is the model that is trained; give a copy of it, or ContextTeacher(model, context) of a PEFT "
                "model"
            )
        if seam.causal_lm(scoring) is not seam.causal_lm(student):
            scoring.to(self.args.device).requires_grad_(False).eval()
        self.teacher = teacher
        self._distillation = chosen_divergence({"divergence": "reverse_kl", **(distillation or {})}, MORE)
        self._heads = Heads()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `Trainer.compute_loss`; the outputs, where asked for, are empty."""
        if "labels" not in inputs:
            raise ValueError("labels: the batch has none; values other than -100 mark the tokens that are scored")
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        scored = inputs["labels"][:, 1:] != -100
        count = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        inner = self.accelerator.unwrap_model(model)

        def loss() -> Tensor:
            with self.accelerator.autocast():
                h_s = hidden_states(inner, ids, mask)
                h_t, head_t = self._teach(ids, mask)
                return divergence(
                    h_s[:, :-1], self._heads(inner), h_t[:, :-1], head_t, token_weights=scored, denominator=count,
                    token_ids=ids[:, 1:], **self._distillation,
                )  # fmt: skip

        value = inside_forward(model, inner, loss)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # DDP averages what was divided by the count of all
        return (value, {}) if return_outputs else value

    @torch.no_grad()
    def _teach(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, LMHead]:
        if isinstance(self.teacher, ContextTeacher):
            return self.teacher.hidden_states(ids, mask), self.teacher.head
        return hidden_states(self.teacher, ids, mask), self._heads(self.teacher)
