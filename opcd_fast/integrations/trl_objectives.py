"""What TRL 1.16's distillation trainers minimise, computed from hidden states.

Divergence, temperature, mask and denominator of each are those of TRL's own method, whose name and arguments these
functions have (trainer first). `check_...` refuse what cannot be computed this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.integrations.forward import Heads, divergence, hidden_states, inside_forward, refuse_settings
from opcd_fast.loss import LMHead, fused_linear_logprobs, sequence_mean_weights


@dataclass(frozen=True, eq=False)
class Options:
    exact: bool
    workspace_bytes: int | None
    backend: str
    heads: Heads

    @property
    def loss(self) -> dict[str, Any]:
        return {"workspace_bytes": self.workspace_bytes, "backend": self.backend, "return_stats": True}


# --------------------------------------------------------------------------------------- DistillationTrainer


def check_distillation(trainer: Any) -> None:
    refuse_settings(trainer)
    if trainer.teacher_model is None:
        raise ValueError("teacher_model is None: a teacher on a server sends no hidden states; give a local model")


def distillation_loss(
    options: Options, trainer: Any, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`DistillationTrainer._compute_loss`: (loss, sum of the student's entropies, number of scored tokens)."""
    answer, mask = inputs["completion_ids"], inputs["completion_mask"]
    ids, attention = _student_row(inputs)
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]

    def states(model: Any) -> Tensor:  # (B, C, D), of the tokens that predict the answer's
        return trainer._get_last_hidden_state(model, ids, attention, answer.shape[1])

    h_s = states(unwrapped_student)
    trainer.teacher_model.eval()
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    with torch.no_grad():
        h_t = inside_forward(trainer.teacher_model, teacher, lambda: states(teacher))
    head_s, head_t = options.heads(unwrapped_student), options.heads(teacher)
    if num_items_in_batch is None:  # evaluation
        num_items_in_batch = mask.sum().clamp(min=1)
    loss, stats = divergence(
        h_s, head_s, h_t, head_t, divergence="jsd", beta=trainer.beta, temperature=trainer.temperature,
        token_weights=mask, denominator=num_items_in_batch, token_ids=answer, **options.loss,
    )  # fmt: skip
    return loss, stats.student_entropy.sum(), (mask != 0).sum()


# ------------------------------------------------------------------------------------------------ GKDTrainer


