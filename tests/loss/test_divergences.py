"""fused_linear_divergence: every divergence against float64 autograd of its textbook formula, on every backend."""

import inspect
import itertools
from pathlib import Path

import pytest
import torch
from loss_oracle import compare, divergence64, logits64, problem

from opcd_fast.loss import (
    DIVERGENCES,
    PARAMETERS,
    LMHead,
    check_divergence,
    fused_linear_divergence,
    fused_linear_reverse_kl,
    unused_parameter,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
INF = float("inf")
PLAIN = [
    ("reverse_kl", {}),
    ("forward_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 1.0}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.0}),
    ("skew_forward_kl", {"alpha": 0.3}),
    ("skew_forward_kl", {"alpha": 0.0}),
    ("gated_kl", {"gate": "kl"}),
    ("gated_kl", {"gate": "tv"}),
]
EACH = [PLAIN[i] for i in (0, 1, 2, 6, 8, 10, 11)]  # none at its ends
TRUNCATED = [
    ("topk_reverse_kl", {"k": k, "tail": tail})
    for k in (1, 7, 10_000)
    for tail in ("none", "renormalize", "bucket")
]
IDS = [f"{name}-{'-'.join(map(str, o.values()))}" for name, o in PLAIN + TRUNCATED]


@pytest.mark.parametrize(("name", "options"), PLAIN + TRUNCATED, ids=IDS)
def test_value_and_gradients(name, options, backend):
    compare(*problem(), backend, name, options)


@pytest.mark.parametrize(
    ("name", "options"), [*EACH, TRUNCATED[3], TRUNCATED[5]], ids=lambda x: str(x)
)
def test_with_every_transform(name, options, backend):
    student, h, teacher, h_t = problem()
    g = torch.Generator().manual_seed(3)
    student = LMHead(student.weight, torch.randn(701, generator=g), 0.5, 6.0, vocab_size=690)
    teacher = LMHead(teacher.weight, torch.randn(701, generator=g), 1.5, None, vocab_size=690)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 3.0, 1.0])
    compare(student, h, teacher, h_t, backend, name, options, temperature=0.7, weights=weights)


@pytest.mark.parametrize("spread", [0.03, 0.003])
@pytest.mark.parametrize(
    ("name", "options"), [PLAIN[1], PLAIN[2], *PLAIN[10:], TRUNCATED[4]], ids=lambda x: str(x)
)
def test_small_divergences_keep_their_digits(name, options, spread, backend):
    stats = compare(*problem(spread=spread), backend, name, options, tolerance=3e-3)
    assert (stats.token_kl >= 0).all() and float(stats.token_kl.mean()) < 3e-3


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl", "gated_kl", "topk_reverse_kl"])
def test_small_workspaces_and_the_late_reduction_give_the_same(name, backend):
    student, h, teacher, h_t = problem(rows=11)
    upstream = torch.linspace(0.5, 2.0, 11)
    results = []
    for options in ({}, {"workspace_bytes": 60_000}, {"reduction": "none"}):
        h_leaf, w_leaf = h.clone().requires_grad_(), student.weight.clone().requires_grad_()
        loss = fused_linear_divergence(
            h_leaf, w_leaf, h_t, teacher, divergence=name, backend=backend, token_weights=upstream,
            **{"reduction": "sum", **options},
        )  # fmt: skip
        if loss.ndim:
            loss = (loss * upstream).sum()
        loss.backward()
        results.append((loss.detach(), h_leaf.grad, w_leaf.grad))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-6)


# A numerical derivative would go through the gate too: test_value_and_gradients compares it with autograd instead.
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "gated_kl"])
def test_gradcheck_in_float64(name):
    g = torch.Generator().manual_seed(0)
    h, h_t = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    w, w_t = (torch.randn(11, 4, generator=g, dtype=torch.float64) for _ in range(2))
    b = torch.randn(11, generator=g, dtype=torch.float64)
    for reduction, softcap, tail in itertools.product(("sum", "none"), (None, 2.0), ("none", "renormalize", "bucket")):
        if tail != "none" and name != "topk_reverse_kl":
            continue

        def loss(h, w, b, reduction=reduction, softcap=softcap, tail=tail):
            return fused_linear_divergence(
                h, LMHead(w, b, 0.7, softcap, vocab_size=10), h_t, LMHead(w_t, vocab_size=10), divergence=name, k=4,
                tail=tail, beta=0.3, alpha=0.2, temperature=1.3, reduction=reduction,
            )  # fmt: skip

        torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (h, w, b)])


