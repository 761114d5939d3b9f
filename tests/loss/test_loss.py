"""Every option of the loss against float64 autograd, on every backend; bad input; the fine print."""

import itertools
import subprocess
import sys

import pytest
import torch
from loss_oracle import compare, leaf, logits64, problem, relative_error, states, token_kl64

from opcd_fast.kernels.csrc import native
from opcd_fast.loss import LMHead, fused_linear_logprobs, fused_linear_reverse_kl, reverse_kl, sequence_mean_weights
from opcd_fast.loss import operators as loss_operators

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
INF = float("inf")


def test_padded_vocabulary_of_unequal_sizes_and_unequal_widths(backend):
    student, h, _, _ = problem(width=16, vocabulary=720)
    teacher, h_t, _, _ = problem(width=24, vocabulary=1000)
    student = LMHead(student.weight, vocab_size=701)
    compare(student, h, LMHead(teacher.weight, vocab_size=701), h_t, backend)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_each_side_in_its_own_dtype(backend, dtypes):
    student, h, teacher, h_t = problem()
    student, h = LMHead(student.weight.to(dtypes[0])), h.to(dtypes[0])
    compare(student, h, LMHead(teacher.weight.to(dtypes[1])), h_t.to(dtypes[1]), backend)


@pytest.mark.parametrize("spare", [0, 30_000])
def test_small_workspaces_give_the_same_answer(backend, spare):
    """11 rows in chunks of one and of a few, with a remainder; on triton also in several gradient chunks."""
    smallest = {"torch": 22_800, "triton": 23_000, "native": 6_000}[backend]
    student, h, teacher, h_t = problem(rows=11)
    student = LMHead(student.weight, torch.linspace(-1, 1, 701))
    compare(student, h, teacher, h_t, backend, workspace_bytes=smallest + spare)


def test_token_weights_denominator_and_leading_dimensions(backend):
    student, h, teacher, h_t = problem(rows=12)
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 3.0]])
    h, h_t = h.view(3, 4, -1), h_t.view(3, 4, -1)
    compare(student, h, teacher, h_t, backend, weights=weights)
    compare(student, h, teacher, h_t, backend, weights=weights, denominator=50)
    kl = fused_linear_reverse_kl(h, student, h_t, teacher, token_weights=weights != 0, reduction="none")
    total = fused_linear_reverse_kl(h, student, h_t, teacher, token_weights=weights, reduction="sum")
    torch.testing.assert_close(total, (weights * kl).sum())
    mean = fused_linear_reverse_kl(
        h, student, h_t, teacher, token_weights=weights, denominator=torch.tensor(50.0), backend=backend
    )
    torch.testing.assert_close(mean, total / 50)


def test_rows_of_weight_zero_may_hold_anything(backend):
    student, h, teacher, h_t = problem(rows=4)
    h[1], h_t[2] = float("nan"), INF
    h_leaf = leaf(h)
    loss = fused_linear_reverse_kl(
        h_leaf, student, h_t, teacher, token_weights=torch.tensor([True, False, False, True]), backend=backend
    )
    loss.backward()
    assert loss.isfinite() and h_leaf.grad.isfinite().all() and not h_leaf.grad[1:3].any()


def test_all_weights_zero_and_no_rows(backend):
    student, h, teacher, h_t = problem(rows=3)
    for rows in (3, 0):
        h_leaf, weight = leaf(h[:rows]), leaf(student.weight)
        for options in ({}, {"reduction": "sum"}, {"denominator": torch.tensor(0.0)}):
            loss = fused_linear_reverse_kl(
                h_leaf, weight, h_t[:rows], teacher, token_weights=torch.zeros(rows), backend=backend, **options
            )
            loss.backward()
            assert float(loss.detach()) == 0.0 and not h_leaf.grad.any() and not weight.grad.any()


