"""The two models of a run: the one that is trained, and the one that reads the context."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd_fast.errors import InputError
from opcd_fast.loss import LMHead
from opcd_fast.models import (
    base_weights,
    is_quantized,
    keep_plain_layout,
    pick_device,
    quantize_4bit,
    refuse_unsupported,
    same_device,
    same_tokenizer,
    seam,
    with_prefix,
)
from opcd_fast.runtime import seeded, stream_seed
from opcd_fast.teacher import MovingWeights, copy_of_trained
from opcd_fast.training.settings import OPCDConfig

logger = logging.getLogger("opcd_fast")


@dataclass
class ModelPair:
    """The models of a run. One object may appear more than once; adapter flags are those of `ContextTeacher`."""

    student: Any
    teacher: Any
    """What the student learns from, with `teacher_adapter`."""
    teacher_adapter: str
    reference: Any
    """The teacher with its first weights, with `reference_adapter`: for evaluations. None: not kept."""
    reference_adapter: str
    moving: MovingWeights | None = None
    """How the teacher follows, in modes "ema" and "periodic"."""


def student_and_teacher(
    model: Any, teacher_model: Any, config: OPCDConfig, device: torch.device, dtype: torch.dtype,
    keep_reference: bool = True, contexts: Sequence[Sequence[int]] = (),
) -> ModelPair:  # fmt: skip
    """Place the models that a run needs, as few copies of the weights as that takes.

    LoRA (`lora_rank`, or a PEFT model): the base keeps `dtype`, the adapter is fp32, and the teacher's first weights
    are the base with the adapter off. Full fine-tuning: the student gets fp32 master weights, and a copy in `dtype` is
    kept of the first weights where the teacher stays there, or with `keep_reference`. A `teacher_model` takes the
    teacher's place in either case. A trained prefix (`num_virtual_tokens`) is an adapter too, which begins with the
    longest of `contexts`, token ids.

    Raises InputError: a model that cannot be trained this way, or settings of the teacher that contradict each other.
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
    if has_adapter and config.makes_adapter:
        name = "lora_rank" if config.lora_rank else "num_virtual_tokens"
        raise InputError(f"model already carries an adapter; set {name}=0 to train that one")
    whole = not (has_adapter or config.makes_adapter)
    place = refuse_contradictions(model, teacher_model, config, device, whole)

    model = _placed(model, device, dtype, config.quantization)
    first = None
    moves = config.teacher_mode != "frozen"
    if whole:
        if teacher_model is None and (keep_reference or not moves):
            first = _teacher(copy.deepcopy(model), place, dtype, config.teacher_quantization)
        copied = copy.deepcopy(model) if config.teacher_mode in ("ema", "periodic") else None
        student = model.float().requires_grad_(True)
    elif config.lora_rank:
        student = with_adapter(model, config, device)
    elif config.num_virtual_tokens:
        student = with_prefix(model, config.num_virtual_tokens, contexts)
    else:
        student = model
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_encoder." in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError("model has nothing to train: its adapter is not LoRA; set lora_rank on the base model instead")
    try:
        seam.trained_prefix(student)
    except ValueError as error:
        raise InputError(str(error)) from error

    if teacher_model is None and not whole:
        own = {name for name, _ in base_weights(student)}
        if beside := [name for name, p in student.named_parameters() if p.requires_grad and name in own]:
            raise InputError(f"model trains {beside[0]!r}, which its teacher shares; freeze it, or give teacher_model")
    if teacher_model is not None:
        given = _teacher(teacher_model, place, dtype, config.teacher_quantization)
        pair = ModelPair(student, given, "active", given, "active")
    else:
        reference = (first, "active") if whole else (student, "disabled")
        pair = ModelPair(student, *reference, *reference)
    if moves:
        pair.teacher, pair.teacher_adapter = student, "active"
    if config.teacher_mode in ("ema", "periodic"):
        trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
        follower = _teacher(copied, place, dtype) if whole else copy_of_trained(student)
        pair.teacher = follower.requires_grad_(False).eval()
        ema = config.teacher_mode == "ema"
        decay, every = (config.teacher_ema_decay, 1) if ema else (0.0, config.teacher_sync_every)
        pair.moving = MovingWeights(trained, pair.teacher, decay, every)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return pair


