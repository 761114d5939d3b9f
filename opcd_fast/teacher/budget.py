"""How many bytes one call of a teacher needs, from the configuration and the lengths alone.

What is counted is what a forward pass holds at its worst moment besides weights and stored prefixes: a few tensors of
the residual stream, and the larger of one layer's attention and one layer's MLP. Written for decoders whose layers have
attention and an MLP; of recurrent layers only the widths of their projections are known, not what their scan holds.
tests/teacher/test_teacher_budget.py compares it with what is allocated: that is at most 1.25 times what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from opcd_fast.models import seam

_LEAST_DEFAULT = 2**30
_WRITTEN_OUT = ("gelu_new", "gelu_fast", "quick_gelu")


def default_batch_bytes(body: nn.Module) -> int:
    """A quarter of the bytes of the weights, at least 1 GiB: 3.5 GiB for a Qwen3-8B in bf16."""
    return max(_LEAST_DEFAULT, sum(p.numel() * p.element_size() for p in body.parameters()) // 4)


@dataclass(frozen=True)
class Sizes:
    """Numbers of one token in the widest layer of a model."""

    hidden: int  # of the residual stream
    inner: int  # of the MLP, or of all experts that a token visits; or of a recurrent layer's projections
    inner_copies: int  # tensors of that width that exist at once
    routed: int  # copies of the residual stream that experts get, one for each that a token visits
    heads: int
    query: int  # of all heads
    keys: int  # keys and values of all heads that have their own
    repeated: int  # keys and values, repeated for every query head; 0 where attention does not need that
    element: int  # bytes
    eager: bool  # whether the model's own attention holds all its scores
    single: int  # bytes of a number in attention on a packed row, which may compute in float32
    window: int | None  # where all layers have one


def sizes_of(body: nn.Module) -> Sizes:
    """What one token of `body` occupies."""
    config = seam.config_of(body)

    def largest(*names: str) -> int:
        """Of the settings `names`, the largest; 0 for those that are missing. Layers may differ."""
        values = [x for name in names for x in _each(seam.setting(config, name))]
        return max((x for x in values if isinstance(x, int)), default=0)

    hidden = largest("hidden_size", "n_embd", "d_model")
    heads = largest("num_attention_heads", "n_head", "n_heads") or 1
    head = largest("head_dim", "global_head_dim") or hidden // heads
    # DeepSeek's keys and values come out of a low-rank projection at their full number of heads.
    key = largest("qk_nope_head_dim") + largest("qk_rope_head_dim") if largest("kv_lora_rank") else head
    value = largest("v_head_dim") or head
    own = heads if largest("kv_lora_rank") else largest("num_key_value_heads", "num_global_key_value_heads") or heads
    visited = largest("num_experts_per_tok", "top_k_experts") or 1
    experts = visited * (largest("moe_intermediate_size") or largest("intermediate_size"))
    routed = visited if largest("num_experts", "num_local_experts", "n_routed_experts") else 0
    shared = largest(
        "shared_expert_intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"
    )
    recurrent = largest("mamba_expand") * hidden + largest("mamba_intermediate_size")
    recurrent += largest("linear_num_value_heads") * largest("linear_value_head_dim")
    activation = seam.setting(config, "hidden_act") or seam.setting(config, "activation_function")
    parameter = next(body.parameters())
    element = parameter.element_size()
    kinds = _each(seam.setting(config, "layer_types"))
    window = largest("sliding_window") or None
    return Sizes(
        hidden=hidden,
        inner=max(largest("intermediate_size") or 4 * hidden, experts if routed else 0, shared, recurrent),
        # Gate, up and product; activations that are written out in single operations hold one more.
        inner_copies=4 if activation in _WRITTEN_OUT else 3,
        routed=routed,
        heads=heads,
        query=heads * max(key, value),
        keys=own * (key + value),
        repeated=heads * (key + value) if own != heads else 0,
        element=element,
        eager=config._attn_implementation == "eager",
        single=4 if parameter.device.type == "cpu" else element,
        window=None if "full_attention" in kinds else window,
    )


def _each(setting: object) -> list[object]:
    return list(setting) if isinstance(setting, list | tuple) else [setting]


@dataclass(frozen=True)
class Part:
    """Some sequences of a call: what their number and lengths come to."""

    sequences: int = 0
    tokens: int = 0
    longest: int = 0
    contexts: tuple[int, ...] = ()  # which, in the order of the sequences
    past: int = 0  # keys that layers hold of all of `contexts`
    longest_past: int = 0
    longest_whole: int = 0  # context and sequence together

    def plus(self, tokens: int, context: int, context_tokens: int, window: int | None = None) -> Part:
        """With one more sequence. window: of all layers, see `Sizes`."""
        past = context_tokens if window is None else min(context_tokens, window - 1)
        new = context not in self.contexts[-1:]  # sequences come sorted by context
        return Part(
            self.sequences + 1,
            self.tokens + tokens,
            max(self.longest, tokens),
            (*self.contexts, context) if new else self.contexts,
            self.past + (past if new else 0),
            max(self.longest_past, past),
            max(self.longest_whole, context_tokens + tokens),
        )


def part_bytes(sizes: Sizes, path: str, part: Part, fetched: bool = False) -> int:
    """Bytes that `path` holds at its worst moment for `part`.

    fetched: a layer's keys and values of the prefixes are copied for reading it, because they lie elsewhere.
    """
    s = sizes.element
    if path == "merge":
        rows, grid = part.tokens, part.sequences * part.longest
        past = part.past
        # The row's keys; queries; outputs of both phases and of the merge in float32; what a padded grid takes, which
        # devices without a varlen kernel use inside sequences. Of a prefix only what a window sees is copied.
        joined = 0 if sizes.window is None else past
        attention = (joined + 2 * rows) * sizes.keys * s + rows * sizes.query * (2 * s + 3 * 4)
        attention += grid * (2 * sizes.query + sizes.keys) * sizes.single
    else:
        whole = part.longest_whole if path == "concat" else part.longest
        rows = part.sequences * whole
        past = 0 if path == "concat" else part.longest_past
        keys = part.sequences * (past + whole)
        scores = whole * keys
        attention = (keys + 2 * rows) * sizes.keys * s + rows * sizes.query * 3 * s
        attention += keys * sizes.repeated * s + scores * (1 + s)  # what the mask makes of heads, and the mask itself
        if sizes.eager:
            attention += scores * sizes.heads * (2 * s + 4)
    attention += past * sizes.keys * s * fetched
    rotation = rows * (4 * sizes.query + sizes.keys) * s
    mlp = rows * (sizes.inner_copies * sizes.inner + 3 * sizes.routed * sizes.hidden) * s
    stream = rows * sizes.hidden * (3 * s + 8)  # the norms compute in float32
    return int(stream + max(attention, rotation, mlp))