def test_reduction_none_has_gradients_for_any_upstream(backend):
    student, h, teacher, h_t = problem(rows=5)
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    h_leaf, weight = leaf(h), leaf(student.weight)
    fused_linear_reverse_kl(h_leaf, weight, h_t, teacher, reduction="none", backend=backend).backward(upstream)
    h_twin, w_twin = leaf(h, torch.float64), leaf(student.weight, torch.float64)
    token_kl64(logits64(h_twin, LMHead(w_twin)), logits64(h_t, teacher)).backward(upstream.double())
    assert relative_error(h_leaf.grad, h_twin.grad) < 1e-4
    assert relative_error(weight.grad, w_twin.grad) < 1e-4

    h[1] = float("nan")
    h_leaf = leaf(h)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0])
    kl = fused_linear_reverse_kl(h_leaf, student, h_t, teacher, reduction="none", token_weights=weights)
    kl.backward(torch.ones(5))
    assert kl[1] == 0 and kl.isfinite().all() and h_leaf.grad.isfinite().all() and not h_leaf.grad[1].any()


def test_a_teacher_from_inference_mode_and_weights_from_another_dtype():
    student, h, teacher, _ = problem(rows=4)
    with torch.inference_mode():
        h_t = h + 0.1
    h_leaf = leaf(h)
    fused_linear_reverse_kl(h_leaf, student, h_t, teacher, reduction="none").sum().backward()
    z_leaf = leaf(h @ student.weight.T)
    with torch.inference_mode():
        z_t = h_t @ teacher.weight.T
    reverse_kl(z_leaf, z_t, reduction="none").sum().backward()
    assert h_leaf.grad.any() and z_leaf.grad.any()


def test_what_was_made_in_inference_mode_is_kept_for_backward():
    student, h, teacher, h_t = problem(rows=4)
    size = student.weight.shape[0]
    with torch.inference_mode():
        weights, ids = torch.tensor([1.0, 0.0, 2.0, 0.5]), torch.tensor([3, 1, 0, 2])
        frozen = LMHead(teacher.weight.clone(), torch.zeros(size))

    def gradients(frozen, weights, ids):
        leaves = leaf(h), leaf(h)
        fused_linear_reverse_kl(
            leaves[0], student, h_t, frozen, token_weights=weights, reduction="none"
        ).sum().backward()
        fused_linear_logprobs(leaves[1], frozen, ids).sum().backward()
        return [x.grad for x in leaves]

    plain = gradients(LMHead(frozen.weight.clone(), frozen.bias.clone()), weights.clone(), ids.clone())
    assert all(map(torch.equal, gradients(frozen, weights, ids), plain)) and all(x.any() for x in plain)


@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_asked_for_are_computed(backend, trains, monkeypatch):
    student, h, teacher, h_t = problem(rows=3, vocabulary=130)
    seen = []
    original = loss_operators.linear_divergence

    def watched(*arguments):
        result = original(*arguments)
        seen.append(tuple(gradient is not None for gradient in result[1][1:]))
        return result

    monkeypatch.setattr(loss_operators, "linear_divergence", watched)
    parts = [h.clone(), student.weight.clone(), torch.zeros(130)]
    for part, train in zip(parts, trains, strict=True):
        part.requires_grad_(train)
    h_t.requires_grad_()
    loss = fused_linear_reverse_kl(parts[0], LMHead(*parts[1:]), h_t, teacher, backend=backend)
    assert loss.requires_grad == any(trains)
    if any(trains):
        loss.backward()
    assert seen == [trains]
    assert [part.grad is not None for part in parts] == list(trains)
    assert h_t.grad is None
    with torch.no_grad():
        assert not fused_linear_reverse_kl(parts[0], LMHead(*parts[1:]), h_t, teacher, backend=backend).requires_grad
    assert seen[-1] == (False, False, False)


