"""The one seam to transformers' and PEFT's versions: loading, names, architectures, packed forward, adapters,
quantization, which weights these are."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.models import seam
    from opcd_fast.models.answering import CastCopy, copy_for_answers
    from opcd_fast.models.architectures import (
        kernels_of, moving_rope, refuses_merge, refuses_packing, refuses_pad, refuses_plain_cache, refuses_sharing,
        refuses_stock_attention, rope_switch,
    )  # fmt: skip
    from opcd_fast.models.blocks import BlockedLinear
    from opcd_fast.models.loading import (
        cpu_has_bf16, first_line, load_model, load_settings, load_tokenizer, pick_device, pick_dtype,
        refuse_unsupported, resolve, same_device, same_tokenizer, with_adapter,
    )  # fmt: skip
    from opcd_fast.models.merged import MergedCopy
    from opcd_fast.models.names import SMOLLM2, SMOLLM2_ON_THE_HUB, Place, base_of_adapter, cache_dir, is_path, place_of
    from opcd_fast.models.own_cache import OwnCache, refuses_own_cache
    from opcd_fast.models.packed import forward_on_row, packed_hidden_states, padded_forward
    from opcd_fast.models.prefix_tuning import virtual_tokens, with_prefix
    from opcd_fast.models.quantized import (
        is_quantized, keep_plain_layout, quantize_4bit, require_bitsandbytes, unmark_4bit,
    )  # fmt: skip
    from opcd_fast.models.shared_prompts import shared_prompt_hidden_states, shares_prompts
    from opcd_fast.models.weights import Checksum, adapter_weights, base_weights, checksum, is_sharded, weights_of

__getattr__, __dir__, __all__ = door(__name__)
