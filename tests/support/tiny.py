"""A random Llama of 2 layers and a byte-level tokenizer with a chat template: the whole job in a second, offline."""

from __future__ import annotations

import copy
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # wide, so that a context changes the answers
        "eos_token_id": 256,
        "pad_token_id": 256,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


def lora_model(dtype=torch.float32, rank=4, **changes):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model(**changes), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def in_bf16(model):
    """A copy with parameters in bfloat16, and buffers as they are."""
    cast = copy.deepcopy(model).eval()
    for parameter in cast.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return cast


def logprobs_by_hand(model, prompt, answer, temperature, top_p=1.0):
    """(T,) float64 on the CPU, from one plain forward of `model` wherever it is."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]], device=device)).logits[0, len(prompt) - 1 : -1]
    logits = logits.double().cpu() / temperature
    if top_p < 1:
        order = logits.sort(descending=True, dim=-1)
        before = order.values.softmax(-1).cumsum(-1) - order.values.softmax(-1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order.indices, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def prefixed(model=None, count=5, dtype=torch.float32):
    """With random keys and values, so that nothing depends on how they begin."""
    from peft import PrefixTuningConfig, get_peft_model

    model = (model or tiny_model()).to(dtype)
    torch.manual_seed(3)
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)).eval()