def test_weights_that_are_one_number_expanded(backend):
    """As the upstream gradient of a sum is. A kernel that took them by address would read what lies behind."""
    student, h, teacher, h_t = problem(rows=6)
    results = []
    for weights in (torch.full((6,), 0.5), torch.tensor(0.5).expand(6)):
        late, given = leaf(h), leaf(h)
        fused_linear_reverse_kl(late, student, h_t, teacher, reduction="none", backend=backend).backward(weights)
        fused_linear_reverse_kl(
            given, student, h_t, teacher, reduction="sum", token_weights=weights, backend=backend
        ).backward()
        results.append((late.grad, given.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_non_contiguous_inputs(backend):
    student, h, teacher, h_t = problem(rows=6)
    weight = student.weight.T.contiguous().T
    h = torch.stack([h, h + 1], dim=-1)[..., 0]
    assert not h.is_contiguous() and not weight.is_contiguous()
    compare(LMHead(weight), h, teacher, h_t.T.contiguous().T, backend)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other column": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "every other row": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of_head", [True, False])
@pytest.mark.parametrize("bf16_dot", [True, False])
def test_bf16_inputs_in_any_layout(monkeypatch, layout, of_head, bf16_dot):
    """With the CPU's bf16 dot product, or what stands for it where the CPU has none, and without."""
    if not native.available():
        pytest.skip(native.status())
    monkeypatch.setattr(native, "has_bf16_dot", lambda: bf16_dot)
    h, w, h_t = states(7, 24, 610, 0.1)
    h_t = h_t.bfloat16()
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0])

    def run(*tensors, **options):
        h, w, h_t = tensors
        h, w = leaf(h), leaf(w)
        loss = fused_linear_reverse_kl(h, w, h_t, w.detach(), backend="native", **options)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    for options in ({}, {"token_weights": weights}, {"workspace_bytes": 150_000}):
        # The same numbers, so the same bits but for what BLAS does with another layout: one bf16 rounding.
        plain, laid_out = run(h, w, h_t, **options), run(layout(h), layout(w) if of_head else w, layout(h_t), **options)
        for found, wanted in zip(laid_out, plain, strict=True):
            assert relative_error(found, wanted) < torch.finfo(torch.bfloat16).eps


def test_two_runs_give_the_same_bits(backend):
    student, h, teacher, h_t = problem(rows=20, vocabulary=1500, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        h_leaf, weight = leaf(h), leaf(student.weight)
        loss = fused_linear_reverse_kl(h_leaf, weight, h_t, teacher, backend=backend)
        loss.backward()
        results.append((loss.detach(), h_leaf.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reverse_kl_from_logits(dtype, weighted, reduction):
    g = torch.Generator().manual_seed(0)
    z_s, z_t = (torch.randn(2, 5, 300, generator=g).to(dtype) for _ in range(2))
    weights = torch.rand(2, 5, generator=g) * (torch.rand(2, 5, generator=g) > 0.3) if weighted else None
    w = weights if weighted else torch.ones(2, 5)
    before = z_s.clone(), z_t.clone()
    z_leaf, z_twin = leaf(z_s), leaf(z_s, torch.float64)
    loss = reverse_kl(z_leaf, z_t, token_weights=weights, temperature=0.7, reduction=reduction)
    if reduction == "none":
        loss = (w * loss).sum() / w.sum()
    loss.backward()
    exact = (w * token_kl64(z_twin, z_t.double(), 0.7)).sum() / w.sum()
    exact.backward()
    assert torch.equal(z_leaf.detach(), before[0]) and torch.equal(z_t, before[1])
    assert abs(float(loss.detach()) / float(exact.detach()) - 1) < 1e-5
    assert relative_error(z_leaf.grad, z_twin.grad) < (3e-3 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_changes_nothing():
    student, h, teacher, h_t = problem()
    plain = fused_linear_reverse_kl(h, student, h_t, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, fused_linear_reverse_kl(h, student, h_t, teacher))


def test_sequence_mean_weights_of_a_mask_and_of_offsets():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    third = 1 / 6
    expected = torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0, 0], [0, third, third, third]])
    torch.testing.assert_close(sequence_mean_weights(mask), expected)
    packed = sequence_mean_weights(cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    torch.testing.assert_close(packed, expected[mask.bool()])
    assert not sequence_mean_weights(torch.zeros(2, 3)).any()
    for wrong in ({}, {"mask": mask, "cu_seqlens": torch.tensor([0, 1])}, {"mask": mask[0]},
                  {"cu_seqlens": torch.tensor([1, 2])}, {"cu_seqlens": torch.tensor([0, 3, 2])}):  # fmt: skip
        with pytest.raises(ValueError):
            sequence_mean_weights(**wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, ["temperature", "positive"]),
        ({"reduction": "batchmean"}, ["reduction", "'mean'"]),
        ({"reduction": "sum", "denominator": 3}, ["denominator", "'mean'"]),
        ({"denominator": 0}, ["denominator", "positive"]),
        ({"backend": "cuda"}, ["backend", "'torch'"]),
        ({"projection": "fp32"}, ["projection", "'auto'", "'separate'"]),
        ({"workspace_bytes": 100}, ["workspace_bytes", "at least"]),
        ({"workspace_bytes": -1}, ["workspace_bytes", "positive"]),
        ({"token_weights": torch.ones(4)}, ["token_weights", "(3,)"]),
        ({"token_weights": torch.ones(3, requires_grad=True)}, ["token_weights", "detach"]),
        ({"token_weights": torch.tensor([1.0, -1.0, 0.0])}, ["token_weights", "denominator"]),
    ],
)
def test_bad_options_say_what_and_what_instead(options, words):
    student, h, teacher, h_t = problem(rows=3)
    with pytest.raises(ValueError) as error:
        fused_linear_reverse_kl(h, student, h_t, teacher, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    student, h, teacher, h_t = problem(rows=3)
    with pytest.raises(ValueError, match="native.*float64.*'torch'"):
        if not native.available():
            pytest.skip(native.status())
        fused_linear_reverse_kl(h.double(), student, h_t, teacher, backend="native")
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(ValueError, match="native.*CPU library"):
        fused_linear_reverse_kl(h, student, h_t, teacher, backend="native")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="triton.*cuda"):
            fused_linear_reverse_kl(h, student, h_t, teacher, backend="triton")


