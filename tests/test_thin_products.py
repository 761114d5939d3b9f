"""Products the other way round: the same numbers, only where they are meant to be made so, and nothing left behind."""

import pytest
import torch
from tiny import lora_model, tiny_model
from torch import nn

from opcd_fast import thin_products as module
from opcd_fast.decoding import decode
from opcd_fast.merged import MergedCopy
from opcd_fast.thin_products import FEWEST_ROWS, MOST_ROWS, thin_products


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def turned(two_threads, monkeypatch):
    """Calls of torch.mm with a weight as the left factor."""
    calls, mm = [], torch.mm

    def counted(left, right):
        calls.append((tuple(left.shape), right.shape[1]))
        return mm(left, right)

    monkeypatch.setattr(torch, "mm", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(FEWEST_ROWS,), (3, 5), (MOST_ROWS, 1), (2, 3, 4)])
def test_results_are_those_of_float64(turned, bias, shape):
    layer = nn.Linear(131, 257, bias=bias)
    x = torch.randn(*shape, 131)
    with torch.no_grad(), thin_products(layer):
        got = layer(x)
    assert turned and got.shape == (*shape, 257) and got.is_contiguous()
    wanted = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEWEST_ROWS - 1, MOST_ROWS + 1])
def test_other_numbers_of_rows_are_left_alone(turned, rows):
    layer, x = nn.Linear(130, 256), torch.randn(rows, 130)
    with torch.no_grad():
        wanted = layer(x)
        with thin_products(layer):
            assert torch.equal(layer(x), wanted)
    assert not turned


def special():
    input_major = nn.Linear(130, 256)
    input_major.weight = nn.Parameter(input_major.weight.detach().t().contiguous().t())

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    replaced = nn.Linear(130, 256)
    replaced.forward = lambda x: x
    return {"input-major": input_major, "class": Scaled(130, 256), "forward": replaced, "small": nn.Linear(130, 16),
            "bf16": nn.Linear(130, 256).bfloat16()}  # fmt: skip


@pytest.mark.parametrize("name", special())
def test_other_layers_are_left_alone(turned, name):
    layer = special()[name]
    before = dict(vars(layer))
    x = torch.randn(16, 130).to(layer.weight.dtype)
    with torch.no_grad(), thin_products(layer):
        layer(x)
    assert not turned and vars(layer).keys() == before.keys()


def test_one_thread_gains_nothing(turned, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = nn.Linear(130, 256)
    with torch.no_grad(), thin_products(layer):
        layer(torch.randn(16, 130))
    assert not turned


def test_forwards_are_as_before_also_after_an_error(two_threads):
    layer = nn.Linear(130, 256)
    with pytest.raises(RuntimeError), thin_products(layer):
        assert "forward" in vars(layer)
        raise RuntimeError
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["plain", "lora", "merged"])
def test_answers_are_the_same(two_threads, turned, monkeypatch, kind):
    size = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = tiny_model(**size) if kind == "plain" else lora_model(**size)
    if kind == "merged":
        model = MergedCopy(model).refresh()
    prompts = [[3 + i, 7, 9 + i, 11][: 2 + i % 3] for i in range(12)]
    uniform = torch.rand(12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"stop_token_ids": [5], "temperature": 1.0, "top_p": 1.0}
    found = decode(model.eval(), prompts, uniform, **options)
    shapes = {shape for shape, _ in turned}
    assert ({(160, 128), (128, 160)} <= shapes) == (kind != "merged")  # its layers are stored the other way
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    turned.clear()
    plain = decode(model, prompts, uniform, **options)
    assert not turned
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in plain]
    for (_, ours), (_, theirs) in zip(found, plain):
        assert ours == pytest.approx(theirs, abs=1e-5)
