"""Random calls of the fused loss: each is right to what its arithmetic allows, or an error that names an argument."""

import pytest
import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import SLACK, exact, precision

from opcd_fast.loss import LMHead, fused_linear_divergence

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def leaf(x: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    return x if x is None else x.detach().requires_grad_(wanted)


def close(found: torch.Tensor, wanted: torch.Tensor, error: torch.Tensor, what: str, case: Case) -> None:
    """Rounded once more, to the type that it came in."""
    info = torch.finfo(found.dtype)
    error = error + wanted.abs() * info.eps + info.smallest_normal * info.eps
    wrong = ~((found.double() - wanted).abs() <= error)
    worst = ((found.double() - wanted).abs() / error)[wrong]
    assert not wrong.any(), f"{what}: {found[wrong][:3]} for {wanted[wrong][:3]}, {worst.amax():.3g} bounds, in {case}"


def check(case: Case) -> None:
    h_s, head_s, h_t, head_t, weights = case.tensors()
    trained = case.trained
    h, w, b = leaf(h_s, trained[0]), leaf(head_s.weight, trained[1]), leaf(head_s.bias, trained[2])
    head = LMHead(w, b, head_s.scale, head_s.softcap, head_s.vocab_size)
    try:
        loss, stats = fused_linear_divergence(
            h, head, h_t, head_t, token_weights=weights, return_stats=True, **case.options
        )
    except ValueError as error:
        wide = torch.float64 in (h.dtype, w.dtype, h_t.dtype, head_t.weight.dtype)
        if "workspace_bytes" in str(error) or wide and "backend='native'" in str(error):
            return
        raise AssertionError(f"{error} in {case}") from error
    rows = torch.ones(case.leading) if weights is None else weights
    rows = rows.double().flatten()
    used = rows != 0
    found = exact(case, h_s.reshape(-1, h_s.shape[-1])[used], head_s, h_t.reshape(-1, h_t.shape[-1])[used], head_t)
    if found.ambiguous.any():
        return
    reduction, denominator = case.options["reduction"], case.options.get("denominator", rows.sum())
    factor = 1.0 / float(denominator) if reduction == "mean" and used.any() else 1.0
    value = torch.zeros(len(rows), dtype=torch.float64).masked_scatter(used, found.value)
    error = torch.zeros_like(value).masked_scatter(used, found.value_error)
    infinite = value == torch.inf
    tokens = stats.token_kl.flatten()
    assert torch.equal(tokens == torch.inf, infinite), f"infinite rows {tokens} for {value} in {case}"
    assert not tokens[~used].any()
    close(tokens[~infinite], value[~infinite], error[~infinite], "token_kl", case)
    assert (tokens >= 0).all() or case.options.get("tail") == "none"
    if reduction == "none":
        assert loss.shape == case.leading and torch.equal(loss.detach().flatten().float(), tokens.float())
    elif infinite.any():
        assert float(loss) == torch.inf
    else:
        sum_error = (rows * error).sum() + SLACK * precision(loss.dtype) * (rows * value.abs()).sum()
        close(loss.detach(), factor * (rows * value).sum(), factor * sum_error, "loss", case)
    if not loss.requires_grad:
        assert not any(trained[: 2 + (b is not None)])
        return
    upstream = torch.full_like(loss, case.upstream) if reduction != "none" else torch.linspace(
        0.5, case.upstream, len(rows)).to(loss.dtype).reshape(loss.shape)  # fmt: skip
    loss.backward(upstream)
    multiplied = upstream.double().flatten() if reduction == "none" else rows * case.upstream * factor
    check_gradients(case, found, multiplied[used], used, h_s, head_s, (h, w, b))


def check_gradients(case, found, multiplied, used, h_s, head_s, leaves) -> None:
    eps, size = precision(h_s.dtype, head_s.weight.dtype), head_s.valid_size
    rows, w64 = h_s.reshape(-1, h_s.shape[-1]), head_s.weight[:size].double()
    g, error = found.g * multiplied[:, None], found.g_error * multiplied.abs()[:, None]
    error = error + SLACK * eps * g.abs()
    h64 = rows[used].double()
    added = SLACK * eps * size**0.5
    dh, dh_error = g @ w64, error @ w64.abs() + added * (g.abs() @ w64.abs())
    whole = torch.zeros(len(used), w64.shape[1], dtype=torch.float64)
    dh, dh_error = (whole.masked_scatter(used[:, None], x) for x in (dh, dh_error))
    added = SLACK * eps * max(1, len(g)) ** 0.5
    dw, dw_error = g.T @ h64, error.T @ h64.abs() + added * (g.abs().T @ h64.abs())
    db, db_error = g.sum(0), error.sum(0) + added * g.abs().sum(0)
    for x, wanted, bound, what in zip(leaves, (dh, dw, db), (dh_error, dw_error, db_error), ("dh", "dw", "db")):
        if x is None or not x.requires_grad:
            assert x is None or x.grad is None
            continue
        gradient = x.grad.reshape(-1, x.shape[-1]) if what == "dh" else x.grad
        if what != "dh":
            assert not gradient[size:].any()
            gradient = gradient[:size]
        close(gradient, wanted, bound, what, case)


@examples(500)
@given(cases())
def test_of_torch_and_native(case):
    check(case)


@examples(20)
@given(cases(backends=("triton",)))
def test_of_triton(case):
    pytest.importorskip("triton")
    kinds = {kind for side in (case.student, case.teacher) for kind in (side.dtype, side.weight_dtype)}
    if torch.float64 not in kinds:
        check(case)
