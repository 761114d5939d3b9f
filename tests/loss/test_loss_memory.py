"""What the loss allocates, counted by the allocator: workspace_bytes bounds it, whatever N is."""

import pytest
import torch
from memory_record import MB, peak_bytes

from opcd_fast.kernels.csrc import native
from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_reverse_kl

VOCABULARY, ROWS, WIDTH = 151_936, 4096, 16
SLACK = 2 * MB  # per-row statistics, weights and row numbers


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of short parallel regions wait for each other on a busy machine; one thread does not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(rows, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, WIDTH, generator=g).to(dtype).requires_grad_()
    w = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtype)
    return h, w, torch.randn(rows, WIDTH, generator=g).to(dtype)


def run(h, w, h_t, **options):
    loss = fused_linear_reverse_kl(h, w, h_t, LMHead(w.detach()), **options)
    if loss.requires_grad:
        loss.backward()
    return loss


def test_the_meter_sees_temporaries_and_what_is_freed():
    assert peak_bytes(lambda: torch.empty(MB, dtype=torch.uint8).add_(1)) >= MB
    assert 8 * MB <= peak_bytes(lambda: [(torch.zeros(MB) + 1).sum() for _ in range(3)]) < 9 * MB


@pytest.mark.parametrize("workspace", [256 * MB, None])
def test_peak_at_the_size_of_a_real_vocabulary(workspace):
    h, w, h_t = inputs(ROWS)
    peak = peak_bytes(lambda: run(h, w, h_t, workspace_bytes=workspace))
    bound = 1024 * MB if workspace is None else workspace
    gradients = 2 * h.numel() * 4  # in forward, and once more where something holds on to it
    assert peak <= bound + gradients + SLACK
    # The meter would have seen one whole (N, V) tensor: 2.3 GiB.
    assert bound < ROWS * VOCABULARY * 4


def test_peak_with_a_trained_head_in_bf16():
    h, w, h_t = inputs(256, torch.bfloat16)
    w.requires_grad_()
    peak = peak_bytes(lambda: run(h, w, h_t, workspace_bytes=64 * MB))
    # dW accumulates in float32 and is rounded once, into what becomes w.grad.
    gradients = w.numel() * (4 + 2) + 2 * h.numel() * 2
    assert peak <= 64 * MB + gradients + SLACK


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl"},
        {"divergence": "jsd"},
        {"divergence": "skew_reverse_kl"},
        {"divergence": "gated_kl"},
        {"divergence": "topk_reverse_kl"},
        {"divergence": "topk_reverse_kl", "k": 8192, "tail": "bucket"},
        {"divergence": "topk_reverse_kl", "k": 4096, "tail": "renormalize"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_divergence_stays_in_its_workspace(backend, options):
    if backend == "native" and not native.available():
        pytest.skip(native.status())
    g = torch.Generator().manual_seed(0)
    h = torch.randn(64, WIDTH, generator=g).requires_grad_()
    w, h_t = torch.randn(8192, WIDTH, generator=g), torch.randn(64, WIDTH, generator=g)
    # Logits 200 below the others: blocks in which probabilities underflow need the most.
    head = LMHead(w, torch.linspace(-200, 0, 8192), softcap=500.0)

    def call():
        loss = fused_linear_divergence(h, head, h_t, head, backend=backend, workspace_bytes=4 * MB, **options)
        loss.backward()

    call()
    small = 256 * 1024  # per-row statistics, the bias in float32
    assert peak_bytes(call) <= 4 * MB + 2 * h.numel() * 4 + small


def test_evaluation_needs_no_more_than_its_workspace():
    h, w, h_t = inputs(512)
    with torch.no_grad():
        assert peak_bytes(lambda: run(h, w, h_t, workspace_bytes=64 * MB)) <= 64 * MB + SLACK