def gkd_loss(
    options: Options, trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:  # fmt: skip
    """`GKDTrainer.compute_loss`. As there, the loss is at temperature 1, whatever the config's (that of sampling)."""
    if return_outputs:
        raise ValueError("return_outputs=True asks for logits, which the fused loss does not make; set it to False")
    mask = inputs["labels"][:, 1:] != -100
    scored = mask.sum().clamp(min=1)
    if options.exact:
        # Trainer divides by the micro-batches itself unless it was given a count.
        denominator = scored * (1 if num_items_in_batch is None else _micro_batches(trainer))
    else:
        denominator = scored if num_items_in_batch is None else num_items_in_batch

    def states(lm: Any) -> tuple[Tensor, LMHead]:
        hidden = hidden_states(lm, inputs["input_ids"], inputs["attention_mask"])
        return hidden[:, :-1], options.heads(lm)

    def loss() -> Tensor:
        with trainer.accelerator.autocast():
            student = states(inner)
            with torch.no_grad():
                teacher = inside_forward(trainer.teacher_model, inner_teacher, lambda: states(inner_teacher))
            value, _ = divergence(
                *student, *teacher, divergence="jsd", beta=trainer.beta, token_weights=mask, denominator=denominator,
                token_ids=inputs["input_ids"][:, 1:], **options.loss,
            )  # fmt: skip
        return value

    trainer.teacher_model.eval()
    inner = trainer.accelerator.unwrap_model(model)
    inner_teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    return inside_forward(model, inner, loss)


# ----------------------------------------------------------------------------------------------- SDFTTrainer


def check_sdft(trainer: Any) -> None:
    refuse_settings(trainer)
    args = trainer.args
    if trainer.use_teacher_server:
        raise ValueError("use_teacher_server=True: a server sends no hidden states; set use_teacher_server=False")
    if args.distillation_mode == "topk_logits":
        if args.distillation_alpha != 1.0:
            raise ValueError(
                f"distillation_alpha={args.distillation_alpha} with distillation_mode='topk_logits': the fused top-k "
                "divergence is the reverse KL; set distillation_alpha=1.0, or distillation_mode='full_logits'"
            )
        if args.distillation_topk is None:
            raise ValueError("distillation_topk is None; distillation_mode='topk_logits' needs a number")
    elif args.distillation_mode == "sampled_token":
        if args.distillation_alpha != 1.0:
            raise ValueError("distillation_mode='sampled_token' is the reverse KL: set distillation_alpha=1.0")
    elif args.distillation_mode != "full_logits":
        raise ValueError(f"distillation_mode={args.distillation_mode!r} is unknown; set 'full_logits'")


def sdft_loss(
    options: Options, trainer: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:  # fmt: skip
    """`SDFTTrainer.compute_loss`: the mean over sequences of the mean over their scored tokens."""
    if return_outputs:
        raise ValueError("return_outputs=True asks for logits; neither SDFTTrainer nor the fused loss returns any")
    answer, mask = inputs["completion_ids"], inputs["completion_mask"]
    width = answer.shape[1]
    mask = mask * (torch.arange(width, device=mask.device) >= trainer.num_loss_tokens_to_skip)
    if options.exact:
        weights = sequence_mean_weights(mask)
    else:
        weights = mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.shape[0])
    clip, old = trainer.args.distillation_is_clip, inputs.get("old_per_token_logps")
    sampled = trainer.args.distillation_mode == "sampled_token"

    def states(lm: Any, ids: Tensor, attention: Tensor) -> tuple[Tensor, LMHead]:
        return hidden_states(lm, ids, attention)[:, -width - 1 : -1], options.heads(lm)

    def logprobs(state: tuple[Tensor, LMHead]) -> Tensor:
        return _logprobs(options, trainer, *state, answer, mask)

    def loss() -> tuple[Tensor, Tensor]:
        with trainer.accelerator.autocast():
            student = states(inner, *_student_row(inputs))
            with torch.no_grad(), trainer._get_teacher_context_for_self_distillation():
                row = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
                teacher = inside_forward(trainer.teacher_model, inner_teacher, lambda: states(inner_teacher, *row))
            own: Any = None
            ratio = torch.ones_like(weights)
            clipped = clip is not None and old is not None
            if sampled or clipped:
                with torch.set_grad_enabled(sampled and torch.is_grad_enabled()):
                    own = logprobs(student)
            if clipped:
                ratio = (own.detach() - old).clamp(-20.0, 20.0).exp().clamp(max=clip) * mask
            if sampled:
                with torch.no_grad():
                    gap = own - logprobs(teacher)
                return (gap * own * ratio * weights).sum(), gap * own.detach() * ratio
            which = {**_sdft_divergence(trainer.args), **options.loss}
            value, stats = divergence(
                *student, *teacher, token_weights=weights * ratio, temperature=trainer.temperature, reduction="sum",
                token_ids=answer, **which,
            )  # fmt: skip
            return value, stats.token_kl * ratio

    inner = trainer.accelerator.unwrap_model(model)
    inner_teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    value, per_token = inside_forward(model, inner, loss)
    mean = (per_token.detach() * mask).sum() / mask.sum().clamp(min=1)
    mode = "train" if model.training else "eval"
    trainer._log_self_distillation_metric(mode, trainer.accelerator.gather(mean).mean().item())
    return value / _micro_batches(trainer)


def sdft_rollout_logps(
    options: Options, trainer: Any, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor | None:  # fmt: skip
    """`SDFTTrainer._compute_rollout_logps`: the sampler's log-probabilities (B, C) where old answers are used again.

    Zeros at padding, which TRL fills with the log-probabilities of padding tokens; its loss reads neither.
    """
    args = trainer.args
    if args.gradient_accumulation_steps % (args.steps_per_generation * trainer.num_iterations) == 0:
        return None
    ids, attention = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad(), trainer.accelerator.autocast():
        hidden = hidden_states(model, ids, attention)[:, -completion_ids.shape[1] - 1 : -1]
        return _logprobs(options, trainer, hidden, options.heads(model), completion_ids, completion_mask)


def _sdft_divergence(args: Any) -> dict[str, Any]:
    if args.distillation_mode == "full_logits":
        return {"divergence": "jsd", "beta": args.distillation_alpha}
    tail = "bucket" if args.distillation_add_tail else "renormalize"
    return {"divergence": "topk_reverse_kl", "k": args.distillation_topk, "tail": tail}


def _student_row(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    return ids, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)


# --------------------------------------------------------------------------------------------------- for all


def _logprobs(options: Options, trainer: Any, hidden: Tensor, head: LMHead, ids: Tensor, mask: Tensor) -> Tensor:
    return fused_linear_logprobs(
        hidden, head, ids.masked_fill(mask == 0, -100), temperature=trainer.temperature,
        workspace_bytes=options.workspace_bytes, backend=options.backend,
    )  # fmt: skip


def _micro_batches(trainer: Any) -> float:
    """By how many micro-batches a step's loss is averaged; 1 in evaluation."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