def test_bad_tensors_say_what_and_what_instead():
    student, h, teacher, h_t = problem(rows=3)
    cases = [
        ((h, LMHead(student.weight, vocab_size=600), h_t, teacher), ["600", "701", "vocab_size"]),
        ((h[:, :8], student, h_t, teacher), ["student_hidden", "8", "16"]),
        ((h, student, h_t[:2], teacher), ["(3,)", "(2,)"]),
        ((h.long(), student, h_t, teacher), ["student_hidden", "int64"]),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError) as error:
            fused_linear_reverse_kl(*arguments)
        assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(TypeError, match=r"student_head is a Linear.*LMHead"):
        fused_linear_reverse_kl(h, torch.nn.Linear(3, 3), h_t, teacher)
    with pytest.raises(ValueError, match="vocabulary"):
        reverse_kl(torch.zeros(2, 3), torch.zeros(2, 4))


def test_checks_name_the_first_bad_row(monkeypatch):
    student, h, teacher, h_t = problem(rows=6)
    h[4, 2] = float("nan")
    h_t[5, 0] = INF
    monkeypatch.setenv("OPCD_CHECK", "1")
    with pytest.raises(ValueError, match="token_weights: entry 2"):
        fused_linear_reverse_kl(h, student, h_t, teacher, token_weights=torch.tensor([1, 1, INF, 1, 1, 1]))
    with pytest.raises(ValueError, match="student_hidden: row 4"):
        fused_linear_reverse_kl(h, student, h_t, teacher)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1])
    with pytest.raises(ValueError, match="teacher_hidden: row 5"):
        fused_linear_reverse_kl(h, student, h_t, teacher, token_weights=weights)
    fused_linear_reverse_kl(h[:4], student, h_t[:4], teacher)
    z_t = torch.zeros(3, 8)
    z_t[1, 3] = -INF
    reverse_kl(torch.zeros(3, 8), z_t)
    z_t[2, 3] = INF
    with pytest.raises(ValueError, match="teacher_logits: row 2"):
        reverse_kl(torch.zeros(3, 8), z_t)


def test_the_loss_imports_torch_alone():
    code = (
        "import sys; from opcd_fast.loss import LMHead, fused_linear_logprobs, fused_linear_reverse_kl; "
        "bad = [m for m in ('transformers', 'triton', 'peft', 'accelerate') if m in sys.modules]; "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