def test_infinities_of_each_divergence(backend):
    """Row 0 harmless; the bias forbids token 5 to the student or to the teacher."""
    student, h, teacher, h_t = problem(rows=3, vocabulary=64)
    bias = torch.zeros(64)
    bias[5] = -INF
    for forbids, (name, options) in itertools.product(("student", "teacher"), EACH):
        h_leaf = h.clone().requires_grad_()
        loss, stats = fused_linear_divergence(
            h_leaf, LMHead(student.weight, bias if forbids == "student" else None), h_t,
            LMHead(teacher.weight, bias if forbids == "teacher" else None),
            divergence=name, return_stats=True, backend=backend, **options,
        )  # fmt: skip
        loss.backward()
        infinite = forbids == {"reverse_kl": "teacher", "forward_kl": "student", "gated_kl": "student"}.get(name)
        assert (stats.token_kl == INF).all() == infinite, (name, forbids)
        assert h_leaf.grad.isfinite().all() and h_leaf.grad.any() != infinite
        assert not stats.token_kl.isnan().any()
        if name == "gated_kl":
            assert ((stats.gate == 1).all() if forbids == "teacher" else (stats.gate < 1).all()), options


@pytest.mark.parametrize("gate", ["kl", "tv"])
def test_gradients_of_the_gated_kl_in_float64(gate):
    """Those of (1 - w) KL(p || q) + w KL(q || p) with a constant w, to rounding; with the late reduction too."""
    student, h, teacher, h_t = problem(rows=4, vocabulary=50, spread=1.0, dtype=torch.float64, softcap=3.0)
    h_t = h_t.double()
    twin = h.clone().requires_grad_()
    z_s, z_t = logits64(twin, student) / 0.8, logits64(h_t, teacher) / 0.8
    value = divergence64(z_s, z_t, "gated_kl", gate=gate)
    value.sum().backward()
    for reduction in ("sum", "none"):
        leaf = h.clone().requires_grad_()
        loss = fused_linear_divergence(
            leaf, student, h_t, teacher, divergence="gated_kl", gate=gate, temperature=0.8, reduction=reduction
        )
        loss.sum().backward()
        torch.testing.assert_close(loss.detach().sum(), value.detach().sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-10, atol=1e-12)


def test_cut_gradients_keep_their_digits_where_the_kl_is_small():
    """As those of the whole KL do: l is a difference of logits, not of log-probabilities."""
    student, h, teacher, h_t = problem(rows=4, vocabulary=2000, spread=0.01)
    options = {"k": 5, "tail": "renormalize"}
    leaf, h_t = (h * 1e-3).requires_grad_(), h_t * 1e-3
    twin = leaf.detach().double().requires_grad_()
    fused_linear_divergence(
        leaf, student, h_t, teacher, divergence="topk_reverse_kl", reduction="sum", **options
    ).backward()
    value = divergence64(logits64(twin, student), logits64(h_t, teacher), "topk_reverse_kl", **options)
    value.sum().backward()
    assert float(value.mean()) < 1e-9
    assert float((leaf.grad - twin.grad).norm()) < 1e-4 * float(twin.grad.norm())


@pytest.mark.parametrize("share", [1e-12, 1e-6, 1 - 1e-6])
@pytest.mark.parametrize("forbids", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "parameter"), [("jsd", "beta"), ("skew_reverse_kl", "alpha"), ("skew_forward_kl", "alpha")]
)
def test_mixtures_near_their_ends_in_float64(name, parameter, forbids, share):
    """What is left of 1 + expm1 where one side forbids a token is the share itself, to all its digits."""
    student, h, teacher, h_t = problem(rows=4, vocabulary=50, spread=1.0, dtype=torch.float64)
    forbidden = torch.zeros(50, dtype=torch.float64).masked_fill(torch.arange(50) % 7 == 0, -INF)
    bias = {forbids: forbidden}
    heads = [LMHead(head.weight, bias.get(side)) for side, head in (("student", student), ("teacher", teacher))]
    leaf, twin = h.clone().requires_grad_(), h.clone().requires_grad_()
    loss = fused_linear_divergence(
        leaf, heads[0], h_t.double(), heads[1], divergence=name, reduction="sum", **{parameter: share}
    )
    loss.backward()
    # The mixture from its parts, each of which keeps its digits.
    p, q = (logits64(x, head).softmax(-1) for x, head in ((twin, heads[0]), (h_t.double(), heads[1])))
    of_p, of_q = (share, 1 - share) if name == "skew_reverse_kl" else (1 - share, share)
    m = of_p * p + of_q * q
    says = {side: forbidden == (0 if forbids == side else forbidden) for side in ("student", "teacher")}
    to_p, to_q = (
        (x[:, says[side]] * (x[:, says[side]] / m[:, says[side]]).log()).sum()
        for side, x in (("student", p), ("teacher", q))
    )
    value = {"jsd": of_q * to_q + of_p * to_p, "skew_reverse_kl": to_p, "skew_forward_kl": to_q}[name]
    value.backward()
    assert float(loss) == pytest.approx(float(value), rel=1e-12)
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-9, atol=1e-15)  # what autograd itself keeps


