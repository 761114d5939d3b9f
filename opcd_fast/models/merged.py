"""A plain copy of a LoRA or DoRA model with the adapter folded into the weights, for generation.

Decoding multiplies thin matrices, where unmerged adapters and row-major weights cost as much as the model itself: on a
CPU the folded copy has its weights in blocks (`blocks`). On a CPU that emulates bf16 products the copy of a bf16 model
is in float32: more bytes, less time. Folding into the training model instead would leave rounding in the base weights
with every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opcd_fast.models import seam
from opcd_fast.models.blocks import BlockedLinear
from opcd_fast.models.loading import cpu_has_bf16
from opcd_fast.models.weights import Checksum, adapter_weights, base_weights, checksum


class MergedCopy:
    """Shares everything with `peft_model` but the weights of the adapted linear layers.

    Of a model that it holds in another type (`type_of`) it shares nothing. Its weights hold numbers after the first
    `refresh`.

    Args:
        peft_model: a PeftModel whose adapters are LoRA or DoRA on nn.Linear layers (see `supports`).
        device: what the copy is made for, "cuda" or "cpu". None: where the model is.
        frozen_base: the caller knows that nothing but the adapter changes; saves reading the rest at each `refresh`.
    """

    def __init__(self, peft_model: Any, device: str | None = None, *, frozen_base: bool = False) -> None:
        self._source, self._frozen_base = peft_model, frozen_base
        self._on_cpu = (device or next(peft_model.parameters()).device.type) == "cpu"
        self.model: Any = None
        self._copy()

    def _copy(self) -> None:
        peft_model, on_cpu = self._source, self._on_cpu
        self.model = None  # never two
        self._copied_from = self._base()
        self._folded: Any = None
        dtype = self.type_of(peft_model) if on_cpu else None
        # Adapted layers, the type of their weights here, and what puts these in place.
        self._pairs: list[tuple[Any, torch.dtype, Callable[[Tensor], Any]]] = []
        shared = {id(p): p for p in peft_model.parameters()} if dtype is None else {}
        self.model = copy.deepcopy(peft_model, shared).unload().eval()
        if dtype is not None:
            self.model.to(dtype)
        for name, layer in peft_model.named_modules():
            if not _is_lora(layer):
                continue
            name = name.removeprefix("base_model.model.")
            plain = self.model.get_submodule(name)
            weight = plain.weight.detach()
            if on_cpu and BlockedLinear.takes(weight.dtype):
                blocked = BlockedLinear(plain.bias)  # without weights until `refresh`
                self.model.set_submodule(name, blocked)
                self._pairs.append((layer, weight.dtype, blocked.load))
            else:
                plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
                self._pairs.append((layer, weight.dtype, plain.weight.copy_))
        head = self.model.get_output_embeddings()
        # Not adapted, but read at every token.
        if isinstance(head, nn.Linear) and on_cpu and BlockedLinear.takes(head.weight.dtype):
            blocked = BlockedLinear(head.bias)
            blocked.load(head.weight)
            self.model.set_output_embeddings(blocked)

    @staticmethod
    def type_of(model: Any) -> torch.dtype | None:
        """The type the copy is held in where that is not the model's own: float32 where bf16 would be emulated."""
        weight = next(model.parameters())
        emulated = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not cpu_has_bf16()
        return torch.float32 if emulated else None

    @staticmethod
    def bytes_needed(model: Any) -> int:
        """Bytes of the weights that the copy does not share with `model`."""
        dtype, weight = MergedCopy.type_of(model), next(model.parameters())
        blocks = weight.device.type == "cpu" and BlockedLinear.takes(dtype or weight.dtype)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if dtype is not None:
            twice = head is not None and head.weight is embedding.weight and blocks  # tied, and the copy's are two
            extra = head.weight.numel() if twice else 0
            return 4 * (sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) + extra)
        adapted = [layer.base_layer.weight for layer in model.modules() if _is_lora(layer)]
        if head is not None and blocks:
            adapted.append(head.weight)
        return sum(weight.numel() * weight.element_size() for weight in adapted)

    @staticmethod
    def supports(model: Any) -> bool:
        """True for a PEFT model whose only adapters are LoRA or DoRA, no other variant, on nn.Linear layers."""
        if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
            return False
        configs = list(model.peft_config.values())
        if any(str(getattr(c.peft_type, "value", c.peft_type)) != "LORA" for c in configs) or len(configs) != 1:
            return False
        # Variants whose effect is more than W + scale * B A, and the norms of its rows.
        names = ("lora_bias", "modules_to_save", "target_parameters", "alora_invocation_tokens")
        if configs[0].bias != "none" or any(getattr(configs[0], name, None) for name in names):
            return False
        layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
        return bool(layers) and all(_is_lora(layer) for layer in layers)

    @torch.no_grad()
    def refresh(self) -> Any:
        """The plain model with the weights and the adapter of this moment; what did not change is not made again."""
        if self._base() != self._copied_from:
            self._copy()
        adapter = checksum(adapter_weights(self._source)), seam.adapter_state(self._source)
        if adapter != self._folded:
            self._fold()
            self._folded = adapter
        return self.model

    def _base(self) -> Checksum:
        return () if self._frozen_base else checksum(base_weights(self._source))

    def _fold(self) -> None:
        for layer, dtype, put in self._pairs:
            put(_folded(layer, dtype))


def _folded(layer: Any, dtype: torch.dtype) -> Tensor:
    """(out, in): the weights that the layer multiplies by, its adapter among them while it is active."""
    (adapter,) = layer.lora_A
    base = layer.base_layer.weight.to(dtype)
    if adapter not in layer.active_adapters or layer.disable_adapters:
        return base
    if adapter in layer.lora_magnitude_vector:
        return _dora_weight(layer, adapter).to(dtype)
    up, down = layer.lora_B[adapter].weight.to(dtype), layer.lora_A[adapter].weight.to(dtype)
    return torch.addmm(base, up, down, alpha=layer.scaling[adapter])


def _dora_weight(layer: Any, adapter: str) -> Tensor:
    """m / |W + scale B A| (W + scale B A), row by row (DoRA, arXiv 2402.09353, Eq. 5); (out, in) float32.

    As the unmerged layer does: adapters are float32, and so are the sum and its norms. Rounded once, by the caller.
    """
    up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    whole = torch.addmm(layer.base_layer.weight.to(up.dtype), up, down, alpha=layer.scaling[adapter])
    norms = torch.linalg.vector_norm(whole, dim=1, keepdim=True)
    return whole.mul_(layer.lora_magnitude_vector[adapter].weight.unsqueeze(1) / norms)


def _is_lora(layer: Any) -> bool:
    base = getattr(layer, "base_layer", None)
    # A layer of packed weights is an nn.Linear too, by inheritance.
    return hasattr(layer, "lora_A") and isinstance(base, nn.Linear) and base.weight.is_floating_point()
