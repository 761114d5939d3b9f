"""Linear layers with their weights in oneDNN's blocks compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from tiny import lora_model
from torch import nn

from opcd_fast.models import BlockedLinear, MergedCopy

TYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if BlockedLinear.takes(dtype)]
pytestmark = pytest.mark.skipif(not TYPES, reason="this torch has no oneDNN kernels")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(23,), (1, 23), (5, 23), (2, 3, 23), (0, 23), (65, 1, 23)], ids=str)
def test_products_are_those_of_the_plain_layer(shape, bias, dtype):
    plain = nn.Linear(23, 37, bias=bias, dtype=dtype).requires_grad_(False)
    layer, hidden = BlockedLinear(plain.bias), torch.randn(*shape, dtype=dtype)
    hidden = hidden.transpose(0, -2).contiguous().transpose(0, -2) if len(shape) > 2 else hidden
    for weight in (plain.weight.clone(), torch.randn(37, 23).to(dtype)):
        layer.load(weight)
        own = plain.bias.double() if bias else torch.zeros(37, dtype=torch.float64)
        wanted = hidden.double() @ weight.double().t() + own
        size = hidden.double().abs() @ weight.double().abs().t() + own.abs()  # of what is summed, in float32
        bound = torch.finfo(dtype).eps * wanted.abs() + 24 * torch.finfo(torch.float32).eps * size
        assert ((layer(hidden).double() - wanted).abs() <= bound).all()
        assert layer.weight.to_dense().equal(weight)


@pytest.mark.skipif(torch.float32 not in TYPES, reason="nothing is blocked")
def test_a_merged_copy_on_a_cpu_has_its_adapted_layers_and_its_head_in_blocks():
    copied = MergedCopy(lora_model(torch.float32)).refresh()
    blocked = {name for name, layer in copied.named_modules() if isinstance(layer, BlockedLinear)}
    assert "lm_head" in blocked and any(name.endswith("q_proj") for name in blocked)
    half = MergedCopy(lora_model(torch.float64)).refresh()
    assert not any(isinstance(layer, BlockedLinear) for layer in half.modules())
