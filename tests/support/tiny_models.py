"""Tiny random fp32 models for the tests, with attention far from uniform so that a wrong key shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from opcd_fast.models import seam

VOCABULARY = 97
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "llama-mha": lambda: LlamaConfig(**{**_SHAPE, "num_key_value_heads": 6}),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen2-mixed-window": lambda: Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=16),
    "mistral-no-window": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "mistral-window-below-context": lambda: MistralConfig(**_SHAPE, sliding_window=8),
    "mistral-window-in-suffix": lambda: MistralConfig(**_SHAPE, sliding_window=26),
    "mistral-window-above-all": lambda: MistralConfig(**_SHAPE, sliding_window=100),
    "olmo2": lambda: Olmo2Config(**_SHAPE),
    "gemma2": lambda: Gemma2Config(**_SHAPE, head_dim=8, sliding_window=8, attn_implementation="eager"),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}
UNPACKABLE = {
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**_SHAPE, new_decoder_architecture=True),
    "llama-dynamic-rope": lambda: LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
}


def tiny_model(name: str = "llama", *, seed: int = 0, **overrides: object) -> nn.Module:
    """A causal LM in eval mode; `overrides` are set on its configuration."""
    config = {**CONFIGS, **UNPACKABLE}[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)
    return model


def with_lora(model: nn.Module, **overrides: object) -> nn.Module:
    """PEFT around `model` with an adapter that does something."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **overrides}
    wrapped = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return wrapped


def random_ids(*lengths: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def pack(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(N,) ids and (B + 1,) int32 bounds."""
    bounds = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0)
    return torch.cat(sequences), bounds.int()


def plain_hidden(model: nn.Module, sequence: Tensor) -> Tensor:
    """(T, D): one sequence alone through the body, nothing of ours involved."""
    body = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    if body is model:  # Llama-4 names an attribute that it does not have
        body = model.model
    return body(input_ids=sequence.unsqueeze(0), use_cache=False).last_hidden_state[0]


def plain_after_context(model: nn.Module, context: Tensor, sequence: Tensor) -> Tensor:
    """(T, D): hidden states of `sequence` after `context`, one plain forward."""
    with torch.no_grad():
        return plain_hidden(model, torch.cat([context, sequence]))[len(context) :]


def tokens_run(model: nn.Module) -> list[int]:
    """A list that receives the number of tokens of every pass through the body."""
    counts: list[int] = []

    def count(_, args, kwargs):
        counts.append(kwargs["input_ids"].numel())

    seam.body_of(model).register_forward_pre_hook(count, with_kwargs=True)
    return counts


TOLERANCE = 1e-4


def assert_close(a, b, atol=TOLERANCE):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def reference(model, contexts, sequences, index):
    """(N, D): each sequence after its context, one plain forward pass each."""
    return torch.cat([plain_after_context(model, contexts[i], s) for s, i in zip(sequences, index, strict=True)])


def told(caplog):
    """What the library logged: others log too, some when they are first imported."""
    return [record for record in caplog.records if record.name == "opcd_fast"]