def refuse_contradictions(
    model: Any, teacher_model: Any, config: OPCDConfig, device: torch.device, whole: bool
) -> torch.device:
    """Check the teacher's settings against the models; returns the teacher's device. Raises InputError."""
    if teacher_model is not None and config.teacher_mode != "frozen":
        raise InputError(
            f"teacher_mode={config.teacher_mode!r} makes a teacher of the student's own weights, and teacher_model is "
            "another model; drop teacher_model, or set teacher_mode='frozen'"
        )
    shares = teacher_model is None and not (whole and config.teacher_mode != "live")
    if shares and config.teacher_quantization != "none":
        raise InputError(
            "teacher_quantization: the teacher is the student's own base here; set quantization='4bit', which packs it "
            "for both, or give a teacher_model"
        )
    if config.teacher_quantization != "none" and config.teacher_mode != "frozen":
        raise InputError(f"teacher_quantization: packed weights cannot follow as teacher_mode={config.teacher_mode!r}")
    if whole and (config.quantization != "none" or is_quantized(model)):
        raise InputError("full fine-tuning cannot move weights of 4 bits; set lora_rank to train an adapter on them")
    if config.teacher_offload:
        refuse_useless_offload(shares, device)
        if teacher_model is not None and is_quantized(teacher_model):
            raise InputError("teacher_offload: teacher_model is in 4 bits, which stay on one device; drop one of them")
        return torch.device("cpu")
    if config.teacher_device == "auto":
        return device
    place = pick_device(config.teacher_device, name="teacher_device", make_current=False)
    if shares and not same_device(place, device):
        raise InputError(
            f"teacher_device={config.teacher_device!r}: the teacher shares the student's weights on {device}; "
            "drop teacher_device, or give a teacher_model"
        )
    return place


def refuse_useless_offload(shares: bool, device: torch.device) -> None:
    """shares: the teacher reads the student's own weights. Raises InputError where there is nothing to gain."""
    if shares:
        raise InputError(
            "teacher_offload: the teacher shares the student's weights, which stay on the GPU; drop teacher_offload, "
            "or give a teacher_model"
        )
    if device.type == "cpu":
        raise InputError("teacher_offload: the run is on the CPU, and so is its teacher; drop teacher_offload")


def _placed(model: Any, device: torch.device, dtype: torch.dtype, quantization: str) -> Any:
    """`model` on `device`, its parameters in `dtype` unless they are packed."""
    if quantization == "4bit":
        model = quantize_4bit(model, device, dtype, "quantization='4bit'")
    if is_quantized(model):
        keep_plain_layout(model)
        return model.to(device=device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: RoPE's frequencies are fp32 in a model of any type
    return model.to(device=device)


def _teacher(model: Any, device: torch.device, dtype: torch.dtype, quantization: str = "none") -> Any:
    """A model that is only read; one that was given keeps its type."""
    if quantization == "4bit":
        model = quantize_4bit(model, device, dtype, "teacher_quantization='4bit'")
    keep_plain_layout(model)
    return model.to(device=device).requires_grad_(False).eval()


def with_adapter(model: Any, config: OPCDConfig, device: torch.device) -> Any:
    """`model` with a fresh LoRA (or DoRA) adapter, its first weights fixed by the seed."""
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = config.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    past = _read_past_adapters(model)
    if past:
        logger.warning("student: no adapter on out_proj of %d Mamba layers, whose kernels read past one", len(past))
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=targets,
        exclude_modules=past or None,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    with seeded(stream_seed(config.seed, "adapter", 0), device):
        try:
            return get_peft_model(model, lora)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"lora_targets={config.lora_targets!r} does not fit this model: {reason}") from error


def _read_past_adapters(model: Any) -> list[str]:
    """Linear maps whose weight the layer around them hands to a fused kernel while it trains, so that an adapter would
    be left out there, and nowhere else: the last one of Mamba's mixers."""
    mixers = {name for name, module in model.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}
    return [f"{name}.out_proj" for name in sorted(mixers) if hasattr(model.get_submodule(name), "out_proj")]


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
    named = (part for name, parameter in model.named_parameters() for part in _plain_tensors(name, parameter))
    for name, parameter in named:
        seen.update(f"{name} {tuple(parameter.shape)}".encode())
        seen.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return seen.hexdigest()


def _plain_tensors(name: str, x: Tensor) -> list[tuple[str, Tensor]]:
    """What together says what a weight is that bitsandbytes packed; any other tensor is its own only part."""
    state: Any = getattr(x, "quant_state", None)
    if state is None or not hasattr(state, "as_dict"):
        return [(name, x)]
    parts = state.as_dict(packed=True)
    return [(name, x.detach().as_subclass(Tensor)), *((f"{name}.{key}", parts[key]) for key in sorted(parts))]
