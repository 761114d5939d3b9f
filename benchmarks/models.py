"""The shapes of the models that benchmarks run or count, and models of random weights in such a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A dense decoder. Widths in numbers, `kv_heads` keys and values shared by `heads` queries (GQA)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int = 0

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration of a Llama-like model."""
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
                   config.num_key_value_heads, width, config.intermediate_size, config.vocab_size)  # fmt: skip

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear map of one layer: queries, keys, values, output, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.hidden, self.intermediate
        return (d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.layers * sum(a * b for a, b in self.products)

    @property
    def flops_per_pair(self) -> int:
        return 4 * self.layers * self.heads * self.head_dim

    def kv_bytes(self, context: int, element_size: int) -> int:
        """Keys and values of one context, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * context * element_size


SHAPES = {  # of their config.json on the Hub
    "Qwen3-8B": Shape(36, 4096, 32, 8, 128, 12_288, 151_936),
    "Qwen3-4B": Shape(36, 2560, 32, 8, 128, 9728, 151_936),
    "Qwen3-1.7B": Shape(28, 2048, 16, 8, 128, 6144, 151_936),
    "Llama-3-70B": Shape(80, 8192, 64, 8, 128, 28_672, 128_256),
    "SmolLM2-135M": Shape(30, 576, 9, 3, 64, 1536, 49_152),
    "tiny Llama": Shape(2, 32, 4, 2, 8, 64, 300),
}


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal LM of that shape in eval mode, weights drawn on the device: a Qwen3, a Llama where heads are small."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    kind = Qwen3Config if shape.head_dim == 128 else LlamaConfig
    torch.manual_seed(0)
    with torch.device(device):
        # Wide enough that a context changes the answers; no token is an end token, so that all answers are whole.
        config = kind(
            num_hidden_layers=shape.layers, hidden_size=shape.hidden, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
            vocab_size=shape.vocabulary, max_position_embeddings=40_960, tie_word_embeddings=True,
            initializer_range=0.05, bos_token_id=None, eos_token_id=shape.vocabulary - 1,
            pad_token_id=shape.vocabulary - 1,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
