"""Shared prompts on a CUDA device: both pairs of kernels against separate copies and against explicit scores."""

from __future__ import annotations

import pytest
import torch
from shared_prompt_runs import both, make_samples, run
from tiny_models import CONFIGS, tiny_model
from tree_oracle import HEADS, LENGTHS, PARENT, dense, in_given_order, make_qkv

from opcd_fast.attention import tree_row
from opcd_fast.attention.pairs import DensePair, VarlenPair, pair_for
from opcd_fast.data import pack

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_explicit_scores(heads, window, dtype):
    tokens = sum(LENGTHS)
    row = tree_row(torch.tensor([0, *LENGTHS]).cumsum(0), torch.tensor(PARENT), tokens, torch.device("cuda"))
    given = [x.detach().cuda().requires_grad_() for x in make_qkv(tokens, heads, d=64, dtype=dtype)]
    assert isinstance(pair_for(given[0]), DensePair if dtype == torch.float32 else VarlenPair)
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    got, expected = in_given_order(*given, row, 0.125, window), dense(*exact, 0.125, window)
    grad_out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    grads = torch.autograd.grad(got, given, grad_out.cuda())
    wanted = torch.autograd.grad(expected, exact, grad_out.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for result, reference in zip((got, *grads), (expected, *wanted), strict=True):
        assert (result.double().cpu() - reference).norm() <= tolerance * reference.norm().clamp_min(1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_equals_separate_copies(name, dtype, checkpointing):
    model = tiny_model(name).to("cuda", dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    (got, grads), (expected, wanted) = both(model, make_samples(), device="cuda")
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert (got - expected).float().norm() <= tolerance * expected.float().norm()
    for parameter in wanted:
        difference = (grads[parameter] - wanted[parameter]).float().norm()
        assert difference <= tolerance * wanted[parameter].float().norm().clamp_min(1e-3), parameter


def test_autocast_over_fp32_weights():
    model = tiny_model().cuda()
    exact = run(model, pack(make_samples()).to(torch.device("cuda")))
    with torch.autocast("cuda", torch.bfloat16):
        shared, copies = (
            run(model, pack(make_samples(), share_prompts=s).to(torch.device("cuda"))) for s in (True, False)
        )
    assert (shared - exact).norm() <= 1.5 * (copies - exact).norm()
    shared.square().sum().backward()
