"""verl 0.9: the exact KL to a teacher that sees a context, reverse or gated, as a distillation loss of its own name.

verl's teacher is a server that sends log-probabilities of some tokens, so its losses are over those. Here the teacher
is the actor itself without its LoRA adapter and with the context in front, run inside the actor's own forward, and the
loss is over the full vocabulary. `opcd_fast.integrations.verl_plugin` is what verl loads by itself (entry point group
`verl.plugins`); it asks for the environment variable OPCD_VERL_CONTEXT.

It needs an FSDP actor with LoRA, `use_fused_kernels` and `use_remove_padding`, and no sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import Message, Prompt, common_prefix_length, read_context, student_ids, teacher_ids
from opcd_fast.integrations.forward import Heads, divergence
from opcd_fast.loss import LMHead
from opcd_fast.models import load_tokenizer, seam
from opcd_fast.teacher import ContextTeacher

LOSSES = {"opcd_reverse_kl": "reverse_kl", "opcd_gated_kl": "gated_kl"}
"""verl's `distillation.distillation_loss.loss_mode`, and the divergence that it is."""

Teach = Callable[[Any, Tensor, Tensor], tuple[Tensor, LMHead | None, Tensor]]
"""(model, ids (N,), cu_seqlens (B + 1,)) -> (hidden states (M, D), their head, positions in the row (M,)); None for the
head of the model that is trained."""


def register() -> None:
    """Make `LOSSES` known to verl in this process. A second call does nothing."""
    from verl.trainer.distillation import losses

    if not LOSSES.keys() & losses.DISTILLATION_LOSS_REGISTRY.keys():
        # of the kind that is computed in forward
        settings = losses.DistillationLossSettings(names=list(LOSSES), use_topk=True)
        losses.register_distillation_loss(settings)(kl_of_response)


