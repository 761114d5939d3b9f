"""Random calls of the losses beside the fused divergence, and arguments that are anything at all."""

import dataclasses
import math

import pytest
import torch
from cases import BACKENDS, cases, examples
from hypothesis import given
from hypothesis import strategies as st
from oracle import SLACK, exact, logits, precision
from test_loss_fuzz import close, leaf

from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_logprobs, reverse_kl


@examples(200)
@given(cases())
def test_logprobs(case):
    h, head, _, _, weights = case.tensors()
    g = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(0, head.valid_size, case.leading, generator=g)
    if weights is not None:
        ids = torch.where(weights == 0, -100, ids)
    used = (ids >= 0).flatten()
    options = {key: case.options[key] for key in ("temperature", "backend")}
    eps = precision(h.dtype, head.weight.dtype)
    if options["backend"] == "native" and eps < 2**-30:
        options["backend"] = "auto"
    h = leaf(h, case.trained[0])
    found = fused_linear_logprobs(h, head, ids, **options)
    assert found.shape == case.leading and not found.flatten()[~used].any()
    z = logits(h.detach().reshape(-1, h.shape[-1])[used], head, options["temperature"], eps)
    chosen = ids.flatten()[used, None]
    log_p = z.z.log_softmax(-1)
    wanted = log_p.gather(-1, chosen)[:, 0]
    error = SLACK * (2 * z.error.amax(-1) + eps * (z.z.amax(-1).abs() + 1 + wanted.abs().clamp(max=1e30)))
    said = wanted > -torch.inf
    got = found.detach().flatten()[used]
    assert torch.equal(got > -torch.inf, said)
    close(got[said], wanted[said], error[said], "log p", case)
    if not found.requires_grad or not said.all():
        return
    found.backward(torch.full_like(found, case.upstream))
    p = log_p.exp()
    g = (torch.zeros_like(p).scatter(-1, chosen, 1.0) - p) * case.upstream
    g_error = SLACK * abs(case.upstream) * (p + (g != 0)) * (z.error.amax(-1, keepdim=True) * 2 + 4 * eps)
    w = head.weight[: head.valid_size].double()
    dh = (g * z.slope) @ w
    bound = (g_error * (z.slope.abs() + z.slope_error) + g.abs() * z.slope_error) @ w.abs()
    bound = bound + SLACK * eps * head.valid_size**0.5 * ((g * z.slope).abs() @ w.abs())
    close(h.grad.reshape(-1, h.shape[-1])[used], dh, bound, "dh", case)


@examples(200)
@given(cases())
def test_of_logits(case):
    """As a head whose weight is the identity."""
    case = dataclasses.replace(
        case, vocabulary=min(case.vocabulary, 40), options={**case.options, "divergence": "reverse_kl"}
    )
    h_s, head_s, h_t, head_t, weights = case.tensors()
    z_s, z_t = ((h.double() @ head.weight[: case.vocabulary].double().T) for h, head in ((h_s, head_s), (h_t, head_t)))
    z_s, z_t = leaf(z_s.to(h_s.dtype), True), z_t.to(h_t.dtype)
    options = {key: case.options[key] for key in ("temperature", "reduction", "denominator") if key in case.options}
    loss = reverse_kl(z_s, z_t, token_weights=weights, **options)
    rows = (torch.ones(case.leading) if weights is None else weights).double().flatten()
    used = rows != 0
    sides = [z.detach().reshape(-1, case.vocabulary)[used] for z in (z_s, z_t)]
    head = LMHead(torch.eye(case.vocabulary))
    found = exact(case, sides[0], head, sides[1], head)
    if options["reduction"] == "none":
        close(loss.detach().flatten()[used], found.value, found.value_error, "loss", case)
        loss.sum().backward()
        factor = torch.ones(len(found.value), dtype=torch.float64)
    else:
        total = float(options.get("denominator", rows.sum())) if options["reduction"] == "mean" else 1.0
        factor = rows[used] / total if used.any() else rows[used]
        error = (factor * found.value_error).sum() + SLACK * precision(loss.dtype) * (factor * found.value).sum()
        close(loss.detach(), (factor * found.value).sum(), error, "loss", case)
        loss.backward()
    gradient = z_s.grad.reshape(-1, case.vocabulary)
    assert not gradient[~used].any()
    wanted, error = found.g * factor[:, None], found.g_error * factor[:, None]
    close(gradient[used], wanted, error + SLACK * precision(loss.dtype) * wanted.abs(), "gradient", case)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.sampled_from(["auto", "torch", "mean", "sum", "none", "jsd", "bucket", "tv", "separate", *BACKENDS]),
    st.builds(
        lambda shape, kind: torch.ones(shape).to(kind), st.sampled_from([(), (1,), (3,), (3, 4), (7, 4), (0, 4)]),
        st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.complex64]),
    ),
)  # fmt: skip
HEADS = ("weight", "bias", "scale", "softcap", "vocab_size", "group")
ARGUMENTS = (
    "student_hidden", "student_head", "teacher_hidden", "teacher_head", "divergence", "beta", "alpha", "k", "tail",
    "gate", "token_weights", "temperature", "reduction", "denominator", "workspace_bytes", "backend", "projection",
    "token_ids", *HEADS,
)  # fmt: skip
OTHER_NAMES = {"weight": "student_hidden", "vocab_size": "vocabulary", "student_head": "student_hidden"}


@examples(950)
@given(st.sampled_from(ARGUMENTS), JUNK, st.sampled_from(["jsd", "skew_reverse_kl", "topk_reverse_kl", "gated_kl"]))
def test_whatever_an_argument_is_it_is_taken_or_named(name, junk, divergence):
    g = torch.Generator().manual_seed(0)
    h, w, h_t = (torch.randn(n, 4, generator=g) for n in (3, 7, 3))
    options = {
        "divergence": divergence,
        "student_hidden": h,
        "student_head": w,
        "teacher_hidden": h_t,
        "teacher_head": w,
    }
    try:
        if name in HEADS:
            options["student_head"] = LMHead(**{"weight": w, name: junk})
            options["teacher_head"] = LMHead(w, vocab_size=options["student_head"].vocab_size)
        else:
            options[name] = junk
        loss = fused_linear_divergence(**options)
    except (ValueError, TypeError) as error:
        if not any(word in str(error) for word in (name, name.split("_")[-1], OTHER_NAMES.get(name, name))):
            raise
    else:
        assert math.isfinite(float(loss.sum())) or isinstance(junk, (int, float)), (name, junk)


@pytest.mark.parametrize("name", ARGUMENTS[4:18])
def test_what_is_taken_above_is_not_everything(name):
    with pytest.raises((ValueError, TypeError), match=name):
        fused_linear_divergence(torch.ones(3, 4), torch.ones(7, 4), torch.ones(3, 4), torch.ones(7, 4), **{name: {}})
