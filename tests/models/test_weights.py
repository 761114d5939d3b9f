"""The checksum of weights: what it tells apart, and what it takes for the same."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast.models import adapter_weights, base_weights, checksum, is_sharded, quantize_4bit, weights_of

TYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn,
    torch.bool, torch.complex64,
]  # fmt: skip
SHAPES = [(), (1,), (3, 5), (4097, 3), (70, 4096), (7, 8193), (33, 8192)]  # a block of a CPU is 131,072 words


def of(*tensors):
    return checksum((f"t{index}", x) for index, x in enumerate(tensors))


def random(shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    return x > 0 if dtype == torch.bool else x.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_counts(dtype, shape):
    x = random(shape, dtype)
    before = of(x)
    assert of(x.clone()) == before
    flat = x.view(-1).view(torch.uint8)
    places = torch.randint(len(flat), (20,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in {0, len(flat) // 2, len(flat) - 1, *places}:
        for bit in (1, 16, 128) if dtype != torch.bool else (1,):
            flat[place] ^= bit
            assert of(x) != before, (place, bit)
            flat[place] ^= bit
    assert of(x) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: x / 2,
        lambda x: x.flip(0),
        lambda x: x.roll(1, 1),
        lambda x: x.reshape(-1)[torch.randperm(x.numel())].view(x.shape),
        lambda x: x.t(),
        lambda x: x.flatten(),
        lambda x: torch.full_like(x, 1.0),
        lambda x: torch.full_like(x, 2.0),
        lambda x: torch.zeros_like(x),
        lambda x: torch.cat([x, x[:1]]),
        lambda x: x[:-1],
    ],
)
def test_changes_of_a_whole_tensor(dtype, change):
    x = random((64, 64), dtype)
    assert of(change(x)) != of(x)
    assert of(torch.full_like(x, 1.0)) != of(torch.full_like(x, 2.0))


def test_which_tensor_is_which_counts():
    a, b = random((5, 7)), random((5, 7), seed=1)
    assert of(a, b) != of(b, a)
    assert checksum([("a", a)]) != checksum([("b", a)])
    assert of(a) != of(a.view(torch.int32)) and of(a) != of(a.view(7, 5))
    assert of(torch.zeros(0), a) != of(a)
    assert of() == of() and of(torch.zeros(0)) == of(torch.zeros(0))


def test_layout_counts_and_strides_cost_no_copy(monkeypatch):
    x = random((5, 7))
    transposed = x.t().contiguous().t()
    assert torch.equal(x, transposed) and of(transposed) == of(transposed.clone())
    assert of(x[:, ::2]) == of(x[:, ::2].clone()) and of(x[:, ::2]) != of(-x[:, ::2])


def test_tensors_without_data_and_of_inference_mode():
    assert of(torch.empty(3, device="meta")) == of(torch.empty(3, device="meta")) != of(torch.empty(4, device="meta"))
    with torch.inference_mode():
        inside = random((9000,))
        told = of(inside)
    assert of(inside) == told == of(random((9000,)))
    assert of(torch.nn.Parameter(random((9000,)))) == told


def test_a_model_with_its_buffers_and_tied_weights():
    model = tiny_model(tie_word_embeddings=True)
    names = [name for name, _ in weights_of(model)]
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names
    assert "model.rotary_emb.inv_freq" in names and "model.rotary_emb.inv_freq" not in model.state_dict()
    before = checksum(weights_of(model))
    assert checksum(weights_of(copy.deepcopy(model))) == before
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert checksum(weights_of(model)) != before


def test_frequencies_that_calls_set_do_not_count():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model(rope_parameters={**rope, "original_max_position_embeddings": 16})
    before = checksum(weights_of(model))
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None])
    assert checksum(weights_of(model)) == before


def test_base_and_adapter_are_told_apart():
    model = lora_model()
    base, adapter = checksum(base_weights(model)), checksum(adapter_weights(model))
    assert len(base_weights(model)) + len(adapter_weights(model)) == len(weights_of(model))
    assert [x.shape for _, x in base_weights(model)] == [x.shape for _, x in weights_of(tiny_model())]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).data[0] += 1
    assert checksum(base_weights(model)) == base and checksum(adapter_weights(model)) != adapter
    assert adapter_weights(tiny_model()) == []


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_scales_of_packed_weights_count():
    def packed(model):
        return quantize_4bit(model, torch.device("cpu"), torch.float32, "quantization='4bit'")

    plain = tiny_model()
    plain.model.layers[1].mlp.up_proj.weight.data *= 2  # the same bytes and other scales
    assert checksum(weights_of(packed(tiny_model()))) == checksum(weights_of(packed(tiny_model())))
    assert checksum(weights_of(packed(plain))) != checksum(weights_of(packed(tiny_model())))
    model = packed(tiny_model())
    before = checksum(weights_of(model))
    model.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] += 1
    assert checksum(weights_of(model)) != before


def test_it_is_one_number_of_known_value():
    """Written out: both levels, with numbers as wide as they come."""
    from opcd_fast.models.weights import _row_weights

    x = torch.arange(3 * 4096 + 5, dtype=torch.int32) * 65537
    low, high = (list(map(int, _row_weights(level, torch.device("cpu")))) for level in (0, 1))
    words = list(map(int, x))
    rows = [sum(a * b for a, b in zip(words[i : i + 4096], low)) for i in range(0, len(words), 4096)]
    total = sum(a * b for a, b in zip(rows, high)) % 2**64
    assert of(x)[1] == (total - 2**64 * (total >= 2**63),)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = tiny_model()
    assert not is_sharded(weights_of(model))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    sharded = fully_shard(tiny_model(), mesh=mesh)
    assert is_sharded(weights_of(sharded))
    before = checksum(weights_of(sharded))
    assert checksum(weights_of(sharded)) == before
    with torch.no_grad():
        sharded.model.layers[1].mlp.up_proj.weight.to_local()[3, 4] += 1
    assert checksum(weights_of(sharded)) != before
