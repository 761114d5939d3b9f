"""The block of memory that stays between calls on a device: whose it is meanwhile, how large it grows, when it goes.

What decides whether a device keeps it is replaced, so that all of it runs on a CPU.
"""

import threading

import pytest
import torch
from loss_oracle import states

from opcd_fast.loss import LMHead, fused_linear_divergence, fused_linear_reverse_kl, release_workspace
from opcd_fast.loss.chunks import buffers, loop


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    monkeypatch.setattr(buffers, "_place", lambda device, nbytes: (device, 0))
    release_workspace()
    yield buffers._kept
    release_workspace()


def problem(rows, seed=0):
    h, w, h_t = states(rows, 16, 701, 0.3, torch.float32, seed=seed)
    return h.requires_grad_(), w.requires_grad_(), h_t


def gradients(h, w, h_t, **options):
    return torch.autograd.grad(fused_linear_reverse_kl(h, w, h_t, w.detach(), **options), (h, w))


def test_calls_take_turns_with_one_block_that_only_grows(kept):
    seen = []
    for rows in (9, 40, 5, 40, 9):
        found = gradients(*problem(rows))
        (block,) = kept.values()
        seen.append((len(block), block.data_ptr()))
        block.fill_(255)  # NaN, should anything of it be read
        assert all(map(torch.equal, found, gradients(*problem(rows)))) and found[0].isfinite().all()
    assert seen[0][0] < seen[1][0] and len(set(seen[1:])) == 1
    release_workspace()
    assert not kept


def test_a_second_loss_before_the_first_ones_backward():
    first, second = problem(9, seed=1), problem(33, seed=2)
    alone = [gradients(*one, reduction=kind) for one, kind in ((first, "mean"), (second, "sum"))]
    one = fused_linear_reverse_kl(*first, first[1].detach())
    other = fused_linear_reverse_kl(*second, second[1].detach(), reduction="sum")
    late = fused_linear_reverse_kl(*first, first[1].detach(), reduction="none")
    found = [torch.autograd.grad(one, first[:2]), torch.autograd.grad(other, second[:2])]
    for ours, theirs in zip(found, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
    again = torch.autograd.grad(late.mean(), first[:2])  # computes its logits now
    for ours, theirs in zip(again, alone[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_a_call_in_another_thread_gets_its_own(monkeypatch, kept):
    """Both are between their products and their row operation at the same time."""
    problems = [problem(9, seed=seed) for seed in range(2)]
    alone = [gradients(*one, backend="torch") for one in problems]
    assert kept
    meet, rows, found = threading.Barrier(2, timeout=30), loop.divergence_rows, [None, None]

    def slowly(*arguments):
        meet.wait()
        rows(*arguments)
        meet.wait()

    monkeypatch.setattr(loop, "divergence_rows", slowly)

    def work(i):
        found[i] = gradients(*problems[i], backend="torch")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, alone, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert len(kept) == 1


def test_differences_use_it_too_and_give_it_to_the_rows_that_are_repeated(kept):
    h, w, h_t = (x.detach().bfloat16() for x in problem(9))
    h.requires_grad_()
    options = {"projection": "difference", "token_ids": torch.full((9,), -100), "return_stats": True}
    loss, stats = fused_linear_divergence(h, LMHead(w), h_t, LMHead(w), **options)
    exact = fused_linear_reverse_kl(h, w, h_t, w)
    assert stats.projection == "difference" and len(kept) == 1
    torch.testing.assert_close(loss, exact, rtol=3e-3, atol=1e-6)


def test_nothing_is_kept_after_an_error(monkeypatch, kept):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "divergence_rows", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(*problem(9))
    assert not kept


def test_a_compiled_call_keeps_nothing(kept):
    """What compiles it may run it in memory of its own, which it gives back."""
    h, w, h_t = problem(9)
    call = torch.compile(lambda: fused_linear_reverse_kl(h, w, h_t, w.detach()), backend="aot_eager", fullgraph=True)
    torch.autograd.grad(call(), (h, w))
    assert not kept


def test_buffers_do_not_overlap():
    shapes = ((3, 5), torch.float32), ((0, 4, 4), torch.float64), ((7,), torch.bfloat16), ((2, 9), torch.float64)
    with buffers.borrowed(torch.device("cpu"), *shapes, keep=True) as cut:
        for number, tensor in enumerate(cut):
            tensor.fill_(number)
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in cut] == list(shapes)
        assert all(bool((tensor == number).all()) for number, tensor in enumerate(cut))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in cut)