@pytest.mark.parametrize("tail", ["none", "renormalize", "bucket"])
def test_a_teacher_that_forbids_all_of_the_students_top_is_infinite(tail, backend):
    student, h, teacher, h_t = problem(rows=3, vocabulary=64)
    bias = torch.zeros(64)
    bias[(h[0] @ student.weight.T).topk(3).indices] = -INF
    h_leaf = h.clone().requires_grad_()
    kl = fused_linear_divergence(
        h_leaf, student, h_t, LMHead(teacher.weight, bias), divergence="topk_reverse_kl", k=3, tail=tail,
        reduction="none", backend=backend,
    )  # fmt: skip
    kl.backward(torch.ones(3))
    assert kl[0] == INF and not kl.isnan().any()
    assert not h_leaf.grad[0].any() and h_leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, row in DIVERGENCES.items() if row.code is not None])
def test_identical_models_have_no_loss_and_no_gradient(name, backend):
    student, h, _, _ = problem()
    h_leaf = h.clone().requires_grad_()
    loss, stats = fused_linear_divergence(
        h_leaf, student, h, student, divergence=name, return_stats=True, backend=backend
    )
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9 and h_leaf.grad.abs().max() < 1e-7
    assert (stats.top1_agreement == 1).all()
    assert stats.gate is None or (stats.gate < 1e-6).all()
    if name == "reverse_kl":
        assert loss == 0 and not h_leaf.grad.any()


def test_the_reverse_kl_is_the_default():
    student, h, teacher, h_t = problem()
    assert torch.equal(
        fused_linear_divergence(h, student, h_t, teacher), fused_linear_reverse_kl(h, student, h_t, teacher)
    )


def test_the_papers_truncated_loss_is_what_their_code_computes():
    """Full-vocabulary log-softmax of both, gathered at the student's top k, sum of p (log p - log q)."""
    student, h, teacher, h_t = problem(rows=4)
    log_p, log_q = (h @ student.weight.T / 0.7).log_softmax(-1), (h_t @ teacher.weight.T / 0.7).log_softmax(-1)
    chosen = log_p.topk(32, dim=-1).indices
    log_p, log_q = log_p.gather(-1, chosen), log_q.gather(-1, chosen)
    theirs = (log_p.exp() * (log_p - log_q)).sum(-1)
    ours = fused_linear_divergence(
        h, student, h_t, teacher, divergence="topk_reverse_kl", k=32, temperature=0.7, reduction="none"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "kl"}, ["divergence", "'reverse_kl'"]),
        ({"divergence": "jsd", "beta": 1.5}, ["beta", "1e-12..1"]),
        ({"divergence": "skew_reverse_kl", "alpha": 1.0}, ["alpha", "1 excluded"]),
        ({"divergence": "skew_forward_kl", "alpha": float("nan")}, ["alpha"]),
        ({"divergence": "topk_reverse_kl", "k": 0}, ["k is 0", "positive"]),
        ({"divergence": "topk_reverse_kl", "k": 2.5}, ["k is 2.5"]),
        ({"divergence": "topk_reverse_kl", "tail": "drop"}, ["tail", "'bucket'"]),
        ({"divergence": "gated_kl", "gate": "js"}, ["gate is 'js'", "'kl', 'tv'"]),
    ],
)
def test_bad_options_say_what_and_what_instead(options, words):
    student, h, teacher, h_t = problem(rows=3)
    with pytest.raises(ValueError) as error:
        fused_linear_divergence(h, student, h_t, teacher, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_the_page_and_the_docstring_name_every_divergence_and_parameter():
    """And every parameter is a keyword with the table's default."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "loss.md").read_text()
    signature = inspect.signature(fused_linear_divergence).parameters
    for name, row in DIVERGENCES.items():
        assert f'"{name}"' in fused_linear_divergence.__doc__
        (line,) = [line for line in page.splitlines() if line.startswith(f'| `"{name}"` |')]
        assert all(f"`{parameter}`" in line for parameter in row.parameters), line
    for name, parameter in PARAMETERS.items():
        assert signature[name].default == parameter.default
        assert any(name in row.parameters for row in DIVERGENCES.values())


def test_a_parameter_of_another_divergence_is_told():
    defaults = {name: parameter.default for name, parameter in PARAMETERS.items()}
    assert unused_parameter("jsd", defaults | {"beta": 0.3}) is None
    assert unused_parameter("jsd", defaults | {"alpha": 0.3}) == "alpha"
    assert unused_parameter("topk_reverse_kl", defaults | {"k": 3, "tail": "bucket"}) is None
    assert unused_parameter("gated_kl", defaults | {"gate": "tv"}) is None
    assert unused_parameter("jsd", defaults | {"gate": "tv"}) == "gate"
    assert check_divergence("jsd", defaults | {"beta": 1}) == ("reverse_kl", 0.0, "")
    assert check_divergence("topk_reverse_kl", defaults | {"k": 3}) == ("topk_reverse_kl", 3.0, "none")
