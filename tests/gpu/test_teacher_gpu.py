"""Teacher and student on a CUDA device: the flash and varlen kernels, fp32's fallback, windows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, pack, plain_after_context, plain_hidden, random_ids, tiny_model

from opcd_fast import attention
from opcd_fast.student import packed_hidden_states
from opcd_fast.teacher import ContextTeacher

pytestmark = pytest.mark.gpu

# Head sizes that the flash kernels take; the tiny default of 8 is one, 64 is what models have.
NAMES = [*CONFIGS]


def on_gpu(name, dtype):
    return tiny_model(name).to("cuda", dtype)


@pytest.fixture(autouse=True)
def _exact_fp32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", NAMES)
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
@pytest.mark.parametrize("name", NAMES)
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
@pytest.mark.parametrize("name", NAMES)
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


def test_lse_layout_is_known_when_tokens_equal_heads():
    tokens = heads = 16
    row = attention.packed_row(torch.tensor([0, 5, tokens]), tokens, torch.device("cuda"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out, lse = attention.causal_attention(q, k, v, row, 0.125, with_lse=True)
    exact, exact_lse = attention.causal_attention(q.float(), k.float(), v.float(), row, 0.125, with_lse=True)
    torch.testing.assert_close(lse, exact_lse, atol=2e-2, rtol=0)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)


def test_memory_does_not_hold_the_context_per_sequence():
    model = tiny_model(max_position_embeddings=9000).to("cuda", torch.bfloat16)
    ids, bounds = pack(random_ids(*[8] * 64))
    teacher = ContextTeacher(model, random_ids(8000)[0], path="merge")
    assert teacher.prefixes[0].nbytes == 2 * 3 * 8000 * 2 * 8 * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    teacher.hidden_states_packed(ids.cuda(), bounds.cuda())
    assert torch.cuda.max_memory_allocated() - before < 64 * 8000 * 2 * 8 * 2  # one layer's keys, replicated
