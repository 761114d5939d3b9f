"""The two models of a run: the one that is trained, and the one that reads the context."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch

from opcd_fast.config import OPCDConfig
from opcd_fast.errors import InputError
from opcd_fast.heads import LMHead
from opcd_fast.models import refuse_unsupported, same_tokenizer
from opcd_fast.seeds import seeded, stream_seed


def student_and_teacher(
    model: Any, teacher_model: Any, config: OPCDConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Place both models; the same object twice when an adapter tells student and teacher apart.

    LoRA (`lora_rank`, or a PEFT model): the base keeps `dtype`, the adapter is fp32, and the teacher is the base with
    the adapter off. Full fine-tuning: the student gets fp32 master weights, its copy in `dtype` is the teacher. A
    `teacher_model` takes the teacher's place in either case.

    Raises InputError: a model that cannot be trained this way.
    """
    for name, given in (("model", model), ("teacher_model", teacher_model)):
        if given is not None:
            refuse_unsupported(given, name)
            refuse_injected_adapters(given, name)
    if teacher_model is model:
        raise InputError(
            "teacher_model is the model to be trained; leave it None: the teacher then has its first weights"
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"model is in {dtype}, whose gradients underflow; set dtype='bfloat16' or 'float32'")
    has_adapter = is_peft(model)
    if has_adapter and config.lora_rank:
        raise InputError("model already carries an adapter; set lora_rank=0 to train that one")
    model = model.to(device=device, dtype=dtype)
    teacher = teacher_model
    if config.lora_rank:
        student = with_adapter(model, config, device)
    elif has_adapter:
        student = model
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    else:
        teacher = teacher_model or copy.deepcopy(model)
        student = model.float().requires_grad_(True)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError("model has nothing to train: its adapter is not LoRA; set lora_rank on the base model instead")
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if teacher is None:
        return student, student
    return student, teacher.to(device=device).requires_grad_(False).eval()


def with_adapter(model: Any, config: OPCDConfig, device: torch.device) -> Any:
    """`model` with a fresh LoRA adapter, its first weights fixed by the seed."""
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with seeded(stream_seed(config.seed, "adapter", 0), device):
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"lora_targets={config.lora_targets!r} does not fit this model: {reason}") from error


def is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def name_of(model: Any) -> str | None:
    """What the model, or the base under its adapter, was loaded from; None for one made in memory, or no model."""
    base = model.get_base_model() if is_peft(model) else model
    return getattr(base, "name_or_path", None) or None


def refuse_injected_adapters(model: Any, name: str) -> None:
    if hasattr(model, "peft_config") and not is_peft(model):
        raise InputError(f"{name} has adapters put in by add_adapter; wrap the base model with peft.PeftModel instead")


def shared_vocabulary(student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any) -> int | None:
    """Ids that both models know, when one of them has fewer than the other; None when they are the same.

    Models of one family often share a tokenizer and pad their heads to different lengths (Qwen2.5: 151,936 and
    152,064). Raises InputError: different tokenizers, or a tokenizer with more tokens than a head.
    """
    if teacher_tokenizer is not None and not same_tokenizer(tokenizer, teacher_tokenizer):
        raise InputError("student and teacher have different tokenizers; distillation needs the same token ids")
    try:
        sizes = {name: LMHead.from_model(m).valid_size for name, m in (("model", student), ("teacher", teacher))}
    except ValueError as error:
        raise InputError(str(error)) from error
    for name, size in sizes.items():
        if len(tokenizer) > size:
            raise InputError(f"tokenizer has {len(tokenizer)} tokens, the {name}'s head only {size}; they do not match")
    if sizes["model"] == sizes["teacher"]:
        return None
    if teacher_tokenizer is None:
        raise InputError(
            f"the heads have {sizes['model']} and {sizes['teacher']} rows; give teacher_tokenizer= to show that "
            "student and teacher_model share a tokenizer"
        )
    return min(sizes.values())


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Tells one set of weights from another: names, shapes, and the first values of every parameter, hashed."""
    seen = hashlib.sha256()
    for name, parameter in model.named_parameters():
        seen.update(f"{name} {tuple(parameter.shape)}".encode())
        seen.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return seen.hexdigest()
