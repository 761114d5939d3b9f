"""projection="dual" through the public function: float64 autograd, accuracy of float32 logits, refusals."""

import pytest
import torch
from loss_oracle import logits64, relative_error, states, token_kl64

from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_reverse_kl

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0, 2.0])


def problem(spread=0.3, vocabulary=701, width=16):
    h, w, h_t = states(11, width, vocabulary, spread, torch.float32)
    return h, w, h_t


def run(h, head, h_t, teacher, projection="dual", **options):
    leaf = h.clone().requires_grad_()
    weight = head.weight.clone().requires_grad_()
    bias = None if head.bias is None else head.bias.clone().requires_grad_()
    student = LMHead(weight, bias, head.scale, head.softcap, head.vocab_size)
    loss, stats = fused_linear_reverse_kl(
        leaf, student, h_t, teacher, backend="triton", projection=projection, return_stats=True, **options
    )
    loss.backward()
    return loss.detach(), stats, [leaf.grad, weight.grad] + ([] if bias is None else [bias.grad])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("workspace", [None, 60_000])
def test_gradients_and_statistics(shared, workspace):
    h, w, h_t = problem()
    g = torch.Generator().manual_seed(1)
    student = LMHead(w) if shared else LMHead(w, torch.randn(701, generator=g), 0.5, 6.0, vocab_size=690)
    if shared:
        teacher = student
    else:
        h_t, teacher = states(11, 24, 720, 0.3, torch.float32, seed=4)[0], None
        teacher = LMHead(states(11, 24, 720, 0.3, torch.float32, seed=4)[1], scale=1.2, vocab_size=690)
    loss, stats, gradients = run(
        h, student, h_t, teacher, token_weights=WEIGHTS, temperature=0.8, workspace_bytes=workspace
    )
    h64, w64 = h.double().requires_grad_(), w.double().requires_grad_()
    b64 = None if student.bias is None else student.bias.double().requires_grad_()
    z_s = logits64(h64, LMHead(w64, b64, student.scale, student.softcap, student.vocab_size))
    kl = token_kl64(z_s, logits64(h_t, teacher), 0.8)
    exact = (kl * WEIGHTS).sum() / WEIGHTS.sum()
    exact.backward()
    assert float(loss) == pytest.approx(float(exact.detach()), rel=2e-3)
    torch.testing.assert_close(stats.token_kl.double(), kl.detach() * (WEIGHTS != 0), rtol=3e-3, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=z_s.detach() / 0.8).entropy()
    torch.testing.assert_close(stats.student_entropy.double(), entropy * (WEIGHTS != 0), rtol=1e-4, atol=1e-5)
    for ours, leaf in zip(gradients, [x for x in (h64, w64, b64) if x is not None], strict=True):
        assert relative_error(ours, leaf.grad) < 3e-3


@pytest.mark.parametrize("spread", [0.09, 0.0049])
def test_it_is_as_accurate_as_float32_logits_where_the_models_are_near(spread):
    h, w, h_t = problem(spread, vocabulary=2001)
    h64 = h.double().requires_grad_()
    token_kl64(logits64(h64, LMHead(w)), logits64(h_t, LMHead(w))).mean().backward()
    errors = [relative_error(run(h, LMHead(w), h_t, LMHead(w), p)[2][0], h64.grad) for p in ("dual", "fp32")]
    assert errors[0] < 1e-3 and errors[1] < 1e-3  # bf16 logits: 0.15 and more


def test_statistics_alone_store_no_logits():
    h, w, h_t = problem()
    with torch.no_grad():
        results = [
            fused_linear_reverse_kl(
                h, w, h_t, w, backend="triton", projection=p, return_stats=True, token_weights=WEIGHTS
            )
            for p in ("dual", "fp32")
        ]
    (loss, stats), (wanted, wanted_stats) = results
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    for name, value in vars(stats).items():
        torch.testing.assert_close(value, getattr(wanted_stats, name), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_refused():
    h, w, h_t = problem()
    for options, words in (
        ({"divergence": "jsd"}, ["reverse KL", "'jsd'"]),
        ({"backend": "torch"}, ["backend", "'fp32'"]),
        ({"projection": "both"}, ["projection", "'dual'"]),
    ):
        with pytest.raises(ValueError) as error:
            fused_linear_divergence(h, w, h_t, w, **{"backend": "triton", "projection": "dual", **options})
        assert all(word in str(error.value) for word in words), error.value
    for hidden, weight, words in ((h.bfloat16(), w, "cast"), (h[:, :15], w[:, :15], "16 bytes")):
        with pytest.raises(ValueError, match=words):
            fused_linear_reverse_kl(hidden, weight, hidden, weight, backend="triton", projection="dual")