def kl_of_response(
    config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The distillation loss function that verl calls: ((B, response length) losses, metrics).

    Nothing is clamped, `topk` and `log_prob_min_clamp` do not enter. Raises RuntimeError when what the forward left is
    not of `with_divergence`, or of another divergence.
    """
    strategy, name = getattr(config, "strategy", None), distillation_config.distillation_loss.loss_mode
    if "distillation_losses" not in model_output or "overlap_count" in model_output or strategy not in _STRATEGIES:
        raise RuntimeError(
            f"loss_mode={name}: the actor's forward did not compute it (strategy {strategy!r}). It needs "
            "OPCD_VERL_CONTEXT (or teach_with_context) in every worker, an fsdp or fsdp2 actor, use_fused_kernels=True "
            "and use_remove_padding=True"
        )
    if LOSSES[name] != _computed:
        raise RuntimeError(
            f"loss_mode={name}, but the actor's forward computed {_computed!r}; set in every worker "
            f"OPCD_VERL_DIVERGENCE={LOSSES[name]}"
        )
    from verl.workers.utils.padding import no_padding_2_padding

    losses = no_padding_2_padding(model_output["distillation_losses"], data)
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    scored = losses.detach()[mask]
    return losses, {f"distillation/{_computed}": scored.mean().item() if scored.numel() else 0.0}


_STRATEGIES = ("fsdp", "fsdp2")
_computed: str | None = None  # by the last forward of this process


def with_divergence(
    forward: Callable[..., Any], teach: Teach, head_of: Callable[[Any], LMHead], which: str = "reverse_kl"
) -> Callable[..., Any]:
    """verl's fused forward of a …ForCausalLM, with the divergence of each token in its output while it is trained.

    forward: as in `verl.models.transformers.dense_common`: packed `input_ids` and `position_ids` (1, N), one
    temperature, no logits. teach: the teacher; runs without gradients. head_of: the model's own head. which: the
    divergence, of those in `LOSSES`; ValueError for another.

    Where gradients are wanted the output has `fused_linear_aux` with `distillation_losses`, `student_mass` and
    `teacher_mass`, each (1, N), which verl's FSDP engine collects: the value in nats, 0 where `teach` gives no
    position, and masses of 1, because all tokens of the vocabulary are compared.
    """

    _check(which)

    @wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _computed
        if not (self.training and torch.is_grad_enabled()):  # verl's log-probabilities of old answers
            return forward(self, *args, **kwargs)
        states: list[Tensor] = []
        hook = seam.body_of(self).register_forward_hook(lambda module, inputs, output: states.append(output[0]))
        try:
            output = forward(self, *args, **kwargs)
        finally:
            hook.remove()
        ids, cu_seqlens = _packed(kwargs)
        (temperature,) = torch.as_tensor(kwargs.get("temperature", 1.0)).unique().tolist()
        with torch.no_grad():
            h_t, head_t, positions = teach(self, ids, cu_seqlens)
        h_s = states[0][0].index_select(0, positions)
        head = head_of(self)
        options = {"divergence": which, "temperature": temperature, "reduction": "none"}
        options["token_ids"] = ids.roll(-1)[positions]  # of a sequence's last token any: ids decide over speed alone
        kl = divergence(h_s, head, h_t, head_t or head, **options)
        _computed = which
        row = kl.new_zeros(ids.numel()).index_copy(0, positions, kl).unsqueeze(0)
        mass = torch.ones_like(row)
        output.fused_linear_aux = SimpleNamespace(distillation_losses=row, student_mass=mass, teacher_mass=mass)
        return output

    wrapped.computes_divergence = True  # type: ignore[attr-defined]
    return wrapped


def _packed(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(N,) ids and (B + 1,) offsets of a packed row, whose sequences begin where positions do."""
    ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if ids is None or positions is None or ids.shape[0] != 1 or positions.shape != ids.shape:
        raise RuntimeError(
            "the actor's forward did not get a packed row of ids with its positions; set "
            "actor_rollout_ref.model.use_remove_padding=True"
        )
    starts = (positions[0] == 0).nonzero()[:, 0]
    if not starts.numel() or int(starts[0]) != 0:
        raise RuntimeError("the packed row begins inside a sequence; sequence parallelism is not supported")
    return ids[0], torch.cat([starts, starts.new_tensor([ids.shape[1]])])


@dataclass(frozen=True)
class Swap:
    """How a rendered prompt becomes the one with the context: its first tokens are exchanged for others."""

    student: tuple[int, ...]  # what every prompt begins with
    teacher: tuple[int, ...]  # what it begins with when the context is there
    lead: tuple[int, ...]  # what follows in either case, up to the user's own words

    @classmethod
    def of(cls, tokenizer: Any, context: str | Path | Sequence[Message]) -> Swap:
        """From two prompts that share nothing but the template. Raises ValueError where templates do not work so."""
        told = read_context(context)
        pairs = []
        for text in ("Ask", "zero"):
            prompt = Prompt(({"role": "user", "content": text},), text)
            plain, seen = student_ids(tokenizer, prompt), teacher_ids(tokenizer, prompt, told)
            if plain == seen:
                raise ValueError("context changes nothing: with and without it the rendered prompt is the same")
            same = common_prefix_length([plain[::-1], seen[::-1]])
            pairs.append((plain, seen, same))
        heads = {(tuple(plain[: len(plain) - same]), tuple(seen[: len(seen) - same])) for plain, seen, same in pairs}
        if len(heads) != 1:
            raise ValueError("context: with this chat template it does not stand in front of the prompt, as is needed")
        ((student, teacher),) = heads
        rests = [plain[len(student) :] for plain, _, _ in pairs]
        return cls(student, teacher, tuple(rests[0][: common_prefix_length(rests)]))


class ContextInFront:
    """A `Teach`: the model that is trained, without its adapter, after a context.

    tokenizer: renders prompts as verl does, without arguments for the template. context: as for `OPCDTrainer`.

    Raises RuntimeError for a model without an adapter, and for a prompt that does not begin like the others (one with a
    system message of its own).
    """

    def __init__(self, tokenizer: Any, context: str | Path | Sequence[Message]) -> None:
        self.swap = Swap.of(tokenizer, context)
        self._teacher: ContextTeacher | None = None

    def __call__(self, model: Any, ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, None, Tensor]:
        swap, row = self.swap, ids.tolist()
        offsets, expected = cu_seqlens.tolist(), (*swap.student, *swap.lead)
        suffixes = []
        for begin, end in zip(offsets, offsets[1:]):
            if tuple(row[begin : begin + len(expected)]) != expected:
                raise RuntimeError(
                    "a prompt does not begin as the chat template makes it begin; prompts with a system message of "
                    "their own, or template arguments, are not supported"
                )
            # The last token predicts nothing.
            suffixes.append(torch.arange(begin + len(swap.student), end - 1))
        positions = torch.cat(suffixes).to(ids.device)
        lengths = torch.tensor([0, *(len(suffix) for suffix in suffixes)]).cumsum(0)
        hidden = self._of(model).hidden_states_packed(ids.index_select(0, positions), lengths.to(ids.device))
        return hidden, None, positions

    def _of(self, model: Any) -> ContextTeacher:
        if self._teacher is None or self._teacher.model is not model:
            if not seam.adapter_modules(model):
                raise RuntimeError(
                    "the actor has no adapter, so nothing is left of the teacher once it is trained; set "
                    "actor_rollout_ref.model.lora_rank"
                )
            self._teacher = ContextTeacher(model, list(self.swap.teacher), frozen_weights=True)
        return self._teacher


def _check(which: str) -> None:
    if which not in LOSSES.values():
        known = ", ".join(LOSSES.values())
        raise ValueError(f"the divergence (OPCD_VERL_DIVERGENCE) is {which!r}; with verl it must be one of {known}")


def teach_with_context(
    context: str | Path | Sequence[Message], *, tokenizer: Any = None, which: str = "reverse_kl"
) -> Callable[[], None]:
    """Every model to which verl gives a fused forward from now on, in this process, learns from itself with `context`.

    Call it before verl builds its models, in every worker. tokenizer: None loads the one beside the model's weights.
    which: the divergence, see `with_divergence`.
    Returns a function that takes it back (models that have their forward keep it).
    """
    _check(which)
    from verl.models.transformers import monkey_patch

    give_forward = monkey_patch.patch_forward_with_backends
    plain: dict[type, Callable[..., Any]] = {}
    told = read_context(context)  # a missing file is an error here, not in the middle of a job

    @wraps(give_forward)
    def patched(model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None) -> None:
        kind = type(model)
        before = kind.forward
        give_forward(model, use_fused_kernels, fused_kernels_backend)
        if kind.forward is before:
            return  # no fused forward was asked for; the loss will say that it needs one
        if not hasattr(before, "computes_divergence"):
            plain[kind] = before
        words = tokenizer or load_tokenizer(model.config._name_or_path)
        kind.forward = with_divergence(kind.forward, ContextInFront(words, told), Heads(plain[kind]), which)

    def take_back() -> None:
        monkey_patch.patch_forward_with_backends = give_forward

    monkey_patch.patch_forward_with_backends = patched
    return take_back
