"""Fingerprints of weights: every byte counts, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model, with_lora

from opcd_fast import fingerprint
from opcd_fast import transformers_seam as seam


def of(x, name="x"):
    return fingerprint.of_tensors([(name, x)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 3, 1000, (1 << 18) + 5])
def test_any_single_value_counts(dtype, size):
    x = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = of(x)
    assert of(x.clone()) == before
    for place in {0, size // 2, size - 1} if size else ():
        changed = x.clone()
        changed[place] = 1 - int(changed[place])
        assert of(changed) != before


def test_swaps_shapes_names_and_types_count():
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    seen = {of(x), of(x, "y"), of(x.view(2, -1)), of(x.view(torch.int32)), of(x.flip(0)), of(x.roll(2)), of(-x)}
    swapped = x.clone()  # whole 8-byte words, inside of a run and between runs
    swapped[[0, 1, 10, 11]] = x[[10, 11, 0, 1]]
    seen.add(of(swapped))
    swapped = x.clone()
    swapped[: 1 << 17], swapped[1 << 18 : 3 << 17] = x[1 << 18 : 3 << 17], x[: 1 << 17]
    seen.add(of(swapped))
    assert len(seen) == 9


def test_every_sign_counts():
    """The highest bit of a word is lost when its factor is even."""
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    before = of(x)
    for place in range(400):
        changed = x.clone()
        changed[place].neg_()
        assert of(changed) != before


def test_layout_in_memory_does_not_count():
    x = torch.randn(7, 5)
    assert of(x.t().contiguous().t()) == of(x)
    assert of(torch.cat([torch.zeros(1), x.flatten()])[1:]) == of(x.flatten())  # begins at 4 bytes
    assert of(torch.nn.Parameter(x)) == of(x)


def test_what_bytes_do_not_describe_is_refused():
    class Packed(torch.Tensor):
        pass

    for x in (torch.zeros(3).as_subclass(Packed), torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()):
        with pytest.raises(fingerprint.NoFingerprintError, match="weight"):
            of(x, "weight")


def test_every_weight_and_buffer_of_the_body_counts():
    model = tiny_model()
    before = fingerprint.of_teacher(model, "disabled")
    assert fingerprint.of_teacher(copy.deepcopy(model), "active") == before
    body = seam.body_of(model)
    tensors = [*body.named_parameters(), *body.named_buffers()]
    assert any("inv_freq" in name for name, _ in tensors)
    for _, tensor in tensors:
        flat = tensor.data.view(-1)
        old = flat[-1].clone()
        flat[-1] += 1e-3  # through .data, which torch does not count
        assert fingerprint.of_teacher(model, "disabled") != before
        flat[-1] = old
    assert fingerprint.of_teacher(model, "disabled") == before
    model.lm_head.weight.data.add_(1.0)  # no key or value depends on it
    assert fingerprint.of_teacher(model, "disabled") == before


def test_adapters_count_when_they_act():
    plain, model = tiny_model(), with_lora(tiny_model())
    assert fingerprint.of_teacher(model, "disabled") == fingerprint.of_teacher(plain, "disabled")
    active = fingerprint.of_teacher(model, "active")
    assert active == fingerprint.of_teacher(copy.deepcopy(model), "active")
    seen = {active, fingerprint.of_teacher(plain, "active")}
    with model.disable_adapter():
        seen.add(fingerprint.of_teacher(model, "active"))
    layer = seam.adapter_modules(model)[0]
    layer.scaling["default"] *= 2  # not a parameter
    seen.add(fingerprint.of_teacher(model, "active"))
    layer.scaling["default"] /= 2
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] += 1
    seen.add(fingerprint.of_teacher(model, "active"))
    assert len(seen) == 5
    assert fingerprint.of_teacher(model, "disabled") == fingerprint.of_teacher(plain, "disabled")


@pytest.mark.slow  # another process imports transformers and peft: 7 seconds
def test_same_in_another_process():
    """Nothing depends on hash seeds or addresses."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_models import tiny_model, with_lora\n"
        "from opcd_fast import fingerprint\n"
        "from opcd_fast.prefix_store import identity_of\n"
        "model = with_lora(tiny_model(), target_modules=['q_proj', 'v_proj', 'o_proj'])\n"
        "print(identity_of(model, fingerprint.of_teacher(model, 'active')))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    outputs = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(outputs) == 1 and "weights" in outputs.pop()
