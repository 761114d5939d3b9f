"""Teacher and student on a CUDA device: the flash and varlen kernels, fp32's fallback, windows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, pack, plain_after_context, plain_hidden, random_ids, tiny_model

from opcd_fast.attention import PackedCall, packed_row
from opcd_fast.models import packed_hidden_states
from opcd_fast.teacher import ContextTeacher

pytestmark = pytest.mark.gpu


def on_gpu(name, dtype):
    return tiny_model(name).to("cuda", dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_matches_concat_in_fp32(name):
    model = on_gpu(name, torch.float32)
    contexts, (ids, bounds) = random_ids(20, 6, 0), pack(random_ids(5, 1, 17, 4, 9, seed=2))
    merge, concat = ContextTeacher(model, contexts), ContextTeacher(model, contexts, path="concat")
    assert merge.path == "merge"
    for index in ([1, 0, 2, 0, 1], [0] * 5):
        a = merge.hidden_states_packed(ids.cuda(), bounds.cuda(), context_index=index)
        b = concat.hidden_states_packed(ids.cuda(), bounds.cuda(), context_index=index)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_as_close_to_fp32_as_concat(name, dtype):
    exact_model, model = on_gpu(name, torch.float32), on_gpu(name, dtype)
    (context,), sequences = random_ids(20), random_ids(5, 1, 17, 4, 9, seed=2)
    exact = torch.cat([plain_after_context(exact_model, context.cuda(), s.cuda()) for s in sequences])
    ids, bounds = pack(sequences)
    merge = ContextTeacher(model, context)
    assert merge.path == "merge", merge.explain()
    errors = []
    for teacher in (merge, ContextTeacher(model, context, path="concat")):
        hidden = teacher.hidden_states_packed(ids.cuda(), bounds.cuda())
        assert hidden.dtype == dtype
        errors.append(((hidden.float() - exact).norm() / exact.norm()).item())
    # The rounding of a tiny random model varies from run to run of kernels by more than a big one's.
    assert errors[0] <= 1.5 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_student_gradients(name, dtype):
    model = on_gpu(name, dtype)
    sequences = [s.cuda() for s in random_ids(5, 1, 30, 12)]
    ids, bounds = pack(sequences)
    results = []
    for packed in (True, False):
        model.zero_grad()
        hidden = (
            packed_hidden_states(model, ids, bounds.cuda())
            if packed
            else torch.cat([plain_hidden(model, s) for s in sequences])
        )
        hidden.float().square().sum().backward()
        results.append((hidden.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (a, grads_a), (b, grads_b) = results
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert ((a - b).float().norm() / b.float().norm()).item() <= tolerance
    for x, y in zip(grads_a, grads_b, strict=True):
        assert ((x - y).float().norm() / y.float().norm().clamp_min(1e-3)).item() <= tolerance


class Layer(torch.nn.Module):
    layer_idx = 0


def test_lse_layout_is_known_when_tokens_equal_heads():
    """A sink takes its part by the logsumexp, which would fit in the wrong layout too."""
    tokens = heads = 16
    row = packed_row(torch.tensor([0, 5, tokens]), tokens, torch.device("cuda"))
    torch.manual_seed(0)
    given = [torch.randn(1, heads, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    options = {"scaling": 0.125, "s_aux": torch.randn(heads, device="cuda")}
    out, _ = PackedCall(row).attend(Layer(), *given, None, **options)
    exact, _ = PackedCall(row).attend(Layer(), *(x.float() for x in given), None, **options)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-window", "gemma2"])
def test_prefixes_from_the_host_give_the_same_numbers(name):
    model = on_gpu(name, torch.float32)
    contexts, (ids, bounds) = random_ids(90, 6, 0), pack(random_ids(5, 1, 17, 4, 9, seed=2))
    here = ContextTeacher(model, contexts)
    there = ContextTeacher(model, contexts, prefix_device="cpu")
    assert here.path == there.path == ("pad" if name == "gemma2" else "merge"), there.explain()
    for _ in range(20):  # a race would not show every time
        want = here.hidden_states_packed(ids.cuda(), bounds.cuda(), context_index=[1, 0, 2, 0, 1])
        got = there.hidden_states_packed(ids.cuda(), bounds.cuda(), context_index=[1, 0, 2, 0, 1])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    for prefix in there.prefixes:
        assert all(x.is_pinned() for x in (*prefix.keys, *prefix.values) if x.numel())
        assert set(prefix.nbytes_by_device) <= {"cpu"}


@pytest.mark.parametrize(("place", "layers"), [(None, 0), ("cpu", 1)])
def test_what_is_on_the_device_besides_the_prefix(place, layers):
    """Nothing of the context where it lies there; one layer at a time where it comes from the host."""
    sizes = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 9000}
    model = tiny_model(**sizes).to("cuda", torch.bfloat16)
    teacher = ContextTeacher(model, random_ids(8000)[0], path="merge", prefix_device=place)
    layer = teacher.prefixes[0].nbytes // 3
    assert layer == 2 * 8000 * 8 * 64 * 2
    ids, bounds = pack(random_ids(*[8] * 8))
    teacher.hidden_states_packed(ids.cuda(), bounds.cuda())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    teacher.hidden_states_packed(ids.cuda(), bounds.cuda())
    assert torch.cuda.max_memory_allocated() - before < (layers + 0.5) * layer
